"""The machine is decided once: what FIX proves a guest for is what its domain has."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Literal

import pytest

from hyper2kvmd.domain.machine import check_cpus, machine_for
from hyper2kvmd.domain.model import GuestSystem, Machine
from hyper2kvmd.domain.xml import to_xml
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.guest.linux.kernels import bus_of
from tests.unit.domain.test_domain import DEBIAN, PLAIN, RHEL5, WINDOWS_2022, WINDOWS_XP, disks

# The driver without which no disk on such a bus is seen; one of those that are named together is enough.
DRIVERS = {"virtio": {"virtio_blk"}, "scsi": {"virtio_scsi"}, "sata": {"ahci"}, "ide": {"ata_piix", "piix"}}
Firmware = Literal["bios", "uefi"]


@pytest.mark.parametrize(
    ("guest", "firmware", "count", "virtio", "expected"),
    [
        (None, "bios", 1, True, Machine("q35", "virtio", "virtio")),
        (DEBIAN, "bios", 20, True, Machine("q35", "virtio", "virtio")),
        (DEBIAN, "bios", 21, True, Machine("q35", "scsi", "virtio")),
        (DEBIAN, "uefi", 1, False, Machine("q35", "sata", "e1000e")),
        (RHEL5, "bios", 1, True, Machine("pc", "virtio", "virtio")),
        (RHEL5, "bios", 30, True, Machine("pc", "virtio", "virtio")),  # its kernel has no virtio-scsi
        (RHEL5, "bios", 1, False, Machine("pc", "ide", "e1000")),
        (RHEL5, "uefi", 1, False, Machine("q35", "sata", "e1000e")),
        (WINDOWS_XP, "bios", 1, False, Machine("pc", "ide", "e1000")),
        (WINDOWS_2022, "bios", 1, False, Machine("q35", "sata", "e1000e")),
    ],
)
def test_the_machine_follows_from_guest_firmware_and_disks(
    guest: GuestSystem | None, firmware: Firmware, count: int, virtio: bool, expected: Machine
) -> None:
    assert expected == machine_for(guest, firmware, count, virtio=virtio)


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
@pytest.mark.parametrize("guest", [None, DEBIAN, RHEL5, replace(DEBIAN, kernel="2.4.21-50.EL")])
def test_the_proof_is_about_the_buses_that_the_domain_has(guest: GuestSystem | None, firmware: Firmware) -> None:
    for count, virtio in itertools.product((1, 4, 5, 20, 21, 30), (True, False)):
        machine = machine_for(guest, firmware, count, virtio=virtio)
        domain = replace(PLAIN, guest=guest, firmware=firmware, disks=disks(count), machine=machine)
        given = {str(target.get("bus")) for target in ET.fromstring(to_xml(domain)).findall("devices/disk/target")}
        for way in bus_of(machine, count).ways:
            seen = {bus for bus, drivers in DRIVERS.items() if drivers & {*way}}
            assert given == seen, (count, virtio, way)


def test_more_cpus_than_the_older_chipset_has_room_for_are_refused_with_the_way_out() -> None:
    older = machine_for(RHEL5, "bios", 1, virtio=True)
    check_cpus(replace(PLAIN, cpus=288))
    check_cpus(replace(PLAIN, cpus=255, machine=older))
    with pytest.raises(MigrationError, match="288 CPUs are more than the older chipset") as caught:
        check_cpus(replace(PLAIN, cpus=288, machine=older))
    assert "at most 255" in caught.value.hint
