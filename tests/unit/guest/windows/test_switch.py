"""A Windows is given another bus only if it would start from there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.inspect import inspect
from hyper2kvmd.guest.session import Session
from hyper2kvmd.guest.windows.registry import dword
from hyper2kvmd.guest.windows.switch import Switch, left_behind, prove_switch
from hyper2kvmd.run import Tools
from tests import virtiowin
from tests.sabotage import lost, value
from tests.unit.guest.windows.test_fix import repair
from tests.windows import FAMILIES, Directory, guest


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return virtiowin.write(tmp_path_factory.mktemp("virtio-win"), virtiowin.tree())


def switch(g: Directory, bus: Literal["virtio", "sata"]) -> Switch:
    g.umount_all()
    found = inspect(Session(g, (), Tools()))
    assert found.windows is not None
    return prove_switch(g, found, found.windows, bus)


def contents(at: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in at.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_that_was_migrated_to_virtio_can_go_back_to_sata(name: str, tmp_path: Path, drivers: Path) -> None:
    g = guest(tmp_path, name, storahci_off=True)
    repair(g, drivers)
    before = contents(tmp_path)
    found = switch(g, "sata")
    machine = found.machine
    assert found.new_cards
    assert ("sata", "e1000" if name.startswith("7") else "e1000e") == (machine.disks, machine.cards)
    assert before == contents(tmp_path)


@pytest.mark.parametrize("name", ["7", "2016", "2025"])
def test_one_that_got_the_drivers_later_can_go_to_virtio(name: str, tmp_path: Path) -> None:
    g = guest(tmp_path, name, adopt=True)
    repair(g, None)  # which has them start
    found = switch(g, "virtio")
    assert "virtio" == found.machine.disks
    assert all(proof.ok for proof in found.proofs)


def test_without_drivers_it_does_not_go_to_virtio(tmp_path: Path) -> None:
    g = guest(tmp_path, "2022")
    repair(g, None)
    with pytest.raises(MigrationError, match="has none of the identifiers of the virtio disk") as raised:
        switch(g, "virtio")
    assert Code.FIX_UNPROVED == raised.value.code
    assert "Install virtio-win in it" in raised.value.hint


def test_drivers_that_do_not_start_are_not_enough(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match=r"viostor Start is 3, and has to be 0"):
        switch(guest(tmp_path, "2022", adopt=True), "virtio")


def test_a_sata_driver_that_does_not_start_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match=r"storahci\\StartOverride 0 is 3") as raised:
        switch(guest(tmp_path, "2022", storahci_off=True), "sata")
    assert "sc config storahci start= boot" in raised.value.hint


def test_every_control_set_counts(tmp_path: Path, drivers: Path) -> None:
    g = guest(tmp_path, "2022", two_sets=True)
    repair(g, drivers)
    switch(g, "virtio")
    value("ControlSet002\\Services\\viostor", "Start", dword(3))(g)
    with pytest.raises(MigrationError, match=r"ControlSet002\\Services\\viostor Start is 3"):
        switch(g, "virtio")


def test_a_lost_file_counts(tmp_path: Path, drivers: Path) -> None:
    g = guest(tmp_path, "2022")
    repair(g, drivers)
    lost("Windows/System32/drivers/viostor.sys")(g)
    with pytest.raises(MigrationError, match=r"viostor\.sys, the file of viostor, is not there"):
        switch(g, "virtio")


def test_cards_without_a_driver_stay_as_they_are(tmp_path: Path, drivers: Path) -> None:
    g = guest(tmp_path, "2022")
    repair(g, drivers)  # NetKVM is installed when it first starts
    found = switch(g, "virtio")
    assert "virtio" == found.machine.disks and not found.new_cards
    assert ["no_virtio"] == [warning.code for warning in found.warnings]


def test_addresses_that_stay_behind_are_named(tmp_path: Path) -> None:
    found = inspect(Session(guest(tmp_path, "2022", static=True), (), Tools()))
    assert found.windows is not None
    said = " ".join(finding.message for finding in left_behind(found.windows))
    assert "192.0.2.10/24" in said and "192.0.2.11/24" in said
