"""Proves that a changed Windows starts on its new machine: every link from the firmware to the driver of its disks."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Proof
from hyper2kvmd.guest.session import spelt
from hyper2kvmd.guest.windows import chain
from hyper2kvmd.guest.windows.bcd import Place, default_entry
from hyper2kvmd.guest.windows.look import SYSTEM, Windows
from hyper2kvmd.guest.windows.plan import CARD_DRIVER, PACKAGES, Choice
from hyper2kvmd.guest.windows.registry import Hive, open_hive

# What has to run before any disk is there.
BUS_DRIVERS = ("pci", "disk", "partmgr", "volmgr", "mountmgr")
# Device classes whose filters are loaded with the disk that Windows starts from.
CLASSES = {
    "SCSIAdapter": "{4D36E97B-E325-11CE-BFC1-08002BE10318}",
    "HDC": "{4D36E96A-E325-11CE-BFC1-08002BE10318}",
    "DiskDrive": "{4D36E967-E325-11CE-BFC1-08002BE10318}",
    "Volume": "{71A27CDD-812A-11D0-BEC7-08002BE2092F}",
}


# What UEFI firmware starts: by the name that Windows gave it, and, where it has forgotten that, by one of its own.
MANAGER = "/EFI/Microsoft/Boot/bootmgfw.efi"
FALLBACK = {"x86_64": "bootx64.efi", "i386": "bootia32.efi", "aarch64": "bootaa64.efi"}


def prove(
    g: Any, windows: Windows, firmware: Literal["bios", "uefi"], root: str, choice: Choice, given: Mapping[str, str]
) -> tuple[list[Proof], list[Finding]]:
    """What holds of the changed guest, and what may yet keep it from starting. It is mounted, and unmounted after.

    root: the partition that Windows is on. given: the SHA-256 in hex of each file that was put into the guest, by its
    path in lower case. Raise MigrationError (guest_dirty).
    """
    with open_hive(g, windows.hives[SYSTEM], SYSTEM) as system:
        proofs, warnings = _prove_system(g, system, windows, choice, given)
    g.umount_all()
    return [*proofs, *_prove_boot(g, windows, firmware, root)], warnings


def prove_bus(g: Any, system: Hive, windows: Windows, choice: Choice) -> list[Proof]:
    """What of a Windows that starts already has to hold on another bus."""
    return [
        proof
        for control_set in windows.control_sets
        for proof in (_disk(g, system, windows, choice, control_set, {}), _installs(system, control_set))
    ]


def _prove_system(
    g: Any, system: Hive, windows: Windows, choice: Choice, given: Mapping[str, str]
) -> tuple[list[Proof], list[Finding]]:
    """What the hive SYSTEM has to say, with the files of the mounted Windows."""
    proofs: list[Proof] = []
    warnings: list[Finding] = []
    for control_set in windows.control_sets:
        proofs.append(_disk(g, system, windows, choice, control_set, given))
        proofs.append(_installs(system, control_set))
        proofs += _bus(g, system, windows, control_set)
        for proof, warning in _filters(g, system, windows, control_set):
            proofs.append(proof)
            warnings += warning
        proofs.append(_card(g, system, windows, choice, control_set))
    proofs.append(_letter(system, windows.place))
    return proofs, warnings


def _disk(g: Any, system: Hive, windows: Windows, choice: Choice, control_set: str, given: Mapping[str, str]) -> Proof:
    claim = f"Windows starts a driver for its {choice.disk.title} while it boots"
    subject = f"{system.name}\\{control_set}"
    link = chain.service_of(system, control_set, choice.disk)
    if link.service is None:
        return Proof(subject, claim, False, link.said)
    why = chain.unfit(g, system, control_set, link.service, windows)
    if why:
        return Proof(subject, claim, False, f"{why}; the way there: {link.said}")
    path = spelt(g, chain.driver_path(system, control_set, link.service, windows.system_root)) or ""
    wanted = given.get(path.lower())
    found = g.checksum("sha256", path) if wanted or choice.disks == "given" else ""
    if choice.disks == "given" and found != wanted:
        said = f"{path} is not the file of virtio-win that was put there"
        return Proof(subject, claim, False, f"{said}; the way there: {link.said}")
    start = "Type 1, Start 0, no StartOverride"
    return Proof(subject, claim, True, f"{link.said}; {start}; {path}" + (f" (SHA-256 {found})" if found else ""))


def _installs(system: Hive, control_set: str) -> Proof:
    """That nothing keeps Windows from taking a device that it has not seen before."""
    key = f"{control_set}\\Control\\PnP"
    claim = "Windows takes devices that it has not seen before"
    for name in ("DisableCDDB", "DontStartRawDevices"):
        value = system.value(key, name)
        if value is not None and value.number:
            return Proof(f"{system.name}\\{control_set}", claim, False, f"{key} {name} is {value.shown()}")
    return Proof(f"{system.name}\\{control_set}", claim, True, f"{key} has neither DisableCDDB nor DontStartRawDevices")


def _bus(g: Any, system: Hive, windows: Windows, control_set: str) -> Iterator[Proof]:
    for name in BUS_DRIVERS:
        why = chain.unfit(g, system, control_set, name, windows)
        claim = f"{name} starts while Windows boots"
        yield Proof(f"{system.name}\\{control_set}\\Services\\{name}", claim, not why, why or "Start 0, and its file")


def _filters(g: Any, system: Hive, windows: Windows, control_set: str) -> Iterator[tuple[Proof, list[Finding]]]:
    """Each filter of the disk's classes: one that is missing, or does not start, keeps the disk from starting."""
    for title, guid in CLASSES.items():
        key = f"{control_set}\\Control\\Class\\{guid}"
        for kind in ("UpperFilters", "LowerFilters"):
            value = system.value(key, kind)
            for name in value.texts if value else ():
                why = chain.unfit(g, system, control_set, name, windows, boots=False)
                claim = f"{name}, one of {kind} of {title}, can be loaded"
                said = why or "its service and its file are there"
                late = "" if why else chain.late(system, control_set, name)
                warning = Finding(
                    "windows_filter",
                    f"{name} is one of {kind} of {title}, and may keep Windows from starting: {late}",
                    "If Windows stops with 0x7B, remove the product that it belongs to on VMware, and export again.",
                )
                yield Proof(f"{system.name}\\{key}", claim, not why, said), [warning] if late else []


