"""The ifcfg files of Red Hat and SUSE: which cards they configure."""

from __future__ import annotations

import re

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card, card_or_glob
from hyper2kvmd.guest.linux.fixers.network.match import Match, Rewrite, element, from_elements
from hyper2kvmd.text import mac_address

_ASSIGNMENT = re.compile(r"[ \t]*(?:export[ \t]+)?(?P<key>[A-Z][A-Z0-9_]*)=(?P<value>\"[^\"]*\"|'[^']*'|[^\s#;]*)")
# What the network scripts and wicked pass over themselves.
_LEFTOVER = re.compile(r".*(?:~|\.(?:bak|old|orig|rpmnew|rpmorig|rpmsave|swp|scpmbackup|template))")
_MATCHES = ("MATCH_PATH", "MATCH_DRIVER")
_MATCH_LINE = re.compile(r"[ \t]*(?:MATCH_PATH|MATCH_DRIVER)=")
_SLAVES = re.compile(r"BONDING_SLAVE_?\d{0,3}|BRIDGE_PORTS|ETHERDEVICE|PHYSDEV|BOND_IFACES")
# A card, and one that is a port of Open vSwitch.
_CARDS = ("ethernet", "ovsport")
_KERNEL_NAME = re.compile(r"e(?:th|n|m)\w*\d\w*")


def redhat(text: str, file: str, *, renames: bool) -> tuple[Interface, ...]:
    """The cards of a file in /etc/sysconfig/network-scripts.

    renames: udev has Red Hat's rule that gives the name in DEVICE to the card with the address in HWADDR.
    """
    values = _values(text)
    suffix = _suffix(file)
    if suffix is None:
        return ()
    mac = mac_address(values.get("HWADDR", ""))
    matched = any(key.startswith("MATCH_") for key in values)
    # NetworkManager gives each of its profiles a UUID, and uses one without DEVICE for any card, whatever its file is
    # called (ifcfg-Wired_connection_1).
    any_card = mac or matched or ("UUID" in values and not _KERNEL_NAME.fullmatch(suffix))
    device = values.get("DEVICE", "") or ("" if any_card else suffix)
    idle = values.get("ONBOOT", "").lower() in ("no", "false")
    slaves = _slaves(values)
    virtual = (
        values.get("TYPE", "Ethernet").lower() not in _CARDS
        or values.get("DEVICETYPE", "").lower() == "team"
        or "yes" in (values.get("VLAN", "").lower(), values.get("BONDING_MASTER", "").lower())
    )
    if virtual or slaves:
        names = [*slaves, card(device) if "." in device else ""]
        return tuple(Interface(file, name, idle=idle) for name in names if name)
    name = card(device)
    if name or (mac and not device):
        return (Interface(file, name, mac, pinned=renames and bool(name and mac), idle=idle),)
    words = (element(word) for word in values.get("MATCH_INTERFACE_NAME", "").split())
    found = ((card_or_glob(word), excluded) for word, excluded in words)
    return tuple(Interface(file, name, excluded=excluded) for name, excluded in found if name)


def matches(text: str, file: str) -> tuple[Match, ...]:
    """What a file of Red Hat's asks of the machine; NetworkManager reads these keys."""
    values = _values(text)
    if _suffix(file) is None or values.get("TYPE", "Ethernet").lower() != "ethernet":
        return ()
    words = {key: [element(word) for word in values.get(key, "").split()] for key in _MATCHES}
    mac = mac_address(values.get("HWADDR", ""))

    def changed(text: str, new: Rewrite) -> str:
        lines = [line for line in text.split("\n") if not _MATCH_LINE.match(line)]
        if new.macs and not mac:
            lines.insert(0, f"HWADDR={new.macs[0].upper()}")
        if not new.macs:
            lines.insert(0, f'MATCH_DRIVER="{new.driver}"')
        return "\n".join(lines)

    return from_elements(file, words["MATCH_PATH"], words["MATCH_DRIVER"], mac, changed, _MATCHES)


def suse(text: str, file: str) -> tuple[Interface, ...]:
    """The cards of a file in /etc/sysconfig/network, whose name says which one it is for."""
    values = _values(text)
    suffix = _suffix(file)
    if suffix is None:
        return ()
    if suffix.startswith("eth-id-"):
        mac = mac_address(suffix.removeprefix("eth-id-"))
        return (Interface(file, "", mac),) if mac else ()
    virtual = any(values.get(key) for key in ("BONDING_MASTER", "BRIDGE", "ETHERDEVICE", "TUNNEL", "TEAM_RUNNER"))
    names = [*_slaves(values), "" if virtual and "." not in suffix else card(suffix)]
    idle = values.get("STARTMODE", "").lower() in ("off", "manual")
    return tuple(Interface(file, name, idle=idle) for name in dict.fromkeys(names) if name)


def _slaves(values: dict[str, str]) -> list[str]:
    words = (word for key, value in values.items() if _SLAVES.fullmatch(key) for word in value.split())
    return list(dict.fromkeys(name for word in words if (name := card(word))))


def _suffix(file: str) -> str | None:
    """What follows `ifcfg-` in the name of a file; None for backups."""
    suffix = file.rpartition("/")[2].removeprefix("ifcfg-")
    return None if _LEFTOVER.fullmatch(suffix) else suffix


def _values(text: str) -> dict[str, str]:
    found = (_ASSIGNMENT.match(line) for line in text.split("\n"))
    return {match["key"]: match["value"].strip("\"'") for match in found if match}
