"""Keeps the queue of an engine in step with the exports directory: hands jobs over, and takes back what must wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from hyper2kvmd.dispatch.engine import Engine, Handed, Submission
from hyper2kvmd.errors import Code, Finding, MigrationError

AT_ONCE = 4  # submissions: each mostly waits for the engine
ROUND_SECONDS = 2.0  # between two rounds, whatever happens in the exports directory
POLL_SECONDS = 10.0  # and at rest
REFUSED_LIMIT = 3  # so many jobs in a row that are refused mean that it is not about the jobs


@dataclass(frozen=True)
class Round:
    """What came of one round, which asked the engine at `asked` (monotonic) what it has.

    jobs: what it has by now, by our names; submitted: those of them that it was given in this round; withdrawn: what
    was taken back, as it must not start, or not like that. asked_for: as what each was handed over by this daemon.
    refused: by name, why it did not take a job. trouble: why nothing more could be done, if that is so.
    """

    asked: float = 0.0
    jobs: Mapping[str, Handed] = field(default_factory=dict)
    submitted: frozenset[str] = frozenset()
    withdrawn: frozenset[str] = frozenset()
    asked_for: Mapping[str, Submission] = field(default_factory=dict)
    refused: Mapping[str, Finding] = field(default_factory=dict)
    trouble: Finding | None = None


class Dispatcher:
    """One round at a time, in a thread: an engine that hangs holds up nothing but the next round."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.last = Round()
        self._wake = wake
        self._thread: threading.Thread | None = None
        self._ended = 0.0

    @property
    def busy(self) -> bool:
        """Whether a round has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, engine: Engine, wanted: Sequence[Submission], ours: frozenset[str], limit: int) -> float:
        """Begin a round if it is time, and return the seconds until another look may find that it is.

        wanted: the jobs that are to be with the engine, the first first. ours: the names of all jobs of the exports
        directory; what the engine has besides is somebody else's. limit: so many jobs are with it at most.
        """
        if self.busy:
            return POLL_SECONDS
        names, there = {submission.name for submission in wanted}, self.last.jobs
        new = bool(names - {*there}) and len(there) < limit and self.last.trouble is None
        changed = _changed(self.last, wanted)
        stale = any(job.state == "waiting" and (name not in names or name in changed) for name, job in there.items())
        left = self._ended + (ROUND_SECONDS if new or stale else POLL_SECONDS) - time.monotonic()
        if self._ended and left > 0:
            return left
        work = (engine, tuple(wanted), ours, limit)
        self._thread = threading.Thread(target=self._work, args=work, name="dispatch", daemon=True)
        self._thread.start()
        return POLL_SECONDS

    def _work(self, engine: Engine, wanted: Sequence[Submission], ours: frozenset[str], limit: int) -> None:
        self.last = in_step(engine, wanted, ours, limit, self.last)
        self._ended = time.monotonic()
        self._wake()


def in_step(engine: Engine, wanted: Sequence[Submission], ours: frozenset[str], limit: int, before: Round) -> Round:
    """Do one round: one question what there is; then take back, then hand over."""
    asked = time.monotonic()
    try:
        listed = [job for job in engine.jobs() if job.name in ours]
        names = {submission.name for submission in wanted}
        changed = _changed(before, wanted)
        # What runs decides for itself: its runner sees who is on hold or cancelled, and stops.
        waiting = [job for job in listed if job.state == "waiting"]
        stale = [job for job in waiting if job.stuck or job.name not in names or job.name in changed]
        if stale:
            engine.cancel([job.id for job in stale])
    except MigrationError as error:
        return Round(before.asked, before.jobs, asked_for=before.asked_for, trouble=error.finding())
    jobs = {job.name: job for job in listed if job not in stale}
    withdrawn = frozenset(job.name for job in stale if not job.stuck)
    # What was there and is gone has ended: whether it left anything is for the next look to say.
    known = {*jobs, *before.jobs} - withdrawn
    due = [submission for submission in wanted if submission.name not in known][: max(limit - len(jobs), 0)]
    refused: dict[str, Finding] = {}
    taken: list[str] = []
    trouble: list[Finding] = []

    def hand_over(submission: Submission) -> None:
        if trouble:
            return  # what keeps one out keeps out the rest
        try:
            id = engine.submit(submission)
        except MigrationError as error:
            if error.code == Code.ENGINE_REFUSED:
                refused[submission.name] = error.finding()
            if error.code != Code.ENGINE_REFUSED or (not taken and len(refused) >= REFUSED_LIMIT):
                trouble.append(error.finding())
        else:
            jobs[submission.name] = Handed(id, submission.name, "waiting")
            taken.append(submission.name)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(hand_over, due))
    handed = {**before.asked_for, **{submission.name: submission for submission in due}}
    asked_for = {name: submission for name, submission in handed.items() if name in jobs}
    return Round(asked, jobs, frozenset(taken), withdrawn, asked_for, refused, trouble[0] if trouble else None)


def _changed(before: Round, wanted: Sequence[Submission]) -> set[str]:
    """What is wanted otherwise by now than it was handed over: with another priority, on other hosts, by another plan.

    Which hosts must not get it is for their runners to see. What another daemon handed over is left as it is.
    """
    return {
        one.name
        for one in wanted
        if one.name in before.asked_for and replace(before.asked_for[one.name], exclude=()) != replace(one, exclude=())
    }
