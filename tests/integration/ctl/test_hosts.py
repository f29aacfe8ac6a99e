"""`hyper2kvmctl hosts`, what `list` and `show` say of jobs anywhere, and draining one host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd import __version__
from hyper2kvmd.queue import hosts
from hyper2kvmd.queue.hosts import Beat, this_host
from hyper2kvmd.queue.names import HOSTS, PROGRESS
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, report_of, run_job
from tests.integration.daemon.test_daemon import change, daemon, done, free_port, look_again, wait_until


def rows(ctl: Ctl, *words: str) -> dict[str, Any]:
    said = json.loads(ctl("hosts", "--json", *words).stdout)
    return {row["host"]: row for row in said["hosts"]} | {"findings": said["findings"]}


def in_list(ctl: Ctl, *words: str) -> dict[str, Any]:
    """The rows of `list`, by the names of the exports."""
    return {Path(row["export"]).name: row for row in json.loads(ctl("list", "--json", *words).stdout)}


@pytest.fixture
def gate(fake: Callable[[str, str], None], tmp_path: Path) -> Path:
    """Every conversion waits until this file is there."""
    path = tmp_path / "gate"
    wait = f'[ "$1" = convert ] && while [ ! -e {path} ]; do sleep 0.1; done\n'
    fake("qemu-img", wait + 'exec /usr/bin/qemu-img "$@"\n')
    return path


def test_a_host_is_listed_while_its_daemon_runs_and_after_that_as_stopped(scratch: Settings, ctl: Ctl) -> None:
    with daemon(scratch):
        wait_until(lambda: this_host() in rows(ctl))
        row = rows(ctl)[this_host()]
        assert ("running", 0, 2, __version__) == (row["state"], row["jobs"], row["workers"], row["version"])
        assert row["output_free_bytes"] > 0
        assert row["memory_mb"] > 0
        assert row["seen_seconds_ago"] < 60
        table = ctl("hosts").stdout
        assert this_host() in table
        assert "running" in table
    assert "stopped" == rows(ctl)[this_host()]["state"]
    assert [] == rows(ctl)["findings"]


def test_a_host_that_died_another_version_and_a_wrong_clock_are_named_with_what_to_do(
    scratch: Settings, ctl: Ctl
) -> None:
    now = time.time()
    hosts.beat(scratch, Beat("dead", "running", 10, now - 1000))
    os.utime(scratch.exports_dir / HOSTS / "dead.json", (now - 1000, now - 1000))
    hosts.beat(scratch, Beat("old", "running", 1000, now, version="0.0.1"))
    hosts.beat(scratch, Beat("fast", "running", 1000, now + 300))
    hosts.beat(scratch, Beat("off", "stopped", 10, now + 300))  # said when it was, and its clock may be right by now
    os.utime(scratch.exports_dir / HOSTS / "off.json", (now - 1000, now - 1000))
    found = rows(ctl)
    assert ("gone", "running", "running") == tuple(found[name]["state"] for name in ("dead", "old", "fast"))
    codes = {finding["code"]: finding["message"] for finding in found["findings"]}
    assert {"host_gone", "host_version", "host_clock"} == {*codes}
    assert codes["host_clock"].startswith("the clock of fast is 5 min ahead of")
    assert 0 == ctl("hosts", "--forget", "dead").returncode
    assert "dead" not in rows(ctl)
    assert 3 == ctl("hosts", "--forget", "dead").returncode


def test_every_host_sees_how_far_a_job_is_and_nothing_of_it_is_left(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, gate: Path
) -> None:
    export = make_export()
    job = _by_hand(export, scratch)
    try:
        wait_until(lambda: "convert" in str(in_list(ctl)["web01"]["progress"]), 60)
        progress = in_list(ctl)["web01"]["progress"]
        assert (this_host(), 1, ["convert"]) == (
            progress["host"],
            progress["attempt"],
            [stage["stage"] for stage in progress["stages"]],
        )
        assert f"convert 0 % on {this_host()}" in ctl("list").stdout
        assert f"convert 0 % on {this_host()}" in ctl("show", "web01").stdout
        port = free_port()
        with daemon(change(scratch, metrics={"listen": f"127.0.0.1:{port}"})) as process:
            look_again(port)
            page = _page(port)
            assert 1 == rows(ctl)[this_host()]["jobs"], "a job by hand is one of this host, too"
            process.send_signal(signal.SIGTERM)
        assert f'hyper2kvmd_elsewhere_progress_ratio{{host="{this_host()}",stage="convert",vm="web01"}} 0.0' in page
        assert f'hyper2kvmd_host_jobs{{host="{this_host()}"}} 1.0' in page
    finally:
        gate.touch()
        job.wait(60)
    assert "succeeded" == report_of(export)["status"]
    assert not (export / PROGRESS).exists()
    assert in_list(ctl)["web01"]["progress"] is None


def test_a_job_that_is_killed_leaves_a_file_that_nobody_believes(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, gate: Path
) -> None:
    export = make_export()
    job = _by_hand(export, scratch)
    wait_until(lambda: in_list(ctl)["web01"]["progress"] is not None, 60)
    job.kill()
    job.wait(60)
    wait_until(lambda: "running" != in_list(ctl)["web01"]["state"], 60)
    assert in_list(ctl)["web01"]["progress"] is None
    gate.touch()
    assert 0 == run_job(export, scratch).returncode
    assert not (export / PROGRESS).exists()


def test_a_drained_host_starts_nothing_also_not_for_an_engine_and_another_host_is_not_concerned(
    scratch: Settings, make_export: MakeExport, ctl: Ctl
) -> None:
    hosts.beat(scratch, Beat("kvm9", "running", 1000, time.time()))
    export = make_export()
    port = free_port()
    assert 3 == ctl("drain", "--host", "nobody").returncode
    with daemon(change(scratch, metrics={"listen": f"127.0.0.1:{port}"})):
        wait_until(lambda: done(export), 60)
        assert 0 == ctl("drain", "--host", this_host()).returncode
        second = make_export("web02")
        look_again(port)
        assert not done(second)
        assert ("draining", "running") == tuple(rows(ctl)[name]["state"] for name in (this_host(), "kvm9"))
        assert 75 == run_job(second, scratch, "--if-ready").returncode
        assert not done(second)
        assert 0 == ctl("resume", "--host", this_host()).returncode
        wait_until(lambda: done(second), 60)


def test_what_no_host_takes_stays_queued_and_says_why_and_is_taken_when_that_changes(
    scratch: Settings, make_export: MakeExport, ctl: Ctl
) -> None:
    large, small = make_export("large", 3 << 20), make_export("small", 1 << 20)
    hosts.beat(scratch, Beat("kvm9", "running", 1000, time.time(), waits={"large": "its tags are wrong"}))
    picky = change(scratch, accept={"largest_disk_gib": 2 / 1024}, scan_interval_seconds=0.3)
    with daemon(picky):
        wait_until(lambda: done(small), 60)
        wait_until(lambda: in_list(ctl)["large"]["reason"] is not None, 60)
        row = in_list(ctl)["large"]
        assert ("queued", "not_accepted") == (row["state"], row["reason"]["code"])
        assert "kvm9: its tags are wrong" in row["reason"]["message"]
        assert f"{this_host()}: its largest file has 3 MiB (accept.largest_disk_gib is" in row["reason"]["message"]
    assert not done(large)
    with daemon(picky, "--once") as process:
        output, _ = process.communicate(timeout=60)
    assert not done(large), output
    with daemon(scratch):
        wait_until(lambda: done(large), 60)


@pytest.mark.parametrize("asked", [None, "test:///default?asked"])
def test_a_rule_says_which_libvirt_gets_the_domain_and_a_persons_word_goes_before_it(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, asked: str | None
) -> None:
    tagged = make_export("tagged", metadata={"tags": {"site": "berlin"}})
    rule = {"tags": {"site": "berlin"}, "libvirt_uri": "test:///nowhere/at/all"}
    settings = change(scratch, libvirt={"import": True, "uri": "test:///default"}, rules=[rule])
    words = () if asked is None else ("--set", f"libvirt.uri={asked}")
    done = run_job(tagged, settings, *words)
    report = report_of(tagged)
    text = json.dumps(report)
    assert ("test:///nowhere/at/all" in text) == (asked is None), (done.stderr, text)


def _page(port: int) -> str:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text: str = answer.read().decode()
    return text


def _by_hand(export: Path, settings: Settings) -> subprocess.Popen[bytes]:
    """A job that a person started, and that goes on."""
    config = settings.work_dir.parent / "job.json"
    config.write_text(settings.model_dump_json(by_alias=True))
    return subprocess.Popen(
        [sys.executable, "-m", "hyper2kvmd", "run-job", str(export), "--config", str(config)],
        stderr=subprocess.DEVNULL,
    )
