"""A made-up day of three hosts, with the daemon's own metrics: what the preview of the dashboards shows."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hyper2kvmd.daemon import fleet, metrics
from hyper2kvmd.job.events import Event
from hyper2kvmd.queue.hosts import Beat, Seen
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.queue.state import FINAL, State

STEP = 60  # seconds between two scrapes


class _Clock:
    """Stands in for the module `time` in the metrics, so that they tell of another day."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    monotonic = time


@dataclass
class _Job:
    """One made-up VM: the stages that it has before it, with their seconds and bytes."""

    vm: str
    size: int
    arrived: float
    attempt: int = 1
    ends: tuple[str, str | None] = ("succeeded", None)
    stages: list[tuple[str, float, int]] = field(default_factory=list)
    progress: Progress = field(default_factory=lambda: Progress("export"))
    began: float = 0.0
    stage_began: float = 0.0


@dataclass
class Host:
    """One made-up host: how many workers, how fast its storage is (bytes per second), when how many exports come."""

    name: str
    workers: int
    speed: float
    drops: dict[float, int]
    free: float
    silent: tuple[float, float] = (0, 0)  # hours in which it does not answer
    no_libvirt: tuple[float, float] = (0, 0)


HOSTS = (
    Host("kvm1.example.com:9878", 4, 420e6, {1: 8, 8: 24, 14: 20, 19: 12, 21.5: 24, 23.2: 14}, 19e12),
    Host("kvm2.example.com:9878", 4, 300e6, {2: 10, 9: 20, 16: 18, 22.5: 16}, 12e12, no_libvirt=(11, 12.2)),
    Host("kvm3.example.com:9878", 2, 110e6, {3: 4, 10: 6, 17: 8}, 3.2e12, silent=(23.2, 25)),
)
ENDS: tuple[tuple[str, str | None, int], ...] = (
    ("succeeded", None, 180),
    ("failed", "checksum_mismatch", 5),
    ("failed", "image_corrupt", 2),
    ("blocked", "os_unsupported", 4),
    ("blocked", "network_missing", 3),
    ("rejected", "manifest_invalid", 3),
    ("retrying", "tool_killed", 3),
    ("retrying", "no_space", 4),
    ("cancelled", "cancelled", 2),
)


