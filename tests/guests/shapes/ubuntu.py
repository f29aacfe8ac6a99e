"""Ubuntu servers as their installer leaves them: LVM and a /boot beside it, netplan by cloud-init, a swap file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.guests.guest import BUILD_DRACUT, BUILD_INITRAMFS, GIB, Guest
from tests.guests.rootfs import Rootfs
from tests.guests.shapes.partition import BIOS_BOOT, ESP, LINUX, REST, Layout, gpt, mount, shell

_COMMON = (
    *("linux-image-virtual", "zstd", "kmod", "udev", "systemd-sysv", "mount", "login", "iproute2", "open-vm-tools"),
    *("grub2-common", "e2fsprogs", "dosfstools", "lvm2", "netplan.io", "cloud-init", "dbus"),
)
_INITRAMFS_TOOLS = ("initramfs-tools", "busybox-initramfs")
_SECURE_BOOT = ("grub-efi-amd64-signed", "shim-signed", "grub-efi-amd64-bin")


def _ubuntu(name: str, suite: str, packages: tuple[str, ...], *overlays: str, commands: tuple[str, ...]) -> Rootfs:
    return Rootfs(
        name,
        suite,
        (*_COMMON, *packages),
        ("common", "shapes/ubuntu/common", *overlays, f"shapes/ubuntu/{name}"),
        # netplan refuses to read what everybody can
        ("chmod 600 /etc/netplan/*", "systemctl enable systemd-networkd", *commands),
        "ubuntu",
    )


GUESTS = (
    Guest(
        "ubuntu2204-bios",
        _ubuntu(
            "ubuntu2204-bios", "jammy", (*_INITRAMFS_TOOLS, "grub-pc-bin"), "initramfs-tools", commands=BUILD_INITRAMFS
        ),
        "bios",
        "LVM, GPT, swap file",
        "initramfs-tools",
        "netplan by the installer",
        (4 * GIB,),
    ),
    Guest(
        "ubuntu2404-uefi",
        _ubuntu(
            "ubuntu2404-uefi",
            "noble",
            (*_INITRAMFS_TOOLS, *_SECURE_BOOT),
            "initramfs-tools",
            "shapes/ubuntu/cloud-init",
            commands=BUILD_INITRAMFS,
        ),
        "uefi",
        "LVM, GPT, swap file; shim and signed GRUB",
        "initramfs-tools",
        "netplan by cloud-init",
        (4 * GIB,),
    ),
    Guest(
        "ubuntu2604-bios",
        _ubuntu(
            "ubuntu2604-bios",
            "resolute",
            ("dracut", "grub-pc-bin"),
            "shapes/ubuntu/cloud-init",
            commands=BUILD_DRACUT,
        ),
        "bios",
        "LVM, GPT, swap file",
        "dracut",
        "netplan by cloud-init",
        (4 * GIB,),
    ),
)


def _uefi(g: Any, _guest: Guest) -> Mapping[str, str]:
    gpt(g, "/dev/sda", (64, ESP), (512, LINUX), (REST, LINUX))
    places = _ubuntu_vg(g)
    mount(g, "/dev/sda1", "/boot/efi", "vfat")
    return {**places, "@ESP@": g.vfs_uuid("/dev/sda1")}


def _bios(g: Any, _guest: Guest) -> Mapping[str, str]:
    gpt(g, "/dev/sda", (1, BIOS_BOOT), (512, LINUX), (REST, LINUX))
    return _ubuntu_vg(g)


def _ubuntu_vg(g: Any) -> Mapping[str, str]:
    """The volume group on the third partition; Ubuntu does not give it LVM's type."""
    g.pvcreate("/dev/sda3")
    g.vgcreate("ubuntu-vg", ["/dev/sda3"])
    g.lvcreate_free("ubuntu-lv", "ubuntu-vg", 100)
    mount(g, "/dev/ubuntu-vg/ubuntu-lv", "/", "ext4")
    mount(g, "/dev/sda2", "/boot", "ext4")
    volume = (g.vguuid("ubuntu-vg") + g.lvuuid("/dev/ubuntu-vg/ubuntu-lv")).replace("-", "")
    return {"@ROOT@": f"dm-uuid-LVM-{volume}", "@BOOT@": g.vfs_uuid("/dev/sda2")}


def _swap_file(g: Any) -> None:
    shell(g, "fallocate -l 128M /sysroot/swap.img && chmod 600 /sysroot/swap.img && mkswap /sysroot/swap.img")


LAYOUTS: dict[str, Layout] = {"ubuntu2204-bios": _bios, "ubuntu2404-uefi": _uefi, "ubuntu2604-bios": _bios}
FINISH: dict[str, Callable[[Any], None]] = dict.fromkeys(LAYOUTS, _swap_file)
