"""Reads the OVF descriptor that lies beside the exported disks, for what the manifest leaves out: the network cards."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import defusedxml
from defusedxml import ElementTree

from hyper2kvmd.errors import Finding
from hyper2kvmd.manifest.problems import plain, show

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

SIZE_LIMIT = 1 << 20
NIC_LIMIT = 64  # VMware allows 10
_ETHERNET = "10"  # CIM's resource type
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")


class OvfError(ValueError):
    """An OVF descriptor that cannot be used. `finding` is what a person should know."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


@dataclass(frozen=True)
class OvfNic:
    """A network adapter: `mac` in lower case with colons, `network` as VMware calls it, `model` (VmxNet3, E1000).

    pci_slot: VMware's pciSlotNumber, from which Linux makes names such as ens192. What is not given is None.
    """

    mac: str | None
    network: str | None
    model: str | None
    pci_slot: int | None


@dataclass(frozen=True)
class Ovf:
    """What a descriptor says of the VM. `nics` are in the order of the VM's adapters."""

    nics: tuple[OvfNic, ...]


def choose(names: Iterable[str], vm_name: str) -> str | None:
    """The descriptor among an export's file names: the only one, or the one that is named like the VM; None: no OVF.

    Raise OvfError if there are several, and none or more than one of them is named so.
    """
    found = sorted(name for name in names if name.lower().endswith(".ovf"))
    if len(found) > 1:
        same = [name for name in found if name[: -len(".ovf")] == vm_name]
        if len(same) != 1:
            shown = ", ".join(show(name) for name in found[:5]) + (", ..." if len(found) > 5 else "")
            raise OvfError(
                Finding(
                    "ovf_ambiguous",
                    f"the export has {len(found)} OVF descriptors ({shown}), and it is not clear which is that of "
                    f"{show(vm_name)}: none was read",
                    f"Remove those of other VMs, or name this one {plain(vm_name)}.ovf.",
                )
            )
        found = same
    return found[0] if found else None


def parse(data: bytes, name: str) -> Ovf:
    """Read a descriptor, of OVF 1.x or 2.x; `name` is its file's, for messages. Raise OvfError."""
    if len(data) > SIZE_LIMIT:
        raise _unreadable(name, f"it has {len(data)} bytes, more than the {SIZE_LIMIT} that are read")
    try:
        root = ElementTree.fromstring(data, forbid_dtd=True)
    except (ElementTree.ParseError, defusedxml.DefusedXmlException, LookupError, ValueError) as error:
        # LookupError is an encoding that Python does not know, ValueError one that cannot be had here.
        position = getattr(error, "position", None)
        where = f" at line {position[0]}, column {position[1] + 1}" if position else ""
        refused = isinstance(error, defusedxml.DefusedXmlException)
        raise _unreadable(name, "it has a DTD" if refused else f"it is no complete XML{where}") from None
    if _local(root.tag) != "Envelope":
        raise _unreadable(name, f"its root element is {show(_local(root.tag))}, not 'Envelope'")
    systems = [element for element in root.iter() if _local(element.tag) == "VirtualSystem"]
    if len(systems) != 1:
        raise _unreadable(name, f"it describes {len(systems)} virtual machines, not one")
    nics = [_nic(item, name) for item in _in_order(_items(systems[0], _ETHERNET))]
    if len(nics) > NIC_LIMIT:
        raise _unreadable(name, f"it has {len(nics)} network adapters, more than {NIC_LIMIT}")
    macs = [nic.mac for nic in nics if nic.mac]
    if twice := next((mac for mac in macs if macs.count(mac) > 1), None):
        raise _unreadable(name, f"two network adapters have the MAC address {twice}")
    return Ovf(nics=tuple(nics))


def _items(system: Element, resource_type: str) -> list[Element]:
    """The devices of one type. OVF 2 calls them EthernetPortItem and the like, and 1 calls all of them Item.

    A device that belongs to another choice of hardware ("configuration") than the default is not told apart.
    """
    items = (element for element in system.iter() if _local(element.tag) in ("Item", "EthernetPortItem"))
    return [item for item in items if _value(item, "ResourceType") == resource_type]


def _in_order(items: list[Element]) -> list[Element]:
    """The adapters by their number on the parent, where each has its own; vCloud does not list them in that order."""
    numbers = [_number(_value(item, "AddressOnParent")) for item in items]
    if None in numbers or len(set(numbers)) < len(items):
        return items
    return [item for _, item in sorted(zip(numbers, items, strict=True), key=lambda pair: pair[0] or 0)]


def _nic(item: Element, name: str) -> OvfNic:
    address = _value(item, "Address")
    slots = (e for e in item if _local(e.tag) == "Config" and _attribute(e, "key") == "slotInfo.pciSlotNumber")
    return OvfNic(
        mac=_mac(address, name) if address else None,
        network=_value(item, "Connection"),
        model=_value(item, "ResourceSubType"),
        pci_slot=next((_number(_attribute(slot, "value")) for slot in slots), None),
    )


def _mac(text: str, name: str) -> str:
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise _unreadable(name, f"{show(text)} is not the MAC address of a network adapter")
    return mac


def _value(item: Element, tag: str) -> str | None:
    """The text of a device's property; writers differ in the namespace (rasd, epasd) and in their prefixes."""
    return next(((e.text or "").strip() or None for e in item if _local(e.tag) == tag), None)


def _attribute(element: Element, key: str) -> str | None:
    return next((value for name, value in element.items() if _local(name) == key), None)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 5 else None


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _unreadable(name: str, why: str) -> OvfError:
    return OvfError(
        Finding(
            "ovf_unreadable",
            f"the OVF descriptor {show(name)} was not used: {why}",
            "Export the VM again, or list its network adapters with their MAC addresses in the manifest's nics.",
            "nics",
        )
    )
