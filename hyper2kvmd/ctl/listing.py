"""`hyper2kvmctl list` and `show`: the state of the exports, from the directory alone."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hyper2kvmd.ctl.migrate import print_report
from hyper2kvmd.ctl.output import print_json
from hyper2kvmd.errors import Finding, MigrationError
from hyper2kvmd.exits import EXIT_DONE, EXIT_NOT_FOUND
from hyper2kvmd.files import open_directory
from hyper2kvmd.queue import facts, setbacks
from hyper2kvmd.queue.asked import Asked, kept
from hyper2kvmd.queue.claim import holder
from hyper2kvmd.queue.export import Export
from hyper2kvmd.queue.state import Facts, State, state_of
from hyper2kvmd.settings.model import Settings

STYLE = {
    State.SUCCEEDED: "green",
    State.RUNNING: "cyan",
    State.BLOCKED: "yellow",
    State.RETRYING: "yellow",
    State.FAILED: "red",
    State.REJECTED: "red",
}


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands to the parser."""
    list_ = commands.add_parser("list", help="list the exports and their states")
    list_.set_defaults(run=list_exports)
    show = commands.add_parser("show", help="show one export: its state, what was done, what to do")
    show.add_argument("export", help="directory of the export, or its name, or the VM's name")
    show.set_defaults(run=show_export)
    return [list_, show]


def list_exports(options: argparse.Namespace, config: Settings) -> int:
    """Print a table of all exports."""
    rows = [row for export in facts.exports(config)[0] if (row := _row(export, config)) is not None]
    asked = {export: _asked(export, config) for export, _, _ in rows}
    if options.json:
        print_json(
            [
                {"export": str(export), "state": state, **_reason(finding), "asked": asked[export].options()}
                for export, state, finding in rows
            ]
        )
        return EXIT_DONE
    table = Table(box=None, pad_edge=False)
    wide = any(str(wanted) for wanted in asked.values())
    for heading in ("EXPORT", "STATE", "REASON", *(["ASKED FOR"] if wide else [])):
        table.add_column(heading, overflow="fold")
    for export, state, finding in rows:
        style = "red" if state == "unreadable" else STYLE.get(state)
        more = [Text(str(asked[export]))] if wide else []
        table.add_row(export.name, state, Text(finding.message if finding else ""), *more, style=style)
    Console().print(table)
    return EXIT_DONE


def show_export(options: argparse.Namespace, config: Settings) -> int:
    """Print all there is to know about one export."""
    export = find(options.export, config)
    if export is None:
        print(
            f"hyper2kvmctl: {options.export}: no export of this name in {config.exports_dir}; see `hyper2kvmctl list`",
            file=sys.stderr,
        )
        return EXIT_NOT_FOUND
    _, state, finding = _describe(export, config)
    document = facts.read_report(export)
    runner = holder(export)
    asked = _asked(export, config)
    if options.json:
        shape = {"export": str(export), "state": state, **_reason(finding), "asked": asked.options()}
        print_json({**shape, "holder": runner, "report": document})
        return EXIT_DONE
    console = Console()
    console.print(f"{'export':<10} {export}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{'state':<10} {state}", style=STYLE.get(state), markup=False, highlight=False)
    if asked != Asked():
        console.print(f"{'asked for':<10} {asked}", markup=False, highlight=False, soft_wrap=True)
    if state == State.RUNNING:
        text = f"attempt {runner.get('attempt')}, process {runner.get('pid')} on {runner.get('host')}"
        console.print(f"{'runner':<10} {text} since {runner.get('since')}", markup=False, highlight=False)
    if document:
        print_report(console, document)
    elif finding is not None:
        console.print(f"{'reason':<10} {finding}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_DONE


def find(name: str, config: Settings) -> Path | None:
    """The export that a person means: its name below the exports directory, a VM's name, or a directory."""
    if "/" in name:
        return Path(name).resolve() if Path(name).is_dir() else None
    for export in (exports := facts.exports(config)[0]):
        if export.name == name:
            return export
    for export in exports:
        with contextlib.suppress(OSError):  # one that cannot be read has no name
            report = facts.read_report(export)
            if report and report.get("vm_name") == name:
                return export
    # Last: what lies in the working directory by chance must not hide an export.
    return Path(name).resolve() if Path(name).is_dir() else None


def _row(export: Path, config: Settings) -> tuple[Path, State | Literal["unreadable"], Finding | None] | None:
    """One row of the list; None for an export that is gone."""
    found = facts.look_or_reason(export, config)
    if isinstance(found, Finding):
        return export, "unreadable", found
    return None if found is None else (export, *_state(export, found, config))


def _asked(export: Path, config: Settings) -> Asked:
    """What a person asked for that the next attempt has, too; nothing where nobody may know."""
    with contextlib.suppress(OSError, MigrationError):
        fd = open_directory(export)
        try:
            return kept(Export(export, fd), config.work_dir)
        finally:
            os.close(fd)
    return Asked()


def _describe(export: Path, config: Settings) -> tuple[Path, State, Finding | None]:
    return export, *_state(export, facts.look(export, config), config)


def _state(export: Path, look: Facts, config: Settings) -> tuple[State, Finding | None]:
    """The state, with what a daemon of this host knows that could not be written into the export."""
    return state_of(replace(look, setback=setbacks.read(config.work_dir).get(export)), config, time.time())


def _reason(finding: Finding | None) -> dict[str, Any]:
    return {"reason": None if finding is None else finding.as_json()}


def state_now(export: Path, config: Settings, *, held: bool | None = None) -> State:
    """The state of an export as of now; held: whether its claim is, if the caller knows. Raise OSError."""
    look = facts.look(export, config)
    return state_of(look if held is None else replace(look, held=held), config, time.time())[0]
