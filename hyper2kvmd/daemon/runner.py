"""One job's process, as seen by whoever started it: its events, its end, and how to stop it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from hyper2kvmd import run
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.job.events import Decoder, Event
from hyper2kvmd.job.request import Request
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.settings.model import Settings

# A job ends its tools within seconds, but storage that hangs can hold it up.
STOP_SECONDS = 30.0
_AS_BEFORE = Request()


class Runner:
    """A `hyper2kvmd run-job` process. It dies with the thread that started it."""

    def __init__(
        self, export: Path, settings: Settings, request: Request = _AS_BEFORE, *, stderr: int | None = None
    ) -> None:
        self.export = export
        self.progress = Progress(export.name)
        self._decoder = Decoder()
        self.events_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write_fd, True)
        try:
            self._process = spawn(
                settings,
                *("hyper2kvmd", "run-job", str(export), "--events-fd", str(write_fd), *request.options()),
                pass_fds=(write_fd,),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        except (OSError, MigrationError):
            os.close(self.events_fd)
            raise
        finally:
            os.close(write_fd)

    @property
    def pid(self) -> int:
        """The process id of the job."""
        return self._process.pid

    def read(self) -> Iterator[Event]:
        """Yield the events that came since the last call, each as `progress` takes it into account."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.events_fd, 65536):
                for event in self._decoder.feed(data):
                    self.progress.apply(event.kind, event.data, time.monotonic())
                    yield event

    def follow(self, on_event: Callable[[Event], None]) -> int:
        """Hand over the events as they come until the process has ended; return what `poll` then does."""
        while (status := self.poll()) is None:
            if select.select([self.events_fd], [], [], 0.2)[0]:
                for event in self.read():
                    on_event(event)
        for event in self.read():
            on_event(event)
        return status

    def poll(self) -> int | None:
        """The exit status if the process has ended (negative: the signal that killed it), else None."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask the job to stop; it ends its tools, leaves no report, and is done again later."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGTERM)

    def close(self, patience: float = STOP_SECONDS) -> None:
        """Release what belongs to a process that has ended; ends it if it has not, within `patience` seconds."""
        # Closed first: a job that still has much to say must not wait for a reader.
        os.close(self.events_fd)
        run.end(self._process, patience)


def stop_all(runners: Iterable[Runner]) -> None:
    """Stop runners, and wait for all of them together, STOP_SECONDS at most."""
    runners = list(runners)
    for runner in runners:
        runner.stop()
    deadline = time.monotonic() + STOP_SECONDS
    for runner in runners:
        runner.close(max(deadline - time.monotonic(), 0))


def spawn(
    settings: Settings,
    module: str,
    *arguments: str,
    pass_fds: Sequence[int] = (),
    stdout: int | None = None,
    stderr: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start one of our programs with the settings in force, not those of the file: it may have been edited since.

    Raise OSError or MigrationError.
    """
    settings_fd = os.memfd_create("settings", os.MFD_CLOEXEC)
    try:
        os.write(settings_fd, settings.model_dump_json(by_alias=True).encode())
        # -P: a directory of our name where somebody happens to be, such as an export, is not the program.
        argv = [sys.executable, "-P", "-m", module, *arguments, "--config", f"/proc/self/fd/{settings_fd}"]
        return run.spawn(argv, pass_fds=(*pass_fds, settings_fd), stdout=stdout, stderr=stderr)
    finally:
        os.close(settings_fd)
