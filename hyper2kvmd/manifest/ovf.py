"""Reads the OVF descriptor that lies beside the exported disks: what the VM was, where the manifest does not say."""

from __future__ import annotations

import re
import unicodedata
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import defusedxml
from defusedxml import ElementTree
from pydantic import ValidationError

from hyper2kvmd.errors import Finding
from hyper2kvmd.manifest import wire
from hyper2kvmd.manifest.devices import left_out
from hyper2kvmd.manifest.elements import attribute_of, by_id, child_of, local_name, number_of, settings_of, text_of
from hyper2kvmd.manifest.problems import PROBLEM_LIMIT
from hyper2kvmd.text import is_card_mac, mac_address, plain, show

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

SIZE_LIMIT = 1 << 20
NIC_LIMIT = 64  # VMware allows 10
ANNOTATION_LIMIT = 4096  # characters
OS_LIMIT = 100

# CIM's resource types.
_CPU, _MEMORY, _ETHERNET, _DISK = "3", "4", "10", "17"
_CONTROLLERS = {"5": "ide", "6": "scsi", "20": "sata"}
# VMware does not say in which order a guest sees controllers of different kinds. This is libvirt's for VMware's VMs,
# and therefore that of virt-v2v and Forklift.
_KINDS = ("scsi", "sata", "nvme", "ide")

_UUID = re.compile(r"(?!0{32}|f{32})[0-9a-f]{32}")  # SMBIOS has all zeros and all ones for "none"
# DSP0004's "byte * 2^20" without its spaces, and the words that writers used before it.
_UNITS = re.compile(r"(?P<word>[a-z]{1,9})(?P<factors>(?:\*[0-9]{1,4}(?:\^[0-9]{1,2})?){0,4})")
_WORDS = {
    **dict.fromkeys(("byte", "bytes"), 1),
    **dict.fromkeys(("kilobytes", "kb"), 1 << 10),
    **dict.fromkeys(("megabytes", "mb"), 1 << 20),
    **dict.fromkeys(("gigabytes", "gb"), 1 << 30),
}

# Notes a value that is not used: what it is, the value, what it must be, the manifest's field that can say it instead.
_Warn = Callable[[str, str, str, str | None], None]


class OvfError(ValueError):
    """An OVF descriptor that cannot be used. `finding` is what a person should know.

    complete: False for what is no complete XML, and may be still being written.
    """

    def __init__(self, finding: Finding, *, complete: bool = True) -> None:
        super().__init__(finding.message)
        self.finding = finding
        self.complete = complete


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
class Packing:
    """How the file of a disk is kept: its bytes, and of each of the chunks that it is cut into; its compression."""

    bytes: int | None
    chunk_bytes: int | None
    compression: str | None


