"""Everything that is known to go wrong later is found at once, in the first seconds, and without an appliance."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import Domain, DomainNic, domain_uuid
from hyper2kvmd.domain.xml import to_xml
from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.hypervisor.define import define
from hyper2kvmd.settings.model import Settings
from tests.conftest import disk_entry, report_of, run_job, write_manifest
from tests.libvirtd import session

MAC = "00:50:56:aa:bb:01"
BLOCKING = {
    "output_denied",  # the manifest asks for a directory that is not allowed
    "output_exists",  # somebody's file has the name of the result
    "domain_exists",  # another VM has the name
    "mac_exists",  # and the MAC address
    "network_missing",  # one network and one bridge
    "pool_missing",
    "appliance_failed",  # guest.accel is kvm, which does not work
    "no_space",  # in the work directory
    "no_memory",
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A libvirt that has the domain of somebody else."""
    with session(tmp_path_factory.mktemp("libvirtd")) as uri:
        theirs = Domain(
            name="web01", uuid=domain_uuid("theirs"), title="web01", description="", cpus=1, cores_per_socket=None,
            memory_mib=64, firmware="bios", secure_boot=False, tpm=False, virt_type="qemu", guest=None, disks=(),
            machine=machine_for(None, "bios", 0, virtio=True),
            nics=(DomainNic(MAC, "user"),), job="another-job", source={}, tags={},
        )  # fmt: skip
        with connect(uri) as connection:
            define(connection, to_xml(theirs), theirs.name, theirs.uuid, theirs.job, autostart=False, start=False)
        yield uri


