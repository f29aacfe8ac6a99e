"""What a person asks for with `migrate` holds for every later attempt, whoever makes it, until another is asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.queue.names import ASKED, REPORT
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, report_of, run_job
from tests.integration.daemon.test_daemon import change, wait_until

GOOD = 'exec /usr/bin/qemu-img "$@"\n'
DIES = '[ "$1" = convert ] && kill -KILL $$\n' + GOOD  # a passing cause


@pytest.fixture
def scratch(scratch: Settings) -> Settings:
    """With a libvirt that would take the domain, and no delay before the next attempt."""
    libvirt, retry = {"uri": "test:///default"}, {"delay_seconds": 0, "max_attempts": 9}
    return change(scratch, libvirt=libvirt, retry=retry, guest={"accel": "tcg"})


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory for disks that no settings name."""
    directory = tmp_path / "else where"
    directory.mkdir()
    return directory


def options(elsewhere: Path) -> tuple[str | Path, ...]:
    return "--name", "test1", "--no-import", "--output-dir", elsewhere, "--set", "output.format=raw"


def work_off(settings: Settings) -> None:
    """Have a daemon do what there is to do."""
    config = settings.work_dir.parent / "daemon.json"
    config.write_text(settings.model_dump_json(by_alias=True))
    program = (sys.executable, "-m", "hyper2kvmd", "run", "--once", "--config", str(config))
    subprocess.run(program, check=False, capture_output=True, timeout=300)


def check_as_asked(export: Path, elsewhere: Path, settings: Settings) -> None:
    report = report_of(export)
    assert ("succeeded", "test1", None) == (report["status"], report["vm_name"], report["domain"]), report["error"]
    assert "daemon" == report["host"]["started_by"]
    assert [elsewhere / "test1-disk-0.qcow2"] == [path for path in elsewhere.iterdir() if not path.name.startswith(".")]
    assert [] == list(settings.output_dir.iterdir())


def test_the_daemon_goes_on_as_was_asked_after_a_passing_failure(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, fake: Callable[[str, str], None], elsewhere: Path
) -> None:
    export = make_export()
    fake("qemu-img", DIES)
    done = ctl("migrate", *options(elsewhere), export / "manifest.json")
    assert (75, "retrying") == (done.returncode, report_of(export)["status"]), done.stderr
    fake("qemu-img", GOOD)
    work_off(scratch)
    check_as_asked(export, elsewhere, scratch)


def test_the_daemon_goes_on_as_was_asked_after_the_runner_was_killed(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path, elsewhere: Path
) -> None:
    export = make_export()
    config = tmp_path / "ctl.json"
    config.write_text(scratch.model_dump_json(by_alias=True))
    fake("qemu-img", f'[ "$1" = measure ] && echo $PPID > {tmp_path}/runner && exec sleep 120\n{GOOD}')
    program = (sys.executable, "-m", "hyper2kvmd.ctl", "migrate", *options(elsewhere), export, "--config", config)
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as asker:
        wait_until(lambda: (tmp_path / "runner").exists() and (tmp_path / "runner").read_text() != "", 60)
        os.kill(int((tmp_path / "runner").read_text()), signal.SIGKILL)
        assert 0 != asker.wait(60)
    assert not (export / REPORT).exists()
    fake("qemu-img", GOOD)
    work_off(scratch)
    check_as_asked(export, elsewhere, scratch)


def test_retry_keeps_what_was_asked_and_show_and_list_say_it(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, fake: Callable[[str, str], None], elsewhere: Path
) -> None:
    export = make_export()
    fake("qemu-img", DIES)
    ctl("migrate", *options(elsewhere), "--set", "retry.max_attempts=1", export)
    assert "failed" == report_of(export)["status"]
    asked = f"""--name test1 --set output.format=raw --set retry.max_attempts=1 --set libvirt.import=false \
--set 'output_dir="{elsewhere}"' --set 'pipeline.convert.output_dir="{elsewhere}"'"""
    assert f"asked for  {asked}" in ctl("show", export.name).stdout
    (row,) = json.loads(ctl("list", "--json").stdout)
    assert row["asked"] == json.loads(ctl("show", export.name, "--json").stdout)["asked"]
    assert ["--name", "test1", "--set", "output.format=raw"] == row["asked"][:4]
    assert "test1" in ctl("list").stdout
    assert 0 == ctl("retry", export.name).returncode
    fake("qemu-img", GOOD)
    work_off(scratch)
    check_as_asked(export, elsewhere, scratch)


