"""How commands answer: JSON, lines and bars for people, and errors of the system with their remedies."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.exits import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_PERMISSION
from hyper2kvmd.files import REMEDIES, explained, trouble
from hyper2kvmd.text import plain

# The exit status for each kind of trouble with files, and what to do for the person at the keyboard.
_STATUS = {"denied": EXIT_PERMISSION, "read-only": EXIT_PERMISSION, "missing": EXIT_NOT_FOUND}
_REMEDIES = {
    **REMEDIES,
    "denied": "run it as root, or give the service's user access, for example with setfacl",
    "missing": "check the path, here or in the settings",
}


def refused(error: OSError, where: Path | None = None) -> tuple[int, str]:
    """The exit status for an error of the operating system; what failed, why, and what to do.

    where: the directory that a relative name in the error belongs to.
    """
    kind = trouble(error)
    return _STATUS.get(kind, EXIT_FAILED), f"{explained(error, where)}; {_REMEDIES[kind]}"


def refuse(status: int, message: str) -> int:
    """Say why a command does nothing, and return its exit status."""
    print(f"hyper2kvmctl: {message}", file=sys.stderr)
    return status


def print_json(shape: Any) -> None:
    """Print the result of a command with --json."""
    print(json.dumps(shape, indent=2, ensure_ascii=False))


def refuse_existing(path: Path) -> None:
    """Raise MigrationError (output_exists) if there is a file of that name."""
    if os.path.lexists(path):
        hint = "Move it away, or name another file with -o."
        raise MigrationError(Code.OUTPUT_EXISTS, f"{path} already exists", hint)


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, float], None]]:
    """A function that shows for a name how much is done, from 0 to 1; on a terminal only."""
    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(name: str, ratio: float) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(plain(name, 40), total=1.0)
            bars.update(tasks[name], completed=ratio)

        yield tell


def print_check(console: Console, check: str, result: str, detail: str, finding: dict[str, str] | None) -> None:
    """Print what one check found, with the remedy."""
    style = {"ok": "green", "warning": "yellow", "failed": "red"}[result]
    console.print(f"{result:<7} {check}: {detail}", style=style, markup=False, highlight=False, soft_wrap=True)
    if finding is not None:
        console.print(f"        {finding['hint']}", markup=False, highlight=False, soft_wrap=True)


def print_warnings(warnings: Iterable[Finding]) -> None:
    """Print warnings on standard error."""
    console = Console(stderr=True)
    for finding in warnings:
        console.print(f"warning: {finding}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def agreed(question: str) -> bool:
    """Whether the person at the terminal says yes; anything else is a no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def say(text: str) -> None:
    """Print a line for people."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
