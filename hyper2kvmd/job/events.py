"""What a runner tells whoever started it, as JSON lines on a pipe; losing them loses no work."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CHOICES = ("inspect", "fix", "convert", "validate", "import")  # the stages that can be left out
STAGES = ("plan", "verify", "inspect", "fix", "convert", "commit", "validate", "boot", "publish", "hook", "import")


@dataclass(frozen=True)
class Event:
    """One line: `kind` is claimed, manifest, stage, progress, converted, warning or finished; `data` depends on it.

    - claimed: job, vm (the name of the export's directory), attempt
    - manifest: vm (its own name), tags
    - stage: stage, status (started, done, skipped, failed, cancelled), seconds; total (bytes it will do) if started
    - progress: stage, item, ratio (0..1), bytes (done since the last event of this item)
    - converted: item, engine (stream, reflink or qemu-img), read, inflated, written (bytes; inflated may be null)
    - warning: code, message, hint, field
    - finished: status; report, if one was written; code, message and hint, if none was and there is a reason
    """

    kind: str
    data: dict[str, Any]


class Emitter:
    """Writes events to a descriptor; with None they go nowhere. Safe to use from several threads.

    `also` gets every event too, whether there is a descriptor or not.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self.also: Callable[[str, dict[str, Any]], None] | None = None

    def emit(self, kind: str, **data: Any) -> None:
        """Write one event; a reader that is gone is not an error."""
        if self.also is not None:
            self.also(kind, data)
        if self._fd is None:
            return
        line = memoryview(json.dumps({"event": kind, **data}).encode() + b"\n")
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._fd, line) :]
            except OSError:
                self._fd = None


class Decoder:
    """Turns the bytes of the pipe into events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield the events that `data` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            shape = json.loads(line)
            yield Event(shape.pop("event"), shape)
