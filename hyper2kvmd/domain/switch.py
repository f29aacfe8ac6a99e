"""Another bus for the disks of a domain that is defined; all else stays as its administrator has it."""

from __future__ import annotations

import difflib
import io
import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path

from hyper2kvmd.domain.model import DiskBus, Machine
from hyper2kvmd.domain.xml import SCSI_TARGETS, device_name

# What a machine of ours can have: a disk on USB, or a card of another model, was somebody's own choice.
_BUSES = ("virtio", "scsi", "sata", "ide")
_CARDS = ("virtio", "e1000", "e1000e")
_CONVENTIONAL = "e1000"  # the only one of them that does not fit into a slot of PCI Express
# What only virtio-blk has, as attributes of a disk's driver, and what it has not, as one of its target.
_VIRTIO_BLK = ("iothread", "ioeventfd", "event_idx", "queues", "queue_size", "iommu", "ats", "packed", "page_per_vq")
_ROTATION = "rotation_rate"
SATA_PORTS = 6  # of one controller

Place = tuple[str, str]  # a controller: its type, and its index among those of the type


def is_q35(xml: str) -> bool:
    """Whether the chipset is the one that a Windows is proved for."""
    system = ET.fromstring(xml).find("os/type")
    return system is not None and "q35" in system.get("machine", "")


def hard_disks(xml: str) -> list[tuple[Path, str]]:
    """The disks as (file or device, format), in the order in which the firmware tries them.

    Raise ValueError, with its name in the domain, for one whose data is no file and no device of this host.
    """
    found = []
    for disk in hard_disk_elements(ET.fromstring(xml)):
        path = _get(disk, "source", "file") or _get(disk, "source", "dev")
        if not path:
            raise ValueError(_get(disk, "target", "dev"))
        found.append((Path(path), _get(disk, "driver", "type") or "raw"))
    return found


def switched(xml: str, machine: Machine, *, cards: bool = True) -> str:
    """The domain with its disks on the bus of a machine, and with `cards` its network cards of the machine's model.

    Of the cards, virtio's become others, or others virtio's: who chose between those had a reason.
    Where on a bus what was changed comes to be is left to libvirt. What is so already is not touched.
    """
    root = parsed(xml)
    for devices in root.findall("devices"):
        disks = enumerate(hard_disk_elements(root))
        moved = [(disk, machine.bus(index)) for index, disk in disks if _bus(disk) != machine.bus(index)]
        emptied = {place for disk, _ in moved if (place := _controller(disk))}
        for disk, bus in moved:
            _move(disk, bus)
        _name(devices, moved)
        for controller in devices.findall("controller"):
            if _place(controller) in emptied - _used(devices):
                devices.remove(controller)
        _add_controllers(devices, [disk for disk, bus in moved if bus == "scsi"])
        if any(bus in ("virtio", "scsi") for _, bus in moved) and root.find("iothreads") is None:
            threads = ET.Element("iothreads")
            threads.text = "1"
            root.insert([*root].index(devices), threads)
        for interface in devices.findall("interface") if cards else ():
            _replace_card(interface, machine.cards)
    return ET.tostring(root, encoding="unicode") + "\n"


def parsed(xml: str) -> ET.Element:
    """The domain as a tree that is written with the prefixes that it came with."""
    for _, (prefix, uri) in ET.iterparse(io.StringIO(xml), ["start-ns"]):
        if prefix and not re.fullmatch(r"ns[0-9]+", prefix):
            ET.register_namespace(prefix, uri)
    return ET.fromstring(xml)


def difference(before: str, after: str) -> str:
    """What changes from one domain to another, as a unified diff; "" if nothing does."""
    old, new = (ET.fromstring(xml) for xml in (before, after))
    for root in (old, new):
        ET.indent(root)
    was, then = (ET.tostring(root, encoding="unicode").split("\n") for root in (old, new))
    return "\n".join(difflib.unified_diff(was, then, "now", "then", lineterm="", n=2))


