"""Disks in several files against the real qemu-img: read as one, and never a part for the whole."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.image import qemu_img
from hyper2kvmd.image.source import check_unchanged
from hyper2kvmd.manifest import Disk
from hyper2kvmd.run import Tools
from tests.integration.image.test_images import Format, convert, disk, ignore, opened, refusal, run_qemu_img, write_raw

MIB = 1 << 20
# A little more than fits into one extent, so that there are two; and what does, so that there is one.
SIZES = {"two extents": 2048 * MIB + 40 * MIB, "one extent": 40 * MIB}
KINDS = ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicFlat")


@pytest.fixture(scope="session", params=SIZES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with data at its start, and in the last of its extents."""
    return write_raw(tmp_path_factory.mktemp("raw") / "disk.raw", SIZES[request.param])


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw") / "disk.raw", SIZES["two extents"])


@pytest.fixture
def export(tmp_path: Path) -> Path:
    directory = tmp_path / "export"
    directory.mkdir()
    return directory


def make(directory: Path, kind: str, raw: Path, name: str = "web.vmdk") -> Path:
    """The description of a disk in a directory, with its extents."""
    path = directory / name
    done = run_qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", raw, path)
    assert done.returncode == 0, done.stderr
    return path


def parts(path: Path) -> list[Path]:
    """The extents of a disk."""
    return sorted(file for file in path.parent.iterdir() if file != path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_in_extents_comes_through_unchanged(kind: str, plain: Path, export: Path, tmp_path: Path) -> None:
    path = make(export, kind, plain)
    before = {file: file.stat().st_mtime_ns for file in export.iterdir()}
    with opened(export, disk(path, "vmdk")) as (source,):
        qemu_img.check_source(Tools(), source)
        assert source.virtual_size == plain.stat().st_size
        assert {file.name for file in source.files} == {file.name for file in before}
        assert qemu_img.measure(Tools(), source) < 10 * MIB or kind != "twoGbMaxExtentSparse"
        target, overlay, flat = tmp_path / "target", tmp_path / "work" / "overlay.qcow2", tmp_path / "flat"
        convert(Tools(), source, target, "qcow2", compress=False, on_progress=ignore)
        assert run_qemu_img("compare", "-f", "raw", "-F", "qcow2", plain, target).returncode == 0
        qemu_img.create_overlay(Tools(), overlay, source)
        assert run_qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay, flat).returncode == 0
        assert run_qemu_img("compare", "-f", "raw", "-F", "raw", plain, flat).returncode == 0
        qemu_img.compare(Tools(), source, None, target, "qcow2", on_progress=ignore)
    assert {file: file.stat().st_mtime_ns for file in export.iterdir()} == before


def test_flat_and_sparse_extents_make_one_disk_together(large: Path, export: Path, tmp_path: Path) -> None:
    """As VMware writes it: its sparse extents have no place for a description, and its lines end in CR LF."""
    flat, sparse = (
        make(export, kind, large, f"{kind}.vmdk") for kind in ("twoGbMaxExtentFlat", "twoGbMaxExtentSparse")
    )
    first = flat.with_name("twoGbMaxExtentFlat-f001.vmdk")
    second = sparse.with_name("twoGbMaxExtentSparse-s002.vmdk")
    with second.open("r+b") as file:
        file.seek(28)
        file.write(struct.pack("<QQ", 0, 0))
    sizes = (first.stat().st_size // 512, (large.stat().st_size - first.stat().st_size) // 512)
    text = (
        '# Disk DescriptorFile\nversion=1\nencoding="windows-1252"\nCID=12345678\nparentCID=ffffffff\n'
        f'createType="2GbMaxExtentSparse"\n\n# Extent description\nRW {sizes[0]} FLAT "{first.name}" 0\n'
        f'RDONLY {sizes[1]} SPARSE "{second.name}"\n\nddb.adapterType = "lsilogic"\n'
    )
    path = export / "both.vmdk"
    path.write_text(text.replace("\n", "\r\n"))
    for other in (flat, sparse):
        other.unlink()
    with opened(export, disk(path, "vmdk")) as (source,):
        qemu_img.check_source(Tools(), source)
        convert(Tools(), source, tmp_path / "target", "qcow2", compress=False, on_progress=ignore)
    assert run_qemu_img("compare", "-f", "raw", "-F", "qcow2", large, tmp_path / "target").returncode == 0


# A part for the whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
@pytest.mark.parametrize("format", ["vmdk", "raw"])
def test_an_extent_that_is_named_as_the_disk_is_refused_with_the_name_of_its_description(
    kind: str, format: Format, large: Path, export: Path
) -> None:
    path = make(export, kind, large)
    for extent in parts(path):
        error = refusal(export, disk(extent, format))
        assert (Code.FORMAT_UNSUPPORTED, "disks[0].local_path") == (error.code, error.field)
        assert f"{extent} is one of the 2 extents of the disk that web.vmdk describes" in error.message
        assert "Name web.vmdk in its place" in error.hint


def test_the_only_flat_extent_is_the_whole_disk_as_raw_and_none_as_vmdk(large: Path, export: Path) -> None:
    path = make(export, "monolithicFlat", large)
    (extent,) = parts(path)
    with opened(export, disk(extent, "raw")) as (source,):
        assert source.virtual_size == large.stat().st_size
    error = refusal(export, disk(extent, "vmdk"))
    assert "holds the data of the disk that web.vmdk describes" in error.message
    assert "Name web.vmdk in its place" in error.hint


@pytest.mark.parametrize(("kind", "format"), [("twoGbMaxExtentSparse", "vmdk"), ("twoGbMaxExtentFlat", "raw")])
def test_an_extent_without_its_description_is_no_disk(kind: str, format: Format, large: Path, export: Path) -> None:
    path = make(export, kind, large)
    first, last = parts(path)
    path.unlink()
    for extent in (first, last):
        error = refusal(export, disk(extent, format))
        assert Code.FORMAT_UNSUPPORTED == error.code
        assert "descri" in error.hint
    first.unlink()
    assert Code.FORMAT_UNSUPPORTED == refusal(export, disk(last, format)).code


def test_an_extent_cannot_be_that_of_two_disks(large: Path, export: Path) -> None:
    path = make(export, "twoGbMaxExtentFlat", large)
    shutil.copy(path, export / "other.vmdk")
    with (
        pytest.raises(MigrationError, match="is the file of two disks"),
        opened(export, disk(path, "vmdk"), disk(export / "other.vmdk", "vmdk", id="disk-1")),
    ):
        pass


# Damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_extent_that_is_missing_is_named(kind: str, large: Path, export: Path) -> None:
    path = make(export, kind, large)
    last = parts(path)[-1]
    last.unlink()
    error = refusal(export, disk(path, "vmdk"))
    assert (Code.DISK_MISSING, f"{last} does not exist") == (error.code, error.message)


@pytest.mark.parametrize("kind", KINDS)
def test_an_extent_that_was_cut_short_is_noticed(kind: str, large: Path, export: Path) -> None:
    path = make(export, kind, large)
    last = parts(path)[-1]
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size - 65536)
    error = refusal(export, disk(path, "vmdk"))
    assert Code.IMAGE_CORRUPT == error.code
    assert str(last) in error.message


