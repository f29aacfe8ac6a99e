"""`hyper2kvmctl manifest`, as people use it: real processes, real images, real archives."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hyper2kvmd.authoring.artifact import ArtifactManifest
from hyper2kvmd.queue.claim import claim_export
from hyper2kvmd.settings.model import Settings
from tests import DATA
from tests.conftest import Ctl, MakeExport, report_of, run_job, write_manifest

FORMATS = {"vmdk": "vmdk", "qcow2": "qcow2", "raw": "raw", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}


def image(path: Path, format: str = "vmdk", content: bytes = b"", size: int = 8 << 20, options: str = "") -> Path:
    """Make a disk image of `size` bytes that starts with `content`."""
    raw = path.with_name(f"{path.name}.tmp")
    raw.write_bytes(content)
    os.truncate(raw, size)
    more = ["-o", options] if options else []
    subprocess.run(
        ["qemu-img", "convert", "-q", "-f", "raw", "-O", FORMATS[format], *more, raw, path], check=True, timeout=60
    )
    raw.unlink()
    return path


def partitioned(kind: int) -> bytes:
    """The boot sector of a disk with boot code and one partition of a kind."""
    return b"\xeb\x63".ljust(450, b"\0") + bytes([kind]) + bytes(59) + b"\x55\xaa"


LINUX, EFI_SYSTEM = partitioned(0x83), partitioned(0xEF)


def descriptor(*disks: str, mib: int = 6000) -> bytes:
    """An OVF descriptor of a VM with these disks, whose controller lists them from the last to the first."""
    files = "".join(f'<File ovf:href="{disk}" ovf:id="f{n}"/>' for n, disk in enumerate(disks))
    table = "".join(
        f'<Disk ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="d{n}" ovf:fileRef="f{n}"/>'
        for n in range(len(disks))
    )

    def item(type: int, **values: object) -> str:
        inner = "".join(f"<rasd:{key}>{value}</rasd:{key}>" for key, value in values.items())
        return f"<Item>{inner}<rasd:ResourceType>{type}</rasd:ResourceType></Item>"

    items = [
        item(3, InstanceID=1, VirtualQuantity=4),
        item(4, InstanceID=2, AllocationUnits="byte * 2^20", VirtualQuantity=mib),
        item(6, InstanceID=3, Address=0, ResourceSubType="VirtualSCSI"),
        *reversed(
            [
                item(17, InstanceID=10 + n, Parent=3, AddressOnParent=n, HostResource=f"ovf:/disk/d{n}")
                for n in range(len(disks))
            ]
        ),
        item(10, InstanceID=30, Address="00:50:56:AA:BB:01", Connection="DMZ", ResourceSubType="VmxNet3"),
    ]
    return (
        '<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"'
        ' xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"'
        ' xmlns:vmw="http://www.vmware.com/schema/ovf">'
        f"<References>{files}</References><DiskSection>{table}</DiskSection>"
        f'<VirtualSystem ovf:id="web01"><VirtualHardwareSection>{"".join(items)}'
        '<vmw:Config vmw:key="firmware" vmw:value="efi"/>'
        '<vmw:Config vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="false"/>'
        "</VirtualHardwareSection></VirtualSystem></Envelope>"
    ).encode()


def archive(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as ova:  # type: ignore[call-overload]  # its modes are literals for mypy
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            ova.addfile(info, io.BytesIO(data))
    return path


def sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"SHA256({name})= {hashlib.sha256(data).hexdigest()}\n" for name, data in files.items()).encode()


# create ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_and_the_size_of_a_disk_file_are_found(ctl: Ctl, tmp_path: Path, format: str) -> None:
    # qemu would round the size of a VHD up to what cylinders and heads can say.
    path = image(tmp_path / f"web01.{format}", format, LINUX, options="force_size" if format == "vhd" else "")
    done = ctl("manifest", "create", path, "--json")
    assert 0 == done.returncode, done.stderr
    shown = json.loads(done.stdout)
    (disk,) = shown["disks"]
    assert (format, 8 << 20) == (disk["format"], disk["virtual_size"])
    assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (disk["bytes"], disk["sha256"])
    assert ("web01", "bios", str(tmp_path / "manifest.json")) == (
        *(shown["vm_name"], shown["firmware"], shown["manifest"]),
    )
    artifact = ArtifactManifest.load(tmp_path / "manifest.json")
    assert {"disk-0": disk["sha256"]} == artifact.verify_checksums()


def test_content_tells_the_format_where_the_name_does_not(ctl: Ctl, tmp_path: Path) -> None:
    image(tmp_path / "cloud.img", "qcow2")
    assert (
        "qcow2" == json.loads(ctl("manifest", "create", tmp_path / "cloud.img", "--json").stdout)["disks"][0]["format"]
    )


def test_a_created_manifest_can_be_migrated(ctl: Ctl, scratch: Settings) -> None:
    export = scratch.exports_dir / "web01"
    export.mkdir()
    image(export / "web01.vmdk", options="subformat=streamOptimized")
    assert 0 == ctl("manifest", "create", export).returncode
    done = ctl("migrate", export, "--stages", "convert,validate", "--strict")
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "succeeded" == report_of(export)["status"]


def test_a_directory_gives_its_disks_in_the_order_of_its_descriptor(ctl: Ctl, tmp_path: Path) -> None:
    export = tmp_path / "web01"
    export.mkdir()
    image(export / "system disk.vmdk", content=EFI_SYSTEM)
    for name in ("data-10.vmdk", "data-2.vmdk"):
        image(export / name)
    image(export / "flat.vmdk", options="subformat=monolithicFlat")
    (export / "web01.ovf").write_bytes(descriptor("data-2.vmdk", "system%20disk.vmdk"))
    done = ctl("manifest", "create", export, "--json")
    assert 0 == done.returncode, done.stderr
    manifest = ArtifactManifest.load(export / "manifest.json").manifest
    assert ["data-2.vmdk", "system disk.vmdk", "data-10.vmdk", "flat.vmdk"] == [disk.path for disk in manifest.disks]
    assert ["data", "boot", "data", "data"] == [disk.kind for disk in manifest.disks]
    assert [1, 0, 2, 3] == [disk.boot_order for disk in manifest.disks]
    assert (4, 6000, "uefi", False) == (
        *(manifest.vm.cpu, manifest.vm.memory_mib, manifest.vm.firmware, manifest.vm.secure_boot),
    )
    assert [("00:50:56:aa:bb:01", "DMZ")] == [(nic.mac, nic.network) for nic in manifest.nics]


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicFlat"])
def test_a_disk_in_extents_is_one_disk_and_is_migrated(
    ctl: Ctl, scratch: Settings, tmp_path: Path, subformat: str
) -> None:
    export = scratch.exports_dir / "web01"
    export.mkdir()
    size = (2 << 30) + (8 << 20)  # two extents, where they have 2 GiB at most
    image(export / "web01.vmdk", "vmdk", LINUX, size, f"subformat={subformat}")
    image(export / "data.vmdk", "vmdk", size=8 << 20, options=f"subformat={subformat}")
    for extent in [*export.iterdir()]:
        if extent.name.startswith("data-"):  # under a name that says nothing
            text = (export / "data.vmdk").read_text().replace(extent.name, "part.vmdk")
            (export / "data.vmdk").write_text(text)
            extent.rename(export / "part.vmdk")
    done = ctl("manifest", "create", export, "--json")
    assert 0 == done.returncode, done.stderr
    shown = json.loads(done.stdout)
    assert [("data.vmdk", 8 << 20), ("web01.vmdk", size)] == [
        (disk["path"], disk["virtual_size"]) for disk in shown["disks"]
    ]
    assert "disk-1" == shown["boot_disk"]
    document = json.loads((export / "manifest.json").read_text())
    looks = subformat == "twoGbMaxExtentSparse"  # once: it takes a while
    document["pipeline"]["inspect"]["enabled"], document["pipeline"]["fix"]["enabled"] = looks, False
    (export / "manifest.json").write_text(json.dumps(document))
    settings = scratch.model_copy(update={"cleanup_source": True})
    done = run_job(export, settings)
    assert 0 == done.returncode, done.stderr
    if looks:  # INSPECT saw the disks, on which there is no system
        assert "os_unknown" in {warning["code"] for warning in report_of(export)["warnings"]}
    target = scratch.output_dir / "web01-disk-1.qcow2"
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", target]))
    assert size == info["virtual-size"]
    assert [] == [path.name for path in export.iterdir() if path.suffix == ".vmdk"], "all that was read is removed"


def test_an_extent_or_a_delta_that_is_named_is_refused_with_what_to_do(ctl: Ctl, tmp_path: Path) -> None:
    path = image(tmp_path / "web01.vmdk", "vmdk", size=3 << 30, options="subformat=twoGbMaxExtentFlat")
    done = ctl("manifest", "create", tmp_path / "web01-f002.vmdk")
    assert 1 == done.returncode
    assert "is one of the 2 extents of the disk that web01.vmdk describes" in done.stderr
    assert "Name web01.vmdk in its place" in done.stderr
    command = ["qemu-img", "create", "-q", "-f", "vmdk", "-b", str(path), "-F", "vmdk"]
    subprocess.run([*command, str(tmp_path / "web01-000001.vmdk")], check=True)
    done = ctl("manifest", "create", tmp_path)
    assert (1, []) == (done.returncode, [*tmp_path.glob("*.json.tmp")])
    assert "Consolidate the VM's snapshots" in done.stderr
    assert not (tmp_path / "manifest.json").exists()


def test_a_descriptor_gives_the_disks_that_it_names_and_no_others(ctl: Ctl, tmp_path: Path) -> None:
    image(tmp_path / "a.vmdk")
    image(tmp_path / "other.vmdk")
    (tmp_path / "web.ovf").write_bytes(descriptor("a.vmdk"))
    done = ctl("manifest", "create", tmp_path / "web.ovf", "--name", "The Web Server", "--no-checksum")
    assert 0 == done.returncode, done.stderr
    manifest = ArtifactManifest.load(tmp_path / "manifest.json").manifest
    assert ("The Web Server", ["a.vmdk"]) == (manifest.vm_name, [disk.path for disk in manifest.disks])
    assert manifest.disks[0].sha256 is None
    assert "no checksum" in done.stderr


def test_a_disk_that_the_descriptor_names_must_be_there(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "web.ovf").write_bytes(descriptor("a.vmdk", "b.vmdk"))
    image(tmp_path / "a.vmdk")
    done = ctl("manifest", "create", tmp_path / "web.ovf")
    assert 1 == done.returncode
    assert f"disks[1].local_path: {tmp_path / 'b.vmdk'} does not exist" in done.stderr
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("dialect", ["seed", "go"])
@pytest.mark.parametrize("format", ["json", "yaml"])
def test_both_dialects_are_written_as_json_and_as_yaml(ctl: Ctl, tmp_path: Path, dialect: str, format: str) -> None:
    image(tmp_path / "a.vmdk", content=LINUX)
    (tmp_path / "web.ovf").write_bytes(descriptor("a.vmdk"))
    done = ctl("manifest", "create", tmp_path, "--dialect", dialect, "--format", format)
    assert 0 == done.returncode, done.stderr
    path = tmp_path / f"manifest.{format}"
    manifest = ArtifactManifest.load(path).manifest
    assert dialect == manifest.dialect
    assert (6000 if dialect == "seed" else 5 * 1024) == manifest.vm.memory_mib
    content = json.loads(path.read_bytes()) if format == "json" else yaml.safe_load(path.read_bytes())
    assert ("update_grub" in content["pipeline"]["fix"]) == (dialect == "go")


@pytest.mark.parametrize(("suffix", "mode"), [(".ova", "w"), (".ova", "w:gz"), (".ova.gz", "w:gz")])
def test_an_ova_becomes_an_export(ctl: Ctl, tmp_path: Path, scratch: Settings, suffix: str, mode: str) -> None:
    disk = image(tmp_path / "disk.vmdk", content=LINUX, options="subformat=streamOptimized").read_bytes()
    files = {"web01.ovf": descriptor("web01-disk1.vmdk"), "web01-disk1.vmdk": disk}
    ova = archive(tmp_path / f"web01{suffix}", {"web01.mf": sums(files), **files}, mode)
    export = scratch.exports_dir / "web01"
    done = ctl("manifest", "create", ova, "--directory", export, "--json")
    assert 0 == done.returncode, done.stderr
    shown = json.loads(done.stdout)
    assert (str(export / "manifest.json"), "web01", []) == (shown["manifest"], shown["vm_name"], shown["warnings"])
    assert {"manifest.json", "web01.mf", *files} == {path.name for path in export.iterdir()}
    assert {"disk-0": hashlib.sha256(disk).hexdigest()} == ArtifactManifest.load(
        export / "manifest.json"
    ).verify_checksums()
    done = ctl("migrate", export, "--stages", "convert,validate")
    assert 0 == done.returncode, done.stdout + done.stderr


def test_an_ova_is_unpacked_where_its_manifest_is_to_be(ctl: Ctl, tmp_path: Path) -> None:
    disk = image(tmp_path / "disk.vmdk").read_bytes()
    ova = archive(tmp_path / "web.ova", {"web.ovf": descriptor("d.vmdk"), "d.vmdk": disk})
    done = ctl("manifest", "create", ova, "-o", tmp_path / "new/artifact-manifest.yaml")
    assert 0 == done.returncode, done.stderr
    assert {"artifact-manifest.yaml", "web.ovf", "d.vmdk"} == {path.name for path in (tmp_path / "new").iterdir()}
    assert "holds no digests (.mf)" in done.stderr


@pytest.mark.parametrize(
    ("files", "status", "message"),
    [
        ({"../evil.vmdk": b""}, 1, "'../evil.vmdk', which is not a plain file name"),
        ({"a.ovf": b"", "a.mf": b"SHA256(a.ovf)= " + b"0" * 64}, 1, "its .mf says 00000000"),
        ({"a.ovf": b"<no xml"}, 65, "it is no complete XML"),
        ({"a.txt": b""}, 1, "holds no disk images"),
        ({"a.ovf": descriptor("d.vmdk"), "d.vmdk": b"KDMV" + bytes(2000)}, 1, "d.vmdk has a capacity of 0"),
        ({"a.ovf": descriptor("d.vmdk")}, 1, "web.ova/d.vmdk does not exist"),
    ],
)
def test_of_a_bad_ova_nothing_is_left(
    ctl: Ctl, tmp_path: Path, files: dict[str, bytes], status: int, message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    ova = archive(tmp_path / "in/web.ova", files)
    done = ctl("manifest", "create", ova, "--directory", tmp_path / "out/web")
    assert (status, "") == (done.returncode, done.stdout)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert ["web.ova"] == [path.name for path in (tmp_path / "in").iterdir()]
    assert [] == list((tmp_path / "out").iterdir())


def test_nothing_is_overwritten(ctl: Ctl, tmp_path: Path) -> None:
    image(tmp_path / "a.vmdk")
    (tmp_path / "manifest.json").write_text("mine")
    done = ctl("manifest", "create", tmp_path)
    assert (1, f"hyper2kvmctl: {tmp_path / 'manifest.json'} already exists") == (
        *(done.returncode, done.stderr.splitlines()[0]),
    )
    assert "mine" == (tmp_path / "manifest.json").read_text()


def test_all_bad_disks_are_told_at_once(ctl: Ctl, tmp_path: Path) -> None:
    for name in ("a.vmdk", "b.qcow2"):
        (tmp_path / name).write_bytes(b"junk" * 1000)
    (tmp_path / "c.raw").symlink_to("/etc/passwd")
    done = ctl("manifest", "create", *(tmp_path / name for name in ("a.vmdk", "b.qcow2", "c.raw")))
    assert 1 == done.returncode
    for place in ("disks[0].source_format", "disks[1].source_format", "disks[2].local_path"):
        assert f"hyper2kvmctl: {place}: " in done.stderr


def test_a_boot_sector_that_cannot_be_read_is_a_warning(ctl: Ctl, fake: Any, tmp_path: Path) -> None:
    image(tmp_path / "a.vmdk")
    fake("qemu-img", "echo broken >&2; exit 1")
    done = ctl("manifest", "create", tmp_path / "a.vmdk", "--json")
    assert 0 == done.returncode, done.stderr
    shown = json.loads(done.stdout)
    assert "unknown" == shown["firmware"]
    assert "boot_sector" == shown["warnings"][0]["code"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("none.vmdk",), 3, "no such file"),
        (("a.vmdk", "sub"), 2, "must all be disk files"),
        (("a.vmdk", "--directory", "new"), 2, "--directory is for OVAs"),
        (("a.vmdk", "-o", "manifest.txt"), 2, "does not end in"),
        (("a.vmdk", "-o", "manifest.json", "--format", "yaml"), 2, "does not end in .yaml"),
        (("sub", "-o", "manifest.json"), 2, "where the disks are"),
        (("a.vmdk", "-o", "sub/manifest.json"), 1, "where the manifest is to be"),
        (("a.vmdk", "--name", "a/b"), 65, "cannot be the name of a VM"),
        (("empty",), 1, "holds no disk images"),
    ],
)
def test_a_request_that_makes_no_sense_is_explained(
    ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], status: int, message: str
) -> None:
    work = tmp_path / "here"
    (work / "sub").mkdir(parents=True)
    (work / "empty").mkdir()
    image(work / "a.vmdk")
    image(work / "sub/b.vmdk")
    monkeypatch.chdir(work)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    done = ctl("manifest", "create", *arguments)
    assert (status, "") == (done.returncode, done.stdout)
    assert message in done.stderr
    assert [] == list(work.rglob("manifest*"))


# rehash, relocate -----------------------------------------------------------------------------------------


def test_rehash_puts_the_new_checksum_in_and_keeps_the_old_file(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export("web01", metadata={"tags": ["a"], "x-ours": [1, 2]})
    path, disk = export / "manifest.json", export / "web01-disk-0.raw"
    before, old = path.read_bytes(), hashlib.sha256(disk.read_bytes()).hexdigest()
    disk.write_bytes(os.urandom(2 << 20))
    new = hashlib.sha256(disk.read_bytes()).hexdigest()
    done = ctl("manifest", "rehash", "--yes", path)
    assert 0 == done.returncode, done.stderr
    assert f"disks[0].checksum: sha256:{old} -> sha256:{new}" in done.stdout
    assert "disks[0].bytes: 1048576 -> 2097152" in done.stdout
    assert before == (export / "manifest.json.bak").read_bytes()
    expected = json.loads(before)
    expected["disks"][0] |= {"bytes": 2 << 20, "checksum": f"sha256:{new}"}
    assert json.dumps(expected) == json.dumps(json.loads(path.read_bytes()))
    again = ctl("manifest", "rehash", path)
    assert (0, f"{path}: nothing to change\n") == (again.returncode, again.stdout)
    assert ["manifest.json", "manifest.json.bak", disk.name] == sorted(file.name for file in export.iterdir())


def test_rehash_without_anybody_to_ask_changes_nothing(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export()
    (export / "web01-disk-0.raw").write_bytes(os.urandom(1 << 20))
    before = (export / "manifest.json").read_bytes()
    done = ctl("manifest", "rehash", export / "manifest.json")
    assert 2 == done.returncode
    assert "there is nobody to ask; use --yes" in done.stderr
    assert before == (export / "manifest.json").read_bytes()
    assert not (export / "manifest.json.bak").exists()


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("", 1), ("no", 1), ("\x04", 1)])
def test_rehash_asks_on_a_terminal(make_export: MakeExport, answer: str, status: int) -> None:
    export = make_export()
    (export / "web01-disk-0.raw").write_bytes(os.urandom(1 << 20))
    before = (export / "manifest.json").read_bytes()
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode() + b"\n" * (answer != "\x04"))
    done = subprocess.run(
        [sys.executable, "-m", "hyper2kvmd.ctl", "manifest", "rehash", export / "manifest.json"],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    os.close(theirs)
    os.close(ours)
    assert status == done.returncode, done.stderr
    assert f"Change {export / 'manifest.json'}? [y/N]" in done.stderr
    assert (before != (export / "manifest.json").read_bytes()) == (answer == "y")


def test_old_files_are_numbered(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export()
    contents = []
    for _ in range(3):
        contents.append((export / "manifest.json").read_bytes())
        (export / "web01-disk-0.raw").write_bytes(os.urandom(1 << 20))
        assert 0 == ctl("manifest", "rehash", "--yes", export / "manifest.json").returncode
    names = ("manifest.json.bak", "manifest.json.bak.1", "manifest.json.bak.2")
    assert contents == [(export / name).read_bytes() for name in names]


def test_rehash_of_a_yaml_says_what_becomes_of_its_comments(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export()
    content = json.loads((export / "manifest.json").read_bytes())
    path = export / "manifest.yaml"
    path.write_text("# ours\n" + yaml.safe_dump(content, sort_keys=False))
    (export / "web01-disk-0.raw").write_bytes(os.urandom(1 << 20))
    done = ctl("manifest", "rehash", "--yes", path, "--json")
    assert ["comments"] == [warning["code"] for warning in json.loads(done.stdout)["warnings"]]
    assert list(content) == list(yaml.safe_load(path.read_bytes()))
    assert {"disk-0"} == set(ArtifactManifest.load(path).verify_checksums())


def test_a_manifest_that_a_runner_works_on_is_left_alone(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export()
    held = claim_export(export)
    try:
        for arguments in (("rehash",), ("relocate", str(export), "/new")):
            done = ctl("manifest", *arguments, "--yes", export / "manifest.json")
            assert 5 == done.returncode
            assert "a runner works on it" in done.stderr
    finally:
        held.close()


def test_rehash_names_every_disk_that_it_cannot_read(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export()
    manifest = json.loads((export / "manifest.json").read_bytes())
    disk = manifest["disks"][0]
    write_manifest(export, [disk, *({**disk, "id": name, "local_path": name} for name in ("gone", "gone-too"))])
    done = ctl("manifest", "rehash", "--yes", export / "manifest.json")
    assert (1, "") == (done.returncode, done.stdout)
    assert "disks[1].local_path" in done.stderr
    assert "disks[2].local_path" in done.stderr


def test_relocate_brings_a_moved_export_back_into_use(ctl: Ctl, make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    moved = export.with_name("moved")
    (export / "disks").mkdir()
    (export / "web01-disk-0.raw").rename(export / "disks/web01-disk-0.raw")
    export.rename(moved)
    assert "failed" == json.loads(ctl("migrate", moved, "--json").stdout)["status"]
    done = ctl("manifest", "relocate", export, moved / "disks", "--yes", moved / "manifest.json", "--json")
    assert 0 == done.returncode, done.stderr
    shown = json.loads(done.stdout)
    assert [str(moved / "disks/web01-disk-0.raw")] == [change["new"] for change in shown["changes"]]
    assert ("manifest.json.bak", []) == (shown["backup"], shown["warnings"])
    assert 0 == ctl("retry", moved).returncode
    assert 0 == run_job(moved, scratch).returncode


def test_relocate_says_where_the_disks_are_if_not_there(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export()
    done = ctl("manifest", "relocate", "/old", "/new", "--yes", export / "manifest.json")
    assert 3 == done.returncode
    assert str(export / "web01-disk-0.raw") in done.stderr
    done = ctl("manifest", "relocate", export, "/new", "--yes", export / "manifest.json")
    assert 0 == done.returncode
    assert "/new/web01-disk-0.raw does not exist" in done.stderr


# schema, upgrade ------------------------------------------------------------------------------------------


def test_the_schema_takes_what_the_exporters_write(ctl: Ctl) -> None:
    schema = json.loads(ctl("manifest", "schema").stdout)
    for path in (DATA / "manifests").glob("[gs]*.json"):
        jsonschema.validate(json.loads(path.read_bytes()), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", ["seed.json", "go-vsphere.json", "go-everything.json", "go-everything.yaml"])
def test_every_manifest_goes_to_the_other_dialect_and_back(ctl: Ctl, tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    source.write_bytes((DATA / "manifests" / name).read_bytes())
    was = ArtifactManifest.load(source).manifest
    there, back = tmp_path / "there.yaml", tmp_path / "back.json"
    for one, other in ((source, there), (there, back)):
        done = ctl("manifest", "upgrade", one, "-o", other)
        assert 0 == done.returncode, done.stderr
    assert was.dialect != ArtifactManifest.load(there).manifest.dialect
    now = ArtifactManifest.load(back).manifest
    assert (was.dialect, was.vm_name, was.ordered()[0].id) == (now.dialect, now.vm_name, now.ordered()[0].id)
    same = ("nics", "configuration", "options", "notes", "job_id", "exporter_warnings")
    assert {key: getattr(was, key) for key in same} == {key: getattr(now, key) for key in same}


def test_upgrade_prints_the_manifest_and_warns_of_what_is_lost(ctl: Ctl) -> None:
    done = ctl("manifest", "upgrade", DATA / "manifests/go-everything.yaml", "--dialect", "seed")
    assert "raw" == yaml.safe_load(done.stdout)["pipeline"]["convert"]["target_format"]
    assert "warning: pipeline.fix.backup: the guide's dialect cannot say true here" in done.stderr
    shown = json.loads(ctl("manifest", "upgrade", DATA / "manifests/go-everything.yaml", "--json").stdout)
    assert ("seed", None) == (shown["dialect"], shown["output"])
    assert {"not_in_dialect"} == {warning["code"] for warning in shown["warnings"]}


def test_upgrade_overwrites_nothing(ctl: Ctl, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("mine")
    done = ctl("manifest", "upgrade", DATA / "manifests/seed.json", "-o", tmp_path / "other.json")
    assert 1 == done.returncode
    assert "mine" == (tmp_path / "other.json").read_text()


# Bad input ------------------------------------------------------------------------------------------------

GOOD = (DATA / "manifests/seed.json").read_text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.yaml", "a: &x [1]\nb: *x\n", "YAML anchors and aliases are not allowed"),
        ("m.yaml", "a: !!python/object/apply:os.system [id]\n", "the YAML tag"),
        ("m.yaml", "a: 1\na: 2\n", "the key 'a' is there twice"),
        ("m.json", '{"disks": [], "disks": []}', "the key 'disks' is there twice"),
        ("m.json", GOOD.replace('"bytes": 21474836480', '"bytes": "21474836480"'), "disks[0].bytes: '21474836480'"),
        ("m.json", GOOD.replace('"cpu": 4', '"cpu": "4"'), "vm.cpu: '4' is not allowed here"),
        ("m.json", "[" * 100_000, "nested deeper than"),
        ("m.json", GOOD + " " * (1 << 20), "bytes"),
        ("m.json", '{"manifest_version": "2.0"}', "manifest version '2.0' is not supported"),
    ],
)
def test_a_bad_manifest_is_an_error_and_stays_as_it_is(
    ctl: Ctl, tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = tmp_path / "export" / name
    path.parent.mkdir()
    path.write_text(text)
    done = ctl("manifest", "rehash", "--yes", path)
    assert (65, "") == (done.returncode, done.stdout)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [name] == [file.name for file in path.parent.iterdir()]
    assert text == path.read_text()


@pytest.mark.parametrize("command", [("rehash",), ("relocate", "/old", "/new"), ("upgrade",)])
def test_what_is_no_manifest_is_an_error_of_every_command(ctl: Ctl, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "bad.json").write_text("{")
    for path in (tmp_path / "bad.json", tmp_path / "none.json", tmp_path / "none/manifest.json"):
        done = ctl("manifest", *command, path)
        assert 65 == done.returncode
        assert str(path.relative_to(tmp_path).parts[0]) in done.stderr
        assert "Traceback" not in done.stderr