@dataclass(frozen=True)
class OvfDisk:
    """A hard disk; `file` is a base name, and None for a disk without content. What is not given is None.

    controller: its model as written (lsilogic, VirtualSCSI, vmware.sata.ahci), or else its kind (ide).
    bus: the controller's number among those of its kind. unit: the disk's number on it. packing: if it has one.
    lost: the id of its file, of which the descriptor says nothing more.
    """

    file: str | None
    capacity_bytes: int | None
    controller: str | None
    bus: int | None
    unit: int | None
    packing: Packing | None = None
    lost: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What its file can be called, the likeliest first: the standard has URIs there, but not all writers do."""
        return () if self.file is None else _names(self.file)


@dataclass(frozen=True)
class OvfFile:
    """A file that the descriptor names, of a disk or not; `name` is a base name. What is not given is None."""

    name: str
    bytes: int | None
    packing: Packing | None

    @property
    def names(self) -> tuple[str, ...]:
        """What it can be called, the likeliest first."""
        return _names(self.name)


def _names(written: str) -> tuple[str, ...]:
    names = (written, unquote(written))
    return tuple(dict.fromkeys((*names, *(name.removesuffix(".gz") for name in names))))


@dataclass(frozen=True)
class Ovf:
    """What the descriptor in the file `name` says. What is not in it, or cannot be used (`warnings`), is None or empty.

    nics, disks: in the order in which the guest sees them. vm_name: of a kind that can be that of a file.
    files: all that belong to it, by its References.
    uuid: the BIOS UUID as libvirt spells it, which is not how VMware does.
    os: VMware's osType such as debian12_64Guest, or else a description.
    """

    name: str
    cpus: int | None = None
    cores_per_socket: int | None = None
    memory_mib: int | None = None
    firmware: Literal["bios", "uefi"] | None = None
    secure_boot: bool | None = None
    tpm: bool = False
    nics: tuple[OvfNic, ...] = ()
    disks: tuple[OvfDisk, ...] = ()
    uuid: str | None = None
    annotation: str = ""
    os: str | None = None
    vm_name: str | None = None
    files: tuple[OvfFile, ...] = ()
    warnings: tuple[Finding, ...] = ()


def is_descriptor(name: str) -> bool:
    """Whether a file is an OVF descriptor by its name. A hidden one is none: macOS puts `._vm.ovf` beside `vm.ovf`."""
    return name.lower().endswith(".ovf") and not name.startswith(".")


def choose(names: Iterable[str], vm_name: str) -> str | None:
    """The descriptor among an export's file names: the only one, or the one that is named like the VM; None: no OVF.

    Raise OvfError if there are several, and none or more than one of them is named so.
    """
    found = sorted(filter(is_descriptor, names))
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
    """Read a descriptor, of OVF 1.x or 2.x; `name` is its file's, for messages.

    A value that is not understood is left out, with a warning. Raise OvfError where nothing can be relied on.
    """
    if len(data) > SIZE_LIMIT:
        raise unreadable(name, f"it has {len(data)} bytes, more than the {SIZE_LIMIT} that are read")
    try:
        root = ElementTree.fromstring(data, forbid_dtd=True)
    except (ElementTree.ParseError, defusedxml.DefusedXmlException, LookupError, ValueError) as error:
        # LookupError is an encoding that Python does not know, ValueError one that cannot be had here.
        position = getattr(error, "position", None)
        where = f" at line {position[0]}, column {position[1] + 1}" if position else ""
        if isinstance(error, defusedxml.DefusedXmlException):
            raise unreadable(name, "it has a DTD") from None
        raise unreadable(name, f"it is no complete XML{where}", complete=False) from None
    if local_name(root.tag) != "Envelope":
        raise unreadable(name, f"its root element is {show(local_name(root.tag))}, not 'Envelope'")
    systems = [element for element in root.iter() if local_name(element.tag) == "VirtualSystem"]
    if len(systems) != 1:
        raise unreadable(name, f"it describes {len(systems)} virtual machines, not one")
    section = child_of(systems[0], "VirtualHardwareSection")
    if section is None:
        raise unreadable(name, "it describes no hardware: it has no VirtualHardwareSection")

    # OVF 2 has names of its own for some devices, and 1 calls all of them Item.
    items = [item for item in section if local_name(item.tag) in ("Item", "StorageItem", "EthernetPortItem")]
    warnings = left_out(items, by_id(root, "References", "File", "id"), name)

    def warn(what: str, value: str, hint: str, field: str | None) -> None:
        if len(warnings) < PROBLEM_LIMIT:
            message = f"the OVF descriptor {show(name)} gives {value} as {what}: it was not used"
            warnings.append(Finding("ovf_value", message, hint, field))

    config = settings_of(section)
    cpus, cores_per_socket = _cpus(_items(items, _CPU), warn)
    return Ovf(
        name=name,
        cpus=cpus,
        cores_per_socket=cores_per_socket,
        memory_mib=_memory_mib(_items(items, _MEMORY), warn),
        firmware=_firmware(config.get("firmware"), warn),
        secure_boot=_secure_boot(config.get("bootOptions.efiSecureBootEnabled"), warn),
        tpm=any(text_of(item, "ResourceSubType") == "vmware.vtpm" for item in items),
        nics=_nics(_items(items, _ETHERNET), name, warn),
        disks=_disks(root, items, warn),
        uuid=_uuid(config.get("uuid") or config.get("uuid.bios"), warn),
        annotation=_annotation(systems[0]),
        os=_os(systems[0]),
        vm_name=_vm_name(systems[0]),
        files=_referenced(root),
        warnings=tuple(warnings),
    )


def _items(items: list[Element], resource_type: str) -> list[Element]:
    """The devices of one type.

    A device that belongs to another choice of hardware ("configuration") than the default is not told apart.
    """
    return [item for item in items if text_of(item, "ResourceType") == resource_type]


def _cpus(items: list[Element], warn: _Warn) -> tuple[int | None, int | None]:
    """The number of CPUs and that of cores per socket. Where there are alternatives, the first is the usual one."""
    if not items:
        return None, None
    quantity, cores = text_of(items[0], "VirtualQuantity"), text_of(items[0], "CoresPerSocket")
    cpus = number_of(quantity)
    if quantity and cpus is None:
        warn("the number of CPUs", show(quantity), "Write it into the manifest's vm.cpu.", "vm.cpu")
    cores_per_socket = number_of(cores)
    if cores and cores_per_socket is None:
        warn("the cores per socket", show(cores), "Correct it in the descriptor: it must be a number.", None)
    return cpus, cores_per_socket or None  # 0 is vSphere's for "choose"


def _memory_mib(items: list[Element], warn: _Warn) -> int | None:
    quantity = text_of(items[0], "VirtualQuantity") if items else None
    if quantity is None:
        return None
    units = text_of(items[0], "AllocationUnits")
    size = _bytes(quantity, units)
    if size is None:
        hint = "Write it into the manifest's vm.mem_gb. Units that are known are such as 'byte * 2^20'."
        given = f"{show(quantity)} in {show(units)}" if units else f"{show(quantity)} without units"
        warn("the memory", given, hint, "vm.mem_gb")
        return None
    return size >> 20


def _firmware(value: str | None, warn: _Warn) -> Literal["bios", "uefi"] | None:
    match (value or "").lower():
        case "":
            return None
        case "bios":
            return "bios"
        case "efi":
            return "uefi"
    warn("the firmware", show(value), "Write it into the manifest's vm.firmware: bios or uefi.", "vm.firmware")
    return None


def _secure_boot(value: str | None, warn: _Warn) -> bool | None:
    match (value or "").lower():
        case "":
            return None
        case "true":
            return True
        case "false":
            return False
    warn("Secure Boot", show(value), "Write it into the manifest's vm.secure_boot: true or false.", "vm.secure_boot")
    return None


def _uuid(text: str | None, warn: _Warn) -> str | None:
    if not text:
        return None
    digits = re.sub("[ -]", "", text).lower()
    if not _UUID.fullmatch(digits):
        warn("the BIOS UUID", show(text), "Correct it in the descriptor: it must have 32 hexadecimal digits.", None)
        return None
    # VMware prints the bytes as they lie in SMBIOS, as "56 4d a6 d2 17 06 63 43-..." or as 564da6d2-1706-6343-...
    # SMBIOS has the first three fields in little-endian, and libvirt's UUID is put there so: the guest finds the same
    # bytes if libvirt is told d2a64d56-0617-4363-... That is also what a guest on hardware version 13 or later prints;
    # with the SMBIOS 2.4 of older hardware Linux, but not Windows, prints VMware's spelling.
    return str(uuid.UUID(bytes_le=bytes.fromhex(digits)))


def _annotation(system: Element) -> str:
    section = child_of(system, "AnnotationSection")
    text = (text_of(section, "Annotation") if section is not None else None) or ""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")[:ANNOTATION_LIMIT]


def _os(system: Element) -> str | None:
    section = child_of(system, "OperatingSystemSection")
    if section is None:
        return None
    name = attribute_of(section, "osType") or text_of(section, "Description") or attribute_of(section, "id")
    return plain(name, OS_LIMIT) if name else None


def _vm_name(system: Element) -> str | None:
    name = text_of(system, "Name") or attribute_of(system, "id")
    try:
        return None if name is None else wire.Source(vm_name=name).vm_name
    except ValidationError:
        return None


def _nics(items: list[Element], name: str, warn: _Warn) -> tuple[OvfNic, ...]:
    if len(items) > NIC_LIMIT:
        raise unreadable(name, f"it has {len(items)} network adapters, more than {NIC_LIMIT}")
    nics = tuple(_nic(item, warn) for item in _in_order(items))
    macs = [nic.mac for nic in nics if nic.mac]
    if twice := next((mac for mac in macs if macs.count(mac) > 1), None):
        raise unreadable(name, f"two network adapters have the MAC address {twice}")
    return nics


def _in_order(items: list[Element]) -> list[Element]:
    """The adapters by their number on the parent, where each has its own; vCloud does not list them in that order."""
    numbers = [number_of(text_of(item, "AddressOnParent")) for item in items]
    if None in numbers or len(set(numbers)) < len(items):
        return items
    return [item for _, item in sorted(zip(numbers, items, strict=True), key=lambda pair: pair[0] or 0)]


def _nic(item: Element, warn: _Warn) -> OvfNic:
    address = text_of(item, "Address")
    return OvfNic(
        mac=_mac(address, warn) if address else None,
        network=text_of(item, "Connection"),
        model=text_of(item, "ResourceSubType"),
        pci_slot=number_of(settings_of(item).get("slotInfo.pciSlotNumber")),
    )


def _mac(text: str, warn: _Warn) -> str | None:
    mac = mac_address(text)
    if mac is None or not is_card_mac(mac):
        warn("the MAC address of a network adapter", show(text), "Write it into the manifest's nics.", "nics")
        return None
    return mac


def _disks(root: Element, items: list[Element], warn: _Warn) -> tuple[OvfDisk, ...]:
    """The hard disks by their controller's kind and number, and their number on it; else as listed.

    vSphere does not list controllers in order: scsi3 can come before scsi0, and ide1 always comes before ide0.
    """
    files = by_id(root, "References", "File", "id")
    disks = by_id(root, "DiskSection", "Disk", "diskId")
    controllers = {
        number: item
        for item in items
        if text_of(item, "ResourceType") in _CONTROLLERS and (number := text_of(item, "InstanceID"))
    }
    found: list[tuple[tuple[int, int, int], OvfDisk]] = []
    for item in _items(items, _DISK):
        disk, file, packing, lost = _backing(item, disks, files, warn)
        bus, kind, model = _controller(controllers.get(text_of(item, "Parent") or ""))
        unit = number_of(text_of(item, "AddressOnParent"))
        if disk is not None:
            quantity, units = attribute_of(disk, "capacity"), attribute_of(disk, "capacityAllocationUnits") or "byte"
        else:
            quantity, units = text_of(item, "VirtualQuantity"), text_of(item, "AllocationUnits") or "byte"
        capacity = _bytes(quantity, units)
        if quantity and capacity is None:
            hint = "Correct it in the descriptor: it must be a number, and units such as 'byte * 2^30'."
            warn("the capacity of a disk", f"{show(quantity)} in {show(units)}", hint, None)
        rank = _KINDS.index(kind) if kind else len(_KINDS)
        found.append(((rank, _last(bus), _last(unit)), OvfDisk(file, capacity, model, bus, unit, packing, lost)))
    return tuple(disk for _, disk in sorted(found, key=lambda pair: pair[0]))


def _backing(
    item: Element, disks: dict[str, Element], files: dict[str, Element], warn: _Warn
) -> tuple[Element | None, str | None, Packing | None, str | None]:
    """What a disk is made of: its entry in the DiskSection, the base name and packing of its file, the id if lost."""
    resource = text_of(item, "HostResource")
    if resource is None:
        return None, None, None, None
    id = resource.rpartition("/")[2]  # of ovf:/disk/ID or ovf:/file/ID
    disk = disks.get(id)
    reference = id if disk is None else attribute_of(disk, "fileRef")
    if reference is None:
        return disk, None, None, None
    href = attribute_of(files[reference], "href") if reference in files else None
    if href is None:
        warn("the content of a disk", show(reference), "Export the VM again: the descriptor has no such file.", None)
        return disk, None, None, reference
    return disk, href.rpartition("/")[2], _packing(files[reference], warn), None


def _referenced(root: Element) -> tuple[OvfFile, ...]:
    """The files by their names, each once."""
    found: dict[str, OvfFile] = {}
    for file in by_id(root, "References", "File", "id").values():
        name = (attribute_of(file, "href") or "").rpartition("/")[2]
        if name:
            # What is wrong with how a disk is packed is said where the disks are read.
            packing = _packing(file, lambda *_: None)
            found.setdefault(name, OvfFile(name, _bytes(attribute_of(file, "size"), "byte"), packing))
    return tuple(found.values())


def _packing(file: Element, warn: _Warn) -> Packing | None:
    chunk, compression = attribute_of(file, "chunkSize"), attribute_of(file, "compression")
    if compression in (None, "", "identity"):
        compression = None
    if chunk is None and compression is None:
        return None
    chunk_bytes = _bytes(chunk, "byte")
    if chunk is not None and not chunk_bytes:
        warn(
            "the size of the chunks of a file", show(chunk), "Correct it in the descriptor: it must be a number.", None
        )
    return Packing(_bytes(attribute_of(file, "size"), "byte"), chunk_bytes or None, compression)


def _controller(item: Element | None) -> tuple[int | None, str | None, str | None]:
    """The number, the kind (one of _KINDS) and the model of a controller."""
    if item is None:
        return None, None, None
    kind = _CONTROLLERS[text_of(item, "ResourceType") or ""]
    model = text_of(item, "ResourceSubType") or kind
    if "nvme" in model.lower():  # of SATA's resource type
        kind = "nvme"
    return number_of(text_of(item, "Address")), kind, model


def _last(number: int | None) -> int:
    """A number to sort by; None comes last."""
    return 1 << 20 if number is None else number


def _bytes(quantity: str | None, units: str | None) -> int | None:
    """An amount in bytes, None if it is not understood."""
    found = _UNITS.fullmatch("".join((units or "").split()).lower())
    if not quantity or not re.fullmatch("[0-9]{1,19}", quantity) or found is None or found["word"] not in _WORDS:
        return None
    size = int(quantity) * _WORDS[found["word"]]
    for factor in found["factors"].split("*")[1:]:
        base, _, exponent = factor.partition("^")
        size *= int(base) ** int(exponent or 1)
    return size if size < 1 << 63 else None


def unreadable(name: str, why: str, *, complete: bool = True) -> OvfError:
    """What to raise for the descriptor in the file `name`; `why` is the second half of a sentence."""
    return OvfError(
        Finding(
            "ovf_unreadable",
            f"the OVF descriptor {show(name)} was not used: {why}",
            "Export the VM again, or list its network adapters with their MAC addresses in the manifest's nics.",
            "nics",
        ),
        complete=complete,
    )
