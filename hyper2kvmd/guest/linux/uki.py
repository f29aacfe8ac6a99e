"""Reads unified kernel images: one EFI program that holds a kernel, its initramfs and its command line.

Sections and their names: https://uapi-group.org/specifications/specs/unified_kernel_image/
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

_SECTION = struct.Struct("<8sIIII16x")
_SECTION_LIMIT = 64
_TEXT_LIMIT = 1 << 16


@dataclass(frozen=True)
class Image:
    """What is in one. version: of the kernel, "" if it does not say; options: its command line.

    initrd: where the initramfs is in the file, as offset and length in bytes, None if there is none.
    """

    version: str
    options: str
    initrd: tuple[int, int] | None


# From an offset and a length to the bytes there, fewer behind the end of the file.
Read = Callable[[int, int], bytes]


def read(read: Read) -> Image | None:
    """What is in an EFI program; None if it is none that holds a kernel."""
    found = _sections(read)
    if ".linux" not in found:
        return None

    def text(name: str) -> str:
        offset, size = found.get(name, (0, 0))
        return read(offset, min(size, _TEXT_LIMIT)).rstrip(b"\0").decode("utf-8", "replace").strip()

    return Image(text(".uname"), text(".cmdline"), found.get(".initrd"))


def _sections(read: Read) -> dict[str, tuple[int, int]]:
    """The sections of a PE file: name, and where its content is in the file."""
    head = read(0, 64)
    if head[:2] != b"MZ" or len(head) < 64:
        return {}
    (start,) = struct.unpack_from("<I", head, 60)
    header = read(start, 24)
    if header[:4] != b"PE\0\0" or len(header) < 24:
        return {}
    count, optional = struct.unpack_from("<H", header, 6)[0], struct.unpack_from("<H", header, 20)[0]
    table = read(start + 24 + optional, _SECTION.size * min(count, _SECTION_LIMIT))
    found: dict[str, tuple[int, int]] = {}
    for at in range(0, len(table) - _SECTION.size + 1, _SECTION.size):
        name, virtual, _, size, offset = _SECTION.unpack_from(table, at)
        # What is in memory is what counts; the file may be filled up behind it.
        found.setdefault(
            name.rstrip(b"\0").decode("ascii", "replace"), (offset, min(size, virtual) if virtual else size)
        )
    return found
