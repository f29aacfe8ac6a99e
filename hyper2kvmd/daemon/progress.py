"""How far a job is, as of its last event."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hyper2kvmd.job.events import Event
from hyper2kvmd.text import duration, plain


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
    after which `vm` and `tags` do not change any more.
    """

    vm: str
    stages: dict[str, Stage] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    job: str = ""
    attempt: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    heard: float = 0.0
    known: bool = False

    def apply(self, event: Event, now: float) -> None:
        """Take into account one event that came at `now`, by the monotonic clock."""
        data = event.data
        self.heard = now
        if event.kind == "claimed":
            self.vm, self.job, self.attempt = data["vm"], data["job"], data["attempt"]
        elif event.kind == "manifest":
            self.vm, self.tags, self.known = plain(data["vm"]), data["tags"], True
        elif event.kind == "stage":
            if data["status"] == "started":
                self.stages[data["stage"]] = Stage(now, data["total"], now)
            else:
                self.stages.pop(data["stage"], None)
        elif event.kind == "progress" and data["stage"] in self.stages:
            stage = self.stages[data["stage"]]
            stage.done, stage.moved = stage.done + data["bytes"], now
        elif event.kind == "finished":
            self.finished = data

    def seconds_left(self, now: float) -> float | None:
        """How long the slowest of the stages that count will take, if there is one; others can take longer."""
        return max((left for s in self.stages.values() if (left := s.seconds_left(now)) is not None), default=None)

    def phrase(self, now: float) -> str:
        """One phrase, such as `web01 convert 63 % 12 min left fix`."""
        words, left = [self.vm], self.seconds_left(now)
        for name, stage in self.stages.items():
            words.append(name)
            if stage.ratio is not None:
                words.append(f"{100 * stage.ratio:.0f} %")
            if left is not None and stage.seconds_left(now) == left:
                words.append(f"{duration(left)} left")
        return " ".join(words)
