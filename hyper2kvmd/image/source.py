"""The disks of an export, each opened once and examined, without following links.

From then on every tool gets that very file, as /proc/PID/fd/N, with its format spelled out. So nothing can be put in
its place, and nothing is guessed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from hyper2kvmd.errors import Cancelled, Code, Collected, Finding, MigrationError
from hyper2kvmd.files import OURS, inside, open_directory_of, open_file
from hyper2kvmd.image.extents import check_whole, delta_of, look_beside
from hyper2kvmd.image.header import examine, examine_extent
from hyper2kvmd.image.header.reader import SECTOR, Header
from hyper2kvmd.image.header.vmdk import descriptor_for
from hyper2kvmd.image.members import is_archive_name, places, unpack_command
from hyper2kvmd.manifest import Disk
from hyper2kvmd.text import plain, show

DEPTH_LIMIT = 4
BLOCK = 4 << 20
_FINISH_EXPORT = "Copy it there, or export the VM again. `hyper2kvmctl manifest relocate` changes paths in a manifest."


def _path(fd: int) -> str:
    return f"/proc/{os.getpid()}/fd/{fd}"


@dataclass(frozen=True)
class OpenDisk:
    """An open file of an export: `name` is its path inside the export, the rest is how it was when opened.

    One in an archive has the archive's path before its own name (`web01.ova/disk1.vmdk`); it begins at `start` of it,
    and `archive_bytes` is the size of the whole.
    """

    fd: int
    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    start: int = 0
    archive_bytes: int | None = None

    @property
    def file_name(self) -> str:
        """The path inside the export of the file that is open: the archive's, for one in an archive."""
        return self.name if self.archive_bytes is None else self.name.rpartition("/")[0]

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer from there on as far as the file goes, and return how many bytes that were. Raise OSError."""
        return os.preadv(self.fd, [buffer[: max(0, self.size - offset)]], self.start + offset)

    @property
    def path(self) -> str:
        """A path that means this very file to us and to our children, whatever happens to its name."""
        return _path(self.fd)

    def unchanged(self) -> bool:
        """Whether the file is as it was when it was opened."""
        now = os.fstat(self.fd)
        # Whoever writes to a file can put its modification time back, but not its change time.
        size = self.size if self.archive_bytes is None else self.archive_bytes
        return (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (size, self.mtime_ns, self.ctime_ns)


@dataclass(frozen=True)
class Source:
    """A disk of the manifest, open and examined.

    `file` is what the manifest names, and what its checksum is about. It holds the disk, or describes the `extents`
    that do. `image` is the open file that qemu gets: that one, or its only extent, or a description of our own in
    memory, in which the extents have paths that nobody can put another file at. `field` is its place in the manifest,
    such as `disks[0]`.
    """

    disk: Disk
    file: OpenDisk
    extents: tuple[OpenDisk, ...]
    image: int
    header: Header
    field: str
    warnings: tuple[Finding, ...] = ()

    @property
    def files(self) -> tuple[OpenDisk, ...]:
        """The files of the export that the disk is read from."""
        return (self.file, *self.extents)

    @property
    def name(self) -> str:
        """The path inside the export of the file that the manifest names."""
        return self.file.name

    @property
    def size(self) -> int:
        """The bytes of that file."""
        return self.file.size

    @property
    def virtual_size(self) -> int:
        """The bytes of the disk that the guest sees."""
        return self.header.virtual_size

    @property
    def node(self) -> str:
        """The source as a name for qemu: this driver on this file, read-only, and nothing else."""
        file: dict[str, Any] = {"driver": "file", "filename": _path(self.image), "read-only": True}
        if self.file.archive_bytes is not None:
            window = {"offset": self.file.start, "size": self.size}
            file = {"driver": "raw", "read-only": True, **window, "file": file}
        return "json:" + json.dumps(_node(self.header.format, file), separators=(",", ":"))


def _node(driver: str, file: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = {"driver": driver, "read-only": True, "file": file}
    if driver in ("qcow2", "vmdk"):
        node["backing"] = None
    if driver == "vpc":
        # Without it qemu computes the size from the geometry for some makers, and cuts off the end of the disk.
        node["force_size_calc"] = "current_size"
    return node


def open_sources(
    export_fd: int, export_dir: Path, disks: Sequence[Disk], stack: contextlib.ExitStack, problems: Collected
) -> tuple[Source, ...]:
    """Open and examine the disks of a manifest; `stack` closes them. Those that cannot be used are left out.

    `export_fd` is the export's directory, `export_dir` its path as in the manifest. `problems` gets, with
    the disk's field in the manifest: disk_missing, disk_size, export_unsafe, or those of header.examine().
    """
    sources = []
    taken: dict[tuple[int, int, int], str] = {}
    for index, disk in enumerate(disks):
        field = f"disks[{index}]"
        try:
            source = _open_source(export_fd, export_dir, disk, stack, field)
            for file in source.files:
                other = taken.setdefault((file.device, file.inode, file.start), disk.id)
                if other != disk.id:
                    raise MigrationError(
                        Code.EXPORT_UNSAFE,
                        f"{export_dir / file.name} is the file of two disks, {other} and {disk.id}",
                        "Give each disk its own file, or remove one of the two from the manifest.",
                        field=f"{field}.local_path",
                    )
        except MigrationError as error:
            wrong = "source_format" if error.code == Code.FORMAT_MISMATCH else "local_path"
            error.field = error.field or f"{field}.{wrong}"
            problems.errors.append(error)
            continue
        sources.append(source)
    return tuple(sources)


def _open_source(export_fd: int, export_dir: Path, disk: Disk, stack: contextlib.ExitStack, field: str) -> Source:
    file, warnings = open_disk(export_fd, export_dir, disk.path, f"{field}.local_path")
    stack.callback(os.close, file.fd)
    name = str(export_dir / file.name)
    beside = look_beside(export_fd, file.name)
    check_whole(beside, file.name, disk.format, name)
    header = examine(file.fd, file.size, disk.format, name, file.start)
    if header.extents and file.archive_bytes is not None:
        what = f"{name} describes a disk in several files, which is not read from an archive"
        hint = f"Unpack it: {unpack_command(export_dir / file.file_name)}."
        raise MigrationError(Code.FORMAT_UNSUPPORTED, what, hint)
    extents = []
    for extent in header.extents:
        path = str(PurePosixPath(file.name).with_name(extent.file))
        opened, _ = open_disk(export_fd, export_dir, path, f"{field}.local_path")
        stack.callback(os.close, opened.fd)
        examine_extent(opened.fd, opened.size, extent, str(export_dir / opened.name))
        extents.append(opened)
    image = extents[0].fd if extents and header.format == "raw" else file.fd
    if extents and header.format != "raw":
        image = os.memfd_create("descriptor", os.MFD_CLOEXEC)
        stack.callback(os.close, image)
        paths = (opened.path for opened in extents)
        os.write(image, descriptor_for([*zip(header.extents, paths, strict=True)]))
    if extents and disk.sha256 is not None:
        data = extents[0].name + (f" and {len(extents) - 1} more" if len(extents) > 1 else "")
        warnings += (
            Finding(
                "checksum_partial",
                f"the checksum of {disk.id} covers the description {file.name}, not the data in {data}",
                "Export as OVF or OVA, which has both in one file.",
                f"{field}.checksum",
            ),
        )
    if delta := delta_of(beside, file.name):
        warnings += (
            Finding(
                "snapshot_beside",
                f"{plain(delta)} beside {plain(file.name)} is the delta of a snapshot of it: what the VM wrote after"
                " the snapshot is not in this disk",
                "If the VM used it, consolidate its snapshots, and export it again.",
                f"{field}.local_path",
            ),
        )
    held = sum(opened.size for opened in extents)
    if disk.bytes not in (file.size, held, file.size + held, header.virtual_size):
        size = Finding(
            Code.DISK_SIZE,
            f"{name} has {file.size} bytes and holds a disk of {header.virtual_size}, the manifest says {disk.bytes}",
            "Copy it again; or, if it is complete, have `hyper2kvmctl manifest rehash` correct the number.",
            f"{field}.bytes",
        )
        if disk.sha256 is None:
            raise MigrationError(Code.DISK_SIZE, size.message, size.hint, field=size.field)
        warnings += (size,)  # the checksum will tell
    return Source(disk, file, tuple(extents), image, header, field, warnings)


def open_disk(export_fd: int, export_dir: Path, local_path: str, field: str) -> tuple[OpenDisk, tuple[Finding, ...]]:
    """Open one file of an export, and say if it was not where the manifest says.

    An absolute path must lie inside the export; one that does not is stale, and its last part is looked for
    beside the manifest. Raise MigrationError (disk_missing, export_unsafe, io_error).
    """
    warnings: tuple[Finding, ...] = ()
    path = PurePosixPath(inside(local_path, export_dir))
    if local_path.startswith("/") and not PurePosixPath(local_path).is_relative_to(export_dir):
        message = f"{local_path} is outside of the export: using {path} beside the manifest"
        warnings = (Finding("path_stale", message, "Nothing to do if that is the right file.", field),)
    if not path.parts or ".." in path.parts or len(path.parts) > DEPTH_LIMIT:
        raise _unsafe(f"{local_path} does not name a file inside {export_dir}", field)
    if OURS.fullmatch(path.name):
        raise _unsafe(f"{local_path} is a file of hyper2kvmd, not a disk", field)
    if len(path.parts) > 1 and is_archive_name(path.parent.name) and not _is_directory(export_fd, path.parent):
        archive, _ = open_disk(export_fd, export_dir, str(path.parent), field)
        try:
            return _member(archive, export_dir, path, field), warnings
        except (MigrationError, OSError):
            os.close(archive.fd)
            raise
    full = export_dir / path
    fd = -1
    try:
        fd = open_directory_of(export_fd, str(path))
        # Looked at first because opening can have effects: a tape rewinds, a FIFO wakes its writer.
        _check_plain(os.stat(path.name, dir_fd=fd, follow_symlinks=False), full, field)
        file = open_file(path.name, dir_fd=fd)
    except FileNotFoundError:
        hint = _FINISH_EXPORT
        with contextlib.suppress(OSError):
            os.stat(f"{path.name}.000000000", dir_fd=fd, follow_symlinks=False)
            hint = (
                "It is there in chunks: name the .ovf to `hyper2kvmctl manifest create`, which joins them; or join them"
                f" with `cat {plain(path.name)}.0* > {plain(path.name)}`."
            )
        raise MigrationError(Code.DISK_MISSING, f"{full} does not exist", hint, field=field) from None
    except PermissionError as error:
        hint = "Let the user of the service read it, for example with `setfacl -m u:hyper2kvmd:r`."
        message = f"{full} cannot be read: {error.strerror}"
        raise MigrationError(Code.DISK_MISSING, message, hint, field=field) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise _unsafe(f"{full} leads through something that is not a plain directory", field) from None
        message = f"{full} cannot be opened: {error.strerror}"
        raise MigrationError(Code.IO_ERROR, message, "Look at that file system.", field=field) from None
    finally:
        if fd >= 0:
            os.close(fd)
    status = os.fstat(file)
    try:
        _check_plain(status, full, field)
    except MigrationError:
        os.close(file)
        raise
    opened = OpenDisk(
        file,
        str(path),
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return opened, warnings


def _is_directory(export_fd: int, path: PurePosixPath) -> bool:
    with contextlib.suppress(OSError):
        fd = open_directory_of(export_fd, str(path))
        try:
            return stat.S_ISDIR(os.stat(path.name, dir_fd=fd, follow_symlinks=False).st_mode)
        finally:
            os.close(fd)
    return False


def _member(archive: OpenDisk, export_dir: Path, path: PurePosixPath, field: str) -> OpenDisk:
    """A file in an archive, which is open already. Raise MigrationError."""
    try:
        found = places(archive.fd, export_dir / path.parent)
    except MigrationError as error:
        error.field = field
        raise
    if path.name not in found:
        message = f"{export_dir / path.parent} holds no file {show(path.name)}"
        raise MigrationError(Code.DISK_MISSING, message, "Copy the archive again, or export the VM again.", field=field)
    place = found[path.name]
    if place.size % SECTOR:
        message = f"{export_dir / path} has {place.size} bytes, and only whole sectors can be read from an archive"
        hint = f"Unpack it: {unpack_command(export_dir / path.parent)}."
        raise MigrationError(Code.FORMAT_UNSUPPORTED, message, hint, field=field)
    return replace(archive, name=str(path), start=place.start, size=place.size, archive_bytes=archive.size)


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


def _check_plain(status: os.stat_result, path: Path, field: str) -> None:
    """Refuse what is not a file of its own: a link could lead to any file that we can read and others cannot."""
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is not None:
        raise _unsafe(f"{path} is {kind}, not a plain file", field)
    if status.st_nlink != 1:
        raise _unsafe(f"{path} has {status.st_nlink} names (hard links)", field)


def _unsafe(message: str, field: str) -> MigrationError:
    hint = "Put a copy of the disk itself into the export (`cp --reflink=auto` is quick), not a link to it."
    return MigrationError(Code.EXPORT_UNSAFE, message, hint, field=field)


def check_unchanged(source: Source) -> None:
    """Raise MigrationError (source_changed) if a file of the source was written to or replaced since it was opened."""
    changed = [file for file in source.files if not file.unchanged()]
    # A program that has the file mapped can write to it a while before the file's times say so.
    if not changed and _examined(source) != source.header:
        changed = [source.file]
    if changed:
        raise MigrationError(
            Code.SOURCE_CHANGED,
            f"{changed[0].name} was changed while it was being migrated",
            "Nothing was published. Wait until the exporter is done, then run `hyper2kvmctl retry`.",
        )


def _examined(source: Source) -> Header | None:
    with contextlib.suppress(MigrationError):
        file = source.file
        header = examine(file.fd, file.size, source.disk.format, source.name, file.start)
        for extent, file in zip(header.extents, source.extents, strict=False):
            examine_extent(file.fd, file.size, extent, file.name)
        return header
    return None


def verify_checksum(source: Source, cancel: threading.Event, on_progress: Callable[[float], None]) -> str:
    """Compute the checksum of the source and hold it against the manifest's, which must be there; return it.

    Raise MigrationError (checksum_mismatch), Cancelled or OSError.
    """
    digest = sha256(source, cancel, on_progress)
    check_checksum(source, digest)
    return digest


def check_checksum(source: Source, digest: str) -> None:
    """Hold the checksum of the source against the manifest's, which must be there.

    Raise MigrationError (checksum_mismatch).
    """
    if digest != source.disk.sha256:
        raise MigrationError(
            Code.CHECKSUM_MISMATCH,
            f"{source.name} has sha256 {digest}, the manifest says {source.disk.sha256}",
            "The file is not what was exported: copy it again, or export the VM again.",
            field=f"{source.field}.checksum",
        )


def sha256(source: Source, cancel: threading.Event, on_progress: Callable[[float], None]) -> str:
    """The SHA-256 of the file that the manifest names, in hexadecimal. Raise Cancelled or OSError.

    `on_progress` gets the ratio done, from 0 to 1.
    """
    file = source.file
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))
    done = 0
    # Positional reads: the offset of the descriptor belongs to nobody.
    while count := file.read_into(block, done):
        if cancel.is_set():
            raise Cancelled
        digest.update(block[:count])
        done += count
        on_progress(min(done / file.size, 1.0))
    return digest.hexdigest()
