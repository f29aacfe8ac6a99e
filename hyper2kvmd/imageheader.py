"""Reads the headers of a disk image and refuses what could harm, before any other program opens the file.

An image format can name other files of the host, and the programs that open images follow such names.
It can also be cut short in ways that those programs turn into zeros without a word. Both end here.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import uuid
from array import array
from dataclasses import dataclass

from hyper2kvmd.errors import Code, MigrationError

SECTOR = 512
VIRTUAL_SIZE_LIMIT = 64 << 40
DRIVERS = {"vmdk": "vmdk", "qcow2": "qcow2", "raw": "raw", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}

_EXPORT_AGAIN = "Copy the disk again, or export the VM again."
_MERGE = "Remove the VM's snapshots so that each disk is one file, and export the VM again."


@dataclass(frozen=True)
class Header:
    """What an image says of itself.

    `format` is qemu's name of the driver that reads the data, `virtual_size` the disk's size in bytes.
    With `flat_extent`, the image is a text that names the file beside it which holds the data, as raw.
    """

    format: str
    virtual_size: int
    subformat: str | None = None
    flat_extent: str | None = None


def examine(fd: int, size: int, declared: str, name: str) -> Header:
    """Read the headers of the image of `size` bytes open as `fd`.

    `declared` is the manifest's source_format, `name` how messages call the file. Raise MigrationError:
    format_mismatch, format_unsupported (a variant that is not read), image_unsafe (refers to other files,
    or claims an absurd size), image_corrupt (cut short or damaged).
    """
    image = _Image(fd, size, name)
    if size == 0:
        raise image.corrupt("is empty")
    found = _detect(image)
    # Raw has no mark, and a fixed VHD has it at its end, where a truncated one lost it: _vhd() says so.
    if found != declared and not (found is None and declared in ("raw", "vhd")):
        raise _mismatch(image, declared, found)
    header = {"vmdk": _vmdk, "qcow2": _qcow2, "raw": _raw, "vhd": _vhd, "vhdx": _vhdx, "vdi": _vdi}[declared](image)
    if not 0 < header.virtual_size <= VIRTUAL_SIZE_LIMIT:
        raise image.refused(
            f"claims to be a disk of {header.virtual_size} bytes; {VIRTUAL_SIZE_LIMIT} is the most that is accepted"
        )
    return header


@dataclass(frozen=True)
class _Image:
    """A file with bounds: nothing is read from behind its end, and every complaint names it."""

    fd: int
    size: int
    name: str

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Exactly `length` bytes, or an error which says that `what` is cut off."""
        self.holds(offset, length, what)
        data = os.pread(self.fd, length, offset)
        while len(data) < length:
            more = os.pread(self.fd, length - len(data), offset + len(data))
            if not more:
                raise self.truncated(what, offset + length)
            data += more
        return data

    def holds(self, offset: int, length: int, what: str) -> None:
        """Make sure that the file reaches as far as that."""
        if offset + length > self.size:
            raise self.truncated(what, offset + length)

    def truncated(self, what: str, needed: int) -> MigrationError:
        return self.corrupt(f"has {self.size} bytes, but {what} needs {needed}: it is truncated or damaged")

    def corrupt(self, what: str) -> MigrationError:
        return MigrationError(Code.IMAGE_CORRUPT, f"{self.name} {what}", _EXPORT_AGAIN)

    def refused(self, what: str) -> MigrationError:
        return MigrationError(
            Code.IMAGE_UNSAFE,
            f"{self.name} {what}",
            "Do not open this file on the host. Find out where it comes from, then export the VM again.",
        )

    def unsupported(self, what: str, hint: str) -> MigrationError:
        return MigrationError(Code.FORMAT_UNSUPPORTED, f"{self.name} {what}", hint)


_MAGICS = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    # Formats that are never accepted, so that a "raw" disk cannot be one of them either.
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"\x1f\x8b\x08", "gzip"),
)


def _detect(image: _Image) -> str | None:
    """The format that the first bytes, and for fixed VHDs the last ones, tell."""
    start = os.pread(image.fd, 4096, 0)
    for offset, magic, name in _MAGICS:
        if start.startswith(magic, offset):
            return name
    # qemu takes for a VMDK what has, after comments and blank lines, a line with the version.
    text = re.match(rb"(?:[ \t\r]*\n|#[^\n]*\n)*(?:version=[0-9]|# Disk Descriptor)", start)
    if text or start.startswith(b"# Disk DescriptorFile"):
        return "vmdk"
    if image.size >= SECTOR and _vhd_footer(os.pread(image.fd, SECTOR, image.size - SECTOR)):
        return "vhd"
    return "ova" if start[257:262] == b"ustar" else None


