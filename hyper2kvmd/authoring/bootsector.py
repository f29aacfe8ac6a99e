"""Tells from the first MiB of a disk which firmware could boot from it."""

from __future__ import annotations

import struct
import uuid
from typing import Literal

Firmware = Literal["bios", "uefi"]

READ_BYTES = 1 << 20
_EFI_SYSTEM = uuid.UUID("C12A7328-F81F-11D2-BA4B-00A0C93EC93B").bytes_le
_BIOS_BOOT = uuid.UUID("21686148-6449-6E6F-744E-656564454649").bytes_le
_MBR_EFI_SYSTEM = 0xEF
_BOOT_CODE = 440  # bytes
_ENTRY_LIMIT = 1024


def firmware(start: bytes) -> frozenset[Firmware]:
    """The firmware that has what it needs on a disk that starts so; empty for a data disk, both for many cloud images.

    `start`: READ_BYTES of the disk, or all if it is smaller.
    """
    if start[510:512] != b"\x55\xaa":
        return frozenset()
    types = {start[446 + 16 * number + 4] for number in range(4)} - {0}
    found: set[Firmware] = set()
    guids = _gpt(start)
    if _MBR_EFI_SYSTEM in types or _EFI_SYSTEM in guids:
        found.add("uefi")
    if any(start[:_BOOT_CODE]) and (_BIOS_BOOT in guids if guids else types):
        found.add("bios")
    return frozenset(found)


def _gpt(start: bytes) -> set[bytes]:
    """The types of the partitions in a GPT; empty if there is none."""
    for sector in (512, 4096):
        header = start[sector : sector + 92]
        if not header.startswith(b"EFI PART") or len(header) < 92:
            continue
        at, count, size = struct.unpack_from("<QII", header, 72)
        if count > _ENTRY_LIMIT or not 128 <= size <= 4096:
            return set()
        offsets = (at * sector + number * size for number in range(count))
        types = {start[offset : offset + 16] for offset in offsets if offset + 16 <= len(start)}
        return types - {bytes(16)}
    return set()
