"""Exporters that hand over by themselves: an exporter that does what hypersdk's does, and the daemon as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, disk_entry, report_of, write_manifest
from tests.integration.daemon.test_daemon import change, daemon, free_port, look_again, wait_until


@pytest.fixture
def handing(scratch: Settings, tmp_path: Path) -> Settings:
    """Settings with a queue; the exports lie where nobody looks unless somebody hands them over."""
    for name in ("queue", "answers", "elsewhere"):
        (tmp_path / name).mkdir()
    hypersdk: dict[str, Any] = {"queue_dir": tmp_path / "queue", "output_dir": tmp_path / "answers"}
    hypersdk["allowed_dirs"] = [tmp_path / "elsewhere"]
    return change(scratch, hypersdk=hypersdk, retry={"delay_seconds": 0.1})


class Exporter:
    """What the exporter does, by its source: it copies its manifest in place, and then looks at two names only."""

    def __init__(self, settings: Settings) -> None:
        assert settings.hypersdk.queue_dir is not None
        assert settings.hypersdk.output_dir is not None
        self.queue, self.answers = settings.hypersdk.queue_dir, settings.hypersdk.output_dir
        self.elsewhere = settings.hypersdk.allowed_dirs[0]

    def export(self, name: str, directory: Path | None = None, **changes: Any) -> Path:
        """An export with two disks, of which the second is the one that it boots from."""
        directory = directory or self.elsewhere / name
        directory.mkdir(exist_ok=True)
        disks = []
        for index, kind in ((0, "data"), (1, "boot")):
            disk = directory / f"{name}-disk-{index}.raw"
            disk.write_bytes(os.urandom(1 << 20))
            disks.append(disk_entry(disk, id=f"disk-{index}", disk_type=kind, boot_order_hint=index))
        changes.setdefault("source", {"provider": "vsphere", "vm_id": "vm-1", "vm_name": name})
        write_manifest(directory, disks, **changes).rename(directory / "artifact-manifest.json")
        return directory

    def hand_over(self, export: Path) -> None:
        """All VMs have the same name there; it is written as it comes, for nobody else to read."""
        data = (export / "artifact-manifest.json").read_bytes()
        fd = os.open(self.queue / "artifact-manifest.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "wb", buffering=0) as file:
            file.write(data)

    def told(self, name: str) -> Path | str | None:
        """The disk, what went wrong, or None so far."""
        if (link := self.answers / f"{name}.qcow2").exists():
            return link.resolve()
        error = self.answers / f"{name}.error"
        return error.read_text() if error.exists() else None

    def wait(self, name: str) -> Path | str:
        wait_until(lambda: self.told(name) is not None, 60)
        told = self.told(name)
        assert told is not None
        return told

    def left(self) -> list[str]:
        """What is in the queue, as far as it waits."""
        return sorted(path.name for path in self.queue.iterdir() if not path.name.startswith(".hyper2kvmd.answered."))


@pytest.fixture
def exporter(handing: Settings) -> Exporter:
    return Exporter(handing)


def test_what_is_handed_over_is_migrated_and_its_exporter_told_of_the_disk_that_it_boots_from(
    handing: Settings, exporter: Exporter
) -> None:
    export = exporter.export("Web Server 01")
    with daemon(handing):
        exporter.hand_over(export)
        told = exporter.wait("Web Server 01")
        wait_until(lambda: exporter.left() == [])
    report = report_of(export)
    assert "succeeded" == report["status"]
    assert told == Path(next(disk["target"] for disk in report["disks"] if disk["id"] == "disk-1"))
    assert "qcow2" == json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(told)]))["format"]
    assert ["Web Server 01.qcow2"] == sorted(os.listdir(exporter.answers))


def test_what_lies_elsewhere_is_left_alone_until_it_is_handed_over(handing: Settings, exporter: Exporter) -> None:
    port = free_port()
    left, handed = exporter.export("left"), exporter.export("handed")
    with daemon(change(handing, metrics={"listen": f"127.0.0.1:{port}"})):
        look_again(port)
        exporter.hand_over(handed)
        assert isinstance(exporter.wait("handed"), Path)
    assert not (left / "migration-report.json").exists()


def test_an_export_in_exports_dir_is_migrated_once_whoever_speaks_of_it_first(
    handing: Settings, exporter: Exporter
) -> None:
    export = exporter.export("web01", handing.exports_dir / "web01")
    with daemon(handing):
        wait_until((export / "migration-report.json").exists)
        exporter.hand_over(export)
        assert isinstance(exporter.wait("web01"), Path)
    assert 1 == report_of(export)["attempts"]


def test_vms_handed_over_one_right_after_the_other_are_all_migrated(handing: Settings, exporter: Exporter) -> None:
    exports = [exporter.export(f"vm{index}") for index in range(6)]
    # A look at all exports takes a while; nothing here may depend on when the next one begins.
    with daemon(change(handing, scan_interval_seconds=3600)) as process:
        wait_until(lambda: handing.work_dir.exists() and process.poll() is None)
        exporter.hand_over(exports[0])
        exporter.wait("vm0")
        for export in exports[1:]:
            wait_until(lambda: not (exporter.queue / "artifact-manifest.json").exists(), 5)
            exporter.hand_over(export)
        told = [exporter.wait(f"vm{index}") for index in range(6)]
    assert 6 == len({*told})
    assert all(isinstance(answer, Path) for answer in told)


def test_a_manifest_is_taken_at_once_however_long_a_look_takes(handing: Settings, exporter: Exporter) -> None:
    for number in range(4000):
        (handing.exports_dir / f"other-{number}").mkdir()
    port = free_port()
    with daemon(change(handing, metrics={"listen": f"127.0.0.1:{port}"})):
        look_again(port, 1)
        began = time.monotonic()
        for number in range(30):
            (exporter.queue / "artifact-manifest.json").write_text(json.dumps({"source": {"vm_name": f"vm{number}"}}))
            wait_until(lambda: not (exporter.queue / "artifact-manifest.json").exists())
        taken = time.monotonic() - began
        told = [exporter.wait(f"vm{number}") for number in range(30)]
    assert all("manifest_invalid" in str(one) for one in told)
    assert 3 > taken, "30 looks with their pauses take half a minute"


def test_a_manifest_that_is_still_being_written_is_taken_and_waited_for(handing: Settings, exporter: Exporter) -> None:
    export = exporter.export("slow")
    other = exporter.export("other")
    data = (export / "artifact-manifest.json").read_bytes()
    with daemon(handing), (exporter.queue / "artifact-manifest.json").open("wb", buffering=0) as file:
        file.write(data[:100])
        wait_until(lambda: not (exporter.queue / "artifact-manifest.json").exists())
        exporter.hand_over(other)
        assert isinstance(exporter.wait("other"), Path)
        file.write(data[100:])
        assert isinstance(exporter.wait("slow"), Path)
    assert [] == exporter.left()


def test_what_is_no_manifest_is_told_after_the_grace_period(handing: Settings, exporter: Exporter) -> None:
    with daemon(change(handing, incomplete_grace_seconds=1)):
        (exporter.queue / "notes.json").write_text('{"half": ')
        told = exporter.wait("notes")
    assert isinstance(told, str)
    assert told.startswith("manifest_unreadable: not complete JSON")
    assert "export the VM again" in told


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("outside", "no directory of"),
        ("apart", "lie in different directories"),
        ("relative", "has no directory"),
        ("gone", "is not there"),
        ("without", "holds no manifest"),
        ("another", "is another manifest than the one in the queue"),
    ],
)
def test_disks_that_cannot_be_used_are_told_with_the_remedy_and_touched_by_nobody(
    handing: Settings, exporter: Exporter, tmp_path: Path, place: str, said: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    export = exporter.export("bad", outside / "bad" if place == "outside" else None)
    manifest = export / "artifact-manifest.json"
    content = json.loads(manifest.read_text())
    if place == "apart":
        content["disks"][0]["local_path"] = str(exporter.elsewhere / "other" / "x.raw")
    if place == "relative":
        content["disks"][0]["local_path"] = "x.raw"
    manifest.write_text(json.dumps(content))
    exporter.hand_over(export)
    if place == "gone":
        export.rename(tmp_path / "gone")
        export = tmp_path / "gone"
    if place == "without":
        manifest.unlink()
    if place == "another":
        manifest.write_text(json.dumps({**content, "tags": {"of": "another"}}))
    with daemon(handing):
        told = exporter.wait("bad")
        wait_until(lambda: exporter.left() == [])
    assert isinstance(told, str)
    assert said in told
    assert 2 == len([line for line in told.splitlines() if not line.startswith("export: ")]), "finding and remedy"
    assert not list(handing.output_dir.iterdir())
    if place in ("outside", "apart", "relative", "gone"):
        assert not (export / ".hyper2kvmd.lock").exists()


def test_a_vm_that_fails_is_told_and_its_success_after_a_retry_as_well(
    handing: Settings, exporter: Exporter, tmp_path: Path
) -> None:
    export = exporter.export("repaired")
    disk = export / "repaired-disk-1.raw"
    good = disk.read_bytes()
    disk.write_bytes(bytes(len(good)))
    with daemon(handing):
        exporter.hand_over(export)
        told = exporter.wait("repaired")
        assert isinstance(told, str)
        assert told.startswith("checksum_mismatch: ")
        assert report_of(export)["error"]["hint"] in told
        assert f"export: {export}" in told
        disk.write_bytes(good)
        # By its name: an export that was handed over is one like all others.
        retry = [sys.executable, "-m", "hyper2kvmd.ctl", "retry", "repaired", "--config", str(tmp_path / "daemon.json")]
        subprocess.run(retry, check=True)
        wait_until(lambda: isinstance(exporter.told("repaired"), Path), 60)
    assert ["repaired.qcow2"] == os.listdir(exporter.answers)


def test_an_old_answer_is_not_taken_for_the_new_one(handing: Settings, exporter: Exporter) -> None:
    export = exporter.export("again")
    with daemon(handing):
        exporter.hand_over(export)
        first = exporter.wait("again")
        assert isinstance(first, Path)
        second = exporter.export("again", exporter.elsewhere / "again-2")
        (second / "again-disk-1.raw").write_bytes(b"not the disk of the manifest")
        exporter.hand_over(second)
        wait_until(lambda: exporter.told("again") != first, 4)  # the exporter looks for the first time after five
        assert isinstance(exporter.wait("again"), str)
    assert first.exists(), "a disk that may have a domain is nobody's to take away"


def test_somebody_elses_file_in_the_place_of_the_answer_stays_and_is_told_of(
    handing: Settings, exporter: Exporter
) -> None:
    theirs = exporter.answers / "taken.qcow2"
    theirs.write_text("a disk")
    export = exporter.export("taken")
    with daemon(handing):
        exporter.hand_over(export)
        wait_until((exporter.answers / "taken.error").exists)
    assert "a disk" == theirs.read_text()
    assert "output_exists" in (exporter.answers / "taken.error").read_text()


@pytest.mark.parametrize("moment", ["taken", "claimed", "reported", "told"])
def test_a_daemon_killed_at_any_step_loses_nothing_and_does_nothing_twice(
    handing: Settings, exporter: Exporter, moment: str
) -> None:
    exports = [exporter.export(name) for name in ("one", "two")]

    def reached() -> bool:
        if moment == "taken":
            return any(".taken." in name for name in os.listdir(exporter.queue))
        if moment == "told":
            return exporter.told("one") is not None
        return (exports[0] / {"claimed": ".hyper2kvmd.lock", "reported": "migration-report.json"}[moment]).exists()

    with daemon(handing) as process:
        exporter.hand_over(exports[0])
        wait_until(reached)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not (exporter.queue / "artifact-manifest.json").exists():
        exporter.hand_over(exports[1])  # while nobody is there
    with daemon(handing):
        told = [exporter.wait(name) for name in ("one", "two")]
        wait_until(lambda: exporter.left() == [])
    assert all(isinstance(answer, Path) for answer in told), told
    assert {"one.qcow2", "two.qcow2"} == {*os.listdir(exporter.answers)}
    assert 4 == len([path for path in handing.output_dir.iterdir() if not path.name.startswith(".")])
    if moment in ("reported", "told"):
        assert 1 == report_of(exports[0])["attempts"]


def test_the_exporters_own_way_without_a_service_prints_where_the_disk_is(
    scratch: Settings, make_export: MakeExport, ctl: Ctl
) -> None:
    manifest = make_export() / "manifest.json"
    dry = ctl("migrate", "--print-output", manifest, "-v", "--dry-run")
    assert 0 == dry.returncode, dry.stderr
    assert "Output:" not in dry.stdout
    for _ in range(2):  # the second time, it is migrated already
        done = ctl("migrate", "--print-output", manifest, "-v")
        assert 0 == done.returncode, done.stderr
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith("Output:")]
        assert [["Output:", str(scratch.output_dir / "web01-disk-0.qcow2")]] == lines
    (manifest.parent / "migration-report.json").unlink()
    again = ctl("migrate", "--print-output", manifest)
    assert 1 == again.returncode
    assert "Output:" not in again.stdout
