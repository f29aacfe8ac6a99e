"""An engine's queue in step with ours: what is handed over, what is taken back, and what comes of trouble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from hyper2kvmd.daemon.dispatcher import REFUSED_LIMIT, Round, in_step
from hyper2kvmd.dispatch.engine import Engine, Handed, Submission
from hyper2kvmd.errors import Code, MigrationError

BEFORE = Round()


def submission(name: str) -> Submission:
    return Submission(name, ("true",), Path("/dev/null"), 1, 1)


@dataclass
class Table:
    """An engine that is a table, with what is wrong with it."""

    has: list[Handed] = field(default_factory=list)
    down: bool = False
    refuses: frozenset[str] = frozenset()
    calls: list[str] = field(default_factory=list)

    def submit(self, submission: Submission) -> str:
        self.calls.append(f"submit {submission.name}")
        if self.down:
            raise MigrationError(Code.ENGINE_UNAVAILABLE, "no answer", "start it")
        if submission.name in self.refuses:
            raise MigrationError(Code.ENGINE_REFUSED, "no such partition", "change it")
        self.has.append(Handed(str(len(self.has) + 1), submission.name, "waiting"))
        return self.has[-1].id

    def jobs(self) -> list[Handed]:
        self.calls.append("jobs")
        if self.down:
            raise MigrationError(Code.ENGINE_UNAVAILABLE, "no answer", "start it")
        return [*self.has]

    def cancel(self, ids: Sequence[str]) -> None:
        self.calls.append(f"cancel {' '.join(ids)}")
        self.has = [job for job in self.has if job.id not in ids]


def step(engine: Engine, *wanted: str, ours: Sequence[str] = (), limit: int = 100, before: Round = BEFORE) -> Round:
    return in_step(engine, [submission(name) for name in wanted], frozenset([*wanted, *ours]), limit, before)


def test_what_is_wanted_and_not_there_is_handed_over_after_one_question() -> None:
    engine = Table([Handed("9", "b", "running", "kvm1")])
    found = step(engine, "a", "b", "c")
    assert ["jobs", "submit a", "submit c"] == [engine.calls[0], *sorted(engine.calls[1:])]
    assert {"a", "c"} == found.submitted
    assert {"a": "waiting", "b": "running", "c": "waiting"} == {name: job.state for name, job in found.jobs.items()}
    engine.calls.clear()
    assert frozenset() == step(engine, "a", "b", "c", before=found).submitted
    assert ["jobs"] == engine.calls


def test_what_must_not_start_any_more_is_taken_back_and_what_runs_is_left_alone() -> None:
    engine = Table([Handed("1", "held", "waiting"), Handed("2", "runs", "running", "kvm1")])
    found = step(engine, ours=("held", "runs"))
    assert ["jobs", "cancel 1"] == engine.calls
    assert ["runs"] == [*found.jobs]
    assert {"held"} == found.withdrawn, "it did not end by itself"


def test_what_waits_for_ever_is_taken_back_and_handed_over_anew_once_somebody_has_looked() -> None:
    engine = Table([Handed("1", "a", "waiting", reason="launch failed", stuck=True)])
    found = step(engine, "a")
    assert ["jobs", "cancel 1", "submit a"] == engine.calls
    assert {"a"} == found.submitted
    again = step(Table([Handed("2", "a", "waiting", stuck=True)]), "a", before=found)
    assert (frozenset(), frozenset()) == (again.submitted, again.withdrawn)


def test_what_is_wanted_otherwise_by_now_is_handed_over_anew_if_it_still_waits() -> None:
    engine = Table()
    ours = frozenset({"a", "b", "c"})
    before = in_step(engine, [submission(name) for name in "abc"], ours, 9, BEFORE)
    engine.has = [replace(job, state="running") if job.name == "c" else job for job in engine.has]
    engine.calls.clear()
    first, drained, runs = submission("a"), replace(submission("b"), exclude=("kvm1",)), submission("c")
    wanted = [replace(first, priority=5), drained, replace(runs, words=("false",))]
    found = in_step(engine, wanted, ours, 9, before)
    cancelled = next(job.id for job in before.jobs.values() if job.name == "a")
    assert ["jobs", f"cancel {cancelled}", "submit a"] == engine.calls
    assert {"a"} == found.submitted == found.withdrawn
    engine.calls.clear()
    assert frozenset() == in_step(engine, wanted, ours, 9, found).submitted
    assert ["jobs"] == engine.calls


def test_trouble_forgets_nothing_of_what_was_handed_over() -> None:
    engine = Table()
    before = in_step(engine, [submission("a")], frozenset({"a"}), 9, BEFORE)
    engine.down = True
    trouble = in_step(engine, [submission("a")], frozenset({"a"}), 9, before)
    engine.down = False
    found = in_step(engine, [replace(submission("a"), priority=1)], frozenset({"a"}), 9, trouble)
    assert {"a"} == found.submitted


def test_jobs_of_other_directories_are_nobodys_business_here() -> None:
    engine = Table([Handed("1", "somebody-elses", "waiting")])
    assert {} == step(engine).jobs
    assert ["jobs"] == engine.calls


def test_no_more_than_the_limit_are_with_the_engine_and_the_first_go_first() -> None:
    engine = Table([Handed("7", "x", "running", "kvm1")])
    found = step(engine, "a", "b", "c", "d", ours=("x",), limit=3)
    assert {"a", "b"} == found.submitted
    assert frozenset() == step(engine, "a", "b", "c", "d", ours=("x",), limit=3, before=found).submitted


def test_an_engine_that_is_down_is_trouble_and_what_is_known_stays_known() -> None:
    engine = Table()
    before = step(engine, "a")
    engine.down = True
    found = step(engine, "a", "b", before=before)
    assert ("no answer", before.jobs, before.asked) == (
        found.trouble and found.trouble.message,
        found.jobs,
        found.asked,
    )
    engine.down = False
    again = step(engine, "a", "b", before=found)
    assert {"b"} == again.submitted
    assert again.trouble is None


def test_what_is_gone_is_not_handed_over_before_somebody_has_looked_what_came_of_it() -> None:
    engine = Table()
    before = step(engine, "a")
    engine.has.clear()
    found = step(engine, "a", before=before)
    assert (frozenset(), {}) == (found.submitted, {**found.jobs})
    assert {"a"} == step(engine, "a", before=found).submitted


def test_a_job_that_is_refused_keeps_no_other_out() -> None:
    engine = Table(refuses=frozenset({"b"}))
    found = step(engine, "a", "b", "c")
    assert {"a", "c"} == found.submitted
    assert ["b"] == [*found.refused]
    assert found.trouble is None


def test_when_all_are_refused_it_is_not_about_the_jobs_and_the_rest_is_spared() -> None:
    names = [f"vm{n}" for n in range(200)]
    engine = Table(refuses=frozenset(names))
    found = step(engine, *names)
    assert found.trouble is not None
    assert "no such partition" == found.trouble.message
    assert REFUSED_LIMIT <= len(engine.calls) - 1 < 20


@pytest.mark.parametrize("limit", [0, 1])
def test_a_limit_that_is_reached_already_hands_nothing_over(limit: int) -> None:
    engine = Table([Handed("1", "a", "running", "kvm1")])
    assert frozenset() == step(engine, "b", ours=("a",), limit=limit).submitted
