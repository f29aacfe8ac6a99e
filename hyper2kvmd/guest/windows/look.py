"""What a Windows guest is, read from its registry, its programs and its boot configuration; nothing is changed."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.linux.devices import Device
from hyper2kvmd.guest.mounts import mount_one
from hyper2kvmd.guest.session import spelt
from hyper2kvmd.guest.windows import bcd, program, refuse
from hyper2kvmd.guest.windows.bcd import Entry, Place
from hyper2kvmd.guest.windows.registry import Hive, open_hive
from hyper2kvmd.guest.windows.releases import Release, product_of, release_of
from hyper2kvmd.text import printable

SYSTEM, SOFTWARE = "HKLM\\SYSTEM", "HKLM\\SOFTWARE"
# What VMware Tools run; without VMware's devices they fail at every start. Its drivers are another matter.
VMWARE_SERVICES = ("VMTools", "VGAuthService", "vm3dservice")
STORES = ("/EFI/Microsoft/Boot/BCD", "/Boot/BCD")
_NETWORK = "{4D36E972-E325-11CE-BFC1-08002BE10318}"
# Where Windows keeps what was set for IPv6: addresses, and routes. Nobody has written down how a route is laid out.
_NSI = "Control\\Nsi\\{eb004a01-9b1a-11d4-9123-0050047759bc}"
_NSI_ADDRESSES, _NSI_ROUTES = f"{_NSI}\\10", f"{_NSI}\\16"
_PREFIX_LENGTH = 16  # where it stands behind two lifetimes and two origins of an address
_ARCHITECTURES = {"AMD64": "x86_64", "X86": "i386", "ARM64": "aarch64"}


@dataclass(frozen=True)
class Addresses:
    """A network card as Windows knows it, and what it is set to.

    guid: as the registry spells it, in braces. mac: with colons; "" before Windows 10, which notes none. slot: the
    number that VMware gives the card's PCI slot (160, 192...), where that is known. addresses: 192.0.2.10/24,
    2001:db8::10/64. dhcp: of IPv4. routes6: whether it has routes of IPv6 that cannot be read.
    """

    guid: str
    name: str
    mac: str
    slot: int | None
    dhcp: bool
    addresses: tuple[str, ...]
    gateways: tuple[str, ...]
    dns: tuple[str, ...]
    routes6: bool = False

    @property
    def static(self) -> bool:
        """Whether it has addresses of its own."""
        return bool(self.addresses)


@dataclass(frozen=True)
class Boot:
    """The partition that firmware starts. path: of the boot configuration on it, as it is spelt there.

    entry: the one that starts by itself, None if there is none.
    """

    device: str
    path: str
    entry: Entry | None


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What FIX has to know of a Windows guest. Texts are printable.

    system_root: "/Windows", as it is spelt on the disk. release: None if it is older than Vista. arch: of its kernel.
    control_sets: those that it starts with, the one that is default first. hives: from HKLM\\SYSTEM and the like to
    paths. vmware_tools: their product code, "" if they are not installed. place: where it is; None for what is no
    partition. boot: None if nothing that starts Windows was found.
    """

    system_root: str
    version: str
    build: int
    product: str
    installation_type: str
    release: Release | None
    arch: str
    hostname: str
    control_sets: tuple[str, ...]
    hives: dict[str, str]
    real_time_is_universal: bool
    addresses: tuple[Addresses, ...]
    vmware_services: tuple[str, ...]
    vmware_tools: str
    place: Place | None
    boot: Boot | None

    @property
    def family(self) -> str:
        """The directory of virtio-win that has its drivers, "" for one that is older than Vista."""
        return self.release.family if self.release else ""

    @property
    def has_driver_database(self) -> bool:
        """Whether it is Windows 8 or later, by its release."""
        return self.release is not None and self.release.has_driver_database


