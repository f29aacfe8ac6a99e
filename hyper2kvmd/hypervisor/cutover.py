"""Starts a migrated VM in the place of its source, watches it come up with its addresses, and shuts it down again."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import libvirt

from hyper2kvmd.errors import Code
from hyper2kvmd.hypervisor import boottest, reach
from hyper2kvmd.hypervisor.connection import translated

ASK_SECONDS = 5.0  # between two questions to the agent and the network
_SOURCES = (
    (libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT, "the guest agent"),
    (libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE, "a lease of libvirt's network"),
)


@dataclass
class Watched:
    """What was seen of a VM that started. `up`: by what it is known to have come up. `found`: addresses, and how."""

    outcome: Literal["verified", "unverified", "failed"] = "unverified"
    reason: str = ""
    up: str = ""
    found: dict[str, str] = field(default_factory=dict)


def start(connection: Any, uri: str, domain: Any, console: bytearray) -> None:
    """Start a domain, whose console is appended to `console` from its first character. Raise MigrationError.

    One that an earlier attempt left paused is resumed.
    """
    with translated(Code.DEFINE_FAILED, connection):
        if not domain.isActive():
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
            boottest.listen(uri, domain.UUIDString(), console)
        if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.resume()


def watch(
    connection: Any,
    domain: Any,
    console: bytearray,
    addresses: Sequence[str],
    leads: Sequence[reach.Lead],
    asker: socket.socket | None,
    seconds: float,
) -> Watched:
    """Wait until the VM has come up and all its addresses were seen, for at most `seconds`.

    leads: where its cards lead to. asker: from arp_socket(). Raise MigrationError (libvirt_unavailable).
    """
    deadline, ask_at, heard = time.monotonic() + seconds, 0.0, 0
    macs = {lead.mac for lead in leads}
    seen = Watched()
    with translated(Code.LIBVIRT_UNAVAILABLE, connection):
        while True:
            if len(console) != heard:
                heard = len(console)
                outcome, reason = boottest.judge(boottest.readable(console)) or ("", "")
                if outcome == "failed":
                    return _ended(seen, "failed", reason)
                seen.up = seen.up or reason
            if not domain.isActive():
                return _ended(seen, "failed", "it switched itself off")
            if time.monotonic() >= ask_at:
                if not seen.up and boottest.agent_answers(domain):
                    seen.up = "the guest agent answers"
                seen.found |= dict(_told(domain, addresses))
                if other := _asked(seen, addresses, leads, asker, macs):
                    return _ended(seen, "failed", other)
                ask_at = time.monotonic() + ASK_SECONDS
            missing = [address for address in addresses if address not in seen.found]
            if addresses and not missing:
                seen.up = seen.up or "it answers on the network"
            if seen.up and not missing:
                return _ended(seen, "verified", seen.up)
            if time.monotonic() > deadline:
                what = f"{', '.join(missing)} was not seen" if seen.up else "nothing shows that it came up"
                return _ended(seen, "unverified", f"{what} within {seconds:g} s")
            time.sleep(boottest.POLL_SECONDS)


def _ended(seen: Watched, outcome: Literal["verified", "unverified", "failed"], reason: str) -> Watched:
    seen.outcome, seen.reason = outcome, reason
    return seen


def _told(domain: Any, addresses: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The addresses that the guest's agent or libvirt's own DHCP server knows of, and which of the two."""
    for source, name in _SOURCES:
        with contextlib.suppress(libvirt.libvirtError):  # no agent, or no such network
            for card in domain.interfaceAddresses(source).values():
                for entry in card["addrs"] or ():
                    address = str(ipaddress.ip_address(entry["addr"]))
                    if address in addresses:
                        yield address, name


def _asked(
    seen: Watched,
    addresses: Sequence[str],
    leads: Sequence[reach.Lead],
    asker: socket.socket | None,
    macs: set[str],
) -> str:
    """Ask the network for the addresses; why that is the end of it, if another machine answers."""
    asked = [address for address in addresses if ipaddress.ip_address(address).version == 4]
    for interface in sorted({lead.interface for lead in leads if lead.interface}) if asker and asked else ():
        assert asker is not None
        try:
            answers = reach.who_has(asker, interface, asked, questions=1)
        except OSError:
            continue  # it went down meanwhile; then nobody is seen there
        for address, answering in answers.items():
            if strangers := answering - macs:
                return f"{address} is answered by {', '.join(sorted(strangers))} on {interface}, which is not this VM"
            seen.found[address] = f"it answers on {interface}"
    return ""


def shut_down(domain: Any, seconds: float, *, force: bool) -> str | None:
    """Shut a VM down from within; how it went off, None if it still runs after `seconds`.

    force: then cut its power. Raise MigrationError (libvirt_unavailable).
    """
    with translated(Code.LIBVIRT_UNAVAILABLE):
        deadline = time.monotonic() + seconds
        asked = 0.0
        while domain.isActive():
            if time.monotonic() > deadline:
                if not force:
                    return None
                domain.destroy()
                return "its power was cut"
            if time.monotonic() > asked + 30:  # a guest that still boots does not hear the first one
                with contextlib.suppress(libvirt.libvirtError):
                    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                        domain.resume()
                    domain.shutdown()
                asked = time.monotonic()
            time.sleep(boottest.POLL_SECONDS)
        return "it shut down"
