"""The pages of reports as commands write them: with what lies beside a report, and each file whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from hyper2kvmd.authoring.accepted import remade
from hyper2kvmd.domain import hardware
from hyper2kvmd.domain.hardware import Hardware
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.files import open_directory, open_file
from hyper2kvmd.manifest import Manifest, parse
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.export import Export
from hyper2kvmd.queue.names import BOOT_SCREEN, LOG, REPORT, SIGNED
from hyper2kvmd.report.html import render
from hyper2kvmd.report.model import ManifestRecord, Report
from hyper2kvmd.report.results import Results

LOG_BYTES = 1 << 20  # more than the lines that are shown; the log itself may be planted
SCREEN_BYTES = 8 << 20


def page_of(export: Path, document: dict[str, Any], shown: Report, results: Results) -> str:
    """The page of one report, with what lies beside it. Raise OSError."""
    fd = open_directory(export)
    try:
        log = beside(fd, LOG, LOG_BYTES).decode(errors="replace")
        # One that the report does not name is an earlier attempt's.
        named = results.boot is not None and results.boot.screenshot is not None
        screen = beside(fd, BOOT_SCREEN, SCREEN_BYTES) if named else None
        signed = beside(fd, REPORT + SIGNED, 1) != b""
        return render(document, log, screen, _source(fd, export, shown.manifest), signed=signed)
    finally:
        os.close(fd)


def beside(dir_fd: int, name: str, limit: int) -> bytes:
    """The last bytes of a plain file in the export; empty for what is none, or is not to be read."""
    try:
        fd = open_file(name, dir_fd=dir_fd)
    except OSError:
        return b""
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        # A second name is how somebody has a file shown that he may not read.
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            return b""
        file.seek(max(0, status.st_size - limit))
        return file.read(limit)


def _source(dir_fd: int, export: Path, record: ManifestRecord) -> tuple[Manifest, Hardware] | None:
    """The manifest and the VM's hardware, if the manifest is still the one of the report."""
    if "/" in record.name:
        return None  # somewhere else, which nobody but a planted report says
    try:
        name, data = facts.read_manifest(dir_fd, export, (record.name,))
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != record.sha256:
            return None
        manifest = parse(data, name) if record.made is None else remade(record.made, Export(export, dir_fd), name, data)
        return manifest, hardware.read(dir_fd, manifest)[0]
    except (MigrationError, OSError):
        return None


def write_page(path: Path, data: bytes) -> None:
    """Write the page so that it is there whole, or the old one is. Raise OSError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):  # a directory, a device: nothing to be replaced
            raise OSError(errno.EINVAL, "it is not a plain file")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o640)  # not for everybody, like the log that it quotes
            os.fsync(file.fileno())
            os.rename(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
