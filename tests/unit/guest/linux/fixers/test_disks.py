"""Names of disks in the guest's settings: what becomes of those that the old hardware gave."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hyper2kvmd.domain.model import DiskBus
from hyper2kvmd.guest.linux import menu, names
from hyper2kvmd.guest.linux.devices import Device, Names
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.fixers.disks import crypttab, fstab, lvm, raid, rules
from hyper2kvmd.guest.linux.kernels import Image, Kernel
from tests.pace import work_of_at_most
from tests.unit.guest.linux.fixers.test_configuration import Guest, applied

SDA = (
    Device("/dev/sda", disk="/dev/sda"),
    Device("/dev/sda1", "xfs", "boot", part_uuid="p1", disk="/dev/sda"),
    Device("/dev/sda2", "swap", "swap", part_uuid="p2", disk="/dev/sda"),
    Device("/dev/sda3", "xfs", "root", part_uuid="p3", disk="/dev/sda"),
)
SDB = (
    Device("/dev/sdb", disk="/dev/sdb"),
    Device("/dev/sdb1", "ext4", "data", part_uuid="q1", disk="/dev/sdb"),
    Device("/dev/sdb2", "xfs_external_log", part_uuid="q2", disk="/dev/sdb"),
)
ROOT = "/dev/sda3 / xfs defaults 0 0\n"


def view(files: Mapping[str, str] | Guest, *devices: Device, locked: tuple[str, ...] = ()) -> View:
    """A guest with these files and devices, whose root is the third partition of the first disk."""
    guest = files if isinstance(files, Guest) else Guest(files)
    devices = devices or (*SDA, *SDB)
    by_name = {device.name: device for device in devices}
    disks = list(dict.fromkeys(device.disk for device in devices if device.disk))
    inspection: Any = SimpleNamespace(root="/dev/sda3", locked=locked, disks=tuple(disks), menu=None, firmware="bios")
    read = View(guest, inspection, Names({}, {})).read
    inspection.menu = menu.read(read, guest.glob_expand)
    known = names.known(read, guest.glob_expand, inspection.menu, disks, by_name, "/dev/sda3")
    return View(guest, inspection, known.names)


def table(text: str, *devices: Device, locked: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """/etc/fstab after the fix without its first line, which is the root's, and the warnings."""
    guest = view({"/etc/fstab": ROOT + text}, *devices, locked=locked)
    plan = fstab.plan(guest)
    new = applied(Guest({"/etc/fstab": ROOT + text}), plan).files["/etc/fstab"]
    assert new.startswith("UUID=root / xfs defaults 0 0\n")
    again = fstab.plan(view({"/etc/fstab": new}, *devices, locked=locked))
    assert () == again.edits, "what is repaired is left alone"
    return new.partition("\n")[2], [finding.message for finding in plan.warnings]


@pytest.mark.parametrize(
    "line",
    [
        ".host:/ /mnt/hgfs fuse.vmhgfs-fuse defaults,allow_other 0 0",
        "vmhgfs-fuse /mnt/hgfs fuse defaults 0 0",
        "shared /mnt/shared vboxsf defaults 0 0",
        "/dev/sr0 /mnt/repo iso9660 ro 0 0",
        "/dev/cdrom /mnt/repo iso9660 ro 0 0",
        "/dev/fd0 /mnt/floppy auto rw 0 0",
    ],
)
def test_what_the_new_machine_certainly_lacks_does_not_stop_the_boot(line: str) -> None:
    fields = line.split(" ")
    fields[3] += ",nofail"
    new, (warning,) = table(line + "\n")
    assert " ".join(fields) + "\n" == new
    assert f"/etc/fstab line 2 mounts {fields[0]} on {fields[1]}: the " in warning


@pytest.mark.parametrize(
    "line",
    [
        "/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0",
        "192.0.2.9:/nfs/SH /SH nfs ,nofail,noatime 0 0",
        "//filer/share /srv cifs credentials=/root/x 0 0",
        "tmpfs /tmp tmpfs size=1g 0 0",
        "/srv/a /srv/b none bind 0 0",
        "/dev/mapper/cryptswap none swap sw 0 0",
        "/dev/loop0 /mnt/loop ext4 loop 0 0",
        "UUID=data /data ext4 ,defaults 0 0 a seventh field",
    ],
)
def test_what_no_hardware_named_stays_as_it_is(line: str) -> None:
    assert (f"{line}\n", []) == table(line + "\n")


