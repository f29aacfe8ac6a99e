"""hyper2kvmctl(1): what people use, with or without the daemon; it works on the same directory."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyper2kvmd import __version__, journal
from hyper2kvmd.errors import Code, MigrationError, SettingsError
from hyper2kvmd.exits import EXIT_CONFIG, EXIT_FAILED, EXIT_MANIFEST, EXIT_NOT_FOUND, EXIT_PERMISSION, EXIT_UNAVAILABLE
from hyper2kvmd.options import add_settings_options
from hyper2kvmd.settings.load import load_settings

# What to do about an error of the operating system, and the exit status that it has.
_DENIED = (EXIT_PERMISSION, "run as root, as the user of the service, or as a member of its group")
_NOT_THERE = (EXIT_NOT_FOUND, "check the path, here or in the settings")
_FULL = (EXIT_FAILED, "free some space there")
_REMEDIES = {
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: (EXIT_PERMISSION, "mount the file system writable"),
    errno.ENOENT: _NOT_THERE,
    errno.ENOTDIR: _NOT_THERE,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
}
_OTHER = (EXIT_FAILED, "look at the file system that it is on, and at `journalctl -k`")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, from which the manual is made too."""
    from hyper2kvmd.ctl import batch, control, doctor, listing, manifest, migrate, notify, report, validate

    parser = argparse.ArgumentParser(
        prog="hyper2kvmctl", description="Migrates exports, checks them, shows their state."
    )
    parser.add_argument("--version", action="version", version=f"hyper2kvmctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (migrate, batch, validate, manifest, listing, report, control, notify, doctor):
        for command in module.add_commands(commands):
            command.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
            add_settings_options(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = build_parser().parse_args(argv)
    try:
        config = load_settings(options.config, tuple(options.overrides))
    except SettingsError as error:
        print(f"hyper2kvmctl: {error}", file=sys.stderr)
        return EXIT_CONFIG
    journal.configure("warning")
    try:
        status: int = options.run(options, config)
    except MigrationError as error:
        print(f"hyper2kvmctl: {error}", file=sys.stderr)
        if error.code in (Code.MANIFEST_INVALID, Code.MANIFEST_UNREADABLE):
            return EXIT_MANIFEST
        return EXIT_UNAVAILABLE if error.code in (Code.LIBVIRT_UNAVAILABLE, Code.TOOL_MISSING) else EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:
        return refuse(*refused(error))
    return status


def refused(error: OSError, where: Path | None = None) -> tuple[int, str]:
    """The exit status for an error of the operating system; what failed, why, and what to do.

    where: the directory that a relative name in the error belongs to.
    """
    status, remedy = _REMEDIES.get(error.errno or 0, _OTHER)
    path = where
    if isinstance(error.filename, str):  # it can be the number of a descriptor
        path = (where or Path()) / error.filename
    return status, f"{f'{path}: ' if path else ''}{error.strerror or error}; {remedy}"


def refuse(status: int, message: str) -> int:
    """Say why a command does nothing, and return its exit status."""
    print(f"hyper2kvmctl: {message}", file=sys.stderr)
    return status


def print_json(shape: Any) -> None:
    """Print the result of a command with --json."""
    print(json.dumps(shape, indent=2, ensure_ascii=False))
