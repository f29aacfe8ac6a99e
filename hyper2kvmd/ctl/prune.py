"""`hyper2kvmctl prune`: removes what nobody needs any more."""

from __future__ import annotations

import argparse
import contextlib
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
from hyper2kvmd.queue.names import LOG
from hyper2kvmd.queue.state import FINAL, Facts, State, state_of
from hyper2kvmd.settings.model import Settings


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("prune", help="remove what nobody needs any more, as the settings' retention says")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    parser.set_defaults(run=prune)
    return [parser]


def prune(options: argparse.Namespace, config: Settings) -> int:
    """Remove what nobody needs: left-overs of jobs that are over, old logs, reports of earlier runs."""
    removed = []
    status = EXIT_DONE
    for path, remove in _prunable(config, time.time()):
        try:
            if not options.dry_run:
                remove()
        except OSError as error:  # the others can be removed all the same
            status = refuse(*refused(error, path.parent))
            continue
        removed.append(str(path))
        if not options.json:
            print(f"{'would remove' if options.dry_run else 'removed'} {path}")
    if options.json:
        print_json({"dry_run": options.dry_run, "removed": removed})
    return status


def _prunable(config: Settings, now: float) -> Iterator[tuple[Path, Callable[[], object]]]:
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
            if idle and work_dir.is_dir() and not steps.in_use(work_dir):
                yield work_dir, partial(_abandon, work_dir, over.get(work_dir.name))
    for directory in (config.output_dir, *config.output.allowed_dirs):
        for path in sorted(directory.glob(".*.partial")):
            with contextlib.suppress(FileNotFoundError):
                names = [*(f".{job}." for job in needed), *(f".{job}-" for job in unknown)]
                known = any(name in path.name for name in names)
                if not known and path.stat().st_mtime < oldest:
                    yield path, partial(path.unlink, missing_ok=True)


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
) -> Iterable[tuple[Path, Callable[[], object]]]:
    """Reports of earlier runs beyond those that are kept, and the log of a job that has been over for long."""
    reports = sorted(
        (path for path in export.glob("migration-report.*.json") if re.search(r"\.\d+\.json$", path.name)),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    found = list(reports[config.retention.old_reports :])
    log = export / LOG
    if finished and log.is_file() and now - log.stat().st_mtime > config.retention.log_days * 86400:
        found.append(log)
    return [(path, partial(path.unlink, missing_ok=True)) for path in found]