def test_an_extent_of_another_disk_is_noticed(large: Path, export: Path) -> None:
    path = make(export, "twoGbMaxExtentSparse", large)
    first, last = parts(path)
    shutil.copy(last, first)
    error = refusal(export, disk(path, "vmdk"))
    assert str(first) in error.message
    assert "is an extent of 41943040 bytes, its descriptor says 2147483648" in error.message


def test_an_extent_in_which_qemu_would_read_a_description_is_refused(large: Path, export: Path) -> None:
    """With a capacity of 0, what stands where its description would be is obeyed."""
    path = make(export, "twoGbMaxExtentSparse", large)
    last = parts(path)[-1]
    data = bytearray(last.read_bytes())
    data[12:20] = bytes(8)
    text = '# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 4 FLAT "/etc/passwd" 0\n'
    data[512 : 512 + len(text)] = text.encode()
    last.write_bytes(data)
    assert Code.IMAGE_UNSAFE == refusal(export, disk(path, "vmdk")).code


def test_an_extent_that_changes_is_noticed(large: Path, export: Path, tmp_path: Path) -> None:
    path = make(export, "twoGbMaxExtentFlat", large)
    with opened(export, disk(path, "vmdk")) as (source,):
        check_unchanged(source)
        with parts(path)[-1].open("r+b") as file:
            file.write(b"x")
        with pytest.raises(MigrationError, match=r"web-f002.vmdk was changed while it was being migrated"):
            convert(Tools(), source, tmp_path / "target", "qcow2", compress=False, on_progress=ignore)
    assert 0 == (tmp_path / "target").stat().st_size


def test_the_size_may_be_that_of_the_description_the_extents_or_the_disk(large: Path, export: Path) -> None:
    path = make(export, "twoGbMaxExtentSparse", large)
    extents = sum(file.stat().st_size for file in parts(path))
    for size in (path.stat().st_size, extents, extents + path.stat().st_size, large.stat().st_size):
        with opened(export, disk(path, "vmdk", bytes=size)) as (source,):
            assert () == source.warnings
    assert Code.DISK_SIZE == refusal(export, disk(path, "vmdk", bytes=1000)).code


# Snapshots ------------------------------------------------------------------------------------------------


def delta(path: Path, base: Path, **more: Any) -> Disk:
    """A delta as VMware writes it, of a disk; the entry of a manifest for it."""
    done = run_qemu_img("create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", "-o", f"subformat={more['kind']}", path)
    assert done.returncode == 0, done.stderr
    return disk(path, "vmdk")


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_a_delta_is_refused_and_its_base_is_known_to_be_old(kind: str, large: Path, export: Path) -> None:
    base = make(export, kind, large)
    error = refusal(export, delta(export / "web-000001.vmdk", base, kind=kind))
    assert "it is the delta of a snapshot" in error.message
    assert "Consolidate the VM's snapshots" in error.hint
    with opened(export, disk(base, "vmdk")) as (source,):
        (warning,) = source.warnings
    assert "snapshot_beside" == warning.code
    assert "web-000001.vmdk beside web.vmdk is the delta of a snapshot of it" in warning.message


def test_a_delta_of_esx_is_told_to_be_one_by_its_type(export: Path) -> None:
    """Whose description can have lost the name of its base."""
    (export / "web-000001-delta.vmdk").write_bytes(b"COWD" + bytes(4096))
    path = export / "web-000001.vmdk"
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        'createType="vmfsSparse"\nRW 8 VMFSSPARSE "web-000001-delta.vmdk"\n'
    )
    assert "Consolidate" in refusal(export, disk(path, "vmdk")).hint
    error = refusal(export, disk(export / "web-000001-delta.vmdk", "vmdk"))
    assert "holds the data of the disk that web-000001.vmdk describes" in error.message


def test_the_flat_file_of_a_base_is_known_to_be_old_as_well(export: Path, large: Path) -> None:
    base = make(export, "monolithicFlat", large)
    delta(export / "web-000001.vmdk", base, kind="monolithicSparse")
    with opened(export, disk(export / "web-flat.vmdk", "raw")) as (source,):
        assert ["snapshot_beside"] == [warning.code for warning in source.warnings]
