"""VHD, which QEMU calls vpc: fixed and dynamic."""

from __future__ import annotations

import struct

from hyper2kvmd.image.header.reader import SECTOR, Header, Image, integers


def is_vhd_footer(data: bytes) -> bool:
    """Whether this sector is a VHD footer: its name alone could be a guest's file by chance, its checksum not."""
    if len(data) < SECTOR or not data.startswith(b"conectix"):
        return False
    return _checksum_holds(data, 64)


def _checksum_holds(data: bytes, at: int) -> bool:
    """Whether the checksum at `at` is the complement of the sum of all other bytes."""
    expected = ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF
    return data[at : at + 4] == expected.to_bytes(4, "big")


def read_vhd(image: Image) -> Header:
    """The header of a VHD, and its footer, which must say the same. Raise MigrationError like read_vdi()."""
    if image.size < 2 * SECTOR:
        raise image.truncated("a VHD", 2 * SECTOR)
    footer = image.read(image.size - SECTOR, SECTOR, "the footer")
    if not is_vhd_footer(footer):
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
    if not is_vhd_footer(start) or any(start[a:b] != footer[a:b] for a, b in ((16, 24), (48, 56), (60, 64))):
        raise image.refused("has a header that contradicts its footer")
    at = struct.unpack_from(">Q", footer, 16)[0]
    dynamic = image.read(at, 1024, "the dynamic header")
    if not dynamic.startswith(b"cxsparse") or not _checksum_holds(dynamic, 36):
        raise image.corrupt("has a damaged dynamic header")
    table, _, entries, block = struct.unpack_from(">QIII", dynamic, 16)
    if block < SECTOR or block & (block - 1) or block > 1 << 30 or entries * block < size:
        raise image.corrupt(f"has {entries} blocks of {block} bytes for a disk of {size} bytes")
    bitmap = -(-(block // SECTOR // 8) // SECTOR) * SECTOR
    blocks = integers(image.read(table, entries * 4, "the block table"), "I", big=True)
    last = max((offset for offset in blocks if offset != 0xFFFFFFFF), default=0)
    if last:
        image.holds(last * SECTOR, bitmap + block + SECTOR, "its last block")
    return Header("vpc", size, "dynamic")
