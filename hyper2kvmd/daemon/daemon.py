"""The daemon: looks at the exports directory and keeps at most `workers` runners alive."""

from __future__ import annotations

import contextlib
import math
import os
import random
import selectors
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from hyper2kvmd import journal
from hyper2kvmd.daemon.handover import Handover
from hyper2kvmd.daemon.health import REMEDY
from hyper2kvmd.daemon.live import Look
from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.daemon.periodic import PeriodicTask
from hyper2kvmd.daemon.placer import Placer, Row
from hyper2kvmd.daemon.public import Public
from hyper2kvmd.daemon.pulse import Pulse
from hyper2kvmd.daemon.runner import Runner, stop_all
from hyper2kvmd.daemon.systemd import Notifier, status_line
from hyper2kvmd.daemon.watch import POLL_SECONDS, Scan, Scanner, Watch
from hyper2kvmd.dispatch.engines import engine_of
from hyper2kvmd.errors import Code, Finding, MigrationError, SettingsError
from hyper2kvmd.exits import EXIT_BUSY, EXIT_DONE, EXIT_FAILED, EXIT_TEMPORARY
from hyper2kvmd.job.request import Request
from hyper2kvmd.messages import Kind
from hyper2kvmd.notify import outbox
from hyper2kvmd.queue import setbacks
from hyper2kvmd.queue.placement import declined, placement
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.queue.state import FINAL, Facts, Setback, State, state_of
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()

# After a look, events wait for so many times as long as it took, but not for longer than a second: an export is seen at
# once when it comes alone, and while many come, the looks take a fifth of the time at most.
PAUSE_FACTOR = 4
PAUSE_SECONDS = 1.0
# At rest, where events say when to look, looks take a hundredth of the time.
REST_FACTOR = 100
PRUNE_SECONDS = 3600.0
NOTIFY_SECONDS = 5.0
STOP = {signal.SIGTERM, signal.SIGINT}
BUSY_SECONDS = 1.0  # how often STATUS is refreshed while jobs run
SCANNING_SECONDS = 0.2  # how often it is asked whether a look that takes long has ended
REST_SECONDS = 15.0  # how often the loop comes round when nothing happens, so that one that hangs can be told from it


