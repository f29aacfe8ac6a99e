"""Checks of libvirt: all that a domain could want of it, and one that is defined."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import re
import shlex
import socket
import stat
import threading
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt

from hyper2kvmd.ctl.doctor.diagnosis import Diagnosis, Host, output_dirs
from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import Domain, DomainDisk, DomainNic, generated_mac
from hyper2kvmd.domain.xml import to_xml
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.hypervisor.connection import ANSWER_SECONDS, connect, libvirt_version, unanswered, virt_type
from hyper2kvmd.hypervisor.define import define
from hyper2kvmd.hypervisor.preflight import preflight
from hyper2kvmd.queue.access import user_name
from hyper2kvmd.settings.model import Settings


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
    thread.join(ANSWER_SECONDS)
    diagnosis.errors += theirs.errors
    diagnosis.warnings += theirs.warnings
    if thread.is_alive():
        raise unanswered(uri)
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
            _reach(connection, settings, diagnosis)
        except libvirt.libvirtError as error:
            raise MigrationError(
                Code.LIBVIRT_UNAVAILABLE, f"libvirt: {error}", "See libvirt's log (`journalctl -u libvirtd`)."
            ) from None
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
        diagnosis.errors += preflight(connection, variant, settings.libvirt.pool, settings.output_dir)
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


def _reach(connection: Any, settings: Settings, diagnosis: Diagnosis) -> None:
    """Warn of directories that libvirt's QEMU, which is another user, cannot get to."""
    account = _qemu_account(connection)
    if account is None:
        return
    uid, gids = account
    wanted = dict.fromkeys(directory for directory, _ in output_dirs(settings))
    if settings.validate_.test_boot:
        wanted[settings.work_dir] = None
    places = dict.fromkeys(place for directory in wanted for place in _way(directory))
    for place in places:
        if not _may_enter(place, uid, gids):
            user = user_name(uid)
            diagnosis.warn(
                "qemu_kept_out",
                f"QEMU runs as {user}, who may not enter {place}: no guest whose disks lie below it can start",
                f"Run `setfacl -m u:{user}:x {shlex.quote(str(place))}`, or set output_dir to a directory that {user}"
                " can get to.",
                "output_dir",
            )


def _qemu_account(connection: Any) -> tuple[int, set[int]] | None:
    """User and groups of libvirt's QEMU; None if it is root, somebody like us, or on another host."""
    if connection.getHostname() != socket.gethostname():
        return None
    capabilities = ET.fromstring(connection.getCapabilities())
    label = capabilities.findtext("host/secmodel[model='dac']/baselabel[@type='qemu']", "")
    found = re.fullmatch(r"\+(\d+):\+(\d+)", label)
    if found is None or int(found[1]) in (0, os.geteuid()):
        return None
    uid, gid = int(found[1]), int(found[2])
    try:
        return uid, {gid, *os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)}
    except KeyError:
        return uid, {gid}


def _way(directory: Path) -> Iterable[Path]:
    """The directories that one goes through, from the root; those that do not exist yet are left out."""
    real = Path(os.path.realpath(directory))
    return itertools.takewhile(os.path.isdir, reversed((real, *real.parents)))


def _may_enter(directory: Path, uid: int, gids: set[int]) -> bool:
    """Whether a user may enter a directory, as far as its mode says; an access list may say anything else."""
    with contextlib.suppress(OSError):
        if "system.posix_acl_access" in os.listxattr(directory):
            return True
    status = directory.stat()
    bit = stat.S_IXUSR if status.st_uid == uid else stat.S_IXGRP if status.st_gid in gids else stat.S_IXOTH
    return bool(status.st_mode & bit)
