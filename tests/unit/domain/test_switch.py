"""Another bus for a domain: its disks, controllers and cards change, and nothing else."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import Domain, DomainNic, Machine
from hyper2kvmd.domain.switch import difference, hard_disks, is_q35, switched
from hyper2kvmd.domain.xml import job_of, to_xml
from hyper2kvmd.hypervisor.connection import connect
from tests.unit.domain.test_domain import PLAIN, VARIANTS, WINDOWS_2022, disks

SATA = machine_for(WINDOWS_2022, "uefi", 1, virtio=False)
VIRTIO = machine_for(WINDOWS_2022, "uefi", 1, virtio=True)
SCSI = machine_for(WINDOWS_2022, "uefi", 1, virtio=True, scsi=True)
NICS = (DomainNic("00:50:56:aa:bb:01", "default"), DomainNic("00:50:56:aa:bb:02", "user"))
WINDOWS = replace(PLAIN, guest=WINDOWS_2022, machine=SATA, disks=disks(3), nics=NICS)


def on(machine: Machine, domain: Domain = WINDOWS) -> str:
    return to_xml(replace(domain, machine=machine))


def changed_parts(xml: str) -> list[str]:
    """The disks, cards and controllers, in any order of what is in them."""
    found = []
    for tag in ("disk", "controller", "interface"):
        for element in ET.fromstring(xml).findall(f"devices/{tag}"):
            element[:] = sorted(element, key=lambda child: child.tag)
            found.append(ET.canonicalize(ET.tostring(element, encoding="unicode"), strip_text=True))
    return found


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize(("one", "other"), [(SATA, VIRTIO), (VIRTIO, SATA), (SATA, SCSI), (SCSI, SATA), (SCSI, VIRTIO)])
def test_it_becomes_what_it_would_have_been(one: Machine, other: Machine, count: int) -> None:
    domain = replace(WINDOWS, disks=disks(count))
    assert changed_parts(on(other, domain)) == changed_parts(switched(on(one, domain), other))


def test_what_is_so_already_is_no_difference() -> None:
    assert "" == difference(on(SATA), switched(on(SATA), SATA))
    assert "" == difference(on(SCSI), switched(on(SCSI), SCSI))


def test_there_and_back_is_where_it_was() -> None:
    back = switched(switched(on(SATA), VIRTIO), SATA)
    assert ["+  <iothreads>1</iothreads>"] == [
        line for line in difference(on(SATA), back).splitlines()[2:] if line.startswith(("+", "-"))
    ]


OWN = """
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name><memory>1048576</memory><os><type machine='pc-q35-7.2'>hvm</type></os>
  <metadata><own:note xmlns:own='urn:mine'>kept</own:note></metadata>
  <devices>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/>
      <address type='drive' controller='0' unit='1'/></disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='writeback' queues='4'/><source file='/data.qcow2'/>
      <target dev='vdb' bus='virtio'/><boot order='2'/><address type='pci' slot='0x01'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/vg/web'/><target dev='vda' bus='virtio'/><boot order='1'/>
    </disk>
    <disk type='file' device='disk'><source file='/stick.img'/><target dev='sdb' bus='usb'/></disk>
    <interface type='user'><mac address='52:54:00:00:00:01'/><model type='virtio'/>
      <address type='pci' bus='0x01'/></interface>
    <interface type='user'><mac address='52:54:00:00:00:02'/><model type='rtl8139'/></interface>
    <controller type='sata' index='0'/><controller type='scsi' index='0' model='virtio-scsi'/>
    <graphics type='vnc' passwd='secret'/>
  </devices>
  <qemu:commandline><qemu:arg value='-s'/></qemu:commandline>