def look(
    g: Any,
    root: str,
    boot: str | None,
    devices: Sequence[Device],
    mounts: dict[str, str],
    warnings: list[Finding],
) -> Windows:
    """Look at the Windows on `root`, and leave it mounted, as `mounts` then says.

    boot: the partition that firmware starts, None if there is none.
    Raise MigrationError: guest_dirty for one that is hibernated, was not shut down, is damaged, or amid an update;
    os_unsupported for dynamic disks and Storage Spaces.
    """
    refuse.volumes(devices)
    refuse.unclean(g, root)
    place = _place(g, root)
    starts = _boot(g, boot)
    mount_one(g, "/", root, {device.name: device.type for device in devices}, mounts, warnings, waits=True)
    system_root = _needed(g, "/Windows")
    config = f"{system_root}/System32/config"
    hives = {SYSTEM: _needed(g, f"{config}/SYSTEM"), SOFTWARE: _needed(g, f"{config}/SOFTWARE")}
    kernel = _needed(g, f"{system_root}/System32/ntoskrnl.exe")
    with open_hive(g, hives[SYSTEM], SYSTEM) as system:
        control_sets = _control_sets(system)
        own = control_sets[0]
        control = f"{own}\\Control"
        is_client = _text(system, f"{control}\\ProductOptions", "ProductType") == "WinNT"
        hostname = _text(system, f"{control}\\ComputerName\\ComputerName", "ComputerName")
        said = _text(system, f"{control}\\Session Manager\\Environment", "PROCESSOR_ARCHITECTURE")
        arch = architecture(g, kernel, _ARCHITECTURES.get(said.upper(), "unknown"))
        universal = system.value(f"{control}\\TimeZoneInformation", "RealTimeIsUniversal")
        addresses = _addresses(system, own)
        services = tuple(
            name for name in VMWARE_SERVICES if any(system.exists(f"{one}\\Services\\{name}") for one in control_sets)
        )
        warnings += _pending_renames(system, own)
    with open_hive(g, hives[SOFTWARE], SOFTWARE) as software:
        refuse.pending_update(g, software, system_root)
        key = "Microsoft\\Windows NT\\CurrentVersion"
        build = _build(software, key)
        kind = _text(software, key, "InstallationType") or ("Client" if is_client else "Server")
        release = release_of(build, kind)
        return Windows(
            system_root=system_root,
            version=_version(software, key),
            build=build,
            product=product_of(release, _text(software, key, "ProductName")),
            installation_type=kind,
            release=release,
            arch=arch,
            hostname=hostname or "unknown",
            control_sets=control_sets,
            hives=hives,
            real_time_is_universal=universal is not None and universal.number == 1,
            addresses=addresses,
            vmware_services=services,
            vmware_tools=_vmware_tools(software),
            place=place,
            boot=starts,
        )


def _needed(g: Any, path: str) -> str:
    """A path as it is spelt on the disk."""
    found = spelt(g, path)
    if found is None:
        raise MigrationError(
            Code.GUEST_DIRTY,
            f"Windows has no {path}, without which it does not start",
            "Start the guest on VMware, run `chkdsk C: /f` and `sfc /scannow` in it, shut it down, and export it"
            " again.",
        )
    return found


def _place(g: Any, root: str) -> Place | None:
    """Where a partition is, in the words of Windows."""
    try:
        own, disk = g.blkid(root), g.blkid(g.part_to_dev(root))
        if own["PART_ENTRY_SCHEME"] == "gpt":
            return Place(disk["PTUUID"].lower(), own["PART_ENTRY_UUID"].lower())
        return Place(f"{int(disk['PTUUID'], 16):08x}", int(own["PART_ENTRY_OFFSET"]) * 512)
    except (RuntimeError, KeyError, ValueError):  # a volume, an array, a disk without a table
        return None


