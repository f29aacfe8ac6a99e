"""Disk images against the real qemu-img: what is healthy comes through unchanged, what is not is refused."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from hyper2kvmd.errors import Cancelled, Code, Collected, MigrationError
from hyper2kvmd.files import fsync_file
from hyper2kvmd.image import qemu_img
from hyper2kvmd.image.convert import Copied, copy, stream, streams
from hyper2kvmd.image.header import DRIVERS
from hyper2kvmd.image.header.reader import Header
from hyper2kvmd.image.publish import publish
from hyper2kvmd.image.source import OpenDisk, Source, check_unchanged, open_sources, sha256
from hyper2kvmd.manifest import Disk
from hyper2kvmd.run import Tools
from tests.vmdk import vmware_stream

MIB = 1 << 20
CANARY = b"CANARY-of-a-file-that-no-export-may-read\n" * 50
Format = Literal["vmdk", "qcow2", "raw", "vhd", "vhdx", "vdi"]

# Every kind of image that qemu-img writes and we read: (manifest format, options of qemu-img, suffix).
HEALTHY: dict[str, tuple[Format, tuple[str, ...]]] = {
    "raw": ("raw", ()),
    "monolithicSparse": ("vmdk", ("-o", "subformat=monolithicSparse")),
    "streamOptimized": ("vmdk", ("-o", "subformat=streamOptimized")),
    "monolithicFlat": ("vmdk", ("-o", "subformat=monolithicFlat")),
    "qcow2": ("qcow2", ()),
    "qcow2-v2": ("qcow2", ("-o", "compat=0.10")),
    "qcow2-compressed": ("qcow2", ("-c",)),
    "qcow2-zstd": ("qcow2", ("-c", "-o", "compression_type=zstd")),
    "qcow2-extended-l2": ("qcow2", ("-o", "extended_l2=on,cluster_size=128k")),
    "qcow2-4k": ("qcow2", ("-o", "cluster_size=4k")),
    "qcow2-refcounts-1": ("qcow2", ("-o", "refcount_bits=1")),
    "vhd-dynamic": ("vhd", ("-o", "force_size=on")),
    "vhd-fixed": ("vhd", ("-o", "subformat=fixed,force_size=on")),
    "vhdx-dynamic": ("vhdx", ()),
    "vhdx-fixed": ("vhdx", ("-o", "subformat=fixed")),
    "vdi": ("vdi", ()),
    "vdi-static": ("vdi", ("-o", "static=on")),
}
SIZES = {"whole MiB": 40 * MIB, "odd": 40 * MIB + 7 * 512}


def run_qemu_img(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)


def convert(
    tools: Tools,
    source: Source,
    target: Path,
    format: str,
    *,
    compress: bool,
    on_progress: Callable[[float], None],
    engine: Literal["auto", "qemu-img"] = "auto",
) -> Copied:
    """Convert as a job does, to a file that is not there yet."""
    qemu_img.make_target(target)
    what = (tools, source, target, format)
    copied = None
    if streams(source, engine, compress=compress):
        copied = stream(*what, compress=compress, threads=2, on_progress=on_progress)
    return copied or copy(*what, reflink=engine == "auto", compress=compress, on_progress=on_progress)


def make(path: Path, kind: str, raw: Path) -> Path:
    format, options = HEALTHY[kind]
    done = run_qemu_img("convert", "-f", "raw", "-O", DRIVERS[format], *options, raw, path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session", params=SIZES)
def raw(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with data at its start, in its middle and in its last sector."""
    return write_raw(tmp_path_factory.mktemp("raw") / "disk.raw", SIZES[request.param])


def write_raw(path: Path, size: int) -> Path:
    generator = random.Random(size)
    with path.open("wb") as file:
        file.truncate(size)
        for offset in (0, 5 * MIB, 17 * MIB + 4096, 33 * MIB, size - 70_000):
            file.seek(offset)
            file.write(generator.randbytes(70_000))
    return path


@pytest.fixture
def export(tmp_path: Path) -> Path:
    directory = tmp_path / "export"
    directory.mkdir()
    return directory


def disk(
    path: Path | str, format: Format, *, id: str = "disk-0", bytes: int | None = None, sha256: str | None = None
) -> Disk:
    size = bytes if bytes is not None else Path(path).stat().st_size
    return Disk(
        id=id, format=format, bytes=size, path=str(path), sha256=sha256, boot_order=None, kind="boot", label=None
    )


