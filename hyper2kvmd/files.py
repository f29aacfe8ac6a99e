"""Files that are safe to open, durable when they are written, and open to whom they should be."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pwd
import re
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Literal


def write_durably(dir_fd: int, name: str, data: bytes, attempt: int) -> None:
    """Write a file so that after a crash it is the old one or the new one, whole.

    Raise OSError; then the old one is still there.
    """
    write_whole(dir_fd, name, data, attempt, flush=True)
    os.fsync(dir_fd)


def write_whole(dir_fd: int, name: str, data: bytes, number: int, *, flush: bool = False) -> None:
    """Write a file so that a reader finds the old one or the new one, whole. flush: so that a crash does not, either.

    number: what tells its writer from others, for the temporary name. Raise OSError; then the old one is still there.
    """
    temporary = f".{name}.{number}.tmp"
    fd = create_file(temporary, 0o644, dir_fd=dir_fd)
    try:
        try:
            os.fchmod(fd, 0o644)  # whatever the umask: reports are for reading
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if flush:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:  # also what a signal raises
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        raise


def remove_leftovers(dir_fd: int, name: str) -> None:
    """Remove what write_durably() of dead processes left of a file that nobody else may be writing. Raise OSError."""
    for leftover in os.listdir(dir_fd):
        if re.fullmatch(rf"\.{re.escape(name)}\.\d+\.tmp", leftover):
            os.unlink(leftover, dir_fd=dir_fd)


def open_file(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> int:
    """A descriptor for reading. Follows no link in the last part, and waits for no writer of a FIFO. Raise OSError."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)


def inside(path: str, directory: Path) -> str:
    """Where in `directory` a path is that a file there names: an absolute one leads nowhere else.

    One that is not in the directory is stale; then its last part is what counts.
    """
    if not path.startswith("/"):
        return path
    pure = PurePosixPath(path)
    below = pure.is_relative_to(directory) and pure != PurePosixPath(directory)
    return str(pure.relative_to(directory)) if below else pure.name


def open_directory_of(dir_fd: int, path: str) -> int:
    """A descriptor of the directory that a relative path's last part is in. Raise OSError; no link is followed."""
    fd = os.dup(dir_fd)
    for part in PurePosixPath(path).parts[:-1]:
        try:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


