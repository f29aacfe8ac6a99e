"""The daemon as a process, on real directories with small real disks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, report_of, run_job


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def done(*exports: Path) -> bool:
    return all((export / "migration-report.json").exists() for export in exports)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def looks(port: int) -> float:
    """How often the daemon that serves its metrics there has looked at all exports; 0 before it has begun."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            found = re.search(r"^hyper2kvmd_scan_duration_seconds_count (\S+)", answer.read().decode(), re.MULTILINE)
    except OSError:
        return 0
    return float(found[1]) if found else 0


def look_again(port: int, times: int = 5) -> None:
    """Return when it has looked that often again: what has not happened by then is not going to."""
    wanted = looks(port) + times
    wait_until(lambda: looks(port) >= wanted)


@contextmanager
def daemon(settings: Settings, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    config = settings.work_dir.parent / "daemon.json"
    config.write_text(settings.model_dump_json(by_alias=True))
    process = subprocess.Popen(
        [sys.executable, "-m", "hyper2kvmd", "run", "--config", str(config), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()


def left_behind(work_dir: Path, partial: Path) -> None:
    """Make the work directory of a job that died long ago, with a journal that knows its unfinished disk."""
    work_dir.mkdir()
    journal: dict[str, object] = {**dict.fromkeys(("converted", "overlays", "guest", "record")), "items": []}
    (work_dir / "journal.json").write_text(json.dumps({**journal, "made": {str(partial): partial.stat().st_ino}}))
    os.utime(work_dir, (1, 1))


def change(settings: Settings, **update: object) -> Settings:
    return Settings.model_validate({**settings.model_dump(by_alias=True), **update})


@pytest.mark.parametrize("mode", ["auto", "poll", "off"])
def test_what_is_there_and_what_is_dropped_later_is_migrated_in_every_mode(
    scratch: Settings, make_export: MakeExport, mode: str
) -> None:
    early = make_export("early")
    with daemon(change(scratch, watch={"mode": mode})):
        wait_until(lambda: done(early))
        late = make_export("late")
        moved = scratch.exports_dir.parent / "moved"
        shutil.copytree(early, moved)
        (moved / "migration-report.json").unlink()
        manifest = json.loads((moved / "manifest.json").read_text())
        manifest["source"]["vm_name"] = "moved"
        manifest["disks"][0]["local_path"] = "early-disk-0.raw"
        (moved / "manifest.json").write_text(json.dumps(manifest))
        moved.rename(scratch.exports_dir / "moved")
        wait_until(lambda: done(late, scratch.exports_dir / "moved"))
    for name in ("early", "late", "moved"):
        assert "succeeded" == report_of(scratch.exports_dir / name)["status"]
    assert 3 == len(list(scratch.output_dir.iterdir()))


def test_with_inotify_a_drop_is_seen_long_before_the_next_scan(scratch: Settings, make_export: MakeExport) -> None:
    port = free_port()
    with daemon(change(scratch, scan_interval_seconds=3600, metrics={"listen": f"127.0.0.1:{port}"})):
        look_again(port, 1)
        export = make_export()
        wait_until(lambda: done(export), 30)


def test_metrics_are_there_from_the_start_and_count_each_job_once(scratch: Settings, make_export: MakeExport) -> None:
    port = free_port()

    def metrics() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def up() -> bool:
        try:
            return bool(metrics())
        except OSError:
            return False

    with daemon(change(scratch, metrics={"listen": f"127.0.0.1:{port}"})):
        wait_until(up)
        before = metrics()
        assert 0 == before['hyper2kvmd_jobs_completed_total{result="succeeded"}']
        assert 0 == before['hyper2kvmd_job_failures_total{reason="checksum_mismatch"}']
        good = make_export("good")
        bad = make_export("bad")
        (bad / "bad-disk-0.raw").write_bytes(os.urandom(1 << 20))
        wait_until(lambda: done(good, bad))
        wait_until(lambda: metrics()['hyper2kvmd_jobs{state="succeeded"}'] == 1)
        wait_until(lambda: metrics()['hyper2kvmd_jobs_completed_total{result="failed"}'] == 1)
        after = metrics()
    assert 1 == after['hyper2kvmd_jobs_completed_total{result="succeeded"}']
    assert 1 == after['hyper2kvmd_job_failures_total{reason="checksum_mismatch"}']
    assert 1 == after['hyper2kvmd_jobs{state="failed"}']
    assert after['hyper2kvmd_bytes_read_total{stage="convert"}'] >= 1 << 20
    assert 1 <= after['hyper2kvmd_stage_duration_seconds_count{stage="validate"}']


def test_systemd_is_told_in_clean_text(scratch: Settings, make_export: MakeExport, tmp_path: Path) -> None:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(tmp_path / "notify"))
    receiver.settimeout(30)
    make_export(source={"vm_id": "1", "vm_name": "wëb 日本", "provider": "vsphere"})
    messages: list[str] = []
    with daemon(scratch, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="2000000") as process:
        while not any("1 done" in message for message in messages):
            messages.append(receiver.recv(65536).decode("ascii"))
        process.send_signal(signal.SIGTERM)
        while messages[-1] != "STOPPING=1":
            messages.append(receiver.recv(65536).decode("ascii"))
    assert "READY=1" in messages
    assert messages.count("WATCHDOG=1") >= 2
    assert all("\n" not in message for message in messages)


BLIND = """
import math, sys
from pathlib import Path
from hyper2kvmd.daemon.daemon import Daemon
from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.settings.load import load_settings

class Blind(Daemon):
    turns = 0

    def tick(self, now):
        return math.inf  # as after a defect: no look is taken, and none will be

    def _tell(self):
        self.turns += 1
        if self.turns == 8:
            sys.exit("it went round and round")

settings = load_settings(Path(sys.argv[1]))
Blind(settings, lambda: settings, Metrics()).run()
"""


def test_a_daemon_that_goes_round_and_never_looks_does_not_tell_systemd_that_it_works(
    scratch: Settings, tmp_path: Path
) -> None:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(tmp_path / "notify"))
    receiver.setblocking(False)
    (tmp_path / "blind.json").write_text(scratch.model_dump_json(by_alias=True))
    done = subprocess.run(
        [sys.executable, "-c", BLIND, tmp_path / "blind.json"],
        env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "it went round and round" in done.stderr
    messages = []
    with suppress(BlockingIOError):
        while True:
            messages.append(receiver.recv(65536).decode())
    assert ("READY=1", "STOPPING=1") == (messages[0], messages[-1])
    assert "WATCHDOG=1" not in messages


def test_a_reload_takes_a_good_file_and_keeps_the_old_one_when_it_is_bad(scratch: Settings, tmp_path: Path) -> None:
    port = free_port()
    settings = change(scratch, metrics={"listen": f"127.0.0.1:{port}"})

    def metric(name: str) -> float | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return None
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    config = tmp_path / "daemon.json"
    with daemon(settings) as process:
        wait_until(lambda: metric("hyper2kvmd_workers") == 2)
        config.write_text("workers: none\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric("hyper2kvmd_config_last_reload_successful") == 0)
        assert 2 == metric("hyper2kvmd_workers")
        config.write_text(change(settings, workers=5).model_dump_json(by_alias=True))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric("hyper2kvmd_workers") == 5)
        assert 1 == metric("hyper2kvmd_config_last_reload_successful")


def test_a_manifest_that_is_being_written_is_waited_for_and_one_that_stays_cut_is_rejected(
    scratch: Settings, make_export: MakeExport
) -> None:
    slow, stuck = make_export("slow"), make_export("stuck")
    whole = (slow / "manifest.json").read_bytes()
    for export in (slow, stuck):
        (export / "manifest.json").write_bytes(whole[:50])
    with daemon(change(scratch, incomplete_grace_seconds=4)):
        for end in range(100, len(whole), 100):
            (slow / "manifest.json").write_bytes(whole[:end])
            time.sleep(0.4)
            assert not done(slow), "a manifest that was still being written was judged"
        (slow / "manifest.json").write_bytes(whole)
        wait_until(lambda: done(slow, stuck))
    assert "succeeded" == report_of(slow)["status"]
    document = report_of(stuck)
    assert ("rejected", "manifest_unreadable") == (document["status"], document["error"]["code"])


def test_an_export_that_cannot_be_written_to_is_tried_again_slowly_and_named(
    scratch: Settings, make_export: MakeExport
) -> None:
    """A runner that leaves nothing on disk must not be started again at once, for ever."""
    planted = make_export("planted")
    (planted / ".hyper2kvmd.lock").symlink_to("/dev/null")
    good = make_export("good")
    port = free_port()
    with daemon(change(scratch, metrics={"listen": f"127.0.0.1:{port}"})) as process:
        wait_until(lambda: done(good))
        look_again(port)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert 1 == sum("started" in line and "export=planted" in line for line in output.splitlines()), output
    assert "next_attempt_in_seconds=60" in output
    assert "not a plain file" in output


def test_a_runner_that_dies_at_once_is_not_started_again_at_once(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None]
) -> None:
    make_export()
    fake("setpriv", "kill -SYS $$\n")
    port = free_port()
    with daemon(change(scratch, metrics={"listen": f"127.0.0.1:{port}"})) as process:
        look_again(port)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert 1 == sum("started" in line and "export=web01" in line for line in output.splitlines()), output
    assert "was killed by signal 31" in output


def test_directories_with_unusual_names_are_migrated_too(scratch: Settings, make_export: MakeExport) -> None:
    exports = [make_export(name) for name in ("Büro Server, alt", "-n", "a,file.filename=x", "%s [x] *")]
    with daemon(scratch, "--once") as process:
        output, _ = process.communicate(timeout=120)
    assert 0 == process.returncode, output
    assert ["succeeded"] * 4 == [report_of(export)["status"] for export in exports]
    assert 4 == len(list(scratch.output_dir.iterdir()))
    assert [] == [path for path in scratch.work_dir.iterdir() if path.is_dir()]


def test_once_works_off_what_is_there_and_says_how_it_went(scratch: Settings, make_export: MakeExport) -> None:
    exports = [make_export(f"vm{n}") for n in range(5)]
    with daemon(scratch, "--once") as process:
        output, _ = process.communicate(timeout=120)
    assert 0 == process.returncode, output
    assert done(*exports)
    assert "5 done" in output


def test_what_a_job_left_is_removed_when_the_daemon_starts(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    assert 0 == run_job(export, scratch).returncode
    left = scratch.work_dir / report_of(export)["job"]
    left.mkdir()
    with daemon(scratch):
        wait_until(lambda: not left.exists())


def test_a_prune_that_fails_is_logged_and_counted(scratch: Settings, tmp_path: Path) -> None:
    port = free_port()
    in_the_way = scratch.output_dir / ".web01-disk-0.qcow2.other-01234567.1.partial"
    in_the_way.mkdir()  # no file can be removed there
    left_behind(scratch.work_dir / "other-01234567", in_the_way)
    settings = change(scratch, metrics={"listen": f"127.0.0.1:{port}"})

    def failed() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
            return 'hyper2kvmd_task_failures_total{task="prune"} 1.0' in page.read().decode()
        return False

    with daemon(settings):
        wait_until(failed, 60)
    assert in_the_way.is_dir()


def test_an_export_that_cannot_be_written_is_told_as_that_and_left_alone_also_after_a_restart(
    scratch: Settings, make_export: MakeExport, ctl: Ctl
) -> None:
    export, port = make_export(), free_port()
    settings = change(scratch, retry={"delay_seconds": 3600}, metrics={"listen": f"127.0.0.1:{port}"})

    def row() -> tuple[str, str | None]:
        (found,) = json.loads(ctl("list", "--json", "--set", "retry.delay_seconds=3600").stdout)
        reason = found["reason"]
        return found["state"], None if reason is None else reason["code"]

    subprocess.run(["mount", "--bind", export, export], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", export], check=True)
        with daemon(settings):
            wait_until(lambda: ("retrying", "export_unwritable") == row(), 60)
        assert ("retrying", "export_unwritable") == row(), "it went with the daemon"
        with daemon(settings):
            look_again(port)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
                text = page.read().decode()
        assert "hyper2kvmd_jobs_started_total 0.0" in text
        assert 'hyper2kvmd_jobs{state="retrying"} 1.0' in text
        assert ["manifest.json", "web01-disk-0.raw"] == sorted(os.listdir(export))
    finally:
        subprocess.run(["umount", export], check=True)
    # Repaired, and its time has come.
    with daemon(change(scratch, retry={"delay_seconds": 0})):
        wait_until(lambda: done(export), 60)
        # The daemon hears of the runner's end later than the report is there.
        wait_until(lambda: {} == json.loads((scratch.work_dir / "setbacks.json").read_text()))
    assert ("succeeded", None) == row()


def test_two_daemons_on_one_directory_do_nothing_twice(scratch: Settings, make_export: MakeExport) -> None:
    exports = [make_export(f"vm{n}") for n in range(12)]
    with daemon(scratch), daemon(scratch):
        wait_until(lambda: done(*exports), 120)
    for export in exports:
        document = report_of(export)
        assert ("succeeded", 1) == (document["status"], document["attempts"]), document["error"]


def test_a_bad_configuration_ends_with_78_and_the_reason(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("worker: 2\n")
    done = subprocess.run(
        [sys.executable, "-m", "hyper2kvmd", "run", "--config", config],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert 78 == done.returncode
    assert "bad.yaml:1: worker: unknown setting; did you mean workers?" in done.stderr


def test_a_job_starts_when_its_window_begins_and_once_does_not_wait_for_it(
    scratch: Settings, make_export: MakeExport
) -> None:
    now, later = make_export("now"), make_export("later")
    scratch.plan_dir.mkdir()
    plan = scratch.plan_dir / "later.yaml"
    plan.write_text("not_before: 2099-01-01 00:00\n")
    with daemon(scratch, "--once") as process:
        output, _ = process.communicate(timeout=120)
    assert (True, False) == (done(now), done(later)), output
    begins = time.time() + 8
    plan.write_text(f"not_before: {datetime.fromtimestamp(begins, UTC).isoformat()}\n")
    # So rarely that only the window can have been what it looked for.
    with daemon(scratch.model_copy(update={"scan_interval_seconds": 3600.0})):
        wait_until(lambda: done(later), 120)
    claimed = datetime.fromisoformat(report_of(later)["started_at"]).timestamp()
    assert begins <= claimed < begins + 60
