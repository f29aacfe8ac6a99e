"""What must be true of libvirt before the copy begins."""

from __future__ import annotations

import contextlib
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import libvirt

from hyper2kvmd.domain.machine import needs_remapping
from hyper2kvmd.domain.model import Attachment, Domain, attachment
from hyper2kvmd.domain.xml import job_of, to_xml
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.hypervisor.connection import libvirt_version, no_driver, see_log, translated
from hyper2kvmd.hypervisor.units import unit
from hyper2kvmd.text import show

NETWORKS_FIELD = "libvirt.network_map"
POOL_FIELD = "libvirt.pool"
BRIDGE_VLANS = 11_000_000  # the version of libvirt that tags on the kernel's own bridges
EMULATED_X2APIC = 9_000_000  # the version of QEMU that emulates CPUs with numbers above 254


Warn = Callable[[Finding], None]


def preflight(
    connection: Any,
    domain: Domain,
    pool: str | None,
    directory: Path,
    *,
    start: bool = False,
    warn: Warn = lambda finding: None,
) -> list[MigrationError]:
    """Everything because of which the domain could not be defined, or could not start then.

    pool: the storage pool that the disks are to belong to, if any. directory: where the disks go; they need not exist
    yet. start: whether the domain is started at once. warn: gets what cannot be told, as a part of libvirt is not
    there. A domain that an earlier attempt of the same job defined is not in the way, unless it runs.
    Codes: domain_exists, mac_exists, network_missing, pool_missing, firmware_missing, tool_missing, define_failed.
    Raise MigrationError (libvirt_unavailable).
    """
    with translated(Code.LIBVIRT_UNAVAILABLE):
        existing = existing_domains(connection)
        return [
            *conflicts(existing, domain.name, domain.uuid, domain.job),
            *_taken_macs(existing, domain),
            *_unreachable(connection, domain, start, warn),
            *_misplaced(connection, pool, directory, warn),
            *_refused(connection, domain),
        ]


def uuid_taken(connection: Any, uuid: str, job: str) -> bool:
    """Whether a domain that this job did not make has the UUID. Raise MigrationError (libvirt_unavailable)."""
    with translated(Code.LIBVIRT_UNAVAILABLE):
        return any(other.uuid == uuid and other.job != job for other in existing_domains(connection))


@dataclass(frozen=True)
class ExistingDomain:
    """A domain that libvirt has.

    job: that which made it, None for domains that are not ours. disks: the paths of the files that it has, whether it
    runs on them or will; with what they are laid on, as far as libvirt says.
    """

    name: str
    uuid: str
    active: bool
    job: str | None
    macs: frozenset[str]
    disks: frozenset[str]


def existing_domains(connection: Any) -> list[ExistingDomain]:
    """All domains, running or not. Raise libvirtError."""
    found = []
    for domain in connection.listAllDomains():
        try:
            active, xml = bool(domain.isActive()), domain.XMLDesc(0)
            # What runs may have been given other disks for its next start.
            following = [domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)] if active else []
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:  # undefined since it was listed
                continue
            raise
        described = [ET.fromstring(text) for text in (xml, *following)]
        macs = frozenset(str(mac.get("address")).lower() for mac in described[0].findall("devices/interface/mac"))
        disks = frozenset(path for one in described for path in _disks(connection, one))
        found.append(ExistingDomain(domain.name(), domain.UUIDString(), active, job_of(xml), macs, disks))
    return found


def _disks(connection: Any, domain: ET.Element) -> Iterator[str]:
    """The files and devices that a domain's disks are, and are laid on."""
    for source in domain.findall("devices/disk//source"):
        if path := source.get("file") or source.get("dev"):
            yield path
        elif (pool := source.get("pool")) and (volume := source.get("volume")):
            with contextlib.suppress(libvirt.libvirtError):  # the pool or the volume is not there any more
                yield connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path()


