"""A real libguestfs appliance on small disks that are made here, and on the project's own guests."""

from __future__ import annotations

import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyper2kvmd import accel
from hyper2kvmd.errors import Cancelled, Code, MigrationError, Outcome
from hyper2kvmd.guest.change import FixResult
from hyper2kvmd.guest.inspect import Inspection, inspect
from hyper2kvmd.guest.linux.fix import fix
from hyper2kvmd.guest.options import FixOptions
from hyper2kvmd.guest.session import Session, open_guest
from hyper2kvmd.run import Tools
from tests.appliance import MEMORY_MB, Workshop
from tests.guests.build import build

pytestmark = pytest.mark.timeout(1800)


def test_what_kvm_is_tried_with_boots_and_ends_by_itself() -> None:
    """Emulated, as there need not be a KVM: a trial that never succeeds would condemn every host."""
    assert "-kernel" in accel.probe("tcg")
    assert 0 == Tools().run(*accel.probe("tcg"), timeout=120).returncode


def raw(path: Path, size: int, *mkfs: str) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    if mkfs:
        subprocess.run([*mkfs, str(path)], check=True, capture_output=True)
    return path


def overlay(base: Path, directory: Path) -> Path:
    path = directory / f"{base.stem}.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(path)]
    subprocess.run(command, check=True)
    return path


def refused(session: Session) -> MigrationError:
    with pytest.raises(MigrationError) as caught:
        inspect(session)
    return caught.value


