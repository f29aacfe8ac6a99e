"""Opens the disks of an export safely, and has qemu-img measure, convert, check and compare them.

A source is opened once, without following links, and looked at; from then on every tool gets that very file, as
/proc/PID/fd/N, with its format spelled out. So nothing can be put in its place, and nothing is guessed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import re
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hyper2kvmd import imageheader
from hyper2kvmd.errors import Cancelled, Code, Finding, MigrationError, Noted
from hyper2kvmd.imageheader import Header
from hyper2kvmd.manifest import Disk
from hyper2kvmd.run import Done, Tools

DEPTH_LIMIT = 4
BLOCK = 4 << 20
# A hostile header that slipped through must not take the machine's memory or an hour of its time.
INFO_LIMITS = ("--as=1073741824", "--cpu=30", "--fsize=0", "--nofile=64", "--core=0")
WORK_LIMITS = ("--as=4294967296", "--core=0")
_OURS = re.compile(r"\.hyper2kvmd\..*|migration-report(\.\d+)?\.json")
_FINISH_EXPORT = "Copy it there, or export the VM again. `hyper2kvmctl manifest relocate` changes paths in a manifest."


@dataclass(frozen=True)
class OpenDisk:
    """An open file of an export: `name` is its path inside the export, the rest is how it was when opened."""

    fd: int
    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int

    @property
    def path(self) -> str:
        """A path that means this very file to us and to our children, whatever happens to its name."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def unchanged(self) -> bool:
        """Whether the file is as it was when it was opened."""
        now = os.fstat(self.fd)
        return (now.st_size, now.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass(frozen=True)
class Source:
    """A disk of the manifest, open and examined.

    `file` is what the manifest names, and what its checksum is about. `data` holds the disk: the same file,
    or the flat extent that it describes. `field` is its place in the manifest, such as `disks[0]`.
    """

    disk: Disk
    file: OpenDisk
    data: OpenDisk
    header: Header
    field: str
    warnings: tuple[Finding, ...] = ()

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
        return "json:" + json.dumps(_node(self.header.format, self.data.path), separators=(",", ":"))


def _node(driver: str, path: str) -> dict[str, Any]:
    file = {"driver": "file", "filename": path, "read-only": True}
    node: dict[str, Any] = {"driver": driver, "read-only": True, "file": file}
    if driver in ("qcow2", "vmdk"):
        node["backing"] = None
    if driver == "vpc":
        # Without it qemu computes the size from the geometry for some makers, and cuts off the end of the disk.
        node["force_size_calc"] = "current_size"
    return node


def open_sources(
    export_fd: int, export_dir: Path, disks: Sequence[Disk], stack: contextlib.ExitStack, noted: Noted
) -> tuple[Source, ...]:
    """Open and examine the disks of a manifest; `stack` closes them. Those that cannot be used are left out.

    `export_fd` is the export's directory, `export_dir` its path as in the manifest. `noted` gets, with
    the disk's field in the manifest: disk_missing, disk_size, export_unsafe, or those of imageheader.examine().
    """
    sources = []
    taken: dict[tuple[int, int], str] = {}
    for index, disk in enumerate(disks):
        field = f"disks[{index}]"
        try:
            source = _open_source(export_fd, export_dir, disk, stack, field)
            for file in dict.fromkeys((source.file, source.data)):
                other = taken.setdefault((file.device, file.inode), disk.id)
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
            noted.errors.append(error)
            continue
        sources.append(source)
    return tuple(sources)


def _open_source(export_fd: int, export_dir: Path, disk: Disk, stack: contextlib.ExitStack, field: str) -> Source:
    file, warnings = open_disk(export_fd, export_dir, disk.path, f"{field}.local_path")
    stack.callback(os.close, file.fd)
    name = str(export_dir / file.name)
    header = imageheader.examine(file.fd, file.size, disk.format, name)
    data = file
    if header.flat_extent is not None:
        beside = str(PurePosixPath(file.name).with_name(header.flat_extent))
        data, _ = open_disk(export_fd, export_dir, beside, f"{field}.local_path")
        stack.callback(os.close, data.fd)
        if data.size != header.virtual_size:
            raise MigrationError(
                Code.IMAGE_CORRUPT,
                f"{export_dir / data.name} has {data.size} bytes, but {name} describes {header.virtual_size}",
                "Copy the disk again, or export the VM again.",
            )
        if disk.sha256 is not None:
            warnings += (
                Finding(
                    "checksum_partial",
                    f"the checksum of {disk.id} covers the description {file.name}, not the data in {data.name}",
                    "Export as OVF or OVA, which has both in one file.",
                    f"{field}.checksum",
                ),
            )
    if disk.bytes not in (file.size, data.size, header.virtual_size):
        size = Finding(
            Code.DISK_SIZE,
            f"{name} has {file.size} bytes and holds a disk of {header.virtual_size}, the manifest says {disk.bytes}",
            "Copy it again; or, if it is complete, have `hyper2kvmctl manifest rehash` correct the number.",
            f"{field}.bytes",
        )
        if disk.sha256 is None:
            raise MigrationError(Code.DISK_SIZE, size.message, size.hint, field=size.field)
        warnings += (size,)  # the checksum will tell
    return Source(disk, file, data, header, field, warnings)


def open_disk(export_fd: int, export_dir: Path, local_path: str, field: str) -> tuple[OpenDisk, tuple[Finding, ...]]:
    """Open one file of an export, and say if it was not where the manifest says.

    An absolute path must lie inside the export; one that does not is stale, and its last part is looked for
    beside the manifest. Raise MigrationError (disk_missing, export_unsafe, io_error).
    """
    warnings: tuple[Finding, ...] = ()
    path = PurePosixPath(local_path)
    if path.is_absolute():
        if path.is_relative_to(export_dir) and path != PurePosixPath(export_dir):
            path = path.relative_to(export_dir)
        else:
            path = PurePosixPath(path.name)
            message = f"{local_path} is outside of the export: using {path} beside the manifest"
            warnings = (Finding("path_stale", message, "Nothing to do if that is the right file.", field),)
    if not path.parts or ".." in path.parts or len(path.parts) > DEPTH_LIMIT:
        raise _unsafe(f"{local_path} does not name a file inside {export_dir}", field)
    if _OURS.fullmatch(path.name):
        raise _unsafe(f"{local_path} is a file of hyper2kvmd, not a disk", field)
    full = export_dir / path
    fd = os.dup(export_fd)
    try:
        for part in path.parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = inner
        # Looked at first because opening can have effects: a tape rewinds, a FIFO wakes its writer.
        _check_plain(os.stat(path.name, dir_fd=fd, follow_symlinks=False), full, field)
        file = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        raise MigrationError(Code.DISK_MISSING, f"{full} does not exist", _FINISH_EXPORT, field=field) from None
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
        os.close(fd)
    status = os.fstat(file)
    try:
        _check_plain(status, full, field)
    except MigrationError:
        os.close(file)
        raise
    opened = OpenDisk(file, str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return opened, warnings


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


def unchanged(source: Source) -> None:
    """Raise MigrationError (source_changed) if a file of the source was written to since it was opened."""
    for file in (source.file, source.data):
        if not file.unchanged():
            raise MigrationError(
                Code.SOURCE_CHANGED,
                f"{file.name} was changed while it was being migrated",
                "Nothing was published. Wait until the exporter is done, then run `hyper2kvmctl retry`.",
            )


def verify(source: Source, cancel: threading.Event, on_progress: Callable[[float], None]) -> str:
    """Compute the checksum of the source and hold it against the manifest's, which must be there; return it.

    Raise MigrationError (checksum_mismatch), Cancelled or OSError.
    """
    digest = sha256(source, cancel, on_progress)
    if digest != source.disk.sha256:
        raise MigrationError(
            Code.CHECKSUM_MISMATCH,
            f"{source.name} has sha256 {digest}, the manifest says {source.disk.sha256}",
            "The file is not what was exported: copy it again, or export the VM again.",
            field=f"{source.field}.checksum",
        )
    return digest


def sha256(source: Source, cancel: threading.Event, on_progress: Callable[[float], None]) -> str:
    """The SHA-256 of the file that the manifest names, in hexadecimal. Raise Cancelled or OSError.

    `on_progress` gets the ratio done, from 0 to 1.
    """
    fd, size = source.file.fd, source.file.size
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))
    done = 0
    # Positional reads: the offset of the descriptor belongs to nobody.
    while count := os.preadv(fd, [block], done):
        if cancel.is_set():
            raise Cancelled
        digest.update(block[:count])
        done += count
        on_progress(min(done / size, 1.0))
    return digest.hexdigest()


