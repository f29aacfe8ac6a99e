"""Writes sparse VMDKs as every maker lays them out, from a disk that is known, and reads them in the simplest way."""

from __future__ import annotations

import ctypes
import random
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
GRAIN = 65536
AT_END = 0xFFFFFFFFFFFFFFFF
NEW_LINES, REDUNDANT, ZERO_GRAINS, COMPRESSED, MARKERS = 1, 2, 4, 1 << 16, 1 << 17
_TEXT_SECTORS = 20
_TABLE, _DIRECTORY, _FOOTER = 1, 2, 3  # the types of markers


@dataclass(frozen=True)
class Disk:
    """What is to be in an image: `size` bytes, and the parts of it that the file holds, by their numbers.

    A part is as long as a grain, or shorter if it ends in zeros. It may be nothing but zeros.
    """

    size: int
    parts: Mapping[int, bytes]
    grain: int = GRAIN

    @classmethod
    def of(cls, content: bytes, grain: int = GRAIN) -> Disk:
        """A disk with this content, of which the file holds what is not zeros."""
        parts = (content[begin : begin + grain].rstrip(b"\0") for begin in range(0, len(content), grain))
        return cls(len(content), {number: part for number, part in enumerate(parts) if part}, grain)

    def holding(self) -> dict[int, bytes]:
        """The parts that are not zeros, each as long as it is on the disk."""
        return {
            number: part.ljust(self.length(number), b"\0") for number, part in self.parts.items() if part.strip(b"\0")
        }

    def length(self, number: int) -> int:
        """The bytes of the disk that are in a part."""
        return min(self.grain, self.size - number * self.grain)

    def write(self, path: Path) -> Path:
        """Write it as a raw image, with holes."""
        with path.open("wb") as file:
            file.truncate(self.size)
            for number, part in self.parts.items():
                file.seek(number * self.grain)
                file.write(part)
        return path


@dataclass(frozen=True)
class Layout:
    """How a maker writes: what is where, and how grains are.

    behind: tables, directory and a footer are behind the grains. all_tables: also those of which nothing is in the
    file. twice: directory and tables are in front a second time. ended: there is an end-of-stream marker. level: of
    zlib; 0 stores. whole: the last grain is a whole one, else it ends with the disk. order: puts the numbers of the
    grains into the order of the file. gap: what is in front of each grain, in whole sectors. zeroed: parts that the
    tables say are zeros. flags: besides those that follow.
    """

    compressed: bool = True
    behind: bool = True
    all_tables: bool = False
    twice: bool = False
    ended: bool = True
    level: int = 6
    whole: bool = True
    order: Callable[[list[int]], None] | None = None
    gap: Callable[[], bytes] = bytes
    zeroed: frozenset[int] = frozenset()
    entries: int = 512
    flags: int = 0


# vSphere's export: a stream that is written from its first byte to its last.
VSPHERE = Layout()
# qemu-img: tables in front, for the whole disk, twice; no end.
QEMU_STREAM = Layout(behind=False, all_tables=True, twice=True, ended=False, flags=REDUNDANT)
# open-vmdk, which ova-compose runs: tables in front, once; the best compression; the last grain ends with the disk.
OPEN_VMDK = Layout(behind=False, all_tables=True, level=9, whole=False)
# What a hosted VMware and qemu-img call monolithicSparse.
MONOLITHIC = Layout(compressed=False, behind=False, all_tables=True, twice=True, ended=False, flags=REDUNDANT)


