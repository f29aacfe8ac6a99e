"""dhcpcd's configuration, which gives cards static addresses too (Raspberry Pi OS and others)."""

from __future__ import annotations

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card, card_or_glob

PATHS = ("/etc/dhcpcd.conf", "/usr/local/etc/dhcpcd.conf")


def interfaces(text: str, file: str) -> tuple[Interface, ...]:
    """The cards that have a block of their own, and those that dhcpcd is to keep to, or to keep off.

    The file may be there without a dhcpcd that runs.
    """
    found: dict[Interface, None] = {}
    for line in text.split("\n"):
        key, *words = line.split() or [""]
        if key == "interface" and words and (name := card(words[0])):
            found[Interface(file, name, passing=True)] = None
        elif key in ("allowinterfaces", "denyinterfaces"):
            names = (card_or_glob(name) for word in words for name in word.split(","))
            found |= dict.fromkeys(
                Interface(file, name, excluded=key[0] == "d", passing=True) for name in names if name
            )
    return tuple(found)