def users_of(connection: Any, files: Iterable[Path]) -> list[ExistingDomain]:
    """The domains that refer to one of the files. Raise MigrationError (libvirt_unavailable)."""
    wanted = {os.path.realpath(file) for file in files}
    if not wanted:
        return []
    with translated(Code.LIBVIRT_UNAVAILABLE):
        existing = existing_domains(connection)
    return [domain for domain in existing if wanted & {os.path.realpath(disk) for disk in domain.disks}]


def runs_already(connection: Any, files: Iterable[Path], job: str) -> bool:
    """Whether the domain that this job made runs on what it published: then the import is done.

    Raise MigrationError (libvirt_unavailable).
    """
    return any(domain.active and domain.job == job for domain in users_of(connection, files))


def conflicts(existing: list[ExistingDomain], name: str, uuid: str, job: str) -> Iterator[MigrationError]:
    """Domains that have the name or the UUID, other than one that this job defined and nobody started."""
    for other in existing:
        same = (other.name, other.uuid) == (name, uuid)
        if (other.name != name and other.uuid != uuid) or (same and other.job == job and not other.active):
            continue
        what = "running" if other.active else "made by another migration" if same else "shut off"
        yield MigrationError(
            Code.DOMAIN_EXISTS,
            f"libvirt already has the domain {show(other.name)} (UUID {other.uuid}, {what});"
            f" this VM would be {show(name)} (UUID {uuid})",
            "Rename or undefine that domain, or export the VM under another name; then `hyper2kvmctl retry`.",
            field="source.vm_name",
        )


def _taken_macs(existing: list[ExistingDomain], domain: Domain) -> Iterator[MigrationError]:
    """Two VMs with one address on one network lose each other's packets."""
    for nic in domain.nics:
        for other in existing:
            if other.job != domain.job and nic.mac.lower() in other.macs:
                yield MigrationError(
                    Code.MAC_EXISTS,
                    f"the domain {show(other.name)} has the MAC address {nic.mac} of this VM",
                    "Undefine that domain if it is an older copy of this VM; else give one of the two a new MAC"
                    " address; then `hyper2kvmctl retry`.",
                    field="nics",
                )


def _unreachable(connection: Any, domain: Domain, start: bool, warn: Warn) -> Iterator[MigrationError]:
    """Networks and bridges that are not there, are not active, or cannot do what is asked of them."""
    targets = sorted({nic.target for nic in domain.nics})
    places = {target: attachment(target) for target in targets}
    networks: dict[str, Any] = {}
    known = True
    if wanted := sorted(place.name for place in places.values() if place.kind == "network"):
        try:
            networks = {network.name(): network for network in connection.listAllNetworks()}
        except libvirt.libvirtError as error:
            if not no_driver(connection, error):
                raise
            known = False
            finding = _unknown("network", f"whether there is the network {', '.join(map(show, wanted))}", error)
            if start:
                yield MigrationError(Code.NETWORK_MISSING, finding.message, finding.hint, field=finding.field)
            else:
                warn(finding)
    for target, place in places.items():
        if place.kind == "network" and not known:
            continue
        if place.kind == "network" and place.name not in networks:
            yield MigrationError(
                Code.NETWORK_MISSING,
                f"libvirt ({connection.getURI()}) has no network {show(place.name)};"
                f" it has {', '.join(sorted(networks)) or 'none'}",
                "Create the network, or set libvirt.network_map or libvirt.default_network to an existing one,"
                " to bridge:NAME, to ovs:NAME, or to user.",
                field=NETWORKS_FIELD,
            )
        elif place.kind == "network" and not networks[place.name].isActive():
            yield MigrationError(
                Code.NETWORK_MISSING,
                f"libvirt's network {show(place.name)} is not active: no VM that is connected to it can start",
                f"Run `virsh net-start {place.name}` and `virsh net-autostart {place.name}`.",
                field=NETWORKS_FIELD,
            )
        elif place.kind in ("bridge", "ovs"):
            yield from _bridge_errors(connection, place, warn)
        if place.vlan is not None and not _tags(connection, place, networks.get(place.name)):
            yield MigrationError(
                Code.NETWORK_MISSING,
                f"{show(target)}: libvirt {libvirt_version(connection)} can tag with a VLAN only on Open vSwitch",
                "Use ovs:NAME@VLAN, a bridge on top of the VLAN's own interface, or libvirt 11.",
                field=NETWORKS_FIELD,
            )


