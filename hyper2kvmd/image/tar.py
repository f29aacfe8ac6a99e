"""Reads a tar archive member by member, holding every size in it against what it can hold."""

from __future__ import annotations

import gzip
import itertools
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.text import plain, show

HEADER_LIMIT = 1 << 16  # bytes of one extended header
SPARSE_LIMIT = 1 << 17  # pieces of a sparse file
BLOCK = 1 << 20
RECORD = 512
GZIP = b"\x1f\x8b"
_DEFLATE_RATIO = 1032  # the most that deflate can make of one byte
_PADDING_LIMIT = 1 << 20

# Names that mean something to hyper2kvmd, or that are hidden.
_RESERVED = re.compile(r"\..*|migration-report.*|boot-test\..*|(artifact-)?manifest\.(json|ya?ml)")
_PAX_LENGTH = re.compile(rb"([0-9]{1,5}) ")
_NUMBER = re.compile(r"[0-9]{1,18}")

COPY_AGAIN = "Copy the archive again, or export the VM again."
UNPACK = "Unpack it with `tar -xf` into an empty directory, and name the .ovf that is there."
_SUSPICIOUS = "Nothing was unpacked. Find out where this archive comes from; no exporter writes such a thing."

Pieces = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Member:
    """A file of an archive: its name without directories, and its size.

    pieces: of a sparse file, the offsets and lengths of what is stored of it, one behind the other; zeros are between
    them. None for a file that is stored whole.
    """

    name: str
    size: int
    pieces: Pieces | None = None

    @property
    def stored(self) -> int:
        """The bytes of it in the archive."""
        return self.size if self.pieces is None else sum(length for _, length in self.pieces)


class Archive:
    """The bytes of an archive in their order, decompressed; every complaint names it."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.compressed = file.read(len(GZIP)) == GZIP
        file.seek(0)
        self._stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=file, mode="rb") if self.compressed else file
        self.offset = 0
        self._most = self._size * (_DEFLATE_RATIO if self.compressed else 1)

    @property
    def left(self) -> int:
        """The most that can still come."""
        return self._most - self.offset

    def grows(self) -> None:
        """Take no size for too large: the archive may be still being copied, and the caller sees where it ends."""
        self._most = sys.maxsize

    def skip(self, length: int) -> None:
        """Leave out so many bytes of an archive that is not compressed, without reading them."""
        self._file.seek(length, os.SEEK_CUR)
        self.offset += length

    def ratio(self) -> float:
        """How much of the file has been read, from 0 to 1."""
        return min(self._file.tell() / self._size, 1.0) if self._size else 1.0

    def read(self, length: int) -> bytes:
        """Exactly `length` bytes, of which there must be that many."""
        data = self._some(length)
        self.offset += len(data)
        if len(data) < length:
            raise self.corrupt(f"ends after {self.offset} bytes, in the middle: it is truncated")
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
        return MigrationError(Code.IMAGE_CORRUPT, f"{self.path} {what}", COPY_AGAIN)

    def unsafe(self, what: str) -> MigrationError:
        return MigrationError(Code.EXPORT_UNSAFE, f"{self.path} {what}", _SUSPICIOUS)

    def unsupported(self, what: str) -> MigrationError:
        """For what is harmless, and not read here all the same."""
        return MigrationError(Code.FORMAT_UNSUPPORTED, f"{self.path} {what}", UNPACK)


_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
}


def members(archive: Archive) -> Iterator[Member]:
    """Each file; who takes one reads what is stored of it, and the padding, before the next.

    The headers are read here and not by tarfile, which takes as much memory as a header asks for, follows every
    extension of the format, and holds a damaged header for the end of the archive.
    """
    name: str | None = None
    records: list[tuple[str, str]] | None = None
    for first in itertools.chain((True,), itertools.repeat(False)):
        block = archive.read(RECORD)
        if not any(block):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if not first:
                raise archive.corrupt("has a damaged header") from None
            hint = "Name an OVA, a directory, an .ovf, or disk files."
            if archive.compressed:
                hint += " A disk that is compressed is to be unpacked (`gunzip -k`), or named by its .ovf."
            raise MigrationError(Code.FORMAT_UNSUPPORTED, f"{archive.path} is not a tar archive", hint) from None
        if not 0 <= header.size <= archive.left:
            raise archive.unsafe(f"claims {header.size} bytes for {show(header.name)}, more than it can hold")
        if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if header.size > HEADER_LIMIT:
                raise archive.unsafe(f"has a header of {header.size} bytes")
            if (name if header.type == tarfile.GNUTYPE_LONGNAME else records) is not None:
                raise archive.corrupt("has two headers of a kind for one file")
            data = archive.read(header.size)
            archive.read(-header.size % RECORD)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                records = _pax(archive, data)
            continue
        more = dict(records or ())
        shown = more.get("GNU.sparse.name") or more.get("path") or name or header.name
        size = int(more["size"]) if _NUMBER.fullmatch(more.get("size", "")) else header.size
        member = _member(archive, block, header, shown, size, records or [])
        name = records = None
        if member is not None:
            yield member


def _member(
    archive: Archive, block: bytes, header: tarfile.TarInfo, name: str, size: int, records: list[tuple[str, str]]
) -> Member | None:
    """The file that a header is about, whose data comes next; None for what is passed over."""
    if header.type == tarfile.DIRTYPE:
        if name.rstrip("/") not in ("", "."):
            _file_name(archive, name.rstrip("/"))  # what is in it is taken without it
        return None
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.GNUTYPE_SPARSE):
        kind = _KINDS.get(header.type, f"an entry of type {show(header.type.decode('latin-1'))}")
        raise archive.unsafe(f"holds {show(name)}, which is {kind}")
    if size > archive.left:
        raise archive.unsafe(f"claims {size} bytes for {show(name)}, more than it can hold")
    base = _file_name(archive, name)
    if base is None:
        left = size + -size % RECORD
        while left:
            left -= len(archive.read(min(left, BLOCK)))
        return None
    if header.type == tarfile.GNUTYPE_SPARSE:
        real, pieces = _old_sparse(archive, block)
    elif any(key.startswith("GNU.sparse") for key, _ in records):
        real, pieces, size = _pax_sparse(archive, records, size)
    elif any(key == "SCHILY.realsize" for key, _ in records):
        raise archive.unsupported(f"holds {show(name)} as a sparse file in the way of star, which is not read")
    else:
        return Member(base, size)
    ends = [0, *itertools.chain.from_iterable((offset, offset + length) for offset, length in pieces), real]
    if ends != sorted(ends) or sum(length for _, length in pieces) != size:
        raise archive.corrupt(f"holds {show(name)} as a sparse file whose map is damaged")
    return Member(base, real, pieces)


def _old_sparse(archive: Archive, block: bytes) -> tuple[int, Pieces]:
    """The size and the map of a sparse file in GNU's old format: in its header, and in blocks behind that."""
    fields, more = [block[386:482]], block[482]
    while more:
        if len(fields) * 21 > SPARSE_LIMIT:
            raise _scattered(archive)
        following = archive.read(RECORD)
        fields.append(following[:504])
        more = following[504]
    numbers = [_integer(archive, field[at : at + 12]) for field in fields for at in range(0, len(field), 12)]
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    # What is not used is zero; a last one without length stands where the file ends.
    return _integer(archive, block[483:495]), tuple(pair for pair in pairs if pair[1])


