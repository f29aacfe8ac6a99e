"""Watches over one job from a thread of its own: what people wish in the meantime, and stages that hang."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import structlog

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.job.context import Job
from hyper2kvmd.queue import requests
from hyper2kvmd.queue.state import request_error

log = structlog.get_logger()

POLL_SECONDS = 0.5
# A job that was told to stop ends its tools within seconds. One that is stuck in the kernel, or in a library that waits
# for a server, cannot; then its death takes the tools along, and the next attempt goes on.
STUCK_SECONDS = 8.0


@contextlib.contextmanager
def overseen(job: Job, show: Callable[[], None]) -> Iterator[None]:
    """Have `job` stopped when somebody wishes it, or when a stage takes too long; `job.verdict` says why.

    `show` is called twice a second meanwhile.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            show()
            job.verdict = verdict(job, time.monotonic())
            if job.verdict is not None:
                break
        else:
            return
        log.warning(job.verdict.message, error=str(job.verdict.code))
        job.tools.cancel.set()
        if not over.wait(STUCK_SECONDS):
            log.error("the job does not stop, so its process is killed", seconds=STUCK_SECONDS)
            os.kill(os.getpid(), signal.SIGKILL)

    watcher = threading.Thread(target=watch, name="overseer", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def verdict(job: Job, now: float) -> MigrationError | None:
    """Why the job must stop, if it must: held, cancelled or timed_out. `now` is the monotonic clock."""
    request = requests.pending(job.export.fd)
    if request is not None:
        return request_error(request)
    limits = job.settings.limits
    longest = limits.stage_seconds.model_dump(by_alias=True)
    for stage, began in dict(job.running).items():
        if now - began > longest[stage]:
            return MigrationError(
                Code.TIMED_OUT,
                f"the stage {stage} took longer than {longest[stage]:g} s",
                f"Look at the host's load and storage; or raise limits.stage_seconds.{stage}.",
                field=f"limits.stage_seconds.{stage}",
            )
    # Each by itself: that a checksum gets further says nothing of a conversion that hangs beside it.
    for what, moved_at in dict(job.reporting).items():
        if now - moved_at > limits.no_progress_seconds:
            return MigrationError(
                Code.TIMED_OUT,
                f"{what} has not got further for {limits.no_progress_seconds:g} s",
                "Look at the host's storage; or raise limits.no_progress_seconds.",
                field="limits.no_progress_seconds",
            )
    return None
