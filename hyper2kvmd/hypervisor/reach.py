"""Which network of this host each card of a domain is on, and who answers to an IPv4 address there (ARP)."""

from __future__ import annotations

import ipaddress
import json
import select
import socket
import struct
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.hypervisor.connection import is_remote, translated
from hyper2kvmd.run import Tools

ASK_SECONDS = 1.0  # between two questions
QUESTIONS = 3
_ETH_P_ARP = 0x0806
_ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")  # RFC 826, in an Ethernet frame
_REQUEST, _REPLY = 1, 2
_OUTGOING = 4  # PACKET_OUTGOING of linux/if_packet.h
_NETWORK_SECONDS = 10.0
_INTERFACES = Path("/sys/class/net")


@dataclass(frozen=True)
class Lead:
    """Where a card leads to: an `interface` of this host on the same network, or `why` there is none to ask on."""

    mac: str
    interface: str | None
    why: str = ""


def arp_socket() -> socket.socket | None:
    """What questions are asked with; None for whoever may not open one (it takes CAP_NET_RAW)."""
    try:
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ARP))
    except PermissionError:
        return None


def leads(connection: Any, xml: str) -> list[Lead]:
    """Where the cards of a domain lead to, from its XML. Raise MigrationError (libvirt_unavailable, ...)."""
    remote = is_remote(connection.getURI())
    found = []
    for card in ET.fromstring(xml).iterfind("devices/interface"):
        mac, link = card.find("mac"), card.find("link")
        address = "" if mac is None else mac.get("address", "").lower()
        if link is not None and link.get("state") == "down":
            found.append(Lead(address, None, f"the cable of its card {address} is unplugged"))
        elif remote:
            found.append(Lead(address, None, "its libvirt is on another host"))
        else:
            found.append(_lead(connection, card, address))
    return found


def _lead(connection: Any, card: ET.Element, mac: str) -> Lead:
    source, kind = card.find("source"), card.get("type", "")
    names = {} if source is None else source.attrib
    if card.find("vlan") is not None or card.find("virtualport") is not None:
        return Lead(mac, None, f"its card {mac} is in a VLAN or on Open vSwitch, where this host has no place to ask")
    if kind == "bridge":
        return _uplinked(mac, names.get("bridge", ""))
    if kind == "direct":
        return Lead(mac, names.get("dev"))
    if kind == "network":
        with translated(Code.NETWORK_MISSING, connection):
            shown = ET.fromstring(connection.networkLookupByName(names.get("network", "")).XMLDesc(0))
        forward, bridge = shown.find("forward"), shown.find("bridge")
        mode = None if forward is None else forward.get("mode", "nat")
        if mode == "bridge" and bridge is not None:
            return _uplinked(mac, bridge.get("name", ""))
        if mode in ("bridge", "vepa", "private", "passthrough"):
            device = shown.find("forward/interface")
            return Lead(mac, None if device is None else device.get("dev"), "its network names no interface")
        return Lead(mac, None, f"the network {names.get('network')} is one of this host's own, where no source is")
    return Lead(mac, None, f"its card {mac} is of the type {kind}, which leads to no network of this host")


def _uplinked(mac: str, bridge: str) -> Lead:
    """The lead through a bridge. One without a port to the outside is silent whatever happens there."""
    ports = _INTERFACES / bridge / "brif"
    try:
        outside = [port for port in ports.iterdir() if not (_INTERFACES / port.name / "tun_flags").exists()]
    except OSError:
        return Lead(mac, None, f"{bridge} is no bridge of this host")
    if not outside:
        return Lead(mac, None, f"{bridge} has no port that leads out of this host")
    return Lead(mac, bridge)


def on_link(tools: Tools, interface: str, address: str) -> bool:
    """Whether the host has an address in the network of this one on the interface. Raise MigrationError."""
    shown = tools.run("ip", "-j", "-4", "addr", "show", "dev", interface, timeout=_NETWORK_SECONDS).stdout
    try:
        found = [entry for link in json.loads(shown or "[]") for entry in link.get("addr_info", [])]
        networks = [ipaddress.ip_network(f"{one['local']}/{one['prefixlen']}", strict=False) for one in found]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise MigrationError(
            Code.TOOL_FAILED, f"`ip addr show dev {interface}` said what is no JSON", "Install a newer iproute2."
        ) from None
    return any(ipaddress.ip_address(address) in network for network in networks)


def who_has(
    asker: socket.socket, interface: str, addresses: Sequence[str], questions: int = QUESTIONS
) -> dict[str, set[str]]:
    """The MAC addresses that answer to each IPv4 address on an interface's network; silent ones are left out.

    Takes `questions` times ASK_SECONDS, as two can answer. Raise OSError for an interface that is down or not there.
    """
    asker.bind((interface, _ETH_P_ARP))
    own = bytes.fromhex((_INTERFACES / interface / "address").read_text().strip().replace(":", ""))
    answers: dict[str, set[str]] = {}
    for _ in range(questions):
        for address in addresses:
            asker.send(_question(own, address))
        deadline = time.monotonic() + ASK_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            for sender, mac in _heard(asker, left):
                if sender in addresses:
                    answers.setdefault(sender, set()).add(mac)
    return answers


def _question(own: bytes, address: str) -> bytes:
    """A probe as RFC 5227 has it: from nobody's address, so that it changes no table of the network."""
    parts = (_ETH_P_ARP, 1, 0x0800, 6, 4, _REQUEST)
    return _ARP.pack(b"\xff" * 6, own, *parts, own, bytes(4), bytes(6), socket.inet_aton(address))


def _heard(asker: socket.socket, seconds: float) -> Iterator[tuple[str, str]]:
    """Who says within `seconds` that an address is its own: pairs of IPv4 and MAC address."""
    if not select.select([asker], [], [], seconds)[0]:
        return
    frame, (_, _, direction, _, _) = asker.recvfrom(2048)
    if direction == _OUTGOING or len(frame) < _ARP.size:
        return
    _, _, ethertype, hardware, protocol, _, _, operation, mac, sender, _, _ = _ARP.unpack_from(frame)
    if (ethertype, hardware, protocol) == (_ETH_P_ARP, 1, 0x0800) and operation in (_REQUEST, _REPLY):
        yield socket.inet_ntoa(sender), mac.hex(":")
