"""How a guest is made: Debian packages plus `overlay/`, written without loop devices into a bootable GPT disk."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import struct
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
OVERLAY = HERE / "overlay"  # copied into every guest as it is
PER_GUEST = HERE / "per-guest"  # files with @PLACES@ to fill in
GRUB_MODULES = Path("/usr/lib/grub")  # the host's grub-pc-bin and grub-efi-amd64-bin

SUITE = "bookworm"
PACKAGES = (
    *("linux-image-amd64", "initramfs-tools", "busybox", "zstd", "kmod", "udev", "systemd-sysv"),
    *("grub2-common", "grub-pc-bin", "grub-efi-amd64-bin", "e2fsprogs", "dosfstools", "mount", "login"),
    *("ifupdown", "iproute2", "open-vm-tools"),
)
# Nothing here is needed by a headless machine; without it the image and every initramfs rebuild are half the size.
LEFT_OUT = (
    *("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"),
    *("/lib/modules/*/kernel/sound/*", "/lib/modules/*/kernel/drivers/gpu/*"),
    *("/lib/modules/*/kernel/drivers/media/*", "/lib/modules/*/kernel/drivers/staging/*"),
    *("/lib/modules/*/kernel/drivers/net/wireless/*", "/lib/modules/*/kernel/drivers/infiniband/*"),
    *("/lib/modules/*/kernel/drivers/iio/*", "/lib/modules/*/kernel/drivers/isdn/*"),
)

MIB = 1 << 20
SECTOR = 512
# The same three partitions on every guest, so that root is /dev/sda2 and swap /dev/sda3 whatever the firmware.
FIRST_START, FIRST_SIZE = 1 * MIB, 64 * MIB
ROOT_START, ROOT_SIZE = 65 * MIB, 1850 * MIB
SWAP_START, SWAP_SIZE = 1915 * MIB, 132 * MIB
DISK_SIZE = 2048 * MIB  # the last MiB holds the backup partition table

BIOS_BOOT, ESP, LINUX, SWAP = "ef02", "ef00", "8300", "8200"


@dataclass(frozen=True)
class Guest:
    name: str
    firmware: str  # "bios" or "uefi"
    fallback: bool = False  # also EFI/BOOT/BOOTX64.EFI, so that it boots without an NVRAM entry

    @property
    def root_uuid(self) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"root.{self.name}"))

    @property
    def swap_uuid(self) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"swap.{self.name}"))


GUESTS = {
    guest.name: guest
    for guest in (
        Guest("debian12-bios", "bios"),
        Guest("debian12-uefi", "uefi"),
        Guest("debian12-uefi-fallback", "uefi", fallback=True),
    )
}


def digest() -> str:
    """Name this version of the recipe: a change to this file or to the files it copies makes new guests."""
    sha = hashlib.sha256()
    for path in [Path(__file__), *sorted(OVERLAY.rglob("*")), *sorted(PER_GUEST.iterdir())]:
        if path.is_file():
            sha.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()[:12]


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a tool; when it fails, raise with the end of what it said."""
    argv = [os.fspath(word) for word in command]
    try:
        subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
            check=True,
        )
    except FileNotFoundError as error:
        raise RuntimeError(f"{argv[0]} is not installed: run 'make deps'") from error
    except subprocess.CalledProcessError as error:
        tail = "\n".join(error.stdout.decode(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"{shlex.join(argv)} ended with {error.returncode}:\n{tail}") from error


def make_rootfs(tarball: Path) -> None:
    """Install Debian with the settings common to all guests into a tarball. Needs root and the Debian archive."""
    if os.geteuid() != 0:
        raise RuntimeError("building a guest needs root (mmdebstrap, file owners): run it with sudo")
    hooks = (
        # not with cp -a: whoever checked the files out must not own them in the guest
        f'cp --recursive --no-target-directory {shlex.quote(str(OVERLAY))} "$1"',
        # a machine that has been running for years has an id; without one every boot would be a first boot
        'echo 5a0f2d0c3b1e4c6f8d7a9e1b2c3d4e5f >"$1/etc/machine-id"',
        'echo root:root | chroot "$1" chpasswd',
        'chroot "$1" systemctl enable --quiet boot-report.service',
        'sed -i "s/^MODULES=.*/MODULES=list/" "$1/etc/initramfs-tools/initramfs.conf"',
        'chroot "$1" update-initramfs -u -k all',
    )
    run(
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar"),
        "--include=" + ",".join(PACKAGES),
        '--aptopt=APT::Install-Recommends "false"',
        *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
        *(f"--customize-hook={hook}" for hook in hooks),
        *(SUITE, tarball),
    )


def make_disk(guest: Guest, rootfs: Path, disk: Path) -> None:
    """Turn the tarball into the raw disk of one guest; work files go beside the disk and are removed."""
    tree = disk.with_name("tree")
    tree.mkdir()
    try:
        run("tar", "--extract", "--numeric-owner", "--xattrs", "--file", rootfs, "--directory", tree)
        _personalise(guest, tree)
        with disk.open("wb") as image:
            image.truncate(DISK_SIZE)
        _partition(guest, disk)
        _make_swap(guest, disk)
        if guest.firmware == "bios":
            _install_grub_bios(tree, disk)
        else:
            _install_grub_uefi(guest, tree, disk)
        run(
            *("mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-U", guest.root_uuid, "-d", tree),
            *("-E", f"offset={ROOT_START},root_owner=0:0", disk, f"{ROOT_SIZE // 1024}k"),
        )
    finally:
        shutil.rmtree(tree)


def _personalise(guest: Guest, tree: Path) -> None:
    (kernel,) = [path.name.removeprefix("vmlinuz-") for path in (tree / "boot").glob("vmlinuz-*")]
    esp = "# /boot/efi was on /dev/sda1 during installation\n"
    esp += "/dev/sda1 /boot/efi       vfat    umask=0077      0       1\n"
    places = {
        "@ROOT_UUID@": guest.root_uuid,
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
        run("mkswap", "--uuid", guest.swap_uuid, area)
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
            f"search.fs_uuid {guest.root_uuid} root hd0,gpt2\n"
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
