"""Every fault of `make soak` a few times, and the checker itself: that it sees each way in which a job can go wrong."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.queue.names import REPORT
from tests import ROOT
from tests.faults import FAULTS, Result, Site, conclude, invariants, site, soak

DOCS = ROOT / "docs" / "faults.md"
QUICK = [replace(fault, times=1) for fault in FAULTS if not fault.guest]
# Of each kind one: every call fails, with every error; every directory is full; each of those that work is killed,
# stopped or paused. All others are for `make test-all`. A kill before each step is in test_kill.
EVERY_TIME = {
    *("kill-daemon", "kill-all", "stop-runner", "pause-runner", "claim-stolen", "power-cut", "two-daemons"),
    *("open-ESTALE", "write-ENOSPC", "fsync-EIO", "rename-EROFS", "link-EIO", "flock-ESTALE"),
    *("full-output-ext4", "full-exports-tmpfs", "full-work-tmpfs", "inodes-tmp-tmpfs"),
    *("libvirt-away", "libvirt-killed"),
}

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def results() -> Callable[[str], list[Result]]:
    """From the name of a fault to what came of it, when it was injected with its like. `make soak` has other seeds."""

    @functools.cache
    def once(every_time: bool) -> list[Result]:
        return soak(
            [fault for fault in QUICK if (fault.name in EVERY_TIME) == every_time],
            seed=22, rounds=1, seconds=600, endless=5,
        )  # fmt: skip

    return lambda name: [result for result in once(name in EVERY_TIME) if result.fault == name]


@pytest.mark.parametrize(
    "name",
    [pytest.param(fault.name, marks=[] if fault.name in EVERY_TIME else pytest.mark.rest) for fault in QUICK],
)
def test_nothing_is_lost_doubled_or_left_by(name: str, results: Callable[[str], list[Result]]) -> None:
    mine = results(name)
    assert [] == [result.problem for result in mine if result.problem], "\n\n".join(one.problem for one in mine)
    assert any(result.hits for result in mine), "it was never injected: this test tests nothing"


def test_the_documentation_names_every_fault_and_how_often_it_was_injected() -> None:
    rows = re.findall(r"^\| ([a-zA-Z0-9-]+) \| (.*?) \| (\d+) \|", DOCS.read_text(), re.MULTILINE)
    assert [(fault.name, fault.what) for fault in FAULTS] == [(name, what) for name, what, _ in rows]
    assert all(int(times) for _, _, times in rows), "a fault that was never injected"


@pytest.fixture
def finished() -> Iterator[Site]:
    """A site where one export was migrated and all is well."""
    with site() as here:
        here.drop(random.Random(0), disks=1)
        here.start()
        conclude(here, 60)
        yield here


def final(here: Site) -> Path:
    return here.finals(here.vms[0])["disk-0"]


def put(text: str, *, report: bool = True) -> Callable[[Site], None]:
    def spoil(here: Site) -> None:
        path = here.export(here.vms[0]) / REPORT
        content = {**json.loads(path.read_text()), **json.loads(text)} if report else text
        path.write_text(json.dumps(content) if report else text)

    return spoil


def another_disk(here: Site) -> None:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(final(here)), "1M"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def write_to_source(here: Site) -> None:
    source, _ = here.vms[0].disks["disk-0"]
    with source.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


def leave_a_process(here: Site) -> None:
    subprocess.Popen(["sleep", "600"], cwd=here.settings.work_dir, stdin=subprocess.DEVNULL)


def kill_the_daemon(here: Site) -> None:
    here.daemons[0].send_signal(signal.SIGKILL)
    here.daemons[0].wait()


def claim_again(here: Site) -> None:
    with (here.root / "log").open("a") as log:
        log.write(next(line for line in here.log().splitlines(True) if "claimed" in line))


WRONG: dict[str, tuple[Callable[[Site], object], str]] = {
    "no report": (lambda here: (here.export(here.vms[0]) / REPORT).unlink(), "in the export are"),
    "half a report": (put('{"schema', report=False), "Unterminated string"),
    "a report that is not one": (put('{"attempts": "2"}'), "not of type"),
    "a report that is no end": (put('{"status": "retrying"}'), "is not an end"),
    "a report by another runner": (put('{"attempts": 99}'), "wrote the report"),
    "a report of a disk elsewhere": (put('{"disks": []}'), "reported to be"),
    "half a report beside it": (
        lambda here: (here.export(here.vms[0]) / f".{REPORT}.1.tmp").touch(),
        "in the export are",
    ),
    "a disk that was not published": (lambda here: final(here).unlink(), "not published"),
    "a disk that is not whole": (lambda here: os.truncate(final(here), 70_000), "not whole"),
    "a disk that is another one": (another_disk, "not whole"),
    "a disk under two names": (lambda here: os.link(final(here), here.root / "second"), "has 2 names"),
    "a partial disk": (lambda here: (here.settings.output_dir / ".web01.partial").touch(), "left in the output"),
    "an overlay": (lambda here: (here.settings.work_dir / "web01-1").mkdir(), "left in the work"),
    "a source that was written to": (write_to_source, "the source changed"),
    "a process": (leave_a_process, "processes are left"),
    "a dead daemon": (kill_the_daemon, "a daemon is dead"),
    "an attempt made twice": (claim_again, "the same attempt"),
}


@pytest.mark.rest
@pytest.mark.parametrize("what", WRONG)
def test_the_checker_sees(what: str, finished: Site) -> None:
    spoil, words = WRONG[what]
    spoil(finished)
    with pytest.raises((AssertionError, ValueError, jsonschema.ValidationError), match=words):
        invariants(finished, patience=2)


@pytest.mark.rest
def test_the_checker_sees_a_domain_that_is_not_there() -> None:
    with site(libvirt="root") as here:
        here.drop(random.Random(0))
        here.start()
        conclude(here, 90)
        assert here.libvirt
        with connect(here.libvirt.uri) as connection:
            connection.lookupByName("web01").undefine()
        with pytest.raises(AssertionError, match="the domains are not those"):
            invariants(here)
