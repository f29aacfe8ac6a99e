"""A UEFI boot entry in the variable store of OVMF, as the machine that a guest was installed on had one."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence

GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")  # the namespace of Boot0000 and BootOrder
STORE = uuid.UUID("aaf32c78-947b-439a-a180-2e144ec37792")  # the signature of a store with authenticated variables
NON_VOLATILE_BOOT_RUNTIME = 0x7
VARIABLE_START, VARIABLE_ADDED, VARIABLE_DELETED = 0x55AA, 0x3F, 0x3C
ACTIVE = 1


def with_boot_entry(store: bytes, loader: str) -> bytes:
    r"""The store (all of the flash image) with one boot entry, first in the order, for `loader` (`\EFI\...`)."""
    path = loader.encode("utf-16-le") + b"\0\0"
    # a file on whichever disk has it (media device path, file path), and the end of the path
    device_path = struct.pack("<BBH", 4, 4, 4 + len(path)) + path + struct.pack("<BBH", 0x7F, 0xFF, 4)
    option = struct.pack("<IH", ACTIVE, len(device_path)) + "debian\0".encode("utf-16-le") + device_path
    added = _variable("Boot0000", option)
    added += _variable("BootOrder", struct.pack("<H", 0), len(added))
    kept, at = _without(store, ("Boot0000", "BootOrder"))
    if store[at : at + len(added)].strip(b"\xff"):
        raise ValueError("the variable store has no room, or is not one of OVMF's")
    return kept[:at] + added + kept[at + len(added) :]


def _variable(name: str, data: bytes, offset: int = 0) -> bytes:
    """One variable; it begins at a multiple of four bytes from the beginning of the store."""
    encoded = (name + "\0").encode("utf-16-le")
    # count, time stamp and key of a signature: none
    header = struct.pack("<HBBIQ16sI", VARIABLE_START, VARIABLE_ADDED, 0, NON_VOLATILE_BOOT_RUNTIME, 0, bytes(16), 0)
    sizes = struct.pack("<II", len(encoded), len(data))
    padding = b"\xff" * (-offset % 4)
    return padding + header + sizes + GLOBAL.bytes_le + encoded + data


def _without(store: bytes, names: Sequence[str]) -> tuple[bytes, int]:
    """The store without these variables, and where the others end.

    One that brings the keys of Secure Boot has entries of its own, and with two of a name the firmware hangs.
    """
    kept = bytearray(store)
    at = store.index(STORE.bytes_le) + 28  # behind the store's own header
    while struct.unpack_from("<H", store, at)[0] == VARIABLE_START:
        name_size, data_size = struct.unpack_from("<II", store, at + 36)
        if store[at + 60 : at + 60 + name_size].decode("utf-16-le").rstrip("\0") in names:
            kept[at + 2] &= VARIABLE_DELETED
        at += 60 + name_size + data_size
        at += -at % 4
    return bytes(kept), at
