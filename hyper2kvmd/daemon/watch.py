"""Watching the exports directory: it is looked at again and again, and events only say when to look sooner."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from watchdog.events import DirCreatedEvent, DirMovedEvent, FileClosedEvent, FileMovedEvent, FileSystemEvent
from watchdog.observers import Observer

from hyper2kvmd.daemon.handover import Handover
from hyper2kvmd.daemon.pulse import Pulse
from hyper2kvmd.errors import Finding
from hyper2kvmd.queue import facts, requests
from hyper2kvmd.queue.hosts import Seen, all_hosts, drained_hosts, draining_all, this_host
from hyper2kvmd.queue.names import LOCK, REPORT, SIGNED
from hyper2kvmd.queue.state import Facts
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()

# inotify sees only what this host does; on these, others write too.
NETWORK_FILE_SYSTEMS = (
    *("nfs", "cifs", "smb", "ceph", "fuse", "9p", "virtiofs", "vboxsf", "gluster", "gfs2", "ocfs2", "lustre"),
    *("afs", "autofs", "beegfs", "gpfs"),
)
MOUNTS = Path("/proc/self/mountinfo")
POLL_SECONDS = 10.0  # NFS keeps what it knows of a directory for longer than this, so faster would find no more
PATIENCE_SECONDS = 1.0
HANG_SECONDS = 10.0
SAY_AGAIN_SECONDS = 60.0


class Watch:
    """Calls `wake` when something in a directory changed; `ensure` is to be called at every scan, and repairs it.

    `count` is told of each `event` that wakes, of each `warning` of the library, and of why it was begun again: `died`,
    `replaced` or `settings`.
    """

    def __init__(self, wake: Callable[[], None], count: Callable[[str], None] = lambda what: None) -> None:
        self.polls = False
        self._wake = wake
        self._count = count
        self._complaints = _Complaints(count)
        self._observer: Any = None
        self._watched: tuple[Path, str, int, int] | None = None
        self._problem = ""

    @property
    def up(self) -> bool:
        """Whether changes are seen at once."""
        return self._observer is not None

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog, in its thread: a hint, unless the event is about our own files."""
        name = os.path.basename(os.fsdecode(event.dest_path or event.src_path))
        # A lock that is closed is an export that somebody let go of, perhaps after a look had found it held.
        if name == LOCK or (not name.startswith(".") and name not in (REPORT, REPORT + SIGNED)):
            self._count("event")
            self._wake()

    def ensure(self, root: Path, mode: str) -> None:
        """Start watching, or start again if the observer died, the directory was replaced or the wish is another.

        Where it cannot be watched, `polls` says whether it should be looked at more often instead.
        """
        try:
            status, kind = root.stat(), file_system(root)
        except OSError:
            if self.up:
                self._count("replaced")
            self._stop()
            return  # the scan says what is wrong
        wanted = (root, mode, status.st_dev, status.st_ino)
        # An observer can die alone, and any of its emitters without it.
        alive = self.up and self._observer.is_alive() and all(e.is_alive() for e in self._observer.emitters)
        if self._watched == wanted and (alive or not self.up) and not self._problem:
            return
        if self.up and not alive:
            log.warning("watching again", directory=str(root), reason="the observer died")
        if self.up:
            same = self._watched is not None and self._watched[:2] == wanted[:2]
            self._count("died" if not alive else "replaced" if same else "settings")
        known = self._watched == wanted
        self._stop()
        network = mode == "auto" and kind.startswith(NETWORK_FILE_SYSTEMS)
        if network and not known:
            log.info("others may write there: polling", directory=str(root), file_system=kind, seconds=POLL_SECONDS)
        self.polls = network or mode == "poll"
        self._problem = "" if self.polls or mode == "off" else self._start(root)
        self._watched = wanted

    def _start(self, root: Path) -> str:
        """Start watching, or say why that is not possible."""
        # Without the filter, every block that the exporter writes is an event.
        interesting: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent]
        try:
            logging.getLogger("watchdog").addHandler(self._complaints)
            observer = Observer()
            # The type: watchdog calls dispatch() and nothing else.
            observer.schedule(self, str(root), recursive=True, event_filter=interesting)  # type: ignore[arg-type]
            observer.start()
        except OSError as error:  # most often a limit: of watches, or of those who watch
            if self._problem != str(error):  # once, not at every scan
                log.warning("cannot watch, the scan finds everything later", directory=str(root), reason=str(error))
            return str(error)
        self._observer = observer
        return ""

    def _stop(self) -> None:
        """Stop watching."""
        self._watched = None
        logging.getLogger("watchdog").removeHandler(self._complaints)
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(timeout=5)
            self._observer = None


