"""What went wrong elsewhere, tried on a guest of RHEL 7's layout whose files are ours: what becomes of it here.

Its dracut is a script of ours, so that the initramfs is our idea of one; what is tried is which devices are which.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.change import FixResult
from hyper2kvmd.guest.inspect import Inspection, inspect
from hyper2kvmd.guest.linux.fix import fix
from hyper2kvmd.guest.options import FixOptions
from hyper2kvmd.guest.session import read_text
from tests.appliance import Workshop
from tests.guests import phony

BASE = "/dev/sda3 / xfs defaults 0 0\nUUID=@sda1@ /boot xfs defaults 0 0\n/dev/sda2 swap swap defaults 0 0\n"
ROOT = "UUID=@sda3@ / xfs defaults 0 0\nUUID=@sda1@ /boot xfs defaults 0 0\nUUID=@sda2@ swap swap defaults 0 0\n"
DATA = "d1f8a2f0-5f4a-4c7e-9e1b-6a6d2f0c7b11"  # the UUID of what is on the data disk
FSTAB = "/etc/fstab"
PATH = "/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:{}:0-part{}"

pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Case:
    """A guest that was repaired. text: fills in UUIDs. files: by path, as they are then, "" if not there."""

    inspection: Inspection
    result: FixResult
    text: Callable[[str], str]
    files: Mapping[str, str]

    @property
    def said(self) -> dict[str, str]:
        """The messages of all warnings, by their codes."""
        return {finding.code: finding.message for finding in (*self.inspection.warnings, *self.result.warnings)}


Try = Callable[..., Case]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A disk of 64 MiB with a GPT and one ext4 file system."""
    path = tmp_path / "data.raw"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["sgdisk", "--new=1:2048:0", path], check=True, capture_output=True)
    make = ["mkfs.ext4", "-q", "-U", DATA, "-E", "offset=1048576", str(path), "60M"]
    subprocess.run(make, check=True, capture_output=True)
    return path


@pytest.fixture
def attempt(shop: Workshop, tmp_path: Path) -> Try:
    """A function that writes files into the guest and repairs it.

    disks: more disks of it. directories: that it has, too. copied: its disk is there twice. prepare: does something to
    the disks first.
    """

    def run(
        files: Mapping[str, str],
        *disks: Path,
        directories: tuple[str, ...] = (),
        copied: bool = False,
        family: str = "rhel7-ready",
        prepare: Callable[[Any], None] = lambda g: None,
    ) -> Case:
        disk = phony.disk(family)
        overlays = [tmp_path / f"{number}.qcow2" for number in range(1 + copied)]
        for overlay in overlays:
            command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(disk.path), "-F", "raw", str(overlay)]
            subprocess.run(command, check=True)
        more = [*((overlay, "qcow2") for overlay in overlays[1:]), *((path, "raw") for path in disks)]
        session = shop.put_in(overlays[0], "qcow2", *more)
        g = session.g
        prepare(g)
        root = "/dev/sda3" if family == "rhel7-ready" else "/dev/rl/root"
        g.mount(root, "/")
        for directory in directories:
            g.mkdir_p(directory)
        for path, text in files.items():
            g.mkdir_p(path.rpartition("/")[0])
            text = text.replace("@sdb@", g.vfs_uuid("/dev/sdb")) if "@sdb@" in text else text
            g.write(path, disk.text(text).encode())
        g.umount_all()
        inspection = inspect(session)
        result = fix(session, inspection, FixOptions())
        for point in sorted(inspection.mounts, key=len):
            g.mount(inspection.mounts[point], point)
        paths = {FSTAB, *files, *(change.path for change in result.changes)}
        return Case(inspection, result, disk.text, {path: read_text(g, path) or "" for path in paths})

    return run


def refusal(attempt: Try, *arguments: object, **options: object) -> MigrationError:
    with pytest.raises(MigrationError) as caught:
        attempt(*arguments, **options)
    return caught.value


# What is there twice ----------------------------------------------------------------------------------------


def test_a_copy_of_the_boot_disk_is_refused_and_both_are_named(attempt: Try) -> None:
    error = refusal(attempt, {FSTAB: BASE}, copied=True)
    assert Code.DEVICE_UNCERTAIN == error.code
    assert "/dev/sda3" in error.message
    assert "/dev/sdb3" in error.message
    assert "leave that disk out of the manifest" in error.hint


