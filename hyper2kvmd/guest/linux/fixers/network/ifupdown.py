"""ifupdown's /etc/network/interfaces: which cards it configures, and which other files belong to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card, card_or_glob

# `hwaddress ether` is not here: it is an address to set, and says nothing about the card.
_SLAVES = {
    *("bridge_ports", "bridge-ports", "bond-slaves", "bond_slaves", "slaves"),
    *("vlan-raw-device", "vlan_raw_device"),
}
# ifupdown passes over other files in a directory, such as backups.
IN_DIRECTORY = re.compile(r"[A-Za-z0-9_-]+")
_STARTS = {"iface", "mapping", "auto", "source", "source-directory", "rename", "no-auto-down", "no-scripts", "template"}


@dataclass(frozen=True)
class Parsed:
    """What one file says. `sources` are globs of further files, and of directories, which end in a slash."""

    interfaces: tuple[Interface, ...]
    sources: tuple[str, ...]


def parse(text: str, file: str) -> Parsed:
    """Read a file. What starts an interface (auto, allow-hotplug) does not matter: a name is a name."""
    names: dict[str, None] = {}
    started: set[str] = set()
    logical: set[str] = set()  # names of stanzas, not of cards
    virtual: set[str] = set()
    sources: list[str] = []
    mapped = False
    current = ""
    for words in _lines(text):
        key, arguments = words[0], words[1:]
        starts = key in _STARTS or key.startswith("allow-")
        if starts:
            current = arguments[0] if key in ("iface", "template") and arguments else ""
        if key == "iface" and current:
            names[current] = None
        elif key == "template":
            logical.add(current)
        elif key == "mapping":
            mapped = True
        elif key == "auto" or key.startswith("allow-"):
            for word in arguments:
                name, _, stanza = word.removeprefix("/").partition("=")
                started.add(name)
                if stanza:
                    names[name] = None
                    logical.add(stanza)
        elif key == "rename":
            for word in arguments:
                name, _, new = word.removeprefix("/").partition("=")
                names[name] = None
                logical.add(new)
        elif key in ("source", "source-directory"):
            sources += [_absolute(path) + ("" if key == "source" else "/") for path in arguments if _is_plain(path)]
        elif key in _SLAVES and not starts:
            virtual.add(current)
            names |= dict.fromkeys(word for word in arguments if word not in ("none", "all", "auto", "regex"))
        elif key in ("bond-mode", "bond_mode", "tunnel-mode", "wireguard-config-path") and not starts:
            virtual.add(current)
    if mapped:  # a script chooses among the stanzas: only what is started by name is a card
        logical |= names.keys() - started
    cards = dict.fromkeys(card_or_glob(name) for name in names if name not in logical and name not in virtual)
    # A VLAN is virtual, and what it stands on is not.
    cards |= dict.fromkeys(card(name) for name in virtual if "." in name)
    return Parsed(tuple(Interface(file, name) for name in cards if name), tuple(sources))


def _lines(text: str) -> Iterator[list[str]]:
    """The words of every line that is not a comment; a backslash at its end continues a line."""
    pending = ""
    for line in text.split("\n"):
        line = line.rstrip("\r")
        if not pending and line.lstrip().startswith("#"):
            continue
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        if words := (pending + line).split():
            yield words
        pending = ""
    if words := pending.split():
        yield words


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"/etc/network/{path}"


def _is_plain(path: str) -> bool:
    """Whether a path is a glob and nothing that a shell would run or replace."""
    return bool(re.fullmatch(r"[A-Za-z0-9_./*?\[\]-]{1,200}", path))
