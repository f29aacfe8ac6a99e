"""The main job, whole, where users stand: a guest that cannot boot on virtio is copied in, and boots on virtio.

The package is installed, the service runs as its own user, and libvirt is as the distribution ships it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hyper2kvmd.guest.inspect import inspect
from hyper2kvmd.guest.linux.fix import fix
from hyper2kvmd.guest.options import FixOptions, Nic
from hyper2kvmd.guest.session import open_guest
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from tests import ROOT, matrix
from tests.appliance import MEMORY_MB
from tests.conftest import disk_entry, report_of, run_job
from tests.e2e.conftest import libvirt_of
from tests.e2e.container import Container, wait_until
from tests.e2e.test_systemd import CONFIG, EXPORTS, IMAGES, images, report
from tests.guests.boot import boot, boot_domain
from tests.guests.build import build, export
from tests.guests.recipe import GUESTS
from tests.guests.rootfs import run

MIGRATION_SECONDS = 900
# In a file that every guest has: what a migration must not lose.
CANARY = "b872b754c47962d7"
MAC = "00:50:56:aa:bb:01"


@dataclass(frozen=True)
class Migrated:
    """What the service made of one export; paths are this machine's."""

    host: Container
    export: Path
    before: dict[str, str]
    report: dict[str, Any]
    domain_xml: str
    metrics: str
    account: str

    @property
    def disk(self) -> Path:
        return self.host.root / f"{IMAGES}/web01-disk-0.qcow2".lstrip("/")


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def migrated(host: Container, tmp_path_factory: pytest.TempPathFactory) -> Migrated:
    """The export is copied in by root, slowly, by a tool that keeps old times."""
    settings = {
        "scan_interval_seconds": 1,
        "settle_seconds": 1,
        "limits": {"nice": 0},
        "libvirt": {"default_network": "user"},
        "validate": {"compare": True, "test_boot": True},
    }
    host.write(CONFIG, yaml.safe_dump(settings))
    host.run("systemctl", "reload", "hyper2kvmd")
    directory = export("debian12-bios", tmp_path_factory.mktemp("export"), dialect="seed", vm_name="web01", mac=MAC)
    before = digests(directory)
    shutil.copytree(directory, host.root / "root/web01")
    host.run("rsync", "-a", "--bwlimit=40m", "/root/web01", EXPORTS)
    document = report(host, "web01", MIGRATION_SECONDS)
    assert "succeeded" == document["status"], json.dumps(document["error"], indent=2)
    page = (
        "from urllib.request import urlopen; print(urlopen('http://127.0.0.1:9878/metrics', timeout=5).read().decode())"
    )

    def metrics() -> str:
        return host.run("/usr/bin/python3", "-c", page)

    wait_until(lambda: 'hyper2kvmd_jobs{state="succeeded"} 1' in metrics(), "it is counted")
    xml = host.run("virsh", "-c", "qemu:///system", "dumpxml", "web01")
    virsh = ("virsh", "-q", "-c", "qemu:///system")
    host.run(*virsh, "start", "--paused", "web01")
    account = host.run("ps", "-o", "user:20=", "-C", "qemu-system-x86_64").strip()
    host.run(*virsh, "destroy", "web01")
    exported = host.root / f"{EXPORTS}/web01".lstrip("/")
    return Migrated(host, exported, before, document, xml, metrics(), account)


@pytest.mark.rest
def test_the_guest_does_not_boot_on_virtio_before() -> None:
    result = boot([build("debian12-bios")], "raw", "virtio", timeout=900)
    assert "failed" == result.outcome, result.serial_log[-3000:]


def test_it_is_migrated_at_the_first_attempt_by_the_services_user_and_leaves_nothing_behind(migrated: Migrated) -> None:
    report = migrated.report
    assert (1, "hyper2kvm", "daemon") == (
        report["attempts"],
        report["host"]["user"],
        report["host"]["started_by"],
    )
    assert ["web01-disk-0.qcow2"] == images(migrated.host)
    assert "" == migrated.host.run("find", "/var/lib/hyper2kvmd/work", "-mindepth", "1", "-type", "d")


def test_the_boot_test_passes_and_the_disk_stays_the_services(migrated: Migrated) -> None:
    boot = migrated.report["results"]["boot"]
    assert "passed" == boot["outcome"]
    assert "login:" in (migrated.export / boot["serial_log"]).read_text()
    # As libvirt gave it back after the domain had run.
    assert "600 hyper2kvm" == migrated.host.run("stat", "-c", "%a %U", f"{IMAGES}/web01-disk-0.qcow2").strip()
    assert "user:" not in migrated.host.run("getfacl", "-cpnE", f"{IMAGES}/web01-disk-0.qcow2").replace("user::", "")


def test_it_runs_unprivileged(migrated: Migrated) -> None:
    assert "libvirt-qemu" == migrated.account


@pytest.mark.rest
def test_it_runs_on_virtio_with_its_root_by_uuid_and_its_old_address(migrated: Migrated) -> None:
    result = boot_domain(libvirt_of(migrated.host), "web01", root=migrated.host.root)
    assert "matched" == result.outcome, result.serial_log[-3000:]
    said = result.report
    assert "ens192:UP:10.0.2.15/24" == said["net"], "the card lost its name or its address"
    assert said["fstab-root"].startswith("UUID=")
    assert ("/dev/vda2", "/dev/vda3", "none") == (said["root"], said["swap"], said["failed"])
    assert CANARY == said["canary"], "the data did not survive"


