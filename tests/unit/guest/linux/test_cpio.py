"""The initramfs reader, on archives that are made here byte by byte."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.linux import cpio
from hyper2kvmd.run import Tools

PROGRAMS = {"zstd": ["zstd", "-q", "-c"], "lz4": ["lz4", "-l", "-c"]}


def entry(name: str, content: bytes = b"") -> bytes:
    raw = name.encode() + b"\0"
    fields = [0, 0o100644, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0]
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
    return header + b"\0" * (-len(header) % 4) + content + b"\0" * (-len(content) % 4)


def archive(*names: str, content: bytes = b"x" * 777) -> bytes:
    whole = b"".join(entry(name, content) for name in names) + entry("TRAILER!!!")
    return whole + b"\0" * (-len(whole) % 512)


def names(tmp_path: Path, data: bytes) -> frozenset[str]:
    image = tmp_path / "initrd.img"
    image.write_bytes(data)
    return cpio.read(image, Tools()).names


@pytest.mark.parametrize(
    "compress",
    [bytes, gzip.compress, bz2.compress, lzma.compress, lambda data: lzma.compress(data, lzma.FORMAT_ALONE)],
    ids=["plain", "gzip", "bzip2", "xz", "lzma"],
)
@pytest.mark.parametrize("early", [b"", archive("kernel/x86/microcode/GenuineIntel.bin")], ids=["alone", "after-early"])
def test_main_archive_is_read_in_every_compression(tmp_path: Path, compress: object, early: bytes) -> None:
    data = early + compress(archive("init", "usr/lib/modules/6.1/kernel/virtio_blk.ko"))  # type: ignore[operator]
    assert {"init", "usr/lib/modules/6.1/kernel/virtio_blk.ko"} <= names(tmp_path, data)


@pytest.mark.parametrize("program", PROGRAMS)
def test_main_archive_is_read_when_a_program_must_unpack_it(tmp_path: Path, program: str) -> None:
    packed = subprocess.run(PROGRAMS[program], input=archive("init"), capture_output=True, check=True).stdout
    early = archive("kernel/x86/microcode/AuthenticAMD.bin")
    assert names(tmp_path, packed) == {"init"}
    assert names(tmp_path, early + packed) == {"init", "kernel/x86/microcode/AuthenticAMD.bin"}


def test_archive_behind_the_main_one_counts_too(tmp_path: Path) -> None:
    assert names(tmp_path, gzip.compress(archive("init")) + archive("extra")) == {"init", "extra"}


def test_names_are_relative_to_the_root(tmp_path: Path) -> None:
    assert names(tmp_path, archive("./init", "/etc/fstab")) == {"init", "etc/fstab"}


@pytest.mark.parametrize("format", ["gzip", "zstd"])
@pytest.mark.parametrize("cut", [1, 100, 700, 99999])
def test_truncated_image_is_not_read_as_a_whole_one(tmp_path: Path, cut: int, format: str) -> None:
    # content that does not compress, so that every cut hits something that matters
    plain = archive("init", "conf", "etc", content=random.Random(0).randbytes(1500))
    whole = subprocess.run([format, "-qc"], input=plain, capture_output=True, check=True).stdout
    with pytest.raises(MigrationError) as caught:
        names(tmp_path, whole[:-cut])
    assert caught.value.code is Code.FIX_UNPROVED


def test_truncated_early_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="cut off"):
        names(tmp_path, archive("one", "two")[:900])


def test_unknown_compression_is_refused_with_its_magic(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="unknown compression deadbeef"):
        names(tmp_path, bytes.fromhex("deadbeef") * 100)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: object) -> None:
    monkeypatch.setattr(cpio, "MAX_UNPACKED_BYTES", 1 << 20)
    with pytest.raises(MigrationError, match="unpacks to more"):
        names(tmp_path, compress(archive("bomb", content=bytes(5 << 20))))  # type: ignore[operator]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_archive_that_unpacks_in_many_pieces_is_read_to_its_end(tmp_path: Path, compress: object) -> None:
    data = compress(archive("large", "last", content=bytes(5 << 20)))  # type: ignore[operator]
    assert names(tmp_path, data) == {"large", "last"}


def test_absurd_name_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="file name of"):
        names(tmp_path, b"070701" + b"F" * 104 + b"\0" * 100)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
@pytest.mark.parametrize("size", [b"-0000074", b"+0000010", b"0x000010", b"0_000010", b"        "])
def test_size_that_is_no_hexadecimal_number_is_refused(tmp_path: Path, compress: object, size: bytes) -> None:
    data = archive("init")
    data = data[:54] + size + data[62:]
    with pytest.raises(MigrationError, match="no hexadecimal number"):
        names(tmp_path, compress(data))  # type: ignore[operator]


@given(st.lists(st.integers(1, 300), min_size=1))
def test_walker_does_not_care_where_the_pieces_end(sizes: list[int]) -> None:
    data = archive("init", "usr/lib/modules/6.1/kernel/virtio.ko", "etc/modprobe.d/x.conf", content=b"c" * 131)
    walker = cpio.Walker()
    at = 0
    for size in sizes:
        walker.feed(data[at : at + size])
        at += size
    walker.feed(data[at:])
    assert walker.complete
    assert walker.names == {"init", "usr/lib/modules/6.1/kernel/virtio.ko", "etc/modprobe.d/x.conf"}


@given(st.binary(max_size=600))
def test_no_bytes_make_the_walker_do_more_than_refuse(data: bytes) -> None:
    walker = cpio.Walker()
    try:
        walker.feed(b"070701" + data)
    except ValueError:
        assert not walker.complete
