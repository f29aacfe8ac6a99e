"""The manifest of an export: read, or made of the OVF descriptor of an export that came without one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from hyper2kvmd.authoring import create
from hyper2kvmd.authoring.contents import verified
from hyper2kvmd.authoring.create import Found
from hyper2kvmd.errors import Code, Collected, Finding, MigrationError
from hyper2kvmd.manifest import Manifest, ManifestError, parse, wire
from hyper2kvmd.manifest.model import Made
from hyper2kvmd.manifest.ovf import Ovf, is_descriptor
from hyper2kvmd.queue import descriptor
from hyper2kvmd.queue.descriptor import create_command, mf_of
from hyper2kvmd.queue.export import Export
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

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
    if not is_descriptor(name):
        return parse(data, name, pipeline, vm_name)
    path = export.directory / name
    if not settings.ovf.accept:
        message = f"{path} is an OVF descriptor, not a manifest"
        hint = f"Make a manifest of it: {create_command(path)}. Or set ovf.accept to true."
        raise MigrationError(Code.MANIFEST_INVALID, message, hint)
    found = _find(path, descriptor.parse(data, export.directory, name), export)
    digests, problems = found.digests, Collected()
    with problems:
        _check_descriptor(path, data, found)
    for needed in descriptor.needed(_ovf(found), os.listdir(export.fd)):
        with problems:
            _check_size(export, name, needed, digests.algorithms(needed.name))
    problems.check()
    known = {disk: digests.of[disk]["sha256"] for disk in found.disks if "sha256" in digests.algorithms(disk)}
    if check:
        # A disk whose SHA-256 is known is read by VERIFY; but that is not so for the data that it may have beside it.
        read = [file for file in create.whole(found) if file not in known]
        known |= {
            file: sha256
            for file, sha256 in verified(export.directory, read, digests, on_progress).items()
            if file in found.disks
        }
    described = create.describe(
        found, "seed", checksum=False, digests=known, tools=tools, on_progress=lambda name, ratio: None
    )
    document = _document(described)
    manifest = parse(json.dumps(document).encode(), "manifest.json", pipeline, vm_name)
    return manifest.model_copy(
        update={
            "sha256": hashlib.sha256(data).hexdigest(),
            "made": Made(descriptor=name, document=document),
            "warnings": _warnings(manifest, described, found, export),
        }
    )


def remade(document: dict[str, object], name: str, sha256: str) -> Manifest:
    """A manifest that was made earlier of the descriptor `name`, from what it says. Raise ManifestError."""
    manifest = parse(json.dumps(document).encode(), "manifest.json")
    return manifest.model_copy(update={"sha256": sha256, "made": Made(descriptor=name, document=document)})


def _find(path: Path, read: Ovf, export: Export) -> Found:
    """The disks of a descriptor, none of which is missing or packed. Raise MigrationError."""
    names = os.listdir(export.fd)
    for needed in descriptor.needed(read, names):
        if needed.name not in names:
            hint = "Copy it there, or export the VM again."
            if not needed.disk:
                hint += f" If the VM needs no such file, make a manifest of the disks alone: {create_command(path)}."
            raise MigrationError(Code.DISK_MISSING, f"{export.directory / needed.name} does not exist", hint)
    found = create.of_parsed(path, read, None)
    if found.packed:
        packed = found.packed[0]
        how = "compressed" if packed.compressed else "in chunks"
        unpack = create_command(path, "--directory", f"{export.directory}-unpacked")
        raise MigrationError(
            Code.FORMAT_UNSUPPORTED,
            f"{export.directory / packed.pieces[0]} is {how}, and an export is read where it is",
            f"Unpack it into a new export: {unpack}; then delete this one.",
        )
    return found


def _ovf(found: Found) -> Ovf:
    assert found.descriptor is not None  # of_parsed() has put it there
    return found.descriptor


def _check_descriptor(path: Path, data: bytes, found: Found) -> None:
    """Hold the descriptor itself against the digests."""
    algorithms = found.digests.algorithms(path.name)
    try:
        sums = {algorithm: hashlib.new(algorithm, data, usedforsecurity=False).hexdigest() for algorithm in algorithms}
        found.digests.check(path.name, sums, str(path))
    except MigrationError as error:
        error.hint += f" If somebody changed the .ovf on purpose, delete its line in {plain(mf_of(path.name))}."
        raise


def _check_size(export: Export, name: str, needed: descriptor.Needed, algorithms: frozenset[str]) -> None:
    """Hold the size of a disk against the descriptor's; where there is a digest, that tells more."""
    if not needed.disk or needed.bytes is None or algorithms:
        return
    size = os.stat(needed.name, dir_fd=export.fd, follow_symlinks=False).st_size
    if size != needed.bytes:
        raise MigrationError(
            Code.DISK_SIZE,
            f"{export.directory / needed.name} has {size} bytes, {plain(name)} says {needed.bytes} (ovf:size)",
            "Copy it again, or export the VM again.",
        )


def _document(described: create.Described) -> dict[str, object]:
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
    where = str(export.directory) if not digests.of else mf_of(_ovf(found).name)
    return (
        *(warning for warning in manifest.warnings if warning.code != "no_checksum"),
        *(warning for warning in described.warnings if warning not in _ovf(found).warnings),
        *digests.warnings,
        *digests.unproved(dict.fromkeys(found.disks), where),
    )
