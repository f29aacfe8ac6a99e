"""Says of a Windows guest, before anything is changed, why it cannot be migrated as it stands, and what to do in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.linux.devices import Device
from hyper2kvmd.guest.session import spelt
from hyper2kvmd.guest.windows.registry import Hive

_DYNAMIC = ("0x42", "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "af9b60a0-1431-4f62-bc68-3311714a69ad")
_STORAGE_SPACES = "e75caf8f-f680-4cee-afa3-b001e56efc2d"
# What ntfs-3g.probe says by its exit status.
_SOUND, _NOT_NTFS, _HIBERNATED, _NOT_UNMOUNTED = 0, 12, 14, 15
_SERVICING = "Microsoft\\Windows\\CurrentVersion\\Component Based Servicing"
_UPDATE = "Microsoft\\Windows\\CurrentVersion\\WindowsUpdate\\Auto Update"


def bitlocker(devices: Sequence[Device]) -> None:
    """For disks on which no system can be seen: raise MigrationError (guest_encrypted) if BitLocker is why."""
    if locked := [device.name for device in devices if device.type == "BitLocker"]:
        raise MigrationError(
            Code.GUEST_ENCRYPTED,
            f"no operating system can be seen: {', '.join(locked)} is encrypted with BitLocker, and its key may be in a"
            " virtual TPM that cannot be moved",
            "Start Windows on VMware, run `manage-bde -off C:`, wait until `manage-bde -status` says Fully Decrypted"
            " (suspending the protection is not enough), shut it down, and export it again. BitLocker can be turned on"
            " again afterwards.",
        )


def volumes(devices: Sequence[Device]) -> None:
    """Raise MigrationError (os_unsupported) for dynamic disks and Storage Spaces."""
    if dynamic := [device.name for device in devices if device.part_type in _DYNAMIC]:
        raise MigrationError(
            Code.OS_UNSUPPORTED,
            f"{', '.join(dynamic)} is part of a dynamic disk, of which it cannot be proved that Windows finds it again",
            "Make basic disks of them on VMware: a backup of the whole machine that is restored to new disks does it,"
            " or a tool that converts them in place; `diskpart`, `list disk` marks dynamic ones with a star under Dyn."
            " Then export it again.",
        )
    if pooled := [device.name for device in devices if device.part_type == _STORAGE_SPACES]:
        raise MigrationError(
            Code.OS_UNSUPPORTED,
            f"{', '.join(pooled)} belongs to a pool of Storage Spaces, of which it cannot be proved that Windows finds"
            " it again",
            "Move its data to an ordinary disk on VMware, remove the pool (`Remove-StoragePool`), and export it again;"
            " or leave the disks of the pool out of the manifest, and attach them to the new VM later.",
        )


def unreadable(g: Any, devices: Sequence[Device]) -> None:
    """For disks on which no system can be seen: raise MigrationError (tool_missing) if the appliance has no NTFS."""
    found = [device.name for device in devices if device.type == "ntfs"]
    if found and not g.feature_available(["ntfs3g"]):
        raise MigrationError(
            Code.TOOL_MISSING,
            f"{', '.join(found)} is NTFS, which the libguestfs appliance of this host cannot read",
            "Install ntfs-3g (on RHEL and its kin libguestfs-winsupport, or ntfs-3g of EPEL), then `hyper2kvmctl"
            " retry`.",
        )


def unclean(g: Any, device: str) -> None:
    """Raise MigrationError (guest_dirty) if the NTFS of Windows is hibernated, in use or damaged.

    Called before it is mounted: ntfs-3g would mount it for reading alone, without a word.
    """
    status = g.ntfs_3g_probe(True, device)
    if status in (_SOUND, _NOT_NTFS):
        return
    if status == _HIBERNATED:
        raise MigrationError(
            Code.GUEST_DIRTY,
            f"Windows on {device} is hibernated, or was shut down with fast start-up, which is the same to a disk",
            "Start it on VMware, run `powercfg /h off` and then `shutdown /s /t 0` in it, and export it again.",
        )
    why = "was not unmounted" if status == _NOT_UNMOUNTED else f"is damaged (ntfs-3g.probe says {status})"
    raise MigrationError(
        Code.GUEST_DIRTY,
        f"the NTFS of Windows on {device} {why}: it was exported while it ran, or its power was cut",
        "Start it on VMware, run `chkdsk C: /f` in it and restart it, then `shutdown /s /t 0`, and export it again.",
    )


def pending_update(g: Any, software: Hive, system_root: str) -> None:
    """Raise MigrationError (guest_dirty) if an update has begun that goes on when Windows starts."""
    # Its directory has more names than any other, and they are not listed to see how this one is spelt.
    directory = spelt(g, f"{system_root}/WinSxS")
    pending = f"{directory}/pending.xml" if directory and g.exists(f"{directory}/pending.xml") else None
    keys = (f"{_SERVICING}\\RebootPending", f"{_UPDATE}\\RebootRequired")
    found = pending or next((f"{software.name}\\{key}" for key in keys if software.exists(key)), None)
    if found:
        raise MigrationError(
            Code.GUEST_DIRTY,
            f"an update of Windows is not finished ({found} is there): it would go on with other drivers than it began",
            "Start Windows on VMware, restart it until Windows Update wants no restart any more, shut it down, and"
            " export it again. What never ends is undone by"
            " `dism /image:C:\\ /cleanup-image /revertpendingactions` in the recovery environment.",
        )
