"""Gives a finished disk its final name, durably, and never over another file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import fsync_directory


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its final name in the same directory, durably, and never over another file.

    Raise MigrationError (output_exists) or OSError.
    """
    try:
        os.link(temporary, final, follow_symlinks=False)
    except FileExistsError:
        # A crash between the two steps leaves both names, and a second try finds them.
        if not os.path.samestat(temporary.lstat(), final.lstat()):
            raise output_exists(final) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        raise MigrationError(
            Code.OUTPUT_DENIED,
            f"{final.parent} is on a file system without hard links, which publishing without overwriting needs",
            "Set output_dir to a directory on a Linux file system.",
            field="output_dir",
        ) from None
    temporary.unlink()
    fsync_directory(final.parent)


def output_exists(path: Path) -> MigrationError:
    """The error for a file that is in the way."""
    return MigrationError(
        Code.OUTPUT_EXISTS,
        f"{path} already exists",
        "If it is not needed, move it away; otherwise give the VM another name in the manifest."
        " Then run `hyper2kvmctl retry`.",
    )
