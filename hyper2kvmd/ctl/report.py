"""`hyper2kvmctl report`: what became of one export, on the terminal or as a page, and whether that is still so."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from hyper2kvmd.ctl.campaign import report_all
from hyper2kvmd.ctl.evidence import add_options, verify_report
from hyper2kvmd.ctl.listing import find
from hyper2kvmd.ctl.migrate import print_report
from hyper2kvmd.ctl.output import refuse
from hyper2kvmd.ctl.pages import page_of, write_page
from hyper2kvmd.exits import EXIT_DONE, EXIT_NOT_FOUND, EXIT_PERMISSION, EXIT_USAGE
from hyper2kvmd.manifest.problems import place
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.queue.state import State, state_of
from hyper2kvmd.report.html import checked
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "report", help="show the report of one export or of all, write it as a page, or verify its signature"
    )
    parser.add_argument(
        "export",
        nargs="?",
        help="directory of the export, or its name, or the VM's name; or the word verify, with what is to be verified",
    )
    parser.add_argument(
        "verified", nargs="?", metavar="EXPORT_OR_REPORT", help="after the word verify: an export, or a report's file"
    )
    parser.add_argument("--all", action="store_true", help="all exports at a glance, instead of one")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained HTML page; - is standard output")
    parser.add_argument(
        "--csv", metavar="FILE", help="with --all: write a table for a spreadsheet; - is standard output"
    )
    add_options(parser)
    parser.set_defaults(run=report)
    return [parser]


def report(options: argparse.Namespace, config: Settings) -> int:
    """Print the report of one export, or write its page; or the campaign's. Or verify one."""
    if options.verified is not None:
        return _verify(options, config)
    if options.disks or options.public_key is not None or options.allowed_signers is not None:
        return refuse(EXIT_USAGE, "--disks, --public-key and --allowed-signers are for `report verify EXPORT`")
    if options.all == (options.export is not None):
        return refuse(EXIT_USAGE, "name an export, or say --all")
    if options.all:
        return report_all(options, config)
    if options.csv is not None:
        return refuse(EXIT_USAGE, "--csv is for --all; one report is in JSON")
    if options.json and options.html == "-":
        return refuse(EXIT_USAGE, "--json and --html - both write to standard output; give --html a file")
    export = find(options.export, config)
    if export is None:
        hint = "say what to verify: `report verify EXPORT`" if options.export == "verify" else "see `hyper2kvmctl list`"
        return refuse(EXIT_NOT_FOUND, f"{options.export}: no export of this name in {config.exports_dir}; {hint}")
    document = facts.read_report(export)
    if document is None:
        return refuse(EXIT_NOT_FOUND, _no_report(export, config))
    try:
        shown, results = checked(document)
        html = "" if options.html is None else page_of(export, document, shown, results)
    except ValidationError as error:
        return refuse(EXIT_NOT_FOUND, _no_such_shape(export, error))
    if options.html == "-":
        sys.stdout.write(html)
        return EXIT_DONE
    if options.html is not None:
        try:
            write_page(Path(options.html), html.encode())
        except OSError as error:
            message = f"{options.html}: the page cannot be written: {error.strerror}; choose another file"
            return refuse(EXIT_PERMISSION, message)
    if options.json:
        print(json.dumps(document, indent=2))  # in ASCII: a planted report can hold what no encoding can write
    elif options.html is not None:
        print(f"wrote {plain(options.html, 4096)}")
    else:
        print_report(Console(), shown.model_dump(mode="json"))
    return EXIT_DONE


def _verify(options: argparse.Namespace, config: Settings) -> int:
    """Find the report, and verify it."""
    if options.export != "verify" or options.all or options.html is not None or options.csv is not None:
        return refuse(EXIT_USAGE, "name one export; or `verify` and what to verify, without --all, --html and --csv")
    export = find(options.verified, config)
    if export is None and Path(options.verified).is_file():
        return verify_report(options, config, Path(options.verified).resolve())
    if export is None:
        message = f"{options.verified}: no export of this name in {config.exports_dir}, and no file of a report"
        return refuse(EXIT_NOT_FOUND, f"{message}; see `hyper2kvmctl list`")
    if not (export / REPORT).exists():
        return refuse(EXIT_NOT_FOUND, _no_report(export, config))
    return verify_report(options, config, export / REPORT)


def _no_report(export: Path, config: Settings) -> str:
    """Why an export has no report yet, and what to do about it. Raise OSError."""
    state, finding = state_of(facts.look(export, config), config, time.time())
    if finding is not None:
        return f"{export} has no report yet, it is {state}: {finding}"
    if state == State.RUNNING:
        return f"{export} has no report yet, it is {state}; see `hyper2kvmctl logs -f {export.name}`"
    return f"{export} has no report yet, it is {state}; the daemon migrates it, or `hyper2kvmctl migrate {export}` does"


def _no_such_shape(export: Path, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return (
        f"{export / REPORT} is not a report of this program: {place(first['loc'])}: {plain(first['msg'])}; "
        "use the version that wrote it, or move it away to have the VM migrated"
    )
