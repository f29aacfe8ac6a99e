"""Reads a sparse VMDK once, from its first byte to its last, and writes the disk in it as qcow2 or raw.

One thread reads, and hashes what it has read; the others inflate that very memory, and write. So the bytes that the
checksum is of are the bytes that were converted.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from hyper2kvmd.image.header.reader import SECTOR, Image
from hyper2kvmd.image.header.vmdk import read_sparse
from hyper2kvmd.image.stream.grains import GRAIN, GRAIN_SECTORS, TABLE_ENTRIES, Grains, look, place
from hyper2kvmd.image.stream.inflate import Buffer, Inflate, inflater, load
from hyper2kvmd.image.stream.qcow2 import CLUSTER, L2_ENTRIES, Layout

_MARKER = struct.Struct("<QI")  # in front of a compressed grain: its first sector on the disk, and its length
# Deflate makes 64 KiB at most a little longer. Whatever claims more than this is no grain.
_LONGEST = 2 * GRAIN
_PIECE_GRAINS = 32
_PIECE = _PIECE_GRAINS * (GRAIN + 2 * SECTOR)  # what so many take that do not get any smaller
_ZEROS = bytes(GRAIN)


@dataclass(frozen=True)
class Totals:
    """Bytes: read from the file, that came out of its grains, and that the result takes. sha256: of the whole file."""

    read: int
    inflated: int
    written: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """A part of the file, from `begin` to `end`, with its grains as (sector, rank, number, where it ends at most)."""

    begin: int
    end: int
    grains: tuple[tuple[int, int, int, int], ...]


def convert(source: Image, target: int, format: str, *, threads: int, on_read: Callable[[int], None]) -> Totals:
    """Write the disk in `source` to the empty file open as `target`, as qcow2 or raw.

    on_read: gets how many bytes of the file have been read. Raise MigrationError (image_corrupt), OSError, or
    Unsuitable, before anything is written.
    """
    grains = look(source, read_sparse(source))
    writer = _Qcow2(target, grains) if format == "qcow2" else _Raw(target, grains)
    with _Crew(grains, writer, threads) as crew:
        digest = _read_all(grains, crew, on_read)
    writer.finish()
    inflated = sum(worker.inflated for worker in crew.workers)
    return Totals(source.size, inflated, os.fstat(target).st_blocks * 512, digest)


# The file ------------------------------------------------------------------------------------------------------


def pieces(grains: Grains) -> Iterator[Piece]:
    """The parts of the file that hold grains, in their order; what lies between is not for the disk."""
    batch: list[tuple[int, int, int, int]] = []
    begin = end = 0
    for grain, following in itertools.pairwise(itertools.chain(grains.in_file(), [None])):
        sector, rank, number = cast(tuple[int, int, int], grain)  # only the last is None
        last = grains.image.size if following is None else following[0] * SECTOR
        last = min(last, sector * SECTOR + _LONGEST)
        if batch and (len(batch) == _PIECE_GRAINS or last - begin > _PIECE):
            yield Piece(begin, end, tuple(batch))
            batch = []
        if not batch:
            begin = sector * SECTOR
        batch.append((sector, rank, number, last))
        end = last
    if batch:
        yield Piece(begin, end, tuple(batch))


def _read_all(grains: Grains, crew: _Crew, on_read: Callable[[int], None]) -> str:
    """Read the file from end to end, give its pieces to the crew, and return its SHA-256."""
    image, digest, position = grains.image, hashlib.sha256(), 0
    os.posix_fadvise(image.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(buffer: Buffer, end: int) -> None:
        nonlocal position
        begin = position
        while position < end:
            count = os.preadv(image.fd, [buffer.view[position - begin : end - begin]], position)
            if not count:
                raise image.corrupt(f"ends at byte {position} of {image.size}: it was cut off while it was read")
            digest.update(buffer.view[position - begin : position - begin + count])
            position += count
        on_read(position)

    def skip(end: int) -> None:
        while position < end:
            slot = crew.take()
            read(slot, min(end, position + _PIECE))
            crew.give_back(slot)

    for piece in pieces(grains):
        skip(piece.begin)
        slot = crew.take()
        read(slot, piece.end)
        crew.give(slot, piece)
    skip(image.size)
    return digest.hexdigest()


# The crew ------------------------------------------------------------------------------------------------------


class _Crew:
    """Threads that inflate what was read, and write it."""

    def __init__(self, grains: Grains, writer: _Writer, threads: int) -> None:
        library = load()
        self.workers = [_Worker(grains, writer, inflater(library)) for _ in range(threads)]
        self._idle = [Buffer(_PIECE) for _ in range(threads + 2)]  # one is being read, and one waits
        self._resting: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._resting.put(worker)
        self._given: deque[Future[Buffer]] = deque()
        self._pool = ThreadPoolExecutor(threads)

    def take(self) -> Buffer:
        """Memory for a piece, once there is some. Raise what a thread raised."""
        return self._idle.pop() if self._idle else self._given.popleft().result()

    def give_back(self, slot: Buffer) -> None:
        """Memory that is no longer needed."""
        self._idle.append(slot)

    def give(self, slot: Buffer, piece: Piece) -> None:
        """Have a piece that was read inflated and written."""
        self._given.append(self._pool.submit(self._do, slot, piece))

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Wait for all that was given, or drop it after an error. Raise what a thread raised."""
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for done in self._given:
                done.result()

    def _do(self, slot: Buffer, piece: Piece) -> Buffer:
        worker = self._resting.get()
        worker.do(slot, piece)
        self._resting.put(worker)
        return slot


