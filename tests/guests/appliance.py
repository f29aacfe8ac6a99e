"""Disks made inside libguestfs's appliance, whose kernel knows LVM, LUKS, btrfs and XFS where the host's may not."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.guests.recipe import Guest

BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
LVM = "E6D6D379-F507-44C2-A23C-238F2A3DF928"
SWAP = "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F"
REST = 0

MIB_SECTORS = 2048
# Commands see the kernel's names. libguestfs's own calls translate theirs, by which /dev/sda is the first disk.
BOOT_DISK = "/dev/disk/guestfs/boot"


def make_disks(guest: Guest, rootfs: Path, disks: Sequence[Path]) -> None:
    """Turn the tarball into the raw disks of one guest: the layout by its name, the rest as an installer does it."""
    import guestfs

    for disk, size in zip(disks, guest.disk_sizes, strict=True):
        with disk.open("wb") as image:
            image.truncate(size)
    g = guestfs.GuestFS(python_return_dict=True)
    try:
        g.set_backend("direct")
        g.set_backend_settings(["force_tcg"])  # works everywhere; a /dev/kvm that is there may still not work
        g.set_memsize(1280)
        g.set_smp(2)
        for disk, label in zip(disks, ("boot", "second", "third"), strict=False):
            g.add_drive_opts(str(disk), format="raw", cachemode="unsafe", label=label)
        # The tarball as one more disk: read directly it takes a third of the time it would through libguestfs. On
        # another bus, for what is on the same one may be found in any order, and then sda would be another disk.
        g.config("-drive", f"file={str(rootfs).replace(',', ',,')},format=raw,if=virtio,readonly=on")
        g.launch()
        LAYOUTS[guest.name](g, guest)
        _shell(g, "tar --extract --numeric-owner --xattrs --file /dev/vda --directory /sysroot")
        if guest.passphrase:
            g.sh("update-initramfs -u -k all")
        if guest.firmware == "uefi":
            # --no-nvram: there the appliance has none; and nothing in EFI/BOOT, which most installers leave alone
            g.sh("grub-install --target=x86_64-efi --efi-directory=/boot/efi --no-nvram")
        else:
            g.sh(f"grub-install --target=i386-pc {BOOT_DISK}")
        g.sh("update-grub")
        if guest.name in FINISH:
            FINISH[guest.name](g)
        g.umount_all()
        g.shutdown()
    finally:
        g.close()


def _shell(g: Any, command: str) -> None:
    """Run a command of the appliance itself, where the guest is mounted on /sysroot."""
    g.debug("sh", [command])


def _gpt(g: Any, disk: str, *partitions: tuple[int, str]) -> None:
    """Partition with GPT: size in MiB, and type."""
    g.part_init(disk, "gpt")
    start = MIB_SECTORS
    for number, (size, kind) in enumerate(partitions, start=1):
        end = start + size * MIB_SECTORS if size else g.blockdev_getsz(disk) - MIB_SECTORS
        g.part_add(disk, "p", start, end - 1)
        g.part_set_gpt_type(disk, number, kind)
        start = end


def _mbr(g: Any, disk: str, *partitions: tuple[int, int]) -> None:
    """Partition with an MBR: size in MiB, and type."""
    g.part_init(disk, "mbr")
    start = MIB_SECTORS
    for number, (size, kind) in enumerate(partitions, start=1):
        end = start + size * MIB_SECTORS if size else g.blockdev_getsz(disk)
        g.part_add(disk, "p", start, end - 1)
        g.part_set_mbr_id(disk, number, kind)
        start = end
    g.part_set_bootable(disk, 1, True)


def _mount(g: Any, device: str, point: str, fstype: str) -> None:
    g.mkfs(fstype, device)
    if point != "/":
        g.mkdir_p(point)
    g.mount(device, point)


def _uefi_lvm(g: Any, _guest: Guest) -> None:
    _gpt(g, "/dev/sda", (64, ESP), (256, LINUX), (REST, LVM))
    _debian_vg(g, "/dev/sda3")
    _mount(g, "/dev/sda2", "/boot", "ext4")
    _mount(g, "/dev/sda1", "/boot/efi", "vfat")


def _debian_vg(g: Any, volume: str) -> None:
    """The volume group as Debian's installer makes it in guided partitioning."""
    g.pvcreate(volume)
    g.vgcreate("debian-vg", [volume])
    g.lvcreate("swap_1", "debian-vg", 128)
    g.lvcreate_free("root", "debian-vg", 100)
    g.mkswap("/dev/debian-vg/swap_1")
    _mount(g, "/dev/debian-vg/root", "/", "ext4")


