"""Unpacks an OVA, which is a tar archive of an OVF descriptor and its disks, without trusting anything in it."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import itertools
import os
import re
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import create_file, fsync_directory
from hyper2kvmd.text import plain, show

MEMBER_LIMIT = 1000
HEADER_LIMIT = 1 << 16  # bytes of one extended header
DIGESTS_LIMIT = 1 << 20  # bytes of a .mf
BLOCK = 1 << 20
_RECORD = 512
_GZIP = b"\x1f\x8b"
_DEFLATE_RATIO = 1032  # the most that deflate can make of one byte
_PADDING_LIMIT = 1 << 20

# Names that mean something to hyper2kvmd, or that are hidden.
_RESERVED = re.compile(r"\..*|migration-report.*|boot-test\..*|(artifact-)?manifest\.(json|ya?ml)")
_DIGEST = re.compile(r"(SHA1|SHA256|SHA512) ?\((.+)\) ?= ?([0-9a-fA-F]{40,128})")
_PAX_LENGTH = re.compile(rb"([0-9]{1,5}) ")

_COPY_AGAIN = "Copy the archive again, or export the VM again."
_SUSPICIOUS = "Nothing was unpacked. Find out where this archive comes from; no exporter writes such a thing."


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
        start = file.read(_RECORD)
    return start.startswith(_GZIP) or start[257:262] == b"ustar"


@contextlib.contextmanager
def unpacked(archive: Path, target: Path, on_progress: Callable[[float], None]) -> Iterator[Unpacked]:
    """Unpack an archive next to `target`, and give the directory that name when the block ends well.

    Otherwise nothing is left of it. `target` must not exist, or be an empty directory. `on_progress` gets the ratio
    done, from 0 to 1. Raise MigrationError: output_exists; format_unsupported (no tar archive); image_corrupt (cut
    short); export_unsafe (holds what no OVA holds); checksum_mismatch; no_space; io_error.
    """
    target = target.resolve()
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise MigrationError(
            Code.OUTPUT_EXISTS,
            f"{target} already exists: {archive} is not unpacked over it",
            "Name a directory that does not exist yet with --directory.",
        )
    # Hidden, so that no daemon takes it for an export.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
    except OSError as error:
        raise _failed(target, error) from None
    try:
        yield _unpack(archive, temporary, on_progress)
        try:
            fsync_directory(temporary)
            temporary.rename(target)
            fsync_directory(target.parent)
        except OSError as error:
            raise _failed(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # which is not there any more if all went well


def parse_digests(data: bytes, name: str) -> dict[str, tuple[str, str]]:
    """What a .mf says: for each file the algorithm (sha1, sha256, sha512) and the digest in hexadecimal.

    Raise MigrationError (image_corrupt).
    """
    found = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        match = _DIGEST.fullmatch(line.strip())
        algorithm = match[1].lower() if match else ""
        if match is None or len(match[3]) != hashlib.new(algorithm, usedforsecurity=False).digest_size * 2:
            raise MigrationError(
                Code.IMAGE_CORRUPT,
                f"line {number} of {plain(name)} is no digest: {show(line)}",
                "Each line must be like `SHA256(disk.vmdk)= ` and the digest. Export the VM again.",
            )
        found[match[2]] = (algorithm, match[3].lower())
    return found


def _unpack(path: Path, directory: Path, on_progress: Callable[[float], None]) -> Unpacked:
    sums: dict[str, dict[str, str]] = {}
    expected: dict[str, tuple[str, str]] = {}
    try:
        status = os.statvfs(directory)
        room = status.f_bavail * status.f_frsize
        with _open(path) as file:
            archive = _Archive(file, path)
            for name, size in _members(archive):
                if name in sums:
                    raise archive.unsafe(f"holds {show(name)} twice")
                if len(sums) == MEMBER_LIMIT:
                    raise archive.unsafe(f"holds more than {MEMBER_LIMIT} files")
                if size > room:
                    raise _no_room(path, directory, room, f"{show(name)} in it has {size} bytes")
                room -= size
                wanted = {"sha256"} | ({expected[name][0]} if name in expected else set())
                sums[name] = _store(archive, directory / name, size, wanted, on_progress)
                if name.lower().endswith(".mf"):
                    expected |= parse_digests(_read(directory / name, DIGESTS_LIMIT, archive), name)
                _check(archive, name, sums[name], expected)
            archive.finish()
        for name, (algorithm, _) in expected.items():
            # The .mf may stand behind what it is about.
            if name in sums and algorithm not in sums[name]:
                with open(directory / name, "rb") as member:
                    digest = hashlib.file_digest(member, lambda: hashlib.new(algorithm, usedforsecurity=False))  # noqa: B023  # called at once
                sums[name][algorithm] = digest.hexdigest()
            elif name not in sums:
                message = f"{path} has a digest of {show(name)}, but not the file: the archive is incomplete"
                raise MigrationError(Code.DISK_MISSING, message, _COPY_AGAIN)
            _check(archive, name, sums[name], expected)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(path, directory, 0, "it needs more") from None
        raise _failed(directory, error) from None
    return Unpacked(
        directory,
        tuple(sums),
        {name: digests["sha256"] for name, digests in sums.items()},
        tuple(_unproved(path, sums, expected)),
    )


def _unproved(path: Path, names: Mapping[str, object], expected: Mapping[str, object]) -> Iterator[Finding]:
    if not expected:
        hint = "A damaged copy would not be noticed: export it with a manifest file (`ovftool --shaAlgorithm=SHA256`)."
        yield Finding("no_digests", f"{path} holds no digests (.mf) of its files", hint)
        return
    for name in names:
        if name not in expected and not name.lower().endswith((".mf", ".cert")):
            hint = "A damaged copy of it would not be noticed."
            yield Finding("no_digests", f"{path} holds no digest of {show(name)}", hint)


def _check(archive: _Archive, name: str, digests: Mapping[str, str], expected: Mapping[str, tuple[str, str]]) -> None:
    algorithm, digest = expected.get(name, ("", ""))
    if digests.get(algorithm, digest) != digest:
        raise MigrationError(
            Code.CHECKSUM_MISMATCH,
            f"{show(name)} in {archive.path} has {algorithm} {digests[algorithm]}, its .mf says {digest}",
            _COPY_AGAIN,
        )


def _store(
    archive: _Archive, path: Path, size: int, algorithms: set[str], on_progress: Callable[[float], None]
) -> dict[str, str]:
    """Write the next `size` bytes of the archive into a new file, and return their digests."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with open(create_file(path, 0o644), "wb") as file:
        left = size
        while left:
            data = archive.read(min(left, BLOCK))
            for digest in digests.values():
                digest.update(data)
            file.write(data)
            left -= len(data)
            on_progress(archive.ratio())
        file.flush()
        os.fsync(file.fileno())
    archive.read(-size % _RECORD)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _read(path: Path, limit: int, archive: _Archive) -> bytes:
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise archive.unsafe(f"has more than {limit} bytes of digests in {show(path.name)}")
    return data


