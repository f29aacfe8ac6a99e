"""In which order a session runs its tests, the longest first, and where its time went.

python -m tests.order --sum NAME...    say how the sessions of these names went, all together
python -m tests.order --keep NAME...   write the list of durations again from what they took
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests import ROOT

LOGS = ROOT / ".cache/logs"
DURATIONS = ROOT / "tests/durations.json"  # seconds by file, on two cores without KVM
UNKNOWN = 1.0  # for each test of a file that is not in the list
# What runs one after the other in one process. Two guests that boot at once on two cores without KVM run into their own
# time limits; and who needs the same appliance shares it.
GROUPS = {
    **{f"tests/e2e/test_{name}.py": "guests that boot" for name in ("import", "migration")},
    **{
        f"tests/integration/guest/{name}.py": "one appliance"
        for name in ("test_guest", "linux/test_families", "linux/test_field_cases", "windows/test_windows")
    },
}


def tier(file: str) -> str:
    """unit, integration or e2e."""
    return Path(file).parts[1]


def group(nodeid: str) -> str:
    """What is run by one process: a file, or several."""
    file = nodeid.partition("::")[0]
    return GROUPS.get(file, file)


class LongestFirst(LoadFileScheduling):  # type: ignore[misc]  # which has no types
    """Hands out groups, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LongestFirst:
    """Its own markers for groups have no effect with pytest 9.2."""
    config.option.loadscopereorder = False
    return LongestFirst(config, log)


def longest_first(items: list[pytest.Item], durations: dict[str, float]) -> list[pytest.Item]:
    """The tests in the order of their groups, of which the longest comes first."""
    tests: dict[str, int] = defaultdict(int)
    files: dict[str, set[str]] = defaultdict(set)
    for item in items:
        file = item.nodeid.partition("::")[0]
        tests[file] += 1
        files[group(item.nodeid)].add(file)
    seconds = {
        name: sum(durations.get(file, UNKNOWN * tests[file]) for file in of_group) for name, of_group in files.items()
    }
    return sorted(items, key=lambda item: (-seconds[group(item.nodeid)], group(item.nodeid)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several processes, the longest comes first; whoever runs one file gets it in its own order."""
    if hasattr(config, "workerinput"):
        items[:] = longest_first(items, json.loads(DURATIONS.read_text()))


# Where the time goes --------------------------------------------------------------------------------------


_burnt = 0.0  # of a processor's seconds, when the last report was made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note in a report what its phase took of a processor, which is the same when others want it, too.

    That of a child counts when it has ended: of what outlives a test, at the end of its module.
    """
    global _burnt  # noqa: PLW0603
    report = yield
    now = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    report.burnt = now - _burnt  # type: ignore[attr-defined]  # passed on by xdist as everything is
    _burnt = now
    return report


class Times:
    """Adds up the seconds of every file, and keeps them with how the session went."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)
        self.burnt: dict[str, float] = defaultdict(float)
        self.tests: dict[str, int] = defaultdict(int)
        LOGS.mkdir(parents=True, exist_ok=True)
        self.told = (LOGS / f"{name}.tests").open("w", buffering=1)  # at once: a session that is killed has no summary

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of set-up, call and tear-down."""
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        self.burnt[file] += getattr(report, "burnt", 0)
        self.tests[tier(file)] += report.when == "call"
        if report.failed or report.when == "call" or report.duration > 1:
            name = f"{report.outcome} {report.when} {report.duration:.1f} s {report.nodeid}"
            self.told.write(f"{name}\n{report.longreprtext}\n" if report.failed else f"{name}\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Keep it."""
        ended = {kind: len(reports) for kind, reports in terminalreporter.stats.items() if kind in KINDS}
        kept = {
            "wall": time.monotonic() - self.began,
            "ended": ended,
            "tests": self.tests,
            "seconds": {file: round(seconds, 1) for file, seconds in sorted(self.seconds.items())},
            "burnt": {file: round(seconds, 1) for file, seconds in sorted(self.burnt.items())},
        }
        (LOGS / f"{self.name}.json").write_text(json.dumps(kept, indent=1) + "\n")


# The words of pytest's last line, in its order
KINDS = ("failed", "passed", "skipped", "xfailed", "xpassed", "error")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Asked for by make."""
    parser.addoption("--times", metavar="NAME", help=f"keep what each file took in {LOGS.name}/NAME.json")


def pytest_configure(config: pytest.Config) -> None:
    """Only where all reports come together."""
    if (name := config.getoption("--times")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Times(name))


def summary(sessions: Iterable[dict[str, Any]]) -> str:
    """A line for each tier, and at the end one as pytest's for all sessions together."""
    tests: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    burnt: dict[str, float] = defaultdict(float)
    ended: dict[str, int] = defaultdict(int)
    wall = 0.0
    for session in sessions:
        wall += session["wall"]
        for name, count in session["tests"].items():
            tests[name] += count
        for file, taken in session["seconds"].items():
            seconds[tier(file)] += taken
            burnt[tier(file)] += session["burnt"][file]
        for kind, count in session["ended"].items():
            ended[kind] += count
    lines = [
        f"{name:12} {tests[name]:5} tests, {taken:5.0f} s, of which {burnt[name]:5.0f} s of a processor"
        for name, taken in seconds.items()
    ]
    counts = ", ".join(f"{ended[kind]} {kind}" for kind in KINDS if ended[kind])
    return "\n".join([*lines, f"{counts} in {wall:.0f} s"])


def main() -> int:
    """The exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.order", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sum", nargs="+", metavar="NAME")
    what.add_argument("--keep", nargs="+", metavar="NAME")
    options = parser.parse_args()
    sessions = [json.loads((LOGS / f"{name}.json").read_text()) for name in options.sum or options.keep]
    if options.sum:
        print(summary(sessions))
        return 0
    known: dict[str, float] = json.loads(DURATIONS.read_text())
    for session in sessions:
        known.update({file: max(1, round(taken)) for file, taken in session["seconds"].items()})
    listed = {file: taken for file, taken in sorted(known.items()) if (ROOT / file).exists()}
    DURATIONS.write_text(json.dumps(listed, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