def _card(g: Any, system: Hive, windows: Windows, choice: Choice, control_set: str) -> Proof:
    """That there is a driver for the network cards: installed, or where Windows looks for one."""
    claim = f"Windows has a driver for its {choice.card.title}"
    subject = f"{system.name}\\{control_set}"
    package = choice.package(CARD_DRIVER) if choice.machine.virtio else None
    if package is not None:
        where = f"{windows.system_root}/{PACKAGES}/{package.driver}"
        missing = next((name for name in package.files if spelt(g, f"{where}/{name}") is None), None)
        said = f"{where}/{missing} is not there" if missing else f"{where}, which is in DevicePath"
        return Proof(subject, claim, missing is None, said)
    link = chain.installed(g, system, control_set, choice.card, windows)
    return Proof(subject, claim, link.service is not None, link.said)


def _letter(system: Hive, place: Place | None) -> Proof:
    """That C: is the partition of Windows: programs and settings name it by that letter."""
    claim = "C: is the partition that Windows is on"
    value = system.value("MountedDevices", "\\DosDevices\\C:")
    subject = f"{system.name}\\MountedDevices"
    if value is None:
        return Proof(subject, claim, True, "no letter is noted for C:, so Windows gives it to the partition it is on")
    said: Place | None = None
    if value.data.startswith(b"DMIO:ID:") and len(value.data) >= 24:
        guid = str(uuid.UUID(bytes_le=value.data[8:24]))
        said = place if place is not None and guid == place.partition else Place("unknown", guid)
    elif len(value.data) == 12:
        signature, offset = struct.unpack("<IQ", value.data)
        said = Place(f"{signature:08x}", offset)
    return Proof(subject, claim, said == place, f"C: is {said or value.shown()}; Windows is on {place}")


def _prove_boot(g: Any, windows: Windows, firmware: Literal["bios", "uefi"], root: str) -> list[Proof]:
    """What the firmware starts, and whether that leads to this Windows. Nothing is mounted before, nor after."""
    boot = windows.boot
    if boot is None:
        said = "no partition that the firmware starts has a boot configuration of Windows"
        return [Proof("BCD", f"the firmware starts the Windows on {root}", False, said)]
    proofs = []
    g.mount_ro(boot.device, "/")
    try:
        for path in (MANAGER, f"/EFI/Boot/{FALLBACK[windows.arch]}") if firmware == "uefi" else ("/bootmgr",):
            found = spelt(g, path)
            claim = f"the firmware finds {path} on {boot.device}"
            proofs.append(Proof(path, claim, found is not None, found or "it is not there"))
        entry = default_entry(g, boot.path)
    finally:
        g.umount_all()
    if firmware == "bios":
        proofs.append(_active(g, boot.device))
    claim = f"the boot manager starts the Windows on {root}"
    if entry is None:
        return [*proofs, Proof(boot.path, claim, False, "it names no entry that starts by default")]
    for what, device in (("the loader", entry.device), ("Windows", entry.os_device)):
        there = device is not None and (
            device.place == windows.place
            if device.kind == "partition"
            else device.kind == "boot" and boot.device == root
        )
        said = f"'{entry.description or entry.id}' has {what} on {device or 'no device'}; it is on {windows.place}"
        proofs.append(Proof(boot.path, f"{claim}: {what}", there, said))
    g.mount_ro(root, "/")
    try:
        loader, directory = (
            spelt(g, path.replace("\\", "/")) if path else None for path in (entry.path, entry.system_root)
        )
    finally:
        g.umount_all()
    fits = loader is not None and loader.lower().endswith(".efi" if firmware == "uefi" else ".exe")
    said = f"{entry.path or 'no path'}: {loader or 'not there'}"
    proofs.append(Proof(boot.path, f"{claim}: its loader is there", fits, said))
    said = f"{entry.system_root or 'no directory'}: {directory or 'not there'}"
    proofs.append(Proof(boot.path, f"{claim}: from {windows.system_root}", directory == windows.system_root, said))
    return proofs


def _active(g: Any, device: str) -> Proof:
    """That the boot sector goes on with the partition that has the boot manager."""
    disk = g.part_to_dev(device)
    sector: bytes = g.pread_device(disk, 512, 0)
    entries = [struct.unpack_from("<B3xB3xI", sector, 446 + 16 * number) for number in range(4)]
    active = [start for flag, kind, start in entries if flag == 0x80 and kind]
    begins = int(g.blkid(device).get("PART_ENTRY_OFFSET", "-1"))
    said = f"active: sector {', '.join(map(str, active)) or 'none'}; {device} begins at {begins}"
    return Proof(disk, f"{device} is the active partition", active == [begins], said)
