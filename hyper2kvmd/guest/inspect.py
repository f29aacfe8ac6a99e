"""Finds out by looking which operating system is on the disks, how it boots, and mounts it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.change import decode, printable
from hyper2kvmd.guest.devices import Device
from hyper2kvmd.guest.grub import GRUB_CFG, kernels
from hyper2kvmd.guest.session import Session

ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_~-]{0,100}")
_ENCRYPTED = ("crypto_LUKS", "BitLocker")


@dataclass(frozen=True)
class Kernel:
    """A kernel in /boot, its initramfs if it has one, and whether a boot menu entry starts it."""

    version: str
    path: str
    initrd: str | None
    chosen_by_bootloader: bool


@dataclass(frozen=True)
class Inspection:
    """What was found on the disks. Strings from the guest are printable and short.

    `mounts` maps mount points to what is mounted there now, `disks` are the appliance's names in the order given,
    `boot_disk` is an index into them.
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
    boot_disk: int
    disks: tuple[str, ...]
    filesystems: tuple[Device, ...]
    warnings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """The inspection as it stands in the report (warnings are reported elsewhere)."""
        shape = dataclasses.asdict(self)
        del shape["warnings"]
        return shape


def inspect(session: Session) -> Inspection:
    """Find the operating system, mount it (which replays journals), and look at how it boots.

    The guest stays mounted in the session. Raise MigrationError: os_unknown, guest_encrypted, guest_dirty.
    """
    g = session.g
    warnings: list[Finding] = []
    disks = tuple(g.list_devices())
    devices = _devices(g, disks)
    _refuse_hibernated(devices)
    roots = g.inspect_os()
    root = _choose_root(g, roots, devices, warnings)
    if encrypted := [device.name for device in devices if device.type in _ENCRYPTED]:
        warnings.append(
            Finding(
                "encrypted_data",
                f"{', '.join(encrypted)} is encrypted and was left alone",
                "See that the guest can still unlock it: a TPM or a key server may not know the new machine.",
            )
        )
    esp = next((d.name for d in devices if d.part_type in (ESP, "0xef") and _has_loaders(g, d.name)), None)
    firmware, evidence, boot_disk = _firmware(g, disks, devices, esp)
    mounts = _mount(g, root, warnings)
    if esp is not None and esp not in mounts.values() and g.is_dir("/boot/efi"):
        g.mount(esp, "/boot/efi")
        mounts["/boot/efi"] = esp
    if boot_disk is None:
        boot_disk = _disk_index(g, _device_of(mounts.get("/boot", mounts["/"])))
    os_type = g.inspect_get_type(root)
    if os_type == "windows":
        _refuse_hibernated_windows(g, root)
    menu = decode(g.read_file(GRUB_CFG)) if g.is_file(GRUB_CFG, followsymlinks=True) else ""
    major, minor = g.inspect_get_major_version(root), g.inspect_get_minor_version(root)
    return Inspection(
        os_type=os_type,
        distro=g.inspect_get_distro(root),
        version=f"{major}.{minor}",
        product_name=_product_name(g, root),
        arch=g.inspect_get_arch(root),
        hostname=printable(g.inspect_get_hostname(root)),
        package_format=g.inspect_get_package_format(root),
        root=_device_of(root),
        mounts=mounts,
        kernels=_kernels(g, menu) if os_type == "linux" else (),
        initramfs=_initramfs(g) if os_type == "linux" else "none",
        bootloader=_bootloader(g) if os_type == "linux" else "none",
        firmware=firmware,
        firmware_evidence=evidence,
        esp=esp,
        boot_disk=boot_disk or 0,
        disks=disks,
        filesystems=devices,
        warnings=tuple(warnings),
    )


def _devices(g: Any, disks: Sequence[str]) -> tuple[Device, ...]:
    """Every disk, partition and logical volume with what is on it; one probe each, as probing is slow."""
    names = dict.fromkeys([*disks, *g.list_partitions(), *g.lvs()])
    return tuple(_device(name, _probe(g, name)) for name in names)


def _probe(g: Any, name: str) -> dict[str, str]:
    try:
        probed: dict[str, str] = g.blkid(name)
    except RuntimeError:  # nothing on it, not even a partition table
        return {}
    return probed


