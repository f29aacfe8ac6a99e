"""One .ovf in the place of a manifest: which one counts, and when its export is there as a whole."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hyper2kvmd.queue import facts
from hyper2kvmd.queue.descriptor import create_command, mf_of
from hyper2kvmd.queue.state import State, state_of
from hyper2kvmd.settings.model import Settings
from tests.ovf import DISKS, NVRAM, OVFTOOL, describe


@pytest.fixture
def settings(scratch: Settings) -> Settings:
    return scratch.model_copy(update={"ovf": scratch.ovf.model_copy(update={"accept": True})})


@pytest.fixture
def export(settings: Settings) -> Path:
    """What ovftool leaves, with a few bytes in place of disks: nobody looks into them here."""
    directory = settings.exports_dir / "db01"
    directory.mkdir()
    for name in (*DISKS, NVRAM):
        (directory / name).write_bytes(os.urandom(600))
    (directory / "db01.ovf").write_text(OVFTOOL.read_text())
    describe(directory / "db01.ovf")
    return directory


def state(export: Path, settings: Settings) -> tuple[State, str]:
    look = facts.look(export, settings)
    found, finding = state_of(look, settings, time.time())
    return found, finding.message if finding else ""


def test_descriptor_stands_in_for_a_manifest(export: Path, settings: Settings) -> None:
    look = facts.look(export, settings)
    assert ("db01.ovf", "db01", ()) == (look.manifest, look.vm_name, look.missing)
    assert [(name, 600) for name in DISKS] == [*look.sizes]  # the estimate is of the disks alone
    assert look.estimate is not None
    assert State.QUEUED == state(export, settings)[0]


def test_without_the_setting_there_is_nothing_to_do(export: Path, scratch: Settings) -> None:
    assert facts.look(export, scratch).manifest is None
    assert (State.INCOMPLETE, "") == state(export, scratch)
    assert facts.manifest_name(export, scratch) is None


@pytest.mark.parametrize("name", [*DISKS, NVRAM])
def test_every_file_that_it_names_must_be_there(export: Path, settings: Settings, name: str) -> None:
    (export / name).unlink()
    found, message = state(export, settings)
    assert (State.INCOMPLETE, f"{export / name} is not there yet") == (found, message)


def test_file_that_is_shorter_than_it_says_is_still_being_copied(export: Path, settings: Settings) -> None:
    with (export / DISKS[1]).open("r+b") as file:
        file.truncate(200)
    assert (State.INCOMPLETE, f"{export / DISKS[1]} has 200 of 600 bytes") == state(export, settings)


@pytest.mark.parametrize("name", [f".{DISKS[0]}.aB3dE6", f"{NVRAM}.part", ".db01.mf.aB3dE6", "db01.ovf.filepart"])
def test_name_that_a_copying_tool_gives_is_waited_for(export: Path, settings: Settings, name: str) -> None:
    (export / name).write_bytes(b"half")
    assert State.INCOMPLETE == state(export, settings)[0]


def test_half_a_descriptor_is_waited_for(export: Path, settings: Settings) -> None:
    (export / "db01.ovf").write_text(OVFTOOL.read_text()[:2000])
    assert State.INCOMPLETE == state(export, settings)[0]
    over = settings.model_copy(update={"incomplete_grace_seconds": 0})
    assert State.QUEUED == state(export, over)[0]  # for a runner that says what is wrong


def test_export_that_changed_just_now_is_not_taken(export: Path, settings: Settings) -> None:
    later = settings.model_copy(update={"settle_seconds": 3600})
    assert State.WAITING == state(export, later)[0]


def test_several_descriptors_are_no_export(export: Path, settings: Settings) -> None:
    (export / "web02.OVF").write_text(OVFTOOL.read_text())
    look = facts.look(export, settings)
    assert look.problem is not None
    assert "manifest_invalid" == look.problem.code
    assert f"{export} has 2 OVF descriptors ('db01.ovf', 'web02.OVF')" in look.problem.message
    assert facts.manifest_name(export, settings) is None


def test_hidden_descriptor_is_none(export: Path, settings: Settings) -> None:
    (export / "._db01.ovf").write_bytes(b"\0\5\x16\7")
    assert "db01.ovf" == facts.look(export, settings).manifest == facts.manifest_name(export, settings)


def test_manifest_goes_first(export: Path, settings: Settings) -> None:
    (export / "manifest.yaml").write_text("{}")
    assert "manifest.yaml" == facts.look(export, settings).manifest == facts.manifest_name(export, settings)


@pytest.mark.parametrize(
    ("written", "there"),
    [("a%20b.vmdk", "a b.vmdk"), ("a.vmdk.gz", "a.vmdk"), ("a.vmdk", "a.vmdk.000000000"), ("x/a.vmdk", "a.vmdk")],
)
def test_file_can_have_another_name_than_the_descriptor_writes(
    export: Path, settings: Settings, written: str, there: str
) -> None:
    text = (export / "db01.ovf").read_text().replace(DISKS[0], written)
    (export / "db01.ovf").write_text(text)
    (export / DISKS[0]).rename(export / there)
    assert () == facts.look(export, settings).missing


def test_link_in_the_place_of_a_descriptor_is_refused(export: Path, settings: Settings) -> None:
    (export / "db01.ovf").rename(export.parent / "elsewhere.ovf")
    (export / "db01.ovf").symlink_to(export.parent / "elsewhere.ovf")
    problem = facts.look(export, settings).problem
    assert problem is not None
    assert "export_unsafe" == problem.code


def test_names_that_go_with_a_descriptor() -> None:
    assert ["db01.mf", "DB01.mf"] == [mf_of("db01.ovf"), mf_of("DB01.OVF")]
    assert "`hyper2kvmctl manifest create '/srv/a b.ovf'`" == create_command(Path("/srv/a b.ovf"))