class _Worker:
    """What one thread has: memory for what comes out of a piece, and its own inflater."""

    def __init__(self, grains: Grains, writer: _Writer, inflate: Inflate) -> None:
        self.inflated = 0
        self._grains, self._writer, self._inflate = grains, writer, inflate
        self._out = Buffer(_PIECE_GRAINS * GRAIN)

    def do(self, slot: Buffer, piece: Piece) -> None:
        """Write the grains of a piece, as many at a time as go to one place. Grains of zeros are left out."""
        out, writer = self._out.memory, self._writer
        filled = begin = 0
        offset = expected = -1
        for grain in piece.grains:
            self._fill(slot, piece.begin, grain, filled)
            if not out[filled] and out[filled : filled + GRAIN] == _ZEROS:
                continue
            _, rank, number, _ = grain
            if (to := writer.take(rank, number)) != expected:
                if filled > begin:
                    writer.write(self._out.view[begin:filled], offset)
                begin, offset = filled, to
            filled += GRAIN
            expected = to + GRAIN
        if filled > begin:
            writer.write(self._out.view[begin:filled], offset)
        self.inflated += len(piece.grains) * GRAIN

    def _fill(self, slot: Buffer, begin: int, grain: tuple[int, int, int, int], to: int) -> None:
        """Put what a grain holds into the memory at `to`. Raise MigrationError (image_corrupt)."""
        sector, _, number, last = grain
        image = self._grains.image
        room, at = last - sector * SECTOR, sector * SECTOR - begin
        needed = min(GRAIN, self._grains.virtual_size - number * GRAIN)
        if self._grains.sparse.compressed:
            first, length = _MARKER.unpack_from(slot.view, at) if room >= _MARKER.size else (-1, 0)
            if first != number * GRAIN_SECTORS:
                raise image.corrupt(f"has no marker of {place(number, sector)}, or that of another one")
            if not 0 < length <= room - _MARKER.size:
                raise image.corrupt(f"says that {place(number, sector)} takes {length} bytes, where it has {room}")
            count = self._inflate(slot, at + _MARKER.size, length, self._out, to, GRAIN)
            if count is None or count < needed:
                raise image.corrupt(f"is damaged: {place(number, sector)} cannot be inflated to {needed} bytes")
        else:
            if room < needed:
                raise image.corrupt(f"has something else inside of {place(number, sector)}, after {room} bytes")
            count = needed
            self._out.view[to : to + count] = slot.view[at : at + count]
        if count < GRAIN:
            self._out.view[to + count : to + GRAIN] = bytes(GRAIN - count)


# What is written -----------------------------------------------------------------------------------------------


class _Writer:
    """The file that the disk becomes. Threads may share it."""

    def __init__(self, fd: int, grains: Grains) -> None:
        self.fd, self.grains = fd, grains

    def take(self, rank: int, number: int) -> int:
        """Where in the file a grain that is not zeros goes."""
        raise NotImplementedError

    def write(self, data: memoryview, offset: int) -> None:
        """Write aligned memory. Raise OSError."""
        while data:
            count = os.pwrite(self.fd, data, offset)
            data, offset = data[count:], offset + count

    def finish(self) -> None:
        """Make an image of it, once all grains are written. Raise OSError, MigrationError."""
        raise NotImplementedError


class _Raw(_Writer):
    """A raw image: whole grains, then cut off at the end of the disk."""

    def take(self, rank: int, number: int) -> int:
        return number * GRAIN

    def finish(self) -> None:
        os.ftruncate(self.fd, self.grains.virtual_size)


class _Qcow2(_Writer):
    """A qcow2 image; its header comes last, so that an unfinished one is none."""

    def __init__(self, fd: int, grains: Grains) -> None:
        super().__init__(fd, grains)
        parts = dict.fromkeys(number * TABLE_ENTRIES // L2_ENTRIES for number in grains.tables)
        self.layout = Layout.of(grains.virtual_size, parts, grains.count)
        self._used = bytearray(grains.count)

    def take(self, rank: int, number: int) -> int:
        self._used[rank] = 1
        return (self.layout.first_data + rank) * CLUSTER

    def finish(self) -> None:
        layout = self.layout
        os.ftruncate(self.fd, layout.clusters * CLUSTER)
        in_disk = ((rank, number) for _, rank, number in self.grains.in_disk())
        self._put(layout.l2_tables(in_disk, self._used), layout.first_l2)
        self._put([layout.l1_table()], layout.first_l1)
        self._put(layout.reference_blocks(self._used), 1 + layout.reference_table)
        self._put([layout.reference_tables()], 1)
        self._put([layout.header()], 0)

    def _put(self, clusters: Iterable[bytes], first: int) -> None:
        """Write whole clusters, the first at that one."""
        page, offset = Buffer(CLUSTER), first * CLUSTER
        for data in clusters:
            for begin in range(0, len(data), CLUSTER):
                page.view[:] = data[begin : begin + CLUSTER]
                self.write(page.view, offset)
                offset += CLUSTER
