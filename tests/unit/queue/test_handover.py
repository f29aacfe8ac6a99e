"""What exporters hand over: which export a manifest means, what the answer is called, and when it may be given."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hyper2kvmd.daemon.handover import Handover
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.queue import answer, facts
from hyper2kvmd.queue.answer import Verdict, due, verdict
from hyper2kvmd.queue.handover import Ticket, export_of, take, tickets
from hyper2kvmd.queue.state import Facts, State
from hyper2kvmd.settings.model import Settings
from tests.conftest import disk_entry, write_manifest

NOW = 1_000_000.0
SETTINGS = Settings(settle_seconds=5, incomplete_grace_seconds=600)
ROOTS = (Path("/srv/exports"), Path("/data/more"))
WRONG = Finding(Code.DISK_MISSING, "it is gone", "Look for it.")


@pytest.mark.parametrize(
    ("disks", "expected"),
    [
        (["/srv/exports/vm/a.vmdk"], "/srv/exports/vm"),
        (["/data/more/vm/a.vmdk", "/data/more/vm/b.vmdk"], "/data/more/vm"),
        (["/data/more//vm/./a.vmdk"], "/data/more/vm"),
        (["/data/more/vm/sub/a.vmdk"], "no directory of"),
        (["/data/more/a.vmdk"], "no directory of"),
        (["/etc/a.vmdk"], "no directory of"),
        (["/data/more/../more/vm/a.vmdk"], "no directory of"),
        (["/data/more/../../etc/a.vmdk"], "no directory of"),
        (["/data/more/.hidden/a.vmdk"], "no directory of"),
        (["/data/more/../a.vmdk"], "no directory of"),
        (["/data/more/new\nline/a.vmdk"], "no directory of"),
        (["/data/more/vm/a.vmdk", "/data/more/other/b.vmdk"], "different directories"),
        (["a.vmdk"], "has no directory"),
        (["/data/more/vm/a.vmdk", "b.vmdk"], "has no directory"),
    ],
)
def test_an_export_is_a_directory_in_one_that_is_allowed_and_is_found_without_looking(
    disks: list[str], expected: str
) -> None:
    try:
        assert Path(expected) == export_of(disks, ROOTS)
    except MigrationError as error:
        assert expected in error.message
        assert Code.EXPORT_UNSAFE == error.code
        assert "\n" not in error.message
        assert error.hint


def test_the_remedy_for_a_directory_that_is_not_allowed_names_the_setting_and_its_value() -> None:
    with pytest.raises(MigrationError) as caught:
        export_of(["/mnt/dc1/vm/a.vmdk"], ROOTS)
    assert "add '/mnt/dc1' to hypersdk.allowed_dirs" in caught.value.hint
    assert Path("/mnt/dc1/vm") == export_of(["/mnt/dc1/vm/a.vmdk"], (*ROOTS, Path("/mnt/dc1")))


def ticket(path: str = "q/1", **changes: Any) -> Ticket:
    number = int(path.rpartition("/")[2])
    shape: dict[str, Any] = {
        "path": Path(f"/q/.hyper2kvmd.taken.{number:020}-00000000.m.json"),
        "answered": False,
        "since": NOW - 60,
        "name": "web01",
        "sha256": "a",
        "directory": Path("/data/more/vm"),
        "problem": None,
        **changes,
    }
    return Ticket(**shape)


def look(**changes: Any) -> Facts:
    return Facts(**{"manifest": "manifest.json", "manifest_sha256": "a", "settled_since": NOW - 60, **changes})


UNREADABLE = Finding(Code.MANIFEST_UNREADABLE, "half", "Wait.")
UNSAFE = Finding(Code.EXPORT_UNSAFE, "elsewhere", "Move it.")
DENIED = Finding(Code.IO_ERROR, "denied", "Allow it.")


@pytest.mark.parametrize(
    ("ticket", "look", "expected"),
    [
        (ticket(), look(), None),
        (ticket(), look(held=True), None),
        (ticket(), look(report_status="succeeded", report_sha256="a"), State.SUCCEEDED),
        (ticket(), look(report_status="failed", report_sha256="a", report_finding=WRONG), WRONG.code),
        (ticket(), look(report_status="blocked", report_sha256="a", report_finding=WRONG), WRONG.code),
        (ticket(), look(report_status="cancelled", report_sha256="a", report_finding=WRONG), WRONG.code),
        (ticket(), look(report_status="failed", report_sha256="a"), Code.MANIFEST_CHANGED),
        (ticket(), look(report_status="retrying", report_sha256="a", next_attempt_at=NOW + 9), None),
        (ticket(), look(request="hold"), None),
        (ticket(), look(report_status="succeeded", report_sha256="old"), Code.MANIFEST_CHANGED),
        # The export's manifest is another one: what came of that is no answer for this one.
        (ticket(sha256="b"), look(report_status="succeeded", report_sha256="a"), Code.MANIFEST_CHANGED),
        (ticket(sha256="b", since=NOW - 4), look(report_status="succeeded", report_sha256="a"), None),
        (ticket(sha256="b"), look(held=True), None),
        (ticket(), look(manifest=None, manifest_sha256=None), Code.MANIFEST_CHANGED),
        (ticket(), look(manifest_sha256=None, problem=UNSAFE), UNSAFE.code),
        (ticket(), None, Code.MANIFEST_CHANGED),
        (ticket(since=NOW - 4), None, None),
        (ticket(), DENIED, None),
        (ticket(since=NOW - 601), DENIED, DENIED.code),
        (ticket(problem=UNREADABLE, directory=None), None, None),
        (ticket(problem=UNREADABLE, directory=None, since=NOW - 601), None, UNREADABLE.code),
        (ticket(problem=UNREADABLE, directory=None, since=NOW + 9999), None, UNREADABLE.code),
        (ticket(problem=UNSAFE, directory=None, since=NOW), None, UNSAFE.code),
        (ticket(problem=DENIED, directory=None, since=0), None, None),
    ],
)
def test_the_verdict_on_a_ticket(ticket: Ticket, look: Facts | Finding | None, expected: str | None) -> None:
    found = verdict(ticket, look, SETTINGS, NOW)
    assert expected == (found.code if isinstance(found, Finding) else found)


def said(verdicts: Mapping[str, Verdict], *there: Ticket) -> tuple[dict[str, object], set[int]]:
    """What is to be said under each name, and which tickets nobody needs, by the names of their directories."""
    found, obsolete = due(there, lambda one: verdicts[one.directory.name if one.directory else ""])
    return {one.name: one.verdict and one.verdict[1] for one in found}, {one.number for one in obsolete}


def at(number: int, directory: str, **changes: Any) -> Ticket:
    return ticket(f"q/{number}", directory=Path("/data/more") / directory, **changes)


def test_all_who_wait_for_one_name_are_told_together_and_never_of_a_success_that_one_did_not_have() -> None:
    one, two = at(1, "one"), at(2, "two")
    good = State.SUCCEEDED
    assert ({"web01": None}, set()) == said({"one": good, "two": None}, one, two)
    assert ({"web01": WRONG}, set()) == said({"one": WRONG, "two": good}, one, two)
    assert ({"web01": WRONG}, set()) == said({"one": good, "two": WRONG}, one, two)
    assert ({"web01": good}, set()) == said({"one": good, "two": good}, one, two)
    apart = at(2, "two", name="web02")
    assert ({"web01": good, "web02": WRONG}, set()) == said({"one": good, "two": WRONG}, one, apart)


def test_one_that_is_handed_over_again_stands_for_what_it_was_before() -> None:
    good = State.SUCCEEDED
    assert ({"web01": None}, {1}) == said({"one": None}, at(1, "one", sha256="old"), at(2, "one"))
    assert ({"web01": None}, {1}) == said({"one": None, "two": good}, at(1, "two", answered=True), at(2, "one"))


def test_half_written_manifests_do_not_stand_for_each_other() -> None:
    half = {"directory": None, "problem": UNREADABLE, "name": "artifact-manifest"}
    assert ({"artifact-manifest": None}, set()) == said({"": None}, ticket("q/1", **half), ticket("q/2", **half))


def test_who_was_told_is_told_again_of_a_success_only() -> None:
    answered = at(1, "one", answered=True)
    assert ({"web01": State.SUCCEEDED}, set()) == said({"one": State.SUCCEEDED}, answered)
    assert ({}, set()) == said({"one": WRONG}, answered)
    assert ({}, set()) == said({"one": None}, answered)


@pytest.fixture
def settings(scratch: Settings, tmp_path: Path) -> Settings:
    for name in ("queue", "answers", "elsewhere"):
        (tmp_path / name).mkdir()
    dirs = {"queue_dir": tmp_path / "queue", "output_dir": tmp_path / "answers"}
    return Settings.model_validate(
        {**scratch.model_dump(by_alias=True), "hypersdk": {**dirs, "allowed_dirs": [tmp_path / "elsewhere"]}}
    )


def queue_of(settings: Settings) -> Path:
    assert settings.hypersdk.queue_dir is not None
    return settings.hypersdk.queue_dir


def exported(settings: Settings, name: str, **changes: Any) -> Path:
    """An export that was handed over."""
    directory = settings.hypersdk.allowed_dirs[0] / name
    directory.mkdir(exist_ok=True)
    disk = directory / "disk.raw"
    disk.write_bytes(b"x" * 512)
    manifest = write_manifest(directory, [disk_entry(disk)], **changes)
    (queue_of(settings) / "artifact-manifest.json").write_bytes(manifest.read_bytes())
    return directory


def migrated(settings: Settings, export: Path, format: str = "qcow2", **changes: Any) -> Path:
    """As if it had been migrated; the disk that it became."""
    disk = settings.output_dir / f"{export.name}-disk-0.qcow2"
    disk.write_bytes(b"a disk")
    report = {
        "status": "succeeded",
        "manifest": {"sha256": facts.look(export, settings).manifest_sha256},
        "disks": [{"target": str(disk), "target_format": format, "boot": True}],
        **changes,
    }
    (export / "migration-report.json").write_text(json.dumps(report))
    return disk


def handed(settings: Settings, desk: Handover | None = None) -> dict[str, str]:
    """What exporters are told after a look."""
    desk = desk or Handover()
    desk.receive(settings)
    desk.answer(settings, {export: facts.look_or_reason(export, settings) for export in facts.exports(settings)[0]})
    answers = settings.hypersdk.output_dir
    assert answers is not None
    return {
        path.name: os.readlink(path) if path.is_symlink() else path.read_text() for path in sorted(answers.iterdir())
    }


def test_manifests_are_taken_in_order_whatever_the_clock_does_and_whatever_they_are_called(
    settings: Settings,
) -> None:
    queue = queue_of(settings)
    # Of a time that is to come: the clock was put back since.
    (queue / ".hyper2kvmd.answered.09999999999999999999-0123abcd.old.json").write_text("{}")
    for name in ("a.json", "b.yaml", "c" * 240 + ".yml", "d\nd.JSON"):
        (queue / name).write_text("{}")
        take(queue)
    for name in ("notes.txt", ".e.json", "f"):
        (queue / name).write_text("{}")
    (queue / "dir.json").mkdir()
    take(queue)
    assert {"notes.txt", ".e.json", "f", "dir.json"} <= {*os.listdir(queue)}
    found = tickets(settings)
    names = [one.path.name.partition("-")[2][len("01234567.") :] for one in found]
    assert ["old.json", "a.json", "b.yaml", "c" * 146 + ".yml", "d_d.JSON"] == names
    assert 5 == len({one.number for one in found})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"vm_name": "Web Server 01"}, "Web Server 01"),
        ({"vm_name": "..x"}, "..x"),
        ({"vm_name": ""}, "vm"),
        ({}, "vm"),
        (None, "vm"),
        ({"vm_name": "../../etc/cron.d/x"}, "artifact-manifest"),
        ({"vm_name": "x" * 300}, "artifact-manifest"),
        ({"vm_name": 7}, "artifact-manifest"),
    ],
)
def test_the_answer_is_called_as_the_exporter_expects_and_never_something_elsewhere(
    settings: Settings, source: object, expected: str
) -> None:
    exported(settings, "vm1", source=source, vm=None)
    take(queue_of(settings))
    assert [expected] == [one.name for one in tickets(settings)]


def test_a_file_that_others_may_not_read_or_that_is_no_file_hides_no_others(settings: Settings) -> None:
    queue = queue_of(settings)
    os.symlink("/etc/hostname", queue / "link.json")
    os.mkfifo(queue / "pipe.json")
    migrated(settings, exported(settings, "good"))
    told = handed(settings)
    assert {"link.error", "pipe.error", "good.qcow2"} == told.keys()
    assert "is a symbolic link" in told["link.error"]
    assert "is not a regular file" in told["pipe.error"]


def test_a_crash_between_the_answer_and_its_record_says_the_same_again(settings: Settings) -> None:
    disk = migrated(settings, exported(settings, "vm1"))
    first = handed(settings)
    assert {"vm1.qcow2": str(disk)} == first
    (record,) = (path for path in queue_of(settings).iterdir() if ".answered." in path.name)
    record.rename(record.with_name(record.name.replace(".answered.", ".taken.")))
    assert first == handed(settings)
    assert [".hyper2kvmd.answered."] == [name[:21] for name in os.listdir(queue_of(settings))]


def test_an_answer_that_somebody_removed_stays_removed(settings: Settings) -> None:
    migrated(settings, exported(settings, "vm1"))
    handed(settings)
    (settings.output_dir.parent / "answers" / "vm1.qcow2").unlink()
    assert {} == handed(settings)


def test_an_answer_is_withdrawn_as_soon_as_the_next_is_waited_for(settings: Settings) -> None:
    disk = migrated(settings, exported(settings, "vm1"))
    assert {"vm1.qcow2": str(disk)} == handed(settings)
    (settings.hypersdk.allowed_dirs[0] / "vm1" / "migration-report.json").unlink()
    exported(settings, "vm1", tags={"of": "another export"})
    assert {} == handed(settings)
    assert disk.exists()


def test_what_was_handed_over_is_an_export_as_long_as_it_is_there(settings: Settings) -> None:
    export = exported(settings, "vm1")
    assert [] == facts.exports(settings)[0]
    handed(settings)
    assert [export] == facts.exports(settings)[0]
    migrated(settings, export)
    handed(settings)
    assert [export] == facts.exports(settings)[0]
    export.rename(export.with_name("away"))
    handed(settings)
    assert [] == os.listdir(queue_of(settings))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "raw"}, "format_mismatch: the VM was migrated to"),
        ({"disks": []}, "output_denied: the VM was migrated without writing a disk"),
        ({"disks": [{"target": None}]}, "without writing a disk"),
        ({"disks": "planted"}, "without writing a disk"),
        ({"disks": [{"target": "/etc/shadow", "target_format": "qcow2"}]}, "/etc/shadow, which is in no directory"),
        ({"disks": [{"target": "IMAGES/gone.qcow2", "target_format": "qcow2"}]}, "which is gone since"),
    ],
)
def test_a_success_without_a_disk_for_the_exporter_is_no_success_for_it(
    settings: Settings, changes: dict[str, Any], said: str
) -> None:
    export = exported(settings, "vm1")
    text = json.dumps(changes).replace("IMAGES", str(settings.output_dir))
    migrated(settings, export, **json.loads(text))
    desk = Handover()
    told = handed(settings, desk)
    assert ["vm1.error"] == [*told]
    assert said in told["vm1.error"]
    assert told == handed(settings, desk)


def test_a_queue_that_is_gone_stops_nothing_else(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    queue_of(settings).rmdir()
    desk = Handover()
    for _ in range(3):
        handed(settings, desk)
    printed = capsys.readouterr()
    assert 1 == (printed.out + printed.err).count("cannot be worked off")


@pytest.mark.parametrize(
    ("hypersdk", "others", "problem"),
    [
        ({"queue_dir": "/q"}, {}, "set both, or neither"),
        ({"output_dir": "/o"}, {}, "set both, or neither"),
        ({"queue_dir": "/q", "output_dir": "/q"}, {}, "hypersdk.output_dir (/q) and hypersdk.queue_dir (/q)"),
        ({"queue_dir": "/q", "output_dir": "/o"}, {"output_dir": "/o"}, "hypersdk.output_dir (/o) and output_dir (/o)"),
        ({"queue_dir": "/q", "output_dir": "/o"}, {"exports_dir": "/q"}, "hypersdk.queue_dir (/q) and exports_dir"),
        (
            {"queue_dir": "/e/q", "output_dir": "/o"},
            {"exports_dir": "/e"},
            "hypersdk.queue_dir (/e/q) and exports_dir (/e)",
        ),
        ({"queue_dir": "/q", "output_dir": "/o"}, {"exports_dir": "/q/e"}, "hypersdk.queue_dir (/q) and exports_dir"),
        ({"queue_dir": "/q", "output_dir": "/q/o"}, {}, "output_dir (/q/o) and hypersdk.queue_dir (/q)"),
    ],
)
def test_directories_that_would_be_taken_for_each_other_are_refused(
    hypersdk: dict[str, str], others: dict[str, str], problem: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"hypersdk": hypersdk, **others})
    assert problem in str(caught.value)


def test_the_usual_directories_are_accepted() -> None:
    usual = {"queue_dir": "/var/lib/hyper2kvm/queue", "output_dir": "/var/lib/hyper2kvm/output"}
    assert Settings.model_validate({"hypersdk": usual}).hypersdk.queue_dir == Path("/var/lib/hyper2kvm/queue")
    assert answer.failed_before(Settings(), "vm") is False