@pytest.mark.parametrize(
    "spec", ["/dev/sdb1", "/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:1:0-part1",
             "/dev/disk/by-id/wwn-0x6000c29-part1",
             "/dev/mapper/mpathb1", "/dev/mapper/mpathbp1", "/dev/mapper/36000c29d5e8a4b7c1f3e2d1c0b9a8f7e-part1",
             "/dev/nvme0n1p1", "/dev/cciss/c0d1p1", "/dev/disk/azure/scsi1/lun0-part1"]
)  # fmt: skip
def test_one_disk_that_is_left_over_is_the_one_name_that_is_left_over(spec: str) -> None:
    assert ("UUID=data /data ext4 defaults 0 0\n", []) == table(f"{spec} /data ext4 defaults 0 0\n")


def test_two_names_for_one_disk_that_is_left_over_are_uncertain_and_said_to_be() -> None:
    text = "/dev/nvme0n1p1 /logs ext4 defaults 0 0\n/dev/nvme1n1p1 /data ext4 defaults 0 0\n"
    new, warnings = table(text)
    assert text.replace("defaults", "defaults,nofail") == new
    assert 2 == len(warnings)
    assert all(warning.endswith("nobody can know which disk that is") for warning in warnings)


def test_a_position_where_something_else_lies_is_not_taken() -> None:
    new, (warning,) = table("/dev/sdb1 none swap sw 0 0\n")
    assert "/dev/sdb1 none swap sw,nofail 0 0\n" == new
    assert warning.endswith("by its place it would be /dev/sdb1, which is no swap but ext4")


@pytest.mark.parametrize(
    "line",
    [
        "/dev/nvme0n1p1 /data xfs defaults 0 0",  # sda1, which is /boot
        "/dev/nvme0n1 /data xfs defaults 0 0",  # sda, which is a whole disk with partitions
        "/dev/xvda2 /data ext4 defaults 0 0",  # sda2, which is swap
        "/dev/hda9 /data ext4 defaults 0 0",  # not there
    ],
)
def test_positions_that_mean_what_they_cannot_mean_are_not_those_of_these_disks(line: str) -> None:
    text = f"UUID=root / xfs defaults 0 0\nUUID=boot /boot xfs defaults 0 0\n{line}\n"
    (edit,) = fstab.plan(view({"/etc/fstab": text})).edits
    assert text.replace(line, line.replace("defaults", "defaults,nofail")) == edit.after


@pytest.mark.parametrize(
    "drive",
    [
        "/dev/hdc /media/cdrom0 udf,iso9660 user,noauto 0 0",
        "/dev/hdc /media/cdrom auto pamconsole,exec,noauto,managed 0 0",
        "/dev/hda /media/dvdrecorder auto noauto,user 0 0",
        "/dev/hda /cdrom iso9660 ro,noauto 0 0",
    ],
)
def test_a_drive_of_cds_on_an_ide_controller_is_no_disk(drive: str) -> None:
    text = (
        f"UUID=root / xfs defaults 0 0\n/dev/sda1 /boot xfs defaults 0 0\n/dev/sdb1 /data ext4 defaults 0 0\n{drive}\n"
    )
    (edit,) = fstab.plan(view({"/etc/fstab": text})).edits
    assert text.replace("/dev/sda1", "UUID=boot").replace("/dev/sdb1", "UUID=data") == edit.after


@pytest.mark.parametrize("driver", ["ntfs", "ntfs-3g", "ntfs3"])
def test_a_file_system_of_windows_is_one_by_every_name_of_its_drivers(driver: str) -> None:
    device = Device("/dev/sdb1", "ntfs", "data", disk="/dev/sdb")
    assert (f"UUID=data /data {driver} defaults 0 0\n", []) == table(
        f"/dev/sdb1 /data {driver} defaults 0 0\n", *SDA, Device("/dev/sdb", disk="/dev/sdb"), device
    )


@pytest.mark.parametrize("path", ["/etc/sysconfig/oracleasm", "/etc/sysconfig/rawdevices"])
def test_a_file_of_blank_lines_does_not_keep_us_busy(path: str) -> None:
    with work_of_at_most(5):
        assert () == rules.plan(view({path: " \n" * (1 << 19)}), "virtio").warnings


VOLUME = Device("/dev/vg/root", "xfs", "lv", aliases=("/dev/mapper/vg-root",))
BOOT = (
    Device("/dev/sda", disk="/dev/sda"),
    Device("/dev/sda1", "ext3", "boot", part_uuid="p1", disk="/dev/sda"),
    Device("/dev/sda2", "LVM2_member", "pv1", part_uuid="p2", disk="/dev/sda"),
    VOLUME,
)
GREW = (*BOOT, Device("/dev/sdb", "LVM2_member", "pv2", disk="/dev/sdb"))  # a group that got a second disk
BY_ID = "/dev/disk/by-id/scsi-36000c29f00aa-part1"