class Daemon:
    """One daemon on one exports directory. `tick` is its whole work; `run` calls it until told to stop."""

    def __init__(self, settings: Settings, load: Callable[[], Settings], metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.runners: dict[Path, Runner] = {}
        self._slots: dict[Path, int] = {}  # of the runners: from 0, less than `workers` when they start
        self.table: dict[Path, Row] = {}
        # What cannot be on disk in the exports, because they cannot be written to.
        self._setbacks = setbacks.read(settings.work_dir)
        self.draining = ""  # the command that ends it, if a person has said so
        self.retiring = False  # this daemon: it ends with its last runner, so that another version can take over
        self._trouble = ""
        self._ignored: set[Finding] = set()
        self._unreadable: dict[Path, Finding] = {}
        self._load = load
        self._notifier = Notifier()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._signals: set[int] = set()
        self._watch = Watch(self.wake, metrics.watched)
        self._handover = Handover()
        self._queue_watch = Watch(self._handed_over)
        self._pulse = Pulse()
        self._scanner = Scanner(self._watch, self._handover, self._queue_watch, self._pulse)
        self._placer = Placer(self.wake, metrics)
        # By export: its newest modification, and when that was by a clock that does not jump.
        self._settling: dict[Path, tuple[float, float]] = {}
        self._last_status = ""
        self._rested_at = 0.0  # when the next look may be taken at the earliest (monotonic)
        self._prune = PeriodicTask("prune", PRUNE_SECONDS, metrics.task_failed)
        self._notify = PeriodicTask(
            "notify", NOTIFY_SECONDS, metrics.task_failed, (EXIT_DONE, EXIT_FAILED, EXIT_BUSY)
        )  # a receiver that fails has metrics of its own
        # systemd is told twice as often as it asks for.
        interval = self._notifier.watchdog_interval()
        self._public = Public(lambda: self.settings, metrics, None if interval is None else 2 * interval)
        self.health = self._public.health
        metrics.show({}, settings.workers)
        metrics.reload(accepted=True)

    def wake(self) -> None:
        """Have the directory looked at soon. Safe in threads and signal handlers."""
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already
            os.write(self._wake_write, b"w")

    def _handed_over(self) -> None:
        """Something is in the queue of exporters: it is taken out at once, in the thread that heard of it."""
        self._handover.receive(self.settings)
        self.wake()

    def run(self, *, once: bool = False) -> int:
        """Work until SIGTERM or SIGINT; with `once`, until there is nothing left to do. Return the exit status.

        After SIGQUIT nothing is started any more, and with the last runner it ends: EXIT_TEMPORARY.

        Raise SettingsError before anything is done, if metrics cannot be served as the settings say.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._signal)
        self.metrics.count_log()
        self._serve(self.settings)
        log.info(
            "watching", kind=Kind.WATCHING, directory=str(self.settings.exports_dir), workers=self.settings.workers
        )
        try:
            self._loop(once)
        finally:
            self._stop()
        if self.retiring and not self._signals & STOP:
            return EXIT_TEMPORARY
        return (
            EXIT_DONE if not once or all(seen.state == State.SUCCEEDED for seen in self.table.values()) else EXIT_FAILED
        )

    def tick(self, now: float) -> float:
        """Look at every export, start what is ready, and return the seconds until the next look is due.

        If the look takes long, it goes on by itself, nothing is started, and the answer is infinity.
        """
        found = self._scanner.scan(self.settings)
        if found is not None and found.settings is not self.settings:  # reloaded meanwhile
            found = self._scanner.scan(self.settings)
        if found is None:
            if hangs := self._scanner.hangs():
                self._note_trouble(hangs)
                self.metrics.watcher_up.set(0)
            return math.inf
        self.metrics.watcher_up.set(self._watch.up)
        self._scan(now, found)
        self.draining = found.resume
        self.metrics.draining.set(self._starts_nothing)
        due = self._start(now, found)
        self._count(now, found)
        self._public.live.show(Look(self.settings.exports_dir, self.table, self._unreadable, found.hosts, now))
        self._rested_at = time.monotonic() + min(PAUSE_FACTOR * found.seconds, PAUSE_SECONDS)
        return min(self._next_look(now, found.seconds), self._do_periodic(now), due)

    def _do_periodic(self, now: float) -> float:
        """Have done what is due beside the jobs, and return the seconds until something is."""
        standing = outbox.standing(self.settings)
        if standing.known:
            self.metrics.notified(standing.pending, standing.given_up)
        if standing.due is not None:
            self._notify.due = min(self._notify.due, time.monotonic() + max(standing.due - now, 0))
        left = self._notify.run(self.settings)
        if not self._starts_nothing:
            self._prune.due = min(self._prune.due, time.monotonic() + PRUNE_SECONDS)
            self._prune.run(self.settings)
        return left

    @property
    def _starts_nothing(self) -> bool:
        return bool(self.draining) or self.retiring

    def status(self) -> str:
        """One line for people: what runs, what waits, what is over."""
        # The table is as old as the last scan; who runs is known.
        states = Counter(seen.state for export, seen in self.table.items() if export not in self.runners)
        words = {State.SUCCEEDED: "done"}
        others = [state for state in State if states[state] and state != State.RUNNING]
        parts = [f"{states[state]} {words.get(state, state)}" for state in others]
        rest = [self._placer.trouble, self._trouble]
        if self.draining:
            rest[:0] = [f"draining: no job is started (`{self.draining}` ends that)"]
        if self.retiring:
            rest[:0] = ["ends with its last job, then restarts"]
        now = time.monotonic()
        here = [runner.progress.phrase(now) for runner in self.runners.values()]
        there = [progress.phrase(now) for progress in self._elsewhere()]
        return status_line(here, parts, states[State.RUNNING], there, [text for text in rest if text])

    def _elsewhere(self) -> list[Progress]:
        """How far the jobs of other hosts are, and those that an engine or a person started on this one."""
        looks = (seen.look for export, seen in self.table.items() if export not in self.runners)
        return [look.progress for look in looks if look.progress is not None]

    def _loop(self, once: bool) -> None:
        watchdog = self._notifier.watchdog_interval()
        next_scan = 0.0  # monotonic
        ready = False
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            watched: dict[int, Runner] = {}
            while not self._signals & STOP:
                if signal.SIGHUP in self._signals:
                    self._signals.discard(signal.SIGHUP)
                    self._notifier.reloading()
                    self._reload()
                    next_scan, ready = 0, False
                if signal.SIGQUIT in self._signals and not self.retiring:
                    self.retiring = self._pulse.retiring = True
                    log.info("no job is started any more; the daemon ends with the last that runs", kind=Kind.RETIRING)
                # Every end of a runner changes the picture: a place is free, a report is there.
                if self._reap(selector, watched):
                    next_scan = 0
                if self.retiring and not self.runners:
                    return
                if time.monotonic() >= next_scan or self._scanner.busy:
                    if not self._scanner.busy:
                        next_scan = math.inf  # from here on, what happens calls for another look
                    seconds = self.tick(time.time())
                    next_scan = min(next_scan, time.monotonic() + seconds)
                    if not ready and not self._scanner.busy:
                        self._tell()  # first, so that whoever waits for READY finds it
                        self._notifier.ready()
                        ready = True
                    for runner in self.runners.values():
                        if runner.events_fd not in watched:
                            selector.register(runner.events_fd, selectors.EVENT_READ)
                            watched[runner.events_fd] = runner
                    if once and not self.runners and not self._pending() and not self._scanner.busy:
                        self._notify.finish(self.settings)
                        return
                self._tell()
                # Not by a loop that goes round and never looks. A look that hangs counts: a restart repairs no storage.
                if self._scanner.busy or next_scan < math.inf:
                    self._notifier.alive()
                    self.health.turned = time.monotonic()
                timeout = next_scan - time.monotonic()
                for limit in (
                    REST_SECONDS,
                    watchdog,
                    BUSY_SECONDS if self.runners else None,
                    SCANNING_SECONDS if self._scanner.busy else None,
                ):
                    timeout = timeout if limit is None else min(timeout, limit)
                for key, _ in selector.select(max(timeout, 0)):
                    if key.fd == self._wake_read:
                        os.read(self._wake_read, 65536)
                        next_scan = min(next_scan, max(time.monotonic(), self._rested_at))
                    else:
                        self._read(watched[key.fd])

    def _signal(self, number: int, frame: object) -> None:
        if number != signal.SIGCHLD:
            self._signals.add(number)
        self.wake()

    def _note_trouble(self, trouble: str) -> None:
        """Say once, not at every scan, that the directory cannot be read, and once that it can be again."""
        if trouble and not self._trouble:
            self.metrics.scan_errors.labels("directory").inc()
            log.error(trouble, kind=Kind.EXPORTS_UNREADABLE, hint=REMEDY["exports"])
        elif self._trouble and not trouble:
            log.info("the exports directory can be read again", directory=str(self.settings.exports_dir))
        self._trouble = self.health.trouble = trouble

    def _scan(self, now: float, found: Scan) -> None:
        """Work out the state of every export from what a look at them found."""
        self._note_trouble(found.trouble)
        for ignored in sorted(set(found.ignored) - self._ignored, key=str):
            log.warning(ignored.message, hint=ignored.hint)
        self._ignored = set(found.ignored)
        for export, why in found.unreadable.items():
            self.metrics.scan_errors.labels("export").inc()
            if why != self._unreadable.get(export):
                log.error("cannot read an export", directory=str(export), reason=why.message)
        self._unreadable = found.unreadable
        table: dict[Path, Row] = {}
        for export, look in found.looks.items():
            setback = self._setbacks.get(export)
            look = replace(look, settled_since=self._settled_since(export, look, now), setback=setback)
            state, finding = state_of(look, self.settings, now)
            if setback is not None and finding is setback.finding:
                look = replace(look, next_attempt_at=setback.until)
            before = self.table.get(export)
            if before is None or before.state != state:
                details = {} if finding is None else {"code": finding.code, "reason": finding.message}
                log.debug("state", export=export.name, state=str(state), **details)
                if state in FINAL:
                    self._notify.due = 0.0
            table[export] = Row(state, finding, look, self._since(before, state, look, now))
        self.table = table
        there = {**found.looks, **found.unreadable}
        over = {export for export, seen in table.items() if seen.state in FINAL and seen.look.report_status}
        if not found.trouble and (gone := [e for e in self._setbacks if e not in there or e in over]):
            self._forget_setbacks(gone)
        self._settling = {export: times for export, times in self._settling.items() if export in table}

    def _settled_since(self, export: Path, look: Facts, now: float) -> float:
        """When an export was last written to, by a clock that does not jump once it has been seen.

        A modification in the future, by a file server whose clock is ahead, counts from when it was first seen.
        """
        modified, then = self._settling.get(export, (None, 0.0))
        if modified != look.settled_since:
            age = now - look.settled_since
            then = time.monotonic() - (0 if age < -self.settings.settle_seconds else age)
            self._settling[export] = (look.settled_since, then)
        return now - (time.monotonic() - then)

    def _since(self, before: Row | None, state: State, look: Facts, now: float) -> float:
        """When an export could have been started, or when it was first seen in the state that it is in."""
        if before is not None and before.state == state:
            return before.since
        if before is not None and before.state not in (State.INCOMPLETE, State.WAITING, State.RETRYING):
            return now
        due = look.next_attempt_at or (before.look.next_attempt_at if before is not None else None)
        return max(look.due(self.settings), due or 0)

    def _start(self, now: float, found: Scan) -> float:
        """Start what can be started, here or by an engine; return the seconds until it is to be tried again."""
        queued = [export for export, seen in self.table.items() if seen.state == State.QUEUED]
        looks = {export: self.table[export].look for export in queued}
        placements = {export: placement(self.settings, export.name, look) for export, look in looks.items()}
        # Of one priority, the oldest first: who has waited longest is served first.
        queued.sort(key=lambda export: (-placements[export].priority, looks[export].settled_since, export.name))
        engine = engine_of(self.settings)
        if engine is None:
            self._pulse.waits = self._start_here(now, queued)
            return math.inf
        if self.retiring or found.trouble:
            return math.inf
        wanted = [] if found.draining_all else [(export, placements[export]) for export in queued]
        due, set_back = self._placer.place(engine, self.settings, self.table, wanted, found, now)
        for export, finding in set_back:
            self._set_back(export, finding)
        self._pulse.waits = self._placer.waits(queued, self.table)
        return due

    def _start_here(self, now: float, queued: Sequence[Path]) -> dict[str, str]:
        """Start jobs on this host as long as there are workers; return why it leaves exports to others."""
        waits: dict[str, str] = {}
        if self._starts_nothing:
            return waits
        verdict = self.health.checks(time.monotonic())["output"]
        output_free = None if math.isnan(verdict.value) else int(verdict.value)
        for export in queued:
            look = self.table[export].look
            if why := declined(look, self.settings, output_free=output_free, kvm=self._pulse.kvm):
                waits[export.name] = why
                continue
            if len(self.runners) < self.settings.workers and export not in self.runners:
                try:
                    before = self._setbacks.get(export)
                    crashed = before is not None and before.finding.code == Code.RUNNER_CRASHED
                    died = before.finding.message if before is not None and crashed else ""
                    request = Request(if_ready=True, died=died)
                    self.runners[export] = Runner(export, self.settings, request)
                    self._slots[export] = min({*range(len(self._slots) + 1)} - {*self._slots.values()})
                except (OSError, MigrationError) as error:
                    code = error.code if isinstance(error, MigrationError) else Code.IO_ERROR
                    hint = "See what the host is short of."
                    self._set_back(export, Finding(code, f"no runner can be started: {error}", hint))
                    continue
                self.metrics.job_started(now - self.table[export].since)
                log.info("started", export=export.name, pid=self.runners[export].pid)
        return waits

    def _count(self, now: float, found: Scan) -> None:
        """Show what a look found."""
        states = Counter(State.RUNNING if export in self.runners else seen.state for export, seen in self.table.items())
        waiting = (
            seen.since
            for export, seen in self.table.items()
            if seen.state == State.QUEUED and export not in self.runners
        )
        self.metrics.looked((seen.look for seen in self.table.values()), states, min(waiting, default=None), now)
        self.metrics.scan_seconds.observe(found.seconds)
        self.metrics.fleet.show(self._elsewhere(), found.hosts, len(self.runners))
        self.health.interval = self._pulse.interval = self._interval(found.seconds) + found.seconds
        self.health.looked = time.monotonic()

    def _interval(self, took: float) -> float:
        """Seconds until the next look if nothing happens, after one that took so long."""
        interval = self.settings.scan_interval_seconds
        if self._watch.polls:
            return max(min(interval, POLL_SECONDS), PAUSE_FACTOR * took)  # a file server has others to serve
        seen = self._watch.up and (self.settings.hypersdk.queue_dir is None or self._queue_watch.up)
        return max(interval, REST_FACTOR * took) if seen else interval

    def _next_look(self, now: float, took: float) -> float:
        interval = self._interval(took) * random.uniform(0.75, 1.25)
        for seen in self.table.values():
            if seen.state == State.WAITING:
                interval = min(interval, seen.look.due(self.settings) - now)
            elif seen.state == State.RETRYING and seen.look.next_attempt_at is not None:
                interval = min(interval, seen.look.next_attempt_at - now)
        return max(interval, 0.1)

    def _pending(self) -> bool:
        """Whether there is something that this daemon will do soon without anybody doing anything."""
        others = set() if self.settings.dispatch.engine != "local" else {*self._pulse.waits}
        states = {seen.state for export, seen in self.table.items() if not (seen.for_later or export.name in others)}
        return not states.isdisjoint({State.WAITING, State.QUEUED}) or self._placer.has_jobs

    def _read(self, runner: Runner) -> None:
        for event in runner.read():
            self.metrics.event(event)

    def _reap(self, selector: selectors.BaseSelector, watched: dict[int, Runner]) -> bool:
        """Take leave of the runners that ended; whether there were any."""
        ended = {export: runner for export, runner in self.runners.items() if runner.poll() is not None}
        for export, runner in ended.items():
            self._read(runner)
            finished = runner.progress.finished
            self.metrics.job_ended(finished)
            if finished is None:
                how = runner.poll() or 0
                reason = f"ended with status {how} and said nothing"
                if how < 0:
                    reason = f"was killed by signal {-how} ({signal.strsignal(-how)})"
                hint = "See the journal of that time, and `journalctl -k`."
                self._set_back(export, Finding(Code.RUNNER_CRASHED, f"the runner {reason}", hint))
            elif finished["status"] in ("unclaimed", "unreported"):
                self._set_back(export, Finding(finished["code"], finished["message"], finished["hint"]))
            elif finished["status"] not in ("busy", "nothing") and export in self._setbacks:
                self._forget_setbacks([export])
            if watched.pop(runner.events_fd, None) is not None:
                selector.unregister(runner.events_fd)
            runner.close()
            del self.runners[export], self._slots[export]
            self._notify.due = 0.0
        return bool(ended)

    def _set_back(self, export: Path, finding: Finding) -> None:
        """Leave an export alone for a while, longer each time."""
        count = self._setbacks[export].count + 1 if export in self._setbacks else 1
        delay = self.settings.retry.delay(count)
        self._setbacks[export] = Setback(count, time.time() + delay, finding)
        setbacks.write(self.settings.work_dir, self._setbacks)
        log.error(
            finding.message,
            kind=Kind.RUNNER_DIED,
            error=str(finding.code),
            export=export.name,
            hint=finding.hint,
            next_attempt_in_seconds=round(delay),
        )

    def _forget_setbacks(self, exports: Iterable[Path]) -> None:
        for export in exports:
            del self._setbacks[export]
        setbacks.write(self.settings.work_dir, self._setbacks)

    def _tell(self) -> None:
        progress = {slot: self.runners[export].progress for export, slot in self._slots.items()}
        self.metrics.show(progress, self.settings.workers)
        self._public.live.tell({export: runner.progress for export, runner in self.runners.items()}, self._trouble)
        status = self.status()
        if status != self._last_status:
            self._notifier.status(status)
            self._last_status = status

    def _serve(self, settings: Settings) -> None:
        """Show the daemon as the settings say from now on. Raise SettingsError; then all is as it was."""
        self._public.apply(settings)
        self.settings = settings
        try:
            outbox.begin(settings)
        except OSError as error:
            log.warning("notifications may be missing", directory=str(settings.work_dir), reason=error.strerror)
        self._public.try_now(settings)

    def _reload(self) -> None:
        try:
            settings = self._load()
            self._serve(settings)
        except SettingsError as error:
            self.metrics.reload(accepted=False)
            self.health.refused = str(error)
            bad = "the new configuration is bad, the old one stays in force"
            log.error(bad, kind=Kind.CONFIG_BAD, reason=str(error))
            return
        self.metrics.reload(accepted=True)
        # The settings may ask for something else now.
        self._forget_setbacks([e for e, back in self._setbacks.items() if back.finding.code == Code.ENGINE_REFUSED])
        self.health.refused = ""
        journal.configure(settings.log.level)
        self.metrics.count_log()
        log.info("configuration reloaded", kind=Kind.RELOADED, workers=settings.workers)

    def _stop(self) -> None:
        """Stop the runners and wait for them: their jobs are done again by the next start."""
        self._notifier.stopping()
        self._pulse.stop(self.settings)
        stop_all(self.runners.values())
        self._prune.end()
        self._notify.end()
        jobs = len(self.runners)
        log.info("stopped; the jobs that ran go on at the next start", kind=Kind.STOPPED, jobs=jobs)
