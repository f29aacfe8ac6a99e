"""A connection to libvirt that cannot hang for ever, and its errors as ours."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import libvirt

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.hypervisor.units import unit

ANSWER_SECONDS = 30.0  # the first that is asked after its start has libvirt look at every QEMU there is


@contextlib.contextmanager
def connect(uri: str) -> Iterator[Any]:
    """A connection to libvirt, closed at the end.

    Raise MigrationError (libvirt_unavailable), also for one that does not answer within ANSWER_SECONDS.
    """
    # Without a handler of ours, libvirt prints every error to standard error besides raising it.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    opened: list[Any] = []
    refused: list[libvirt.libvirtError] = []

    def open_() -> None:
        try:
            opened.append(libvirt.open(uri))
        except libvirt.libvirtError as error:
            refused.append(error)

    # In a thread: a call to a libvirt that hangs cannot be ended, only left alone.
    thread = threading.Thread(target=open_, name="libvirt", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if refused:
        raise MigrationError(
            Code.LIBVIRT_UNAVAILABLE,
            f"{uri}: {refused[0]}",
            f"Start libvirt (`systemctl start {unit()}`); check libvirt.uri and the user's groups.",
        )
    if not opened:
        raise unanswered(uri)
    connection = opened[0]
    try:
        yield connection
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            connection.close()


def is_remote(uri: str) -> bool:
    """Whether a libvirt is reached through a network, so that its files may be others than ours."""
    return bool(urlsplit(uri).hostname)


def unanswered(uri: str, seconds: float | None = None) -> MigrationError:
    """The error of a libvirt that hangs, or did not get through a check within `seconds`."""
    return MigrationError(
        Code.LIBVIRT_UNAVAILABLE,
        f"{uri}: no answer within {seconds or ANSWER_SECONDS:g} s",
        f"Restart it: `systemctl restart {unit()}`; running guests stay as they are.",
    )


def libvirt_version(connection: Any) -> str:
    """The version of libvirt at the other end."""
    with translated(Code.LIBVIRT_UNAVAILABLE):
        number = connection.getLibVersion()
    return f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"


def qemu_account(connection: Any, virt_type: str) -> int | None:
    """The user as whom libvirt's QEMU opens disks; None if that is root, or somebody like us.

    libvirt gives a domain's disks to this user when it starts, unless it is told not to. Raise MigrationError.
    """
    with translated(Code.LIBVIRT_UNAVAILABLE, connection):
        capabilities = ET.fromstring(connection.getCapabilities())
    label = capabilities.findtext(f"host/secmodel[model='dac']/baselabel[@type='{virt_type}']", "")
    found = re.fullmatch(r"\+(\d+):\+\d+", label)
    return None if found is None or int(found[1]) in (0, os.geteuid()) else int(found[1])


def virt_type(connection: Any, accel: str) -> str:
    """The domain type to use: `accel` (kvm or tcg) if libvirt can, else what it has for x86_64."""
    with translated(Code.LIBVIRT_UNAVAILABLE):
        capabilities = ET.fromstring(connection.getCapabilities())
    types = [str(domain.get("type")) for domain in capabilities.findall("guest/arch[@name='x86_64']/domain")]
    types = types or [str(domain.get("type")) for domain in capabilities.findall("guest/arch/domain")]
    wish = "kvm" if accel == "kvm" else "qemu"
    if wish in types or not types:
        return wish
    return types[0]


@contextlib.contextmanager
def translated(code: Code, connection: Any = None) -> Iterator[None]:
    """Turn an error of libvirt into one of ours; with a connection, one that broke is libvirt_unavailable."""
    try:
        yield
    except libvirt.libvirtError as error:
        if connection is not None and not connection.isAlive():  # restarted: it said nothing about the domain
            code = Code.LIBVIRT_UNAVAILABLE
        raise MigrationError(code, f"libvirt: {error}", see_log()) from None


def see_log() -> str:
    """The remedy for what libvirt alone knows."""
    return f"See libvirt's log (`journalctl -u {unit()}`) for what it did not like."


def no_driver(connection: Any, error: libvirt.libvirtError) -> bool:
    """Whether an error says nothing of what was asked for, but that the part of libvirt that knows is not there.

    Its driver is not installed, or it is a daemon of its own, to which that of QEMU cannot connect.
    """
    code = error.get_error_code()
    if code == libvirt.VIR_ERR_SYSTEM_ERROR:
        return error.get_error_domain() == libvirt.VIR_FROM_RPC and bool(connection.isAlive())
    return code in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_NO_CONNECT)
