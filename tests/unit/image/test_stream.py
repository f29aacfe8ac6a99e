"""Our own reader of sparse VMDKs: what it makes of images in every layout, and of broken ones."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.image.header import examine
from hyper2kvmd.image.header.reader import Image
from hyper2kvmd.image.stream import codecs, pipeline
from hyper2kvmd.image.stream.grains import Unsuitable
from tests.fuzz_stream import fuzz
from tests.pace import work_of_at_most
from tests.vmdk import (
    GRAIN,
    MONOLITHIC,
    OPEN_VMDK,
    QEMU_STREAM,
    SECTOR,
    VSPHERE,
    Disk,
    Layout,
    Written,
    a_disk,
    a_layout,
    read,
    read_qcow2,
    write,
)

MIB = 1 << 20
FORMATS = ["qcow2", "raw"] + (["qcow2-zstd"] if codecs.libzstd() else [])
LIBRARIES = ["zlib"] + (["libdeflate"] if codecs.libdeflate() else [])
LAYOUTS = {"vsphere": VSPHERE, "qemu": QEMU_STREAM, "open-vmdk": OPEN_VMDK, "monolithic": MONOLITHIC}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "zlib":
        monkeypatch.setattr(pipeline, "libdeflate", lambda: None)
    return name


def opened(data: bytes | bytearray) -> Image:
    fd = os.memfd_create("source")
    os.write(fd, data)
    return Image(fd, len(data), "disk.vmdk")


def convert(
    data: bytes | bytearray, format: str, threads: int = 2, on_read: Callable[[int], None] = lambda _: None
) -> tuple[pipeline.Totals, bytes]:
    """What is said of the conversion, and the file."""
    image, target = opened(data), os.memfd_create("target")
    try:
        totals = pipeline.convert(image, target, format, threads=threads, on_read=on_read)
        return totals, os.pread(target, os.fstat(target).st_size, 0)
    finally:
        os.close(image.fd)
        os.close(target)


def check(disk: Disk, data: bytes | bytearray, format: str, threads: int) -> None:
    """Convert an image, and see that the disk is in the result, and that all that is said is true."""
    reads = list[int]()
    totals, made = convert(data, format, threads, reads.append)
    if format == "raw":
        assert len(made) == disk.size
        assert Disk.of(made).holding() == disk.holding()
    else:
        found = read_qcow2(made)
        assert found.size == disk.size
        assert found.parts == disk.holding()  # nothing has a cluster that is zeros
    assert (totals.read, totals.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert reads[-1] == len(data)
    assert reads == sorted(set(reads))


# Sound images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_disk_comes_through_whatever_is_in_it_and_however_it_is_laid_out(format: str, library: str) -> None:
    chance = random.Random(f"{format} {library}")
    for _ in range(20):
        disk = a_disk(chance, parts=40)
        layout = a_layout(chance, disk)
        if format == "raw" and disk.size > 20 * MIB:
            continue  # it is all read back
        image = write(disk, layout)
        left = replace(disk, parts={number: disk.parts[number] for number in disk.parts.keys() - layout.zeroed})
        assert read(image.data).holding() == left.holding()
        check(left, image.data, format, chance.choice((1, 2)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_disk_with_nothing_in_it_and_of_one_sector(layout: str, format: str) -> None:
    for disk in (Disk(SECTOR, {}), Disk(SECTOR, {0: b"x"}), Disk(40 * MIB + SECTOR, {}), Disk(SECTOR, {0: b""})):
        check(disk, write(disk, LAYOUTS[layout]).data, format, 2)


# With a table for each 32 MiB of 2 TiB it takes seconds.
@pytest.mark.parametrize(("layout", "size"), [("vsphere", 1 << 41), ("qemu", 1 << 37), ("monolithic", 1 << 37)])
def test_large_disk_takes_what_it_holds(layout: str, size: int) -> None:
    size -= 111 * SECTOR
    disk = Disk(size, {0: b"first", 511: b"x", 512: b"y", 1 << 20: b"z" * GRAIN, (size - 1) // GRAIN: b"last"})
    image = write(disk, LAYOUTS[layout])
    _, made = convert(image.data, "qcow2")
    found = read_qcow2(made)
    assert (found.size, found.parts) == (size, disk.holding())
    assert len(made) < 4 * MIB


@pytest.mark.parametrize("geometry", [(8, 512), (64, 512), (256, 512), (128, 256), (128, 128), (128, 1)])
def test_other_geometries_are_left_to_qemu_img(geometry: tuple[int, int]) -> None:
    grain, entries = geometry
    disk = Disk.of(b"data" * 100_000, grain * SECTOR)
    for layout in LAYOUTS.values():
        with pytest.raises(Unsuitable):
            convert(write(disk, replace(layout, entries=entries)).data, "qcow2")


def test_what_is_in_no_grain_is_read_for_the_checksum_alone() -> None:
    disk = Disk.of(random.Random(1).randbytes(10 * GRAIN))
    check(disk, write(disk, Layout(gap=lambda: b"junk" * 128 * 5000)).data, "raw", 2)


# Broken ones ----------------------------------------------------------------------------------------------


def victim(layout: Layout = VSPHERE) -> Written:
    """Five grains in two tables, two of which get no smaller, of a disk that ends within a grain."""
    chance = random.Random(3)
    parts = {number: chance.randbytes(GRAIN) for number in (1, 2)}
    return write(Disk(33 * MIB + 17 * SECTOR, {0: b"\1", **parts, 3: b"x", 528: b"last"}), layout)


def packed(image: Written, number: int, data: bytes, *, adler: int | None = None) -> None:
    """Give a grain other bytes, in place; what it had must be as long."""
    begin, end = image.grains[number]
    if adler is not None:
        data = data[:-4] + struct.pack(">I", adler)
    assert len(data) <= -(-(end - begin) // SECTOR) * SECTOR - 12
    image.put(begin + 8, "I", len(data))
    image.data[begin + 12 : begin + 12 + len(data)] = data


def sector(at: int) -> int:
    assert at % SECTOR == 0
    return at // SECTOR


def table_used_twice(image: Written) -> None:
    image.put(image.directory, "I", sector(image.tables[1]))


def tables_overlap(image: Written) -> None:
    image.put(image.directory, "I", sector(image.tables[1]) - 1)


def table_is_the_header(image: Written) -> None:
    image.put(image.header + 56, "Q", 0)


def table_outside(image: Written) -> None:
    image.put(image.directory + 4, "I", sector(len(image.data)))


def table_at_the_maximum(image: Written) -> None:
    image.put(image.directory + 4, "I", 0xFFFFFFFF)


def table_in_the_descriptor(image: Written) -> None:
    image.put(image.directory, "I", 1)


def directory_is_its_own_table(image: Written) -> None:
    image.put(image.directory, "I", sector(image.directory))


def directory_outside(image: Written) -> None:
    image.put(image.header + 56, "Q", sector(len(image.data)))


def directory_far_outside(image: Written) -> None:
    image.put(image.header + 56, "Q", (1 << 64) - 2)


def two_entries_on_one_grain(image: Written) -> None:
    image.put(image.entry(2), "I", sector(image.grains[1][0]))


def neighbours_exchanged(image: Written) -> None:
    for one, other in ((1, 2), (2, 1)):
        image.put(image.entry(one), "I", sector(image.grains[other][0]))


def grain_in_the_header(image: Written) -> None:
    """1 is a grain of zeros in an image that says so, and this does not."""
    image.put(image.entry(0), "I", 1)


def grain_in_a_table(image: Written) -> None:
    image.put(image.entry(1), "I", sector(image.tables[0]))


def grain_in_the_directory(image: Written) -> None:
    image.put(image.entry(1), "I", sector(image.directory))


def grain_behind_the_end(image: Written) -> None:
    image.put(image.entry(1), "I", sector(len(image.data)))


def grain_at_the_maximum(image: Written) -> None:
    image.put(image.entry(1), "I", 0xFFFFFFFF)


def grain_behind_the_capacity(image: Written) -> None:
    image.put(image.entry(600), "I", sector(image.grains[1][0]))


def wrong_place(image: Written) -> None:
    image.put(image.grains[1][0], "Q", 256)


def place_of_64_bits(image: Written) -> None:
    image.put(image.grains[1][0], "Q", 128 + (1 << 57))


def size_of_nothing(image: Written) -> None:
    image.put(image.grains[1][0] + 8, "I", 0)


def size_into_the_next(image: Written) -> None:
    image.put(image.grains[1][0] + 8, "I", image.grains[2][0] - image.grains[1][0] - 11)


def size_behind_the_end(image: Written) -> None:
    image.put(image.grains[528][0] + 8, "I", len(image.data) - image.grains[528][0])


def size_at_the_maximum(image: Written) -> None:
    image.put(image.grains[1][0] + 8, "I", 0xFFFFFFFF)


def bomb(image: Written) -> None:
    packed(image, 2, zlib.compress(bytes(40 * MIB), 9))


def a_byte_too_much(image: Written) -> None:
    packed(image, 2, zlib.compress(b"x" * (GRAIN + 1)))


def a_byte_too_few(image: Written) -> None:
    packed(image, 2, zlib.compress(b"x" * (GRAIN - 1)))


def too_few_for_the_end(image: Written) -> None:
    packed(image, 528, zlib.compress(b"x" * (17 * SECTOR - 1)))


def wrong_checksum(image: Written) -> None:
    packed(image, 2, zlib.compress(b"x" * GRAIN), adler=1)


def without_its_end(image: Written) -> None:
    packed(image, 2, zlib.compress(b"x" * GRAIN)[:-1])


def with_a_dictionary(image: Written) -> None:
    compressor = zlib.compressobj(zdict=b"x" * 100)
    packed(image, 2, compressor.compress(b"x" * GRAIN) + compressor.flush())


def no_zlib_around_it(image: Written) -> None:
    compressor = zlib.compressobj(wbits=-15)
    packed(image, 2, compressor.compress(b"x" * GRAIN) + compressor.flush())


def says_it_is_not_compressed(image: Written) -> None:
    for header in {0, image.header}:
        image.put(header + 8, "I", image.get(header + 8) ^ 1 << 16)


def says_it_is_compressed_otherwise(image: Written) -> None:
    for header in {0, image.header}:
        image.put(header + 77, "H", image.get(header + 77, "H") ^ 2)


def of_eight_exabytes(image: Written) -> None:
    for header in {0, image.header}:
        image.put(header + 12, "Q", 1 << 54)


def footer_is_of_another(image: Written) -> None:
    image.put(image.header + 12, "Q", image.get(image.header + 12, "Q") + 1)


def footer_is_gone(image: Written) -> None:
    del image.data[-SECTOR:]


Break = Callable[[Written], None]
CORRUPT, UNSAFE = Code.IMAGE_CORRUPT, Code.IMAGE_UNSAFE
# What is done, the layouts that it is done to, the code, a part of the message ({1} is where the grain 1 is), and
# whether it is refused already by what looks at every image before any program opens it.
STREAMS, FOOTED, PLAIN = ("vsphere", "qemu", "open-vmdk"), ("vsphere",), ("monolithic",)
ALL, FRONT = (*STREAMS, *PLAIN), ("qemu", "open-vmdk", "monolithic")
HOSTILE: list[tuple[Break, tuple[str, ...], Code, str, bool]] = [
    (table_used_twice, ALL, CORRUPT, "has two tables, or a table and a header, at byte {t1}", True),
    (tables_overlap, ALL, CORRUPT, "has two tables, or a table and a header, at byte ", True),
    (table_in_the_descriptor, ALL, CORRUPT, "has two tables, or a table and a header, at byte 512", True),
    (directory_is_its_own_table, ALL, CORRUPT, "has two tables, or a table and a header, at byte {d}", True),
    (table_is_the_header, ALL, CORRUPT, "has two tables, or a table and a header, at byte 0", True),
    (table_outside, ALL, CORRUPT, "a grain table needs", True),
    (table_at_the_maximum, ALL, CORRUPT, "a grain table needs", True),
    (directory_outside, ALL, CORRUPT, "the grain directory needs", True),
    (directory_far_outside, ALL, CORRUPT, "the grain directory needs", True),
    (two_entries_on_one_grain, ALL, CORRUPT, "has another grain where grain 1 at byte {1} is", False),
    (neighbours_exchanged, STREAMS, CORRUPT, "has no marker of grain 2 at byte {1}, or that of another one", False),
    (grain_in_the_header, ALL, CORRUPT, "has a header or a table where grain 0 at byte 512 is", False),
    (grain_in_a_table, ALL, CORRUPT, "has a header or a table where grain 1 at byte {t0} is", False),
    (grain_in_the_directory, ALL, CORRUPT, "has a header or a table where grain 1 at byte {d} is", False),
    (grain_behind_the_end, ALL, CORRUPT, "has {size} bytes, but the last grain needs", True),
    (grain_at_the_maximum, ALL, CORRUPT, "has {size} bytes, but the last grain needs", True),
    (grain_behind_the_capacity, ALL, CORRUPT, "has grains behind the end of its disk, which has 529", False),
    (wrong_place, STREAMS, CORRUPT, "has no marker of grain 1 at byte {1}, or that of another one", False),
    (place_of_64_bits, STREAMS, CORRUPT, "has no marker of grain 1 at byte {1}, or that of another one", False),
    (size_of_nothing, STREAMS, CORRUPT, "says that grain 1 at byte {1} takes 0 bytes", False),
    (size_into_the_next, STREAMS, CORRUPT, "says that grain 1 at byte {1} takes ", False),
    (size_behind_the_end, STREAMS, CORRUPT, "the last grain needs", True),
    (
        size_at_the_maximum,
        STREAMS,
        CORRUPT,
        "says that grain 1 at byte {1} takes 4294967295 bytes, where it has ",
        False,
    ),
    (bomb, STREAMS, CORRUPT, "is damaged: grain 2 at byte {2} cannot be inflated to 65536 bytes", False),
    (a_byte_too_much, STREAMS, CORRUPT, "is damaged: grain 2 at byte {2} cannot be inflated to 65536 bytes", False),
    (a_byte_too_few, STREAMS, CORRUPT, "is damaged: grain 2 at byte {2} cannot be inflated to 65536 bytes", False),
    (too_few_for_the_end, STREAMS, CORRUPT, "is damaged: grain 528 at byte {528} cannot be inflated to 8704", False),
    (wrong_checksum, STREAMS, CORRUPT, "is damaged: grain 2 at byte {2} cannot be inflated to 65536 bytes", False),
    (without_its_end, STREAMS, CORRUPT, "is damaged: grain 2 at byte {2} cannot be inflated to 65536 bytes", False),
    (with_a_dictionary, STREAMS, CORRUPT, "is damaged: grain 2 at byte {2} cannot be inflated to 65536 bytes", False),
    (no_zlib_around_it, STREAMS, CORRUPT, "is damaged: grain 2 at byte {2} cannot be inflated to 65536 bytes", False),
    (says_it_is_not_compressed, ALL, UNSAFE, "contradicts itself about whether its grains are compressed", True),
    (says_it_is_compressed_otherwise, STREAMS, UNSAFE, "contradicts itself about whether its grains are comp", True),
    (of_eight_exabytes, ALL, UNSAFE, "claims to be a disk of 9223372036854775808 bytes", True),
    (footer_is_of_another, FOOTED, UNSAFE, "has a footer that contradicts its header about capacity", True),
    (footer_is_gone, FOOTED, CORRUPT, "does not end with the footer", True),
]
CASES = [pytest.param(layout, *case, id=f"{case[0].__name__}-{layout}") for case in HOSTILE for layout in case[1]]


@pytest.mark.parametrize(("layout", "break_", "layouts", "code", "message", "examined"), CASES)
def test_hostile_image_is_refused(
    layout: str,
    break_: Break,
    layouts: tuple[str, ...],
    code: Code,
    message: str,
    examined: bool,
    library: str,
    tmp_path: Path,
) -> None:
    image = victim(LAYOUTS[layout])
    break_(image)
    source, target = opened(image.data), os.memfd_create("target")
    try:
        with pytest.raises(MigrationError) as caught, work_of_at_most(2):
            pipeline.convert(source, target, "qcow2", threads=1, on_read=lambda _: None)
        error = caught.value
        places = {str(number): begin for number, (begin, _) in image.grains.items()}
        tables = {f"t{number}": begin for number, begin in image.tables.items()}
        expected = message
        for name, value in {**places, **tables, "d": image.directory, "size": len(image.data)}.items():
            expected = expected.replace(f"{{{name}}}", str(value))
        if examined:
            with pytest.raises(MigrationError) as caught:
                examine(source.fd, source.size, "vmdk", "disk.vmdk")
            assert caught.value.code == code
            assert f"disk.vmdk {expected}" in caught.value.message or expected in caught.value.message
        else:
            assert examine(source.fd, source.size, "vmdk", "disk.vmdk").format == "vmdk"
            assert f"disk.vmdk {expected}" in error.message
        assert error.code == code
        assert error.hint
        assert os.pread(target, 4, 0) in (b"", bytes(4))  # and so it is no image
    finally:
        os.close(source.fd)
        os.close(target)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_in_a_grain_behind_the_end_of_the_disk_is_left_out(format: str) -> None:
    for parts in ({0: b"x" * GRAIN, 1: b"y" * GRAIN}, {1: bytes(SECTOR) + b"y"}):
        for layout in (VSPHERE, MONOLITHIC):
            image = write(Disk(2 * GRAIN, parts), layout)
            for header in {0, image.header}:
                image.put(header + 12, "Q", 129)
            left = {number: part[: GRAIN if number == 0 else SECTOR] for number, part in parts.items()}
            check(Disk(GRAIN + SECTOR, left), image.data, format, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_several_damaged_grains_end_the_conversion(threads: int) -> None:
    """Each is found by a thread that others may wait for."""
    image = write(Disk.of(random.Random(1).randbytes(200 * GRAIN)))
    for number in range(0, 200, 5):
        image.put(image.grains[number][0], "Q", 1)
    with pytest.raises(MigrationError, match="has no marker of grain 0 "):
        convert(image.data, "raw", threads)


@pytest.mark.parametrize("layout", STREAMS)
def test_what_a_grain_has_behind_its_stream_is_passed_over(layout: str) -> None:
    """A maker may count the padding: what came out has a checksum of its own."""
    image = victim(LAYOUTS[layout])
    packed(image, 2, zlib.compress(b"x" * GRAIN) + b"x")
    _, made = convert(image.data, "raw")
    assert b"x" * GRAIN == made[2 * GRAIN : 3 * GRAIN]


CHANGED = Disk(70 * GRAIN, {number: random.Random(number).randbytes(1000) + b"\1" for number in range(70)})


def rewritten(fd: int) -> None:
    """As the same disk, laid out in another way."""
    os.pwrite(fd, write(CHANGED, replace(VSPHERE, order=random.Random(7).shuffle)).data, 0)


def halved(fd: int) -> None:
    os.ftruncate(fd, os.fstat(fd).st_size // 2)


def emptied(fd: int) -> None:
    os.ftruncate(fd, 0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("at", [0, 1, 2, -1])
@pytest.mark.parametrize("change", [rewritten, halved, emptied])
def test_file_that_is_changed_while_it_is_read_is_noticed_or_read_as_it_was(
    change: Callable[[int], None], at: int, format: str
) -> None:
    """Before anything is read, after a piece, or at the end; the tables are looked at again then."""
    for layout in (VSPHERE, QEMU_STREAM):
        data = write(CHANGED, layout).data
        image, target = opened(data), os.memfd_create("target")
        reads = list[int]()

        def on_read(count: int, image: Image = image, reads: list[int] = reads) -> None:
            reads.append(count)
            if at and (len(reads) == at or (at == -1 and count == image.size)):
                change(image.fd)

        try:
            if not at:
                change(image.fd)
            pipeline.convert(image, target, format, threads=2, on_read=on_read)
        except MigrationError as error:
            assert error.code == Code.IMAGE_CORRUPT
        else:
            made = os.pread(target, os.fstat(target).st_size, 0)
            parts = Disk.of(made).holding() if format == "raw" else read_qcow2(made).parts
            assert {number: part.rstrip(b"\0") for number, part in parts.items()} == CHANGED.parts
        finally:
            os.close(image.fd)
            os.close(target)


def test_nothing_broken_ends_in_anything_but_an_image_or_a_refusal(tmp_path: Path) -> None:
    outcomes = fuzz(19, 2000, tmp_path)
    assert outcomes["converted"] > 100
    assert outcomes["refused: image_corrupt (not by its header)"] > 100
