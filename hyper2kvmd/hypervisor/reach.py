"""Which network of this host each card of a domain is on, and who answers to an IPv4 address there (ARP)."""

from __future__ import annotations

import ctypes
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
NEIGHBOURS = 16
_ETH_P_ALL, _ETH_P_ARP = 0x0003, 0x0806
# A program for SO_ATTACH_FILTER (linux/filter.h): load the type of the frame; if it is ARP, take all, else nothing.
_SO_ATTACH_FILTER = 26
_FILTER = struct.Struct("HBBI")
_ONLY_ARP = ((0x28, 0, 0, 12), (0x15, 0, 1, _ETH_P_ARP), (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0))
_ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")  # RFC 826, in an Ethernet frame
_REQUEST, _REPLY = 1, 2
_OUTGOING = 4  # PACKET_OUTGOING of linux/if_packet.h
_NETWORK_SECONDS = 10.0
_INTERFACES = Path("/sys/class/net")


@dataclass(frozen=True)
class Lead:
    """Where a card leads to: `interface`, what of this host is on the same network, if anything is.

    why: the reason for which silence there proves nothing about machines elsewhere; "" if there is none. ports: those
    of a bridge that lead out of this host.
    """

    mac: str
    interface: str | None
    why: str = ""
    ports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heard:
    """Who answered for an address: the MAC address, and the port of this host where the answer came in."""

    mac: str
    port: str


def arp_socket() -> socket.socket | None:
    """What questions are asked with; None for whoever may not open one (it takes CAP_NET_RAW).

    It hears the ARP of every interface: whether an answer came from a VM or from outside is a matter of the port.
    """
    try:
        asker = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    except PermissionError:
        return None
    program = ctypes.create_string_buffer(b"".join(_FILTER.pack(*step) for step in _ONLY_ARP))
    asker.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(_ONLY_ARP), ctypes.addressof(program)))
    return asker


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
        return _macvtap(mac, names.get("dev"))
    if kind == "network":
        with translated(Code.NETWORK_MISSING, connection):
            shown = ET.fromstring(connection.networkLookupByName(names.get("network", "")).XMLDesc(0))
        forward, bridge = shown.find("forward"), shown.find("bridge")
        mode = None if forward is None else forward.get("mode", "nat")
        if mode == "bridge" and bridge is not None:
            return _uplinked(mac, bridge.get("name", ""))
        if mode in ("bridge", "vepa", "private", "passthrough"):
            device = shown.find("forward/interface")
            return _macvtap(mac, None if device is None else device.get("dev"))
        own = None if bridge is None else bridge.get("name")
        return Lead(mac, own, f"the network {names.get('network')} is one of this host's own, where no source is")
    return Lead(mac, None, f"its card {mac} is of the type {kind}, which leads to no network of this host")


def _macvtap(mac: str, device: str | None) -> Lead:
    """The lead through a device of this host, to which its own guests do not answer."""
    return Lead(mac, device, "" if device else f"the network of its card {mac} names no interface of this host")


def _uplinked(mac: str, bridge: str) -> Lead:
    """The lead through a bridge. One whose ports to the outside are dead is silent whatever happens there."""
    try:
        ports = [_INTERFACES / port.name for port in (_INTERFACES / bridge / "brif").iterdir()]
    except OSError:
        return Lead(mac, None, f"{bridge} is no bridge of this host")
    outside = [port for port in ports if not (port / "tun_flags").exists()]
    if not outside:
        return Lead(mac, bridge, f"{bridge} has no port that leads out of this host")
    if not any(map(_forwards, outside)):
        return Lead(mac, bridge, f"{', '.join(port.name for port in outside)}, the way out of {bridge}, has no link")
    return Lead(mac, bridge, ports=tuple(port.name for port in outside))


def _forwards(port: Path) -> bool:
    try:
        return (port / "carrier").read_text() == "1\n" and (port / "brport/state").read_text() == "3\n"
    except OSError:  # it is down
        return False


def neighbours(tools: Tools, interface: str, address: str) -> list[str]:
    """Machines of the network that an address is in, which this host knows on the interface: routers come first.

    Empty if the host has no address in that network. Raise MigrationError.
    """
    networks = [
        ipaddress.ip_network(f"{one['local']}/{one['prefixlen']}", strict=False)
        for link in _ip(tools, "addr", "show", "dev", interface)
        for one in link.get("addr_info", ())
    ]
    known = [str(route.get("gateway", "")) for route in _ip(tools, "route", "show", "dev", interface)]
    known += [str(entry.get("dst", "")) for entry in _ip(tools, "neigh", "show", "dev", interface)]
    found = []
    for network in networks:
        if ipaddress.ip_address(address) in network:
            found += [one for one in known if one and one != address and ipaddress.ip_address(one) in network]
    return [*dict.fromkeys(found)][:NEIGHBOURS]


def _ip(tools: Tools, *words: str) -> list[dict[str, Any]]:
    """What ip(8) says, as JSON. Raise MigrationError."""
    said = tools.run("ip", "-j", "-4", *words, timeout=_NETWORK_SECONDS).stdout
    try:
        found = json.loads(said or "[]")
    except ValueError:
        raise MigrationError(
            Code.TOOL_FAILED, f"`ip -j -4 {' '.join(words)}` said what is no JSON", "Install a newer iproute2."
        ) from None
    return [entry for entry in found if isinstance(entry, dict)]


def who_has(
    asker: socket.socket,
    interface: str,
    addresses: Sequence[str],
    ports: Sequence[str] = (),
    questions: int = QUESTIONS,
) -> dict[str, set[Heard]]:
    """Who answers to each IPv4 address on an interface's network; silent ones are left out.

    ports: other interfaces of this host whose answers count, such as those of a VM. Takes `questions` times
    ASK_SECONDS, as two can answer. Raise OSError for an interface that is down or not there.
    """
    own = bytes.fromhex((_INTERFACES / interface / "address").read_text().strip().replace(":", ""))
    answers: dict[str, set[Heard]] = {}
    while select.select([asker], [], [], 0)[0]:
        asker.recv(1)  # from before the question
    for _ in range(questions):
        for address in addresses:
            asker.sendto(_question(own, address), (interface, _ETH_P_ARP))
        deadline = time.monotonic() + ASK_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            for sender, heard in _heard(asker, left):
                if sender in addresses and heard.port in (interface, *ports):
                    answers.setdefault(sender, set()).add(heard)
    return answers


def _question(own: bytes, address: str) -> bytes:
    """A probe as RFC 5227 has it: from nobody's address, so that it changes no table of the network."""
    parts = (_ETH_P_ARP, 1, 0x0800, 6, 4, _REQUEST)
    return _ARP.pack(b"\xff" * 6, own, *parts, own, bytes(4), bytes(6), socket.inet_aton(address))


def _heard(asker: socket.socket, seconds: float) -> Iterator[tuple[str, Heard]]:
    """Who says within `seconds` that an IPv4 address is its own."""
    if not select.select([asker], [], [], seconds)[0]:
        return
    frame, (port, _, direction, _, _) = asker.recvfrom(2048)
    if direction == _OUTGOING or len(frame) < _ARP.size:
        return
    _, _, ethertype, hardware, protocol, _, _, operation, mac, sender, _, _ = _ARP.unpack_from(frame)
    if (ethertype, hardware, protocol) == (_ETH_P_ARP, 1, 0x0800) and operation in (_REQUEST, _REPLY):
        yield socket.inet_ntoa(sender), Heard(mac.hex(":"), port)
