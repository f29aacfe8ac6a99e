"""One libguestfs appliance with all disks of a guest: started, watched for cancellation, and shut down."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hyper2kvmd.accel import KERNELS, kernels
from hyper2kvmd.errors import Cancelled, Code, MigrationError
from hyper2kvmd.guest.change import decode
from hyper2kvmd.memory import available
from hyper2kvmd.run import TAIL_LINES, Tools, qemu, tail
from hyper2kvmd.text import printable

CANCEL_POLL_SECONDS = 0.2
LOG_LINES = 200
MAX_TEXT_BYTES = 1 << 20
# Emulated on a busy host it takes minutes; what takes longer hangs, as an emulation of several CPUs may.
LAUNCH_SECONDS = 600.0


@dataclass(frozen=True)
class Session:
    """A running appliance. `g` is the libguestfs handle: the disks are /dev/sda, /dev/sdb, ... in order.

    `tools` are the job's, for what is done outside of the appliance.
    """

    g: Any
    disks: tuple[Path, ...]
    tools: Tools

    def version(self) -> dict[str, Any]:
        """The version of libguestfs: `major`, `minor`, `release`."""
        version: dict[str, Any] = self.g.version()
        return version


def check_host() -> None:
    """Check what can be checked of libguestfs without starting an appliance.

    Raise MigrationError: tool_missing, appliance_failed for a host whose kernel this user cannot read.
    """
    _load()
    qemu()
    if {"LIBGUESTFS_PATH", "SUPERMIN_KERNEL"} & os.environ.keys():
        return  # the appliance, or its kernel, is somebody's own
    found = kernels()
    if not any(os.access(path, os.R_OK) for path in found):
        raise MigrationError(
            Code.APPLIANCE_FAILED,
            f"the libguestfs appliance is made from this host's kernel, and {KERNELS} holds "
            f"{'none that this user may read' if found else 'none'}",
            f"`chmod 0644 {KERNELS}/vmlinuz-*` (Ubuntu: dpkg-statoverride), or install a kernel package.",
        )


@contextlib.contextmanager
def open_guest(
    disks: Sequence[tuple[Path, str]],
    *,
    accel: str,
    memory_mb: int,
    tools: Tools,
    launch_seconds: float = LAUNCH_SECONDS,
) -> Iterator[Session]:
    """Start one appliance with all `disks` (path and format, in the guest's order), writable.

    accel: "kvm" or "tcg". memory_mb: the appliance's memory in MiB. launch_seconds: how long its start may take.
    `tools.cancel`, set from another thread, ends the appliance within a second, also while it starts.
    The disks must be overlays that are thrown away unless the block ends without an error.
    Raise MigrationError (tool_missing, appliance_failed, fix_failed) or Cancelled.
    """
    guestfs = _load()
    cancel = tools.cancel
    g = guestfs.GuestFS(python_return_dict=True)
    console = _Console()
    late = threading.Event()
    limit = threading.Timer(launch_seconds, late.set)
    with contextlib.ExitStack() as stack:
        stack.callback(limit.cancel)
        stack.callback(g.close)
        g.set_event_callback(console.add, guestfs.EVENT_APPLIANCE | guestfs.EVENT_LIBRARY)
        stack.enter_context(_killed_by((cancel, late), disks[0][0]))
        limit.start()
        failed = partial(_launch_failed, console=console, memory_mb=memory_mb, launch_seconds=launch_seconds, late=late)
        with _translated(cancel, failed):
            _configure(g, disks, accel, memory_mb)
            g.launch()
            limit.cancel()
            if late.is_set():  # just now: it is being killed
                raise RuntimeError
        with _translated(cancel, lambda error: _work_failed(error, console)):
            yield Session(g, tuple(path for path, _ in disks), tools)
            # What the appliance could not write to the overlays shows here, and only here.
            g.umount_all()
            g.shutdown()


def read_text(g: Any, path: str) -> str | None:
    """The text of a file in the guest (at most 1 MiB), or None if there is no such file."""
    if not can_be_asked_for(path) or not g.is_file(path, followsymlinks=True):
        return None
    # One answer of the appliance, where read_file is a file that is sent, which takes ten times as long; more than the
    # limit and a byte does not fit into one.
    data: bytes = g.pread(path, MAX_TEXT_BYTES + 1, 0)
    return None if len(data) > MAX_TEXT_BYTES else decode(data)


def can_be_asked_for(path: str) -> bool:
    """Whether a path is one that libguestfs takes: UTF-8. One that a guest's file has may be in an older encoding."""
    try:
        return "\0" not in path and bool(path.encode())
    except UnicodeEncodeError:
        return False


def spelt(g: Any, path: str) -> str | None:
    """A path in any case as it is spelt on a file system of Windows, or None if it is not there.

    It need not be readable: ntfs-3g shows what Windows itself compressed (CompactOS) as links to nowhere. A directory
    is listed only where the spelling is another, as that of System32 has thousands of names.
    """

    def there(path: str) -> bool:
        return bool(g.exists(path) or g.is_symlink(path))

    try:
        if there(path):
            return path
        at = ""
        for name in filter(None, path.split("/")):
            found: str | None = name
            if not there(f"{at}/{name}"):
                found = next((one for one in g.ls(at or "/") if one.lower() == name.lower()), None)
            if found is None:
                return None
            at = f"{at}/{found}"
    except RuntimeError:  # it leads through a file, or is longer than a path can be
        return None
    return at or "/"


def shell(g: Any, command: str) -> tuple[int, str]:
    """Run a command in the guest with its own /bin/sh, and return its exit status and all of its output, printable.

    libguestfs has /dev, /proc and /sys there, and no network.
    """
    # On failure libguestfs keeps only what was written to stderr, which need not say what went wrong.
    lines = g.sh(f'( {command}\n) 2>&1; echo "; $?"').strip().split("\n")
    before, _, status = lines[-1].rpartition("; ")
    return int(status), "\n".join(printable(line, 1000) for line in [*lines[:-1], before] if line.strip())


def last_line(output: str) -> str:
    """What a program said last, "nothing" if it was silent."""
    return output.rpartition("\n")[2] or "nothing"


def _configure(g: Any, disks: Sequence[tuple[Path, str]], accel: str, memory_mb: int) -> None:
    g.set_backend("direct")
    g.set_backend_settings(["force_tcg"] if accel == "tcg" else [])
    g.set_network(False)
    g.set_autosync(True)
    g.set_pgroup(True)  # a Ctrl-C meant for us must not end the appliance behind our back
    g.set_memsize(memory_mb)
    # Measured without KVM: with a second virtual CPU two initramfs rebuilds at once take 39 s instead of 68 s.
    # It does nothing for one rebuild, and more than four kernels are rare.
    g.set_smp(min(4, os.cpu_count() or 1))
    for path, format in disks:
        # "unsafe" only ignores flushes. QEMU still writes everything to the file when it ends, later steps read
        # the file through the same page cache, and an overlay from a crashed host is never used again. So the
        # guest's journal does not have to wait for a host disk that is busy converting.
        g.add_drive_opts(str(path), format=format, cachemode="unsafe")


class _Console:
    """The last lines that the appliance and libguestfs wrote; a callback of libguestfs."""

    def __init__(self) -> None:
        self._chunks: deque[str] = deque(maxlen=LOG_LINES)

    def add(self, event: int, handle: int, chunk: str | bytes, array: Any) -> None:
        """Keep a piece of output."""
        text = chunk.decode(errors="replace") if isinstance(chunk, bytes) else chunk
        self._chunks.append(text[-4096:])

    def tail(self) -> str:
        """The last lines, printable."""
        lines = re.split(r"[\r\n]+", "".join(self._chunks))
        return "\n".join([printable(line) for line in lines if line.strip()][-TAIL_LINES:])


@contextlib.contextmanager
def _translated(cancel: threading.Event, explain: Callable[[RuntimeError], MigrationError]) -> Iterator[None]:
    """Turn libguestfs's only exception into ours, or into Cancelled if that is what ended the appliance."""
    try:
        yield
    except RuntimeError as error:
        if cancel.is_set():
            raise Cancelled from None
        raise explain(error) from error
    except UnicodeDecodeError as error:
        # libguestfs's binding takes what the appliance answers, such as the names in a directory, for UTF-8.
        raise MigrationError(
            Code.FIX_FAILED,
            f"the guest has a file whose name is not UTF-8: {printable(error.object.decode('latin-1'))}",
            "Rename it on VMware (`convmv` does that for many), and export the VM again.",
        ) from error
    if cancel.is_set():
        raise Cancelled


@contextlib.contextmanager
def _killed_by(reasons: Sequence[threading.Event], disk: Path) -> Iterator[None]:
    """Kill the appliance that has `disk` when one of `reasons` is set, for as long as the block runs."""
    over = threading.Event()

    def watch() -> None:
        while not any(reason.is_set() for reason in reasons):
            if over.wait(CANCEL_POLL_SECONDS):
                return
        # Again and again: while it starts, libguestfs runs one helper after the other.
        while not over.wait(CANCEL_POLL_SECONDS):
            for pid in _appliance(disk):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    watcher = threading.Thread(target=watch, name="guest-cancel", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _appliance(disk: Path) -> list[int]:
    """The children of this process that libguestfs started for `disk`, and supermin, which builds the appliance.

    libguestfs would say the number itself, but not to another thread while it launches.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes() if parent == os.getpid() else b""
        except (OSError, IndexError, ValueError):
            continue  # it ended while we looked
        program = command.partition(b"\0")[0]
        if b"supermin" in program or (b"qemu" in program and os.fsencode(disk) in command):
            found.append(int(entry.name))
    return found


def _load() -> Any:
    """The guestfs module, which comes with the distribution's libguestfs and from nowhere else."""
    try:
        import guestfs
    except ImportError as error:
        raise MigrationError(
            Code.TOOL_MISSING,
            f"the Python module guestfs cannot be loaded: {error}",
            "Install python3-guestfs (Debian) or python3-libguestfs (Fedora, RHEL, SUSE), and create the virtual "
            "environment with /usr/bin/python3 -m venv --system-site-packages.",
        ) from None
    return guestfs


def _launch_failed(
    error: RuntimeError, console: _Console, memory_mb: int, launch_seconds: float, late: threading.Event
) -> MigrationError:
    memory = available()
    what = f"it took longer than {launch_seconds:g} s" if late.is_set() else _last_line(error)
    if memory is not None and memory.mb < memory_mb:
        hint = (
            f"The appliance needs {memory_mb} MiB of memory, and {memory.holder} has {memory.mb} available: "
            f"lower workers or guest.memory_mb, or {memory.remedy}."
        )
    elif late.is_set():
        hint = "Look at the load of the host; run libguestfs-test-tool as this user to see where it hangs."
    else:
        hint = (
            f"Run libguestfs-test-tool as this user; raise guest.memory_mb (now {memory_mb}) if the output ends "
            "in an out-of-memory message."
        )
    return MigrationError(
        Code.APPLIANCE_FAILED,
        f"the libguestfs appliance did not start: {what}",
        hint,
        tail=console.tail(),
    )


def _work_failed(error: RuntimeError, console: _Console) -> MigrationError:
    hint = "Run fsck in the guest on VMware, check that its file systems have free space, and export it again."
    if "Operation not permitted" in str(error):  # root may do everything else
        hint = "If `lsattr` shows an i for the file, run `chattr -i` on it in the guest on VMware, and export it again."
    return MigrationError(
        Code.FIX_FAILED,
        f"libguestfs could not work on the guest: {_last_line(error)}",
        hint,
        tail=tail(str(error)) or console.tail(),
    )


def _last_line(error: RuntimeError) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return printable(lines[0] if lines else "no message", 400)
