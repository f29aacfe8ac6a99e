"""`hyper2kvmctl switch-bus` with a real libvirt: what it refuses, and a whole switch of a phony Windows."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import libvirt
import pytest

from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import Domain, DomainDisk
from hyper2kvmd.domain.switch import difference, hard_disks, switched
from hyper2kvmd.domain.xml import METADATA_NAMESPACE, to_xml
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.hypervisor.define import redefine, settled_xml
from tests import virtiowin
from tests.conftest import Ctl
from tests.guests.ntfs import pour
from tests.libvirtd import remove, session
from tests.unit.domain.test_domain import WINDOWS_2022
from tests.unit.domain.test_switch import NICS, WINDOWS
from tests.unit.guest.windows.test_fix import repair
from tests.windows import guest

pytestmark = pytest.mark.timeout(1800)
SMALL = replace(WINDOWS, virt_type="qemu", memory_mib=64, nics=(NICS[1],))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with session(tmp_path_factory.mktemp("libvirtd")) as uri:
        yield uri


@contextmanager
def defined(uri: str, domain: Domain, old: str = "", new: str = "") -> Iterator[Any]:
    """The domain, with one word of its XML replaced; gone in the end."""
    with connect(uri) as connection:
        found = connection.defineXML(to_xml(domain).replace(old, new) if old else to_xml(domain))
        try:
            yield found
        finally:
            remove(found)


def on_disk(path: Path, format: str = "raw") -> tuple[DomainDisk, ...]:
    return (DomainDisk(path, format, "disk-0", False),)


def test_an_unknown_domain_is_not_found(ctl: Ctl, uri: str) -> None:
    done = ctl("switch-bus", "nobody", "virtio", f"--set=libvirt.uri={uri}")
    assert 3 == done.returncode
    assert "no domain of this name" in done.stderr


def test_a_domain_of_somebody_else_is_left_alone(ctl: Ctl, uri: str) -> None:
    with defined(uri, SMALL, METADATA_NAMESPACE, "urn:somebody") as domain:
        before = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        done = ctl("switch-bus", "web-01", "virtio", "-y", f"--set=libvirt.uri={uri}")
        assert 1 == done.returncode
        assert "was not made by hyper2kvmd" in done.stderr
        assert before == domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)


def test_a_domain_that_runs_is_busy(ctl: Ctl, uri: str, tmp_path: Path) -> None:
    disk = tmp_path / "0.raw"
    disk.write_bytes(bytes(1 << 20))
    with defined(uri, replace(SMALL, disks=on_disk(disk))) as domain:
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        done = ctl("switch-bus", "web-01", "virtio", "-y", f"--set=libvirt.uri={uri}")
        assert 5 == done.returncode
        assert "is not shut off" in done.stderr


def test_a_disk_that_is_not_there_and_another_chipset_are_said(ctl: Ctl, uri: str) -> None:
    with defined(uri, SMALL):
        done = ctl("switch-bus", "web-01", "virtio", f"--set=libvirt.uri={uri}")
        assert 3 == done.returncode
        assert "/images/web-01-disk-0.qcow2" in done.stderr
    with defined(uri, replace(SMALL, machine=machine_for(None, "bios", 1, virtio=True)), "q35", "pc"):
        done = ctl("switch-bus", "web-01", "sata", f"--set=libvirt.uri={uri}")
        assert 1 == done.returncode
        assert "another chipset than q35" in done.stderr


def test_what_somebody_changed_meanwhile_is_left_as_it_is(uri: str) -> None:
    with defined(uri, SMALL) as domain, connect(uri) as connection:
        before = settled_xml(domain, "web-01", secrets=True)
        domain.setMemoryFlags(32 << 10, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        changed = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        with pytest.raises(MigrationError, match="changed web-01 meanwhile") as raised:
            redefine(connection, domain, "web-01", before, before)
        assert Code.BUSY == raised.value.code
        assert changed == domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)


@pytest.mark.parametrize("count", [1, 9, 25])
def test_qemu_starts_it_there_and_back(count: int, uri: str, tmp_path: Path) -> None:
    disks = tuple(replace(on_disk(tmp_path / f"{number}.raw")[0], serial=f"disk-{number}") for number in range(count))
    for disk in disks:
        disk.path.write_bytes(bytes(1 << 20))
    many = partial(machine_for, WINDOWS_2022, "bios", count)
    with defined(uri, replace(SMALL, disks=disks)) as domain, connect(uri) as connection:
        drive = "<disk type='file' device='cdrom'><target dev='sdz' bus='sata'/></disk>"
        if count == 9:
            domain.attachDeviceFlags(drive, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        for machine in (many(virtio=True), many(virtio=False), many(virtio=True, scsi=True), many(virtio=False)):
            before = settled_xml(domain, "web-01", secrets=True)
            redefine(connection, domain, "web-01", before, switched(before, machine))
            after = settled_xml(domain, "web-01", secrets=True)
            assert "" == difference(after, switched(after, machine))
            assert [disk.path for disk in disks] == [path for path, _ in hard_disks(after)]
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
            domain.destroy()


def test_a_windows_on_sata_goes_to_virtio_with_all_that_was_made_of_it(ctl: Ctl, uri: str, tmp_path: Path) -> None:
    (tmp_path / "guest").mkdir()
    phony = guest(tmp_path / "guest", "2016")
    repair(phony, virtiowin.write(tmp_path / "virtio-win", virtiowin.tree()))
    phony.umount_all()
    (disk,) = pour(phony, tmp_path)
    content = disk.read_bytes()
    sata = replace(SMALL, guest=WINDOWS_2022, disks=on_disk(disk))
    with defined(uri, sata, 'listen="127.0.0.1"', 'listen="127.0.0.1" passwd="secret"') as domain:
        asked = ctl("switch-bus", "web-01", "virtio", f"--set=libvirt.uri={uri}")
        assert 2 == asked.returncode, asked.stderr
        assert "nobody to ask" in asked.stderr
        assert "secret" not in asked.stdout
        assert '+      <target dev="vda" bus="virtio" />' in asked.stdout
        assert "sata" == bus_of(domain)
        done = ctl("switch-bus", "web-01", "virtio", "-y", "--json", f"--set=libvirt.uri={uri}")
        assert 0 == done.returncode, done.stderr
        said = json.loads(done.stdout)
        assert (True, "virtio", None) == (said["changed"], said["disks"], said["cards"])
        assert all(proof["ok"] for proof in said["proofs"])
        assert "virtio" == bus_of(domain)
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        assert "secret" in xml
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    assert content == disk.read_bytes()


def bus_of(domain: Any) -> str | None:
    target = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)).find("devices/disk/target")
    return None if target is None else target.get("bus")
