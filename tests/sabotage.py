"""Ways to break a Windows guest that was just fixed: a proof must find each. docs/windows-proofs.md lists them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hivex

from hyper2kvmd.guest.change import Proof
from hyper2kvmd.guest.windows.bcd import BOOTMGR
from hyper2kvmd.guest.windows.registry import Value, binary, dword, expand_sz, multi_sz, sz
from tests.pages import wrapped
from tests.windows import DEFAULT, HDC, SCSI, SYSTEM, Directory, program

Break = Callable[[Directory], None]
SET, OTHER_SET = "ControlSet001", "ControlSet002"
DISK_DRIVE, VOLUME = "{4D36E967-E325-11CE-BFC1-08002BE10318}", "{71A27CDD-812A-11D0-BEC7-08002BE2092F}"
BEST = "VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01"
INF = "hyper2kvm-viostor.inf"
PACKAGE = f"DriverDatabase\\DriverPackages\\{INF}_amd64_0000000000000000"
CRITICAL = f"{SET}\\Control\\CriticalDeviceDatabase"
NOWHERE = bytes.fromhex("00112233445566778899aabbccddeeff")


@dataclass(frozen=True)
class Sabotage:
    """One way. guest: the family, and "virtio" or "sata". what: for people. claim: of the proof that finds it."""

    guest: tuple[str, str]
    what: str
    break_: Break
    claim: str

    def row(self, proof: Proof) -> str:
        """What docs/windows-proofs.md has of it: what was done, to which guest, and the proof that finds it."""
        why = re.split("; |: VEN_", proof.evidence)[0]
        return wrapped(f"- **{self.what}** ({', '.join(self.guest)}): {proof.claim}. `{why}`\n")


class Registry:
    """A hive of a guest, open for breaking it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hive: Any = hivex.Hivex(str(path), write=True)

    def node(self, key: str, *, make: bool = False) -> int:
        """The handle of a key."""
        node = self._hive.root()
        for name in key.split("\\"):
            child = self._hive.node_get_child(node, name)
            if child is None and not make:
                raise KeyError(f"{self._path}: {key}")
            node = self._hive.node_add_child(node, name) if child is None else child
        return int(node)

    def set(self, key: str, name: str, value: Value) -> None:
        """Set a value, in a key that may be new."""
        node = self.node(key, make=True)
        self._hive.node_set_value(node, {"key": name, "t": value.type, "value": value.data})

    def drop(self, key: str, name: str) -> None:
        """Take one value away."""
        node = self.node(key)
        kept = [
            {"key": self._hive.value_key(v), "t": self._hive.value_type(v)[0], "value": self._hive.value_value(v)[1]}
            for v in self._hive.node_values(node)
            if self._hive.value_key(v).lower() != name.lower()
        ]
        self._hive.node_set_values(node, kept)

    def remove(self, key: str) -> None:
        """Take a key away."""
        self._hive.node_delete_child(self.node(key))

    def names(self, key: str) -> list[str]:
        """The keys below one."""
        return [self._hive.node_name(child) for child in self._hive.node_children(self.node(key))]

    def close(self) -> None:
        """Write what was done."""
        self._hive.commit(None)


def _windows(g: Directory) -> Path:
    return max(g.at.glob("sda*/Windows")).parent


def _boot(g: Directory) -> Path:
    return g.at / "sda1"


def system(change: Callable[[Registry], None]) -> Break:
    """A change of the hive SYSTEM."""

    def done(g: Directory) -> None:
        registry = Registry(_windows(g) / SYSTEM)
        change(registry)
        registry.close()

    return done


def bcd(change: Callable[[Registry], None]) -> Break:
    """A change of the boot configuration."""

    def done(g: Directory) -> None:
        registry = Registry(next(path for path in _boot(g).rglob("BCD")))
        change(registry)
        registry.close()

    return done


def value(key: str, name: str, new: Value) -> Break:
    """Another value in SYSTEM."""
    return system(lambda registry: registry.set(key, name, new))


def gone(key: str) -> Break:
    """A key of SYSTEM that is not there."""
    return system(lambda registry: registry.remove(key))


def lost(path: str) -> Break:
    """A file of Windows that is not there."""
    return lambda g: (_windows(g) / path).unlink()


def written(path: str, content: bytes) -> Break:
    """Another file in its place."""

    def done(g: Directory) -> None:
        assert (_windows(g) / path).is_file()
        (_windows(g) / path).write_bytes(content)

    return done


def moved(element: str) -> Break:
    """A device element that names another partition."""

    def change(registry: Registry) -> None:
        key = f"Objects\\{DEFAULT}\\Elements\\{element}"
        node = registry.node(key)
        data = bytearray(registry._hive.value_value(registry._hive.node_get_value(node, "Element"))[1])
        data[32:48] = NOWHERE
        registry.set(key, "Element", binary(bytes(data)))

    return bcd(change)


