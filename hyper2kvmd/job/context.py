"""What belongs to one job: its claim, its settings, its tools, and the record of what it did so far."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog

from hyper2kvmd.errors import Cancelled, Finding, MigrationError
from hyper2kvmd.files import timestamp
from hyper2kvmd.job.events import Emitter
from hyper2kvmd.job.request import Request
from hyper2kvmd.job.results import Results
from hyper2kvmd.messages import Kind
from hyper2kvmd.queue.export import Export
from hyper2kvmd.report.model import ChangeRecord, DiskRecord, DomainRecord, FindingRecord, StageRecord
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()

T = TypeVar("T")
PROGRESS_SECONDS = 0.5
AT_ONCE = 4  # the three branches, and more disks than that only get in each other's way


@dataclass
class Record:
    """What has been done so far; becomes the report, however the job ends."""

    warnings: list[Finding] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    results: Results = field(default_factory=Results)
    disks: list[DiskRecord] = field(default_factory=list)
    changes: list[ChangeRecord] = field(default_factory=list)
    domain: DomainRecord | None = None
    tools: dict[str, str] = field(default_factory=dict)
    failed_stage: str | None = None

    def dump(self) -> dict[str, Any]:
        """The record as plain data, for the journal of the job."""
        models = {name: [item.model_dump() for item in getattr(self, name)] for name in ("stages", "disks", "changes")}
        warnings = [finding.as_json() for finding in self.warnings]
        return {"warnings": warnings, "results": self.results.as_json(), "tools": self.tools, **models}

    @classmethod
    def load(cls, content: dict[str, Any]) -> Record:
        """A record from what dump() made of it. Raise ValueError, KeyError or TypeError for what is none."""
        return cls(
            warnings=[Finding(**finding) for finding in content["warnings"]],
            stages=[StageRecord(**stage) for stage in content["stages"]],
            results=Results.model_validate(content["results"]),
            disks=[DiskRecord(**disk) for disk in content["disks"]],
            changes=[ChangeRecord(**change) for change in content["changes"]],
            tools={**content["tools"]},
        )

    def take_over(self, earlier: Record) -> None:
        """Take over what an earlier attempt put on its record; what this one did so far comes last."""
        self.warnings[:0] = earlier.warnings
        self.stages[:0] = earlier.stages
        self.results.fill(earlier.results)
        self.disks = earlier.disks
        self.changes = earlier.changes
        self.tools = {**earlier.tools, **self.tools}


@dataclass
class Job:
    """One job. `id` names its work directory and everything temporary, and is the same for every attempt.

    `attempt` is the number of this one, which every temporary name carries; 0 if nothing is to be written. `running`
    has the stages that are under way with their beginning, `reporting` what tells how far it is just now with when it
    last got further, both by the monotonic clock; `verdict` is why the job was stopped, if it was.
    """

    id: str
    export: Export
    attempt: int
    request: Request
    settings: Settings
    tools: Tools
    events: Emitter
    record: Record = field(default_factory=Record, init=False)
    running: dict[str, float] = field(default_factory=dict, init=False)
    reporting: dict[str, float] = field(default_factory=dict, init=False)
    verdict: MigrationError | None = field(default=None, init=False)

    @property
    def work_dir(self) -> Path:
        """Where overlays and the journal of this job are; a dry run does not touch those of the real one."""
        return self.settings.work_dir / (f"{self.id}.dry-run" if self.request.dry_run else self.id)

    def warn(self, finding: Finding) -> None:
        """Put a warning on the record."""
        self.record.warnings.append(finding)
        self.events.emit("warning", **finding.as_json())
        log.warning(finding.message, kind=Kind.WARNING, warning=str(finding.code), hint=finding.hint)

    def skip(self, stage: str) -> None:
        """Put it on the record that a stage was left out."""
        self.record.stages.append(StageRecord(name=stage, status="skipped"))
        self.events.emit("stage", stage=stage, status="skipped", seconds=0.0)

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[None]:
        """Time a stage, and tell about its begin and end. total: the bytes that it will report as progress."""
        began = time.time()
        started = self.running[name] = time.monotonic()
        self.events.emit("stage", stage=name, status="started", seconds=0.0, total=total)
        log.info("stage started", kind=Kind.STAGE_STARTED, stage=name)
        status = "failed"
        try:
            yield
            status = "done"
        except Cancelled:
            status = "cancelled"
            raise
        except (MigrationError, OSError):
            self.record.failed_stage = self.record.failed_stage or name
            raise
        finally:
            del self.running[name]
            seconds = round(time.monotonic() - started, 3)
            self.record.stages.append(
                StageRecord(name=name, status=status, started_at=timestamp(began), seconds=seconds)
            )
            self.events.emit("stage", stage=name, status=status, seconds=seconds)
            log.info("stage ended", kind=Kind.STAGE_ENDED, stage=name, status=status, seconds=seconds)

    @contextlib.contextmanager
    def progress(self, stage: str, item: str, total: int) -> Iterator[Callable[[float], None]]:
        """For as long as a tool tells how far it is: a function that takes the ratio done of an item of `total` bytes.

        Nothing else is taken for one that hangs: what does not tell is only slow, as far as anybody knows. Such is
        libguestfs: its events are a few points of a launch, with many seconds between them, and some copies of files.
        """
        what = f"{stage} of {item}"
        last_time, last_ratio, highest = 0.0, 0.0, 0.0

        def tell(ratio: float) -> None:
            nonlocal last_time, last_ratio, highest
            now = time.monotonic()
            if ratio >= 1:  # nothing more is to come; what the tool still flushes it does without a word
                self.reporting.pop(what, None)
            elif ratio > highest:
                highest = ratio
                self.reporting[what] = now
            if ratio < 1 and now - last_time < PROGRESS_SECONDS:
                return
            done = int((ratio - last_ratio) * total)
            self.events.emit("progress", stage=stage, item=item, ratio=round(ratio, 4), bytes=max(done, 0))
            last_time, last_ratio = now, ratio

        self.reporting[what] = time.monotonic()
        try:
            yield tell
        finally:
            self.reporting.pop(what, None)

    def together(self, *branches: Callable[[], T]) -> list[T]:
        """Run functions at the same time, at most AT_ONCE of them, and return what they return, in order.

        The first that fails cancels the others; its error is raised when all have ended.
        """
        with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
            # With the context, so that log lines of every branch name the job.
            futures = [pool.submit(contextvars.copy_context().run, branch) for branch in branches]
            done, _ = wait_for(futures, return_when="FIRST_EXCEPTION")
            if any(future.exception() for future in done):
                self.tools.cancel.set()
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Cancelled)):
            raise error
        return [future.result() for future in futures]


def job_id(export: Path, digest: str) -> str:
    """The identifier of the job, safe as a file name: the export's name, and a hash over that and its manifest."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", export.name)[:40]
    return f"{name}-{hashlib.sha256(f'{export.name}/{digest}'.encode()).hexdigest()[:8]}"


def finding_records(findings: Iterable[Finding]) -> tuple[FindingRecord, ...]:
    """Findings as they stand in the report; each once."""
    return tuple(FindingRecord(**finding.as_json()) for finding in dict.fromkeys(findings))
