"""What the guest may call volumes and arrays, and that its fstab is mounted by any of these names."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hyper2kvmd.errors import Finding, MigrationError
from hyper2kvmd.guest import mounts, storage
from hyper2kvmd.guest.linux import names
from hyper2kvmd.guest.linux.devices import Device, Known
from hyper2kvmd.guest.session import read_text

GROUPS = {"ubuntu-vg": "AbCd" * 8, "data": "EfGh" * 8, "twin": "IjKl" * 8}
VOLUMES = {"/dev/ubuntu-vg/ubuntu-lv": "1111" * 8, "/dev/ubuntu-vg/var": "2222" * 8, "/dev/data/var": "3333" * 8}
ARRAY = "0a1b2c3d:4e5f6071:8293a4b5:c6d7e8f9"


class Appliance:
    """A guest with two volume groups that have a volume of one name, and an array; its files, and what is mounted."""

    def __init__(self, files: Mapping[str, bytes], twins: tuple[str, ...] = ()) -> None:
        self.files, self.twins = files, twins
        self.mounted: dict[str, str] = {}

    def list_partitions(self) -> list[str]:
        return ["/dev/sda1"]

    def list_md_devices(self) -> list[str]:
        return ["/dev/md127"]

    def list_dm_devices(self) -> list[str]:
        return []

    def lvs(self) -> list[str]:
        return list(VOLUMES)

    def lvs_full(self) -> list[dict[str, str]]:
        return [{"lv_name": name.rpartition("/")[2], "lv_uuid": uuid, "lv_attr": "-wi-a-----"}
                for name, uuid in VOLUMES.items()]  # fmt: skip

    def vgs(self) -> list[str]:
        return [*GROUPS, *self.twins]

    def vgs_full(self) -> list[dict[str, str]]:
        return [{"vg_name": name, "vg_uuid": GROUPS[name]} for name in self.vgs()]

    def lvuuid(self, volume: str) -> str:
        assert volume.split("/")[2] not in self.twins, "LVM refuses to say it"
        return "-".join([VOLUMES[volume][:6], VOLUMES[volume][6:]])

    def md_detail(self, name: str) -> dict[str, str]:
        return {"level": "raid1", "uuid": ARRAY, "name": "shop:0"}

    def blkid(self, name: str) -> dict[str, str]:
        return {"TYPE": "ext4", "UUID": f"on-{name.rpartition('/')[2]}"} if name != "/dev/sda" else {}

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        return path in self.files

    def pread(self, path: str, count: int, offset: int) -> bytes:
        return self.files[path]

    def is_dir(self, path: str, followsymlinks: bool = False) -> bool:
        path.encode()  # as the binding does
        return True

    def glob_expand(self, pattern: str) -> list[str]:
        return []

    def realpath(self, path: str) -> str:
        return path

    def pread_device(self, device: str, count: int, offset: int) -> bytes:
        return b"\1"

    def mount_options(self, options: str, device: str, point: str) -> None:
        self.mounted[point] = device


def mounted(fstab: bytes) -> tuple[dict[str, str], list[str]]:
    """What is mounted where, by this fstab, and the warnings."""
    g = Appliance({"/etc/fstab": fstab})
    devices: dict[str, Device] = {one.name: one for one in storage._devices(g, ["/dev/sda"])}
    root = "/dev/ubuntu-vg/ubuntu-lv"
    said: list[Finding] = []

    def known() -> Known:
        return names.known(lambda path: read_text(g, path), g.glob_expand, None, ["/dev/sda"], devices, root)

    mounts.mount(g, root, devices, known, (), said)
    return g.mounted, [finding.message for finding in said]


def by_uuid(group: str, volume: str) -> str:
    return f"/dev/disk/by-id/dm-uuid-LVM-{GROUPS[group]}{VOLUMES[volume]}"


@pytest.mark.parametrize(
    ("spec", "device"),
    [
        (by_uuid("ubuntu-vg", "/dev/ubuntu-vg/var"), "/dev/ubuntu-vg/var"),  # as Ubuntu's installer writes it
        (by_uuid("data", "/dev/data/var"), "/dev/data/var"),
        ("/dev/disk/by-id/dm-name-ubuntu--vg-var", "/dev/ubuntu-vg/var"),
        ("/dev/mapper/ubuntu--vg-var", "/dev/ubuntu-vg/var"),
        (f"/dev/disk/by-id/md-uuid-{ARRAY}", "/dev/md127"),
        ("/dev/disk/by-id/md-name-shop:0", "/dev/md127"),
        ("/dev/md/0", "/dev/md127"),
        ("/dev/md0", "/dev/md127"),
    ],
)
def test_what_the_guest_needs_is_found_by_every_name_of_a_volume_or_an_array(spec: str, device: str) -> None:
    assert (device, []) == ((found := mounted(f"{spec} /var ext4 defaults 0 1\n".encode()))[0]["/var"], found[1])


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("root", "root"),
        ("EFI\\ System\\ Partition", "EFI System Partition"),
        ("my\\ BM-CM-\\<\\'d", "my Bü'd"),  # what blkid says of a label with an umlaut
        ("M-CM-^_", "ß"),
        ("M-Audio", "M-Audio"),
        ("BM-|ro", "BM-|ro"),  # in Latin-1: nobody can write that into an fstab of UTF-8
        ("/boot", "/boot"),
    ],
)
def test_label_is_read_as_it_is_on_the_disk(said: str, label: str) -> None:
    assert label == storage._device("/dev/sda1", {"LABEL": said}, "/dev/sda", ()).label


@pytest.mark.parametrize(
    "line", [b"/dev/ubuntu-vg/var /daten/b\xfccher ext4 defaults 0 2", b"/dev/data/var /a\\000b ext4 defaults 0 2",
             b"/dev/data/var /data btrfs subvol=b\xfccher 0 0", b"LABEL=B\xfcro /data ext4 defaults 0 2"]
)  # fmt: skip
def test_a_mount_point_in_an_older_encoding_is_left_alone(line: bytes) -> None:
    assert ({"/": "/dev/ubuntu-vg/ubuntu-lv"}, []) == mounted(line + b"\n")


@pytest.mark.parametrize("option", ["logdev=/dev/sdb1", "rtdev=/dev/data/var", "journal_path=/dev/disk/by-id/x"])
def test_a_data_volume_with_its_journal_elsewhere_is_left_alone(option: str) -> None:
    line = f"/dev/data/var {{}} xfs noatime,{option} 0 0\n"
    assert "/srv/data" not in mounted(line.format("/srv/data").encode())[0]
    assert "/var" in mounted(line.format("/var").encode())[0]


def test_of_two_groups_with_one_name_nobody_asks_for_a_volume() -> None:
    g = Appliance({}, twins=("data",))
    found = {one.name: one.aliases for one in storage._devices(g, ["/dev/sda"])}
    assert ("/dev/mapper/data-var", "/dev/disk/by-id/dm-name-data-var") == found["/dev/data/var"]
    assert by_uuid("ubuntu-vg", "/dev/ubuntu-vg/var") in found["/dev/ubuntu-vg/var"]


def test_a_volume_that_is_not_there_is_still_refused_where_the_guest_needs_it() -> None:
    with pytest.raises(MigrationError, match="no disk of this export is that device"):
        mounted(f"/dev/disk/by-id/dm-uuid-LVM-{'x' * 64} /var ext4 defaults 0 1\n".encode())