def _device(name: str, probed: dict[str, str]) -> Device:
    return Device(
        name=name,
        type=printable(probed.get("TYPE", "")),
        uuid=printable(probed.get("UUID", "")),
        label=printable(probed.get("LABEL", "")),
        part_uuid=printable(probed.get("PART_ENTRY_UUID", "")),
        part_type=printable(probed.get("PART_ENTRY_TYPE", "")),
    )


def _refuse_hibernated(devices: Sequence[Device]) -> None:
    for device in devices:
        if device.type in ("swsuspend", "swsusp"):
            raise MigrationError(
                Code.GUEST_DIRTY,
                f"the guest is hibernated: {device.name} holds a memory image, which a changed disk would corrupt",
                "Start the guest on VMware, shut it down properly, and export it again.",
            )


def _refuse_hibernated_windows(g: Any, root: str) -> None:
    path = "/hiberfil.sys"
    if g.is_file(path) and g.pread(path, 4, 0).lower() in (b"hibr", b"wake"):
        raise MigrationError(
            Code.GUEST_DIRTY,
            f"Windows on {_device_of(root)} is hibernated (or was shut down with fast startup)",
            "Start it on VMware, run `powercfg /h off` and `shutdown /s /t 0`, and export it again.",
        )


def _choose_root(g: Any, roots: Sequence[str], devices: Sequence[Device], warnings: list[Finding]) -> str:
    if not roots:
        if encrypted := [device.name for device in devices if device.type in _ENCRYPTED]:
            raise MigrationError(
                Code.GUEST_ENCRYPTED,
                f"no operating system can be seen: {', '.join(encrypted)} is encrypted",
                "Decrypt the guest on VMware and export it again, or set fix.enabled to false in the manifest; "
                "the guest must then hold the virtio drivers already.",
            )
        kinds = ", ".join(f"{device.name} {device.type or 'unknown'}" for device in devices) or "no partitions"
        raise MigrationError(
            Code.OS_UNKNOWN,
            f"no operating system was found on the disks ({kinds})",
            "Check that the export has all disks of the VM; for a VM without a known system set fix.enabled to false "
            "in the manifest, or fix.allow_unsupported in the settings.",
        )
    default = _default_subvolume(g, _device_of(roots[0])) if len(roots) > 1 and _is_subvolume(roots[0]) else ""
    root = pick_root(roots, default)
    others = {_device_of(other) for other in roots} - {_device_of(root)}
    if others:
        warnings.append(
            Finding(
                "several_systems",
                f"the disks hold several operating systems; only the one on {_device_of(root)} is fixed, "
                f"not {', '.join(sorted(others))}",
                "If the guest boots another one, remove the disks that it does not need from the export.",
            )
        )
    return root


def pick_root(roots: Sequence[str], default_subvolume: str) -> str:
    """The one system to work on, without ever asking.

    Snapshots make one btrfs look like many systems: the default subvolume is the one that boots, or else the first
    that is not a snapshot.
    """
    for root in roots:
        if default_subvolume and _is_subvolume(root) and root.endswith(f"/{default_subvolume}"):
            return root
    return next((root for root in roots if "snapshots/" not in root), roots[0])


def _is_subvolume(mountable: str) -> bool:
    return mountable.startswith("btrfsvol:")


def _device_of(mountable: str) -> str:
    """The device of what libguestfs calls a mountable: `/dev/sda2`, or `btrfsvol:/dev/sda2/path`."""
    if not _is_subvolume(mountable):
        return mountable
    return "/".join(mountable.removeprefix("btrfsvol:").split("/")[:3])


def _default_subvolume(g: Any, device: str) -> str:
    g.mount_ro(device, "/")
    try:
        number = g.btrfs_subvolume_get_default("/")
        return next((v["btrfssubvolume_path"] for v in g.btrfs_subvolume_list("/")
                     if v["btrfssubvolume_id"] == number), "")  # fmt: skip
    finally:
        g.umount_all()


