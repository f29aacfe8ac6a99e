"""A Windows guest through a whole job: from its export to a domain of a real libvirt."""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from hyper2kvmd.guest.fix import fix
from hyper2kvmd.guest.inspect import inspect
from hyper2kvmd.guest.options import FixOptions, Nic
from hyper2kvmd.guest.session import Session
from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from tests import virtiowin
from tests.conftest import disk_entry, report_of, run_job, write_manifest
from tests.guests.ntfs import pour
from tests.libvirtd import session
from tests.unit.manifest.test_ovf import item
from tests.windows import guest

pytestmark = pytest.mark.timeout(1800)

MACS = ("00:50:56:aa:00:01", "00:50:56:aa:00:02")
TPM = item(1, ElementName="TPM", ResourceSubType="vmware.vtpm")
OVF = f"<Envelope><VirtualSystem><VirtualHardwareSection>{TPM}</VirtualHardwareSection></VirtualSystem></Envelope>"


def test_a_guest_goes_from_its_export_to_a_domain_with_virtio(scratch: Settings, tmp_path: Path) -> None:
    """What is done to it is what the stand-in says; its domain has what the VM had, and no Hyper-V without KVM."""
    (tmp_path / "tree").mkdir()
    stand_in = guest(tmp_path / "tree", "2022", static=True, vmware=True, two_sets=True, compressed=True)
    export = scratch.exports_dir / "dc01"
    export.mkdir()
    (disk,) = pour(stand_in, export)
    digest = hashlib.sha256(disk.read_bytes()).hexdigest()
    (export / "dc01.ovf").write_text(OVF)
    write_manifest(
        export,
        [disk_entry(disk)],
        vm={"cpu": 2, "mem_gb": 2, "firmware": "uefi", "secure_boot": True, "os_hint": "windows"},
        nics=[{"id": f"nic-{number}", "mac": mac, "network": "LAN"} for number, mac in enumerate(MACS)],
        pipeline={"inspect": {"enabled": True}, "fix": {"enabled": True}, "convert": {"enabled": True}},
    )
    iso = virtiowin.iso(tmp_path / "virtio-win.iso", virtiowin.tree())
    shape = scratch.model_dump(by_alias=True)
    shape["fix"] |= {"virtio_win": iso}
    shape["guest"] |= {"accel": "tcg"}
    with session(tmp_path) as uri:
        shape["libvirt"] |= {"uri": uri, "import": True, "default_network": "user"}
        done = run_job(export, Settings.model_validate(shape))
        assert 0 == done.returncode, done.stderr
        with connect(uri) as connection:
            xml = ET.fromstring(connection.lookupByName("dc01").XMLDesc(0))

    assert ["virtio"] == [one.get("bus") for one in xml.findall("devices/disk/target")]
    assert ["virtio"] * 2 == [one.get("type") for one in xml.findall("devices/interface/model")]
    assert list(MACS) == [one.get("address") for one in xml.findall("devices/interface/mac")]
    assert ["localtime"] == [one.get("offset") for one in xml.findall("clock")]
    assert ["yes"] * 2 == [
        one.get("enabled") for one in xml.findall("os/firmware/feature")
    ]  # Secure Boot, with its keys
    assert ["2.0"] == [one.get("version") for one in xml.findall("devices/tpm/backend")]
    assert "qemu" == xml.get("type") and xml.find("features/hyperv") is None
    assert ["q35"] == [(one.get("machine") or "").split("-")[1] for one in xml.findall("os/type")]

    document = report_of(export)
    assert document["results"]["inspect"]["build"] == 20348
    expected = Session(stand_in, (), Tools())
    options = FixOptions(virtio_win=iso, nics=tuple(Nic(mac) for mac in MACS))
    result = fix(expected, inspect(expected), options)
    assert [change.as_json() for change in result.changes] == document["changes"]
    assert [proof.subject for proof in result.proofs] == [
        proof["subject"] for proof in document["results"]["fix"]["proofs"]
    ]
    assert digest == hashlib.sha256(disk.read_bytes()).hexdigest()
