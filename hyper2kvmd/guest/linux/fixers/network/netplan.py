"""Netplan's YAML files: which cards they configure, and by what."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import yaml

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card, card_or_glob
from hyper2kvmd.guest.linux.fixers.network.match import Match, Rewrite, element, is_old_driver
from hyper2kvmd.text import mac_address


def interfaces(files: Iterable[tuple[str, dict[str, Any]]]) -> tuple[Interface, ...]:
    """The cards of all files together, given by path and content in the order in which netplan reads them.

    Bonds, bridges and VLANs name the entries of `ethernets`, so that nothing is to be learned from them.
    """
    merged: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for path, content in files:
        entries = _table(_table(content.get("network")).get("ethernets"))
        for key, entry in entries.items():
            old = merged.setdefault(key, {})
            new = _table(entry)
            match = {"match": {**_table(old.get("match")), **_table(new.get("match"))}}
            merged[key] = {**old, **new, **(match if "match" in old or "match" in new else {})}
            where[key] = path
    return tuple(one for key, entry in merged.items() for one in _interfaces(where[key], key, entry))


def _interfaces(file: str, key: str, entry: dict[str, Any]) -> list[Interface]:
    match = _table(entry.get("match"))
    name, new_name, mac = (
        _text(value) for value in (match.get("name"), entry.get("set-name"), match.get("macaddress"))
    )
    address = mac_address(mac)
    if not match:  # one that is empty fits every card
        return [Interface(file, card(key))] if card(key) and "match" not in entry else []
    if address and new_name:
        return [Interface(file, card(new_name), address, pinned=True)]
    return [Interface(file, card_or_glob(name), address)]


def matches(text: str, file: str) -> tuple[Match, ...]:
    """What a file that `load` has read asks of the machine, in the entries of `ethernets` and in what it hands on."""
    found = []
    for key, entry in _ethernets(text):
        match = _node(entry, "match")
        value = _node(match, "driver")
        globs = value.value if isinstance(value, yaml.SequenceNode) else [value]
        drivers = tuple(glob.value for glob in globs if isinstance(glob, yaml.ScalarNode))
        mac = mac_address(_text(getattr(_node(match, "macaddress"), "value", None)))
        if any(map(is_old_driver, drivers)):
            what = f"driver: {', '.join(drivers)} (entry {key})"
            found.append(Match(file, what, drivers=drivers, mac=mac, changed=partial(_changed, key)))
        # A profile of NetworkManager's, whose keys are `match.path` and the like; it is NetworkManager that writes it.
        for name, value in _pairs(_node(_node(entry, "networkmanager"), "passthrough")):
            if name.value in ("match.path", "match.driver") and isinstance(value, yaml.ScalarNode):
                words = [word for word, _ in map(element, value.value.replace(";", " ").split())]
                if words and (name.value == "match.path" or any(map(is_old_driver, words))):
                    found.append(Match(file, f"{name.value}: {value.value} (entry {key})", paths=tuple(words)))
    return tuple(found)


def _changed(key: str, text: str, new: Rewrite) -> str:
    """The file with another driver in the place of the one that an entry asks for, or with a MAC address instead."""
    match = _node(dict(_ethernets(text)).get(key), "match")
    driver, value = next(pair for pair in _pairs(match) if pair[0].value == "driver")
    if new.macs and not new.known:
        return f'{text[: driver.start_mark.index]}macaddress: "{new.macs[0]}"{_end(text, value)}'
    return f"{text[: driver.end_mark.index]}: {new.driver}{_end(text, value)}"


def _ethernets(text: str) -> list[tuple[str, yaml.Node]]:
    root = yaml.compose(text, Loader=yaml.BaseLoader)
    return [(key.value, entry) for key, entry in _pairs(_node(_node(root, "network"), "ethernets"))]


def _end(text: str, node: yaml.Node) -> str:
    """What follows a node; a list in lines of its own ends, as YAML says it, only where the next begins."""
    end = node.end_mark.index
    while end > node.start_mark.index and text[end - 1] in " \n":
        end -= 1
    return text[end:]


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [(key, value) for key, value in pairs if isinstance(key, yaml.ScalarNode)]


def _node(node: yaml.Node | None, key: str) -> yaml.Node | None:
    return next((value for name, value in _pairs(node) if name.value == key), None)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
