"""wicked's own XML files, which SUSE reads besides the ifcfg files."""

from __future__ import annotations

import re

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card
from hyper2kvmd.text import mac_address

PATHS = ("/etc/wicked/ifconfig/*.xml",)
SIZE_LIMIT = 1 << 16
# The files are small, and a person's: their elements are found without an XML parser, which a guest could keep busy.
_NAME = re.compile(r"<name[^>]{0,100}>(?P<name>[^<]{0,40})(?:<permanent-address>(?P<mac>[^<]{0,40}))?")


def interfaces(text: str, file: str) -> tuple[Interface, ...]:
    """The cards that a file configures: by their name, or by the address that the hardware has."""
    found: dict[Interface, None] = {}
    plain = "".join(part.partition("-->")[2] if number else part for number, part in
                    enumerate(text[:SIZE_LIMIT].split("<!--")))  # fmt: skip
    for block in plain.split("<interface")[1:]:
        name = _NAME.search(block) if block[:1] in (">", " ", "\t", "\n") else None
        if name is None:
            continue
        if name["mac"]:
            if mac := mac_address(name["mac"]):
                found[Interface(file, "", mac)] = None
        elif word := card(name["name"].strip()):
            found[Interface(file, word)] = None
    return tuple(found)
