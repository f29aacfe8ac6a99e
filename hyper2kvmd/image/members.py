"""The files in an OVA where they lie: a tar archive that is not compressed has each of them in one piece."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.image.tar import COPY_AGAIN, RECORD, Archive, members
from hyper2kvmd.text import plain, show

MEMBER_LIMIT = 1000
_COMMAND_LIMIT = 4096  # characters: half of a path is of no use


@dataclass(frozen=True)
class Place:
    """Where in an archive a file is: the bytes before it, and its own."""

    start: int
    size: int


def is_archive_name(name: str) -> bool:
    """Whether a file is an OVA by its name; a hidden one is none."""
    return name.lower().endswith(".ova") and not name.startswith(".")


def places(fd: int, path: Path) -> dict[str, Place]:
    """The files in the archive that is open as `fd`, by their names without directories; `path` is for messages.

    Raise MigrationError: image_corrupt (cut short, or damaged), format_unsupported (compressed, or with a file that is
    not in one piece), export_unsafe (holds what no OVA holds); or OSError.
    """
    found: dict[str, Place] = {}
    # Opened again, as the position of `fd` belongs to nobody.
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        archive = Archive(file, path)
        if archive.compressed:
            raise _unreadable(path, "is compressed, and an archive is read where it is")
        archive.grows()
        for member in members(archive):
            name, start = member.name, archive.offset
            if member.pieces is not None:
                raise _unreadable(path, f"holds {show(name)} as a sparse file, and an archive is read where it is")
            if name in found:
                raise archive.unsafe(f"holds {show(name)} twice")
            if len(found) == MEMBER_LIMIT:
                raise archive.unsafe(f"holds more than {MEMBER_LIMIT} files")
            if start + member.size > os.fstat(fd).st_size:
                what = f"{path} ends in the middle of {show(name)}: it is truncated"
                raise MigrationError(Code.IMAGE_CORRUPT, what, COPY_AGAIN)
            archive.skip(member.size + -member.size % RECORD)
            found[name] = Place(start, member.size)
    return found


def read(fd: int, place: Place, limit: int) -> bytes:
    """The bytes of a small file in an archive, `limit` of them at most. Raise OSError."""
    return os.pread(fd, min(place.size, limit), place.start)


def unpack_command(source: Path, target: Path | None = None) -> str:
    """The command that unpacks an export into a new one, as a person can paste it."""
    target = target or source.parent.with_name(f"{source.parent.name}-unpacked")
    words = ("hyper2kvmctl", "manifest", "create", str(source), "--directory", str(target))
    return f"`{plain(shlex.join(words), _COMMAND_LIMIT)}`"


def _unreadable(path: Path, what: str) -> MigrationError:
    hint = f"Unpack it into a new export: {unpack_command(path)}; then delete this one."
    return MigrationError(Code.FORMAT_UNSUPPORTED, f"{path} {what}", hint)
