"""The words in which a guest's disks are laid out inside libguestfs's appliance: partitions, mounts, commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.guests.boot import wwn
from tests.guests.guest import Guest

BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
LVM = "E6D6D379-F507-44C2-A23C-238F2A3DF928"
SWAP = "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F"
REST = 0

MIB_SECTORS = 2048
# Commands see the kernel's names. libguestfs's own calls translate theirs, by which /dev/sda is the first disk.
BOOT_DISK = "/dev/disk/guestfs/boot"
# What dracut puts in on VMware, whatever the machine is like where it is run.
VMWARE_DRACUT = (
    'dracut --force --hostonly --hostonly-mode strict --omit "qemu qemu-net"'
    ' --omit-drivers "virtio virtio_ring virtio_pci virtio_pci_modern_dev virtio_pci_legacy_dev virtio_blk virtio_scsi'
    ' virtio_net virtio_console virtio_rng"'
    ' --add-drivers "mptspi vmw_pvscsi ahci sd_mod vmxnet3"'
)
# A layout makes the disks and mounts them; what it returns are places to fill in the guest's /etc/fstab.
Layout = Callable[[Any, Guest], Mapping[str, str] | None]


def wwid(number: int) -> str:
    """What Linux calls a disk of the old machine by that name."""
    return f"naa.{wwn(number):x}"


def shell(g: Any, command: str) -> None:
    """Run a command of the appliance itself, where the guest is mounted on /sysroot."""
    g.debug("sh", [command])


def gpt(g: Any, disk: str, *partitions: tuple[int, str]) -> None:
    """Partition with GPT: size in MiB, and type."""
    g.part_init(disk, "gpt")
    start = MIB_SECTORS
    for number, (size, kind) in enumerate(partitions, start=1):
        end = start + size * MIB_SECTORS if size else g.blockdev_getsz(disk) - MIB_SECTORS
        g.part_add(disk, "p", start, end - 1)
        g.part_set_gpt_type(disk, number, kind)
        start = end


def mbr(g: Any, disk: str, *partitions: tuple[int, int]) -> None:
    """Partition with an MBR: size in MiB, and type."""
    g.part_init(disk, "mbr")
    start = MIB_SECTORS
    for number, (size, kind) in enumerate(partitions, start=1):
        end = start + size * MIB_SECTORS if size else g.blockdev_getsz(disk)
        g.part_add(disk, "p", start, end - 1)
        g.part_set_mbr_id(disk, number, kind)
        start = end
    g.part_set_bootable(disk, 1, True)


def mount(g: Any, device: str, point: str, fstype: str) -> None:
    g.mkfs(fstype, device)
    if point != "/":
        g.mkdir_p(point)
    g.mount(device, point)
