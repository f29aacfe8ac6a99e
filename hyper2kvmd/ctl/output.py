"""How commands answer: JSON, and errors of the system with their remedies."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

from hyper2kvmd.exits import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_PERMISSION

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
