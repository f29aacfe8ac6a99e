"""retry, cancel, hold, release, drain, resume, logs and prune: through the directory, with and without a daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hyper2kvmd.queue import facts, hosts
from hyper2kvmd.queue.names import CANCEL, LOG, REPORT
from hyper2kvmd.queue.state import state_of
from hyper2kvmd.settings.model import Settings
from tests import ROOT
from tests.conftest import Ctl, MakeExport, disk_entry, left_in, report_of, run_job, write_manifest
from tests.integration.daemon.test_daemon import change, daemon, free_port, left_behind, look_again, wait_until
from tests.integration.job.test_kill import check_finished_once, is_alive, start

SLOW = '[ "$1" = convert ] && echo $$ > {pids} && exec sleep 120\nexec /usr/bin/qemu-img "$@"\n'
GOOD = 'exec /usr/bin/qemu-img "$@"\n'


def state_in(export: Path, settings: Settings) -> str:
    return state_of(facts.look(export, settings), settings, time.time())[0]


@pytest.fixture
def slow(fake: Callable[[str, str], None], tmp_path: Path) -> Callable[[], int]:
    """Has the conversion hang; the function waits for that and returns its process id."""
    pids = tmp_path / "pids"
    fake("qemu-img", SLOW.format(pids=pids))

    def pid() -> int:
        wait_until(lambda: pids.exists() and pids.read_text().strip() != "", 60)
        return int(pids.read_text())

    return pid


def test_cancel_ends_a_running_job_long_before_its_time_and_leaves_nothing(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, slow: Callable[[], int]
) -> None:
    export = make_export()
    runner = start(export, scratch)
    tool = slow()
    started = time.monotonic()
    done = ctl("cancel", export.name)
    assert (0, "web01: cancelled\n") == (done.returncode, done.stdout), done.stderr
    assert time.monotonic() - started < 60
    runner.wait(timeout=60)
    assert not is_alive(tool)
    assert ("cancelled", "cancelled") == (report_of(export)["status"], report_of(export)["error"]["code"])
    assert ([], []) == (list(scratch.output_dir.iterdir()), left_in(scratch.work_dir))
    assert CANCEL not in os.listdir(export)


def test_cancel_ends_a_job_that_the_daemon_runs(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, slow: Callable[[], int]
) -> None:
    export = make_export()
    with daemon(scratch) as process:
        tool = slow()
        assert 0 == ctl("cancel", export.name).returncode
        assert not is_alive(tool)
        assert process.poll() is None
        assert "cancelled" == state_in(export, scratch)


# hyper2kvmd whose last step hangs, as a call to a server that does not answer does: nothing looks at `cancel` there.
HANGS = """
import sys, time
from hyper2kvmd.job import pipeline
from hyper2kvmd.__main__ import main
pipeline.publish = lambda *paths: time.sleep(600)
sys.exit(main())
"""


def test_cancel_kills_a_job_that_cannot_stop_and_says_so_in_its_report(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, tmp_path: Path
) -> None:
    export = make_export()
    config = tmp_path / "settings.json"
    config.write_text(scratch.model_dump_json(by_alias=True))
    runner = subprocess.Popen([sys.executable, "-c", HANGS, "run-job", str(export), "--config", str(config)])
    wait_until(lambda: any(scratch.work_dir.glob("*/journal.json")), 30)
    time.sleep(2)
    done = ctl("cancel", export.name)
    assert 0 == done.returncode, done.stderr
    assert -9 == runner.wait(timeout=60)
    assert "cancelled" == report_of(export)["status"]
    assert ([], []) == (list(scratch.output_dir.iterdir()), left_in(scratch.work_dir))


def test_cancel_of_a_job_that_waits_or_is_blocked_writes_the_report(
    scratch: Settings, make_export: MakeExport, ctl: Ctl
) -> None:
    waiting, blocked = make_export("waiting"), make_export("blocked")
    (scratch.output_dir / "blocked-disk-0.qcow2").write_text("somebody else's")
    assert 1 == run_job(blocked, scratch).returncode
    assert "blocked" == report_of(blocked)["status"]
    done = ctl("cancel", "waiting", "blocked")
    assert 0 == done.returncode, done.stderr
    assert ("cancelled", "cancelled") == (report_of(waiting)["status"], report_of(blocked)["status"])
    assert "somebody else's" == (scratch.output_dir / "blocked-disk-0.qcow2").read_text()


def test_cancel_of_a_job_that_is_over_changes_nothing(scratch: Settings, make_export: MakeExport, ctl: Ctl) -> None:
    export = make_export()
    assert 0 == run_job(export, scratch).returncode
    before = (export / REPORT).read_bytes()
    done = ctl("cancel", "web01")
    assert (1, "web01: is succeeded already\n") == (done.returncode, done.stderr)
    assert before == (export / REPORT).read_bytes()


def test_hold_stops_a_job_and_release_lets_it_go_on(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, slow: Callable[[], int], fake: Callable[[str, str], None]
) -> None:
    export = make_export()
    with daemon(scratch):
        tool = slow()
        assert 0 == ctl("hold", "web01").returncode
        assert not is_alive(tool)
        assert "blocked" == state_in(export, scratch)
        assert "on hold" in ctl("show", "web01").stdout
        assert not (export / REPORT).exists(), "a hold is no end"
        fake("qemu-img", GOOD)
        done = ctl("release", "web01")
        assert "released, is queued now" in done.stdout
        wait_until((export / REPORT).exists, 60)
    assert "succeeded" == report_of(export)["status"]
    assert 1 == ctl("release", "web01").returncode


def test_retry_keeps_the_old_report_and_starts_anew(scratch: Settings, make_export: MakeExport, ctl: Ctl) -> None:
    export = make_export()
    obstacle = scratch.output_dir / "web01-disk-0.qcow2"
    obstacle.write_text("in the way")
    assert 1 == run_job(export, scratch).returncode
    obstacle.unlink()
    done = ctl("retry", "web01")
    assert "web01: was blocked, will be retried\n" == done.stdout
    assert "blocked" == json.loads((export / "migration-report.1.json").read_text())["status"]
    assert "queued" == state_in(export, scratch)
    check_finished_once(export, scratch)


def test_retry_wakes_a_daemon_that_would_look_again_only_in_an_hour(
    scratch: Settings, make_export: MakeExport, ctl: Ctl
) -> None:
    settings = Settings.model_validate({**scratch.model_dump(by_alias=True), "scan_interval_seconds": 3600})
    export = make_export()
    obstacle = scratch.output_dir / "web01-disk-0.qcow2"
    obstacle.write_text("in the way")
    with daemon(settings):
        wait_until((export / REPORT).exists, 60)
        obstacle.unlink()
        assert 0 == ctl("retry", "web01").returncode
        wait_until(lambda: (export / REPORT).exists() and "succeeded" == report_of(export)["status"], 60)


def test_retry_of_a_running_job_is_refused(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, slow: Callable[[], int]
) -> None:
    export = make_export()
    runner = start(export, scratch)
    slow()
    done = ctl("retry", "web01")
    assert 5 == done.returncode
    assert "hold" in done.stderr
    runner.terminate()
    runner.wait()


def test_drain_finishes_what_runs_and_starts_nothing_until_resume(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    fake("qemu-img", f'[ "$1" = convert ] && touch {gate}.there && while [ ! -e {gate} ]; do sleep 0.1; done\n' + GOOD)
    port = free_port()
    first = make_export("a")
    with daemon(change(scratch, workers=1, metrics={"listen": f"127.0.0.1:{port}"})):
        wait_until((tmp_path / "gate.there").exists, 60)
        second = make_export("b")
        assert 0 == ctl("drain", "--no-wait").returncode
        look_again(port)
        gate.touch()
        done = ctl("drain")
        assert "drained" in done.stdout
        assert "succeeded" == report_of(first)["status"]
        look_again(port)
        assert not (second / REPORT).exists()
        hosts.beat(scratch, hosts.Beat("kvm9", "running", 1000, time.time()))
        assert 0 == ctl("drain", "--host", "kvm9").returncode
        (waits,) = (line for line in ctl("list").stdout.splitlines() if line.startswith("b "))
        assert "no host starts jobs: " in waits
        assert f"{hosts.this_host()} is draining" in waits
        resumed = ctl("resume")
        assert "drained still, by name: kvm9; `hyper2kvmctl resume --host HOST` ends that" in resumed.stderr
        wait_until((second / REPORT).exists, 60)
        assert f", attempt 1 on {hosts.this_host()}" in ctl("show", "b").stdout
    assert "succeeded" == report_of(second)["status"]


def test_logs_has_every_attempt_and_no_line_that_a_name_could_forge(
    scratch: Settings, make_export: MakeExport, ctl: Ctl
) -> None:
    export = make_export()
    assert 0 == run_job(export, scratch).returncode
    done = ctl("logs", "web01")
    assert 0 == done.returncode
    lines = done.stdout.splitlines()
    assert any("claimed" in line and "attempt=1" in line for line in lines)
    assert any("succeeded" in line for line in lines)
    with (export / LOG).open("a") as log:
        log.write("\x1b[2Jforged\n")
    assert "\x1b" not in ctl("logs", "web01").stdout
    assert [json.loads(line) for line in ctl("logs", "web01", "--json").stdout.splitlines()]


def test_logs_of_an_export_that_nobody_touched_says_so(make_export: MakeExport, ctl: Ctl) -> None:
    make_export()
    done = ctl("logs", "web01")
    assert 3 == done.returncode
    assert "nothing was logged" in done.stderr


def test_prune_removes_what_is_over_and_nothing_that_is_needed(
    scratch: Settings, make_export: MakeExport, ctl: Ctl
) -> None:
    finished, interrupted = make_export("finished"), make_export("interrupted")
    assert 0 == run_job(finished, scratch).returncode
    stopped = start(
        interrupted, scratch, "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=linkat",
        "-e", "inject=linkat:signal=KILL:when=1",
    )  # fmt: skip
    assert 0 != stopped.wait(timeout=60)
    (needed,) = (scratch.work_dir / name for name in left_in(scratch.work_dir))
    gone = scratch.work_dir / "gone-01234567"
    old = scratch.output_dir / ".x.qcow2.gone-01234567.1.partial"
    beside = old.with_suffix(".boot.partial")
    for path in (old, beside):
        path.write_bytes(b"half")
    left_behind(gone, old)
    others = [scratch.output_dir / name for name in (".x.qcow2.gone-01234567.2.partial", ".film.partial")]
    others += [scratch.work_dir / name / "file" for name in ("photos", "photos-01234567")]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not ours")
        os.utime(path, (1, 1))
        os.utime(path.parent, (1, 1))
    elsewhere = scratch.work_dir / "elsewhere-01234567"
    elsewhere.mkdir()
    left = scratch.work_dir / report_of(finished)["job"]
    left.mkdir()
    named_alike = [finished / "migration-report.mine.1.json", finished / "migration-report.99.json"]
    for path in named_alike:
        path.write_text("{}")
        os.utime(path, (1, 1))
    for number in range(1, 13):
        (finished / f"migration-report.{number}.json").write_bytes((finished / REPORT).read_bytes())
        (finished / f"migration-report.{number}.json.sig").write_text("a signature")
        os.utime(finished / f"migration-report.{number}.json", (number, number))
    os.utime(finished / LOG, (1, 1))
    would = json.loads(ctl("prune", "--dry-run", "--json").stdout)["removed"]
    removed = json.loads(ctl("prune", "--json").stdout)["removed"]
    assert would == removed
    reports = {finished / f"migration-report.{n}.json{suffix}" for n in (1, 2) for suffix in ("", ".sig")}
    expected = {gone, left, old, beside, finished / LOG, *reports}
    assert {str(path) for path in expected} == set(removed)
    assert not any(path.exists() for path in expected)
    assert all(path.exists() for path in (needed, elsewhere, *others, *named_alike))
    assert 10 == len(list(finished.glob("migration-report.*.json.sig")))
    assert "succeeded" == report_of(finished)["status"]
    elsewhere.rmdir()
    for path in others:
        path.unlink()
    for name in ("photos", "photos-01234567"):
        (scratch.work_dir / name).rmdir()
    check_finished_once_beside(interrupted, scratch, finished)


def test_prune_removes_the_half_disk_of_a_runner_that_was_killed_once_its_export_is_gone(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, slow: Callable[[], int]
) -> None:
    export = make_export()
    runner = start(export, scratch)
    slow()
    runner.kill()
    runner.wait(60)
    (half,) = scratch.output_dir.iterdir()
    assert [] == json.loads(ctl("prune", "--json", "--set", "retention.work_days=0").stdout)["removed"]
    shutil.rmtree(export)
    wait_until(lambda: ctl("prune", "--json", "--set", "retention.work_days=0").stdout.count("partial") > 0, 60)
    assert ([], []) == (list(scratch.output_dir.iterdir()), left_in(scratch.work_dir))
    assert half.suffix == ".partial"


def check_finished_once_beside(export: Path, settings: Settings, other: Path) -> None:
    """As check_finished_once, with another VM's disk in the output directory."""
    assert 0 == run_job(export, settings).returncode
    names = {f"{path.name}-disk-0.qcow2" for path in (export, other)}
    assert names == {path.name for path in settings.output_dir.iterdir()}
    assert [] == left_in(settings.work_dir)


