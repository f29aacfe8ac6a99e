"""VMDK: the text that describes extents in other files, and sparse extents, streams included."""

from __future__ import annotations

import heapq
import re
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.image.header.reader import MERGE, SECTOR, VIRTUAL_SIZE_LIMIT, Extent, Header, Image, integers

_AT_END = 0xFFFFFFFFFFFFFFFF
_COMPRESSED, _MARKERS, _ZERO_GRAINS = 1 << 16, 1 << 17, 1 << 2
_DESCRIPTOR_LIMIT = 20 * SECTOR  # how much of it qemu looks at, whatever the header says
_TABLE_LIMIT = 1 << 22  # twice as many as the largest disk has in VMware's geometry
TEXT_LIMIT = 1 << 16  # bytes of a description
EXTENT_LIMIT = 512  # each is an open file; VMware's have 2 GiB, so that is a disk of 1 TiB
# What a description of extents calls itself; the numbers are VMware's older spelling.
_IN_EXTENTS = frozenset(
    {"monolithicflat", "vmfs", "twogbmaxextentsparse", "twogbmaxextentflat", "2gbmaxextentsparse", "2gbmaxextentflat"}
)
_DELTAS = frozenset({"vmfssparse", "sesparse"})
_CONSOLIDATE = (
    "Consolidate the VM's snapshots (delete all of them, or clone the VM), so that each disk is whole, and export it"
    " again."
)
_MERGE_EXTENTS = (
    "`vmware-vdiskmanager -r OLD.vmdk -t 0 NEW.vmdk` makes one file of it; so does an export as OVF or OVA."
)
_EXTENT = re.compile(r'(RW|RDONLY|NOACCESS)\s+(\d{1,18})\s+(\w+)(?:\s+"([^"]*)"(?:\s+(\d{1,18}))?.*)?')
_SETTING = re.compile(r'([\w.]+)\s*=\s*"?([^"]*)"?')