def _no_ids(registry: Registry) -> None:
    for id in registry.names("DriverDatabase\\DeviceIds\\PCI"):
        if id.startswith("VEN_1AF4&DEV_1042"):
            registry.remove(f"DriverDatabase\\DeviceIds\\PCI\\{id}")


def _no_critical_ids(registry: Registry) -> None:
    for id in registry.names(CRITICAL):
        if "DEV_1042" in id:
            registry.remove(f"{CRITICAL}\\{id}")


def _twin(registry: Registry) -> None:
    """Another package that is registered for the same device."""
    registry.set(f"DriverDatabase\\DeviceIds\\PCI\\{BEST}", "mshdc.inf", binary(b"\x01\xff\0\0"))
    package = next(name for name in registry.names("DriverDatabase\\DriverPackages") if name.startswith("mshdc"))
    registry.set(f"DriverDatabase\\DriverPackages\\{package}\\Descriptors\\PCI\\{BEST}", "Configuration",
                 sz("storahci_Install"))  # fmt: skip


def _inactive(g: Directory) -> None:
    disk = g.disks["/dev/sda"]
    swapped = (replace(disk.partitions[0], active=False), replace(disk.partitions[1], active=True))
    g.disks["/dev/sda"] = replace(disk, partitions=swapped)


def _service(name: str) -> str:
    return f"{SET}\\Services\\{name}"


def _filter(guid: str, kind: str, name: str, file: bytes | None = None) -> Break:
    """A filter of a class; with a file, or without a service."""

    def done(g: Directory) -> None:
        registry = Registry(_windows(g) / SYSTEM)
        registry.set(f"{SET}\\Control\\Class\\{guid}", kind, multi_sz("partmgr", name))
        if file is not None:
            registry.set(_service(name), "Type", dword(1))
            registry.set(_service(name), "Start", dword(0))
            (_windows(g) / f"Windows/System32/drivers/{name}.sys").write_bytes(file)
        registry.close()

    return done


VIRTIO, SATA, BIOS = ("2022", "virtio"), ("2022", "sata"), ("7", "virtio")
DISK, CARD = "starts a driver for its virtio disk", "has a driver for its"
TAKES, LOADED, STARTS = "takes devices that it has not seen", "can be loaded", "starts while Windows boots"
FIRMWARE, MANAGER = "the firmware finds", "the boot manager starts"
DRIVERS = "Windows/System32/drivers"