def _mismatch(image: _Image, declared: str, found: str | None) -> MigrationError:
    if found in DRIVERS:
        what = f"is a {found} image, but the manifest calls it {declared}"
        hint = f"Set source_format of this disk to {found} if that is right; otherwise export the VM again."
    elif found == "ova" and declared == "raw":
        what, hint = (
            "is a tar archive such as an OVA, not a disk",
            "Unpack it: `hyper2kvmctl manifest create` reads OVAs.",
        )
    elif found is not None:
        what, hint = f"holds {found} data, but the manifest calls it {declared}", "Unpack or convert it first."
    else:
        start = os.pread(image.fd, 8, 0)
        what = f"is not a {declared} image: it starts with the bytes {start.hex(' ')}"
        hint = "Set source_format of this disk to what it is (raw, if it has no format); otherwise export the VM again."
    return MigrationError(Code.FORMAT_MISMATCH, f"{image.name} {what}", hint)


def _raw(image: _Image) -> Header:
    return Header("raw", -(-image.size // SECTOR) * SECTOR)  # qemu fills the last sector up, too


# VMDK -----------------------------------------------------------------------------------------------------

_AT_END = 0xFFFFFFFFFFFFFFFF
_COMPRESSED, _MARKERS = 1 << 16, 1 << 17
_DESCRIPTOR_LIMIT = 20 * SECTOR  # how much of it qemu looks at, whatever the header says
_EXTENT = re.compile(r'(RW|RDONLY|NOACCESS)\s+(\d{1,18})\s+(\w+)(?:\s+"([^"]*)"(?:\s+(\d{1,18}))?.*)?')
_SETTING = re.compile(r'([\w.]+)\s*=\s*"?([^"]*)"?')


@dataclass(frozen=True)
class _Sparse:
    """The header of a sparse VMDK extent; offsets and sizes in sectors."""

    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_size: int
    entries_per_table: int
    directory: int

    @classmethod
    def parse(cls, data: bytes) -> _Sparse:
        flags, capacity, grain, descriptor, descriptor_size, entries, _, directory = struct.unpack_from(
            "<IQQQQIQQ", data, 8
        )
        return cls(flags, capacity, grain, descriptor, descriptor_size, entries, directory)


@dataclass(frozen=True)
class _Descriptor:
    """The text of a VMDK: its settings, and its extents as (sectors, type, file, offset)."""

    settings: dict[str, str]
    extents: tuple[tuple[int, str, str, int], ...]


def _vmdk(image: _Image) -> Header:
    magic = os.pread(image.fd, 4, 0)
    if magic == b"COWD":
        raise image.unsupported("is an ESX snapshot or thin disk (COWD), which refers to others", _MERGE)
    return _vmdk_sparse(image) if magic == b"KDMV" else _vmdk_text(image)


def _vmdk_text(image: _Image) -> Header:
    if image.size > 1 << 16:
        raise image.unsupported(f"is a descriptor of {image.size} bytes: more than 65536 are not read", _MERGE)
    descriptor = _descriptor(image, image.read(0, image.size, "the descriptor"))
    kind = descriptor.settings["createtype"]
    for _, extent_kind, file, _ in descriptor.extents:
        if extent_kind == "ZERO":
            continue
        if not file or file.startswith(".") or not file.isprintable() or re.search(r"[/\\:]|\.\.", file):
            raise image.refused(f"takes its data from {file!r}, which is not the name of a file beside it")
    if kind.lower() not in ("monolithicflat", "vmfs") or len(descriptor.extents) != 1:
        what = f"is of the type {kind} with {len(descriptor.extents)} extents, which is not supported"
        raise image.unsupported(what, f"{_MERGE} Exporting as OVF or OVA gives a type that is.")
    sectors, extent_kind, file, offset = descriptor.extents[0]
    if extent_kind not in ("FLAT", "VMFS") or offset != 0:
        raise image.unsupported(f"has an extent {extent_kind} at {offset}, which is not supported", _MERGE)
    return Header("raw", sectors * SECTOR, kind, file)


def _descriptor(image: _Image, data: bytes) -> _Descriptor:
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
        raise image.refused("builds on another disk image (it is the delta of a snapshot)")
    if "createtype" not in settings:
        raise image.corrupt("does not say its createType in its descriptor")
    return _Descriptor(settings, tuple(extents))


def _vmdk_sparse(image: _Image) -> Header:
    header = _Sparse.parse(image.read(0, SECTOR, "the VMDK header"))
    # With a capacity of 0 qemu reads the embedded text as if it were a file of its own, extents and all.
    if header.capacity == 0:
        raise image.refused("has a capacity of 0, with which its descriptor could name any file")
    # qemu looks for it in the second sector, whatever the header says.
    if header.descriptor != 1:
        raise image.unsupported("is one extent of a disk, without its descriptor", _MERGE)
    length = min(_DESCRIPTOR_LIMIT, max(image.size - SECTOR, SECTOR))
    descriptor = _descriptor(image, image.read(SECTOR, length, "the descriptor"))
    kind = descriptor.settings["createtype"]
    if kind.lower() not in ("monolithicsparse", "streamoptimized"):
        raise image.unsupported(f"is of the type {kind}, which is not supported", _MERGE)
    if len(descriptor.extents) != 1 or descriptor.extents[0][1] != "SPARSE":
        raise image.refused("does not have exactly one SPARSE extent, itself")
    if re.search(r"[/\\:]|\.\.", descriptor.extents[0][2]):
        raise image.refused(f"names {descriptor.extents[0][2]!r} as its extent, which is not a plain file name")
    tables = _footer(image, header) if header.directory == _AT_END else header
    _check_grains(image, tables)
    return Header("vmdk", header.capacity * SECTOR, kind)


def _footer(image: _Image, header: _Sparse) -> _Sparse:
    """The copy of the header at the end of a stream, which is only there if the stream is whole."""
    # A marker, the footer and the end-of-stream marker: one sector each.
    end = image.read(max(0, image.size - 3 * SECTOR), min(3 * SECTOR, image.size), "the footer")
    _, size, kind = struct.unpack_from("<QII", end, 0)
    stops = struct.unpack_from("<QII", end, len(end) - SECTOR)
    if len(end) < 3 * SECTOR or (size, kind) != (0, 3) or end[SECTOR : SECTOR + 4] != b"KDMV" or any(stops):
        raise image.corrupt("does not end with the footer that a streamOptimized VMDK has: it is truncated")
    footer = _Sparse.parse(end[SECTOR : 2 * SECTOR])
    for field in ("capacity", "grain", "entries_per_table", "flags"):
        if getattr(footer, field) != getattr(header, field):
            raise image.refused(f"has a footer that contradicts its header about {field}")
    return footer


def _check_grains(image: _Image, header: _Sparse) -> None:
    """Make sure that the file reaches to the end of its last grain: qemu reads what is cut off as zeros."""
    if header.grain & (header.grain - 1) or not 8 <= header.grain <= 1 << 16:
        raise image.corrupt(f"has grains of {header.grain} sectors")
    if not 1 <= header.entries_per_table <= SECTOR:
        raise image.corrupt(f"has grain tables of {header.entries_per_table} entries")
    grains = -(-header.capacity // header.grain)
    tables = -(-grains // header.entries_per_table)
    directory = _integers(image.read(header.directory * SECTOR, tables * 4, "the grain directory"), "I")
    used = [(number, offset) for number, offset in enumerate(directory) if offset]
    # Bounds the work by the size of the file: a hostile directory could name one table a million times.
    if len({offset for _, offset in used}) != len(used):
        raise image.corrupt("uses a grain table twice")
    compressed = header.flags & _COMPRESSED
    last, needed = 0, 0
    for number, offset in used:
        data = image.read(offset * SECTOR, header.entries_per_table * 4, "a grain table")
        table = _integers(data, "I")
        highest = max(table)
        if highest > max(last, 1):  # 1 stands for a grain of zeros
            last = highest
            grain = number * header.entries_per_table + table.index(highest)
            needed = min(header.grain, header.capacity - grain * header.grain) * SECTOR
    if last and compressed:
        if not header.flags & _MARKERS:
            raise image.unsupported("is compressed without markers", _MERGE)
        marker = image.read(last * SECTOR, 12, "the last grain")
        needed = 12 + struct.unpack_from("<I", marker, 8)[0]
    if last:
        image.holds(last * SECTOR, needed, "the last grain")


# qcow2 ----------------------------------------------------------------------------------------------------

_COPIED = 1 << 63


def _qcow2(image: _Image) -> Header:
    start = image.read(0, 72, "the qcow2 header")
    version, backing, _, bits, size, encryption, entries, table = struct.unpack_from(">IQIIQIIQ", start, 4)
    references, reference_clusters, snapshots = struct.unpack_from(">QII", start, 48)
    if version not in (2, 3):
        raise image.unsupported(f"is a qcow image of version {version}; 2 and 3 are read", "Convert it to qcow2 first.")
    if backing:
        raise image.refused("builds on another file (a backing file)")
    if not 9 <= bits <= 21:
        raise image.corrupt(f"has clusters of 2^{bits} bytes")
    cluster = 1 << bits
    length, features, width, wide = 72, 0, 4, False
    if version == 3:
        features, _, _, width, length = struct.unpack(">QQQII", image.read(72, 32, "the qcow2 header"))
        if features & 1 << 2:
            raise image.refused("keeps its data in another file (an external data file)")
        if features & 1 << 1:
            raise image.corrupt("is marked as corrupt")
        if features & ~0b11001:  # dirty, compression type, extended L2
            raise image.unsupported(f"uses unknown features ({features:#x})", "Convert it on the host it comes from.")
        if not 104 <= length <= cluster or length % 8:
            raise image.corrupt(f"has a header of {length} bytes")
        wide = bool(features & 1 << 4)
    if encryption:
        raise image.unsupported(
            "is encrypted", "Convert it to an unencrypted image first; qemu-img asks for the secret."
        )
    _check_extensions(image, length, cluster)
    if snapshots > 1024:
        raise image.corrupt(f"claims to have {snapshots} snapshots")
    if size > VIRTUAL_SIZE_LIMIT:
        return Header("qcow2", size)  # refused by the caller; the tables below would be as absurd
    covers = cluster * (cluster // (16 if wide else 8))
    if entries < -(-size // covers) or entries * 8 > 32 << 20:
        raise image.corrupt(f"has an L1 table of {entries} entries for a disk of {size} bytes")
    if table % cluster or references % cluster or not 0 < reference_clusters * cluster <= 8 << 20 or width > 6:
        raise image.corrupt("has tables in places where they cannot be")
    level1 = image.read(table, entries * 8, "the L1 table")
    image.holds(references, reference_clusters * cluster, "the refcount table")
    _check_last_cluster(image, _Layout(cluster, size, 1 << width, wide), level1, references, reference_clusters)
    return Header("qcow2", size)


def _check_extensions(image: _Image, offset: int, cluster: int) -> None:
    """Walk through the header extensions and refuse the one that names another file."""
    end = min(cluster, image.size)
    while offset + 8 <= end:
        kind, length = struct.unpack(">II", image.read(offset, 8, "the header extensions"))
        if kind == 0:
            return
        if kind == 0x44415441:
            raise image.refused("names another file for its data (an external data file)")
        if kind == 0x0537BE77:
            raise image.unsupported("is encrypted", "Convert it to an unencrypted image first.")
        offset += 8 + -(-length // 8) * 8
    if offset > cluster:
        raise image.corrupt("has header extensions beyond its first cluster")


@dataclass(frozen=True)
class _Layout:
    """Sizes in a qcow2 image: bytes of a cluster and of the disk, bits of a refcount; whether L2 is extended."""

    cluster: int
    size: int
    width: int
    wide: bool


def _check_last_cluster(image: _Image, layout: _Layout, level1: bytes, table: int, clusters: int) -> None:
    """Make sure that the file reaches to the end of its last cluster.

    qemu reads what is cut off as zeros, and `qemu-img check` does not notice if it is less than a cluster.
    The refcounts tell the last cluster without a walk through all tables.
    """
    cluster = layout.cluster
    per_block = cluster * 8 // layout.width
    last = -1
    # The table may have been made for growth: look for its last entry from the end.
    for offset in range(table + (clusters - 1) * cluster, table - 1, -cluster):
        blocks = _integers(image.read(offset, cluster, "the refcount table"), "Q", big=True)
        index = next((index for index in range(len(blocks) - 1, -1, -1) if blocks[index]), None)
        if index is not None:
            block = image.read(blocks[index] & ~0x1FF, cluster, "a refcount block")
            used = block.rstrip(b"\0")
            if used:
                # Refcounts of less than a byte start at its lowest bit.
                within = (used[-1].bit_length() - 1) // layout.width if layout.width < 8 else 0
                per_byte = max(8 // layout.width, 1)
                position = (len(used) - 1) * 8 // layout.width // per_byte * per_byte + within
                last = ((offset - table) // 8 + index) * per_block + position
            break
    if last < 0:
        raise image.corrupt("has no refcounts")
    if image.size >= (last + 1) * cluster:
        return
    if image.size <= last * cluster:
        raise image.truncated("its last cluster", last * cluster + 1)
    # A file may end within its last cluster if that one is compressed, or only some of its subclusters are there.
    entry_size = 16 if layout.wide else 8
    seen = {0}  # a hostile table could name one L2 table a million times
    for number, entry in enumerate(_integers(level1, "Q", big=True)):
        offset = entry & 0x00FFFFFFFFFFFE00
        if offset in seen:
            continue
        seen.add(offset)
        data = image.read(offset, cluster, "an L2 table")
        for pattern in (struct.pack(">Q", _COPIED | last * cluster), struct.pack(">Q", last * cluster)):
            at = data.find(pattern)
            while at >= 0 and at % entry_size:
                at = data.find(pattern, at + 1)
            if at >= 0:
                guest = (number * (cluster // entry_size) + at // entry_size) * cluster
                there = cluster
                if layout.wide:
                    (subclusters,) = struct.unpack_from(">I", data, at + 12)
                    there = subclusters.bit_length() * cluster // 32
                image.holds(last * cluster, min(there, layout.size - guest), "its last cluster")
                return


# VHD, VHDX, VDI -------------------------------------------------------------------------------------------


def _vhd_footer(data: bytes) -> bool:
    """Whether this sector is a VHD footer: its name alone could be a guest's file by chance, its checksum not."""
    if len(data) < SECTOR or not data.startswith(b"conectix"):
        return False
    return _checksum_holds(data, 64)


def _checksum_holds(data: bytes, at: int) -> bool:
    """Whether the checksum at `at` is the complement of the sum of all other bytes."""
    expected = ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF
    return data[at : at + 4] == expected.to_bytes(4, "big")


def _vhd(image: _Image) -> Header:
    if image.size < 2 * SECTOR:
        raise image.truncated("a VHD", 2 * SECTOR)
    footer = image.read(image.size - SECTOR, SECTOR, "the footer")
    if not _vhd_footer(footer):
        raise image.corrupt("does not end with a VHD footer: it is truncated or damaged")
    size, kind = struct.unpack_from(">Q", footer, 48)[0], struct.unpack_from(">I", footer, 60)[0]
    start = image.read(0, SECTOR, "the header")
    if kind == 2:
        if start.startswith(b"conectix"):
            raise image.refused("has a header that contradicts its footer")
        image.holds(0, size + SECTOR, "a fixed VHD of its size")
        return Header("vpc", size, "fixed")
    if kind == 4:
        raise image.refused("builds on another disk image (it is a differencing VHD)")
    if kind != 3:
        raise image.unsupported(f"is a VHD of the unknown type {kind}", "Convert it to a dynamic VHD first.")
    # qemu believes the copy at the start, so that one must say the same.
    if not _vhd_footer(start) or any(start[a:b] != footer[a:b] for a, b in ((16, 24), (48, 56), (60, 64))):
        raise image.refused("has a header that contradicts its footer")
    at = struct.unpack_from(">Q", footer, 16)[0]
    dynamic = image.read(at, 1024, "the dynamic header")
    if not dynamic.startswith(b"cxsparse") or not _checksum_holds(dynamic, 36):
        raise image.corrupt("has a damaged dynamic header")
    table, _, entries, block = struct.unpack_from(">QIII", dynamic, 16)
    if block < SECTOR or block & (block - 1) or block > 1 << 30 or entries * block < size:
        raise image.corrupt(f"has {entries} blocks of {block} bytes for a disk of {size} bytes")
    bitmap = -(-(block // SECTOR // 8) // SECTOR) * SECTOR
    blocks = _integers(image.read(table, entries * 4, "the block table"), "I", big=True)
    last = max((offset for offset in blocks if offset != 0xFFFFFFFF), default=0)
    if last:
        image.holds(last * SECTOR, bitmap + block + SECTOR, "its last block")
    return Header("vpc", size, "dynamic")


_BAT = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
_METADATA = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
_FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
_PARENT_LOCATOR = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
_NO_LOG = bytes(16)


def _vhdx(image: _Image) -> Header:
    headers = [image.read(offset, 4096, "the header") for offset in (64 << 10, 128 << 10)]
    valid = [header for header in headers if header.startswith(b"head")]
    if not valid:
        raise image.corrupt("has no VHDX header")
    current = max(valid, key=lambda header: int(struct.unpack_from("<Q", header, 8)[0]))
    if current[48:64] != _NO_LOG:
        raise MigrationError(
            Code.IMAGE_CORRUPT,
            f"{image.name} was not closed cleanly: its log holds changes that are not in place yet",
            "Shut the VM down and export it again; or run `qemu-img check -r all` on a copy of the file.",
        )
    table = image.read(192 << 10, 64 << 10, "the region table")
    if not table.startswith(b"regi"):
        raise image.corrupt("has a damaged region table")
    count = min(struct.unpack_from("<I", table, 8)[0], 2047)
    found = (struct.unpack_from("<16sQI", table, 16 + 32 * index) for index in range(count))
    regions = {uuid.UUID(bytes_le=guid): (offset, length) for guid, offset, length in found}
    if _BAT not in regions or _METADATA not in regions:
        raise image.corrupt("has no block table or no metadata")
    base = regions[_METADATA][0]
    table = image.read(base, 64 << 10, "the metadata")
    if not table.startswith(b"metadata"):
        raise image.corrupt("has damaged metadata")
    count = min(struct.unpack_from("<H", table, 10)[0], 2046)
    listed = (struct.unpack_from("<16sI", table, 32 + 32 * index) for index in range(count))
    items = {uuid.UUID(bytes_le=guid): base + offset for guid, offset in listed}
    if _FILE_PARAMETERS not in items or _DISK_SIZE not in items:
        raise image.corrupt("does not say its size")
    block, flags = struct.unpack("<II", image.read(items[_FILE_PARAMETERS], 8, "the metadata"))
    (size,) = struct.unpack("<Q", image.read(items[_DISK_SIZE], 8, "the metadata"))
    if _PARENT_LOCATOR in items or flags & 2:
        raise image.refused("builds on another disk image (it is a differencing VHDX)")
    if block & (block - 1) or not 1 << 20 <= block <= 256 << 20:
        raise image.corrupt(f"has blocks of {block} bytes")
    if size > VIRTUAL_SIZE_LIMIT:
        return Header("vhdx", size)  # refused by the caller; the table below would be as absurd
    blocks = -(-size // block)
    start, length = regions[_BAT]
    # Between the blocks stand the entries of bitmaps, one for every 4 GiB at least.
    length = min(length, (blocks + blocks * block // (4 << 30) + 1) * 8)
    last = 0
    for offset in range(start, start + length, 1 << 20):
        piece = image.read(offset, min(1 << 20, start + length - offset) & ~7, "the block table")
        last = max(last, max((entry for entry in _integers(piece, "Q") if entry & 7 == 6), default=0))  # 6: is there
    if last:
        image.holds(last >> 20 << 20, block, "its last block")
    return Header("vhdx", size, "fixed" if flags & 1 else "dynamic")


def _vdi(image: _Image) -> Header:
    header = image.read(0, SECTOR, "the VDI header")
    version, _, kind = struct.unpack_from("<III", header, 68)
    table, data = struct.unpack_from("<II", header, 340)
    sector, _, size, block, extra, blocks = struct.unpack_from("<IIQIII", header, 360)
    if version != 0x00010001:
        raise image.unsupported(f"is a VDI of version {version:#x}; 1.1 is read", "Convert it with VBoxManage first.")
    if kind not in (1, 2) or any(header[424:456]):
        raise image.refused("builds on another disk image (it is a differencing VDI)")
    if sector != SECTOR or block < SECTOR or block & (block - 1) or extra or blocks * block < size:
        raise image.corrupt(f"has {blocks} blocks of {block} bytes and sectors of {sector} for {size} bytes")
    used = [entry for entry in _integers(image.read(table, blocks * 4, "the block table"), "I") if entry < 0xFFFFFFFE]
    if used:
        image.holds(data + max(used) * block, block, "its last block")
    return Header("vdi", size, "static" if kind == 2 else "dynamic")


def _integers(data: bytes, kind: str, *, big: bool = False) -> array[int]:
    """Unpack unsigned integers: I has 32 bits, Q has 64."""
    numbers = array(kind)
    numbers.frombytes(data)
    if big != (sys.byteorder == "big"):
        numbers.byteswap()
    return numbers
