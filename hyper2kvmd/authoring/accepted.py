"""The manifest of an export: read, or made of the .ovf or .ova of an export that came without one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hyper2kvmd.authoring import create
from hyper2kvmd.authoring.builder import SUFFIXES
from hyper2kvmd.authoring.contents import verified
from hyper2kvmd.authoring.create import Found
from hyper2kvmd.authoring.digests import NONE, SIZE_LIMIT, Digests
from hyper2kvmd.authoring.digests import parse as parse_digests
from hyper2kvmd.errors import Code, Collected, Finding, MigrationError
from hyper2kvmd.image.members import is_archive_name, unpack_command
from hyper2kvmd.image.members import read as read_bytes
from hyper2kvmd.image.tar import GZIP
from hyper2kvmd.manifest import Manifest, ManifestError, parse, wire
from hyper2kvmd.manifest.model import Made
from hyper2kvmd.manifest.ovf import Ovf
from hyper2kvmd.queue import descriptor
from hyper2kvmd.queue.access import open_shared
from hyper2kvmd.queue.descriptor import create_command, mf_of
from hyper2kvmd.queue.export import Export
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain, show

Progress = Callable[[str, float], None]


def manifest_of(
    export: Export,
    name: str,
    data: bytes,
    settings: Settings,
    tools: Tools,
    *,
    pipeline: wire.Pipeline,
    vm_name: str | None = None,
    check: bool = True,
    on_progress: Progress = lambda name, ratio: None,
) -> Manifest:
    """The manifest of an export whose file `name` holds `data`. Nothing is written.

    pipeline, vm_name: what goes before the manifest's own. check: whether to read what has only digests that VERIFY
    does not compute, and hold it against them. on_progress: gets the name of a file that is read, and the ratio done.
    Raise ManifestError, MigrationError or OSError.
    """
    if not descriptor.stands_in(name):
        return parse(data, name, pipeline, vm_name)
    path = export.directory / name
    if not settings.ovf.accept:
        message = f"{path} is an OVF descriptor, not a manifest"
        hint = f"Make a manifest of it: {create_command(path)}. Or set ovf.accept to true."
        if is_archive_name(name):
            message = f"{path} is an archive, not a manifest"
            hint = f"Unpack it into a new export: {unpack_command(path)}. Or set ovf.accept to true."
        raise MigrationError(Code.MANIFEST_INVALID, message, hint)
    descriptor.check_place(export.directory, name, settings.exports_dir)
    read = descriptor.parse(data, export.directory, name)
    found = (_in_archive if is_archive_name(name) else _in_directory)(export, name, data, read)
    digests = found.digests
    known = {disk: digests.of[disk]["sha256"] for disk in found.disks if "sha256" in digests.algorithms(disk)}
    if check:
        # A disk whose SHA-256 is known is read by VERIFY; but that is not so for the data that it may have beside it.
        rest = [file for file in create.whole(found) if file not in known]
        known |= {
            file: sha256
            for file, sha256 in verified(export.directory, rest, digests, on_progress).items()
            if file in found.disks
        }
    described = create.describe(
        found, "seed", checksum=False, digests=known, tools=tools, on_progress=lambda name, ratio: None
    )
    document = _document(described)
    manifest = _parsed(document, name, data, read, pipeline, vm_name)
    return manifest.model_copy(update={"warnings": _warnings(manifest, described, found, export)})


def remade(document: dict[str, Any], export: Export, name: str, data: bytes) -> Manifest:
    """A manifest that was made earlier of the file `name` that holds `data`. Raise ManifestError, MigrationError."""
    return _parsed(document, name, data, descriptor.parse(data, export.directory, name))


def _parsed(
    document: dict[str, Any],
    name: str,
    data: bytes,
    read: Ovf,
    pipeline: wire.Pipeline | None = None,
    vm_name: str | None = None,
) -> Manifest:
    manifest = parse(json.dumps(document).encode(), "manifest.json", pipeline, vm_name)
    made = Made(file=name, descriptor=read, document=document)
    return manifest.model_copy(update={"sha256": hashlib.sha256(data).hexdigest(), "made": made})


def _in_directory(export: Export, name: str, data: bytes, read: Ovf) -> Found:
    """The disks that an .ovf names, which lie beside it. Raise MigrationError as manifest_of() does, or OSError."""
    path, names = export.directory / name, os.listdir(export.fd)
    _check_there(read, names, export.directory, create_command(path))
    found = create.of_parsed(path, read, None, names, create.digests_beside(export.directory, names, read))
    if found.packed:
        packed = found.packed[0]
        raise _packed(path, export.directory / packed.pieces[0], "compressed" if packed.compressed else "in chunks")

    def size(file: str) -> int:
        return os.stat(file, dir_fd=export.fd, follow_symlinks=False).st_size

    _check(path, data, read, names, size, found.digests)
    return found


def _in_archive(export: Export, name: str, data: bytes, read: Ovf) -> Found:
    """The disks in an .ova, which are called `web01.ova/disk1.vmdk` in the manifest. Raise as _in_directory() does."""
    path = export.directory / name
    fd = open_shared(name, dir_fd=export.fd)
    try:
        own, _, files = descriptor.read_archive(fd, path)
        _check_there(read, files, path, unpack_command(path))
        for needed in descriptor.needed(read, files):
            chunk = needed.name.endswith(".000000000")
            if needed.disk and (chunk or read_bytes(fd, files[needed.name], 2) == GZIP):
                raise _packed(path, path / needed.name, "in chunks" if chunk else "compressed")
        mf = files.get(descriptor.mf_of(own))
        said = NONE if mf is None else parse_digests(read_bytes(fd, mf, SIZE_LIMIT), descriptor.mf_of(own))
    finally:
        os.close(fd)
    _check(path / own, data, read, files, lambda file: files[file].size, said)
    disks = tuple(f"{name}/{disk}" for disk in create.files_of(read, [*files]))
    digests = said if said is NONE else replace(said, of={f"{name}/{file}": known for file, known in said.of.items()})
    return create.found_by(path, read, None, disks, digests)


def _check_there(read: Ovf, names: Collection[str], where: Path, command: str) -> None:
    """Make sure that each file of a descriptor is there."""
    if lost := next((disk.lost for disk in read.disks if disk.lost is not None), None):
        message = f"{where}: {plain(read.name)} has a disk with the file {show(lost)}, which its References lack"
        raise MigrationError(Code.DISK_MISSING, message, "Export the VM again.")
    for needed in descriptor.needed(read, names):
        if needed.name not in names:
            hint = "Copy it there, or export the VM again."
            if not needed.disk:
                hint += f" If the VM needs no such file, make a manifest of the disks alone: {command}."
            raise MigrationError(Code.DISK_MISSING, f"{where / needed.name} does not exist", hint)


def _packed(path: Path, file: Path, how: str) -> MigrationError:
    hint = f"Unpack it into a new export: {unpack_command(path)}; then delete this one."
    return MigrationError(Code.FORMAT_UNSUPPORTED, f"{file} is {how}, and an export is read where it is", hint)


def _check(
    path: Path, data: bytes, read: Ovf, names: Collection[str], size: Callable[[str], int], digests: Digests
) -> None:
    """Hold the descriptor at a path against its digests, and the disks beside it against the sizes that it says."""
    name, problems = path.name, Collected()
    with problems:
        sums = {
            algorithm: hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
            for algorithm in digests.algorithms(name)
        }
        try:
            digests.check(name, sums, str(path))
        except MigrationError as error:
            error.hint += f" If somebody changed the .ovf on purpose, delete its line in {plain(mf_of(name))}."
            raise
    for needed in descriptor.needed(read, names):
        # Where there is a digest, that tells more.
        if needed.disk and needed.bytes not in (None, size(needed.name)) and not digests.algorithms(needed.name):
            what = f"has {size(needed.name)} bytes, {plain(name)} says {needed.bytes} (ovf:size)"
            hint = "Copy it again, or export the VM again."
            problems.errors.append(MigrationError(Code.DISK_SIZE, f"{path.with_name(needed.name)} {what}", hint))
    problems.check()


def _document(described: create.Described) -> dict[str, Any]:
    """What the manifest says. Raise MigrationError for what is wrong with the disks, as for those of any export."""
    try:
        return described.builder.document()
    except ManifestError as error:
        problems = Collected()
        problems.errors += [
            MigrationError(Code(found.code), found.message, found.hint, field=found.field) for found in error.problems
        ]
        problems.check()
        raise


def _warnings(manifest: Manifest, described: create.Described, found: Found, export: Export) -> tuple[Finding, ...]:
    """What a person should know; without what the plan of the job says of the descriptor in any case."""
    digests = found.digests
    own = found.descriptor.warnings if found.descriptor else ()
    return (
        *(warning for warning in manifest.warnings if warning.code != "no_checksum"),
        *(warning for warning in described.warnings if warning not in own),
        *_unused(found),
        *digests.warnings,
        *digests.unproved(dict.fromkeys(found.disks), str(export.directory)),
    )


def _unused(found: Found) -> Iterator[Finding]:
    """The disks that came along, and that the VM does not have."""
    if found.descriptor is None:
        return
    used = {disk.file for disk in found.descriptor.disks}
    for file in found.descriptor.files:
        if file.name not in used and file.name.lower().endswith(tuple(SUFFIXES)):
            message = f"{show(file.name)} is no disk of the VM by {show(found.descriptor.name)}: it is not migrated"
            yield Finding("disk_unused", message, "Compare with the source, whether the VM has it.")
