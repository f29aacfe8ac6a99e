"""Metrics of what this daemon does not do itself: jobs on other hosts, the hosts, and what an engine has."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hyper2kvmd.dispatch.engine import Handed
from hyper2kvmd.queue.hosts import Seen, this_host
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.text import plain

NAMESPACE = "hyper2kvmd"
LABEL_LIMIT = 200


class Fleet(Collector):
    """What there is, as of the last look. Of what is not there, there is no series."""

    def __init__(self) -> None:
        # Replaced as a whole: they are read in other threads.
        self._seen: tuple[tuple[Progress, ...], tuple[Seen, ...], int] = ((), (), 0)
        self._engine: tuple[Counter[str], bool] | None = None

    def show(self, jobs: Iterable[Progress], hosts: Iterable[Seen], own: int) -> None:
        """Show the jobs that this daemon did not start, the hosts, and that it has started `own` jobs."""
        self._seen = (tuple(jobs), tuple(hosts), own)

    def show_engine(self, jobs: Iterable[Handed], *, up: bool) -> None:
        """Show what an engine has, and whether it answers and takes jobs."""
        self._engine = (Counter(job.state for job in jobs), up)

    def collect(self) -> Iterator[Metric]:
        """Every family, also one without a series."""
        jobs, hosts, own = self._seen
        yield from _jobs(jobs)
        yield from _hosts(jobs, hosts, own)
        waits = _family("engine_jobs", "Jobs of this daemon that the engine has, waiting and running.", "state")
        up = _family("engine_up", "Whether the engine answered and took jobs at the last check.")
        if self._engine is not None:
            states, answers = self._engine
            for state in ("waiting", "running"):
                waits.add_metric((state,), states[state])
            up.add_metric((), answers)
        yield from (waits, up)


def _family(name: str, help: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{NAMESPACE}_{name}", help, labels=labels)


def _jobs(jobs: Iterable[Progress]) -> Iterator[Metric]:
    labels = ("vm", "host", "stage")
    ratio = _family("elsewhere_progress_ratio", "Progress of a job that this daemon did not start, 0 to 1.", *labels)
    rate = _family("elsewhere_bytes_per_second", "Speed of the slowest stage of such a job.", *labels)
    left = _family("elsewhere_stage_remaining_seconds", "Time left for that stage at this speed.", *labels)
    now = time.monotonic()
    # Of two VMs of one name on one host, one: a series must not be there twice.
    for progress in {(progress.vm, progress.host): progress for progress in jobs}.values():
        name = progress.slowest(now)
        stage = progress.stages[name] if name else None
        known = (plain(progress.vm, LABEL_LIMIT), progress.host, name or "")
        values = (stage.ratio, stage.rate, stage.seconds_left(now)) if stage is not None else (None, None, None)
        for family, value in zip((ratio, rate, left), values, strict=True):
            family.add_metric(known, math.nan if value is None else value)
    yield from (ratio, rate, left)


def _hosts(jobs: Iterable[Progress], hosts: Iterable[Seen], own: int) -> Iterator[Metric]:
    up = _family(
        "host_up",
        "Whether a host of the exports directory has reported lately; without a daemon, only during jobs.",
        "host",
    )
    said = _family("host_last_seen_timestamp_seconds", "Time of its last report.", "host")
    running = _family("host_jobs", "Running jobs on a host, by their own reports.", "host")
    counts = Counter(progress.host for progress in jobs)
    counts[this_host()] += own
    for seen in hosts:
        labels = (seen.beat.host,)
        if seen.beat.state != "runner" or not seen.late:  # without a daemon and without a job, it cannot be known
            up.add_metric(labels, not seen.gone and seen.beat.state != "stopped")
        said.add_metric(labels, time.time() - seen.age)
        running.add_metric(labels, counts[seen.beat.host])
    yield from (up, said, running)
