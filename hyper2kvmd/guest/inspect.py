"""Finds out by looking which operating system is on the disks, how it boots, and mounts it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from hyper2kvmd.domain.model import GuestSystem
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest import storage
from hyper2kvmd.guest.linux import kernels, menu
from hyper2kvmd.guest.linux.devices import Device
from hyper2kvmd.guest.linux.kernels import Kernel
from hyper2kvmd.guest.linux.menu import Menu
from hyper2kvmd.guest.session import Session, read_text
from hyper2kvmd.guest.storage import KeyFor, device_of
from hyper2kvmd.text import printable

ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found on the disks, as the report has it. Strings from the guest are printable and short.

    serial_console: whether a kernel on the menu writes to a serial port.
    `mounts` maps mount points to what is mounted there now, `disks` are the appliance's names in the order given,
    `locked` are the encrypted devices that nobody had a key for.
    """

    os_type: str
    distro: str
    version: str
    product_name: str
    arch: str
    hostname: str
    package_format: str
    root: str
    mounts: dict[str, str]
    kernels: tuple[Kernel, ...]
    initramfs: str
    bootloader: str
    firmware: Literal["bios", "uefi"]
    firmware_evidence: str
    esp: str | None
    disks: tuple[str, ...]
    filesystems: tuple[Device, ...]
    locked: tuple[str, ...]
    serial_console: bool

    def system(self, kernel: str | None) -> GuestSystem:
        """The operating system as a domain knows it, starting this kernel."""
        return GuestSystem(self.os_type, self.distro, self.version, kernel, self.product_name)


@dataclass(frozen=True, kw_only=True)
class Inspection(Found):
    """What FIX needs besides. `boot_disk` is an index into `disks`."""

    boot_disk: int
    menu: Menu | None
    warnings: tuple[Finding, ...]


def inspect(session: Session, key_for: KeyFor = lambda uuid: None, firmware_hint: str = "unknown") -> Inspection:
    """Find the operating system, mount it (which replays journals), and look at how it boots.

    key_for: from the UUID of a LUKS container to its passphrase, or None. firmware_hint: "bios" or "uefi" decides for
    disks that are made for both. The guest stays mounted in the session.
    Raise MigrationError: os_unknown, guest_encrypted, guest_dirty, appliance_too_old.
    """
    g = session.g
    warnings: list[Finding] = []
    disks = tuple(g.list_devices())
    root, devices, locked = storage.find_system(g, disks, key_for, warnings)
    esp = next((d.name for d in devices if d.part_type in (ESP, "0xef") and _has_loaders(g, d.name)), None)
    firmware, evidence, boot_disk = _firmware(g, disks, devices, esp, firmware_hint)
    mounts = storage.mount(g, root, disks, devices, warnings)
    mounted = next((point for point, device in mounts.items() if device == esp), None)
    if esp is not None and mounted is None and g.is_dir("/boot/efi"):
        g.mount(esp, "/boot/efi")
        mounts["/boot/efi"] = esp
        mounted = "/boot/efi"
    if boot_disk is None:
        boot_disk = _disk_index(g, device_of(mounts.get("/boot", mounts["/"])))
    os_type = g.inspect_get_type(root)
    if os_type == "windows":
        _refuse_hibernated_windows(g, root)
    found = menu.read(partial(read_text, g), g.glob_expand) if os_type == "linux" else None
    major, minor = g.inspect_get_major_version(root), g.inspect_get_minor_version(root)
    return Inspection(
        os_type=os_type,
        distro=g.inspect_get_distro(root),
        version=f"{major}.{minor}",
        product_name=_product_name(g, root),
        arch=g.inspect_get_arch(root),
        hostname=printable(g.inspect_get_hostname(root)),
        package_format=g.inspect_get_package_format(root),
        root=device_of(root),
        mounts=mounts,
        kernels=kernels.find(g, found, mounted) if os_type == "linux" else (),
        initramfs=_initramfs(g) if os_type == "linux" else "none",
        bootloader=found.loader if found else "none",
        firmware=firmware,
        firmware_evidence=evidence,
        esp=esp,
        boot_disk=boot_disk or 0,
        disks=disks,
        filesystems=devices,
        locked=locked,
        menu=found,
        serial_console=found is not None and any("console=ttyS" in file.text for file in found.files),
        warnings=tuple(warnings),
    )


