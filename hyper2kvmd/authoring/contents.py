"""Makes whole files of the disks that an OVF descriptor has in chunks or compressed; the files that it reads stay."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hyper2kvmd.authoring.digests import NONE, Digests
from hyper2kvmd.authoring.ova import free, no_room
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import create_file, open_directory
from hyper2kvmd.image.source import OpenDisk, open_disk
from hyper2kvmd.image.tar import BLOCK, GZIP
from hyper2kvmd.manifest.ovf import Ovf, OvfDisk
from hyper2kvmd.text import plain, show

_CHUNK = re.compile(r"(?P<name>.+)\.(?P<number>[0-9]{9})")
_OVERHEAD = 16 << 20  # of a disk image over its disk, besides a 64th
_IMAGES = (b"KDMV", b"QFI\xfb", b"vhdxfile", b"conectix", b"# Disk Desc")
_COPY_AGAIN = "Copy it there, or export the VM again."

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Packed:
    """A disk that is to become the file `name`, of the files `pieces` one after the other, compressed or not.

    limit: the bytes that it can have, as far as that is known.
    """

    name: str
    pieces: tuple[str, ...]
    compressed: bool
    limit: int | None


def find_packed(
    directory: Path, names: Sequence[str], descriptor: Ovf
) -> tuple[dict[str, Packed], tuple[Finding, ...]]:
    """The descriptor's disks, by their files, that are not whole in the directory, which has the files `names`.

    Raise MigrationError: disk_missing (names the chunk), image_corrupt (a chunk of the wrong size),
    format_unsupported (another compression), export_unsafe, output_exists (it is there whole as well); or OSError.
    """
    found, warnings = dict[str, Packed](), list[Finding]()
    for disk in descriptor.disks:
        whole = next((name for name in disk.names if name in names), None)
        pieces, more = _chunks(directory, names, disk) if whole is None else ((whole,), [])
        if not pieces or disk.file is None or disk.file in found:
            continue  # that it is missing is said when it is opened
        warnings += more
        name = whole or pieces[0][: -len(".000000000")]
        with _opened(directory, pieces[0]) as file:
            start = os.pread(file.fd, 512, 0)
        compressed = start.startswith(GZIP + b"\x08")
        said = disk.packing.compression if disk.packing else None
        if said not in (None, "gzip") and not compressed and not _is_image(start):
            raise MigrationError(
                Code.FORMAT_UNSUPPORTED,
                f"{directory / pieces[0]} is compressed with {show(said)}, which is not read",
                "Unpack it, and name the disk files instead of the descriptor.",
            )
        if said is not None and not compressed:
            message = f"{show(descriptor.name)} calls {show(name)} compressed, and it is not: it is taken as it is"
            warnings.append(Finding("not_packed", message, "Nothing to do if somebody unpacked it."))
        if whole is not None and not compressed:
            continue
        becomes = name.removesuffix(".gz") if compressed else name
        if becomes != name and becomes in names:
            raise MigrationError(
                Code.OUTPUT_EXISTS,
                f"{directory} has both {show(name)} and {show(becomes)}: it is not clear which is the disk",
                "Move one of the two away.",
            )
        capacity = disk.capacity_bytes
        limit = None if capacity is None else capacity + capacity // 64 + _OVERHEAD
        found[disk.file] = Packed(becomes, pieces, compressed, limit)
    return found, tuple(warnings)


def _chunks(directory: Path, names: Sequence[str], disk: OvfDisk) -> tuple[tuple[str, ...], list[Finding]]:
    """The chunks of a file in their order; none if there is not even one."""
    numbers: dict[str, list[int]] = {}
    for match in filter(None, map(_CHUNK.fullmatch, names)):
        numbers.setdefault(match["name"], []).append(int(match["number"]))
    name = next((name for name in disk.names if name in numbers), None)
    if name is None:
        return (), []

    def called(number: int) -> str:
        return f"{name}.{number:09}"

    size, chunk = (disk.packing.bytes, disk.packing.chunk_bytes) if disk.packing else (None, None)
    sizes = {n: os.stat(directory / called(n), follow_symlinks=False).st_size for n in sorted(numbers[name])}
    count = -(-size // chunk) if size and chunk else max(sizes) + 1
    missing = next((called(number) for number in range(len(sizes) + 1) if number not in sizes and number < count), None)
    if missing is not None:
        how = f"{show(name)} is in {count} chunks" if size and chunk else f"a later chunk of {show(name)} is there"
        raise MigrationError(Code.DISK_MISSING, f"{directory / missing} does not exist: {how}", _COPY_AGAIN)
    if len(sizes) > count:
        message = f"{directory / called(max(sizes))} is too many: the descriptor has {size} bytes in chunks of {chunk}"
        raise MigrationError(Code.IMAGE_CORRUPT, message, "Export the VM again into an empty directory.")
    each = chunk or sizes[0]
    for number, bytes in sizes.items():
        last = number == count - 1
        expected = size - each * number if last and size else each
        if bytes != expected and not (last and not size and 0 < bytes < each):
            message = f"{directory / called(number)} has {bytes} bytes, and must have {expected}"
            raise MigrationError(Code.IMAGE_CORRUPT, message, _COPY_AGAIN)
    warnings = []
    if not size and sizes[count - 1] == each:
        message = f"whether {show(called(count - 1))} is the last chunk cannot be known"
        hint = "Compare with the source; the descriptor should say the file's size (ovf:size)."
        warnings.append(Finding("chunks_uncertain", message, hint))
    return tuple(map(called, sizes)), warnings


def make_whole(
    directory: Path, disk: Packed, target: Path, on_progress: Progress, digests: Digests, called: str = ""
) -> None:
    """Write a disk into the directory `target`, under its name or as `called`, and have it on stable storage.

    digests: of the pieces, as far as they are known. Raise MigrationError: no_space; checksum_mismatch; image_corrupt
    (cut short, damaged, or more than the disk can hold); io_error.
    """
    first = directory / disk.pieces[0]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_opened(directory, name)) for name in disk.pieces]
        size = sum(file.size for file in files)
        try:
            room = free(target)
            if not disk.compressed and size > room:
                raise no_room(first, target, room, f"it has {size} bytes with its other chunks")
            reader = _Joined(directory, files, digests, lambda ratio: on_progress(disk.name, ratio))
            source = gzip.GzipFile(fileobj=io.BufferedReader(reader, BLOCK)) if disk.compressed else reader
            out = stack.enter_context(open(create_file(target / (called or disk.name), 0o644), "wb"))
            written = 0
            while data := source.read(BLOCK):
                written += len(data)
                if disk.compressed and disk.limit is not None and written > disk.limit:
                    raise _corrupt(first, f"unpacks to more than the {disk.limit} bytes that its disk can take")
                if written > room:
                    raise no_room(first, target, room, "it needs more")
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _corrupt(first, f"cannot be decompressed: {plain(str(error))}") from None
        except OSError as error:
            raise _failed(first, target, error) from None


def replace_packed(directory: Path, disk: Packed, on_progress: Progress) -> None:
    """Put a disk in the place of its pieces, in a directory of our own. Raise MigrationError as make_whole() does."""
    temporary = f".{disk.name}.whole"
    make_whole(directory, disk, directory, on_progress, NONE, called=temporary)
    for piece in disk.pieces:
        (directory / piece).unlink()
    (directory / temporary).rename(directory / disk.name)


def copy(directory: Path, name: str, target: Path, on_progress: Progress) -> None:
    """Copy a file that is whole into another directory, durably; as a clone where the file system can do that.

    Raise MigrationError.
    """
    with _opened(directory, name) as file, contextlib.ExitStack() as stack:
        try:
            room, done = free(target), 0
            if file.size > room:
                raise no_room(directory / name, target, room, f"it has {file.size} bytes")
            out = stack.enter_context(open(create_file(target / name, 0o644), "wb")).fileno()
            while done < file.size:
                try:
                    count = os.copy_file_range(file.fd, out, min(file.size - done, 1 << 28), done, done)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                    count = os.pwrite(out, os.pread(file.fd, BLOCK, done), done)
                if not count:
                    raise _corrupt(directory / name, "got shorter while it was copied")
                done += count
                on_progress(name, done / file.size)
            os.fsync(out)
        except OSError as error:
            raise _failed(directory / name, target, error) from None


def verified(directory: Path, names: Sequence[str], digests: Digests, on_progress: Progress) -> dict[str, str]:
    """The SHA-256 of those of the files that have digests, and are what these say. Raise MigrationError or OSError."""
    found = {}
    for name in names:
        if not digests.algorithms(name):
            continue
        with contextlib.suppress(FileNotFoundError), _opened(directory, name) as file:
            sums = _Sums(digests, name)
            block, done = memoryview(bytearray(BLOCK)), 0
            while count := file.read_into(block, done):
                done += count
                sums.update(block[:count])
                on_progress(name, min(done / max(file.size, 1), 1.0))
            found[name] = sums.checked(directory)["sha256"]
    return found


class _Sums:
    """The digests of a file as far as it was read."""

    def __init__(self, digests: Digests, name: str) -> None:
        self._digests, self._name = digests, name
        self._sums = {
            algorithm: hashlib.new(algorithm, usedforsecurity=False)
            for algorithm in digests.algorithms(name) and digests.algorithms(name) | {"sha256"}
        }

    def update(self, data: bytes | memoryview) -> None:
        for digest in self._sums.values():
            digest.update(data)

    def checked(self, directory: Path) -> dict[str, str]:
        """The digests, if they are the right ones. Raise MigrationError (checksum_mismatch)."""
        found = {algorithm: digest.hexdigest() for algorithm, digest in self._sums.items()}
        self._digests.check(self._name, found, str(directory / self._name))
        return found


class _Joined(io.RawIOBase):
    """The bytes of several files, one after the other, each checked at its end."""

    def __init__(
        self, directory: Path, files: Sequence[OpenDisk], digests: Digests, on_progress: Callable[[float], None]
    ) -> None:
        self._directory = directory
        self._files = [(file, _Sums(digests, file.name)) for file in files]
        self._on_progress = on_progress
        self._whole = max(sum(file.size for file in files), 1)
        self._done = self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while self._files:
            file, sums = self._files[0]
            count = os.preadv(file.fd, [buffer], self._at)
            if count:
                sums.update(memoryview(buffer)[:count])
                self._at += count
                self._done += count
                self._on_progress(min(self._done / self._whole, 1.0))
                return count
            sums.checked(self._directory)
            del self._files[0]
            self._at = 0
        return 0


@contextlib.contextmanager
def _opened(directory: Path, name: str) -> Iterator[OpenDisk]:
    """A plain file of its own. Raise MigrationError."""
    fd = open_directory(directory.resolve())
    try:
        file, _ = open_disk(fd, directory.resolve(), name, "")
    except MigrationError as error:
        error.field = None
        raise
    finally:
        os.close(fd)
    try:
        yield file
    finally:
        os.close(file.fd)


def _is_image(start: bytes) -> bool:
    """Whether a file starts like a disk, so that nobody compressed it, or somebody unpacked it since."""
    return start.startswith(_IMAGES) or start[510:512] == b"\x55\xaa"


def _corrupt(path: Path, what: str) -> MigrationError:
    return MigrationError(Code.IMAGE_CORRUPT, f"{path} {what}", _COPY_AGAIN)


def _failed(path: Path, target: Path, error: OSError) -> MigrationError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(path, target, 0, "it needs more")
    message = f"{error.filename or path}: {error.strerror}"
    return MigrationError(Code.IO_ERROR, message, "Check its permissions, and its file system.")
