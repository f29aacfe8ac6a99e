"""What the daemon does with queued exports where an engine places jobs: it hands them over, and watches what comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from hyper2kvmd import __version__
from hyper2kvmd.daemon.dispatcher import Dispatcher
from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.daemon.watch import Scan
from hyper2kvmd.dispatch.engine import PREFIX, Engine, Submission
from hyper2kvmd.errors import Code, Finding
from hyper2kvmd.job.context import job_id
from hyper2kvmd.messages import Kind
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.hosts import this_host
from hyper2kvmd.queue.names import LOG
from hyper2kvmd.queue.placement import Placement
from hyper2kvmd.queue.state import Facts, State
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()


@dataclass(frozen=True)
class Row:
    """An export as of the last scan. `since`: when it could have been started, or came into its state."""

    state: State
    finding: Finding | None
    look: Facts
    since: float

    @property
    def for_later(self) -> bool:
        """Whether it waits for its window, or for one that is long enough."""
        return self.finding is not None and self.finding.code == Code.WINDOW


class Placer:
    """Keeps nothing that is needed: what an engine has it says itself, and what is done is in the exports directory.

    `trouble` is why nothing can be handed over, "" if that is not so.
    """

    def __init__(self, wake: Callable[[], None], metrics: Metrics) -> None:
        self.trouble = ""
        self._limit = 0
        self._dispatcher = Dispatcher(wake)
        self._metrics = metrics
        self._seen = self._dispatcher.last
        self._handed: dict[Path, str] = {}  # what the engine has, and what has ended there since it was looked at
        self._counted: dict[Path, float | None] = {}  # when the last attempt ended that the metrics have

    @property
    def has_jobs(self) -> bool:
        """Whether the engine has jobs of this exports directory."""
        return bool(self._handed) or self._dispatcher.busy

    def place(
        self,
        engine: Engine,
        settings: Settings,
        table: Mapping[Path, Row],
        wanted: Sequence[tuple[Path, Placement]],
        found: Scan,
        now: float,
    ) -> tuple[float, list[tuple[Path, Finding]]]:
        """Bring the engine into step with a look; return the seconds until that is due again, and what failed why.

        wanted: what is to be handed over, the first first. found: the look that `table` is of.
        """
        names = {export: name_of(export, seen.look) for export, seen in table.items()}
        failed = self._take_note(names, table, now)
        for export, name in [*self._handed.items()]:
            # The look must be newer than the answer: its report is there before a job is gone.
            if name not in self._seen.jobs and found.began > self._seen.asked:
                del self._handed[export]
                failed += self._ended(export, name, table.get(export))
        out = {export for export, _ in failed}
        submissions = [
            submission(settings, names[export], export, table[export].look.plan.digest, placed, found.drained)
            for export, placed in wanted
            if export not in out
        ]
        self._limit = settings.dispatch.max_submitted
        return self._dispatcher.begin(engine, submissions, frozenset(names.values()), self._limit), failed

    def _take_note(
        self, names: Mapping[Path, str], table: Mapping[Path, Row], now: float
    ) -> list[tuple[Path, Finding]]:
        """Take note of the last round, once; return what it refused."""
        last = self._dispatcher.last
        if last is self._seen:
            return []
        self._seen = last
        self._note_trouble(last.trouble)
        self._metrics.fleet.show_engine(last.jobs.values(), up=last.trouble is None)
        for export, name in names.items():
            if name in last.withdrawn:
                self._handed.pop(export, None)
            if name in last.jobs:
                self._handed[export] = name
            if name in last.submitted:
                self._metrics.job_started(now - table[export].since)
                log.info("submitted", export=export.name, name=name, id=last.jobs[name].id)
        return [(export, last.refused[name]) for export, name in names.items() if name in last.refused]

    def _note_trouble(self, trouble: Finding | None) -> None:
        """Say once, not at every round, that nothing can be handed over, and once that it can be again."""
        message = "" if trouble is None else trouble.message
        if trouble is not None and message != self.trouble:
            log.error(message, kind=Kind.ENGINE_DOWN, error=str(trouble.code), hint=trouble.hint)
        if self.trouble and trouble is None:
            log.info("jobs are handed over again")
        self.trouble = message

    def _ended(self, export: Path, name: str, seen: Row | None) -> list[tuple[Path, Finding]]:
        """What is to be done for a job that the engine does not have any more: nothing, if it left a report."""
        if seen is None:
            return []
        if seen.state == State.QUEUED:
            hint = f"See `hyper2kvmctl logs {export.name}`, and what the engine says of it; {_CHECK}."
            return [(export, Finding(Code.RUNNER_CRASHED, f"the job {name} ended and left nothing", hint))]
        if seen.look.report_status is not None and self._counted.get(export) != seen.look.finished_at:
            self._counted[export] = seen.look.finished_at
            with contextlib.suppress(OSError):
                self._metrics.reported(facts.read_report(export) or {})
        return []

    def waits(self, queued: Iterable[Path], table: Mapping[Path, Row]) -> dict[str, str]:
        """Why exports are queued still, by their names."""
        found = {}
        for export in queued:
            job = self._seen.jobs.get(name_of(export, table[export].look))
            if self.trouble:
                found[export.name] = self.trouble
            elif job is None:
                full = len(self._seen.jobs) >= self._limit
                found[export.name] = "waits to be handed over to the engine"
                found[export.name] += f", which has dispatch.max_submitted jobs ({self._limit})" if full else ""
            elif job.state == "waiting":
                found[export.name] = f"waits as job {job.id}" + (f": {job.reason}" if job.reason else "")
        return found


_CHECK = "`hyper2kvmctl doctor dispatch` tries every host"


def name_of(export: Path, look: Facts) -> str:
    """The name of an export's job in an engine."""
    return PREFIX + job_id(export, look.manifest_sha256 or "")


def submission(
    settings: Settings, name: str, export: Path, planned: str, placed: Placement, exclude: Iterable[str]
) -> Submission:
    """What an engine is asked for, for one export. planned: the digest of the VM's plan."""
    dispatch, kvm = settings.dispatch, ("kvm",) if settings.guest.accel == "kvm" else ()
    who = ("--submitted-by", __version__, this_host(), "--planned", planned)
    options = ("run-job", str(export), "--if-ready", "--as-before", *who)
    return Submission(
        name=name,
        words=(*dispatch.program, *options),
        log=export / LOG,
        cpus=dispatch.cpus,
        memory_mb=settings.guest.memory_mb + dispatch.memory_mb,
        scratch_mb=dispatch.scratch_mb,
        features=tuple(dict.fromkeys((*dispatch.slurm.features, *kvm, *placed.features))),
        licenses=tuple(dict.fromkeys((*dispatch.slurm.licenses, *placed.licenses))),
        priority=placed.priority,
        exclude=tuple(sorted(exclude)),
    )
