"""The queue: states that follow from what is on disk, claims that the kernel keeps, reports that are whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import write_durably
from hyper2kvmd.queue import facts, setbacks
from hyper2kvmd.queue.claim import Busy, claim_export
from hyper2kvmd.queue.names import LOCK, REPORT
from hyper2kvmd.queue.state import FINAL, Facts, Setback, State, state_of
from hyper2kvmd.report.model import HostRecord, ManifestRecord, Report
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport

NOW = 1_000_000.0
SETTINGS = Settings(settle_seconds=5, incomplete_grace_seconds=600)


def state(**found: Any) -> State:
    look = Facts(**{"manifest": "manifest.json", "manifest_sha256": "a", "settled_since": NOW - 60, **found})
    return state_of(look, SETTINGS, NOW)[0]


def report(status: str = "succeeded", **changes: Any) -> Report:
    shape: dict[str, Any] = {
        "status": status,
        "job": "web01-12345678",
        "manifest": ManifestRecord(name="manifest.json", sha256="a"),
        "attempts": 1,
        "started_at": "2026-01-01T00:00:00.000Z",
        "finished_at": "2026-01-01T00:00:01.000Z",
        "seconds": 1,
        "host": HostRecord(name="h", pid=1),
        **changes,
    }
    return Report(**shape)


def test_a_setback_holds_until_its_time_and_only_what_would_be_started() -> None:
    finding = Finding(Code.EXPORT_UNWRITABLE, "it cannot be written", "give access")
    delay = SETTINGS.retry.delay(2)

    def of(until: float, **found: Any) -> tuple[State, Finding | None]:
        look = {
            "manifest": "m",
            "manifest_sha256": "a",
            "settled_since": NOW - 60,
            "setback": Setback(2, until, finding),
        }
        return state_of(Facts(**{**look, **found}), SETTINGS, NOW)

    assert (State.RETRYING, finding) == of(NOW + delay)
    assert (State.QUEUED, None) == of(NOW - 1)
    assert (State.QUEUED, None) == of(NOW + delay + 1), "the clock was put back"
    assert (State.RUNNING, None) == of(NOW + 1, held=True)
    assert State.SUCCEEDED == of(NOW + 1, report_status="succeeded", report_sha256="a")[0]


def test_setbacks_come_back_and_a_damaged_file_is_none(tmp_path: Path) -> None:
    found = {tmp_path / "web01": Setback(3, 1e9, Finding("export_unwritable", "m", "h", "f"))}
    setbacks.write(tmp_path / "work", found)
    assert found == setbacks.read(tmp_path / "work")
    for damage in ("", "[]", "{", '{"a": {}}', '{"a": {"count": "x", "until": 1, "finding": {}}}', "[" * 60000):
        (tmp_path / "work" / setbacks.FILE).write_text(damage)
        assert {} == setbacks.read(tmp_path / "work")
    setbacks.write(Path("/proc/nowhere"), found)  # nothing that ends a daemon


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"manifest": None}, State.INCOMPLETE),
        ({"settled_since": NOW - 1}, State.WAITING),
        ({"settled_since": NOW - 5}, State.QUEUED),
        ({"settled_since": NOW + 4}, State.WAITING),
        ({"settled_since": NOW + 3600}, State.QUEUED),
        ({"held": True}, State.RUNNING),
        ({"held": True, "report_status": "retrying"}, State.RUNNING),
        ({"unreadable": True}, State.INCOMPLETE),
        ({"unreadable": True, "settled_since": NOW - 601}, State.QUEUED),
        ({"missing": ("x",)}, State.INCOMPLETE),
        ({"missing": ("x",), "settled_since": NOW - 601}, State.QUEUED),
        ({"report_status": "succeeded", "report_sha256": "a"}, State.SUCCEEDED),
        ({"report_status": "failed", "report_sha256": "a"}, State.FAILED),
        ({"report_status": "rejected", "report_sha256": None}, State.REJECTED),
        ({"report_status": "succeeded", "report_sha256": "b"}, State.BLOCKED),
        ({"report_status": "retrying", "report_sha256": "a", "next_attempt_at": NOW + 1}, State.RETRYING),
        ({"report_status": "retrying", "report_sha256": "a", "next_attempt_at": NOW}, State.QUEUED),
        # Further away than the longest delay (an hour, stretched): the clock was put back meanwhile.
        ({"report_status": "retrying", "report_sha256": "a", "next_attempt_at": NOW + 4400}, State.RETRYING),
        ({"report_status": "retrying", "report_sha256": "a", "next_attempt_at": NOW + 4600}, State.QUEUED),
        ({"crashes": 9, "began_at": NOW}, State.RETRYING),
        ({"crashes": 9, "began_at": NOW + 3}, State.QUEUED),
        ({"crashes": 1, "began_at": NOW - 30}, State.RETRYING),
        ({"crashes": 1, "began_at": NOW - 60}, State.QUEUED),
        ({"crashes": 2, "began_at": NOW - 60}, State.RETRYING),
        (
            {"report_status": "retrying", "report_sha256": "a", "next_attempt_at": NOW, "crashes": 1, "began_at": NOW},
            State.RETRYING,
        ),
    ],
)
def test_the_state_follows_from_the_facts(found: dict[str, Any], expected: State) -> None:
    assert expected == state(**found)


@given(
    st.builds(
        Facts,
        manifest=st.none() | st.just("manifest.json"),
        manifest_sha256=st.none() | st.sampled_from("ab"),
        unreadable=st.booleans(),
        missing=st.sampled_from([(), ("x",)]),
        settled_since=st.floats(0, 2 * NOW),
        held=st.booleans(),
        crashes=st.integers(0, 100),
        began_at=st.floats(0, 2 * NOW),
        report_status=st.none() | st.sampled_from([*FINAL, "retrying"]),
        report_sha256=st.none() | st.sampled_from("ab"),
        next_attempt_at=st.none() | st.floats(0, 2 * NOW),
    )
)
def test_nothing_runs_twice_and_nothing_is_stuck(look: Facts) -> None:
    now, _ = state_of(look, SETTINGS, NOW)
    if look.held:
        assert State.RUNNING == now
    if look.report_status in FINAL and not look.held:
        assert now in FINAL, "a final report must never lead to another run"
    if look.manifest and not look.held and look.report_status not in FINAL:
        conflict = look.manifest_sha256 is not None and look.report_sha256 not in (None, look.manifest_sha256)
        later, _ = state_of(look, SETTINGS, 10 * NOW)
        assert later == (State.BLOCKED if conflict and look.report_status else State.QUEUED)


def test_a_fresh_export_is_queued_and_a_finished_one_is_over(make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    assert State.QUEUED == state_of(facts.look(export, scratch), scratch, time.time())[0]
    claim = claim_export(export)
    assert State.RUNNING == state_of(facts.look(export, scratch), scratch, time.time())[0]
    claim.finish(report(manifest=ManifestRecord(name="manifest.json", sha256=None)))
    claim.close()
    assert State.SUCCEEDED == state_of(facts.look(export, scratch), scratch, time.time())[0]


def test_another_manifest_beside_a_report_is_a_conflict(make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    claim = claim_export(export)
    claim.finish(report(manifest=ManifestRecord(name="manifest.json", sha256="0" * 64)))
    claim.close()
    now, finding = state_of(facts.look(export, scratch), scratch, time.time())
    assert State.BLOCKED == now
    assert finding is not None and finding.code == Code.MANIFEST_CHANGED


def test_something_else_under_the_reports_name_is_never_overwritten(make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    (export / REPORT).write_text("my notes")
    assert State.BLOCKED == state_of(facts.look(export, scratch), scratch, time.time())[0]


@pytest.mark.parametrize("name", [LOCK, REPORT])
@pytest.mark.parametrize(
    "content",
    [
        '{"attempt": "x", "crashes": [], "status": [], "next_attempt_at": 5, "error": 7, "manifest": "m"}',
        '{"attempt": 1e999, "crashes": -1, "status": {"a": 1}, "next_attempt_at": "0001-01-01T00:00:00"}',
        '{"status": "failed", "error": {"code": 3, "field": ["x"]}, "next_attempt_at": "x", "attempt": true}',
        "[" * 4000,
        "\x00" * 4000,
        "",
    ],
)
def test_whatever_somebody_planted_a_look_and_a_claim_survive(
    make_export: MakeExport, scratch: Settings, name: str, content: str
) -> None:
    export = make_export()
    (export / name).write_text(content)
    state_of(facts.look(export, scratch), scratch, time.time())
    claim = claim_export(export)
    claim.check()
    claim.interrupted()
    claim.close()


def test_a_missing_disk_is_waited_for(make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    (export / "web01-disk-0.raw").unlink()
    now, finding = state_of(facts.look(export, scratch), scratch, time.time())
    assert State.INCOMPLETE == now
    assert finding is not None and "web01-disk-0.raw" in finding.message


def test_a_disk_that_was_just_written_is_waited_for(make_export: MakeExport, scratch: Settings) -> None:
    patient = scratch.model_copy(update={"settle_seconds": 60})
    look = facts.look(make_export(), patient)
    assert State.WAITING == state_of(look, patient, time.time())[0]
    assert State.QUEUED == state_of(look, patient, time.time() + 61)[0]


@pytest.mark.parametrize("name", ["web01-disk-0.raw", "manifest.json", "sub"])
def test_old_times_of_what_was_just_copied_do_not_count(name: str, make_export: MakeExport, scratch: Settings) -> None:
    """As `cp -p`, `rsync -a` and unzip leave them."""
    export = make_export()
    (export / "sub").mkdir()
    began = time.time()
    os.utime(export / name, (1, 1))
    assert facts.look(export, scratch).settled_since >= began - 1


def test_a_disk_is_looked_for_in_the_export_alone(make_export: MakeExport, scratch: Settings, tmp_path: Path) -> None:
    """While `cp -r` copies an export, the original that its manifest names by its whole path is still there."""
    export = make_export()
    disk = export / "web01-disk-0.raw"
    original = tmp_path / "original" / disk.name
    original.parent.mkdir()
    disk.rename(original)
    manifest = (export / "manifest.json").read_text()
    (export / "manifest.json").write_text(manifest.replace(str(disk), str(original)))
    look = facts.look(export, scratch)
    assert (disk.name,) == look.missing
    assert State.INCOMPLETE == state_of(look, scratch, time.time())[0]
    original.rename(disk)
    assert State.QUEUED == state_of(facts.look(export, scratch), scratch, time.time())[0]


@pytest.mark.parametrize("path", ["/dev/../etc/passwd", "../../../etc/passwd", "link/web01-disk-0.raw"])
def test_no_path_of_a_manifest_leads_the_look_elsewhere(
    path: str, make_export: MakeExport, scratch: Settings, tmp_path: Path
) -> None:
    export = make_export()
    (tmp_path / "web01-disk-0.raw").write_bytes(b"x")
    (export / "link").symlink_to(tmp_path)
    manifest = (export / "manifest.json").read_text()
    (export / "manifest.json").write_text(manifest.replace(str(export / "web01-disk-0.raw"), path))
    assert () == facts.look(export, scratch).sizes


@pytest.mark.parametrize(
    "temporary",
    [".web01-disk-0.raw.Xa3f9Z", "web01-disk-0.raw.filepart", "web01-disk-0.raw.part", ".manifest.json.AAAAAA"],
)
def test_what_is_still_being_copied_is_waited_for(temporary: str, make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    (export / temporary).write_bytes(b"")
    state, reason = state_of(facts.look(export, scratch), scratch, time.time())
    assert State.INCOMPLETE == state
    assert reason is not None and temporary in reason.message
    # One that was left behind holds the export up no longer than a disk that does not come.
    assert State.QUEUED == state_of(facts.look(export, scratch), scratch, time.time() + 601)[0]
    (export / temporary).unlink()
    assert State.QUEUED == state_of(facts.look(export, scratch), scratch, time.time())[0]


def test_a_file_that_is_called_almost_so_is_no_copy(make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    for name in (".notes.Xa3f9Z", "web01.part", ".web01-disk-0.raw.toolong1"):
        (export / name).write_bytes(b"")
    assert State.QUEUED == state_of(facts.look(export, scratch), scratch, time.time())[0]


def test_what_we_write_ourselves_is_no_sign_of_life(make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    before = facts.look(export, scratch).settled_since
    time.sleep(0.05)
    signatures = ("migration-report.json.sig", "migration-report.2.json.sig", ".migration-report.json.sig.1.tmp")
    for name in (".hyper2kvmd.lock", ".hyper2kvmd.log", "boot-test.png", ".migration-report.json.1.tmp", *signatures):
        (export / name).write_bytes(b"")
    assert before == facts.look(export, scratch).settled_since


def test_names_that_could_forge_lines_are_told_apart_and_the_rest_are_exports(scratch: Settings) -> None:
    for name in (".hidden", "-n", "a b", "a\nb", "ok", "Büro 日本", "x\x1b[2J"):
        (scratch.exports_dir / name).mkdir()
    (scratch.exports_dir / "link").symlink_to(scratch.work_dir)
    (scratch.exports_dir / "file").touch()
    exports, ignored = facts.exports(scratch)
    assert ["-n", "Büro 日本", "a b", "ok"] == [path.name for path in exports]
    said = "is ignored: the name has control characters"
    assert [f"'a\\nb' {said}", f"'x\\x1b[2J' {said}"] == [finding.message for finding in ignored]


def test_one_of_two_claims_wins(make_export: MakeExport) -> None:
    export = make_export()
    first = claim_export(export)
    with pytest.raises(Busy):
        claim_export(export)
    first.close()
    second = claim_export(export)
    assert (1, 2) == (first.attempt, second.attempt)
    second.close()


def test_of_many_processes_that_race_one_wins(make_export: MakeExport) -> None:
    export = make_export()
    code = (
        "import sys, time; from pathlib import Path; from hyper2kvmd.queue.claim import Busy, claim_export\n"
        "try: claim = claim_export(Path(sys.argv[1]))\n"
        "except Busy: print('busy')\n"
        "else: print('won', claim.attempt, flush=True); time.sleep(30)"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(export)], stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    try:
        lines = []
        for racer in racers:
            assert racer.stdout is not None
            lines.append(racer.stdout.readline().strip())
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert ["busy"] * 7 + ["won 1"] == sorted(lines)


def test_the_kernel_frees_the_claim_of_a_killed_process_and_the_death_is_counted(make_export: MakeExport) -> None:
    export = make_export()
    code = (
        "import sys, time; from pathlib import Path; from hyper2kvmd.queue.claim import Busy, claim_export\n"
        "claim_export(Path(sys.argv[1])); print('ok', flush=True); time.sleep(60)"
    )
    for expected in (1, 2):
        holder = subprocess.Popen([sys.executable, "-c", code, str(export)], stdout=subprocess.PIPE)
        assert holder.stdout is not None and holder.stdout.readline()
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
        assert expected == facts.look(export, Settings()).crashes
    claim = claim_export(export)
    assert (3, 2) == (claim.attempt, claim.crashes)
    claim.interrupted()
    claim.close()
    assert 0 == facts.look(export, Settings()).crashes, "an attempt that was stopped on purpose is no crash"


def test_only_failures_count_as_retries(make_export: MakeExport) -> None:
    export = make_export()
    for status, expected in ((None, 0), (None, 0), ("retrying", 0), (None, 1), ("retrying", 1), ("succeeded", 2)):
        claim = claim_export(export)
        assert expected == claim.retries
        if status is None:
            claim.interrupted()
        else:
            claim.finish(report(status))
        claim.close()
    claim = claim_export(export)
    assert (7, 0) == (claim.attempt, claim.retries)
    claim.close()


def test_a_claim_notices_that_it_was_lost(make_export: MakeExport) -> None:
    export = make_export()
    claim = claim_export(export)
    claim.check()
    os.pwrite(claim.lock_fd, b'{"attempt": 7, ', 0)
    with pytest.raises(MigrationError, match="attempt 7 has begun"):
        claim.check()
    with pytest.raises(MigrationError, match="was lost"):
        claim.finish(report())
    claim.close()
    assert not (export / REPORT).exists()


def test_a_claim_notices_that_its_lock_was_replaced(make_export: MakeExport) -> None:
    export = make_export()
    claim = claim_export(export)
    (export / LOCK).unlink()
    (export / LOCK).touch()
    with pytest.raises(MigrationError, match="was replaced"):
        claim.check()
    claim.close()


@pytest.mark.parametrize("plant", ["symlink", "hardlink", "fifo", "directory"])
def test_a_planted_lock_is_refused(make_export: MakeExport, tmp_path: Path, plant: str) -> None:
    export = make_export()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = export / LOCK
    match plant:
        case "symlink":
            lock.symlink_to(victim)
        case "hardlink":
            os.link(victim, lock)
        case "fifo":
            os.mkfifo(lock)
        case "directory":
            lock.mkdir()
    with pytest.raises((MigrationError, OSError)):
        claim_export(export)
    assert "precious" == victim.read_text()


def test_a_half_written_lock_still_tells_the_attempt(make_export: MakeExport) -> None:
    export = make_export()
    (export / LOCK).write_text('{"attempt": 41, "cra')
    claim = claim_export(export)
    assert 42 == claim.attempt
    claim.close()


def test_a_report_is_written_whole_or_not_at_all(make_export: MakeExport) -> None:
    export = make_export()
    (export / f".{REPORT}.1.tmp").write_text("left by a dead attempt")
    claim = claim_export(export)
    claim.finish(report())
    claim.close()
    assert "succeeded" == json.loads((export / REPORT).read_text())["status"]
    assert not list(export.glob(".*.tmp"))


def finished(export: Path, signature: bytes | None) -> None:
    claim = claim_export(export)
    claim.finish(report(), signature)
    claim.close()


def test_the_signature_is_there_before_the_report_and_that_of_an_earlier_one_is_not(
    make_export: MakeExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make_export()
    (export / f".{REPORT}.sig.1.tmp").write_text("left by a dead attempt")
    written = []
    monkeypatch.setattr("hyper2kvmd.queue.claim.write_durably", lambda fd, name, *rest: written.append(name))
    finished(export, b"signature")
    assert [f"{REPORT}.sig", REPORT] == written
    monkeypatch.undo()
    finished(export, b"signature")
    assert b"signature" == (export / f"{REPORT}.sig").read_bytes()
    assert not list(export.glob(".*.tmp"))
    finished(export, None)
    assert not (export / f"{REPORT}.sig").exists(), "it would be taken for that of a report that has none"


def test_a_retry_moves_the_signature_with_its_report_also_after_a_crash_between_the_two(
    make_export: MakeExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make_export()
    (export / "migration-report.1.json").write_text("{}")
    finished(export, b"second")
    rename = os.rename

    def crash(old: str, new: str, **where: int) -> None:
        if old == REPORT:
            raise KeyboardInterrupt
        rename(old, new, **where)

    claim = claim_export(export)
    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        claim.forget()
    monkeypatch.undo()
    assert (export / REPORT).exists()
    claim.forget()
    claim.close()
    assert [] == list(export.glob(f"{REPORT}*"))
    assert b"second" == (export / "migration-report.2.json.sig").read_bytes()
    assert json.loads((export / "migration-report.2.json").read_text())["status"] == "succeeded"
    assert not (export / "migration-report.1.json.sig").exists()


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    write_durably(fd, "report", b"old", 1)
    os.mkdir(tmp_path / ".report.2.tmp")
    with pytest.raises(OSError):
        write_durably(fd, "report", b"new", 2)
    os.close(fd)
    assert b"old" == (tmp_path / "report").read_bytes()


def test_scan_forgives_an_export_that_vanished(make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    export.rename(export.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError):
        facts.look(export, scratch)


def test_the_same_look_gives_the_same_state() -> None:
    look = Facts("manifest.json", "a", settled_since=NOW)
    assert state_of(look, SETTINGS, NOW) == state_of(replace(look), SETTINGS, NOW)
