"""DHCP leases as evidence: clients tell the server their MAC address, and write down what they told."""

from __future__ import annotations

import re

from hyper2kvmd.guest.linux.fixers.network.interface import card
from hyper2kvmd.text import mac_address

_BLOCK = re.compile(r"^lease \{\n(?P<body>[^{}]*)\}", re.MULTILINE)
_INTERFACE = re.compile(r"^[ \t]{0,9}interface \"(?P<name>[^\"\n]{1,15})\";", re.MULTILINE)
# Type 1 is Ethernet. Type 255 is a DUID, which belongs to the machine and not to the card.
_IDENTIFIER = re.compile(r"^[ \t]{0,9}option dhcp-client-identifier 0?1:(?P<mac>[0-9a-fA-F:]{11,17});", re.MULTILINE)
_INTERNAL = re.compile(r"internal-[0-9a-f-]{36}-(?P<name>[A-Za-z0-9_-]{1,15})\.lease")
_CLIENT_ID = re.compile(r"^CLIENTID=01(?P<mac>[0-9a-fA-F]{12})$", re.MULTILINE)


def dhclient(text: str) -> set[tuple[str, str]]:
    """The names and MAC addresses in a file of dhclient's, also where NetworkManager runs it."""
    found = set()
    for block in _BLOCK.finditer(text):
        name, identifier = _INTERFACE.search(block["body"]), _IDENTIFIER.search(block["body"])
        if name and identifier:
            # Bytes are written without leading zeros.
            mac = mac_address(":".join(byte.zfill(2) for byte in identifier["mac"].split(":")))
            if mac and card(name["name"]):
                found.add((card(name["name"]), mac))
    return found


def internal(text: str, file: str) -> set[tuple[str, str]]:
    """The same from NetworkManager's own DHCP client, whose files have the interface in their name."""
    name, identifier = _INTERNAL.fullmatch(file.rpartition("/")[2]), _CLIENT_ID.search(text)
    if not name or not identifier or not card(name["name"]):
        return set()
    digits = identifier["mac"].lower()
    return {(card(name["name"]), ":".join(digits[at : at + 2] for at in range(0, 12, 2)))}
