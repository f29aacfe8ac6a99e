"""An export that is one .ova in a directory: its disks are read where they lie in the archive."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, left_in, run_job
from tests.guests.build import export as export_guest
from tests.guests.ovf import Identity
from tests.integration.job.test_ovf import compress, cut, migrated, refused
from tests.ovf import DISKS, NVRAM, accepting, describe, export_ovf, pack, write_digests


@pytest.fixture
def settings(scratch: Settings) -> Settings:
    return accepting(scratch)


def archive_of(settings: Settings, digests: str | None = "sha256", mib: int = 1) -> tuple[Path, Path]:
    """An OVA that is an export, and the directory with what is in it."""
    descriptor = export_ovf(settings.exports_dir.parent / "files", digests, mib)
    return pack(descriptor, settings.exports_dir / "db01" / "db01.ova"), descriptor.parent


def same(one: Path, format: str, other: Path, target: str = "qcow2") -> bool:
    argv = ("qemu-img", "compare", "-f", format, "-F", target, one, other)
    return subprocess.run(argv, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("engine", ["auto", "qemu-img"])
@pytest.mark.parametrize("digests", ["sha256", "sha1", None])
def test_disks_are_read_where_they_lie(settings: Settings, engine: str, digests: str | None) -> None:
    archive, files = archive_of(settings, digests, mib=5)
    before = archive.read_bytes()
    report = migrated(archive, accepting(settings, convert={"engine": engine}))
    left = {path.name for path in archive.parent.iterdir()}
    assert {"db01.ova", ".hyper2kvmd.lock", ".hyper2kvmd.log", "migration-report.json"} == left
    assert before == archive.read_bytes()
    for number, name in enumerate(DISKS):
        assert same(files / name, "vmdk", settings.output_dir / f"db01-disk-{number}.qcow2")
    assert [digests is not None] * 3 == [disk["source_verified"] for disk in report["disks"]]
    assert ["stream" if engine == "auto" else "qemu-img"] * 3 == [disk["engine"] for disk in report["disks"]]
    assert [f"db01.ova/{name}" for name in DISKS] == [disk["source"] for disk in report["disks"]]
    assert ("db01.ova", "db01") == (report["manifest"]["name"], report["vm_name"])
    codes = {warning["code"] for warning in report["warnings"]}
    assert (digests is None) == ("no_digests" in codes)
    assert not codes & {"no_nics", "no_cpu", "no_memory", "ovf_unreadable"}
    assert [] == left_in(settings.work_dir)


@pytest.mark.parametrize("format", ["vmdk", "qcow2", "raw", "vhdx", "vdi", "vhd"])
@pytest.mark.parametrize("target", ["qcow2", "raw"])
def test_disk_of_any_format_is_the_same_in_an_archive(settings: Settings, format: str, target: str) -> None:
    archive, files = archive_of(settings, None)
    raw, disk, descriptor = files / "content", files / f"db01-disk1.{format}", files / "db01.ovf"
    # The end is not empty: who reads a window of the wrong size does not get it.
    raw.write_bytes(os.urandom(1 << 20) + bytes(6 << 20) + os.urandom(1 << 20))
    (files / DISKS[0]).unlink()
    driver, options = ("vpc", ("-o", "subformat=fixed,force_size=on")) if format == "vhd" else (format, ())
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", driver, *options, raw, disk], check=True)
    descriptor.write_text(descriptor.read_text().replace(DISKS[0], disk.name))
    describe(descriptor)
    pack(descriptor, archive, (DISKS[1], disk.name, DISKS[2], NVRAM))
    migrated(archive, accepting(settings, output={"format": target}, validate={"compare": True}))
    assert same(raw, "raw", settings.output_dir / f"db01-disk-0.{target}", target)


@pytest.mark.parametrize("fixed", [False, pytest.param(True, marks=pytest.mark.rest)])
def test_guest_in_an_archive_is_looked_into_and_fixed(scratch: Settings, fixed: bool) -> None:
    identity = Identity(("00:50:56:aa:bb:01",), "564da6d2-1706-6343-dc2d-9959b533a7b3")
    files = export_guest("debian12-bios", scratch.exports_dir.parent / "files", vm_name="web01", identity=identity)
    names = [path.name for path in files.glob("*.vmdk")]
    write_digests(files / "web01.ovf", names=names)
    archive = pack(files / "web01.ovf", scratch.exports_dir / "web01" / "web01.ova", names)
    changes = {"ovf": {"accept": True}, "validate": {"compare": True}, "pipeline": {"fix": {"enabled": fixed}}}
    report = migrated(archive, Settings.model_validate({**scratch.model_dump(by_alias=True), **changes}))
    assert "debian" == report["results"]["inspect"]["distro"]
    assert report["results"]["validate"]["all_valid"]
    assert fixed == any("initramfs" in change["fixer"] for change in report["changes"])
    assert [True] == [disk["source_verified"] for disk in report["disks"]]


@pytest.mark.parametrize("name", ["db01.ovf", DISKS[0], DISKS[2]])
@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])
def test_wrong_digest_is_a_wrong_checksum(settings: Settings, name: str, algorithm: str) -> None:
    archive, files = archive_of(settings, algorithm)
    mf = files / "db01.mf"
    line = re.escape(name) + r"\)\s*=\s*"
    mf.write_text(re.sub(f"({line})(.)", lambda m: m[1] + ("1" if m[2] == "0" else "0"), mf.read_text()))
    pack(files / "db01.ovf", archive)
    error = refused(archive, settings)
    assert ("checksum_mismatch", True) == (error["code"], f"db01.ova/{name}" in error["message"]), error


def test_damage_in_the_archive_is_found(settings: Settings) -> None:
    archive, files = archive_of(settings)
    disk, data = (files / DISKS[1]).read_bytes(), bytearray(archive.read_bytes())
    data[data.index(disk) + len(disk) // 2] ^= 1
    archive.write_bytes(data)
    # By its checksum, or already as its grain cannot be inflated.
    assert refused(archive, settings)["code"] in ("checksum_mismatch", "image_corrupt")


def gone(archive: Path, files: Path) -> None:
    pack(files / "db01.ovf", archive, (DISKS[0], DISKS[1], NVRAM))


def compressed(archive: Path, files: Path) -> None:
    compress(files / "db01.ovf")
    pack(files / "db01.ovf", archive, (f"{DISKS[0]}.gz", *DISKS[1:], NVRAM))


def in_chunks(archive: Path, files: Path) -> None:
    cut(files / "db01.ovf")
    pack(files / "db01.ovf", archive, (f"{DISKS[0]}.000000000", f"{DISKS[0]}.000000001", *DISKS[1:], NVRAM))


def whole_compressed(archive: Path, files: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(files / "db01.ovf", "db01.ovf")


def two_vms(archive: Path, files: Path) -> None:
    shutil.copyfile(files / "db01.ovf", files / "web.ovf")
    pack(files / "db01.ovf", archive, (*DISKS, NVRAM, "web.ovf"))


def two_archives(archive: Path, files: Path) -> None:
    shutil.copyfile(archive, archive.with_name("web.ova"))


def cut_short(archive: Path, files: Path) -> None:
    os.truncate(archive, archive.stat().st_size // 2)


def no_archive(archive: Path, files: Path) -> None:
    archive.write_bytes(os.urandom(4096))


def linked(archive: Path, files: Path) -> None:
    shutil.move(archive, files / "db01.ova")
    archive.symlink_to(files / "db01.ova")


def wrong_size(archive: Path, files: Path) -> None:
    with (files / DISKS[0]).open("ab") as file:
        file.write(bytes(512))
    pack(files / "db01.ovf", archive)


def odd_size(archive: Path, files: Path) -> None:
    with (files / DISKS[0]).open("ab") as file:
        file.write(b"x")
    describe(files / "db01.ovf")
    pack(files / "db01.ovf", archive)


def in_two_files(archive: Path, files: Path) -> None:
    (files / "content").write_bytes(os.urandom(1 << 20))
    (files / DISKS[0]).unlink()
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat"]
    subprocess.run([*argv, files / "content", files / DISKS[0]], check=True)
    with (files / DISKS[0]).open("ab") as file:
        file.write(b"\n" * (-file.tell() % 512))
    describe(files / "db01.ovf")
    pack(files / "db01.ovf", archive, (*DISKS, "db01-disk1-flat.vmdk", NVRAM))


@pytest.mark.parametrize(
    ("breaks", "code", "says"),
    [
        (gone, "disk_missing", [f"db01.ova/{DISKS[2]} does not exist"]),
        (compressed, "format_unsupported", [f"db01.ova/{DISKS[0]}.gz is compressed", "--directory"]),
        (in_chunks, "format_unsupported", [f"db01.ova/{DISKS[0]}.000000000 is in chunks", "--directory"]),
        (whole_compressed, "format_unsupported", ["db01.ova is compressed", "--directory"]),
        (two_vms, "manifest_invalid", ["db01.ova holds 2 OVF descriptors"]),
        (two_archives, "manifest_invalid", ["has 2 OVAs ('db01.ova', 'web.ova')"]),
        (cut_short, "image_corrupt", ["truncated"]),
        (no_archive, "format_unsupported", ["is not a tar archive"]),
        (linked, "export_unsafe", ["is a symbolic link"]),
        (wrong_size, "disk_size", [f"db01.ova/{DISKS[0]} has", "(ovf:size)"]),
        (odd_size, "format_unsupported", ["only whole sectors", "--directory"]),
        (in_two_files, "format_unsupported", ["in several files, which is not read from an archive", "--directory"]),
    ],
)
def test_what_is_refused(
    settings: Settings, breaks: Callable[[Path, Path], object], code: str, says: list[str]
) -> None:
    archive, files = archive_of(settings, None)
    breaks(archive, files)
    error = refused(archive, accepting(settings, incomplete_grace_seconds=0))
    assert code == error["code"], error
    for text in says:
        assert text in error["message"] + error["hint"]


def test_remedy_works(settings: Settings, ctl: Ctl) -> None:
    archive, files = archive_of(settings, None)
    compressed(archive, files)
    command = re.search("`(hyper2kvmctl [^`]*)`;", refused(archive, settings)["hint"])
    assert command is not None
    assert 0 == ctl(*command[1].split()[1:]).returncode
    migrated(settings.exports_dir / "db01-unpacked/manifest.json", settings)


def test_archive_is_removed_only_if_that_is_asked_for(settings: Settings) -> None:
    archive, _ = archive_of(settings)
    migrated(archive, accepting(settings, cleanup_source=True))
    assert not archive.exists()


def test_second_run_does_nothing(settings: Settings) -> None:
    archive, _ = archive_of(settings)
    migrated(archive, settings)
    assert "succeeded already" in run_job(archive.parent, settings).stderr


def test_archive_that_is_written_to_meanwhile_is_refused(settings: Settings, fake: Callable[[str, str], None]) -> None:
    archive, _ = archive_of(settings)
    real, end = shutil.which("qemu-img"), archive.stat().st_size - 1
    # Anywhere in it: here in what is behind the last file.
    write = f"printf x | dd of={archive} bs=1 seek={end} conv=notrunc 2>/dev/null"
    fake("qemu-img", f'case $1 in measure) {write};; esac\nexec {real} "$@"\n')
    assert "source_changed" == refused(archive, settings)["code"]


def test_files_in_a_directory_of_the_archive(settings: Settings) -> None:
    archive, files = archive_of(settings)
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("db01.ovf", *DISKS, NVRAM, "db01.mf"):
            tar.add(files / name, f"db01/{name}")
    assert [True] * 3 == [disk["source_verified"] for disk in migrated(archive, settings)["disks"]]


def test_commands_take_the_archive(settings: Settings, ctl: Ctl) -> None:
    archive, _ = archive_of(settings)
    on = ("--set", "ovf.accept=true", "--set", "pipeline.inspect.enabled=false", "--set", "pipeline.fix.enabled=false")
    strict = ctl("validate", archive, "--strict", *on)
    assert (0, True) == (strict.returncode, "valid, 3 disks" in strict.stdout), strict.stdout
    said = ctl("validate", archive)
    assert (1, True) == (said.returncode, "is an archive, not a manifest" in said.stdout)
    assert "queued" in ctl("list", *on).stdout
    done = ctl("migrate", archive, *on)
    assert 0 == done.returncode, done.stdout
    page = archive.parent.parent.parent / "page.html"
    assert 0 == ctl("report", "db01", "--html", page).returncode
    assert "00:50:56:82:3a:0c" in page.read_text()
