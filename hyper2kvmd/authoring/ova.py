"""Unpacks an OVA, which is a tar archive of an OVF descriptor and its disks, without trusting anything in it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hyper2kvmd.authoring import digests
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import create_file, fsync_directory
from hyper2kvmd.image.tar import BLOCK, COPY_AGAIN, GZIP, RECORD, UNPACK, Archive, Member, members
from hyper2kvmd.text import show

MEMBER_LIMIT = 1000


@dataclass(frozen=True)
class Unpacked:
    """The content of an archive: the directory it is in for now, its files, and the SHA-256 of each in hexadecimal."""

    directory: Path
    files: tuple[str, ...]
    sha256: dict[str, str]
    warnings: tuple[Finding, ...]


def is_archive(path: Path) -> bool:
    """Whether a file starts like a tar archive, or like something that was compressed by gzip. Raise OSError."""
    with _open(path) as file:
        start = file.read(RECORD)
    return start.startswith(GZIP) or start[257:262] == b"ustar"


@contextlib.contextmanager
def unpacked(archive: Path, target: Path, on_progress: Callable[[float], None]) -> Iterator[Unpacked]:
    """Unpack an archive into a new directory, which is called `target` when the block ends well.

    `on_progress` gets the ratio done, from 0 to 1. Raise MigrationError as new_directory() does, and
    format_unsupported (no tar archive); image_corrupt (cut short); export_unsafe (holds what no OVA holds);
    checksum_mismatch; disk_missing; no_space.
    """
    with new_directory(archive, target) as directory:
        yield _unpack(archive, directory, on_progress)


@contextlib.contextmanager
def new_directory(source: Path, target: Path) -> Iterator[Path]:
    """A directory beside `target`, which gets that name when the block ends well; otherwise nothing is left of it.

    `source` is what is unpacked into it. `target` must not exist, or be an empty directory. Raise MigrationError
    (output_exists, io_error).
    """
    target = target.resolve()
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise MigrationError(
            Code.OUTPUT_EXISTS,
            f"{target} already exists: {source} is not unpacked over it",
            "Name a directory that does not exist yet with --directory.",
        )
    # Hidden, so that no daemon takes it for an export.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
    except OSError as error:
        raise _failed(target, error) from None
    try:
        yield temporary
        try:
            fsync_directory(temporary)
            temporary.rename(target)
            fsync_directory(target.parent)
        except OSError as error:
            raise _failed(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # which is not there any more if all went well


def free(directory: Path) -> int:
    """The bytes that can be written into a directory. Raise OSError."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def no_room(source: Path, directory: Path, room: int, what: str, way_out: str = "") -> MigrationError:
    """The error for what does not fit; `directory` is that which new_directory() gave."""
    return MigrationError(
        Code.NO_SPACE,
        f"{source} cannot be unpacked into {directory.parent}, which has {room} bytes left: {what}",
        f"Free some space there, or name another place with --directory. {way_out}".rstrip(),
    )


def _unpack(path: Path, directory: Path, on_progress: Callable[[float], None]) -> Unpacked:
    sums: dict[str, dict[str, str]] = {}
    expected = digests.NONE
    try:
        room = free(directory)
        with _open(path) as file:
            archive = Archive(file, path)
            for member in members(archive):
                name = member.name
                if name in sums:
                    hint = f"{UNPACK} If two VMs are in it, give each a directory of its own."
                    message = f"{path} holds {show(name)} twice"
                    raise MigrationError(Code.EXPORT_UNSAFE, message, hint)
                if len(sums) == MEMBER_LIMIT:
                    raise archive.unsafe(f"holds more than {MEMBER_LIMIT} files")
                if member.size > room:
                    way_out = f"Or, as most of it is not stored: {UNPACK}" if member.stored < member.size else ""
                    raise no_room(path, directory, room, f"{show(name)} in it has {member.size} bytes", way_out)
                room -= member.size
                wanted = expected.algorithms(name) | {"sha256"}
                sums[name] = _store(archive, directory / name, member, wanted, on_progress)
                if name.lower().endswith(".mf"):
                    expected = expected.joined(digests.parse(_read(directory / name, archive), name))
                expected.check(name, sums[name], f"{show(name)} in {path}")
            archive.finish()
        for name in expected.of:
            if name not in sums:
                message = f"{path} has a digest of {show(name)}, but not the file: the archive is incomplete"
                raise MigrationError(Code.DISK_MISSING, message, COPY_AGAIN)
            # The .mf may stand behind what it is about.
            for algorithm in expected.algorithms(name) - sums[name].keys():
                sums[name][algorithm] = _digest(directory / name, algorithm)
            expected.check(name, sums[name], f"{show(name)} in {path}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(path, directory, 0, "it needs more") from None
        raise _failed(directory, error) from None
    return Unpacked(
        directory,
        tuple(sums),
        {name: found["sha256"] for name, found in sums.items()},
        (*expected.warnings, *expected.unproved(sums, str(path))),
    )


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _store(
    archive: Archive, path: Path, member: Member, algorithms: frozenset[str], on_progress: Callable[[float], None]
) -> dict[str, str]:
    """Write the bytes of a member, which come next in the archive, into a new file, and return its digests."""
    sums = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    zeros = bytes(BLOCK)
    with open(create_file(path, 0o644), "wb") as file:
        at = 0
        pieces = ((0, member.size),) if member.pieces is None else (*member.pieces, (member.size, 0))
        for offset, length in pieces:
            for start in range(at, offset, BLOCK):
                for digest in sums.values():
                    digest.update(zeros[: offset - start])
            file.seek(offset)  # what is passed over becomes a hole
            left = length
            while left:
                data = archive.read(min(left, BLOCK))
                for digest in sums.values():
                    digest.update(data)
                file.write(data)
                left -= len(data)
                on_progress(archive.ratio())
            at = offset + length
        file.flush()
        os.ftruncate(file.fileno(), member.size)
        os.fsync(file.fileno())
    archive.read(-member.stored % RECORD)
    return {name: digest.hexdigest() for name, digest in sums.items()}


def _read(path: Path, archive: Archive) -> bytes:
    with open(path, "rb") as file:
        data = file.read(digests.SIZE_LIMIT + 1)
    if len(data) > digests.SIZE_LIMIT:
        raise archive.unsafe(f"has more than {digests.SIZE_LIMIT} bytes of digests in {show(path.name)}")
    return data


def _open(path: Path) -> BinaryIO:
    """A plain file for reading; what is none could block for ever, or never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return open(fd, "rb")


def _failed(path: Path, error: OSError) -> MigrationError:
    return MigrationError(
        Code.IO_ERROR,
        f"{error.filename or path}: {error.strerror}",
        "Check that the directory exists, its permissions, and its file system.",
    )
