"""Disks as Debian's installer leaves them, and as its guests have them years later."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from tests.guests.guest import Guest
from tests.guests.shapes.partition import (
    BIOS_BOOT,
    BOOT_DISK,
    ESP,
    LINUX,
    LVM,
    MIB_SECTORS,
    REST,
    SWAP,
    Layout,
    gpt,
    mbr,
    mount,
    shell,
)


def _uefi_lvm(g: Any, _guest: Guest) -> None:
    gpt(g, "/dev/sda", (64, ESP), (256, LINUX), (REST, LVM))
    _debian_vg(g, "/dev/sda3")
    mount(g, "/dev/sda2", "/boot", "ext4")
    mount(g, "/dev/sda1", "/boot/efi", "vfat")


def _debian_vg(g: Any, volume: str) -> None:
    """The volume group as Debian's installer makes it in guided partitioning."""
    g.pvcreate(volume)
    g.vgcreate("debian-vg", [volume])
    g.lvcreate("swap_1", "debian-vg", 128)
    g.lvcreate_free("root", "debian-vg", 100)
    g.mkswap("/dev/debian-vg/swap_1")
    mount(g, "/dev/debian-vg/root", "/", "ext4")


def _xfs(g: Any, _guest: Guest) -> None:
    gpt(g, "/dev/sda", (1, BIOS_BOOT), (2800, LINUX), (REST, SWAP))
    g.mkswap("/dev/sda3")
    mount(g, "/dev/sda2", "/", "xfs")


def _btrfs(g: Any, _guest: Guest) -> None:
    mbr(g, "/dev/sda", (3900, 0x83), (REST, 0x82))
    g.mkswap("/dev/sda2")
    mount(g, "/dev/sda1", "/", "btrfs")
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
        shell(g, f"btrfs subvolume snapshot -r /sysroot /sysroot/.snapshots/{number}/snapshot")
    g.umount("/home")
    g.umount("/")
    g.mount("/dev/sda1", "/")
    # sorts before @rootfs
    shell(g, "btrfs subvolume snapshot /sysroot/@rootfs /sysroot/@before-upgrade")


def _luks(g: Any, guest: Guest) -> None:
    gpt(g, "/dev/sda", (1, BIOS_BOOT), (256, LINUX), (REST, LINUX))
    # few iterations: an emulated CPU would take minutes for the usual number
    options = "--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --batch-mode --key-file -"
    key = shlex.quote(guest.passphrase or "")
    shell(g, f"printf %s {key} | cryptsetup luksFormat {options} $(readlink -f {BOOT_DISK})3")
    shell(g, f"printf %s {key} | cryptsetup open --key-file - $(readlink -f {BOOT_DISK})3 sda3_crypt")
    _debian_vg(g, "/dev/mapper/sda3_crypt")
    mount(g, "/dev/sda2", "/boot", "ext4")


def _three_disks(g: Any, _guest: Guest) -> None:
    mbr(g, "/dev/sda", (256, 0x83), (REST, 0x8E))
    gpt(g, "/dev/sdc", (REST, LINUX))
    # the second disk was added when the first was full: whole, without partitions
    for volume in ("/dev/sda2", "/dev/sdb"):
        g.pvcreate(volume)
    g.vgcreate("vg0", ["/dev/sda2", "/dev/sdb"])
    g.lvcreate("swap", "vg0", 128)
    g.lvcreate_free("root", "vg0", 100)
    g.mkswap("/dev/vg0/swap")
    mount(g, "/dev/vg0/root", "/", "ext4")
    mount(g, "/dev/sda1", "/boot", "ext4")
    mount(g, "/dev/sdc1", "/data", "ext4")


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
    mount(g, "/dev/sda1", "/", "ext4")


LAYOUTS: dict[str, Layout] = {
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
