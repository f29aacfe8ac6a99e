"""Bad input: each ends in a report that names file, value and remedy; the source is untouched, nothing is published."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.queue.names import LOCK, LOG, REPORT
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport, disk_entry, left_in, report_of, run_job, write_manifest
from tests.libvirtd import session

CANARY = b"root:CANARY-THAT-MUST-NEVER-LEAVE:0:0\n"


def img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, stdin=subprocess.DEVNULL)


def digests(directory: Path) -> dict[str, str]:
    """The content of everything the exporter wrote."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file() and not path.is_symlink() and path.name not in (LOCK, LOG, REPORT)
    }


def refused(export: Path, settings: Settings, code: str, *words: str) -> dict[str, Any]:
    """Run the job, and check that it ends with this error and leaves everything as it was."""
    before = digests(export)
    done = run_job(export, settings)
    assert done.returncode not in (0, 75), done.stderr
    document = report_of(export)
    error = document["error"]
    assert code == error["code"], error
    for word in words:
        text = f"{error['field']}: {error['message']}"
        assert word in text, f"{word!r} is not in {text!r}"
    assert error["hint"], "an error without a remedy"
    assert before == digests(export), "the source was changed"
    assert [] == list(settings.output_dir.iterdir()), "something was published"
    assert [] == left_in(settings.work_dir), "something was left behind"
    return document


@pytest.fixture
def raw(scratch: Settings) -> Path:
    """A disk with some data, to be made into images of any format."""
    path = scratch.work_dir.parent / "data.raw"
    with path.open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.seek(3 << 20)
        file.write(os.urandom(1 << 20))
        file.truncate(8 << 20)
    return path


def export_with(scratch: Settings, put: Callable[[Path], Path], format: str, **changes: Any) -> Path:
    """An export whose disk is made by `put(directory)`."""
    directory = scratch.exports_dir / "web01"
    directory.mkdir()
    disk = put(directory)
    write_manifest(directory, [disk_entry(disk, format, **changes)])
    return directory


# The manifest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"manifest_version": "2.0"}, "manifest_invalid", ["manifest_version", "2.0"]),
        ({"disks": []}, "manifest_invalid", ["disk"]),
        ({"source": {"vm_name": "../../x", "vm_id": "1", "provider": "v"}}, "manifest_invalid", ["../../x"]),
        ({"pipeline": {"convert": {"enabled": True, "compress": "yes"}}}, "manifest_invalid", ["compress", "yes"]),
        ({"output": {"directory": "/etc"}}, "output_denied", ["/etc"]),
    ],
)
def test_a_wrong_manifest_is_refused(
    scratch: Settings, make_export: MakeExport, change: dict[str, Any], code: str, words: list[str]
) -> None:
    document = refused(make_export(**change), scratch, code, *words)
    assert ("blocked" if code == "output_denied" else "rejected") == document["status"]


