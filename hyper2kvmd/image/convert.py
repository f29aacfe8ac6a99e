"""Converts a disk by what is fastest for it: our own reader, a reflink, or qemu-img."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.image import qemu_img
from hyper2kvmd.image.source import Source, check_unchanged
from hyper2kvmd.image.stream.codecs import libzstd
from hyper2kvmd.run import Tools

log = structlog.get_logger()

Engine = Literal["stream", "reflink", "qemu-img"]
THREADS_LIMIT = 8  # one thread reads and hashes for all others, which is what limits beyond some of them


@dataclass(frozen=True)
class Copied:
    """How a disk was converted. In bytes: `read` from its file, `inflated`, and what the result takes (`written`).

    sha256: of the file, if the same read gave it. inflated: None if nobody counted.
    """

    engine: Engine
    read: int
    inflated: int | None
    written: int
    sha256: str | None = None


def streams(source: Source, engine: Literal["auto", "qemu-img"], *, compress: bool) -> bool:
    """Whether our own reader is tried first, which computes the checksum of the source as well."""
    return engine == "auto" and source.header.subformat in _STREAMED and not (compress and libzstd() is None)


_STREAMED = ("streamOptimized", "monolithicSparse")


def stream(
    tools: Tools,
    source: Source,
    target: Path,
    format: str,
    *,
    compress: bool,
    threads: int,
    on_progress: Callable[[float], None],
) -> Copied | None:
    """Have our own reader convert the source to `target` (absolute), which is there and empty, as `qcow2` or `raw`.

    It is a process of its own, of which `threads` inflate. `on_progress` gets the ratio done, from 0 to 1. None if it
    is not for this disk, with nothing written. Raise MigrationError or Cancelled; then the caller removes `target`.
    """
    check_unchanged(source)
    said = _Lines(lambda line: on_progress(min(line["read"] / source.size, 1.0)))
    kind = f"{format}-zstd" if compress else format
    tools.run(
        *(sys.executable, "-P", "-m", "hyper2kvmd.image.stream"),
        *(source.file.path, str(source.file.start), str(source.size), source.name, target, kind, str(threads)),
        on_output=said, limits=qemu_img.WORK_LIMITS,
    )  # fmt: skip
    last = said.last
    if "unsuitable" in last:
        log.info("qemu-img converts this disk", disk=source.disk.id, reason=last["unsuitable"])
        return None
    if "error" in last:
        check_unchanged(source)  # whoever still writes to it need not export it again
        error = last["error"]
        raise MigrationError(Code(error["code"]), error["message"], error["hint"])
    on_progress(1.0)
    return Copied("stream", **last["done"])


def copy(
    tools: Tools,
    source: Source,
    target: Path,
    format: str,
    *,
    reflink: bool,
    compress: bool,
    on_progress: Callable[[float], None],
) -> Copied:
    """Convert the source as stream() does, by other means.

    reflink: whether a raw disk may share its blocks with its source, where the file system can do that.
    """
    whole = source.file.archive_bytes is None
    if reflink and whole and "raw" == format == source.header.format and _reflinked(source, target):
        return Copied("reflink", 0, None, 0)
    qemu_img.convert(tools, source, target, format, compress=compress, on_progress=on_progress)
    read = sum(file.size for file in source.extents or source.files)
    return Copied("qemu-img", read, None, target.stat().st_blocks * 512)


def _reflinked(source: Source, target: Path) -> bool:
    """Have the target share the blocks of the source. False if the file system does not do that. Raise OSError."""
    check_unchanged(source)
    with target.open("r+b") as file:
        try:
            fcntl.ioctl(file, _FICLONE, source.image)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY):
                return False
            raise
        os.ftruncate(file.fileno(), source.virtual_size)  # up to whole sectors
    return True


_FICLONE = 0x40049409  # ioctl_ficlone(2)


class _Lines:
    """Takes lines of JSON, however they are cut into pieces; `last` is the one that did not tell of progress."""

    def __init__(self, tell: Callable[[dict[str, int]], None]) -> None:
        self.tell = tell
        self.last: dict[str, Any] = {}
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in map(json.loads, lines):
            if "read" in line:
                self.tell(line)
            else:
                self.last = line