@pytest.fixture
def planted(scratch: Settings, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings with which hardly anything can go well, and the export `web01` to go with them."""
    export = scratch.exports_dir / "web01"
    export.mkdir()
    disk = export / "disk.raw"
    disk.write_bytes(os.urandom(1 << 20))
    write_manifest(
        export,
        [disk_entry(disk)],
        nics=[{"id": "a", "mac": MAC, "network": "LAN"}, {"id": "b", "mac": "00:50:56:aa:bb:02", "network": "DMZ"}],
        output={"directory": "/somewhere/else"},
        pipeline={"inspect": {"enabled": True}, "fix": {"enabled": True}, "convert": {"enabled": True}},
    )
    (scratch.output_dir / "web01-disk-0.qcow2").write_text("somebody's")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", scratch.work_dir], check=True)
    shape = scratch.model_dump(by_alias=True)
    shape["libvirt"] |= {
        "uri": uri,
        "import": True,
        "pool": "vms",
        "network_map": {"LAN": "lan", "DMZ": "bridge:br-dmz"},
    }
    shape["guest"] |= {"accel": "kvm", "memory_mb": 1 << 30}
    yield Settings.model_validate(shape)
    subprocess.run(["umount", scratch.work_dir], check=True)


def configured(settings: Settings, tmp_path: Path) -> list[str]:
    path = tmp_path / "planted.json"
    path.write_text(settings.model_dump_json(by_alias=True))
    return ["--config", str(path)]


def codes(findings: list[dict[str, Any]]) -> list[str]:
    return sorted(finding["code"] for finding in findings)


def test_a_job_is_blocked_with_everything_that_is_in_its_way(planted: Settings) -> None:
    export = planted.exports_dir / "web01"
    before = sorted(path.name for path in export.iterdir())
    run_job(export, planted)
    document = report_of(export)
    assert "blocked" == document["status"], document["error"]
    problems = document["error"]["problems"]
    assert BLOCKING == set(codes(problems))
    assert 2 == codes(problems).count("network_missing")
    assert all(problem["message"] and problem["hint"] for problem in problems)
    assert ["plan"] == [stage["name"] for stage in document["stages"]], "nothing was copied, no appliance was started"
    assert {*before, ".hyper2kvmd.lock", ".hyper2kvmd.log", "migration-report.json"} == {
        path.name for path in export.iterdir()
    }
    assert ["web01-disk-0.qcow2"] == [path.name for path in planted.output_dir.iterdir()]


def test_validate_and_a_dry_run_say_the_same_and_what_is_wrong_with_disks(planted: Settings, tmp_path: Path) -> None:
    export = planted.exports_dir / "web01"
    path = export / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["disks"] += [
        {**manifest["disks"][0], "id": "gone", "local_path": str(export / "gone.raw"), "disk_type": "data"},
        {**manifest["disks"][0], "id": "other", "local_path": str(export / "other.vmdk"), "source_format": "vmdk"},
    ]
    (export / "other.vmdk").write_bytes(os.urandom(1 << 20))
    path.write_text(json.dumps(manifest))
    program = [sys.executable, "-m", "hyper2kvmd.ctl"]
    validate, dry_run = (
        subprocess.run(
            [*program, *command, "--json", *configured(planted, tmp_path)], capture_output=True, text=True, check=False
        )
        for command in (["validate", str(path)], ["migrate", "--dry-run", str(export)])
    )
    assert (1, 65) == (validate.returncode, dry_run.returncode), validate.stderr + dry_run.stderr
    errors = json.loads(validate.stdout)["errors"]
    assert {*BLOCKING, "disk_missing", "format_mismatch"} == set(codes(errors))
    assert codes(errors) == codes(json.loads(dry_run.stdout)["error"]["problems"])
    assert not (export / "migration-report.json").exists(), "the export is as it was, to be migrated"


def to_validate(scratch: Settings, uri: str, tmp_path: Path, name: str) -> tuple[Path, Settings, list[str]]:
    """An export without a fault, the settings with the libvirt at `uri`, and the command that validates it."""
    shape = scratch.model_dump(by_alias=True)
    shape["libvirt"] |= {"uri": uri, "import": True, "default_network": "user"}
    settings = Settings.model_validate(shape)
    export = scratch.exports_dir / name
    export.mkdir()
    disk = export / "disk.raw"
    disk.write_bytes(os.urandom(1 << 20))
    manifest = write_manifest(export, [disk_entry(disk)])
    program = [sys.executable, "-m", "hyper2kvmd.ctl", "validate", str(manifest), *configured(settings, tmp_path)]
    return export, settings, program


def test_an_export_without_a_fault_is_valid_before_and_after_its_migration(
    scratch: Settings, uri: str, tmp_path: Path
) -> None:
    export, settings, program = to_validate(scratch, uri, tmp_path, "db01")
    before = subprocess.run(program, capture_output=True, text=True, check=False)
    assert 0 == run_job(export, settings).returncode, report_of(export)["error"]
    after = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (0, 0) == (before.returncode, after.returncode), before.stdout + after.stdout


def test_validate_asks_the_libvirt_of_the_vms_plan(scratch: Settings, uri: str, tmp_path: Path) -> None:
    _, _, program = to_validate(scratch, "qemu+unix:///system?socket=/nobody", tmp_path, "planned01")
    scratch.plan_dir.mkdir()
    for plan, status, said in (
        ("memory_mb: 512\n", 1, "/nobody"),
        (f"libvirt_uri: {uri}\n", 0, "valid, 1 disk"),
        ("memory_mb: much\n", 1, "planned01.yaml"),
    ):
        (scratch.plan_dir / "planned01.yaml").write_text(plan)
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert (status, True) == (done.returncode, said in done.stdout), done.stdout


# hyper2kvmd that waits for an answer for seconds only.
IMPATIENT = """
import sys
from hyper2kvmd.__main__ import main
from hyper2kvmd.hypervisor import connection
connection.ANSWER_SECONDS = 3.0
sys.exit(main())
"""


def test_a_libvirt_that_hangs_is_waited_for_and_named(scratch: Settings, uri: str, tmp_path: Path) -> None:
    socket = Path(uri.rpartition("socket=")[2])
    daemon = int((socket.parent / "pid").read_text())
    shape = scratch.model_dump(by_alias=True)
    shape["libvirt"] |= {"uri": uri, "import": True, "default_network": "user"}
    export = scratch.exports_dir / "db02"
    export.mkdir()
    disk = export / "disk.raw"
    disk.write_bytes(os.urandom(1 << 20))
    write_manifest(export, [disk_entry(disk)])
    os.kill(daemon, signal.SIGSTOP)
    try:
        run_job(export, Settings.model_validate(shape), timeout=90, program=("-c", IMPATIENT))
    finally:
        os.kill(daemon, signal.SIGCONT)
    document = report_of(export)
    assert ("retrying", "libvirt_unavailable") == (document["status"], document["error"]["code"])
    assert "no answer within 3 s" in document["error"]["message"]