@dataclass(frozen=True)
class Sparse:
    """The header of a sparse VMDK extent; offsets and sizes in sectors. compression: 0 is none, 1 deflate."""

    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_size: int
    entries_per_table: int
    directory: int
    compression: int

    @property
    def compressed(self) -> bool:
        """Whether grains are compressed."""
        return bool(self.flags & _COMPRESSED)

    @property
    def marked(self) -> bool:
        """Whether every compressed grain begins with its place and its length."""
        return bool(self.flags & _MARKERS)

    @property
    def has_zero_grains(self) -> bool:
        """Whether the entry 1 of a grain table means a grain of zeros."""
        return bool(self.flags & _ZERO_GRAINS)

    @property
    def tables(self) -> int:
        """How many grain tables the directory has entries for."""
        return -(-self.capacity // (self.grain * self.entries_per_table))

    @classmethod
    def parse(cls, data: bytes) -> Sparse:
        flags, capacity, grain, descriptor, descriptor_size, entries, _, directory = struct.unpack_from(
            "<IQQQQIQQ", data, 8
        )
        (compression,) = struct.unpack_from("<H", data, 77)
        return cls(flags, capacity, grain, descriptor, descriptor_size, entries, directory, compression)


@dataclass(frozen=True)
class _Descriptor:
    """The text of a VMDK: its settings, and its extents as (sectors, type, file, offset)."""

    settings: dict[str, str]
    extents: tuple[tuple[int, str, str, int], ...]


def is_text(start: bytes) -> bool:
    """Whether a file that starts so is a description."""
    # qemu takes for one what has, after comments and blank lines, a line with the version.
    found = re.match(rb"(?:[ \t\r]*\n|#[^\n]*\n)*(?:version=[0-9]|# Disk Descriptor)", start)
    return found is not None or start.startswith(b"# Disk DescriptorFile")


def read_vmdk(image: Image) -> Header:
    """The header of a VMDK, sparse or a description. Raise MigrationError like read_vdi()."""
    magic = image.peek(4)
    if magic == b"COWD":
        raise image.unsupported("is an ESX snapshot or thin disk (COWD), which refers to others", _CONSOLIDATE)
    return _vmdk_sparse(image) if magic == b"KDMV" else _vmdk_text(image)


def _vmdk_text(image: Image) -> Header:
    if image.size > TEXT_LIMIT:
        raise image.unsupported(f"is a descriptor of {image.size} bytes: more than {TEXT_LIMIT} are not read", MERGE)
    descriptor = _descriptor(image, image.read(0, image.size, "the descriptor"))
    kind = descriptor.settings["createtype"]
    for _, extent_kind, file, _ in descriptor.extents:
        if extent_kind == "ZERO":
            continue
        if not file or file.startswith(".") or not file.isprintable() or re.search(r'[/\\:"]|\.\.', file):
            raise image.refused(f"takes its data from {file!r}, which is not the name of a file beside it")
    if _DELTAS & {kind.lower(), *(extent_kind.lower() for _, extent_kind, _, _ in descriptor.extents)}:
        raise _delta(image)
    if kind.lower() not in _IN_EXTENTS or not descriptor.extents:
        what = f"is of the type {kind} with {len(descriptor.extents)} extents, which is not supported"
        raise image.unsupported(what, f"{MERGE} Exporting as OVF or OVA gives a type that is.")
    if len(descriptor.extents) > EXTENT_LIMIT:
        what = f"is in {len(descriptor.extents)} extents; {EXTENT_LIMIT} is the most that is opened"
        raise image.unsupported(what, _MERGE_EXTENTS)
    extents = []
    for sectors, extent_kind, file, offset in descriptor.extents:
        if extent_kind not in ("FLAT", "VMFS", "SPARSE") or offset != 0 or sectors == 0:
            what = f"has an extent {extent_kind} of {sectors} sectors at {offset}, which is not supported"
            raise image.unsupported(what, MERGE)
        extents.append(Extent(file, sectors * SECTOR, extent_kind == "SPARSE"))
    if len({extent.file for extent in extents}) != len(extents):
        raise image.refused("takes its data from one file twice")
    raw = len(extents) == 1 and not extents[0].sparse
    return Header("raw" if raw else "vmdk", sum(extent.bytes for extent in extents), kind, tuple(extents))


def check_extent(image: Image, bytes: int) -> None:
    """Check one sparse extent of a disk in several files, which must be a part of `bytes`. Raise MigrationError."""
    magic = image.peek(4)
    if magic != b"KDMV":
        raise image.corrupt(
            f"is not the sparse extent that its descriptor says: it starts with the bytes {magic.hex(' ')}"
        )
    header = Sparse.parse(image.read(0, SECTOR, "the VMDK header"))
    # With a capacity of 0 qemu would read a text in it as a descriptor.
    if header.capacity == 0:
        raise image.refused("has a capacity of 0, with which its descriptor could name any file")
    if header.capacity * SECTOR != bytes:
        raise image.corrupt(f"is an extent of {header.capacity * SECTOR} bytes, its descriptor says {bytes}")
    _check_grains(image, read_sparse(image))


def descriptor_for(extents: Sequence[tuple[Extent, str]]) -> bytes:
    """A description of our own of a disk in extents that are at these paths, in which qemu finds no other name."""
    sparse = any(extent.sparse for extent, _ in extents)
    lines = [
        f"RW {extent.bytes // SECTOR} " + (f'SPARSE "{path}"' if extent.sparse else f'FLAT "{path}" 0')
        for extent, path in extents
    ]
    kind = "twoGbMaxExtentSparse" if sparse else "twoGbMaxExtentFlat"
    head = ("# Disk DescriptorFile", "version=1", "CID=fffffffe", "parentCID=ffffffff", f'createType="{kind}"')
    return "".join(f"{line}\n" for line in (*head, *lines, 'ddb.adapterType = "lsilogic"')).encode()


@dataclass(frozen=True)
class Described:
    """What a VMDK says of other files: those beside it that hold its data, and the image that it is a delta to.

    embedded: whether it is the beginning of a sparse file.
    """

    extents: tuple[str, ...]
    parent: str | None
    embedded: bool


def described(start: bytes) -> Described | None:
    """What a VMDK that starts so names, whatever that is worth and whether or not it is supported; None for no VMDK."""
    embedded = start.startswith(b"KDMV")
    if not embedded and not is_text(start):
        return None
    text = start[SECTOR if embedded else 0 :].split(b"\0", 1)[0].decode("utf-8", "replace")
    found = [_EXTENT.fullmatch(line.strip()) for line in text.splitlines()]
    # A sparse file has its own name in it, often that from before it was renamed.
    extents = () if embedded else tuple(extent[4] for extent in found if extent and extent[4])
    parent = re.search(r'(?im)^\s*parentFileNameHint\s*=\s*"([^"]*)"', text)
    return Described(extents, re.split(r"[/\\]", parent[1])[-1] if parent else None, embedded)


def _delta(image: Image) -> MigrationError:
    return MigrationError(
        Code.IMAGE_UNSAFE,
        f"{image.name} builds on another disk image: it is the delta of a snapshot, with only what was written since",
        _CONSOLIDATE,
    )


def _descriptor(image: Image, data: bytes) -> _Descriptor:
    """Parse a descriptor, understanding every line: what is skipped here, qemu might obey."""
    settings: dict[str, str] = {}
    extents = []
    text = data.split(b"\0", 1)[0]
    try:
        lines = text.decode("utf-8").split("\n")
    except UnicodeDecodeError:  # older products write the code page of the machine
        lines = text.decode("latin-1").split("\n")
    for line in lines:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if extent := _EXTENT.fullmatch(line):
            extents.append((int(extent[2]), extent[3].upper(), extent[4] or "", int(extent[5] or 0)))
        elif setting := _SETTING.fullmatch(line):
            key = setting[1].lower()
            if key in settings and not key.startswith("ddb."):
                raise image.refused(f"sets {key} twice, which different programs read differently")
            settings[key] = setting[2].strip()
        else:
            raise image.corrupt(f"has the line {line[:60]!r} in its descriptor, which means nothing")
    # qemu searches the text for these words wherever they stand, so a comment is no hiding place.
    if b"parentfilenamehint" in text.lower() or settings.get("parentcid", "ffffffff").lower() != "ffffffff":
        raise _delta(image)
    if "createtype" not in settings:
        raise image.corrupt("does not say its createType in its descriptor")
    return _Descriptor(settings, tuple(extents))


def _vmdk_sparse(image: Image) -> Header:
    header = Sparse.parse(image.read(0, SECTOR, "the VMDK header"))
    # With a capacity of 0 qemu reads the embedded text as if it were a file of its own, extents and all.
    if header.capacity == 0:
        raise image.refused("has a capacity of 0, with which its descriptor could name any file")
    # qemu looks for it in the second sector, whatever the header says.
    length = min(_DESCRIPTOR_LIMIT, max(image.size - SECTOR, SECTOR))
    text = image.read(SECTOR, length, "the descriptor") if header.descriptor == 1 else b""
    if not text.strip(b"\0"):
        hint = "Name the descriptor in its place: the small file beside it, a text, that lists the extents."
        raise image.unsupported("is one extent of a disk, and not its descriptor", hint)
    descriptor = _descriptor(image, text)
    kind = descriptor.settings["createtype"]
    if kind.lower() not in ("monolithicsparse", "streamoptimized"):
        raise image.unsupported(f"is of the type {kind}, which is not supported", MERGE)
    if len(descriptor.extents) != 1 or descriptor.extents[0][1] != "SPARSE":
        raise image.refused("does not have exactly one SPARSE extent, itself")
    if re.search(r"[/\\:]|\.\.", descriptor.extents[0][2]):
        raise image.refused(f"names {descriptor.extents[0][2]!r} as its extent, which is not a plain file name")
    _check_grains(image, read_sparse(image))
    return Header("vmdk", header.capacity * SECTOR, kind)


def _footer(image: Image, header: Sparse) -> Sparse:
    """The copy of the header at the end of a stream, which is only there if the stream is whole."""
    # A marker, the footer and the end-of-stream marker: one sector each.
    end = image.read(max(0, image.size - 3 * SECTOR), min(3 * SECTOR, image.size), "the footer")
    _, size, kind = struct.unpack_from("<QII", end, 0)
    stops = struct.unpack_from("<QII", end, len(end) - SECTOR)
    if len(end) < 3 * SECTOR or (size, kind) != (0, 3) or end[SECTOR : SECTOR + 4] != b"KDMV" or any(stops):
        raise image.corrupt("does not end with the footer that a streamOptimized VMDK has: it is truncated")
    footer = Sparse.parse(end[SECTOR : 2 * SECTOR])
    for field in ("capacity", "grain", "entries_per_table", "flags", "compression"):
        if getattr(footer, field) != getattr(header, field):
            raise image.refused(f"has a footer that contradicts its header about {field}")
    return footer


def _check_grains(image: Image, header: Sparse) -> None:
    """Make sure that the file reaches to the end of its last grain: qemu reads what is cut off as zeros."""
    last, needed = 0, 0
    for number, table in grain_tables(image, header):
        highest = max(table)
        if highest > max(last, 1):  # 1 stands for a grain of zeros
            last = highest
            grain = number * header.entries_per_table + table.index(highest)
            needed = min(header.grain, header.capacity - grain * header.grain) * SECTOR
    if last and header.compressed:
        if not header.marked:
            raise image.unsupported("is compressed without markers", MERGE)
        marker = image.read(last * SECTOR, 12, "the last grain")
        needed = 12 + struct.unpack_from("<I", marker, 8)[0]
    if last:
        image.holds(last * SECTOR, needed, "the last grain")


def grain_tables(image: Image, header: Sparse) -> Iterator[tuple[int, array[int]]]:
    """The grain tables that a sparse VMDK has, each with its number: the sector of every grain, 0 where there is none.

    Raise MigrationError (image_corrupt).
    """
    directory = _directory(image, header)
    _structures(image, header, directory)
    for number, offset in enumerate(directory):
        if offset:
            yield number, integers(image.read(offset * SECTOR, header.entries_per_table * 4, "a grain table"), "I")


def structures(image: Image, header: Sparse) -> array[int]:
    """The sectors that are no grain's, ascending: where the headers and the tables begin and end, one after the other.

    Raise MigrationError (image_corrupt).
    """
    return _structures(image, header, _directory(image, header))


def _structures(image: Image, header: Sparse, directory: array[int]) -> array[int]:
    table = _sectors(header.entries_per_table * 4)
    end = _sectors(image.size)
    others = [(0, 1), (header.directory, header.directory + _sectors(header.tables * 4))]
    if header.descriptor:
        others.append((min(header.descriptor, end), min(header.descriptor + header.descriptor_size, end)))
    tables = ((offset, offset + table) for offset in sorted(offset for offset in directory if offset))
    found = array("Q")
    for begin, behind in heapq.merge(sorted(others), tables):
        # Bounds the work by the size of the file, too: a hostile directory could name one table a million times.
        if found and begin < found[-1]:
            raise image.corrupt(f"has two tables, or a table and a header, at byte {begin * SECTOR}")
        found.extend((begin, behind))
    return found


def _directory(image: Image, header: Sparse) -> array[int]:
    if header.grain & (header.grain - 1) or not 8 <= header.grain <= 1 << 16:
        raise image.corrupt(f"has grains of {header.grain} sectors")
    if not 1 <= header.entries_per_table <= SECTOR:
        raise image.corrupt(f"has grain tables of {header.entries_per_table} entries")
    if header.tables > _TABLE_LIMIT:
        raise image.corrupt(f"has {header.tables} grain tables; {_TABLE_LIMIT} is the most that is accepted")
    return integers(image.read(header.directory * SECTOR, header.tables * 4, "the grain directory"), "I")


def _sectors(length: int) -> int:
    return -(-length // SECTOR)


def read_sparse(image: Image) -> Sparse:
    """The header of a sparse VMDK that read_vmdk() found good; of a stream, the footer. Raise MigrationError."""
    header = Sparse.parse(image.read(0, SECTOR, "the VMDK header"))
    # The flag says it to VMware, the number to qemu.
    if header.compressed != (header.compression == 1):
        raise image.refused("contradicts itself about whether its grains are compressed")
    if header.capacity * SECTOR > VIRTUAL_SIZE_LIMIT:
        raise image.absurd(header.capacity * SECTOR)
    return _footer(image, header) if header.directory == _AT_END else header