@pytest.mark.parametrize(
    "spec", [BY_ID, "/dev/disk/by-path/pci-0000:00:10.0-scsi-0:0:0:0-part1", "/dev/mapper/mpatha1", "/dev/sda1"]
)
def test_what_the_guest_needs_is_on_the_disk_that_has_it(spec: str) -> None:
    text = "/dev/vg/root / xfs defaults 1 1\n{} /boot ext3 acl 1 2\n"
    plan = fstab.plan(view({"/etc/fstab": text.format(spec)}, *GREW))
    assert [text.format("UUID=boot")] == [edit.after for edit in plan.edits]


@pytest.mark.parametrize(
    ("where", "other"),
    [
        ("/boot", Device("/dev/sdb1", "ext3", "old", part_uuid="q1", disk="/dev/sdb")),  # it may be either
        (
            "/data",
            Device("/dev/sdb1", "LVM2_member", "pv2", part_uuid="q1", disk="/dev/sdb"),
        ),  # its disk may be missing
        ("/boot", None),
    ],
)
def test_what_could_be_elsewhere_is_not_taken_for_the_one_that_is_there(where: str, other: Device | None) -> None:
    more = [other] if other else []
    devices = [one for one in BOOT if other or one.name != "/dev/sda1"]
    text = f"/dev/vg/root / xfs defaults 1 1\n{BY_ID} {where} ext3 acl 1 2\n"
    plan = fstab.plan(view({"/etc/fstab": text}, *devices, Device("/dev/sdb", disk="/dev/sdb"), *more))
    assert [text.replace("acl", "acl,nofail")] == [edit.after for edit in plan.edits]


def test_a_disk_that_was_not_exported_is_said_to_be_missing() -> None:
    new, (warning,) = table("/dev/sdc1 /backup ext4 defaults 0 2\n")
    assert "/dev/sdc1 /backup ext4 defaults,nofail 0 2\n" == new
    assert warning.endswith("on /backup: no disk of this export has that device")


def test_members_of_a_btrfs_find_each_other() -> None:
    members = (
        Device("/dev/sdb", "btrfs", "pool", member="one", disk="/dev/sdb"),
        Device("/dev/sdc", "btrfs", "pool", member="two", disk="/dev/sdc"),
    )
    line = "/dev/sdb /data btrfs defaults,device=/dev/sdb,device=/dev/sdc,compress=zstd 0 0\n"
    assert ("UUID=pool /data btrfs defaults,compress=zstd 0 0\n", []) == table(line, *SDA, *members)
    only = "/dev/sdb /data btrfs device=/dev/sdb,device=/dev/sdc 0 0\n"
    assert ("UUID=pool /data btrfs defaults 0 0\n", []) == table(only, *SDA, *members)


def test_a_copy_of_a_btrfs_member_is_a_twin() -> None:
    twins = tuple(Device(f"/dev/{name}", "btrfs", "pool", member="one", disk=f"/dev/{name}") for name in ("sdb", "sdc"))
    new, (warning,) = table("/dev/sdb /data btrfs defaults 0 0\n", *SDA, *twins)
    assert "/dev/sdb /data btrfs defaults,nofail 0 0\n" == new
    assert warning.endswith("/dev/sdb has no identifier that no other device has")


def test_a_log_on_another_partition_is_named_by_its_own_identifier() -> None:
    new, _ = table("/dev/sdb1 /data xfs logdev=/dev/sdb2 0 0\n", *SDA, Device("/dev/sdb", disk="/dev/sdb"),
                   Device("/dev/sdb1", "xfs", "data", part_uuid="q1", disk="/dev/sdb"), SDB[2])  # fmt: skip
    assert "UUID=data /data xfs logdev=/dev/disk/by-partuuid/q2 0 0\n" == new


def test_a_journal_that_is_on_no_disk_does_not_stop_the_boot() -> None:
    new, (warning,) = table("UUID=data /data ext4 journal_path=/dev/sdz1 0 0\n")
    assert "UUID=data /data ext4 journal_path=/dev/sdz1,nofail 0 0\n" == new
    assert "journal_path is /dev/sdz1" in warning


def test_an_identifier_that_two_devices_have_is_not_written() -> None:
    copies = (Device("/dev/sdb1", "xfs", "boot", part_uuid="q1", disk="/dev/sdb"), Device("/dev/sdb", disk="/dev/sdb"))
    assert "PARTUUID=p1 /boot xfs defaults 0 0\n" == table("/dev/sda1 /boot xfs defaults 0 0\n", *SDA, *copies)[0]


