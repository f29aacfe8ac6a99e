"""Mounts the guest by its own fstab, and says why if that cannot be done."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.linux import fstab
from hyper2kvmd.guest.linux.devices import BY_CONTENT, Device, Known, Names, changes_with_hardware, fits
from hyper2kvmd.guest.linux.fstab import Entry
from hyper2kvmd.guest.session import can_be_asked_for, read_text
from hyper2kvmd.text import printable

ENCRYPTED = ("crypto_LUKS", "BitLocker")
# What has to be there for the guest to start, and for FIX to build an initramfs.
NEEDED = frozenset(("/", "/boot", "/etc", "/usr", "/usr/lib", "/lib", "/bin", "/sbin", "/var", "/var/lib"))
# Options that name the device on which a file system has its journal, or its data.
_EXTERNAL = ("logdev", "rtdev", "journal_path", "journal_dev")
# File systems whose journal the appliance can replay: one that still cannot be mounted is damaged.
JOURNALED = ("ext2", "ext3", "ext4", "xfs", "btrfs", "vfat")
_EXT_STATE = 1024 + 58  # where the superblock of ext2 and its successors says how the file system is
_EXT_ERRORS = 2
# What mount says, and the kernel to its log, of a file system that they do not know, or of which they do not know all.
_TOO_NEW = re.compile(
    r".*(?:unknown filesystem type|(?:unknown|unsupported) (?:optional|incompat|compat_ro|(?:read-only )?compatible"
    r"|incompatible) ?features?).*"
)
_INCOMPLETE = re.compile(r"BTRFS.* devid \d+ uuid \S+ is missing")
_TWINS = (
    "If one is a copy of the other, leave that disk out of the manifest and attach it to the new VM later; or give "
    "the copy identifiers of its own on VMware (`tune2fs -U random`, `xfs_admin -U generate`, `vgimportclone`, "
    "`sgdisk -G`), and export again."
)


def device_of(mountable: str) -> str:
    """The device of what libguestfs calls a mountable: `/dev/sda2`, or `btrfsvol:/dev/sda2/path`."""
    if not is_subvolume(mountable):
        return mountable
    # a logical volume has four parts, everything else three: /dev/mapper/name, /dev/vg/lv, /dev/sda2
    parts = mountable.removeprefix("btrfsvol:").split("/")
    return "/".join(parts[:3] if re.fullmatch(r"(?:[hsv]d[a-z]{1,3}\d*|md\d+(?:p\d+)?)", parts[2]) else parts[:4])


def is_subvolume(mountable: str) -> bool:
    return mountable.startswith("btrfsvol:")


def mount(
    g: Any,
    root: str,
    devices: Mapping[str, Device],
    names_of: Callable[[], Known],
    locked: Sequence[str],
    warnings: list[Finding],
) -> dict[str, str]:
    """Mount the system by its own fstab, shortest mount point first, and return what is mounted where.

    Its root is found by looking. A file system that is not needed to fix the guest is mounted so that its journal is
    replayed, and left alone if its mount point is not there.
    names_of: from the guest's settings to what it calls its devices; asked once its root is mounted.
    Raise MigrationError: device_uncertain for a needed device that is not there, or is there twice; guest_dirty and
    appliance_too_old for a file system that cannot be mounted.
    """
    mounted: dict[str, str] = {}
    types = {name: device.type for name, device in devices.items()}
    mount_one(g, "/", root, types, mounted, warnings, waits=True)
    names = names_of().names
    own = devices.get(device_of(root))
    if own is not None and (twins := names.twins(own)) and names.name_of(own) is None:
        others = ", ".join(twin.name for twin in twins)
        raise _uncertain(f"the root of the guest, {own.name}, is not unique: {others} has the same UUID {own.uuid}")
    found = [entry for entry in fstab.entries(read_text(g, fstab.PATH) or "") if _is_local(entry)]
    for entry in sorted(found, key=lambda entry: entry.where.count("/")):
        point = entry.where.rstrip("/") or "/"
        if point == "/" or point in mounted or not can_be_asked_for(point + entry.option("subvol")):
            continue
        device = _device_for(entry, names, locked, warnings)
        if device is None or not device.type or device.type in (*ENCRYPTED, "swap", "LVM2_member"):
            continue
        if point not in NEEDED and any(map(entry.option, _EXTERNAL)):
            continue  # sound as it is, and mounted with the other device only, by whatever name
        if not g.is_dir(point, followsymlinks=True):
            if point not in NEEDED:
                continue
            g.mkdir_p(point)
        subvolume = _subvolume(g, entry, device, root)
        mountable = f"btrfsvol:{device.name}/{subvolume}" if subvolume else device.name
        mount_one(g, str(g.realpath(point)), mountable, types, mounted, warnings, waits=entry.waits)
    _refuse_copied_members(g, names, mounted)
    return mounted


def _refuse_copied_members(g: Any, names: Names, mounted: Mapping[str, str]) -> None:
    """Raise MigrationError (device_uncertain) if what the system lies on is there twice: a group, or a part of one."""
    on = {device_of(mountable) for mountable in mounted.values()}
    arrays = {one for one in on if one.startswith("/dev/md")}
    volumes = {one for one in on - arrays if one in names.devices and names.devices[one].aliases}
    used = {"LVM2_member": volumes, "linux_raid_member": arrays}
    for device in names.devices.values():
        if used.get(device.type) and (twins := names.twins(device)):
            raise _uncertain(
                f"{device.name} and {twins[0].name} hold the same {device.type} {device.uuid}, and the guest's system "
                "lies on it"
            )
    groups = g.vgs() if volumes else []
    for group in {group for group in groups if groups.count(group) > 1}:
        if inside := sorted(one for one in volumes if one.startswith(f"/dev/{group}/")):
            raise _uncertain(
                f"two volume groups are called {printable(group)}, and the guest's {inside[0]} is in one of them"
            )


def _is_local(entry: Entry) -> bool:
    """Whether a line mounts a file system of a device."""
    return (
        entry.where.startswith("/")
        and entry.type not in fstab.VIRTUAL
        and not {"bind", "rbind"} & set(entry.options)
        and (entry.spec.startswith(("/dev/", *BY_CONTENT)))
    )


def _device_for(entry: Entry, names: Names, locked: Sequence[str], warnings: list[Finding]) -> Device | None:
    """The device of a line of fstab, None if it is not there and not needed."""
    line = f"{fstab.PATH} line {entry.number} mounts {printable(entry.spec)} on {printable(entry.where)}"
    devices = names.all(entry.spec)
    if len(devices) > 1:
        said = f"{line}, and {' and '.join(device.name for device in devices)} are both that"
        if entry.waits or entry.where in NEEDED:
            raise _uncertain(f"{said}: nobody can know which of them the guest means")
        warnings.append(Finding("twin_devices", said, _TWINS))
        return None
    device = devices[0] if devices else None
    if device and changes_with_hardware(entry.spec) and not fits(device, entry.type):
        device = None
    is_missing = names.lacks(entry.spec) or not changes_with_hardware(entry.spec)
    if device is None and entry.where in NEEDED and "noauto" not in entry.options and not locked:
        raise MigrationError(
            Code.DEVICE_UNCERTAIN,
            f"{line}, which the guest needs to start, and "
            + ("no disk of this export is that device" if is_missing else "nobody can know which of the disks that is"),
            f"Write the UUID of the file system into {fstab.PATH} in the guest (`blkid` shows it), and export it again;"
            " or add the disk that is missing to the export.",
        )  # fmt: skip
    return device


def _uncertain(message: str) -> MigrationError:
    return MigrationError(Code.DEVICE_UNCERTAIN, message, _TWINS)


def _subvolume(g: Any, entry: Entry, device: Device, root: str) -> str:
    """The subvolume of btrfs that a line mounts, "" for the default one."""
    if device.type != "btrfs":
        return ""
    if path := entry.option("subvol").strip("/"):
        return path
    number = entry.option("subvolid")
    if not number or device_of(root) != device.name:
        return ""
    volumes = g.btrfs_subvolume_list("/")
    return next((str(v["btrfssubvolume_path"]) for v in volumes if str(v["btrfssubvolume_id"]) == number), "")


def mount_one(
    g: Any,
    point: str,
    mountable: str,
    types: Mapping[str, str],
    mounted: dict[str, str],
    warnings: list[Finding],
    *,
    waits: bool,
) -> None:
    """Mount one file system, and note it in `mounted`.

    types: of the devices, by their names. waits: whether the guest does not start without it, as far as its fstab is
    concerned; what is damaged is then an error, and else a warning.
    Raise MigrationError: guest_dirty, appliance_too_old.
    """
    device = device_of(mountable)
    type = types.get(device, "")
    try:
        if _is_marked(g, device, type):
            raise RuntimeError("it is marked as having errors")
        # Else ntfs-3g writes 4 KiB at a time: ten times as long for a registry, all of which is written at once. On a
        # volume of less than some 8 GiB, which no Windows has, it does so in any case.
        g.mount_options("big_writes" if type == "ntfs" else "", mountable, point)
    except RuntimeError as error:
        said = printable(str(error), 400)
        is_damaged = type in JOURNALED and (point in NEEDED or not _can_be_mounted(g, device, type, mounted))
        if point not in NEEDED and not (is_damaged and waits):
            warnings.append(
                Finding(
                    "not_mounted",
                    f"{printable(point)} ({printable(mountable)}) cannot be mounted: {said}",
                    "Run fsck on it in the guest."
                    if is_damaged
                    else f"Look at its line in {fstab.PATH} in the guest; the file system itself is sound."
                    if type in JOURNALED
                    else "Check that the export has all disks of the VM.",
                )
            )
            return
        log = kernel_log(g, mountable)
        if why := too_new(log):
            raise appliance_too_old(mountable, type, why) from None
        hint = "Start the guest on VMware, run fsck on that file system, shut down properly, and export again."
        if _INCOMPLETE.search(log):
            said, hint = "a device of it is missing", "Export the VM with all disks that this file system is on."
        raise MigrationError(
            Code.GUEST_DIRTY,
            f"the file system of {printable(point)} on {printable(mountable)} cannot be used: {said}",
            hint,
        ) from None
    else:
        mounted[point] = mountable


def _is_marked(g: Any, device: str, type: str) -> bool:
    """Whether a kernel that found errors left its mark; changes on top of them could make it worse."""
    return type.startswith("ext") and bool(g.pread_device(device, 1, _EXT_STATE)[0] & _EXT_ERRORS)


def _can_be_mounted(g: Any, device: str, type: str, mounted: Mapping[str, str]) -> bool:
    """Whether a file system is sound by itself, so that the reason lies in the mount point or the options."""
    g.umount_all()
    try:
        if _is_marked(g, device, type):
            return False
        g.mount(device, "/")
    except RuntimeError:
        return False
    finally:
        g.umount_all()
        for point in sorted(mounted, key=len):
            g.mount(mounted[point], point)
    return True


def kernel_log(g: Any, mountable: str) -> str:
    """What the appliance's kernel and mount say when a file system is mounted; "" if it can be.

    All that is mounted is unmounted: where somebody asks, nothing can be done with the guest.
    """
    g.umount_all()
    last = g.dmesg().rstrip("\n").rpartition("\n")[2]
    try:
        g.mount(mountable, "/")
    except RuntimeError as error:
        return f"{g.dmesg().rpartition(last)[2]}\n{error}"
    finally:
        g.umount_all()
    return ""


def too_new(log: str) -> str:
    """What of a file system is newer than the appliance, in the words of `kernel_log`; "" if nothing is."""
    said = _TOO_NEW.search(log)
    return printable(said[0].strip(), 400) if said else ""


def appliance_too_old(mountable: str, type: str, why: str) -> MigrationError:
    return MigrationError(
        Code.APPLIANCE_TOO_OLD,
        f"the file system {type} on {printable(mountable)} is newer than the libguestfs appliance of this host: {why}",
        "The appliance is made from this host's newest kernel in /boot: install a newer one (on Debian from backports;"
        " a reboot is not needed), or migrate on a newer release; then `hyper2kvmctl retry`. If the guest holds the"
        " virtio drivers already, set fix.enabled to false in the manifest.",
    )
