"""VDI, version 1.1."""

from __future__ import annotations

import struct

from hyper2kvmd.image.header.reader import SECTOR, Header, Image, integers


def read_vdi(image: Image) -> Header:
    """The header of a VDI. Raise MigrationError: format_unsupported, image_unsafe, image_corrupt."""
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
    used = [entry for entry in integers(image.read(table, blocks * 4, "the block table"), "I") if entry < 0xFFFFFFFE]
    if used:
        image.holds(data + max(used) * block, block, "its last block")
    return Header("vdi", size, "static" if kind == 2 else "dynamic")
