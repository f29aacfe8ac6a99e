"""Building manifests: what goes in comes out of the parser again, and all that is wrong is told at once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from hyper2kvmd.authoring.artifact import ArtifactManifest
from hyper2kvmd.authoring.bootsector import firmware
from hyper2kvmd.authoring.builder import ManifestBuilder
from hyper2kvmd.authoring.rewrite import Dialect
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.manifest import Configuration, Manifest, ManifestError, parse, wire
from hyper2kvmd.manifest.model import Interface, Services, User
from tests import DATA
from tests.conftest import disk_entry, write_manifest

MANIFESTS = DATA / "manifests"
DIALECTS: tuple[Dialect, ...] = ("seed", "go")


def disk(path: Path, size: int = 4096) -> str:
    """Make a raw disk; return its SHA-256."""
    path.write_bytes(os.urandom(size))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def problems(builder: ManifestBuilder, dialect: Dialect = "seed") -> dict[str | None, str]:
    with pytest.raises(ManifestError) as caught:
        builder.build(dialect)
    assert all(problem.hint for problem in caught.value.problems)
    return {problem.field: problem.message for problem in caught.value.problems}


def test_the_guides_example_is_built_and_written(tmp_path: Path) -> None:
    digest = disk(tmp_path / "disk-0.raw")
    builder = (
        ManifestBuilder(tmp_path)
        .with_source("production-db", provider="vsphere", vm_id="vm-5678", datacenter="Production-DC")
        .with_vm(cpu=8, mem_gb=16, firmware="uefi", os_hint="rhel", os_version="9.3", secure_boot=True)
        .add_disk("disk-0.raw")
        .with_pipeline()
        .with_metadata(hypersdk_version="0.0.1", job_id="job-123", tags=["production", "database"])
        .with_output("/var/lib/libvirt/images", "qcow2")
        .add_note("Exported from Production vCenter")
        .add_note("Target: KVM production cluster")
    )
    manifest = builder.write()
    assert manifest == parse((tmp_path / "manifest.json").read_bytes(), "manifest.json")
    assert ("production-db", "vsphere", "vm-5678") == (manifest.vm_name, manifest.provider, manifest.vm_id)
    assert (8, 16384, "uefi", True) == (
        manifest.vm.cpu,
        manifest.vm.memory_mib,
        manifest.vm.firmware,
        manifest.vm.secure_boot,
    )
    (found,) = manifest.disks
    assert ("disk-0", "raw", 4096, "disk-0.raw", digest, 0, "boot") == (
        *(found.id, found.format, found.bytes, found.path, found.sha256, found.boot_order, found.kind),
    )
    assert {"production": "", "database": ""} == manifest.tags
    assert ("/var/lib/libvirt/images", "qcow2") == (manifest.output.directory, manifest.output.format)
    assert "qcow2" == json.loads((tmp_path / "manifest.json").read_bytes())["pipeline"]["convert"]["target_format"]
    assert 2 == len(manifest.notes)
    assert () == manifest.warnings


def test_steps_need_not_be_chained(tmp_path: Path) -> None:
    disk(tmp_path / "boot.raw")
    builder = ManifestBuilder(tmp_path)
    builder.with_source("web")
    builder.add_disk("boot.raw")
    assert "web" == builder.build().vm_name


def test_several_disks_have_the_order_they_are_given(tmp_path: Path) -> None:
    for name in ("a.raw", "b.raw", "c.raw"):
        disk(tmp_path / name)
    builder = ManifestBuilder(tmp_path).with_source("app").add_disk("a.raw").add_disk("b.raw", id="data-hdd-1")
    manifest = builder.add_disk("c.raw", kind="boot", boot_order=7, label="the third").build()
    assert ["disk-0", "data-hdd-1", "disk-2"] == [found.id for found in manifest.disks]
    assert ["boot", "data", "boot"] == [found.kind for found in manifest.disks]
    assert ["disk-0", "disk-2", "data-hdd-1"] == [found.id for found in manifest.ordered()]
    assert "the third" == manifest.disks[2].label


def test_a_checksum_is_computed_or_taken_or_left_out(tmp_path: Path) -> None:
    digest = disk(tmp_path / "a.raw", 9 << 20)
    ratios: list[float] = []
    builder = ManifestBuilder(tmp_path).with_source("a").add_disk("a.raw", on_progress=ratios.append)
    assert digest == builder.build().disks[0].sha256
    assert (1.0, sorted(ratios)) == (ratios[-1], ratios)
    for checksum, expected in ((False, None), ("1" * 64, "1" * 64)):
        builder = ManifestBuilder(tmp_path).with_source("a").add_disk("a.raw", checksum=checksum)
        assert expected == builder.build().disks[0].sha256


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    disk(tmp_path / "a.raw")
    (tmp_path / "b.raw").symlink_to("/etc/passwd")
    (tmp_path / "c.vmdk").write_bytes(b"nothing of a VMDK" * 100)
    (tmp_path / "d.raw").touch()
    builder = ManifestBuilder(tmp_path).with_source("a/b").with_vm(cpu=-1, mem_gb=float("1e9"))
    for name in ("a.raw", "a.raw", "b.raw", "c.vmdk", "d.raw", "e.raw", "../f.raw", "/etc/hostname"):
        builder.add_disk(name)
    builder.add_nic("not a mac").add_nic("00:50:56:00:00:01").add_nic("00-50-56-00-00-01")
    assert {
        "source.vm_name": "'a/b' cannot be the name of a VM",
        "vm.cpu": "-1 is not allowed here",
        "vm.mem_gb": "1000000000.0 is not allowed here",
        "disks[1].local_path": "a.raw is the file of the disk disk-0 already",
        "disks[2].local_path": f"{tmp_path}/b.raw is a symbolic link, not a plain file",
        "disks[3].source_format": f"{tmp_path}/c.vmdk is raw by its content, and vmdk by its name",
        "disks[4].local_path": f"{tmp_path}/d.raw is empty",
        "disks[5].local_path": f"{tmp_path}/e.raw does not exist",
        "disks[6].local_path": f"../f.raw does not name a file inside {tmp_path}",
        "disks[7].local_path": f"/etc/hostname is not in {tmp_path}, where the manifest is to be",
        "nics[0].mac": "'not a mac' is not the MAC address of a network interface",
        "nics[2].mac": "'00-50-56-00-00-01' is already the mac of nics[1]",
    } == problems(builder)
    with pytest.raises(ManifestError):
        builder.write()
    assert not (tmp_path / "manifest.json").exists()


def test_a_manifest_without_a_disk_or_a_name_is_refused(tmp_path: Path) -> None:
    assert {"source.vm_name", "disks"} == set(problems(ManifestBuilder(tmp_path)))


def test_a_raw_disk_whose_guest_wrote_another_formats_header_is_refused(tmp_path: Path) -> None:
    for name, magic in (("a.raw", b"vhdxfile"), ("b.raw", b"QED\0"), ("c.img", b"\x1f\x8b\x08")):
        (tmp_path / name).write_bytes(magic + bytes(8192))
        builder = ManifestBuilder(tmp_path).with_source("a").add_disk(name)
        with pytest.raises(ManifestError) as caught:
            builder.build()
        assert caught.value.problems[0].code in (Code.FORMAT_MISMATCH, Code.IMAGE_CORRUPT)


def test_a_directory_that_does_not_exist_is_an_error_of_the_disk(tmp_path: Path) -> None:
    found = problems(ManifestBuilder(tmp_path / "none").with_source("a").add_disk("a.raw"))
    assert {"disks[0].local_path": "a.raw cannot be read: No such file or directory"} == found


@pytest.mark.parametrize(
    ("step", "dialect", "field"),
    [
        ({"inject_drivers": False}, "go", "pipeline.fix.inject_drivers"),
        ({"verify_checksum": False}, "go", "pipeline.validate.verify_checksum"),
        ({"test_boot": True}, "go", "pipeline.validate.test_boot"),
        ({"remove_vmware_tools": True}, "seed", "pipeline.fix.remove_vmware_tools"),
        ({"fstab_mode": "bypath-only"}, "seed", "pipeline.fix.fstab_mode"),
        ({"compress_level": 3}, "seed", "pipeline.convert.compress_level"),
        ({"check_image_integrity": False}, "seed", "pipeline.validate.check_image_integrity"),
    ],
)
def test_what_a_dialect_has_no_words_for_is_refused(
    tmp_path: Path, step: dict[str, Any], dialect: Dialect, field: str
) -> None:
    disk(tmp_path / "a.raw")
    builder = ManifestBuilder(tmp_path).with_source("a").add_disk("a.raw").with_pipeline(**step)
    assert {field} == set(problems(builder, dialect))
    assert builder.build("go" if dialect == "seed" else "seed")


def test_a_whole_configuration_comes_out_as_it_went_in(tmp_path: Path) -> None:
    disk(tmp_path / "a.raw")
    configuration = Configuration(
        hostname="shop",
        domain="example.com",
        hosts={"192.0.2.7": ("db", "db.example.com")},
        users=(
            User(name="ann", uid=2000, groups=("adm",), ssh_keys=("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE",)),
            User(name="bob", password_hash=SecretStr("$6$abcdefgh$abcdefgh"), sudo="NOPASSWD: ALL", lock=True),
        ),
        disable_users=("ubuntu",),
        services=Services(enable=("sshd.service",), mask=("bluetooth.service",)),
        interfaces=(Interface(name="ens192", addresses=("192.0.2.10/24",), gateway4="192.0.2.1"),),
    )
    builder = ManifestBuilder(tmp_path).with_source("a").add_disk("a.raw").with_pipeline()
    for dialect in DIALECTS:
        assert configuration == builder.with_configuration(configuration).build(dialect).configuration
    builder.with_configuration(Configuration())
    assert Configuration() == builder.build().configuration


PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40)
WORD = st.from_regex(r"[-+.0-9eE:_xoyn~ ]{1,12}", fullmatch=True) | PRINTABLE
FREE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
FLAG = st.booleans()
MAC = st.integers(0, 255).map(lambda number: f"00:50:56:00:00:{number:02x}")


@settings(max_examples=50)
@given(
    name=WORD.filter(lambda name: "/" not in name and name not in (".", "..") and len(name.encode()) < 256),
    source=st.fixed_dictionaries({}, optional=dict.fromkeys(("provider", "vm_id", "datacenter"), WORD)),
    vm=st.fixed_dictionaries(
        {},
        optional={
            "cpu": st.integers(1, 4096),
            "mem_gb": st.integers(1, 1024),
            "firmware": st.sampled_from(["bios", "uefi", "unknown"]),
            "secure_boot": st.just(True),
            "os_version": WORD,
        },
    ),
    labels=st.lists(st.none() | WORD, min_size=1, max_size=3),
    nics=st.dictionaries(MAC, st.none() | WORD, max_size=3),
    pipeline=st.none()
    | st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("inspect", "fix", "convert", "validate", "fix_grub", "regenerate_initramfs"), FLAG),
            "compression": FLAG,
        },
    ),
    metadata=st.fixed_dictionaries({}, optional={"job_id": WORD, "tags": st.lists(WORD, max_size=3)}),
    notes=st.lists(FREE, max_size=3),
    filename=st.none() | st.just("web.img"),
    verbose=st.integers(0, 9),
)
def test_what_is_written_is_read_as_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    source: dict[str, Any],
    vm: dict[str, Any],
    labels: list[str | None],
    nics: dict[str, str | None],
    pipeline: dict[str, Any] | None,
    metadata: dict[str, Any],
    notes: list[str],
    filename: str | None,
    verbose: int,
) -> None:
    directory = tmp_path_factory.getbasetemp() / "written"
    directory.mkdir(exist_ok=True)
    builder = ManifestBuilder(directory).with_source(name, **source).with_vm(**vm).with_metadata(**metadata)
    digests = []
    for number, label in enumerate(labels):
        digests.append(disk(directory / f"{number}.raw", 512))
        builder.add_disk(f"{number}.raw", label=label)
    for mac, network in nics.items():
        builder.add_nic(mac, network)
    for note in notes:
        builder.add_note(note).add_warning(note, stage="export")
    if pipeline is not None:
        builder.with_pipeline(**pipeline)
    builder.with_output(filename=filename).with_options(verbose=verbose, dry_run=True, report_path="copy.json")
    read: list[Manifest] = []
    for dialect in DIALECTS:
        for file in ("manifest.json", "manifest.yaml"):
            manifest = builder.write(file, dialect)
            assert manifest == parse((directory / file).read_bytes(), file)
            read.append(manifest)
        assert read[-2] == builder.build(dialect)
    for manifest in read:
        assert read[0].model_dump(exclude={"sha256", "dialect"}) == manifest.model_dump(exclude={"sha256", "dialect"})
    one = read[0]
    assert name == one.vm_name
    assert source == {key: getattr(one, key) for key in source}
    assert vm.get("mem_gb", 0) * 1024 == (one.vm.memory_mib or 0)
    assert {key: value for key, value in vm.items() if key != "mem_gb"} == {
        key: getattr(one.vm, key) for key in vm if key != "mem_gb"
    }
    assert list(zip(digests, labels, strict=True)) == [(found.sha256, found.label) for found in one.disks]
    assert list(nics.items()) == [(nic.mac, nic.network) for nic in one.nics]
    assert dict.fromkeys(metadata.get("tags", ()), "") == one.tags
    assert (tuple(notes), tuple(f"export: {note}" for note in notes)) == (one.notes, one.exporter_warnings)
    assert (verbose, True, "copy.json") == (one.options.verbose, one.options.dry_run, one.options.report_path)
    if pipeline is not None:
        assert pipeline.get("fix", True) == one.stages.fix.enabled
        assert pipeline.get("fix_grub", True) == one.stages.fix.bootloader
        assert pipeline.get("compression") == one.stages.convert.compress


def test_nothing_is_written_where_the_disks_are_not(tmp_path: Path) -> None:
    disk(tmp_path / "a.raw")
    (tmp_path / "other").mkdir()
    builder = ManifestBuilder(tmp_path).with_source("a").add_disk(tmp_path / "a.raw")
    for path in (tmp_path / "other/manifest.json", "manifest.txt"):
        with pytest.raises(ManifestError):
            builder.write(path)
    builder.write(tmp_path / "manifest.yml")
    assert ["a.raw", "manifest.yml", "other"] == sorted(path.name for path in tmp_path.iterdir())


def test_an_older_manifest_stays_when_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    disk(tmp_path / "a.raw")
    builder = ManifestBuilder(tmp_path).with_source("a").add_disk("a.raw")
    builder.write()
    before = (tmp_path / "manifest.json").read_bytes()
    builder.add_note("x" * (1 << 20))
    with pytest.raises(ManifestError, match="bytes are too much"):
        builder.write()
    assert before == (tmp_path / "manifest.json").read_bytes()
    assert ["a.raw", "manifest.json"] == sorted(path.name for path in tmp_path.iterdir())


def test_every_manifest_fits_the_schema() -> None:
    schema = wire.Document.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for name in ("seed.json", "go-vsphere.json", "go-everything.json"):
        jsonschema.validate(json.loads((MANIFESTS / name).read_bytes()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"manifest_version": "2.0"}, schema)


def test_reading_manifests_loads_nothing_of_what_builds_them() -> None:
    script = (
        "import sys, hyper2kvmd.manifest; print(any('images' in name or 'builder' in name for name in sys.modules))"
    )
    assert "False" == subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip()  # noqa: PLW1510


# ArtifactManifest -----------------------------------------------------------------------------------------


def test_a_manifest_is_loaded_with_its_disks(tmp_path: Path) -> None:
    digests = {name: disk(tmp_path / f"{name}.raw") for name in ("boot", "data-1", "data-2")}
    entries = [disk_entry(tmp_path / f"{name}.raw", id=name) for name in ("data-2", "boot", "data-1")]
    for entry, order in zip(entries, (2, 0, 1), strict=True):
        entry |= {"boot_order_hint": order, "disk_type": "boot" if entry["id"] == "boot" else "data"}
    del entries[2]["checksum"]
    path = write_manifest(tmp_path, entries)
    told: list[tuple[str, float]] = []
    for where in (path, str(path)):
        artifact = ArtifactManifest.load(where)
        assert "boot" == artifact.get_boot_disk().id
        assert ["data-1", "data-2"] == [found.id for found in artifact.get_data_disks()]
        assert tmp_path.name == artifact.manifest.vm_name
        assert {"boot": digests["boot"], "data-2": digests["data-2"]} == artifact.verify_checksums(
            lambda id, ratio: told.append((id, ratio))
        )
    assert {("boot", 1.0), ("data-2", 1.0)} == set(told)


def test_every_disk_that_is_not_what_was_exported_is_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        disk(tmp_path / f"{name}.raw")
    path = write_manifest(tmp_path, [disk_entry(tmp_path / f"{name}.raw", id=name) for name in ("a", "b", "c")])
    disk(tmp_path / "a.raw")
    (tmp_path / "b.raw").unlink()
    with pytest.raises(MigrationError) as caught:
        ArtifactManifest.load(path).verify_checksums()
    assert {"disks[0].checksum", "disks[1].local_path"} == {problem.field for problem in caught.value.problems}


def test_no_file_outside_of_the_export_is_read_for_a_checksum(tmp_path: Path) -> None:
    export = tmp_path / "web"
    export.mkdir()
    disk(tmp_path / "secret.raw")
    path = write_manifest(export, [disk_entry(tmp_path / "secret.raw")])
    with pytest.raises(MigrationError) as caught:
        ArtifactManifest.load(path).verify_checksums()
    assert Code.DISK_MISSING == caught.value.code


def test_what_is_no_manifest_is_an_error_and_never_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(MANIFESTS / "seed.json")
    (tmp_path / "half.json").write_text("{")
    for name in ("none.json", "none/manifest.json", "link.json", "half.json", "."):
        with pytest.raises(MigrationError) as caught:
            ArtifactManifest.load(tmp_path / name)
        assert caught.value.hint


# bootsector -----------------------------------------------------------------------------------------------


def mbr(*types: int, code: bytes = b"\xeb\x63\x90") -> bytes:
    table = b"".join(bytes([0, 0, 0, 0, kind]) + bytes(11) for kind in types)
    return (code.ljust(446, b"\0") + table.ljust(64, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")


def gpt(*guids: str, code: bytes = b"", sector: int = 512) -> bytes:
    start = bytearray(mbr(0xEE, code=code))
    header = b"EFI PART" + bytes(64) + (2).to_bytes(8, "little") + (128).to_bytes(4, "little") * 2 + bytes(4)
    start[sector : sector + 92] = header
    for number, guid in enumerate(guids):
        at = 2 * sector + number * 128
        start[at : at + 16] = uuid.UUID(guid).bytes_le
    return bytes(start)


ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"", set()),
        (bytes(1 << 20), set()),
        (mbr(0x83), {"bios"}),
        (mbr(0x83, code=b""), set()),
        (mbr(), set()),
        (mbr(0xEF, 0x83, code=b""), {"uefi"}),
        (gpt(ESP, LINUX), {"uefi"}),
        (gpt(ESP, LINUX, sector=4096), {"uefi"}),
        (gpt(BIOS_BOOT, LINUX, code=b"\xeb\x63\x90"), {"bios"}),
        (gpt(BIOS_BOOT, ESP, LINUX, code=b"\xeb\x63\x90"), {"bios", "uefi"}),
        (gpt(LINUX), set()),
        (gpt(ESP)[:700], set()),
    ],
)
def test_the_first_mib_tells_which_firmware_boots_a_disk(start: bytes, expected: set[str]) -> None:
    assert expected == firmware(start)


@given(st.binary(max_size=200), st.integers(440, 1200))
def test_no_partition_table_is_too_strange_to_be_read(damage: bytes, at: int) -> None:
    start = bytearray(gpt(ESP, code=b"x"))
    start[at : at + len(damage)] = damage
    assert firmware(bytes(start)) <= {"bios", "uefi"}