def _integer(archive: Archive, field: bytes) -> int:
    """A number as tar has them: octal digits, or, if it is large, binary."""
    if field[0] & 0x80:
        return int.from_bytes(bytes((field[0] & 0x7F, *field[1:])), "big")
    text = field.strip(b" \0")
    if text and not re.fullmatch(rb"[0-7]+", text):
        raise archive.corrupt("has a damaged header of a sparse file")
    return int(text or b"0", 8)


def _pax_sparse(archive: Archive, records: list[tuple[str, str]], size: int) -> tuple[int, Pieces, int]:
    """The size and the map of a sparse file in GNU's three newer formats, and the bytes of its data."""
    last = dict(records)
    real = last.get("GNU.sparse.realsize", last.get("GNU.sparse.size", ""))
    if (last.get("GNU.sparse.major", "0"), last.get("GNU.sparse.minor", "0")) == ("1", "0"):
        texts, used = _leading_map(archive, size)
        size -= used
    elif last.get("GNU.sparse.major", "0") == "0":
        texts = last["GNU.sparse.map"].split(",") if last.get("GNU.sparse.map") else []
        texts += [text for key, text in records if key in ("GNU.sparse.offset", "GNU.sparse.numbytes")]
    else:
        raise archive.unsupported("holds a sparse file of a version that is not known")
    if len(texts) % 2 or not all(_NUMBER.fullmatch(text) for text in (real, *texts)):
        raise archive.corrupt("has a damaged map of a sparse file")
    numbers = [int(text) for text in texts]
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return int(real), tuple(pair for pair in pairs if pair[1]), size


def _leading_map(archive: Archive, size: int) -> tuple[list[str], int]:
    """The numbers that stand in lines before the data, and the bytes of whole records that they take."""
    data, count, used = b"", None, 0
    lines: list[bytes] = []
    while count is None or len(lines) < 2 * count + 1:
        used += RECORD
        if used > size:
            raise archive.corrupt("has a map of a sparse file that is longer than the file")
        *done, data = (data + archive.read(RECORD)).split(b"\n")
        lines += done
        if count is None and lines:
            if not re.fullmatch(rb"[0-9]{1,9}", lines[0]):
                raise archive.corrupt("has a damaged map of a sparse file")
            count = int(lines[0])
            if count > SPARSE_LIMIT:
                raise _scattered(archive)
        if len(data) > RECORD:
            raise archive.corrupt("has a damaged map of a sparse file")
    return [line.decode("latin-1") for line in lines[1 : 2 * count + 1]], used


def _scattered(archive: Archive) -> MigrationError:
    return archive.unsupported(f"holds a sparse file in more than {SPARSE_LIMIT} pieces, which is not read")


def _file_name(archive: Archive, text: str) -> str | None:
    """The last part of a member's path, with which it becomes a file in the directory; None if it is to be left out.

    Left out is what macOS's tar adds to a file, for other Macs.
    """
    path = PurePosixPath(text)
    parts = path.parts
    if not parts or text.startswith("/") or text.endswith("/") or ".." in parts or not text.isprintable():
        raise archive.unsafe(f"holds {show(text)}, which is not a plain file name")
    if any(len(part.encode()) > 255 for part in parts):
        raise archive.unsafe(f"holds {show(text)}, which is not a plain file name")
    if path.name.startswith("._") or path.name == ".DS_Store" or "__MACOSX" in parts:
        return None
    if _RESERVED.fullmatch(path.name) or any(part.startswith(".") for part in parts):
        raise archive.unsafe(f"holds {show(text)}, a name that hyper2kvmd uses itself, or that is hidden")
    return path.name


def _pax(archive: Archive, data: bytes) -> list[tuple[str, str]]:
    """The records of an extended header, each `LENGTH KEY=VALUE` and a line feed; a key can come again and again."""
    records = []
    while data:
        found = _PAX_LENGTH.match(data)
        end = int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise archive.corrupt("has a damaged extended header")
        key, _, value = data[found.end() : end - 1].decode("utf-8", "surrogateescape").partition("=")
        records.append((key, value))
        data = data[end:]
    return records
