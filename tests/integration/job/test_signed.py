"""Jobs whose reports are signed, by the real ssh-keygen: every end, every fault of the key, a kill at every moment."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, left_in, report_of, run_job
from tests.integration.job.test_kill import check_finished_once, check_nothing_half_done, killed_before, start
from tests.keys import is_signed, make_key, signing


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path / "key")


def test_a_report_is_signed_and_has_the_digests_of_its_disks(
    scratch: Settings, make_export: MakeExport, key: Path
) -> None:
    export = make_export()
    done = run_job(export, signing(scratch, key))
    assert 0 == done.returncode, done.stderr
    assert is_signed(export / REPORT, key)
    (disk,) = report_of(export)["disks"]
    assert hashlib.sha256(Path(disk["target"]).read_bytes()).hexdigest() == disk["target_sha256"]
    assert not [warning for warning in report_of(export)["warnings"] if "sign" in warning["code"]]


def test_nothing_of_it_is_done_without_a_key(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    assert 0 == run_job(export, scratch).returncode
    assert not (export / f"{REPORT}.sig").exists()
    assert report_of(export)["disks"][0]["target_sha256"] is None


def test_reports_of_failures_are_signed_too_and_a_retry_moves_both(
    scratch: Settings, make_export: MakeExport, key: Path, ctl: Ctl
) -> None:
    settings = signing(scratch, key)
    export = make_export()
    (disk,) = export.glob("*.raw")
    content = disk.read_bytes()
    disk.write_bytes(bytes(len(content)))
    assert 1 == run_job(export, settings).returncode
    assert "checksum_mismatch" == report_of(export)["error"]["code"]
    assert is_signed(export / REPORT, key)
    disk.write_bytes(content)
    done = ctl("retry", "web01", "--set", f"report.sign_key={key}")
    assert 0 == done.returncode, done.stderr
    moved = export / "migration-report.1.json"
    assert is_signed(moved, key) and json.loads(moved.read_text())["status"] == "failed"
    assert not (export / f"{REPORT}.sig").exists()
    assert 0 == run_job(export, settings).returncode
    assert is_signed(export / REPORT, key) and is_signed(moved, key)


def test_a_cancelled_job_has_a_signed_report(scratch: Settings, make_export: MakeExport, key: Path, ctl: Ctl) -> None:
    export = make_export()
    (export / ".hyper2kvmd.cancel").touch()
    assert 1 == run_job(export, signing(scratch, key)).returncode
    assert "cancelled" == report_of(export)["status"]
    assert is_signed(export / REPORT, key)


@pytest.mark.parametrize("fault", ["missing", "passphrase", "readable", "public"])
def test_a_key_that_cannot_sign_blocks_the_job_before_anything_is_copied(
    scratch: Settings, make_export: MakeExport, tmp_path: Path, fault: str
) -> None:
    key = tmp_path / "key"
    if fault != "missing":
        make_key(key, passphrase="secret" if fault == "passphrase" else "")
    if fault == "readable":
        key.chmod(0o644)
    export = make_export()
    settings = signing(scratch, key.with_suffix(".pub") if fault == "public" else key)
    assert 1 == run_job(export, settings).returncode
    document = report_of(export)
    error = document["error"]
    assert ("blocked", "sign_key_unusable", "report.sign_key", "plan") == (
        *(document["status"], error["code"], error["field"], error["stage"]),
    )
    assert str(tmp_path) in error["message"] and error["hint"]
    assert ["plan"] == [stage["name"] for stage in document["stages"]]
    assert ([], []) == (list(settings.output_dir.iterdir()), left_in(settings.work_dir))
    assert not (export / f"{REPORT}.sig").exists()
    dry = make_export("web02")
    assert "sign_key_unusable" in run_job(dry, settings, "--dry-run").stderr, "a dry run finds it, too"


def test_a_key_that_is_lost_in_between_does_not_lose_the_migration(
    scratch: Settings, make_export: MakeExport, key: Path, fake: Callable[[str, str], None], ctl: Ctl
) -> None:
    export = make_export()
    (export / f"{REPORT}.sig").write_text("of an earlier report")
    fake("qemu-img", f'[ "$1" = convert ] && mv {key} {key}.gone\nexec /usr/bin/qemu-img "$@"\n')
    done = run_job(export, signing(scratch, key))
    assert 0 == done.returncode, done.stderr
    document = report_of(export)
    assert "succeeded" == document["status"] and Path(document["disks"][0]["target"]).exists()
    (warning,) = (warning for warning in document["warnings"] if warning["code"] == "report_unsigned")
    assert f"the report is not signed: the key {key} does not exist" == warning["message"]
    assert not (export / f"{REPORT}.sig").exists()
    assert warning["message"] in done.stderr, "the journal has it"
    refused = ctl("report", "verify", "web01", "--public-key", key.with_name("key.pub"))
    assert 1 == refused.returncode
    assert "has no signature beside it" in refused.stdout and warning["message"] in refused.stdout
    # The remedy of the warning, as it stands there.
    Path(f"{key}.gone").rename(key)
    command = shlex.split(warning["hint"].split("`")[-2])
    subprocess.run(command, check=True, capture_output=True)
    assert 0 == ctl("report", "verify", "web01", "--public-key", key.with_name("key.pub")).returncode


def test_a_key_that_is_taken_out_of_the_settings_leaves_no_old_signature(
    scratch: Settings, make_export: MakeExport, key: Path, fake: Callable[[str, str], None]
) -> None:
    export = make_export()
    settings = Settings.model_validate({**scratch.model_dump(by_alias=True), "guest": {"accel": "tcg"}})
    fake("qemu-img", '[ "$1" = convert ] && kill -9 $$\nexec /usr/bin/qemu-img "$@"\n')
    assert 75 == run_job(export, signing(settings, key)).returncode
    assert "retrying" == report_of(export)["status"] and is_signed(export / REPORT, key)
    fake("qemu-img", 'exec /usr/bin/qemu-img "$@"\n')
    assert 0 == run_job(export, settings).returncode
    assert "succeeded" == report_of(export)["status"]
    assert not (export / f"{REPORT}.sig").exists()


def test_the_manifest_cannot_have_a_copy_put_in_place_of_the_signature(
    scratch: Settings, make_export: MakeExport, key: Path
) -> None:
    for name, settings in (("web01", scratch), ("web02", signing(scratch, key))):
        export = make_export(name, options={"report": {"enabled": True, "path": f"{REPORT}.sig"}})
        assert 0 == run_job(export, settings).returncode
    assert not (scratch.exports_dir / "web01" / f"{REPORT}.sig").exists()
    assert is_signed(scratch.exports_dir / "web02" / REPORT, key)


@pytest.mark.parametrize("call", ["rename,renameat,renameat2", "fsync"])
def test_a_kill_before_any_step_leaves_no_report_without_its_signature(
    scratch: Settings, make_export: MakeExport, key: Path, call: str
) -> None:
    settings, alone = signing(scratch, key), 0
    for nth in range(1, 60):
        export = make_export(f"vm{nth}")
        status = killed_before(call, nth, export, settings)
        alone += (export / f"{REPORT}.sig").exists() and not (export / REPORT).exists()
        if (export / REPORT).exists():
            assert is_signed(export / REPORT, key)
        check_nothing_half_done(export, settings)
        if status == 0:
            assert nth > 1 and alone, "never between the signature and the report: this test tests nothing"
            return
        check_finished_once(export, settings)
        assert is_signed(export / REPORT, key)
        for path in settings.output_dir.iterdir():
            path.unlink()
    pytest.fail(f"more than 60 calls of {call}")


def test_a_disk_that_is_published_by_the_next_attempt_keeps_its_digest(
    scratch: Settings, make_export: MakeExport, key: Path
) -> None:
    export, settings = make_export(), signing(scratch, key)
    # Right before it gets its name: all is validated, and noted.
    runner = start(
        export, settings, "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=link,linkat",
        "-e", "inject=link,linkat:signal=KILL:when=1",
    )  # fmt: skip
    assert runner.wait(timeout=120) in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert [] == list(settings.output_dir.glob("[!.]*"))
    check_finished_once(export, settings)
    (disk,) = report_of(export)["disks"]
    assert hashlib.sha256(Path(disk["target"]).read_bytes()).hexdigest() == disk["target_sha256"]
    assert is_signed(export / REPORT, key)
