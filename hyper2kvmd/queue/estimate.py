"""How long a migration will take, and how much it will write, by what earlier ones on this host took."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from hyper2kvmd.files import open_directory, write_durably
from hyper2kvmd.text import duration

log = structlog.get_logger()

FILE = "history.jsonl"
KEPT = 200  # of the last migrations: hosts and storage change
FILE_LIMIT = 1 << 20
# What takes longer the larger the disks are. The others take the same for every guest, more or less.
BY_SIZE = ("verify", "convert", "validate", "publish")
# Where this host has no migration yet: seconds, and bytes a second, as two cores without KVM need them
# (docs/benchmarks.md); of a disk in VMDK, which vSphere compresses, about so much is written for each byte.
FIRST_SECONDS = {"plan": 5.0, "inspect": 40.0, "fix": 90.0, "commit": 2.0, "import": 2.0}
FIRST_RATE = {"verify": 500e6, "convert": 100e6, "validate": 500e6, "publish": 200e6}
FIRST_RATIO = {".vmdk": 2.0, ".ova": 2.0}


@dataclass(frozen=True)
class Sample:
    """One migration that went through at its first attempt.

    kind: the ending of its disks' names, such as .vmdk. bytes: the size of the files that were exported. written: what
    its disks take. seconds: from its start to its report; stages: of each stage that was not left out.
    """

    kind: str
    bytes: int
    written: int
    seconds: float
    stages: Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """What one migration will take.

    seconds: the most likely; low, high: eight of ten of the earlier ones would have been between these. stages: seconds
    of each. written: bytes. samples: how many earlier migrations it is made of; 0 if this host has none.
    """

    seconds: float
    low: float
    high: float
    stages: Mapping[str, float]
    written: int
    samples: int

    @property
    def confidence(self) -> str:
        """In a word: none (this host has migrated nothing yet), low, medium or high."""
        if self.samples == 0:
            return "none"
        narrow = self.high <= 2 * self.low
        return "high" if narrow and self.samples >= 20 else "medium" if narrow or self.samples >= 5 else "low"

    def __str__(self) -> str:
        return f"about {duration(self.seconds)} ({duration(self.low)} to {duration(self.high)})"

    def as_json(self) -> dict[str, Any]:
        """The estimate for `--json` and reports."""
        times = {key: round(getattr(self, key), 1) for key in ("seconds", "low", "high")}
        stages = {name: round(seconds, 1) for name, seconds in self.stages.items()}
        return {
            **times,
            "stages": stages,
            "written": self.written,
            "samples": self.samples,
            "confidence": self.confidence,
        }


def estimate(sizes: Sequence[tuple[str, int]], work_dir: Path) -> Estimate:
    """What migrating these files will take. sizes: of each its path, and its size in bytes."""
    kind, bytes = kind_and_bytes(sizes)
    path = work_dir / FILE
    learnt = _learnt(path, _version(path), kind)
    return first(kind, bytes) if learnt is None else learnt.of(bytes)


def kind_and_bytes(sizes: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """The ending of the largest file, and the bytes of all."""
    largest = max(sizes, key=lambda one: one[1], default=("", 0))
    return Path(largest[0]).suffix.lower(), sum(bytes for _, bytes in sizes)


def critical_path(stages: Mapping[str, float]) -> float:
    """Seconds of a job whose stages take so long: VERIFY, CONVERT, and INSPECT with FIX run at the same time."""
    took = {name: stages.get(name, 0.0) for name in ("verify", "inspect", "fix", "convert")}
    beside = sum(seconds for name, seconds in stages.items() if name not in took)
    return beside + max(took["verify"], took["inspect"] + took["fix"], took["convert"])


def history(work_dir: Path) -> tuple[Sample, ...]:
    """The last migrations of this host, the newest last; none of them if they cannot be read."""
    with contextlib.suppress(OSError), (work_dir / FILE).open("rb") as file:
        lines = file.read(4 * FILE_LIMIT).splitlines()[-KEPT:]
        return tuple(sample for line in lines if (sample := _sample(line)) is not None)
    return ()


def _version(path: Path) -> tuple[int, ...]:
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return (status.st_ino, status.st_mtime_ns, status.st_size)
    return ()


def add(work_dir: Path, sample: Sample) -> None:
    """Keep a migration. That it cannot be kept is no reason to fail: an estimate is less exact then."""
    line = json.dumps(asdict(sample)).encode() + b"\n"
    try:
        fd = os.open(work_dir / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.write(fd, line)
            full = os.fstat(fd).st_size > FILE_LIMIT
        finally:
            os.close(fd)
        if full:
            directory = open_directory(work_dir)
            try:
                rest = (json.dumps(asdict(one)) + "\n" for one in history(work_dir))
                write_durably(directory, FILE, "".join(rest).encode(), os.getpid())
            finally:
                os.close(directory)
    except OSError as error:
        log.debug("the duration of this job is not kept", directory=str(work_dir), reason=error.strerror)


def _sample(line: bytes) -> Sample | None:
    """A line of the file; None for one that was cut off, or that another version wrote."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        content: dict[str, Any] = json.loads(line)
        stages = {str(name): float(seconds) for name, seconds in content["stages"].items()}
        sample = Sample(
            str(content["kind"]), int(content["bytes"]), int(content["written"]), float(content["seconds"]), stages
        )
        return sample if sample.bytes > 0 and sample.seconds > 0 else None
    return None