def test_escapes_and_line_ends_of_another_system_are_read_and_kept() -> None:
    text = "/dev/sdb1 /data\\040one ext4 defaults 0 0\r\n"
    guest = view({"/etc/fstab": ROOT + text})
    (edit,) = fstab.plan(guest).edits
    assert "UUID=data /data\\040one ext4 defaults 0 0\r\n" in (edit.after or "")
    (_, name) = fstab.plan(guest).names
    assert (2, "/data one", "/dev/sdb1") == (name.line, name.use, name.device)


def test_what_lies_in_a_locked_container_is_not_said_to_be_missing() -> None:
    line = "UUID=inside /secret ext4 defaults 0 0\n"
    assert (line, []) == table(line, locked=("/dev/sdb2",))


# Units ------------------------------------------------------------------------------------------------------

UNIT = "[Unit]\nDescription=Data\n\n[Mount]\nWhat={}\nWhere=/srv/data\nType=ext4\nOptions=noatime\n"
DIRECTORY = "/etc/systemd/system"


class Escaping(Guest):
    """A guest in which a backslash in a glob takes the meaning of what follows it, as it does in the appliance."""

    def glob_expand(self, pattern: str) -> list[str]:
        return super().glob_expand(re.sub(r"\\(.)", r"\1", pattern))


REQUIRED = {f"{DIRECTORY}/local-fs.target.requires/srv-data.mount": "../srv-data.mount"}


@pytest.mark.parametrize(
    "spec", ["/dev/sdb1", "/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:1:0-part1", "/dev/mapper/mpathb1"]
)
def test_a_mount_unit_is_repaired_as_fstab_is(spec: str) -> None:
    path = f"{DIRECTORY}/srv-data.mount"
    plan = fstab.plan(view({"/etc/fstab": ROOT, path: UNIT.format(spec)}))
    assert UNIT.format("/dev/disk/by-uuid/data") in [edit.after for edit in plan.edits]
    assert () == plan.warnings


@pytest.mark.parametrize(
    ("unit", "spec"),
    [
        ("dev-sda2", "/dev/sda2"),
        (r"dev-disk-by\x2dpath-pci\x2d0000:03:00.0\x2dscsi\x2d0:0:0:0\x2dpart2",
         "/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part2"),
        ("dev-mapper-mpatha2", "/dev/mapper/mpatha2"),
    ],
)  # fmt: skip
def test_a_swap_unit_is_called_after_its_device_and_still_started(unit: str, spec: str) -> None:
    path, link = f"{DIRECTORY}/{unit}.swap", f"{DIRECTORY}/swap.target.wants/{unit}.swap"
    before = Escaping({"/etc/fstab": "UUID=root / xfs\n", path: f"[Swap]\nWhat={spec}\n"}, links={link: path})
    plan = fstab.plan(view(before, *SDA))
    new = rf"{DIRECTORY}/dev-disk-by\x2duuid-swap.swap"
    after = applied(before, plan).files
    assert ("[Swap]\nWhat=/dev/disk/by-uuid/swap\n", False) == (after[new], path in after)
    (command,) = plan.commands
    assert f"ln -sf '{new}' {DIRECTORY}/swap.target.wants/ && rm " in command.command
    assert link in command.command
    assert FixPlan() == replace(fstab.plan(view(Escaping(after), *SDA)), names=())


def test_two_swap_units_of_one_device_become_one() -> None:
    units = {
        f"{DIRECTORY}/dev-mapper-{name}.swap": f"[Swap]\nWhat=/dev/mapper/{name}\n"
        for name in ("mpatha2", "mpatha-part2")
    }
    edits = fstab.plan(view({"/etc/fstab": "UUID=root / xfs\n", **units}, *SDA)).edits
    assert {*units, rf"{DIRECTORY}/dev-disk-by\x2duuid-swap.swap"} == {edit.path for edit in edits}
    assert 3 == len(edits)


@pytest.mark.parametrize("key", ["Requires", "After", "BindsTo"])
def test_a_mount_unit_waits_for_the_device_that_it_mounts(key: str) -> None:
    unit = f"[Unit]\n{key}=other.service {{0}}.device\nBefore=dev-sdb10.device\n[Mount]\nWhat={{1}}\nWhere=/srv/data\n"
    path = f"{DIRECTORY}/srv-data.mount"
    plan = fstab.plan(view({"/etc/fstab": ROOT, path: unit.format("dev-sdb1", "/dev/sdb1")}))
    assert unit.format(r"dev-disk-by\x2duuid-data", "/dev/disk/by-uuid/data") in [edit.after for edit in plan.edits]


def test_a_unit_whose_name_has_a_hyphen_is_no_longer_required_either() -> None:
    path = rf"{DIRECTORY}/srv-my\x2ddata.mount"
    link = rf"{DIRECTORY}/local-fs.target.requires/srv-my\x2ddata.mount"
    guest = Escaping({"/etc/fstab": ROOT, path: UNIT.format("/dev/sdc1")}, links={link: path})
    (command,) = fstab.plan(view(guest)).commands
    assert f"mv '{link}' " in command.command


