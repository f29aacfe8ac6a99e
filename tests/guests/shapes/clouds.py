"""Guests that never saw VMware: Xen as on EC2, whose disks are xvda and so on, and Hyper-V as on Azure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.guests.guest import BUILD_INITRAMFS, COMMON, GIB, INITRAMFS_TOOLS, MIB, Guest
from tests.guests.rootfs import Rootfs
from tests.guests.shapes.partition import BIOS_BOOT, LINUX, REST, Layout, gpt, mount, shell

_COMMON = (*(package for package in COMMON if package != "open-vm-tools"), *INITRAMFS_TOOLS)
_CLOUD = ("cloud-init", "netplan.io", "grub-pc-bin")
# netplan refuses to read what everybody can
_COMMANDS = ("chmod 600 /etc/netplan/*", "systemctl enable --quiet systemd-networkd", *BUILD_INITRAMFS)
_ETH0 = ("eth0:UP:10.0.2.15/24",)

GUESTS = (
    Guest(
        "ec2-shape-xen",
        Rootfs(
            "ec2-shape-xen",
            "bookworm",
            (*_COMMON, *_CLOUD),
            ("common", "shapes/ec2"),
            _COMMANDS,
        ),
        "bios",
        "ext4 on xvda1, GPT; /data on all of xvdb",
        "initramfs-tools",
        "netplan by cloud-init, which asks EC2",
        (3 * GIB, 256 * MIB),
        platform="xen",
        exported_as="raw",
        cards=_ETH0,
    ),
    Guest(
        "azure-shape",
        Rootfs(
            "azure-shape",
            "bookworm",
            (*_COMMON, *_CLOUD, "waagent"),
            ("common", "shapes/azure"),
            _COMMANDS,
        ),
        "bios",
        "ext4, GPT; Azure's resource disk on /mnt",
        "initramfs-tools",
        "netplan by cloud-init, which asks Azure",
        (3 * GIB,),
        platform="hyper-v",
        exported_as="vhd",
        cards=_ETH0,
    ),
)


def _ec2(g: Any, _guest: Guest) -> Mapping[str, str] | None:
    g.mkfs("ext4", "/dev/sdb", label="data")
    return _cloud_image(g)


def _azure(g: Any, _guest: Guest) -> Mapping[str, str] | None:
    return _cloud_image(g)


def _cloud_image(g: Any) -> Mapping[str, str]:
    """The system first and the boot loader's partition behind it, as cloud images have them; swap is a file."""
    gpt(g, "/dev/sda", (2900, LINUX), (1, BIOS_BOOT), (REST, LINUX))
    mount(g, "/dev/sda1", "/", "ext4")
    return {"@ROOT@": g.vfs_uuid("/dev/sda1")}


def _swap_file(g: Any) -> None:
    shell(g, "fallocate -l 128M /sysroot/swapfile && chmod 600 /sysroot/swapfile && mkswap /sysroot/swapfile")


def _xvda(g: Any) -> None:
    """GRUB's menu as it was written on Xen, where the root had another name than here."""
    _swap_file(g)
    g.mkdir_p("/data")
    g.sh("sed -i 's,root=[^ ]*,root=/dev/xvda1,' /boot/grub/grub.cfg")


LAYOUTS: dict[str, Layout] = {"ec2-shape-xen": _ec2, "azure-shape": _azure}
FINISH: dict[str, Callable[[Any], None]] = {"ec2-shape-xen": _xvda, "azure-shape": _swap_file}
