"""Files that are safe to open, and durable when they are written."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from pathlib import Path


def write_durably(dir_fd: int, name: str, data: bytes, attempt: int) -> None:
    """Write a file so that after a crash it is the old one or the new one, whole.

    Raise OSError; then the old one is still there.
    """
    temporary = f".{name}.{attempt}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=dir_fd)
    try:
        try:
            os.fchmod(fd, 0o644)  # whatever the umask: reports are for reading
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:  # also what a signal raises
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        raise
    os.fsync(dir_fd)


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def open_directory(directory: Path) -> int:
    """A descriptor of an export's directory. Raise OSError, also for a symbolic link."""
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def fsync_file(path: Path) -> None:
    """Have a file on stable storage. Raise OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def existing_parent(directory: Path) -> Path:
    """The directory, or what it will be made in: the first job makes it."""
    return next(path for path in (directory, *directory.parents) if path.is_dir())
