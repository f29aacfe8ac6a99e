"""Reads files out of an ISO 9660 image, by the names of Joliet or Rock Ridge where it has them.

By hand: pycdlib, the only library that needs no root, reads all directories when it opens an image and never ends
where one of them holds itself. EL has no package of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

SECTOR = 2048
DIRECTORY_LIMIT = 1 << 20  # bytes of one directory
_FIRST, _DESCRIPTORS = 16, 64
_PRIMARY, _SUPPLEMENTARY, _END = 1, 2, 255
_JOLIET = (b"%/@", b"%/C", b"%/E")
_IS_DIRECTORY, _GOES_ON = 0x02, 0x80
_RECORD = 34  # the least that a record of a directory has


class IsoError(ValueError):
    """An image that is no ISO, or is damaged."""


@dataclass(frozen=True)
class Node:
    """A file or a directory: its first sector, and its bytes."""

    sector: int
    size: int
    directory: bool


class Iso:
    """An ISO in a file that stays open. Raise IsoError, and OSError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._joliet = False
        root: bytes | None = None
        for number in range(_FIRST, _FIRST + _DESCRIPTORS):
            sector = os.pread(file.fileno(), SECTOR, number * SECTOR)
            if len(sector) < SECTOR or sector[1:6] != b"CD001" or sector[0] == _END:
                break
            joliet = sector[0] == _SUPPLEMENTARY and sector[88:91] in _JOLIET
            if joliet or (sector[0] == _PRIMARY and root is None):
                root, self._joliet = sector[156:190], joliet
        if root is None:
            raise IsoError("it is not an ISO 9660 image")
        self.root = _node(root)

    def children(self, directory: Node) -> dict[str, Node]:
        """What is in a directory, by name."""
        if directory.size > DIRECTORY_LIMIT:
            raise IsoError(f"one of its directories has {directory.size} bytes: it is damaged")
        data = self.read(directory)
        found: dict[str, Node] = {}
        for record in _records(data):
            raw = record[33 : 33 + record[32]]
            if raw not in (b"\0", b"\1"):  # the directory itself, and the one above
                found.setdefault(self._name(record, raw), _node(record))
        return found

    def read(self, node: Node) -> bytes:
        """The bytes of a file or directory, all at once."""
        data = os.pread(self._file.fileno(), node.size, node.sector * SECTOR)
        if len(data) < node.size:
            raise IsoError(f"it ends before its sector {node.sector}: it is truncated")
        return data

    def _name(self, record: bytes, raw: bytes) -> str:
        if self._joliet:
            return raw.decode("utf-16-be", "replace").partition(";")[0]
        rock_ridge = b"".join(_names(record[33 + len(raw) + (len(raw) + 1) % 2 :]))
        if rock_ridge:
            return rock_ridge.decode("utf-8", "replace")
        return raw.decode("latin-1").partition(";")[0].rstrip(".")


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a directory. None goes over the end of a sector: zeros are before that."""
    at = 0
    while at < len(data):
        length = data[at]
        if length == 0:
            at += SECTOR - at % SECTOR
            continue
        record = data[at : at + length]
        if len(record) < max(length, _RECORD) or 33 + record[32] > length:
            raise IsoError("one of its directories is damaged")
        yield record
        at += length


def _names(extra: bytes) -> Iterator[bytes]:
    """The pieces of the name that Rock Ridge has behind a record."""
    while len(extra) > 5 and extra[2] > 3:
        if extra[:2] == b"NM":
            yield extra[5 : extra[2]]
        extra = extra[extra[2] :]


def _node(record: bytes) -> Node:
    if record[25] & _GOES_ON:
        raise IsoError("one of its files is in several pieces, which is not read")
    sector, size = (int.from_bytes(record[at : at + 4], "little") for at in (2, 10))
    return Node(sector + record[1], size, bool(record[25] & _IS_DIRECTORY))
