"""What a report has to tell, to whom, and when; webhooks and hooks that cannot be used."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.errors import Code, MigrationError, SettingsError
from hyper2kvmd.files import timestamp
from hyper2kvmd.notify import hooks, outbox, request
from hyper2kvmd.notify.channels import Channel
from hyper2kvmd.notify.delivery import Undelivered
from hyper2kvmd.notify.message import Ended, ended
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.load import load_settings
from hyper2kvmd.settings.model import Hooks, Settings, Webhook, url_problem
from tests import ROOT

PATH = Path("/exports/web01/migration-report.json")
JOURNAL = f"{outbox.STATE}-journal"
ERROR = {"code": "checksum_mismatch", "message": "web01.vmdk has another checksum", "hint": "Export the VM again."}
AT = "2026-11-24T10:00:00.000Z"


def report(**changes: Any) -> dict[str, Any]:
    return {
        "schema_version": "1.0",
        "status": "failed",
        "dry_run": False,
        "job": "web01-0a1b2c3d",
        "vm_name": "web01",
        "attempts": 2,
        "finished_at": AT,
        "seconds": 66.0,
        "error": {**ERROR, "stage": "verify", "tail": "", "problems": []},
        "warnings": [],
        "host": {"name": socket.gethostname(), "pid": 1},
        **changes,
    }


def message(**changes: Any) -> Ended:
    found = ended(PATH, report(**changes))
    assert found is not None
    return found


def test_a_failure_is_one_line_with_its_reason_and_its_remedy() -> None:
    expected = "web01: failed in verify: checksum_mismatch: web01.vmdk has another checksum; Export the VM again."
    assert expected == message().summary


def test_a_success_says_how_long_it_took_and_how_much_there_is_to_know() -> None:
    assert "web01: succeeded after 66 s" == message(status="succeeded", error=None).summary
    warned = message(status="succeeded", error=None, seconds=7200, warnings=[{}])
    assert "web01: succeeded after 2.0 h, 1 warning" == warned.summary


def test_the_id_is_that_of_the_job_the_attempt_and_the_time() -> None:
    assert "web01-0a1b2c3d/2/2026-11-24T10:00:00.000Z" == message().id
    others = {message(attempts=3).id, message(finished_at="2026-11-24T10:00:00.001Z").id, message(job="x").id}
    assert 4 == len({message().id, *others})


def test_a_message_has_all_that_a_receiver_needs() -> None:
    shape = json.loads(message().message())
    assert [*("id", "event", "vm", "job", "host", "status", "summary", "text", "report_path", "report")] == [*shape]
    assert (report(), str(PATH)) == (shape["report"], shape["report_path"])
    assert ("failed", "failed", "web01") == (shape["event"], shape["status"], shape["vm"])
    assert shape["summary"] == shape["text"]


def test_the_page_shows_the_form_of_a_message_and_every_variable_of_a_hook() -> None:
    page = (ROOT / "docs/notify.md").read_text()
    shown = json.loads(page.split("```json\n")[1].split("```")[0])
    assert [*json.loads(message().message())] == [*shown]
    assert [] == [name for name in hooks.variables(PATH, "", "", "") if f"`{name}`" not in page]


def test_an_export_without_a_vm_name_is_called_by_its_directory() -> None:
    assert "web01" == message(vm_name=None, status="rejected").vm


HOSTILE = [
    'web"01\\',
    "web\n01: succeeded",
    "\x1b[2Jweb",
    "a\u2028b",
    "\u202egnp.exe",
    "\x00",
    "x" * 5000,
    "日本-vm",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_stays_in_its_place(name: str) -> None:
    error = {**ERROR, "code": name, "message": name, "hint": name, "stage": name}
    found = message(vm_name=name, job=name, error=error)
    body = found.message()
    assert name == json.loads(body)["report"]["vm_name"]
    assert b"\n" not in body
    assert found.summary.isprintable()
    assert 1 == len(found.summary.splitlines())
    assert len(found.summary) < 2000
    for value in hooks.variables(PATH.parent, found.vm, found.status, found.job).values():
        os.fsencode(value)
        assert value.isprintable()


def test_no_vm_can_call_everybody_in_a_chat() -> None:
    shape = json.loads(message(vm_name="<!channel> @all &amp;").message())
    assert not {"<!", "@all", "@channel"} & {word for word in ("<!", "@all", "@channel") if word in shape["text"]}
    assert "&lt;!channel&gt;" in shape["text"]
    assert "<!channel> @all" in shape["summary"]


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "retrying"},
        {"status": "running"},
        {"dry_run": True},
        {"status": ["failed"]},
        {"job": None},
        {"attempts": -1},
        {"attempts": "2"} | {"host": None},
        {"finished_at": "yesterday"},
        {"finished_at": "2026-11-24T10:00:00"},
        {"seconds": float("nan")},
        {"results": {"convert": float("inf")}},
        {"host": {}},
        {"error": {"code": 1}},
        {"vm_name": "\ud800"},
    ],
    ids=str,
)
def test_what_is_not_at_its_end_or_no_report_of_ours_has_no_message(changes: dict[str, Any]) -> None:
    assert ended(PATH, report()) is not None
    assert ended(PATH, report(**changes)) is None


def cutover(**changes: Any) -> dict[str, Any]:
    failed = {"name": "addresses", "status": "failed", "evidence": "192.0.2.10 was not seen", "hint": "Try again."}
    return {
        "status": "unverified",
        "job": "web01-0a1b2c3d",
        "vm_name": "web01",
        "finished_at": AT,
        "seconds": 66.0,
        "steps": [{"name": "up", "status": "passed", "evidence": "a login prompt"}, failed],
        "host": {"name": socket.gethostname(), "pid": 1},
        **changes,
    }


CUT_OVER = PATH.with_name("cutover-report.1.json")


def test_a_cutover_is_an_event_of_its_own_and_says_what_was_not_seen() -> None:
    found = ended(CUT_OVER, cutover())
    assert found is not None
    assert ("cutover", "unverified") == (found.event, found.status)
    assert "web01: cutover unverified after 66 s; 192.0.2.10 was not seen; Try again." == found.summary
    sent = json.loads(found.message())
    assert ("cutover", f"web01-0a1b2c3d/cutover/{AT}", "unverified") == (sent["event"], sent["id"], sent["status"])
    wanted = {"a": frozenset({"failed"}), "b": frozenset({"cutover"}), "hook": None}
    assert ["b"] == [n for n, events in wanted.items() if Channel(n, print, 1, events).wants(found)]
    assert ["a", "hook"] == [n for n, events in wanted.items() if Channel(n, print, 1, events).wants(message())]


@pytest.mark.parametrize("changes", [{"status": "running", "finished_at": None}, {"status": "ready"}, {"job": None}])
def test_a_cutover_that_is_not_at_its_end_has_no_message(changes: dict[str, Any]) -> None:
    assert ended(CUT_OVER, cutover(**changes)) is None
    assert ended(PATH, cutover()) is None


def test_a_report_of_a_later_version_is_told_with_all_that_it_has() -> None:
    assert {"new": 1} == json.loads(message(added={"new": 1}).message())["report"]["added"]


# The state ------------------------------------------------------------------------------------------------------


def put(scratch: Settings, name: str, **changes: Any) -> Path:
    """An export that holds nothing but a report."""
    export = scratch.exports_dir / name
    export.mkdir(exist_ok=True)
    path = export / "migration-report.json"
    path.write_text(json.dumps(report(job=f"{name}-0a1b2c3d", vm_name=name, **changes)))
    return path


def with_hook(scratch: Settings, tmp_path: Path, script: str = "exit 0", name: str = "10-cmdb") -> Settings:
    directory = tmp_path / "hooks.d/post-job"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)
    return scratch.model_copy(
        update={
            "hooks": Hooks(directory=tmp_path / "hooks.d", timeout_seconds=5),
            "retry": scratch.retry.model_copy(update={"delay_seconds": 0.0}),
        }
    )


def long_ago(config: Settings) -> None:
    """Have everything count that has ended since 1970."""
    outbox.begin(config)
    with database(config) as db:
        db.execute("UPDATE history SET since = 0")


@contextlib.contextmanager
def database(config: Settings) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(config.work_dir / outbox.STATE)) as db, db:
        yield db


def sent(config: Settings) -> tuple[int, int]:
    result = outbox.send(config, Tools())
    return result.delivered, result.failed


def test_what_ended_before_the_first_run_counts_as_told(scratch: Settings, tmp_path: Path) -> None:
    config = with_hook(scratch, tmp_path)
    put(config, "old")
    assert (0, 0) == sent(config)
    put(config, "new", finished_at=timestamp(time.time()))
    assert (1, 0) == sent(config)
    assert (0, 0) == sent(config)


def test_what_ends_after_the_beginning_is_told_by_the_first_run(scratch: Settings, tmp_path: Path) -> None:
    config = with_hook(scratch, tmp_path)
    outbox.begin(config)
    put(config, "web01", finished_at=timestamp(time.time() + 1))
    outbox.begin(config)
    assert (1, 0) == sent(config)


def test_a_job_of_another_host_is_told_there(scratch: Settings, tmp_path: Path) -> None:
    config = with_hook(scratch, tmp_path)
    long_ago(config)
    put(config, "web01", host={"name": "elsewhere"})
    assert (0, 0) == sent(config)


def test_a_receiver_that_is_added_later_is_not_told_what_was(scratch: Settings, tmp_path: Path) -> None:
    config = with_hook(scratch, tmp_path)
    long_ago(config)
    put(config, "web01")
    assert (1, 0) == sent(config)
    config = with_hook(scratch, tmp_path, name="20-tickets")
    assert (0, 0) == sent(config)


def test_a_report_under_another_name_and_a_copy_of_it_are_the_same_message(scratch: Settings, tmp_path: Path) -> None:
    config = with_hook(scratch, tmp_path)
    long_ago(config)
    path = put(config, "web01")
    assert (1, 0) == sent(config)
    path.rename(path.with_name("migration-report.1.json"))
    path.with_name("migration-report.2.json").write_bytes(path.with_name("migration-report.1.json").read_bytes())
    assert (0, 0) == sent(config)


def test_a_report_that_retry_moved_away_before_it_was_told_is_told(scratch: Settings, tmp_path: Path) -> None:
    config = with_hook(scratch, tmp_path)
    long_ago(config)
    path = put(config, "web01")
    path.rename(path.with_name("migration-report.1.json"))
    put(config, "web01", status="succeeded", error=None, finished_at="2026-11-24T11:00:00.000Z")
    assert (2, 0) == sent(config)


def test_an_exports_directory_that_is_not_mounted_for_a_while_makes_nothing_new(
    scratch: Settings, tmp_path: Path
) -> None:
    config = with_hook(scratch, tmp_path)
    long_ago(config)
    put(config, "web01")
    assert (1, 0) == sent(config)
    config.exports_dir.rename(tmp_path / "away")
    config.exports_dir.mkdir()
    assert (0, 0) == sent(config)
    config.exports_dir.rmdir()
    (tmp_path / "away").rename(config.exports_dir)
    assert (0, 0) == sent(config)


def test_what_is_gone_for_longer_than_work_is_kept_is_forgotten(scratch: Settings, tmp_path: Path) -> None:
    keep_nothing = scratch.retention.model_copy(update={"work_days": 0})
    config = with_hook(scratch, tmp_path).model_copy(update={"retention": keep_nothing})
    long_ago(config)
    path = put(config, "web01")
    assert (1, 0) == sent(config)
    path.unlink()
    assert (0, 0) == sent(config)
    with database(config) as db:
        assert [] == db.execute("SELECT * FROM reports").fetchall()


def test_a_hook_that_fails_is_run_once_more_and_then_given_up(
    scratch: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = with_hook(scratch, tmp_path, f"echo . >> {tmp_path}/runs; exit 3")
    long_ago(config)
    put(config, "web01")
    assert (0, 1) == sent(config)
    standing = outbox.standing(config)
    assert (1, 0) == (standing.pending, standing.given_up)
    assert standing.due is not None
    assert (0, 0) == sent(config), "before it is due"
    time.sleep(max(standing.due - time.time(), 0) + 0.01)
    assert (0, 1) == sent(config)
    assert outbox.Standing(None, 0, 1) == outbox.standing(config)
    assert (0, 0) == sent(config)
    assert ".\n.\n" == (tmp_path / "runs").read_text()
    assert "given up" in "".join(capfd.readouterr())


@pytest.mark.parametrize("damage", ["rubbish", "rubbish within", "another's", "cut off"])
def test_a_damaged_state_is_not_begun_anew_in_silence(scratch: Settings, damage: str) -> None:
    path = scratch.work_dir / outbox.STATE
    if damage == "another's":
        with database(scratch) as db:
            db.execute("CREATE TABLE reports (name)")
    else:
        outbox.begin(scratch)
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if damage == "cut off":
                file.truncate(size // 2)
            else:
                file.seek(size // 2 if damage == "rubbish within" else 0)
                file.write(b"rubbish " * 512)
    outbox.begin(scratch)
    before = path.read_bytes()
    for look in (lambda: outbox.send(scratch, Tools()), lambda: outbox.pending(scratch)):
        with pytest.raises(MigrationError, match=r"notified\.sqlite is damaged") as caught:
            look()
        assert (Code.IO_ERROR, True) == (caught.value.code, "remove it" in caught.value.hint)
    assert before == path.read_bytes()
    if damage != "rubbish within":  # what it reads of it is whole
        assert outbox.Standing() == outbox.standing(scratch)


def kill_while_it_writes(config: Settings) -> None:
    """Have a process end between what SQLite writes into the file and the end of the transaction."""
    outbox.begin(config)
    script = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA cache_size = 1")
db.execute("UPDATE history SET given_up = 7")
db.executemany("INSERT INTO reports (export, file) VALUES (?, 0)", [("x" * 1000 + str(n),) for n in range(100)])
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script, config.work_dir / outbox.STATE], check=True)
    assert {outbox.STATE, JOURNAL, outbox.LOCK} == set(os.listdir(config.work_dir))


def test_a_file_that_a_crash_left_half_written_is_in_nobodys_way(scratch: Settings) -> None:
    kill_while_it_writes(scratch)
    due = outbox.standing(scratch).due
    assert due is not None, "a run is due, to put it right"
    assert due <= time.time()
    assert (0, 0) == sent(scratch)
    assert {outbox.STATE, outbox.LOCK} == set(os.listdir(scratch.work_dir))
    assert outbox.Standing() == outbox.standing(scratch)


def test_a_file_that_was_made_by_a_run_that_was_killed_at_once_is_no_damage(scratch: Settings) -> None:
    (scratch.work_dir / outbox.STATE).touch()
    assert outbox.Standing() == outbox.standing(scratch)
    assert [] == outbox.pending(scratch)
    assert (0, 0) == sent(scratch)


def test_looking_how_it_stands_makes_no_file(scratch: Settings) -> None:
    assert (outbox.Standing(), []) == (outbox.standing(scratch), outbox.pending(scratch))
    assert [] == os.listdir(scratch.work_dir)


def test_two_do_not_tell_at_the_same_time(scratch: Settings) -> None:
    with outbox._locked(scratch):
        with pytest.raises(BlockingIOError):
            outbox.send(scratch, Tools())
        assert [] == outbox.pending(scratch)


def give_away(config: Settings) -> None:
    """Have work_dir belong to a user, as it does to the service's."""
    for path in (config.work_dir, *config.work_dir.iterdir()):
        os.chown(path, 12345, 12345)
    for parent in config.work_dir.parents:
        parent.chmod(parent.stat().st_mode | 0o011)


