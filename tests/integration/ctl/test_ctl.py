"""hyper2kvmctl, as people use it: real processes on real exports."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport, disk_entry, report_of, run_job, write_manifest


def test_migrate_works_without_the_daemon_and_prints_the_report(ctl: Any, make_export: MakeExport) -> None:
    export = make_export()
    done = ctl("migrate", export / "manifest.json")
    assert 0 == done.returncode, done.stderr
    assert "status     succeeded" in done.stdout
    assert "succeeded" == report_of(export)["status"]


def test_migrate_prints_json_and_nothing_else(ctl: Any, make_export: MakeExport) -> None:
    export = make_export()
    done = ctl("migrate", export, "--json")
    assert report_of(export) == json.loads(done.stdout)


def test_migrate_again_does_nothing_and_says_so(ctl: Any, make_export: MakeExport) -> None:
    export = make_export()
    first = ctl("migrate", export)
    before = (export / "migration-report.json").read_bytes()
    again = ctl("migrate", export)
    assert (0, 0) == (first.returncode, again.returncode)
    assert "succeeded already" in again.stderr
    assert before == (export / "migration-report.json").read_bytes()


def test_a_dry_run_writes_neither_disk_nor_report(ctl: Any, make_export: MakeExport, scratch: Settings) -> None:
    export = make_export()
    done = ctl("migrate", export, "--dry-run", "--json")
    assert 0 == done.returncode, done.stderr
    assert json.loads(done.stdout)["dry_run"]
    assert not (export / "migration-report.json").exists()
    assert [] == list(scratch.output_dir.iterdir())
    assert 0 == ctl("migrate", export).returncode


def test_the_output_directory_can_be_chosen(ctl: Any, make_export: MakeExport, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    done = ctl("migrate", make_export(), "--output-dir", tmp_path / "other")
    assert 0 == done.returncode, done.stderr
    assert (tmp_path / "other/web01-disk-0.qcow2").exists()


def test_strict_compares_every_byte_of_the_result(ctl: Any, make_export: MakeExport) -> None:
    document = json.loads(ctl("migrate", make_export(), "--strict", "--json").stdout)
    assert document["results"]["validate"]["disks"]["disk-0"]["compared"]


def test_an_unknown_stage_is_a_usage_error(ctl: Any, make_export: MakeExport) -> None:
    done = ctl("migrate", make_export(), "--stages", "inspect,bake")
    assert 2 == done.returncode
    assert "bake: choose from inspect, fix, convert, validate, import" in done.stderr


def test_a_failure_is_shown_with_its_remedy(ctl: Any, make_export: MakeExport) -> None:
    export = make_export()
    (export / "web01-disk-0.raw").write_bytes(os.urandom(1 << 20))
    done = ctl("migrate", export)
    assert 1 == done.returncode
    assert "checksum_mismatch in verify: disks[0].checksum" in done.stdout
    assert "remedy" in done.stdout


def test_list_shows_every_state(ctl: Any, make_export: MakeExport, scratch: Settings) -> None:
    run_job(make_export("good"), scratch)
    bad = make_export("bad")
    (bad / "bad-disk-0.raw").write_bytes(b"x" * (1 << 20))
    run_job(bad, scratch)
    make_export("new")
    (make_export("half") / "manifest.json").write_text("{")
    rows = {Path(row["export"]).name: row for row in json.loads(ctl("list", "--json").stdout)}
    expected = {"good": "succeeded", "bad": "failed", "new": "queued", "half": "incomplete"}
    assert expected == {name: row["state"] for name, row in rows.items()}
    assert "checksum_mismatch" == rows["bad"]["reason"]["code"]
    table = ctl("list").stdout
    assert all(name in table and state in table for name, state in expected.items())


def test_show_finds_an_export_by_its_name_its_path_and_its_vm(
    ctl: Any, make_export: MakeExport, scratch: Settings
) -> None:
    export = make_export("dir01", source={"provider": "v", "vm_id": "1", "vm_name": "The Web Server"})
    run_job(export, scratch)
    for name in ("dir01", str(export), "The Web Server"):
        shown = ctl("show", name, "--json")
        assert "succeeded" == json.loads(shown.stdout)["state"], shown.stderr
    missing = ctl("show", "nobody")
    assert 3 == missing.returncode
    assert "no export of this name" in missing.stderr


def test_an_export_goes_before_a_directory_of_that_name_where_one_stands(
    ctl: Any, make_export: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make_export("web01", source={"provider": "v", "vm_id": "1", "vm_name": "webserver"})
    assert 0 == ctl("migrate", export).returncode
    here = tmp_path / "here"
    for name in ("web01", "webserver", "other"):
        (here / name).mkdir(parents=True)
    monkeypatch.chdir(here)
    found = {name: json.loads(ctl("show", "--json", name).stdout)["export"] for name in ("web01", "webserver", "other")}
    assert {"web01": str(export), "webserver": str(export), "other": str(here / "other")} == found
    assert str(here / "web01") == json.loads(ctl("show", "--json", "./web01").stdout)["export"]


def test_validate_lists_everything_at_once(ctl: Any, make_export: MakeExport) -> None:
    export = make_export()
    path = export / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["disks"][0]["checksum"] = "md5:1"
    manifest["disks"][0]["source_format"] = "vmkd"
    path.write_text(json.dumps(manifest))
    done = ctl("validate", path, "--json")
    assert 1 == done.returncode
    fields = {error["field"] for error in json.loads(done.stdout)["errors"]}
    assert {"disks[0].checksum", "disks[0].source_format"} <= fields


def test_a_pipeline_override_goes_before_the_manifest_and_is_on_record(ctl: Any, scratch: Settings) -> None:
    directory = scratch.exports_dir / "web01"
    directory.mkdir()
    (directory / "disk.raw").write_bytes(b"h2k" * (1 << 20))
    write_manifest(directory, [disk_entry(directory / "disk.raw")])
    before = (directory / "manifest.json").read_bytes()
    done = ctl("migrate", directory, "--set", "pipeline.convert.compression=true", "--name", "web-02", "--json")
    assert 0 == done.returncode, done.stderr
    document = json.loads(done.stdout)
    assert document["results"]["convert"]["compressed"]
    assert {"convert": {"compression": True}, "vm_name": "web-02"} == document["overrides"]
    assert [str(scratch.output_dir / "web-02-disk-0.qcow2")] == [disk["target"] for disk in document["disks"]]
    assert before == (directory / "manifest.json").read_bytes()


def test_an_unknown_pipeline_override_names_the_nearest_one(ctl: Any, make_export: MakeExport) -> None:
    done = ctl("migrate", make_export(), "--set", "pipeline.convert.compres=true")
    assert 78 == done.returncode
    assert "pipeline.convert.compres: unknown setting; did you mean compress?" in done.stderr


def test_the_report_says_who_ran_what(ctl: Any, make_export: MakeExport) -> None:
    document = json.loads(ctl("migrate", make_export(), "--json").stdout)
    expected = ("command", pwd.getpwuid(os.geteuid()).pw_name, os.uname().nodename)
    host = document["host"]
    assert expected == (host["started_by"], host["user"], host["name"])
    assert document["manifest"]["sha256"]
    assert document["tools"]["qemu-img"]


def test_disks_without_a_checksum_are_refused_if_the_settings_say_so(ctl: Any, scratch: Settings) -> None:
    directory = scratch.exports_dir / "web01"
    directory.mkdir()
    (directory / "disk.raw").write_bytes(bytes(1 << 20))
    entry = {key: value for key, value in disk_entry(directory / "disk.raw").items() if key != "checksum"}
    write_manifest(directory, [entry])
    wish = ("--set", "validate.require_checksums=true")
    done = ctl("validate", directory / "manifest.json", *wish, "--json")
    assert 1 == done.returncode
    (error,) = json.loads(done.stdout)["errors"]
    assert ("checksum_missing", "disks[0].checksum") == (error["code"], error["field"])
    assert "disk disk-0 has no checksum" in error["message"]
    assert 1 == ctl("migrate", directory, *wish).returncode
    assert "blocked" == report_of(directory)["status"]
    # The remedy that it names.
    assert 0 == ctl("manifest", "rehash", "--yes", directory / "manifest.json").returncode
    assert 0 == ctl("retry", "web01").returncode
    assert 0 == ctl("migrate", directory, *wish).returncode


def test_validate_computes_checksums_only_when_strict(ctl: Any, make_export: MakeExport) -> None:
    export = make_export()
    (export / "web01-disk-0.raw").write_bytes(os.urandom(1 << 20))
    assert 0 == ctl("validate", export / "manifest.json").returncode
    strict = ctl("validate", export / "manifest.json", "--strict")
    assert 1 == strict.returncode
    assert "has sha256" in strict.stdout


def test_validate_of_nothing_says_what_is_missing(ctl: Any, tmp_path: Path) -> None:
    done = ctl("validate", tmp_path / "none/manifest.json")
    assert 1 == done.returncode
    assert "none" in done.stdout


def test_a_key_that_nobody_knows_is_an_error_to_the_strict_alone(ctl: Any, make_export: MakeExport) -> None:
    stages = {name: {"enabled": False} for name in ("inspect", "fix")}
    pipeline = {**stages, "convert": {"enabled": True, "compres": True}, "validate": {"enabled": True}}
    manifest = make_export(pipeline=pipeline) / "manifest.json"
    done = ctl("validate", manifest, "--json")
    assert 0 == done.returncode, done.stderr
    (warning,) = (w for w in json.loads(done.stdout)["warnings"] if w["code"] == "unknown_key")
    assert ("pipeline.convert.compres", "Did you mean compress?") == (warning["field"], warning["hint"])
    strict = ctl("validate", manifest, "--strict", "--json")
    assert 1 == strict.returncode
    assert [warning] == json.loads(strict.stdout)["errors"]
    assert warning not in json.loads(strict.stdout)["warnings"]
    assert 0 == ctl("migrate", manifest).returncode


@pytest.mark.rest
def test_doctor_checks_the_host_for_real(ctl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBGUESTFS_PATH", raising=False)  # with the appliance that libguestfs makes by itself
    done = ctl("doctor", "--json")
    results = {result["check"]: result for result in json.loads(done.stdout)}
    assert 0 == done.returncode, results
    assert "the appliance starts" in results["libguestfs"]["detail"]
    assert "flock works" == results["locks"]["detail"]


def test_doctor_names_what_is_wrong_and_the_remedy(ctl: Any, scratch: Settings) -> None:
    scratch.output_dir.rmdir()
    done = ctl("doctor", "output")
    assert 1 == done.returncode
    assert str(scratch.output_dir) in done.stdout


def test_a_bad_setting_ends_with_78(ctl: Any) -> None:
    done = ctl("list", "--set", "worker=1")
    assert 78 == done.returncode
    assert "did you mean workers?" in done.stderr


@pytest.mark.parametrize(
    "command",
    ["list", "show web01", "report web01", "retry web01", "logs web01", "drain --no-wait", "prune", "batch {}"],
)
def test_exports_that_are_not_there_are_named(ctl: Any, scratch: Settings, command: str) -> None:
    scratch.exports_dir.rmdir()
    done = ctl(*command.format(scratch.exports_dir).split())
    said = f"hyper2kvmctl: {scratch.exports_dir}: No such file or directory; check the path, here or in the settings\n"
    assert (3, said) == (done.returncode, done.stderr)
