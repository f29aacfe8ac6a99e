"""A job waits for space and memory that others have reserved, and what hangs is stopped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.job import reserve
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport, disk_entry, report_of, run_job, write_manifest
from tests.integration.daemon.test_daemon import daemon, wait_until
from tests.integration.job.test_kill import check_finished_once


def changed(settings: Settings, **changes: Any) -> Settings:
    return Settings.model_validate({**settings.model_dump(by_alias=True), **changes})


@pytest.fixture
def small_disk(scratch: Settings) -> Iterator[int]:
    """The output directory on a file system of its own, of 64 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", scratch.output_dir], check=True)
    yield 64 << 20
    subprocess.run(["umount", scratch.output_dir], check=True)


@contextlib.contextmanager
def running_job(
    settings: Settings, *, bytes: int = 0, files: tuple[str, ...] = (), memory_mb: int = 0
) -> Iterator[None]:
    """What another job that runs has reserved; it holds its lock as long as the block runs."""
    directory = settings.work_dir / "other-01234567"
    directory.mkdir()
    need = {"directory": str(settings.output_dir), "bytes": bytes, "files": files, "field": "output_dir"}
    path = directory / reserve.FILE
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"pid": os.getpid(), "needs": [need], "memory_mb": memory_mb}, file)
        file.flush()
        yield
    path.unlink()
    directory.rmdir()


def test_a_job_waits_for_space_that_a_running_one_has_reserved(
    scratch: Settings, make_export: MakeExport, small_disk: int
) -> None:
    export = make_export(size=8 << 20)
    with running_job(scratch, bytes=small_disk - (4 << 20)):
        assert 75 == run_job(export, scratch).returncode
        report = report_of(export)
        assert ("retrying", "no_space") == (report["status"], report["error"]["code"])
        assert "of which running jobs still need 60 MiB" in report["error"]["message"]
        assert [] == list(scratch.output_dir.iterdir()), "it began although it does not fit"
    check_finished_once(export, changed(scratch, retry={"delay_seconds": 0}))


def test_what_a_running_job_has_written_already_is_not_counted_twice(
    scratch: Settings, make_export: MakeExport, small_disk: int
) -> None:
    written = scratch.output_dir / "other.partial"
    written.write_bytes(os.urandom(40 << 20))
    export = make_export(size=8 << 20)
    with running_job(scratch, bytes=44 << 20, files=(str(written),)):
        done = run_job(export, scratch)
    assert 0 == done.returncode, done.stderr


def test_a_disk_that_was_compressed_keeps_no_more_than_it_takes(
    scratch: Settings, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    """How well a disk compresses shows only when that is done: until then all of it is reserved."""
    export = scratch.exports_dir / "web01"
    export.mkdir()
    disk = export / "disk.raw"
    disk.write_bytes(b"all work and no play " * 400_000)
    os.truncate(disk, 8 << 20)
    write_manifest(
        export,
        [disk_entry(disk)],
        pipeline={"convert": {"enabled": True, "compression": True}, "validate": {"enabled": True}},
    )
    look = f"cat {scratch.work_dir}/*/{reserve.FILE} > {tmp_path}/"
    fake(
        "qemu-img",
        f'case "$1" in convert) {look}before;; check) {look}after 2>/dev/null;; esac\nexec /usr/bin/qemu-img "$@"\n',
    )
    assert 0 == run_job(export, scratch).returncode
    before, after = (json.loads((tmp_path / name).read_text())["needs"][0]["bytes"] for name in ("before", "after"))
    assert before >= 8 << 20
    assert after < 1 << 20


def test_what_a_dead_job_had_reserved_is_free(scratch: Settings, make_export: MakeExport, small_disk: int) -> None:
    with running_job(scratch, bytes=small_disk):
        content = (scratch.work_dir / "other-01234567" / reserve.FILE).read_text()
    (scratch.work_dir / "other-01234567").mkdir()
    (scratch.work_dir / "other-01234567" / reserve.FILE).write_text(content)
    export = make_export(size=8 << 20)
    assert 0 == run_job(export, scratch).returncode


def test_a_job_waits_for_memory_as_long_as_it_takes(scratch: Settings, make_export: MakeExport) -> None:
    settings = changed(scratch, retry={"max_attempts": 1, "delay_seconds": 0})
    export = make_export(pipeline={"inspect": {"enabled": True}, "fix": {"enabled": False}})
    with running_job(settings, memory_mb=1 << 20):
        for _ in range(3):  # more often than a failure would be tried
            assert 75 == run_job(export, settings).returncode
            assert ("retrying", "no_memory") == (report_of(export)["status"], report_of(export)["error"]["code"])
    assert 3 == report_of(export)["attempts"]
    assert [] == list(settings.output_dir.iterdir())


def test_a_stage_that_takes_too_long_is_stopped_and_tried_again(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None]
) -> None:
    settings = changed(scratch, limits={"stage_seconds": {"convert": 1}}, retry={"delay_seconds": 0})
    export = make_export()
    fake("qemu-img", '[ "$1" = convert ] && exec sleep 120\nexec /usr/bin/qemu-img "$@"\n')
    started = time.monotonic()
    assert 75 == run_job(export, settings).returncode
    assert time.monotonic() - started < 100, "as long as it sleeps"
    error = report_of(export)["error"]
    assert ("timed_out", "limits.stage_seconds.convert") == (error["code"], error["field"])
    assert [] == list(settings.output_dir.iterdir())
    fake("qemu-img", 'exec /usr/bin/qemu-img "$@"\n')
    check_finished_once(export, changed(scratch, retry={"delay_seconds": 0}))


