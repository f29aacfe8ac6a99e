"""One .ovf in the place of a manifest: which one counts, and when its export is there as a whole."""

from __future__ import annotations

import gzip
import os
import subprocess
import time
from pathlib import Path

import pytest

from hyper2kvmd.queue import facts
from hyper2kvmd.queue.descriptor import create_command, mf_of
from hyper2kvmd.queue.state import State, state_of
from hyper2kvmd.settings.model import Settings
from tests.ovf import DISKS, NVRAM, OVFTOOL, describe, pack


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


@pytest.fixture
def archive(export: Path, settings: Settings) -> Path:
    """The same as one .ova in a directory."""
    return pack(export / "db01.ovf", settings.exports_dir / "packed" / "db01.ova")


def test_archive_stands_in_for_a_manifest(export: Path, archive: Path, settings: Settings) -> None:
    look = facts.look(archive.parent, settings)
    assert ("db01.ova", "db01", (("db01.ova", archive.stat().st_size),)) == (look.manifest, look.vm_name, look.sizes)
    assert facts.look(export, settings).manifest_sha256 == look.manifest_sha256
    assert State.QUEUED == state(archive.parent, settings)[0]
    assert "db01.ova" == facts.manifest_name(archive.parent, settings)


def test_archive_is_waited_for_until_its_end_is_there(archive: Path, settings: Settings) -> None:
    data = archive.read_bytes()
    last = data.rindex(NVRAM.encode()) + 512 + 600  # of the last file; zeros follow
    for length in (0, 100, 512, 3000, len(data) // 2, last - 1, last - last % 512 + 512):
        archive.write_bytes(data[:length])
        found, message = state(archive.parent, settings)
        assert (State.INCOMPLETE, True) == (found, "truncated" in message), length
    archive.write_bytes(data)
    assert State.QUEUED == state(archive.parent, settings)[0]


def test_descriptor_goes_before_an_archive(export: Path, archive: Path, settings: Settings) -> None:
    archive.rename(export / "db01.ova")
    assert "db01.ovf" == facts.look(export, settings).manifest


def test_archive_that_is_not_read_says_what_to_do(archive: Path, settings: Settings) -> None:
    archive.write_bytes(gzip.compress(archive.read_bytes()))
    problem = facts.look(archive.parent, settings).problem
    assert problem is not None
    assert "format_unsupported" == problem.code
    unpacked = settings.exports_dir / "packed-unpacked"
    assert f"`hyper2kvmctl manifest create {archive} --directory {unpacked}`" in problem.hint


def test_size_that_no_file_can_have_is_no_crash(archive: Path, settings: Settings) -> None:
    data = bytearray(archive.read_bytes())
    data[124:136] = b"\x80" + b"\x7f" * 11  # of the first file, in tar's binary way
    data[148:156] = f"{sum(data[:148]) + 8 * 32 + sum(data[156:512]):06o}\0 ".encode()
    archive.write_bytes(data)
    assert facts.look(archive.parent, settings).problem is not None


def test_file_beside_the_exports_is_no_export_and_that_is_said(
    archive: Path, settings: Settings, scratch: Settings
) -> None:
    bare = archive.rename(settings.exports_dir / "web 01.ova")
    (settings.exports_dir / "._web 01.ova").touch()
    exports, (finding,) = facts.exports(settings)
    assert bare not in exports
    assert f"{bare} is ignored: it is a file, and an export is a directory" == finding.message
    subprocess.run(["sh", "-c", finding.hint.split("`")[1]], check=True)
    assert (settings.exports_dir / "web 01/web 01.ova").exists()
    assert [] == facts.exports(settings)[1]
    (settings.exports_dir / "web.ovf").touch()
    assert "Put it, with its disks" in facts.exports(settings)[1][0].hint
    assert [] == facts.exports(scratch)[1]


def test_names_that_go_with_a_descriptor() -> None:
    assert ["db01.mf", "DB01.mf"] == [mf_of("db01.ovf"), mf_of("DB01.OVF")]
    assert "`hyper2kvmctl manifest create '/srv/a b.ovf'`" == create_command(Path("/srv/a b.ovf"))
