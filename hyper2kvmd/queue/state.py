"""The state of an export: one pure decision from the facts, the settings and the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Literal

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.queue.estimate import Estimate
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.queue.record import NO_RECORD, Record
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.settings.plan import NO_PLAN, VmPlan
from hyper2kvmd.text import duration


class State(StrEnum):
    """The states of an export; `state_of` says how they follow from what is on disk."""

    INCOMPLETE = "incomplete"
    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    BLOCKED = "blocked"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


JITTER = 1.25  # the most that a delay is stretched by, so that jobs that failed together do not come back together
NOT_YET = frozenset({Code.HELD, Code.PLAN_INVALID, Code.WINDOW})  # with these, a job has not even begun
FINAL = frozenset({State.BLOCKED, State.SUCCEEDED, State.FAILED, State.REJECTED, State.CANCELLED})


@dataclass(frozen=True)
class Setback:
    """A runner ended, for the `count`th time, without leaving anything in the export; none is started before `until`.

    `until` is in seconds since the epoch.
    """

    count: int
    until: float
    finding: Finding


@dataclass(frozen=True)
class Facts:
    """What one look at an export found; the state follows from this and the time alone.

    Times are seconds since the epoch. `settled_since` is when the newest file of the export was written, or renamed.
    `sizes` are those of the disks that are there, by their paths inside the export. `setback` is what a daemon of this
    host knows that could not be written there. `progress` is how far a job is that runs, as it says. `vm_name` and
    `tags` are the manifest's, if that could be read. `plan` is what is planned for the VM, and `plan_problem` what is
    wrong with that. `estimate` is what its migration will take, if that is still to come. `record`
    is what the report says of a job, as far as a list of many wants it.
    """

    manifest: str | None
    manifest_sha256: str | None = None
    problem: Finding | None = None
    unreadable: bool = False
    missing: tuple[str, ...] = ()
    settled_since: float = 0.0
    held: bool = False
    request: Literal["hold", "cancel"] | None = None
    crashes: int = 0
    began_at: float = 0.0
    report_status: str | None = None
    report_sha256: str | None = None
    report_finding: Finding | None = None
    next_attempt_at: float | None = None
    finished_at: float | None = None
    record: Record = NO_RECORD
    sizes: tuple[tuple[str, int], ...] = ()
    setback: Setback | None = None
    progress: Progress | None = None
    vm_name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    plan: VmPlan = NO_PLAN
    plan_problem: Finding | None = None
    estimate: Estimate | None = None

    def due(self, settings: Settings) -> float:
        """When an export that waits may be started: it has settled, and its window has begun."""
        window = self.plan.window(settings).not_before
        return max(self.settled_since + settings.settle_seconds, 0.0 if window is None else window.timestamp())


def state_of(facts: Facts, settings: Settings, now: float, *, any_time: bool = False) -> tuple[State, Finding | None]:
    """The state of an export, and the reason where there is one. Pure: looks at nothing but its arguments.

    any_time: whether a person wants it migrated now, whatever its window says.
    """
    state, finding = _state_on_disk(facts, settings, now)
    if state == State.QUEUED and facts.request != "cancel":
        if planned := facts.plan_problem or (_planned_hold(settings) if facts.plan.hold else None):
            return State.BLOCKED, planned
        if not any_time and (outside := _outside(facts, settings, now)):
            return outside
    # A setback that is further away than its delay is long does not count: the clock was put back meanwhile.
    setback = facts.setback
    if setback is not None and state == State.QUEUED and 0 < setback.until - now <= settings.retry.delay(setback.count):
        # What an engine refuses is for a person to change; that it is tried again now and then, as well, costs nothing.
        refused = setback.finding.code == Code.ENGINE_REFUSED
        return State.BLOCKED if refused else State.RETRYING, setback.finding
    return state, finding


def _state_on_disk(facts: Facts, settings: Settings, now: float) -> tuple[State, Finding | None]:
    """The state by what is in the export."""
    if facts.held:
        return State.RUNNING, None
    if facts.report_status is not None:
        if facts.manifest_sha256 is not None and facts.report_sha256 not in (None, facts.manifest_sha256):
            return State.BLOCKED, Finding(
                Code.MANIFEST_CHANGED,
                f"{REPORT} belongs to another manifest (sha256 {facts.report_sha256}) than the one in the export",
                "If this is a new export of the VM, move the old report away; otherwise put the old manifest back.",
            )
        due = max(facts.next_attempt_at or 0, _crash_delay(facts, settings))
        if due - now > settings.retry.max_delay_seconds * JITTER:  # no delay is that long: the clock was put back
            due = now
        if facts.report_status == State.RETRYING and facts.request == "hold":
            return _on_hold()
        if facts.report_status == State.RETRYING and (due <= now or facts.request == "cancel"):
            return State.QUEUED, facts.report_finding
        return State(facts.report_status), facts.report_finding
    if facts.manifest is None:
        return State.INCOMPLETE, None
    if facts.request == "hold":
        return _on_hold()
    if facts.request == "cancel":
        return State.QUEUED, None  # for a runner that says so in a report
    age = now - facts.settled_since
    # A modification time in the future is a clock that jumped: waiting for it could take for ever.
    settled = age < -settings.settle_seconds or age >= settings.settle_seconds
    # Half-written is normal while the exporter works; after the grace period a runner says what is wrong.
    if (facts.unreadable or facts.missing) and 0 <= age < settings.incomplete_grace_seconds:
        return State.INCOMPLETE, facts.problem
    if not settled:
        return State.WAITING, None
    if 0 < _crash_delay(facts, settings) - now <= settings.retry.max_delay_seconds:
        return State.RETRYING, None
    return State.QUEUED, None


def _on_hold() -> tuple[State, Finding]:
    return State.BLOCKED, request_error("hold").finding()


def _planned_hold(settings: Settings) -> Finding:
    hint = f"Remove `hold` from its file in {settings.plan_dir} when it may start."
    return Finding(Code.HELD, "its plan puts it on hold", hint)


def _outside(facts: Facts, settings: Settings, now: float) -> tuple[State, Finding] | None:
    """Why a job must not start now, if it must not: it waits for its window, or that is over or too short for it."""
    window = facts.plan.window(settings)
    whose = "its window" if facts.plan.has_window else f"the window of wave {facts.plan.wave}"
    if window.not_before is not None and now < window.not_before.timestamp():
        hint = "It starts by itself then; `hyper2kvmctl migrate` starts it now."
        return State.WAITING, Finding(Code.WINDOW, f"{whose} begins at {clock(window.not_before)}", hint)
    if window.not_after is None:
        return None
    hint = "Give it a later window in its plan, or in `waves`; `hyper2kvmctl migrate` starts the job now."
    left = window.not_after.timestamp() - now
    if left <= 0:
        return State.BLOCKED, Finding(Code.WINDOW, f"{whose} ended at {clock(window.not_after)}", hint)
    if facts.estimate is not None and facts.estimate.seconds > left:
        takes = f"the job would take {duration(facts.estimate.seconds)}"
        message = f"{takes} by the estimate, and {whose} ends in {duration(left)}, at {clock(window.not_after)}"
        return State.BLOCKED, Finding(Code.WINDOW, message, hint)
    return None


def clock(time: datetime) -> str:
    """A time for people, by this host's clock: 2026-12-05 20:00 +0100."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M %z")


def request_error(request: Literal["hold", "cancel"]) -> MigrationError:
    """What people ask for, as an error: held or cancelled."""
    if request == "hold":
        return MigrationError(Code.HELD, "the export is on hold", "`hyper2kvmctl release` lets it go on.")
    return MigrationError(Code.CANCELLED, "the job was cancelled", "`hyper2kvmctl retry` starts it again.")


def _crash_delay(facts: Facts, settings: Settings) -> float:
    """When an export whose last runners died may be tried again."""
    return facts.began_at + settings.retry.delay(facts.crashes) if facts.crashes else 0.0
