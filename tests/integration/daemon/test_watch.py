"""Watching the exports directory: whatever happens to the events, nothing is lost and nothing is done twice."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hyper2kvmd.daemon.daemon import Daemon
from hyper2kvmd.daemon.health import Verdict, check_locks
from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.daemon.watch import POLL_SECONDS, Watch, file_system
from hyper2kvmd.queue.state import State
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport, disk_entry, report_of, write_manifest
from tests.integration.daemon.test_daemon import change, daemon, done, free_port, look_again, wait_until

QUEUE_LIMIT = Path("/proc/sys/fs/inotify/max_queued_events")

# Stands in for setpriv, and so for every runner: claims, publishes and reports as a job does, within milliseconds.
# A second publication of the same name fails and is noted.
QUICK_JOB = """
while [ "$1" != run-job ]; do shift; done
export=$2
while [ "$1" != --events-fd ]; do shift; done
events=/proc/self/fd/$2
end() { echo "{\\"event\\": \\"finished\\", \\"status\\": \\"$1\\"}" >$events; exit; }
exec 9>>"$export/.hyper2kvmd.lock"
flock --nonblock 9 || end busy
[ ! -e "$export/migration-report.json" ] || end nothing
mkdir "IMAGES/${export##*/}" || echo "$export" >>IMAGES/../twice
echo '{"status": "succeeded"}' >"$export/.report"
mv "$export/.report" "$export/migration-report.json"
end succeeded
"""


@pytest.fixture
def quick_jobs(scratch: Settings, fake: Callable[[str, str], None]) -> Settings:
    """Settings under which jobs take no time, so that there can be thousands of them."""
    fake("setpriv", QUICK_JOB.replace("IMAGES", str(scratch.output_dir)))
    return change(scratch, workers=64, scan_interval_seconds=2)


def drop(directory: Path, name: str) -> Path:
    """Write a tiny export as an exporter does: the disk, and then the manifest by a rename."""
    export = directory / name
    export.mkdir()
    disk = export / f"{name}-disk-0.raw"
    disk.write_bytes(os.urandom(512))
    entry = disk_entry(disk, local_path=disk.name)
    written = write_manifest(export, [entry]).rename(export / "manifest.tmp")
    written.rename(export / "manifest.json")
    return export


def check_none_lost_none_twice(settings: Settings, names: list[str]) -> None:
    """Each of `names` has its report and its output, and nothing else has."""
    lost = [name for name in names if not (settings.exports_dir / name / "migration-report.json").exists()]
    assert [] == lost, f"{len(lost)} of {len(names)} were lost"
    assert not (settings.output_dir.parent / "twice").exists(), (settings.output_dir.parent / "twice").read_text()
    outputs = sorted(path.name.removesuffix("-disk-0.qcow2") for path in settings.output_dir.iterdir())
    assert sorted(names) == outputs
    reports = [report_of(settings.exports_dir / name) for name in names]
    assert {("succeeded", 1)} == {(document["status"], document.get("attempts", 1)) for document in reports}


class Systemd:
    """Receives what a daemon tells systemd."""

    def __init__(self, path: Path) -> None:
        self.messages: list[str] = []
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "2000000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        while message := self._socket.recv(65536):
            self.messages.append(message.decode("ascii"))

    def close(self) -> None:
        """Let the thread end."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"", self._socket.getsockname())

    def ready(self) -> bool:
        """Whether READY was received."""
        return "READY=1" in self.messages

    def status(self) -> str:
        """The last STATUS."""
        found = [message for message in self.messages if message.startswith("STATUS=")]
        return found[-1].removeprefix("STATUS=") if found else ""


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    """What stands in for systemd."""
    receiver = Systemd(tmp_path / "notify")
    yield receiver
    receiver.close()


