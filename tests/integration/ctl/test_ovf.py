"""The commands on an export that hypersdk did not make."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from hyper2kvmd.api import MigrationPipeline
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, report_of
from tests.ovf import DISKS, accepting, export_ovf, pack, write_digests


@pytest.fixture
def scratch(scratch: Settings) -> Settings:
    """The settings of every command here."""
    return accepting(scratch)


@pytest.fixture
def descriptor(scratch: Settings) -> Path:
    return export_ovf(scratch.exports_dir / "db01")


def test_list_and_show_know_it(descriptor: Path, ctl: Ctl) -> None:
    (row,) = json.loads(ctl("list", "--json").stdout)
    assert ("queued", None) == (row["state"], row["reason"])
    assert row["estimate"]["seconds"] > 0
    descriptor.with_name(DISKS[1]).unlink()
    assert f"{DISKS[1]} is not there yet" in ctl("show", "db01").stdout


def test_list_speaks_of_what_lies_beside_the_exports(descriptor: Path, scratch: Settings, ctl: Ctl) -> None:
    (scratch.exports_dir / "web01.ova").touch()
    listed = ctl("list", "--json")
    assert 1 == len(json.loads(listed.stdout))
    assert f"{scratch.exports_dir}/web01.ova is ignored" in listed.stderr
    assert f"&& mv {scratch.exports_dir}/web01.ova" in listed.stderr


def test_plan_estimates_it(descriptor: Path, ctl: Ctl) -> None:
    shown = ctl("plan", "estimate", "--json")
    assert 0 == shown.returncode, shown.stderr
    assert "db01" in shown.stdout


def test_validate_takes_the_descriptor(descriptor: Path, ctl: Ctl) -> None:
    good = ctl("validate", descriptor)
    assert (0, True) == (good.returncode, "valid, 3 disks" in good.stdout), good.stdout
    with descriptor.with_name(DISKS[0]).open("r+b") as file:
        file.seek(-1024, 2)
        file.write(b"x")
    assert 0 == ctl("validate", descriptor).returncode
    strict = json.loads(ctl("validate", descriptor, "--strict", "--json").stdout)
    assert ["checksum_mismatch"] == [error["code"] for error in strict["errors"]]


def test_validate_reads_what_has_another_digest_only_if_it_is_to(descriptor: Path, ctl: Ctl) -> None:
    write_digests(descriptor, "sha1")
    disk = descriptor.with_name(DISKS[2])
    disk.write_bytes(disk.read_bytes()[:-1] + b"x")
    assert 0 == ctl("validate", descriptor).returncode
    strict = ctl("validate", descriptor, "--strict", "--json")
    assert ["checksum_mismatch"] == [error["code"] for error in json.loads(strict.stdout)["errors"]]


def test_validate_of_an_export_without_digests(scratch: Settings, ctl: Ctl) -> None:
    descriptor = export_ovf(scratch.exports_dir / "db01", None)
    strict = json.loads(ctl("validate", descriptor, "--strict", "--json").stdout)
    assert (True, []) == (strict["valid"], strict["errors"])
    assert "no_digests" in {warning["code"] for warning in strict["warnings"]}


def test_validate_says_what_to_do_where_it_is_not_accepted(descriptor: Path, ctl: Ctl) -> None:
    said = ctl("validate", descriptor, "--set", "ovf.accept=false")
    assert 1 == said.returncode
    assert f"{descriptor} is an OVF descriptor, not a manifest" in said.stdout
    assert "Or set ovf.accept to true." in said.stdout


@pytest.mark.parametrize("named", ["directory", "descriptor"])
def test_migrate_takes_the_directory_or_the_descriptor(descriptor: Path, ctl: Ctl, named: str) -> None:
    what = descriptor if named == "descriptor" else descriptor.parent
    done = ctl("migrate", what, "--json", "--name", "orders")
    assert 0 == done.returncode, done.stderr
    document = json.loads(done.stdout)
    assert ("succeeded", "orders", "db01.ovf") == (
        document["status"],
        document["vm_name"],
        document["manifest"]["name"],
    )
    # The name of the file is no wish: it is what is read in any case.
    (row,) = json.loads(ctl("list", "--json").stdout)
    assert ["--name", "orders"] == row["asked"]


@pytest.mark.parametrize("command", ["migrate", "validate"])
def test_file_beside_the_exports_is_no_export(descriptor: Path, scratch: Settings, ctl: Ctl, command: str) -> None:
    bare = pack(descriptor, scratch.exports_dir / "web01.ova")
    done = ctl(command, bare)
    assert 0 != done.returncode
    assert f"{bare} is ignored: it is a file, and an export is a directory" in done.stdout + done.stderr
    assert ["db01", "web01.ova"] == sorted(path.name for path in scratch.exports_dir.iterdir())


def test_person_chooses_one_of_several(descriptor: Path, scratch: Settings, ctl: Ctl) -> None:
    descriptor.with_name("other.ovf").write_text(descriptor.read_text())
    assert 65 == ctl("migrate", descriptor.parent).returncode
    assert 0 == ctl("retry", "db01").returncode
    assert 0 == ctl("migrate", descriptor).returncode
    assert "ovf_ambiguous" not in {warning["code"] for warning in report_of(descriptor.parent)["warnings"]}


def test_library_migrates_it(descriptor: Path, scratch: Settings) -> None:
    report = MigrationPipeline(descriptor, scratch).run()
    assert report.manifest.made is not None
    assert "db01" == report.manifest.made["source"]["vm_name"]


def test_page_has_the_hardware_of_the_source(descriptor: Path, ctl: Ctl) -> None:
    assert 0 == ctl("migrate", descriptor).returncode
    page = descriptor.parent.parent.parent / "page.html"
    done = ctl("report", "db01", "--html", page)
    assert 0 == done.returncode, done.stderr
    assert "00:50:56:82:3a:0c" in page.read_text()
    descriptor.write_text(descriptor.read_text() + "\n")
    page.unlink()
    assert 0 == ctl("report", "db01", "--html", page).returncode
    assert "00:50:56:82:3a:0c" not in page.read_text()  # the descriptor is another one


def test_retry_after_the_export_was_repaired(descriptor: Path, ctl: Ctl) -> None:
    disk = descriptor.with_name(DISKS[0])
    good = disk.read_bytes()
    disk.write_bytes(good[:-600] + b"x" + good[-599:])
    assert 1 == ctl("migrate", descriptor.parent).returncode
    disk.write_bytes(good)
    assert 0 == ctl("retry", "db01").returncode
    assert 0 == ctl("migrate", descriptor.parent).returncode


def test_batch_migrates_it(descriptor: Path, scratch: Settings, ctl: Ctl) -> None:
    done = ctl("batch", scratch.exports_dir)
    assert 0 == done.returncode, done.stderr
    assert "succeeded" == report_of(descriptor.parent)["status"]


def test_bundle_has_what_the_tool_wrote(descriptor: Path, ctl: Ctl, tmp_path: Path) -> None:
    assert 0 == ctl("migrate", descriptor.parent).returncode
    assert 0 == ctl("bundle", "db01", "--output", tmp_path / "b.tar.gz").returncode
    with tarfile.open(tmp_path / "b.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"export/db01.ovf", "export/db01.mf", "export/migration-report.json"} <= names
