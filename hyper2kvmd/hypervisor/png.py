"""QEMU's screenshots as PNG.

By hand, as zlib does the work: pypng would save ten lines, and be one more dependency of every package.
"""

from __future__ import annotations

import re
import struct
import zlib


def png(ppm: bytes) -> bytes | None:
    """A picture in the binary PPM format, as QEMU makes them, as PNG; None if it is something else."""
    header = re.match(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s", ppm)
    if header is None:
        return None
    width, height = int(header[1]), int(header[2])
    pixels = ppm[header.end() :]
    if len(pixels) != 3 * width * height:
        return None
    rows = b"".join(b"\0" + pixels[start : start + 3 * width] for start in range(0, len(pixels), 3 * width))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
