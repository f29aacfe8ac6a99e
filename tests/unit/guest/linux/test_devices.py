"""The guest's device names, and the names that stay."""

from __future__ import annotations

import pytest

from hyper2kvmd.guest.linux.devices import Device, Names, changes_with_hardware, work_out

DEVICES = [
    Device("/dev/sda", part_type="", disk="/dev/sda"),
    Device("/dev/sda1", uuid="ROOT", part_uuid="p-a1", disk="/dev/sda"),
    Device("/dev/sda2", uuid="TWIN", part_uuid="p-a2", disk="/dev/sda"),
    Device("/dev/sdb", uuid="WHOLE", disk="/dev/sdb"),
    Device("/dev/sdb1", uuid="TWIN", part_uuid="p-b1", disk="/dev/sdb"),
    Device("/dev/sdb2", disk="/dev/sdb"),
    Device("/dev/vg/root", "xfs", uuid="LV", aliases=("/dev/mapper/vg-root",)),
]


def known(used: str, disks: int = 2, root: tuple[str, str] | None = None) -> Names:
    """The names of a guest that uses these, on so many of the disks."""
    names = ("/dev/sda", "/dev/sdb", "/dev/sdc")[:disks]
    devices = {device.name: device for device in DEVICES if device.disk in ("", *names)}
    return work_out(names, devices, used.split(), root).names


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("/dev/sda1", "UUID=ROOT"),
        ("/dev/hda1", "UUID=ROOT"),
        ("/dev/vda1", "UUID=ROOT"),
        ("/dev/xvda1", "UUID=ROOT"),
        ("/dev/mmcblk0p1", "UUID=ROOT"),
        ("/dev/cciss/c0d0p1", "UUID=ROOT"),
        ("/dev/nvme0n1p1", "UUID=ROOT"),
        ("/dev/sdb", "UUID=WHOLE"),
        ("/dev/nvme0n2", "UUID=WHOLE"),
        ("/dev/nvme1n1", "UUID=WHOLE"),
        ("/dev/sdb2", None),  # nothing on it that could identify it
        ("/dev/sdc1", None),  # no such disk
        ("/dev/sda9", None),
        ("/dev/sdaa1", None),
        ("/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part1", None),  # of two disks, it could be either
        ("/dev/mapper/mpatha1", None),
    ],
)
def test_device_name_becomes_what_is_on_the_device(spec: str, name: str | None) -> None:
    assert known(spec).stable(spec) == name


def test_uuid_that_two_devices_have_is_not_used() -> None:
    assert known("/dev/sda2").stable("/dev/sda2") == "PARTUUID=p-a2"
    assert known("/dev/sda2", 1).stable("/dev/sda2") == "UUID=TWIN"
    assert known("").find("UUID=TWIN") is None
    assert (
        "/dev/sda2 and /dev/sdb1 are both that: nobody can know which of them is meant"
        == known("").becomes("UUID=twin").why
    )


def test_partition_can_be_asked_for_by_its_own_identifier() -> None:
    assert known("/dev/sda1", 1).stable("/dev/sda1", by_partition=True) == "PARTUUID=p-a1"


PATH = "/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:{}:0-part1"


def test_hardware_path_is_understood_where_there_is_one_disk() -> None:
    path, identity = PATH.format(0), "/dev/disk/by-id/scsi-36000c29f6b9b0-part2"
    names = known(f"{path} {identity}", 1)
    assert names.stable(path) == "UUID=ROOT"
    assert names.stable(identity) == "UUID=TWIN"


@pytest.mark.parametrize("word", ["²", "٣", "1" * 400])
def test_address_with_odd_digits_raises_nothing(word: str) -> None:
    path = f"/dev/disk/by-path/pci-{word}-part1"
    assert known(path, 1).stable(path) == "UUID=ROOT"


