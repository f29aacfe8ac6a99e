"""Reads a sparse VMDK once, from its first byte to its last, and writes the disk in it as qcow2 or raw.

One thread reads, and hashes what it has read; the others inflate that very memory, and write. So the bytes that the
checksum is of are the bytes that were converted.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import itertools
import mmap
import os
import queue
import struct
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hyper2kvmd.image.header.reader import SECTOR, Image
from hyper2kvmd.image.header.vmdk import read_sparse
from hyper2kvmd.image.stream.codecs import Buffer, Inflate, Zstd, inflater, libdeflate, libzstd
from hyper2kvmd.image.stream.grains import GRAIN, GRAIN_SECTORS, TABLE_ENTRIES, Grains, Unsuitable, look, place
from hyper2kvmd.image.stream.qcow2 import CLUSTER, L2_ENTRIES, Layout, compressed_entry, plain_entry

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
    """Write the disk in `source` to the empty file open as `target`, as qcow2, qcow2-zstd (compressed) or raw.

    on_read: gets how many bytes of the file have been read. Raise MigrationError (image_corrupt, image_unsafe), OSError
    with the name of the source if that could not be read, or Unsuitable, before anything is written.
    """
    grains = look(source, read_sparse(source))
    writer = _writer(target, grains, format)
    with _Crew(grains, writer, threads) as crew:
        digest = _read_all(grains, crew, on_read)
    writer.finish()
    inflated = sum(worker.inflated for worker in crew.workers)
    return Totals(source.size, inflated, os.fstat(target).st_blocks * 512, digest)


def _writer(target: int, grains: Grains, format: str) -> _Raw:
    if format == "raw":
        return _Raw(target, grains)
    if format == "qcow2":
        return _Qcow2(target, grains)
    library = libzstd()
    if library is None:
        raise Unsuitable("libzstd is not installed")
    return _Compressed(target, grains, library)


# The file ------------------------------------------------------------------------------------------------------


def pieces(grains: Grains) -> Iterator[Piece]:
    """The parts of the file that hold grains, in their order; what lies between is not for the disk."""
    batch: list[tuple[int, int, int, int]] = []
    begin = end = 0
    for sector, rank, number, limit in grains.in_file():
        last = min(limit * SECTOR, grains.image.size, sector * SECTOR + _LONGEST)
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
            with image.named():
                count = os.preadv(image.fd, [buffer.view[position - begin : end - begin]], image.start + position)
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

    def __init__(self, grains: Grains, writer: _Raw, threads: int) -> None:
        library = libdeflate()
        self.workers = [_Worker(grains, inflater(library), writer.pen()) for _ in range(threads)]
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
        try:
            worker.do(slot, piece)
        finally:  # the next piece may be begun before anybody knows of an error in this one, and waits for a worker
            self._resting.put(worker)
        return slot


class _Worker:
    """What one thread has: memory for what comes out of a piece, its own inflater, and a pen."""

    def __init__(self, grains: Grains, inflate: Inflate, write: Pen) -> None:
        self.inflated = 0
        self._grains, self._inflate, self._write = grains, inflate, write
        self._out = Buffer(_PIECE_GRAINS * GRAIN)

    def do(self, slot: Buffer, piece: Piece) -> None:
        """Inflate and write the grains of a piece. Those of zeros are left out."""
        kept: list[tuple[int, int]] = []
        for grain in piece.grains:
            at = len(kept) * GRAIN
            self._fill(slot, piece.begin, grain, at)
            if self._out.memory[at] or self._out.memory[at : at + GRAIN] != _ZEROS:
                kept.append(grain[1:3])
        if kept:
            self._write(self._out, kept)
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
            self._out.view[to : to + needed] = slot.view[at : at + needed]
        if needed < GRAIN:  # what is behind the end of the disk is nobody's, and would be there if the disk grew
            self._out.view[to + needed : to + GRAIN] = bytes(GRAIN - needed)


# What is written -----------------------------------------------------------------------------------------------

# Writes the grains that lie one after the other in a buffer, each a (rank, number). Of one thread.
Pen = Callable[[Buffer, list[tuple[int, int]]], None]


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write aligned memory. Raise OSError."""
    direct = True
    while data:
        try:
            count = os.pwrite(fd, data, offset)
        except OSError as error:
            # Some file systems take the flag and refuse the writing; or there was room for a part of a block.
            if error.errno != errno.EINVAL or not direct:
                raise
            direct = False
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            continue
        data, offset = data[count:], offset + count