class _Day:
    """The day of one host."""

    def __init__(self, host: Host, clock: _Clock, start: float) -> None:
        self.host = host
        self.clock = clock
        self.start = start
        self.chance = random.Random(host.name)
        self.metrics = metrics.Metrics()
        self.queue: list[_Job] = []
        self.running: dict[int, _Job] = {}
        self.states: dict[State, int] = dict.fromkeys(State, 0)
        self.free = host.free
        self.numbers = itertools.count(1)
        self.drops = sorted((start + hour * 3600, count) for hour, count in host.drops.items())
        self.metrics.reload(accepted=True)
        self.metrics.watcher_up.set(1)

    def step(self) -> None:
        """Have STEP seconds go by, up to the time of the clock."""
        now = self.clock.now
        while self.drops and self.drops[0][0] <= now:
            self.queue += [self._export(now) for _ in range(self.drops.pop(0)[1])]
            self.metrics.watched("event")
        for slot, job in list(self.running.items()):
            self._advance(slot, job)
        for slot in range(self.host.workers):
            if slot not in self.running and self.queue:
                self._begin(slot, self.queue.pop(0))
        self._look(now)

    def _export(self, now: float) -> _Job:
        kind = self.chance.choice(("web", "db", "app", "mail", "files", "build"))
        size = int(2 ** self.chance.uniform(35, 38.5))
        status, code, _ = self.chance.choices(ENDS, [weight for *_, weight in ENDS])[0]
        job = _Job(f"{kind}{next(self.numbers):03}", size, now, ends=(status, code))
        copy = size / self.host.speed / self.chance.uniform(0.7, 1.2)
        whole: list[tuple[str, float, int]] = [
            ("plan", 6, 0),
            ("verify", copy * 0.8, size),
            ("inspect", 25, 0),
            ("convert", copy, size),
            ("fix", self.chance.uniform(120, 400), 0),
            ("commit", 20, 0),
            ("validate", copy * 0.4, 0),
            ("publish", 8, 0),
            ("import", 3, 0),
        ]
        job.stages = whole[: 1 if status == "rejected" else 2 if status == "failed" else 3] if code else whole
        return job

    def _begin(self, slot: int, job: _Job) -> None:
        job.began = job.stage_began = self.clock.now
        self.running[slot] = job
        self.metrics.job_started(self.clock.now - job.arrived)
        name = f"{job.vm}-{self.chance.getrandbits(32):08x}"
        self._tell(job, "claimed", job=name, vm=job.vm, attempt=job.attempt)
        tags = {"env": self.chance.choice(("production", "test")), "wave": "7"}
        self._tell(job, "manifest", vm=job.vm, tags=tags)
        self._tell(job, "stage", stage=job.stages[0][0], status="started", seconds=0.0, total=job.stages[0][2])

    def _advance(self, slot: int, job: _Job) -> None:
        left = float(STEP)
        while job.stages and left > 0:
            stage, seconds, size = job.stages[0]
            if size:
                done = int(min(left, seconds) / seconds * size)
                self._tell(job, "progress", stage=stage, item="disk-0", ratio=0.0, bytes=done)
                size -= done
            if seconds > left:
                job.stages[0] = (stage, seconds - left, size)
                break
            left -= seconds
            job.stages.pop(0)
            took = self.clock.now - left - job.stage_began
            self._tell(job, "stage", stage=stage, status="done", seconds=took)
            if stage == "convert":
                moved = {"read": job.size // 4, "inflated": job.size // 2, "written": job.size // 2}
                self._tell(job, "converted", item="disk-0", engine="stream", **moved)
            job.stage_began = self.clock.now - left
            if job.stages:
                following, _, total = job.stages[0]
                self._tell(job, "stage", stage=following, status="started", seconds=0.0, total=total)
        if not job.stages:
            self._end(slot, job)

    def _end(self, slot: int, job: _Job) -> None:
        status, code = job.ends
        taken = int(job.size * 0.5)
        disks = [{"target_format": "qcow2", "target_bytes": taken}]
        report = {"seconds": self.clock.now - job.began, "disks": disks}
        self.metrics.job_ended({"status": status, **({"code": code} if code else {}), "report": report})
        self.metrics.log_messages.labels("info").inc(2)
        del self.running[slot]
        if status in FINAL:
            self.states[State(status)] += 1
        if status == "succeeded":
            self.free -= taken
            self.metrics.log_messages.labels("warning").inc(self.chance.random() < 0.1)
        else:
            self.metrics.log_messages.labels("error").inc()
        if status == "retrying":
            again = self._export(job.arrived)
            again.vm, again.attempt, again.ends = job.vm, job.attempt + 1, ("succeeded", None)
            self.queue.append(again)

    def _tell(self, running: _Job, kind: str, **data: Any) -> None:
        event = Event(kind, data)
        running.progress.apply(event.kind, event.data, self.clock.now)
        self.metrics.event(event)

    def _look(self, now: float) -> None:
        hour = (now - self.start) / 3600
        working = not self.host.no_libvirt[0] <= hour < self.host.no_libvirt[1]
        for check in metrics.CHECKS:
            self.metrics.ready.labels(check).set(working or check != "libvirt")
        self.metrics.libvirt_up.set(working)
        self.metrics.free.labels("output").set(self.free)
        self.metrics.free.labels("work").set(2e12 - 8e9 * len(self.running))
        self.metrics.scan_seconds.observe(0.02 + 0.0006 * sum(self.states.values()) * self.chance.uniform(0.7, 1.4))
        self.metrics.events.inc(len(self.running))
        current = {State.QUEUED: len(self.queue), State.RUNNING: len(self.running)}
        since = min((job.arrived for job in self.queue), default=None)
        self.metrics.looked((), {**self.states, **current}, since, now)
        self.metrics.show({slot: job.progress for slot, job in self.running.items()}, self.host.workers)

    def see(self, all_days: Iterable[_Day]) -> None:
        """See the jobs of the other hosts, and which of them are there."""
        there = []
        for day in all_days:
            silent = day.host.silent[0] <= (self.clock.now - self.start) / 3600 < day.host.silent[1]
            beat = Beat(day.host.name.partition(".")[0], "running", 30, self.clock.now)
            there.append(Seen(beat, 600.0 if silent else 5.0, drained=False))
            for job in day.running.values():
                job.progress.host = beat.host
        others = [job.progress for day in all_days if day is not self for job in day.running.values()]
        self.metrics.fleet.show(others, there, len(self.running))


def history(start: float, end: float) -> Iterator[str]:
    """The lines of an OpenMetrics file with every scrape of every host."""
    clock = _Clock(start)
    vars(metrics)["time"] = vars(fleet)["time"] = clock
    days = [_Day(host, clock, start) for host in HOSTS]
    while clock.now <= end:
        for day in days:
            day.step()
        for day in days:
            day.see(days)
            yield from _scrape(day, clock.now)
        clock.now += STEP
    vars(metrics)["time"] = vars(fleet)["time"] = time
    yield "# EOF\n"


def _scrape(day: _Day, now: float) -> Iterator[str]:
    target = f'job="hyper2kvmd",instance="{day.host.name}"'
    silent = day.host.silent[0] <= (now - day.start) / 3600 < day.host.silent[1]
    yield f"up{{{target}}} {0 if silent else 1} {now:.0f}\n"
    for family in () if silent else day.metrics.registry.collect():
        for sample in family.samples:
            # As Prometheus does with a label that it has itself.
            labels = "".join(f',{"exported_job" if k == "job" else k}="{v}"' for k, v in sample.labels.items())
            yield f"{sample.name}{{{target}{labels}}} {sample.value} {now:.0f}\n"
