"""The one decision about the machine: FIX proves the guest for it, the domain is built from it, the report says it."""

from __future__ import annotations

import re
from typing import Literal

from hyper2kvmd.domain.model import Domain, GuestSystem, Machine
from hyper2kvmd.errors import Code, MigrationError

# Every virtio-blk disk takes a PCI slot of its own, and about 30 are left for disks and network cards together.
VIRTIO_BLK_DISKS = 20
# An interrupt has 8 bits for the CPU that it is meant for, and this number means all of them.
BROADCAST = 255


def machine_for(
    guest: GuestSystem | None, firmware: Literal["bios", "uefi"], disks: int, *, virtio: bool, scsi: bool = False
) -> Machine:
    """The machine of a guest with so many disks.

    guest: with the kernel that it starts; None if nobody looked. virtio: whether the guest has the drivers, or is
    taken to have them. scsi: whether it has that of virtio-scsi alone where it looks for its root, as after a life on a
    KVM that gave it such disks.
    """
    older = firmware == "bios" and _knows_no_q35(guest)  # no guest that old starts from UEFI, and Secure Boot needs q35
    if not virtio:
        return Machine("pc", "ide", "e1000") if older else Machine("q35", "sata", "e1000e")
    # A guest that is old enough for pc has no virtio-scsi, and there libvirt adds bridges with more slots.
    many = disks > VIRTIO_BLK_DISKS
    return Machine("pc" if older else "q35", "scsi" if (many or scsi) and not older else "virtio", "virtio")


def topology(cpus: int, cores_per_socket: int | None) -> tuple[int, int] | None:
    """The sockets, and the cores of each; None where they do not divide, and every CPU is a socket of its own."""
    if not cores_per_socket or cores_per_socket < 0 or cpus % cores_per_socket:
        return None
    return cpus // cores_per_socket, cores_per_socket


def needs_remapping(cpus: int, cores_per_socket: int | None) -> bool:
    """Whether there are CPUs that an interrupt reaches only if an IOMMU remaps it; QEMU has none for pc.

    That begins with 256 CPUs, and below where sockets have gaps: the cores of each are numbered up to a power of two.
    """
    sockets, cores = topology(cpus, cores_per_socket) or (cpus, 1)
    return ((sockets - 1) << (cores - 1).bit_length()) + cores - 1 >= BROADCAST


def check_cpus(domain: Domain) -> None:
    """Raise MigrationError (define_failed) if the guest needs a machine on which it has too many CPUs."""
    if domain.machine.type == "pc" and needs_remapping(domain.cpus, domain.cores_per_socket):
        raise MigrationError(
            Code.DEFINE_FAILED,
            f"{domain.cpus} CPUs are more than the older chipset (pc) has room for, and this guest knows no other",
            f"Write a vm.cpu of at most {BROADCAST} into the manifest, or fewer if sockets have cores of another number"
            " than a power of two; then `hyper2kvmctl retry`.",
            field="vm.cpu",
        )


def _knows_no_q35(guest: GuestSystem | None) -> bool:
    """Linux has PCI Express' configuration space with 2.6.25, Windows with Vista."""
    if guest is None:
        return False
    if guest.type == "linux":
        found = re.match(r"2\.([0-9]{1,3})(?:\.([0-9]{1,3}))?(?![0-9])", guest.kernel or "")
        return found is not None and (int(found[1]), int(found[2] or 0)) < (6, 25)
    return guest.type == "windows" and re.match(r"[1-5]\.", guest.version) is not None  # up to XP and 2003