class _Raw:
    """A raw image: whole grains, then cut off at the end of the disk."""

    def __init__(self, fd: int, grains: Grains) -> None:
        self._fd, self._grains = fd, grains

    def pen(self) -> Pen:
        """What writes, for one thread."""
        return self._write

    def _write(self, data: Buffer, grains: list[tuple[int, int]]) -> None:
        """As many at a time as go to one place."""
        begin = 0
        for end, grain in enumerate(grains, 1):
            if end == len(grains) or self._place(*grains[end]) != self._place(*grain) + GRAIN:
                _write_all(self._fd, data.view[begin * GRAIN : end * GRAIN], self._place(*grains[begin]))
                begin = end

    def _place(self, rank: int, number: int) -> int:
        return number * GRAIN

    def finish(self) -> None:
        """Make an image of it, once all grains are written. Raise OSError, MigrationError."""
        os.ftruncate(self._fd, self._grains.virtual_size)


class _Qcow2(_Raw):
    """A qcow2 image, with a place for each grain in the order of the disk; that of one of zeros stays a hole."""

    def __init__(self, fd: int, grains: Grains) -> None:
        super().__init__(fd, grains)
        self._used = bytearray(grains.count)

    def _write(self, data: Buffer, grains: list[tuple[int, int]]) -> None:
        super()._write(data, grains)
        for rank, _ in grains:
            self._used[rank] = 1

    def _place(self, rank: int, number: int) -> int:
        return (1 + rank) * CLUSTER

    def finish(self) -> None:
        self._finish(self._used, lambda rank: plain_entry(self._place(rank, 0)) if self._used[rank] else 0, zstd=False)

    def _finish(self, counts: Sequence[int], entry: Callable[[int], int], *, zstd: bool) -> None:
        """Write what is no data. counts: the references of each cluster; entry: of the grain of that rank."""
        parts = dict.fromkeys(number * TABLE_ENTRIES // L2_ENTRIES for number in self._grains.tables)
        layout = Layout.of(self._grains.virtual_size, len(counts), parts)
        entries = ((number, entry(rank)) for _, rank, number in self._grains.in_disk())
        os.ftruncate(self._fd, layout.size)
        page = Buffer(CLUSTER)
        for offset, data in layout.metadata(counts, entries, zstd=zstd):
            for begin in range(0, len(data), CLUSTER):
                page.view[:] = data[begin : begin + CLUSTER]
                _write_all(self._fd, page.view, offset + begin)


class _Compressed(_Qcow2):
    """A qcow2 image whose clusters are compressed, and lie where there was room when they were."""

    def __init__(self, fd: int, grains: Grains, library: ctypes.CDLL) -> None:
        super().__init__(fd, grains)
        self._library = library
        self._mutex = threading.Lock()
        self._end = CLUSTER
        self._counts = array("H")
        self._entries = array("Q", bytes(8 * grains.count))

    def pen(self) -> Pen:
        """What compresses and writes, for one thread."""
        compress = Zstd(self._library)
        room = Buffer(_rounded(_PIECE_GRAINS * compress.bound(GRAIN)))

        def write(data: Buffer, grains: list[tuple[int, int]]) -> None:
            ends = [0]
            for number in range(len(grains)):
                ends.append(ends[-1] + compress(data, number * GRAIN, GRAIN, room, ends[-1]))
            size = _rounded(ends[-1])
            room.view[ends[-1] : size] = bytes(size - ends[-1])
            with self._mutex:
                offset, self._end = self._end, self._end + size
                self._counts.extend([0] * (-(-self._end // CLUSTER) - 1 - len(self._counts)))
                for (rank, _), (begin, end) in zip(grains, itertools.pairwise(ends), strict=True):
                    self._entries[rank] = compressed_entry(offset + begin, end - begin)
                    for cluster in range((offset + begin) // CLUSTER, (offset + end - 1) // CLUSTER + 1):
                        self._counts[cluster - 1] += 1
            _write_all(self._fd, room.view[:size], offset)

        return write

    def finish(self) -> None:
        self._finish(self._counts, self._entries.__getitem__, zstd=True)


def _rounded(length: int) -> int:
    """Up to what can be written past the page cache."""
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
