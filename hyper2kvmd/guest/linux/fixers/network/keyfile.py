"""The files of systemd-networkd, systemd's .link files and NetworkManager's, which share one syntax."""

from __future__ import annotations

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card, card_or_glob
from hyper2kvmd.guest.linux.fixers.network.udev import Pin
from hyper2kvmd.text import mac_address

_ETHERNET = ("ethernet", "802-3-ethernet")


def networkd(text: str, file: str) -> tuple[Interface, ...]:
    """The cards that a .network file matches."""
    match = _sections(text).get("Match", {})
    if "Kind" in match or any("ether" not in kind for kind in match.get("Type", [])):
        return ()
    driver = " ".join(_words(match, "Driver"))
    macs = [mac_address(word) for word in _words(match, "MACAddress") + _words(match, "PermanentMACAddress")]
    names = [card_or_glob(word) for word in _words(match, "Name") if not word.startswith("!")]
    names = [name for name in names if name]
    if not _words(match, "Name"):
        return tuple(Interface(file, "", mac, driver) for mac in macs or [None])
    # Which of several addresses goes with which name is not said.
    mac = macs[0] if len(macs) == len(names) == 1 else None
    return tuple(Interface(file, name, mac, driver) for name in names)


def netdev(text: str) -> str:
    """The name of the device that a .netdev file makes: a VLAN, a bridge, a bond; "" if it has none."""
    return _last(_sections(text).get("NetDev", {}), "Name")


def link(text: str, file: str) -> tuple[Pin, ...]:
    """The name that a .link file gives to a MAC address."""
    sections = _sections(text)
    match = sections.get("Match", {})
    macs = [mac_address(word) for word in _words(match, "MACAddress") + _words(match, "PermanentMACAddress")]
    name = (sections.get("Link", {}).get("Name") or [""])[-1]
    harmless = {"MACAddress", "PermanentMACAddress"}
    harmless |= {key for key, value in (("Type", "ether"), ("OriginalName", "*")) if match.get(key) == [value]}
    if not card(name) or len(macs) != 1 or macs[0] is None:
        return ()
    return (Pin(card(name), macs[0], file, holds=match.keys() <= harmless),)


def networkmanager(text: str, file: str) -> tuple[Interface, ...]:
    """The cards that a connection profile is for; those that go with any card name none."""
    sections = _sections(text)
    connection = sections.get("connection", {})
    kind = _last(connection, "type")
    if kind == "vlan":
        parent = card(_last(sections.get("vlan", {}), "parent"))  # may be the UUID of a profile, which is no name
        return (Interface(file, parent),) if parent else ()
    if kind not in _ETHERNET:
        return ()
    ethernet = {key: value for name in _ETHERNET for key, value in sections.get(name, {}).items()}
    mac = mac_address(_old_mac(_last(ethernet, "mac-address")))
    name = card(_last(connection, "interface-name") or _last(ethernet, "interface-name"))
    if name or mac:
        return (Interface(file, name, mac),)
    globs = _last(sections.get("match", {}), "interface-name").replace(";", " ").split()
    return tuple(Interface(file, card_or_glob(word)) for word in globs if card_or_glob(word))


def _old_mac(text: str) -> str:
    """A MAC address that was written as a list of numbers (`0;80;86;1;2;3;`), as one is written now."""
    numbers = text.rstrip(";").split(";")
    if len(numbers) == 6 and all(n.isascii() and n.isdigit() and len(n) <= 3 and int(n) < 256 for n in numbers):
        return ":".join(f"{int(number):02x}" for number in numbers)
    return text


def _sections(text: str) -> dict[str, dict[str, list[str]]]:
    """Every value of every key, by section. What is no line of this syntax is passed over."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in text.split("\n"):
        line = line.strip()
        key, equals, value = line.partition("=")
        if line.startswith("[") and line.endswith("]"):
            section = found.setdefault(line[1:-1], {})
        elif equals and not line.startswith(("#", ";")):
            section.setdefault(key.rstrip(), []).append(value.strip())
    return found


def _words(section: dict[str, list[str]], key: str) -> list[str]:
    return " ".join(section.get(key, [])).split()


def _last(section: dict[str, list[str]], key: str) -> str:
    return section.get(key, [""])[-1]
