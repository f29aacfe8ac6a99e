"""The PCI devices of a domain as Windows sees them: the names under which it looks for a driver of each."""

from __future__ import annotations

from dataclasses import dataclass

from hyper2kvmd.domain.model import CardModel, DiskBus

# The subsystem of what QEMU made itself.
_QEMU = (0x1AF4, 0x1100)


@dataclass(frozen=True)
class Function:
    """A PCI function by the numbers in its configuration space.

    subsystem: vendor and device. kind: class, subclass and programming interface, as in 0x010601. title: for people.
    """

    title: str
    vendor: int
    device: int
    subsystem: tuple[int, int]
    revision: int
    kind: int

    def ids(self) -> tuple[str, ...]:
        """Windows' identifiers of it without `PCI\\`, best first: the hardware IDs, and then the compatible IDs.

        Source: "Identifiers for PCI devices" in Microsoft's documentation of Windows drivers.
        """
        device = f"VEN_{self.vendor:04X}&DEV_{self.device:04X}"
        subsystem = f"{device}&SUBSYS_{self.subsystem[1]:04X}{self.subsystem[0]:04X}"
        interface, subclass = f"{self.kind:06X}", f"{self.kind >> 8:04X}"
        return (
            f"{subsystem}&REV_{self.revision:02X}",
            subsystem,
            f"{device}&CC_{interface}",
            f"{device}&CC_{subclass}",
            f"{device}&REV_{self.revision:02X}",
            device,
            f"VEN_{self.vendor:04X}&CC_{interface}",
            f"VEN_{self.vendor:04X}&CC_{subclass}",
            f"VEN_{self.vendor:04X}",
            f"CC_{interface}",
            f"CC_{subclass}",
        )


# What has the disks, by their bus; a domain for Windows is always a q35, whose own SATA controller is the AHCI.
DISKS: dict[DiskBus, Function] = {
    "virtio": Function("virtio disk", 0x1AF4, 0x1042, _QEMU, 1, 0x010000),
    "scsi": Function("virtio SCSI controller", 0x1AF4, 0x1048, _QEMU, 1, 0x010000),
    "sata": Function("SATA controller", 0x8086, 0x2922, _QEMU, 2, 0x010601),
}
# From the fastest to the one that the oldest Windows has a driver for.
CARDS: dict[CardModel, Function] = {
    "virtio": Function("virtio network card", 0x1AF4, 0x1041, _QEMU, 1, 0x020000),
    "e1000e": Function("e1000e network card", 0x8086, 0x10D3, (0x8086, 0x0000), 0, 0x020000),
    "e1000": Function("e1000 network card", 0x8086, 0x100E, _QEMU, 3, 0x020000),
}
