"""`hyper2kvmctl report verify`, on reports of real jobs, of which one thing after the other is changed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.__main__ import main
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, report_of, run_job
from tests.keys import keygen, make_key, signing


@dataclass
class Migrated:
    """A VM that was migrated, and what `report verify` says of it."""

    export: Path
    key: Path
    ctl: Ctl

    @property
    def report(self) -> Path:
        return self.export / REPORT

    @property
    def disk(self) -> Path:
        return Path(report_of(self.export)["disks"][0]["target"])

    def rows(self, *options: str | Path, what: str | Path = "web01") -> list[tuple[str, str, str]]:
        """Check, result and code, or what was found, of each row; the exit status fits them."""
        by = () if "--allowed-signers" in options else ("--public-key", self.key.with_name("key.pub"))
        done = self.ctl("report", "verify", what, "--json", *by, *options)
        found: dict[str, Any] = json.loads(done.stdout)
        assert (done.returncode == 0) == found["holds"]
        assert done.returncode in (0, 1), done.stderr
        rows = found["checks"]
        assert all(row["finding"]["hint"] for row in rows if row["finding"])
        return [(row["check"], row["result"], (row["finding"] or {"code": row["detail"]})["code"]) for row in rows]

    def results(self, *options: str | Path, what: str | Path = "web01") -> list[str]:
        """What is wrong, by its code, and `ok` for what is right."""
        return ["ok" if result == "ok" else code for _, result, code in self.rows(*options, what=what)]


@pytest.fixture
def migrated(scratch: Settings, make_export: MakeExport, tmp_path: Path, ctl: Ctl) -> Migrated:
    key = make_key(tmp_path / "key")
    export = make_export()
    assert 0 == run_job(export, signing(scratch, key)).returncode
    return Migrated(export, key, ctl)


def flip(path: Path, position: int) -> None:
    """Another bit in a file, whose times stay as they were."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_all_holds_of_what_nobody_touched(migrated: Migrated) -> None:
    rows = migrated.rows("--disks")
    assert ["signature", "report", "manifest", "disk disk-0"] == [check for check, _, _ in rows]
    assert {"ok"} == {result for _, result, _ in rows}
    assert "VM web01, succeeded at " in rows[1][2]
    done = migrated.ctl("report", "verify", migrated.export, "--public-key", migrated.key.with_name("key.pub"))
    assert done.stdout.startswith('ok      signature: Good "hyper2kvmd-report" signature for '), done.stdout
    assert 3 == len(done.stdout.splitlines()), "no disk is read unless that is asked for"


