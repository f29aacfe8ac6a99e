"""Phony Windows guests: directories with real hives and headers, and what stands in for the appliance.

There is no code of Windows in them. Hives are made from their layout, and filled with the library that libguestfs has.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hivex

from hyper2kvmd.guest.windows.registry import Value, binary, dword, expand_sz, multi_sz, sz

Keys = Mapping[str, Mapping[str, Value]]

# ---- hives

NOWHERE = 0xFFFFFFFF


def cell(data: bytes) -> bytes:
    """A cell in use, as it stands in a hive."""
    length = (len(data) + 4 + 7) // 8 * 8
    return struct.pack("<i", -length) + data.ljust(length - 4, b"\0")


def key(name: str, security: int, *, children: int = 0, listed: int = NOWHERE, root: bool = False) -> bytes:
    """The cell of a key without values. security, listed: where the cells of its rights and its children begin."""
    head = struct.pack("<2sHQI", b"nk", 0x2C if root else 0x20, 0, 0)
    rest = struct.pack("<13I", NOWHERE, children, 0, listed, NOWHERE, 0, NOWHERE, security, NOWHERE, 0, 0, 0, 0)
    return cell(head + rest + struct.pack("<IHH", 0, len(name), 0) + name.encode("ascii"))


def rights(place: int) -> bytes:
    """The cell of rights that keys share; hives want one."""
    descriptor = b"\x01\x00\x04\x80" + bytes(16)
    return cell(struct.pack("<2sHIIII", b"sk", 0, place, place, 1, len(descriptor)) + descriptor)


def hive(cells: bytes, sequence: tuple[int, int] = (1, 1)) -> bytes:
    """A hive whose one bin holds these cells, the first of which is its root."""
    used = len(cells) + 0x20
    size = (used + 16 + 0xFFF) // 0x1000 * 0x1000
    free = size - used
    bin = struct.pack("<4sIIQQI", b"hbin", 0, size, 0, 0, 0) + cells + struct.pack("<i", free) + bytes(free - 4)
    return base_block(size, sequence) + bin


def base_block(size: int, sequence: tuple[int, int]) -> bytes:
    """What a hive begins with, checksum included; size: of all bins."""
    head = struct.pack("<4sIIQIIIIIII", b"regf", *sequence, 0, 1, 3, 0, 1, 0x20, size, 1).ljust(508, b"\0")
    checksum = 0
    for (word,) in struct.iter_unpack("<I", head):
        checksum ^= word
    return (head + struct.pack("<I", checksum)).ljust(4096, b"\0")


def empty_hive() -> bytes:
    """A hive that has nothing but its root."""
    place = 0x20 + len(key("ROOT", 0, root=True))
    return hive(key("ROOT", place, root=True) + rights(place))


def write_hive(path: Path, keys: Keys) -> None:
    """Put keys and values into a hive, which is made if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(empty_hive())
    opened = hivex.Hivex(str(path), write=True)
    for key, values in keys.items():
        node = opened.root()
        for name in filter(None, key.split("\\")):
            node = opened.node_get_child(node, name) or opened.node_add_child(node, name)
        for name, value in values.items():
            opened.node_set_value(node, {"key": name, "t": value.type, "value": value.data})
    opened.commit(None)


def unclose(path: Path) -> None:
    """Leave a hive as Windows does when its power goes: begun to be written, and not done."""
    data = path.read_bytes()
    first = struct.unpack_from("<I", data, 4)[0]
    path.write_bytes(base_block(struct.unpack_from("<I", data, 40)[0], (first + 1, first)) + data[4096:])


# ---- programs

MACHINES = {"x86_64": 0x8664, "i386": 0x14C, "aarch64": 0xAA64}


def program(arch: str, content: str = "") -> bytes:
    """What a program or driver of Windows begins with; `content` tells one from another."""
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80)
    return head.ljust(0x80, b"\0") + b"PE\0\0" + struct.pack("<H", MACHINES[arch]) + bytes(18) + content.encode()


# ---- disks

ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
RESERVED = "e3c9e316-0b5c-4db8-817d-f92df00215ae"
BASIC_DATA = "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7"
LDM_DATA = "af9b60a0-1431-4f62-bc68-3311714a69ad"
STORAGE_SPACES = "e75caf8f-f680-4cee-afa3-b001e56efc2d"


