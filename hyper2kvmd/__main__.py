"""The commands of hyper2kvmd(8): run, run-job, check-config."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING

from hyper2kvmd import __version__
from hyper2kvmd.errors import Code, Collected, MigrationError, SettingsError
from hyper2kvmd.exits import EXIT_BUSY, EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_NOT_FOUND, EXIT_PERMISSION, EXIT_USAGE
from hyper2kvmd.files import existing_parent, user_name
from hyper2kvmd.job.events import CHOICES, Emitter
from hyper2kvmd.job.request import Request
from hyper2kvmd.options import add_settings_options
from hyper2kvmd.queue.access import forgo_capabilities
from hyper2kvmd.queue.asked import Asked, keep
from hyper2kvmd.queue.claim import Busy, claim_export, unwritable

if TYPE_CHECKING:
    from hyper2kvmd.settings.model import Settings


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, from which the manual is made too."""
    parser = argparse.ArgumentParser(prog="hyper2kvmd", description="Migrates exported virtual machines to KVM.")
    parser.add_argument("--version", action="version", version=f"hyper2kvmd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="watch the exports directory, and migrate the exports that arrive there")
    run.add_argument("--once", action="store_true", help="migrate the exports that exist, print a summary, and exit")
    job = commands.add_parser("run-job", help="migrate one export under its lock")
    job.add_argument("export", type=Path, help="directory of the export")
    job.add_argument("--events-fd", type=int, metavar="N", help="write events as JSON lines to this descriptor")
    job.add_argument("--dry-run", action="store_true", help="inspect and fix on throw-away overlays, change nothing")
    job.add_argument("--stages", metavar="A,B", help=f"run these of {', '.join(CHOICES)}, and no others")
    job.add_argument("--name", metavar="VM", help="name of the VM, instead of the manifest's")
    job.add_argument("--as-before", action="store_true", help="use the options of the last `migrate`, from any host")
    job.add_argument("--if-ready", action="store_true", help="do nothing while the export is being written")
    job.add_argument("--died", default="", metavar="HOW", help="how the last runner of this export died")
    job.add_argument(
        "--submitted-by",
        nargs=2,
        metavar=("VERSION", "HOST"),
        help="what an engine starts: do nothing unless this host has the caller's release; the report names the caller",
    )
    job.add_argument("--planned", metavar="DIGEST", help="do nothing unless the plan of the VM is the same here")
    check = commands.add_parser("check-config", help="check the settings and print them")
    host = commands.add_parser("check-host", help="say in JSON whether this host can do jobs that an engine sends")
    host.add_argument("mark", type=Path, help="a file in the exports directory, made by the caller")
    for command in (run, job, check, host):
        add_settings_options(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = build_parser().parse_args(argv)
    if options.command == "run-job":
        return _run_job(options)
    config = _settings(options)
    if config is None:
        return EXIT_CONFIG
    if options.command == "check-config":
        return _check_config(config)
    if options.command == "check-host":
        return _check_host(options.mark, config)
    return _run(options, config)


def _check_config(config: Settings) -> int:
    """Print the settings, unless they want what is not installed, or a key that cannot be used."""
    from hyper2kvmd.notify.apprise import missing

    for problem in (missing(config.notify.apprise), _unusable_key(config)):
        if problem is not None:
            print(f"hyper2kvmd: {problem.message}. {problem.hint}", file=sys.stderr)
            return EXIT_CONFIG
    print(config.model_dump_json(by_alias=True, indent=2))
    return EXIT_DONE


def _release(version: str) -> list[str]:
    """What two versions share that work together: the first two numbers."""
    return version.split(".")[:2]


def _settings(options: argparse.Namespace) -> Settings | None:
    """The settings, in force for the log; None if they are bad, which has been said."""
    from hyper2kvmd import journal
    from hyper2kvmd.settings.load import load_settings

    try:
        config = load_settings(options.config, tuple(options.overrides))
    except SettingsError as error:
        print(f"hyper2kvmd: {error}", file=sys.stderr)
        return None
    journal.configure(config.log.level)
    return config


def _run_job(options: argparse.Namespace) -> int:
    """Claim an export, and only then load the libraries that a migration needs: they take longer than the claim."""
    only = None if options.stages is None else frozenset(options.stages.split(","))
    if only is not None and (unknown := only - set(CHOICES)):
        print(f"--stages: {', '.join(sorted(unknown))}: choose from {', '.join(CHOICES)}", file=sys.stderr)
        return EXIT_USAGE
    version, submitter = options.submitted_by or (__version__, None)
    if _release(version) != _release(__version__):
        remedy = f"Install the same release on all hosts; `hyper2kvmctl hosts` lists them, this one is {gethostname()}."
        print(f"hyper2kvmd {__version__} takes no job from {version} on {submitter}. {remedy}", file=sys.stderr)
        return EXIT_CONFIG
    request = Request(
        asked=None if options.as_before else Asked(only, options.name, tuple(options.overrides)),
        dry_run=options.dry_run,
        if_ready=options.if_ready,
        died=options.died,
        submitted_by=submitter,
        planned=options.planned,
    )
    # What is kept for later attempts must mean something.
    config = _settings(options) if options.overrides else None
    if options.overrides and config is None:
        return EXIT_CONFIG
    # Whoever stops us until we can take note of it is heard a moment later.
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    events = Emitter(options.events_fd)
    export = options.export.resolve()
    try:
        claim = claim_export(export)
        forgo_capabilities()
    except Busy:
        hint = f"See `hyper2kvmctl show {export.name}`."
        busy = MigrationError(Code.BUSY, f"{export}: another runner works on it", hint)
        events.emit("finished", status="busy", **busy.finding().as_json())
        print(busy, file=sys.stderr)
        return EXIT_BUSY
    except (FileNotFoundError, NotADirectoryError):
        print(f"{export}: no such export directory", file=sys.stderr)
        return EXIT_NOT_FOUND
    except (OSError, MigrationError) as problem:
        # Not ours to write into: there is no report, only this.
        error = problem if isinstance(problem, MigrationError) else unwritable(export, problem)
        events.emit("finished", status="unclaimed", **error.finding().as_json())
        print(error, file=sys.stderr)
        return EXIT_PERMISSION
    try:
        if request.asked is not None and request.writes:
            try:
                keep(claim.export, request.asked, claim.attempt)  # before anything is done
            except OSError as problem:
                claim.interrupted()
                error = unwritable(export, problem)
                events.emit("finished", status="unclaimed", **error.finding().as_json())
                print(error, file=sys.stderr)
                return EXIT_PERMISSION
        from hyper2kvmd.job.main import run_job
        from hyper2kvmd.run import Tools

        tools = Tools(claim.lock_fd)
        _cancel_on(stops, tools.cancel)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        config = config or _settings(options)
        if config is None:
            claim.interrupted()
            return EXIT_CONFIG
        return run_job(claim, config, tools, events, request)
    finally:
        claim.close()


def _cancel_on(signals: Iterable[signal.Signals], cancel: threading.Event) -> None:
    """Have `cancel` set when one of `signals` comes.

    Not by a handler in Python: it runs between any two steps of the main thread, and a second signal in the midst of
    the first one's `set`, or of the main thread's own, would wait for a lock that its own thread holds.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in signals:
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        os.read(read_fd, 1)
        cancel.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _unusable_key(config: Settings) -> MigrationError | None:
    """Why the key that is to sign reports cannot do so, if there is one, and it cannot."""
    from hyper2kvmd.report.sign import check_key
    from hyper2kvmd.run import Tools

    noted = Collected()
    with noted:
        if config.report.sign_key is not None:
            check_key(Tools(), config.report.sign_key)
    return next(iter(noted.errors), None)


def _check_host(mark: Path, config: Settings) -> int:
    """Say what this host is, and what keeps it from doing jobs. `hyper2kvmctl doctor dispatch` reads it."""
    problems = []
    for name, directory in (("output_dir", config.output_dir), ("work_dir", existing_parent(config.work_dir))):
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            hint = f"Make it, give the service's user access, or set {name} in the settings of that host."
            problems.append({"message": f"cannot write to {directory} ({name})", "hint": hint})
    if unusable := _unusable_key(config):
        problems.append({"message": unusable.message, "hint": unusable.hint})
    shared = mark.exists() and config.exports_dir in mark.parents
    uid = os.geteuid()
    said = {"host": gethostname(), "version": __version__, "uid": uid, "user": user_name(uid), "clock": time.time()}
    said |= {"shared": shared, "problems": problems}
    print(json.dumps(said))
    return EXIT_DONE if shared and not problems else EXIT_FAILED


def _run(options: argparse.Namespace, config: Settings) -> int:
    from hyper2kvmd.daemon.daemon import Daemon
    from hyper2kvmd.daemon.metrics import Metrics
    from hyper2kvmd.settings.load import load_settings

    daemon = Daemon(config, lambda: load_settings(options.config, tuple(options.overrides)), Metrics())
    try:
        status = daemon.run(once=options.once)
    except SettingsError as error:
        print(f"hyper2kvmd: {error}", file=sys.stderr)
        return EXIT_CONFIG
    if options.once:
        print(daemon.status())
    return status


if __name__ == "__main__":
    sys.exit(main())
