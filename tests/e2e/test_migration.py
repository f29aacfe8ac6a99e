"""The main job, whole: a guest that cannot boot on virtio is dropped, migrated by the daemon, and boots on virtio."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hyper2kvmd.guest.inspect import inspect
from hyper2kvmd.guest.linux.fix import FixOptions, fix
from hyper2kvmd.guest.linux.fixers.network import Nic
from hyper2kvmd.guest.session import open_guest
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from tests import ROOT
from tests.appliance import MEMORY_MB
from tests.conftest import disk_entry, report_of, run_job
from tests.guests.boot import boot
from tests.guests.build import build, export
from tests.guests.rootfs import run
from tests.integration.daemon.test_daemon import daemon, free_port, wait_until
from tests.libvirtd import session

MIGRATION_SECONDS = 900
# In a file that every guest has: what a migration must not lose.
CANARY = "b872b754c47962d7"
MAC = "00:50:56:aa:bb:01"


@dataclass(frozen=True)
class Migrated:
    """What the daemon made of one dropped export."""

    export: Path
    before: dict[str, str]
    report: dict[str, Any]
    domain_xml: str
    metrics: str
    images: Path


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def migrate(directory: Path, guest: str, dialect: Any, vm_name: str) -> Migrated:
    for name in ("exports", "images", "work"):
        (directory / name).mkdir()
    port = free_port()
    with session(directory) as uri:
        settings = Settings.model_validate(
            {
                "exports_dir": directory / "exports",
                "output_dir": directory / "images",
                "work_dir": directory / "work",
                "settle_seconds": 1,
                "libvirt": {"uri": uri, "default_network": "user"},
                "validate": {"compare": True},
                "metrics": {"listen": f"127.0.0.1:{port}"},
            }
        )
        with daemon(settings):
            # As the exporter does: the disks first, the manifest last.
            dropped = export(guest, directory / "exports", dialect=dialect, vm_name=vm_name, mac=MAC)
            before = digests(dropped)
            wait_until((dropped / "migration-report.json").exists, MIGRATION_SECONDS)

            def metrics() -> str:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    text: str = answer.read().decode()
                    return text

            wait_until(lambda: f'hyper2kvmd_jobs{{state="{report_of(dropped)["status"]}"}} 1' in metrics())
            seen = metrics()
        shown = subprocess.run(["virsh", "-c", uri, "dumpxml", vm_name], capture_output=True, text=True, check=False)
    return Migrated(dropped, before, report_of(dropped), shown.stdout, seen, directory / "images")


@pytest.fixture(scope="module")
def bios(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Migrated]:
    yield migrate(tmp_path_factory.mktemp("bios"), "debian12-bios", "seed", "web01")


@pytest.mark.rest
def test_the_guest_does_not_boot_on_virtio_before() -> None:
    result = boot([build("debian12-bios")], "raw", "virtio", timeout=900)
    assert "failed" == result.outcome, result.serial_log[-3000:]


def test_the_migration_succeeds_and_leaves_nothing_behind(bios: Migrated) -> None:
    assert "succeeded" == bios.report["status"], json.dumps(bios.report["error"], indent=2)
    assert ["web01-disk-0.qcow2"] == [path.name for path in bios.images.iterdir()]
    assert [] == [path for path in (bios.images.parent / "work").iterdir() if path.is_dir()]


def test_the_result_boots_on_virtio_with_its_root_by_uuid_and_its_old_address(bios: Migrated) -> None:
    result = boot([bios.images / "web01-disk-0.qcow2"], "qcow2", "virtio", macs=[MAC], timeout=900)
    assert "matched" == result.outcome, result.serial_log[-3000:]
    said = result.report
    assert "ens192:UP:10.0.2.15/24" == said["net"], "the card lost its name or its address"
    assert said["fstab-root"].startswith("UUID=")
    assert ("/dev/vda2", "/dev/vda3", "none") == (said["root"], said["swap"], said["failed"])
    assert CANARY == said["canary"], "the data did not survive"


def test_a_second_fix_finds_nothing_to_do_and_proves_the_same(bios: Migrated, tmp_path: Path, accelerator: str) -> None:
    overlay = tmp_path / "overlay.qcow2"
    base = bios.images / "web01-disk-0.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    with open_guest([(overlay, "qcow2")], accel=accelerator, memory_mb=MEMORY_MB, tools=Tools()) as session:
        again = fix(session, inspect(session), FixOptions(nics=(Nic(MAC),)))
    assert () == again.changes
    assert bios.report["results"]["fix"]["proofs"] == [asdict(proof) for proof in again.proofs]


def test_the_domain_is_defined_and_shut_off(bios: Migrated) -> None:
    domain = ET.fromstring(bios.domain_xml)
    assert "web01" == domain.findtext("name")
    assert bios.report["domain"]["uuid"] == domain.findtext("uuid")
    disk = domain.find("devices/disk")
    assert disk is not None
    source, target, order = disk.find("source"), disk.find("target"), disk.find("boot")
    assert source is not None and str(bios.images / "web01-disk-0.qcow2") == source.get("file")
    assert target is not None and "virtio" == target.get("bus")
    assert order is not None and "1" == order.get("order")
    nic = domain.find("devices/interface/mac")
    assert nic is not None and MAC == nic.get("address")


def test_the_source_is_untouched(bios: Migrated) -> None:
    after = {name: digest for name, digest in digests(bios.export).items() if name in bios.before}
    assert bios.before == after


def test_the_report_validates_against_its_published_schema(bios: Migrated) -> None:
    jsonschema.validate(bios.report, json.loads((ROOT / "docs/migration-report.schema.json").read_text()))


def test_the_report_says_what_was_found_done_and_proved(bios: Migrated) -> None:
    results = bios.report["results"]
    assert ("linux", "debian", "bios") == tuple(results["inspect"][key] for key in ("os_type", "distro", "firmware"))
    assert ("grub2", "initramfs-tools", "disk-0") == tuple(
        results["inspect"][key] for key in ("bootloader", "initramfs", "boot_disk")
    )
    assert results["fix"]["boot_updated"]
    assert {"virtio_blk", "virtio_pci"} <= set(results["fix"]["drivers_injected"])
    assert results["fix"]["proofs"] and all(proof["ok"] for proof in results["fix"]["proofs"])
    assert {"/etc/fstab", "/boot/grub/grub.cfg"} <= {change["path"] for change in bios.report["changes"]}
    assert results["validate"]["all_valid"]
    assert bios.report["disks"][0]["source_sha256"]


def test_one_success_was_counted(bios: Migrated) -> None:
    assert 'hyper2kvmd_jobs_completed_total{result="succeeded"} 1.0' in bios.metrics
    assert 'hyper2kvmd_jobs_completed_total{result="failed"} 0.0' in bios.metrics


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
