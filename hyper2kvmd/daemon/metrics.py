"""Every metric of the daemon: what is counted, with every label from the start, and what is shown of jobs that run."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.core import InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hyper2kvmd import __version__
from hyper2kvmd.daemon.fleet import NAMESPACE, Fleet
from hyper2kvmd.daemon.health import Health, Verdict
from hyper2kvmd.daemon.web import Answer
from hyper2kvmd.errors import MEANING, Code
from hyper2kvmd.job.events import STAGES, Event
from hyper2kvmd.journal import PRIORITY
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.queue.state import FINAL, Facts, State
from hyper2kvmd.text import plain

# From a second to a day: small disks are common, and so are nights. Each bucket is a series, so what there is once for
# each stage has few.
BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
FEW_BUCKETS = (60, 600, 3600, 86400)
STAGE_BUCKETS = (60, 3600)  # there are many stages
SCAN_BUCKETS = (0.1, 1, 10, 60)
RESULTS = tuple(
    sorted({*(str(state) for state in FINAL), "retrying", "interrupted", "crashed", "unclaimed", "unreported"})
)
READ = ("verify", "convert", "validate")  # the stages that count the bytes of the sources' disks
FORMATS = ("qcow2", "raw")
CONVERTED = {"stream": ("read", "inflated", "written"), "qemu-img": ("read", "written")}  # what is counted of which
CHECKS = ("settings", "exports", "locks", "libvirt", "output", "work")
POOLS = ("output", "work")
# Before there is a job that could end so.
NO_JOB = {Code.ENGINE_UNAVAILABLE, Code.ENGINE_REFUSED, Code.NOT_ACCEPTED, Code.WINDOW}
TAGS_LIMIT = 200
# A series for each of when a counter was created would double what there is, and Prometheus does not need them.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The daemon's metrics; one instance belongs to one daemon, tests make as many as they need."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._running: tuple[tuple[str, ...], ...] = ()  # replaced as a whole: it is read in other threads
        self._given_up: int | None = None  # as of the last look; what was so before the first is not counted
        self._slots: set[int] = set()
        self._last: dict[str, float] = {}  # when a job last ended, by its result
        self._declare_jobs()
        self._declare_slots()
        self._declare_watching()
        self._declare_health()
        self.fleet = Fleet()
        self.registry.register(_Running(self))
        self.registry.register(self.fleet)

    def _declare_jobs(self) -> None:
        self.jobs = self._gauge("jobs", "Number of exports in each state, at the last scan.", "state")
        self.oldest_waiting = self._gauge(
            "oldest_waiting_job_timestamp_seconds",
            "Time from which the export that has waited longest for a worker could start, NaN if none waits.",
        )
        self.estimated = self._gauge(
            "estimated_seconds",
            "Estimated time of all jobs that have not begun, one after the other; see `plan estimate`.",
        )
        self.workers = self._gauge("workers", "Number of jobs that may run at the same time.")
        self.workers_busy = self._gauge("workers_busy", "Number of jobs that run.")
        self.started = self._counter("jobs_started", "Jobs that were started; a retry counts again.")
        self.completed = self._counter("jobs_completed", "Jobs that ended, by how they ended.", "result")
        self.failures = self._counter(
            "job_failures",
            "Jobs that ended with an error, by the code of the error.",
            "reason",
        )
        self.job_seconds = self._histogram(
            "job_duration_seconds",
            "Duration of jobs that left a report: those that succeeded, and all others.",
            BUCKETS,
            "result",
        )
        self.stage_seconds = self._histogram(
            "stage_duration_seconds", "Duration of stages that were done or failed.", STAGE_BUCKETS, "stage"
        )
        self.queue_seconds = self._histogram(
            "queue_wait_seconds", "Time that exports waited until they were started.", FEW_BUCKETS
        )
        self.bytes_read = self._counter("bytes_read", "Bytes of the source disks that a stage has read.", "stage")
        self.bytes_converted = self._counter(
            "convert_bytes",
            "Bytes of converted disks: of the source files (read), after decompression (inflated), and of the results"
            " (written); by the engine: hyper2kvmd's own reader (stream), or qemu-img.",
            "engine",
            "kind",
        )
        self.bytes_written = self._counter("bytes_written", "Bytes of the published disks, by format.", "format")
        self.last_completion = self._gauge(
            "last_job_completion_timestamp_seconds",
            "Time when a job last ended with this result; 0 if no report in exports_dir has it.",
            "result",
        )
        self.claims = self._counter(
            "claims",
            "Attempts to lock an export: locked (won), locked by another process (busy), impossible (failed), or lost"
            " while the job ran (lost).",
            "outcome",
        )
        self.report_write_errors = self._counter("report_write_errors", "Jobs whose report could not be written.")
        _initialise(self.jobs, State)
        self.oldest_waiting.set(math.nan)
        _initialise(self.completed, RESULTS)
        _initialise(self.failures, [code for code in MEANING if code not in NO_JOB])
        _initialise(self.job_seconds, ("succeeded", "other"))
        _initialise(self.stage_seconds, STAGES)
        _initialise(self.bytes_read, READ)
        for engine, kinds in CONVERTED.items():
            for kind in kinds:
                self.bytes_converted.labels(engine, kind)
        _initialise(self.bytes_written, FORMATS)
        _initialise(self.last_completion, FINAL)
        _initialise(self.claims, ("won", "busy", "failed", "lost"))

    def _declare_slots(self) -> None:
        self.ratio = self._gauge(
            "slot_progress_ratio",
            "Progress of the slowest stage that counts in bytes, 0 to 1, NaN if there is none or no job runs.",
            "slot",
        )
        self.rate = self._gauge(
            "slot_bytes_per_second", "Speed of that stage, 0 if there is none or no job runs.", "slot"
        )
        self.left = self._gauge(
            "slot_stage_remaining_seconds",
            "Time left for that stage at this speed, NaN if it is unknown.",
            "slot",
        )
        self.stage_start = self._gauge(
            "slot_stage_start_timestamp_seconds",
            "Time when that stage began, or another one if none counts in bytes, NaN if no stage runs.",
            "slot",
        )
        self.stage = self._gauge(
            "slot_stage",
            "Number of that stage, NaN if none runs: "
            + ", ".join(f"{number} {name}" for number, name in enumerate(STAGES, 1))
            + ".",
            "slot",
        )
        self.last_progress = self._gauge(
            "slot_last_progress_timestamp_seconds",
            "Time of the last progress of the job, NaN if no job runs. Of several stages that count in bytes, the one"
            " with the oldest progress.",
            "slot",
        )
        self.show({}, 1)  # there is always one worker

    def _declare_watching(self) -> None:
        self.scan_seconds = self._histogram("scan_duration_seconds", "Duration of a scan of all exports.", SCAN_BUCKETS)
        self.last_scan = self._gauge("last_scan_timestamp_seconds", "Time when the last scan of the exports ended.")
        self.scan_errors = self._counter(
            "scan_errors",
            "Scans in which exports_dir (directory) or an export in it (export) could not be read.",
            "reason",
        )
        self.watcher_up = self._gauge(
            "watcher_up", "Whether the daemon sees changes at once (1), or only by the next scan (0)."
        )
        self.watcher_restarts = self._counter(
            "watcher_restarts",
            "Restarts of the watch: it died, its directory was replaced, or the settings changed.",
            "reason",
        )
        self.events = self._counter("events", "Changes in exports_dir that the watch saw.")
        self.watcher_warnings = self._counter("watcher_warnings", "Warnings of the watch, such as a full queue.")
        self.task_failures = self._counter(
            "task_failures",
            "Times that a task which the daemon has done now and then (prune, notify, heartbeat) failed.",
            "task",
        )
        _initialise(self.scan_errors, ("directory", "export"))
        _initialise(self.task_failures, ("prune", "notify", "heartbeat"))
        _initialise(self.watcher_restarts, ("died", "replaced", "settings"))

    def _declare_health(self) -> None:
        build = Info("build", "Versions of the daemon and of its Python.", namespace=NAMESPACE, registry=self.registry)
        build.info({"version": __version__, "python": platform.python_version()})
        self.ready = self._gauge(
            "ready", "Whether a check of /readyz passed, or is not needed by the settings.", "check"
        )
        self.libvirt_up = self._gauge(
            "libvirt_up", "Whether libvirt answered at the last check, NaN if the settings do not need it."
        )
        self.free = self._gauge(
            "destination_free_bytes",
            "Free bytes in output_dir and work_dir, NaN if unknown.",
            "pool",
        )
        self.reload_ok = self._gauge("config_last_reload_successful", "Whether the last reload was accepted.")
        self.reloaded = self._gauge(
            "config_last_reload_success_timestamp_seconds", "Time of the last reload that was accepted."
        )
        self.log_messages = self._counter("log_messages", "Messages that the daemon itself logged, by level.", "level")
        self.draining = self._gauge(
            "draining", "Whether the daemon starts no jobs: after `hyper2kvmctl drain`, or before an upgrade."
        )
        self.pending = self._gauge("notifications_pending", "Notifications of finished jobs that are still to be sent.")
        self.given_up = self._counter(
            "notifications_given_up", "Notifications of finished jobs that nobody accepted, and that are given up."
        )
        _initialise(self.ready, CHECKS)
        _initialise(self.free, POOLS)
        _initialise(self.log_messages, PRIORITY)

    def show(self, running: Mapping[int, Progress], workers: int) -> None:
        """Show the jobs that run, by the numbers of their slots, of which there is one for each worker."""
        slots = {*range(workers), *running}
        now = time.monotonic()
        for slot in slots:
            self._show_slot(str(slot), running.get(slot), now)
        for slot in self._slots - slots:
            for gauge in (self.ratio, self.rate, self.left, self.stage, self.stage_start, self.last_progress):
                gauge.remove(str(slot))
        self._slots = slots
        self._running = tuple(
            (str(slot), p.job, plain(p.vm, TAGS_LIMIT), str(p.attempt), _tags(p.tags))
            for slot, p in sorted(running.items())
            if p.known
        )
        self.workers.set(workers)
        self.workers_busy.set(len(running))

    def _show_slot(self, slot: str, progress: Progress | None, now: float) -> None:
        epoch = time.time() - now  # of the monotonic clock
        counting = [stage.moved for stage in progress.stages.values() if stage.total] if progress else []
        heard = min(counting, default=progress.heard if progress else 0.0)
        name = progress.slowest(now) if progress else None
        number, ratio, rate, left, start = math.nan, math.nan, 0.0, math.nan, math.nan
        if progress is not None and name is not None:
            number, stage = STAGES.index(name) + 1.0, progress.stages[name]
            ratio, rate = _number(stage.ratio), stage.rate or 0.0
            left, start = _number(stage.seconds_left(now)), epoch + stage.began
        self.stage.labels(slot).set(number)
        self.ratio.labels(slot).set(ratio)
        self.rate.labels(slot).set(rate)
        self.left.labels(slot).set(left)
        self.stage_start.labels(slot).set(start)
        self.last_progress.labels(slot).set(epoch + heard if heard else math.nan)

    def reported(self, report: Mapping[str, Any]) -> None:
        """Count a job that an engine ran somewhere, by its report, which may be anything."""
        with contextlib.suppress(KeyError, TypeError, ValueError):
            error = report["error"]
            finished = {"status": report["status"], "report": report}
            if report["status"] not in RESULTS:
                return
            for stage in report["stages"]:
                if stage["name"] in STAGES and stage["status"] in ("done", "failed"):
                    self.stage_seconds.labels(stage["name"]).observe(stage["seconds"])
            self.job_ended(finished if error is None else {**finished, "code": error["code"]})

    def job_started(self, waited: float) -> None:
        """Count a job that was started, `waited` seconds after it could have been."""
        self.started.inc()
        self.queue_seconds.observe(max(waited, 0))

    def event(self, event: Event) -> None:
        """Count what a job tells while it runs."""
        data = event.data
        if event.kind == "claimed":
            self.claims.labels("won").inc()
        elif event.kind == "stage" and data["status"] in ("done", "failed"):
            self.stage_seconds.labels(data["stage"]).observe(data["seconds"])
        elif event.kind == "progress" and data["stage"] in READ:
            self.bytes_read.labels(data["stage"]).inc(data["bytes"])
        elif event.kind == "converted":
            for kind in CONVERTED.get(data["engine"], ()):  # what is shared is not moved
                self.bytes_converted.labels(data["engine"], kind).inc(data[kind])

    def job_ended(self, finished: Mapping[str, Any] | None) -> None:
        """Count a job that ended; `finished` is its last event, None if there was none."""
        result, code = (finished["status"], finished.get("code")) if finished else ("crashed", Code.RUNNER_CRASHED)
        if result == "busy":
            self.claims.labels("busy").inc()
        if result in ("busy", "nothing"):
            return
        self.completed.labels(result).inc()
        if code is not None:
            self.failures.labels(Code(code)).inc()
        if result == "unclaimed":
            self.claims.labels("failed").inc()
        if result == "unreported":
            self.report_write_errors.inc()
        if code == Code.CLAIM_LOST:
            self.claims.labels("lost").inc()
        report = finished.get("report") if finished else None
        if report is None:
            return
        self.job_seconds.labels("succeeded" if result == "succeeded" else "other").observe(report["seconds"])
        if result in FINAL:
            self._completed(result, time.time())
        for disk in report["disks"] if result == "succeeded" else ():
            if disk["target_format"] in FORMATS:
                self.bytes_written.labels(disk["target_format"]).inc(disk["target_bytes"] or 0)

    def looked(
        self, looks: Iterable[Facts], states: Mapping[State, int], waiting_since: float | None, now: float
    ) -> None:
        """Show what a look at the exports found, at `now`. Times are seconds since the epoch.

        What ended before this daemon began is known from the reports, which every look reads.
        """
        for state in State:
            self.jobs.labels(state).set(states.get(state, 0))
        self.oldest_waiting.set(_number(waiting_since))
        self.last_scan.set(now)
        left = 0.0
        for look in looks:
            left += look.estimate.seconds if look.estimate is not None and not look.held else 0.0
            # A report can say anything, also that it is from the future.
            if look.report_status in FINAL and look.finished_at is not None and look.finished_at <= now:
                self._completed(look.report_status, look.finished_at)
        self.estimated.set(left)

    def _completed(self, result: str, when: float) -> None:
        if when > self._last.get(result, 0):
            self._last[result] = when
            self.last_completion.labels(result).set(when)

    def notified(self, pending: int, given_up: int) -> None:
        """Show how many messages wait, and count those that were given up, of which there are so many in all."""
        self.pending.set(pending)
        self.given_up.inc(max(given_up - (given_up if self._given_up is None else self._given_up), 0))
        self._given_up = given_up

    def watched(self, what: str) -> None:
        """Count what the watch tells: see `watch.Watch`."""
        if what == "event":
            self.events.inc()
        elif what == "warning":
            self.watcher_warnings.inc()
        else:
            self.watcher_restarts.labels(what).inc()

    def task_failed(self, task: str) -> None:
        """Note that a periodic task failed."""
        self.task_failures.labels(task).inc()

    def reload(self, *, accepted: bool) -> None:
        """Note a reload, or the start, which is the first one."""
        self.reload_ok.set(accepted)
        if accepted:
            self.reloaded.set(time.time())

    def follow(self, health: Health) -> None:
        """Show, whenever it is asked for, what is known of the daemon's health."""

        def verdict(check: str) -> Verdict:
            return health.checks(time.monotonic())[check]

        def passed(check: str) -> float:
            return not verdict(check).problem

        for check in CHECKS:
            self.ready.labels(check).set_function(functools.partial(passed, check))
        self.libvirt_up.set_function(lambda: passed("libvirt") if health.needs_libvirt() else math.nan)
        self.free.labels("output").set_function(lambda: verdict("output").value)
        self.free.labels("work").set_function(lambda: verdict("work").value)

    def count_log(self) -> None:
        """Count messages from now on; `journal.configure` ends that."""
        *others, final = structlog.get_config()["processors"]
        structlog.configure(processors=[*others, self._count_message, final])

    def _count_message(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        self.log_messages.labels(event["level"]).inc()
        return event

    def page(self, query: str, accept: str) -> Answer:
        """The page that Prometheus reads."""
        try:
            encode, kind = choose_encoder(accept)
        except TypeError:  # a version in it that is none
            encode, kind = choose_encoder("")
        return Answer(200, kind, encode(self.registry))

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, namespace=NAMESPACE, registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(name, help, labels, namespace=NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, help, labels, buckets=buckets, namespace=NAMESPACE, registry=self.registry)


class _Running(Collector):
    """Each job that runs, and no other: what the numbers of its slot belong to."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """One series for each job, from when its manifest was read until it ends: its labels do not change."""
        help = "The running job in a slot: its VM, the number of the attempt, and the tags of its manifest."
        family = InfoMetricFamily(f"{NAMESPACE}_job", help, labels=("slot", "job", "vm", "attempt", "tags"))
        for labels in self._metrics._running:
            family.add_metric(labels, {})
        yield family


def _initialise(metric: Counter | Gauge | Histogram, values: Iterable[str]) -> None:
    """Have the series of each value of the one label: a counter that appears at 1 has not increased for Prometheus."""
    for value in values:
        metric.labels(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _tags(tags: Mapping[str, str]) -> str:
    """Tags as one label, `env=production,team=db`; the values of an exporter have no bounds, this has."""
    words = (f"{key[:TAGS_LIMIT]}={value[:TAGS_LIMIT]}" if value else key for key, value in tags.items())
    return plain(",".join(itertools.islice(words, TAGS_LIMIT)), TAGS_LIMIT)
