"""An export that hypersdk did not make: one .ovf with its disks is migrated as any other, and refused as any other."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, left_in, report_of, run_job
from tests.integration.job.test_kill import start
from tests.ovf import DISKS, NVRAM, accepting, describe, export_ovf, vmdk, write_digests


@pytest.fixture
def settings(scratch: Settings) -> Settings:
    return accepting(scratch)


@pytest.fixture
def descriptor(settings: Settings) -> Path:
    return export_ovf(settings.exports_dir / "db01")


def names_in(export: Path) -> set[str]:
    return {path.name for path in export.iterdir()}


def migrated(descriptor: Path, settings: Settings) -> dict[str, Any]:
    done = run_job(descriptor.parent, settings)
    report = report_of(descriptor.parent)
    assert (0, "succeeded") == (done.returncode, report["status"]), report["error"] or done.stderr
    return report


def refused(descriptor: Path, settings: Settings) -> dict[str, Any]:
    """The error of a job, which left no disk behind."""
    run_job(descriptor.parent, settings)
    report = report_of(descriptor.parent)
    assert "succeeded" != report["status"]
    assert [] == [*settings.output_dir.iterdir()]
    error: dict[str, Any] = report["error"]
    return error


def codes(report: dict[str, Any]) -> set[str]:
    return {warning["code"] for warning in report["warnings"]}


def same(one: Path, other: Path) -> bool:
    argv = ("qemu-img", "compare", "-f", "vmdk", "-F", "qcow2", one, other)
    return subprocess.run(argv, check=False, capture_output=True).returncode == 0


def test_export_of_ovftool_is_migrated_where_it_is(descriptor: Path, settings: Settings) -> None:
    export = descriptor.parent
    before = {path.name: path.read_bytes() for path in export.iterdir()}
    report = migrated(descriptor, settings)
    assert {".hyper2kvmd.lock", ".hyper2kvmd.log", "migration-report.json"} == names_in(export) - {*before}
    assert before == {name: (export / name).read_bytes() for name in before}
    for number, name in enumerate(DISKS):
        assert same(export / name, settings.output_dir / f"db01-disk-{number}.qcow2")
    assert [True] * 3 == [disk["source_verified"] for disk in report["disks"]]
    assert "no_digests" not in codes(report)
    assert "no_checksum" not in codes(report)
    assert "disk_empty" in codes(report)  # ovftool's sample has one without a file
    assert [] == left_in(settings.work_dir)


def test_report_has_the_manifest_that_was_made(descriptor: Path, settings: Settings, ctl: Ctl) -> None:
    record = migrated(descriptor, settings)["manifest"]
    made = record.pop("made")
    assert {"name": "db01.ovf", "dialect": "seed"} == {key: record[key] for key in ("name", "dialect")}
    by_hand = shutil.copytree(descriptor.parent, settings.work_dir.parent / "by-hand") / "db01.ovf"
    assert 0 == ctl("manifest", "create", by_hand).returncode
    created = json.loads(by_hand.with_name("manifest.json").read_text())
    for document in (made, created):
        document["metadata"].pop("created_at")
    assert created == made


def test_what_only_the_descriptor_says_reaches_the_domain(descriptor: Path, settings: Settings) -> None:
    # Not a second descriptor: macOS leaves such files.
    descriptor.with_name("._db01.ovf").write_bytes(b"\0\5\x16\7")
    report = migrated(descriptor, settings)
    assert not codes(report) & {"ovf_ambiguous", "ovf_unreadable", "ovf_differs", "no_nics", "no_cpu", "no_memory"}


def test_second_run_does_nothing(descriptor: Path, settings: Settings) -> None:
    migrated(descriptor, settings)
    first = (descriptor.with_name("migration-report.json")).read_bytes()
    done = run_job(descriptor.parent, settings)
    assert 0 == done.returncode
    assert "succeeded already" in done.stderr
    assert first == descriptor.with_name("migration-report.json").read_bytes()


def test_nothing_is_accepted_unless_the_settings_say_so(descriptor: Path, scratch: Settings) -> None:
    done = run_job(descriptor.parent, scratch, "--if-ready")
    assert 75 == done.returncode, done.stderr
    assert not descriptor.with_name("migration-report.json").exists()


def test_person_learns_how_to_have_it_accepted(descriptor: Path, scratch: Settings, ctl: Ctl) -> None:
    done = ctl("migrate", descriptor.parent)
    assert "'db01.ovf' is not accepted as one" in done.stdout + done.stderr
    assert "Set ovf.accept to true." in done.stdout + done.stderr


def test_manifest_goes_before_a_descriptor(descriptor: Path, settings: Settings, ctl: Ctl) -> None:
    assert 0 == ctl("manifest", "create", descriptor).returncode
    record = migrated(descriptor, settings)["manifest"]
    assert ("manifest.json", None) == (record["name"], record["made"])


@pytest.mark.parametrize("algorithm", ["sha1", "sha512"])
def test_other_digests_than_sha256_are_checked_too(settings: Settings, algorithm: str) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", algorithm)
    assert [True] * 3 == [disk["source_verified"] for disk in migrated(descriptor, settings)["disks"]]


def test_export_without_digests_is_migrated_and_that_is_said(settings: Settings) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", None)
    report = migrated(descriptor, settings)
    assert [False] * 3 == [disk["source_verified"] for disk in report["disks"]]
    assert {"no_digests"} == codes(report) & {"no_digests", "no_checksum"}


def test_export_without_digests_is_refused_where_they_are_demanded(settings: Settings) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", None)
    error = refused(descriptor, accepting(settings, validate={"require_checksums": True}))
    assert "checksum_missing" == error["code"]
    assert "ovftool --shaAlgorithm=SHA256" in error["hint"]


@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])
@pytest.mark.parametrize("name", ["db01.ovf", DISKS[0], DISKS[2]])
def test_wrong_digest_is_a_wrong_checksum(settings: Settings, algorithm: str, name: str) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", algorithm)
    mf = descriptor.with_suffix(".mf")
    line = re.escape(name) + r"\)\s*=\s*"
    mf.write_text(re.sub(f"({line})(.)", lambda m: m[1] + ("1" if m[2] == "0" else "0"), mf.read_text()))
    error = refused(descriptor, settings)
    assert "checksum_mismatch" == error["code"]
    assert name in error["message"]


def test_data_beside_a_description_is_held_against_its_digest(settings: Settings) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", None)
    raw = descriptor.with_name("raw")
    raw.write_bytes(os.urandom(1 << 20))
    descriptor.with_name(DISKS[1]).unlink()
    vmdk(raw, descriptor.with_name(DISKS[1]), "monolithicFlat")
    raw.unlink()
    flat = "db01-disk2-flat.vmdk"
    describe(descriptor)
    write_digests(descriptor, "sha256", (*DISKS, NVRAM, flat))
    with descriptor.with_name(flat).open("r+b") as file:
        file.write(b"damaged")
    error = refused(descriptor, settings)
    assert ("checksum_mismatch", True) == (error["code"], flat in error["message"])


def test_disk_of_the_wrong_size_without_a_digest(settings: Settings) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", None)
    with descriptor.with_name(DISKS[1]).open("ab") as file:
        file.write(bytes(512))
    error = refused(descriptor, settings)
    assert ("disk_size", True) == (error["code"], DISKS[1] in error["message"])


def break_nothing(descriptor: Path) -> None:
    descriptor.with_name("web02.ovf").write_text(descriptor.read_text())


def compress(descriptor: Path) -> None:
    disk = descriptor.with_name(DISKS[0])
    disk.with_name(f"{disk.name}.gz").write_bytes(gzip.compress(disk.read_bytes()))
    disk.unlink()
    text = descriptor.read_text()
    descriptor.write_text(
        re.sub(f'"{disk.name}" (ovf:id="[^"]+")', rf'"{disk.name}.gz" \1 ovf:compression="gzip"', text)
    )


def cut(descriptor: Path) -> None:
    disk = descriptor.with_name(DISKS[0])
    data = disk.read_bytes()
    half = len(data) // 2 // 512 * 512
    disk.with_name(f"{disk.name}.000000000").write_bytes(data[:half])
    disk.with_name(f"{disk.name}.000000001").write_bytes(data[half:])
    disk.unlink()
    text = descriptor.read_text()
    descriptor.write_text(text.replace(f'"{disk.name}"', f'"{disk.name}" ovf:chunkSize="{half}"'))


@pytest.mark.parametrize(
    ("breaks", "code", "says"),
    [
        (break_nothing, "manifest_invalid", ["'db01.ovf', 'web02.ovf'", "a directory of its own"]),
        (lambda path: path.with_name(DISKS[2]).unlink(), "disk_missing", [DISKS[2]]),
        (lambda path: path.with_name(NVRAM).unlink(), "disk_missing", [NVRAM, "manifest create"]),
        (compress, "format_unsupported", [f"{DISKS[0]}.gz is compressed", "--directory"]),
        (cut, "format_unsupported", [f"{DISKS[0]}.000000000 is in chunks", "--directory"]),
        (lambda path: path.write_text(path.read_text()[:900]), "manifest_unreadable", ["it is no complete XML"]),
        (lambda path: path.write_text("<nonsense/>"), "manifest_invalid", ["its root element is 'nonsense'"]),
        (lambda path: path.with_name(DISKS[0]).write_bytes(bytes(4096)), "format_mismatch", [DISKS[0]]),
    ],
)
def test_what_is_refused(settings: Settings, breaks: Callable[[Path], object], code: str, says: list[str]) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", None)
    breaks(descriptor)
    if code == "format_mismatch":
        describe(descriptor)
    error = refused(descriptor, accepting(settings, incomplete_grace_seconds=0))
    assert code == error["code"], error
    for text in says:
        assert text in error["message"] + error["hint"]


def test_disk_without_its_file_in_the_references_is_not_left_out(settings: Settings) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", None)
    descriptor.write_text(descriptor.read_text().replace('ovf:fileRef="file2"', 'ovf:fileRef="file9"'))
    error = refused(descriptor, settings)
    assert ("disk_missing", True) == (error["code"], "a disk with the file 'file9'" in error["message"])


def test_disk_that_the_vm_does_not_have_is_spoken_of(settings: Settings) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", None)
    shutil.copyfile(descriptor.with_name(DISKS[1]), descriptor.with_name("spare.vmdk"))
    line = '<File ovf:href="spare.vmdk" ovf:id="file8" ovf:size="0"/>'
    descriptor.write_text(descriptor.read_text().replace("</References>", f"{line}</References>"))
    describe(descriptor)
    (warning,) = (one for one in migrated(descriptor, settings)["warnings"] if one["code"] == "disk_unused")
    assert "'spare.vmdk' is no disk of the VM" in warning["message"]


def test_remedy_of_a_packed_export_works(settings: Settings, ctl: Ctl) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", None)
    compress(descriptor)
    command = re.search("`(hyper2kvmctl [^`]*)`;", refused(descriptor, settings)["hint"])
    assert command is not None
    assert 0 == ctl(*command[1].split()[1:]).returncode
    unpacked = settings.exports_dir / "db01-unpacked"
    assert "succeeded" == migrated(unpacked / "db01.ovf", settings)["status"]


def test_job_that_was_killed_goes_on(settings: Settings) -> None:
    descriptor = export_ovf(settings.exports_dir / "db01", mib=48)
    process = start(descriptor.parent, settings)
    deadline = time.monotonic() + 120
    journal: list[Path] = []
    while not (journal and json.loads(journal[0].read_text()).get("converted")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        journal = [*settings.work_dir.glob("db01-*/journal.json")]
    process.kill()
    process.wait()
    converted = {file["inode"] for file in json.loads(journal[0].read_text())["converted"].values()}
    report = migrated(descriptor, settings)
    assert 2 == report["attempts"]
    assert converted <= {path.stat().st_ino for path in settings.output_dir.iterdir()}