def _xfs(g: Any, _guest: Guest) -> None:
    _gpt(g, "/dev/sda", (1, BIOS_BOOT), (2800, LINUX), (REST, SWAP))
    g.mkswap("/dev/sda3")
    _mount(g, "/dev/sda2", "/", "xfs")


def _btrfs(g: Any, _guest: Guest) -> None:
    _mbr(g, "/dev/sda", (3900, 0x83), (REST, 0x82))
    g.mkswap("/dev/sda2")
    _mount(g, "/dev/sda1", "/", "btrfs")
    g.btrfs_subvolume_create("/@rootfs")
    g.btrfs_subvolume_create("/@home")
    g.umount("/")
    g.mount("btrfsvol:/dev/sda1/@rootfs", "/")
    g.mkdir("/home")
    g.mount("btrfsvol:/dev/sda1/@home", "/home")


def _btrfs_snapshots(g: Any) -> None:
    """Copies of the whole system, each of which looks like one that could be booted: snapper's, and one by hand."""
    g.btrfs_subvolume_create("/.snapshots")
    for number in (1, 2, 3):
        g.mkdir(f"/.snapshots/{number}")
        _shell(g, f"btrfs subvolume snapshot -r /sysroot /sysroot/.snapshots/{number}/snapshot")
    g.umount("/home")
    g.umount("/")
    g.mount("/dev/sda1", "/")
    # sorts before @rootfs
    _shell(g, "btrfs subvolume snapshot /sysroot/@rootfs /sysroot/@before-upgrade")


def _luks(g: Any, guest: Guest) -> None:
    _gpt(g, "/dev/sda", (1, BIOS_BOOT), (256, LINUX), (REST, LINUX))
    # few iterations: an emulated CPU would take minutes for the usual number
    options = "--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --batch-mode --key-file -"
    key = shlex.quote(guest.passphrase or "")
    _shell(g, f"printf %s {key} | cryptsetup luksFormat {options} $(readlink -f {BOOT_DISK})3")
    _shell(g, f"printf %s {key} | cryptsetup open --key-file - $(readlink -f {BOOT_DISK})3 sda3_crypt")
    _debian_vg(g, "/dev/mapper/sda3_crypt")
    _mount(g, "/dev/sda2", "/boot", "ext4")


def _three_disks(g: Any, _guest: Guest) -> None:
    _mbr(g, "/dev/sda", (256, 0x83), (REST, 0x8E))
    _gpt(g, "/dev/sdc", (REST, LINUX))
    # the second disk was added when the first was full: whole, without partitions
    for volume in ("/dev/sda2", "/dev/sdb"):
        g.pvcreate(volume)
    g.vgcreate("vg0", ["/dev/sda2", "/dev/sdb"])
    g.lvcreate("swap", "vg0", 128)
    g.lvcreate_free("root", "vg0", 100)
    g.mkswap("/dev/vg0/swap")
    _mount(g, "/dev/vg0/root", "/", "ext4")
    _mount(g, "/dev/sda1", "/boot", "ext4")
    _mount(g, "/dev/sdc1", "/data", "ext4")


def _installer_mbr(g: Any, _guest: Guest) -> None:
    """Debian's guided partitioning of a small disk: root, and swap as a logical partition."""
    g.part_init("/dev/sda", "mbr")
    end = g.blockdev_getsz("/dev/sda")
    extended = end - 130 * MIB_SECTORS
    g.part_add("/dev/sda", "p", MIB_SECTORS, extended - 1)
    g.part_add("/dev/sda", "e", extended, end - 1)
    g.part_add("/dev/sda", "l", extended + MIB_SECTORS, end - 1)
    g.part_set_mbr_id("/dev/sda", 5, 0x82)
    g.part_set_bootable("/dev/sda", 1, True)
    g.mkswap("/dev/sda5")
    _mount(g, "/dev/sda1", "/", "ext4")


LAYOUTS: dict[str, Callable[[Any, Guest], None]] = {
    "debian13-uefi-lvm": _uefi_lvm,
    "debian12-dracut-xfs": _xfs,
    "debian11-btrfs": _btrfs,
    "debian12-luks": _luks,
    "debian12-three-disks": _three_disks,
    "debian12-networkmanager": _installer_mbr,
    "debian12-two-kernels": _installer_mbr,
    "debian12-no-virtio": _installer_mbr,
}
# What is done to a guest that is complete
FINISH: dict[str, Callable[[Any], None]] = {"debian11-btrfs": _btrfs_snapshots}
