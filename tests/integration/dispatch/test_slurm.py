"""The engine against a real Slurm: a controller and two nodes, each a host of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.dispatch.engine import Handed, Submission
from hyper2kvmd.dispatch.slurm import Slurm
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.settings.model import Settings
from tests import ROOT
from tests.fleet import HEAD, Fleet

SECONDS = 60.0


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(nodes=2) as fleet:
        yield fleet


@pytest.fixture(autouse=True)
def reachable(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slurm's commands are those of the controller's host, and no test leaves a job to the next."""
    monkeypatch.setenv("PATH", f"{fleet.bin}:{os.environ['PATH']}")
    yield
    fleet.run(HEAD, "scancel", f"--user={fleet.account}", "--full")
    fleet.wait(lambda: not slurm(fleet).jobs(), "no job is left", SECONDS)


def slurm(fleet: Fleet, timeout_seconds: float = 30, **changes: Any) -> Slurm:
    dispatch = {"engine": "slurm", "timeout_seconds": timeout_seconds, "slurm": changes}
    return Slurm(Settings.model_validate({"dispatch": dispatch}).dispatch, uid=fleet.uid)


def job(fleet: Fleet, script: str, *words: str, name: str = "job", **changes: Any) -> Submission:
    log = fleet.exports / f"{name}.log"
    shape = {"name": f"h2k-{name}", "words": ("sh", "-c", script, *words), "log": log, "cpus": 1, "memory_mb": 100}
    return Submission(**{**shape, **changes})


def handed(fleet: Fleet, id: str) -> Handed | None:
    return next((job for job in slurm(fleet).jobs() if job.id == id), None)


def host(fleet: Fleet, id: str) -> str:
    there = handed(fleet, id)
    return there.host if there is not None else ""


def over(fleet: Fleet, *ids: str) -> None:
    fleet.wait(lambda: not {job.id for job in slurm(fleet).jobs()} & set(ids), f"{ids} are over", SECONDS)


