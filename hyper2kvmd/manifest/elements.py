"""Looks into the elements of an OVF descriptor, whose writers differ in their namespaces and prefixes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


def settings_of(parent: Element) -> dict[str, str]:
    """VMware's settings of the VM or of a device, which it writes as keys and values."""
    return {
        key: attribute_of(element, "value") or ""
        for element in parent
        if local_name(element.tag) in ("Config", "ExtraConfig") and (key := attribute_of(element, "key"))
    }


def by_id(root: Element, section: str, tag: str, id: str) -> dict[str, Element]:
    """The elements of a section that have an attribute `id`, by its value."""
    parent = child_of(root, section)
    found = [] if parent is None else [element for element in parent if local_name(element.tag) == tag]
    return {key: element for element in found if (key := attribute_of(element, id))}


def child_of(parent: Element, tag: str) -> Element | None:
    """The first child of a name."""
    return next((element for element in parent if local_name(element.tag) == tag), None)


def text_of(item: Element, tag: str) -> str | None:
    """The text of a child, None if there is none or it is empty."""
    child = child_of(item, tag)
    return (child.text or "").strip() or None if child is not None else None


def attribute_of(element: Element, key: str) -> str | None:
    """An attribute, whatever its prefix."""
    return next((value for name, value in element.items() if local_name(name) == key), None)


def number_of(text: str | None) -> int | None:
    """A small number; None for what is none."""
    return int(text) if text and re.fullmatch("[0-9]{1,5}", text) else None


def local_name(tag: str) -> str:
    """A name without its namespace."""
    return tag.rpartition("}")[2]