@contextlib.contextmanager
def network_directory(settings: Settings) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Mount a file system on the exports directory that, as NFS, shows what somebody else writes, without events.

    Yield the directory where somebody else writes, and the file server's process; stopped, it stands in for one that
    is gone.
    """
    behind = settings.exports_dir.parent / "behind"
    behind.mkdir()
    server = subprocess.Popen(
        ["bindfs", "-f", "-o", "allow_other,attr_timeout=0,entry_timeout=0", behind, settings.exports_dir]
    )
    try:
        wait_until(settings.exports_dir.is_mount, 10)
        yield behind, server
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "--lazy", settings.exports_dir], check=False)
        server.terminate()
        server.wait(120)


# Events -----------------------------------------------------------------------------------------------------


def test_from_ready_on_every_drop_is_seen_by_its_events(
    scratch: Settings, make_export: MakeExport, systemd: Systemd
) -> None:
    """The next scan is an hour away, so only events can bring it forward."""
    with daemon(change(scratch, scan_interval_seconds=3600), **systemd.environment):
        wait_until(systemd.ready)
        for number in range(3):
            export = make_export(f"vm{number}")
            wait_until(lambda: done(export), 20)  # noqa: B023
    check_none_lost_none_twice(scratch, ["vm0", "vm1", "vm2"])


def test_a_full_queue_of_events_loses_nothing(quick_jobs: Settings, systemd: Systemd) -> None:
    """512 places, 1,000 drops of several events each while nobody reads them."""
    before = QUEUE_LIMIT.read_text()
    QUEUE_LIMIT.write_text("512")
    try:
        # What is started is not logged: nobody reads it meanwhile.
        settings = change(quick_jobs, watch={"mode": "inotify"}, workers=256, log={"level": "warning"})
        with daemon(settings, **systemd.environment) as process:
            wait_until(systemd.ready)
            QUEUE_LIMIT.write_text(before)
            process.send_signal(signal.SIGSTOP)
            names = [drop(settings.exports_dir, f"vm{number:04}").name for number in range(1000)]
            process.send_signal(signal.SIGCONT)
            wait_until(lambda: f"{len(names)} done" in systemd.status(), 600)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=60)
        assert "overflow" in output, "the queue was never full: this test tests nothing"
    finally:
        QUEUE_LIMIT.write_text(before)
    check_none_lost_none_twice(settings, names)


@pytest.mark.parametrize(
    ("limit", "number"), [("max_inotify_watches", 100), ("max_inotify_instances", 0)], ids=["watches", "instances"]
)
def test_a_limit_of_watches_loses_nothing(quick_jobs: Settings, limit: str, number: int) -> None:
    """The limits are those of a user name space, so this machine's own are left alone."""
    config = quick_jobs.work_dir.parent / "limited.json"
    config.write_text(change(quick_jobs, watch={"mode": "inotify"}).model_dump_json(by_alias=True))
    process = subprocess.Popen(
        [
            *("unshare", "--user", "--map-root-user"),
            *("sh", "-c", f'echo {number} >/proc/sys/user/{limit} && exec "$@"', "sh"),
            *(sys.executable, "-m", "hyper2kvmd", "run", "--config", str(config)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        exports = [drop(quick_jobs.exports_dir, f"vm{n:03}") for n in range(300)]
        wait_until(lambda: done(*exports), 300)
        fds = len(os.listdir(f"/proc/{process.pid}/fd"))
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=60)
    check_none_lost_none_twice(quick_jobs, [export.name for export in exports])
    # Said once, not at every scan; and what failed left nothing open.
    assert (number == 0) == (1 == output.count("cannot watch, the scan finds everything later")), output
    assert fds < 20 + quick_jobs.workers


def exchange(one: Path, other: Path) -> None:
    """Give each of two directories the other's name, so that both are there all the time."""
    here, exchanged = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    assert 0 == ctypes.CDLL(None).renameat2(here, bytes(one), here, bytes(other), exchanged)


# The directory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "poll"])
def test_a_directory_that_goes_and_comes_back_is_watched_again(
    scratch: Settings, make_export: MakeExport, systemd: Systemd, mode: str
) -> None:
    root = scratch.exports_dir
    away = root.with_name("away")
    with daemon(change(scratch, watch={"mode": mode}), **systemd.environment) as process:
        wait_until(systemd.ready)
        first = make_export("first")
        wait_until(lambda: done(first))
        root.rename(away)
        wait_until(lambda: f"cannot read {root}: No such file or directory" in systemd.status())
        root.mkdir()
        second = make_export("second")
        wait_until(lambda: done(second))
        # And another one in its place, at once.
        exchange(root, away)
        third = make_export("third")
        wait_until(lambda: done(third))
        wait_until(lambda: "0 running, 2 done" == systemd.status())
        shutil.move(away / "second", root / "second")
        wait_until(lambda: "0 running, 3 done" == systemd.status())
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    check_none_lost_none_twice(scratch, ["first", "second", "third"])
    # The first prune, a process of its own, may meet the gap, too.
    assert 1 == output.count(f"cannot read {root}: No such file or directory"), "said once, not at every scan"


def test_events_come_again_after_the_directory_was_replaced(tmp_path: Path) -> None:
    root = tmp_path / "exports"
    woken = threading.Event()
    watch = Watch(woken.set)
    for _ in range(3):
        root.mkdir()
        watch.ensure(root, "inotify")
        woken.clear()
        (root / "web01").mkdir()
        assert woken.wait(120)
        time.sleep(0.2)  # the watch on the new directory follows its event
        woken.clear()
        (root / "web01" / "manifest.json").write_text("{}")
        assert woken.wait(120)
        time.sleep(0.2)
        woken.clear()
        (root / "web01" / "migration-report.json").write_text("{}")
        (root / "web01" / ".hyper2kvmd.log").write_text("{}")
        assert not woken.wait(0.5), "our own files wake nobody"
        (root / "web01" / ".hyper2kvmd.lock").write_text("{}")
        assert woken.wait(120), "but for the lock: somebody let go of the export"
        shutil.rmtree(root)
        watch.ensure(root, "inotify")
        assert not watch.up
    assert not watch.polls


def test_a_wish_that_changes_is_taken_up_at_the_next_scan(tmp_path: Path) -> None:
    watch = Watch(lambda: None)
    seen = []
    for mode in ("off", "inotify", "poll", "auto", "off"):
        watch.ensure(tmp_path, mode)
        seen.append((watch.up, watch.polls))
    assert [(False, False), (True, False), (False, True), (True, False), (False, False)] == seen


# Network file systems ---------------------------------------------------------------------------------------


def test_the_file_system_is_that_of_the_topmost_mount(scratch: Settings) -> None:
    root = scratch.exports_dir
    below = file_system(root)
    with network_directory(scratch):
        assert "fuse" == file_system(root)
        subprocess.run(["mount", "-t", "tmpfs", "none", root], check=True)
        try:
            assert "tmpfs" == file_system(root)
        finally:
            subprocess.run(["umount", root], check=True)
        assert "fuse" == file_system(root)
    assert below == file_system(root) != "fuse"


@contextlib.contextmanager
def odd_mount(directory: Path) -> Iterator[Path]:
    """A way to a mount with a name that the kernel's list of mounts has as it is, but for a space and a new line."""
    odd = os.fsencode(directory) + b"/a\r b\n\x0b\xff\xc2\x85 - c"
    os.mkdir(odd)
    subprocess.run([b"mount", b"-t", b"tmpfs", b"tmpfs", odd], check=True)
    try:
        way = directory / "way"
        way.symlink_to(os.fsdecode(odd))
        yield way
    finally:
        subprocess.run([b"umount", b"--lazy", odd], check=True)


def test_a_mount_with_an_odd_name_blinds_nobody(scratch: Settings, tmp_path: Path) -> None:
    with odd_mount(tmp_path) as way:
        assert "tmpfs" == file_system(way)
        assert file_system(scratch.exports_dir) != "unknown"
        assert [Verdict(), Verdict()] == [check_locks(way), check_locks(scratch.exports_dir)]


@pytest.mark.parametrize("mode", ["auto", "inotify", "poll", "off"])
def test_what_is_written_behind_the_mount_is_found(
    scratch: Settings, tmp_path: Path, systemd: Systemd, mode: str
) -> None:
    # With `auto` and `poll`, the interval does not matter.
    seconds = 2 if mode in ("inotify", "off") else 3600
    settings = change(scratch, watch={"mode": mode}, scan_interval_seconds=seconds)
    with network_directory(settings) as (behind, _), daemon(settings, **systemd.environment) as process:
        wait_until(systemd.ready)
        names = [drop(behind, f"vm{number}").name for number in range(3)]
        wait_until(lambda: done(*(behind / name for name in names)), 1.25 * POLL_SECONDS + 20)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        check_none_lost_none_twice(settings, names)
    assert (mode == "auto") == ("others may write there: polling" in output)


def test_a_file_server_that_is_gone_hangs_the_look_and_nothing_else(scratch: Settings, systemd: Systemd) -> None:
    settings = change(scratch, watch={"mode": "off"})
    with network_directory(settings) as (behind, server), daemon(settings, **systemd.environment) as process:
        wait_until(systemd.ready)
        names = [drop(behind, "before").name]
        wait_until(lambda: "1 done" in systemd.status())

        server.send_signal(signal.SIGSTOP)
        names.append(drop(behind, "meanwhile").name)
        wait_until(lambda: f"no answer from {settings.exports_dir}" in systemd.status())
        assert "1 done" in systemd.status(), "what was known stays known"
        alive = systemd.messages.count("WATCHDOG=1")
        wait_until(lambda: systemd.messages.count("WATCHDOG=1") >= alive + 3)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: any(message.startswith("RELOADING=1\n") for message in systemd.messages))
        assert 1 == systemd.messages.count("READY=1"), "a reload is over when the directory has been looked at again"

        server.send_signal(signal.SIGCONT)
        wait_until(lambda: "0 running, 2 done" == systemd.status())
        wait_until(lambda: 2 == systemd.messages.count("READY=1"))
        check_none_lost_none_twice(settings, names)

        server.send_signal(signal.SIGSTOP)
        time.sleep(2)  # it looks every second
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert 0 == process.returncode, output
    assert 1 == output.count("no answer from"), output
    assert 1 == output.count("can be read again"), output


def test_it_is_not_ready_before_the_directory_has_answered(scratch: Settings, systemd: Systemd) -> None:
    settings = change(scratch, watch={"mode": "off"})
    with network_directory(settings) as (behind, server):
        server.send_signal(signal.SIGSTOP)
        with daemon(settings, **systemd.environment):
            wait_until(lambda: "no answer from" in systemd.status())
            assert not systemd.ready()
            server.send_signal(signal.SIGCONT)
            wait_until(systemd.ready)
            export = drop(behind, "web01")
            wait_until(lambda: done(export))
            check_none_lost_none_twice(settings, ["web01"])


# Clocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-3600, 86400 * 365])
def test_a_clock_that_jumps_neither_hastens_nor_delays(quick_jobs: Settings, jump: float) -> None:
    settings = change(quick_jobs, settle_seconds=3, incomplete_grace_seconds=6, watch={"mode": "off"})
    whole = drop(settings.exports_dir, "whole")
    half = drop(settings.exports_dir, "half")
    text = (half / "manifest.json").read_bytes()
    (half / "manifest.json").write_bytes(text[:100])
    watcher = Daemon(settings, lambda: settings, Metrics())

    def states() -> tuple[State, State]:
        watcher.tick(time.time() + jump)
        return watcher.table[whole].state, watcher.table[half].state

    watcher.tick(time.time())
    assert (State.WAITING, State.INCOMPLETE) == states()
    time.sleep(3)
    assert (State.QUEUED, State.INCOMPLETE) == states()
    (half / "manifest.json").write_bytes(text)
    time.sleep(1)
    # A file that is written after the jump has the new time, and this one has not: the clock that was put back.
    assert State.INCOMPLETE != states()[1]
    wait_until(lambda: bool(states()) and done(whole, half), 10)
    for runner in watcher.runners.values():
        runner.close()
    check_none_lost_none_twice(settings, ["whole", "half"])


@pytest.mark.parametrize("offset", [-86400 * 365 * 50, 30])
def test_the_file_servers_clock_does_not_matter(scratch: Settings, make_export: MakeExport, offset: float) -> None:
    """It writes its own time onto every file; a half-written manifest in the future is waited for as any other."""

    def stamp(export: Path) -> None:
        for path in export.iterdir():
            when = max(time.time() + offset, 0)
            os.utime(path, (when, when))

    settings = change(scratch, settle_seconds=1, incomplete_grace_seconds=600)
    whole, half = make_export("whole"), make_export("half")
    text = (half / "manifest.json").read_bytes()
    if offset > 0:  # what is as old as that, and half-written, is judged
        (half / "manifest.json").write_bytes(text[:100])
    for export in (whole, half):
        stamp(export)
    port = free_port()
    with daemon(change(settings, metrics={"listen": f"127.0.0.1:{port}"})):
        wait_until(lambda: done(whole, *([half] if offset < 0 else [])))
        look_again(port)
        assert (offset < 0) == done(half)
        (half / "manifest.json").write_bytes(text)
        stamp(half)
        wait_until(lambda: done(half))
    check_none_lost_none_twice(scratch, ["whole", "half"])


# Several daemons --------------------------------------------------------------------------------------------


def test_two_daemons_that_are_killed_at_random_do_nothing_twice(scratch: Settings, make_export: MakeExport) -> None:
    """Nothing but the claims keeps them apart; a job whose daemon died goes on under another."""
    exports = [make_export(f"vm{number}") for number in range(10)]
    settings = change(scratch, retry={"delay_seconds": 1})
    with daemon(change(settings, watch={"mode": "off"})):
        for pause in (2.0, 3.1, 2.6):
            with daemon(settings) as other:
                time.sleep(pause)
                other.kill()
        with daemon(settings):
            wait_until(lambda: done(*exports), 120)
    for export in exports:
        document = report_of(export)
        assert "succeeded" == document["status"], document["error"]
        lock = json.loads((export / ".hyper2kvmd.lock").read_text())
        assert "reported" == lock["ended"] or lock["attempt"] > document["attempts"]
    assert sorted(f"{export.name}-disk-0.qcow2" for export in exports) == sorted(
        path.name for path in scratch.output_dir.iterdir()
    )
    assert [] == [path for path in scratch.work_dir.iterdir() if path.is_dir()]
