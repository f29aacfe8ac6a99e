"""Finds out by looking which operating system is on the disks, how it boots, and mounts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from hyper2kvmd.domain.model import GuestSystem
from hyper2kvmd.errors import Finding
from hyper2kvmd.guest import mounts as guest_mounts
from hyper2kvmd.guest import storage, systems
from hyper2kvmd.guest.linux import kernels, menu
from hyper2kvmd.guest.linux import names as guest_names
from hyper2kvmd.guest.linux.devices import Device, Names
from hyper2kvmd.guest.linux.kernels import Kernel
from hyper2kvmd.guest.linux.menu import Menu
from hyper2kvmd.guest.mounts import device_of
from hyper2kvmd.guest.session import Session, read_text
from hyper2kvmd.guest.storage import KeyFor, System
from hyper2kvmd.guest.systems import Release
from hyper2kvmd.guest.windows.look import Windows, look
from hyper2kvmd.text import printable

ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found on the disks, as the report has it. Strings from the guest are printable and short.

    serial_console: whether a kernel on the menu writes to a serial port. build: the number that tells one Windows from
    another; utc: whether it keeps UTC in the hardware clock.
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
    build: int | None = None
    utc: bool = False

    def system(self, kernel: str | None) -> GuestSystem:
        """The operating system as a domain knows it, starting this kernel."""
        return GuestSystem(self.os_type, self.distro, self.version, kernel, self.product_name, self.utc)


@dataclass(frozen=True, kw_only=True)
class Inspection(Found):
    """What FIX needs besides. `boot_disk` is an index into `disks`; `names` knows what the guest calls its devices.

    windows: what a Windows is; None for another system, and for a Windows of the last century.
    """

    boot_disk: int
    menu: Menu | None
    names: Names
    warnings: tuple[Finding, ...]
    windows: Windows | None = None


def inspect(session: Session, key_for: KeyFor = lambda uuid: None, firmware_hint: str = "unknown") -> Inspection:
    """Find the operating system, mount it (which replays journals), and look at how it boots.

    key_for: from the UUID of a LUKS container to its passphrase, or None. firmware_hint: "bios" or "uefi" decides for
    disks that are made for both. The guest stays mounted in the session.
    Raise MigrationError: os_unknown, guest_encrypted, guest_dirty, device_uncertain, appliance_too_old,
    os_unsupported, tool_missing.
    """
    g = session.g
    warnings: list[Finding] = []
    disks = tuple(g.list_devices())
    starts: list[_Start] = []

    def starts_from(devices: Sequence[Device]) -> str:
        esp = next((d.name for d in devices if d.part_type in (ESP, "0xef") and _has_loaders(g, d.name)), None)
        starts.append(_firmware(g, disks, devices, esp, firmware_hint))
        return "" if starts[0].disk is None else disks[starts[0].disk]

    system = storage.find_system(g, disks, key_for, starts_from, warnings)
    if system.is_linux:
        looked = _linux(g, system, disks, starts[0].esp, warnings)
    elif system.is_windows:
        looked = _windows(g, system, disks, starts[0], warnings)
    else:
        looked = _other(g, system, warnings)
    boot_disk = starts[0].disk
    if boot_disk is None:
        boot_disk = _disk_index(g, device_of(looked.mounts.get("/boot", looked.mounts["/"])))
    menu = looked.menu
    return Inspection(
        os_type=looked.os_type,
        distro=looked.release.distro,
        version=f"{looked.release.major}.{looked.release.minor}",
        product_name=looked.release.product_name,
        arch=looked.release.arch,
        hostname=looked.release.hostname,
        package_format=looked.release.package_format,
        root=device_of(looked.mounts["/"]),
        mounts=looked.mounts,
        kernels=looked.kernels,
        initramfs=_initramfs(g) if system.is_linux else "none",
        bootloader=menu.loader if menu else "none",
        firmware=starts[0].firmware,
        firmware_evidence=starts[0].evidence,
        esp=starts[0].esp,
        boot_disk=boot_disk or 0,
        disks=disks,
        filesystems=system.devices,
        locked=system.locked,
        menu=menu,
        names=looked.names,
        build=looked.windows.build if looked.windows else None,
        utc=looked.windows is not None and looked.windows.real_time_is_universal,
        windows=looked.windows,
        serial_console=menu is not None and any("console=ttyS" in file.text for file in menu.files),
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class _Start:
    """What firmware starts: the ESP if it is one with loaders on it, and the index of the disk if that is known."""

    firmware: Literal["bios", "uefi"]
    evidence: str
    disk: int | None
    esp: str | None


@dataclass(frozen=True)
class _Looked:
    """A system that is mounted."""

    os_type: str
    release: Release
    mounts: dict[str, str]
    menu: Menu | None
    kernels: tuple[Kernel, ...]
    names: Names
    windows: Windows | None = None


def _linux(g: Any, system: System, disks: Sequence[str], esp: str | None, warnings: list[Finding]) -> _Looked:
    """Mount the Linux that the boot menu starts.

    What seems to start is mounted first; if its own menu names another root, that is the one.
    """
    read = partial(read_text, g)
    devices = {device.name: device for device in system.devices}
    root, tried = system.root, set[str]()
    while True:
        tried.add(root)
        said: list[Finding] = []
        names_of = partial(guest_names.known, read, g.glob_expand, disks=disks, devices=devices, root=device_of(root))
        # The boot menu may lie on a file system that these names lead to, and then says more.
        mounts = guest_mounts.mount(g, root, devices, partial(names_of, menu=None), system.locked, said)
        if esp is not None and esp not in mounts.values() and g.is_dir("/boot/efi"):
            g.mount(esp, "/boot/efi")
            mounts["/boot/efi"] = esp
        found = menu.read(read, g.glob_expand)
        known = names_of(menu=found)
        other = _named_root(found, known.names, system.roots, root)
        if other is None or other in tried:
            break
        g.umount_all()
        root = other
    warnings += said
    if known.disagrees:
        warnings.append(guest_names.disk_order(known.root, device_of(root)))
    mounted = next((point for point, device in mounts.items() if device == esp), None)
    release = systems.release(g, read)
    return _Looked("linux", release, mounts, found, kernels.find(g, found, mounted), known.names)


def _named_root(found: Menu | None, names: Names, roots: Sequence[str], root: str) -> str | None:
    """Another of the roots, if the entry that starts by default names that one."""
    if found is None or found.default is None:
        return None
    entry = found.entries[found.default]
    device = names.find(entry.option("root"))
    if device is None:
        return None
    candidates = [one for one in roots if device_of(one) == device.name]
    flags = dict(word.partition("=")[::2] for word in entry.option("rootflags").split(","))
    if subvolume := flags.get("subvol", "").strip("/"):
        candidates = [one for one in candidates if one.endswith(f"{device.name}/{subvolume}")]
    if device.name == device_of(root) and not subvolume:
        return None
    return next((one for one in candidates if one != root), None) if root not in candidates else None


def _windows(g: Any, system: System, disks: Sequence[str], start: _Start, warnings: list[Finding]) -> _Looked:
    """Mount the Windows that starts."""
    mounts: dict[str, str] = {}
    boot = start.esp
    if start.firmware == "bios":
        boot = _active_partition(g, system, disks[start.disk]) if start.disk is not None else None
    windows = look(g, system.root, boot, system.devices, mounts, warnings)
    major, minor = map(int, windows.version.split("."))
    release = Release("windows", major, minor, windows.product, windows.arch, windows.hostname, "unknown")
    names = Names({device.name: device for device in system.devices}, {})
    return _Looked("windows", release, mounts, None, (), names, windows)


def _active_partition(g: Any, system: System, disk: str) -> str | None:
    """The partition that the boot sector of a disk starts."""
    sector = g.pread_device(disk, 512, 0)
    active = [f"{disk}{number}" for number, flag in enumerate(sector[446:510:16], 1) if flag == 0x80]
    return next((device.name for device in system.devices if device.name in active), None)


def _other(g: Any, system: System, warnings: list[Finding]) -> _Looked:
    """Mount what is no Linux, of which libguestfs knows."""
    root = system.root
    if root not in g.inspect_get_roots():
        g.inspect_os()
        g.umount_all()
    mounts: dict[str, str] = {}
    types = {device.name: device.type for device in system.devices}
    guest_mounts.mount_one(g, "/", root, types, mounts, warnings, waits=True)
    os_type = g.inspect_get_type(root)
    release = Release(
        distro=g.inspect_get_distro(root),
        major=g.inspect_get_major_version(root),
        minor=g.inspect_get_minor_version(root),
        product_name=printable(g.inspect_get_product_name(root)),
        arch=g.inspect_get_arch(root),
        hostname=printable(g.inspect_get_hostname(root)),
        package_format=g.inspect_get_package_format(root),
    )
    names = Names({device.name: device for device in system.devices}, {})
    return _Looked(os_type, release, mounts, None, (), names)


def _initramfs(g: Any) -> str:
    """What builds the initramfs, by the programs that are there: a distribution's name says little.

    A Debian that was given dracut keeps mkinitramfs, of another package, and without update-initramfs nothing runs it.
    """
    if "mkinitramfs" in (read_text(g, "/usr/sbin/update-initramfs") or ""):
        return "initramfs-tools"
    for name, program in (
        ("dracut", "/usr/bin/dracut"),
        ("dracut", "/usr/sbin/dracut"),
        ("dracut", "/sbin/dracut"),
        ("mkinitcpio", "/usr/bin/mkinitcpio"),
        ("mkinitrd", "/sbin/mkinitrd"),
    ):
        if g.is_file(program, followsymlinks=True):
            return name
    return "none"


def _firmware(g: Any, disks: Sequence[str], devices: Sequence[Device], esp: str | None, hint: str) -> _Start:
    """The firmware that the disks are made for, how that was seen, and what it starts."""
    sectors = [g.pread_device(disk, 512, 0) for disk in disks]
    grub_disk = next((number for number, sector in enumerate(sectors) if b"GRUB" in sector[:440]), None)
    has_bios_boot = any(device.part_type == BIOS_BOOT for device in devices)
    both = esp is not None and has_bios_boot and grub_disk is not None
    if esp is not None and (not both or hint == "uefi"):
        more = ", and so does a boot sector, but the manifest says UEFI" if both else ""
        evidence = f"the EFI system partition {esp} holds boot loaders{more}"
        return _Start("uefi", evidence, _disk_index(g, esp), esp)
    if grub_disk is not None:
        more = f", and {esp} is an EFI system partition with boot loaders too" if esp is not None else ""
        return _Start("bios", f"GRUB is in the boot sector of {disks[grub_disk]}{more}", grub_disk, esp)
    for number, sector in enumerate(sectors):
        if any(sector[:440]) and 0x80 in sector[446:510:16]:
            return _Start("bios", f"{disks[number]} has boot code and an active partition", number, esp)
    return _Start("bios", "nothing on the disks says otherwise", None, esp)


def _has_loaders(g: Any, esp: str) -> bool:
    """Whether an EFI system partition is more than an empty one; to be called with nothing mounted."""
    try:
        g.mount_ro(esp, "/")
        # EFI/debian/grubx64.efi, and EFI/Microsoft/Boot/bootmgfw.efi.
        paths = (path for pattern in ("/*/*/*", "/*/*/*/*") for path in g.glob_expand(pattern))
        return any(path.lower().endswith(".efi") for path in paths)
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
