"""When a job that runs has to stop, and what it hears as the reason."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyper2kvmd.errors import MigrationError
from hyper2kvmd.job.context import Job
from hyper2kvmd.job.events import Emitter
from hyper2kvmd.job.request import Request
from hyper2kvmd.job.supervise import verdict
from hyper2kvmd.queue.export import Export
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Limits, Settings

LIMITS = Limits.model_validate({"no_progress_seconds": 60, "stage_seconds": {"fix": 1000}})


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield Job("web01-1", Export(tmp_path, fd), 1, Request(), Settings(limits=LIMITS), Tools(), Emitter(None))
    os.close(fd)


def after(job: Job, seconds: float) -> MigrationError | None:
    """What is said when so many seconds have gone by."""
    return verdict(job, time.monotonic() + seconds)


def test_a_stage_that_reports_nothing_has_its_own_limit_and_no_other(job: Job) -> None:
    with job.stage("fix"):
        assert after(job, 900) is None
        stopped = after(job, 1001)
    assert stopped is not None
    assert "limits.stage_seconds.fix" == stopped.field


def test_one_that_hangs_is_found_although_others_get_further(job: Job) -> None:
    with (
        job.stage("verify", 100),
        job.stage("convert", 200),
        job.progress("convert", "disk-0", 100) as hangs,
        job.progress("convert", "disk-1", 100) as moves,
        job.progress("verify", "disk-0", 100) as moves_too,
    ):
        hangs(0.5)
        job.reporting["convert of disk-0"] -= 61
        moves(0.1)
        moves_too(0.9)
        stopped = after(job, 0)
        assert stopped is not None
        assert "convert of disk-0 has not got further for 60 s" == stopped.message
        hangs(0.5)
        assert after(job, 0) is not None, "the same again is no progress"
        hangs(0.51)
        assert after(job, 0) is None


def test_what_has_nothing_more_to_report_is_not_taken_for_one_that_hangs(job: Job) -> None:
    with job.stage("convert", 100):
        with job.progress("convert", "disk-0", 100) as tell:
            assert after(job, 61) is not None
            tell(1.0)
            assert after(job, 61) is None, "it flushes what it wrote"
        assert after(job, 61) is None