def _boot(g: Any, device: str | None) -> Boot | None:
    """What is on the partition that firmware starts; nothing is mounted before and after."""
    if device is None:
        return None
    try:
        g.mount_ro(device, "/")
        path = next(filter(None, (spelt(g, path) for path in STORES)), None)
        return Boot(device, path, bcd.default_entry(g, path)) if path else None
    except RuntimeError:  # no file system
        return None
    finally:
        g.umount_all()


def _control_sets(system: Hive) -> tuple[str, ...]:
    names = []
    for value in ("Default", "Current"):
        number = _number(system, "Select", value)
        name = f"ControlSet{number:03}" if number is not None else None
        if name is None or not system.exists(name):
            raise MigrationError(
                Code.GUEST_DIRTY,
                f"the registry of Windows is damaged: {SYSTEM}\\Select\\{value} names {name or 'no control set'}, which"
                " is not there",
                "Start the guest on VMware, see that it starts, shut it down, and export it again.",
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def _pending_renames(system: Hive, control_set: str) -> list[Finding]:
    value = system.value(f"{control_set}\\Control\\Session Manager", "PendingFileRenameOperations")
    if value is None or not value.data.strip(b"\0"):
        return []
    return [
        Finding(
            "pending_renames",
            "a program that was installed or removed in Windows waits for a restart to replace files",
            "That happens when the new VM starts first. Restart the guest on VMware before the export if it was a"
            " driver.",
        )
    ]


def architecture(g: Any, path: str, compressed: str) -> str:
    """The architecture of a program, by its PE header: x86_64, i386, aarch64, or "unknown".

    compressed: what is said of one that Windows has compressed in its own way, which nobody else can read.
    """
    try:
        return program.architecture(lambda offset, count: g.pread(path, count, offset))
    except RuntimeError:
        return compressed


def _build(software: Hive, key: str) -> int:
    said = _text(software, key, "CurrentBuildNumber") or _text(software, key, "CurrentBuild")
    if not re.fullmatch(r"[0-9]{1,9}", said):
        raise MigrationError(
            Code.GUEST_DIRTY,
            f"the registry of Windows is damaged: {SOFTWARE}\\{key}\\CurrentBuildNumber is '{said}', and no number",
            "Start the guest on VMware, run `sfc /scannow` in it, shut it down, and export it again.",
        )
    return int(said)


def _vmware_tools(software: Hive) -> str:
    key = "Microsoft\\Windows\\CurrentVersion\\Uninstall"
    products = (product for product in software.keys(key) if product.startswith("{"))
    return next((one for one in products if _text(software, f"{key}\\{one}", "DisplayName") == "VMware Tools"), "")


def _version(software: Hive, key: str) -> str:
    """6.1, 10.0: since Windows 10 the older value stays at 6.3."""
    major = _number(software, key, "CurrentMajorVersionNumber")
    if major is not None:
        return f"{major}.{_number(software, key, 'CurrentMinorVersionNumber') or 0}"
    said = _text(software, key, "CurrentVersion")
    return said if re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", said) else "0.0"


def _addresses(system: Hive, control_set: str) -> tuple[Addresses, ...]:
    """All cards that are known by a MAC address or a slot, and all that have addresses of their own."""
    interfaces = f"{control_set}\\Services\\Tcpip\\Parameters\\Interfaces"
    luids = _luids(system, control_set)
    cards = (_card(system, control_set, guid, luids.get(guid.lower(), "")) for guid in system.keys(interfaces))
    return tuple(card for card in cards if card.mac or card.slot is not None or card.addresses)


def _luids(system: Hive, control_set: str) -> dict[str, str]:
    """How names in the store of IPv6 begin, by the card's GUID in lower case."""
    found = {}
    drivers = f"{control_set}\\Control\\Class\\{_NETWORK}"
    for name in system.keys(drivers) if system.exists(f"{control_set}\\{_NSI_ADDRESSES}") else ():
        key = f"{drivers}\\{name}"
        kind, index = _number(system, key, "*IfType"), _number(system, key, "NetLuidIndex")
        if kind is not None and index is not None:
            luid = (kind & 0xFFFF) << 48 | (index & 0xFFFFFF) << 24
            found[_text(system, key, "NetCfgInstanceId").lower()] = luid.to_bytes(8, "little").hex()
    return found


def _card(system: Hive, control_set: str, guid: str, luid: str) -> Addresses:
    key = f"{control_set}\\Services\\Tcpip\\Parameters\\Interfaces\\{guid}"
    key6 = f"{control_set}\\Services\\Tcpip6\\Parameters\\Interfaces\\{guid}"
    connection = f"{control_set}\\Control\\Network\\{_NETWORK}\\{guid}\\Connection"
    device = _text(system, connection, "PnpInstanceID")
    kernel = f"{control_set}\\Control\\NetworkSetup2\\Interfaces\\{guid}\\Kernel"
    mac = system.value(kernel, "PermanentAddress")
    dhcp = _number(system, key, "EnableDHCP") == 1
    servers = (_text(system, one, "NameServer") for one in (key, key6))
    return Addresses(
        guid=printable(guid),
        name=_text(system, connection, "Name"),
        mac=mac.data.hex(":") if mac and len(mac.data) == 6 else "",
        slot=_number(system, f"{control_set}\\Enum\\{device}", "UINumber") if device else None,
        dhcp=dhcp,
        addresses=(
            *(() if dhcp else _with_prefix(_texts(system, key, "IPAddress"), _texts(system, key, "SubnetMask"))),
            *_addresses6(system, control_set, luid),
        ),
        gateways=() if dhcp else _usable(_texts(system, key, "DefaultGateway")),
        dns=_usable(address for one in servers for address in re.split(r"[,;\s]+", one)),
        routes6=bool(luid) and any(luid in name.lower() for name in system.values(f"{control_set}\\{_NSI_ROUTES}")),
    )


def _addresses6(system: Hive, control_set: str, luid: str) -> tuple[str, ...]:
    """The addresses of IPv6 that somebody gave a card, but for those of its link, which it makes for itself."""
    found = []
    for name, value in system.values(f"{control_set}\\{_NSI_ADDRESSES}").items() if luid else ():
        if re.fullmatch(rf"{luid}[0-9a-f]{{32}}", name.lower()) and len(value.data) > _PREFIX_LENGTH:
            address = ipaddress.IPv6Address(int(name[len(luid) :], 16))
            length = value.data[_PREFIX_LENGTH]
            if not (address.is_link_local or address.is_multicast or address.is_loopback) and 0 < length <= 128:
                found.append(f"{address}/{length}")
    return tuple(found)


def _with_prefix(addresses: Sequence[str], masks: Sequence[str]) -> tuple[str, ...]:
    """Addresses as 192.0.2.10/24; those that are none, or have no mask, are left out."""
    found = []
    for address, mask in zip(addresses, masks, strict=False):
        if ":" not in address and _usable([address]):
            try:
                found.append(f"{address}/{ipaddress.IPv4Network(f'0.0.0.0/{mask}').prefixlen}")
            except ValueError:
                continue
    return tuple(found)


def _usable(addresses: Iterable[str]) -> tuple[str, ...]:
    """Those that are addresses, but for 0.0.0.0, which Windows writes where there is none."""
    found = []
    for address in addresses:
        try:
            if "%" not in address and not ipaddress.ip_address(address).is_unspecified:
                found.append(address)
        except ValueError:
            continue
    return tuple(found)


def _text(hive: Hive, key: str, name: str) -> str:
    value = hive.value(key, name)
    return printable(value.text or "") if value else ""


def _texts(hive: Hive, key: str, name: str) -> tuple[str, ...]:
    value = hive.value(key, name)
    return value.texts if value else ()


def _number(hive: Hive, key: str, name: str) -> int | None:
    value = hive.value(key, name)
    return value.number if value else None
