"""The libvirt domain of a migrated VM, as XML."""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

METADATA_NAMESPACE = "urn:hyper2kvmd:domain:1"
# Fixed for ever: a domain's UUID follows from it, and a job that is done again must find the domain it made.
_UUID_NAMESPACE = uuid.UUID("5f7a1c7e-2f54-4a0e-9d55-0d2b8f1f6a11")

ET.register_namespace("h2k", METADATA_NAMESPACE)


@dataclass(frozen=True)
class DomainDisk:
    """A disk of the domain. Disks are given in boot order."""

    path: Path
    format: str
    serial: str
    direct_io: bool


@dataclass(frozen=True)
class DomainNic:
    """A network interface: `target` is a libvirt network, `bridge:NAME`, or `user` (no privileges needed)."""

    mac: str
    target: str


@dataclass(frozen=True)
class Domain:
    """What the domain is made of. `virt_type` is libvirt's: kvm, qemu or test."""

    name: str
    uuid: str
    title: str
    cpus: int
    memory_mib: int
    firmware: Literal["bios", "uefi"]
    secure_boot: bool
    virt_type: str
    disks: tuple[DomainDisk, ...]
    nics: tuple[DomainNic, ...]
    job: str
    source: dict[str, str]
    compatible: bool = False  # SATA and e1000e, for a guest that is not known to have virtio


def domain_uuid(*identity: str) -> str:
    """The UUID of the domain of a source VM: the same whenever the same VM is migrated."""
    return str(uuid.uuid5(_UUID_NAMESPACE, "\0".join(identity)))


def generated_mac(domain_uuid: str, index: int) -> str:
    """A MAC address in QEMU's range that follows from the domain's UUID, so that a retry keeps it."""
    digest = uuid.uuid5(uuid.UUID(domain_uuid), f"nic{index}").bytes
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


def to_xml(domain: Domain) -> str:
    """The domain as libvirt XML."""
    root = ET.Element("domain", type=domain.virt_type)
    _text(root, "name", domain.name)
    _text(root, "uuid", domain.uuid)
    _text(root, "title", domain.title)
    record = ET.SubElement(ET.SubElement(root, "metadata"), f"{{{METADATA_NAMESPACE}}}migration", job=domain.job)
    for key, value in domain.source.items():
        _text(record, f"{{{METADATA_NAMESPACE}}}{key}", value)
    _text(root, "memory", str(domain.memory_mib), unit="MiB")
    _text(root, "vcpu", str(domain.cpus))

    # libvirt chooses loader and NVRAM by itself: naming them as well is an error on some versions.
    system = ET.SubElement(root, "os", {"firmware": "efi"} if domain.firmware == "uefi" else {})
    _text(system, "type", "hvm", arch="x86_64", machine="q35")
    if domain.firmware == "uefi":
        firmware = ET.SubElement(system, "firmware")
        secure = "yes" if domain.secure_boot else "no"
        ET.SubElement(firmware, "feature", enabled=secure, name="secure-boot")
        ET.SubElement(firmware, "feature", enabled=secure, name="enrolled-keys")

    features = ET.SubElement(root, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if domain.secure_boot and domain.firmware == "uefi":
        ET.SubElement(features, "smm", state="on")
    if domain.virt_type != "test":
        ET.SubElement(root, "cpu", mode="host-model" if domain.virt_type == "kvm" else "maximum")
    ET.SubElement(root, "clock", offset="utc")

    devices = ET.SubElement(root, "devices")
    for index, disk in enumerate(domain.disks):
        _disk(devices, disk, index, "sata" if domain.compatible else "virtio")
    for nic in domain.nics:
        _nic(devices, nic, "e1000e" if domain.compatible else "virtio")
    serial = ET.SubElement(devices, "serial", type="pty")
    ET.SubElement(serial, "target", port="0")
    console = ET.SubElement(devices, "console", type="pty")
    ET.SubElement(console, "target", type="serial", port="0")
    channel = ET.SubElement(devices, "channel", type="unix")
    ET.SubElement(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    ET.SubElement(devices, "input", type="tablet", bus="usb")
    ET.SubElement(devices, "graphics", type="vnc", port="-1", autoport="yes", listen="127.0.0.1")
    ET.SubElement(ET.SubElement(devices, "video"), "model", type="vga")
    rng = ET.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def job_of(xml: str) -> str | None:
    """The job that made a domain, read from its XML; None if it is not one of ours."""
    record = ET.fromstring(xml).find(f"metadata/{{{METADATA_NAMESPACE}}}migration")
    return None if record is None else record.get("job")


def _disk(devices: ET.Element, disk: DomainDisk, index: int, bus: str) -> None:
    element = ET.SubElement(devices, "disk", type="file", device="disk")
    # io=native needs O_DIRECT, which tmpfs and some network file systems refuse.
    caching = {"cache": "none", "io": "native"} if disk.direct_io else {}
    ET.SubElement(element, "driver", {"name": "qemu", "type": disk.format, "discard": "unmap", **caching})
    ET.SubElement(element, "source", file=str(disk.path))
    ET.SubElement(element, "target", dev=_device_name("vd" if bus == "virtio" else "sd", index), bus=bus)
    _text(element, "serial", disk.serial[:20])
    # Every disk has an order: OVMF connects only the devices it is told of, and /boot may be on the second.
    ET.SubElement(element, "boot", order=str(index + 1))


def _nic(devices: ET.Element, nic: DomainNic, model: str) -> None:
    kind, _, name = nic.target.partition(":")
    if nic.target == "user":
        element = ET.SubElement(devices, "interface", type="user")
    elif kind == "bridge" and name:
        element = ET.SubElement(devices, "interface", type="bridge")
        ET.SubElement(element, "source", bridge=name)
    else:
        element = ET.SubElement(devices, "interface", type="network")
        ET.SubElement(element, "source", network=nic.target)
    ET.SubElement(element, "mac", address=nic.mac)
    ET.SubElement(element, "model", type=model)


def _device_name(prefix: str, index: int) -> str:
    """vda to vdz, then vdaa (or sda...): the kernel's own order."""
    letters = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return prefix + letters


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
