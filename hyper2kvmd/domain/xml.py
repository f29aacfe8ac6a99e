"""The libvirt domain of a migrated VM, as XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable

from hyper2kvmd.domain.machine import needs_remapping, topology
from hyper2kvmd.domain.model import Domain, DomainNic, GuestSystem, attachment
from hyper2kvmd.domain.osinfo import osinfo_id

METADATA_NAMESPACE = "urn:hyper2kvmd:domain:1"
OSINFO_NAMESPACE = "http://libosinfo.org/xmlns/libvirt/domain/1.0"
SCSI_TARGETS = 256  # of one virtio-scsi controller
SERIAL_LENGTH = 20  # what virtio-blk and SATA have room for
TEXT_LENGTH = 4096  # more of an annotation than anybody reads in virt-manager
# What XML 1.0 cannot hold, and what is there to harm the terminal on which it is shown.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

ET.register_namespace("h2k", METADATA_NAMESPACE)
ET.register_namespace("libosinfo", OSINFO_NAMESPACE)


def to_xml(domain: Domain) -> str:
    """The domain as libvirt XML. Raise ValueError if a NIC's target is none."""
    windows = domain.guest is not None and domain.guest.type == "windows"
    # Enlightenments are KVM's; emulation has none.
    hyperv = windows and domain.virt_type == "kvm"

    root = ET.Element("domain", type=domain.virt_type)
    _text(root, "name", domain.name)
    _text(root, "uuid", domain.uuid)
    _text(root, "title", " ".join(_printable(domain.title).split()) or domain.name)
    if description := _printable(domain.description).strip():
        _text(root, "description", description)
    _metadata(root, domain)
    _text(root, "memory", str(domain.memory_mib), unit="MiB")
    _text(root, "vcpu", str(domain.cpus))
    threaded = bool({"virtio", "scsi"} & domain.machine.buses(len(domain.disks)))
    if threaded:
        _text(root, "iothreads", "1")
    _firmware(root, domain)
    remaps = needs_remapping(domain.cpus, domain.cores_per_socket)
    _features(root, secure_boot=domain.firmware == "uefi" and domain.secure_boot, hyperv=hyperv, remaps=remaps)
    _cpu(root, domain)
    _clock(root, domain.guest if windows else None, hyperv=hyperv)

    devices = ET.SubElement(root, "devices")
    _disks(devices, domain)
    for nic in domain.nics:
        _nic(devices, nic, domain.machine.cards)
    serial = ET.SubElement(devices, "serial", type="pty")
    ET.SubElement(serial, "target", port="0")
    console = ET.SubElement(devices, "console", type="pty")
    ET.SubElement(console, "target", type="serial", port="0")
    channel = ET.SubElement(devices, "channel", type="unix")
    ET.SubElement(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    ET.SubElement(devices, "input", type="tablet", bus="usb")
    ET.SubElement(devices, "graphics", type="vnc", port="-1", autoport="yes", listen="127.0.0.1")
    # Every guest and both firmwares can draw on VGA; virtio needs a driver that old guests do not have.
    ET.SubElement(ET.SubElement(devices, "video"), "model", type="vga")
    if domain.tpm:
        tpm = ET.SubElement(devices, "tpm", model="tpm-crb" if domain.machine.type == "q35" else "tpm-tis")
        ET.SubElement(tpm, "backend", type="emulator", version="2.0")
    rng = ET.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    if remaps:
        ET.SubElement(ET.SubElement(devices, "iommu", model="intel"), "driver", intremap="on", eim="on")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def job_of(xml: str) -> str | None:
    """The job that made a domain, read from its XML; None if it is not one of ours."""
    record = ET.fromstring(xml).find(f"metadata/{{{METADATA_NAMESPACE}}}migration")
    return None if record is None else record.get("job")


def _metadata(root: ET.Element, domain: Domain) -> None:
    """Whose domain it is, which is how we know it again, and what runs in it, which virt-manager wants to know."""
    metadata = ET.SubElement(root, "metadata")
    record = ET.SubElement(metadata, f"{{{METADATA_NAMESPACE}}}migration", job=domain.job)
    for key, value in domain.source.items():
        _text(record, f"{{{METADATA_NAMESPACE}}}{key}", _printable(value))
    for key, value in domain.tags.items():
        _text(record, f"{{{METADATA_NAMESPACE}}}tag", _printable(value), name=_printable(key))
    if domain.guest is not None and (id := osinfo_id(domain.guest)):
        osinfo = ET.SubElement(metadata, f"{{{OSINFO_NAMESPACE}}}libosinfo")
        ET.SubElement(osinfo, f"{{{OSINFO_NAMESPACE}}}os", id=id)


def _firmware(root: ET.Element, domain: Domain) -> None:
    """libvirt chooses loader and NVRAM by what is asked of them: naming a loader as well is an error."""
    uefi = domain.firmware == "uefi"
    system = ET.SubElement(root, "os", {"firmware": "efi"} if uefi else {})
    _text(system, "type", "hvm", arch="x86_64", machine=domain.machine.type)
    if uefi:
        firmware = ET.SubElement(system, "firmware")
        secure = "yes" if domain.secure_boot else "no"
        ET.SubElement(firmware, "feature", enabled=secure, name="secure-boot")
        ET.SubElement(firmware, "feature", enabled=secure, name="enrolled-keys")


def _features(root: ET.Element, *, secure_boot: bool, hyperv: bool, remaps: bool) -> None:
    features = ET.SubElement(root, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if hyperv:
        enlightenments = ET.SubElement(features, "hyperv")
        for name in ("relaxed", "vapic", "vpindex", "synic", "stimer"):
            ET.SubElement(enlightenments, name, state="on")
        ET.SubElement(enlightenments, "spinlocks", state="on", retries="8191")
    if secure_boot:
        ET.SubElement(features, "smm", state="on")  # it guards the variables
    if remaps:
        ET.SubElement(features, "ioapic", driver="qemu")  # KVM's own does not ask the IOMMU


def _cpu(root: ET.Element, domain: Domain) -> None:
    mode = {"kvm": "host-model", "qemu": "maximum"}.get(domain.virt_type)
    cpu = ET.Element("cpu", {} if mode is None else {"mode": mode})
    if found := topology(domain.cpus, domain.cores_per_socket):
        # Some guests are licensed by the socket, and Windows clients use no more than two.
        ET.SubElement(cpu, "topology", sockets=str(found[0]), cores=str(found[1]), threads="1")
    if cpu.attrib or len(cpu):
        root.append(cpu)


def _clock(root: ET.Element, windows: GuestSystem | None, *, hyperv: bool) -> None:
    """Windows keeps local time in the hardware clock unless it was told otherwise, everybody else UTC."""
    clock = ET.SubElement(root, "clock", offset="localtime" if windows and not windows.utc else "utc")
    if windows:
        ET.SubElement(clock, "timer", name="rtc", tickpolicy="catchup")
        ET.SubElement(clock, "timer", name="pit", tickpolicy="delay")
        ET.SubElement(clock, "timer", name="hpet", present="no")
    if hyperv:
        ET.SubElement(clock, "timer", name="hypervclock", present="yes")


def _disks(devices: ET.Element, domain: Domain) -> None:
    buses = [domain.machine.bus(index) for index in range(len(domain.disks))]
    for index in range(-(-buses.count("scsi") // SCSI_TARGETS)):
        controller = ET.SubElement(devices, "controller", type="scsi", index=str(index), model="virtio-scsi")
        ET.SubElement(controller, "driver", iothread="1")
    used: Counter[str] = Counter()
    serials = _unique_serials(disk.serial for disk in domain.disks)
    for order, (disk, bus, serial) in enumerate(zip(domain.disks, buses, serials, strict=True), start=1):
        number = used[bus]
        used[bus] += 1
        element = ET.SubElement(devices, "disk", type="file", device="disk")
        # io=native needs O_DIRECT, which tmpfs and some network file systems refuse.
        caching = {"cache": "none", "io": "native"} if disk.direct_io else {}
        thread = {"iothread": "1"} if bus == "virtio" else {}
        ET.SubElement(element, "driver", {"name": "qemu", "type": disk.format, "discard": "unmap", **caching, **thread})
        ET.SubElement(element, "source", file=str(disk.path))
        ET.SubElement(element, "target", dev=device_name(number, bus), bus=bus)
        if bus == "scsi":
            # By itself libvirt puts 15 disks on a controller, and adds LSI controllers, for which OVMF has no driver.
            controller_index, target = divmod(number, SCSI_TARGETS)
            place = {"controller": str(controller_index), "bus": "0", "target": str(target), "unit": "0"}
            ET.SubElement(element, "address", {"type": "drive", **place})
        _text(element, "serial", serial)
        # Every disk has an order: OVMF connects only the devices it is told of, and /boot may be on the second.
        ET.SubElement(element, "boot", order=str(order))


def _unique_serials(serials: Iterable[str]) -> list[str]:
    """The serials cut to their length, and told apart by a number at the end where that made two equal."""
    taken: dict[str, None] = {}  # in the order given
    for serial in serials:
        cut = serial[:SERIAL_LENGTH]
        number = 1
        while cut in taken:
            number += 1
            cut = f"{serial[: SERIAL_LENGTH - 1 - len(str(number))]}-{number}"
        taken[cut] = None
    return list(taken)


def _nic(devices: ET.Element, nic: DomainNic, model: str) -> None:
    leads = attachment(nic.target)
    element = ET.SubElement(devices, "interface", type="bridge" if leads.kind == "ovs" else leads.kind)
    if leads.kind != "user":
        ET.SubElement(element, "source", {"network" if leads.kind == "network" else "bridge": leads.name})
    if leads.kind == "ovs":
        ET.SubElement(element, "virtualport", type="openvswitch")
    if leads.vlan is not None:
        ET.SubElement(ET.SubElement(element, "vlan"), "tag", id=str(leads.vlan))
    ET.SubElement(element, "mac", address=nic.mac)
    ET.SubElement(element, "model", type=model)


def device_name(index: int, bus: str) -> str:
    """vda to vdz, then vdaa (or sda, hda...): the kernel's own order."""
    letters = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return {"virtio": "vd", "ide": "hd"}.get(bus, "sd") + letters


def _printable(text: str) -> str:
    """Text of the source that XML can hold and a terminal can show, of bounded length."""
    kept = _UNPRINTABLE.sub("", text[: TEXT_LENGTH + 1].replace("\r\n", "\n"))
    return kept if len(kept) <= TEXT_LENGTH else kept[: TEXT_LENGTH - 1] + "…"


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
