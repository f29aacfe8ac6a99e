"""The library call, as a Python program uses it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper2kvmd.api import MigrationFailed, MigrationPipeline
from hyper2kvmd.daemon.progress import Progress
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.job.events import Event
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport, disk_entry, report_of, write_manifest


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


@pytest.mark.parametrize("stage", ["inspect", "fix", "convert", "validate", "import"])
def test_every_stage_can_be_left_out(scratch: Settings, make_export: MakeExport, stage: str) -> None:
    others = {"inspect", "fix", "convert", "validate", "import"} - {stage}
    export = make_export(pipeline={name: {"enabled": name == stage} for name in ("convert", "validate")})
    report = MigrationPipeline(export, scratch, stages=others).run()
    assert "skipped" == next(record.status for record in report.stages if record.name == stage)


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