def versions(tools: Tools) -> dict[str, str]:
    """The version of qemu-img, for the report."""
    words = tools.run("qemu-img", "--version").stdout.split()
    return {"qemu-img": words[2] if len(words) > 2 else "unknown"}


def check_source(tools: Tools, source: Source) -> None:
    """Have qemu-img confirm what the headers said, and look for damage.

    Raise MigrationError: image_unsafe if it finds another file behind the image, image_corrupt.
    """
    done = tools.run("qemu-img", "info", "--output=json", source.node, accept=(0, 1), limits=INFO_LIMITS)
    if done.returncode:
        raise _damaged(source, done.stderr)
    info = json.loads(done.stdout)
    data = info.get("format-specific", {}).get("data", {})
    others = [info[key] for key in ("backing-filename", "full-backing-filename") if key in info]
    others += [data["data-file"]] if "data-file" in data else []
    others += [extent["filename"] for extent in data.get("extents", ()) if source.data.path not in extent["filename"]]
    if others:
        raise MigrationError(
            Code.IMAGE_UNSAFE,
            f"{source.name} refers to other files: {', '.join(map(repr, others))}",
            "Find out where this file comes from, then export the VM again.",
        )
    if info["virtual-size"] != source.virtual_size:
        raise MigrationError(
            Code.IMAGE_CORRUPT,
            f"{source.name}: its header says {source.virtual_size} bytes, qemu-img {info['virtual-size']}",
            "Convert the disk to another format on the host it comes from.",
        )
    done = tools.run("qemu-img", "check", "-q", source.node, accept=_CHECKED, limits=WORK_LIMITS)
    if done.returncode not in _SOUND:
        raise _damaged(source, done.stdout + done.stderr)