def hard_disk_elements(root: ET.Element) -> list[ET.Element]:
    """The disks that a machine of ours could have, those with a place in the boot order first."""
    disks = [
        disk for disk in root.findall("devices/disk") if disk.get("device", "disk") == "disk" and _bus(disk) in _BUSES
    ]
    return sorted(disks, key=lambda disk: int(_get(disk, "boot", "order") or len(disks) + 1_000_000))


def _get(element: ET.Element, tag: str, name: str) -> str:
    """An attribute of the one child of its kind, "" if there is none."""
    child = element.find(tag)
    return "" if child is None else child.get(name, "")


def _bus(disk: ET.Element) -> str:
    return _get(disk, "target", "bus")


def _place(controller: ET.Element) -> Place:
    return controller.get("type", ""), controller.get("index", "")


def _controller(device: ET.Element) -> Place | None:
    """The controller that a device is attached to, None if it needs none, or is on the chipset's own."""
    if _get(device, "address", "type") != "drive":
        return None
    kind, index = _bus(device) or "scsi", _get(device, "address", "controller")
    return None if (kind, index) == ("sata", "0") else (kind, index)


def _used(devices: ET.Element) -> set[Place]:
    return {place for device in devices if (place := _controller(device))}


def _move(disk: ET.Element, bus: DiskBus) -> None:
    """Attach a disk to another bus, without a place on it."""
    for address in disk.findall("address"):
        disk.remove(address)
    for target in disk.findall("target"):
        target.set("bus", bus)
        target.set("dev", "")
        if bus == "virtio":
            target.attrib.pop(_ROTATION, None)
    for driver in disk.findall("driver"):
        for name in _VIRTIO_BLK:
            driver.attrib.pop(name, None)
        if bus == "virtio":
            driver.set("iothread", "1")


def _name(devices: ET.Element, moved: Iterable[tuple[ET.Element, DiskBus]]) -> None:
    """Give the disks names that nobody has, in their order.

    By its name libvirt gives a disk its place on SATA, which another may have under another name.
    """
    disks = devices.findall("disk")
    taken = {_get(disk, "target", "dev") for disk in disks}
    ports = {
        int(_get(disk, "address", "controller")) * SATA_PORTS + int(_get(disk, "address", "unit"))
        for disk in disks
        if _bus(disk) == "sata" and _get(disk, "address", "type") == "drive"
    }
    for disk, bus in moved:
        free = (number for number in itertools.count() if bus != "sata" or number not in ports)
        name = next(name for number in free if (name := device_name(number, bus)) not in taken)
        taken.add(name)
        for target in disk.findall("target"):
            target.set("dev", name)


def _add_controllers(devices: ET.Element, disks: Sequence[ET.Element]) -> None:
    """Attach disks to new virtio-scsi controllers."""
    taken = {_place(controller) for controller in devices.findall("controller")}
    free = (index for index in map(str, itertools.count()) if ("scsi", index) not in taken)
    index = ""
    for number, disk in enumerate(disks):
        target = number % SCSI_TARGETS
        if target == 0:
            index = next(free)
            controller = ET.SubElement(devices, "controller", type="scsi", index=index, model="virtio-scsi")
            ET.SubElement(controller, "driver", iothread="1")
        place = {"controller": index, "bus": "0", "target": str(target), "unit": "0"}
        ET.SubElement(disk, "address", {"type": "drive", **place})


def _replace_card(interface: ET.Element, model: str) -> None:
    """Give a network card another model; it keeps its slot, if it fits in there."""
    for element in interface.findall("model"):
        was = element.get("type", "")
        if was not in _CARDS or (was == "virtio") == (model == "virtio"):
            continue
        element.set("type", model)
        for address in interface.findall("address") if _CONVENTIONAL in (was, model) else ():
            interface.remove(address)
