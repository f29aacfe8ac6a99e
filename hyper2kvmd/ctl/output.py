"""How commands answer: JSON, and errors of the system with their remedies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hyper2kvmd.exits import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_PERMISSION
from hyper2kvmd.files import REMEDIES, explained, trouble

# The exit status for each kind of trouble with files, and what to do for the person at the keyboard.
_STATUS = {"denied": EXIT_PERMISSION, "read-only": EXIT_PERMISSION, "missing": EXIT_NOT_FOUND}
_REMEDIES = {
    **REMEDIES,
    "denied": "run it as root, or give the service's user access, for example with setfacl",
    "missing": "check the path, here or in the settings",
}


def refused(error: OSError, where: Path | None = None) -> tuple[int, str]:
    """The exit status for an error of the operating system; what failed, why, and what to do.

    where: the directory that a relative name in the error belongs to.
    """
    kind = trouble(error)
    return _STATUS.get(kind, EXIT_FAILED), f"{explained(error, where)}; {_REMEDIES[kind]}"


def refuse(status: int, message: str) -> int:
    """Say why a command does nothing, and return its exit status."""
    print(f"hyper2kvmctl: {message}", file=sys.stderr)
    return status


def print_json(shape: Any) -> None:
    """Print the result of a command with --json."""
    print(json.dumps(shape, indent=2, ensure_ascii=False))
