"""`hyper2kvmctl report`: what became of one export, on the terminal or as a page for people."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from hyper2kvmd.ctl.listing import find
from hyper2kvmd.ctl.migrate import print_report
from hyper2kvmd.ctl.output import refuse
from hyper2kvmd.domain import hardware
from hyper2kvmd.domain.hardware import Hardware
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.exits import EXIT_DONE, EXIT_NOT_FOUND, EXIT_PERMISSION, EXIT_USAGE
from hyper2kvmd.files import open_directory, open_file
from hyper2kvmd.manifest import Manifest, parse
from hyper2kvmd.manifest.problems import place
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.names import BOOT_SCREEN, LOG, REPORT
from hyper2kvmd.queue.state import State, state_of
from hyper2kvmd.report.html import checked, render
from hyper2kvmd.report.model import ManifestRecord, Report
from hyper2kvmd.report.results import Results
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

LOG_BYTES = 1 << 20  # more than the lines that are shown; the log itself may be planted
SCREEN_BYTES = 8 << 20


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("report", help="show the report of one export, or write it as a page for people")
    parser.add_argument("export", help="directory of the export, or its name, or the VM's name")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained HTML page; - is standard output")
    parser.set_defaults(run=report)
    return [parser]


def report(options: argparse.Namespace, config: Settings) -> int:
    """Print the report of one export, or write its page."""
    if options.json and options.html == "-":
        return refuse(EXIT_USAGE, "--json and --html - both write to standard output; give --html a file")
    export = find(options.export, config)
    if export is None:
        message = f"{options.export}: no export of this name in {config.exports_dir}; see `hyper2kvmctl list`"
        return refuse(EXIT_NOT_FOUND, message)
    document = facts.read_report(export)
    if document is None:
        return refuse(EXIT_NOT_FOUND, _no_report(export, config))
    try:
        shown, results = checked(document)
        html = "" if options.html is None else _page(export, document, shown, results)
    except ValidationError as error:
        return refuse(EXIT_NOT_FOUND, _no_such_shape(export, error))
    if options.html == "-":
        sys.stdout.write(html)
        return EXIT_DONE
    if options.html is not None:
        try:
            _write(Path(options.html), html.encode())
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


def _page(export: Path, document: dict[str, Any], shown: Report, results: Results) -> str:
    """The page of one report, with what lies beside it. Raise OSError."""
    fd = open_directory(export)
    try:
        log = beside(fd, LOG, LOG_BYTES).decode(errors="replace")
        # One that the report does not name is an earlier attempt's.
        named = results.boot is not None and results.boot.screenshot is not None
        screen = beside(fd, BOOT_SCREEN, SCREEN_BYTES) if named else None
        return render(document, log, screen, _source(fd, export, shown.manifest))
    finally:
        os.close(fd)


def beside(dir_fd: int, name: str, limit: int) -> bytes:
    """The last bytes of a plain file in the export; empty for what is none, or is not to be read."""
    try:
        fd = open_file(name, dir_fd=dir_fd)
    except OSError:
        return b""
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        # A second name is how somebody has a file shown that he may not read.
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            return b""
        file.seek(max(0, status.st_size - limit))
        return file.read(limit)


def _source(dir_fd: int, export: Path, record: ManifestRecord) -> tuple[Manifest, Hardware] | None:
    """The manifest and the VM's hardware, if the manifest is still the one of the report."""
    if "/" in record.name:
        return None  # somewhere else, which nobody but a planted report says
    try:
        name, data = facts.read_manifest(dir_fd, export, (record.name,))
        manifest = parse(data, name)
        return (manifest, hardware.read(dir_fd, manifest)[0]) if manifest.sha256 == record.sha256 else None
    except (MigrationError, OSError):
        return None


def _write(path: Path, data: bytes) -> None:
    """Write the page so that it is there whole, or the old one is. Raise OSError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):  # a directory, a device: nothing to be replaced
            raise OSError(errno.EINVAL, "it is not a plain file")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o640)  # not for everybody, like the log that it quotes
            os.fsync(file.fileno())
            os.rename(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