@pytest.mark.parametrize("what", ["/dev/sdc1", "/dev/sr0", "UUID=gone"])
def test_a_unit_of_what_is_not_there_is_no_longer_required(what: str) -> None:
    guest = Guest({"/etc/fstab": ROOT, f"{DIRECTORY}/srv-data.mount": UNIT.format(what)}, links=REQUIRED)
    plan = fstab.plan(view(guest))
    (command,) = plan.commands
    link, wants = (f"{DIRECTORY}/local-fs.target.{kind}" for kind in ("requires/srv-data.mount", "wants"))
    assert f"mkdir -p {wants} && mv {link} {wants}/" == command.command
    assert [f"{DIRECTORY}/srv-data.mount in the guest mounts {what} on /srv/data"] == [
        finding.message.partition(":")[0] for finding in plan.warnings
    ]


# crypttab ---------------------------------------------------------------------------------------------------


def test_a_container_on_no_disk_does_not_stop_the_boot() -> None:
    text = "data /dev/sdc1 none luks\nmore UUID=gone\nhere UUID=data none luks\n"
    plan = crypttab.plan(view({"/etc/fstab": ROOT, "/etc/crypttab": text}))
    assert (
        "data /dev/sdc1 none luks,nofail\nmore UUID=gone none nofail\nhere UUID=data none luks\n" == plan.edits[0].after
    )
    assert ["line 1", "line 2"] == [finding.message[14:20] for finding in plan.warnings]


# LVM --------------------------------------------------------------------------------------------------------

PV = Device("/dev/sda3", "LVM2_member", "pv", disk="/dev/sda")
SYSTEM_DEVICES = """\
# LVM uses devices listed in this file.
# Created by LVM command pvcreate pid 812 at Mon Jan  1 10:00:00 2024
VERSION=1.1.2
IDTYPE=sys_wwid IDNAME=naa.6000c29f00 DEVNAME=/dev/sda3 PVID=q0 PART=3
IDTYPE=md_uuid IDNAME=aa:bb DEVNAME=/dev/md0 PVID=q1
IDTYPE=devname IDNAME=/dev/sdb DEVNAME=/dev/sdb PVID=q2
"""


def test_lvms_list_of_devices_goes_if_the_hardware_is_in_it() -> None:
    assert ["naa.6000c29f00", "/dev/sdb"] == lvm.changing_ids(SYSTEM_DEVICES)
    guest = Guest({lvm.SYSTEM_DEVICES: SYSTEM_DEVICES, "/etc/lvm/cache/.cache": 'valid_devices=[ "/dev/sda3" ]'})
    plan = lvm.plan(view(guest, PV), "virtio")
    assert [(lvm.SYSTEM_DEVICES, None), ("/etc/lvm/cache/.cache", None)] == [(e.path, e.after) for e in plan.edits]
    assert FixPlan() == lvm.plan(view(applied(guest, plan), PV), "virtio")


def test_lvms_list_of_devices_stays_if_the_content_is_in_it() -> None:
    text = (
        "VERSION=1.1.1\nIDTYPE=md_uuid IDNAME=aa DEVNAME=/dev/md0\nIDTYPE=crypt_uuid IDNAME=CRYPT-LUKS2-x\n#IDTYPE=x\n"
    )
    guest = Guest({lvm.SYSTEM_DEVICES: text, "/etc/blkid.tab": "<device>/dev/dm-0</device>"})
    assert FixPlan() == lvm.plan(view(guest, PV), "virtio")