</domain>
"""


def test_what_an_administrator_made_of_it_stays() -> None:
    xml = switched(OWN, SATA)
    root = ET.fromstring(xml)
    boot, data = (
        root.find(f"devices/disk/source[@{key}='{at}']/..")
        for key, at in (("dev", "/dev/vg/web"), ("file", "/data.qcow2"))
    )
    assert boot is not None and data is not None
    names = [target.get("dev") for disk in (boot, data) for target in disk.findall("target")]
    assert ["sdc", "sdd"] == names  # sda and sdb are taken; the second port is, which would be that of sdb
    assert [None, None] == [disk.find("address") for disk in (boot, data)]
    assert [{"name": "qemu", "type": "qcow2", "cache": "writeback"}] == [one.attrib for one in data.findall("driver")]
    assert ["e1000e", "rtl8139"] == [model.get("type") for model in root.findall("devices/interface/model")]
    assert ["0x01"] == [address.get("bus") for address in root.findall("devices/interface/address")]
    assert ["sata", "scsi"] == [one.get("type") for one in root.findall("devices/controller")]
    for kept in ("<own:note>kept</own:note>", 'passwd="secret"', '<qemu:arg value="-s" />', "/stick.img"):
        assert kept in xml
    changed = [line for line in difference(OWN, xml).splitlines()[2:] if line.startswith(("+", "-"))]
    assert not [line for line in changed if any(word in line for word in ("secret", "note", "usb", "cdrom", "<boot"))]


def test_the_port_of_a_drive_is_left_to_it() -> None:
    xml = OWN.replace("dev='sda'", "dev='sdz'")
    names = [target.get("dev") for target in ET.fromstring(switched(xml, SATA)).findall("devices/disk/target")]
    assert ["sdz", "sdc", "sda", "sdb"] == names


def test_a_card_for_a_conventional_slot_is_given_another() -> None:
    root = ET.fromstring(switched(OWN, replace(SATA, cards="e1000")))
    assert [] == root.findall("devices/interface/address")


def test_cards_that_are_to_stay_do() -> None:
    kept = switched(on(VIRTIO), SATA, cards=False)
    assert ["virtio", "virtio"] == [
        model.get("type") for model in ET.fromstring(kept).findall("devices/interface/model")
    ]
    older = on(replace(SATA, cards="e1000"))
    assert "" == difference(older, switched(older, SATA))


def test_disks_are_in_the_order_of_the_firmware() -> None:
    assert [(Path("/dev/vg/web"), "raw"), (Path("/data.qcow2"), "qcow2")] == hard_disks(OWN)
    with pytest.raises(ValueError, match="vda"):
        hard_disks(OWN.replace("dev='/dev/vg/web'", "pool='vg' volume='web'"))


def test_the_chipset_is_known() -> None:
    assert is_q35(OWN)
    assert not is_q35(OWN.replace("q35", "i440fx"))


@pytest.mark.parametrize("count", [1, 9, 25])
@pytest.mark.parametrize(("one", "other"), [(SATA, VIRTIO), (VIRTIO, SATA), (SATA, SCSI), (SCSI, SATA)])
def test_libvirt_accepts_it_and_knows_it_again(one: Machine, other: Machine, count: int) -> None:
    domain = replace(WINDOWS, virt_type="test", firmware="bios", disks=disks(count))
    inactive = libvirt.VIR_DOMAIN_XML_INACTIVE
    with connect("test:///default") as connection:
        defined = connection.defineXMLFlags(on(one, domain), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        new = switched(defined.XMLDesc(inactive), other)
        connection.defineXMLFlags(new, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        again = defined.XMLDesc(inactive)
        assert PLAIN.job == job_of(again)
        assert "" == difference(again, switched(again, other))
        assert [other.disks] * count == [
            target.get("bus") for target in ET.fromstring(again).findall("devices/disk/target")
        ]
        assert hard_disks(on(one, domain)) == hard_disks(again)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_domain_of_ours_can_be_read(name: str) -> None:
    xml = to_xml(VARIANTS[name])
    assert len(VARIANTS[name].disks) == len(hard_disks(xml))
    assert job_of(switched(xml, SATA))
