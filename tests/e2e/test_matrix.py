"""A guest that differs from test_migration's in all that a migration touches; `make matrix` takes all there are."""

from __future__ import annotations

import json

import pytest

from tests.e2e.test_migration import CANARY
from tests.guests.boot import BootResult
from tests.guests.recipe import GUESTS, Guest
from tests.matrix import Migration, boot_after, boot_before, migrate, works

# Two guests that boot at once on two cores without KVM run into their own time limits: one after the other.
pytestmark = pytest.mark.xdist_group("guests")


@pytest.fixture(scope="module")
def guest() -> Guest:
    return GUESTS["debian13-uefi-lvm"]


@pytest.fixture(scope="module")
def migration(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Migration:
    return migrate(guest, tmp_path_factory.mktemp(guest.name))


@pytest.fixture(scope="module")
def after(guest: Guest, migration: Migration) -> BootResult:
    assert migration.ok, json.dumps(migration.report["error"], indent=2)
    return boot_after(guest, migration)


def test_the_original_does_not_boot_on_virtio(guest: Guest) -> None:
    result = boot_before(guest)
    assert "failed" == result.outcome, result.serial_log[-3000:]


def test_the_migration_succeeds(migration: Migration) -> None:
    assert migration.ok, json.dumps(migration.report["error"], indent=2)


def test_the_result_boots_on_virtio_with_its_file_systems_swap_address_and_services(after: BootResult) -> None:
    assert "matched" == after.outcome, after.serial_log[-3000:]
    assert works(after), after.report
    assert CANARY == after.report["canary"], "the data did not survive"