FILTERS = [
    ('filter = [ "a|/dev/sda.*|", "r|.*|" ]', True),
    ('\tglobal_filter = [ "a|^/dev/sd|",\n   "r|.*|" ]', True),
    ('global_filter = [ "a|pci-0000:03.*|", "r|.*|" ]', True),
    ('filter = [ "a|/dev/disk/by-path/pci.*|", "r/.*/" ]', True),
    ('filter = [ "a|/dev/[sh]d[a-z]|", "r|.*|" ]', True),
    ('filter = [ "r|/dev/vd.*|" ]', True),
    ('filter = "r|.*|"', True),
    ('filter = [ "a#^/dev/sda#", "r#.*#" ]  # the "new" one', True),
    ('devices { global_filter = [ "a|^/dev/sd|", "r|.*|" ] }', True),
    ('devices { global_filter = [ "a|^/dev/vd|", "r|.*|" ] }', False),
    ('# filter = [ "r|.*|" ]', False),
    ('filter = [ "r|^/dev/[^s].*|" ]', True),
    ('filter = [ "a|^/dev/sd|", "r|^/dev/[a-z]+|" ]', True),
    ('filter = [ "r|/dev/(fd|sr|v).*|" ]', True),
    ('filter = [ "r|/dev/[fc]d.*|", "r|/dev/(drbd|loop|sr)|", "r|cdrom|", "r|/dev/mapper/.*-snap|" ]', False),
    ('filter = [ "r|/dev/vdb|" ]', False),  # the administrator's
    ('filter = [ "a|/dev/vda|", "r|.*|" ]', True),  # one of the new disks is not all of them
    ('filter = [ "a|/dev/[sv]d.*|", "r|.*|" ]', False),
    ('filter = [ "a|/dev/sda|", "a|.*|", "r|.*|" ]', False),
    ('filter = [ "r|/dev/cdrom|" ]', False),
    ('filter = [ "a/.*/" ]', False),
    ('sysfs_filter = [ "r|.*|" ]', False),
    ("filter = [ ", False),
    ("filter = [" + '"r|' * 20000, False),
]


@pytest.mark.parametrize(("text", "hidden"), FILTERS)
def test_a_filter_of_lvm_that_hides_the_new_disks_accepts_them_afterwards(text: str, hidden: bool) -> None:
    guest = Guest({"/etc/lvm/lvm.conf": f"devices {{\n{text}\n}}\n"})
    looked = view(guest, PV)
    assert hidden == (not all(proof.ok for proof in lvm.prove(looked, "virtio", ())))
    plan = lvm.plan(looked, "virtio")
    assert hidden == bool(plan.edits)
    repaired = view(applied(guest, plan), PV)
    assert all(proof.ok for proof in lvm.prove(repaired, "virtio", ()))
    assert FixPlan() == lvm.plan(repaired, "virtio")


def test_the_rest_of_a_filter_stays() -> None:
    text = 'devices {\n filter = [ "a|sda|",  # ours\n "r|.*|" ]\n global_filter = "r|.*|"\n}\n'
    plan = lvm.plan(view({"/etc/lvm/lvm.conf": text}, PV), "virtio")
    assert (
        'devices {\n filter = [ "a|^/dev/vd|", "a|sda|",  # ours\n "r|.*|" ]\n'
        ' global_filter = [ "a|^/dev/vd|", "r|.*|" ]\n}\n'
    ) == plan.edits[0].after


def image(**texts: str) -> Image:
    kernel = Kernel("6.1", "/boot/vmlinuz-6.1", "/boot/initrd.img-6.1", True, 0)
    return Image(kernel, 1, frozenset(), frozenset(), {}, frozenset(texts), texts)


def test_a_filter_that_stayed_in_the_initramfs_is_found_out() -> None:
    copy = image(**{"etc/lvm/lvm.conf": 'filter = [ "a|/dev/sda|", "r|.*|" ]'})
    (proof,) = lvm.prove(view({}, PV), "virtio", [copy])
    assert not proof.ok
    assert "/boot/initrd.img-6.1: /etc/lvm/lvm.conf" == proof.subject


@pytest.mark.parametrize(("bus", "hidden"), [("virtio", True), ("sata", False), ("scsi", False)])
def test_a_filter_is_held_against_the_disks_that_the_machine_gets(bus: DiskBus, hidden: bool) -> None:
    text = 'filter = [ "a|/dev/sd.*|", "r|.*|" ]'
    assert hidden == bool(lvm.hiding_filters(text, bus))


def test_a_filter_of_a_guest_without_lvm_on_a_disk_is_left_alone() -> None:
    files = {"/etc/lvm/lvm.conf": 'filter = [ "a|/dev/md.*|", "r|.*|" ]'}
    on_raid = Device("/dev/md0", "LVM2_member", "pv")
    assert (FixPlan(), ()) == (lvm.plan(view(files, on_raid), "virtio"), lvm.prove(view(files, on_raid), "virtio", ()))


# RAID -------------------------------------------------------------------------------------------------------

