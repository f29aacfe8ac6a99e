"""Pours the directories of a phony Windows guest into real file systems, on disks with the tables that it names."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from tests.guests.rootfs import run
from tests.windows import Directory, Disk

MIB = 1 << 20
LAST_MIB = 64  # of the partition behind which nothing begins, and of a blank disk
BOOT_CODE = b"\x33\xc0\x8e\xd0"
# Of a file that Windows has compressed for CompactOS.
REPARSE_POINT = struct.pack("<IHHIIII", 0x80000017, 16, 0, 1, 2, 1, 0)


def pour(guest: Directory, into: Path) -> list[Path]:
    """The disks of a guest with nothing mounted, in order, as sparse raw files in a directory."""
    paths = []
    for device, disk in guest.disks.items():
        path = into / f"{device.rpartition('/')[2]}.raw"
        starts = [partition.start for partition in disk.partitions]
        end = (starts[-1] if starts else 0) + LAST_MIB * MIB
        ends = [*starts[1:], end][: len(starts)]
        with path.open("wb") as file:
            file.truncate(end + MIB)  # the second table of a GPT is at the end
        if disk.table:
            _partition(path, disk, ends)
        for number, (partition, end) in enumerate(zip(disk.partitions, ends, strict=True), 1):
            if partition.content == "BitLocker":
                _lock(path, partition.start)
            if partition.content in ("ntfs", "vfat"):
                with tempfile.TemporaryDirectory(dir=into) as scratch:
                    tree, start = guest.volume(f"{device}{number}"), partition.start
                    volume = _volume(tree, partition.content, start, end, Path(scratch) / "volume")
                    if f"{device}{number}" in guest.dirty:
                        _cut_the_power(volume)
                    place = f"seek={start // MIB}"
                    run("dd", f"if={volume}", f"of={path}", "bs=1M", place, "conv=notrunc,sparse")
        paths.append(path)
    return paths


def _partition(path: Path, disk: Disk, ends: list[int]) -> None:
    lines = [f"label: {disk.table}", f"label-id: {disk.id if disk.table == 'gpt' else f'0x{disk.id}'}"]
    for partition, end in zip(disk.partitions, ends, strict=True):
        size = (end - partition.start) // 512
        words = [f"start={partition.start // 512}", f"size={size}", f"type={partition.type.removeprefix('0x')}"]
        words += [f"uuid={partition.uuid}"] if partition.uuid else []
        lines.append(", ".join([*words, *(["bootable"] if partition.active else [])]))
    subprocess.run(["sfdisk", "--quiet", path], input="\n".join(lines), text=True, check=True)
    if disk.table == "dos":
        with path.open("r+b") as file:
            file.write(BOOT_CODE)


def _volume(tree: Path, content: str, start: int, end: int, volume: Path) -> Path:
    """Make a file system with the files of a directory, in a file of its own."""
    with volume.open("wb") as file:
        file.truncate(end - start)
    if content == "vfat":
        run("mkfs.vfat", volume)
        run("mcopy", "-i", volume, "-s", *tree.iterdir(), "::/")
        return volume
    disk = ("--sector-size=512", "--sectors-per-track=63", "--heads=255")
    run("mkntfs", "--force", "--quick", *disk, f"--partition-start={start // 512}", volume)
    point = volume.with_name("mounted")
    point.mkdir()
    # In the foreground: what is unmounted need not be written before the driver has ended.
    with subprocess.Popen(["ntfs-3g", "-o", "no_detach", volume, point]) as driver:
        try:
            while not os.path.ismount(point):
                assert driver.poll() is None, "ntfs-3g did not mount what mkntfs made"
                time.sleep(0.01)
            shutil.copytree(tree, point, dirs_exist_ok=True, ignore_dangling_symlinks=True)
            for link in (path for path in tree.rglob("*") if path.is_symlink()):
                compressed = point / link.relative_to(tree)
                compressed.touch()
                os.setxattr(compressed, "system.ntfs_reparse_data", REPARSE_POINT)
        finally:
            run("umount", point)
    assert 0 == driver.returncode
    return volume


def _lock(disk: Path, start: int) -> None:
    """Write the header of BitLocker, and the beginning of the description that it leads to."""
    header = bytearray(512)
    header[:11] = b"\xeb\x58\x90-FVE-FS-"
    struct.pack_into("<16sQ", header, 0xA0, uuid.UUID("4967d63b-2e29-4ad8-8399-f6a339e3d001").bytes_le, MIB)
    with disk.open("r+b") as file:
        for place, data in ((0, header), (MIB, b"-FVE-FS-" + struct.pack("<HH", 64, 2))):
            file.seek(start + place)
            file.write(data)


def _cut_the_power(volume: Path) -> None:
    """Leave the journal of NTFS as it is while Windows writes: somebody uses it, and it is not marked as clean."""
    page = bytearray(4096)
    struct.pack_into("<4sHHQIIHHH", page, 0, b"RSTR", 30, 9, 0, 4096, 4096, 48, 1, 1)
    struct.pack_into("<QHHHHIHHQIH", page, 48, 0, 1, 0xFFFF, 0, 0, 46, 224, 64, 1 << 20, 0, 48)
    struct.pack_into("<HH", page, 128, 0xFFFF, 0xFFFF)  # neither is another before that one, nor behind it
    with volume.open("r+b") as file:
        boot = file.read(512)
        cluster = struct.unpack_from("<H", boot, 11)[0] * boot[13]
        file.seek(struct.unpack_from("<Q", boot, 0x30)[0] * cluster + 2 * 1024)  # the third record is the journal's
        record = file.read(1024)
        at = struct.unpack_from("<H", record, 20)[0]
        while struct.unpack_from("<I", record, at)[0] != 0x80:  # its content
            at += struct.unpack_from("<I", record, at + 4)[0]
        runs = at + struct.unpack_from("<H", record, at + 32)[0]
        length, place = record[runs] & 15, record[runs] >> 4
        first = int.from_bytes(record[runs + 1 + length : runs + 1 + length + place], "little")
        for number in (0, 1):
            file.seek(first * cluster + number * len(page))
            file.write(page)
