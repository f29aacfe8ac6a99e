"""Where the grains of a sparse VMDK are, in the order in which they lie in the file.

A grain is 64 KiB of the disk; a table says in which sector of the file each one begins. The format is in VMware's
"Virtual Disk Format 5.0".
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from hyper2kvmd.errors import MigrationError
from hyper2kvmd.image.header.reader import SECTOR, Image
from hyper2kvmd.image.header.vmdk import Sparse, grain_tables, structures

GRAIN_SECTORS = 128
GRAIN = GRAIN_SECTORS * SECTOR
TABLE_ENTRIES = 512
# Grains that do not lie in the order of the disk are sorted, which takes 16 bytes for each: 256 MiB for 1 TiB.
SORTED_LIMIT = 1 << 24
_SORTED_SECTORS = 16  # a power of two: 32 MiB of the file are sorted at a time


class Unsuitable(Exception):
    """The file is sound, as far as was looked, but not for this reader. The argument says why."""


@dataclass(frozen=True)
class Grains:
    """What the tables of an image say.

    count: the grains that are in the file. ordered: whether they lie there in the order of the disk. tables: the
    numbers of the grain tables that have any; each is for 32 MiB of the disk. digests: of these tables.
    structures: see vmdk.structures().
    """

    image: Image
    sparse: Sparse
    count: int
    ordered: bool
    tables: array[int]
    digests: array[int]
    structures: array[int]

    @property
    def virtual_size(self) -> int:
        """The bytes of the disk."""
        return self.sparse.capacity * SECTOR

    def in_disk(self) -> Iterator[tuple[int, int, int]]:
        """Every grain as (sector, rank, number), in the order of the disk.

        number: which one of the disk it is; rank: which one of those that are there. Raise MigrationError.
        """
        rank, expected = 0, zip(self.tables, self.digests, strict=True)
        for first, table in _tables(self.image, self.sparse):
            if not any(table):
                continue
            if next(expected, None) != (first // TABLE_ENTRIES, _digest(table)):
                raise self._changed()
            for number, sector in enumerate(table, first):
                if sector:
                    yield sector, rank, number
                    rank += 1
        if next(expected, None) is not None:
            raise self._changed()

    def _changed(self) -> MigrationError:
        return self.image.corrupt("has other tables than a moment ago: it was changed while it was read")

    def in_file(self) -> Iterator[tuple[int, int, int, int]]:
        """The same in the order of the file, and the sector that each grain ends before.

        Raise MigrationError (image_corrupt) for a grain in a place that has something else in it.
        """
        parts = iter(self.structures)
        begin, end = next(parts), next(parts)
        for grain, following in itertools.pairwise(itertools.chain(self._sorted(), [None])):
            sector, rank, number = cast(tuple[int, int, int], grain)  # only the last is None
            while begin <= sector:
                if sector < end:
                    raise self.image.corrupt(f"has a header or a table where {place(number, sector)} is")
                begin, end = next(parts, self._nowhere), next(parts, self._nowhere)
            limit = begin if following is None else min(begin, following[0])
            # Also what was in order, and is no more, because the file was changed.
            if limit <= sector:
                raise self.image.corrupt(f"has another grain where {place(number, sector)} is")
            yield sector, rank, number, limit

    @property
    def _nowhere(self) -> int:
        return self.image.size // SECTOR + 1

    def _sorted(self) -> Iterator[tuple[int, int, int]]:
        if self.ordered:
            yield from self.in_disk()
            return
        parts: dict[int, array[int]] = {}
        numbers = array("I")
        for sector, rank, number in self.in_disk():
            numbers.append(number)
            parts.setdefault(sector >> _SORTED_SECTORS, array("Q")).append(sector << 32 | rank)
        for key in sorted(parts):
            for pair in sorted(parts.pop(key)):
                sector, rank = pair >> 32, pair & 0xFFFFFFFF
                yield sector, rank, numbers[rank]


def place(number: int, sector: int) -> str:
    """How messages call a grain."""
    return f"grain {number} at byte {sector * SECTOR}"


def look(image: Image, sparse: Sparse) -> Grains:
    """Look at all tables once. Raise MigrationError (image_corrupt), Unsuitable."""
    if sparse.grain != GRAIN_SECTORS or sparse.entries_per_table != TABLE_ENTRIES:
        raise Unsuitable(f"it has grains of {sparse.grain} sectors, and {sparse.entries_per_table} in a table")
    if sparse.compressed and not sparse.marked:
        raise Unsuitable("it is compressed without markers")
    count, last, ordered = 0, 0, True
    tables, digests = array("I"), array("q")
    for first, table in _tables(image, sparse):
        present = [sector for sector in table if sector]
        if present:
            count += len(present)
            ordered = ordered and last < present[0] and all(map(operator.lt, present, present[1:]))
            last = present[-1]
            tables.append(first // TABLE_ENTRIES)
            digests.append(_digest(table))
    if not ordered and count > SORTED_LIMIT:
        raise Unsuitable(f"its {count} grains are in no order")
    return Grains(image, sparse, count, ordered, tables, digests, structures(image, sparse))


def _digest(table: array[int]) -> int:
    """What a table that is read again is held against. Python's own has a key that nobody knows."""
    return hash(table.tobytes())


def _tables(image: Image, sparse: Sparse) -> Iterator[tuple[int, array[int]]]:
    """Every table with the number of its first grain; a grain of zeros is none. Raise MigrationError."""
    end = -(-sparse.capacity // GRAIN_SECTORS)
    sectors = image.size // SECTOR
    for table_number, table in grain_tables(image, sparse):
        first = table_number * TABLE_ENTRIES
        if first + TABLE_ENTRIES > end and any(table[end - first :]):
            raise image.corrupt(f"has grains behind the end of its disk, which has {end}")
        if sparse.has_zero_grains and 1 in table:
            table = array("I", (0 if sector == 1 else sector for sector in table))
        if max(table) > sectors:
            number = first + table.index(max(table))
            raise image.corrupt(f"ends before {place(number, max(table))}")
        yield first, table
