"""The one decision about the machine: its type, the bus of its disks, the model of its cards."""

from __future__ import annotations

import re
from typing import Literal

from hyper2kvmd.domain.model import Domain, GuestSystem

# Every virtio-blk disk takes a PCI slot of its own, and about 30 are left for disks and network cards together.
VIRTIO_BLK_DISKS = 20
IDE_DISKS = 4


def machine_type(guest: GuestSystem | None) -> Literal["q35", "pc"]:
    """The chipset: ICH9 with PCI Express, or the older PIIX for guests that know no other."""
    if guest is None:
        return "q35"
    if guest.type == "linux":
        found = re.match(r"2\.([0-9]{1,3})(?:\.([0-9]{1,3}))?(?![0-9])", guest.kernel or "")
        old = found is not None and (int(found[1]), int(found[2] or 0)) < (6, 25)
    else:
        old = guest.type == "windows" and re.match(r"[1-5]\.", guest.version) is not None  # up to XP and 2003
    return "pc" if old else "q35"


def disk_bus(domain: Domain, machine: str, index: int) -> str:
    if domain.compatible:
        # Windows XP has no driver for SATA; what does not fit on IDE can at least be given one.
        return "ide" if machine == "pc" and index < IDE_DISKS else "sata"
    # A guest that is old enough for pc has no virtio-scsi, and there libvirt adds bridges with more slots.
    return "scsi" if machine == "q35" and len(domain.disks) > VIRTIO_BLK_DISKS else "virtio"
