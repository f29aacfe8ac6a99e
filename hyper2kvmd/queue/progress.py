"""How far a job is, as of its last event; its runner writes it beside the lock, for everybody who looks."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hyper2kvmd.files import open_file, write_whole
from hyper2kvmd.queue.names import PROGRESS
from hyper2kvmd.text import duration, plain

LIMIT = 1 << 14  # of the file; a planted one may be anything
_LONGEST = 1e9  # seconds that a stage can have taken: 30 years


@dataclass
class Stage:
    """A stage that is under way: `done` of `total` bytes; 0 of 0 if it does not count in bytes.

    `began` and `moved` (when it last got further) are by the monotonic clock.
    """

    began: float
    total: int
    moved: float
    done: int = 0

    @property
    def ratio(self) -> float | None:
        """How much is done, 0..1, if that is known."""
        return min(self.done / self.total, 1.0) if self.total else None

    @property
    def rate(self) -> float | None:
        """Bytes per second, since it began, if it counts in bytes and something is done."""
        return self.done / (self.moved - self.began) if self.done and self.moved > self.began else None

    def seconds_left(self, now: float) -> float | None:
        """How long it will take at this rate, if that is known; `now` is by the monotonic clock."""
        if self.rate is None:
            return None
        return max((self.total - self.done) / self.rate - (now - self.moved), 0.0)


@dataclass
class Progress:
    """Where a job is, as of its last event: the stages that are under way, in the order in which they began.

    `heard` is when that event came, by the monotonic clock; 0 before the first. `known`: whether the manifest was read,
    after which `vm` and `tags` do not change any more. `host`: where it runs, "" for here.
    """

    vm: str
    stages: dict[str, Stage] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    job: str = ""
    attempt: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    heard: float = 0.0
    known: bool = False
    host: str = ""

    def apply(self, kind: str, data: Mapping[str, Any], now: float) -> None:
        """Take into account one event (`job.events.Event`) that came at `now`, by the monotonic clock."""
        self.heard = now
        if kind == "claimed":
            self.vm, self.job, self.attempt = data["vm"], data["job"], data["attempt"]
        elif kind == "manifest":
            self.vm, self.tags, self.known = plain(data["vm"]), data["tags"], True
        elif kind == "stage":
            if data["status"] == "started":
                self.stages[data["stage"]] = Stage(now, data["total"], now)
            else:
                self.stages.pop(data["stage"], None)
        elif kind == "progress" and data["stage"] in self.stages:
            stage = self.stages[data["stage"]]
            stage.done, stage.moved = stage.done + data["bytes"], now
        elif kind == "finished":
            self.finished = dict(data)

    def seconds_left(self, now: float) -> float | None:
        """How long the slowest of the stages that count will take, if there is one; others can take longer."""
        return max((left for s in self.stages.values() if (left := s.seconds_left(now)) is not None), default=None)

    def slowest(self, now: float) -> str | None:
        """The stage under way that takes longest, as far as is known; one that counts in bytes before others."""

        def weight(name: str) -> tuple[bool, float]:
            stage = self.stages[name]
            return stage.total > 0, stage.seconds_left(now) or math.inf

        return max(self.stages, key=weight, default=None)

    def phrase(self, now: float) -> str:
        """One phrase, such as `web01 convert 63 % 12 min left fix`."""
        return " ".join([self.vm, *self._words(now)])

    def doing(self, now: float) -> str:
        """The same without the VM, for who has named it already."""
        return " ".join(self._words(now))

    def _words(self, now: float) -> list[str]:
        words, left = [], self.seconds_left(now)
        for name, stage in self.stages.items():
            words.append(name)
            if stage.ratio is not None:
                words.append(f"{100 * stage.ratio:.0f} %")
            if left is not None and stage.seconds_left(now) == left:
                words.append(f"{duration(left)} left")
        return [*words, *(["on", self.host] if self.host else [])]

    def as_json(self, now: float) -> dict[str, Any]:
        """The job and its stages for `--json`: `ratio` from 0 to 1, bytes a second, seconds; null is not known."""
        stages = [
            {"stage": name, "ratio": s.ratio, "bytes_per_second": s.rate, "seconds_left": s.seconds_left(now)}
            for name, s in self.stages.items()
        ]
        return {"job": self.job, "attempt": self.attempt, "vm": self.vm, "host": self.host, "stages": stages}


def write(dir_fd: int, progress: Progress, now: float) -> None:
    """Write how far a job is into its export, which is open; a reader finds the old file or the new one, whole.

    Times are in seconds before the file was written, so that hosts whose clocks differ understand each other. It is
    not flushed to the disk: after a crash nobody needs it. Raise OSError.
    """
    stages = [
        {
            "stage": name,
            "total": s.total,
            "done": s.done,
            "began": round(now - s.began, 1),
            "moved": round(now - s.moved, 1),
        }
        for name, s in progress.stages.items()
    ]
    keys = ("job", "attempt", "vm", "host")
    shape = {**{key: getattr(progress, key) for key in keys}, "known": progress.known, "stages": stages}
    write_whole(dir_fd, PROGRESS, json.dumps(shape).encode(), progress.attempt)


def remove(dir_fd: int) -> None:
    """Remove what write() left, of a job that is over. Raise OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(PROGRESS, dir_fd=dir_fd)


def read(dir_fd: int, now: float) -> Progress | None:
    """How far the job of an open export is; None if it has not said, or if the file is none of ours.

    `now` is the reader's monotonic clock: to it, the times in the file are turned.
    """
    try:
        fd = open_file(PROGRESS, dir_fd=dir_fd)
    except OSError:
        return None
    try:
        shape = json.loads(os.read(fd, LIMIT))
        texts = {key: plain(shape[key]) for key in ("job", "vm", "host")}
        progress = Progress(texts["vm"], job=texts["job"], host=texts["host"], heard=now, known=bool(shape["known"]))
        progress.attempt = int(shape["attempt"])
        for stage in shape["stages"]:
            began, moved = (now - _seconds(stage[key]) for key in ("began", "moved"))
            total, done = (max(int(stage[key]), 0) for key in ("total", "done"))
            progress.stages[plain(stage["stage"])] = Stage(began, total, max(began, moved), done)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    finally:
        os.close(fd)
    return progress


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds) or seconds > _LONGEST:
        raise ValueError(value)
    return max(seconds, 0.0)