MEMBERS = tuple(
    Device(f"/dev/{name}", "linux_raid_member", "array", member=name, disk=f"/dev/{name}") for name in ("sdb", "sdc")
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "DEVICE /dev/sd[a-z]\nARRAY /dev/md0 UUID=a:b devices=/dev/sdb,/dev/sdc\n",
            "DEVICE partitions\nARRAY /dev/md0 UUID=a:b\n",
        ),
        ("device /dev/sda1\n  /dev/sdb1\nMAILADDR root\n", "device partitions\nMAILADDR root\n"),
        (
            "ARRAY /dev/md0 metadata=1.2\n   devices=/dev/nvme0n1\n   name=a:0\n",
            "ARRAY /dev/md0 metadata=1.2\n   name=a:0\n",
        ),
        ("DEVICE /dev/disk/by-id/scsi-*\n", "DEVICE partitions\n"),
        ("DEVICE containers\n", "DEVICE partitions\n"),
    ],
)
def test_arrays_are_found_by_their_uuid(text: str, expected: str) -> None:
    guest = Guest({"/etc/mdadm.conf": text})
    looked = view(guest, *SDA, *MEMBERS)
    assert not all(proof.ok for proof in raid.prove(looked, "virtio", ()))
    repaired = applied(guest, raid.plan(looked, "virtio"))
    assert expected == repaired.files["/etc/mdadm.conf"]
    copy = image(**{"etc/mdadm.conf": expected})
    assert all(proof.ok for proof in raid.prove(view(repaired, *SDA, *MEMBERS), "virtio", [copy]))
    stale = image(**{"etc/mdadm.conf": text})
    assert not all(proof.ok for proof in raid.prove(view(repaired, *SDA, *MEMBERS), "virtio", [stale]))


@pytest.mark.parametrize(
    "text", ["DEVICE partitions\nARRAY /dev/md0 UUID=a\n", "DEVICE /dev/vd* /dev/sd*\n", "# DEVICE x\n"]
)
def test_settings_that_name_no_hardware_stay(text: str) -> None:
    assert FixPlan() == raid.plan(view({"/etc/mdadm/mdadm.conf": text}, *SDA, *MEMBERS), "virtio")


def test_an_array_that_is_known_by_its_members_only_is_said_and_not_proved() -> None:
    looked = view({"/etc/mdadm.conf": "ARRAY /dev/md0 devices=/dev/sdb,/dev/sdc\n"}, *SDA, *MEMBERS)
    (warning,) = raid.plan(looked, "virtio").warnings
    assert "/etc/mdadm.conf knows the array /dev/md0 by its members only" in warning.message
    assert [False] == [proof.ok for proof in raid.prove(looked, "virtio", ())]


# What is only said ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "wanted"),
    [
        (
            "/etc/udev/rules.d/99-oracle-asmdevices.rules",
            '# ASM\nKERNEL=="sd?1", SUBSYSTEM=="block", PROGRAM=="/usr/lib/udev/scsi_id -g -u -d /dev/$parent", '
            'RESULT=="36000c29", SYMLINK+="oracleasm/asm1", OWNER="oracle"\n',
            "line 2 in the guest goes by the disk sd?1",
        ),
        ("/etc/udev/rules.d/60-db.rules", 'ENV{ID_SERIAL}=="36000c29", OWNER="db"\n', "goes by the disk 36000c29"),
        ("/etc/sysconfig/oracleasm", 'ORACLEASM_SCANORDER="sd"\n', "goes by the disk sd"),
        ("/etc/sysconfig/rawdevices", "/dev/raw/raw1 /dev/sdb1\n", "goes by the disk /dev/sdb1"),
    ],
)
def test_files_that_go_by_the_kernels_names_are_named(path: str, text: str, wanted: str) -> None:
    (warning,) = rules.plan(view({path: text}), "virtio").warnings
    assert warning.message.startswith(path)
    assert wanted in warning.message


@pytest.mark.parametrize(
    "text",
    [
        '# KERNEL=="sd?1", OWNER="oracle"\n',
        'KERNEL=="vd?1", OWNER="oracle"\n',
        'KERNEL=="sd*", ATTR{queue/scheduler}=="x"\n',
        'ENV{ID_FS_UUID}=="data", OWNER="db"\n',
    ],
)
def test_rules_that_hold_are_not_named(text: str) -> None:
    assert FixPlan() == rules.plan(view({"/etc/udev/rules.d/9.rules": text}), "virtio")


