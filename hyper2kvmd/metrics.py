"""Every metric of the daemon, with every label set there from the start at 0."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from hyper2kvmd import __version__
from hyper2kvmd.errors import MEANING, Code
from hyper2kvmd.events import STAGES
from hyper2kvmd.spool import FINAL, State

NAMESPACE = "hyper2kvmd"
# From a second to a day: small disks are common, and so are nights.
BUCKETS = (1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 57600, 86400)
RESULTS = tuple(
    sorted({*(str(state) for state in FINAL), "retrying", "interrupted", "crashed", "unclaimed", "unreported"})
)


class Metrics:
    """The daemon's metrics; one instance belongs to one daemon, tests make as many as they need."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.build = Info("build", "Version of the daemon", namespace=NAMESPACE, registry=registry)
        self.build.info({"version": __version__})
        self.jobs = Gauge(
            "jobs", "Exports by state, as of the last scan", ["state"], namespace=NAMESPACE, registry=registry
        )
        self.workers = Gauge(
            "workers", "Runners that may work at the same time", namespace=NAMESPACE, registry=registry
        )
        self.workers_busy = Gauge("workers_busy", "Runners that are working", namespace=NAMESPACE, registry=registry)
        self.started = Counter("jobs_started", "Runners started", namespace=NAMESPACE, registry=registry)
        self.completed = Counter(
            "jobs_completed", "Runners that ended, by result", ["result"], namespace=NAMESPACE, registry=registry
        )
        self.failures = Counter(
            "job_failures",
            "Jobs that ended with an error, by its code",
            ["code"],
            namespace=NAMESPACE,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "stage_duration_seconds",
            "Time that a stage took",
            ["stage"],
            buckets=BUCKETS,
            namespace=NAMESPACE,
            registry=registry,
        )
        self.job_seconds = Histogram(
            "job_duration_seconds", "Time that a job took", buckets=BUCKETS, namespace=NAMESPACE, registry=registry
        )
        self.bytes = Counter(
            "bytes",
            "Bytes of guest disks that a stage worked through",
            ["stage"],
            namespace=NAMESPACE,
            registry=registry,
        )
        self.scan_seconds = Histogram(
            "scan_duration_seconds",
            "Time that a scan took",
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60),
            namespace=NAMESPACE,
            registry=registry,
        )
        self.last_scan = Gauge(
            "last_scan_timestamp_seconds", "When the last scan ended", namespace=NAMESPACE, registry=registry
        )
        self.scan_errors = Counter(
            "scan_errors", "Exports or roots that could not be read", namespace=NAMESPACE, registry=registry
        )
        self.watcher_up = Gauge(
            "watcher_up",
            "Whether changes are seen at once (0: by the scan only)",
            namespace=NAMESPACE,
            registry=registry,
        )
        self.reload_ok = Gauge(
            "config_last_reload_successful",
            "Whether the last reload was accepted",
            namespace=NAMESPACE,
            registry=registry,
        )
        for state in State:
            self.jobs.labels(state)
        for result in RESULTS:
            self.completed.labels(result)
        for code in MEANING:
            self.failures.labels(code)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for stage in ("verify", "convert"):
            self.bytes.labels(stage)

    def finished(self, result: str, code: str | None) -> None:
        """Count one runner that ended."""
        self.completed.labels(result).inc()
        if code is not None:
            self.failures.labels(Code(code)).inc()

    def serve(self, listen: str) -> None:
        """Serve /metrics on `host:port` in a thread. Raise OSError if the address cannot be used."""
        host, _, port = listen.rpartition(":")
        start_http_server(int(port), addr=host.strip("[]"), registry=self.registry)
