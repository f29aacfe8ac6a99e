"""Netplan's YAML files: which cards they configure, and by what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card, card_or_glob
from hyper2kvmd.text import mac_address

SIZE_LIMIT = 1 << 16
DEPTH_LIMIT = 30


def load(text: str) -> dict[str, Any] | None:
    """A file as dicts, lists and strings; None if it is not YAML or no file that a person would write.

    Aliases are refused: a few lines of them can stand for gigabytes. All scalars are strings, as YAML would read some
    MAC addresses as numbers to the base of sixty.
    """
    if len(text) > SIZE_LIMIT:
        return None
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if isinstance(event, yaml.AliasEvent) or depth > DEPTH_LIMIT:
                return None
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, OverflowError):  # the last two: an escaped character that does not exist
        return None
    if content in (None, ""):
        return {}
    return content if isinstance(content, dict) else None


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
            merged[key] = {**old, **new, "match": {**_table(old.get("match")), **_table(new.get("match"))}}
            where[key] = path
    return tuple(one for key, entry in merged.items() for one in _interfaces(where[key], key, entry))


def _interfaces(file: str, key: str, entry: dict[str, Any]) -> list[Interface]:
    match = entry["match"]
    name, new_name, mac = (
        _text(value) for value in (match.get("name"), entry.get("set-name"), match.get("macaddress"))
    )
    address = mac_address(mac)
    if not match:
        return [Interface(file, card(key))] if card(key) else []
    if address and new_name:
        return [Interface(file, card(new_name), address, pinned=True)]
    drivers = match.get("driver")
    driver = " ".join(map(_text, drivers)) if isinstance(drivers, list) else _text(drivers)
    return [Interface(file, card_or_glob(name), address, driver)]


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
