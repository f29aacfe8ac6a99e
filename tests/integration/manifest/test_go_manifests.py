"""Manifests as hypersdk's own Go library wrote them, byte for byte: they load, round-trip, and migrate."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from hyper2kvmd.authoring.artifact import ArtifactManifest
from hyper2kvmd.authoring.rewrite import dump
from hyper2kvmd.manifest import document
from hyper2kvmd.settings.model import Settings
from tests import DATA
from tests.conftest import Ctl, report_of

LIBRARY = DATA / "manifests/go-library"
NAMES = ("artifact-manifest.json", "full.json", "full.yaml")
DISKS = {name: ["disk-0", "data_1"] for name in NAMES} | {"artifact-manifest.json": ["disk-1"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_of_the_go_library_loads(name: str) -> None:
    loaded = ArtifactManifest.load(LIBRARY / name)
    assert ("go", "web-01") == (loaded.manifest.dialect, loaded.manifest.vm_name)
    assert DISKS[name] == [disk.id for disk in (loaded.get_boot_disk(), *loaded.get_data_disks())]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_of_the_go_library_survives_being_written_again(name: str) -> None:
    content = document.load((LIBRARY / name).read_bytes(), name)
    for other in ("manifest.json", "manifest.yaml"):
        assert content == document.load(dump(content, other), other)


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_of_the_go_library_goes_to_the_guides_dialect_and_back(ctl: Ctl, tmp_path: Path, name: str) -> None:
    there, back = tmp_path / "there.json", tmp_path / "back.json"
    assert 0 == ctl("manifest", "upgrade", LIBRARY / name, "-o", there).returncode
    assert 0 == ctl("manifest", "upgrade", there, "-o", back).returncode
    was, now = (ArtifactManifest.load(path).manifest for path in (LIBRARY / name, back))
    same = ("dialect", "vm_name", "vm_id", "nics", "options", "notes", "exporter_warnings", "job_id", "vm")
    assert {key: getattr(was, key) for key in same} == {key: getattr(now, key) for key in same}
    disks = [[(disk.id, disk.format, disk.sha256, disk.path) for disk in one.disks] for one in (was, now)]
    assert disks[0] == disks[1]


@pytest.mark.parametrize("name", NAMES)
def test_an_export_with_a_manifest_of_the_go_library_is_migrated(ctl: Ctl, scratch: Settings, name: str) -> None:
    export = scratch.exports_dir / "web-01"
    export.mkdir()
    disk = export / "web-01-disk-0.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", disk, "64M"], check=True)
    (export / "data.raw").write_bytes(b"data" * (1 << 18))
    text = (LIBRARY / name).read_text()
    # The disks of the library's own run are not at hand, so the checksum is that of ours; and `full` asks for a dry
    # run only, and for an output directory that is none of this test's.
    old = ArtifactManifest.load(LIBRARY / name).get_boot_disk().sha256
    assert old is not None
    text = text.replace(old, hashlib.sha256(disk.read_bytes()).hexdigest())
    for true, false in (('"dry_run": true', '"dry_run": false'), ("dry_run: true", "dry_run: false")):
        text = text.replace(true, false)
    (export / name).write_text(text)
    done = ctl(
        "migrate", export / name, "--skip-fix", "--stages", "convert,validate", "--output-dir", scratch.output_dir
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    report = report_of(export)
    vmdk_target, *others = (Path(entry["target"]) for entry in report["disks"])
    info = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", vmdk_target], check=True, capture_output=True, text=True
        ).stdout
    )
    assert ("qcow2" if name == "artifact-manifest.json" else "raw", 64 << 20) == (info["format"], info["virtual-size"])
    assert [b"data" * (1 << 18)] * (name != "artifact-manifest.json") == [path.read_bytes() for path in others]
