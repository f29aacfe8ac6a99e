"""`hyper2kvmctl logs`: what the attempts at one export logged."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from hyper2kvmd.ctl.listing import find, state_now
from hyper2kvmd.exits import EXIT_DONE, EXIT_NOT_FOUND, EXIT_UNAVAILABLE
from hyper2kvmd.files import open_file
from hyper2kvmd.job.context import job_id
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.names import LOG
from hyper2kvmd.queue.state import FINAL
from hyper2kvmd.run import become
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import printable

POLL_SECONDS = 0.2


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("logs", help="print what the attempts at one export logged")
    parser.add_argument("export", help="directory, its name, or the VM's name")
    parser.add_argument("-f", "--follow", action="store_true", help="follow the log until the job ends")
    parser.add_argument("--journal", action="store_true", help="read the journal, with the daemon's messages")
    parser.set_defaults(run=logs)
    return [parser]


def logs(options: argparse.Namespace, config: Settings) -> int:
    """Print the log beside the export, or become a journalctl(1) that prints what the journal has of it."""
    export = find(options.export, config)
    if export is None:
        print(f"hyper2kvmctl: {options.export}: no export of this name in {config.exports_dir}", file=sys.stderr)
        return EXIT_NOT_FOUND
    if options.journal:
        matches = journal_matches(export, config)
        output = "json" if options.json else "short-iso"
        try:
            become(["journalctl", "-o", output, *(["-f"] if options.follow else []), *matches])
        except OSError as error:
            remedy = "without --journal, the log beside the export is printed"
            print(f"hyper2kvmctl: journalctl: {error.strerror}; {remedy}", file=sys.stderr)
            return EXIT_UNAVAILABLE
    try:
        fd = open_file(export / LOG)
    except FileNotFoundError:
        print(f"hyper2kvmctl: {export}: nothing was logged yet", file=sys.stderr)
        return EXIT_NOT_FOUND
    with open(fd, encoding="utf-8", errors="replace") as file:
        while True:
            for line in file:
                # The file lies where others may write: nothing in it moves the cursor of whoever reads it.
                text = printable(line.rstrip("\n"), len(line))
                print(json.dumps(text) if options.json else text, flush=options.follow)
            if not options.follow or state_now(export, config) in FINAL:
                return EXIT_DONE
            time.sleep(POLL_SECONDS)


def journal_matches(export: Path, config: Settings) -> list[str]:
    """What journalctl(1) takes to find what was logged of an export, by its runners and by the daemon."""
    look, report = facts.look(export, config), facts.read_report(export) or {}
    jobs = {job_id(export, look.manifest_sha256 or ""), str(report.get("job", ""))} - {""}
    fields = [f"H2K_JOB_ID={job}" for job in sorted(jobs)]
    fields += [f"H2K_EXPORT={name}" for name in (export.name, export)]
    return [word for field in fields for word in ("+", field)][1:]
