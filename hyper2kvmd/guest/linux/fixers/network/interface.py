"""An Ethernet interface as a guest's configuration names it, in whatever format."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What the kernel takes as a name, and udev as a word, without what makes it an alias (eth0:1) or a VLAN (eth0.100).
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_-]{0,14})(?:[.:][A-Za-z0-9_:-]{1,15})?")
# Devices that software makes, and cards that VMware does not have. Names of one's own choice must not be among them.
_VIRTUAL = re.compile(
    r"(?:lo|br|bridge|bond|team|vlan|vxlan|macvlan|docker|virbr|lxcbr|lxdbr|veth|vnet|vmnet|tun|tap|wg|ovs|dummy|sit"
    r"|gre|ip6tnl|ppp|tailscale|cni|usb|can|ib|wlan|wl[opsx]|wwan|ww[ps])(?:[\d_-].*)?"
)
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Interface:
    """One interface that a file of the guest configures.

    name: may be a glob, and is "" where the file goes by other properties only. mac: by which the file matches, not
    one that it sets. pinned: the guest itself gives the name to that MAC address at every boot. excluded: the file is
    for every card but this one, which must be known by that name all the same. passing: the file is none that
    configures the system's network; those that do may know the card by another name, and go before it. idle: the boot
    does not start it, as files of cards that are not there any more say, too.
    """

    file: str
    name: str = ""
    mac: str | None = None
    pinned: bool = False
    excluded: bool = False
    passing: bool = False
    idle: bool = False

    @property
    def is_glob(self) -> bool:
        """Whether the name stands for many."""
        return bool(_GLOB.search(self.name))

    @property
    def minor(self) -> bool:
        """Whether the name yields to those that configure a card, and are started."""
        return self.passing or self.excluded or self.idle


def card(word: str) -> str:
    """The name of the card that a configured name stands on (`ens192.100`: ens192), or "" if it is no card's name."""
    found = _NAME.fullmatch(word)
    return found["name"] if found and not _VIRTUAL.fullmatch(found["name"]) else ""


def card_or_glob(word: str) -> str:
    """The same, but a glob is kept as it is."""
    return word if _GLOB.search(word) and len(word) <= 64 else card(word)