@dataclass
class Written:
    """A VMDK, and where in it what is, in bytes.

    grains: begin and end of each, with its marker, without what fills its last sector up. tables: of each part of the
    disk that has one. header: the one that counts, which is the footer if there is one.
    """

    data: bytearray
    grains: dict[int, tuple[int, int]] = field(default_factory=dict)
    tables: dict[int, int] = field(default_factory=dict)
    directory: int = 0
    header: int = 0

    def entry(self, number: int) -> int:
        """Where the table's entry of a grain is."""
        return self.tables[number // 512] + number % 512 * 4

    def put(self, at: int, format: str, *values: int | bytes) -> None:
        """Change something."""
        struct.pack_into(f"<{format}", self.data, at, *values)

    def get(self, at: int, format: str = "I") -> int:
        """A number in it."""
        value: int = struct.unpack_from(f"<{format}", self.data, at)[0]
        return value


def write(disk: Disk, layout: Layout = VSPHERE) -> Written:
    """A VMDK of a disk."""
    return _Writer(disk, layout).write()


def vmware_stream(content: bytes) -> bytes:
    """A streamOptimized VMDK as vSphere writes it: markers, tables after the data, and a footer at the end."""
    return bytes(write(Disk.of(content)).data)


class _Writer:
    def __init__(self, disk: Disk, layout: Layout) -> None:
        self.disk, self.layout = disk, layout
        self.out = bytearray()
        self.overhead = 0  # sectors in front of the first grain; qemu wants the file to have that many
        self.made = Written(self.out)
        self.per_table = layout.entries * disk.grain
        self.table_numbers = range(-(-disk.size // self.per_table))
        self.numbers = sorted(disk.parts.keys() - layout.zeroed)
        self.of_table: dict[int, list[int]] = defaultdict(list)
        for number in sorted({*self.numbers, *layout.zeroed}):
            self.of_table[number // layout.entries].append(number)
        if layout.order:
            layout.order(self.numbers)

    def write(self) -> Written:
        layout = self.layout
        self.out += bytes((1 + _TEXT_SECTORS) * SECTOR)
        second = 0
        if not layout.behind:
            if layout.twice:
                second = self._place_tables()
            self.made.directory = self._place_tables()
        if layout.behind or not layout.compressed:
            self._fill(128 * SECTOR)
        self.overhead = len(self.out) // SECTOR
        if layout.behind and layout.order is None:
            for table in self.table_numbers:
                self._put_grains([number for number in self.of_table.get(table, ()) if number not in layout.zeroed])
                self._put_table(table)
        else:
            self._put_grains(self.numbers)
            for table in self.table_numbers if layout.behind else ():
                self._put_table(table)
        if layout.behind:
            self._mark(self._directory_sectors(), _DIRECTORY)
            self.made.directory = self._put_directory(self.made.tables)
            self._mark(1, _FOOTER)
            self.made.header = len(self.out)
            self.out += self._header(self.made.directory // SECTOR, 0)
        if layout.ended:
            self.out += bytes(SECTOR)
        self.out[:SECTOR] = self._header(AT_END if layout.behind else self.made.directory // SECTOR, second // SECTOR)
        self.out[SECTOR : SECTOR + len(self._text())] = self._text()
        for table in self.of_table:
            entries, at = self._entries(table), self.made.tables[table]
            self.out[at : at + len(entries)] = entries
            if second:
                to = at - self.made.directory + second
                self.out[to : to + len(entries)] = entries
        return self.made

    def _header(self, directory: int, second: int) -> bytes:
        layout, compressed = self.layout, self.layout.compressed
        flags = NEW_LINES | layout.flags | (COMPRESSED | MARKERS if compressed else 0)
        flags |= ZERO_GRAINS if layout.zeroed else 0
        fields = struct.pack(
            "<4sIIQQQQIQQQ",
            *(b"KDMV", 3 if compressed else 1, flags, self.disk.size // SECTOR, self.disk.grain // SECTOR),
            *(1, _TEXT_SECTORS, layout.entries, second, directory, self.overhead),
        )
        return (fields + b"\0\n \r\n" + struct.pack("<H", compressed)).ljust(SECTOR, b"\0")

    def _text(self) -> bytes:
        kind = "streamOptimized" if self.layout.compressed else "monolithicSparse"
        return (
            f'# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="{kind}"\n'
            f'RW {self.disk.size // SECTOR} SPARSE "call-me-stream.vmdk"\nddb.adapterType = "lsilogic"\n'
        ).encode()

    def _place_tables(self) -> int:
        """Room for a directory and all tables behind it, which are filled in the end."""
        directory = len(self.out)
        self.out += bytes(self._directory_sectors() * SECTOR)
        tables = {}
        for table in self.table_numbers:
            tables[table] = len(self.out)
            self.out += bytes(-(-self.layout.entries * 4 // SECTOR) * SECTOR)
        self._put_directory(tables, directory)
        self.made.tables = tables
        return directory

    def _directory_sectors(self) -> int:
        return -(-len(self.table_numbers) * 4 // SECTOR)

    def _put_directory(self, tables: Mapping[int, int], at: int | None = None) -> int:
        entries = struct.pack(
            f"<{len(self.table_numbers)}I", *(tables.get(table, 0) // SECTOR for table in self.table_numbers)
        )
        at = len(self.out) if at is None else at
        self.out[at : at + len(entries)] = entries
        self._fill()
        return at

    def _put_table(self, table: int) -> None:
        entries = self._entries(table)
        if any(entries) or self.layout.all_tables:
            self._mark(-(-len(entries) // SECTOR), _TABLE)
            self.made.tables[table] = len(self.out)
            self.out += entries
            self._fill()

    def _entries(self, table: int) -> bytes:
        entries = self.layout.entries
        sectors = [0] * entries
        for number in self.of_table.get(table, ()):
            begin, _ = self.made.grains.get(number, (SECTOR, 0))
            sectors[number % entries] = begin // SECTOR
        return struct.pack(f"<{entries}I", *sectors) if any(sectors) else bytes(4 * entries)

    def _put_grains(self, numbers: list[int]) -> None:
        for number in numbers:
            self.out += self.layout.gap()
            begin = len(self.out)
            length = self.disk.grain if self.layout.whole else self.disk.length(number)
            part = self.disk.parts[number].ljust(length, b"\0")
            if self.layout.compressed:
                packed = zlib.compress(part, self.layout.level)
                self.out += struct.pack("<QI", number * self.disk.grain // SECTOR, len(packed)) + packed
            else:
                self.out += part
            self.made.grains[number] = (begin, len(self.out))
            self._fill()

    def _mark(self, sectors: int, kind: int) -> None:
        self.out += struct.pack("<QII", sectors, 0, kind).ljust(SECTOR, b"\0")

    def _fill(self, unit: int = SECTOR) -> None:
        self.out += bytes(-len(self.out) % unit)


# By chance -----------------------------------------------------------------------------------------------------


def content(chance: random.Random, length: int) -> bytes:
    """What may be in a part of a disk."""
    match chance.randrange(7):
        case 0:  # does not get smaller
            return chance.randbytes(length)
        case 1:
            return bytes([chance.randrange(1, 256)]) * length
        case 2:  # starts as a grain of zeros does, and is none
            return bytes(length - 1) + b"\1"
        case 3:
            return bytes(length)
        case 4:
            return b"\1"
        case _:
            words = [chance.randbytes(chance.randrange(1, 9)) for _ in range(30)]
            return b"".join(chance.choices(words, k=length // 9)).ljust(length // 2, b"\0")[:length]


def a_disk(chance: random.Random, *, parts: int) -> Disk:
    """A disk with so many parts at most, in runs and alone, often at its end or on both sides of a table's end."""
    tables = chance.choice((0, 0, 0, 1, 2, 20))  # 32 MiB each
    size = chance.choice(
        (
            chance.choice((1, 2, 127, 128, 129)) * SECTOR,
            tables * 512 * GRAIN + chance.choice((1, 127, 128, 129, 300 * 128, 300 * 128 + 17)) * SECTOR,
            chance.randrange(1, 4000) * SECTOR,
            max(1, tables) * 512 * GRAIN,
        )
    )
    count = -(-size // GRAIN)
    numbers: set[int] = set()
    while len(numbers) < parts and chance.random() < 0.9:
        begin = chance.choice((0, count - 1, chance.randrange(count), min(510, count - 1)))
        numbers.update(range(begin, min(count, begin + chance.randrange(1, 7))))
    kept = sorted(numbers)[:parts]
    disk = Disk(size, {})
    return Disk(size, {number: content(chance, disk.length(number)) for number in kept})


def a_layout(chance: random.Random, disk: Disk, **fixed: bool) -> Layout:
    """One that the reader is for."""
    layout = {"compressed": chance.random() < 0.7, "behind": chance.random() < 0.5, **fixed}

    def gap() -> bytes:
        return chance.randbytes(chance.choice((0, 0, 1, 3, 300)) * SECTOR)

    return Layout(
        compressed=layout["compressed"],
        behind=layout["compressed"] and layout["behind"],
        all_tables=chance.random() < 0.5,
        twice=chance.random() < 0.5,
        ended=layout["behind"] or chance.random() < 0.5,
        level=chance.choice((0, 1, 6, 9)),
        whole=chance.random() < 0.5,
        order=chance.choice((None, None, chance.shuffle, list[int].reverse)),
        gap=gap if chance.random() < 0.3 else bytes,
        zeroed=frozenset(number for number in disk.parts if chance.random() < 0.2)
        if chance.random() < 0.3
        else frozenset(),
    )


# Read ----------------------------------------------------------------------------------------------------------


def read(data: bytes | bytearray) -> Disk:
    """The disk in a VMDK of the usual geometry, with no look at anything but what leads to the data.

    Raise struct.error or zlib.error if that leads nowhere.
    """
    at = 0 if struct.unpack_from("<Q", data, 56)[0] != AT_END else len(data) - 2 * SECTOR
    flags, capacity = struct.unpack_from("<IQ", data, at + 8)
    (directory,) = struct.unpack_from("<Q", data, at + 56)
    disk = Disk(capacity * SECTOR, {})
    parts: dict[int, bytes] = {}
    for table in range(-(-capacity // (512 * 128))):
        (place,) = struct.unpack_from("<I", data, directory * SECTOR + table * 4)
        for number, sector in enumerate(
            struct.unpack_from("<512I", data, place * SECTOR) if place else (), table * 512
        ):
            if sector == 0 or (sector == 1 and flags & ZERO_GRAINS):
                continue
            begin = sector * SECTOR
            if flags & COMPRESSED:
                _, length = struct.unpack_from("<QI", data, begin)
                part = zlib.decompress(data[begin + 12 : begin + 12 + length])
            else:
                part = bytes(data[begin : begin + GRAIN])
            parts[number] = part[: disk.length(number)]
    return Disk(disk.size, parts)


def read_qcow2(data: bytes | bytearray) -> Disk:
    """The disk in a qcow2 image with clusters as large as grains, plain or compressed with zstd.

    Every cluster must be counted as often as something refers to it.
    """
    magic, version, backing, _, bits, size, crypt, entries, l1, references, blocks = struct.unpack_from(
        ">4sIQIIQIIQQI", data
    )
    incompatible, _, _, order, length, compression = struct.unpack_from(">QQQIIB", data, 72)
    assert (magic, version, backing, bits, crypt) == (b"QFI\xfb", 3, 0, 16, 0)
    assert (incompatible, compression) in ((0, 0), (8, 1))
    assert (order, length) == (4, 112)
    assert len(data) % GRAIN == 0
    assert entries == -(-size // (GRAIN * 8192))
    used = Counter([0])
    parts = {}

    def refer(offset: int, length: int) -> None:
        assert offset + length <= len(data)
        used.update(range(offset // GRAIN, (offset + length - 1) // GRAIN + 1))

    def plain(entry: int) -> int:
        """What says that nothing else refers to the cluster."""
        assert entry >> 56 == 0x80
        assert entry % GRAIN == 0
        refer(entry & ~(1 << 63), GRAIN)
        return entry & ~(1 << 63)

    refer(references, blocks * GRAIN)
    refer(l1, entries * 8)
    for number, entry in enumerate(struct.unpack_from(f">{entries}Q", data, l1)):
        l2 = struct.unpack_from(">8192Q", data, plain(entry)) if entry else ()
        for cluster, place in enumerate(l2, number * 8192):
            if place >> 62 & 1:
                assert compression
                begin = place & (1 << 54) - 1
                length = ((place >> 54 & 0xFF) + 1) * SECTOR - begin % SECTOR
                refer(begin, length)
                parts[cluster] = _unzstd(bytes(data[begin : begin + length]))
            elif place:
                parts[cluster] = bytes(data[(begin := plain(place)) : begin + GRAIN])
    places = [place for place in struct.unpack_from(f">{blocks * 8192}Q", data, references) if place]
    for place in places:
        refer(place, GRAIN)
    counts = [count for place in places for count in struct.unpack_from(">32768H", data, place)]
    assert used == {cluster: count for cluster, count in enumerate(counts) if count}
    for number, part in parts.items():
        assert not any(part[max(0, size - number * GRAIN) :])
    return Disk(size, {number: part[: size - number * GRAIN] for number, part in parts.items()})


def _unzstd(data: bytes) -> bytes:
    """A cluster, from bytes that it is at the beginning of."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_findFrameCompressedSize.restype = library.ZSTD_decompress.restype = ctypes.c_size_t
    out = ctypes.create_string_buffer(GRAIN)
    length = library.ZSTD_findFrameCompressedSize(data, ctypes.c_size_t(len(data)))
    assert library.ZSTD_decompress(out, ctypes.c_size_t(GRAIN), data, ctypes.c_size_t(length)) == GRAIN
    return out.raw
