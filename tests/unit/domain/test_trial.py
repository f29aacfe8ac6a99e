"""The domain of a boot test: the same hardware, on other disks, cut off from every network, and small."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

from hyper2kvmd.domain.model import DomainNic
from hyper2kvmd.domain.trial import kept_ours, thrown_away
from hyper2kvmd.domain.xml import job_of, to_xml
from hyper2kvmd.hypervisor.connection import connect
from tests.unit.domain.test_domain import PLAIN, disks

OVERLAY, BELOW, NVRAM = Path("/images/x"), Path("/images/y"), Path("/images/nvram")


def tried(xml: str, count: int = 1, memory_mb: int = 2048) -> ET.Element:
    overlays = [Path(f"/images/x{number}") for number in range(count)]
    return ET.fromstring(thrown_away(xml, overlays, [(BELOW, "raw")] * count, NVRAM, memory_mb))


def test_it_is_cut_off_small_and_another_one() -> None:
    nics = (DomainNic("00:50:56:aa:bb:01", "bridge:br0@20"), DomainNic("00:50:56:aa:bb:02", "ovs:br1"))
    domain = replace(PLAIN, cpus=64, cores_per_socket=16, memory_mib=262144, tpm=True, firmware="uefi", nics=nics)
    root = tried(to_xml(domain))
    assert (f"{domain.name}.boot-test", domain.job) == (root.findtext("name"), job_of(ET.tostring(root).decode()))
    assert domain.uuid != root.findtext("uuid")
    assert ("4", "2048", None, None) == (
        root.findtext("vcpu"),
        root.findtext("memory"),
        root.find("devices/tpm"),
        root.find("cpu/topology"),
    )
    assert str(NVRAM) == root.findtext("os/nvram")
    cards = root.findall("devices/interface")
    assert [["mac", "model", "link"]] * 2 == [[child.tag for child in card] for card in cards]
    assert [({"type": "user"}, "down")] * 2 == [
        (card.attrib, "" if (link := card.find("link")) is None else link.get("state")) for card in cards
    ]


def test_its_disks_keep_their_places_and_nothing_else_of_the_host_is_used() -> None:
    more = (
        "<disk type='file' device='disk'><source file='/usb.img'/><target dev='sdz' bus='usb'/></disk>"
        "<disk type='file' device='cdrom'><source file='/cd.iso'/><target dev='sdy' bus='sata'/><readonly/></disk>"
        "<hostdev mode='subsystem' type='usb'/><filesystem type='mount'/></devices>"
    )
    xml = to_xml(replace(PLAIN, disks=disks(2))).replace("</devices>", more)
    before, root = ET.fromstring(xml), tried(xml, 2)
    places = [(disk.find("target").attrib, disk.findtext("serial")) for disk in root.iterfind("devices/disk")]  # type: ignore[union-attr]
    wanted = [(disk.find("target").attrib, disk.findtext("serial")) for disk in before.iterfind("devices/disk")]  # type: ignore[union-attr]
    assert [place for place in wanted if place[0]["bus"] != "usb"] == places
    sources = [source.get("file") for source in root.iterfind("devices/disk//source")]
    assert ["/images/x0", str(BELOW), "/images/x1", str(BELOW), "/cd.iso"] == sources
    assert root.find("devices/hostdev") is None and root.find("devices/filesystem") is None
    assert all("cache" not in driver.attrib for driver in root.iterfind("devices/disk/driver"))


def test_a_small_machine_stays_as_it_is_whatever_its_unit() -> None:
    xml = to_xml(replace(PLAIN, cpus=2, memory_mib=512))
    for shown in (xml, xml.replace('unit="MiB">512<', 'unit="KiB">524288<')):
        root = tried(shown)
        assert ("2", ET.fromstring(shown).findtext("memory")) == (root.findtext("vcpu"), root.findtext("memory"))
    large = tried(xml.replace('unit="MiB">512<', 'unit="KiB">8388608<'))
    assert ("2048", "MiB") == (large.findtext("memory"), large.find("memory").get("unit"))  # type: ignore[union-attr]


def test_only_the_disks_that_are_ours_are_kept_from_libvirt() -> None:
    xml = thrown_away(to_xml(PLAIN), [OVERLAY], [(BELOW, "qcow2")], NVRAM, 2048)
    xml = xml.replace("</devices>", "<disk type='file' device='cdrom'><source file='/cd.iso'/></disk></devices>")
    root = ET.fromstring(kept_ours(xml, [OVERLAY, BELOW]))
    labels = [(source.get("file"), len(source)) for source in root.iterfind("devices/disk//source")]
    assert [(str(OVERLAY), 1), (str(BELOW), 1), ("/cd.iso", 0)] == labels


def test_libvirt_takes_what_it_shows_of_a_domain_of_ours() -> None:
    with connect("test:///default") as connection:
        defined = connection.defineXML(to_xml(replace(PLAIN, virt_type="test", firmware="bios")))
        shown = thrown_away(defined.XMLDesc(0), [OVERLAY], [(BELOW, "raw")], NVRAM, 256)
        assert f"{PLAIN.name}.boot-test" == connection.createXML(shown, 0).name()
