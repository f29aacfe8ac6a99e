"""hyper2kvmctl bundle: what is in it, and that no secret is, wherever one was."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from hyper2kvmd.exits import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_USAGE
from hyper2kvmd.queue.names import BOOT_LOG, LOG, REPORT
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, run_job
from tests.libvirtd import session


def members(path: Path, tmp_path: Path) -> dict[str, bytes]:
    """What is in a bundle, by its name there."""
    if path.name.endswith(".zst"):
        plain = tmp_path / "plain.tar"
        subprocess.run(["zstd", "-q", "-d", "-f", path, "-o", plain], check=True)
        path = plain
    with tarfile.open(path) as archive:
        return {
            entry.name.partition("/")[2]: file.read()
            for entry in archive
            if (file := archive.extractfile(entry)) is not None
        }


@pytest.mark.parametrize("ending", ["tar.zst", "tar.gz"])
def test_it_holds_all_that_tells_why_and_no_secret(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, tmp_path: Path, ending: str
) -> None:
    planted = {
        name: f"geheim-{name}" for name in ("tag", "log", "boot", "report", "key", "webhook", "plan", "ovf", "libvirt")
    }
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text(planted["key"] + "\n")
    export = make_export(metadata={"tags": {"api_token": planted["tag"], "site": "berlin"}})
    scratch.plan_dir.mkdir()
    (scratch.plan_dir / "web01.yaml").write_text(f"notes: 'password={planted['plan']}'\n")
    with session(tmp_path) as uri:
        libvirt = {"uri": uri, "import": True, "default_network": "user"}
        whole = {**json.loads(scratch.model_dump_json(by_alias=True)), "libvirt": libvirt}
        assert 0 == run_job(export, Settings.model_validate(whole)).returncode
        # As a guest, an exporter or a tool could have had it there.
        with (export / LOG).open("a") as log:
            log.write(f"opened with {planted['key']}\nAuthorization: Bearer {planted['log']}\n")
        (export / BOOT_LOG).write_text(f"root:$6$salt${planted['boot']}:19000::::::\n")
        (export / "web01.ovf").write_text(f"<x url='https://ann:{planted['ovf']}@vcenter/folder'/>\n")
        report = json.loads((export / REPORT).read_text())
        report["warnings"].append(
            {"code": "x", "message": f"https://x/?sig={planted['report']}", "hint": "", "field": None}
        )
        (export / REPORT).write_text(json.dumps(report))
        (export / "migration-report.1.json").symlink_to("/etc/shadow")
        for name, value in (("desc", f"password={planted['libvirt']}"),):
            subprocess.run(["virsh", "-c", uri, name, "web01", value], check=True, capture_output=True)
        output = tmp_path / f"web01.{ending}"
        done = ctl(
            *("bundle", "web01", "-o", output, "--set", f"libvirt.uri={uri}", "--set", f"fix.luks_keys.web01={key}"),
            *("--set", f"notify.webhook.url=https://example.com/{planted['webhook']}"),
        )
    assert 0 == done.returncode, done.stderr
    assert 0o600 == stat.S_IMODE(os.stat(output).st_mode)
    found = members(output, tmp_path)
    for name, data in found.items():
        assert [] == [secret for secret in planted.values() if secret.encode() in data], name
    shown = {name: data.decode() for name, data in found.items()}
    assert "succeeded" == json.loads(shown[f"export/{REPORT}"])["status"]
    assert {"site": "berlin"}.items() <= json.loads(shown[f"export/{REPORT}"])["tags"].items()
    assert str(scratch.exports_dir) == json.loads(shown["settings.json"])["exports_dir"]
    assert "<name>web01</name>" in shown["domain.xml"]
    assert {"user", "exports"} <= {row["check"] for row in json.loads(shown["doctor.json"])}
    assert "qemu-img: qemu-img version" in shown["versions.txt"]
    assert {"plan.yaml", "export/hyper2kvmd.log", "export/manifest.json", "export/boot-test.log"} <= {*found}
    assert "export/migration-report.1.json" not in found, "a link shows what its maker may not read"
    assert {*json.loads(shown["contents.json"])["members"]} == {*found} - {"contents.json"}


def test_what_cannot_be_had_is_named_and_stops_nothing(
    ctl: Ctl, scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    export = make_export()
    assert 0 == ctl("migrate", export).returncode
    report = json.loads((export / REPORT).read_text())
    identity = "564d1a2b-3c4d-5e6f-7081-92a3b4c5d6e7"
    report["domain"] = {"name": "web01", "uuid": identity, "uri": "qemu+ext:///system?command=/bin/touch+/tmp/planted"}
    (export / REPORT).write_text(json.dumps(report))
    done = ctl(
        "bundle",
        "web01",
        "-o",
        tmp_path / "b.tar.gz",
        "--set",
        "libvirt.uri=qemu+unix:///system?socket=/nowhere",
        "--json",
    )
    assert 0 == done.returncode, done.stderr
    shape = json.loads(done.stdout)
    assert "domain.xml" in shape["missing"]
    assert "/nowhere" in shape["missing"]["domain.xml"]
    assert shape["missing"] == json.loads(members(tmp_path / "b.tar.gz", tmp_path)["contents.json"])["missing"]


def test_it_writes_over_no_file_and_leaves_none_behind(ctl: Ctl, make_export: MakeExport, tmp_path: Path) -> None:
    make_export()
    there = tmp_path / "b.tar.gz"
    there.write_text("mine")
    assert EXIT_FAILED == ctl("bundle", "web01", "-o", there).returncode
    assert "mine" == there.read_text()
    assert EXIT_USAGE == ctl("bundle", "web01", "-o", tmp_path / "b.zip").returncode
    assert EXIT_NOT_FOUND == ctl("bundle", "nothing", "-o", tmp_path / "c.tar.gz").returncode
    assert 3 == ctl("bundle", "web01", "-o", tmp_path / "no/such/c.tar.gz").returncode
    assert [] == [path.name for path in tmp_path.iterdir() if "tar" in path.name and path != there]
