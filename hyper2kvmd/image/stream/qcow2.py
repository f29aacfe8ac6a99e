"""What a qcow2 file has besides data, written once all data is there: it lies behind that, and the header comes last.

The format is in QEMU's docs/interop/qcow2.rst. Clusters have 64 KiB, counts of references 16 bits.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L2_ENTRIES = CLUSTER // 8
_COUNTS = CLUSTER // 2  # in one block
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_SECTORS_SHIFT = 62 - (CLUSTER_BITS - 8)
_ZSTD_FEATURE, _ZSTD = 1 << 3, 1
_HEADER_LENGTH = 112


def plain_entry(offset: int) -> int:
    """The L2 entry of a cluster of data at that byte of the file."""
    return offset | _COPIED


def compressed_entry(offset: int, length: int) -> int:
    """The L2 entry of a compressed cluster."""
    more_sectors = (offset + length - 1) // 512 - offset // 512
    return offset | more_sectors << _SECTORS_SHIFT | _COMPRESSED


@dataclass(frozen=True)
class Layout:
    """Which clusters of the file are what: the header, `data` clusters, L1, L2 tables, counts, the table of these.

    parts: the numbers of the 512 MiB parts of the disk that have an L2 table. The numbers of the rest are of clusters.
    """

    virtual_size: int
    data: int
    parts: tuple[int, ...]
    blocks: int
    table: int

    @classmethod
    def of(cls, virtual_size: int, data: int, parts: Iterable[int]) -> Layout:
        """The layout for a disk of that many bytes."""
        with_l2 = tuple(parts)
        others = 1 + data + _clusters(_l1_entries(virtual_size) * 8) + len(with_l2)
        blocks = table = 0
        # They count themselves, too.
        while (needed := -(-(others + blocks + table) // _COUNTS)) != blocks or _clusters(8 * blocks) != table:
            blocks, table = needed, _clusters(8 * needed)
        return cls(virtual_size, data, with_l2, blocks, table)

    @property
    def _first_l1(self) -> int:
        return 1 + self.data

    @property
    def _first_l2(self) -> int:
        return self._first_l1 + _clusters(_l1_entries(self.virtual_size) * 8)

    @property
    def _first_block(self) -> int:
        return self._first_l2 + len(self.parts)

    @property
    def _first_of_table(self) -> int:
        return self._first_block + self.blocks

    @property
    def size(self) -> int:
        """The bytes of the file."""
        return (self._first_of_table + self.table) * CLUSTER

    def metadata(
        self, counts: Sequence[int], entries: Iterable[tuple[int, int]], *, zstd: bool
    ) -> Iterator[tuple[int, bytes]]:
        """What to write where, in whole clusters, in this order; the last is the header.

        counts: how often each cluster of data is referred to. entries: the L2 entries with the number of the cluster of
        the disk, in its order.
        """
        for number, l2 in enumerate(self._l2_tables(entries)):
            yield (self._first_l2 + number) * CLUSTER, l2
        yield self._first_l1 * CLUSTER, self._l1_table()
        for number in range(self.blocks):
            yield (self._first_block + number) * CLUSTER, self._block(number, counts)
        blocks = array("Q", ((self._first_block + number) * CLUSTER for number in range(self.blocks)))
        yield self._first_of_table * CLUSTER, _whole(blocks)
        yield 0, self._header(zstd=zstd)

    def _l2_tables(self, entries: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        table = array("Q", bytes(CLUSTER))
        parts = iter(self.parts)
        part = next(parts, None)
        for number, entry in entries:
            while number // L2_ENTRIES != part:
                yield _whole(table)
                table, part = array("Q", bytes(CLUSTER)), next(parts)
            table[number % L2_ENTRIES] = entry
        while part is not None:
            yield _whole(table)
            table, part = array("Q", bytes(CLUSTER)), next(parts, None)

    def _l1_table(self) -> bytes:
        entries = array("Q", bytes(_l1_entries(self.virtual_size) * 8))
        for number, part in enumerate(self.parts):
            entries[part] = plain_entry((self._first_l2 + number) * CLUSTER)
        return _whole(entries)

    def _block(self, number: int, counts: Sequence[int]) -> bytes:
        """One block of counts: 1 for what is no data."""
        begin, end = number * _COUNTS, min((number + 1) * _COUNTS, self._first_of_table + self.table)
        data = counts[max(begin - 1, 0) : max(end - 1, 0)]
        header = 1 if number == 0 else 0
        return _whole(array("H", [*[1] * header, *data, *[1] * (end - begin - header - len(data))]))

    def _header(self, *, zstd: bool) -> bytes:
        fields = struct.pack(
            ">4sIQIIQIIQQIIQQQQIIB",
            *(b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, self.virtual_size, 0),
            *(_l1_entries(self.virtual_size), self._first_l1 * CLUSTER, self._first_of_table * CLUSTER, self.table),
            *(0, 0, _ZSTD_FEATURE if zstd else 0, 0, 0, 4, _HEADER_LENGTH),
            _ZSTD if zstd else 0,
        )
        return fields.ljust(CLUSTER, b"\0")


def _l1_entries(virtual_size: int) -> int:
    return -(-virtual_size // (L2_ENTRIES * CLUSTER))


def _clusters(length: int) -> int:
    return -(-length // CLUSTER)


def _whole(numbers: array[int]) -> bytes:
    """Big endian, filled up to whole clusters."""
    if sys.byteorder == "little":
        numbers.byteswap()
    data = numbers.tobytes()
    return data.ljust(_clusters(len(data)) * CLUSTER, b"\0")
