"""Watching the exports directory: events only say when to look, losing one costs time and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from watchdog.events import DirCreatedEvent, DirMovedEvent, FileClosedEvent, FileMovedEvent, FileSystemEvent
from watchdog.observers import Observer
from watchdog.observers.polling import PollingObserver

from hyper2kvmd import spool

log = structlog.get_logger()

# inotify sees only what this host does; on these, other hosts write too.
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "ceph", "fuse", "9p", "gluster", "gfs2", "ocfs2", "lustre")
POLL_SECONDS = 10.0


class Watch:
    """Calls `wake` when something in `root` changed; `ensure` is to be called at every scan, and mends it."""

    def __init__(self, root: Path, mode: str, wake: Callable[[], None]) -> None:
        self._root = root
        self._wake = wake
        self._observer: Any = None
        self._root_id: tuple[int, int] | None = None
        self._mode = mode

    @property
    def up(self) -> bool:
        """Whether changes are seen at once."""
        return self._observer is not None

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog, in its thread: a hint, unless the event is about our own files."""
        name = os.path.basename(os.fsdecode(event.dest_path or event.src_path))
        if not name.startswith(".") and name != spool.REPORT:
            self._wake()

    def ensure(self) -> None:
        """Start watching, or start again if the observer died or the directory was replaced."""
        if self._mode == "off":
            return
        try:
            status = self._root.stat()
        except OSError:
            self.stop()
            return
        root_id = (status.st_dev, status.st_ino)
        if self._observer is not None:
            alive = self._observer.is_alive() and all(emitter.is_alive() for emitter in self._observer.emitters)
            if alive and root_id == self._root_id:
                return
            log.warning("watching again", directory=str(self._root), reason="replaced" if alive else "observer died")
            self.stop()
        mode = self._mode
        if mode == "auto":
            mode = "poll" if file_system(self._root).startswith(NETWORK_FILE_SYSTEMS) else "inotify"
        observer = PollingObserver(timeout=POLL_SECONDS) if mode == "poll" else Observer()
        interesting: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent]
        try:
            # Without the filter, every block that the exporter writes is an event.
            observer.schedule(
                self,  # type: ignore[arg-type]  # watchdog calls dispatch() and nothing else
                str(self._root),
                recursive=True,
                event_filter=None if mode == "poll" else interesting,
            )
            observer.start()
        except OSError as error:  # most often the limit of watches
            log.warning("cannot watch, the scan finds everything later", directory=str(self._root), reason=str(error))
            return
        self._observer, self._root_id = observer, root_id

    def stop(self) -> None:
        """Stop watching."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(timeout=5)
            self._observer = None


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, by the longest matching mount point."""
    resolved = path.resolve()
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode("ascii", "surrogateescape").decode("unicode_escape")
        if len(mount) > best and resolved.is_relative_to(mount):
            best, kind = len(mount), after.split()[0]
    return kind