def appliances(disk: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(disk).encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_disks_without_a_system_are_unknown_and_say_what_is_on_them(tmp_path: Path, accelerator: str) -> None:
    empty = raw(tmp_path / "empty.raw", 4 << 20)
    data = raw(tmp_path / "data.raw", 16 << 20, "mkfs.ext4", "-q")
    disks = [(empty, "raw"), (data, "raw")]
    with (
        pytest.raises(MigrationError) as caught,
        open_guest(disks, accel=accelerator, memory_mb=MEMORY_MB, tools=Tools()) as session,
    ):
        error = refused(session)
        # And while there is an appliance: a file that not even root may change.
        session.g.mount("/dev/sdb", "/")
        session.g.write("/fstab", "")
        session.g.set_e2attrs("/fstab", "i")
        session.g.write("/fstab", "/dev/vda1 / ext4\n")
    assert error.code is Code.OS_UNKNOWN
    assert "/dev/sda unknown, /dev/sdb ext4" in error.message
    assert "/fstab" in caught.value.message
    assert "chattr -i" in caught.value.hint


def test_encrypted_disk_is_said_to_be_encrypted_and_nobody_is_asked(tmp_path: Path, shop: Workshop) -> None:
    disk = raw(tmp_path / "luks.raw", 32 << 20)
    header = bytearray(592)  # of LUKS 1: what blkid reads of it
    header[:8] = b"LUKS\xba\xbe\x00\x01"
    header[168:204] = b"0f2c1f5e-7b1d-4c39-9a53-0c1f7f5b6a11"
    with disk.open("r+b") as file:
        file.write(header)
    error = refused(shop.put_in(disk, "raw"))
    assert error.code is Code.GUEST_ENCRYPTED
    assert "/dev/sda" in error.message


def test_hibernated_guest_is_refused(tmp_path: Path, shop: Workshop) -> None:
    disk = raw(tmp_path / "swap.raw", 16 << 20, "mkswap")
    with disk.open("r+b") as file:
        file.seek(4096 - 10)
        file.write(b"S1SUSPEND\0")
    error = refused(shop.put_in(disk, "raw"))
    assert error.code is Code.GUEST_DIRTY
    assert "hibernated" in error.message


@pytest.mark.parametrize("seconds", [0.5, 3.0, None], ids=["at-the-start", "while-it-boots", "while-it-works"])
def test_cancel_ends_the_appliance_at_once(tmp_path: Path, accelerator: str, seconds: float | None) -> None:
    disk = raw(tmp_path / "disk.raw", 64 << 20)
    cancel = threading.Event()
    cancelled_at = []

    def set_cancel() -> None:
        cancelled_at.append(time.monotonic())
        cancel.set()

    if seconds is not None:
        threading.Timer(seconds, set_cancel).start()
    with (
        pytest.raises(Cancelled),
        open_guest([(disk, "raw")], accel=accelerator, memory_mb=MEMORY_MB, tools=Tools(cancel=cancel)) as session,
    ):
        threading.Timer(0.5, set_cancel).start()
        session.g.debug("sh", ["sleep", "60"])
    assert time.monotonic() - cancelled_at[0] < 50, "as long as it sleeps"
    assert appliances(disk) == []


def test_an_appliance_that_does_not_start_in_time_is_ended_and_tried_again_later(
    tmp_path: Path, accelerator: str
) -> None:
    disk = raw(tmp_path / "disk.raw", 1 << 20)
    with (
        pytest.raises(MigrationError) as caught,
        open_guest([(disk, "raw")], accel=accelerator, memory_mb=MEMORY_MB, tools=Tools(), launch_seconds=0.5),
    ):
        pass
    assert "the libguestfs appliance did not start: it took longer than 0.5 s" == caught.value.message
    assert (Code.APPLIANCE_FAILED, Outcome.RETRY) == (caught.value.code, caught.value.outcome)
    assert appliances(disk) == []


def test_appliance_that_cannot_start_says_why(tmp_path: Path, accelerator: str) -> None:
    disk = tmp_path / "garbage.qcow2"
    disk.write_bytes(b"no qcow2")
    with (
        pytest.raises(MigrationError) as caught,
        open_guest([(disk, "qcow2")], accel=accelerator, memory_mb=MEMORY_MB, tools=Tools()),
    ):
        pass
    assert caught.value.code is Code.APPLIANCE_FAILED
    assert "not in qcow2 format" in caught.value.tail
    assert appliances(disk) == []


def repair(session: Session) -> tuple[Inspection, FixResult]:
    inspection = inspect(session)
    return inspection, fix(session, inspection, FixOptions())


def tree_of(directory: Path) -> Path:
    """What libguestfs takes for a system."""
    files = {
        "etc/fstab": "/dev/sda1 / xfs defaults 0 0\n",
        "etc/os-release": 'ID=rocky\nVERSION_ID="9.4"\nPRETTY_NAME="Rocky Linux 9.4 (Blue Onyx)"\n',
        "usr/bin/dracut": "",
        "boot/grub2/grub.cfg": "",
        "bin/sh": "",
    }
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def crc32c(data: bytes) -> int:
    """The checksum of file systems' superblocks."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


FUTURE = 1 << 30  # a feature that no kernel knows


def set_feature(disk: Path, kind: str) -> None:
    """Have a file system use a feature, with the checksum of its superblock right."""
    start, length, offset, order, sums = {
        "ext4": (1024, 1024, 96, "<", None),
        "ext4, for writing": (1024, 1024, 100, "<", None),
        "xfs": (0, 512, 216, ">", 224),
        "btrfs": (65536, 4096, 188, "<", 0),
    }[kind]
    with disk.open("r+b") as file:
        file.seek(start)
        block = bytearray(file.read(length))
        (features,) = struct.unpack_from(f"{order}I", block, offset)
        struct.pack_into(f"{order}I", block, offset, features | FUTURE)
        if sums is not None:
            struct.pack_into("<I", block, sums, 0)
            struct.pack_into("<I", block, sums, crc32c(bytes(block[32:] if kind == "btrfs" else block)))
        file.seek(start)
        file.write(block)


def system(directory: Path, kind: str) -> Path:
    """A file system with a system on it, but for xfs, which cannot be made with files."""
    tree = str(tree_of(directory / "tree"))
    mkfs = {
        "ext4": ("mkfs.ext4", "-q", "-O", "^metadata_csum", "-d", tree),
        "xfs": ("mkfs.xfs", "-q"),
        "btrfs": ("mkfs.btrfs", "-q", "--rootdir", tree),
    }
    return raw(directory / "disk.raw", 320 << 20, *mkfs[kind])


@pytest.mark.parametrize("kind", ["ext4", "ext4, for writing", "xfs", "btrfs"])
def test_a_file_system_newer_than_the_appliance_is_not_sent_to_fsck(kind: str, tmp_path: Path, shop: Workshop) -> None:
    """Some say that they may still be read: then the system is found, and cannot be repaired."""
    disk = system(tmp_path, kind.partition(",")[0])
    set_feature(disk, kind)
    error = refused(shop.put_in(disk, "raw"))
    assert error.code is Code.APPLIANCE_TOO_OLD
    assert error.outcome is Outcome.BLOCKED
    assert f"{kind.partition(',')[0]} on" in error.message
    assert "feature" in error.message
    assert "install a newer one" in error.hint
    assert "fsck" not in str(error)


def test_a_damaged_file_system_is_sent_to_fsck_and_not_called_new(tmp_path: Path, shop: Workshop) -> None:
    disk = system(tmp_path, "ext4")
    with disk.open("r+b") as file:
        file.seek(1024 + 58)
        file.write(b"\x03\x00")  # it is clean, and has errors
    error = refused(shop.put_in(disk, "raw"))
    assert error.code is Code.GUEST_DIRTY
    assert "fsck" in error.hint


def test_a_btrfs_that_lacks_a_disk_is_not_sent_to_fsck(tmp_path: Path, shop: Workshop) -> None:
    tree = tree_of(tmp_path / "tree")
    uuid = "0f2c1f5e-7b1d-4c39-9a53-0c1f7f5b6a11"
    (tree / "etc/fstab").write_text(f"/dev/sda / ext4 defaults 0 0\nUUID={uuid} /var btrfs defaults 0 0\n")
    (tree / "var").mkdir()
    root = raw(tmp_path / "root.raw", 32 << 20, "mkfs.ext4", "-q", "-d", str(tree))
    other = raw(tmp_path / "other.raw", 200 << 20)
    data = raw(tmp_path / "data.raw", 200 << 20, "mkfs.btrfs", "-q", "-U", uuid, "-d", "raid0", str(other))
    error = refused(shop.put_in(root, "raw", (data, "raw")))
    assert error.code is Code.GUEST_DIRTY
    assert "/var on /dev/sdb cannot be used: a device of it is missing" in error.message
    assert "all disks" in error.hint


def test_guest_whose_boot_menu_names_no_kernel_is_refused_with_the_remedy(tmp_path: Path, shop: Workshop) -> None:
    tree = tree_of(tmp_path / "tree")
    disk = raw(tmp_path / "rocky.raw", 32 << 20, "mkfs.ext4", "-q", "-d", str(tree))
    with pytest.raises(MigrationError) as caught:
        repair(shop.put_in(overlay(disk, tmp_path), "qcow2"))
    assert caught.value.code is Code.OS_UNSUPPORTED
    assert caught.value.outcome is Outcome.BLOCKED
    assert "Rocky Linux 9.4" in caught.value.message
    assert "dracut" in caught.value.message
    assert "fix.enabled" in caught.value.hint


def test_guest_without_room_for_a_new_initramfs_is_refused_before_anything_is_edited(
    bios_guest: Path, shop: Workshop
) -> None:
    session = shop.put_in(bios_guest, "qcow2")
    inspection = inspect(session)
    free = session.g.statvfs("/")
    session.g.fallocate64("/filler", free["bavail"] * free["frsize"] - (8 << 20))
    before = session.g.read_file("/etc/fstab")
    with pytest.raises(MigrationError) as caught:
        fix(session, inspection, FixOptions())
    assert caught.value.code is Code.GUEST_SPACE
    assert before == session.g.read_file("/etc/fstab")


@pytest.fixture
def bios_guest(tmp_path: Path) -> Iterator[Path]:
    path = overlay(build("debian12-bios"), tmp_path)
    yield path
    path.unlink()


@pytest.mark.rest
@pytest.mark.timeout(1800)
def test_vmware_guest_is_repaired_once_and_then_left_alone(bios_guest: Path, shop: Workshop) -> None:
    found, result = repair(shop.put_in(bios_guest, "qcow2"))
    assert (found.os_type, found.distro, found.firmware, found.boot_disk) == ("linux", "debian", "bios", 0)
    assert (found.bootloader, found.initramfs) == ("grub2", "initramfs-tools")
    assert {"virtio_pci", "virtio_blk"} <= set(result.drivers_injected)
    assert result.boot_updated
    assert "/etc/fstab" in [change.path for change in result.changes]

    _, again = repair(shop.put_in(bios_guest, "qcow2"))
    assert again.changes == ()
    assert again.proofs == result.proofs
