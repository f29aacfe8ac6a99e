"""Inflating a grain, with libdeflate where the system has that, as it takes half of zlib's time; and zstd."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import zlib
from collections.abc import Callable
from typing import Protocol

_ZSTD_LEVEL = 3  # what qemu-img takes


class Buffer:
    """Page-aligned memory of `size` bytes, as direct I/O wants it, with its address."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Inflate(Protocol):
    """Inflates `length` bytes at a place of one buffer to a place of another, at most `limit` bytes.

    Returns how many came out, or None if these bytes do not begin with a whole zlib stream with the right checksum, or
    that holds more. One thread at a time.
    """

    def __call__(self, source: Buffer, at: int, length: int, target: Buffer, to: int, limit: int) -> int | None: ...


def inflater(library: ctypes.CDLL | None) -> Inflate:
    """A function of one's own for each thread, of what libdeflate() gave."""
    return _libdeflate(library) if library is not None else _zlib


def libdeflate() -> ctypes.CDLL | None:
    """The library, if the system has it: Debian's package libdeflate0, Fedora's libdeflate."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libdeflate.so.0")
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


class Zstd:
    """Compresses with libzstd. One thread at a time."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._context = library.ZSTD_createCCtx()  # lives as long as the process
        if not self._context:
            raise MemoryError

    def bound(self, length: int) -> int:
        """The most bytes that so many can become."""
        return int(self._library.ZSTD_compressBound(length))

    def __call__(self, source: Buffer, at: int, length: int, target: Buffer, to: int) -> int:
        """Compress bytes of one buffer into another, which has room for bound() of them; how many it became."""
        room = len(target.view) - to
        made = self._library.ZSTD_compressCCtx(
            self._context, target.address + to, room, source.address + at, length, _ZSTD_LEVEL
        )
        if self._library.ZSTD_isError(made):
            raise MemoryError(f"libzstd: error {made}")
        return int(made)


def libzstd() -> ctypes.CDLL | None:
    """The library, if the system has it: Debian's package libzstd1, Fedora's libzstd."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libzstd.so.1")
        library.ZSTD_createCCtx.restype = ctypes.c_void_p
        library.ZSTD_compressBound.argtypes = (ctypes.c_size_t,)
        library.ZSTD_compressBound.restype = ctypes.c_size_t
        library.ZSTD_compressCCtx.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
            ctypes.c_int,
        )
        library.ZSTD_compressCCtx.restype = ctypes.c_size_t
        library.ZSTD_isError.argtypes = (ctypes.c_size_t,)
        return library
    return None