@contextlib.contextmanager
def opened(export: Path, *disks: Disk) -> Iterator[tuple[Source, ...]]:
    fd = os.open(export, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.ExitStack() as stack:
            noted = Collected()
            sources = open_sources(fd, export, disks, stack, noted)
            noted.check()
            yield sources
    finally:
        os.close(fd)


def ignore(_: float) -> None:
    pass


def refusal(export: Path, item: Disk) -> MigrationError:
    """The error with which a disk is refused by what runs before the first byte is copied."""
    with pytest.raises(MigrationError) as caught, opened(export, item) as (source,):
        qemu_img.check_source(Tools(), source)
    assert caught.value.hint
    assert CANARY.decode()[:20] not in str(caught.value) + caught.value.tail
    return caught.value


# Healthy images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEALTHY)
def test_every_healthy_image_comes_through_unchanged(kind: str, raw: Path, export: Path, tmp_path: Path) -> None:
    path = make(export / "disk", kind, raw)
    size = raw.stat().st_size
    with opened(export, disk(path, HEALTHY[kind][0])) as (source,):
        qemu_img.check_source(Tools(), source)
        assert source.virtual_size == size
        for format in ("qcow2", "raw"):
            target, converted, compared = tmp_path / f"target.{format}", list[float](), list[float]()
            convert(Tools(), source, target, format, compress=False, on_progress=converted.append)
            assert run_qemu_img("compare", "-f", "raw", "-F", format, raw, target).returncode == 0
            qemu_img.check_target(Tools(), target, format, size)
            qemu_img.compare(Tools(), source, None, target, format, on_progress=compared.append)
            for ratios, last in ((converted, 1.0), (compared, 0.9)):
                assert ratios[-1] >= last
                assert ratios == sorted(ratios)
        check_unchanged(source)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize("kind", ["streamOptimized", "monolithicSparse", "monolithicFlat", "raw", "vhd-dynamic"])
def test_committing_the_overlay_gives_what_flattening_it_gives(
    kind: str, format: str, raw: Path, export: Path, tmp_path: Path
) -> None:
    path = make(export / "disk", kind, raw)
    before = {file.name: file.read_bytes() for file in export.iterdir()}
    overlay, target, flat = tmp_path / "work" / "overlay.qcow2", tmp_path / "target", tmp_path / "flat"
    tools = Tools()
    with opened(export, disk(path, HEALTHY[kind][0])) as (source,):
        qemu_img.create_overlay(tools, overlay, source)
        for command in ("write -P 7 0 4096", "write -P 8 20M 1M", f"write -P 9 {source.virtual_size - 512} 512"):
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, overlay], check=True, capture_output=True)
        assert run_qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay, flat).returncode == 0
        convert(tools, source, target, format, compress=format == "qcow2", on_progress=ignore)
        ratios = list[float]()
        qemu_img.commit(tools, overlay, target, format, on_progress=ratios.append)
        assert ratios
        assert ratios == sorted(ratios)
        qemu_img.check_target(tools, target, format, source.virtual_size)
        assert run_qemu_img("compare", "-f", "raw", "-F", format, flat, target).returncode == 0
        qemu_img.compare(tools, source, overlay, target, format, on_progress=ignore)
        with pytest.raises(MigrationError, match="mismatch") as caught:
            qemu_img.compare(tools, source, None, target, format, on_progress=ignore)
        assert caught.value.code == Code.VALIDATION_FAILED
    assert {file.name: file.read_bytes() for file in export.iterdir()} == before


def test_compare_is_not_fooled_by_an_overlay_that_lies_on_the_target(raw: Path, export: Path, tmp_path: Path) -> None:
    path = make(export / "disk", "streamOptimized", raw)
    overlay, target = tmp_path / "overlay.qcow2", tmp_path / "target"
    with opened(export, disk(path, "vmdk")) as (source,):
        qemu_img.create_overlay(Tools(), overlay, source)
        convert(Tools(), source, target, "raw", compress=False, on_progress=ignore)
        qemu_img.commit(Tools(), overlay, target, "raw", on_progress=ignore)
        with target.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"damage")
        with pytest.raises(MigrationError, match="mismatch"):
            qemu_img.compare(Tools(), source, overlay, target, "raw", on_progress=ignore)


def test_vhd_of_a_maker_whose_geometry_is_too_small_keeps_its_end(raw: Path, export: Path, tmp_path: Path) -> None:
    path = make(export / "disk.vhd", "vhd-fixed", raw)
    data = bytearray(path.read_bytes())
    footer = data[-512:]
    footer[28:32], footer[56:60] = b"vpc ", struct.pack(">HBB", 70, 16, 63)
    footer[64:68] = bytes(4)
    footer[64:68] = struct.pack(">I", ~sum(footer) & 0xFFFFFFFF)
    path.write_bytes(data[:-512] + footer)
    assert f"({raw.stat().st_size} bytes)" not in run_qemu_img("info", "-f", "vpc", path).stdout
    overlay, target = tmp_path / "overlay", tmp_path / "target"
    with opened(export, disk(path, "vhd")) as (source,):
        qemu_img.check_source(Tools(), source)
        qemu_img.create_overlay(Tools(), overlay, source)
        assert run_qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, overlay).returncode == 0
        convert(Tools(), source, target, "raw", compress=False, on_progress=ignore)
    assert target.read_bytes() == raw.read_bytes()


