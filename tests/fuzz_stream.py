"""Converts sparse VMDKs that are broken at random: `python -m tests.fuzz_stream --files 500000` takes half an hour.

What is broken is refused, or is what the simplest of readers reads; nothing crashes, hangs, or writes elsewhere.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hyper2kvmd.errors import MigrationError
from hyper2kvmd.image.header import examine
from hyper2kvmd.image.header.reader import Image
from hyper2kvmd.image.header.vmdk import read_sparse
from hyper2kvmd.image.stream import pipeline
from hyper2kvmd.image.stream.codecs import libdeflate, libzstd
from hyper2kvmd.image.stream.grains import Unsuitable, look
from tests.vmdk import GRAIN, SECTOR, Disk, Written, a_disk, a_layout, read, read_qcow2, write

BATCH = 250  # files for one process: if that crashes, no other does
PATIENCE_SECONDS = 120.0  # for one file, which takes some milliseconds where nothing else runs
LARGEST = 1 << 19
BASES = 40


@dataclass(frozen=True)
class Base:
    """A sound image, the disk in it, and the parts of the file on which that depends."""

    image: Written
    disk: Disk
    parts: tuple[tuple[int, int], ...]

    @classmethod
    def by(cls, chance: random.Random) -> Base:
        while True:
            disk = a_disk(chance, parts=chance.choice((1, 3, 6)))
            layout = a_layout(chance, disk)
            image = write(disk, layout)
            if len(image.data) <= LARGEST:
                break
        left = {number: part for number, part in disk.parts.items() if number not in layout.zeroed}
        directory = image.directory + len(range(0, disk.size, 512 * GRAIN)) * 4
        parts = [(0, 21 * SECTOR), (image.directory, directory)]
        parts += [(at, at + 2048) for at in image.tables.values()]
        parts += image.grains.values()
        # The markers around a footer are looked at, too.
        parts += [(image.header - SECTOR, image.header + 2 * SECTOR)] if image.header else []
        return cls(image, replace(disk, parts=left), tuple(parts))

    def touched(self, begin: int, end: int) -> bool:
        """Whether the disk depends on what is there."""
        return any(begin < behind and at < end for at, behind in self.parts)


def broken(chance: random.Random, bases: Sequence[Base]) -> tuple[bytes, Base, bool]:
    """A broken file, the sound one that it is made of, and whether anything is changed on which the disk depends."""
    base = chance.choice(bases)
    image, data = base.image, bytearray(base.image.data)
    touched = False
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        begin = chance.randrange(len(data))
        match chance.randrange(8):
            case 0:
                data[begin] ^= 1 << chance.randrange(8)
                end = begin + 1
            case 1 | 2 | 3 | 4:
                begin, format = _place(chance, base)
                if begin + struct.calcsize(format) > len(data):
                    continue
                struct.pack_into(format, data, begin, _number(chance, data, begin, format, image))
                end = begin + struct.calcsize(format)
            case 5:  # within a sector or at the end of one, and nothing but zeros or more of the same behind it
                data[max(1, begin - begin % chance.choice((1, SECTOR))) :] = b""
                if chance.random() < 0.5:
                    data += bytes(chance.choice((1, 511, SECTOR, 3 * SECTOR)))
                touched = True
                continue
            case 6:  # from another place, or another file
                other = chance.choice((data, chance.choice(bases).image.data))
                length = chance.choice((4, 12, SECTOR, 4 * SECTOR, 70_000))
                unit = 4 if length < SECTOR else SECTOR
                begin, start = begin - begin % unit, chance.randrange(len(other)) // unit * unit
                length = min(length, len(data) - begin, len(other) - start)
                end = begin + length
                data[begin:end] = other[start : start + length]
            case _:
                end = min(len(data), begin + chance.choice((1, 8, 600)))
                data[begin:end] = chance.randbytes(end - begin)
        touched = touched or base.touched(begin, end)
    return bytes(data), base, touched


def _place(chance: random.Random, base: Base) -> tuple[int, str]:
    """Where a number is that means something."""
    image = base.image
    numbers = sorted(image.grains)
    match chance.randrange(5):
        case 0:
            fields = ((4, "<I"), (8, "<I"), (12, "<Q"), (20, "<Q"), (28, "<Q"), (36, "<Q"), (44, "<I"), (56, "<Q"))
            offset, format = chance.choice((*fields, (77, "<H")))
            return chance.choice((0, image.header)) + offset, format
        case 1:
            return image.directory + 4 * chance.randrange(3), "<I"
        case 2 if image.tables:
            return chance.choice([*image.tables.values()]) + 4 * chance.randrange(512), "<I"
        case 3 if numbers:
            return image.entry(chance.choice(numbers)), "<I"
        case _ if numbers:
            offset, format = chance.choice(((0, "<Q"), (8, "<I")))
            return image.grains[chance.choice(numbers)][0] + offset, format
        case _:
            return image.directory, "<I"


def _number(chance: random.Random, data: bytearray, at: int, format: str, image: Written) -> int:
    places = [begin for begin, _ in image.grains.values()] + [*image.tables.values(), image.directory, image.header]
    now: int = struct.unpack_from(format, data, at)[0]
    value = chance.choice(
        (
            *(0, 1, 2, 128, chance.choice(places) // SECTOR, chance.choice(places) // SECTOR + chance.choice((-1, 1))),
            *(len(data) // SECTOR, len(data) // SECTOR - 1, now + 1, now - 1, now * 2, now ^ 1 << chance.randrange(64)),
            *(1 << chance.randrange(64), (1 << 32) - 1, (1 << 64) - 1, chance.randrange(1 << 16)),
        )
    )
    return value & (1 << 8 * struct.calcsize(format)) - 1


# One file ------------------------------------------------------------------------------------------------------


def attempt(data: bytes, base: Base, touched: bool, chance: random.Random, target: int) -> str:
    """Convert it, and return what came of it. Raise AssertionError, or whatever it does and must not."""
    source = os.memfd_create("source")
    try:
        os.write(source, data)
        image = Image(source, len(data), "disk")
        format = chance.choice(("raw", "qcow2", "qcow2-zstd" if libzstd() and chance.random() < 0.2 else "qcow2"))
        threads = chance.choice((1, 2))
        both = chance.random() < 0.1
        outcomes = []
        for library in [libdeflate, lambda: None] if both else [chance.choice((libdeflate, lambda: None))]:
            pipeline.libdeflate = library  # type: ignore[attr-defined]
            outcomes.append(_outcome(image, target, format, threads))
            _check(data, base, touched, outcomes[-1], format, target)
        assert len({*outcomes}) == 1, outcomes
        try:
            examine(source, len(data), "vmdk", "disk")
        except MigrationError:
            return outcomes[0]
        return f"{outcomes[0]} (not by its header)" if outcomes[0] != "converted" else "converted"
    finally:
        os.close(source)


def _outcome(image: Image, target: int, format: str, threads: int) -> str:
    os.ftruncate(target, 0)
    try:
        pipeline.convert(image, target, format, threads=threads, on_read=lambda _: None)
    except MigrationError as error:
        assert error.message.startswith("disk ")
        assert error.hint
        return f"refused: {error.code}"
    except Unsuitable:
        assert os.fstat(target).st_size == 0
        return "left to qemu-img"
    except OSError as error:
        return f"error: {error.strerror}"
    return "converted"


def _check(data: bytes, base: Base, touched: bool, outcome: str, format: str, target: int) -> None:
    """That what was written is the disk, or no image and no more than it would have been."""
    size = os.fstat(target).st_size
    if outcome != "converted":
        assert touched, outcome
        assert os.pread(target, 4, 0) != b"QFI\xfb"
        if size:
            image = Image(os.memfd_create("source"), len(data), "disk")
            os.write(image.fd, data)
            grains = look(image, read_sparse(image))
            os.close(image.fd)
            most = -(-grains.virtual_size // GRAIN) if format == "raw" else 1 + 2 * grains.count
            assert size <= most * GRAIN
        return
    expected = read(data) if touched else base.disk
    if format == "raw":
        assert size == expected.size
        assert _raw(target) == {number: part.rstrip(b"\0") for number, part in expected.holding().items()}
    else:
        found = read_qcow2(os.pread(target, size, 0))
        assert (found.size, found.parts) == (expected.size, expected.holding())


def _raw(fd: int) -> dict[int, bytes]:
    """The parts of a raw image with holes, which may be large ones, without the zeros at their ends."""
    parts = {}
    size, number = os.fstat(fd).st_size, 0
    while number * GRAIN < size:
        try:
            number = os.lseek(fd, number * GRAIN, os.SEEK_DATA) // GRAIN
        except OSError:
            break
        parts[number] = os.pread(fd, GRAIN, number * GRAIN).rstrip(b"\0")
        number += 1
    return {number: part for number, part in parts.items() if part}


# Many ----------------------------------------------------------------------------------------------------------


def fuzz(seed: int, files: int, directory: Path) -> Counter[str]:
    """Try so many files, with a target in an empty directory; how often there was what outcome."""
    canary = directory / "canary"
    canary.write_bytes(b"canary")
    chance = random.Random(seed)
    bases = [Base.by(chance) for _ in range(BASES)]
    outcomes: Counter[str] = Counter()
    with mmap.mmap(-1, 8) as now:
        for first in range(0, files, BATCH):
            outcomes += _batch(seed, range(first, min(files, first + BATCH)), bases, directory / "target", now)
            assert {"canary", "target"} == {*os.listdir(directory)}
            assert canary.read_bytes() == b"canary"
    assert outcomes.total() == files
    return outcomes


def one(seed: int, number: int, bases: Sequence[Base], target: int) -> str:
    """Try one of the files."""
    chance = random.Random(f"{seed} {number}")
    data, base, touched = broken(chance, bases)
    return attempt(data, base, touched, chance, target)


def _batch(seed: int, numbers: range, bases: Sequence[Base], target: Path, now: mmap.mmap) -> Counter[str]:
    """Try some in a process of their own. `now` is shared with it: the number of the file that it has begun."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            for number in numbers:
                now[:8] = number.to_bytes(8, "little")
                os.write(writer, f"{one(seed, number, bases, fd)}\n".encode())
            status = 0
        except BaseException:  # noqa: BLE001  # and so is said
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    os.set_blocking(reader, False)
    said, begun, since, ended = b"", b"", time.monotonic(), 0
    try:
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            try:
                said += os.read(reader, 1 << 20)
            except BlockingIOError:
                time.sleep(0.02)
            if now[:8] != begun:
                begun, since = now[:8], time.monotonic()
            if not ended and time.monotonic() - since > PATIENCE_SECONDS:
                os.kill(child, 9)
        while more := os.read(reader, 1 << 20):
            said += more
    finally:
        os.close(reader)
    if status:
        file, how = int.from_bytes(begun, "little"), os.waitstatus_to_exitcode(status)
        raise AssertionError(f"seed {seed}, file {file}: {how}\n{said.decode().partition('Traceback')[2]}")
    return Counter(said.decode().splitlines())


def main() -> int:
    """The exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_stream", description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        for outcome, count in fuzz(options.seed, options.files, Path(directory)).most_common():
            print(f"{count:8} {outcome}")
    print(f"{options.files} files, seed {options.seed}, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