def test_addresses_on_one_controller_are_in_the_order_of_the_disks() -> None:
    used = f"{PATH.format(10)} {PATH.format(2)}"
    assert ["UUID=ROOT", "PARTUUID=p-b1"] == [known(used).stable(PATH.format(target)) for target in (2, 10)]
    # But what was found by looking goes first.
    swapped = known(used, root=(PATH.format(10), "/dev/sda"))
    assert ["PARTUUID=p-b1", "UUID=ROOT"] == [swapped.stable(PATH.format(target)) for target in (2, 10)]


def test_an_address_that_the_one_disk_does_not_have_is_of_a_disk_that_is_missing() -> None:
    names = known(f"{PATH.format(0)} {PATH.format(1)}", 1, root=(PATH.format(1), "/dev/sda"))
    assert ("UUID=ROOT", None) == (names.stable(PATH.format(1)), names.stable(PATH.format(0)))
    assert names.lacks(PATH.format(0))
    assert "no disk of this export has that device" == names.becomes(PATH.format(0)).why


def test_positions_in_two_families_say_nothing_of_each_other() -> None:
    used = "/dev/sda1 /dev/nvme0n1"
    assert [None, None] == [known(used).stable(spec) for spec in used.split()]
    names = known(used, root=("/dev/sda1", "/dev/sda"))
    assert ["UUID=ROOT", "UUID=WHOLE"] == [names.stable(spec) for spec in used.split()]


def test_a_disk_is_the_same_by_both_of_its_identities() -> None:
    one, other = "/dev/disk/by-id/scsi-36000c29d5e8a4b7c-part1", "/dev/disk/by-id/wwn-0x6000c29d5e8a4b7c-part1"
    mapper = "/dev/mapper/36000c29d5e8a4b7c-part1"
    names = known(f"{one} {other} {mapper}", root=(one, "/dev/sdb"))
    assert {"PARTUUID=p-b1"} == {names.stable(spec) for spec in (one, other, mapper)}


@pytest.mark.parametrize(
    ("disk", "part"),
    [("mpatha", "mpathap1"), ("mpatha", "mpatha-part1"), ("mpathaa", "mpathaap1"), ("mpath0", "mpath0p1")],
)
def test_partition_of_a_multipath_device_is_on_that(disk: str, part: str) -> None:
    names = known(f"/dev/mapper/{disk} /dev/mapper/{part}", 1)
    assert "UUID=ROOT" == names.stable(f"/dev/mapper/{part}")
    assert "/dev/sda" == names.becomes(f"/dev/mapper/{disk}").place


def test_name_spaces_of_several_controllers_have_no_order() -> None:
    used = "/dev/nvme0n1 /dev/nvme0n2 /dev/nvme1n1"
    assert {None} == {known(used).stable(spec) for spec in used.split()}


def test_volume_is_known_by_both_of_its_names() -> None:
    assert ["/dev/vg/root"] * 2 == [
        device.name for spec in ("/dev/vg/root", "/dev/mapper/vg-root") for device in known("").all(spec)
    ]


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ("/dev/sda1", True),
        ("/dev/nvme0n1p2", True),
        ("/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:0:0-part1", True),
        ("/dev/disk/by-id/wwn-0x6000c29-part1", True),
        ("/dev/xvda1", True),
        ("/dev/mmcblk0p2", True),
        ("/dev/cciss/c0d0p1", True),
        ("/dev/nvme1n1p1", True),
        ("/dev/mapper/mpatha", True),
        ("/dev/mapper/mpathap1", True),
        ("/dev/mapper/mpatha-part1", True),
        ("/dev/mapper/36000c29d5e8a4b7c-part1", True),
        ("/dev/disk/by-id/dm-uuid-part1-mpath-36000c29", True),
        ("/dev/disk/by-id/dm-name-mpatha", True),
        ("/dev/disk/cloud/azure_resource-part1", True),
        ("/dev/disk/azure/root-part1", True),
        ("/dev/disk/by-diskseq/3", True),
        ("/dev/disk/by-id/md-uuid-a:b", False),
        ("/dev/mapper/mpath0", True),
        ("/dev/mapper/mpath12p3", True),
        ("/dev/mapper/mpath-of-destiny", False),
        ("/dev/disk/by-partlabel/root", False),
        ("/dev/dm-0", False),
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


