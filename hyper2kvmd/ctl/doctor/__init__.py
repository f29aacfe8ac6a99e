"""`hyper2kvmctl doctor`: what the host needs, checked for real, with the remedy for what is missing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from hyper2kvmd.ctl.as_service import become_service, service_of, unit_properties
from hyper2kvmd.ctl.doctor.diagnosis import Diagnosis, Host
from hyper2kvmd.ctl.doctor.directories import (
    check_exports,
    check_handover,
    check_locks,
    check_output,
    check_watching,
    check_work,
)
from hyper2kvmd.ctl.doctor.dispatch import check_dispatch
from hyper2kvmd.ctl.doctor.host import (
    check_kvm,
    check_libguestfs,
    check_memory,
    check_programs,
    check_settings,
    check_user,
    check_windows,
)
from hyper2kvmd.ctl.doctor.libvirt import check_libvirt
from hyper2kvmd.ctl.doctor.notify import check_notify
from hyper2kvmd.ctl.doctor.service import check_metrics, check_service, check_signing
from hyper2kvmd.ctl.output import print_check, print_json
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.exits import EXIT_DONE, EXIT_FAILED, EXIT_USAGE
from hyper2kvmd.files import explained, remedy
from hyper2kvmd.options import DEFAULT_PATH
from hyper2kvmd.settings.model import Settings


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "doctor", help="check everything that the host needs; as root, with the rights of the service's user"
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"only these of {', '.join(CHECKS)}")
    parser.set_defaults(run=doctor)
    return [parser]


def doctor(options: argparse.Namespace, config: Settings) -> int:
    """Run every check, or those that are named, and print what they found. A warning is not a failure."""
    if unknown := [name for name in options.checks if name not in CHECKS]:
        print(f"doctor: {', '.join(unknown)}: choose from {', '.join(CHECKS)}", file=sys.stderr)
        return EXIT_USAGE
    settings_file = (options.config or DEFAULT_PATH).absolute()
    host = Host(config, settings_file, unit_properties(service_of(settings_file)))
    become_service(host.unit)
    console = Console()
    rows = []
    for name in options.checks or CHECKS:
        for row in _examine(name, host):
            rows.append(row)
            if not options.json:
                print_check(console, **row)
    if options.json:
        print_json(rows)
    return EXIT_FAILED if any(row["result"] == "failed" for row in rows) else EXIT_DONE


def _examine(name: str, host: Host) -> list[dict[str, Any]]:
    """Rows for what a check found: one if all is well, and one for everything that is wrong."""
    diagnosis, detail = Diagnosis(), ""
    try:
        with diagnosis:
            detail = CHECKS[name](host, diagnosis)
    except OSError as error:
        hint = f"{remedy(error)}, or change the setting."
        diagnosis.errors.append(MigrationError(Code.IO_ERROR, explained(error), hint))
    found = [("failed", finding) for finding in diagnosis.findings()]
    found += [("warning", finding) for finding in dict.fromkeys(diagnosis.warnings)]
    rows: list[dict[str, Any]] = []
    if detail and not diagnosis.errors:
        rows.append({"check": name, "result": "ok", "detail": detail, "finding": None})
    rows += [
        {"check": name, "result": result, "detail": finding.message, "finding": finding.as_json()}
        for result, finding in found
    ]
    return rows


CHECKS: dict[str, Callable[[Host, Diagnosis], str]] = {
    "user": check_user,
    "settings": check_settings,
    "programs": check_programs,
    "exports": check_exports,
    "watching": check_watching,
    "locks": check_locks,
    "handover": check_handover,
    "output": check_output,
    "work": check_work,
    "memory": check_memory,
    "kvm": check_kvm,
    "libguestfs": check_libguestfs,
    "libvirt": check_libvirt,
    "windows": check_windows,
    "service": check_service,
    "signing": check_signing,
    "metrics": check_metrics,
    "notify": check_notify,
    "dispatch": check_dispatch,
}
