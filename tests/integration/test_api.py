"""The library call, as a Python program uses it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.api import MigrationFailed, MigrationPipeline
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.job.events import Event
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.settings.load import overridden
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, disk_entry, report_of, write_manifest


def test_run_migrates_and_returns_the_report(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    report = MigrationPipeline(export / "manifest.json", scratch).run()
    assert report_of(export) == report.model_dump(mode="json")
    assert ("succeeded", {"disk-0": str(scratch.output_dir / "web01-disk-0.qcow2")}) == (
        report.status,
        report.results["convert"]["disks"],
    )


def test_a_second_run_returns_the_same_report_and_writes_nothing(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    first = MigrationPipeline(export, scratch).run()
    target = scratch.output_dir / "web01-disk-0.qcow2"
    before = target.stat()
    assert first == MigrationPipeline(export, scratch).run()
    assert (before.st_ino, before.st_mtime_ns) == (target.stat().st_ino, target.stat().st_mtime_ns)


def test_the_callback_sees_every_stage_and_the_progress(scratch: Settings, make_export: MakeExport) -> None:
    seen: list[tuple[str, str]] = []
    ratios: list[float | None] = []
    thread = threading.current_thread()

    def on_event(event: Event, progress: Progress) -> None:
        assert thread is threading.current_thread()
        if event.kind == "stage":
            seen.append((event.data["stage"], event.data["status"]))
        if event.kind == "progress":
            ratios.append(progress.stages[event.data["stage"]].ratio)

    MigrationPipeline(make_export(), scratch, on_event=on_event).run()
    for stage in ("plan", "verify", "convert", "validate", "publish"):
        assert seen.index((stage, "started")) < seen.index((stage, "done"))
    assert {("inspect", "skipped"), ("fix", "skipped"), ("import", "skipped")} <= {*seen}
    assert 1.0 in ratios


@pytest.mark.parametrize("stage", ["inspect", "fix", "convert", "import"])
def test_every_stage_can_be_left_out(scratch: Settings, make_export: MakeExport, stage: str) -> None:
    """Although the manifest enables it, and the settings do."""
    settings = scratch.model_copy(update={"libvirt": scratch.libvirt.model_copy(update={"import_": True})})
    export = make_export(pipeline={name: {"enabled": True} for name in ("inspect", "fix", "convert", "validate")})
    report = MigrationPipeline(export, settings, stages={"convert", "validate"} - {stage}).run()
    assert "skipped" == next(record.status for record in report.stages if record.name == stage)


def test_validation_can_be_left_out(scratch: Settings, make_export: MakeExport) -> None:
    report = MigrationPipeline(make_export(), scratch, stages={"convert"}).run()
    assert report.results["validate"]["all_valid"] is None


# What no manifest and no setting says, or what they forbid; the last names what to do, as far as that is cheap.
SILENT: dict[str, dict[str, Any]] = {
    "an empty pipeline": {},
    "stages without a word": {"convert": {}, "validate": {"verify_checksum": True}},
    "stages that are off": {"convert": {"enabled": False}, "validate": {"enabled": False}},
    "other stages": {"inspect": {"enabled": True}, "fix": {"enabled": True}},
}


@pytest.mark.parametrize("case", SILENT)
def test_a_stage_that_is_asked_for_by_name_is_done_and_no_other(
    scratch: Settings, make_export: MakeExport, case: str
) -> None:
    export = make_export(pipeline=SILENT[case])
    report = MigrationPipeline(export, scratch, stages=("convert", "validate")).run()
    assert report.disks[0].target is not None
    assert Path(report.disks[0].target).stat().st_size > 1 << 20
    assert report.results["validate"]["all_valid"] is True
    done = {record.name for record in report.stages if record.status == "done"}
    assert {"plan", "verify", "convert", "validate", "publish"} == done
    assert [] == [warning.code for warning in report.warnings if warning.code in ("stage_off", "not_converted")]


def test_a_stage_that_is_asked_for_by_name_is_done_whatever_the_settings_say(
    scratch: Settings, make_export: MakeExport
) -> None:
    settings = overridden(scratch, ("pipeline.convert.enabled=false", "libvirt.uri=test:///default"))
    assert not settings.libvirt.import_
    report = MigrationPipeline(make_export(), settings, stages=("convert", "import")).run()
    assert report.domain is not None
    assert ("web01", "done") == (report.domain.name, report.stages[-1].status)


def test_stages_that_have_nothing_to_work_on_are_named(scratch: Settings, make_export: MakeExport) -> None:
    report = MigrationPipeline(make_export(), scratch, stages=("validate",)).run()
    (warning,) = [warning for warning in report.warnings if warning.code == "not_converted"]
    assert warning.message.endswith("no disk is written, so that VALIDATE has nothing to work on")


def test_leaving_fix_out_enables_no_other_stage(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export(pipeline={"fix": {"enabled": True}, "convert": {"enabled": True}})
    assert 0 == ctl("migrate", export, "--skip-fix").returncode
    stages = {stage["name"]: stage["status"] for stage in report_of(export)["stages"]}
    assert ("skipped", "skipped", "done") == (stages["inspect"], stages["fix"], stages["convert"])
    assert report_of(export)["results"]["validate"]["all_valid"] is None


def test_what_is_left_out_by_an_option_is_not_done_though_it_is_named(ctl: Ctl, make_export: MakeExport) -> None:
    export = make_export()
    assert 0 == ctl("migrate", export, "--stages", "fix,convert,import", "--skip-fix", "--no-import").returncode
    stages = {stage["name"]: stage["status"] for stage in report_of(export)["stages"]}
    assert ("skipped", "done", "skipped") == (stages["fix"], stages["convert"], stages["import"])


def test_a_dry_run_leaves_everything_as_it_was(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    report = MigrationPipeline(export, scratch, dry_run=True).run()
    assert (True, "succeeded") == (report.dry_run, report.status)
    assert ([], False) == (os.listdir(scratch.output_dir), (export / "migration-report.json").exists())


def test_a_failure_is_raised_with_its_report_and_remedy(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    (export / "web01-disk-0.raw").write_bytes(bytes(1 << 20))
    with pytest.raises(MigrationFailed) as caught:
        MigrationPipeline(export, scratch).run()
    assert (Code.CHECKSUM_MISMATCH, 1) == (caught.value.code, caught.value.exit_status)
    assert caught.value.hint
    assert caught.value.report is not None
    assert report_of(export) == caught.value.report.model_dump(mode="json")
    with pytest.raises(MigrationFailed) as again:
        MigrationPipeline(export, scratch).run()
    assert (Code.CHECKSUM_MISMATCH, 5) == (again.value.code, again.value.exit_status)


def test_what_somebody_else_migrates_is_left_to_them(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    fake(
        "qemu-img", f'[ "$1" = convert ] && until [ -e {tmp_path}/go ]; do sleep 0.1; done\nexec /usr/bin/qemu-img "$@"'
    )
    export = make_export()
    reports = []
    converting = threading.Event()

    def on_event(event: Event, progress: Progress) -> None:
        if "convert" in progress.stages:
            converting.set()

    first = threading.Thread(target=lambda: reports.append(MigrationPipeline(export, scratch, on_event=on_event).run()))
    first.start()
    assert converting.wait(30)
    with pytest.raises(MigrationFailed) as caught:
        MigrationPipeline(export, scratch).run()
    (tmp_path / "go").touch()
    first.join(60)
    assert (Code.BUSY, None) == (caught.value.code, caught.value.report)
    assert ["succeeded"] == [report.status for report in reports]


def test_nothing_in_the_directory_where_somebody_is_is_taken_for_the_program(
    scratch: Settings, make_export: MakeExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make_export()
    (export / "hyper2kvmd").mkdir()
    (export / "hyper2kvmd/__init__.py").write_text(f"open({str(scratch.work_dir / 'planted')!r}, 'w')\n")
    (export / "hyper2kvmd/__main__.py").write_text("")
    monkeypatch.chdir(export)
    assert "succeeded" == MigrationPipeline(export, scratch).run().status
    assert not (scratch.work_dir / "planted").exists()


def test_bad_arguments_are_refused_at_once(scratch: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bake: no such stage; choose from inspect, fix"):
        MigrationPipeline(tmp_path, scratch, stages=["bake"])
    with pytest.raises(MigrationError, match="nowhere: no such directory"):
        MigrationPipeline(tmp_path / "nowhere" / "manifest.json", scratch).run()


def test_a_manifest_under_any_name_is_taken_if_it_is_named(scratch: Settings) -> None:
    directory = scratch.exports_dir / "web01"
    directory.mkdir()
    (directory / "disk.raw").write_bytes(bytes(1 << 20))
    manifest = write_manifest(directory, [disk_entry(directory / "disk.raw")])
    named = manifest.rename(directory / "mine.json")
    assert "mine.json" == MigrationPipeline(named, scratch).run().manifest.name
    assert "succeeded" == json.loads((directory / "migration-report.json").read_text())["status"]
