"""Opens what the guest's file systems lie on (LUKS, LVM, RAID, btrfs), and picks its root."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest import systems
from hyper2kvmd.guest.linux.devices import Device, work_out
from hyper2kvmd.guest.mounts import (
    ENCRYPTED,
    JOURNALED,
    appliance_too_old,
    device_of,
    is_subvolume,
    kernel_log,
    too_new,
)
from hyper2kvmd.guest.session import read_text
from hyper2kvmd.guest.windows import refuse
from hyper2kvmd.text import printable

CRYPTTAB = "/etc/crypttab"
_MAPPED_NAME = re.compile(r"[A-Za-z0-9._+-]{1,100}")
# From the UUID of a LUKS container to its passphrase, or None if there is none.
KeyFor = Callable[[str], str | None]


@dataclass(frozen=True)
class System:
    """What is on the disks. roots: of every Linux, as libguestfs says them; root: the one that is likely to start.

    windows: the partitions that hold one. locked: the encrypted devices that nobody had a key for.
    """

    roots: tuple[str, ...]
    windows: tuple[str, ...]
    root: str
    devices: tuple[Device, ...]
    locked: tuple[str, ...]

    @property
    def is_linux(self) -> bool:
        """Whether the one that starts is a Linux."""
        return self.root in self.roots

    @property
    def is_windows(self) -> bool:
        """Whether it is a Windows."""
        return self.root in self.windows


def find_system(
    g: Any,
    disks: Sequence[str],
    key_for: KeyFor,
    starts_from: Callable[[Sequence[Device]], str],
    warnings: list[Finding],
) -> System:
    """Open all devices, and find the systems on them.

    starts_from: from the devices to the disk that firmware starts from, "" if that is not known.
    Raise MigrationError: os_unknown, guest_encrypted, guest_dirty, appliance_too_old.
    """
    devices = _devices(g, disks)
    _refuse_hibernated(devices)
    boot_disk = starts_from(devices)
    opened = {
        device.name: f"luks-{device.uuid}"
        for device in devices
        if device.type == "crypto_LUKS" and _unlock(g, device, f"luks-{device.uuid}", key_for)
    }
    if opened:
        g.lvm_scan(True)
        devices = _devices(g, disks)
        _refuse_hibernated(devices)
    said: list[Finding] = []
    found = _roots(g, devices)
    root = _choose_root(g, found, devices, boot_disk, said)
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
        found = _roots(g, devices)
        root = _choose_root(g, found, devices, boot_disk, [])
    warnings += said
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
    return System(found.linux, found.windows, root, devices, locked)


def _devices(g: Any, disks: Sequence[str]) -> tuple[Device, ...]:
    """Every disk, partition, array and volume with what is on it; one probe each, as probing is slow."""
    partitions = g.list_partitions()
    arrays = {name: _names_of_array(g, name) for name in g.list_md_devices()}
    # A snapshot has all identifiers of its origin, and nobody mounts it by one of them.
    volumes = g.lvs()
    details = g.lvs_full() if volumes else []
    snapshots = _snapshots(details, volumes)
    volumes = [name for name in volumes if name not in snapshots]
    aliases = arrays | _names_of_volumes(g, volumes, details)
    names = dict.fromkeys([*disks, *partitions, *arrays, *g.list_dm_devices(), *volumes])
    return tuple(_device(name, _probe(g, name), _disk_of(name, disks), aliases.get(name, ())) for name in names)


def _disk_of(name: str, disks: Sequence[str]) -> str:
    return next((disk for disk in disks if re.fullmatch(rf"{re.escape(disk)}\d*", name)), "")


def _mapper_name(volume: str) -> str:
    """What device mapper calls /dev/VG/LV: hyphens are doubled, and one joins the two."""
    group, name = (part.replace("-", "--") for part in volume.removeprefix("/dev/").split("/", 1))
    return f"/dev/mapper/{group}-{name}"


def _names_of_volumes(
    g: Any, volumes: Sequence[str], details: Sequence[Mapping[str, str]]
) -> dict[str, tuple[str, ...]]:
    """What the guest may call each volume besides /dev/VG/LV. Ubuntu's installer writes the last of them into fstab.

    details: what LVM says of volumes, by their names without the group's.
    """
    groups: dict[str, str] = {}
    for group in g.vgs_full() if volumes else ():
        # Of two groups with one name nobody knows which is which.
        groups[group["vg_name"]] = "" if group["vg_name"] in groups else group["vg_uuid"]
    found = {}
    for volume in volumes:
        group, name = volume.removeprefix("/dev/").split("/", 1)
        mapper = _mapper_name(volume)
        names = [mapper, f"/dev/disk/by-id/dm-name-{mapper.removeprefix('/dev/mapper/')}"]
        if groups.get(group):
            uuids = [one["lv_uuid"] for one in details if one["lv_name"] == name]
            identity = uuids[0] if len(uuids) == 1 else g.lvuuid(volume)
            names.append("/dev/disk/by-id/dm-uuid-LVM-" + (groups[group] + identity).replace("-", ""))
        found[volume] = tuple(names)
    return found


def _snapshots(details: Sequence[Mapping[str, str]], volumes: Sequence[str]) -> set[str]:
    """The volumes that are snapshots of others; a name that one of them has and one that is none has, is not told."""
    told: dict[str, set[bool]] = {}
    for volume in details:
        told.setdefault(volume["lv_name"], set()).add(volume["lv_attr"][:1] in ("s", "S"))
    return {volume for volume in volumes if told.get(volume.rpartition("/")[2]) == {True}}


def _names_of_array(g: Any, name: str) -> tuple[str, ...]:
    """What the guest may call an array, by its UUID, and by the name in its superblock: /dev/md0, /dev/md/root."""
    try:
        detail = g.md_detail(name)
    except RuntimeError:
        return ()
    uuid, whole = str(detail.get("uuid", "")), str(detail.get("name", ""))
    names = [f"/dev/disk/by-id/md-uuid-{uuid}"] if re.fullmatch(r"[0-9a-f]{8}(?::[0-9a-f]{8}){3}", uuid) else []
    said = whole.rpartition(":")[2]
    if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", said):
        names += [
            f"/dev/md/{said}",
            f"/dev/disk/by-id/md-name-{whole}",
            *([f"/dev/md{said}"] if said.isdigit() else []),
        ]
    return tuple(names)


def _probe(g: Any, name: str) -> dict[str, str]:
    try:
        probed: dict[str, str] = g.blkid(name)
    except RuntimeError:  # nothing on it, not even a partition table
        return {}
    return probed


def _label(said: str) -> str:
    """A label as it is on the disk. blkid puts a backslash before white space and what means something to a shell.

    It also writes other bytes than ASCII as cat -v does: `B\\303\\274ro` is `BM-CM-\\<ro`.
    """
    plain = re.sub(r"\\(.)", r"\1", said)

    def byte(found: re.Match[str]) -> str:
        value = ord(found["plain"] or found["control"]) ^ (0x40 if found["control"] else 0)
        return chr(value | (0x80 if found["high"] else 0))

    raw = re.sub(r"(?P<high>M-)(?:\^(?P<control>[?-_])|(?P<plain>[ -~]))", byte, plain)
    try:
        return raw.encode("latin-1").decode()
    except UnicodeError:  # it was no such notation, or is in an older encoding
        return plain


def _device(name: str, probed: Mapping[str, str], disk: str, aliases: tuple[str, ...]) -> Device:
    return Device(
        name=name,
        type=printable(probed.get("TYPE", "")),
        uuid=printable(probed.get("UUID", "")),
        label=printable(_label(probed.get("LABEL", ""))),
        part_uuid=printable(probed.get("PART_ENTRY_UUID", "")),
        part_type=printable(probed.get("PART_ENTRY_TYPE", "")),
        part_label=printable(_label(probed.get("PART_ENTRY_NAME", ""))),
        member=printable(probed.get("UUID_SUB", "")),
        aliases=aliases,
        disk=disk,
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
    lines = [words for line in text.split("\n") if len(words := line.split("#", 1)[0].split()) >= 2]
    known = work_out(disks, {device.name: device for device in devices}, (words[1] for words in lines), None).names
    names = dict(opened)
    for name, spec, *_ in lines:
        found = known.find(spec)
        if found and found.name in opened and _MAPPED_NAME.fullmatch(name) and name not in names.values():
            names[found.name] = name
    return names


@dataclass(frozen=True)
class _Roots:
    """What can be started from, as libguestfs says it."""

    linux: tuple[str, ...]
    windows: tuple[str, ...]
    others: tuple[str, ...] = ()


def _roots(g: Any, devices: Sequence[Device]) -> _Roots:
    """What can be started from: every Linux and every Windows, by looking; else what libguestfs finds.

    libguestfs is not asked where it need not be: it gives up if one of several disks is blank.
    """
    found = _Roots(tuple(systems.linux_roots(g, devices)), tuple(systems.windows(g, devices)))
    if found.linux or found.windows:
        return found
    refuse.bitlocker(devices)
    refuse.volumes(devices)
    refuse.unreadable(g, devices)
    others: list[str] = []
    try:
        others = g.inspect_os()
    finally:
        # libguestfs passes over what it cannot mount, and gives up if that is a btrfs.
        for device in devices if not others else ():
            if device.type in JOURNALED and (why := too_new(kernel_log(g, device.name))):
                raise appliance_too_old(device.name, device.type, why)
    return _Roots((), (), tuple(others))


def _choose_root(g: Any, found: _Roots, devices: Sequence[Device], boot_disk: str, warnings: list[Finding]) -> str:
    roots = (*found.linux, *found.windows, *found.others)
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
    on = {device.name: device.disk for device in devices}
    # What the firmware starts is on its disk, as a rule; the boot menu has the last word.
    ordered = sorted(roots, key=lambda root: on.get(device_of(root)) != boot_disk)
    first = [root for root in ordered if device_of(root) == device_of(ordered[0])]
    default = _default_subvolume(g, device_of(first[0])) if any(map(is_subvolume, first)) else ""
    root = pick_root(first, default)
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
        if default_subvolume and is_subvolume(root) and root.endswith(f"/{default_subvolume}"):
            return root
    return next((root for root in roots if "snapshots/" not in root), roots[0])


def _default_subvolume(g: Any, device: str) -> str:
    g.mount_ro(device, "/")
    try:
        number = g.btrfs_subvolume_get_default("/")
        return next((v["btrfssubvolume_path"] for v in g.btrfs_subvolume_list("/")
                     if v["btrfssubvolume_id"] == number), "")  # fmt: skip
    finally:
        g.umount_all()
