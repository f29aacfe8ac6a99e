"""The commands of hyper2kvmd(8): run, run-job, check-config."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hyper2kvmd import __version__, journal, settings
from hyper2kvmd.errors import SettingsError
from hyper2kvmd.options import EXIT_CONFIG, add_settings_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="hyper2kvmd", description="Migrates exported virtual machines to KVM.")
    parser.add_argument("--version", action="version", version=f"hyper2kvmd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="watch the exports directory and migrate what is dropped there")
    run.add_argument("--once", action="store_true", help="work off what is there, print a summary, and end")
    job = commands.add_parser("run-job", help="migrate one export under its lock")
    job.add_argument("export", type=Path, help="directory of the export")
    job.add_argument("--events-fd", type=int, metavar="N", help="write events as JSON lines to this descriptor")
    job.add_argument("--dry-run", action="store_true", help="inspect and fix on throw-away overlays, change nothing")
    job.add_argument("--stages", metavar="A,B", help="run only these of inspect, fix, convert, validate, import")
    job.add_argument("--if-ready", action="store_true", help="do nothing while the export is being written")
    job.add_argument("--died", default="", metavar="HOW", help="how the last runner of this export died")
    check = commands.add_parser("check-config", help="check the settings and print them")
    for command in (run, job, check):
        add_settings_options(command)
    options = parser.parse_args(argv)

    try:
        config = settings.load(options.config, tuple(options.overrides))
    except SettingsError as error:
        print(f"hyper2kvmd: {error}", file=sys.stderr)
        return EXIT_CONFIG
    journal.configure(config.log.level)
    if options.command == "check-config":
        print(config.model_dump_json(by_alias=True, indent=2))
        return 0
    if options.command == "run-job":
        # Imported here: the daemon stays small, and the runner is where the big libraries are.
        from hyper2kvmd.runjob import run_job

        return run_job(
            options.export,
            config,
            options.events_fd,
            dry_run=options.dry_run,
            stages=options.stages,
            if_ready=options.if_ready,
            died=options.died,
        )
    return _run(options, config)


def _run(options: argparse.Namespace, config: settings.Settings) -> int:
    from hyper2kvmd.daemon import Daemon
    from hyper2kvmd.metrics import Metrics

    metrics = Metrics()
    if config.metrics.listen:
        try:
            metrics.serve(config.metrics.listen)
        except OSError as error:
            print(
                f"hyper2kvmd: metrics.listen: {config.metrics.listen}: {error}; set another address,"
                " or an empty one to turn metrics off",
                file=sys.stderr,
            )
            return EXIT_CONFIG
    daemon = Daemon(config, lambda: settings.load(options.config, tuple(options.overrides)), metrics)
    status = daemon.run(once=options.once)
    if options.once:
        print(daemon.status())
    return status


if __name__ == "__main__":
    sys.exit(main())