def test_duplicate_ids_are_refused_with_both_places(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    manifest = json.loads((export / "manifest.json").read_text())
    manifest["disks"] *= 2
    (export / "manifest.json").write_text(json.dumps(manifest))
    document = refused(export, scratch, "manifest_invalid", "disk-0")
    assert "disks[1].id" == document["error"]["field"]


@pytest.mark.parametrize("size", [0, 1, 100, -2])
def test_a_manifest_that_stays_cut_off_is_rejected_after_the_grace_period(
    scratch: Settings, make_export: MakeExport, size: int
) -> None:
    export = make_export()
    whole = (export / "manifest.json").read_bytes()
    (export / "manifest.json").write_bytes(whole[:size])
    document = refused(export, scratch, "manifest_unreadable", "manifest.json")
    assert "rejected" == document["status"]


def test_a_symlinked_manifest_is_refused(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    (export / "manifest.json").rename(scratch.work_dir.parent / "m.json")
    (export / "manifest.json").symlink_to(scratch.work_dir.parent / "m.json")
    refused(export, scratch, "export_unsafe", "manifest.json", "symbolic link")


# The disks ------------------------------------------------------------------------------------------------


def test_a_missing_disk_is_named(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    (export / "web01-disk-0.raw").unlink()
    refused(export, scratch, "disk_missing", "web01-disk-0.raw")


def test_a_short_disk_without_a_checksum_is_refused(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    manifest = json.loads((export / "manifest.json").read_text())
    del manifest["disks"][0]["checksum"]
    (export / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(export / "web01-disk-0.raw", 1 << 19)
    refused(export, scratch, "disk_size", str(1 << 19), str(1 << 20))


def test_a_disk_with_another_checksum_is_refused(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    with (export / "web01-disk-0.raw").open("r+b") as file:
        file.seek(12345)
        file.write(b"x")
    document = refused(export, scratch, "checksum_mismatch", "web01-disk-0.raw")
    assert "disks[0].checksum" == document["error"]["field"]
    assert "failed" == document["status"]


def test_a_format_that_does_not_match_the_content_is_refused(scratch: Settings, raw: Path) -> None:
    def put(directory: Path) -> Path:
        img("convert", "-O", "qcow2", raw, directory / "d.raw")
        return directory / "d.raw"

    refused(export_with(scratch, put, "raw"), scratch, "format_mismatch", "d.raw", "qcow2")


@pytest.mark.parametrize("percent", [50, 90, 99])
def test_a_truncated_monolithic_sparse_vmdk_is_refused(scratch: Settings, raw: Path, percent: int) -> None:
    def put(directory: Path) -> Path:
        disk = directory / "d.vmdk"
        img("convert", "-O", "vmdk", "-o", "subformat=monolithicSparse", raw, disk)
        os.truncate(disk, disk.stat().st_size * percent // 100)
        return disk

    refused(export_with(scratch, put, "vmdk"), scratch, "image_corrupt", "d.vmdk")


def test_a_stream_optimized_vmdk_without_its_end_is_refused(scratch: Settings, raw: Path) -> None:
    def put(directory: Path) -> Path:
        disk = directory / "d.vmdk"
        img("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, disk)
        os.truncate(disk, disk.stat().st_size - 1536)
        return disk

    refused(export_with(scratch, put, "vmdk"), scratch, "image_corrupt", "d.vmdk")


@pytest.mark.parametrize("kind", ["backing", "data file"])
def test_a_qcow2_that_refers_to_another_file_is_refused(scratch: Settings, tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CANARY * 2000)

    def put(directory: Path) -> Path:
        disk = directory / "d.qcow2"
        if kind == "backing":
            img("create", "-f", "qcow2", "-b", secret, "-F", "raw", disk)
        else:
            img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on", disk, "1M")
        return disk

    refused(export_with(scratch, put, "qcow2"), scratch, "image_unsafe", "d.qcow2")


@pytest.mark.parametrize("extent", ["/etc/passwd", "../x", "sub/../../x", "/dev/zero", "json:{}", "nbd://127.0.0.1/x"])
def test_a_vmdk_descriptor_that_leads_outside_is_refused(scratch: Settings, extent: str) -> None:
    def put(directory: Path) -> Path:
        (directory.parent.parent / "x").write_bytes(CANARY * 2000)
        disk = directory / "d.vmdk"
        disk.write_text(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
            f'createType="monolithicFlat"\nRW 64 FLAT "{extent}" 0\nddb.adapterType = "lsilogic"\n'
        )
        return disk

    refused(export_with(scratch, put, "vmdk"), scratch, "image_unsafe", "d.vmdk")


@pytest.mark.parametrize("link", ["symbolic", "hard", "fifo"])
def test_a_disk_that_is_not_a_plain_file_is_refused(scratch: Settings, make_export: MakeExport, link: str) -> None:
    export = make_export()
    disk = export / "web01-disk-0.raw"
    elsewhere = scratch.work_dir.parent / "elsewhere"
    disk.rename(elsewhere)
    match link:
        case "symbolic":
            disk.symlink_to(elsewhere)
        case "hard":
            os.link(elsewhere, disk)
        case "fifo":
            os.mkfifo(disk)
    refused(export, scratch, "export_unsafe", "web01-disk-0.raw")


# The target -----------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_never_overwritten(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    other = scratch.output_dir / "web01-disk-0.qcow2"
    other.write_text("another VM's disk")
    done = run_job(export, scratch)
    assert 1 == done.returncode
    document = report_of(export)
    assert ("blocked", "output_exists") == (document["status"], document["error"]["code"])
    assert str(other) in document["error"]["message"]
    assert "another VM's disk" == other.read_text()
    assert [other] == list(scratch.output_dir.iterdir())


def test_an_output_directory_that_is_not_there_is_named(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    scratch.output_dir.rmdir()
    run_job(export, scratch)
    error = report_of(export)["error"]
    assert "output_denied" == error["code"]
    assert str(scratch.output_dir) in error["message"]


@pytest.fixture
def small_output(scratch: Settings) -> Any:
    """The output directory is a file system of 6 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", scratch.output_dir], check=True)
    yield scratch
    subprocess.run(["umount", scratch.output_dir], check=True)


def test_too_little_space_is_found_before_the_copy(small_output: Settings, make_export: MakeExport) -> None:
    export = make_export(size=32 << 20)
    done = run_job(export, small_output)
    assert 75 == done.returncode
    document = report_of(export)
    assert ("retrying", "no_space") == (document["status"], document["error"]["code"])
    assert str(small_output.output_dir) in document["error"]["message"]
    assert document["next_attempt_at"]
    assert "convert" not in [stage["name"] for stage in document["stages"]]


def test_a_cause_that_does_not_pass_is_a_failure_in_the_end(scratch: Settings, make_export: MakeExport) -> None:
    away = {"uri": "qemu+unix:///system?socket=/nowhere", "import": True}
    settings = Settings.model_validate(
        {**scratch.model_dump(by_alias=True), "libvirt": away, "retry": {"max_attempts": 2, "delay_seconds": 0}}
    )
    export = make_export()
    assert 75 == run_job(export, settings).returncode
    assert 1 == run_job(export, settings).returncode
    document = report_of(export)
    expected = ("failed", "libvirt_unavailable", None)
    assert expected == (document["status"], document["error"]["code"], document["next_attempt_at"])


def test_a_full_file_system_is_waited_for_and_never_a_failure(small_output: Settings, make_export: MakeExport) -> None:
    settings = Settings.model_validate({**small_output.model_dump(by_alias=True), "retry": {"max_attempts": 1}})
    export = make_export(size=32 << 20)
    for _ in range(3):
        assert 75 == run_job(export, settings).returncode
    assert ("retrying", "no_space") == (report_of(export)["status"], report_of(export)["error"]["code"])


def test_a_runner_of_the_daemon_leaves_an_export_alone_that_is_being_written_again(
    scratch: Settings, make_export: MakeExport
) -> None:
    export = make_export()
    (export / "manifest.json").write_text("{")
    assert 75 == run_job(export, scratch, "--if-ready").returncode
    assert not (export / "migration-report.json").exists()


def test_an_output_that_fills_up_during_the_copy_leaves_nothing_and_is_tried_again(
    small_output: Settings, make_export: MakeExport, fake: Callable[[str, str], None]
) -> None:
    """Somebody else fills the file system after the plan found enough space."""
    export = make_export(size=4 << 20)
    filler = small_output.output_dir / "filler"
    # Not a stand-in: the real qemu-img runs, on a file system that fills up at the moment the copy begins.
    fake("qemu-img", f'[ "$1" = convert ] && head -c 5m /dev/zero > {filler}\nexec /usr/bin/qemu-img "$@"\n')
    done = run_job(export, small_output)
    assert 75 == done.returncode, done.stderr
    document = report_of(export)
    assert ("retrying", "no_space") == (document["status"], document["error"]["code"])
    assert [filler] == list(small_output.output_dir.iterdir())
    filler.unlink()
    fake("qemu-img", 'exec /usr/bin/qemu-img "$@"\n')
    assert 0 == run_job(export, small_output).returncode
    assert ("succeeded", 2) == (report_of(export)["status"], report_of(export)["attempts"])


def test_a_report_that_cannot_be_written_is_written_later_and_nothing_is_done_again(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None]
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", scratch.exports_dir], check=True)
    try:
        export = make_export()
        filler = scratch.exports_dir / "filler"
        fake("qemu-img", f'[ "$1" = convert ] && head -c 9m /dev/zero > {filler}\nexec /usr/bin/qemu-img "$@"\n')
        assert 75 == run_job(export, scratch).returncode
        assert not (export / "migration-report.json").exists()
        (disk,) = scratch.output_dir.iterdir()
        before = disk.stat()
        filler.unlink()
        fake("qemu-img", '[ "$1" = convert ] && exit 1\nexec /usr/bin/qemu-img "$@"\n')
        done = run_job(export, scratch)
        assert 0 == done.returncode, done.stderr
        assert "succeeded" == report_of(export)["status"]
        assert (before.st_ino, before.st_mtime_ns) == (disk.stat().st_ino, disk.stat().st_mtime_ns)
    finally:
        subprocess.run(["umount", scratch.exports_dir], check=True)


def test_libvirt_that_goes_away_during_the_copy_costs_only_the_import(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    with session(tmp_path) as uri:
        settings = Settings.model_validate(
            {**scratch.model_dump(by_alias=True), "libvirt": {"uri": uri, "default_network": "user"}}
        )
        export = make_export()
        path = uri.partition("socket=")[2]
        fake("qemu-img", f'[ "$1" = convert ] && mv {path} {path}.away\nexec /usr/bin/qemu-img "$@"\n')
        assert 75 == run_job(export, settings).returncode
        document = report_of(export)
        assert ("retrying", "libvirt_unavailable", "import") == (
            document["status"],
            document["error"]["code"],
            document["error"]["stage"],
        )
        os.rename(f"{path}.away", path)
        fake("qemu-img", '[ "$1" = convert ] && exit 1\nexec /usr/bin/qemu-img "$@"\n')
        done = run_job(export, settings)
        assert 0 == done.returncode, done.stderr
        document = report_of(export)
        assert ("succeeded", 2, "web01") == (document["status"], document["attempts"], document["domain"]["name"])
        assert 1 == len(list(scratch.output_dir.iterdir()))


def test_a_domain_of_the_same_name_is_found_before_the_copy(scratch: Settings, make_export: MakeExport) -> None:
    """libvirt's test driver starts with a domain called `test`."""
    settings = Settings.model_validate(
        {**scratch.model_dump(by_alias=True), "libvirt": {"uri": "test:///default", "import": True}}
    )
    document = refused(make_export("test"), settings, "domain_exists", "'test'")
    assert "blocked" == document["status"]
    assert ["plan"] == [stage["name"] for stage in document["stages"]]


def test_a_network_that_does_not_exist_is_found_before_the_copy(scratch: Settings, make_export: MakeExport) -> None:
    settings = Settings.model_validate(
        {
            **scratch.model_dump(by_alias=True),
            "libvirt": {"uri": "test:///default", "import": True, "default_network": "vlan20"},
        }
    )
    refused(make_export(), settings, "network_missing", "vlan20")


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "device"])
def test_a_planted_log_is_not_written_to_and_the_job_goes_on(
    scratch: Settings, make_export: MakeExport, tmp_path: Path, kind: str
) -> None:
    export = make_export()
    victim = tmp_path / "victim"
    victim.write_bytes(CANARY)
    log = export / LOG
    match kind:
        case "symlink":
            log.symlink_to(victim)
        case "hard link":
            log.hardlink_to(victim)
        case "fifo":
            os.mkfifo(log)
        case "device":
            os.mknod(log, 0o20666, os.makedev(1, 3))
    done = run_job(export, scratch)
    assert 0 == done.returncode, done.stderr
    assert CANARY == victim.read_bytes()