SABOTAGE = (
    Sabotage(VIRTIO, "viostor starts on demand", value(_service("viostor"), "Start", dword(3)), DISK),
    Sabotage(VIRTIO, "viostor is no driver", value(_service("viostor"), "Type", dword(16)), DISK),
    Sabotage(VIRTIO, "viostor has a StartOverride",
             value(f"{_service('viostor')}\\StartOverride", "0", dword(3)), DISK),
    Sabotage(VIRTIO, "viostor's service is not there", gone(_service("viostor")), DISK),
    Sabotage(VIRTIO, "viostor's path leads nowhere",
             value(_service("viostor"), "ImagePath", expand_sz("system32\\drivers\\vioster.sys")), DISK),
    Sabotage(VIRTIO, "viostor.sys is not there", lost(f"{DRIVERS}/viostor.sys"), DISK),
    Sabotage(VIRTIO, "viostor.sys is for another processor", written(f"{DRIVERS}/viostor.sys", program("i386")), DISK),
    Sabotage(VIRTIO, "viostor.sys is another than that of virtio-win",
             written(f"{DRIVERS}/viostor.sys", program("x86_64", "other")), DISK),
    Sabotage(VIRTIO, "viostor.sys is cut off", written(f"{DRIVERS}/viostor.sys", b"MZ"), DISK),
    Sabotage(VIRTIO, "no identifier of the disk is registered", system(_no_ids), DISK),
    Sabotage(VIRTIO, "another driver is registered for the same device", system(_twin), DISK),
    Sabotage(VIRTIO, "the .inf names no package", gone(f"DriverDatabase\\DriverInfFiles\\{INF}"), DISK),
    Sabotage(VIRTIO, "the package has no version", system(lambda r: r.drop(PACKAGE, "Version")), DISK),
    Sabotage(VIRTIO, "the package does not describe the device",
             gone(f"{PACKAGE}\\Descriptors\\PCI\\{BEST}"), DISK),
    Sabotage(VIRTIO, "the package has no configuration", gone(f"{PACKAGE}\\Configurations"), DISK),
    Sabotage(VIRTIO, "the configuration names another service",
             value(f"{PACKAGE}\\Configurations\\viostor_hyper2kvm", "Service", sz("viostop")), DISK),
    Sabotage(VIRTIO, "the device is disabled",
             value(f"{PACKAGE}\\Configurations\\viostor_hyper2kvm", "ConfigFlags", dword(1)), DISK),
    Sabotage(VIRTIO, "the whole database of drivers is not there", gone("DriverDatabase"), DISK),
    Sabotage(("2022 two sets", "virtio"), "only one control set was fixed",
             value(f"{OTHER_SET}\\Services\\viostor", "Start", dword(3)), DISK),
    Sabotage(BIOS, "no critical device is registered", system(_no_critical_ids), DISK),
    Sabotage(BIOS, "the critical device has no class",
             system(lambda r: r.drop(f"{CRITICAL}\\PCI#{BEST}", "ClassGUID")), DISK),
    Sabotage(BIOS, "the critical device names another service",
             value(f"{CRITICAL}\\PCI#{BEST}", "Service", sz("LSI_SAS2")), DISK),
    Sabotage(VIRTIO, "new critical devices are not taken",
             value(f"{SET}\\Control\\PnP", "DisableCDDB", dword(1)), TAKES),
    Sabotage(VIRTIO, "raw devices are not started",
             value(f"{SET}\\Control\\PnP", "DontStartRawDevices", dword(1)), TAKES),
    Sabotage(VIRTIO, "a filter of the controller has no service", _filter(SCSI, "UpperFilters", "avflt"), LOADED),
    Sabotage(VIRTIO, "a filter of the disk is for another processor",
             _filter(DISK_DRIVE, "LowerFilters", "avflt", program("i386")), LOADED),
    Sabotage(VIRTIO, "a filter of the volume is no program", _filter(VOLUME, "UpperFilters", "avflt", b""), LOADED),
    Sabotage(SATA, "a filter of the SATA controller has no service", _filter(HDC, "LowerFilters", "avflt"), LOADED),
    Sabotage(VIRTIO, "pci starts on demand", value(_service("pci"), "Start", dword(3)), STARTS),
    Sabotage(VIRTIO, "disk has a StartOverride", value(f"{_service('disk')}\\StartOverride", "0", dword(3)), STARTS),
    Sabotage(VIRTIO, "partmgr.sys is not there", lost(f"{DRIVERS}/partmgr.sys"), STARTS),
    Sabotage(VIRTIO, "volmgr is not there", gone(_service("volmgr")), STARTS),
    Sabotage(VIRTIO, "mountmgr is disabled", value(_service("mountmgr"), "Start", dword(4)), STARTS),
    Sabotage(VIRTIO, "C: is another partition",
             value("MountedDevices", "\\DosDevices\\C:", binary(b"DMIO:ID:" + NOWHERE)), "C: is the partition"),
    Sabotage(BIOS, "C: is on another disk",
             value("MountedDevices", "\\DosDevices\\C:", binary(NOWHERE[:12])), "C: is the partition"),
    Sabotage(VIRTIO, "netkvm.sys is not there", lost("Windows/Drivers/VirtIO/NetKVM/netkvm.sys"), CARD),
    Sabotage(SATA, "storahci starts on demand", value(_service("storahci"), "Start", dword(3)), "its SATA controller"),
    Sabotage(SATA, "storahci has a StartOverride",
             value(f"{_service('storahci')}\\StartOverride", "0", dword(3)), "its SATA controller"),
    Sabotage(SATA, "storahci.sys is not there", lost(f"{DRIVERS}/storahci.sys"), "its SATA controller"),
    Sabotage(SATA, "SATA controllers are not registered",
             gone("DriverDatabase\\DeviceIds\\PCI\\CC_010601"), "its SATA controller"),
    Sabotage(SATA, "the driver of the network card is not registered",
             gone("DriverDatabase\\DeviceIds\\PCI\\VEN_8086&DEV_10D3"), CARD),
    Sabotage(VIRTIO, "no entry starts by default",
             bcd(lambda r: r.remove(f"Objects\\{BOOTMGR}\\Elements\\23000003")), MANAGER),
    Sabotage(VIRTIO, "the loader is on another partition", moved("11000001"), MANAGER),
    Sabotage(VIRTIO, "Windows is on another partition", moved("21000001"), MANAGER),
    Sabotage(BIOS, "the loader is on another partition of an MBR", moved("11000001"), MANAGER),
    Sabotage(VIRTIO, "winload.efi is not there", lost("Windows/System32/winload.efi"), MANAGER),
    Sabotage(VIRTIO, "the loader is that of a BIOS",
             bcd(lambda r: r.set(f"Objects\\{DEFAULT}\\Elements\\12000002", "Element",
                                 sz("\\Windows\\system32\\winload.exe"))), MANAGER),
    Sabotage(VIRTIO, "the entry starts another directory",
             bcd(lambda r: r.set(f"Objects\\{DEFAULT}\\Elements\\22000002", "Element", sz("\\Users"))), MANAGER),
    Sabotage(VIRTIO, "bootmgfw.efi is not there",
             lambda g: (_boot(g) / "EFI/Microsoft/Boot/bootmgfw.efi").unlink(), FIRMWARE),
    Sabotage(VIRTIO, "bootx64.efi is not there", lambda g: (_boot(g) / "EFI/Boot/bootx64.efi").unlink(), FIRMWARE),
    Sabotage(BIOS, "bootmgr is not there", lambda g: (_boot(g) / "bootmgr").unlink(), FIRMWARE),
    Sabotage(BIOS, "another partition is active", _inactive, "is the active partition"),
)  # fmt: skip