def create_file(path: str | os.PathLike[str], mode: int, *, dir_fd: int | None = None) -> int:
    """A descriptor for writing to a file that did not exist. Raise OSError, also for a link of that name."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=dir_fd)


# What we write into an export, finished or not.
OURS = re.compile(
    r"\.{1,2}hyper2kvmd\..*|\.?(migration|cutover)-report(\.\d+)?\.json(\.sig)?(\.\d+\.tmp)?"
    r"|\.?(boot-test|cutover)\.(log|png)(\.\d+\.tmp)?"
)


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def open_directory(directory: Path) -> int:
    """A descriptor of an export's directory. Raise OSError, also for a symbolic link."""
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def fsync_directory(directory: Path) -> None:
    """Have the names in a directory on stable storage. Raise OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


Trouble = Literal["denied", "read-only", "missing", "full", "other"]

# What to do about each kind of trouble, for whoever looks after the service.
REMEDIES: dict[Trouble, str] = {
    "denied": "give the service's user access, for example with setfacl",
    "read-only": "mount the file system writable (`mount -o remount,rw`)",
    "missing": "create or mount it",
    "full": "free some space there",
    "other": "look at the file system that it is on, and at `journalctl -k`",
}
_TROUBLES: dict[int, Trouble] = {
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EROFS: "read-only",
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
}


def trouble(error: OSError) -> Trouble:
    """What an error of the operating system is about, as REMEDIES and the exit statuses of commands know it."""
    return _TROUBLES.get(error.errno or 0, "other")


def remedy(error: OSError) -> str:
    """What to do about an error of the operating system, as the beginning of a sentence."""
    text = REMEDIES[trouble(error)]
    return f"{text[0].upper()}{text[1:]}"


def explained(error: OSError, where: Path | None = None) -> str:
    """An error of the operating system in words: the path, if there is one, and the reason.

    where: the directory that a relative name in the error belongs to.
    """
    path = where
    if isinstance(error.filename, str):  # it can be the number of a descriptor
        path = (where or Path()) / error.filename
    return f"{f'{path}: ' if path else ''}{error.strerror or error}"


# Access control lists, in the format of linux/posix_acl_xattr.h: a version, and entries in the order of their tags.
_ACL = "system.posix_acl_access"
_NO_ID = 2**32 - 1
_OWNER, _USER, _GROUP, _NAMED_GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_CAPPED = (_USER, _GROUP, _NAMED_GROUP)  # by the mask


def _access_list(fd: int | str | Path) -> list[tuple[int, int, int]]:
    """Tag, rights and id of every entry but the mask, with what the mask leaves them. Raise OSError."""
    mode = os.stat(fd).st_mode
    try:
        entries = [*struct.iter_unpack("<HHI", os.getxattr(fd, _ACL)[4:])]
    except OSError:  # none: the mode says it all
        entries = [(tag, mode >> shift & 7, _NO_ID) for tag, shift in ((_OWNER, 6), (_GROUP, 3), (_OTHER, 0))]
    mask = next((rights for tag, rights, _ in entries if tag == _MASK), 7)
    return [(tag, rights & mask if tag in _CAPPED else rights, id) for tag, rights, id in entries if tag != _MASK]


def _set_access_list(fd: int | str, entries: list[tuple[int, int, int]]) -> None:
    """Have these entries and a mask that takes nothing from them; a mode is enough for those that a mode can say."""
    mask = functools.reduce(int.__or__, (rights for tag, rights, _ in entries if tag in _CAPPED))
    masked = [(_MASK, mask, _NO_ID)] if any(tag in (_USER, _NAMED_GROUP) for tag, _, _ in entries) else []
    acl = b"".join(struct.pack("<HHI", *entry) for entry in sorted([*entries, *masked]))
    os.setxattr(fd, _ACL, struct.pack("<I", 2) + acl)


def rights_of(uid: int, path: Path) -> int:
    """What a user may do with a file or directory, as in a mode, by its mode and access control list. Raise OSError."""
    status = path.stat()
    groups: set[int] = set()
    with contextlib.suppress(KeyError):
        account = pwd.getpwuid(uid)
        groups = {*os.getgrouplist(account.pw_name, account.pw_gid)}
    of_groups = []
    for tag, rights, id in sorted(_access_list(path)):  # the order in which the kernel looks
        if (tag == _OWNER and uid == status.st_uid) or (tag == _USER and uid == id):
            return rights
        if (tag == _GROUP and status.st_gid in groups) or (tag == _NAMED_GROUP and id in groups):
            of_groups.append(rights)
        if tag == _OTHER:
            return functools.reduce(int.__or__, of_groups) if of_groups else rights
    return 0


def grant(fd: int | str, uid: int, rights: int) -> None:
    """Let another user at a file or directory, by an entry in its access control list.

    fd: a descriptor, or a path that leads to one. rights: as in a mode, 4 to read, 2 to write, 1 to enter. Nobody else
    gets more than they had. Raise OSError, also where the file system has no such lists.
    By hand, as it is no shorter with pylibacl, of which PyPI has no wheels, and EL no package outside of EPEL.
    """
    theirs = (_USER, rights, uid)
    _set_access_list(fd, [*(entry for entry in _access_list(fd) if entry[::2] != theirs[::2]), theirs])


@contextlib.contextmanager
def granted(path: Path, uid: int, rights: int) -> Iterator[None]:
    """Let another user at a file of ours for a while; on a file system without access control lists, nothing is done.

    Raise OSError if there is no such file.
    """
    fd = open_file(path)
    try:
        with contextlib.suppress(OSError):
            grant(fd, uid, rights)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                _set_access_list(fd, [entry for entry in _access_list(fd) if entry[::2] != (_USER, uid)])
    finally:
        os.close(fd)


def user_name(uid: int) -> str:
    """The name of a user, or the number of one who has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
