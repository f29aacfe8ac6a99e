"""Lets libvirt's QEMU, which is another user, at disks of ours, and tries whether it can open them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shlex
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt

from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import Domain, DomainDisk
from hyper2kvmd.domain.trial import kept_ours
from hyper2kvmd.domain.xml import to_xml
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import create_file, granted, rights_of, user_name
from hyper2kvmd.hypervisor.connection import is_remote, qemu_account, translated, virt_type
from hyper2kvmd.hypervisor.units import unit

_TRIAL_BYTES = 1 << 20
_TRIAL_MIB = 64


@contextlib.contextmanager
def let_in(connection: Any, xml: str) -> Iterator[str]:
    """The domain as it can be started without its disks being given away.

    libvirt gives the disks of a domain, and all that they are laid on, to the account of its QEMU, and takes back only
    the disks. Here the account is let at them for a while instead. Raise MigrationError (libvirt_unavailable), OSError.
    """
    root = ET.fromstring(xml)
    account = qemu_account(connection, root.get("type", ""))
    if account is None:
        yield xml
        return
    with contextlib.ExitStack() as stack:
        files = []
        for disk in root.iterfind("devices/disk[@device='disk']"):
            for way, rights in (("source", os.R_OK | os.W_OK), ("backingStore/source", os.R_OK)):
                for source in disk.iterfind(way):
                    if file := source.get("file"):
                        files.append(Path(file))
                        stack.enter_context(granted(files[-1], account, rights))
        yield kept_ours(xml, files)


def check_access(connection: Any, domain: Domain, directory: Path, attempt: int, *, given_away: bool) -> None:
    """Have libvirt's QEMU, started for that and paused, open a disk in the directory of the domain's disks.

    given_away: as libvirt starts every domain; else as the boot test has it, whose disks stay ours. attempt: that of
    the job, for the name of the disk.
    Raise MigrationError (qemu_denied, define_failed, libvirt_unavailable) or OSError.
    """
    path = directory / f".trial.{domain.job}.{attempt}.partial"
    trial = replace(
        domain,
        name=f"{domain.name}.trial",
        uuid=str(uuid.uuid5(uuid.UUID(domain.uuid), "trial")),
        cpus=1,
        cores_per_socket=None,
        memory_mib=_TRIAL_MIB,
        firmware="bios",
        secure_boot=False,
        tpm=False,
        virt_type=virt_type(connection, "tcg"),  # whether KVM works is another question
        machine=machine_for(None, "bios", 1, virtio=True),
        guest=None,
        disks=(DomainDisk(path, "raw", "trial", False),),
        nics=(),
    )
    path.unlink(missing_ok=True)  # of an attempt that died
    fd = create_file(path, 0o600)
    try:
        os.truncate(fd, _TRIAL_BYTES)
        os.close(fd)
        with translated(Code.DEFINE_FAILED, connection):
            try:
                xml = to_xml(trial)
                with contextlib.nullcontext(xml) if given_away else let_in(connection, xml) as started:
                    flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY
                    connection.createXML(_without_screen(started), flags).destroy()
            except libvirt.libvirtError as error:
                if str(path) in str(error):
                    raise _denied(connection, trial, directory, error) from None
                raise
    finally:
        path.unlink(missing_ok=True)


def _without_screen(xml: str) -> str:
    """The domain without what takes a port of the host, about which nothing is asked."""
    root = ET.fromstring(xml)
    for devices in root.findall("devices"):
        for graphics in devices.findall("graphics"):
            devices.remove(graphics)
    return ET.tostring(root, encoding="unicode")


def _denied(connection: Any, domain: Domain, directory: Path, error: libvirt.libvirtError) -> MigrationError:
    """What keeps QEMU from a disk, as far as that can be told from here."""
    if is_remote(connection.getURI()) and os.strerror(errno.ENOENT) in str(error):
        hint = (
            f"Mount the storage of {directory} on that host, too, at the same path; or name a libvirt that has it, with"
            " libvirt.uri or a rule. Then `hyper2kvmctl retry`."
        )
        message = f"the libvirt {connection.getURI()} does not see what is in {directory} on this host: {error}"
        return MigrationError(Code.QEMU_DENIED, message, hint, field="libvirt.uri")
    account = qemu_account(connection, domain.virt_type)
    who, closed = "libvirt's QEMU", None
    if account is not None:
        who = f"libvirt's QEMU, which runs as {user_name(account)},"
        closed = next((place for place in _way(directory) if not rights_of(account, place) & os.X_OK), None)
    if account is not None and closed is not None:
        user = user_name(account)
        hint = (
            f"{user} may not enter {closed}. Run `setfacl -m u:{user}:x {shlex.quote(str(closed))}`, or set output_dir"
            " to another directory. Then `hyper2kvmctl retry`."
        )
    else:
        us = user_name(os.geteuid())
        hint = (
            f"See libvirt's log (`journalctl -u {unit()}`), and that of AppArmor or SELinux (`journalctl -k`). On NFS"
            f" with root_squash libvirt can give no disk to another user: set user and group to {us} in"
            " /etc/libvirt/qemu.conf and restart libvirt, or export the directory with no_root_squash."
            " Then `hyper2kvmctl retry`."
        )
    return MigrationError(
        Code.QEMU_DENIED, f"{who} cannot open a disk in {directory}: {error}", hint, field="output_dir"
    )


def _way(directory: Path) -> Iterator[Path]:
    """The directories that one goes through, from the root; those that do not exist yet are left out."""
    real = Path(os.path.realpath(directory))
    return itertools.takewhile(os.path.isdir, reversed((real, *real.parents)))
