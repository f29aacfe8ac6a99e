"""Defines the domain when all is done, and has libvirt see its disks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import libvirt

from hyper2kvmd.errors import Code, Finding
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
