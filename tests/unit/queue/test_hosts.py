"""The hosts of an exports directory: each says that it is there, and every one sees all."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.queue import hosts, requests
from hyper2kvmd.queue.hosts import Beat, Seen, draining_all
from hyper2kvmd.queue.names import DRAIN, HOSTS
from hyper2kvmd.settings.model import Settings


def beat(host: str = "kvm1", **changes: Any) -> Beat:
    return replace(Beat(host, "running", 30.0, time.time(), workers=2, output_free=10, kvm=True), **changes)


def said(settings: Settings, host: str, ago: float) -> None:
    """A host says that it is there, so many seconds ago."""
    hosts.beat(settings, beat(host))
    then = time.time() - ago
    os.utime(settings.exports_dir / HOSTS / f"{host}.json", (then, then))


def states(settings: Settings) -> dict[str, str]:
    return {seen.beat.host: seen.state for seen in hosts.all_hosts(settings, time.time())}


def test_what_a_host_says_of_itself_is_what_the_others_read(scratch: Settings) -> None:
    assert [] == hosts.all_hosts(scratch, time.time())
    told = beat(waits={"web01": "too large"}, memory_mb=8000)
    hosts.beat(scratch, told)
    (seen,) = hosts.all_hosts(scratch, time.time())
    assert told == seen.beat
    assert ("running", False) == (seen.state, seen.gone)
    assert ["kvm1.json"] == os.listdir(scratch.exports_dir / HOSTS)


def test_a_host_is_gone_when_it_has_missed_three_beats_and_not_before(scratch: Settings) -> None:
    said(scratch, "late", 80)
    said(scratch, "dead", 100)
    assert {"late": "running", "dead": "gone"} == states(scratch)


def test_a_daemon_that_was_stopped_is_not_gone_however_long_ago(scratch: Settings) -> None:
    hosts.beat(scratch, beat(state="stopped"))
    (seen,) = hosts.all_hosts(scratch, time.time() + 1e6)
    assert ("stopped", False) == (seen.state, seen.gone)


def test_one_host_can_be_drained_and_the_others_go_on(scratch: Settings) -> None:
    hosts.beat(scratch, beat("kvm1"))
    hosts.beat(scratch, beat(hosts.this_host()))
    requests.ask(scratch.exports_dir, hosts.drain_request("kvm1"))
    assert {"kvm1": "draining", hosts.this_host(): "running"} == states(scratch)
    assert {"kvm1"} == hosts.drained_hosts(scratch)
    assert not requests.draining(scratch)
    requests.ask(scratch.exports_dir, hosts.drain_request(hosts.this_host()))
    assert requests.draining(scratch)
    assert not draining_all(scratch)


def test_a_drain_of_all_hosts_shows_before_they_say_so(scratch: Settings) -> None:
    hosts.beat(scratch, beat("kvm1"))
    hosts.beat(scratch, beat("kvm2", state="stopped"))
    requests.ask(scratch.exports_dir, DRAIN)
    assert {"kvm1": "draining", "kvm2": "stopped"} == states(scratch)


def test_a_runner_says_it_where_there_is_no_daemon_and_not_where_there_is(scratch: Settings) -> None:
    hosts.beat_for_runner(scratch, 60.0)
    assert {hosts.this_host(): "runner"} == states(scratch)
    hosts.beat(scratch, beat(hosts.this_host()))
    hosts.beat_for_runner(scratch, 60.0)
    assert {hosts.this_host(): "running"} == states(scratch)
    said(scratch, hosts.this_host(), 1000)
    hosts.beat_for_runner(scratch, 60.0)
    assert {hosts.this_host(): "runner"} == states(scratch)


def test_a_host_without_a_daemon_is_not_gone_when_its_job_is_over(scratch: Settings) -> None:
    hosts.beat_for_runner(scratch, 60.0)
    (seen,) = hosts.all_hosts(scratch, time.time() + 1e6)
    assert ("runner", False, True) == (seen.state, seen.gone, seen.late)


def test_that_no_host_starts_jobs_is_a_reason_to_wait(scratch: Settings) -> None:
    def reason(*said: Beat, drained: bool = False) -> str:
        found = hosts.untaken(Path("/exports/web01"), [Seen(one, 1.0, drained) for one in said])
        return "" if found is None else found.message

    assert "" == reason(), "nobody ever said that he is there: somebody may migrate by hand"
    assert "" == reason(beat("kvm1"), beat("kvm2", state="stopped"))
    assert "no host starts jobs: kvm1 is draining, kvm2 is stopped" == reason(
        beat("kvm1", state="draining"), beat("kvm2", state="stopped"), beat("kvm3", state="runner")
    )
    assert "no host starts jobs: kvm1 is draining" == reason(beat("kvm1"), drained=True)
    assert "" == reason(beat("kvm1", engine="slurm"), drained=True), "it submits jobs for others"
    assert "no host starts jobs" == reason(beat("kvm3", state="runner"))


def test_a_clock_that_is_ahead_is_told_from_the_file_servers(scratch: Settings) -> None:
    hosts.beat(scratch, beat(clock=time.time() + 100))
    (seen,) = hosts.all_hosts(scratch, time.time())
    assert pytest.approx(100, abs=5) == hosts.skew(seen, time.time())


def test_a_host_is_forgotten_until_it_says_something(scratch: Settings) -> None:
    hosts.beat(scratch, beat())
    assert hosts.forget(scratch, "kvm1")
    assert not hosts.forget(scratch, "kvm1")
    assert {} == states(scratch)
    hosts.beat(scratch, beat())
    assert {"kvm1": "running"} == states(scratch)


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", ".hidden", "", "ü" * 300, "a\nb"])
def test_no_name_of_a_host_leads_out_of_the_directory(scratch: Settings, name: str) -> None:
    hosts.beat(scratch, beat(name))
    (file,) = os.listdir(scratch.exports_dir / HOSTS)
    assert file.endswith(".json")
    assert not file.startswith(".")
    assert [HOSTS] == os.listdir(scratch.exports_dir)
    (seen,) = hosts.all_hosts(scratch, time.time())
    assert seen.beat.host.isprintable()


def test_a_newer_version_may_say_more(scratch: Settings) -> None:
    hosts.beat(scratch, beat())
    path = scratch.exports_dir / HOSTS / "kvm1.json"
    path.write_text(json.dumps({**asdict(beat()), "colour": "blue", "version": "9.9.9"}))
    (seen,) = hosts.all_hosts(scratch, time.time())
    assert "9.9.9" == seen.beat.version


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers())


@given(key=st.sampled_from([*asdict(Beat("h", "running", 1, 1))]), value=values | st.dictionaries(st.text(), values))
def test_values_of_other_types_do_no_harm(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    settings = Settings(exports_dir=tmp_path_factory.mktemp("exports"))
    hosts.make_directory(settings)
    path = settings.exports_dir / HOSTS / "kvm1.json"
    path.write_text(json.dumps({**asdict(beat()), key: value}))
    for seen in hosts.all_hosts(settings, time.time()):
        assert isinstance(seen, Seen)
        assert all(isinstance(text, str) and text.isprintable() for text in (seen.beat.host, seen.state))
        assert all(isinstance(text, str) for text in seen.beat.waits.values())


def test_what_is_not_a_file_of_ours_is_no_host(scratch: Settings) -> None:
    hosts.make_directory(scratch)
    directory = scratch.exports_dir / HOSTS
    (directory / "noise.json").write_bytes(b"\xff{")
    (directory / "dir.json").mkdir()
    (directory / "link.json").symlink_to("/etc/passwd")
    os.mkfifo(directory / "pipe.json")
    (directory / ".kvm9.json.77.tmp").write_text("{}")
    assert [] == hosts.all_hosts(scratch, time.time())


def test_an_unwritable_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "exports").write_text("a file")
    with pytest.raises(OSError, match="Not a directory"):
        hosts.beat(Settings(exports_dir=tmp_path / "exports"), beat())
