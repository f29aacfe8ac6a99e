"""Settings that the scripts of other systems read: netctl of Arch Linux, netifrc of Gentoo, rc.inet1 of Slackware."""

from __future__ import annotations

import re

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card

NETCTL = "/etc/netctl/*"
OTHERS = ("/etc/conf.d/net", "/etc/rc.d/rc.inet1.conf")
_SETTING = re.compile(
    r"^[ \t]*(?:config_(?P<name>\w{1,15})|(?:slaves|bridge)_\w{1,15}|IFNAME\[\d{1,3}\])=(?P<value>[^\n#]{0,300})",
    re.MULTILINE,
)
_PROFILE = re.compile(r"^[ \t]*(?P<key>Interface|Connection|BindsToInterfaces)=(?P<value>[^\n#]{0,300})", re.MULTILINE)


def netctl(text: str, file: str) -> tuple[Interface, ...]:
    """The card of a profile, or those that its bond, bridge or VLAN stands on."""
    said = {found["key"]: found["value"] for found in _PROFILE.finditer(text)}
    ethernet = _words(said.get("Connection", "")) == ["ethernet"]
    return _cards(file, [said.get("Interface", "") if ethernet else "", said.get("BindsToInterfaces", "")])


def others(text: str, file: str) -> tuple[Interface, ...]:
    """The cards that netifrc or rc.inet1 configures, and those that a bond or a bridge of netifrc's stands on."""
    return _cards(file, [found["name"] or found["value"] for found in _SETTING.finditer(text)])


def _words(value: str) -> list[str]:
    return re.sub(r"[()\"',]", " ", value).split()


def _cards(file: str, values: list[str]) -> tuple[Interface, ...]:
    """The files may be there without the scripts that read them."""
    names = (card(word) for value in values for word in _words(value))
    return tuple(dict.fromkeys(Interface(file, name, passing=True) for name in names if name))