def first(kind: str, bytes: int) -> Estimate:
    """What a migration takes where nothing is known but sizes."""
    stages = {**FIRST_SECONDS, **{name: bytes / rate for name, rate in FIRST_RATE.items()}}
    seconds = critical_path(stages)
    return Estimate(seconds, seconds / 3, seconds * 3, stages, int(bytes * FIRST_RATIO.get(kind, 1.0)), 0)


@dataclass(frozen=True)
class Learnt:
    """What earlier migrations say of one of any size.

    lines: of each stage its seconds, and seconds a byte. low, scale, high: how much longer they took than these lines
    say, one of ten of them, half of them, and nine of ten. written: bytes for each byte. samples: their number.
    """

    lines: Mapping[str, tuple[float, float]]
    low: float
    scale: float
    high: float
    written: float
    samples: int

    def of(self, bytes: int) -> Estimate:
        """What a migration of so many bytes takes."""
        stages = _stages(self.lines, bytes)
        seconds = critical_path(stages)
        times = (seconds * self.scale, seconds * self.low, seconds * self.high)
        return Estimate(*times, stages, int(bytes * self.written), self.samples)


def learn(samples: Sequence[Sample]) -> Learnt:
    """What these migrations say, of which there is at least one."""
    lines = _lines(samples)
    taken = (sample.seconds / max(critical_path(_stages(lines, sample.bytes)), 1e-3) for sample in samples)
    errors = sorted(taken)
    low, high = (errors[round(part * (len(errors) - 1))] for part in (0.1, 0.9))
    scale = statistics.median(errors)
    if len(samples) < 5:  # a few say nothing of how much they differ
        low, high = min(low, scale / 2), max(high, scale * 2)
    written = statistics.median(sample.written / sample.bytes for sample in samples)
    return Learnt(lines, min(low, scale), scale, max(high, scale), written, len(samples))


@functools.lru_cache(maxsize=16)  # a queue of a thousand is looked at again and again
def _learnt(path: Path, _version: tuple[int, ...], kind: str) -> Learnt | None:
    """By the migrations of disks of this kind, if there were some; by all, if not; None if there were none."""
    earlier = history(path.parent)
    samples = [sample for sample in earlier if sample.kind == kind] or earlier
    return learn(samples) if samples else None


def _stages(lines: Mapping[str, tuple[float, float]], bytes: int) -> dict[str, float]:
    """Seconds of each stage, by its line."""
    return {name: at + slope * bytes for name, (at, slope) in lines.items()}


def _lines(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """Seconds, and seconds a byte, of each stage that most of the migrations had."""
    found = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(sample.stages for sample in samples)):
        points = [(sample.bytes, sample.stages[name]) for sample in samples if name in sample.stages]
        if 2 * len(points) > len(samples):
            found[name] = _line(points) if name in BY_SIZE else (statistics.median(y for _, y in points), 0.0)
    return found


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The line through points by the medians of Theil and Sen, which a few odd ones do not bend; it never falls."""
    pairs = itertools.combinations(points[-50:], 2)
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs if x1 != x2]
    slope = statistics.median(slopes) if slopes else statistics.median(y / x for x, y in points)
    slope = max(slope, 0.0)
    return max(statistics.median(y - slope * x for x, y in points), 0.0), slope


def total(estimates: Iterable[Estimate], workers: int) -> Estimate:
    """What many take, `workers` at a time: no less than the longest, and no less than all of them shared out."""
    every = [*estimates]

    def shared(each: Sequence[float]) -> float:
        return max(sum(each) / workers, max(each, default=0.0))

    stages = {
        name: sum(one.stages.get(name, 0.0) for one in every)
        for name in dict.fromkeys(itertools.chain.from_iterable(one.stages for one in every))
    }
    samples = min((one.samples for one in every), default=0)
    return Estimate(
        shared([one.seconds for one in every]),
        shared([one.low for one in every]),
        shared([one.high for one in every]),
        stages,
        sum(one.written for one in every),
        samples,
    )
