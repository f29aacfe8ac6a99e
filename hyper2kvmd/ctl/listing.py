"""`hyper2kvmctl list` and `show`: the state of the exports, from the directory alone."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hyper2kvmd.ctl.migrate import print_report
from hyper2kvmd.ctl.output import print_json
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.exits import EXIT_DONE, EXIT_NOT_FOUND
from hyper2kvmd.files import open_directory
from hyper2kvmd.queue import facts, setbacks
from hyper2kvmd.queue.asked import Asked, kept
from hyper2kvmd.queue.claim import holder
from hyper2kvmd.queue.estimate import Estimate
from hyper2kvmd.queue.export import Export
from hyper2kvmd.queue.hosts import Seen, all_hosts, untaken
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.queue.state import FINAL, Facts, State, state_of
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

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
    hosts = known_hosts(config)
    exports, ignored = facts.exports(config)
    rows = [row for export in exports if (row := row_of(export, config, hosts)) is not None]
    for finding in ignored:
        print(f"hyper2kvmctl: {finding}", file=sys.stderr)
    asked = {row.export: _asked(row.export, config) for row in rows}
    now = time.monotonic()
    if options.json:
        print_json([{**row.as_json(now), "asked": asked[row.export].options()} for row in rows])
        return EXIT_DONE
    table = Table(box=None, pad_edge=False)
    wide = any(str(wanted) for wanted in asked.values())
    for heading in ("EXPORT", "STATE", "REASON", *(["ASKED FOR"] if wide else [])):
        table.add_column(heading, overflow="fold")
    for row in rows:
        style = "red" if row.state == "unreadable" else STYLE.get(row.state)
        more = [Text(str(asked[row.export]))] if wide else []
        text = row.finding.message if row.finding else row.progress.doing(now) if row.progress else ""
        if not text and row.estimate is not None:
            text = str(row.estimate)
        table.add_row(row.export.name, row.state, Text(text), *more, style=style)
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
    row = _described(export, facts.look(export, config), config, known_hosts(config))
    document = facts.read_report(export)
    done = facts.read_cutover(export, document) if document else None
    runner = holder(export)
    asked = _asked(export, config)
    if options.json:
        shape = {**row.as_json(time.monotonic()), "asked": asked.options()}
        cutover = None if done is None else done.model_dump(mode="json")
        print_json({**shape, "holder": runner, "report": document, "cutover": cutover})
        return EXIT_DONE
    console = Console()
    console.print(f"{'export':<10} {export}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{'state':<10} {row.state}", style=STYLE.get(State(row.state)), markup=False, highlight=False)
    if asked != Asked():
        console.print(f"{'asked for':<10} {asked}", markup=False, highlight=False, soft_wrap=True)
    if row.estimate is not None and row.state != State.RUNNING:
        console.print(f"{'estimate':<10} {row.estimate}", markup=False, highlight=False, soft_wrap=True)
    if row.progress is not None:
        text = row.progress.doing(time.monotonic())
        console.print(f"{'progress':<10} {text}", markup=False, highlight=False, soft_wrap=True)
    if row.state == State.RUNNING:
        text = f"attempt {runner.get('attempt')}, process {runner.get('pid')} on {runner.get('host')}"
        console.print(f"{'runner':<10} {text} since {runner.get('since')}", markup=False, highlight=False)
    if document:
        print_report(console, document)
        if done is not None:
            text = f"{done.status} at {done.finished_at or done.started_at}, on {done.host.name}"
            console.print(f"{'cutover':<10} {plain(text)}", markup=False, highlight=False, soft_wrap=True)
    elif row.finding is not None:
        console.print(f"{'reason':<10} {row.finding}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_DONE


def find(name: str, config: Settings) -> Path | None:
    """The export that a person means: its name below the exports directory, a VM's name, or a directory.

    Raise MigrationError (busy) for the name of a VM that several exports claim: a report can be anybody's word.
    """
    if "/" in name:
        return Path(name).resolve() if Path(name).is_dir() else None
    for export in (exports := facts.exports(config)[0]):
        if export.name == name:
            return export
    found = []
    for export in exports:
        with contextlib.suppress(OSError):  # one that cannot be read has no name
            report = facts.read_report(export)
            if report and report.get("vm_name") == name:
                found.append(export)
    if len(found) > 1:
        names = ", ".join(plain(export.name) for export in found)
        raise MigrationError(Code.BUSY, f"{len(found)} exports are of the VM {plain(name)}: {names}", "Name one.")
    if found:
        return found[0]
    # Last: what lies in the working directory by chance must not hide an export.
    return Path(name).resolve() if Path(name).is_dir() else None


@dataclass(frozen=True)
class Row:
    """One export as it is shown."""

    export: Path
    state: State | Literal["unreadable"]
    finding: Finding | None
    progress: Progress | None = None
    estimate: Estimate | None = None
    look: Facts | None = None

    def as_json(self, now: float) -> dict[str, Any]:
        """The row for `--json`; now: the monotonic clock."""
        return {
            "export": str(self.export),
            "state": self.state,
            "reason": None if self.finding is None else self.finding.as_json(),
            "progress": None if self.progress is None else self.progress.as_json(now),
            "estimate": None if self.estimate is None else self.estimate.as_json(),
        }


def row_of(export: Path, config: Settings, hosts: Sequence[Seen]) -> Row | None:
    """One row of the list; None for an export that is gone."""
    found = facts.look_or_reason(export, config)
    if isinstance(found, Finding):
        return Row(export, "unreadable", found)
    return None if found is None else _described(export, found, config, hosts)


def _described(export: Path, look: Facts, config: Settings, hosts: Sequence[Seen]) -> Row:
    """The state, with what a daemon of this host knows that could not be written into the export."""
    known = replace(look, setback=setbacks.read(config.work_dir).get(export))
    state, finding = state_of(known, config, time.time())
    if state == State.QUEUED and finding is None:
        finding = untaken(export, hosts)
    return Row(export, state, finding, look.progress, None if state in FINAL - {State.BLOCKED} else look.estimate, look)


def known_hosts(config: Settings) -> list[Seen]:
    """The hosts of the exports directory; none if nobody can know."""
    with contextlib.suppress(OSError):
        return all_hosts(config, time.time())
    return []


def _asked(export: Path, config: Settings) -> Asked:
    """What a person asked for that the next attempt has, too; nothing where nobody may know."""
    with contextlib.suppress(OSError, MigrationError):
        fd = open_directory(export)
        try:
            return kept(Export(export, fd), config.work_dir)
        finally:
            os.close(fd)
    return Asked()


def state_now(export: Path, config: Settings, *, held: bool | None = None) -> State:
    """The state of an export as of now; held: whether its claim is, if the caller knows. Raise OSError."""
    look = facts.look(export, config)
    return state_of(look if held is None else replace(look, held=held), config, time.time())[0]