def test_stream_as_vmware_writes_it_comes_through_unchanged(raw: Path, export: Path, tmp_path: Path) -> None:
    content = raw.read_bytes()
    path = export / "disk.vmdk"
    path.write_bytes(vmware_stream(content))
    target = tmp_path / "target"
    with opened(export, disk(path, "vmdk")) as (source,):
        qemu_img.check_source(Tools(), source)
        convert(Tools(), source, target, "raw", compress=False, on_progress=ignore)
    assert target.read_bytes() == content
    for missing in (1, 512, 1536, path.stat().st_size // 10):
        path.write_bytes(vmware_stream(content)[:-missing])
        assert refusal(export, disk(path, "vmdk")).code == Code.IMAGE_CORRUPT


def test_renamed_stream_is_converted(raw: Path, export: Path) -> None:
    path = make(export / "name-in-the-descriptor.vmdk", "streamOptimized", raw).rename(export / "other, name=x:y.vmdk")
    with opened(export, disk(path, "vmdk")) as (source,):
        qemu_img.check_source(Tools(), source)


def replaced(path: Path, disk: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(disk)
    other.rename(path)


def rewritten(path: Path, disk: bytes) -> None:
    times = path.stat()
    with path.open("r+b") as file:
        file.write(disk)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = {"replaced": replaced, "rewritten": rewritten}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_is_changed_at_the_right_moment_is_noticed_by_every_tool(
    change: str, raw: Path, export: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    canary.write_bytes(CANARY.ljust(raw.stat().st_size, b"x"))
    refers = export / "refers"
    options = f"data_file={canary},data_file_raw=on"
    assert run_qemu_img("create", "-f", "qcow2", "-o", options, refers, str(raw.stat().st_size)).returncode == 0
    path = make(export / "disk", "qcow2", raw)
    target, overlay = tmp_path / "target", tmp_path / "overlay"
    uses: list[Callable[[Source], object]] = [
        lambda source: qemu_img.measure(Tools(), source),
        lambda source: qemu_img.create_overlay(Tools(), overlay, source),
        lambda source: convert(Tools(), source, target, "raw", compress=False, on_progress=ignore),
        lambda source: qemu_img.compare(Tools(), source, None, raw, "raw", on_progress=ignore),
        check_unchanged,
    ]
    with opened(export, disk(path, "qcow2")) as (source,):
        check_unchanged(source)
        CHANGES[change](path, refers.read_bytes())
        for use in uses:
            with pytest.raises(MigrationError) as caught:
                use(source)
            assert caught.value.code == Code.SOURCE_CHANGED
    assert 0 == target.stat().st_size
    assert not overlay.exists()


def test_headers_that_change_before_the_times_of_their_file_are_noticed(raw: Path, export: Path) -> None:
    path = make(export / "disk", "qcow2", raw)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        content[0] = content[
            0
        ]  # the page is written to from here on, and the file has no other times by the next write
        with opened(export, disk(path, "qcow2")) as (source,):
            check_unchanged(source)
            times = path.stat()
            content[24:32] = (2 * source.virtual_size).to_bytes(8, "big")
            assert path.stat().st_ctime_ns == times.st_ctime_ns
            with pytest.raises(MigrationError) as caught:
                check_unchanged(source)
            assert caught.value.code == Code.SOURCE_CHANGED


@pytest.mark.parametrize("kind", ["raw", "streamOptimized"])
def test_what_is_measured_is_enough_and_little_more_than_what_cannot_be_compressed_takes(
    kind: str, export: Path, tmp_path: Path
) -> None:
    """Clusters that get hardly smaller, a little, and not at all, and many holes."""
    raw, target = tmp_path / "raw", tmp_path / "target"
    noise = os.urandom(10 << 20)
    with raw.open("wb") as file:
        for number in range(0, len(noise), 3 << 16):
            file.write(noise[number : number + (1 << 16)] + noise[number + 1 : number + 65000].ljust(1 << 16))
            file.write(noise[number + 2 : number + 30000].ljust(1 << 16))
        file.truncate(1 << 30)
    path = raw if kind == "raw" else make(export / "disk", kind, raw)
    if kind == "raw":
        path = export / "disk"
        raw.rename(path)
    with opened(export, disk(path, "vmdk" if kind != "raw" else "raw")) as (source,):
        need = qemu_img.measure(Tools(), source)
        for format, compress in (("qcow2", False), ("qcow2", True), ("raw", False)):
            convert(Tools(), source, target, format, compress=compress, on_progress=ignore)
            taken = target.stat().st_blocks * 512
            target.unlink()
            assert need * 0.7 < taken <= need, (format, compress)


def test_sha256_is_that_of_the_file(raw: Path, export: Path) -> None:
    path = make(export / "disk", "streamOptimized", raw)
    ratios: list[float] = []
    with opened(export, disk(path, "vmdk")) as (source,):
        assert sha256(source, threading.Event(), ratios.append) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert ratios[-1] == 1.0
        cancel = threading.Event()
        cancel.set()
        with pytest.raises(Cancelled):
            sha256(source, cancel, ignore)


# Damaged images -------------------------------------------------------------------------------------------


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


CUTS: dict[str, Callable[[int], int]] = {
    "1 %": lambda size: size // 100,
    "50 %": lambda size: size // 2,
    "90 %": lambda size: size * 9 // 10,
    "99 %": lambda size: size * 99 // 100,
    "minus 1536": lambda size: size - 1536,
    "minus 512": lambda size: size - 512,
    "minus 1": lambda size: size - 1,
}


@pytest.mark.parametrize("to", CUTS)
@pytest.mark.parametrize("kind", [kind for kind in HEALTHY if kind != "raw"])
def test_truncated_image_is_refused_unless_it_still_holds_all(
    kind: str, to: str, raw: Path, export: Path, tmp_path: Path
) -> None:
    """Some images end in bytes that hold nothing; what counts is that nothing is lost in silence."""
    path = make(export / "disk", kind, raw)
    data = path if kind != "monolithicFlat" else next(file for file in export.iterdir() if file != path)
    cut(data, CUTS[to](data.stat().st_size))
    target = tmp_path / "target"
    try:
        with opened(export, disk(path, HEALTHY[kind][0])) as (source,):
            qemu_img.check_source(Tools(), source)
            convert(Tools(), source, target, "raw", compress=False, on_progress=ignore)
    except MigrationError as error:
        assert error.code == Code.IMAGE_CORRUPT, error
    else:
        assert target.read_bytes() == raw.read_bytes()
        assert to not in ("1 %", "50 %")


def test_empty_and_missing_files_are_told_apart(export: Path) -> None:
    (export / "disk.vmdk").touch()
    assert refusal(export, disk(export / "disk.vmdk", "vmdk", bytes=1)).code == Code.IMAGE_CORRUPT
    error = refusal(export, disk(export / "gone.vmdk", "vmdk", bytes=1))
    assert (error.code, error.field) == (Code.DISK_MISSING, "disks[0].local_path")
    assert str(export / "gone.vmdk") in error.message


def test_flat_extent_under_another_name_is_named(raw: Path, export: Path) -> None:
    path = make(export / "disk.vmdk", "monolithicFlat", raw)
    (export / "disk-flat.vmdk").rename(export / "moved-flat.vmdk")
    error = refusal(export, disk(path, "vmdk"))
    assert error.code == Code.DISK_MISSING
    assert "disk-flat.vmdk" in error.message


def test_cancelled_conversion_ends_at_once(raw: Path, export: Path, tmp_path: Path) -> None:
    path = make(export / "disk", "raw", raw)
    tools = Tools()
    tools.cancel.set()
    with opened(export, disk(path, "raw")) as (source,), pytest.raises(Cancelled):
        convert(tools, source, tmp_path / "target", "qcow2", compress=False, on_progress=ignore)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_full_file_system_is_no_space(raw: Path, export: Path, tmp_path: Path) -> None:
    path = make(export / "disk", "raw", raw)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], check=True)
    try:
        with opened(export, disk(path, "raw")) as (source,), pytest.raises(MigrationError) as caught:
            convert(Tools(), source, small / "target", "qcow2", compress=False, on_progress=ignore)
        assert caught.value.code == Code.NO_SPACE
    finally:
        subprocess.run(["umount", small], check=True)


# Hostile images -------------------------------------------------------------------------------------------


def vmdk_text(extent: str, *, kind: str = "monolithicFlat", more: str = "") -> bytes:
    return (
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="{kind}"\n{more}\n# Extent description\n{extent}\n\nddb.adapterType = "ide"\n'
    ).encode()


def qcow2(path: Path, *options: str) -> bytes:
    assert run_qemu_img("create", "-f", "qcow2", *options, path, "1M").returncode == 0
    data = path.read_bytes()
    path.unlink()
    return data


def patched(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def sparse(subformat: str, directory: Path, edit: Callable[[bytes], bytes]) -> bytes:
    path = directory / "made.vmdk"
    assert run_qemu_img("create", "-f", "vmdk", "-o", f"subformat={subformat}", path, "1M").returncode == 0
    data = path.read_bytes()
    path.unlink()
    text = data[512 : 21 * 512].split(b"\0")[0]
    return data[:512] + edit(text).ljust(20 * 512, b"\0") + data[21 * 512 :]


def hostile(directory: Path, canary: Path) -> dict[str, tuple[Format, bytes]]:
    """Images that make qemu-img read `canary`, or something else that is not in them."""
    base = qcow2(directory / "base")
    name = str(canary)
    backed = qcow2(directory / "backed", "-u", "-b", name, "-F", "raw")
    (directory / "data").touch()
    external = qcow2(directory / "external", "-o", f"data_file={directory / 'data'},data_file_raw=on")
    mono = sparse("monolithicSparse", directory, lambda text: text)
    return {
        "qcow2 backing file": ("qcow2", backed),
        "qcow2 backing relative": ("qcow2", qcow2(directory / "rel", "-u", "-b", "../canary", "-F", "raw")),
        "qcow2 backing json": (
            "qcow2",
            qcow2(directory / "json", "-u", "-b", 'json:{"driver":"null-co"}', "-F", "raw"),
        ),
        "qcow2 backing nbd": ("qcow2", qcow2(directory / "nbd", "-u", "-b", "nbd://127.0.0.1:1/x", "-F", "raw")),
        "qcow2 data file": ("qcow2", external.replace(str(directory / "data").encode(), name.encode().ljust(20))),
        "qcow2 data file bit only": ("qcow2", patched(base, 72, struct.pack(">Q", 4))),
        "qcow2 unknown feature": ("qcow2", patched(base, 72, struct.pack(">Q", 1 << 40))),
        "qcow2 corrupt bit": ("qcow2", patched(base, 72, struct.pack(">Q", 2))),
        "qcow version 1": ("qcow2", patched(base, 4, struct.pack(">I", 1))),
        "qcow2 cluster bits 0": ("qcow2", patched(base, 20, struct.pack(">I", 0))),
        "qcow2 cluster bits 63": ("qcow2", patched(base, 20, struct.pack(">I", 63))),
        "qcow2 of 8 EiB": ("qcow2", patched(base, 24, struct.pack(">Q", 1 << 63))),
        "qcow2 of 65 TiB": ("qcow2", patched(base, 24, struct.pack(">Q", 65 << 40))),
        "qcow2 of no size": ("qcow2", patched(base, 24, bytes(8))),
        "qcow2 encrypted": ("qcow2", patched(base, 32, struct.pack(">I", 1))),
        "qcow2 L1 outside": ("qcow2", patched(base, 40, struct.pack(">Q", 1 << 40))),
        "qcow2 L1 too small": ("qcow2", patched(base, 36, struct.pack(">I", 0))),
        "qcow2 called raw": ("raw", backed),
        "vmdk called raw": ("raw", vmdk_text(f'RW 4 FLAT "{name}" 0')),
        "vmdk called raw, disguised": ("raw", b"# a comment\n\n" + vmdk_text(f'RW 4 FLAT "{name}" 0')[22:]),
        "raw called qcow2": ("qcow2", bytes(MIB)),
        "vmdk absolute": ("vmdk", vmdk_text(f'RW 4 FLAT "{name}" 0')),
        "vmdk parent directory": ("vmdk", vmdk_text('RW 4 FLAT "../canary" 0')),
        "vmdk protocol": ("vmdk", vmdk_text('RW 4 FLAT "nbd:127.0.0.1:1" 0')),
        "vmdk no name": ("vmdk", vmdk_text('RW 4 FLAT "" 0')),
        "vmdk link": ("vmdk", vmdk_text('RW 4 FLAT "link" 0')),
        "vmdk directory": ("vmdk", vmdk_text('RW 4 FLAT "directory" 0')),
        "vmdk itself": ("vmdk", vmdk_text('RW 1 FLAT "disk" 0')),
        "vmdk offset": ("vmdk", vmdk_text('RW 1 FLAT "extent" 1')),
        "vmdk zero": ("vmdk", vmdk_text("RW 4 ZERO")),
        "vmdk no extent": ("vmdk", vmdk_text("")),
        "vmdk two extents": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0\nRW 1 FLAT "extent" 0')),
        "vmdk two gigabytes": ("vmdk", vmdk_text('RW 1 SPARSE "extent"', kind="twoGbMaxExtentSparse")),
        "vmdk second absolute": ("vmdk", vmdk_text(f'RW 1 FLAT "extent" 0\nRW 4 FLAT "{name}" 0')),
        "vmdk second sparse absolute": ("vmdk", vmdk_text(f'RW 1 FLAT "extent" 0\nRW 4 SPARSE "{name}"')),
        "vmdk second link": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0\nRW 4 FLAT "link" 0', kind="twoGbMaxExtentFlat")),
        "vmdk second itself": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0\nRW 4 FLAT "disk" 0')),
        "vmdk second of zeros": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0\nRW 4 ZERO')),
        "vmdk of no sectors": ("vmdk", vmdk_text('RW 0 FLAT "extent" 0\nRW 1 FLAT "extent2" 0')),
        "vmdk of 8 EiB in extents": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0\nRW 999999999999999999 FLAT "x" 0')),
        "vmdk of a thousand extents": ("vmdk", vmdk_text("".join(f'RW 1 FLAT "{n}" 0\n' for n in range(1000)))),
        "vmdk delta of ESX": ("vmdk", vmdk_text('RW 1 VMFSSPARSE "extent"', kind="vmfsSparse")),
        "vmdk device": ("vmdk", vmdk_text('RW 4 FLAT "/dev/vda" 0', kind="fullDevice")),
        "vmdk raw mapping": ("vmdk", vmdk_text('RW 4 VMFSRDM "disk-rdm.vmdk"', kind="vmfsRawDeviceMap")),
        "vmdk parent": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0', more=f'parentFileNameHint="{name}"')),
        "vmdk parent in a comment": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0', more=f'# parentFileNameHint="{name}"')),
        "vmdk parent id": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0').replace(b"ffffffff", b"12345679")),
        "vmdk two types": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0', more='createType="vmfs"')),
        "vmdk line that means nothing": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0', more="!!!")),
        "vmdk UTF-16": ("vmdk", vmdk_text('RW 1 FLAT "extent" 0').decode().encode("utf-16")),
        "sparse with a parent": (
            "vmdk",
            sparse("monolithicSparse", directory, lambda text: text + f'parentFileNameHint="{name}"\n'.encode()),
        ),
        "sparse as a description": ("vmdk", patched(mono, 12, bytes(8))),
        "sparse description elsewhere": ("vmdk", patched(mono, 28, struct.pack("<Q", 2))),
        "sparse with a path": (
            "vmdk",
            sparse("monolithicSparse", directory, lambda text: text.replace(b'"made.vmdk"', b'"/made.vmdk"')),
        ),
        "sparse of another type": (
            "vmdk",
            sparse("monolithicSparse", directory, lambda text: text.replace(b"monolithicSparse", b"custom")),
        ),
        "sparse of 8 EiB": ("vmdk", patched(mono, 12, struct.pack("<Q", 1 << 54))),
        "sparse without grains": ("vmdk", patched(mono, 20, bytes(8))),
        "sparse with tables of nothing": ("vmdk", patched(mono, 44, bytes(4))),
        "sparse with its end at its end": ("vmdk", patched(mono, 56, b"\xff" * 8)),
        "ESX snapshot": ("vmdk", b"COWD" + bytes(4096)),
        "gzip": ("vmdk", b"\x1f\x8b\x08" + bytes(4096)),
        "QED": ("raw", b"QED\0" + bytes(4096)),
    }


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Format, bytes]]]:
    directory = tmp_path_factory.mktemp("corpus")
    canary = directory / "canary"
    canary.write_bytes(CANARY)
    return canary, hostile(directory, canary)