def test_a_second_fix_finds_nothing_to_do_and_proves_the_same(
    migrated: Migrated, tmp_path: Path, accelerator: str
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    base = migrated.disk
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    with open_guest([(overlay, "qcow2")], accel=accelerator, memory_mb=MEMORY_MB, tools=Tools()) as session:
        again = fix(session, inspect(session), FixOptions(nics=(Nic(MAC),)))
    assert () == again.changes
    assert migrated.report["results"]["fix"]["proofs"] == [asdict(proof) for proof in again.proofs]


def test_the_domain_is_defined_and_shut_off(migrated: Migrated) -> None:
    domain = ET.fromstring(migrated.domain_xml)
    assert "web01" == domain.findtext("name")
    assert migrated.report["domain"]["uuid"] == domain.findtext("uuid")
    disk = domain.find("devices/disk")
    assert disk is not None
    source, target, order = disk.find("source"), disk.find("target"), disk.find("boot")
    assert source is not None and f"{IMAGES}/web01-disk-0.qcow2" == source.get("file")
    assert target is not None and "virtio" == target.get("bus")
    assert order is not None and "1" == order.get("order")
    nic = domain.find("devices/interface/mac")
    assert nic is not None and MAC == nic.get("address")


def test_the_source_is_untouched(migrated: Migrated) -> None:
    after = {name: digest for name, digest in digests(migrated.export).items() if name in migrated.before}
    assert migrated.before == after


def test_the_report_validates_against_its_published_schema(migrated: Migrated) -> None:
    jsonschema.validate(migrated.report, json.loads((ROOT / "docs/migration-report.schema.json").read_text()))


def test_the_report_says_what_was_found_done_and_proved(migrated: Migrated) -> None:
    results = migrated.report["results"]
    assert ("linux", "debian", "bios") == tuple(results["inspect"][key] for key in ("os_type", "distro", "firmware"))
    assert ("grub2", "initramfs-tools", "disk-0") == tuple(
        results["inspect"][key] for key in ("bootloader", "initramfs", "boot_disk")
    )
    assert results["fix"]["boot_updated"]
    assert {"virtio_blk", "virtio_pci"} <= set(results["fix"]["drivers_injected"])
    assert results["fix"]["proofs"] and all(proof["ok"] for proof in results["fix"]["proofs"])
    assert {"/etc/fstab", "/boot/grub/grub.cfg"} <= {change["path"] for change in migrated.report["changes"]}
    assert results["validate"]["all_valid"]
    assert migrated.report["disks"][0]["source_sha256"]


def test_one_success_was_counted(migrated: Migrated) -> None:
    assert 'hyper2kvmd_jobs_completed_total{result="succeeded"} 1.0' in migrated.metrics
    assert 'hyper2kvmd_jobs_completed_total{result="failed"} 0.0' in migrated.metrics


# hyper2kvmd with one line left out: what asks for virtio in the initramfs.
BROKEN = """
import dataclasses, sys
from hyper2kvmd.__main__ import main
from hyper2kvmd.guest.linux.fixers import Plan, initramfs
good = initramfs.BUILDERS["initramfs-tools"]
initramfs.BUILDERS["initramfs-tools"] = dataclasses.replace(good, plan=lambda view, drivers: Plan())
sys.exit(main())
"""


@pytest.mark.rest
def test_a_fixer_that_leaves_out_virtio_makes_the_job_fail_and_publishes_nothing(
    scratch: Settings, tmp_path: Path
) -> None:
    directory = export("debian12-bios", tmp_path / "exports", dialect="seed", vm_name="web01")
    done = run_job(directory, scratch, timeout=900, program=("-c", BROKEN))
    report = report_of(directory)
    assert (1, "failed", "fix_unproved") == (done.returncode, report["status"], report["error"]["code"])
    assert "virtio_blk" in report["error"]["message"] and "the initramfs lacks" in report["error"]["message"]
    assert [] == list((tmp_path / "images").iterdir())


@pytest.mark.rest
def test_a_data_disk_that_the_manifest_lists_first_is_not_taken_for_the_boot_disk(
    scratch: Settings, tmp_path: Path
) -> None:
    """The guest calls its root /dev/sda2, but the first disk of the export is another one."""
    directory = export("debian12-bios", tmp_path / "exports", dialect="go", vm_name="db01")
    data = directory / "data.raw"
    data.write_bytes(os.urandom(8 << 20))
    path = directory / "artifact-manifest.json"
    manifest = json.loads(path.read_text())
    manifest["disks"].insert(0, disk_entry(data, id="data", disk_type="data", boot_order_hint=1))
    path.write_text(json.dumps(manifest))
    done = run_job(directory, scratch, timeout=900)
    report = report_of(directory)
    assert 0 == done.returncode, json.dumps(report["error"], indent=2)
    assert [("data", False), ("disk-1", True)] == [(disk["id"], disk["boot"]) for disk in report["disks"]]
    assert {"disk_order", "boot_disk_differs"} <= {warning["code"] for warning in report["warnings"]}
    published = tmp_path / "images/db01-data.qcow2"
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", data, published], check=True)
    result = boot([tmp_path / "images/db01-disk-1.qcow2", published], "qcow2", "virtio", timeout=900)
    assert "matched" == result.outcome, result.serial_log[-3000:]
    assert (CANARY, "/dev/vda3") == (result.report["canary"], result.report["swap"])


@pytest.mark.rest
def test_an_ubuntu_under_secure_boot_does_not_work_before_and_comes_up_with_its_mounts_name_and_address(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [] == matrix.run(GUESTS["ubuntu2404-uefi"], print).problems(), capsys.readouterr().out
