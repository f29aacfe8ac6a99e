"""What every reader of a format works with: the file with bounds, and what it makes of it."""

from __future__ import annotations

import contextlib
import os
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from hyper2kvmd.errors import Code, MigrationError

SECTOR = 512
VIRTUAL_SIZE_LIMIT = 64 << 40

_EXPORT_AGAIN = "Copy the disk again, or export the VM again."
MERGE = "Remove the VM's snapshots so that each disk is one file, and export the VM again."


@dataclass(frozen=True)
class Extent:
    """A part of a disk in a file beside its description: `bytes` as they are, or a sparse image of that many."""

    file: str
    bytes: int
    sparse: bool


@dataclass(frozen=True)
class Header:
    """What an image says of itself.

    `format` is qemu's name of the driver that reads the data, `virtual_size` the disk's size in bytes.
    With `extents`, the image is a text that names the files beside it which hold the data, one after the other. A
    single one that is not sparse is read as raw.
    """

    format: str
    virtual_size: int
    subformat: str | None = None
    extents: tuple[Extent, ...] = ()


@dataclass(frozen=True)
class Image:
    """A file with bounds: nothing is read from behind its end, and every complaint names it.

    start: where it begins in what `fd` is of, which is not 0 for one in an archive.
    """

    fd: int
    size: int
    name: str
    start: int = 0

    def peek(self, length: int, offset: int = 0) -> bytes:
        """At most `length` bytes."""
        return os.pread(self.fd, max(0, min(length, self.size - offset)), self.start + offset)

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Exactly `length` bytes, or an error which says that `what` is cut off."""
        self.holds(offset, length, what)
        with self.named():
            data = self.peek(length, offset)
            while len(data) < length:
                more = self.peek(length - len(data), offset + len(data))
                if not more:
                    raise self.truncated(what, offset + length)
                data += more
        return data

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """An error of the system, which knows a descriptor only, gets the name of the file."""
        try:
            yield
        except OSError as error:
            error.filename = self.name
            raise

    def holds(self, offset: int, length: int, what: str) -> None:
        """Make sure that the file reaches as far as that."""
        if offset + length > self.size:
            raise self.truncated(what, offset + length)

    def truncated(self, what: str, needed: int) -> MigrationError:
        return self.corrupt(f"has {self.size} bytes, but {what} needs {needed}: it is truncated or damaged")

    def corrupt(self, what: str) -> MigrationError:
        return MigrationError(Code.IMAGE_CORRUPT, f"{self.name} {what}", _EXPORT_AGAIN)

    def refused(self, what: str) -> MigrationError:
        return MigrationError(
            Code.IMAGE_UNSAFE,
            f"{self.name} {what}",
            "Do not open this file on the host. Find out where it comes from, then export the VM again.",
        )

    def absurd(self, virtual_size: int) -> MigrationError:
        return self.refused(
            f"claims to be a disk of {virtual_size} bytes; {VIRTUAL_SIZE_LIMIT} is the most that is accepted"
        )

    def unsupported(self, what: str, hint: str) -> MigrationError:
        return MigrationError(Code.FORMAT_UNSUPPORTED, f"{self.name} {what}", hint)


def integers(data: bytes, kind: str, *, big: bool = False) -> array[int]:
    """Unpack unsigned integers: I has 32 bits, Q has 64."""
    numbers = array(kind)
    numbers.frombytes(data)
    if big != (sys.byteorder == "big"):
        numbers.byteswap()
    return numbers