def test_the_last_migrate_counts_and_one_without_options_drops_what_was_asked(
    make_export: MakeExport, ctl: Ctl, fake: Callable[[str, str], None], elsewhere: Path
) -> None:
    def asked() -> Any:
        return json.loads(ctl("list", "--json").stdout)[0]["asked"]

    export = make_export()
    fake("qemu-img", DIES)
    ctl("migrate", *options(elsewhere), export)
    assert "test1" in asked()
    for other in (("--dry-run", "--name", "test2"), ("--stages", "validate", "--name", "test2")):
        ctl("migrate", *other, export)
        assert "test1" in asked(), "what writes nothing decides nothing"
    ctl("migrate", "--name", "test3", export)
    assert ["--name", "test3"] == asked()
    assert 0 != ctl("migrate", export).returncode
    assert [] == asked()
    assert ASKED not in os.listdir(export)
    fake("qemu-img", GOOD)
    ctl("migrate", export)
    assert ("succeeded", "web01") == (report_of(export)["status"], report_of(export)["vm_name"])


def test_batch_keeps_what_was_asked_for_one_of_its_exports_unless_it_asks_itself(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    fake("qemu-img", DIES)
    for name in ("a", "b"):
        assert 75 == ctl("migrate", "--name", f"asked-{name}", make_export(name)).returncode
    plan = tmp_path / "plan.yaml"
    plan.write_text("vms: {b: {name: planned}}\n")
    fake("qemu-img", GOOD)
    done = ctl("batch", scratch.exports_dir, "--plan", plan)
    assert 0 == done.returncode, done.stderr
    assert ["asked-a", "planned"] == [report_of(scratch.exports_dir / name)["vm_name"] for name in ("a", "b")]


@pytest.mark.parametrize("kind", ["others", "unknown setting"])
def test_what_nobody_may_have_asked_for_is_not_done_and_the_remedy_works(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, kind: str
) -> None:
    export = make_export()
    path = export / ASKED
    path.write_text(json.dumps({"export": "web01", "stages": None, "name": "evil", "set": ["nothing=1"]}))
    path.chmod(0o644)
    if kind == "others":
        os.chown(path, 4711, 4711)
    assert 1 == run_job(export, scratch, "--as-before").returncode
    report = report_of(export)
    assert ("blocked", "asked_unusable") == (report["status"], report["error"]["code"])
    assert str(path) in report["error"]["message"]
    assert [] == list(scratch.output_dir.iterdir())
    assert 5 == ctl("migrate", export).returncode, "it is blocked still"
    assert 0 == ctl("retry", export.name).returncode
    work_off(scratch)
    assert ("succeeded", "web01") == (report_of(export)["status"], report_of(export)["vm_name"])


def test_what_is_not_about_the_vm_is_not_kept(make_export: MakeExport, ctl: Ctl) -> None:
    export = make_export()
    secret = "notify.webhook.url=https://chat.example/secret"
    assert 0 == ctl("migrate", "--set", secret, "--set", "log.level=debug", export).returncode
    assert ASKED not in os.listdir(export)


def test_settings_that_mean_nothing_are_refused_before_they_are_kept(
    scratch: Settings, make_export: MakeExport
) -> None:
    export = make_export()
    assert 78 == run_job(export, scratch, "--set", "nothing=1").returncode
    assert ["manifest.json", "web01-disk-0.raw"] == sorted(os.listdir(export))
