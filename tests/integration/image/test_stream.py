"""Our own reader of sparse VMDKs as the process that it is, against qemu-img, and on storage that fails it."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hyper2kvmd.errors import Cancelled, Code, MigrationError
from hyper2kvmd.image import qemu_img
from hyper2kvmd.image.source import check_unchanged
from hyper2kvmd.run import Tools
from tests.fuzz_stream import fuzz
from tests.integration.image.test_images import convert, disk, ignore, opened, run_qemu_img
from tests.unit.image.test_stream import CASES, LAYOUTS, MIB, Break, victim
from tests.vmdk import AT_END, GRAIN, SECTOR, VSPHERE, Disk, Layout, a_disk, a_layout, write

FORMATS = {"qcow2": ("qcow2", False), "qcow2-zstd": ("qcow2", True), "raw": ("raw", False)}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    directory = tmp_path / "export"
    directory.mkdir()
    return directory


def put(export: Path, truth: Disk, layout: Layout = VSPHERE) -> Path:
    path = export / "disk.vmdk"
    path.write_bytes(write(truth, layout).data)
    return path


def check(export: Path, path: Path, raw: Path, target: Path, format: str) -> None:
    """Convert an image, and compare what comes out with the disk that is in it, and with what qemu-img makes of it."""
    name, compress = FORMATS[format]
    other = target.with_name("other")
    with opened(export, disk(path, "vmdk")) as (source,):
        copied = convert(Tools(), source, target, name, compress=compress, on_progress=ignore)
        assert copied.engine == "stream"
        qemu_img.check_target(Tools(), target, name, raw.stat().st_size)
        convert(Tools(), source, other, "qcow2", compress=False, engine="qemu-img", on_progress=ignore)
    if name == "qcow2":
        done = run_qemu_img("check", "-f", "qcow2", target)
        assert (done.returncode, "No errors were found" in done.stdout) == (0, True), done.stdout + done.stderr
    for kind, expected in (("raw", raw), ("qcow2", other)):
        done = run_qemu_img("compare", "-f", kind, "-F", name, expected, target)
        assert done.returncode == 0, done.stdout + done.stderr
    target.unlink()
    other.unlink()


# Sound images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_disk_is_what_qemu_img_sees_in_it(format: str, export: Path, tmp_path: Path) -> None:
    chance = random.Random(format)
    for _ in range(5):
        truth = a_disk(chance, parts=40)
        layout = replace(a_layout(chance, truth), zeroed=frozenset())
        check(export, put(export, truth, layout), truth.write(tmp_path / "raw"), tmp_path / "target", format)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grains_of_zeros_are_zeros(layout: str, export: Path, tmp_path: Path) -> None:
    parts = dict.fromkeys(range(9), b"data" * 9000)
    path = put(export, Disk(9 * GRAIN, parts), replace(LAYOUTS[layout], zeroed=frozenset({2, 8})))
    raw = Disk(9 * GRAIN, {number: parts[number] for number in {*parts} - {2, 8}}).write(tmp_path / "raw")
    check(export, path, raw, tmp_path / "target", "qcow2")


@pytest.mark.parametrize(("layout", "format"), [("vsphere", "raw"), ("open-vmdk", "qcow2")])
def test_disk_of_two_tebibytes(layout: str, format: str, export: Path, tmp_path: Path) -> None:
    size = (1 << 41) - 111 * SECTOR
    parts = {0: b"first", 511: b"x", 512: b"y", 1 << 20: b"z" * GRAIN, (size - 1) // GRAIN: b"last"}
    path, target = put(export, truth := Disk(size, parts), LAYOUTS[layout]), tmp_path / "target"
    with opened(export, disk(path, "vmdk")) as (source,):
        copied = convert(Tools(), source, target, format, compress=False, on_progress=ignore)
    assert (copied.engine, copied.written < 8 * MIB) == ("stream", True)
    qemu_img.check_target(Tools(), target, format, size)
    done = run_qemu_img("compare", "-f", "raw", "-F", format, truth.write(tmp_path / "raw"), target)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_of_another_geometry_is_converted_by_qemu_img(layout: str, export: Path, tmp_path: Path) -> None:
    truth = Disk.of(b"data" * 128_000, GRAIN // 2)
    path, raw, target = put(export, truth, LAYOUTS[layout]), truth.write(tmp_path / "raw"), tmp_path / "target"
    with opened(export, disk(path, "vmdk")) as (source,):
        copied = convert(Tools(), source, target, "qcow2", compress=False, on_progress=ignore)
    assert (copied.engine, copied.sha256) == ("qemu-img", None)
    assert run_qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, target).returncode == 0


# Storage --------------------------------------------------------------------------------------------------


def tmpfs(at: Path) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(at)]


def ramfs(at: Path) -> list[str]:
    """Can neither allocate nor punch holes."""
    return ["mount", "-t", "ramfs", "none", str(at)]


def bindfs(at: Path) -> list[str]:
    """Through FUSE."""
    behind = at.with_name("behind")
    behind.mkdir()
    return ["bindfs", str(behind), str(at)]


@pytest.fixture
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    at = tmp_path / "mounted"
    at.mkdir()
    subprocess.run(request.param(at), check=True, stdin=subprocess.DEVNULL)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)


@needs_root
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mounted", [tmpfs, ramfs, bindfs], indirect=True)
def test_target_may_be_on_any_file_system(mounted: Path, format: str, export: Path, tmp_path: Path) -> None:
    truth = a_disk(random.Random(1), parts=100)
    check(export, put(export, truth), truth.write(tmp_path / "raw"), mounted / "target", format)


def small(at: Path) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(at)]


@needs_root
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mounted", [small], indirect=True)
def test_full_file_system_is_no_space(mounted: Path, format: str, export: Path) -> None:
    path = put(export, Disk.of(random.Random(1).randbytes(200 * GRAIN)))
    name, compress = FORMATS[format]
    with opened(export, disk(path, "vmdk")) as (source,), pytest.raises(MigrationError) as caught:
        convert(Tools(), source, mounted / "target", name, compress=compress, on_progress=ignore)
    assert caught.value.code == Code.NO_SPACE
    assert f"{mounted / 'target'}: No space left on device" in caught.value.message


def under_strace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Path, inject: str) -> None:
    """Have the reader's process run under strace, which does something to its calls for one file."""
    script = tmp_path / "python"
    options = f"-f -qq -o /dev/null -P {shlex.quote(str(path))} -e inject={inject}"
    script.write_text(f'#!/bin/sh\nexec strace {options} {sys.executable} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


FAULTS = [
    *[("source", f"preadv,preadv2:error=EIO:when={number}", Code.IO_ERROR) for number in (1, 3)],
    *[("source", f"pread64:error=EIO:when={number}", Code.IO_ERROR) for number in (1, 3, 5)],
    ("source", "preadv,preadv2:error=ESTALE:when=2", Code.IO_ERROR),
    ("target", "pwrite64:error=EIO:when=1", Code.IO_ERROR),
    ("target", "pwrite64:error=EIO:when=2+", Code.IO_ERROR),
    ("target", "ftruncate:error=EIO", Code.IO_ERROR),
    ("target", "pwrite64:error=ENOSPC:when=2", Code.NO_SPACE),
    ("target", "pwrite64:error=EDQUOT:when=2", Code.NO_SPACE),
    ("target", "pwrite64:signal=KILL:when=2", Code.TOOL_KILLED),
]


@pytest.mark.parametrize(("file", "inject", "code"), FAULTS)
def test_fault_of_the_storage_is_said_as_such(
    file: str, inject: str, code: Code, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = put(export, Disk.of(random.Random(1).randbytes(200 * GRAIN))), tmp_path / "target"
    under_strace(monkeypatch, tmp_path, {"source": path, "target": target}[file], inject)
    with opened(export, disk(path, "vmdk")) as (source,), pytest.raises(MigrationError) as caught:
        convert(Tools(), source, target, "qcow2", compress=False, on_progress=ignore)
    error = caught.value
    assert error.code == code, error
    if code != Code.TOOL_KILLED:
        assert str({"source": source.name, "target": target}[file]) in error.message.rpartition("python ")[2]
    assert target.read_bytes()[:4] in (b"", bytes(4))


def test_file_system_that_takes_o_direct_and_refuses_the_writing_is_written_to_all_the_same(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = Disk.of(random.Random(1).randbytes(200 * GRAIN))
    target = tmp_path / "target"
    under_strace(monkeypatch, tmp_path, target, "pwrite64:error=EINVAL:when=1")
    check(export, put(export, truth), truth.write(tmp_path / "raw"), target, "qcow2")


# Changes, cancelling --------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(MIB))


@pytest.mark.parametrize("change", [cut, rewritten])
def test_source_that_is_changed_while_it_is_read(
    change: Callable[[Path], None], export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(export, Disk.of(random.Random(1).randbytes(300 * GRAIN)))
    under_strace(monkeypatch, tmp_path, path, "preadv,preadv2:delay_enter=300000")
    told = list[float]()

    def on_progress(ratio: float) -> None:
        if not told:
            change(path)
        told.append(ratio)

    with opened(export, disk(path, "vmdk")) as (source,):
        with pytest.raises(MigrationError) as caught:
            convert(Tools(), source, tmp_path / "target", "qcow2", compress=False, on_progress=on_progress)
        assert caught.value.code == Code.SOURCE_CHANGED
        with pytest.raises(MigrationError):
            check_unchanged(source)
    assert 0 < told[0] < 0.5


def test_conversion_is_cancelled_at_once(export: Path, tmp_path: Path) -> None:
    path = put(export, Disk.of(b"data" * GRAIN), LAYOUTS["qemu"])
    os.truncate(path, 200 << 30)  # what lies behind the data is read for the checksum
    tools, target, asked = Tools(), tmp_path / "target", list[float]()

    def cancel() -> None:
        asked.append(time.monotonic())
        tools.cancel.set()

    def on_progress(_: float) -> None:
        if not asked:
            asked.append(0)
            threading.Timer(0.5, cancel).start()

    with opened(export, disk(path, "vmdk")) as (source,), pytest.raises(Cancelled):
        convert(tools, source, target, "qcow2", compress=False, on_progress=on_progress)
    # Had it not ended by itself, it would have been killed later than this.
    assert time.monotonic() - asked[-1] < 4
    assert target.read_bytes()[:4] in (b"", bytes(4))


# Memory ---------------------------------------------------------------------------------------------------

MEASURED = """#!/usr/bin/python3
import os, sys
_, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, PYTHON, [PYTHON, *sys.argv[1:]]), 0)
with open(TOLD, "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def many_grains(path: Path, tables: int, *, backwards: bool) -> int:
    """An image that is full of grains of zeros, the last of which is first in the file if asked for; how many."""
    made = write(Disk(GRAIN, {0: b""}))
    begin, end = made.grains[0]
    grain = bytes(made.data[begin:end]).ljust(SECTOR, b"\0")
    count = tables * 512
    made.put(12, "Q", count * 128)
    made.put(made.header + 12, "Q", count * 128)
    directory = 128 + count + tables * 4
    made.put(made.header + 56, "Q", directory)
    assert made.get(56, "Q") == AT_END
    with path.open("wb") as file:
        file.write(made.data[: 128 * SECTOR])
        for first in range(0, count, 512):
            part = bytearray(grain * 512)
            for number in range(512):
                index = count - 1 - first - number if backwards else first + number
                part[number * SECTOR : number * SECTOR + 8] = (index * 128).to_bytes(8, "little")
            file.write(part)
        for first in range(0, count, 512):
            numbers = range(first, first + 512)
            sectors = (128 + (count - 1 - number if backwards else number) for number in numbers)
            file.write(b"".join(sector.to_bytes(4, "little") for sector in sectors))
        entries = b"".join((128 + count + table * 4).to_bytes(4, "little") for table in range(tables))
        file.write(entries.ljust(-(-len(entries) // SECTOR) * SECTOR, b"\0"))
        file.write(made.data[made.header - SECTOR :])
    return count


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
@pytest.mark.parametrize("gibibytes", [8, pytest.param(100, marks=pytest.mark.rest)])
def test_memory_is_bounded(
    gibibytes: int, backwards: bool, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told, script = export / "disk.vmdk", tmp_path / "told", tmp_path / "python"
    count = many_grains(path, gibibytes * 32, backwards=backwards)
    script.write_text(MEASURED.replace("PYTHON", repr(sys.executable)).replace("TOLD", repr(str(told))))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with opened(export, disk(path, "vmdk")) as (source,):
        copied = convert(Tools(), source, tmp_path / "target", "qcow2", compress=False, on_progress=ignore)
    assert (copied.engine, copied.inflated) == ("stream", count * GRAIN)
    assert copied.written < 2 * MIB + gibibytes * 2 * GRAIN
    peak = int(told.read_text()) << 10
    assert peak < 64 * MIB + 16 * count, f"{peak / MIB:.0f} MiB for {count} grains"


# Hostile images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "break_", "layouts", "code", "message", "examined"),
    [case for case in CASES if case.values[0] in ("vsphere", "monolithic")],  # the unit tests have all
)
def test_hostile_image_is_refused_and_gives_no_image(
    layout: str,
    break_: Break,
    layouts: tuple[str, ...],
    code: Code,
    message: str,
    examined: bool,
    export: Path,
    tmp_path: Path,
) -> None:
    image = victim(LAYOUTS[layout])
    break_(image)
    path, target = export / "disk.vmdk", tmp_path / "target"
    path.write_bytes(image.data)
    with (
        pytest.raises(MigrationError) as caught,
        opened(export, disk(path, "vmdk", bytes=33 * MIB + 17 * SECTOR)) as (source,),
    ):
        assert not examined
        convert(Tools(), source, target, "qcow2", compress=False, on_progress=ignore)
    assert caught.value.code == code
    assert message.partition("{")[0] in caught.value.message
    if target.exists():
        assert run_qemu_img("info", "-f", "qcow2", target).returncode == 1


@pytest.mark.rest
def test_fifty_thousand_broken_ones_end_in_an_image_or_a_refusal(tmp_path: Path) -> None:
    fuzz(20, 50_000, tmp_path)
