"""`hyper2kvmctl batch`: every export of a directory, a few at a time, with a table of where each one is."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hyper2kvmd import batch
from hyper2kvmd.batch import BatchEntry, BatchPlan
from hyper2kvmd.ctl.listing import STYLE
from hyper2kvmd.ctl.migrate import add_migration_options, overrides_wanted, quiet, stages_wanted
from hyper2kvmd.ctl.output import print_json
from hyper2kvmd.errors import SettingsError
from hyper2kvmd.exits import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_NOT_FOUND, EXIT_TEMPORARY
from hyper2kvmd.queue.asked import Asked
from hyper2kvmd.queue.state import State
from hyper2kvmd.settings.load import load_file, overridden
from hyper2kvmd.settings.model import Hypersdk, Settings
from hyper2kvmd.text import duration, nearest

# In a table that is higher than the terminal, the first of these are shown.
_SHOWN_FIRST = (State.RUNNING, State.FAILED, State.REJECTED, State.BLOCKED, State.RETRYING)


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("batch", help="migrate every export of a directory, and show how it goes")
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory of the exports")
    parser.add_argument(
        "--workers", type=_workers, metavar="N", help="migrations at the same time (default: the setting)"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="plans of single VMs, and their order (YAML)")
    add_migration_options(parser)
    parser.set_defaults(run=run)
    return [parser]


def _workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 1 to 256")
    return int(text)


def run(options: argparse.Namespace, config: Settings) -> int:
    """Migrate what is to be migrated; the exit status is 1 if something failed, 75 if something is not over yet."""
    overrides = overrides_wanted(options)
    # These exports and no others, whatever exporters have handed over.
    update = {"exports_dir": options.directory.resolve(), "hypersdk": Hypersdk()}
    config = quiet(overridden(config, overrides)).model_copy(update=update)
    try:
        plan = BatchPlan() if options.plan is None else load_file(BatchPlan, options.plan)
        entries = batch.entries(config, plan, dry_run=options.dry_run)
        _refuse_unknown(plan, options, {entry.export.name for entry in entries})
    except SettingsError as error:
        print(f"hyper2kvmctl: {error}", file=sys.stderr)
        return EXIT_CONFIG
    if not entries:
        print(f"hyper2kvmctl: {options.directory}: no export in it; name the directory above them", file=sys.stderr)
        return EXIT_NOT_FOUND
    console = Console(stderr=options.json)
    redrawn = console.is_terminal and not console.is_dumb_terminal
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def changed(entry: BatchEntry | None) -> None:
                if redrawn:
                    live.update(_table(entries, time.monotonic(), max(console.height - 4, 3)), refresh=True)
                elif entry is not None:
                    console.print(_line(entry), markup=False, highlight=False, soft_wrap=True)

            batch.run(
                entries,
                config,
                workers=config.workers if options.workers is None else options.workers,
                asked=Asked(stages_wanted(options), None, tuple(overrides)),
                dry_run=options.dry_run,
                changed=changed,
            )
    except KeyboardInterrupt:
        _summary(console, entries)
        print("hyper2kvmctl: stopped; the same command resumes the jobs", file=sys.stderr)
        raise
    if options.json:
        print_json([_as_json(entry) for entry in entries])
    else:
        _summary(console, entries)
    return _status(entries)


def _refuse_unknown(plan: BatchPlan, options: argparse.Namespace, names: set[str]) -> None:
    for name, wanted in plan.vms.items():
        if name not in names and not wanted.hold:
            close = nearest(name, names)
            meant = f"; did you mean {close}?" if close else "; take it out, or name the directory of an export"
            raise SettingsError(f"{options.plan}: vms.{name}: no such export in {options.directory}{meant}")


def _status(entries: list[BatchEntry]) -> int:
    states = {entry.state for entry in entries}
    if states <= {State.SUCCEEDED}:
        return EXIT_DONE
    passing = {State.SUCCEEDED, State.RETRYING, State.RUNNING, State.QUEUED, State.WAITING}
    return EXIT_TEMPORARY if states <= passing else EXIT_FAILED


def _as_json(entry: BatchEntry) -> dict[str, Any]:
    return {
        "export": str(entry.export),
        "state": entry.state,
        "reason": None if entry.reason is None else entry.reason.as_json(),
        "attempts": entry.tries,
        "seconds": round(entry.seconds, 3),
        "report": entry.report,
    }


def _line(entry: BatchEntry) -> str:
    """What is said of an entry that starts or ends where there is no terminal."""
    took = f" after {duration(entry.seconds)}" if entry.runner is None else ""
    why = f": {entry.reason.message}" if entry.reason else ""
    return f"{entry.export.name}: {entry.state}{took}{why}"


def _table(entries: list[BatchEntry], now: float, rows: int) -> Table:
    """Where each one is; what moves and what needs somebody first, if there are more than `rows`."""
    table = Table(box=None, pad_edge=False, expand=True)
    for heading in ("VM", "STATE", "STAGE", "", "RATE", "LEFT", "TIME"):
        right = heading in ("RATE", "LEFT", "TIME")
        # Only a reason can be long: it gets what the others leave.
        table.add_column(
            heading, justify="right" if right else "left", no_wrap=True, ratio=1 if heading == "STAGE" else None
        )
    shown = entries
    if len(entries) > rows:
        weight = {state: place for place, state in enumerate(_SHOWN_FIRST)}
        first = sorted(entries, key=lambda entry: weight.get(entry.state, len(weight)))[: rows - 1]
        shown = [entry for entry in entries if any(entry is one for one in first)]
    for entry in shown:
        table.add_row(Text(entry.export.name), entry.state, *_progress(entry, now), style=STYLE.get(entry.state, ""))
    if len(shown) < len(entries):
        table.add_row(Text(f"and {len(entries) - len(shown)} more"))
    return table


def _progress(entry: BatchEntry, now: float) -> tuple[Text, ProgressBar | Text, str, str, str]:
    """The cells of one that runs: stages, a bar of the one that counts, its rate, the time left, the time so far."""
    if entry.runner is None:
        reason = entry.reason.message if entry.reason else ""
        return Text(reason), Text(), "", "", duration(entry.seconds) if entry.tries else ""
    progress = entry.runner.progress
    stages = [(stage.ratio, stage.rate) for stage in progress.stages.values() if stage.ratio is not None]
    ratio, rate = min(stages, key=lambda stage: stage[0] or 0, default=(None, None))
    left = progress.seconds_left(now)
    return (
        Text(", ".join(progress.stages)),
        Text() if ratio is None else ProgressBar(1.0, ratio, width=20),
        "" if rate is None else f"{rate / 1e6:.0f} MB/s",
        "" if left is None else duration(left),
        duration(now - entry.began),
    )


def _summary(console: Console, entries: list[BatchEntry]) -> None:
    """What became of each, what to do about those that did not succeed, and how many there are of each."""
    table = Table(box=None, pad_edge=False)
    for heading in ("VM", "STATE", "TIME", "RESULT"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        domain = (entry.report or {}).get("domain")
        result = f"domain {domain['name']}" if domain else ""
        took = duration(entry.seconds) if entry.tries else ""
        said = str(entry.reason) if entry.reason else result
        table.add_row(Text(entry.export.name), entry.state, took, Text(said), style=STYLE.get(entry.state, ""))
    console.print(table)
    counts = Counter(entry.state for entry in entries)
    console.print(", ".join(f"{counts[state]} {state}" for state in State if counts[state]), highlight=False)
