"""Makes a manifest for disks that came without one, from what lies there: files, a directory, an OVF descriptor."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from hyper2kvmd.authoring import bootsector
from hyper2kvmd.authoring.bootsector import Firmware
from hyper2kvmd.authoring.builder import SUFFIXES, ManifestBuilder, opened
from hyper2kvmd.authoring.contents import Packed, Progress, copy, find_packed, make_whole, verified
from hyper2kvmd.authoring.digests import NONE, SIZE_LIMIT, Digests
from hyper2kvmd.authoring.digests import parse as parse_digests
from hyper2kvmd.authoring.rewrite import Dialect
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import open_directory, timestamp
from hyper2kvmd.image import qemu_img
from hyper2kvmd.image.extents import look_beside
from hyper2kvmd.image.source import Source, open_disk
from hyper2kvmd.manifest import ovf
from hyper2kvmd.queue.descriptor import mf_of
from hyper2kvmd.run import Tools
from hyper2kvmd.text import plain, show

_DISK_SUFFIXES = (*SUFFIXES, ".img")
# The data of a disk whose description has the name without this, and VMware's list of changed blocks.
_BELONGS = re.compile(r"(.+)-(?:flat|ctk)\.vmdk", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """What a manifest is to be made of: the disks' files in `directory`, in the order in which the guest sees them.

    packed: disks that are not files of their own yet. digests: what a .mf beside the descriptor says of the files.
    """

    directory: Path
    vm_name: str
    disks: tuple[str, ...]
    descriptor: ovf.Ovf | None = None
    warnings: tuple[Finding, ...] = ()
    packed: tuple[Packed, ...] = ()
    digests: Digests = NONE

    def unpacked_digests(self) -> Digests:
        """The digests once all is unpacked: where those of all pieces were checked, nothing is left to be checked."""
        if self.digests is NONE:
            return NONE
        known = self.digests.of
        checked: dict[str, dict[str, str]] = {
            disk.name: {} for disk in self.packed if all(piece in known for piece in disk.pieces)
        }
        return Digests({**known, **checked}, self.digests.warnings)


@dataclass(frozen=True)
class Described:
    """A manifest that is ready to be written. virtual_sizes: of the disks in bytes, by their ids."""

    builder: ManifestBuilder
    virtual_sizes: dict[str, int]
    warnings: tuple[Finding, ...]


def in_directory(directory: Path, vm_name: str | None, default: str | None = None) -> Found:
    """All disk images in a directory, in the order that an .ovf there gives them. Raise MigrationError or OSError.

    Without a `vm_name`, it is what the .ovf says, or else `default`, or else the directory's own name.
    """
    name = vm_name or default or directory.resolve().name
    names = sorted((name for name in os.listdir(directory) if not name.startswith(".")), key=_natural)
    descriptor, packed, warnings = None, dict[str, Packed](), tuple[Finding, ...]()
    try:
        chosen = ovf.choose(names, name)
        descriptor = None if chosen is None else _descriptor(directory / chosen)
    except ovf.OvfError as error:
        warnings = (error.finding,)
    if descriptor is not None:
        packed, more = find_packed(directory, names, descriptor)
        warnings = (*descriptor.warnings, *more)
    parts = _extents(directory) | {piece for disk in packed.values() for piece in disk.pieces}
    disks = [
        name
        for name in names
        if name.lower().endswith(_DISK_SUFFIXES) and name not in parts and not _belongs(name, names)
    ]
    if not disks and not packed:
        raise _no_disks(directory, names)
    places = {name: place for place, name in enumerate(files_of(descriptor, names))} if descriptor else {}
    disks.sort(key=lambda name: places.get(name, len(places)))
    name = vm_name or (descriptor and descriptor.vm_name) or name
    digests = digests_beside(directory, names, descriptor) if descriptor else NONE
    return Found(directory, name, tuple(disks), descriptor, warnings, tuple(packed.values()), digests)


def _no_disks(directory: Path, names: Sequence[str]) -> MigrationError:
    """The error for a directory without disks, which may have what becomes some."""
    hint = "Name the directory that the VM was exported to."
    for name in names:
        if name.lower().endswith(tuple(f"{suffix}.gz" for suffix in _DISK_SUFFIXES)):
            hint = f"{plain(name)} is compressed, and no .ovf says what it is: unpack it (`gunzip -k`), and try again."
        elif re.fullmatch(r".+\.0{9}", name):
            stem = plain(name[: -len(".000000000")])
            hint = f"{stem} is in chunks, and no .ovf says so: join them (`cat {stem}.0* > {stem}`), and try again."
    message = f"{directory} holds no disk images ({', '.join(_DISK_SUFFIXES)})"
    return MigrationError(Code.DISK_MISSING, message, hint)


def of_descriptor(path: Path, vm_name: str | None) -> Found:
    """The disks that an .ovf names, which lie beside it. Raise MigrationError or OSError."""
    try:
        descriptor = _descriptor(path)
    except ovf.OvfError as error:
        finding = error.finding
        hint = "Export the VM again, or name the disk files instead of the descriptor."
        raise MigrationError(Code.MANIFEST_INVALID, finding.message, hint) from None
    names = os.listdir(path.parent)
    return of_parsed(path, descriptor, vm_name, names, digests_beside(path.parent, names, descriptor))


def of_parsed(path: Path, descriptor: ovf.Ovf, vm_name: str | None, names: Sequence[str], digests: Digests) -> Found:
    """Likewise for the descriptor at a path that was read already; `names` are the files beside it."""
    packed, more = find_packed(path.parent, names, descriptor)
    return found_by(path, descriptor, vm_name, files_of(descriptor, names, packed), digests, (*packed.values(),), more)


def found_by(
    path: Path,
    descriptor: ovf.Ovf,
    vm_name: str | None,
    disks: tuple[str, ...],
    digests: Digests,
    packed: tuple[Packed, ...] = (),
    more: tuple[Finding, ...] = (),
) -> Found:
    """What a manifest is to be made of, by the descriptor at a path. Raise MigrationError if it has no disks."""
    if not disks and not packed:
        message = f"{path} names no disks with content"
        raise MigrationError(Code.DISK_MISSING, message, "Export the VM again, or name the disk files themselves.")
    empty = sum(disk.file is None for disk in descriptor.disks)
    warnings = (*descriptor.warnings, *more)
    if empty:
        message = f"{show(path.name)} describes {empty} disk{'s' * (empty > 1)} without a file: left out"
        warnings += (Finding("disk_empty", message, "Add an empty disk to the VM once it runs, if it needs one."),)
    name = vm_name or descriptor.vm_name or path.stem
    return Found(path.parent, name, disks, descriptor, warnings, packed, digests)


def unpack(found: Found, target: Path, *, check: bool, on_progress: Progress) -> None:
    """Put all that a manifest is to be made of into a new directory, with each disk a file of its own.

    check: whether to hold what is read against the digests. Raise MigrationError or OSError.
    """
    digests = found.digests if check else NONE
    files = dict.fromkeys((*([found.descriptor.name] if found.descriptor else []), *whole(found)))
    for name in files:
        copy(found.directory, name, target, on_progress)
    for disk in found.packed:
        make_whole(found.directory, disk, target, on_progress, digests)


def of_files(paths: Sequence[Path], directory: Path, vm_name: str | None) -> Found:
    """Disk files in the order in which they are given; the manifest is to lie in `directory`."""
    base = directory.resolve()
    # Not the file itself: a link is to be refused, not followed.
    full = [path.parent.resolve() / path.name for path in paths]
    names = [str(path.relative_to(base) if path.is_relative_to(base) else path) for path in full]
    return Found(directory, vm_name or paths[0].stem, tuple(names))


def describe(
    found: Found,
    dialect: Dialect,
    *,
    checksum: bool,
    digests: Mapping[str, str],
    tools: Tools,
    on_progress: Callable[[str, float], None],
) -> Described:
    """Look at the disks, and put the manifest together; what is wrong comes out when it is written.

    digests: what is known already of the files' SHA-256, by their names; checksum: whether to compute the others.
    on_progress: gets a name and the ratio done.
    Raise MigrationError (checksum_mismatch) for a file that is not what the .mf says, if checksums are computed.
    """
    warnings, sizes, boots = list(found.warnings), dict[str, int](), list[frozenset[Firmware]]()
    if checksum and not digests and found.descriptor and found.digests is not NONE:
        digests = verified(found.directory, whole(found), found.digests, on_progress)
        warnings += (
            *found.digests.warnings,
            *found.digests.unproved(
                dict.fromkeys(found.disks), mf_of(found.descriptor.name) if found.descriptor else ""
            ),
        )
    for index, file in enumerate(found.disks):
        boots.append(frozenset())
        # The builder says what is wrong with the file.
        with contextlib.suppress(MigrationError, OSError), opened(found.directory, file, f"disk-{index}") as source:
            sizes[source.disk.id] = source.virtual_size
            try:
                boots[-1] = bootsector.firmware(_start(tools, source))
            except MigrationError as error:
                message = f"the boot sector of {plain(file)} could not be read: {error.message}"
                warnings.append(Finding("boot_sector", message, error.hint, f"disks[{index}]"))
    boot = next((index for index, firmware in enumerate(boots) if firmware), 0)
    was = found.descriptor or ovf.Ovf("")
    builder = ManifestBuilder(found.directory).with_source(found.vm_name, export_method="hyper2kvmctl manifest create")
    memory_mib, secure_boot = was.memory_mib, was.secure_boot
    if dialect == "go":  # which has whole GiB, and only the word for "on"; the .ovf beside the manifest says the rest
        memory_mib, secure_boot = (memory_mib or 0) // 1024 * 1024 or None, secure_boot or None
    firmware: Firmware | None = was.firmware or (next(iter(boots[boot])) if boots and len(boots[boot]) == 1 else None)
    builder.with_vm(
        cpu=was.cpus,
        mem_gb=_gib(memory_mib),
        firmware=firmware or "unknown",
        secure_boot=secure_boot,
        os_version=was.os,
    )
    order = [boot, *(index for index in range(len(found.disks)) if index != boot)]
    for index, file in enumerate(found.disks):
        builder.add_disk(
            file,
            kind="boot" if index == boot else "data",
            boot_order=order.index(index),
            checksum=digests.get(file, checksum),
            on_progress=functools.partial(on_progress, file),
        )
    for nic in was.nics:
        builder.add_nic(nic.mac, nic.network)
    builder.with_pipeline().with_metadata(created_at=timestamp(time.time()))
    return Described(builder, sizes, tuple(warnings))


def _gib(mib: int | None) -> float | None:
    if mib is None:
        return None
    return mib // 1024 if mib % 1024 == 0 else mib / 1024


def _start(tools: Tools, source: Source) -> bytes:
    """The first MiB that the guest sees. Raise MigrationError or OSError."""
    if source.header.format == "raw":
        return os.pread(source.image, min(bootsector.READ_BYTES, source.header.virtual_size), source.file.start)
    with tempfile.TemporaryDirectory() as directory:  # qemu-img writes into no pipe
        start = Path(directory) / "start"
        tools.run(
            "qemu-img", "dd", "-O", "raw", f"bs={bootsector.READ_BYTES}", "count=1", f"if={source.node}",
            f"of={start}", limits=qemu_img.WORK_LIMITS, timeout=60,
        )  # fmt: skip
        return start.read_bytes()


def _descriptor(path: Path) -> ovf.Ovf:
    """Read an .ovf. Raise OvfError or OSError."""
    fd = open_directory(path.parent.resolve())
    try:
        file, _ = open_disk(fd, path.parent.resolve(), path.name, "")
    except MigrationError as error:
        raise ovf.unreadable(path.name, error.message) from None
    finally:
        os.close(fd)
    try:
        return ovf.parse(os.pread(file.fd, ovf.SIZE_LIMIT + 1, 0), path.name)
    finally:
        os.close(file.fd)


def files_of(descriptor: ovf.Ovf, names: Sequence[str], packed: Container[str] = ()) -> tuple[str, ...]:
    """The files of the descriptor's disks, but for those that are packed."""
    disks = (disk for disk in descriptor.disks if disk.file is not None and disk.file not in packed)
    return tuple(
        dict.fromkeys(next((name for name in disk.names if name in names), unquote(disk.file or "")) for disk in disks)
    )


