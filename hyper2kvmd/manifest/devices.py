"""Which devices of an OVF descriptor a migrated VM does not have, or not as they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hyper2kvmd.errors import Finding
from hyper2kvmd.manifest.elements import attribute_of, text_of
from hyper2kvmd.text import show

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_SHOWN = 20
_OTHER, _ETHERNET, _FLOPPY, _DRIVES = "1", "10", "14", ("15", "16")
# CIM's types of devices that are never there: with one of the others comes a disk, a card, or nothing that is missed.
_NEVER = {
    "7": "Fibre Channel adapter",
    "8": "iSCSI adapter",
    "9": "InfiniBand adapter",
    "11": "network adapter of another kind",
    "13": "I/O device",
    "18": "tape drive",
    "21": "serial port",
    "22": "parallel port",
    "25": "FireWire controller",
    "35": "sound card",
}
# VMware's words for what has no type of its own; the rest is shown as it is written.
_WORDS = {"passthrough": "PCI passthrough", "soundcard": "sound card", "nvdimm": "NVDIMM", "watchdog": "watchdog"}
_UNNOTICED = ("vmware.vmci", "vmware.vtpm")  # which no guest misses; which the VM gets


def left_out(items: Sequence[Element], files: Mapping[str, Element], name: str) -> list[Finding]:
    """One finding for all such devices, if there are any. `files` are the descriptor's, `name` is its own."""
    found = [words for item in items if (words := _words(item, files))]
    if not found:
        return []
    shown = ", ".join([*found[:_SHOWN], *([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])])
    return [
        Finding(
            "devices_left_out",
            f"the OVF descriptor {show(name)} has devices that the new VM does not get: {shown}",
            "If the guest does without, ignore this. Otherwise add them once it is migrated (`virsh edit`, or"
            " virt-manager); what is passed through must be a device of the new host.",
        )
    ]


def _words(item: Element, files: Mapping[str, Element]) -> str | None:
    """What a device is called that is left out; None for one that is not."""
    type, subtype = text_of(item, "ResourceType"), (text_of(item, "ResourceSubType") or "").lower()
    resource = text_of(item, "HostResource")
    name = next((f" {show(text)}" for tag in ("ElementName", "Caption") if (text := text_of(item, tag))), "")
    if type in _NEVER:
        return f"{_NEVER[type]}{name}"
    if type == _ETHERNET and "sriov" in subtype.replace("-", ""):
        return f"SR-IOV{name} (it becomes an ordinary card)"
    if type in _DRIVES and (resource is not None or subtype.endswith(".iso")):
        return f"ISO{_image(resource, files)} in the drive{name}"
    if type == _FLOPPY and (resource is not None or subtype.endswith(".image")):
        return f"floppy image{_image(resource, files)} in the drive{name}"
    if type == _OTHER and subtype and subtype not in _UNNOTICED:
        return next((word for key, word in _WORDS.items() if key in subtype), show(subtype)) + name
    return None


def _image(resource: str | None, files: Mapping[str, Element]) -> str:
    file = files.get((resource or "").rpartition("/")[2])
    href = None if file is None else attribute_of(file, "href")
    return f" {show(href.rpartition('/')[2])}" if href else ""
