"""One job's process, as seen by whoever started it: its events, its end, and how to stop it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyper2kvmd import run
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.events import Decoder, Event
from hyper2kvmd.settings import Settings

# A job ends its tools within seconds, but storage that hangs can hold it up.
STOP_SECONDS = 30.0


@dataclass
class Progress:
    """Where a job is, as of its last event. Ratios are 0..1, by item (a disk)."""

    vm: str
    stages: list[str] = field(default_factory=list)
    ratios: dict[tuple[str, str], float] = field(default_factory=dict)
    finished: dict[str, Any] | None = None

    def apply(self, event: Event) -> None:
        """Take one event into account."""
        data = event.data
        if event.kind == "claimed":
            self.vm = data["vm"]
        elif event.kind == "stage":
            if data["status"] == "started":
                self.stages.append(data["stage"])
            elif data["stage"] in self.stages:
                self.stages.remove(data["stage"])
        elif event.kind == "progress":
            self.ratios[data["stage"], data["item"]] = data["ratio"]
        elif event.kind == "finished":
            self.finished = data

    def __str__(self) -> str:
        """One phrase, such as `web01 convert 63 % fix`."""
        words = [self.vm]
        for stage in self.stages:
            words.append(stage)
            ratios = [ratio for (of, _), ratio in self.ratios.items() if of == stage]
            if ratios:
                words.append(f"{100 * sum(ratios) / len(ratios):.0f} %")
        return " ".join(words)


class Runner:
    """A `hyper2kvmd run-job` process. It dies with the thread that started it."""

    def __init__(
        self, export: Path, settings: Settings, options: Sequence[str] = (), *, stderr: int | None = None
    ) -> None:
        self.export = export
        self.progress = Progress(export.name)
        self._decoder = Decoder()
        self.events_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write_fd, True)
        try:
            self._process = spawn(
                settings,
                *("hyper2kvmd", "run-job", str(export), "--events-fd", str(write_fd), *options),
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

    def read(self) -> list[Event]:
        """The events that came since the last call."""
        events: list[Event] = []
        while True:
            try:
                data = os.read(self.events_fd, 65536)
            except BlockingIOError:
                break
            if not data:
                break
            events += self._decoder.feed(data)
        for event in events:
            self.progress.apply(event)
        return events

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
        argv = [sys.executable, "-m", module, *arguments, "--config", f"/proc/self/fd/{settings_fd}"]
        return run.spawn(argv, pass_fds=(*pass_fds, settings_fd), stdout=stdout, stderr=stderr)
    finally:
        os.close(settings_fd)
