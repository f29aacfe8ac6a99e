"""qemu-img: measure, convert, check and compare disks, and lay an overlay onto one."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import create_file
from hyper2kvmd.image.publish import output_exists
from hyper2kvmd.image.source import Source, check_unchanged
from hyper2kvmd.run import Done, Tools, storage_failed

# A hostile header that slipped through must not take the machine's memory or an hour of its time.
INFO_LIMITS = ("--as=1073741824", "--cpu=30", "--fsize=0", "--core=0")
WORK_LIMITS = ("--as=4294967296", "--core=0")


def versions(tools: Tools) -> dict[str, str]:
    """The version of qemu-img, for the report."""
    words = tools.run("qemu-img", "--version").stdout.split()
    return {"qemu-img": words[2] if len(words) > 2 else "unknown"}


def check_source(tools: Tools, source: Source) -> None:
    """Have qemu-img confirm what the headers said, and look for damage.

    Raise MigrationError: image_unsafe if it finds another file behind the image, image_corrupt.
    """
    limits = (*INFO_LIMITS, f"--nofile={64 + len(source.extents)}")
    done = tools.run("qemu-img", "info", "--output=json", source.node, accept=(0, 1), limits=limits)
    if done.returncode:
        raise _damaged(source, done.stderr)
    info = json.loads(done.stdout)
    data = info.get("format-specific", {}).get("data", {})
    others = [info[key] for key in ("backing-filename", "full-backing-filename") if key in info]
    others += [data["data-file"]] if "data-file" in data else []
    ours = {file.path for file in source.files}
    extents = (extent["filename"] for extent in data.get("extents", ()))
    others += [name for name in extents if not ours & {*_PATHS.findall(name)}]
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


_PATHS = re.compile(r"/proc/[0-9]+/fd/[0-9]+")


def _unchanged(source: Source) -> str:
    """The source as a name for qemu, if it is still what was examined. Raise MigrationError (source_changed)."""
    check_unchanged(source)
    return source.node


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


def measure(tools: Tools, source: Source) -> int:
    """The bytes that the source can take when it is converted, to whatever format, without a fix."""
    # For qcow2 that is what all its data takes uncompressed. Compressed it is never more, as a cluster that does not
    # get smaller is left as it is; and raw files are written with holes, though for them qemu-img counts these as well.
    done = tools.run(
        "qemu-img", "measure", "--output=json", "-O", "qcow2", _unchanged(source), limits=WORK_LIMITS
    )  # fmt: skip
    return int(json.loads(done.stdout)["required"])


def create_overlay(tools: Tools, overlay: Path, source: Source) -> None:
    """Create a qcow2 file that starts as the source, and takes all writes in its place."""
    overlay.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    tools.run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", _unchanged(source), "-F", source.header.format,
        overlay, str(source.virtual_size), limits=WORK_LIMITS,
    )  # fmt: skip


def create_throw_away(tools: Tools, overlay: Path, disk: Path, format: str) -> None:
    """Create a qcow2 file that starts as a disk of ours, and takes all writes in its place."""
    tools.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", format, overlay, limits=WORK_LIMITS)


def make_target(target: Path) -> None:
    """Make the empty file that a converted disk fills, as ours and nobody else's. Raise OSError or MigrationError."""
    try:
        # qemu-img would follow a link that somebody put there.
        os.close(create_file(target, 0o600))
    except FileExistsError:
        raise output_exists(target) from None