# qemu-img check: 0 sound, 1 could not be checked, 2 damaged, 3 only wasted space, 63 the format has no check.
_CHECKED = (0, 1, 2, 3, 63)
_SOUND = (0, 3, 63)


def _damaged(source: Source, output: str) -> MigrationError:
    last = (output.strip().splitlines() or ["(no message)"])[-1]
    return MigrationError(
        Code.IMAGE_CORRUPT,
        f"{source.name} is damaged: {last}",
        "Copy the disk again, or export the VM again.",
        tail=output[-4096:],
    )


def measure(tools: Tools, source: Source, format: str) -> int:
    """The bytes that the source will take when converted to `format`, uncompressed and without a fix."""
    done = tools.run(
        "qemu-img", "measure", "--output=json", "-O", format, source.node, limits=WORK_LIMITS
    )  # fmt: skip
    sizes = json.loads(done.stdout)
    # Raw files are written with holes, so that they take what a qcow2 takes, about.
    return int(sizes["required"])


def create_overlay(tools: Tools, overlay: Path, source: Source) -> None:
    """Create a qcow2 file that starts as the source, and takes all writes in its place."""
    overlay.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tools.run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", source.node, "-F", source.header.format,
        overlay, str(source.virtual_size), limits=WORK_LIMITS,
    )  # fmt: skip


def create_throw_away(tools: Tools, overlay: Path, disk: Path, format: str) -> None:
    """Create a qcow2 file that starts as a disk of ours, and takes all writes in its place."""
    tools.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", format, overlay, limits=WORK_LIMITS)


def convert(
    tools: Tools,
    source: Source,
    target: Path,
    format: str,
    *,
    compress: bool,
    on_progress: Callable[[float], None],
) -> None:
    """Convert the source to the new file `target` (absolute), as `qcow2` or `raw`.

    `on_progress` gets the ratio done, from 0 to 1. Raise MigrationError or Cancelled; then the caller removes
    `target`, which looks like an image and is none.
    """
    try:
        # Ours and nobody else's: qemu-img would follow a link that somebody put there.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise output_exists(target) from None
    try:
        tools.run(
            "qemu-img", "convert", "-p", "-O", format,
            # The checksum is computed at the same time: what one reads, the other finds in the page cache.
            "-T", "writeback",
            "-t", _cache(target),
            # Measured on a streamOptimized VMDK with 900 MiB in it: zstd 6 s, zlib 13 s, zstd with clusters written
            # out of order 3.4 s. Uncompressed, neither -W nor more coroutines than the default gain anything.
            *(("-c", "-W", "-o", "compression_type=zstd") if compress and format == "qcow2" else ()),
            source.node, target,
            on_output=_Progress(on_progress), limits=WORK_LIMITS,
        )  # fmt: skip
    except MigrationError as error:
        if error.code == Code.TOOL_FAILED and "while reading" in error.tail:
            raise _damaged(source, error.tail) from None
        raise


