"""Checks of libvirt: all that a domain could want of it, and one that is defined."""

from __future__ import annotations

import threading
import uuid
from dataclasses import replace
from typing import Any

import libvirt

from hyper2kvmd.ctl.doctor.diagnosis import Diagnosis, Host, output_dirs
from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import Domain, DomainDisk, DomainNic, generated_mac
from hyper2kvmd.domain.xml import to_xml
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.hypervisor.connection import connect, libvirt_version, see_log, unanswered, virt_type
from hyper2kvmd.hypervisor.define import define
from hyper2kvmd.hypervisor.disks import check_access
from hyper2kvmd.hypervisor.preflight import preflight
from hyper2kvmd.settings.model import Settings

CHECK_SECONDS = 120.0  # many questions, and QEMU is started for some; on a busy host 30 seconds were too few


def check_libvirt(host: Host, diagnosis: Diagnosis) -> str:
    """Ask in a thread: a call to a libvirt that hangs cannot be ended."""
    uri = host.settings.libvirt.uri
    if not host.settings.libvirt.import_ and not host.settings.validate_.test_boot:
        return "not used (libvirt.import is false)"
    found: list[str] = []
    theirs = Diagnosis()

    def ask() -> None:
        with theirs:
            found.append(_ask_libvirt(host.settings, theirs))

    thread = threading.Thread(target=ask, name="libvirt", daemon=True)
    thread.start()
    thread.join(CHECK_SECONDS)
    diagnosis.errors += theirs.errors
    diagnosis.warnings += theirs.warnings
    if thread.is_alive():
        raise unanswered(uri, CHECK_SECONDS)
    if not found and not theirs.errors:  # a defect must not look like silence
        raise RuntimeError("the check of libvirt failed; the trace is before this one")
    return "".join(found)


def _ask_libvirt(settings: Settings, diagnosis: Diagnosis) -> str:
    """All that would keep a domain from being defined, and then one that is."""
    with connect(settings.libvirt.uri) as connection:
        detail = f"{settings.libvirt.uri}, version {libvirt_version(connection)}"
        if not settings.libvirt.import_:
            return detail
        try:
            kind = virt_type(connection, "tcg" if settings.guest.accel == "tcg" else "kvm")
            domain = _trial(settings, kind)
            _preflight(connection, domain, settings, diagnosis)
            with diagnosis:
                _define(connection, domain)
            _reach(connection, domain, settings, diagnosis)
        except libvirt.libvirtError as error:
            raise MigrationError(Code.LIBVIRT_UNAVAILABLE, f"libvirt: {error}", see_log()) from None
    return f"{detail}; UEFI, Secure Boot and all networks are there; a domain was defined and undefined"


def _trial(settings: Settings, kind: str) -> Domain:
    """A small domain that nobody else has."""
    id = str(uuid.uuid4())
    name = f"hyper2kvmd-doctor-{id[:8]}"
    return Domain(
        name=name,
        uuid=id,
        title="hyper2kvmctl doctor",
        description="",
        cpus=1,
        cores_per_socket=None,
        memory_mib=256,
        firmware="bios",
        secure_boot=False,
        tpm=False,
        virt_type=kind,
        machine=machine_for(None, "bios", 1, virtio=True),
        guest=None,
        disks=(DomainDisk(settings.output_dir / f"{name}.qcow2", "qcow2", "disk-0", False),),
        nics=(),
        job="doctor",
        source={},
        tags={},
    )


def _preflight(connection: Any, domain: Domain, settings: Settings, diagnosis: Diagnosis) -> None:
    """What a job would check, for every network, and for both kinds of firmware."""
    targets = dict.fromkeys((settings.libvirt.default_network, *settings.libvirt.network_map.values()))
    mac = generated_mac(domain.uuid, 0)
    uefi = replace(domain, firmware="uefi")
    # One at a time: a machine has too few slots for all networks at once.
    variants = [replace(domain, nics=(DomainNic(mac, target),)) for target in targets]
    for variant in (*variants, uefi, replace(uefi, secure_boot=True)):
        diagnosis.errors += preflight(
            connection,
            variant,
            settings.libvirt.pool,
            settings.output_dir,
            start=settings.libvirt.start,
            warn=diagnosis.warnings.append,
        )
    for error in preflight(connection, replace(domain, tpm=True), None, settings.output_dir):
        if error.code is Code.TOOL_MISSING:
            message = f"VMs with a TPM cannot be migrated: {error.message}"
            diagnosis.warnings.append(replace(error.finding(), message=message))


def _define(connection: Any, domain: Domain) -> None:
    """Define a domain, which is gone in the end, whatever happens. Raise MigrationError or libvirtError."""
    try:
        define(connection, to_xml(domain), domain.name, domain.uuid, domain.job, autostart=False, start=False)
    finally:
        for found in connection.listAllDomains():
            if found.UUIDString() == domain.uuid:
                found.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)


def _reach(connection: Any, domain: Domain, settings: Settings, diagnosis: Diagnosis) -> None:
    """Have libvirt's QEMU, which is another user, open a disk in every directory that disks go to."""
    # Without either, nothing is started before somebody does it by hand.
    needed = settings.libvirt.start or settings.validate_.test_boot
    for directory in dict.fromkeys(directory for directory, _ in output_dirs(settings) if directory.is_dir()):
        for given_away in (True, False) if settings.validate_.test_boot else (True,):
            try:
                check_access(connection, domain, directory, 0, given_away=given_away)
            except OSError:
                break  # the check of the output directories says so
            except MigrationError as error:
                (diagnosis.errors.append(error) if needed else diagnosis.warnings.append(error.finding()))
                break
