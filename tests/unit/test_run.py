"""Processes: real ones, started through the one door."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hyper2kvmd
from hyper2kvmd.errors import Cancelled, Code, MigrationError
from hyper2kvmd.run import TAIL_LINES, Tools

PACKAGE = Path(hyper2kvmd.__file__).parent  # as it is installed, which need not be this tree


def test_only_one_module_starts_processes() -> None:
    starters = re.compile(r"Popen\(|subprocess\.(run|call|check)|os\.(system|fork|posix_spawn|exec)|multiprocessing")
    assert [path.name for path in PACKAGE.rglob("*.py") if starters.search(path.read_text())] == ["run.py"]


def test_there_is_one_broad_except_in_the_program() -> None:
    broad = [
        path.name
        for path in PACKAGE.rglob("*.py")
        for _ in re.findall(r"except (?:Base)?Exception\b", path.read_text())
    ]
    # claim closes what it opened, files removes what is half written, whatever happens, and both raise it again.
    assert sorted(broad) == ["claim.py", "files.py", "main.py"]


def test_returns_what_the_tool_wrote() -> None:
    done = Tools().run("sh", "-c", "echo out; echo err >&2; exit 3", accept=(3,))
    assert (3, "out\n", "err\n") == (done.returncode, done.stdout, done.stderr)


def test_a_failure_carries_the_command_its_status_and_the_end_of_its_output() -> None:
    with pytest.raises(MigrationError) as caught:
        Tools().run("sh", "-c", "seq 1 100 >&2; exit 2")
    assert caught.value.code == Code.TOOL_FAILED
    assert "exited 2: 100" in caught.value.message
    assert [str(n) for n in range(101 - TAIL_LINES, 101)] == caught.value.tail.splitlines()


def test_a_missing_program_is_named() -> None:
    with pytest.raises(MigrationError, match="no-such-program is not installed") as caught:
        Tools().run("no-such-program", "--version")
    assert caught.value.code == Code.TOOL_MISSING


def test_a_full_file_system_is_told_apart() -> None:
    with pytest.raises(MigrationError) as caught:
        Tools().run("sh", "-c", "echo 'x: No space left on device' >&2; exit 1")
    assert caught.value.code == Code.NO_SPACE


def test_a_tool_that_writes_more_than_a_pipe_holds_is_not_blocked() -> None:
    done = Tools().run("sh", "-c", "head -c 1000000 /dev/zero; head -c 3000000 /dev/zero >&2", timeout=20)
    assert len(done.stdout) == 1_000_000


def test_a_child_that_outlives_its_tool_holds_nobody_up() -> None:
    child = int(Tools().run("sh", "-c", "sleep 600 & echo $!").stdout)
    try:
        assert not _zombie(str(child)), "it was waited for"
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    monkeypatch.setenv("SECRET", "x")
    names = {line.partition("=")[0] for line in Tools().run("env").stdout.splitlines()}
    assert {"PATH", "LC_ALL"} <= names
    assert not names & {"NOTIFY_SOCKET", "SECRET"}


def test_cancel_ends_the_whole_group(tmp_path: Path) -> None:
    tools = Tools()
    pids = tmp_path / "pids"
    threading.Timer(0.5, tools.cancel.set).start()
    with pytest.raises(Cancelled):
        tools.run("sh", "-c", f"sleep 60 & echo $! > {pids}; echo $$ >> {pids}; wait")
    time.sleep(0.1)
    alive = [pid for pid in pids.read_text().split() if os.path.exists(f"/proc/{pid}") and not _zombie(pid)]
    assert [] == alive


def test_a_tool_that_ignores_term_is_killed_at_its_deadline(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="did not end within"):
        Tools().run("sh", "-c", f"echo $$ > {tmp_path}/pid; trap '' TERM; while :; do sleep 0.1; done", timeout=0.3)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_a_tool_inherits_the_claim_and_nothing_else(tmp_path: Path) -> None:
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    listing = Tools(claim_fd=lock).run("sh", "-c", "ls -l /proc/self/fd").stdout
    assert str(tmp_path / "lock") in listing
    assert str(tmp_path / "other") not in listing
    os.close(lock)
    os.close(other)


def test_limits_are_those_of_prlimit() -> None:
    assert "1000" == Tools().run("sh", "-c", "ulimit -t", limits=["--cpu=1000"]).stdout.strip()


def test_a_fake_on_path_is_what_is_run(fake: Callable[[str, str], None]) -> None:
    fake("qemu-img", "echo fake $1\n")
    assert "fake info\n" == Tools().run("qemu-img", "info").stdout


def _zombie(pid: str) -> bool:
    return " Z " in Path(f"/proc/{pid}/stat").read_text()