def test_sources_are_deleted_only_if_the_settings_say_so_and_only_after_success(
    scratch: Settings, make_export: MakeExport
) -> None:
    settings = Settings.model_validate({**scratch.model_dump(by_alias=True), "cleanup_source": True})
    kept, failed, cleaned = make_export("kept"), make_export("failed"), make_export("cleaned")
    (scratch.output_dir / "failed-disk-0.qcow2").write_text("in the way")
    assert 0 == run_job(kept, scratch).returncode
    assert 1 == run_job(failed, settings).returncode
    assert 0 == run_job(cleaned, settings).returncode
    left = {path.parent.name for path in scratch.exports_dir.glob("*/*.raw")}
    assert {"kept", "failed"} == left
    assert "succeeded" == state_in(cleaned, settings)
    assert (cleaned / "manifest.json").exists()


# One export among others ---------------------------------------------------------------------------------------

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")


@pytest.fixture
def unreadable() -> Iterator[Path]:
    """A directory with two exports of which nobody may look at one's lock, and settings for it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="hyper2kvmd-test-") as name:
        directory = Path(name)
        directory.chmod(0o777)
        for place in ("exports", "images", "work"):
            (directory / place).mkdir()
            (directory / place).chmod(0o777)
        for export in ("bad", "good"):
            (directory / "exports" / export).mkdir()
            disk = directory / "exports" / export / "disk.raw"
            disk.write_bytes(os.urandom(1 << 20))
            write_manifest(disk.parent, [disk_entry(disk)])
        (directory / "exports/bad/.hyper2kvmd.lock").touch(0o600)
        yield directory


def as_nobody(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    places = {"exports_dir": "exports", "output_dir": "images", "work_dir": "work"}
    return subprocess.run(
        [
            *(*NOBODY, sys.executable, "-m", "hyper2kvmd.ctl", *words),
            *(f"--set={key}={directory / place}" for key, place in places.items()),
            *("--set=libvirt.import=false", "--set=settle_seconds=0", "--set=retention.work_days=0"),
        ],
        capture_output=True, text=True, check=False, timeout=120, cwd="/",
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    )  # fmt: skip


def test_an_export_that_cannot_be_looked_at_hides_no_other_in_the_list(unreadable: Path) -> None:
    done = as_nobody(unreadable, "list", "--json")
    assert 0 == done.returncode, done.stderr
    rows = {Path(row["export"]).name: row for row in json.loads(done.stdout)}
    assert ("unreadable", "queued") == (rows["bad"]["state"], rows["good"]["state"])
    assert "bad/.hyper2kvmd.lock: Permission denied" in rows["bad"]["reason"]["message"]
    assert "unreadable" in as_nobody(unreadable, "list").stdout


def test_a_batch_goes_on_beside_an_export_that_cannot_be_looked_at(unreadable: Path) -> None:
    (unreadable / "exports/good").chmod(0o777)
    done = as_nobody(unreadable, "batch", str(unreadable / "exports"), "--json")
    states = {Path(row["export"]).name: (row["state"], row["reason"]) for row in json.loads(done.stdout)}
    assert 1 == done.returncode, done.stderr
    assert ("failed", "succeeded") == (states["bad"][0], states["good"][0]), done.stderr
    assert "Permission denied" in states["bad"][1]["message"]


def test_a_drain_does_not_wait_for_what_it_cannot_see(unreadable: Path) -> None:
    done = as_nobody(unreadable, "drain", "--json")
    assert (0, []) == (done.returncode, json.loads(done.stdout)["running"]), done.stderr


def test_prune_keeps_what_an_export_left_that_cannot_be_looked_at(unreadable: Path) -> None:
    for job in ("bad-01234567", "other-01234567"):
        partial = unreadable / f"images/.a.qcow2.{job}.1.partial"
        partial.touch()
        left_behind(unreadable / "work" / job, partial)
    for path in (*(unreadable / "work").rglob("*"), *(unreadable / "images").iterdir()):
        os.chown(path, 65534, 65534)
    done = as_nobody(unreadable, "prune", "--json")
    assert "bad/.hyper2kvmd.lock: Permission denied" in done.stderr
    removed = sorted(Path(path).name for path in json.loads(done.stdout)["removed"])
    assert [".a.qcow2.other-01234567.1.partial", "other-01234567"] == removed
    assert (unreadable / "work/bad-01234567").is_dir() and (
        unreadable / "images/.a.qcow2.bad-01234567.1.partial"
    ).exists()