class _Archive:
    """The bytes of an archive in their order, decompressed; every complaint names it."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        self._stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=file, mode="rb") if compressed else file
        self._offset = 0
        self._most = self._size * (_DEFLATE_RATIO if compressed else 1)

    @property
    def left(self) -> int:
        """The most that can still come."""
        return self._most - self._offset

    def ratio(self) -> float:
        """How much of the file has been read, from 0 to 1."""
        return min(self._file.tell() / self._size, 1.0) if self._size else 1.0

    def read(self, length: int) -> bytes:
        """Exactly `length` bytes, of which there must be that many."""
        data = self._some(length)
        self._offset += len(data)
        if len(data) < length:
            raise self.corrupt(f"ends after {self._offset} bytes, in the middle: it is truncated")
        return data

    def finish(self) -> None:
        """Read the padding behind the end, so that gzip comes to its own checksum."""
        left = _PADDING_LIMIT
        while left > 0 and (data := self._some(min(left, BLOCK))):
            left -= len(data)

    def _some(self, length: int) -> bytes:
        try:
            return self._stream.read(length)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise self.corrupt(f"cannot be decompressed: {plain(str(error))}") from None

    def corrupt(self, what: str) -> MigrationError:
        return MigrationError(Code.IMAGE_CORRUPT, f"{self.path} {what}", _COPY_AGAIN)

    def unsafe(self, what: str) -> MigrationError:
        return MigrationError(Code.EXPORT_UNSAFE, f"{self.path} {what}", _SUSPICIOUS)


_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.DIRTYPE: "a directory",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def _members(archive: _Archive) -> Iterator[tuple[str, int]]:
    """The name and the size of each file; who takes one reads its bytes, and the padding, before the next.

    The headers are read here and not by tarfile, which takes as much memory as a header asks for, follows every
    extension of the format, and holds a damaged header for the end of the archive.
    """
    name: str | None = None
    size: int | None = None
    for first in itertools.chain((True,), itertools.repeat(False)):
        block = archive.read(_RECORD)
        if not any(block):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if not first:
                raise archive.corrupt("has a damaged header") from None
            hint = "Name an OVA, a directory, an .ovf, or disk files."
            raise MigrationError(Code.FORMAT_UNSUPPORTED, f"{archive.path} is not a tar archive", hint) from None
        if not 0 <= header.size <= archive.left:
            raise archive.unsafe(f"claims {header.size} bytes for {show(header.name)}, more than it can hold")
        if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if header.size > HEADER_LIMIT:
                raise archive.unsafe(f"has a header of {header.size} bytes")
            if (name if header.type == tarfile.GNUTYPE_LONGNAME else size) is not None:
                raise archive.corrupt("has two headers of a kind for one file")
            data = archive.read(header.size)
            archive.read(-header.size % _RECORD)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                continue
            records = _pax(archive, data)
            name = records.get("path", name)
            size = int(records["size"]) if re.fullmatch("[0-9]{1,19}", records.get("size", "")) else size
            continue
        shown = header.name if name is None else name
        bytes = header.size if size is None else size
        name = size = None
        if header.type == tarfile.DIRTYPE and shown in (".", "./"):
            continue
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            kind = _KINDS.get(header.type, f"an entry of type {show(header.type.decode('latin-1'))}")
            raise archive.unsafe(f"holds {show(shown)}, which is {kind}")
        if bytes > archive.left:
            raise archive.unsafe(f"claims {bytes} bytes for {show(shown)}, more than it can hold")
        yield _file_name(archive, shown), bytes


def _file_name(archive: _Archive, text: str) -> str:
    """The name of a member as that of a file in the directory, and nothing else."""
    name = text.removeprefix("./")
    if not name or "/" in name or name in (".", "..") or not name.isprintable() or len(name.encode()) > 255:
        raise archive.unsafe(f"holds {show(text)}, which is not a plain file name")
    if _RESERVED.fullmatch(name):
        raise archive.unsafe(f"holds {show(text)}, a name that hyper2kvmd uses itself, or that is hidden")
    return name


def _pax(archive: _Archive, data: bytes) -> dict[str, str]:
    """The records of an extended header, each `LENGTH KEY=VALUE` and a line feed."""
    records = {}
    while data:
        found = _PAX_LENGTH.match(data)
        end = int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise archive.corrupt("has a damaged extended header")
        key, _, value = data[found.end() : end - 1].decode("utf-8", "surrogateescape").partition("=")
        if key.startswith("GNU.sparse"):
            raise archive.unsafe("holds a sparse file")
        records[key] = value
        data = data[end:]
    return records


def _open(path: Path) -> BinaryIO:
    """A plain file for reading; what is none could block for ever, or never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return open(fd, "rb")


def _no_room(path: Path, directory: Path, room: int, what: str) -> MigrationError:
    return MigrationError(
        Code.NO_SPACE,
        f"{path} cannot be unpacked into {directory.parent}, which has {room} bytes left: {what}",
        "Free some space there, or name another place with --directory.",
    )


def _failed(path: Path, error: OSError) -> MigrationError:
    return MigrationError(
        Code.IO_ERROR,
        f"{error.filename or path}: {error.strerror}",
        "Check that the directory exists, its permissions, and its file system.",
    )
