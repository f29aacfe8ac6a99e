"""Starts a migrated VM in the place of its source, watches it come up with its addresses, and shuts it down again."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import libvirt

from hyper2kvmd.errors import Code
from hyper2kvmd.hypervisor import boottest, reach
from hyper2kvmd.hypervisor.connection import translated

_ANSWERS = "it answers on"
ASK_SECONDS = 5.0  # between two questions to the agent and the network


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
        if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            boottest.listen(uri, domain.UUIDString(), console)
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
    seen = Watched()
    with translated(Code.LIBVIRT_UNAVAILABLE, connection):
        taps = _taps(domain)
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
                seen.found |= dict.fromkeys(_reported(domain, addresses), "the guest agent")
                if other := _asked(seen, addresses, leads, asker, taps):
                    return _ended(seen, "failed", other)
                ask_at = time.monotonic() + ASK_SECONDS
            missing = [address for address in addresses if address not in seen.found]
            if any(how.startswith(_ANSWERS) for how in seen.found.values()):
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


def _taps(domain: Any) -> dict[str, str]:
    """The MAC addresses of the running VM's cards, by the interfaces of this host that they are plugged into."""
    found = {}
    for card in ET.fromstring(domain.XMLDesc(0)).iterfind("devices/interface"):
        target, mac = card.find("target"), card.find("mac")
        if target is not None and mac is not None:
            found[target.get("dev", "")] = mac.get("address", "").lower()
    return found


def _reported(domain: Any, addresses: Sequence[str]) -> Iterator[str]:
    """Those of the addresses that the guest has, by its agent's word."""
    with contextlib.suppress(libvirt.libvirtError):  # no agent
        for card in domain.interfaceAddresses(libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT).values():
            for entry in card["addrs"] or ():
                with contextlib.suppress(ValueError):  # a guest can say anything
                    address = str(ipaddress.ip_address(entry["addr"]))
                    if address in addresses:
                        yield address


def _asked(
    seen: Watched,
    addresses: Sequence[str],
    leads: Sequence[reach.Lead],
    asker: socket.socket | None,
    taps: Mapping[str, str],
) -> str:
    """Ask the network for the addresses; why that is the end of it, if another machine answers.

    The VM has the source's MAC addresses. So an answer counts as the VM's only where it came out of the VM itself.
    """
    asked = [address for address in addresses if ipaddress.ip_address(address).version == 4]
    if asker is None or not asked:
        return ""
    outside = {lead.interface: lead.ports for lead in leads if lead.interface}
    for interface, ports in sorted(outside.items()):
        try:
            answers = reach.who_has(asker, interface, asked, [*taps, *ports], questions=1)
        except OSError:
            continue  # it went down meanwhile; then nobody is seen there
        for address, heard in answers.items():
            ours = {one.mac for one in heard if one.port in taps}
            if others := sorted({one.mac for one in heard if one.port in ports or one.mac not in ours}):
                whose = "; that is the VM's own, so its source is on" if {*others} & {*taps.values()} else ""
                return f"{address} is answered by {', '.join(others)} on {interface}, and not by this VM{whose}"
            if ours:
                seen.found[address] = f"{_ANSWERS} {interface}"
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
