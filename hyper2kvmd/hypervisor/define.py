"""Defines the domain when all is done, and has libvirt see its disks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import libvirt

from hyper2kvmd.domain.xml import job_of
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.hypervisor.connection import no_driver, translated
from hyper2kvmd.hypervisor.preflight import conflicts, existing_domains, is_pool_of


def define(connection: Any, xml: str, name: str, uuid: str, job: str, *, autostart: bool, start: bool) -> None:
    """Define the domain, or define it again if an earlier attempt of the same job did.

    Raise MigrationError (domain_exists, define_failed, libvirt_unavailable).
    """
    with translated(Code.DEFINE_FAILED, connection):
        for conflict in conflicts(existing_domains(connection), name, uuid, job):
            raise conflict
        domain = connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        if autostart:
            domain.setAutostart(1)
        if start and not domain.isActive():
            domain.create()


def settled_xml(domain: Any, name: str, *, secrets: bool = False) -> str:
    """The XML from which a domain of ours starts, if it is shut off.

    secrets: with the passwords in it, which have to be there when it is defined again.
    Raise MigrationError: domain_exists if it is somebody else's, busy if it runs, or is only suspended to a file.
    """
    with translated(Code.DEFINE_FAILED):
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | (libvirt.VIR_DOMAIN_XML_SECURE if secrets else 0)
        xml: str = domain.XMLDesc(flags)
        active, saved = domain.isActive(), domain.hasManagedSaveImage(0)
    if job_of(xml) is None:
        raise MigrationError(
            Code.DOMAIN_EXISTS,
            f"{name} was not made by hyper2kvmd, or has lost the metadata that says so",
            "It is left alone; `virsh edit` changes it.",
        )
    if active or saved:
        raise MigrationError(
            Code.BUSY,
            f"{name} is {'not shut off' if active else 'saved, and would go on with the hardware that it had'}",
            "Shut it down from within, and try again."
            if active
            else "Start it, shut it down from within, and try again.",
        )
    return xml


def redefine(connection: Any, domain: Any, name: str, before: str, after: str) -> None:
    """Define a domain of ours again, if it still is as `before` has it, secrets included.

    Raise MigrationError (busy, domain_exists, define_failed, libvirt_unavailable); then it is as it was.
    """
    if settled_xml(domain, name, secrets=True) != before:
        raise MigrationError(Code.BUSY, f"somebody changed {name} meanwhile; it is left as it is", "Try again.")
    with translated(Code.DEFINE_FAILED, connection):
        connection.defineXMLFlags(after, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)


def refresh_pools(connection: Any, directory: Path, pool: str | None) -> Finding | None:
    """Let libvirt see the new disks: refresh the named pool, or those of the directory. Return a warning on failure."""
    try:
        for candidate in connection.listAllStoragePools(libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE):
            if candidate.name() == pool or (pool is None and is_pool_of(candidate, directory)):
                candidate.refresh(0)
    except libvirt.libvirtError as error:
        if pool is None and no_driver(connection, error):
            return None  # a libvirt without storage pools has none to refresh
        return Finding(
            "pool_not_refreshed",
            f"libvirt did not look again at the storage pool of {directory}: {error}",
            "The domain is not affected. Run `virsh pool-refresh POOL`, so that `virsh vol-list` shows the disks.",
        )
    return None
