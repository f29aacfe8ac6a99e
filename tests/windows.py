"""Phony Windows guests: directories with real hives and headers, and what stands in for the appliance.

There is no code of Windows in them. Hives are made from their layout, and filled with the library that libguestfs has.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hivex

from hyper2kvmd.guest.windows.registry import Value

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
        self.mounted[point] = device

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

    def case_sensitive_path(self, path: str) -> str:
        at = ""
        parts = path.strip("/").split("/")
        for number, part in enumerate(parts):
            names = self.ls(at or "/") if self.is_dir(at or "/") else []
            name = next((name for name in names if name.lower() == part.lower()), None)
            if name is None and number < len(parts) - 1:
                raise RuntimeError(f"case_sensitive_path: {path}: no file or directory found with this name")
            at = f"{at}/{name or part}"
        return at

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
        self._host(path).unlink()

    # hives

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
        try:
            return int(self._hive.node_get_value(node, name))
        except RuntimeError as error:
            if str(error) == "Success":  # what the Python module says of a value that is not there
                return 0
            raise

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