def convert(
    tools: Tools,
    source: Source,
    target: Path,
    format: str,
    *,
    compress: bool,
    on_progress: Callable[[float], None],
) -> None:
    """Convert the source to `target` (absolute), which make_target() made, as `qcow2` or `raw`.

    `on_progress` gets the ratio done, from 0 to 1. Raise MigrationError or Cancelled.
    """
    node = _unchanged(source)
    try:
        tools.run(
            "qemu-img", "convert", "-p", "-O", format,
            # The checksum is computed at the same time: what one reads, the other finds in the page cache.
            "-T", "writeback",
            "-t", _cache(target),
            *(("-c", "-o", "compression_type=zstd") if compress and format == "qcow2" else ()),
            *(("-W",) if compress or source.header.format in _OUT_OF_ORDER else ()),
            node, target,
            on_output=_Progress(on_progress), limits=WORK_LIMITS,
        )  # fmt: skip
    except MigrationError as error:
        if error.code == Code.TOOL_FAILED and "while reading" in error.tail:
            raise _damaged(source, error.tail) from None
        raise


# Where -W, clusters that are written as they come, gains more than a fifth: docs/convert.md has what was measured. More
# coroutines (-m) and io_uring gain nothing beside it.
_OUT_OF_ORDER = ("vhdx", "vpc", "vdi")


class _Progress:
    """Finds `(12.34/100%)` in what qemu-img -p writes, however it is cut into pieces; `rest` is what it said last."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self.tell = tell
        self.rest = b""

    def __call__(self, data: bytes) -> None:
        self.rest += data
        *_, last = [None, *re.finditer(rb"\(([0-9.]+)/100%\)", self.rest)]
        if last is not None:
            self.tell(min(float(last[1]) / 100, 1.0))
            self.rest = self.rest[last.end() :]
        self.rest = self.rest[-4096:]


def commit(tools: Tools, overlay: Path, target: Path, format: str, *, on_progress: Callable[[float], None]) -> None:
    """Write what the overlay holds onto `target`, which must be the source converted to `format`.

    The overlay keeps its content, and from here on means "target, changed". `on_progress` gets the ratio done.
    """
    _rebase(tools, overlay, str(target), format)
    tools.run(
        "qemu-img", "commit", "-p", "-d", "-f", "qcow2", "-t", _cache(target), overlay,
        on_output=_Progress(on_progress), limits=WORK_LIMITS,
    )  # fmt: skip


def _rebase(tools: Tools, overlay: Path, backing: str, format: str) -> None:
    """Say only what the overlay lies on; nothing is read or copied."""
    tools.run("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, overlay, limits=WORK_LIMITS)


def check_target(tools: Tools, target: Path, format: str, virtual_size: int) -> None:
    """Check a disk that we wrote. Raise MigrationError (validation_failed)."""
    info = tools.run(
        "qemu-img", "info", "--output=json", "-f", format, target, accept=(0, 1), limits=(*INFO_LIMITS, "--nofile=64")
    )
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
    return storage_failed(f"{target} cannot be checked", done) or MigrationError(
        Code.VALIDATION_FAILED,
        f"{target} is not what it should be: {what}",
        "Nothing was published. Look at the host's storage and memory, then run `hyper2kvmctl retry`.",
        tail=(done.stdout + done.stderr)[-4096:],
    )


def compare(
    tools: Tools,
    source: Source,
    overlay: Path | None,
    target: Path,
    format: str,
    *,
    on_progress: Callable[[float], None],
) -> None:
    """Prove that a guest sees in `target` what it would see in the source, or in the overlay on the source.

    `on_progress` gets the ratio done. Raise MigrationError (validation_failed).
    """
    expected: tuple[str | Path, ...] = (_unchanged(source),)
    if overlay is not None:
        # After a commit it lies on the target, and would be compared with itself.
        _rebase(tools, overlay, source.node, source.header.format)
        expected = ("-f", "qcow2", overlay)
    progress = _Progress(on_progress)
    done = tools.run(
        "qemu-img", "compare", "-p", "-T", "writeback", "-F", format, *expected, target,
        accept=(0, 1), on_output=progress, limits=WORK_LIMITS,
    )  # fmt: skip
    if done.returncode:
        raise _invalid(target, progress.rest.decode(errors="replace").strip() or done.stderr.strip(), done)


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
