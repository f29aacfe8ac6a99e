"""Whether the daemon works: what is told of which state of the host, by what the clock says."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper2kvmd.daemon import health, watch
from hyper2kvmd.daemon.health import Health, Probe, Verdict
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import existing_parent
from hyper2kvmd.settings.model import Settings


def healthy(settings: Settings) -> Health:
    """The health of a daemon whose every probe has just answered."""
    found = Health(lambda: settings, None)
    found.looked, found.interval = time.monotonic(), 30.0
    for probe in found.probes.values():
        probe.attempt = Verdict
        probe.try_now()
    wait_until(lambda: not any(state.problem for state in found.checks(time.monotonic()).values()))
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def problems(found: Health, now: float | None = None) -> dict[str, str]:
    """What is wrong, by check."""
    checks = found.checks(now or time.monotonic())
    return {name: str(state) for name, state in checks.items() if state.problem}


def test_a_loop_that_turns_is_alive_and_one_that_does_not_is_dead_after_the_time_of_the_watchdog() -> None:
    for watchdog, limit in ((None, health.TURN_SECONDS), (4.0, 4.0)):
        found = Health(Settings, watchdog)
        assert "" == found.hangs(found.turned + limit - 1)
        assert f"for {limit + 1:.0f} s" in found.hangs(found.turned + limit + 1)
    found.turned = time.monotonic()
    assert (200, b"ok\n") == (found.healthz("", "").status, found.healthz("", "").body)
    found.turned -= 60
    assert 503 == found.healthz("", "").status
    assert b"failed: the main loop has not come round for 60 s\n" == found.healthz("", "").body


def test_a_host_on_which_all_works_is_ready(scratch: Settings) -> None:
    found = healthy(scratch)
    assert 200 == found.readyz("", "").status
    names = ["settings", "exports", "locks", "libvirt", "output", "work"]
    assert [f"{name}: ok" for name in names] == found.readyz("", "").body.decode().splitlines()


def test_all_is_well_only_while_both_pages_say_so(scratch: Settings) -> None:
    found = healthy(scratch)
    now = time.monotonic()
    assert found.all_well(now)
    found.turned = now - 61
    assert not found.all_well(now)
    found.turned, found.trouble = now, "cannot read /exports"
    assert not found.all_well(now)
    found.trouble = ""
    assert found.all_well(now)
    assert not Health(lambda: scratch, None).all_well(now), "before the first look"


def test_each_thing_that_is_wrong_has_its_line_with_the_remedy(scratch: Settings) -> None:
    found = healthy(scratch)
    found.refused, found.trouble = "c.yaml:1: worker: unknown\nsetting", "cannot read /exports: No such file"
    assert ["settings", "exports"] == [*problems(found)]
    answer = found.readyz("", "")
    assert 503 == answer.status
    settings, exports, *others = answer.body.decode().splitlines()
    assert settings.startswith("settings: failed: the last reload was refused: c.yaml:1: worker: unknown setting; Fix")
    assert exports.startswith("exports: failed: cannot read /exports: No such file; Mount or create")
    assert 4 == len(others)
    for query, accept in (("format=json", ""), ("", "application/json")):
        assert "application/json" == found.readyz(query, accept).kind
        assert b'"ready": false' in found.readyz(query, accept).body


def test_a_look_that_is_overdue_is_not_ready(scratch: Settings) -> None:
    found = Health(lambda: scratch, None)
    assert "has not been looked at yet" in problems(found)["exports"]
    found.looked, found.interval = 1000.0, 30.0
    assert "exports" not in problems(found, 1089.0)
    assert "the last look at the exports directory was 91 s ago" in problems(found, 1091.0)["exports"]
    found.interval = 0.1  # a busy host is late by more than that
    assert "exports" not in problems(found, 1029.0)


def test_what_does_not_answer_is_a_failure_and_keeps_nothing_else_from_being_tried(scratch: Settings) -> None:
    found = healthy(scratch)
    answers = threading.Event()
    found.probes["output"].attempt = lambda: Verdict(value=answers.wait(60))
    found.try_now()
    wait_until(lambda: "output" in problems(found, time.monotonic() + 20))
    assert {} == problems(found, time.monotonic() + 5)
    assert "has not answered for 20 s" in problems(found, time.monotonic() + 20)["output"]
    assert ["output"] == [*problems(found, time.monotonic() + 20)]
    answers.set()
    wait_until(lambda: {} == problems(found, time.monotonic() + 20))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MigrationError(Code.NO_SPACE, "full", "Free some."), "failed: full; Free some."),
        (PermissionError(13, "Permission denied", "/x"), "failed: /x: Permission denied; Check"),
    ],
)
def test_what_a_probe_finds_wrong_is_said_and_its_value_is_not_known(error: Exception, said: str) -> None:
    def attempt() -> Verdict:
        raise error

    probe = Probe(attempt)
    assert "failed: not tried yet; Wait a moment." == str(probe.state(time.monotonic()))
    probe.try_now()
    wait_until(lambda: str(probe.state(time.monotonic())).startswith(said))
    assert math.isnan(probe.state(time.monotonic()).value)


def test_libvirt_is_asked_only_if_it_is_needed(scratch: Settings, fake: Callable[[str, str], None]) -> None:
    fake("virsh", "echo 'error: failed to connect' >&2; exit 1\n")
    assert "" == health.check_libvirt(scratch).problem
    asked = scratch.model_copy(update={"validate_": scratch.validate_.model_copy(update={"test_boot": True})})
    assert "qemu:///system: error: failed to connect" == health.check_libvirt(asked).problem
    fake("virsh", "exec echo qemu:///system\n")
    assert "" == health.check_libvirt(asked).problem


def test_a_directory_that_the_first_job_makes_need_not_be_there(tmp_path: Path) -> None:
    assert tmp_path == existing_parent(tmp_path / "not" / "yet")
    room = health.check_room(tmp_path, "work_dir")
    assert ("", True) == (room.problem, room.value > 0)


@pytest.mark.parametrize(
    ("options", "local"), [("rw,vers=4.2,local_lock=none", ""), ("rw,vers=3,local_lock=all", "local_lock=all")]
)
def test_a_mount_that_keeps_its_locks_to_this_host_is_not_ready(
    options: str, local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nfs(5) has in /proc/self/mountinfo; there is no NFS server to mount from."""
    device = tmp_path.stat().st_dev
    other = f"40 23 0:{os.minor(device) + 1} / /other rw - nfs kvm1:/other rw,nolock\n"
    line = f"41 23 {os.major(device)}:{os.minor(device)} / {tmp_path} rw shared:1 - nfs4 kvm1:/exports {options}\n"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(other + line)
    monkeypatch.setattr(watch, "MOUNTS", mounts)
    verdict = health.check_locks(tmp_path)
    assert bool(local) == bool(verdict.problem)
    assert verdict.problem.endswith(local)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_check_with_a_defect_is_said_to_have_failed_and_begins_anew() -> None:
    probe = Probe(lambda: Verdict(str(1 // 0)))
    probe.try_now()
    wait_until(lambda: "the check itself failed" in probe.state(time.monotonic()).problem)
    probe.attempt = Verdict
    assert probe._thread is not None
    probe._thread.join(10)
    probe.try_now()
    wait_until(lambda: not probe.state(time.monotonic()).problem)