def test_a_report_that_was_changed_is_no_evidence_of_anything(migrated: Migrated) -> None:
    text = migrated.report.read_text()
    migrated.report.write_text(text.replace('"web01"', '"web02"', 1))
    assert ["signature_wrong"] == migrated.results("--disks"), "the rest is anybody's word"
    for position in (0, len(text) // 2, len(text) - 1):
        migrated.report.write_text(text)
        flip(migrated.report, position)
        assert ["signature_wrong"] == migrated.results("--disks", what=migrated.report)
    migrated.report.write_text(text)
    assert ["ok", "ok", "ok"] == migrated.results()


def test_a_signature_that_was_changed_is_none(migrated: Migrated) -> None:
    signature = migrated.report.with_name(f"{REPORT}.sig")
    whole = signature.read_bytes()
    for content in (whole[:100], b"", bytes(len(whole)), whole.replace(b"U1NI", b"U1NJ")):
        signature.write_bytes(content)
        assert ["signature_wrong"] == migrated.results()
    signature.unlink()
    assert ["unsigned"] == migrated.results("--disks")
    signature.symlink_to("/etc/hostname")
    assert 1 == migrated.ctl("report", "verify", "web01", "--public-key", f"{migrated.key}.pub").returncode


def test_a_manifest_that_was_changed_or_is_gone_is_told_apart(migrated: Migrated) -> None:
    manifest = migrated.export / "manifest.json"
    content = manifest.read_bytes()
    flip(manifest, len(content) // 2)
    assert ["ok", "ok", "manifest_changed"] == migrated.results()
    manifest.unlink()
    assert ["ok", "ok", "manifest_missing"] == migrated.results()
    assert ("manifest", "warning") == migrated.rows()[2][:2], "it need not be kept"


def test_what_became_of_a_disk_is_said(migrated: Migrated) -> None:
    disk = migrated.disk
    flip(disk, disk.stat().st_size // 2)
    assert ["ok", "ok", "ok", "disk_differs"] == migrated.results("--disks")
    assert ["ok", "ok", "ok"] == migrated.results(), "nobody asked for the disks"
    flip(disk, disk.stat().st_size // 2)
    assert ["ok", "ok", "ok", "ok"] == migrated.results("--disks")
    with disk.open("ab") as file:
        file.write(b"\0")
    rows = migrated.rows("--disks")
    assert ("disk disk-0", "failed", "disk_changed") == rows[-1]
    said = migrated.ctl("report", "verify", "web01", "--disks", "--public-key", f"{migrated.key}.pub").stdout
    assert "has changed since it was published" in said and "If the VM has run since" in said
    disk.rename(disk.with_suffix(".moved"))
    assert ["ok", "ok", "ok", "disk_missing"] == migrated.results("--disks")
    disk.symlink_to(disk.with_suffix(".moved"))
    assert 0 != migrated.ctl("report", "verify", "web01", "--disks", "--public-key", f"{migrated.key}.pub").returncode


def test_a_disk_of_which_the_report_has_no_digest_does_not_pass(
    scratch: Settings, migrated: Migrated, make_export: MakeExport, tmp_path: Path
) -> None:
    export = make_export("web02")
    assert 0 == run_job(export, scratch).returncode
    assert ["unsigned"] == migrated.results(what="web02")
    # By hand, as the warning of a report says.
    keygen("-Y", "sign", "-n", "hyper2kvmd-report", "-f", migrated.key, export / REPORT)
    assert ["ok", "ok", "ok"] == migrated.results(what="web02")
    assert ["ok", "ok", "ok", "disk_unrecorded"] == migrated.results("--disks", what="web02")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b"null",
        b'{"finished_at": "0001-01-01T00:00:00+23:59"}',
        b'{"finished_at": 7}',
        b"[" * 100000,
        b"\xff",
    ],
)
def test_a_planted_report_is_refused_and_one_that_somebody_signed_is_none_of_ours(
    migrated: Migrated, content: bytes
) -> None:
    migrated.report.write_bytes(content)
    assert ["signature_wrong"] == migrated.results()
    migrated.report.with_name(f"{REPORT}.sig").unlink()
    assert ["unsigned"] == migrated.results()
    keygen("-Y", "sign", "-n", "hyper2kvmd-report", "-f", migrated.key, migrated.report)
    assert ["ok", "report_unknown"] == migrated.results("--disks")


def test_whose_signature_counts(migrated: Migrated, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    public, foreign = (path.with_name(f"{path.name}.pub") for path in (migrated.key, other))
    done = migrated.ctl("report", "verify", "web01", "--public-key", foreign)
    assert 1 == done.returncode and "by none of those who may sign" in done.stdout
    signers = tmp_path / "signers"
    signers.write_text(f'# ours\nkvm2 {foreign.read_text()}kvm1 namespaces="hyper2kvmd-report" {public.read_text()}')
    rows = migrated.rows("--allowed-signers", signers)
    assert "signature for kvm1 with" in rows[0][2]
    # Without an option, by the key of the settings, of which the public one is enough.
    done = migrated.ctl("report", "verify", "web01")
    assert 2 == done.returncode and "say whose signature it must be" in done.stderr
    migrated.key.unlink()
    assert 0 == migrated.ctl("report", "verify", "web01", "--set", f"report.sign_key={migrated.key}").returncode
    assert 1 == migrated.ctl("report", "verify", "web01", "--set", f"report.sign_key={other}").returncode


def test_a_report_elsewhere_and_one_of_an_earlier_run_are_verified_too(migrated: Migrated, tmp_path: Path) -> None:
    for name in (REPORT, f"{REPORT}.sig"):
        shutil.copy(migrated.export / name, tmp_path)
    assert ["ok", "ok", "manifest_missing"] == migrated.results(what=tmp_path / REPORT)
    assert 0 == migrated.ctl("retry", "web01").returncode
    done = migrated.ctl("report", "verify", "web01", "--public-key", f"{migrated.key}.pub")
    assert 3 == done.returncode and "has no report yet" in done.stderr
    assert ["ok", "ok", "ok"] == migrated.results(what=migrated.export / "migration-report.1.json")


def test_an_export_called_verify_is_named_by_its_path(
    scratch: Settings, make_export: MakeExport, migrated: Migrated
) -> None:
    export = make_export("verify")
    assert 0 == run_job(export, signing(scratch, migrated.key)).returncode
    assert "succeeded" in migrated.ctl("report", "verify").stdout
    assert ["ok", "ok", "ok"] == migrated.results(what=export)
    assert ["ok", "ok", "ok"] == migrated.results(what="verify")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["verify"], 3, "say what to verify"),
        (["verify", "nope"], 3, "no export of this name"),
        (["web01", "web02"], 2, "name one export"),
        (["verify", "web01", "--html", "-"], 2, "name one export"),
        (["web01", "--disks"], 2, "are for `report verify EXPORT`"),
        (["verify", "web01", "--public-key", "/etc/hostname"], 2, "not one public key"),
        (["verify", "web01", "--public-key", "/nope"], 3, "/nope: No such file"),
        (["verify", "web01", "--allowed-signers", "/nope"], 3, "/nope: No such file"),
        (["verify", "web01", "--allowed-signers", "/dev/null"], 2, "not a plain file"),
    ],
)
def test_a_wrong_use_is_explained(migrated: Migrated, words: list[str], status: int, said: str) -> None:
    done = migrated.ctl("report", *words)
    assert status == done.returncode and said in done.stderr, done.stderr
    assert not done.stdout


def test_a_host_without_ssh_keygen_is_no_judgement(
    migrated: Migrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "setpriv").symlink_to("/usr/bin/setpriv")
    monkeypatch.setenv("PATH", str(programs))
    done = migrated.ctl("report", "verify", "web01", "--public-key", f"{migrated.key}.pub")
    assert 69 == done.returncode and "openssh-client" in done.stderr


def test_a_page_says_that_there_is_a_signature(migrated: Migrated) -> None:
    assert "There is a signature of the report" in migrated.ctl("report", "web01", "--html", "-").stdout
    migrated.report.with_name(f"{REPORT}.sig").unlink()
    assert "There is a signature of the report" not in migrated.ctl("report", "web01", "--html", "-").stdout


def test_check_config_and_check_host_try_the_key(scratch: Settings, tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    config.write_text(signing(scratch, make_key(tmp_path / "key")).model_dump_json(by_alias=True))
    assert 0 == main(["check-config", "--config", str(config)])
    mark = scratch.exports_dir / "mark"
    mark.touch()
    assert 0 == main(["check-host", str(mark), "--config", str(config)])
    (tmp_path / "key").unlink()
    assert 78 == main(["check-config", "--config", str(config)])
    assert 1 == main(["check-host", str(mark), "--config", str(config)])
