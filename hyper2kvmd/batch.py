"""Migrates every export of a directory, in the order that a plan gives, and ends; `hyper2kvmctl batch` shows it."""

from __future__ import annotations

import select
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from hyper2kvmd.daemon.runner import Runner, stop_all
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.job.request import Request
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.asked import Asked
from hyper2kvmd.queue.placement import placement
from hyper2kvmd.queue.state import FINAL, Facts, State, state_of
from hyper2kvmd.settings.model import Section, Settings
from hyper2kvmd.settings.plan import NO_PLAN, VmPlan

POLL_SECONDS = 0.2


class BatchPlan(Section):
    """A plan file: the plans of single VMs, by the names of their exports' directories. They go before plan_dir."""

    vms: dict[str, VmPlan] = Field(default_factory=dict)


@dataclass
class BatchEntry:
    """One export of the batch.

    `report` is that of its last attempt here, which began at `began` and took `seconds`; `tries` counts these attempts.
    `due` is when it may be started, in seconds since the epoch.
    """

    export: Path
    plan: VmPlan
    state: State
    reason: Finding | None = None
    runner: Runner | None = None
    report: dict[str, Any] | None = None
    priority: int = 0
    tries: int = 0
    began: float = 0.0
    seconds: float = 0.0
    due: float = 0.0

    def waits(self, settings: Settings) -> bool:
        """Whether it is still to be migrated by this batch."""
        tries = self.tries < settings.retry.max_attempts
        later = self.reason is not None and self.reason.code == Code.WINDOW  # which may be days away
        return (
            self.runner is None and tries and not later and self.state in (State.QUEUED, State.WAITING, State.RETRYING)
        )


def entries(settings: Settings, plan: BatchPlan, *, dry_run: bool) -> list[BatchEntry]:
    """The exports in the order in which they will be migrated, with the states that they are in. Raise OSError."""
    found = []
    for export in facts.exports(settings)[0]:
        wanted = plan.vms.get(export.name, NO_PLAN)
        if wanted.hold:
            continue
        entry = BatchEntry(export, wanted, State.QUEUED)
        _look(entry, settings)
        if dry_run and entry.state in FINAL - {State.SUCCEEDED}:
            entry.state, entry.reason = State.QUEUED, None  # what was decided before is looked at again
        found.append(entry)
    return sorted(found, key=lambda entry: (-entry.priority, entry.export.name))


def run(
    batch: Sequence[BatchEntry],
    settings: Settings,
    *,
    workers: int,
    asked: Asked,
    dry_run: bool,
    changed: Callable[[BatchEntry | None], None],
) -> None:
    """Migrate the entries, `workers` at a time, until each has ended or has been tried `retry.max_attempts` times.

    `asked`, and what an entry's options say, is kept for every later attempt; where there is neither, what was asked
    before still holds. `settings` have it already. `changed` is called with an entry when it starts and ends, and with
    None a few times a second. On KeyboardInterrupt the jobs are stopped, so that they go on where they were when the
    batch is run again.
    """
    try:
        while any(entry.waits(settings) or entry.runner is not None for entry in batch):
            running = [entry for entry in batch if entry.runner is not None]
            for entry in batch:
                if len(running) >= workers:
                    break
                if entry.state == State.WAITING and entry.due <= time.time():
                    _look(entry, settings)  # it may be being written to still
                if entry.waits(settings) and entry.due <= time.time():
                    _start(entry, settings, asked, dry_run)
                    running += [entry] if entry.runner is not None else []
                    changed(entry)
            select.select([entry.runner.events_fd for entry in running if entry.runner], [], [], POLL_SECONDS)
            for entry in running:
                if entry.runner is not None:
                    for _event in entry.runner.read():
                        pass  # the runner's progress is all that is shown
                    if entry.runner.poll() is not None:
                        _ended(entry, settings)
                        changed(entry)
            changed(None)
    finally:
        stop_all(entry.runner for entry in batch if entry.runner is not None)


def _look(entry: BatchEntry, settings: Settings) -> None:
    look = facts.look_or_reason(entry.export, settings)
    if not isinstance(look, Facts):
        gone = Finding(Code.DISK_MISSING, f"{entry.export} is gone", "Put it back, and run the batch again.")
        entry.state, entry.reason = State.FAILED, look or gone
        return
    entry.state, entry.reason = state_of(look, settings, time.time())
    entry.priority = (
        placement(settings, entry.export.name, look).priority if entry.plan.priority is None else entry.plan.priority
    )
    entry.due = look.due(settings) if entry.state == State.WAITING else 0.0


def _start(entry: BatchEntry, settings: Settings, asked: Asked, dry_run: bool) -> None:
    overrides = (*asked.overrides, *entry.plan.overrides(settings))
    wanted = Asked(asked.stages, entry.plan.name, overrides)
    request = Request(None if wanted == Asked() else wanted, dry_run=dry_run)
    entry.tries += 1
    entry.began = time.monotonic()
    try:
        # What it has to say comes as events, and is in its log; here it would only disturb the table.
        entry.runner = Runner(entry.export, settings, request, stderr=subprocess.DEVNULL)
    except (OSError, MigrationError) as error:
        _set_back(entry, settings, Finding(Code.IO_ERROR, f"no runner can be started: {error}", "See what is missing."))
    else:
        entry.state, entry.reason = State.RUNNING, None


def _ended(entry: BatchEntry, settings: Settings) -> None:
    """Take down how a runner ended."""
    runner = entry.runner
    assert runner is not None
    entry.runner = None
    entry.seconds = time.monotonic() - entry.began
    runner.close()
    finished = runner.progress.finished
    if finished is not None and "report" in finished:
        entry.report = finished["report"]
        error = finished["report"]["error"]
        entry.state = State(finished["status"])
        entry.reason = None if error is None else Finding(*(error[key] for key in ("code", "message", "hint", "field")))
        if entry.state == State.RETRYING:
            _set_back(entry, settings, entry.reason)
    elif finished is not None and finished["status"] == "busy":
        entry.state, entry.reason = State.RUNNING, _finding(finished)
        look = facts.look_or_reason(entry.export, settings)
        if isinstance(look, Facts) and look.progress is not None:
            doing = f"{entry.reason.message}: {look.progress.doing(time.monotonic())}"
            entry.reason = replace(entry.reason, message=doing)
    elif finished is not None and finished["status"] in ("nothing", "interrupted"):
        _look(entry, settings)
    else:
        hint = f"See `hyper2kvmctl logs {entry.export.name}`, and `journalctl -k`."
        died = Finding(Code.RUNNER_CRASHED, f"the runner ended with status {runner.poll()} and said nothing", hint)
        _set_back(entry, settings, died if finished is None else _finding(finished))


def _set_back(entry: BatchEntry, settings: Settings, reason: Finding | None) -> None:
    """Have an entry tried again later."""
    entry.state, entry.reason = State.RETRYING, reason
    entry.due = time.time() + settings.retry.delay(entry.tries)


def _finding(finished: dict[str, Any]) -> Finding:
    return Finding(finished["code"], finished["message"], finished["hint"])
