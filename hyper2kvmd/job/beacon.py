"""Shows everybody who looks at the export how far its job is, in a small file beside the lock."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import Any

import structlog

from hyper2kvmd.files import explained
from hyper2kvmd.queue import hosts, progress
from hyper2kvmd.queue.claim import Claim
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()

WRITE_SECONDS = 2.0  # a file server may have a hundred jobs that write
ALIVE_SECONDS = 30.0  # what stands still is written again after so long, as its times count from the writing
HOST_SECONDS = 60.0  # how often a host without a daemon says that it is there


class Beacon:
    """The file of one job. Losing it loses no work: what cannot be written is logged once.

    `note` is called with every event, by any thread; `show` now and then, by one. hosts_of: the settings of the
    directory whose other hosts are told of this one, too: where an engine started the job, there need be no daemon.
    """

    def __init__(self, claim: Claim, hosts_of: Settings | None) -> None:
        self._fd = claim.export.fd
        self._settings = hosts_of
        self._beaten = -math.inf
        self._progress = Progress(claim.export.directory.name, attempt=claim.attempt, host=hosts.this_host())
        self._lock = threading.Lock()
        self._news = False
        self._written = -math.inf
        self._failed = False

    def note(self, kind: str, data: dict[str, Any]) -> None:
        """Take an event into account."""
        with self._lock:
            self._progress.apply(kind, data, time.monotonic())
            self._news = True

    def show(self) -> None:
        """Write the file if there is news, and it is time."""
        now = time.monotonic()
        with self._lock:
            if now - self._written < (WRITE_SECONDS if self._news else ALIVE_SECONDS):
                return
            self._written, self._news = now, False
            try:
                progress.write(self._fd, self._progress, now)
            except OSError as error:
                if not self._failed:
                    log.warning("the progress of the job cannot be shown to others", reason=explained(error))
                self._failed = True
        if self._settings is not None and now - self._beaten >= HOST_SECONDS:
            self._beaten = now
            with contextlib.suppress(OSError):  # said by who looks: this host is not there
                hosts.beat_for_runner(self._settings, HOST_SECONDS)

    def close(self) -> None:
        """Remove the file: the job is over."""
        with contextlib.suppress(OSError):
            progress.remove(self._fd)