# The names are needed before the fixture can run.
HOSTILE = [
    line.split('"')[1]
    for line in Path(__file__).read_text().split("    return {\n", 1)[1].split("\n    }\n")[0].splitlines()
    if line.startswith('        "')
]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_image_is_refused_before_anything_is_read_through_it(
    case: str, corpus: tuple[Path, dict[str, tuple[Format, bytes]]], export: Path
) -> None:
    canary, files = corpus
    shutil.copy(canary, export.parent / "canary")
    (export / "link").symlink_to(canary)
    (export / "directory").mkdir()
    (export / "extent").write_bytes(bytes(512))
    format, data = files[case]
    (export / "disk").write_bytes(data)
    with pytest.raises(MigrationError) as caught, opened(export, disk(export / "disk", format)):
        pass  # no other program may have seen the file by now
    error = caught.value
    assert error.hint
    assert error.code in (
        Code.IMAGE_UNSAFE,
        Code.IMAGE_CORRUPT,
        Code.EXPORT_UNSAFE,
        Code.FORMAT_MISMATCH,
        Code.FORMAT_UNSUPPORTED,
    )
    if "backing" in case or "data file" in case or "parent" in case or case.startswith(("vmdk abs", "vmdk proto")):
        assert error.code == Code.IMAGE_UNSAFE, error


