"""qcow2, versions 2 and 3."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hyper2kvmd.image.header.reader import VIRTUAL_SIZE_LIMIT, Header, Image, integers

_COPIED = 1 << 63


def read_qcow2(image: Image) -> Header:
    """The header of a qcow2, and whether its last cluster is there. Raise MigrationError like read_vdi()."""
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


def _check_extensions(image: Image, offset: int, cluster: int) -> None:
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


def _check_last_cluster(image: Image, layout: _Layout, level1: bytes, table: int, clusters: int) -> None:
    """Make sure that the file reaches to the end of its last cluster.

    qemu reads what is cut off as zeros, and `qemu-img check` does not notice if it is less than a cluster.
    The refcounts tell the last cluster without a walk through all tables.
    """
    cluster = layout.cluster
    per_block = cluster * 8 // layout.width
    last = -1
    # The table may have been made for growth: look for its last entry from the end.
    for offset in range(table + (clusters - 1) * cluster, table - 1, -cluster):
        blocks = integers(image.read(offset, cluster, "the refcount table"), "Q", big=True)
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
    for number, entry in enumerate(integers(level1, "Q", big=True)):
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
