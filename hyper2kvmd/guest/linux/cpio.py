"""Reads an initramfs on the host, down to its files, without trusting any program of the guest.

By hand, as an initramfs is several archives in a row, and libarchive stops behind the first.
"""

from __future__ import annotations

import bz2
import lzma
import mmap
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.change import decode
from hyper2kvmd.run import Tools

MAX_UNPACKED_BYTES = 4 << 30
MAX_FILES = 200_000
MAX_TEXT_BYTES = 1 << 20
_CHUNK = 1 << 20
_HEADER = 110
_MAGICS = (b"070701", b"070702")
_FIELDS = re.compile(rb"[0-9A-Fa-f]{104}")
_TRAILER = "TRAILER!!!"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


# What the standard library unpacks, and what needs a program; by the first bytes.
_LIBRARY: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    b"\x5d\x00\x00": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
    b"BZh": bz2.BZ2Decompressor,
}
_PROGRAM = {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4", b"\x89LZO": "lzop"}


@dataclass(frozen=True)
class Contents:
    """What is in an initramfs: the paths of all its files, relative to its root, and the texts of those asked for."""

    names: frozenset[str]
    texts: Mapping[str, str]


def read(image: Path, tools: Tools, wanted: Collection[str] = ()) -> Contents:
    """Read an initramfs to its end. wanted: the paths of the files whose texts are kept, if they are small.

    An initramfs is a row of cpio archives: early ones (microcode) plain, the main one compressed.
    Raise MigrationError (fix_unproved, tool_missing) if the image is not complete and readable to its end.
    """
    names: set[str] = set()
    texts: dict[str, str] = {}
    unpacked = 0
    if image.stat().st_size == 0:  # which cannot be mapped
        raise _unreadable(image, 0, "it is empty")
    with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while at < len(data):
            if data[at] == 0:  # padding between archives
                at += 1
                continue
            walker = Walker(MAX_UNPACKED_BYTES - unpacked, wanted)
            try:
                at = _read_one(image, data, at, walker, tools)
            except (ValueError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
                raise _unreadable(image, at, str(error)) from None
            if not walker.complete:
                raise _unreadable(image, at, "the archive ends before its trailer")
            unpacked += walker.read
            names |= walker.names
            texts |= walker.texts
    return Contents(frozenset(names), texts)


def _read_one(image: Path, data: mmap.mmap, at: int, walker: Walker, tools: Tools) -> int:
    """Walk the archive at offset `at` and return the offset of what follows it."""
    if data[at : at + 6] in _MAGICS:
        while True:
            found = _entry(data, at)
            if found is None:
                raise ValueError("cut off")
            walker.found(found.name)
            if walker.wants(found):
                walker.keep(found, data[at + found.body : at + found.body + found.size])
            at += found.end
            if walker.complete:
                return at
    for magic, open_decompressor in _LIBRARY.items():
        if data[at : at + len(magic)] == magic:
            decompressor = open_decompressor()
            while not decompressor.eof and at < len(data):
                chunk = data[at : at + _CHUNK]
                at += len(chunk)
                for piece in _unpack(decompressor, chunk):
                    walker.feed(piece)
            if not decompressor.eof:
                raise ValueError("cut off")
            return at - len(decompressor.unused_data)
    for magic, program in _PROGRAM.items():
        if data[at : at + len(magic)] == magic:
            rest = image
            if at:
                rest = image.with_name(image.name + ".main")
                with image.open("rb") as source, rest.open("wb") as target:
                    source.seek(at)
                    shutil.copyfileobj(source, target)
            try:
                tools.run(program, "-dc", rest, on_output=walker.feed, timeout=600)
            except MigrationError as error:
                if error.code is not Code.TOOL_FAILED:
                    raise
                raise ValueError(error.message) from None
            return len(data)
    raise ValueError(f"unknown compression {data[at : at + 6].hex()}")


def _unpack(decompressor: _Decompressor, chunk: bytes) -> Iterator[bytes]:
    """What `chunk` unpacks to, in pieces of bounded size: it may be a bomb."""
    rest = chunk
    while True:
        yield decompressor.decompress(rest, _CHUNK)
        # zlib hands back what it has not used yet, bz2 and lzma keep it and say that they need no more.
        rest = getattr(decompressor, "unconsumed_tail", b"")
        if decompressor.eof or (not rest and getattr(decompressor, "needs_input", True)):
            return


class Walker:
    """Collects the names of the files in a cpio archive (newc) that comes in pieces."""

    def __init__(self, limit: int = MAX_UNPACKED_BYTES, wanted: Collection[str] = ()) -> None:
        self.names: set[str] = set()
        self.texts: dict[str, str] = {}
        self.complete = False
        self.read = 0
        self._limit = limit
        self._wanted = wanted
        self._buffer = bytearray()
        self._skip = 0

    def feed(self, data: bytes) -> None:
        """Take the next piece of the unpacked archive. Raise ValueError if it is none."""
        self.read += len(data)
        if self.read > self._limit:
            raise ValueError(f"unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB")
        self._buffer += data
        at = 0
        while True:
            if self._skip:
                step = min(self._skip, len(self._buffer) - at)
                at += step
                self._skip -= step
                if self._skip:
                    break
            while at < len(self._buffer) and self._buffer[at] == 0:  # padding after a trailer
                at += 1
            found = _entry(self._buffer, at)
            if found is None:
                break
            if self.wants(found):
                body = bytes(self._buffer[at + found.body : at + found.body + found.size])
                if len(body) < found.size:
                    break  # the rest of it is in the next piece
                self.keep(found, body)
            self._skip = found.end
            self.found(found.name)
        del self._buffer[:at]

    def found(self, name: str) -> None:
        """Take the name of one file."""
        self.complete = name == _TRAILER
        if not self.complete:
            self.names.add(_relative(name))
            if len(self.names) > MAX_FILES:
                raise ValueError(f"holds more than {MAX_FILES} files")

    def wants(self, entry: _Entry) -> bool:
        """Whether the text of a file is asked for."""
        return 0 < entry.size <= MAX_TEXT_BYTES and _relative(entry.name) in self._wanted

    def keep(self, entry: _Entry, body: bytes) -> None:
        """Take the text of one file; the kernel keeps the last of several."""
        self.texts[_relative(entry.name)] = decode(body)


@dataclass(frozen=True)
class _Entry:
    """A file's header: its name, where its content begins, how long that is, and where the next header is."""

    name: str
    body: int
    size: int
    end: int


def _relative(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def _entry(data: mmap.mmap | bytearray, at: int) -> _Entry | None:
    """The file whose header is at `at`; None if it is cut off."""
    header = bytes(data[at : at + _HEADER])
    if len(header) < _HEADER:
        return None
    if header[:6] not in _MAGICS:
        raise ValueError(f"no cpio header but {header[:6].hex()}")
    if not _FIELDS.fullmatch(header, 6):  # int() takes a sign too, and what has a negative size has no end
        raise ValueError("a header that is no hexadecimal number")
    size, name_size = int(header[54:62], 16), int(header[94:102], 16)
    if not 0 < name_size <= 4096:
        raise ValueError(f"a file name of {name_size} bytes")
    name = bytes(data[at + _HEADER : at + _HEADER + name_size])
    if len(name) < name_size:
        return None
    body = _padded(_HEADER + name_size)
    return _Entry(name[:-1].decode("utf-8", "replace"), body, size, body + _padded(size))


def _padded(size: int) -> int:
    return (size + 3) & ~3


def _unreadable(image: Path, at: int, why: str) -> MigrationError:
    return MigrationError(
        Code.FIX_UNPROVED,
        f"the initramfs {image.name} cannot be read at byte {at}: {why}",
        "Build it again in the guest on VMware (update-initramfs, dracut or mkinitrd), and export it again.",
    )