def test_differencing_images_are_refused(raw: Path, export: Path) -> None:
    vhd = make(export / "a.vhd", "vhd-dynamic", raw)
    data = bytearray(vhd.read_bytes())
    footer = data[-512:]
    footer[60:68] = struct.pack(">II", 4, 0)
    footer[64:68] = struct.pack(">I", ~sum(footer) & 0xFFFFFFFF)
    vhd.write_bytes(footer + data[512:-512] + footer)
    assert refusal(export, disk(vhd, "vhd")).code == Code.IMAGE_UNSAFE

    vdi = make(export / "a.vdi", "vdi", raw)
    vdi.write_bytes(patched(vdi.read_bytes(), 440, b"\1" * 16))
    assert refusal(export, disk(vdi, "vdi")).code == Code.IMAGE_UNSAFE

    vhdx = make(export / "a.vhdx", "vhdx-dynamic", raw)
    content = vhdx.read_bytes()
    parameters = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")
    place = content.index(b"metadata")
    (offset,) = struct.unpack_from("<I", content, content.index(parameters, place) + 16)
    vhdx.write_bytes(patched(content, place + offset + 4, struct.pack("<I", 2)))
    assert refusal(export, disk(vhdx, "vhdx")).code == Code.IMAGE_UNSAFE
    vhdx.write_bytes(patched(patched(content, 64 * 1024 + 48, b"\1" * 16), 128 * 1024 + 48, b"\1" * 16))
    error = refusal(export, disk(vhdx, "vhdx"))
    assert error.code == Code.IMAGE_CORRUPT
    assert "log" in error.message


