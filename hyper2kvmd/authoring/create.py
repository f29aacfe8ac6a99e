"""Makes a manifest for disks that came without one, from what lies there: files, a directory, an OVF descriptor."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from hyper2kvmd.authoring import bootsector
from hyper2kvmd.authoring.bootsector import Firmware
from hyper2kvmd.authoring.builder import SUFFIXES, ManifestBuilder, opened
from hyper2kvmd.authoring.rewrite import Dialect
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import open_directory, timestamp
from hyper2kvmd.image import qemu_img
from hyper2kvmd.image.extents import look_beside
from hyper2kvmd.image.source import Source, open_disk
from hyper2kvmd.manifest import ovf
from hyper2kvmd.run import Tools
from hyper2kvmd.text import plain, show

_DISK_SUFFIXES = (*SUFFIXES, ".img")
# The data of a disk whose description has the name without this, and VMware's list of changed blocks.
_BELONGS = re.compile(r"(.+)-(?:flat|ctk)\.vmdk", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """What a manifest is to be made of: the disks' files in `directory`, in the order in which the guest sees them."""

    directory: Path
    vm_name: str
    disks: tuple[str, ...]
    descriptor: ovf.Ovf | None = None
    warnings: tuple[Finding, ...] = ()


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
    parts = _extents(directory)
    disks = [
        name
        for name in names
        if name.lower().endswith(_DISK_SUFFIXES) and name not in parts and not _belongs(name, names)
    ]
    if not disks:
        message = f"{directory} holds no disk images ({', '.join(_DISK_SUFFIXES)})"
        raise MigrationError(Code.DISK_MISSING, message, "Name the directory that the VM was exported to.")
    try:
        chosen = ovf.choose(names, name)
        descriptor = None if chosen is None else _descriptor(directory / chosen)
    except ovf.OvfError as error:
        return Found(directory, name, tuple(disks), None, (error.finding,))
    places = {name: place for place, name in enumerate(_files(descriptor, names))} if descriptor else {}
    disks.sort(key=lambda name: places.get(name, len(places)))
    name = vm_name or (descriptor and descriptor.vm_name) or name
    return Found(directory, name, tuple(disks), descriptor, descriptor.warnings if descriptor else ())


def of_descriptor(path: Path, vm_name: str | None) -> Found:
    """The disks that an .ovf names, which lie beside it. Raise MigrationError or OSError."""
    try:
        descriptor = _descriptor(path)
    except ovf.OvfError as error:
        finding = error.finding
        hint = "Export the VM again, or name the disk files instead of the descriptor."
        raise MigrationError(Code.MANIFEST_INVALID, finding.message, hint) from None
    disks = _files(descriptor, os.listdir(path.parent))
    if not disks:
        message = f"{path} names no disks with content"
        raise MigrationError(Code.DISK_MISSING, message, "Export the VM again, or name the disk files themselves.")
    empty = sum(disk.file is None for disk in descriptor.disks)
    warnings = descriptor.warnings
    if empty:
        message = f"{show(path.name)} describes {empty} disk{'s' * (empty > 1)} without a file: left out"
        warnings += (Finding("disk_empty", message, "Add an empty disk to the VM once it runs, if it needs one."),)
    return Found(path.parent, vm_name or descriptor.vm_name or path.stem, disks, descriptor, warnings)


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

    digests: what is known already of the files' SHA-256, by their names. on_progress: gets a name and the ratio done.
    """
    warnings, sizes, boots = list(found.warnings), dict[str, int](), list[frozenset[Firmware]]()
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
            checksum=digests.get(file, True) if checksum else False,
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
        return os.pread(source.image, bootsector.READ_BYTES, 0)
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


def _files(descriptor: ovf.Ovf, names: Sequence[str]) -> tuple[str, ...]:
    """The files of the descriptor's disks. The standard has URIs there, but not all writers do."""
    written = [disk.file for disk in descriptor.disks if disk.file is not None]
    return tuple(dict.fromkeys(file if file in names else unquote(file) for file in written))


def _extents(directory: Path) -> frozenset[str]:
    """The files in a directory that are parts of disks which others there describe."""
    fd = open_directory(directory.resolve())
    try:
        return look_beside(fd, "any").extents
    finally:
        os.close(fd)


def _belongs(name: str, names: Sequence[str]) -> bool:
    found = _BELONGS.fullmatch(name)
    return found is not None and f"{found[1]}.vmdk" in names


def _natural(name: str) -> tuple[tuple[str, int], ...]:
    """A key by which disk-2 comes before disk-10."""
    return tuple((text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d{0,18})", name))
