"""A command of ours that the daemon has done now and then."""

from __future__ import annotations

import contextlib
import math
import subprocess
import time
from collections.abc import Callable, Container

import structlog

from hyper2kvmd import run
from hyper2kvmd.daemon.runner import spawn
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.messages import Kind
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()

ONCE_SECONDS = 120.0  # with --once, for what is to be told at the end


class PeriodicTask:
    """A command of ours that a process of its own does now and then, one at a time, as it may take long.

    `due` is when it is to be started, by the monotonic clock; it is not, within `gap` seconds of the last time.
    failed: called with the command when it ended with an exit status that is not one of `good`.
    """

    def __init__(self, command: str, gap: float, failed: Callable[[str], None], good: Container[int] = (0,)) -> None:
        self.due = 0.0
        self._failed = failed
        self._good = good
        self._command = command
        self._gap = gap
        self._process: subprocess.Popen[bytes] | None = None
        self._rested_at = 0.0

    def run(self, settings: Settings) -> float:
        """Start it if it is due, and return the seconds until it will be."""
        now = time.monotonic()
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return self._gap  # it is looked at again then, at the latest
            self._process = None
            if status not in self._good:
                log.error(
                    "a periodic task failed",
                    kind=Kind.TASK_FAILED,
                    command=f"hyper2kvmctl {self._command}",
                    status=status,
                    hint="Run it by hand to see why; what it said stands before this.",
                )
                self._failed(self._command)
        if max(self.due, self._rested_at) <= now:
            self.due, self._rested_at = math.inf, now + self._gap
            try:
                self._process = spawn(settings, "hyper2kvmd.ctl", self._command)
            except (OSError, MigrationError) as error:
                log.warning("a periodic task cannot be started", command=self._command, reason=str(error))
                self.due = self._rested_at
        return max(self.due, self._rested_at) - now

    def finish(self, settings: Settings) -> None:
        """Do what is due at once, and wait for it, but not for ever."""
        for _ in range(2):  # one may be on its way, which began before the last thing happened
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(ONCE_SECONDS)
            if self.due < math.inf:
                self._rested_at = 0.0
                self.run(settings)

    def end(self) -> None:
        """End its process, if there is one."""
        if self._process is not None:
            run.end(self._process)
