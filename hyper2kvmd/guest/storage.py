"""Opens what the guest's file systems lie on (LUKS, LVM, RAID, btrfs), picks its root, and mounts it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.linux.devices import Device, Names
from hyper2kvmd.guest.session import read_text
from hyper2kvmd.text import printable

FSTAB = "/etc/fstab"
CRYPTTAB = "/etc/crypttab"
ENCRYPTED = ("crypto_LUKS", "BitLocker")
# File systems whose journal the appliance can replay: one that still cannot be mounted is damaged.
_JOURNALED = ("ext2", "ext3", "ext4", "xfs", "btrfs", "vfat")
# What names a device by what is on it, and which property of a Device that is.
BY_CONTENT = {
    "UUID=": "uuid",
    "/dev/disk/by-uuid/": "uuid",
    "LABEL=": "label",
    "/dev/disk/by-label/": "label",
    "PARTUUID=": "part_uuid",
    "/dev/disk/by-partuuid/": "part_uuid",
}
_EXT_STATE = 1024 + 58  # where the superblock of ext2 and its successors says how the file system is
_EXT_ERRORS = 2
# What mount says, and the kernel to its log, of a file system that they do not know, or of which they do not know all.
_TOO_NEW = re.compile(
    r".*(?:unknown filesystem type|(?:unknown|unsupported) (?:optional|incompat|compat_ro|(?:read-only )?compatible"
    r"|incompatible) ?features?).*"
)
_MAPPED_NAME = re.compile(r"[A-Za-z0-9._+-]{1,100}")

# From the UUID of a LUKS container to its passphrase, or None if there is none.
KeyFor = Callable[[str], str | None]


def find_system(
    g: Any, disks: Sequence[str], key_for: KeyFor, warnings: list[Finding]
) -> tuple[str, tuple[Device, ...], tuple[str, ...]]:
    """The root of the one system on the disks, as libguestfs says it, all devices, and those that stay locked.

    Raise MigrationError: os_unknown, guest_encrypted, guest_dirty, appliance_too_old.
    """
    devices = _devices(g, disks)
    _refuse_hibernated(devices)
    opened = {
        device.name: f"luks-{device.uuid}"
        for device in devices
        if device.type == "crypto_LUKS" and _unlock(g, device, f"luks-{device.uuid}", key_for)
    }
    if opened:
        g.lvm_scan(True)
        devices = _devices(g, disks)
        _refuse_hibernated(devices)
    root = _choose_root(g, _roots(g, devices), devices, warnings)
    if opened and (names := _names_in_crypttab(g, root, disks, devices, opened)) != opened:
        # fstab and the builder of the initramfs know an encrypted device by the name that crypttab gives it.
        g.vg_activate_all(False)
        for device in devices:
            if device.name in opened:
                g.cryptsetup_close(f"/dev/mapper/{opened[device.name]}")
        for device in devices:
            if device.name in names:
                _unlock(g, device, names[device.name], key_for)
        g.lvm_scan(True)
        devices = _devices(g, disks)
        root = _choose_root(g, _roots(g, devices), devices, [])
    locked = tuple(device.name for device in devices if device.type in ENCRYPTED and device.name not in opened)
    if locked:
        warnings.append(
            Finding(
                "encrypted_data",
                f"{', '.join(locked)} is encrypted and was left alone",
                "See that the guest can still unlock it: a TPM or a key server may not know the new machine. With a "
                "key in fix.luks_keys it is looked into as well.",
            )
        )
    return root, devices, locked


def device_of(mountable: str) -> str:
    """The device of what libguestfs calls a mountable: `/dev/sda2`, or `btrfsvol:/dev/sda2/path`."""
    if not _is_subvolume(mountable):
        return mountable
    # a logical volume has four parts, everything else three: /dev/mapper/name, /dev/vg/lv, /dev/sda2
    parts = mountable.removeprefix("btrfsvol:").split("/")
    return "/".join(parts[:3] if re.fullmatch(r"(?:[hsv]d[a-z]{1,3}\d*|md\d+(?:p\d+)?)", parts[2]) else parts[:4])


def _devices(g: Any, disks: Sequence[str]) -> tuple[Device, ...]:
    """Every disk, partition, array and volume with what is on it; one probe each, as probing is slow."""
    names = dict.fromkeys([*disks, *g.list_partitions(), *g.list_md_devices(), *g.list_dm_devices(), *g.lvs()])
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


def _unlock(g: Any, device: Device, name: str, key_for: KeyFor) -> bool:
    """Open an encrypted device as /dev/mapper/`name`, if there is a key for it."""
    key = key_for(device.uuid)
    if key is None:
        return False
    try:
        g.cryptsetup_open(device.name, key, name)
    except RuntimeError as error:
        said = printable(str(error), 400)
        if "memory" in said.lower():
            hint = "Its key derivation needs more memory than the appliance has: raise guest.memory_mb (3072)."
        else:
            hint = f"Put the passphrase of LUKS {device.uuid} into the file that fix.luks_keys names for it."
        raise MigrationError(
            Code.GUEST_ENCRYPTED,
            f"{device.name} (LUKS {device.uuid}) cannot be unlocked with the key of fix.luks_keys: {said}",
            hint,
            field="fix.luks_keys",
        ) from None
    return True


def _names_in_crypttab(
    g: Any, root: str, disks: Sequence[str], devices: Sequence[Device], opened: Mapping[str, str]
) -> dict[str, str]:
    """What the guest itself calls the encrypted devices that were opened; ours where it does not say."""
    g.mount_ro(root, "/")
    try:
        text = read_text(g, CRYPTTAB) or ""
    finally:
        g.umount_all()
    names = dict(opened)
    for line in text.split("\n"):
        words = line.split("#", 1)[0].split()
        if len(words) >= 2 and _MAPPED_NAME.fullmatch(words[0]):
            found = resolve(words[1], disks, devices)
            if found in opened and words[0] not in names.values():
                names[found] = words[0]
    return names


def resolve(spec: str, disks: Sequence[str], devices: Sequence[Device]) -> str:
    """The device that fstab or crypttab means by `spec`, "" if nobody knows."""
    for start, key in BY_CONTENT.items():
        if spec.startswith(start):
            value = spec.removeprefix(start).strip("\"'").lower()
            return next((device.name for device in devices if value and getattr(device, key).lower() == value), "")
    known = {device.name: device for device in devices}
    if spec.startswith("/dev/mapper/") and spec in known:
        return spec
    found = Names(disks, known).find(spec)
    return found.name if found else ""


def _roots(g: Any, devices: Sequence[Device]) -> list[str]:
    """The roots that libguestfs finds. It passes over what it cannot mount, and gives up if that is a btrfs."""
    roots: list[str] = []
    try:
        roots = g.inspect_os()
    finally:
        for device in devices if not roots else ():
            if device.type in _JOURNALED and (why := _too_new(g, device.name)):
                raise _appliance_too_old(device.name, device.type, why)
    return roots


def _choose_root(g: Any, roots: Sequence[str], devices: Sequence[Device], warnings: list[Finding]) -> str:
    if not roots:
        if encrypted := [f"{device.name} (UUID {device.uuid})" for device in devices if device.type in ENCRYPTED]:
            raise MigrationError(
                Code.GUEST_ENCRYPTED,
                f"no operating system can be seen: {', '.join(encrypted)} is encrypted",
                "Name a file with the passphrase in the setting fix.luks_keys, under the VM's name or the UUID; or set "
                "fix.enabled to false in the manifest if the guest holds the virtio drivers already.",
                field="fix.luks_keys",
            )
        kinds = ", ".join(f"{device.name} {device.type or 'unknown'}" for device in devices) or "no partitions"
        raise MigrationError(
            Code.OS_UNKNOWN,
            f"no operating system was found on the disks ({kinds})",
            "Check that the export has all disks of the VM; for a VM without a known system set fix.enabled to false "
            "in the manifest, or fix.allow_unsupported in the settings.",
        )
    default = _default_subvolume(g, device_of(roots[0])) if len(roots) > 1 and _is_subvolume(roots[0]) else ""
    root = pick_root(roots, default)
    others = {device_of(other) for other in roots} - {device_of(root)}
    if others:
        warnings.append(
            Finding(
                "several_systems",
                f"the disks hold several operating systems; only the one on {device_of(root)} is fixed, "
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


def _default_subvolume(g: Any, device: str) -> str:
    g.mount_ro(device, "/")
    try:
        number = g.btrfs_subvolume_get_default("/")
        return next((v["btrfssubvolume_path"] for v in g.btrfs_subvolume_list("/")
                     if v["btrfssubvolume_id"] == number), "")  # fmt: skip
    finally:
        g.umount_all()


def mount(
    g: Any, root: str, disks: Sequence[str], devices: Sequence[Device], warnings: list[Finding]
) -> dict[str, str]:
    """Mount the system by its own fstab, shortest mount point first, and return what is mounted where.

    Raise MigrationError (guest_dirty, appliance_too_old) for a file system that is there and cannot be mounted.
    """
    types = {device.name: device.type for device in devices}
    points: dict[str, str] = g.inspect_get_mountpoints(root)
    points["/"] = root  # found by looking; the name in fstab may be one that only the old controller gave
    mounted: dict[str, str] = {}
    _mount_one(g, "/", root, types, mounted, warnings)
    text = read_text(g, FSTAB) or ""
    # libguestfs leaves out what it cannot resolve, such as a name that it does not know from crypttab.
    for spec, point in re.findall(r"^[ \t]*([^\s#]\S*)[ \t]+(/\S+)[ \t]", text, re.MULTILINE):
        if point not in points and (found := resolve(spec, disks, devices)) and types[found] in _JOURNALED:
            points[point] = found
        # And it was seen to take the name of a disk that is not in the export for another one.
        if point in points and point != "/" and Names(disks, {}).lacks(spec):
            del points[point]
    for point in sorted(points, key=len):
        if point not in mounted:
            _mount_one(g, point, points[point], types, mounted, warnings)
    return mounted


def _mount_one(
    g: Any, point: str, mountable: str, types: Mapping[str, str], mounted: dict[str, str], warnings: list[Finding]
) -> None:
    device = device_of(mountable)
    type = types.get(device, "")
    try:
        # A kernel that found errors leaves this mark; changes on top of them could make it worse.
        if type.startswith("ext") and g.pread_device(device, 1, _EXT_STATE)[0] & _EXT_ERRORS:
            raise RuntimeError("it is marked as having errors")
        g.mount(mountable, point)
    except RuntimeError as error:
        said = printable(str(error), 400)
        if point == "/" or type in _JOURNALED:
            if why := _too_new(g, mountable):
                raise _appliance_too_old(mountable, type, why) from None
            raise MigrationError(
                Code.GUEST_DIRTY,
                f"the file system of {printable(point)} on {printable(mountable)} cannot be used: {said}",
                "Start the guest on VMware, run fsck on that file system, shut down properly, and export again.",
            ) from None
        warnings.append(
            Finding(
                "not_mounted",
                f"{printable(point)} ({printable(mountable)}) cannot be mounted: {said}",
                "Check that the export has all disks of the VM.",
            )
        )
    else:
        mounted[point] = mountable


def _too_new(g: Any, mountable: str) -> str:
    """What of a file system is newer than the appliance, in the words of its kernel or of mount; "" if nothing is.

    All that is mounted is unmounted: where somebody asks, nothing can be done with the guest.
    """
    g.umount_all()
    last = g.dmesg().rstrip("\n").rpartition("\n")[2]
    try:
        g.mount(mountable, "/")
    except RuntimeError as error:
        said = _TOO_NEW.search(g.dmesg().rpartition(last)[2]) or _TOO_NEW.search(str(error))
        return printable(said[0].strip(), 400) if said else ""
    finally:
        g.umount_all()
    return ""


def _appliance_too_old(mountable: str, type: str, why: str) -> MigrationError:
    return MigrationError(
        Code.APPLIANCE_TOO_OLD,
        f"the file system {type} on {printable(mountable)} is newer than the libguestfs appliance of this host: {why}",
        "The appliance is made from this host's newest kernel in /boot: install a newer one (on Debian from backports;"
        " a reboot is not needed), or migrate on a newer release; then `hyper2kvmctl retry`. If the guest holds the"
        " virtio drivers already, set fix.enabled to false in the manifest.",
    )
