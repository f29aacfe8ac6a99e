"""libvirt: what must be true before the copy begins, and defining the domain when it is done."""

from __future__ import annotations

import contextlib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import libvirt

from hyper2kvmd.domain import job_of
from hyper2kvmd.errors import Code, MigrationError


@contextlib.contextmanager
def connect(uri: str) -> Iterator[Any]:
    """A connection to libvirt, closed at the end. Raise MigrationError (libvirt_unavailable)."""
    # Without a handler of ours, libvirt prints every error to standard error besides raising it.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise MigrationError(
            Code.LIBVIRT_UNAVAILABLE,
            f"{uri}: {error}",
            "Start libvirt (`systemctl start libvirtd`), check libvirt.uri and the user's groups.",
        ) from None
    try:
        yield connection
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            connection.close()


def preflight(connection: Any, name: str, uuid: str, job: str, networks: set[str]) -> None:
    """Check that the domain can be defined: nobody has its name or UUID, its networks exist.

    A domain that an earlier attempt of the same job defined is not in the way, unless it runs.
    Raise MigrationError (domain_exists, network_missing, libvirt_unavailable).
    """
    with _translated(Code.LIBVIRT_UNAVAILABLE):
        existing = [domain for domain in connection.listAllDomains() if domain.name() == name]
        existing += [d for d in connection.listAllDomains() if d.UUIDString() == uuid and d.name() != name]
        for domain in existing:
            _refuse_foreign(domain, name, uuid, job)
        known = {network.name() for network in connection.listAllNetworks()} if networks else set()
    for network in sorted(networks - known):
        raise MigrationError(
            Code.NETWORK_MISSING,
            f"libvirt ({connection.getURI()}) has no network {network!r}; it has {', '.join(sorted(known)) or 'none'}",
            "Create the network, or set libvirt.network_map or libvirt.default_network to an existing one,"
            " to bridge:NAME, or to user.",
            field="libvirt.default_network",
        )


def version(connection: Any) -> str:
    """The version of libvirt at the other end."""
    with _translated(Code.LIBVIRT_UNAVAILABLE):
        number = connection.getLibVersion()
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def virt_type(connection: Any, accel: str) -> str:
    """The domain type to use: `accel` (kvm or tcg) if libvirt can, else what it has for x86_64."""
    with _translated(Code.LIBVIRT_UNAVAILABLE):
        capabilities = ET.fromstring(connection.getCapabilities())
    types = [str(domain.get("type")) for domain in capabilities.findall("guest/arch[@name='x86_64']/domain")]
    types = types or [str(domain.get("type")) for domain in capabilities.findall("guest/arch/domain")]
    wish = "kvm" if accel == "kvm" else "qemu"
    if wish in types or not types:
        return wish
    return types[0]


def define(connection: Any, xml: str, name: str, uuid: str, job: str, *, autostart: bool, start: bool) -> None:
    """Define the domain, or define it again if an earlier attempt of the same job did.

    Raise MigrationError (domain_exists, define_failed, libvirt_unavailable).
    """
    with _translated(Code.DEFINE_FAILED, connection):
        for domain in connection.listAllDomains():
            if domain.name() == name or domain.UUIDString() == uuid:
                _refuse_foreign(domain, name, uuid, job)
        domain = connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        if autostart:
            domain.setAutostart(1)
        if start and not domain.isActive():
            domain.create()


def _refuse_foreign(domain: Any, name: str, uuid: str, job: str) -> None:
    if domain.name() == name and domain.UUIDString() == uuid and not domain.isActive():
        if job_of(domain.XMLDesc(0)) == job:
            return
        what = "made by another migration"
    else:
        what = "running" if domain.isActive() else "shut off"
    raise MigrationError(
        Code.DOMAIN_EXISTS,
        f"libvirt already has the domain {domain.name()!r} (UUID {domain.UUIDString()}, {what});"
        f" this VM would be {name!r} (UUID {uuid})",
        "Rename or undefine that domain, or export the VM under another name; then `hyper2kvmctl retry`.",
        field="source.vm_name",
    )


@contextlib.contextmanager
def _translated(code: Code, connection: Any = None) -> Iterator[None]:
    """Turn an error of libvirt into one of ours; with a connection, one that broke is libvirt_unavailable."""
    try:
        yield
    except libvirt.libvirtError as error:
        if connection is not None and not connection.isAlive():  # restarted: it said nothing about the domain
            code = Code.LIBVIRT_UNAVAILABLE
        raise MigrationError(
            code, f"libvirt: {error}", "See libvirt's log (`journalctl -u libvirtd`) for what it did not like."
        ) from None