@dataclass(frozen=True)
class Partition:
    """A partition. start: in bytes. type: a GUID, or 0x07 and the like. uuid: of a GPT. content: as blkid calls it."""

    start: int
    type: str
    content: str = ""
    uuid: str = ""
    active: bool = False


@dataclass(frozen=True)
class Disk:
    """A disk. table: gpt, dos, or "" for a blank one. id: its GUID, or its signature in eight hexadecimal digits."""

    table: str = ""
    id: str = ""
    partitions: tuple[Partition, ...] = ()


class _Hivex(hivex.Hivex):  # type: ignore[misc]
    """The library's own, which closes what it could not open, and complains about that where nobody hears it."""

    def __del__(self) -> None:
        if hasattr(self, "_o"):
            super().__del__()


class Directory:
    """Stands in for libguestfs: disks whose file systems are directories below `at`, named sda1 and so on.

    Names are told apart by their case, as in the appliance. What is not there is a RuntimeError.
    """

    def __init__(self, at: Path, disks: Sequence[Disk]) -> None:
        self.at = at
        self.disks = {f"/dev/sd{'abcdefgh'[number]}": disk for number, disk in enumerate(disks)}
        self.dirty: set[str] = set()  # file systems that were not unmounted
        self.mounted: dict[str, str] = {}
        self._hive: Any = None
        for name, partition in self._partitions().items():
            if partition.content in ("ntfs", "vfat"):
                self.volume(name).mkdir(parents=True, exist_ok=True)

    def volume(self, device: str) -> Path:
        """The directory that a file system is, on the host."""
        return self.at / device.removeprefix("/dev/")

    def host(self, path: str) -> Path:
        """Where a file of the mounted guest is on the host."""
        point = max((p for p in self.mounted if path == p or path.startswith(p.rstrip("/") + "/")), key=len, default="")
        if not point:
            raise RuntimeError(f"{path}: you must call 'mount' first to mount the root filesystem")
        return self.volume(self.mounted[point]) / path[len(point) :].strip("/")

    # disks

    def _partitions(self) -> dict[str, Partition]:
        return {
            f"{name}{number}": partition
            for name, disk in self.disks.items()
            for number, partition in enumerate(disk.partitions, 1)
        }

    def list_devices(self) -> list[str]:
        return list(self.disks)

    def list_partitions(self) -> list[str]:
        return list(self._partitions())

    def list_md_devices(self) -> list[str]:
        return []

    def list_dm_devices(self) -> list[str]:
        return []

    def lvs(self) -> list[str]:
        return []

    def part_to_dev(self, device: str) -> str:
        if device not in self._partitions():
            raise RuntimeError(f"part_to_dev: {device}: device name is not a partition")
        return device.rstrip("0123456789")

    def device_index(self, device: str) -> int:
        return list(self.disks).index(device)

    def blkid(self, device: str) -> dict[str, str]:
        if disk := self.disks.get(device):
            if not disk.table:
                raise RuntimeError(f"blkid: {device}: nothing is on it")
            return {"PTTYPE": disk.table, "PTUUID": disk.id}
        disk, partition = self.disks[self.part_to_dev(device)], self._partitions()[device]
        number = device.lstrip("/abcdefghijklmnopqrstuvwxyz")
        said = {
            "PART_ENTRY_SCHEME": disk.table,
            "PART_ENTRY_TYPE": partition.type,
            "PART_ENTRY_NUMBER": number,
            "PART_ENTRY_OFFSET": str(partition.start // 512),
            "PART_ENTRY_UUID": partition.uuid or f"{disk.id}-{int(number):02}",
        }
        return said | ({"TYPE": partition.content, "UUID": f"0123{number}"} if partition.content else {})

    def pread_device(self, device: str, count: int, offset: int) -> bytes:
        sector = bytearray(512)
        disk = self.disks[device]
        if disk.table:
            sector[510:] = b"\x55\xaa"
        if disk.table == "dos":
            sector[:4] = b"\x33\xc0\x8e\xd0"
            sector[440:444] = int(disk.id, 16).to_bytes(4, "little")
            for number, partition in enumerate(disk.partitions):
                entry = struct.pack("<B3xB3xII", 0x80 * partition.active, int(partition.type, 16),
                                    partition.start // 512, 2048)  # fmt: skip
                sector[446 + 16 * number : 462 + 16 * number] = entry
        return bytes(sector[offset : offset + count])

    def feature_available(self, groups: list[str]) -> bool:
        return groups == ["ntfs3g"]

    def ntfs_3g_probe(self, rw: bool, device: str) -> int:
        root = self.volume(device)
        hibernated = next((path for path in root.glob("*") if path.name.lower() == "hiberfil.sys"), None)
        if rw and hibernated and hibernated.read_bytes()[:4].lower() == b"hibr":
            return 14
        return 15 if device in self.dirty else 0

    def mount(self, device: str, point: str) -> None:
        if self._partitions()[device].content not in ("ntfs", "vfat"):
            raise RuntimeError(f"mount: {device}: wrong fs type")
        if point != "/" and not self.is_dir(point):
            raise RuntimeError(f"mount: {point}: mount point is not a directory")
        if point in self.mounted:
            raise RuntimeError(f"mount: {point}: something is mounted there already")
        self.mounted[point] = device

    def mount_options(self, options: str, device: str, point: str) -> None:
        assert options in ("", "big_writes")
        self.mount(device, point)

    def mount_ro(self, device: str, point: str) -> None:
        self.mount(device, point)

    def umount_all(self) -> None:
        self.mounted.clear()

    def dmesg(self) -> str:
        return ""

    def inspect_os(self) -> list[str]:
        raise RuntimeError("inspect_os: parted: /dev/sdb: unrecognised disk label")

    # files

    def _host(self, path: str) -> Path:
        """The same for a file that has to be there."""
        found = self.host(path)
        if not found.exists():
            raise RuntimeError(f"{path}: No such file or directory")
        return found

    def exists(self, path: str) -> bool:
        return self.host(path).exists()

    def is_symlink(self, path: str) -> bool:
        return self.host(path).is_symlink()

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        return self.host(path).is_file()

    def is_dir(self, path: str, followsymlinks: bool = False) -> bool:
        return self.host(path).is_dir()

    def ls(self, path: str) -> list[str]:
        return sorted(child.name for child in self._host(path).iterdir())

    def glob_expand(self, pattern: str) -> list[str]:
        found = ["/"]
        for part in pattern.strip("/").split("/"):
            below = [(at, name) for at in found if self.is_dir(at) for name in self.ls(at)]
            found = [f"{at.rstrip('/')}/{name}" for at, name in below if fnmatch.fnmatchcase(name, part)]
        return found

    def pread(self, path: str, count: int, offset: int) -> bytes:
        with self._host(path).open("rb") as file:
            file.seek(offset)
            return file.read(count)

    def filesize(self, path: str) -> int:
        return self._host(path).stat().st_size

    def checksum(self, kind: str, path: str) -> str:
        return hashlib.new(kind, self._host(path).read_bytes()).hexdigest()

    def write(self, path: str, content: bytes) -> None:
        self._host(path.rpartition("/")[0] or "/")
        self.host(path).write_bytes(content)

    def upload(self, source: str, path: str) -> None:
        self.write(path, Path(source).read_bytes())

    def mkdir_p(self, path: str) -> None:
        self.host(path).mkdir(parents=True, exist_ok=True)

    def cp(self, source: str, path: str) -> None:
        shutil.copyfile(self._host(source), self.host(path))

    def rm(self, path: str) -> None:
        self.host(path).unlink()

    # hives

    def is_ready(self) -> bool:
        return True

    def hivex_open(self, path: str, *, write: bool = False) -> None:
        if self._hive is not None:
            raise RuntimeError("hivex_open: a hive is open already")
        self._hive = _Hivex(str(self._host(path)), write=write)

    def hivex_close(self) -> None:
        self._hive = None

    def hivex_commit(self, path: str | None) -> None:
        self._hive.commit(path)

    def hivex_root(self) -> int:
        return int(self._hive.root())

    def hivex_node_children(self, node: int) -> list[dict[str, int]]:
        return [{"hivex_node_h": child} for child in self._hive.node_children(node)]

    def hivex_node_get_child(self, node: int, name: str) -> int:
        return self._hive.node_get_child(node, name) or 0

    def hivex_node_name(self, node: int) -> str:
        return str(self._hive.node_name(node))

    def hivex_node_values(self, node: int) -> list[dict[str, int]]:
        return [{"hivex_value_h": value} for value in self._hive.node_values(node)]

    def hivex_node_get_value(self, node: int, name: str) -> int:
        # Not with the library's own call: for a value that is not there it says what went wrong somewhere before.
        found = (value for value in self._hive.node_values(node) if self.hivex_value_key(value).lower() == name.lower())
        return next(found, 0)

    def hivex_value_key(self, value: int) -> str:
        return str(self._hive.value_key(value))

    def hivex_value_type(self, value: int) -> int:
        return int(self._hive.value_type(value)[0])

    def hivex_value_value(self, value: int) -> bytes:
        return bytes(self._hive.value_value(value)[1])

    def hivex_node_set_value(self, node: int, name: str, type: int, data: bytes) -> None:
        self._hive.node_set_value(node, {"key": name, "t": type, "value": data})

    def hivex_node_add_child(self, node: int, name: str) -> int:
        return int(self._hive.node_add_child(node, name))

    def hivex_node_delete_child(self, node: int) -> None:
        self._hive.node_delete_child(node)


# ---- guests


@dataclass(frozen=True)
class Family:
    """A Windows as it comes: what it says in its registry, and the machine that it was installed for."""

    build: int
    product: str
    edition: str = "ServerStandard"
    installation_type: str = "Server"
    arch: str = "x86_64"
    firmware: str = "uefi"
    ubr: int = 0

    @property
    def has_driver_database(self) -> bool:
        """Whether devices are looked up in DriverDatabase, as Windows 8 and later do."""
        return self.build >= 9200


FAMILIES = {
    "7": Family(7601, "Windows 7 Professional", "Professional", "Client", firmware="bios"),
    "7-x86": Family(7601, "Windows 7 Professional", "Professional", "Client", arch="i386", firmware="bios"),
    "2012R2": Family(9600, "Windows Server 2012 R2 Standard", firmware="bios"),
    "2016": Family(14393, "Windows Server 2016 Standard", firmware="bios", ubr=6614),
    "10": Family(19045, "Windows 10 Pro", "Professional", "Client", ubr=3803),
    "11": Family(22631, "Windows 10 Pro", "Professional", "Client", ubr=2861),  # it does say 10 there
    "2019": Family(17763, "Windows Server 2019 Standard", installation_type="Server Core", ubr=5329),
    "2022": Family(20348, "Windows Server 2022 Datacenter", "ServerDatacenter", ubr=2227),
    "2025": Family(26100, "Windows Server 2025 Standard", ubr=1742),
}

SIGNATURE = "9a6f3cd4"
DISK_GUID = "4c1d0b52-3f4b-4a55-8a55-6d1c35f5a001"
ESP_GUID = "4c1d0b52-3f4b-4a55-8a55-6d1c35f5a011"
WINDOWS_GUID = "4c1d0b52-3f4b-4a55-8a55-6d1c35f5a013"
WINDOWS_START = 525336576
BIOS_DISK = Disk(
    "dos",
    SIGNATURE,
    (Partition(1 << 20, "0x7", "ntfs", active=True), Partition(WINDOWS_START, "0x7", "ntfs")),
)
UEFI_DISK = Disk(
    "gpt",
    DISK_GUID,
    (
        Partition(1 << 20, ESP, "vfat", ESP_GUID),
        Partition(101 << 20, RESERVED, "", "4c1d0b52-3f4b-4a55-8a55-6d1c35f5a012"),
        Partition(WINDOWS_START, BASIC_DATA, "ntfs", WINDOWS_GUID),
    ),
)
SYSTEM = "Windows/System32/config/SYSTEM"
SOFTWARE = "Windows/System32/config/SOFTWARE"
CARDS = (
    ("{11111111-0000-4000-8000-00000000000A}", bytes.fromhex("005056aa0001"), "Ethernet0"),
    ("{22222222-0000-4000-8000-00000000000B}", bytes.fromhex("005056aa0002"), "Backup LAN"),
)
NETWORK = "{4D36E972-E325-11CE-BFC1-08002BE10318}"
SCSI = "{4D36E97B-E325-11CE-BFC1-08002BE10318}"
HDC = "{4D36E96A-E325-11CE-BFC1-08002BE10318}"
ADOPTED = (
    # PCI function, service, .inf and class of drivers that an administrator installed while on VMware
    ("VEN_1AF4&DEV_1001&SUBSYS_00021AF4&REV_00", "viostor", "oem3.inf", SCSI),
    ("VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01", "viostor", "oem3.inf", SCSI),
    ("VEN_1AF4&DEV_1041&SUBSYS_11001AF4&REV_01", "netkvm", "oem4.inf", NETWORK),
)
# Where links lead that ntfs-3g shows for files of a kind that it does not know.
COMPRESSED = "unsupported reparse tag 0x80000017"
VMWARE = ("VMTools", "VGAuthService", "vm3dservice")


def guest(
    at: Path,
    name: str,
    *,
    hibernated: bool = False,
    bitlocker: bool = False,
    unclosed: bool = False,
    adopt: bool = False,
    two_disks: bool = False,
    two_sets: bool = False,
    static: bool = False,
    ipv6: bool = False,
    storahci_off: bool = False,
    vmware: bool = False,
    pending: bool = False,
    compressed: bool = False,
) -> Directory:
    """A guest of a family below `at`, with nothing mounted. /dev/sda1 starts it, and Windows is on the last partition.

    adopt: viostor is installed as on VMware, and so not started. two_disks: the second is blank. two_sets: Default is
    another control set than Current. static: two cards with addresses. ipv6: the first has one of IPv6.
    storahci_off: as in a VM without SATA. compressed: some drivers are as ntfs-3g shows what Windows has compressed.
    """
    family = FAMILIES[name]
    disk = UEFI_DISK if family.firmware == "uefi" else BIOS_DISK
    if bitlocker:
        disk = replace(disk, partitions=(*disk.partitions[:-1], replace(disk.partitions[-1], content="BitLocker")))
    g = Directory(at, [disk, Disk()] if two_disks else [disk])
    boot, windows = g.volume("/dev/sda1"), g.volume(f"/dev/sda{len(disk.partitions)}")
    _fill_boot(boot, family)
    if bitlocker:
        return g
    sets = ("ControlSet001", "ControlSet002") if two_sets else ("ControlSet001",)
    system: dict[str, dict[str, Value]] = {
        "Select": {"Current": dword(1), "Default": dword(len(sets)), "Failed": dword(0), "LastKnownGood": dword(1)},
        "MountedDevices": {"\\DosDevices\\C:": binary(_mounted_device(family))},
    }
    for one in sets:
        system |= {f"{one}\\{key}": values for key, values in _control_set(family, static=static, ipv6=ipv6).items()}
        if storahci_off:
            system[f"{one}\\Services\\{_ahci(family)}\\StartOverride"] = {"0": dword(3)}
        if vmware:
            system |= {f"{one}\\Services\\{service}": _service(service, 16, 2) for service in VMWARE}
        if adopt:
            system |= {f"{one}\\{key}": values for key, values in _adopted(family).items()}
    if family.has_driver_database:
        system |= _driver_database(family, adopt=adopt)
    write_hive(windows / SYSTEM, system)
    write_hive(windows / SOFTWARE, _software(family))
    _fill_windows(windows, family, adopt=adopt)
    if hibernated:
        (windows / "hiberfil.sys").write_bytes(b"HIBR" + bytes(4092))
    if unclosed:
        unclose(windows / SYSTEM)
    for driver in ("disk", _ahci(family), "viostor") if compressed else ():
        path = windows / f"Windows/System32/drivers/{driver}.sys"
        path.unlink(missing_ok=True)
        path.symlink_to(COMPRESSED)
    if pending:
        (windows / "Windows/WinSxS").mkdir()
        (windows / "Windows/WinSxS/pending.xml").write_text("<PendingTransaction/>")
    return g


def _ahci(family: Family) -> str:
    return "storahci" if family.has_driver_database else "msahci"


def _service(name: str, type: int, start: int, group: str = "") -> dict[str, Value]:
    """What Windows notes of a service; type 1 is a driver, start 0 is by the loader."""
    if type != 1:
        image = f'"C:\\Program Files\\VMware\\{name}.exe"'
        return {"Type": dword(type), "Start": dword(start), "ErrorControl": dword(1), "ImagePath": expand_sz(image)}
    return {
        "Type": dword(1),
        "Start": dword(start),
        "ErrorControl": dword(3 if start == 0 else 1),
        "ImagePath": expand_sz(f"System32\\drivers\\{name}.sys"),
        **({"Group": sz(group)} if group else {}),
    }


def _control_set(family: Family, *, static: bool, ipv6: bool) -> dict[str, dict[str, Value]]:
    """What every guest has in a control set, below it."""
    network_driver = "e1iexpress" if family.has_driver_database else "e1express"
    services = {
        "pci": _service("pci", 1, 0, "Boot Bus Extender"),
        "volmgr": _service("volmgr", 1, 0, "System Bus Extender"),
        "mountmgr": _service("mountmgr", 1, 0, "System Bus Extender"),
        "partmgr": _service("partmgr", 1, 0, "Boot Bus Extender"),
        "partmgr\\Parameters": {"SanPolicy": dword(3 if family.installation_type != "Client" else 1)},
        "disk": _service("disk", 1, 0),
        "volsnap": _service("volsnap", 1, 0),
        "LSI_SAS": _service("lsi_sas", 1, 0, "SCSI Miniport"),
        _ahci(family): _service(_ahci(family), 1, 0 if family.has_driver_database else 3, "SCSI Miniport"),
        network_driver: _service(network_driver, 1, 3, "NDIS"),
        **({} if family.has_driver_database else {"iaStorV": _service("iaStorV", 1, 3, "SCSI Miniport")}),
    }
    classes = {
        SCSI: {"Class": sz("SCSIAdapter")},
        HDC: {"Class": sz("HDC")},
        "{4D36E967-E325-11CE-BFC1-08002BE10318}": {"Class": sz("DiskDrive"), "UpperFilters": multi_sz("partmgr")},
        "{71A27CDD-812A-11D0-BEC7-08002BE2092F}": {"Class": sz("Volume"), "UpperFilters": multi_sz("volsnap")},
        NETWORK: {"Class": sz("Net")},
    }
    keys = {f"Services\\{name}": values for name, values in services.items()}
    keys |= {f"Control\\Class\\{guid}": values for guid, values in classes.items()}
    keys |= {
        "Control\\ComputerName\\ComputerName": {"ComputerName": sz("WIN-PHONY")},
        "Control\\ProductOptions": {"ProductType": sz("WinNT" if family.installation_type == "Client" else "ServerNT")},
        "Control\\TimeZoneInformation": {"TimeZoneKeyName": sz("W. Europe Standard Time")},
        "Control\\CrashControl": {"AutoReboot": dword(1)},
        "Control\\Session Manager": {"ProtectionMode": dword(1)},
        "Control\\Session Manager\\Environment": {
            "PROCESSOR_ARCHITECTURE": sz({"x86_64": "AMD64", "i386": "x86"}[family.arch])
        },
        "Control\\PnP": {},
    }
    if not family.has_driver_database:
        database = "Control\\CriticalDeviceDatabase"
        keys[f"{database}\\pci#cc_010601"] = {"Service": sz("msahci"), "ClassGUID": sz(HDC)}
        keys[f"{database}\\pci#ven_1000&dev_0054"] = {"Service": sz("LSI_SAS"), "ClassGUID": sz(SCSI)}
    return keys | _network(family, static=static) | (_ipv6() if ipv6 else {})


def _ipv6() -> dict[str, dict[str, Value]]:
    """An address, a route and a DNS server of the first card; and what its link has, and another card that is gone."""
    guid, luid, nsi = CARDS[0][0], "0000000900000600", "Control\\Nsi\\{eb004a01-9b1a-11d4-9123-0050047759bc}"
    forever = binary(bytes([255] * 8) + struct.pack("<IIB", 1, 1, 64) + bytes(31))
    return {
        f"Control\\Class\\{NETWORK}\\0007": {
            "NetCfgInstanceId": sz(guid),
            "NetLuidIndex": dword(9),
            "*IfType": dword(6),
        },
        f"Control\\Class\\{NETWORK}\\Properties": {},
        f"{nsi}\\10": {
            f"{luid}20010db8000000000000000000000010": forever,
            f"{luid}fe800000000000000000000000000010": forever,
            "000000080000060020010db8000000000000000000000099": forever,
            f"{luid}20010db8": forever,
            f"{luid}20010db8000000000000000000000011": binary(bytes(16)),
        },
        f"{nsi}\\16": {"0" * 40 + luid + "fe80000000000000" + "0" * 15 + "1": binary(bytes(32))},
        f"Services\\Tcpip6\\Parameters\\Interfaces\\{guid}": {"NameServer": sz("2001:db8::53")},
    }


def _network(family: Family, *, static: bool) -> dict[str, dict[str, Value]]:
    """One card with DHCP, or two with addresses. MAC addresses are noted from Windows 10 on, slots always."""
    addresses = (
        {
            "EnableDHCP": dword(0),
            "IPAddress": multi_sz("192.0.2.10", "192.0.2.11"),
            "SubnetMask": multi_sz("255.255.255.0", "255.255.255.0"),
            "DefaultGateway": multi_sz("192.0.2.1"),
            "NameServer": sz("192.0.2.53,192.0.2.54"),
        },
        {
            "EnableDHCP": dword(0),
            "IPAddress": multi_sz("198.51.100.7"),
            "SubnetMask": multi_sz("255.255.255.192"),
            "NameServer": sz(""),
        },
    )
    dhcp = {"EnableDHCP": dword(1), "DhcpIPAddress": sz("192.0.2.99"), "IPAddress": multi_sz("0.0.0.0")}
    keys: dict[str, dict[str, Value]] = {}
    for number, (guid, mac, alias) in enumerate(CARDS if static else CARDS[:1]):
        pnp = f"PCI\\VEN_15AD&DEV_07B0&SUBSYS_07B015AD&REV_01\\4&3AD87E0A&0&00{number}8"
        keys[f"Services\\Tcpip\\Parameters\\Interfaces\\{guid}"] = addresses[number] if static else dhcp
        keys[f"Control\\Network\\{NETWORK}\\{guid}\\Connection"] = {"Name": sz(alias), "PnpInstanceID": sz(pnp)}
        keys[f"Enum\\{pnp}"] = {"UINumber": dword(160 + 32 * number), "Service": sz("vmxnet3ndis6")}
        if family.build >= 10240:
            keys[f"Control\\NetworkSetup2\\Interfaces\\{guid}\\Kernel"] = {"PermanentAddress": binary(mac)}
    return keys


def _driver_database(family: Family, *, adopt: bool) -> dict[str, dict[str, Value]]:
    """From the ids of PCI functions to services, as Windows 8 and later keep it."""
    network = ("VEN_8086&DEV_10D3", "e1iexpress", "net1ic64.inf", NETWORK)
    keys: dict[str, dict[str, Value]] = {}
    for id, service, inf, guid in (
        ("CC_010601", "storahci", "mshdc.inf", HDC), network, *(ADOPTED if adopt else ()),
    ):  # fmt: skip
        package = f"{inf}_{'amd64' if family.arch == 'x86_64' else 'x86'}_0123456789abcdef"
        at, configuration = f"DriverDatabase\\DriverPackages\\{package}", f"{service}_Install"
        keys[f"DriverDatabase\\DriverInfFiles\\{inf}"] = {
            "": multi_sz(package),
            "Active": sz(package),
            "Configurations": multi_sz(configuration),
        }
        keys.setdefault(f"DriverDatabase\\DeviceIds\\PCI\\{id}", {})[inf] = binary(b"\x01\xff\0\0")
        keys[at] = {"": sz(inf), "Version": binary(bytes(8) + uuid.UUID(guid).bytes_le + bytes(24))}
        keys[f"{at}\\Configurations\\{configuration}"] = {"Service": sz(service), "ConfigFlags": dword(0)}
        keys[f"{at}\\Descriptors\\PCI\\{id}"] = {"Configuration": sz(configuration)}
    return keys


def _adopted(family: Family) -> dict[str, dict[str, Value]]:
    """The services of drivers that were installed on VMware: PnP saw no device, and starts neither at boot."""
    keys = {
        "Services\\viostor": _service("viostor", 1, 3, "SCSI miniport"),
        "Services\\viostor\\StartOverride": {"0": dword(3)},
        "Services\\viostor\\Parameters\\PnpInterface": {"5": dword(1)},
        "Services\\netkvm": _service("netkvm", 1, 3, "NDIS"),
    }
    if not family.has_driver_database:
        for id, service, _, guid in ADOPTED[:2]:
            keys[f"Control\\CriticalDeviceDatabase\\PCI#{id}"] = {"Service": sz(service), "ClassGUID": sz(guid)}
    return keys


def _software(family: Family) -> dict[str, dict[str, Value]]:
    version = {
        "CurrentBuildNumber": sz(str(family.build)),
        "CurrentVersion": sz({7601: "6.1", 9200: "6.2"}.get(family.build, "6.3")),
        "ProductName": sz(family.product),
        "EditionID": sz(family.edition),
        "InstallationType": sz(family.installation_type),
        "SystemRoot": sz("C:\\Windows"),
    }
    if family.build >= 10240:
        version |= {"CurrentMajorVersionNumber": dword(10), "CurrentMinorVersionNumber": dword(0)}
        version["UBR"] = dword(family.ubr)
    return {
        "Microsoft\\Windows NT\\CurrentVersion": version,
        "Microsoft\\Windows\\CurrentVersion": {"DevicePath": expand_sz("%SystemRoot%\\inf")},
        "Microsoft\\Windows\\CurrentVersion\\Component Based Servicing": {},
    }


def _fill_windows(root: Path, family: Family, *, adopt: bool) -> None:
    """The files of the system's own partition."""
    drivers = ["pci", "volmgr", "mountmgr", "partmgr", "disk", "volsnap", "lsi_sas", _ahci(family)]
    drivers += ["e1iexpress"] if family.has_driver_database else ["e1express", "iaStorV"]
    drivers += ["viostor", "netkvm"] if adopt else []
    names = ["ntoskrnl.exe", "cmd.exe", "winload.efi", "winload.exe", *(f"drivers/{name}.sys" for name in drivers)]
    for name in names:
        _put(root / "Windows/System32" / name, program(family.arch, name))
    _put(root / "Windows/inf/nete1g3e.inf", "%E100E% = E100E, PCI\\VEN_8086&DEV_100E\r\n".encode("utf-16"))
    for directory in ("Windows/Temp", "Program Files", "Users/Public"):
        (root / directory).mkdir(parents=True)


def _fill_boot(root: Path, family: Family) -> None:
    """The files that firmware starts: an EFI system partition, or what Windows calls System Reserved."""
    if family.firmware == "uefi":
        for name in ("Microsoft/Boot/bootmgfw.efi", "Boot/bootx64.efi"):
            _put(root / "EFI" / name, program(family.arch, name))
        write_hive(root / "EFI/Microsoft/Boot/BCD", store(family))
    else:
        _put(root / "bootmgr", b"\xe9\xd5\x01\xeb")
        write_hive(root / "Boot/BCD", store(family))


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


BOOTMGR = "{9dea862c-5cdd-4e70-acc1-f32b344d4795}"
DEFAULT = "{5e2a1f0c-0a1b-11ee-9f3a-005056aa0001}"
RESUME = "{5e2a1f0b-0a1b-11ee-9f3a-005056aa0001}"


def device_of(family: Family) -> bytes:
    """The device element that names the partition of Windows."""
    if family.firmware == "uefi":
        partition, table, disk = uuid.UUID(WINDOWS_GUID).bytes_le, 0, uuid.UUID(DISK_GUID).bytes_le
    else:
        partition, table, disk = WINDOWS_START.to_bytes(16, "little"), 1, int(SIGNATURE, 16).to_bytes(16, "little")
    return bytes(16) + struct.pack("<IIII", 6, 0, 0x48, 0) + partition + struct.pack("<II", 0, table) + disk + bytes(16)


def store(family: Family) -> dict[str, dict[str, Value]]:
    """The boot configuration, as the keys of a hive."""
    loader = "\\Windows\\system32\\winload." + ("efi" if family.firmware == "uefi" else "exe")
    elements: dict[str, dict[str, Value]] = {
        BOOTMGR: {
            "12000004": sz("Windows Boot Manager"),
            "23000003": sz(DEFAULT),
            "24000001": multi_sz(DEFAULT),
            "25000004": binary((30).to_bytes(8, "little")),
        },
        DEFAULT: {
            "11000001": binary(device_of(family)),
            "12000002": sz(loader),
            "12000004": sz("Windows"),
            "21000001": binary(device_of(family)),
            "22000002": sz("\\Windows"),
            "23000003": sz(RESUME),
        },
        RESUME: {"11000001": binary(device_of(family)), "12000002": sz(loader.replace("load", "resume"))},
    }
    types = {BOOTMGR: 0x10100002, DEFAULT: 0x10200003, RESUME: 0x10200004}
    keys = {f"Objects\\{id}\\Description": {"Type": dword(type)} for id, type in types.items()}
    for id, values in elements.items():
        keys |= {f"Objects\\{id}\\Elements\\{element}": {"Element": value} for element, value in values.items()}
    return keys


def _mounted_device(family: Family) -> bytes:
    """What MountedDevices says of C:."""
    if family.firmware == "uefi":
        return b"DMIO:ID:" + uuid.UUID(WINDOWS_GUID).bytes_le
    return struct.pack("<IQ", int(SIGNATURE, 16), WINDOWS_START)