def test_a_root_at_its_place_says_that_the_others_are_at_theirs() -> None:
    devices = {device.name: device for device in DEVICES}
    for disks in (("/dev/sda", "/dev/sdb", "/dev/sdc"), ["/dev/sda", "/dev/sdb", "/dev/sdc"]):
        found = work_out(disks, devices, ["/dev/sda1", "/dev/sdb", "/dev/sdc"], ("/dev/sda1", "/dev/sda"))
        assert not found.disagrees
        assert {"/dev/sda", "/dev/sdb", "/dev/sdc"} == {*found.names.known.values()}


def test_of_two_disks_in_the_wrong_order_both_are_known_from_one() -> None:
    swapped = known("/dev/sda1 /dev/sdb", root=("/dev/sda1", "/dev/sdb"))
    assert ["PARTUUID=p-b1", None] == [swapped.stable(spec) for spec in ("/dev/sda1", "/dev/sdb")]
    assert "/dev/sda" == swapped.all("/dev/sdb")[0].name


def test_of_three_disks_in_the_wrong_order_only_the_one_that_was_seen_is_known() -> None:
    three = known("/dev/sda1 /dev/sdb1 /dev/sdc1", 3, root=("/dev/sdb1", "/dev/sda"))
    assert three.stable("/dev/sdb1") == "UUID=ROOT"
    assert three.stable("/dev/sda1") is None
    assert three.stable("/dev/sdc1") is None


def test_a_root_on_a_volume_that_the_guest_calls_a_partition_says_that_the_order_is_not_the_guests() -> None:
    found = work_out(("/dev/sda", "/dev/sdb"), {}, ["/dev/sda1", "/dev/sdb1"], ("/dev/sda1", ""))
    assert found.disagrees
    assert () == found.names.all("/dev/sda1")


@pytest.mark.parametrize(
    "spec",
    [
        "/dev/disk/cloud/azure_resource-part1",
        "/dev/disk/azure/resource-part1",
        "/dev/disk/by-id/scsi-36000c29d5e8a4b7c1f3e2d1c0b9a8f7e-part1",
        "/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:1:0-part1",
        "/dev/mapper/mpathb1",
    ],
)
def test_a_name_of_a_disk_that_was_not_exported_is_not_that_of_the_only_one(spec: str) -> None:
    """Its root is known by its UUID, and is not what is mounted on /mnt."""
    devices = {device.name: device for device in DEVICES}
    found = work_out(("/dev/sda",), devices, ["UUID=ROOT", spec], None, taken={"/dev/sda1"}).names
    assert (None, True) == (found.find(spec), found.lacks(spec))
    two = work_out(("/dev/sda", "/dev/sdb"), devices, ["UUID=ROOT", spec], None, taken={"/dev/sda1", "/dev/sdb1"}).names
    assert two.find(spec) is None


def test_azures_temporary_disk_is_on_no_disk_of_an_export() -> None:
    for spec in ("/dev/disk/azure/resource-part1", "/dev/disk/cloud/azure_resource"):
        names = work_out(("/dev/sda",), {device.name: device for device in DEVICES}, [spec], None).names
        assert (None, True) == (names.find(spec), names.lacks(spec))


def test_a_disk_behind_the_last_one_is_lacking() -> None:
    names = known("/dev/sda1 /dev/sdb2 /dev/sdc1")
    assert [False, False, True] == [names.lacks(f"/dev/{name}") for name in ("sda1", "sdb2", "sdc1")]
    assert not names.lacks("UUID=0a1b")