def _refuse_hibernated_windows(g: Any, root: str) -> None:
    path = "/hiberfil.sys"
    if g.is_file(path) and g.pread(path, 4, 0).lower() in (b"hibr", b"wake"):
        raise MigrationError(
            Code.GUEST_DIRTY,
            f"Windows on {device_of(root)} is hibernated (or was shut down with fast startup)",
            "Start it on VMware, run `powercfg /h off` and `shutdown /s /t 0`, and export it again.",
        )


def _product_name(g: Any, root: str) -> str:
    """What the system calls itself; libguestfs's answer for Debian is only the version."""
    release = read_text(g, "/etc/os-release") or ""
    found = re.search(r"^PRETTY_NAME=[\"']?([^\"'\n]+)", release, re.MULTILINE)
    return printable(found[1] if found else g.inspect_get_product_name(root))


def _initramfs(g: Any) -> str:
    """What builds the initramfs, by the programs that are there: a distribution's name says little."""
    for name, program in (
        ("initramfs-tools", "/usr/sbin/mkinitramfs"),
        ("dracut", "/usr/bin/dracut"),
        ("dracut", "/usr/sbin/dracut"),
        ("dracut", "/sbin/dracut"),
        ("mkinitcpio", "/usr/bin/mkinitcpio"),
        ("mkinitrd", "/sbin/mkinitrd"),
    ):
        if g.is_file(program, followsymlinks=True):
            return name
    return "none"


def _firmware(
    g: Any, disks: Sequence[str], devices: Sequence[Device], esp: str | None, hint: str
) -> tuple[Literal["bios", "uefi"], str, int | None]:
    """The firmware that the disks are made for, how that was seen, and the index of the disk it starts from."""
    sectors = [g.pread_device(disk, 512, 0) for disk in disks]
    grub_disk = next((number for number, sector in enumerate(sectors) if b"GRUB" in sector[:440]), None)
    has_bios_boot = any(device.part_type == BIOS_BOOT for device in devices)
    both = esp is not None and has_bios_boot and grub_disk is not None
    if esp is not None and (not both or hint == "uefi"):
        more = ", and so does a boot sector, but the manifest says UEFI" if both else ""
        return "uefi", f"the EFI system partition {esp} holds boot loaders{more}", _disk_index(g, esp)
    if grub_disk is not None:
        more = f", and {esp} is an EFI system partition with boot loaders too" if esp is not None else ""
        return "bios", f"GRUB is in the boot sector of {disks[grub_disk]}{more}", grub_disk
    for number, sector in enumerate(sectors):
        if any(sector[:440]) and 0x80 in sector[446:510:16]:
            return "bios", f"{disks[number]} has boot code and an active partition", number
    return "bios", "nothing on the disks says otherwise", None


def _has_loaders(g: Any, esp: str) -> bool:
    """Whether an EFI system partition is more than an empty one; to be called with nothing mounted."""
    try:
        g.mount_ro(esp, "/")
        return any(path.lower().endswith(".efi") for path in g.glob_expand("/*/*/*"))
    except RuntimeError:  # no file system on it, or a broken one: nothing starts from there
        return False
    finally:
        g.umount_all()


def _disk_index(g: Any, device: str) -> int | None:
    """The disk that a partition is on; None for what may span several (logical volumes, RAID)."""
    try:
        index: int = g.device_index(g.part_to_dev(device))
    except RuntimeError:
        return None
    return index
