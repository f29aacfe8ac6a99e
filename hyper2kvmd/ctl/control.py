"""`hyper2kvmctl retry`, `cancel`, `hold`, `release`, `drain`, `resume`, all through the directory."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyper2kvmd.ctl.listing import find, state_now
from hyper2kvmd.ctl.output import print_json, refuse, refused
from hyper2kvmd.daemon.runner import Runner
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.exits import EXIT_BUSY, EXIT_DONE, EXIT_FAILED, EXIT_NOT_FOUND
from hyper2kvmd.job import steps
from hyper2kvmd.job.context import job_id
from hyper2kvmd.job.undo import OUTPUT_KEPT
from hyper2kvmd.queue import facts, requests
from hyper2kvmd.queue.claim import Busy, claim_export
from hyper2kvmd.queue.hosts import all_hosts, drain_request, drained_hosts, draining_all, make_directory
from hyper2kvmd.queue.names import CANCEL, DRAIN, HOLD
from hyper2kvmd.queue.state import FINAL, Facts, State
from hyper2kvmd.settings.model import Settings

# A runner looks for requests twice a second and has its tools ended within ten; NFS may show a file late.
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands to the parser."""
    made = []
    for name, run, text in (
        ("retry", retry, "retry a job after you fixed its error; the old report is kept under another name"),
        ("cancel", cancel, "stop a job for good, and remove what it made"),
        ("hold", hold, "stop a job, or do not start it, until it is released"),
        ("release", release, "resume a job that is on hold"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("exports", nargs="+", metavar="EXPORT", help="directory, its name, or the VM's name")
        command.set_defaults(run=_for_each(name, run))
        made.append(command)
    drain_ = commands.add_parser("drain", help="start no more jobs, and wait for those that run")
    drain_.add_argument("--no-wait", action="store_true", help="do not wait for the jobs that run")
    drain_.set_defaults(run=drain)
    resume_ = commands.add_parser("resume", help="start jobs again after a drain")
    resume_.set_defaults(run=resume)
    for command in (drain_, resume_):
        command.add_argument("--host", metavar="NAME", help="on this host only, as `hyper2kvmctl hosts` has its name")
    return [*made, drain_, resume_]


def _for_each(name: str, run: Callable[[Path, Settings], str]) -> Callable[[argparse.Namespace, Settings], int]:
    """A command for several exports: it does what it can, and its exit status is that of the first failure."""

    def command(options: argparse.Namespace, config: Settings) -> int:
        status = EXIT_DONE
        results = []
        for wanted in options.exports:
            export, code, text = _attempt(run, wanted, config)
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


def _attempt(run: Callable[[Path, Settings], str], wanted: str, config: Settings) -> tuple[Path | None, int, str]:
    """The export that was named, the exit status, and what came of it."""
    try:
        export = find(wanted, config)
    except MigrationError as error:  # several are of a VM of that name
        return None, EXIT_BUSY, str(error)
    if export is None:
        return None, EXIT_NOT_FOUND, f"no export of this name in {config.exports_dir}; see `hyper2kvmctl list`"
    try:
        return export, EXIT_DONE, run(export, config)
    except Busy:
        return export, EXIT_BUSY, "a runner works on it; `hyper2kvmctl hold` or `cancel` stops it"
    except _Refused as reason:
        return export, EXIT_FAILED, str(reason)
    except OSError as error:
        return export, *refused(error, export)


class _Refused(Exception):
    """What is asked for makes no sense in the state that the export is in."""


def retry(export: Path, config: Settings) -> str:
    """Start again. The job goes on with the steps that are done, if these still fit."""
    claim = claim_export(export)
    try:
        before = state_now(export, config, held=False)
        done = facts.read_cutover(export, facts.read_report(export) or {})
        if done is not None and done.status != "undone":
            raise _Refused(
                f"was cut over at {done.started_at}, and its disks are in use;"
                f" `hyper2kvmctl cutover --undo {export.name}` comes first"
            )
        claim.forget()
    finally:
        claim.close()
    if requests.pending_in(export) == "hold":
        return f"was {before}, will be retried once it is released"
    return f"was {before}, will be retried"


def cancel(export: Path, config: Settings) -> str:
    """Stop a job for good."""
    state = state_now(export, config)
    if state in (State.SUCCEEDED, State.FAILED, State.REJECTED) or (
        state == State.CANCELLED and not steps.unfinished(_work_dir(export, config))
    ):
        raise _Refused(f"is {state} already")
    requests.ask(export, CANCEL)
    # Whoever runs it now, here or elsewhere, is given the time to stop; then one of ours says so in a report.
    _wait_until(lambda: state_now(export, config) != State.RUNNING)
    if state_now(export, config) not in FINAL or requests.pending_in(export) == "cancel":
        runner = Runner(export, config)
        try:
            _wait_until(lambda: runner.poll() is not None)
        finally:
            runner.close()
    state = state_now(export, config)
    if state != State.CANCELLED:
        raise _Refused(f"is {state}: it ended before it could be cancelled")
    if steps.unfinished(_work_dir(export, config)):
        warnings = (facts.read_report(export) or {}).get("warnings", [])
        kept = next((warning for warning in warnings if warning["code"] == OUTPUT_KEPT), None)
        raise _Refused("cancelled, but its disks are kept" if kept is None else f"{kept['message']}. {kept['hint']}")
    return "cancelled"


def _work_dir(export: Path, config: Settings) -> Path:
    return config.work_dir / job_id(export, facts.look(export, config).manifest_sha256 or "")


def hold(export: Path, config: Settings) -> str:
    """Stop a job until it is released."""
    state = state_now(export, config)
    if state in FINAL - {State.BLOCKED}:
        raise _Refused(f"is {state} already")
    requests.ask(export, HOLD)
    _wait_until(lambda: state_now(export, config) != State.RUNNING)
    return "on hold"


def release(export: Path, config: Settings) -> str:
    """Let a job on hold go on."""
    if not requests.withdraw(export, HOLD):
        raise _Refused("is not on hold")
    return f"released, is {state_now(export, config)} now"


def drain(options: argparse.Namespace, config: Settings) -> int:
    """Have no daemon on this directory, or that of one host, start another job."""
    host = options.host
    if host is not None and host not in (known := [seen.beat.host for seen in all_hosts(config, time.time())]):
        names = ", ".join(known) or "none has said that it is there yet"
        return refuse(EXIT_NOT_FOUND, f"{host}: no such host works on {config.exports_dir}; the hosts are: {names}")
    try:
        if host is not None:
            make_directory(config)
        requests.ask(config.exports_dir, _drain_name(host))
    except OSError as error:
        return refuse(*refused(error, config.exports_dir))
    if not options.no_wait:
        while running := _running(config, host):
            print(f"waiting for {', '.join(export.name for export in running)}", file=sys.stderr)
            _wait_until(lambda: not _running(config, host), seconds=10.0)
    left = [str(export) for export in _running(config, host)]
    where, again = ("", "") if host is None else (f" on {host}", f" --host {host}")
    if options.json:
        print_json({"draining": True, "host": host, "running": left})
    elif left:
        print(f"no job is started any more{where}")
    else:
        print(f"drained{where}; `hyper2kvmctl resume{again}` starts jobs again")
    return EXIT_DONE


def resume(options: argparse.Namespace, config: Settings) -> int:
    """Have jobs started again."""
    was = requests.withdraw(config.exports_dir, _drain_name(options.host))
    if options.json:
        print_json({"draining": False, "host": options.host, "was_draining": was})
    else:
        print("jobs are started again" if was else "nobody had asked for this drain")
        if left := _other_drains(options.host, config):
            print(f"hyper2kvmctl: {left}", file=sys.stderr)
    return EXIT_DONE


def _other_drains(host: str | None, config: Settings) -> str:
    """What still keeps hosts from starting jobs, after a drain of all hosts or of one was ended; "" if nothing does."""
    if host is not None:
        everywhere = draining_all(config)
        return "all hosts are drained still; `hyper2kvmctl resume` ends that" if everywhere else ""
    names = sorted(drained_hosts(config))
    return f"drained still, by name: {', '.join(names)}; `hyper2kvmctl resume --host HOST` ends that" if names else ""


def _drain_name(host: str | None) -> str:
    return DRAIN if host is None else drain_request(host)


def _running(config: Settings, host: str | None) -> list[Path]:
    """The exports that a job works on, on one host or on any."""
    looks = ((export, facts.look_or_reason(export, config)) for export in facts.exports(config)[0])
    running = [(export, look) for export, look in looks if isinstance(look, Facts) and look.held]
    # A job says within a moment where it runs; until then it may be anywhere.
    return [export for export, look in running if host is None or look.progress is None or look.progress.host == host]


def _wait_until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Wait until something is so, but not for ever: whoever asked looks at the state afterwards."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
