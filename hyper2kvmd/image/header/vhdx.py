"""VHDX: fixed and dynamic."""

from __future__ import annotations

import struct
import uuid

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.image.header.reader import VIRTUAL_SIZE_LIMIT, Header, Image, integers

_BAT = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
_METADATA = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
_FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
_PARENT_LOCATOR = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
_NO_LOG = bytes(16)


def read_vhdx(image: Image) -> Header:
    """The header of a VHDX whose log is empty. Raise MigrationError like read_vdi()."""
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
        last = max(last, max((entry for entry in integers(piece, "Q") if entry & 7 == 6), default=0))  # 6: is there
    if last:
        image.holds(last >> 20 << 20, block, "its last block")
    return Header("vhdx", size, "fixed" if flags & 1 else "dynamic")
