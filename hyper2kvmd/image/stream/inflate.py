"""Inflating one grain: with libdeflate, which takes half the time, where the system has it; else with zlib."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import zlib
from collections.abc import Callable
from typing import Protocol

# The name has not changed since there is one: Debian's libdeflate0, Fedora's and openSUSE's libdeflate.
LIBRARY = "libdeflate.so.0"


class Buffer:
    """Page-aligned memory of `size` bytes, as direct I/O wants it, with its address."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Inflate(Protocol):
    """Inflates `length` bytes at a place of one buffer to a place of another, at most `limit` bytes.

    Returns how many came out, or None if these bytes are not a whole zlib stream with the right checksum, or hold more.
    One thread at a time.
    """

    def __call__(self, source: Buffer, at: int, length: int, target: Buffer, to: int, limit: int) -> int | None: ...


def inflater(library: ctypes.CDLL | None) -> Inflate:
    """A function of one's own for each thread."""
    return _libdeflate(library) if library is not None else _zlib


def load() -> ctypes.CDLL | None:
    """libdeflate, if the system has it."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(LIBRARY)
        library.libdeflate_alloc_decompressor.argtypes = ()
        library.libdeflate_alloc_decompressor.restype = ctypes.c_void_p
        library.libdeflate_zlib_decompress.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
            ctypes.POINTER(ctypes.c_size_t),
        )
        library.libdeflate_zlib_decompress.restype = ctypes.c_int
        return library
    return None


def _libdeflate(library: ctypes.CDLL) -> Inflate:
    # It lives as long as the process, whose threads each have one.
    state = library.libdeflate_alloc_decompressor()
    if not state:
        raise MemoryError
    decompress: Callable[..., int] = library.libdeflate_zlib_decompress
    count = ctypes.c_size_t()
    counted = ctypes.byref(count)

    def inflate(source: Buffer, at: int, length: int, target: Buffer, to: int, limit: int) -> int | None:
        if decompress(state, source.address + at, length, target.address + to, limit, counted):
            return None
        return count.value

    return inflate


def _zlib(source: Buffer, at: int, length: int, target: Buffer, to: int, limit: int) -> int | None:
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(source.view[at : at + length], limit)
        if not stream.eof:  # what comes out may be all, and its checksum still to be read
            data += stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error:
        return None
    if not stream.eof or len(data) > limit:
        return None
    target.view[to : to + len(data)] = data
    return len(data)
