"""The values that a domain is made of, without libvirt."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyper2kvmd.text import show

# Fixed for ever: a domain's UUID follows from it, and a job that is done again must find the domain it made.
_UUID_NAMESPACE = uuid.UUID("5f7a1c7e-2f54-4a0e-9d55-0d2b8f1f6a11")
_TARGET = re.compile(r"(?:(bridge|ovs):)?([^@:/\x00-\x1f]+)(?:@([0-9]{1,4}))?")


@dataclass(frozen=True)
class DomainDisk:
    """A disk of the domain. Disks are given in boot order."""

    path: Path
    format: str
    serial: str
    direct_io: bool


@dataclass(frozen=True)
class DomainNic:
    """A network interface. `target` is as `attachment` reads it."""

    mac: str
    target: str


@dataclass(frozen=True)
class Attachment:
    """Where a network interface leads to. `name` is that of the network or bridge; `user` has none."""

    kind: Literal["network", "bridge", "ovs", "user"]
    name: str
    vlan: int | None = None


@dataclass(frozen=True)
class GuestSystem:
    """The operating system that was found on the disks, in the words of libguestfs.

    type: "linux", "windows"... distro: "debian", "sles"... version: "12.0", "10.0"... product: what it calls itself,
    which is all that tells one Windows 10.0 from another. kernel: "6.1.0-18-amd64", the one that will boot. utc:
    whether a Windows keeps UTC in the hardware clock, and not local time.
    """

    type: str
    distro: str
    version: str
    kernel: str | None
    product: str = ""
    utc: bool = False


DiskBus = Literal["virtio", "scsi", "sata", "ide"]
CardModel = Literal["virtio", "e1000", "e1000e"]
IDE_DISKS = 4  # that a machine has room for


@dataclass(frozen=True)
class Machine:
    """Virtual hardware, in libvirt's words.

    type: q35 has ICH9 with PCI Express, pc the older PIIX for guests that know no other. disks: the bus of the disks;
    scsi is that of virtio-scsi controllers. cards: the model of the network cards.
    """

    type: Literal["q35", "pc"]
    disks: DiskBus
    cards: CardModel

    @property
    def virtio(self) -> bool:
        """Whether the guest gets virtio devices."""
        return self.cards == "virtio"

    def bus(self, index: int) -> DiskBus:
        """The bus of one disk, counted from 0 in boot order."""
        # Windows XP has no driver for SATA; what does not fit on IDE can at least be given one.
        return "sata" if self.disks == "ide" and index >= IDE_DISKS else self.disks

    def buses(self, count: int) -> frozenset[DiskBus]:
        """The buses of so many disks."""
        return frozenset(map(self.bus, range(count)))


@dataclass(frozen=True)
class Domain:
    """What the domain is made of.

    virt_type: libvirt's, kvm, qemu or test. guest: None if nobody looked into the disks. compatible: SATA and e1000e,
    for a guest that is not known to have virtio. nvram: where the variables of UEFI are kept, if not where libvirt
    keeps them.
    """

    name: str
    uuid: str
    title: str
    description: str
    cpus: int
    cores_per_socket: int | None
    memory_mib: int
    firmware: Literal["bios", "uefi"]
    secure_boot: bool
    tpm: bool
    virt_type: str
    machine: Machine
    guest: GuestSystem | None
    disks: tuple[DomainDisk, ...]
    nics: tuple[DomainNic, ...]
    job: str
    source: dict[str, str]
    tags: dict[str, str]


def domain_uuid(*identity: str) -> str:
    """The UUID of the domain of a source VM: the same whenever the same VM is migrated."""
    return str(uuid.uuid5(_UUID_NAMESPACE, "\0".join(identity)))


def generated_mac(domain_uuid: str, index: int) -> str:
    """A MAC address in QEMU's range that follows from the domain's UUID, so that a retry keeps it."""
    digest = uuid.uuid5(uuid.UUID(domain_uuid), f"nic{index}").bytes
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


def attachment(target: str) -> Attachment:
    """Read `NETWORK`, `bridge:NAME` or `ovs:NAME`, each with an optional `@VLAN`, or `user`. Raise ValueError."""
    found = _TARGET.fullmatch(target)
    vlan = int(found[3]) if found and found[3] else None
    if found is None or (vlan is not None and (target.startswith("user@") or not 1 <= vlan <= 4094)):
        raise ValueError(
            f"{show(target)} is not the name of a network, bridge:NAME, ovs:NAME, one of these with"
            " @VLAN (1 to 4094), or user"
        )
    if target == "user":
        return Attachment("user", "")
    kinds: dict[str | None, Literal["network", "bridge", "ovs"]] = {None: "network", "bridge": "bridge", "ovs": "ovs"}
    return Attachment(kinds[found[1]], found[2], vlan)
