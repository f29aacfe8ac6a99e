"""Disks that our own reader converts: VERIFY is that same read, and what it finds decides what is published."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.settings.model import Settings
from tests.conftest import disk_entry, report_of, run_job, write_manifest
from tests.integration.job.test_pipeline import same

MIB = 1 << 20
KINDS = ("streamOptimized", "monolithicSparse")


def stream(directory: Path, number: int = 0, kind: str = "streamOptimized") -> Path:
    """A sparse VMDK with a few MiB of data."""
    raw, path = directory / "raw", directory / f"d{number}.vmdk"
    with raw.open("wb") as file:
        file.truncate(40 * MIB)
        for offset in (0, 17 * MIB, 40 * MIB - 70_000):
            file.seek(offset)
            file.write(os.urandom(70_000))
    options = ("-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}")
    subprocess.run(["qemu-img", "convert", *options, raw, path], check=True)
    raw.unlink()
    return path


def dropped(settings: Settings, *kinds: str, **convert: Any) -> tuple[Path, list[dict[str, Any]]]:
    """An export with a disk of each kind; its directory, and the disks of its manifest."""
    export = settings.exports_dir / "web01"
    export.mkdir()
    entries = []
    for number, kind in enumerate(kinds):
        if kind == "raw":
            path = export / f"d{number}.raw"
            path.write_bytes(os.urandom(MIB))
        else:
            path = stream(export, number, kind)
        entries.append(disk_entry(path, path.suffix[1:], id=f"disk-{number}", boot_order_hint=number))
    write_manifest(export, entries, pipeline=pipeline(convert))
    return export, entries


def pipeline(convert: dict[str, Any] | None = None, *, verify: bool = True) -> dict[str, Any]:
    """The stages of a manifest, without those that open the guest."""
    return {
        "inspect": {"enabled": False},
        "fix": {"enabled": False},
        "convert": {"enabled": True, **(convert or {})},
        "validate": {"enabled": True, "verify_checksum": verify},
    }


def stages(export: Path) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in report_of(export)["stages"]}


@pytest.mark.parametrize(
    "wish", ({"target_format": "qcow2"}, {"target_format": "raw"}, {"target_format": "qcow2", "compression": True})
)
def test_each_disk_is_converted_by_what_is_best_for_it_and_verified_all_the_same(
    wish: dict[str, Any], scratch: Settings
) -> None:
    export, entries = dropped(scratch, "raw", *KINDS, **wish)
    done = run_job(export, scratch)
    assert 0 == done.returncode, done.stderr
    report = report_of(export)
    assert ["qemu-img", "stream", "stream"] == [disk["engine"] for disk in report["disks"]]
    for disk, entry in zip(report["disks"], entries, strict=True):
        assert entry["checksum"] == f"sha256:{disk['source_sha256']}"
        assert disk["source_verified"]
        source, target = export / disk["source"], Path(disk["target"])
        assert same(source, target, wish["target_format"], disk["source_format"])
    assert ("done", "done") == (stages(export)["verify"], stages(export)["convert"])


def test_whoever_wants_qemu_img_gets_it(scratch: Settings) -> None:
    settings = Settings.model_validate({**scratch.model_dump(by_alias=True), "convert": {"engine": "qemu-img"}})
    export, _ = dropped(settings, *KINDS)
    done = run_job(export, settings)
    assert 0 == done.returncode, done.stderr
    disks = report_of(export)["disks"]
    assert ["qemu-img", "qemu-img"] == [disk["engine"] for disk in disks]
    assert all(disk["source_verified"] for disk in disks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_checksum_publishes_nothing(kind: str, scratch: Settings) -> None:
    export, entries = dropped(scratch, "raw", kind)
    entries[1]["checksum"] = "sha256:" + "0" * 64
    write_manifest(export, entries, pipeline=pipeline())
    assert 1 == run_job(export, scratch).returncode
    report = report_of(export)
    right = hashlib.sha256((export / "d1.vmdk").read_bytes()).hexdigest()
    assert ("checksum_mismatch", "disks[1].checksum") == (report["error"]["code"], report["error"]["field"])
    assert right in report["error"]["message"]
    assert [] == list(scratch.output_dir.iterdir())


def test_a_disk_without_a_checksum_gets_one_that_nobody_verified(scratch: Settings) -> None:
    export, entries = dropped(scratch, "streamOptimized")
    del entries[0]["checksum"]
    write_manifest(export, entries, pipeline=pipeline())
    done = run_job(export, scratch)
    assert 0 == done.returncode, done.stderr
    (disk,) = report_of(export)["disks"]
    assert hashlib.sha256((export / "d0.vmdk").read_bytes()).hexdigest() == disk["source_sha256"]
    assert not disk["source_verified"]
    assert "skipped" == stages(export)["verify"]


def test_a_checksum_that_nobody_asked_to_verify_and_is_wrong_is_a_warning(scratch: Settings) -> None:
    export, entries = dropped(scratch, "streamOptimized")
    entries[0]["checksum"] = "sha256:" + "0" * 64
    write_manifest(export, entries, pipeline=pipeline(verify=False))
    done = run_job(export, scratch)
    assert 0 == done.returncode, done.stderr
    report = report_of(export)
    assert "checksum_mismatch" in [warning["code"] for warning in report["warnings"]]
    assert not report["disks"][0]["source_verified"]


@pytest.mark.parametrize("system", ("xfs", "btrfs"))
def test_a_raw_disk_that_stays_raw_shares_its_blocks_where_the_file_system_can_do_that(
    system: str, scratch: Settings, tmp_path: Path
) -> None:
    image, mount = tmp_path / "image", tmp_path / "shared"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run([f"mkfs.{system}", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        for name in ("exports", "images", "work"):
            (mount / name).mkdir()
        places = {"exports_dir": mount / "exports", "output_dir": mount / "images", "work_dir": mount / "work"}
        settings = Settings.model_validate({**scratch.model_dump(by_alias=True), **places})
        export, entries = dropped(settings, "raw", target_format="raw")
        with (export / "d0.raw").open("ab") as file:
            file.write(b"x" * 100)  # the last sector is not whole
        entries[0] = disk_entry(export / "d0.raw")
        write_manifest(export, entries, pipeline=pipeline({"target_format": "raw"}))
        done = run_job(export, settings)
        assert 0 == done.returncode, done.stderr
        (disk,) = report_of(export)["disks"]
        assert ("reflink", True) == (disk["engine"], disk["source_verified"])
        assert same(export / "d0.raw", Path(disk["target"]), "raw")
        assert 0 == Path(disk["target"]).stat().st_size % 512
        written = subprocess.check_output(["filefrag", "-v", disk["target"]], text=True)
        assert "shared" in written, written
    finally:
        subprocess.run(["umount", mount], check=True)
