"""The example for ssh, as it is shipped, against hosts of their own; only ssh itself is played by a script."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.dispatch.command import Command
from hyper2kvmd.dispatch.engine import Submission
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.settings.model import Settings
from tests.fleet import Fleet
from tests.fleet.migrations import over_ssh


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(nodes=2) as fleet:
        yield fleet


@pytest.fixture
def command(fleet: Fleet, tmp_path: Path) -> Iterator[Command]:
    shape = {"dispatch": over_ssh(fleet, tmp_path, ("kvm1", "gone", "kvm2"))}
    yield Command(Settings.model_validate(shape).dispatch)
    for name in fleet.node_names:
        fleet.run(name, "pkill", "-x", f"--uid={fleet.uid}", "sleep", check=False)


def job(fleet: Fleet, name: str, script: str, *words: str, **changes: Any) -> Submission:
    asked = ("sh", "-c", script, *words)
    shape = {"name": f"h2k-{name}", "words": asked, "log": fleet.exports / f"{name}.log", "cpus": 1, "memory_mb": 1}
    return Submission(**{**shape, **changes})


def test_a_job_runs_with_its_words_and_its_log(fleet: Fleet, command: Command) -> None:
    export = fleet.exports / "it's $HOME *"
    export.mkdir()
    os.chown(export, fleet.uid, fleet.gid)
    script = 'id -un; printf "<%s>" "$@"; echo'
    command.submit(job(fleet, "words", script, "x", "a b", "it's", "$HOME", "", log=export / "log"))
    fleet.wait(lambda: not command.jobs(), "it is over")
    assert f"{fleet.account}\n<a b><it's><$HOME><>\n" == (export / "log").read_text()


def test_jobs_are_spread_listed_and_no_more_than_there_are_slots(fleet: Fleet, command: Command) -> None:
    ids = [command.submit(job(fleet, f"spread{number}", "exec sleep 60")) for number in range(4)]
    assert ["kvm1/h2k-spread0", "kvm2/h2k-spread1", "kvm1/h2k-spread2", "kvm2/h2k-spread3"] == ids
    assert {(id, f"h2k-{id.partition('-')[2]}", "running", id.partition("/")[0]) for id in ids} == {
        (job.id, job.name, job.state, job.host) for job in command.jobs()
    }
    with pytest.raises(MigrationError, match="each host has 2 jobs") as caught:
        command.submit(job(fleet, "spread4", "true"))
    assert Code.ENGINE_UNAVAILABLE == caught.value.code
    assert caught.value.message.endswith("; gone: gone does not answer"), "what ssh said"
    command.cancel(ids)
    assert 4 == len(command.jobs()), "none waits, and what runs is left alone"


def test_an_excluded_host_and_one_that_is_down_get_no_job(fleet: Fleet, command: Command) -> None:
    assert "kvm2/h2k-a" == command.submit(job(fleet, "a", "exec sleep 60", exclude=("kvm1",)))
    fleet.kill("kvm1")
    try:
        assert "kvm2/h2k-b" == command.submit(job(fleet, "b", "exec sleep 60"))
        assert {"h2k-a", "h2k-b"} == {job.name for job in command.jobs()}
    finally:
        fleet.boot("kvm1")
