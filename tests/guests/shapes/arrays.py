"""Guests of many disks: mirrors and stripes of md, LVM on them, and as many disks as there are letters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import ascii_lowercase
from typing import Any

from tests.guests.guest import BUILD_INITRAMFS, COMMON, GIB, INITRAMFS_TOOLS, MIB, Guest
from tests.guests.rootfs import Rootfs
from tests.guests.shapes.partition import BIOS_BOOT, LINUX, REST, SWAP, Layout, gpt, mount, shell

_PACKAGES = (*COMMON, *INITRAMFS_TOOLS, "grub-pc-bin", "ifupdown")
_ROOT, _DATA = "6d1a0c5e:3b9f4e77:a1b2c3d4:00000001", "6d1a0c5e:3b9f4e77:a1b2c3d4:00000002"

GUESTS = (
    Guest(
        "debian12-raid",
        Rootfs(
            "debian12-raid",
            "bookworm",
            (*_PACKAGES, "mdadm", "lvm2"),
            ("common", "initramfs-tools", "ifupdown", "disks", "shapes/raid"),
            BUILD_INITRAMFS,
        ),
        "bios",
        "ext4 on a mirror of two disks; LVM on a stripe of them, GPT",
        "initramfs-tools",
        "ifupdown",
        (3 * GIB, 3 * GIB),
    ),
    Guest(
        "debian11-26-disks",
        Rootfs(
            "debian11-26-disks",
            "bullseye",  # newer kernels look at all disks at once, and letters are as it comes
            _PACKAGES,
            ("common", "initramfs-tools", "ifupdown", "disks", "shapes/26-disks"),
            BUILD_INITRAMFS,
        ),
        "bios",
        "ext4, GPT; 25 more disks, each whole and by its name",
        "initramfs-tools",
        "ifupdown",
        (3 * GIB, *[16 * MIB] * 25),
    ),
)


def _raid(g: Any, _guest: Guest) -> Mapping[str, str]:
    for disk in ("/dev/sda", "/dev/sdb"):
        gpt(g, disk, (1, BIOS_BOOT), (2600, LINUX), (REST, LINUX))
    # mdadm.conf, and so the initramfs, names the arrays by what they are given here
    for number, level, part, uuid in ((0, 1, 2, _ROOT), (1, 0, 3, _DATA)):
        members = " ".join(f"$(readlink -f /dev/disk/guestfs/{disk}){part}" for disk in ("boot", "diskb"))
        shell(
            g,
            f"mdadm --create /dev/md{number} --run --assume-clean --homehost=vmware-guest --name={number}"
            f" --level={level} --raid-devices=2 --metadata=1.2 --uuid={uuid} {members}",
        )
    g.pvcreate("/dev/md1")
    g.vgcreate("data", ["/dev/md1"])
    g.lvcreate("swap", "data", 128)
    g.lvcreate_free("files", "data", 100)
    g.mkswap("/dev/data/swap")
    mount(g, "/dev/md0", "/", "ext4")
    mount(g, "/dev/data/files", "/data", "ext4")
    return {}


def _second_boot_disk(g: Any) -> None:
    g.sh("grub-install --target=i386-pc $(readlink -f /dev/disk/guestfs/diskb)")


def _letters(g: Any, _guest: Guest) -> Mapping[str, str]:
    gpt(g, "/dev/sda", (1, BIOS_BOOT), (2800, LINUX), (REST, SWAP))
    g.mkswap("/dev/sda3")
    whole = {f"/dev/sd{letter}": f"/disks/{letter}" for letter in ascii_lowercase[1:]}
    for device, point in {"/dev/sda2": "/", **whole}.items():
        # What Debian 11's kernel and GRUB do not know yet
        g.mkfs("ext4", device, features="^metadata_csum_seed,^orphan_file")
        if point != "/":
            g.mkdir_p(point)
        g.mount(device, point)
    return {}


LAYOUTS: dict[str, Layout] = {"debian12-raid": _raid, "debian11-26-disks": _letters}
FINISH: dict[str, Callable[[Any], None]] = {"debian12-raid": _second_boot_disk}
