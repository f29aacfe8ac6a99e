"""What people ask for, as files beside the manifest: hold, cancel, drain."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Literal

from hyper2kvmd.files import create_file, open_directory, timestamp
from hyper2kvmd.queue.hosts import drain_request, draining_all, this_host
from hyper2kvmd.queue.names import CANCEL, HOLD
from hyper2kvmd.settings.model import Settings


def pending(dir_fd: int) -> Literal["hold", "cancel"] | None:
    """What people ask for, of an export, by the files beside its manifest; cancelling goes first."""
    for name, meant in ((CANCEL, "cancel"), (HOLD, "hold")):
        with contextlib.suppress(OSError):
            os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            return "cancel" if meant == "cancel" else "hold"
    return None


def pending_in(directory: Path) -> Literal["hold", "cancel"] | None:
    """The same, of an export that is not open. Raise OSError."""
    fd = open_directory(directory)
    try:
        return pending(fd)
    finally:
        os.close(fd)


def ask(directory: Path, name: str) -> None:
    """Put a request (HOLD, CANCEL or DRAIN) into a directory, if it is not there already. Raise OSError."""
    fd = open_directory(directory)
    try:
        with contextlib.suppress(FileExistsError):
            file = create_file(name, 0o640, dir_fd=fd)
            try:
                os.write(file, f"asked for at {timestamp(time.time())} on {socket.gethostname()}\n".encode())
            finally:
                os.close(file)
        os.fsync(fd)
    finally:
        os.close(fd)


def withdraw(directory: Path, name: str) -> bool:
    """Take a request away again; whether it was there. Raise OSError."""
    try:
        os.unlink(directory / name)
    except FileNotFoundError:
        return False
    return True


def draining(settings: Settings) -> bool:
    """Whether somebody asked that no job is started any more, on all hosts or on this one."""
    return draining_all(settings) or os.path.lexists(settings.exports_dir / drain_request(this_host()))