def _bridge_errors(connection: Any, place: Attachment, warn: Warn) -> Iterator[MigrationError]:
    """libvirt is asked rather than /sys, because it may run on another host."""
    wanted = "Open vSwitch bridge" if place.kind == "ovs" else "bridge"
    try:
        kind = ET.fromstring(connection.interfaceLookupByName(place.name).XMLDesc(0)).get("type")
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_INTERFACE:
            yield MigrationError(
                Code.NETWORK_MISSING,
                f"the host has no {wanted} {show(place.name)}",
                "Create it, or set libvirt.network_map or libvirt.default_network to another network or bridge.",
                field=NETWORKS_FIELD,
            )
        elif no_driver(connection, error):
            warn(_unknown("interface", f"whether the host has the {wanted} {show(place.name)}", error))
        else:
            raise
        return
    if (kind == "bridge") != (place.kind == "bridge"):
        yield MigrationError(
            Code.NETWORK_MISSING,
            f"{show(place.name)} of the host is not of the kind that {place.kind}: stands for, but of type {kind}",
            "Write bridge:NAME for a bridge of the kernel, and ovs:NAME for one of Open vSwitch.",
            field=NETWORKS_FIELD,
        )


def _unknown(part: Literal["network", "storage", "interface"], what: str, error: libvirt.libvirtError) -> Finding:
    """What cannot be told, and how it could be."""
    daemon = unit(part)
    return Finding(
        f"{part}_unknown",
        f"libvirt cannot tell {what}, as its {part} driver is not there: {error}",
        f"Install the driver (outside Debian it is the package libvirt-daemon-driver-{part}) and run `systemctl"
        f" {'restart libvirtd' if daemon == 'libvirtd' else f'enable --now {daemon}.socket'}`"
        + ("; no VM that is connected to a network of libvirt can start before." if part == "network" else "."),
        POOL_FIELD if part == "storage" else NETWORKS_FIELD,
    )


def _tags(connection: Any, place: Attachment, network: Any) -> bool:
    """Whether libvirt can give an interface there a VLAN; of a network that does not exist, nothing is said."""
    if place.kind == "ovs" or connection.getLibVersion() >= BRIDGE_VLANS:
        return True
    if place.kind == "bridge":
        return False
    if network is None:
        return True
    content = ET.fromstring(network.XMLDesc(0))
    forward = content.find("forward")
    # Network cards of the host that are handed to guests tag by themselves.
    return content.find(".//virtualport[@type='openvswitch']") is not None or (
        forward is not None and forward.get("mode") in ("hostdev", "passthrough")
    )


def _misplaced(connection: Any, pool: str | None, directory: Path, warn: Warn) -> Iterator[MigrationError]:
    """The storage pool that is named in the settings, if it is not the active one of the directory."""
    if pool is None:
        return
    try:
        pools = {candidate.name(): candidate for candidate in connection.listAllStoragePools()}
    except libvirt.libvirtError as error:
        if not no_driver(connection, error):
            raise
        warn(_unknown("storage", f"whether there is the storage pool {show(pool)}", error))
        return
    if pool not in pools:
        yield MigrationError(
            Code.POOL_MISSING,
            f"libvirt ({connection.getURI()}) has no storage pool {show(pool)};"
            f" it has {', '.join(sorted(pools)) or 'none'}",
            f"Run `virsh pool-define-as {pool} dir --target {directory}` and `virsh pool-start {pool}`,"
            " or name another pool.",
            field=POOL_FIELD,
        )
        return
    if not pools[pool].isActive():
        yield MigrationError(
            Code.POOL_MISSING,
            f"libvirt's storage pool {show(pool)} is not active",
            f"Run `virsh pool-start {pool}` and `virsh pool-autostart {pool}`.",
            field=POOL_FIELD,
        )
    if not is_pool_of(pools[pool], directory):
        yield MigrationError(
            Code.POOL_MISSING,
            f"libvirt's storage pool {show(pool)} is of {_path(pools[pool])}, the disks go to {directory}",
            "Set output_dir to the directory of the pool, or name the pool of the output directory.",
            field=POOL_FIELD,
        )