@pytest.mark.parametrize(("command", "what"), [("convert", "convert of disk-0"), ("compare", "validate of disk-0")])
def test_what_reports_progress_and_makes_none_is_stopped(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], command: str, what: str
) -> None:
    settings = changed(scratch, limits={"no_progress_seconds": 1}, validate={"compare": True})
    export = make_export()
    fake("qemu-img", f'[ "$1" = {command} ] && exec sleep 120\nexec /usr/bin/qemu-img "$@"\n')
    assert 75 == run_job(export, settings).returncode
    error = report_of(export)["error"]
    assert ("timed_out", "limits.no_progress_seconds") == (error["code"], error["field"])
    assert f"{what} has not got further for 1 s" == error["message"]


def test_what_is_slow_without_a_word_or_gets_further_slowly_is_left_alone(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None]
) -> None:
    """The checks and the appliance say nothing for longer than the limit; the comparison says something within it."""
    settings = changed(scratch, limits={"no_progress_seconds": 2}, validate={"compare": True})
    pipeline = {"inspect": {"enabled": True}, "fix": {"enabled": False}, "convert": {"enabled": True}}
    export = make_export(pipeline={**pipeline, "validate": {"enabled": True}})
    fake(
        "qemu-img",
        'case "$1" in check) sleep 4;; compare) for n in 1 2 3 4; do printf "($n.00/100%%)\\r"; sleep 1; done;; esac\n'
        'exec /usr/bin/qemu-img "$@"\n',
    )
    done = run_job(export, settings)
    assert 0 == done.returncode, done.stderr
    seconds = {stage["name"]: stage["seconds"] for stage in report_of(export)["stages"]}
    assert all(seconds[stage] > 2 for stage in ("plan", "inspect", "validate")), "nothing was slow"


def test_jobs_and_their_tools_run_with_low_priority(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    said = tmp_path / "said"
    fake("qemu-img", f'[ "$1" = convert ] && {{ nice; ionice; }} > {said}\nexec /usr/bin/qemu-img "$@"\n')
    assert 0 == run_job(make_export(), scratch).returncode
    assert ["10", "best-effort: prio 7"] == said.read_text().splitlines()


def test_a_runner_that_is_killed_is_reported_with_its_signal(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None]
) -> None:
    settings = changed(scratch, retry={"max_attempts": 1, "delay_seconds": 0})
    export = make_export()
    fake("qemu-img", '[ "$1" = convert ] && kill -SEGV $PPID\nexec /usr/bin/qemu-img "$@"\n')
    with daemon(settings):
        wait_until((export / REPORT).exists, 60)
    error = report_of(export)["error"]
    assert "runner_crashed" == error["code"]
    assert "was killed by signal 11 (Segmentation fault)" in error["message"]
