"""What the guest calls its disks, and the names that stay the same when the controller changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# Names that the kernel gives in the order of discovery, and names made from the controller's address or model.
_KERNEL = re.compile(r"/dev/(?:(?:sd|hd|vd)(?P<letters>[a-z]{1,3})(?P<part>\d{1,3})?)")
_NVME = re.compile(r"/dev/nvme0n(?P<number>\d{1,3})(?:p(?P<part>\d{1,3}))?")
_BY_HARDWARE = re.compile(r"/dev/disk/by-(?:path|id)/(?P<name>\S+)")
# These by-id names come from the content (LVM, RAID, dm), so they do not change.
_BY_CONTENT = re.compile(r"(?:dm-name|dm-uuid|md-name|md-uuid|lvm-pv-uuid)-")


@dataclass(frozen=True)
class Device:
    """A partition or a whole disk: `name` as libguestfs says it, what is on it, and its identifiers.

    `part_type` is the partition's type: a GUID in lower case, or 0x83 and the like.
    """

    name: str
    type: str = ""
    uuid: str = ""
    label: str = ""
    part_uuid: str = ""
    part_type: str = ""


@dataclass(frozen=True)
class Names:
    """Translates the guest's device names. `disks` are libguestfs's names in the guest's order, "" where unknown."""

    disks: Sequence[str]
    devices: Mapping[str, Device]

    def find(self, spec: str) -> Device | None:
        """The device that the guest means by `spec`, or None if nobody can know."""
        place = self._place(spec)
        if place is None or not 0 <= place[0] < len(self.disks):
            return None
        return self.devices.get(self.disks[place[0]] + place[1])

    def lacks(self, spec: str) -> bool:
        """Whether `spec` means a disk, by its position, that is not there at all."""
        place = self._place(spec)
        return place is not None and place[0] >= len(self.disks)

    def corrected(self, spec: str, actual: str) -> Names:
        """The same names, for a guest whose device `spec` turned out to be `actual`.

        One disk is then certain. Of two, the other is too; of more, nobody can know which of the rest is which.
        """
        place = self._place(spec)
        disk = max((disk for disk in self.disks if actual.startswith(disk)), key=len, default="")
        rest = [other for other in self.disks if other != disk]
        if place is None or not disk or not 0 <= place[0] < len(self.disks):
            return replace(self, disks=("",) * len(self.disks))
        order = (rest * len(self.disks) if len(rest) == 1 else [""] * len(self.disks))[: len(self.disks)]
        order[place[0]] = disk
        return replace(self, disks=tuple(order))

    def _place(self, spec: str) -> tuple[int, str] | None:
        """The position of the disk that `spec` names, from 0, and the partition's number, if any."""
        if found := _KERNEL.fullmatch(spec):
            return _ordinal(found["letters"]), found["part"] or ""
        if found := _NVME.fullmatch(spec):
            return int(found["number"]) - 1, found["part"] or ""
        if (found := _BY_HARDWARE.fullmatch(spec)) and len(self.disks) == 1:
            # An address says nothing about the order of several disks; of one disk there is no doubt.
            suffix = re.search(r"-part(\d{1,3})$", found["name"])
            return 0, suffix[1] if suffix else ""
        return None

    def stable(self, spec: str, *, by_partition: bool = False) -> str | None:
        """`UUID=...` or `PARTUUID=...` for `spec`; None if it cannot be resolved to something unique.

        by_partition: only the partition's own identifier will do (no initramfs, or content that changes).
        """
        device = self.find(spec)
        if device is None:
            return None
        everything = self.devices.values()
        if not by_partition and device.uuid and [d.uuid for d in everything].count(device.uuid) == 1:
            return f"UUID={device.uuid}"
        if device.part_uuid and [d.part_uuid for d in everything].count(device.part_uuid) == 1:
            return f"PARTUUID={device.part_uuid}"
        return None


def changes_with_hardware(spec: str) -> bool:
    """Whether `spec` is a device name that another controller would change."""
    if found := _BY_HARDWARE.fullmatch(spec):
        return not _BY_CONTENT.match(found["name"])
    return bool(_KERNEL.fullmatch(spec) or _NVME.fullmatch(spec))


def _ordinal(letters: str) -> int:
    """The position that `a`, `b`, ... `z`, `aa` stand for, from 0."""
    value = 0
    for letter in letters:
        value = value * 26 + ord(letter) - ord("a") + 1
    return value - 1
