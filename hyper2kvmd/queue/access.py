"""Who may write into an export: access control lists, and capabilities."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable, Iterator

from hyper2kvmd.files import grant, open_file


def let_in(fd: int | str) -> None:
    """Let this process's user write into what is somebody else's, by an entry in its access control list.

    fd: a descriptor of an export's directory, or a path that leads to its lock.

    hypersdk makes its directories with mode 0755, which a default ACL of their parent cannot widen. It takes
    CAP_FOWNER, which the service has. Raise PermissionError without it, or where the file system has no such lists.
    """
    try:
        grant(fd, os.geteuid(), os.R_OK | os.W_OK | (os.X_OK if stat.S_ISDIR(os.stat(fd).st_mode) else 0))
    except OSError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from error


def become_user(uid: int, capabilities: Iterable[str]) -> None:
    """Go on, from root, as another user who has these capabilities, and hands them to what it starts. Raise OSError.

    capabilities: by their names, of those that are for the claim: "cap_fowner". Others are left out.
    """
    kept = sum(1 << number for name, number in _CAPABILITIES.items() if name in capabilities)
    _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setresuid(uid, uid, uid)
    _set_capabilities(kept)
    for number in _CAPABILITIES.values():
        if kept & 1 << number:
            _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0)


def open_shared(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> int:
    """open_file(), also for a file that its owner lets nobody else read, as the newest exporters do. Raise OSError."""
    try:
        return open_file(path, dir_fd=dir_fd)
    except PermissionError as denied:
        with pinned(path, dir_fd=dir_fd) as (there, status):
            if status is None:
                raise
            try:
                grant(there, os.geteuid(), os.R_OK)
            except OSError:
                raise denied from None
            return os.open(there, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


@contextlib.contextmanager
def pinned(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> Iterator[tuple[str, os.stat_result | None]]:
    """A path that leads to the file which has a name now, whatever gets the name meanwhile, and the file's status.

    The status is None unless it is a regular file with one name: a second may be that of anything. Raise OSError.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        status = os.fstat(fd)
        plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        yield f"/proc/self/fd/{fd}", status if plain else None
    finally:
        os.close(fd)


def forgo_capabilities() -> None:
    """Give up the capabilities of a service's user: they are for the claim alone, and no tool is to inherit them.

    With them, this process's entries in /proc, by which tools open disks, would also be closed to tools without them.
    """
    if os.geteuid() != 0:
        _set_capabilities(0)


def _set_capabilities(mask: int) -> None:
    """Have these capabilities alone, effective and to be inherited."""
    _call("capset", struct.pack("<Ii", _CAPABILITY_VERSION, 0), struct.pack("<6I", mask, mask, mask, 0, 0, 0))


def _call(name: str, *arguments: int | bytes) -> None:
    if ctypes.CDLL(None, use_errno=True)[name](*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


# linux/capability.h and linux/prctl.h
_CAPABILITY_VERSION = 0x20080522
_CAPABILITIES = {"cap_fowner": 3}
_PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 8, 47, 2
