"""The boot configuration (BCD), a hive of its own: which Windows starts by default, and on which partition."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from hyper2kvmd.guest.windows.registry import Hive, open_hive
from hyper2kvmd.text import printable

NAME = "BCD"
BOOTMGR = "{9dea862c-5cdd-4e70-acc1-f32b344d4795}"
# Elements, by the numbers that are the names of their keys.
APPLICATION_DEVICE = "11000001"
APPLICATION_PATH = "12000002"
DESCRIPTION = "12000004"
OS_DEVICE = "21000001"
SYSTEM_ROOT = "22000002"
DEFAULT = "23000003"  # of the boot manager

Kind = Literal["partition", "boot", "locate", "other"]
_KINDS: dict[int, Kind] = {5: "boot", 6: "partition", 8: "locate"}


@dataclass(frozen=True)
class Place:
    """A partition, as Windows notes it.

    disk: the GUID of a GPT, or the signature of an MBR in eight hexadecimal digits. partition: its GUID, or the byte
    of the disk where it begins. GUIDs are in lower case, without braces.
    """

    disk: str
    partition: str | int

    def __str__(self) -> str:
        if isinstance(self.partition, int):
            return f"the partition at byte {self.partition} of the disk with signature {self.disk}"
        return f"partition {self.partition} of disk {self.disk}"


@dataclass(frozen=True)
class Device:
    """What a device element names. place: for a partition.

    boot: the partition that the boot manager itself was read from. locate: whichever has the file. other: a network,
    a file with a disk in it, and what nobody can read.
    """

    kind: Kind
    place: Place | None = None

    def __str__(self) -> str:
        return str(self.place) if self.place else {"boot": "the boot partition"}.get(self.kind, f"{self.kind} device")


@dataclass(frozen=True)
class Entry:
    """A Windows that can be started. device has the loader, whose path there is `path`; os_device has `system_root`.

    Both are None where the entry has no such element.
    """

    id: str
    description: str
    path: str
    device: Device | None
    os_device: Device | None
    system_root: str


def default_entry(g: Any, path: str) -> Entry | None:
    """The entry that starts by itself, in a store of the mounted partition; None if it names none, or one that is not
    there.

    Raise MigrationError: guest_dirty.
    """
    with open_hive(g, path, NAME) as hive:
        id = _text(hive, BOOTMGR, DEFAULT).lower()
        return _entry(hive, id) if id and hive.exists(f"Objects\\{id}") else None


def read_device(data: bytes) -> Device:
    """What the bytes of a device element name."""
    if len(data) < 72:
        return Device("other")
    kind: Kind = _KINDS.get(struct.unpack_from("<I", data, 16)[0], "other")
    if kind != "partition":
        return Device(kind)
    medium, table = struct.unpack_from("<II", data, 48)
    if medium != 0 or table > 1:  # another than a hard disk, or one without partitions
        return Device("other")
    if table == 0:
        return Device(kind, Place(str(uuid.UUID(bytes_le=data[56:72])), str(uuid.UUID(bytes_le=data[32:48]))))
    offset, signature = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<I", data, 56)[0]
    return Device(kind, Place(f"{signature:08x}", offset))


def _entry(hive: Hive, id: str) -> Entry:
    return Entry(
        id=id,
        description=_text(hive, id, DESCRIPTION),
        path=_text(hive, id, APPLICATION_PATH),
        device=_device(hive, id, APPLICATION_DEVICE),
        os_device=_device(hive, id, OS_DEVICE),
        system_root=_text(hive, id, SYSTEM_ROOT),
    )


def _element(id: str, element: str) -> str:
    return f"Objects\\{id}\\Elements\\{element}"


def _text(hive: Hive, id: str, element: str) -> str:
    value = hive.value(_element(id, element), "Element")
    return printable(value.text or "") if value else ""


def _device(hive: Hive, id: str, element: str) -> Device | None:
    value = hive.value(_element(id, element), "Element")
    return read_device(value.data) if value else None