def is_pool_of(pool: Any, directory: Path) -> bool:
    """Whether a storage pool is of a directory. Raise libvirtError."""
    path = _path(pool)
    return path is not None and os.path.realpath(path) == os.path.realpath(directory)


def _path(pool: Any) -> str | None:
    return ET.fromstring(pool.XMLDesc(0)).findtext("target/path")


def _not_emulated(connection: Any, domain: Domain) -> Iterator[MigrationError]:
    """CPUs that QEMU refuses to emulate, which shows only when it is started."""
    many = needs_remapping(domain.cpus, domain.cores_per_socket)
    if domain.virt_type == "qemu" and many and connection.getVersion() < EMULATED_X2APIC:
        cores = f" and {domain.cores_per_socket} cores per socket" if domain.cores_per_socket else ""
        yield MigrationError(
            Code.DEFINE_FAILED,
            f"without KVM, the QEMU of this host starts no VM with {domain.cpus} CPUs{cores}: it emulates at most 255,"
            " and fewer if the cores of a socket are no power of two",
            "Use a host with KVM, or one with QEMU 9; or write a lower vm.cpu into the manifest.",
            field="vm.cpu",
        )


def _refused(connection: Any, domain: Domain) -> Iterator[MigrationError]:
    """What this host's libvirt and QEMU cannot give the domain: firmware, TPM, that many CPUs or devices."""
    refusal = _refusal(connection, domain)
    if refusal is None:
        yield from _not_emulated(connection, domain)
        return
    # The texts of errors differ between versions, so the culprit is found by asking for one thing at a time.
    plain = replace(domain, firmware="bios", tpm=False, cpus=1)
    cpus = _refusal(connection, replace(plain, cpus=domain.cpus))
    firmware = _refusal(connection, replace(plain, firmware=domain.firmware))
    tpm = _refusal(connection, replace(plain, tpm=domain.tpm))
    if _refusal(connection, plain) is not None or cpus is firmware is tpm is None:
        yield MigrationError(
            Code.DEFINE_FAILED,
            f"libvirt would refuse the domain: {refusal}",
            see_log(),
        )
        return
    if cpus is not None:
        can = connection.getDomainCapabilities(None, "x86_64", domain.machine.type, domain.virt_type)
        most = ET.fromstring(can).find("vcpu[@max]")
        yield MigrationError(
            Code.DEFINE_FAILED,
            f"libvirt would refuse the domain with {domain.cpus} CPUs: {cpus}",
            f"Write a vm.cpu of at most {'what this host has' if most is None else most.get('max')} into the manifest,"
            " or use a host with a newer QEMU.",
            field="vm.cpu",
        )
    else:
        yield from _not_emulated(connection, domain)
    if firmware is not None:
        kind = "UEFI firmware with Secure Boot and its keys" if domain.secure_boot else "UEFI firmware"
        yield MigrationError(
            Code.FIRMWARE_MISSING,
            f"the host has no {kind} for the VM: {firmware}",
            "Install the package ovmf (edk2-ovmf outside Debian and Ubuntu).",
            field="vm.firmware",
        )
    if tpm is not None:
        yield MigrationError(
            Code.TOOL_MISSING,
            f"the VM has a TPM, and the host has no program that emulates one: {tpm}",
            "Install the packages swtpm and swtpm-tools, and restart libvirt.",
        )


def _refusal(connection: Any, domain: Domain) -> str | None:
    """Why libvirt would not start the domain; None if it would, or cannot tell.

    It is let make QEMU's command line, for which it checks the domain, chooses the firmware and gives every device its
    place, but opens no disk and runs nothing.
    """
    try:
        connection.domainXMLToNative("qemu-argv", to_xml(domain), 0)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return None
        if not connection.isAlive():
            raise
        return str(error)
    return None