@pytest.mark.rest
def test_a_copy_of_a_disk_with_the_volume_group_is_refused(attempt: Try) -> None:
    error = refusal(attempt, {}, copied=True, family="rhel9")
    assert Code.DEVICE_UNCERTAIN == error.code
    assert "/dev/sda" in error.message
    assert "/dev/sdb" in error.message


# What fstab may say -----------------------------------------------------------------------------------------


def test_lines_that_mount_takes_or_passes_over_are_no_reason_to_fail(attempt: Try) -> None:
    lines = (
        "192.0.2.9:/nfs/SH /SH nfs ,nofail,noatime 0 0\n"
        "tmpfs /scratch tmpfs size=1g 0 0 and more\n"
        "# a comment\r\ntmpfs /path#1 tmpfs ,, 0 0\r\nbroken\n"
    )
    case = attempt({FSTAB: BASE + lines})
    assert case.text(ROOT + lines) == case.files[FSTAB]
    assert {"/", "/boot"} == {*case.inspection.mounts}
    assert "disk_order" not in case.said


def test_a_mount_point_with_a_space_is_mounted(attempt: Try, data: Path) -> None:
    line = f"UUID={DATA} /data\\040one ext4 defaults 0 0\n"
    case = attempt({FSTAB: BASE + line}, data, directories=("/data one",))
    assert "/dev/sdb1" == case.inspection.mounts["/data one"]
    assert case.text(ROOT + line) == case.files[FSTAB]


@pytest.mark.rest
def test_a_mount_point_that_is_not_there_is_no_reason_to_fail(attempt: Try, data: Path) -> None:
    case = attempt({FSTAB: f"{BASE}UUID={DATA} /srv/new ext4 defaults 0 0\n"}, data)
    assert "/srv/new" not in case.inspection.mounts
    assert [] == [code for code in case.said if code.startswith("fstab")]


@pytest.mark.rest
def test_a_mount_point_that_is_a_file_is_said_and_no_reason_to_fail(attempt: Try, data: Path) -> None:
    case = attempt({FSTAB: f"{BASE}UUID={DATA} /etc/hostname ext4 defaults 0 0\n"}, data)
    assert {"/", "/boot"} == {*case.inspection.mounts}


def test_addresses_of_two_disks_become_uuids(attempt: Try, data: Path) -> None:
    lines = (
        f"{PATH.format(0, 3)} / xfs defaults 0 0\n{PATH.format(0, 1)} /boot xfs defaults 0 0\n"
        f"{PATH.format(0, 2)} swap swap defaults 0 0\n{PATH.format(1, 1)} /data ext4 defaults 0 0\n"
    )
    case = attempt({FSTAB: lines}, data, directories=("/data",))
    assert case.text(f"{ROOT}UUID={DATA} /data ext4 defaults 0 0\n") == case.files[FSTAB]
    assert "/dev/sdb1" == case.inspection.mounts["/data"]


@pytest.mark.rest
def test_multipath_names_become_uuids(attempt: Try) -> None:
    lines = BASE.replace("/dev/sda", "/dev/mapper/mpatha").replace("UUID=@sda1@", "/dev/mapper/mpatha1")
    case = attempt({FSTAB: lines})
    assert case.text(ROOT) == case.files[FSTAB]


def test_a_boot_partition_that_nobody_can_know_is_refused_with_its_line(attempt: Try, data: Path) -> None:
    lines = BASE.replace("UUID=@sda1@", "/dev/disk/by-id/ata-other-part1") + "/dev/disk/by-id/ata-third-part1 /x ext4\n"
    error = refusal(attempt, {FSTAB: lines}, data)
    assert Code.DEVICE_UNCERTAIN == error.code
    assert "/etc/fstab line 2 mounts /dev/disk/by-id/ata-other-part1 on /boot, which the guest needs" in error.message
    assert "nobody can know which of the disks that is" in error.message


