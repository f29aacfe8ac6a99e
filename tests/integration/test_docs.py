"""The documentation is true: its commands run and print what it says they print, and what it names is there."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyper2kvmd import __main__ as daemon
from hyper2kvmd import ctl
from tests import ROOT, docs, pages

PAGES = [ROOT / name for name in pages.every()]
# The tutorial is followed on a system with the package (tests/e2e/test_tutorial.py).
CONSOLE = [page for page in PAGES if docs.commands(page) and page.name != "tutorial.md"]


@pytest.mark.parametrize("page", CONSOLE, ids=lambda page: page.name)
def test_the_commands_of_a_page_do_what_it_says(page: Path) -> None:
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.docs", page],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
    )
    assert 0 == done.returncode, done.stderr
    results = json.loads(done.stdout)
    for command, result in zip(docs.commands(page), results, strict=True):
        assert 0 == result["status"], f"{page.name}:{command.line}: {command.text}\n{result['output']}"
        shown = [line.rstrip() for line in result["output"].splitlines()]
        for expected in command.prints:
            pattern = ".*".join(re.escape(part) for part in expected.split("…"))
            assert any(re.fullmatch(pattern, line) for line in shown), f"{command.text}: {expected}\n{result['output']}"


def options_of(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> set[str] | None:
    """The options of a subcommand, None if there is none of that name."""
    for name in path:
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not groups or name not in groups[0].choices:
            return None
        parser = groups[0].choices[name]
    return {option for action in parser._actions for option in action.option_strings}


def mentioned() -> Iterator[tuple[str, str]]:
    """Every mention of one of our programs with a command, in any page, with where it is."""
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            for match in re.finditer(r"\b(hyper2kvm(?:ctl|d)) ([a-z][a-z-]+[^`|;#]*)", line):
                yield f"{page.name}:{number}", f"{match[1]} {match[2]}"


def test_every_command_and_option_that_a_page_names_exists() -> None:
    parsers = {"hyper2kvmctl": ctl.build_parser(), "hyper2kvmd": daemon.build_parser()}
    checked = 0
    for where, text in mentioned():
        program, first, *rest = text.split()
        path = (first, rest[0]) if first in ("manifest", "plan") and rest and rest[0].isalpha() else (first,)
        options = options_of(parsers[program], path)
        if options is None:
            # Running text, such as "hyper2kvmd takes an export": no command has an option that could be meant.
            assert "--" not in text, f"{where}: {text}"
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text.split("  ")[0]):
            assert option in options, f"{where}: {option}"
        checked += 1
    assert checked > 60


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for page in PAGES
        for line in page.read_text().splitlines()
        for match in re.findall(r"(?:`|^    )make ((?:[a-z0-9-]+ ?)+)", line)
        for target in match.split()
        if "# " not in target
    }
    assert {"demo", "test", "bench", "matrix"} <= named
    assert set() == {name for name in named if name not in targets} - {"deps"}


def test_every_test_that_the_page_of_examples_names_exists() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "docs/examples.md").read_text())
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert [] == missing
    assert len(named) > 20