def _mount(g: Any, root: str, warnings: list[Finding]) -> dict[str, str]:
    """Mount the system by its own fstab, shortest mount point first."""
    points: dict[str, str] = g.inspect_get_mountpoints(root)
    points["/"] = root  # found by looking; the name in fstab may be one that only the old controller gave
    mounted: dict[str, str] = {}
    for point in sorted(points, key=len):
        try:
            g.mount(points[point], point)
        except RuntimeError as error:
            if point == "/":
                raise MigrationError(
                    Code.GUEST_DIRTY,
                    f"the root file system {root} cannot be mounted: {printable(str(error))}",
                    "Start the guest on VMware, run fsck on the file system, shut down properly, and export again.",
                ) from None
            warnings.append(
                Finding(
                    "not_mounted",
                    f"{printable(point)} ({printable(points[point])}) cannot be mounted: {printable(str(error))}",
                    "Check that the export has all disks of the VM.",
                )
            )
        else:
            mounted[point] = points[point]
    return mounted


def _product_name(g: Any, root: str) -> str:
    """What the system calls itself; libguestfs's answer for Debian is only the version."""
    path = "/etc/os-release"
    release = decode(g.read_file(path)[:65536]) if g.is_file(path, followsymlinks=True) else ""
    found = re.search(r"^PRETTY_NAME=[\"']?([^\"'\n]+)", release, re.MULTILINE)
    return printable(found[1] if found else g.inspect_get_product_name(root))


def _kernels(g: Any, menu: str) -> tuple[Kernel, ...]:
    """The kernels in /boot; without a menu that can be read, every one of them may be chosen."""
    chosen = {path.rpartition("/")[2] for path in map(_resolved(g), kernels(menu))}
    found = []
    for path in sorted(g.glob_expand("/boot/vmlinuz-*")):
        version = path.removeprefix("/boot/vmlinuz-")
        if not _VERSION.fullmatch(version):
            continue
        initrd = f"/boot/initrd.img-{version}"
        found.append(
            Kernel(
                version=version,
                path=path,
                initrd=initrd if g.is_file(initrd, followsymlinks=True) else None,
                chosen_by_bootloader=not chosen or path.rpartition("/")[2] in chosen,
            )
        )
    return tuple(found)


def _resolved(g: Any) -> Any:
    """A function from a name on the menu to the file it leads to (`vmlinuz` is a link in / or in /boot)."""

    def resolve(name: str) -> str:
        for path in (f"/boot/{name}", f"/{name}"):
            if g.is_symlink(path):
                target: str = g.readlink(path)
                return target
        return name

    return resolve


def _initramfs(g: Any) -> str:
    """What builds the initramfs, by the programs that are there: a distribution's name says little."""
    for name, program in (
        ("initramfs-tools", "/usr/sbin/mkinitramfs"),
        ("dracut", "/usr/bin/dracut"),
        ("dracut", "/sbin/dracut"),
        ("mkinitcpio", "/usr/bin/mkinitcpio"),
        ("mkinitrd", "/sbin/mkinitrd"),
    ):
        if g.is_file(program, followsymlinks=True):
            return name
    return "none"


def _bootloader(g: Any) -> str:
    for name, path in (
        ("grub2", GRUB_CFG),
        ("grub2", "/boot/grub2/grub.cfg"),
        ("systemd-boot", "/boot/loader/loader.conf"),
        ("systemd-boot", "/boot/efi/loader/loader.conf"),
        ("extlinux", "/boot/extlinux/extlinux.conf"),
        ("grub-legacy", "/boot/grub/menu.lst"),
        ("grub-legacy", "/boot/grub/grub.conf"),
    ):
        if g.is_file(path, followsymlinks=True):
            return name
    return "none"


def _firmware(
    g: Any, disks: Sequence[str], devices: Sequence[Device], esp: str | None
) -> tuple[Literal["bios", "uefi"], str, int | None]:
    """The firmware that the disks are made for, how that was seen, and the index of the disk it starts from."""
    sectors = [g.pread_device(disk, 512, 0) for disk in disks]
    grub_disk = next((number for number, sector in enumerate(sectors) if b"GRUB" in sector[:440]), None)
    has_bios_boot = any(device.part_type == BIOS_BOOT for device in devices)
    if esp is not None and not (has_bios_boot and grub_disk is not None):
        return "uefi", f"the EFI system partition {esp} holds boot loaders", _disk_index(g, esp)
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
