"""`hyper2kvmctl prune`: removes what nobody needs any more."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hyper2kvmd.ctl.output import print_json, refuse, refused
from hyper2kvmd.errors import Finding
from hyper2kvmd.exits import EXIT_DONE
from hyper2kvmd.job import steps
from hyper2kvmd.job.context import job_id
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.claim import Busy, claim_export
from hyper2kvmd.queue.names import LOG, SIGNED
from hyper2kvmd.queue.state import FINAL, Facts, State, state_of
from hyper2kvmd.settings.model import Settings


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("prune", help="remove leftovers of finished jobs, by the setting `retention`")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    parser.set_defaults(run=prune)
    return [parser]


def prune(options: argparse.Namespace, config: Settings) -> int:
    """Remove what nobody needs: left-overs of jobs that are over, old logs, reports of earlier runs."""
    removed: list[str] = []
    status = EXIT_DONE
    for paths, remove in _prunable(config, time.time()):
        try:
            if not options.dry_run:
                remove()
        except OSError as error:  # the others can be removed all the same
            status = refuse(*refused(error, paths[-1].parent))
            continue
        removed += map(str, paths)
        for path in paths if not options.json else ():
            print(f"{'would remove' if options.dry_run else 'removed'} {path}")
    if options.json:
        print_json({"dry_run": options.dry_run, "removed": removed})
    return status


def _prunable(config: Settings, now: float) -> Iterator[tuple[list[Path], Callable[[], object]]]:
    """What can be removed together, and how; all of it is known as ours, by its very name and by a journal."""
    exports = facts.exports(config)[0]
    needed = set()
    unknown = set()  # the beginnings of the jobs' names whose exports cannot be looked at
    oldest = now - config.retention.work_days * 86400
    over: dict[str, Path] = {}
    for export in exports:
        look = facts.look_or_reason(export, config)
        if isinstance(look, Finding):
            print(f"hyper2kvmctl: {look.message}; what it left is kept. {look.hint}", file=sys.stderr)
            unknown.add(job_id(export, "").rpartition("-")[0])
        if not isinstance(look, Facts):
            continue
        state, _ = state_of(look, config, now)
        job = job_id(export, look.manifest_sha256 or "")
        work_dir = config.work_dir / job
        # What is published without a domain is known as ours by its journal alone.
        if state not in FINAL or (state != State.SUCCEEDED and steps.unfinished(work_dir)):
            needed.add(job)
        else:
            over[job] = export
        yield from _old_files(export, config, now, finished=state in FINAL)
    with contextlib.suppress(FileNotFoundError):
        for work_dir in sorted(config.work_dir.iterdir()):
            # One whose export is not here may belong to somebody else: a daemon on another directory, a job by hand.
            kept = work_dir.name in needed or work_dir.name.rpartition("-")[0] in unknown
            idle = work_dir.name in over or (not kept and work_dir.stat().st_mtime < oldest)
            if idle and steps.is_ours(work_dir) and not steps.in_use(work_dir):
                paths = [*steps.unpublished(work_dir), work_dir]
                yield paths, partial(_abandon, work_dir, over.get(work_dir.name))


def _abandon(work_dir: Path, export: Path | None) -> None:
    """Remove what a job left; as long as its export is there, under its claim."""
    if export is None:
        steps.abandon(work_dir)
        return
    with contextlib.suppress(Busy):
        claim = claim_export(export)
        try:
            steps.abandon(work_dir)
            claim.interrupted()
        finally:
            claim.close()


def _old_files(
    export: Path, config: Settings, now: float, *, finished: bool
) -> Iterable[tuple[list[Path], Callable[[], object]]]:
    """Reports of earlier runs beyond those that are kept, and the log of a job that has been over for long."""
    reports = sorted(
        (path for path in export.iterdir() if _is_old_report(path)),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    # A signature first: one without a report would be taken for that of the next report of its number.
    found = [
        path
        for report in reports[config.retention.old_reports :]
        for path in (report.with_name(report.name + SIGNED), report)
        if os.path.lexists(path)
    ]
    log = export / LOG
    if finished and log.is_file() and now - log.stat().st_mtime > config.retention.log_days * 86400:
        found.append(log)
    return [([path], partial(path.unlink, missing_ok=True)) for path in found]


def _is_old_report(path: Path) -> bool:
    """Whether a file is a report that `retry` moved away, not only called like one."""
    if not re.fullmatch(r"migration-report\.\d+\.json", path.name):
        return False
    report = facts.read_report(path.parent, path.name)
    return report is not None and {"schema_version", "status", "job"} <= report.keys()