def test_second_line_of_defence_sees_a_backing_file_by_itself(export: Path) -> None:
    path = export / "disk"
    other = export / "other"
    other.write_bytes(CANARY.ljust(MIB, b"x"))
    assert run_qemu_img("create", "-f", "qcow2", "-b", other, "-F", "raw", path).returncode == 0
    fd = os.open(path, os.O_RDONLY)
    status = os.fstat(fd)
    file = OpenDisk(fd, "disk", status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    source = Source(disk(path, "qcow2"), file, (), fd, Header("qcow2", MIB), "disks[0]")
    try:
        with pytest.raises(MigrationError) as caught:
            qemu_img.check_source(Tools(), source)
        assert run_qemu_img("convert", "-O", "raw", source.node, export / "out").returncode == 0
        assert (export / "out").read_bytes() == bytes(MIB)
    finally:
        os.close(fd)
    assert caught.value.code == Code.IMAGE_UNSAFE
    assert "other" in caught.value.message


# Opening --------------------------------------------------------------------------------------------------


def make_fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NOT_FILES: dict[str, Callable[[Path, Path], Any]] = {
    "symbolic link": lambda path, canary: path.symlink_to(canary),
    "dangling link": lambda path, canary: path.symlink_to("nothing"),
    "hard link": lambda path, canary: path.hardlink_to(canary),
    "FIFO": make_fifo,
    "socket": make_socket,
    "directory": lambda path, canary: path.mkdir(),
}


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_not_a_plain_file_is_refused(kind: str, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = export.parent / "canary"
    canary.write_bytes(CANARY)
    monkeypatch.chdir(export)  # the name of a socket has room for a hundred bytes
    NOT_FILES[kind](Path("disk.raw"), canary)
    error = refusal(export, disk(export / "disk.raw", "raw", bytes=1))
    assert (error.code, error.field) == (Code.EXPORT_UNSAFE, "disks[0].local_path")


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a device node")
def test_device_is_refused_without_being_opened(export: Path) -> None:
    os.mknod(export / "disk.raw", 0o600 | 0o020000, os.makedev(240, 99))  # opening it would be ENXIO
    error = refusal(export, disk(export / "disk.raw", "raw", bytes=1))
    assert error.code == Code.EXPORT_UNSAFE
    assert "device" in error.message


def test_link_in_the_middle_of_a_path_is_refused(export: Path) -> None:
    outside = export.parent / "outside"
    outside.mkdir()
    (outside / "disk.raw").write_bytes(CANARY)
    (export / "sub").symlink_to(outside)
    assert refusal(export, disk("sub/disk.raw", "raw", bytes=1)).code == Code.EXPORT_UNSAFE


@pytest.mark.parametrize("path", ["../canary", "a/../../canary", "a/b/c/d/e", "/", ".", "sub/.."])
def test_path_that_leads_out_is_refused(path: str, export: Path) -> None:
    (export.parent / "canary").write_bytes(CANARY)
    assert refusal(export, disk(path, "raw", bytes=1)).code == Code.EXPORT_UNSAFE


@pytest.mark.parametrize("name", [".hyper2kvmd.lock", "migration-report.json", "migration-report.3.json.sig"])
def test_our_own_files_are_no_disks(name: str, export: Path) -> None:
    (export / name).write_bytes(bytes(512))
    assert refusal(export, disk(export / name, "raw")).code == Code.EXPORT_UNSAFE


def test_stale_absolute_path_falls_back_to_the_file_beside_the_manifest(export: Path) -> None:
    (export / "disk.raw").write_bytes(bytes(512))
    with opened(export, disk("/mnt/old/web-01/disk.raw", "raw", bytes=512)) as (source,):
        assert source.name == "disk.raw"
        assert [warning.field for warning in source.warnings] == ["disks[0].local_path"]
    assert refusal(export, disk("/etc/passwd", "raw", bytes=512)).code == Code.DISK_MISSING


def test_path_in_a_subdirectory_is_found(export: Path) -> None:
    (export / "a" / "b").mkdir(parents=True)
    (export / "a" / "b" / "disk.raw").write_bytes(bytes(512))
    for path in ("a/b/disk.raw", str(export / "a" / "b" / "disk.raw"), "./a/b/disk.raw"):
        with opened(export, disk(path, "raw", bytes=512)) as (source,):
            assert source.name == "a/b/disk.raw"
            assert source.warnings == ()


def test_two_disks_cannot_be_one_file(export: Path) -> None:
    (export / "disk.raw").write_bytes(bytes(512))
    one, other = (disk(export / "disk.raw", "raw", id=id) for id in ("disk-0", "disk-1"))
    with pytest.raises(MigrationError, match="two disks") as caught, opened(export, one, other):
        pass
    assert caught.value.field == "disks[1].local_path"


def test_size_may_be_that_of_the_file_or_of_the_disk_but_no_other(raw: Path, export: Path) -> None:
    path = make(export / "disk", "streamOptimized", raw)
    for size in (path.stat().st_size, raw.stat().st_size):
        with opened(export, disk(path, "vmdk", bytes=size)) as (source,):
            assert source.warnings == ()
    error = refusal(export, disk(path, "vmdk", bytes=1000))
    assert (error.code, error.field) == (Code.DISK_SIZE, "disks[0].bytes")
    assert "1000" in error.message
    with opened(export, disk(path, "vmdk", bytes=1000, sha256="0" * 64)) as (source,):
        assert [warning.code for warning in source.warnings] == [Code.DISK_SIZE]


def test_checksum_of_a_description_is_said_not_to_cover_the_data(raw: Path, export: Path) -> None:
    path = make(export / "disk.vmdk", "monolithicFlat", raw)
    with opened(export, disk(path, "vmdk", sha256="0" * 64)) as (source,):
        assert [warning.field for warning in source.warnings] == ["disks[0].checksum"]


def test_closing_the_sources_closes_every_descriptor(raw: Path, export: Path) -> None:
    path = make(export / "disk.vmdk", "monolithicFlat", raw)
    before = len(os.listdir("/proc/self/fd"))
    with opened(export, disk(path, "vmdk")):
        pass
    for bad in ("gone", "../x", "sub/disk", "."):
        refusal(export, disk(bad, "raw", bytes=1))
    assert len(os.listdir("/proc/self/fd")) == before


# Publishing -----------------------------------------------------------------------------------------------


def test_publishing_never_overwrites_and_can_be_repeated(tmp_path: Path) -> None:
    partial, final = tmp_path / "partial", tmp_path / "final"
    partial.write_bytes(b"new")
    final.write_bytes(b"old")
    with pytest.raises(MigrationError) as caught:
        publish(partial, final)
    assert caught.value.code == Code.OUTPUT_EXISTS
    assert (partial.read_bytes(), final.read_bytes()) == (b"new", b"old")
    final.unlink()
    os.link(partial, final)  # as after a crash between the two steps
    fsync_file(partial)
    publish(partial, final)
    assert final.read_bytes() == b"new"
    assert not partial.exists()


def test_target_that_exists_is_not_touched(raw: Path, export: Path, tmp_path: Path) -> None:
    path = make(export / "disk", "raw", raw)
    target = tmp_path / "target"
    target.symlink_to(tmp_path / "elsewhere")
    with opened(export, disk(path, "raw")) as (source,), pytest.raises(MigrationError) as caught:
        convert(Tools(), source, target, "raw", compress=False, on_progress=ignore)
    assert caught.value.code == Code.OUTPUT_EXISTS
    assert not (tmp_path / "elsewhere").exists()


def test_progress_is_found_however_it_is_cut() -> None:
    written = b"    (0.00/100%)\r    (12.34/100%)\r    (99.99/100%)\r    (100.00/100%)\r\n"
    for size in range(1, len(written) + 1):
        ratios: list[float] = []
        progress = qemu_img._Progress(ratios.append)
        for start in range(0, len(written), size):
            progress(written[start : start + size])
        assert ratios == sorted(set(ratios))
        assert ratios[-1] == 1.0
        assert size > 12 or [round(ratio, 4) for ratio in ratios] == [0.0, 0.1234, 0.9999, 1.0]


def test_damaged_target_fails_validation(raw: Path, export: Path, tmp_path: Path) -> None:
    path = make(export / "disk", "raw", raw)
    target = tmp_path / "target"
    with opened(export, disk(path, "raw")) as (source,):
        convert(Tools(), source, target, "qcow2", compress=False, on_progress=ignore)
    with pytest.raises(MigrationError) as caught:
        qemu_img.check_target(Tools(), target, "qcow2", MIB)
    assert caught.value.code == Code.VALIDATION_FAILED
    cut(target, 200_000)
    with pytest.raises(MigrationError) as caught:
        qemu_img.check_target(Tools(), target, "qcow2", raw.stat().st_size)
    assert caught.value.code == Code.VALIDATION_FAILED


def test_direct_io_is_what_the_file_system_can(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(8192))
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        assert not qemu_img.direct_io(file)
    else:
        assert qemu_img.direct_io(file)
    with pytest.raises(FileNotFoundError):
        qemu_img.direct_io(tmp_path / "missing")
