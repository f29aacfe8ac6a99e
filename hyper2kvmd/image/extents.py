"""Which files beside a disk belong to it: the extents that a VMDK description names, and deltas of snapshots."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import open_directory_of, open_file
from hyper2kvmd.image.header.reader import SECTOR
from hyper2kvmd.image.header.vmdk import TEXT_LIMIT, Described, described
from hyper2kvmd.text import plain

_ENTRY_LIMIT = 1000  # of a directory; a hostile one could have millions
_NUMBERED = re.compile(r"(?P<stem>.+)-f(?P<number>[0-9]{3})(?P<suffix>\..+)")  # what VMware calls flat extents


@dataclass(frozen=True)
class Beside:
    """The directory of a disk: all names in it, and what its VMDKs name, by their own names."""

    names: frozenset[str]
    vmdks: dict[str, Described]

    @property
    def extents(self) -> frozenset[str]:
        """The files that are a part of a disk which a description here puts together."""
        return frozenset(
            extent for name, found in self.vmdks.items() for extent in found.extents if extent not in (name, "")
        )


def look_beside(export_fd: int, path: str) -> Beside:
    """Look at the directory of the file at a path in an export. Nothing is said of what cannot be read."""
    try:
        directory = open_directory_of(export_fd, path)
    except OSError:
        return Beside(frozenset(), {})
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in itertools.islice(entries, _ENTRY_LIMIT))
        return Beside(frozenset(names), dict(_vmdks(directory, names)))
    finally:
        os.close(directory)


def _vmdks(directory: int, names: list[str]) -> Iterator[tuple[str, Described]]:
    for name in names:
        if not name.lower().endswith(".vmdk"):
            continue
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                continue
            fd = open_file(name, dir_fd=directory)
            try:
                found = described(os.pread(fd, 21 * SECTOR, 0))
                if found is not None and not found.embedded:
                    found = described(os.pread(fd, TEXT_LIMIT, 0))
            finally:
                os.close(fd)
            if found is not None:
                yield name, found


def check_whole(beside: Beside, path: str, format: str, name: str) -> None:
    """Refuse a file that is only a part of a disk. `format` is what it is called, `name` how messages call the file.

    Raise MigrationError (format_unsupported).
    """
    file = PurePosixPath(path)
    for descriptor, found in beside.vmdks.items():
        if file.name not in found.extents or file.name == descriptor:
            continue
        # The only extent of a disk is all of it, if it is called what it is.
        if len(found.extents) == 1 and found.parent is None and format == "raw":
            continue
        what = "holds the data" if len(found.extents) == 1 else f"is one of the {len(found.extents)} extents"
        raise MigrationError(
            Code.FORMAT_UNSUPPORTED,
            f"{name} {what} of the disk that {plain(descriptor)} describes, and is no disk by itself",
            f"Name {plain(str(file.with_name(descriptor)))} in its place, as vmdk, and none of its extents.",
        )
    numbered = _NUMBERED.fullmatch(file.name)
    if numbered and (int(numbered["number"]) > 1 or f"{numbered['stem']}-f002{numbered['suffix']}" in beside.names):
        raise MigrationError(
            Code.FORMAT_UNSUPPORTED,
            f"{name} is one of several extents of a disk by its name, and no description beside it says of which",
            f"Copy the description, such as {plain(numbered['stem'])}.vmdk, there as well, and name that as the disk.",
        )


def delta_of(beside: Beside, path: str) -> str | None:
    """The name of a VMDK beside a disk that holds what was written to it after a snapshot, if there is one."""
    name = PurePosixPath(path).name
    names = {name, *(other for other, found in beside.vmdks.items() if name in found.extents)}
    return next((other for other, found in beside.vmdks.items() if found.parent in names and other not in names), None)
