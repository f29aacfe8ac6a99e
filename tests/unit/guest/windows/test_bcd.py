"""The boot configuration says which Windows starts, and on which partition."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.windows import bcd
from hyper2kvmd.guest.windows.bcd import Device, Place, default_entry, read_device
from hyper2kvmd.guest.windows.registry import Value, binary, sz
from tests.windows import (
    BOOTMGR,
    DEFAULT,
    DISK_GUID,
    FAMILIES,
    SIGNATURE,
    WINDOWS_GUID,
    WINDOWS_START,
    Directory,
    device_of,
    guest,
    unclose,
    write_hive,
)

UEFI, BIOS = "/EFI/Microsoft/Boot/BCD", "/Boot/BCD"
OURS = Place(DISK_GUID, WINDOWS_GUID)
# As `reg query` shows it of a Windows on an MBR: the partition at 351 MiB of the disk with signature b3eba8f1.
FROM_THE_FIELD = bytes.fromhex(
    "00000000000000000000000000000000 06000000000000004800000000000000 0000f015000000000000000000000000"
    "0000000001000000f1a8ebb3000000000000000000000000 00000000000000000000000000000000"
)


def booting(at: Path, name: str) -> Directory:
    g = guest(at, name)
    g.mount("/dev/sda1", "/")
    return g


def change(g: Directory, id: str, element: str, value: Value) -> None:
    write_hive(g.host(UEFI), {f"Objects\\{id}\\Elements\\{element}": {"Element": value}})


def test_the_entry_of_a_uefi_guest_names_its_partition_by_guid(tmp_path: Path) -> None:
    entry = default_entry(booting(tmp_path, "2022"), UEFI)
    assert entry is not None
    assert (DEFAULT, "Windows", "\\Windows") == (entry.id, entry.description, entry.system_root)
    assert "\\Windows\\system32\\winload.efi" == entry.path
    assert Device("partition", OURS) == entry.device == entry.os_device


def test_the_entry_of_a_bios_guest_names_its_partition_by_signature_and_offset(tmp_path: Path) -> None:
    entry = default_entry(booting(tmp_path, "7"), BIOS)
    assert entry is not None
    assert Device("partition", Place(SIGNATURE, WINDOWS_START)) == entry.os_device
    assert "\\Windows\\system32\\winload.exe" == entry.path


def test_a_device_of_the_field_is_read() -> None:
    device = read_device(FROM_THE_FIELD)
    assert Device("partition", Place("b3eba8f1", 351 << 20)) == device
    assert "the partition at byte 368050176 of the disk with signature b3eba8f1" == str(device)


@pytest.mark.parametrize(("type", "kind"), [(5, "boot"), (8, "locate"), (0, "other"), (4, "other"), (6, "partition")])
def test_devices_without_a_partition_are_what_they_are(type: int, kind: str) -> None:
    data = bytearray(device_of(FAMILIES["11"]))
    data[16] = type
    assert kind == read_device(bytes(data)).kind


@pytest.mark.parametrize("data", [b"", bytes(71), bytes(16) + b"\x06" + bytes(31) + b"\x02" + bytes(39)])
def test_what_is_no_device_is_another_one(data: bytes) -> None:
    assert Device("other") == read_device(data)


def test_a_raw_disk_is_no_partition() -> None:
    data = bytearray(FROM_THE_FIELD)
    data[52] = 2
    assert Device("other") == read_device(bytes(data))


def test_an_entry_may_lack_what_others_have(tmp_path: Path) -> None:
    g = booting(tmp_path, "11")
    other = "{aaaaaaaa-0000-4000-8000-000000000001}"
    change(g, other, bcd.DESCRIPTION, sz("Old Windows"))
    change(g, BOOTMGR, bcd.DEFAULT, sz(other.upper()))
    entry = default_entry(g, UEFI)
    assert entry is not None and (other, "Old Windows", None, "") == (
        entry.id, entry.description, entry.os_device, entry.path,
    )  # fmt: skip


def test_a_store_whose_default_is_not_there_has_none(tmp_path: Path) -> None:
    g = booting(tmp_path, "11")
    for value in (sz("{bbbbbbbb-0000-4000-8000-000000000001}"), binary(b"\1")):
        change(g, BOOTMGR, bcd.DEFAULT, value)
        assert default_entry(g, UEFI) is None


def test_a_store_that_was_not_closed_is_refused(tmp_path: Path) -> None:
    g = booting(tmp_path, "2025")
    unclose(g.host(UEFI))
    with pytest.raises(MigrationError, match="its registry hive BCD") as raised:
        default_entry(g, UEFI)
    assert Code.GUEST_DIRTY == raised.value.code


def test_any_bytes_are_some_device() -> None:
    chance = random.Random(19)
    for _ in range(2000):
        data = bytearray(device_of(FAMILIES["7"]))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(16, len(data))] = chance.randrange(256)
        device = read_device(bytes(data[: chance.randint(0, len(data))]))
        assert (device.kind == "partition") == (device.place is not None)
        assert len(str(device)) < 200
