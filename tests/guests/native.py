"""Disks written without a loop device or a virtual machine: one GPT disk with ext4, in seconds."""

from __future__ import annotations

import shutil
import struct
import uuid
from collections.abc import Sequence
from pathlib import Path

from tests.guests.guest import Guest
from tests.guests.rootfs import run

PER_GUEST = Path(__file__).parent / "per-guest"  # files with @PLACES@ to fill in
GRUB_MODULES = Path("/usr/lib/grub")  # the host's grub-pc-bin and grub-efi-amd64-bin

MIB = 1 << 20
SECTOR = 512
# The same three partitions on every guest, so that root is /dev/sda2 and swap /dev/sda3 whatever the firmware.
FIRST_START, FIRST_SIZE = 1 * MIB, 64 * MIB
ROOT_START, ROOT_SIZE = 65 * MIB, 1850 * MIB
SWAP_START, SWAP_SIZE = 1915 * MIB, 132 * MIB  # the last MiB of the disk holds the backup partition table

BIOS_BOOT, ESP, LINUX, SWAP = "ef02", "ef00", "8300", "8200"


def make_disks(guest: Guest, rootfs: Path, disks: Sequence[Path]) -> None:
    """Turn the tarball into the raw disk of one guest; work files go beside the disk and are removed."""
    (disk,) = disks
    tree = disk.with_name("tree")
    tree.mkdir()
    try:
        run("tar", "--extract", "--numeric-owner", "--xattrs", "--file", rootfs, "--directory", tree)
        _personalise(guest, tree)
        with disk.open("wb") as image:
            image.truncate(guest.disk_sizes[0])
        _partition(guest, disk)
        _make_swap(guest, disk)
        if guest.firmware == "bios":
            _install_grub_bios(tree, disk)
        else:
            _install_grub_uefi(guest, tree, disk)
        run(
            *("mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-U", _root_uuid(guest), "-d", tree),
            *("-E", f"offset={ROOT_START},root_owner=0:0", disk, f"{ROOT_SIZE // 1024}k"),
        )
    finally:
        shutil.rmtree(tree)


def _root_uuid(guest: Guest) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"root.{guest.name}"))


def _personalise(guest: Guest, tree: Path) -> None:
    (kernel,) = [path.name.removeprefix("vmlinuz-") for path in (tree / "boot").glob("vmlinuz-*")]
    esp = "# /boot/efi was on /dev/sda1 during installation\n"
    esp += "/dev/sda1 /boot/efi       vfat    umask=0077      0       1\n"
    places = {
        "@ROOT_UUID@": _root_uuid(guest),
        "@KERNEL@": kernel,
        "@ESP@": esp if guest.firmware == "uefi" else "",
    }
    (tree / "boot/grub").mkdir()
    for template, target in (("fstab", "etc/fstab"), ("grub.cfg", "boot/grub/grub.cfg")):
        text = (PER_GUEST / template).read_text()
        for place, value in places.items():
            text = text.replace(place, value)
        (tree / target).write_text(text)
    if guest.firmware == "uefi":
        (tree / "boot/efi").mkdir()


def _partition(guest: Guest, disk: Path) -> None:
    first = BIOS_BOOT if guest.firmware == "bios" else ESP
    layout = (
        (1, FIRST_START, FIRST_SIZE, first),
        (2, ROOT_START, ROOT_SIZE, LINUX),
        (3, SWAP_START, SWAP_SIZE, SWAP),
    )
    options: list[str] = []
    for number, start, size, kind in layout:
        last = (start + size) // SECTOR - 1
        options += [f"--new={number}:{start // SECTOR}:{last}", f"--typecode={number}:{kind}"]
    run("sgdisk", "--set-alignment=2048", *options, disk)


def _make_swap(guest: Guest, disk: Path) -> None:
    # mkswap cannot start in the middle of a file, so make the header (its first page) elsewhere and copy it
    area = disk.with_name("swap")
    try:
        with area.open("wb") as file:
            file.truncate(SWAP_SIZE)
        run("mkswap", "--uuid", str(uuid.uuid5(uuid.NAMESPACE_DNS, f"swap.{guest.name}")), area)
        with area.open("rb") as file:
            _write(disk, SWAP_START, file.read(4096))
    finally:
        area.unlink()


def _install_grub_bios(tree: Path, disk: Path) -> None:
    """Do what grub-install does, which wants a block device: MBR code, core image in the BIOS boot partition."""
    target = tree / "boot/grub/i386-pc"
    shutil.copytree(GRUB_MODULES / "i386-pc", target)
    run(
        *("grub-mkimage", "--format=i386-pc", f"--output={target / 'core.img'}"),
        *("--prefix=(hd0,gpt2)/boot/grub", "biosdisk", "part_gpt", "ext2"),
    )
    core_start = FIRST_START // SECTOR
    boot = bytearray((target / "boot.img").read_bytes())
    struct.pack_into("<Q", boot, 0x5C, core_start)  # where the MBR finds the core image's first sector
    core = bytearray((target / "core.img").read_bytes())
    struct.pack_into("<Q", core, 0x1F4, core_start + 1)  # and where that sector finds the others
    if len(core) > FIRST_SIZE:
        raise RuntimeError(f"GRUB's core image has {len(core)} bytes, its partition {FIRST_SIZE}")
    _write(disk, 0, bytes(boot[:440]))  # behind it begins the partition table
    _write(disk, FIRST_START, bytes(core))


def _install_grub_uefi(guest: Guest, tree: Path, disk: Path) -> None:
    shutil.copytree(GRUB_MODULES / "x86_64-efi", tree / "boot/grub/x86_64-efi", ignore=_not_a_module)
    stub = disk.with_name("grub.cfg")
    grub = disk.with_name("grubx64.efi")
    esp = f"{disk}@@{FIRST_START}"  # mtools' way of saying: the file system begins here
    mtools = {"MTOOLS_SKIP_CHECK": "1"}
    try:
        stub.write_text(
            f"search.fs_uuid {_root_uuid(guest)} root hd0,gpt2\n"
            "set prefix=($root)'/boot/grub'\n"
            "configfile $prefix/grub.cfg\n"
        )
        run(
            *("grub-mkimage", "--format=x86_64-efi", f"--output={grub}", "--prefix=/EFI/debian"),
            *("part_gpt", "fat", "ext2", "normal", "search", "search_fs_uuid", "configfile", "echo", "linux"),
        )
        run("mformat", "-i", esp, "-F", "-T", str(FIRST_SIZE // SECTOR), "-v", "ESP", "::", env=mtools)
        run("mmd", "-i", esp, "::/EFI", "::/EFI/debian", env=mtools)
        run("mcopy", "-i", esp, grub, stub, "::/EFI/debian/", env=mtools)
        if guest.fallback:
            run("mmd", "-i", esp, "::/EFI/BOOT", env=mtools)
            run("mcopy", "-i", esp, grub, "::/EFI/BOOT/BOOTX64.EFI", env=mtools)
    finally:
        stub.unlink(missing_ok=True)
        grub.unlink(missing_ok=True)


def _not_a_module(_directory: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if not name.endswith((".mod", ".lst"))]


def _write(disk: Path, offset: int, data: bytes) -> None:
    with disk.open("r+b") as image:
        image.seek(offset)
        image.write(data)