class _Complaints(logging.Handler):
    """Takes what the library complains of, such as lost events, into our log."""

    def __init__(self, count: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._count = count
        self._said: tuple[str, float] = ("", 0.0)

    def emit(self, record: logging.LogRecord) -> None:
        """Count one record, and log it; the same one again only after a while: a full queue is told for each watch."""
        self._count("warning")
        text, now = record.getMessage(), time.monotonic()
        if text != self._said[0] or now - self._said[1] > SAY_AGAIN_SECONDS:
            self._said = (text, now)
            log.warning(text, exc_info=record.exc_info)


@dataclass(frozen=True)
class Scan:
    """What one look at all of the exports directory found.

    unreadable: exports, and why they cannot be looked at. ignored: what is no export and was perhaps meant to be one.
    trouble: why the directory itself cannot be read, or "". began: when the look began (monotonic). draining: whether
    no job is started here, draining_all: nor anywhere else. drained: hosts that start none, by themselves. hosts: all
    that work on the directory.
    """

    looks: dict[Path, Facts]
    unreadable: dict[Path, Finding]
    ignored: tuple[Finding, ...]
    trouble: str
    draining: bool
    settings: Settings
    seconds: float
    began: float = 0.0
    draining_all: bool = False
    drained: frozenset[str] = frozenset()
    hosts: tuple[Seen, ...] = ()

    @property
    def resume(self) -> str:
        """The command that has jobs started here again; "" if they are."""
        if not self.draining:
            return ""
        return "hyper2kvmctl resume" if self.draining_all else f"hyper2kvmctl resume --host {this_host()}"


class Scanner:
    """Looks at the exports directory in a thread: a file server that is gone must hold up nothing but the look.

    It is a daemon thread, so the program can end without it.
    """

    def __init__(self, watch: Watch, handover: Handover, queue_watch: Watch, pulse: Pulse) -> None:
        self._watch = watch
        self._pulse = pulse
        self._handover = handover
        self._queue_watch = queue_watch
        self._thread: threading.Thread | None = None
        self._found: Scan | None = None
        self._step = (Path(), 0.0)  # what is being looked at, and since when (monotonic)

    @property
    def busy(self) -> bool:
        """Whether a look has begun whose result nobody has got yet."""
        return self._thread is not None

    def hangs(self) -> str:
        """What has not answered for how long, if that is longer than storage that is only slow takes; else ""."""
        path, since = self._step
        seconds = time.monotonic() - since
        return f"no answer from {path} for {seconds:.0f} s" if self.busy and seconds >= HANG_SECONDS else ""

    def scan(self, settings: Settings) -> Scan | None:
        """Look at everything. None if that takes long: then the next calls return what this one would have."""
        patience = 0.0
        if self._thread is None:
            self._step = (settings.exports_dir, time.monotonic())
            self._thread = threading.Thread(target=self._work, args=(settings,), name="scan", daemon=True)
            self._thread.start()
            patience = PATIENCE_SECONDS
        self._thread.join(patience)
        if self._thread.is_alive():
            return None
        self._thread = None
        found, self._found = self._found, None
        if found is None:  # a defect must end the daemon, not blind it
            raise RuntimeError("the look at the exports directory failed; the trace is in the journal before this one")
        return found

    def _work(self, settings: Settings) -> None:
        self._found = self._look(settings)

    def _look(self, settings: Settings) -> Scan:
        began = time.monotonic()
        self._watch.ensure(settings.exports_dir, settings.watch.mode)
        if settings.hypersdk.queue_dir is not None:
            # Whatever `watch` says: exporters use it on this host, and what is not taken at once may be overwritten.
            self._queue_watch.ensure(settings.hypersdk.queue_dir, "inotify")
            self._handover.receive(settings)
        all_looks: dict[Path, Facts | Finding | None] = {}
        looks: dict[Path, Facts] = {}
        unreadable: dict[Path, Finding] = {}
        try:
            exports, ignored = facts.exports(settings)
            everywhere = draining_all(settings)
            # An engine has hosts enough besides this one.
            draining = requests.draining(settings) if settings.dispatch.engine == "local" else everywhere
        except OSError as error:
            trouble = f"cannot read {settings.exports_dir}: {error.strerror}"
            return Scan({}, {}, (), trouble, False, settings, time.monotonic() - began)
        for export in exports:
            self._step = (export, time.monotonic())
            found = all_looks[export] = facts.look_or_reason(export, settings)
            if isinstance(found, Finding):
                unreadable[export] = found
            elif found is not None:
                looks[export] = found
        self._handover.answer(settings, all_looks)
        self._pulse.beat(settings, draining=draining)
        seen: tuple[Seen, ...] = ()
        drained: frozenset[str] = frozenset()
        with contextlib.suppress(OSError):  # `hyper2kvmctl hosts` says why
            seen, drained = tuple(all_hosts(settings, time.time())), drained_hosts(settings)
        found_in = time.monotonic() - began
        return Scan(
            looks, unreadable, tuple(ignored), "", draining, settings, found_in, began, everywhere, drained, seen
        )


def file_system(path: Path) -> str:
    """The type of the file system that holds a directory, by the mount that it is opened through."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    mount_id = next(line.split()[1] for line in info.splitlines() if line.startswith("mnt_id:"))
    for fields in mounts():
        if fields[0] == mount_id:
            return fields[fields.index("-") + 1]
    return "unknown"


def mounts() -> Iterator[list[str]]:
    """The fields of every line of the kernel's list of mounts; of the bytes of a name there may be any but spaces."""
    for line in MOUNTS.read_bytes().split(b"\n"):  # it writes the others as they are, a carriage return among them
        if line:
            yield line.decode(errors="replace").split(" ")