def test_whatever_the_umask_root_and_the_service_take_turns(scratch: Settings, tmp_path: Path) -> None:
    config = with_hook(scratch, tmp_path, f"id -u >> {tmp_path}/users")
    give_away(config)
    before = os.umask(0o077)
    try:
        long_ago(config)
        put(config, "web01")
        assert (1, 0) == sent(config)
    finally:
        os.umask(before)
    for name in (outbox.STATE, outbox.LOCK):
        status = (config.work_dir / name).stat()
        assert (12345, 0o100644) == (status.st_uid, status.st_mode)
    assert ("0\n", 0) == ((tmp_path / "users").read_text(), os.geteuid())


@pytest.mark.parametrize("name", [outbox.STATE, outbox.LOCK])
def test_root_follows_no_link_that_the_service_could_have_made(scratch: Settings, tmp_path: Path, name: str) -> None:
    give_away(scratch)
    (tmp_path / "victim").touch()
    (scratch.work_dir / name).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        outbox.send(scratch, Tools())
    assert (b"", 0) == ((tmp_path / "victim").read_bytes(), os.geteuid())


def test_root_removes_nothing_for_a_journal_that_the_service_could_have_made(scratch: Settings, tmp_path: Path) -> None:
    """SQLite removes the file that a journal names as that of a transaction in several databases."""
    kill_while_it_writes(scratch)
    (tmp_path / "victim").write_text("precious")
    give_away(scratch)
    named = os.fsencode(tmp_path / "victim")
    with (scratch.work_dir / JOURNAL).open("ab") as file:  # as https://sqlite.org/fileformat2.html has it
        page = struct.pack(">I", (1 << 30) // 4096 + 1)
        file.write(page + named + struct.pack(">II", len(named), sum(named)) + bytes.fromhex("d9d505f920a163d7"))
    outbox.standing(scratch)
    with contextlib.suppress(OSError):
        outbox.pending(scratch)
    with contextlib.suppress(OSError):
        outbox.send(scratch, Tools())
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize("junk", [b"", b"[]", b"{", b"null", b"[" * 100_000, b'{"status": "failed"}', b"\xff\xfe"])
def test_a_report_that_is_none_is_left_alone(scratch: Settings, tmp_path: Path, junk: bytes) -> None:
    config = with_hook(scratch, tmp_path)
    long_ago(config)
    put(config, "web01").write_bytes(junk)
    assert (0, 0) == sent(config)


def test_a_report_that_is_a_link_to_elsewhere_is_not_read(scratch: Settings, tmp_path: Path) -> None:
    config = with_hook(scratch, tmp_path)
    long_ago(config)
    path = put(config, "web01")
    path.rename(tmp_path / "secret.json")
    path.symlink_to(tmp_path / "secret.json")
    assert (0, 0) == sent(config)


# The hooks ------------------------------------------------------------------------------------------------------


def test_hooks_are_found_by_the_names_that_run_parts_takes_and_in_their_order(tmp_path: Path) -> None:
    directory = tmp_path / "pre-import"
    directory.mkdir()
    for name in ("20-b", "10_a", "Z9", "30-c.dpkg-old", "10_a~", ".hidden", "README.txt", "é"):
        (directory / name).touch()
    found = hooks.found(Hooks(directory=tmp_path), "pre-import")
    assert ["10_a", "20-b", "Z9"] == [hook.name for hook in found]
    assert [] == hooks.found(Hooks(directory=tmp_path), "post-job")
    assert [] == hooks.found(Hooks(directory=tmp_path / "none"), "post-job")


def a_hook(tmp_path: Path, script: str = "exit 0") -> Path:
    hook = tmp_path / "hooks.d/pre-import/10-check"
    hook.parent.mkdir(parents=True)
    hook.write_text(f"#!/bin/sh\n{script}\n")
    hook.chmod(0o755)
    return hook


@pytest.mark.parametrize("which", [".", "..", "../.."])
def test_a_hook_that_others_could_have_written_is_refused(tmp_path: Path, which: str) -> None:
    hook = a_hook(tmp_path)
    hooks.check(hook)
    path = hook if which == "." else hook.parent if which == ".." else hook.parent.parent
    for mode in (0o775, 0o757):
        path.chmod(mode)
        with pytest.raises(MigrationError, match=f"{path} has mode {mode:04o}") as caught:
            hooks.check(hook)
        assert (Code.HOOK_FAILED, "hooks.directory") == (caught.value.code, caught.value.field)
        assert f"chmod go-w {path}" in caught.value.hint
    path.chmod(0o755)
    os.chown(path, 12345, -1)
    with pytest.raises(MigrationError, match="belongs to user 12345"):
        hooks.check(hook)


def test_what_cannot_be_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    hook = a_hook(tmp_path)
    hook.chmod(0o644)
    with pytest.raises(MigrationError, match="is not executable") as caught:
        hooks.check(hook)
    assert "chmod +x" in caught.value.hint
    hook.unlink()
    hook.symlink_to("/bin/true")
    with pytest.raises(MigrationError, match="is not a plain file"):
        hooks.check(hook)
    hook.unlink()
    with pytest.raises(MigrationError, match="cannot be looked at: No such file"):
        hooks.check(hook)


def test_a_hook_gets_the_report_a_clean_environment_and_the_root_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SERVICE", "x")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    hook = a_hook(tmp_path, f"cat > {tmp_path}/stdin; env > {tmp_path}/env; pwd > {tmp_path}/pwd")
    document = json.dumps({"text": "x" * (1 << 20)}).encode()
    environment = hooks.variables(Path("/exports/web01"), "web01", "importing", "web01-0a1b2c3d")
    hooks.run(Tools(), hook, document, environment, 10)
    assert document == (tmp_path / "stdin").read_bytes()
    assert "/\n" == (tmp_path / "pwd").read_text()
    found = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert {
        "H2K_EXPORT": "/exports/web01",
        "H2K_VM": "web01",
        "H2K_STATUS": "importing",
        "H2K_JOB": "web01-0a1b2c3d",
        "H2K_REPORT": "/exports/web01/migration-report.json",
    } == {name: value for name, value in found.items() if name.startswith("H2K_")}
    assert "/run/credentials/x" == found["CREDENTIALS_DIRECTORY"]
    assert "SECRET_OF_THE_SERVICE" not in found


def test_a_hook_that_does_not_read_is_not_waited_for(tmp_path: Path) -> None:
    hooks.run(Tools(), a_hook(tmp_path), b"x" * (1 << 22), {}, 10)


def test_a_failing_hook_is_named_with_its_status_and_the_end_of_what_it_said(tmp_path: Path) -> None:
    hook = a_hook(tmp_path, "seq 1 100; echo no change window now >&2; exit 3")
    with pytest.raises(MigrationError) as caught:
        hooks.run(Tools(), hook, b"{}", {}, 10)
    assert f"the hook {hook} exited 3: no change window now" == caught.value.message
    assert ["99", "100", "no change window now"] == caught.value.tail.splitlines()[-3:]
    assert (Code.HOOK_FAILED, 25) == (caught.value.code, len(caught.value.tail.splitlines()))


def test_a_hook_that_is_killed_says_so(tmp_path: Path) -> None:
    for number, name in ((9, "Killed"), (35, "Real-time signal 1")):
        with pytest.raises(MigrationError, match=rf"was killed by signal {number} \({name}\)"):
            hooks.run(Tools(), a_hook(tmp_path / str(number), f"kill -{number} $$"), b"{}", {}, 10)


def test_the_time_limit_kills_the_whole_group_stubborn_members_too(tmp_path: Path) -> None:
    script = f"""
    (trap '' TERM; sh -c 'echo $PPID' > {tmp_path}/stubborn; while :; do sleep 1; done) &
    echo before; exec sleep 600"""
    started = time.monotonic()
    with pytest.raises(MigrationError, match="did not end within 1 s: before"):
        hooks.run(Tools(), a_hook(tmp_path, script), b"{}", {}, 1)
    assert time.monotonic() - started < 600, "it was waited for"
    pid = int((tmp_path / "stubborn").read_text())
    time.sleep(0.2)
    state = (
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if Path(f"/proc/{pid}").exists() else "Z"
    )
    assert "Z" == state


def test_a_hook_that_writes_without_end_takes_no_memory(tmp_path: Path) -> None:
    with pytest.raises(MigrationError) as caught:
        hooks.run(Tools(), a_hook(tmp_path, "yes; "), b"{}", {}, 1)
    assert len(caught.value.tail) <= hooks.OUTPUT_LIMIT


def test_what_a_hook_leaves_running_does_not_hold_the_claim(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        hooks.run(Tools(claim_fd=lock.fileno()), a_hook(tmp_path, f"ls -l /proc/$$/fd > {tmp_path}/fds"), b"{}", {}, 10)
    assert "lock" not in (tmp_path / "fds").read_text()


# The webhook ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://user:sekrit@example.com/x", "a user or a password"),
        ("https://user@example.com/x", "a user or a password"),
        ("ftp://example.com/", "not one of https"),
        ("example.com/x", "not one of https"),
        ("https:///x", "not one of https"),
        ("https://example.com:99999/", "a port that is none"),
        ("https://exa mple.com/", "a space"),
        ("https://example.com/\r\nX: y", "a space"),
        ("https://bücher.example/", "not ASCII"),
        ("https://example.com/#x", "has a #"),
        (f"https://{'a' * 64}.example/", "a name of a host that cannot be one"),
        ("http://example.com/x", "unencrypted"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_the_remedy_and_not_shown(
    url: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "hyper2kvmd.yaml"
    path.write_text(json.dumps({"notify": {"webhook": {"url": url}}}))
    with pytest.raises(SettingsError, match=said) as caught:
        load_settings(path)
    assert "sekrit" not in str(caught.value)
    assert f"{path}:1: notify.webhook: url: " in str(caught.value)


@pytest.mark.parametrize("url", ["https://example.com", "http://127.0.0.1:80/x", "http://[::1]/x", "http://localhost/"])
def test_https_and_this_host_are_good(url: str) -> None:
    assert url_problem(url, allow_insecure=False) is None


def test_plain_http_to_another_host_must_be_asked_for() -> None:
    assert "http://a.example/" == Webhook(url="http://a.example/", allow_insecure=True).url


def test_a_url_twice_is_one_too_many(tmp_path: Path) -> None:
    path = tmp_path / "hyper2kvmd.yaml"
    path.write_text("notify: {webhook: {url: 'https://a.example/', url_credential: url}}")
    with pytest.raises(SettingsError, match="both set; delete one"):
        load_settings(path)


def credential(tmp_path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path = tmp_path / "credential"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


def test_headers_are_read_from_a_credential_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credential(tmp_path, "Authorization: Bearer sekrit\n\nX-Team:ops  \n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    found = request._headers(Webhook(headers_credential="credential"), "notify.webhook")
    assert {"Authorization": "Bearer sekrit", "X-Team": "ops"} == found


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("Authorization Bearer sekrit", 0o600, "line 1 of .* is not of the form"),
        ("A: b\n sekrit: x", 0o600, "line 2 of .* is not of the form"),
        ("A: sekrit\x00", 0o600, "line 1 of .* is not of the form"),
        ("Host: sekrit", 0o600, "line 1 of .* is Host, which is not to be set"),
        ("content-length: 3", 0o600, "which is not to be set"),
        ("A: sekrit", 0o644, "can be used by everybody"),
        ("A: é", 0o600, "not ASCII"),
        ("", 0o600, "is empty"),
        ("A: " + "x" * 9000, 0o600, "longer than 8192 bytes"),
    ],
)
def test_a_credential_that_cannot_be_used_is_refused_without_its_content(
    tmp_path: Path, text: str, mode: int, said: str
) -> None:
    with pytest.raises(Undelivered, match=said) as caught:
        request._headers(Webhook(headers_credential=credential(tmp_path, text, mode)), "notify.webhook")
    assert "sekrit" not in str(caught.value) + caught.value.hint
    assert caught.value.hint


@pytest.mark.parametrize("separator", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_no_line_end_of_any_kind_gets_into_a_header(tmp_path: Path, separator: str) -> None:
    """What splits a line makes two headers of it, or none; never one with a line end in it."""
    name = credential(tmp_path, f"A: b{separator}C: d".encode())
    try:
        found = request._headers(Webhook(headers_credential=name), "notify.webhook")
    except Undelivered:
        return
    assert {"A": "b", "C": "d"} == found


def test_a_credential_without_systemd_says_how_to_hand_it_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(Undelivered, match="systemd has handed over none") as caught:
        request._headers(Webhook(headers_credential="webhook-headers"), "notify.webhook")
    assert "LoadCredential=webhook-headers:FILE" in caught.value.hint


def test_a_pipe_in_place_of_a_credential_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(Undelivered, match="not a plain file"):
        request._headers(Webhook(headers_credential=str(tmp_path / "pipe")), "notify.webhook")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\nb"])
def test_a_credential_has_a_plain_name_or_an_absolute_path(name: str) -> None:
    with pytest.raises(ValueError, match="headers_credential"):
        Webhook(headers_credential=name)


def test_a_url_from_a_credential_is_checked_as_one_of_the_settings_is(tmp_path: Path) -> None:
    name = credential(tmp_path, "https://chat.example.com/hooks/sekrit\n")
    assert "https://chat.example.com/hooks/sekrit" == request._url(Webhook(url_credential=name), "notify.webhook")
    credential(tmp_path, "http://chat.example.com/hooks/sekrit\n")
    with pytest.raises(Undelivered, match="unencrypted") as caught:
        request._url(Webhook(url_credential=name), "notify.webhook")
    assert "sekrit" not in str(caught.value)