@pytest.mark.parametrize(
    ("path", "text", "disk"),
    [
        ("/etc/rc.local", "#!/bin/sh\ntouch /x\nmount -t ext4 /dev/sdb1 /backup\nexit 0\n", "/dev/sdb1"),
        (
            "/etc/rc.d/rc.local",
            "  /bin/mount -o noatime /dev/disk/by-path/pci-0:1-part1 /b\n",
            "/dev/disk/by-path/pci-0:1-part1",
        ),
        ("/etc/init.d/boot.local", "swapon /dev/sdc\n", "/dev/sdc"),
        ("/etc/auto.misc", "data  -fstype=ext4,rw  :/dev/sdb1\n", "/dev/sdb1"),
        ("/etc/drbd.d/r0.res", "resource r0 {\n on a {\n  device /dev/drbd0;\n  disk /dev/sdb1;\n", "/dev/sdb1"),
        ("/etc/drbd.d/r1.res", 'on a { device minor 1; disk "/dev/xvdb"; }\n', "/dev/xvdb"),
    ],
)
def test_a_file_that_mounts_a_disk_by_its_kernels_name_is_named(path: str, text: str, disk: str) -> None:
    (warning,) = rules.plan(view({path: text}), "virtio").warnings
    assert f"{path} in the guest goes by the disk {disk}, and the new disks are called vda" in warning.message


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/etc/rc.local", "#mount /dev/sdb1 /data\nmount UUID=x /data\necho noop > /sys/block/sda/queue/scheduler\n"),
        ("/etc/rc.local", "mount /data # /dev/sdb1\nmount -o loop /root/x.iso /mnt\nblockdev --setra 4096 /dev/sda\n"),
        ("/etc/auto.misc", "cd -fstype=iso9660,ro :/dev/cdrom\n# boot -fstype=ext2 :/dev/hda1\nh host:/data\n"),
        ("/etc/drbd.d/r0.res", "disk { on-io-error detach; }\ndisk /dev/vg/lv;\n"),
        ("/etc/rc.local", "mount /dev/vdb1 /data\n"),
    ],
)
def test_a_file_that_mounts_by_what_stays_is_not_named(path: str, text: str) -> None:
    assert () == rules.plan(view({path: text}), "virtio").warnings


DEBCONF = """Name: grub-pc/hidden_timeout
Template: grub-pc/hidden_timeout
Value: /dev/sdz
Owners: grub-pc

Name: grub-{0}/install_devices
Template: grub-{0}/install_devices
Value: {1}
Owners: grub-{0}
Flags: seen
Variables:
 CHOICES = /dev/sda (42949 MB, VMware Virtual disk)

Name: grub-pc/timeout
Template: grub-pc/timeout
Value: /dev/sdz
Owners: grub-pc
"""
INSTALLED_TO = "/etc/default/grub_installdevice"
DEBCONF_FILE = "/var/cache/debconf/config.dat"


@pytest.mark.parametrize(
    ("path", "text", "device", "remedy"),
    [
        (DEBCONF_FILE, DEBCONF.format("pc", "/dev/sda"), "/dev/sda", "`dpkg-reconfigure grub-pc`"),
        (DEBCONF_FILE, DEBCONF.format("pc", "/dev/disk/by-id/scsi-36000c29a, /dev/sdb"),
         "/dev/disk/by-id/scsi-36000c29a", "`dpkg-reconfigure grub-pc`"),
        (INSTALLED_TO, "/dev/disk/by-id/wwn-0x6000c29\nactivate\ngeneric_mbr\n", "/dev/disk/by-id/wwn-0x6000c29",
         "Write the new disk there"),
        (INSTALLED_TO, "(hd0)\n/dev/xvda\n", "/dev/xvda", "Write the new disk there"),
    ],
)  # fmt: skip
def test_where_updates_of_grub_go_is_said_if_it_is_no_more(path: str, text: str, device: str, remedy: str) -> None:
    (warning,) = rules.plan(view({path: text}), "virtio").warnings
    assert f"{path}: updates of GRUB in the guest install it to {device}, a name" in warning.message
    assert remedy in warning.hint


@pytest.mark.parametrize(
    ("path", "text", "bus"),
    [
        (DEBCONF_FILE, DEBCONF.format("pc", "/dev/vda"), "virtio"),
        (DEBCONF_FILE, DEBCONF.format("pc", "/dev/sda"), "sata"),
        (DEBCONF_FILE, DEBCONF.format("pc", ""), "virtio"),
        (DEBCONF_FILE, DEBCONF.format("pc", "/dev/mapper/vg-root"), "virtio"),
        (DEBCONF_FILE, DEBCONF.format("efi", "/dev/sda1"), "virtio"),  # this guest starts by its BIOS
        (INSTALLED_TO, "# /dev/sda\n(hd0)\nactivate\n", "virtio"),
    ],
)
def test_where_updates_of_grub_go_is_not_said_if_it_holds(path: str, text: str, bus: DiskBus) -> None:
    assert () == rules.plan(view({path: text}), bus).warnings


def test_efi_partition_that_updates_of_grub_go_to_is_the_one_of_uefi() -> None:
    files = {DEBCONF_FILE: DEBCONF.format("efi", "/dev/disk/by-id/scsi-36000c29a-part1")}
    guest = view(files)
    cast(Any, guest.inspection).firmware = "uefi"
    (warning,) = rules.plan(guest, "virtio").warnings
    assert "/dev/disk/by-id/scsi-36000c29a-part1" in warning.message
    assert "`dpkg-reconfigure grub-efi-amd64`" in warning.hint
