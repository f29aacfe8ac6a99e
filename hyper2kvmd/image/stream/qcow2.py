"""The layout of a qcow2 file of which it is known beforehand how many clusters of data it takes.

The format is in QEMU's docs/interop/qcow2.rst. Clusters have 64 KiB, references 16 bits.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L2_ENTRIES = CLUSTER // 8
_REFERENCES = CLUSTER // 2  # in one block
_COPIED = 1 << 63
_HEADER_LENGTH = 104


@dataclass(frozen=True)
class Layout:
    """Which clusters of the file are what, one after the other: header, reference table and blocks, L1, L2, data.

    parts: the numbers of the 512 MiB parts of the disk that have an L2 table. The numbers of the rest are of clusters.
    """

    virtual_size: int
    parts: tuple[int, ...]
    data: int
    blocks: int
    reference_table: int
    l1: int

    @classmethod
    def of(cls, virtual_size: int, parts: Iterable[int], data: int) -> Layout:
        """The layout for a disk of that many bytes, with as many clusters of data."""
        with_l2 = tuple(parts)
        l1 = _clusters(-(-virtual_size // (L2_ENTRIES * CLUSTER)) * 8)
        others = 1 + l1 + len(with_l2) + data
        blocks = table = 0
        # The blocks count themselves, and the table of them.
        while (needed := -(-(others + blocks + table) // _REFERENCES)) != blocks or _clusters(8 * blocks) != table:
            blocks, table = needed, _clusters(8 * needed)
        return cls(virtual_size, with_l2, data, blocks, table, l1)

    @property
    def first_l1(self) -> int:
        """The first cluster of the L1 table."""
        return 1 + self.reference_table + self.blocks

    @property
    def first_l2(self) -> int:
        """The first of the L2 tables, which are in the order of the disk."""
        return self.first_l1 + self.l1

    @property
    def first_data(self) -> int:
        """The first cluster of data."""
        return self.first_l2 + len(self.parts)

    @property
    def clusters(self) -> int:
        """How many there are in all."""
        return self.first_data + self.data

    def header(self) -> bytes:
        """The first cluster."""
        l1_entries = -(-self.virtual_size // (L2_ENTRIES * CLUSTER))
        fields = struct.pack(
            ">4sIQIIQIIQQIIQQQQII",
            *(b"QFI\xfb", 3, 0, 0, CLUSTER_BITS, self.virtual_size, 0, l1_entries, self.first_l1 * CLUSTER),
            *(CLUSTER, self.reference_table, 0, 0, 0, 0, 0, 4, _HEADER_LENGTH),
        )
        return fields.ljust(CLUSTER, b"\0")

    def reference_tables(self) -> bytes:
        """The table of the reference blocks."""
        first = 1 + self.reference_table
        entries = array("Q", ((first + number) * CLUSTER for number in range(self.blocks)))
        return _big(entries).ljust(self.reference_table * CLUSTER, b"\0")

    def reference_blocks(self, used: bytes | bytearray) -> Iterator[bytes]:
        """The reference blocks. used: for each cluster of data, 1 if something was written to it, else 0."""
        for number in range(self.blocks):
            begin, end = number * _REFERENCES, min((number + 1) * _REFERENCES, self.clusters)
            tables = max(0, min(end, self.first_data) - begin)
            data = used[max(0, begin - self.first_data) : max(0, end - self.first_data)]
            yield _big(array("H", [*[1] * tables, *data])).ljust(CLUSTER, b"\0")

    def l1_table(self) -> bytes:
        """The L1 table."""
        entries = array("Q", bytes(self.l1 * CLUSTER))
        for number, part in enumerate(self.parts):
            entries[part] = (self.first_l2 + number) * CLUSTER | _COPIED
        return _big(entries)

    def l2_tables(self, clusters: Iterable[tuple[int, int]], used: bytes | bytearray) -> Iterator[bytes]:
        """The L2 tables, in the order of the disk.

        clusters: the data as (rank, number): which one of those that are there, and which of the disk; in its order.
        """
        table = array("Q", bytes(CLUSTER))
        parts = iter(self.parts)
        part = next(parts, None)
        for rank, number in clusters:
            while part is not None and number // L2_ENTRIES != part:
                yield _big(table)
                table, part = array("Q", bytes(CLUSTER)), next(parts, None)
            if used[rank]:
                table[number % L2_ENTRIES] = (self.first_data + rank) * CLUSTER | _COPIED
        if part is not None:
            yield _big(table)


def _clusters(bytes: int) -> int:
    return -(-bytes // CLUSTER)


def _big(numbers: array[int]) -> bytes:
    swapped = array(numbers.typecode, numbers)
    if sys.byteorder == "little":
        swapped.byteswap()
    return swapped.tobytes()
