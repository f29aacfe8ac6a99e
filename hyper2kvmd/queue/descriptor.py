"""An OVF descriptor in the place of a manifest, as an .ovf or in an .ova: which one, and which files it must have."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.image.members import Place, is_archive_name, places, read
from hyper2kvmd.manifest import ovf
from hyper2kvmd.manifest.ovf import Ovf, OvfFile
from hyper2kvmd.text import plain, show

_SHOWN = 5
_COMMAND_LIMIT = 4096  # characters: half of a path is of no use


def stands_in(name: str) -> bool:
    """Whether a file of this name can stand in for a manifest."""
    return ovf.is_descriptor(name) or is_archive_name(name)


def candidates(names: Iterable[str]) -> list[str]:
    """What can stand in for the manifest of an export that has these names: each .ovf, or else each .ova."""
    there = sorted(names)
    return [*filter(ovf.is_descriptor, there)] or [*filter(is_archive_name, there)]


def several(directory: Path, found: list[str]) -> Finding:
    """What is wrong with an export that has more than one of them."""
    shown = ", ".join(map(show, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
    kind, what = ("OVAs", ".ova") if is_archive_name(found[0]) else ("OVF descriptors", ".ovf with its disks")
    return Finding(
        Code.MANIFEST_INVALID,
        f"{directory} has {len(found)} {kind} ({shown}), and an export is one VM",
        f"Put each {what} into a directory of its own.",
    )


def check_place(directory: Path, name: str, exports_dir: Path) -> None:
    """Refuse what lies beside the exports, as its lock and report would. Raise MigrationError."""
    if stands_in(name) and directory.resolve() == exports_dir.resolve():
        finding = outside(directory / name)
        raise MigrationError(Code.MANIFEST_INVALID, finding.message, finding.hint)


def outside(path: Path) -> Finding:
    """What a person should know of an .ovf or .ova that lies beside the exports, and not in one."""
    message = f"{plain(str(path), _COMMAND_LIMIT)} is ignored: it is a file, and an export is a directory"
    if not is_archive_name(path.name):
        return Finding("ignored", message, "Put it, with its disks and its .mf, into a directory of its own.")
    directory = path.with_suffix("")
    commands = (shlex.join(("mkdir", str(directory))), shlex.join(("mv", str(path), f"{directory}/")))
    return Finding("ignored", message, f"Run `{plain(' && '.join(commands), _COMMAND_LIMIT)}`.")


def read_archive(fd: int, path: Path) -> tuple[str, bytes, dict[str, Place]]:
    """The name and the bytes of the descriptor in an OVA, and all files there. Raise MigrationError or OSError."""
    files = places(fd, path)
    found = [*filter(ovf.is_descriptor, files)]
    if len(found) != 1:
        message = f"{path} holds {len(found)} OVF descriptors, and an export is one VM"
        raise MigrationError(Code.MANIFEST_INVALID, message, "Export each VM by itself.")
    return found[0], read(fd, files[found[0]], ovf.SIZE_LIMIT + 1), files


def parse(data: bytes, directory: Path, name: str) -> Ovf:
    """Read the descriptor of an export. Raise MigrationError: manifest_unreadable for half of one, manifest_invalid."""
    try:
        return ovf.parse(data, name)
    except ovf.OvfError as error:
        code = Code.MANIFEST_INVALID if error.complete else Code.MANIFEST_UNREADABLE
        hint = f"Export the VM again, or make a manifest of its disks: {create_command(directory)}."
        raise MigrationError(code, error.finding.message, hint) from None


@dataclass(frozen=True)
class Needed:
    """A file that a descriptor names: `name` as it is called in the export, or would be; whether it is of a disk.

    bytes: what it must have; None where that is not known, or nothing can be said as it is kept packed.
    """

    name: str
    disk: bool
    bytes: int | None


def needed(found: Ovf, names: Collection[str]) -> tuple[Needed, ...]:
    """All files that a descriptor names; `names` are those in the export."""
    disks = {disk.file for disk in found.disks}
    return tuple(_needed(file, names, disk=file.name in disks) for file in found.files)


def _needed(file: OvfFile, names: Collection[str], *, disk: bool) -> Needed:
    name = _called(file, names)
    unpacked_since = file.name.endswith(".gz") and not name.endswith(".gz")
    as_written = file.packing is None and name in file.names and not unpacked_since
    return Needed(name, disk, file.bytes if as_written else None)


def _called(file: OvfFile, names: Collection[str]) -> str:
    """The name that a file has in the export; that of its first chunk if it is in chunks."""
    chunks = (f"{name}.000000000" for name in file.names)
    return next((name for name in (*file.names, *chunks) if name in names), file.names[0])


def create_command(source: Path, *options: str) -> str:
    """The command that makes a manifest of something, as a person can paste it."""
    words = ("hyper2kvmctl", "manifest", "create", str(source), *options)
    return f"`{plain(shlex.join(words), _COMMAND_LIMIT)}`"


def mf_of(name: str) -> str:
    """The name of the file with the digests that belongs to a descriptor."""
    return re.sub(r"\.ovf$", ".mf", name, flags=re.IGNORECASE)
