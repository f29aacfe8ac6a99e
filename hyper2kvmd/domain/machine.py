"""The one decision about the machine: FIX proves the guest for it, the domain is built from it, the report says it."""

from __future__ import annotations

import re
from typing import Literal

from hyper2kvmd.domain.model import GuestSystem, Machine

# Every virtio-blk disk takes a PCI slot of its own, and about 30 are left for disks and network cards together.
VIRTIO_BLK_DISKS = 20


def machine_for(guest: GuestSystem | None, firmware: Literal["bios", "uefi"], disks: int, *, virtio: bool) -> Machine:
    """The machine of a guest with so many disks.

    guest: with the kernel that it starts; None if nobody looked. virtio: whether the guest has the drivers, or is
    taken to have them.
    """
    older = firmware == "bios" and _knows_no_q35(guest)  # no guest that old starts from UEFI, and Secure Boot needs q35
    if not virtio:
        return Machine("pc", "ide", "e1000") if older else Machine("q35", "sata", "e1000e")
    # A guest that is old enough for pc has no virtio-scsi, and there libvirt adds bridges with more slots.
    return Machine("pc" if older else "q35", "scsi" if disks > VIRTIO_BLK_DISKS and not older else "virtio", "virtio")


def _knows_no_q35(guest: GuestSystem | None) -> bool:
    """Linux has PCI Express' configuration space with 2.6.25, Windows with Vista."""
    if guest is None:
        return False
    if guest.type == "linux":
        found = re.match(r"2\.([0-9]{1,3})(?:\.([0-9]{1,3}))?(?![0-9])", guest.kernel or "")
        return found is not None and (int(found[1]), int(found[2] or 0)) < (6, 25)
    return guest.type == "windows" and re.match(r"[1-5]\.", guest.version) is not None  # up to XP and 2003
