"""A domain as it may be tried: the same hardware on throw-away disks, without a network, and with less of the host."""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path

from hyper2kvmd.domain.switch import hard_disk_elements, parsed

MAX_CPUS = 4
# What stays of a network card. The others say where it leads to, and the source may be running with the same addresses.
_OF_CARDS = ("mac", "model", "address")
# What is the host's, or there only once. What is in a TPM stays on VMware: without one, the guest boots the same way.
_LEFT_OUT = ("tpm", "hostdev", "redirdev", "filesystem", "shmem")


def thrown_away(
    xml: str, overlays: Sequence[Path], backing: Sequence[tuple[Path, str]], nvram: Path, memory_mb: int
) -> str:
    """The domain `xml` on `overlays`, qcow2 images in the order in which the firmware tries its disks.

    backing: what each is laid on, and its format. nvram: where UEFI keeps its variables meanwhile.
    """
    root = parsed(xml)
    name, old = root.find("name"), root.findtext("uuid", "")
    if name is not None:
        name.text = f"{name.text}.boot-test"
    for element in root.findall("uuid"):
        element.text = str(uuid.uuid5(uuid.UUID(old), "boot test"))
    _lessen(root, memory_mb)
    for system in root.findall("os"):
        if system.get("firmware") == "efi" and system.find("nvram") is None:
            ET.SubElement(system, "nvram")
        for element in system.findall("nvram"):
            element.text = str(nvram)
    disks = hard_disk_elements(root)
    for devices in root.findall("devices"):
        for disk in devices.findall("disk"):
            if disk not in disks and disk.get("device", "disk") == "disk":
                devices.remove(disk)  # on a bus of somebody's own choice, and nobody boots from there
        for tag in _LEFT_OUT:
            for element in devices.findall(tag):
                devices.remove(element)
        for card in devices.findall("interface"):
            _cut_off(card)
    for disk, overlay, below in zip(disks, overlays, backing, strict=True):
        _lay(disk, overlay, *below)
    return ET.tostring(root, encoding="unicode")


def kept_ours(xml: str, disks: Iterable[Path]) -> str:
    """The domain with these files, and what they are laid on, left to their owner when it starts."""
    root = parsed(xml)
    ours = {str(path) for path in disks}
    for source in [*root.iterfind("devices/disk//source")]:
        if source.get("file") in ours:
            for label in source.findall("seclabel"):
                source.remove(label)
            ET.SubElement(source, "seclabel", model="dac", relabel="no")
    return ET.tostring(root, encoding="unicode")


def _lessen(root: ET.Element, memory_mb: int) -> None:
    """Give it less of the host's memory and processors."""
    for tag in ("memory", "currentMemory", "maxMemory"):
        for element in root.findall(tag):
            if tag != "memory":
                root.remove(element)
            elif memory_mb < _mib(element):
                element.set("unit", "MiB")
                element.text = str(memory_mb)
    for element in root.findall("vcpu"):
        if int(element.text or 1) > MAX_CPUS:
            element.text = str(MAX_CPUS)
            element.attrib.clear()
            for way in ("vcpus", "cputune", "numatune", "cpu/topology", "cpu/numa"):  # for processors by number
                for place in root.findall(f"{way}/.."):
                    for found in place.findall(way.rpartition("/")[2]):
                        place.remove(found)


def _mib(element: ET.Element) -> float:
    """Memory in MiB. A unit that nobody has is libvirt's to refuse."""
    unit = element.get("unit", "KiB")
    scale = {"b": 1, "bytes": 1, "K": 1 << 10, "KiB": 1 << 10, "M": 1 << 20, "MiB": 1 << 20, "G": 1 << 30}
    return int(element.text or 0) * scale.get(unit, 1 << 30) / (1 << 20)


def _cut_off(card: ET.Element) -> None:
    for child in [*card]:
        if child.tag not in _OF_CARDS:
            card.remove(child)
    card.attrib.clear()
    card.set("type", "user")
    ET.SubElement(card, "link", state="down")


def _lay(disk: ET.Element, overlay: Path, path: Path, format: str) -> None:
    """Put an overlay in the place of a disk."""
    disk.set("type", "file")
    for tag in ("source", "backingStore"):
        for element in disk.findall(tag):
            disk.remove(element)
    driver = disk.find("driver")
    if driver is None:
        driver = ET.SubElement(disk, "driver", name="qemu")
    driver.set("type", "qcow2")
    for key in ("cache", "io"):  # they need O_DIRECT, which not every file system of overlays has
        driver.attrib.pop(key, None)
    ET.SubElement(disk, "source", file=str(overlay))
    # Said in full, as libvirt would find it out by itself, and would give it away.
    below = ET.SubElement(disk, "backingStore", type="file")
    ET.SubElement(below, "format", type=format)
    ET.SubElement(below, "source", file=str(path))
    ET.SubElement(below, "backingStore")
