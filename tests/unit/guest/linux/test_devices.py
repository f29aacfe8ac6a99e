"""The guest's device names, and the names that stay."""

from __future__ import annotations

import pytest

from hyper2kvmd.guest.linux.devices import Device, Names, changes_with_hardware

DEVICES = [
    Device("/dev/sda", part_type=""),
    Device("/dev/sda1", uuid="ROOT", part_uuid="p-a1"),
    Device("/dev/sda2", uuid="TWIN", part_uuid="p-a2"),
    Device("/dev/sdb", uuid="WHOLE"),
    Device("/dev/sdb1", uuid="TWIN", part_uuid="p-b1"),
    Device("/dev/sdb2"),
]
TWO = Names(("/dev/sda", "/dev/sdb"), {device.name: device for device in DEVICES})
ONE = Names(("/dev/sda",), {device.name: device for device in DEVICES[:3]})


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("/dev/sda1", "UUID=ROOT"),
        ("/dev/hda1", "UUID=ROOT"),
        ("/dev/vda1", "UUID=ROOT"),
        ("/dev/nvme0n1p1", "UUID=ROOT"),
        ("/dev/sdb", "UUID=WHOLE"),
        ("/dev/nvme0n2", "UUID=WHOLE"),
        ("/dev/sdb2", None),  # nothing on it that could identify it
        ("/dev/sdc1", None),  # no such disk
        ("/dev/sda9", None),
        ("/dev/sdaa1", None),
        ("/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part1", None),  # of two disks, it could be either
    ],
)
def test_device_name_becomes_what_is_on_the_device(spec: str, name: str | None) -> None:
    assert TWO.stable(spec) == name


def test_uuid_that_two_devices_have_is_not_used() -> None:
    assert TWO.stable("/dev/sda2") == "PARTUUID=p-a2"
    assert ONE.stable("/dev/sda2") == "UUID=TWIN"


def test_partition_can_be_asked_for_by_its_own_identifier() -> None:
    assert ONE.stable("/dev/sda1", by_partition=True) == "PARTUUID=p-a1"


def test_hardware_path_is_understood_where_there_is_one_disk() -> None:
    assert ONE.stable("/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part1") == "UUID=ROOT"
    assert ONE.stable("/dev/disk/by-id/scsi-36000c29f6b9b0-part2") == "UUID=TWIN"


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ("/dev/sda1", True),
        ("/dev/nvme0n1p2", True),
        ("/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part1", True),
        ("/dev/disk/by-id/wwn-0x6000c29-part1", True),
        ("/dev/disk/by-id/dm-uuid-LVM-abc", False),
        ("/dev/disk/by-id/lvm-pv-uuid-abc", False),
        ("/dev/disk/by-uuid/abc", False),
        ("/dev/mapper/vg-root", False),
        ("/dev/sr0", False),
        ("/dev/fd0", False),
        ("/dev/md0", False),
        ("UUID=abc", False),
        ("LABEL=root", False),
        ("server:/export", False),
        ("tmpfs", False),
    ],
)
def test_only_names_made_by_the_hardware_change(spec: str, changes: bool) -> None:
    assert changes_with_hardware(spec) is changes


def test_of_two_disks_in_the_wrong_order_both_are_known_from_one() -> None:
    swapped = TWO.corrected("/dev/sda1", "/dev/sdb1")
    assert swapped.disks == ("/dev/sdb", "/dev/sda")
    assert swapped.stable("/dev/sdb1") == "UUID=ROOT"


def test_of_three_disks_in_the_wrong_order_only_the_one_that_was_seen_is_known() -> None:
    three = Names(("/dev/sda", "/dev/sdb", "/dev/sdc"), TWO.devices).corrected("/dev/sdb1", "/dev/sda1")
    assert three.disks == ("", "/dev/sda", "")
    assert three.stable("/dev/sdb1") == "UUID=ROOT"
    assert three.stable("/dev/sda1") is None
    assert three.stable("/dev/sdc1") is None


def test_nothing_is_known_when_the_device_is_on_no_disk_or_beyond_the_last() -> None:
    assert TWO.corrected("/dev/sda1", "/dev/vg/root").disks == ("", "")
    assert TWO.corrected("/dev/sdc1", "/dev/sda1").disks == ("", "")


def test_a_disk_behind_the_last_one_is_lacking() -> None:
    names = Names(("/dev/sda", ""), {})
    assert [False, False, True] == [names.lacks(f"/dev/{name}") for name in ("sda1", "sdb2", "sdc1")]
    assert not names.lacks("UUID=0a1b")
