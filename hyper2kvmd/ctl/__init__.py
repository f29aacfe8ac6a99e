"""hyper2kvmctl(1): what people use, with or without the daemon; it works on the same directory."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hyper2kvmd import __version__, journal
from hyper2kvmd.ctl import (
    batch,
    bundle,
    control,
    cutover,
    doctor,
    hosts,
    listing,
    logs,
    manifest,
    migrate,
    notify,
    plan,
    prune,
    report,
    switch,
    validate,
)
from hyper2kvmd.ctl.as_service import become_service, service_of, unit_properties
from hyper2kvmd.ctl.output import refuse, refused
from hyper2kvmd.errors import Code, MigrationError, SettingsError
from hyper2kvmd.exits import EXIT_BUSY, EXIT_CONFIG, EXIT_FAILED, EXIT_MANIFEST, EXIT_UNAVAILABLE
from hyper2kvmd.files import user_name
from hyper2kvmd.options import DEFAULT_PATH, add_settings_options
from hyper2kvmd.settings.load import load_settings

# Their commands claim exports, or write where the service does: root does that as the service's user.
CLAIMING = (migrate, batch, control, cutover, prune, notify)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, from which the manual is made too."""
    parser = argparse.ArgumentParser(
        prog="hyper2kvmctl", description="Migrates exports, checks them, shows their state."
    )
    parser.add_argument("--version", action="version", version=f"hyper2kvmctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (
        migrate,
        batch,
        plan,
        validate,
        manifest,
        listing,
        report,
        control,
        cutover,
        hosts,
        logs,
        bundle,
        prune,
        switch,
        notify,
        doctor,
    ):
        for command in module.add_commands(commands):
            command.add_argument("--json", action="store_true", help="print JSON and nothing else on standard output")
            add_settings_options(command)
            command.set_defaults(claims=module in CLAIMING)
            if module in CLAIMING:
                command.add_argument(
                    "-v", "--verbose", action="store_true", help="print the user that the command runs as"
                )
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
    if "prepare" in options:
        options.prepare(options)
    if options.claims:
        _become_service(options)
    try:
        status: int = options.run(options, config)
    except MigrationError as error:
        print(f"hyper2kvmctl: {error}", file=sys.stderr)
        if error.code in (Code.MANIFEST_INVALID, Code.MANIFEST_UNREADABLE):
            return EXIT_MANIFEST
        if error.code is Code.BUSY:
            return EXIT_BUSY
        return EXIT_UNAVAILABLE if error.code in (Code.LIBVIRT_UNAVAILABLE, Code.TOOL_MISSING) else EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:
        return refuse(*refused(error))
    return status


def _become_service(options: argparse.Namespace) -> None:
    """Go on as the service's user, if that is needed and possible, and say who it is that does the work."""
    user = None
    if os.geteuid() == 0:
        service = service_of((options.config or DEFAULT_PATH).absolute())
        user = become_service(unit_properties(service))
    if options.verbose:
        who = user_name(os.geteuid()) if user is None else f"{user}, the user of {service}"
        print(f"hyper2kvmctl: working as {who}", file=sys.stderr)