def digests_beside(directory: Path, names: Sequence[str], descriptor: ovf.Ovf) -> Digests:
    """What the .mf of a descriptor says; NONE if there is none. Raise MigrationError."""
    name = mf_of(descriptor.name)
    if name not in names:
        return NONE
    fd = open_directory(directory.resolve())
    try:
        file, _ = open_disk(fd, directory.resolve(), name, "")
    finally:
        os.close(fd)
    try:
        return parse_digests(os.pread(file.fd, SIZE_LIMIT, 0), name)
    finally:
        os.close(file.fd)


def _extents(directory: Path) -> frozenset[str]:
    """The files in a directory that are parts of disks which others there describe."""
    fd = open_directory(directory.resolve())
    try:
        return look_beside(fd, "any").extents
    finally:
        os.close(fd)


def whole(found: Found) -> tuple[str, ...]:
    """The files of the disks that are not packed, and then their extents."""
    fd = open_directory(found.directory.resolve())
    try:
        vmdks = look_beside(fd, "any").vmdks
    finally:
        os.close(fd)
    extents = (name for disk in found.disks if disk in vmdks for name in vmdks[disk].extents)
    return tuple(dict.fromkeys((*found.disks, *extents)))


def _belongs(name: str, names: Sequence[str]) -> bool:
    found = _BELONGS.fullmatch(name)
    return found is not None and f"{found[1]}.vmdk" in names


def _natural(name: str) -> tuple[tuple[str, int], ...]:
    """A key by which disk-2 comes before disk-10."""
    return tuple((text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d{0,18})", name))