def test_a_job_runs_as_the_service_with_its_words_a_clean_environment_and_its_log(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    export = fleet.exports / "%j %s [x] * ä"
    export.mkdir()
    (export / "log").write_text("before\n")
    for path in (export, export / "log"):
        os.chown(path, fleet.uid, fleet.gid)
    script = 'pwd; id -un; printf "<%s>" "$@"; echo; echo "PATH=$PATH LC_ALL=$LC_ALL SECRET=$SECRET"; umask; ulimit -c'
    words = ("x", "a b", "it's", "$HOME", "%s", "", "ä\n;")
    over(fleet, slurm(fleet).submit(job(fleet, script, *words, log=export / "log")))
    assert (
        f"before\n/\n{fleet.account}\n<a b><it's><$HOME><%s><><ä\n;>\n"
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 SECRET=\n"
    ) == "".join((export / "log").read_text().splitlines(keepends=True)[:-2])


def test_a_log_below_a_directory_with_a_backslash_is_written(fleet: Fleet) -> None:
    export = fleet.exports / "a\\b %j"
    export.mkdir()
    os.chown(export, fleet.uid, fleet.gid)
    over(fleet, slurm(fleet).submit(job(fleet, "echo here", log=export / "log")))
    assert "here\n" == (export / "log").read_text()


def test_the_program_is_there_on_the_nodes(fleet: Fleet) -> None:
    asked = job(fleet, "", name="version", words=("hyper2kvmd", "--version"))
    over(fleet, slurm(fleet).submit(asked))
    assert asked.log.read_text().startswith("hyper2kvmd ")


@pytest.mark.parametrize(
    ("setting", "of_settings", "of_job", "said"),
    [
        ("slurm.partition", {"partition": "nowhere"}, {}, "Invalid partition name specified"),
        ("slurm.account", {"partition": "closed"}, {}, "Invalid account or account/partition combination"),
        ("slurm.features", {}, {"features": ("kvm", "moon")}, "Invalid feature specification"),
        ("slurm.licenses", {}, {"licenses": ("moon:1",)}, "Invalid license specification"),
        ("slurm.licenses", {}, {"licenses": ("filer1:2",)}, "Invalid license specification"),
        ("memory_mb", {}, {"memory_mb": 9000}, "Memory specification can not be satisfied"),
        ("scratch_mb", {}, {"scratch_mb": 60000}, "Temporary disk specification can not be satisfied"),
        ("cpus", {}, {"cpus": 5}, "CPU count per node can not be satisfied"),
        ("cpus", {}, {"cpus": 99}, "More processors requested than permitted"),
    ],
)
def test_a_refusal_has_slurms_words_and_the_setting(
    fleet: Fleet, setting: str, of_settings: dict[str, Any], of_job: dict[str, Any], said: str
) -> None:
    with pytest.raises(MigrationError, match=said) as caught:
        slurm(fleet, **of_settings).submit(job(fleet, "true", **of_job))
    assert (Code.ENGINE_REFUSED, f"dispatch.{setting}") == (caught.value.code, caught.value.field)


def test_two_of_one_name_never_run_at_once(fleet: Fleet) -> None:
    asked = job(fleet, "echo begin; sleep 1; echo end", name="twice")
    first, second = (slurm(fleet).submit(asked) for _ in range(2))
    fleet.wait(lambda: host(fleet, first), "the first runs", SECONDS)
    waiting = handed(fleet, second)
    assert waiting is not None
    assert ("waiting", "") == (waiting.state, waiting.host)
    assert waiting.reason.startswith("Dependency: ")
    over(fleet, first, second)
    assert "begin\nend\nbegin\nend\n" == asked.log.read_text()


def test_an_excluded_host_gets_no_job_and_one_that_is_no_node_is_no_matter(fleet: Fleet) -> None:
    ids = [slurm(fleet).submit(job(fleet, "hostname", name=f"excluded{n}", exclude=("kvm1", "desk"))) for n in range(3)]
    over(fleet, *ids)
    assert ["kvm2\n"] * 3 == [(fleet.exports / f"excluded{n}.log").read_text() for n in range(3)]
    with pytest.raises(MigrationError) as caught:
        slurm(fleet).submit(job(fleet, "true", exclude=("kvm1", "kvm2")))
    assert Code.ENGINE_UNAVAILABLE == caught.value.code


def test_the_highest_priority_goes_first_and_what_waits_can_be_dropped(fleet: Fleet) -> None:
    engine, order = slurm(fleet), shlex.quote(str(fleet.exports / "order"))
    all_of_it: dict[str, Any] = {"memory_mb": 8000, "features": ("on-kvm1",)}
    running = engine.submit(job(fleet, "sleep 3", name="first", **all_of_it))
    fleet.wait(lambda: host(fleet, running), "the first runs", SECONDS)
    ids = {
        priority: engine.submit(
            job(fleet, f"echo {priority} >> {order}", name=f"p{priority}", priority=priority, **all_of_it)
        )
        for priority in (0, -1000, 1000, 500, 7)
    }
    engine.cancel([ids[7], running, "999999"])
    assert handed(fleet, ids[7]) is None
    assert "kvm1" == host(fleet, running), "it runs, and is left alone"
    over(fleet, running, *ids.values())
    assert "1000\n500\n0\n-1000\n" == (fleet.exports / "order").read_text()


def test_licences_limit_how_many_run(fleet: Fleet) -> None:
    ids = [slurm(fleet).submit(job(fleet, "sleep 1", name=f"licence{n}", licenses=("filer1:1",))) for n in range(2)]
    fleet.wait(lambda: host(fleet, ids[0]), "the first runs", SECONDS)
    fleet.wait(lambda: (job := handed(fleet, ids[1])) and job.reason.startswith("Licenses"), "the other waits", SECONDS)


def test_nodes_are_told_with_what_they_have(fleet: Fleet) -> None:
    kvm1, kvm2 = slurm(fleet).nodes()
    assert ("kvm1", "idle", True, "", 4, 8000) == (
        kvm1.name,
        kvm1.state,
        kvm1.responds,
        kvm1.reason,
        kvm1.cpus,
        kvm1.memory_mb,
    )
    assert ("kvm", "on-kvm2") == kvm2.features
    fleet.run(HEAD, "scontrol", "update", "nodename=kvm2", "state=drain", "reason=new | disk", account="root")
    try:
        assert ("drained", "new | disk") == (slurm(fleet).nodes()[1].state, slurm(fleet).nodes()[1].reason)
    finally:
        fleet.run(HEAD, "scontrol", "update", "nodename=kvm2", "state=resume", account="root")


def test_a_node_that_dies_loses_its_job_to_another(fleet: Fleet) -> None:
    id = slurm(fleet).submit(job(fleet, "hostname; sleep 60", name="dies"))
    fleet.wait(lambda: host(fleet, id), "it runs", SECONDS)
    first = host(fleet, id)
    log = fleet.exports / "dies.log"
    fleet.wait(lambda: log.exists() and log.read_text(), "it has begun", SECONDS)
    fleet.kill(first)
    try:
        fleet.wait(lambda: host(fleet, id) not in ("", first), "it runs elsewhere", SECONDS)
        second = host(fleet, id)
        fleet.wait(lambda: f"{first}\n{second}\n" == log.read_text(), "it has begun there", SECONDS)
        (dead,) = [node for node in slurm(fleet).nodes() if node.name == first]
        assert ("down", False, "Not responding") == (dead.state, dead.responds, dead.reason)
    finally:
        fleet.boot(first)
    fleet.wait(lambda: fleet.states()[first] == "idle", "it is back", SECONDS)


def test_a_controller_that_is_down_or_hangs_is_no_empty_queue(fleet: Fleet) -> None:
    calls: tuple[Callable[[Slurm], object], ...] = (
        lambda engine: engine.submit(job(fleet, "true")),
        Slurm.jobs,
        lambda engine: engine.cancel(["1"]),
        Slurm.nodes,
    )
    fleet.pause(HEAD, "slurmctld")
    try:
        for call in calls:
            began = time.monotonic()
            with pytest.raises(MigrationError, match="did not answer within 1 s") as caught:
                call(slurm(fleet, timeout_seconds=1))
            assert Code.ENGINE_UNAVAILABLE == caught.value.code
            assert time.monotonic() - began < 10
    finally:
        fleet.go_on(HEAD)
    fleet.stop_daemon(HEAD, "slurmctld")
    try:
        # Slurm's own commands give up after 9 s; both at once.
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(call, slurm(fleet)) for call in calls[:2]]
        for future in asked:
            error = future.exception()
            assert isinstance(error, MigrationError)
            assert Code.ENGINE_UNAVAILABLE == error.code
            assert "Unable to contact slurm controller" in error.message
    finally:
        fleet.start_daemon(HEAD, "slurmctld")
    fleet.wait(lambda: set(fleet.states().values()) == {"idle"}, "the controller is back", SECONDS)