class _Progress:
    """Finds `(12.34/100%)` in what qemu-img -p writes, however it is cut into pieces."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self.tell = tell
        self.rest = b""

    def __call__(self, data: bytes) -> None:
        self.rest += data
        *_, last = [None, *re.finditer(rb"\(([0-9.]+)/100%\)", self.rest)]
        if last is not None:
            self.tell(min(float(last[1]) / 100, 1.0))
            self.rest = self.rest[last.end() :]
        self.rest = self.rest[-64:]


def commit(tools: Tools, overlay: Path, target: Path, format: str) -> None:
    """Write what the overlay holds onto `target`, which must be the source converted to `format`.

    The overlay keeps its content, and from here on means "target, changed".
    """
    _rebase(tools, overlay, str(target), format)
    tools.run("qemu-img", "commit", "-q", "-d", "-f", "qcow2", "-t", _cache(target), overlay, limits=WORK_LIMITS)


def _rebase(tools: Tools, overlay: Path, backing: str, format: str) -> None:
    """Say only what the overlay lies on; nothing is read or copied."""
    tools.run("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, overlay, limits=WORK_LIMITS)


def check_target(tools: Tools, target: Path, format: str, virtual_size: int) -> None:
    """Check a disk that we wrote. Raise MigrationError (validation_failed)."""
    info = tools.run("qemu-img", "info", "--output=json", "-f", format, target, accept=(0, 1), limits=INFO_LIMITS)
    done = info
    if info.returncode == 0:
        found = json.loads(info.stdout)
        if found["virtual-size"] != virtual_size or "backing-filename" in found:
            raise _invalid(target, f"it is a disk of {found['virtual-size']} bytes, not of {virtual_size}", info)
        if format == "raw":
            return
        done = tools.run("qemu-img", "check", "-q", "-f", format, target, accept=_CHECKED, limits=WORK_LIMITS)
    if done.returncode not in _SOUND:
        last = ((done.stdout + done.stderr).strip().splitlines() or ["(no message)"])[-1]
        raise _invalid(target, last, done)


def _invalid(target: Path, what: str, done: Done) -> MigrationError:
    return MigrationError(
        Code.VALIDATION_FAILED,
        f"{target} is not what it should be: {what}",
        "Nothing was published. Look at the host's storage and memory, then run `hyper2kvmctl retry`.",
        tail=(done.stdout + done.stderr)[-4096:],
    )


def compare(tools: Tools, source: Source, overlay: Path | None, target: Path, format: str) -> None:
    """Prove that a guest sees in `target` what it would see in the source, or in the overlay on the source.

    Raise MigrationError (validation_failed).
    """
    expected: tuple[str | Path, ...] = (source.node,)
    if overlay is not None:
        # After a commit it lies on the target, and would be compared with itself.
        _rebase(tools, overlay, source.node, source.header.format)
        expected = ("-f", "qcow2", overlay)
    done = tools.run(
        "qemu-img", "compare", "-T", "writeback", "-F", format, *expected, target, accept=(0, 1), limits=WORK_LIMITS
    )
    if done.returncode:
        raise _invalid(target, done.stdout.strip() or done.stderr.strip(), done)


def direct_io(file: Path) -> bool:
    """Whether a file can bypass the page cache, which tmpfs and some others refuse.

    Raise OSError if it cannot be read.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:  # aligned, as direct I/O wants it
            os.preadv(fd, [page], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:  # some take the flag and refuse the reading
            return False
        raise
    finally:
        os.close(fd)
    return True


def _cache(target: Path) -> str:
    """qemu's cache mode for what is written: without O_DIRECT a large disk pushes all else out of memory."""
    return "none" if direct_io(target) else "writeback"


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its final name in the same directory, durably, and never over another file.

    Raise MigrationError (output_exists) or OSError.
    """
    try:
        os.link(temporary, final, follow_symlinks=False)
    except FileExistsError:
        # A crash between the two steps leaves both names, and a second try finds them.
        if not os.path.samestat(temporary.lstat(), final.lstat()):
            raise output_exists(final) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        raise MigrationError(
            Code.OUTPUT_DENIED,
            f"{final.parent} is on a file system without hard links, which publishing without overwriting needs",
            "Set output_dir to a directory on a Linux file system.",
            field="output_dir",
        ) from None
    temporary.unlink()
    fd = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def output_exists(path: Path) -> MigrationError:
    """The error for a file that is in the way."""
    return MigrationError(
        Code.OUTPUT_EXISTS,
        f"{path} already exists",
        "If it is not needed, move it away; otherwise give the VM another name in the manifest."
        " Then run `hyper2kvmctl retry`.",
    )
