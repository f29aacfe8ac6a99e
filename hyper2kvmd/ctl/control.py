"""`hyper2kvmctl retry`, `cancel`, `hold`, `release`, `drain`, `resume`, `logs`, `prune`, all through the directory."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hyper2kvmd.ctl import print_json, refuse, refused
from hyper2kvmd.ctl.listing import find
from hyper2kvmd.daemon.runner import Runner
from hyper2kvmd.exits import EXIT_BUSY, EXIT_DONE, EXIT_FAILED, EXIT_NOT_FOUND, EXIT_UNAVAILABLE
from hyper2kvmd.job import steps
from hyper2kvmd.job.context import job_id
from hyper2kvmd.queue import facts, requests
from hyper2kvmd.queue.claim import Busy, claim_export
from hyper2kvmd.queue.names import CANCEL, DRAIN, HOLD, LOG
from hyper2kvmd.queue.state import FINAL, State, state_of
from hyper2kvmd.run import become
from hyper2kvmd.settings.model import Settings

# A runner looks for wishes twice a second and has its tools ended within ten; NFS may show a file late.
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands to the parser."""
    made = []
    for name, run, text in (
        ("retry", retry, "start a job anew whose error is mended; the old report is kept under another name"),
        ("cancel", cancel, "stop a job for good, and remove what it made"),
        ("hold", hold, "stop a job, or do not start it, until it is released"),
        ("release", release, "let a job on hold go on"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("exports", nargs="+", metavar="EXPORT", help="directory, its name, or the VM's name")
        command.set_defaults(run=_for_each(name, run))
        made.append(command)
    drain_ = commands.add_parser("drain", help="have no job started any more, and wait for those that run")
    drain_.add_argument("--no-wait", action="store_true", help="do not wait for the jobs that run")
    drain_.set_defaults(run=drain)
    resume_ = commands.add_parser("resume", help="have jobs started again after a drain")
    resume_.set_defaults(run=resume)
    logs_ = commands.add_parser("logs", help="print what the attempts at one export logged")
    logs_.add_argument("export", help="directory, its name, or the VM's name")
    logs_.add_argument("-f", "--follow", action="store_true", help="go on printing as the job goes on")
    logs_.add_argument("--journal", action="store_true", help="from the journal: the daemon's words of it, too")
    logs_.set_defaults(run=logs)
    prune_ = commands.add_parser("prune", help="remove what nobody needs any more, as the settings' retention says")
    prune_.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    prune_.set_defaults(run=prune)
    return [*made, drain_, resume_, logs_, prune_]


def _for_each(name: str, run: Callable[[Path, Settings], str]) -> Callable[[argparse.Namespace, Settings], int]:
    """A command for several exports: it does what it can, and its exit status is that of the first failure."""

    def command(options: argparse.Namespace, config: Settings) -> int:
        status = EXIT_DONE
        results = []
        for wanted in options.exports:
            export = find(wanted, config)
            if export is None:
                code, text = EXIT_NOT_FOUND, f"no export of this name in {config.exports_dir}; see `hyper2kvmctl list`"
            else:
                code, text = _attempt(run, export, config)
            status = status or code
            results.append(
                {"export": str(export or wanted), "command": name, "done": code == EXIT_DONE, "result": text}
            )
            if not options.json:
                print(f"{wanted}: {text}", file=sys.stderr if code else sys.stdout)
        if options.json:
            print_json(results)
        return status

    return command


def _attempt(run: Callable[[Path, Settings], str], export: Path, config: Settings) -> tuple[int, str]:
    try:
        return EXIT_DONE, run(export, config)
    except Busy:
        return EXIT_BUSY, "a runner works on it; `hyper2kvmctl hold` or `cancel` stops it"
    except _Refused as reason:
        return EXIT_FAILED, str(reason)
    except OSError as error:
        return refused(error, export)


class _Refused(Exception):
    """What is asked for makes no sense in the state that the export is in."""


def retry(export: Path, config: Settings) -> str:
    """Start anew. The job goes on with the steps that are done, if these still fit."""
    claim = claim_export(export)
    try:
        before = _state(export, config, held=False)
        claim.forget()
    finally:
        claim.close()
    if requests.pending_in(export) == "hold":
        return f"was {before}, will be tried again once it is released"
    return f"was {before}, will be tried again"


def cancel(export: Path, config: Settings) -> str:
    """Stop a job for good."""
    state = _state(export, config)
    if state in (State.SUCCEEDED, State.FAILED, State.REJECTED, State.CANCELLED):
        raise _Refused(f"is {state} already")
    requests.ask(export, CANCEL)
    # Whoever runs it now, here or elsewhere, is given the time to stop; then one of ours says so in a report.
    _wait_until(lambda: _state(export, config) != State.RUNNING)
    if _state(export, config) not in FINAL or requests.pending_in(export) == "cancel":
        runner = Runner(export, config)
        try:
            _wait_until(lambda: runner.poll() is not None)
        finally:
            runner.close()
    state = _state(export, config)
    if state != State.CANCELLED:
        raise _Refused(f"is {state}: it ended before it could be cancelled")
    return "cancelled"


def hold(export: Path, config: Settings) -> str:
    """Stop a job until it is released."""
    state = _state(export, config)
    if state in FINAL - {State.BLOCKED}:
        raise _Refused(f"is {state} already")
    requests.ask(export, HOLD)
    _wait_until(lambda: _state(export, config) != State.RUNNING)
    return "on hold"


def release(export: Path, config: Settings) -> str:
    """Let a job on hold go on."""
    if not requests.withdraw(export, HOLD):
        raise _Refused("is not on hold")
    return f"released, is {_state(export, config)} now"


def drain(options: argparse.Namespace, config: Settings) -> int:
    """Have no daemon on this directory start another job."""
    try:
        requests.ask(config.exports_dir, DRAIN)
    except OSError as error:
        return refuse(*refused(error, config.exports_dir))
    if not options.no_wait:
        while running := _running(config):
            print(f"waiting for {', '.join(export.name for export in running)}", file=sys.stderr)
            _wait_until(lambda: not _running(config), seconds=10.0)
    left = [str(export) for export in _running(config)]
    if options.json:
        print_json({"draining": True, "running": left})
    else:
        print("drained; `hyper2kvmctl resume` has jobs started again" if not left else "no job is started any more")
    return EXIT_DONE


def resume(options: argparse.Namespace, config: Settings) -> int:
    """Have jobs started again."""
    was = requests.withdraw(config.exports_dir, DRAIN)
    if options.json:
        print_json({"draining": False, "was_draining": was})
    else:
        print("jobs are started again" if was else "nobody had asked for a drain")
    return EXIT_DONE


def logs(options: argparse.Namespace, config: Settings) -> int:
    """Print the log beside the export, or become a journalctl(1) that prints what the journal has of it."""
    export = find(options.export, config)
    if export is None:
        print(f"hyper2kvmctl: {options.export}: no export of this name in {config.exports_dir}", file=sys.stderr)
        return EXIT_NOT_FOUND
    if options.journal:
        look, report = facts.look(export, config), facts.read_report(export) or {}
        jobs = {job_id(export, look.manifest_sha256 or ""), str(report.get("job", ""))} - {""}
        fields = [f"H2K_JOB_ID={job}" for job in sorted(jobs)] + [
            f"H2K_EXPORT={name}" for name in (export.name, export)
        ]
        matches = [word for field in fields for word in ("+", field)][1:]
        output = "json" if options.json else "short-iso"
        try:
            become(["journalctl", "-o", output, *(["-f"] if options.follow else []), *matches])
        except OSError as error:
            remedy = "without --journal, the log beside the export is printed"
            print(f"hyper2kvmctl: journalctl: {error.strerror}; {remedy}", file=sys.stderr)
            return EXIT_UNAVAILABLE
    try:
        fd = os.open(export / LOG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        print(f"hyper2kvmctl: {export}: nothing was logged yet", file=sys.stderr)
        return EXIT_NOT_FOUND
    with open(fd, encoding="utf-8", errors="replace") as file:
        while True:
            for line in file:
                # The file lies where others may write: nothing in it moves the cursor of whoever reads it.
                text = "".join(char if char.isprintable() or char == "\t" else "�" for char in line.rstrip("\n"))
                print(json.dumps(text) if options.json else text, flush=options.follow)
            if not options.follow or _state(export, config) in FINAL:
                return EXIT_DONE
            time.sleep(POLL_SECONDS)


def prune(options: argparse.Namespace, config: Settings) -> int:
    """Remove what nobody needs: left-overs of jobs that are over, old logs, reports of earlier runs."""
    removed = []
    for path, remove in _prunable(config, time.time()):
        removed.append(str(path))
        if not options.dry_run:
            remove()
        if not options.json:
            print(f"{'would remove' if options.dry_run else 'removed'} {path}")
    if options.json:
        print_json({"dry_run": options.dry_run, "removed": removed})
    return EXIT_DONE


def _prunable(config: Settings, now: float) -> Iterator[tuple[Path, Callable[[], object]]]:
    exports = facts.exports(config)[0]
    needed = set()
    oldest = now - config.retention.work_days * 86400
    over: dict[str, Path] = {}
    for export in exports:
        look = facts.look(export, config)
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
            idle = work_dir.name in over or (work_dir.name not in needed and work_dir.stat().st_mtime < oldest)
            if idle and work_dir.is_dir() and not steps.in_use(work_dir):
                yield work_dir, partial(_abandon, work_dir, over.get(work_dir.name))
    for directory in (config.output_dir, *config.output.allowed_dirs):
        for path in sorted(directory.glob(".*.partial")):
            with contextlib.suppress(FileNotFoundError):
                known = any(f".{job}." in path.name for job in needed)
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


def _state(export: Path, config: Settings, *, held: bool | None = None) -> State:
    look = facts.look(export, config)
    return state_of(look if held is None else replace(look, held=held), config, time.time())[0]


def _running(config: Settings) -> list[Path]:
    return [export for export in facts.exports(config)[0] if _state(export, config) == State.RUNNING]


def _wait_until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Wait until something is so, but not for ever: whoever asked looks at the state afterwards."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