def test_nothing_is_left_of_a_fleet_and_two_do_not_disturb_each_other(fleet: Fleet) -> None:
    with Fleet(nodes=1, account="root") as other:
        assert ["kvm1"] == [*other.states()]
        directory = other.directory
        assert "0" == other.run("kvm1", "id", "-u").stdout.strip()
        held = [process for host in other.hosts.values() for process in host.processes()]
        assert len(held) >= 6
        other.cut("kvm1")
        ping = ("ping", "-c1", "-W1", "kvm1")
        assert other.run(HEAD, *ping, check=False, account="root").returncode
        other.cut("kvm1", whole=True)
    assert not directory.exists()
    assert not [pid for pid in held if directory.name in _command(pid)]
    assert 2 == len(slurm(fleet).nodes())


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_the_shipped_configuration_is_one_that_slurm_reads(tmp_path: Path) -> None:
    shipped = (ROOT / "packaging/slurm/slurm.conf").read_text()
    for text, status in ((shipped, 0), (f"{shipped}NoSuchKey=1\n", 1)):
        (tmp_path / "slurm.conf").write_text(text)
        (tmp_path / "cgroup.conf").write_text((ROOT / "packaging/slurm/cgroup.conf").read_text())
        done = subprocess.run(
            ["/usr/bin/scontrol", "show", "hostnames", "kvm[1-2]"],
            env={"SLURM_CONF": str(tmp_path / "slurm.conf")},
            check=False,
            capture_output=True,
            text=True,
        )
        assert status == done.returncode, done.stderr
        assert ("kvm1\nkvm2\n" if status == 0 else "") == done.stdout
