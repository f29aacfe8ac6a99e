"""What a manifest may ask for, done on small real disks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.settings.model import Retry, Settings
from tests.conftest import MakeExport, disk_entry, report_of, run_job, write_manifest


def info(path: Path) -> dict[str, Any]:
    done = subprocess.run(["qemu-img", "info", "--output=json", path], capture_output=True, check=True)
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def same(source: Path, target: Path, target_format: str, source_format: str = "raw") -> bool:
    command = ["qemu-img", "compare", "-f", source_format, "-F", target_format]
    return subprocess.run([*command, source, target], capture_output=True, check=False).returncode == 0


def test_every_disk_of_a_vm_arrives_and_the_boot_disk_is_known(scratch: Settings) -> None:
    export = scratch.exports_dir / "db01"
    export.mkdir()
    entries = []
    for number, kind in enumerate(("data", "boot", "data")):
        disk = export / f"d{number}.raw"
        disk.write_bytes(os.urandom(1 << 20))
        entries.append(disk_entry(disk, id=f"disk-{number}", disk_type=kind, boot_order_hint=number))
    write_manifest(export, entries)
    done = run_job(export, scratch)
    assert 0 == done.returncode, done.stderr
    disks = report_of(export)["disks"]
    assert [False, True, False] == [disk["boot"] for disk in disks]
    for number, disk in enumerate(disks):
        assert str(scratch.output_dir / f"db01-disk-{number}.qcow2") == disk["target"]
        assert same(export / f"d{number}.raw", Path(disk["target"]), "qcow2")


def test_one_bad_disk_of_several_publishes_none(scratch: Settings) -> None:
    export = scratch.exports_dir / "db01"
    export.mkdir()
    entries = []
    for number in range(9):
        disk = export / f"d{number}.raw"
        disk.write_bytes(os.urandom(1 << 20))
        entries.append(disk_entry(disk, id=f"disk-{number}"))
    write_manifest(export, entries)
    (export / "d2.raw").write_bytes(os.urandom(1 << 20))
    assert 1 == run_job(export, scratch).returncode
    assert "disks[2].checksum" == report_of(export)["error"]["field"]
    assert [] == list(scratch.output_dir.iterdir())


def test_the_format_the_name_and_an_allowed_directory_are_the_manifests_choice(
    scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    settings = Settings.model_validate(
        {**scratch.model_dump(by_alias=True), "output": {"allowed_dirs": [tmp_path / "other"]}}
    )
    export = make_export(
        pipeline={"convert": {"enabled": True}, "inspect": {"enabled": False}, "fix": {"enabled": False}},
        output={"directory": str(tmp_path / "other"), "format": "raw", "filename": "web.img"},
    )
    done = run_job(export, settings)
    assert 0 == done.returncode, done.stderr
    assert same(export / "web01-disk-0.raw", tmp_path / "other/web.img", "raw")
    assert [] == list(scratch.output_dir.iterdir())


def test_the_exports_own_directory_means_no_wish(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export(output={"directory": str(scratch.exports_dir / "web01")})
    assert 0 == run_job(export, scratch).returncode
    assert (scratch.output_dir / "web01-disk-0.qcow2").exists()


def test_compression_makes_the_disk_smaller(scratch: Settings) -> None:
    sizes = {}
    for compress in (False, True):
        export = scratch.exports_dir / f"vm-{compress}"
        export.mkdir()
        disk = export / "d.raw"
        disk.write_bytes(b"all work and no play " * 100_000)
        os.truncate(disk, 2_097_152 + 1024)
        pipeline = {
            "inspect": {"enabled": False},
            "fix": {"enabled": False},
            "convert": {"enabled": True, "compression": compress},
        }
        write_manifest(export, [disk_entry(disk)], pipeline=pipeline)
        assert 0 == run_job(export, scratch).returncode
        sizes[compress] = info(scratch.output_dir / f"vm-{compress}-disk-0.qcow2")["actual-size"]
    assert sizes[True] < sizes[False] / 2


def test_a_dry_run_in_the_manifest_is_reported_as_such_and_writes_no_disk(
    scratch: Settings, make_export: MakeExport
) -> None:
    export = make_export(options={"dry_run": True})
    assert 0 == run_job(export, scratch).returncode
    document = report_of(export)
    assert ("succeeded", True) == (document["status"], document["dry_run"])
    assert [] == list(scratch.output_dir.iterdir())


def test_a_copy_of_the_report_is_written_under_the_name_that_was_asked_for(
    scratch: Settings, make_export: MakeExport
) -> None:
    export = make_export(options={"report": {"enabled": True, "path": "report.json"}})
    assert 0 == run_job(export, scratch).returncode
    assert report_of(export) == json.loads((export / "report.json").read_text())


@pytest.mark.parametrize("name", ["web01-disk-0.raw", "manifest.json", "web01.ovf", ".hyper2kvmd.lock"])
def test_the_copy_of_the_report_never_takes_the_place_of_another_file(
    scratch: Settings, make_export: MakeExport, name: str
) -> None:
    export = make_export(options={"report": {"enabled": True, "path": name}})
    (export / "web01.ovf").write_text("<Envelope/>")
    before = {path.name: path.read_bytes() for path in export.iterdir()}
    run_job(export, scratch)
    assert before == {path: (export / path).read_bytes() for path in before}


def test_a_source_that_changes_during_the_copy_is_not_published(
    scratch: Settings, make_export: MakeExport, fake: Any
) -> None:
    export = make_export()
    disk = export / "web01-disk-0.raw"
    manifest = json.loads((export / "manifest.json").read_text())
    del manifest["disks"][0]["checksum"]
    (export / "manifest.json").write_text(json.dumps(manifest))
    fake("qemu-img", f'[ "$1" = convert ] && printf x | dd of={disk} conv=notrunc\nexec /usr/bin/qemu-img "$@"\n')
    assert 1 == run_job(export, scratch).returncode
    assert "source_changed" == report_of(export)["error"]["code"]
    assert [] == list(scratch.output_dir.iterdir())


def test_an_export_as_nutanix_has_it_is_converted_without_a_word_about_its_labels(scratch: Settings) -> None:
    """Disks are called scsi.0 and so on; what its exporter says of firmware and system means nothing."""
    export = scratch.exports_dir / "web01"
    export.mkdir()
    raw, disk = export.with_name("web01.raw"), export / "scsi.0.qcow2"
    raw.write_bytes(os.urandom(1 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk], check=True)
    write_manifest(
        export,
        [disk_entry(disk, "qcow2", label="scsi.0", disk_type="unknown")],
        source={"provider": "nutanix", "vm_id": "0a1b", "vm_name": "web01", "export_method": "nutanix-v3-api"},
        vm={"cpu": 2, "mem_gb": 4, "firmware": "bios", "os_hint": "unknown"},
        output={"directory": str(export), "format": "qcow2"},
    )
    assert 0 == run_job(export, scratch).returncode
    document = report_of(export)
    assert ["no_nics"] == [warning["code"] for warning in document["warnings"]]
    target = scratch.output_dir / "web01-disk-0.qcow2"
    assert str(target) == document["disks"][0]["target"]
    assert same(raw, target, "qcow2")


def test_tags_reach_the_report(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export(metadata={"tags": ["production", "database"]})
    run_job(export, scratch)
    assert {"production": "", "database": ""} == report_of(export)["tags"]


def test_a_guest_that_nobody_knows_is_converted_as_it_is_when_fix_is_off(
    scratch: Settings, make_export: MakeExport
) -> None:
    export = make_export(
        pipeline={"inspect": {"enabled": True}, "fix": {"enabled": False}, "convert": {"enabled": True}}
    )
    assert 0 == run_job(export, scratch).returncode
    document = report_of(export)
    assert "os_unknown" in [warning["code"] for warning in document["warnings"]]
    assert same(export / "web01-disk-0.raw", scratch.output_dir / "web01-disk-0.qcow2", "qcow2")


def test_a_guest_that_cannot_be_fixed_gets_hardware_that_every_guest_knows_if_the_settings_allow_it(
    scratch: Settings, make_export: MakeExport
) -> None:
    settings = Settings.model_validate({**scratch.model_dump(by_alias=True), "fix": {"allow_unsupported": True}})
    export = make_export(
        pipeline={"inspect": {"enabled": True}, "fix": {"enabled": True}, "convert": {"enabled": True}}
    )
    assert 0 == run_job(export, settings).returncode
    document = report_of(export)
    assert document["results"]["fix"]["compatible"]
    assert same(export / "web01-disk-0.raw", scratch.output_dir / "web01-disk-0.qcow2", "qcow2")


def test_a_disk_that_gets_longer_is_not_damaged_but_not_there_yet(
    scratch: Settings, make_export: MakeExport, fake: Any
) -> None:
    """Whoever copies an export in takes a break that is longer than settle_seconds, and goes on while the job looks."""
    export = make_export(size=4 << 20)
    disk = export / "web01-disk-0.raw"
    whole = disk.read_bytes()
    disk.write_bytes(whole[: 1 << 20])
    arrives = f'if [ "$1" = measure ] && [ -e {export}/rest ]; then cat {export}/rest >{disk}; rm {export}/rest; fi'
    fake("qemu-img", f'{arrives}\nexec /usr/bin/qemu-img "$@"\n')
    (export / "rest").write_bytes(whole)
    settings = scratch.model_copy(update={"retry": Retry(delay_seconds=0)})
    done = run_job(export, settings)
    document = report_of(export)
    assert (75, "retrying", "export_incomplete") == (done.returncode, document["status"], document["error"]["code"])
    assert f"{disk} is still being written: it had {1 << 20} bytes" in document["error"]["message"]
    assert [] == list(scratch.output_dir.iterdir())
    assert 0 == run_job(export, settings).returncode
    assert "succeeded" == report_of(export)["status"]


def test_a_disk_that_stays_too_short_is_what_it_seems(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export(size=4 << 20)
    os.truncate(export / "web01-disk-0.raw", 1 << 20)
    assert 1 == run_job(export, scratch).returncode
    assert "checksum_mismatch" == report_of(export)["error"]["code"]
