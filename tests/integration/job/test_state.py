"""What earlier versions have left on disk, in the hands of this one: nothing is lost, told again, or done twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.state import EXPECTED, EXPORTS, IMAGES, KEPT, SETTINGS, TOLD, inside, unpack

VERSIONS = sorted(path.name.removesuffix(".img.xz") for path in KEPT.glob("*.img.xz"))
GONE_ON_WITH = ("fresh", "interrupted", "killed", "retried", "retrying")
LEFT_ALONE = ("succeeded", "failed", "rejected", "blocked", "cancelled", "held")

Run = Callable[..., str]


@pytest.fixture(scope="module", params=VERSIONS)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host of an earlier version, of which the tests are the history: one goes on where the one before it ended."""
    path = tmp_path_factory.mktemp("state") / "image"
    unpack(KEPT / f"{request.param}.img.xz", path)
    return path


@pytest.fixture
def run(image: Path) -> Run:
    """A function that runs a command on that host, and returns what it printed."""

    def run(*argv: str, status: int = 0) -> str:
        done = inside(image, *argv, variables={"PYTHONPATH": str(ROOT)})
        assert status == done.returncode, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


def ctl(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "hyper2kvmd.ctl", *words, "--config", str(SETTINGS))


def once(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "hyper2kvmd", "run", "--once", "--config", str(SETTINGS), *words)


def states(run: Run) -> dict[str, str]:
    return {Path(row["export"]).name: row["state"] for row in json.loads(run(*ctl("list", "--json")))}


def report(run: Run, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run("cat", f"{EXPORTS}/{name}/migration-report.json"))
    return document


def disks(run: Run, *names: str) -> dict[str, list[str]]:
    """The published disks: inode, size and time of each."""
    files = run("find", str(IMAGES), "-type", "f", "-printf", "%f %i %s %T@\n").splitlines()
    return {line.split()[0]: line.split()[1:] for line in files if any(name in line for name in names)}


def content(run: Run, *places: str) -> list[str]:
    """Every file below some places: its inode and time, and a checksum of its bytes."""
    found = run("find", *places, "-type", "f", "-printf", "%p %i %T@\n", "-exec", "sha256sum", "{}", "+")
    return sorted(found.splitlines())


def test_there_is_a_version_to_come_from() -> None:
    assert "0.1.0" in VERSIONS


def test_every_export_is_in_the_state_that_it_was_left_in(run: Run) -> None:
    assert EXPECTED == states(run)


def test_what_is_known_of_every_export_can_be_shown(run: Run) -> None:
    shown = {name: run(*ctl("show", name)) for name in EXPECTED}
    said = {
        "succeeded": "succeeded-disk-0.qcow2",
        "failed": "checksum_mismatch",
        "rejected": "manifest_version",
        "blocked": "output_denied",
        "cancelled": "cancelled",
        "held": "hyper2kvmctl release",
        "retrying": "Input/output error",
    }
    assert {} == {name: shown[name] for name, words in said.items() if words not in shown[name]}


def test_a_report_is_a_page_too(run: Run) -> None:
    run(*ctl("report", "succeeded", "--html", "/srv/page.html"))


def test_what_is_not_over_is_gone_on_with_and_the_rest_is_left_alone(run: Run) -> None:
    alone = [*(f"{EXPORTS}/{name}" for name in LEFT_ALONE if name != "failed"), f"{IMAGES}/succeeded-disk-0.qcow2"]
    before, failure = content(run, *alone), report(run, "failed")
    converted = disks(run, "interrupted", "killed")
    assert 2 == len(converted)
    assert all(name.endswith(".partial") for name in converted)
    told = run("cat", str(TOLD)).split()
    assert {"succeeded", "retried", "rejected", "blocked"} == {*told}

    run(*once(), status=1)  # not all have succeeded

    assert {name: "succeeded" if name in GONE_ON_WITH else state for name, state in EXPECTED.items()} == states(run)
    assert before == content(run, *alone)
    assert failure == report(run, "failed")
    # The very files, not written to since: an inode alone says little, as the next file may get that of a removed one.
    assert sorted(converted.values()) == sorted(disks(run, "interrupted", "killed").values())
    attempts = {name: report(run, name)["attempts"] for name in GONE_ON_WITH}
    assert {
        "fresh": 1,
        "interrupted": 2,
        "killed": 2,
        "retried": 3,
        "retrying": 2,
    } == attempts  # one was `retry` itself
    for name in GONE_ON_WITH:
        source, target = f"{EXPORTS}/{name}/{name}-disk-0.raw", f"{IMAGES}/{name}-disk-0.qcow2"
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, target)
    # Nobody could be told of `failed` before; its turn comes, and what was told is not told again.
    assert sorted([*told, "failed", *GONE_ON_WITH]) == sorted(run("cat", str(TOLD)).split())


def test_what_waited_for_a_person_goes_on_when_it_is_told_to(run: Run) -> None:
    run(*ctl("release", "held"))
    run(*ctl("retry", "blocked"))
    run("mkdir", "/srv/state/elsewhere")
    right = run("sha256sum", f"{EXPORTS}/failed/failed-disk-0.raw").split()[0]
    run("sed", "-i", f"s/{'0' * 64}/{right}/", f"{EXPORTS}/failed/manifest.json")
    run(*ctl("retry", "failed"))
    run(*once("--set", "output.allowed_dirs=[/srv/state/elsewhere]"), status=1)
    assert {**dict.fromkeys(EXPECTED, "succeeded"), "rejected": "rejected", "cancelled": "cancelled"} == states(run)
    assert all("migration-report.1.json" in run("ls", f"{EXPORTS}/{name}") for name in ("blocked", "failed"))


def test_nothing_is_left_of_the_work_when_all_is_over(run: Run) -> None:
    for name in ("rejected", "cancelled"):
        run("rm", "-r", f"{EXPORTS}/{name}")
    run(*ctl("prune"))
    left = run("find", "/srv/state/work", "-mindepth", "1", "-type", "d").split()
    assert [] == left
    assert "partial" not in run("ls", "-A", str(IMAGES))