@pytest.mark.rest
def test_a_second_nvme_controller_is_a_disk_like_any_other(attempt: Try, data: Path) -> None:
    case = attempt({FSTAB: f"{BASE}/dev/nvme1n1p1 /logs ext4 defaults 0 0\n"}, data)
    assert case.text(f"{ROOT}UUID={DATA} /logs ext4 defaults 0 0\n") == case.files[FSTAB]


def test_a_mount_unit_is_repaired_and_its_device_is_on_the_list_of_names(attempt: Try, data: Path) -> None:
    unit = "/etc/systemd/system/srv-data.mount"
    case = attempt({FSTAB: BASE, unit: "[Mount]\nWhat=/dev/sdb1\nWhere=/srv/data\nType=ext4\n"}, data)
    assert f"[Mount]\nWhat=/dev/disk/by-uuid/{DATA}\nWhere=/srv/data\nType=ext4\n" == case.files[unit]
    named = {(name.path, name.use): (name.before, name.after, name.device) for name in case.result.names}
    assert ("/dev/sdb1", f"/dev/disk/by-uuid/{DATA}", "/dev/sdb1") == named[unit, "/srv/data"]
    assert ("/dev/sda3", case.text("UUID=@sda3@"), "/dev/sda3") == named[FSTAB, "/"]


# What lies on several disks ---------------------------------------------------------------------------------


def test_a_filter_of_lvm_on_the_old_controller_is_repaired(attempt: Try) -> None:
    config = 'devices {\n\tglobal_filter = [ "a|pci-0000:03.*|", "r|.*|" ]\n}\n'
    case = attempt({"/etc/lvm/lvm.conf": config}, family="rhel9")
    assert config.replace('[ "a|pci', '[ "a|^/dev/vd|", "a|pci') == case.files["/etc/lvm/lvm.conf"]
    assert ["LVM may use /dev/vd*"] == [proof.claim for proof in case.result.proofs if "LVM" in proof.claim]


@pytest.fixture
def empty(tmp_path: Path) -> tuple[Path, Path]:
    """Two empty disks of 128 MiB."""
    paths = tmp_path / "one.raw", tmp_path / "two.raw"
    for path in paths:
        with path.open("wb") as file:
            file.truncate(128 << 20)
    return paths


def test_a_btrfs_on_two_disks_goes_by_its_uuid(attempt: Try, empty: tuple[Path, Path]) -> None:
    def prepare(g: Any) -> None:
        g.mkfs_btrfs(["/dev/sdb", "/dev/sdc"], datatype="raid1", metadata="raid1")

    line = "/dev/sdb /data btrfs defaults,device=/dev/sdb,device=/dev/sdc 0 0\n"
    case = attempt({FSTAB: BASE + line}, *empty, directories=("/data",), prepare=prepare)
    assert {} == {code: said for code, said in case.said.items() if code == "fstab_unresolved"}
    uuid = next(device.uuid for device in case.inspection.filesystems if device.name == "/dev/sdb")
    assert case.text(f"{ROOT}UUID={uuid} /data btrfs defaults 0 0\n") == case.files[FSTAB]
    assert "/dev/sdb" == case.inspection.mounts["/data"]


def test_a_mirror_is_found_by_its_uuid_and_not_by_its_members(attempt: Try, empty: tuple[Path, Path]) -> None:
    def prepare(g: Any) -> None:
        g.md_create("data", ["/dev/sdb", "/dev/sdc"], nrdevices=2, level="raid1")
        g.mkfs("ext4", "/dev/md/data" if "/dev/md/data" in g.list_md_devices() else g.list_md_devices()[0])

    config = "DEVICE /dev/sd[a-z]\nARRAY /dev/md/data level=raid1 UUID=a:b devices=/dev/sdb,/dev/sdc\n"
    files = {FSTAB: f"{BASE}/dev/md/data /data ext4 defaults 0 0\n", "/etc/mdadm.conf": config}
    case = attempt(files, *empty, directories=("/data",), prepare=prepare)
    assert "DEVICE partitions\nARRAY /dev/md/data level=raid1 UUID=a:b\n" == case.files["/etc/mdadm.conf"]
    assert case.text(f"{ROOT}/dev/md/data /data ext4 defaults 0 0\n") == case.files[FSTAB]
    assert "/data" in case.inspection.mounts
    assert [True] == [proof.ok for proof in case.result.proofs if "mdadm" in proof.claim]
