"""The files of systemd-networkd, systemd's .link files and NetworkManager's, which share one syntax."""

from __future__ import annotations

import re

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card, card_or_glob
from hyper2kvmd.guest.linux.fixers.network.match import (
    Match,
    Rewrite,
    element,
    from_elements,
    is_any_path,
    is_old_driver,
    is_old_path,
    without,
)
from hyper2kvmd.guest.linux.fixers.network.udev import Pin
from hyper2kvmd.text import mac_address

_ETHERNET = ("ethernet", "802-3-ethernet")
# Properties of udev that come from where a card is, what drives it, and who made it.
_OF_HARDWARE = re.compile(
    r"(?:ID_PATH|ID_PATH_TAG|ID_NET_DRIVER|ID_NET_NAME_(?:SLOT|PATH|ONBOARD)|ID_NET_LABEL_ONBOARD|DEVPATH"
    r"|ID_(?:VENDOR|MODEL)(?:_ID|_FROM_DATABASE)?|PCI_SLOT_NAME|PCI_ID|PCI_SUBSYS_ID|ID_PCI_\w+)="
)
_NOT_HERE = ("container", "no", "false", "0", "off", "!vm", "lxc", "docker", "podman", "systemd-nspawn", "openvz")
_HYPERVISORS = ("vmware", "microsoft", "xen", "amazon", "google", "oracle", "parallels", "bhyve")


def networkd(text: str, file: str) -> tuple[Interface, ...]:
    """The cards that a .network file matches."""
    match = _sections(text).get("Match", {})
    if not _for_cards(match):
        return ()
    macs = [mac_address(word) for word in _words(match, "MACAddress") + _words(match, "PermanentMACAddress")]
    words = _words(match, "Name")
    # An exclamation mark before the first is for all of them.
    excluded = bool(words) and words[0].startswith("!")
    names = [name for word in words if (name := card_or_glob(word.removeprefix("!")))]
    if not words:
        return tuple(Interface(file, "", mac) for mac in macs or [None])
    # Which of several addresses goes with which name is not said.
    mac = macs[0] if len(macs) == len(names) == 1 and not excluded else None
    return tuple(Interface(file, name, mac, excluded=excluded) for name in names)


def matches(text: str, file: str, *, permanent: bool) -> tuple[Match, ...]:
    """What a .network or .link file asks of the machine. permanent: its systemd knows PermanentMACAddress=."""
    match = _sections(text).get("Match", {})
    macs = _words(match, "MACAddress") + _words(match, "PermanentMACAddress")
    drivers, paths = _words(match, "Driver"), _words(match, "Path")
    if not any(is_old_path(word.removeprefix("!")) for word in paths):
        if paths and not paths[0].startswith("!") and not any(map(is_any_path, paths)):
            return ()  # for another kind of device
        paths = []
    properties = [word.strip("\"'") for word in _words(match, "Property")]
    firmware = [value for value in match.get("Firmware", []) if "smbios-field" in value]
    if not _for_cards(match) or (drivers and not any(is_old_driver(word.removeprefix("!")) for word in drivers)):
        return ()
    kept = [word for word in properties if not _OF_HARDWARE.match(word.removeprefix("!"))]
    gone = [word for word in properties if word not in kept]
    found = []
    if firmware or any(word in _HYPERVISORS for word in _words(match, "Virtualization")):
        keys = ("Virtualization", *(["Firmware"] if firmware else []))
        what = " ".join(f"{key}={' '.join(match[key])}" for key in keys if key in match)
        found.append(Match(file, what, hypervisor=True, changed=lambda text, new: without(text, "Match", keys, {})))
    excluded = [
        Match(file, f"{key}={' '.join(words)[1:]}", excluded=True)
        for key, words in (("Path", paths), ("Driver", drivers), ("Property", gone))
        if words and words[0].startswith("!")
    ]
    found += excluded
    paths, drivers = ([] if words[:1] and words[0].startswith("!") else words for words in (paths, drivers))
    gone = [word for word in gone if not word.startswith("!")]
    if not (paths or drivers or gone):
        return tuple(found)

    def changed(text: str, new: Rewrite) -> str:
        lines = [f"Property={' '.join(kept)}"] if kept and gone else []
        if new.macs and not macs:
            lines.append(f"{'PermanentMACAddress' if permanent else 'MACAddress'}={' '.join(new.macs)}")
        if not new.macs or not (permanent or macs):
            lines.append(f"Driver={new.driver}")  # what stands on the card has its address, but not its driver
        keys = [*(["Path"] if paths else []), *(["Property"] if gone else []), "Driver"]
        return without(text, "Match", keys, {"Match": lines})

    asked = (("Path", paths), ("Driver", drivers), ("Property", gone))
    what = " ".join(f"{key}={' '.join(words)}" for key, words in asked if words)
    mac = mac_address(macs[0]) if len(macs) == 1 else None
    most = 1 if _last(_sections(text).get("Link", {}), "Name") else 64
    wanted = (tuple(paths), tuple(drivers), tuple(gone))
    found.append(Match(file, what, *wanted, mac=mac, most=most, changed=None if excluded else changed))
    return tuple(found)


def _for_cards(match: dict[str, list[str]]) -> bool:
    """Whether a [Match] section is for network cards of a virtual machine."""
    if "Kind" in match or any("ether" not in kind for kind in match.get("Type", [])):
        return False
    return not any(word in _NOT_HERE for word in _words(match, "Virtualization"))


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


def is_for_many(text: str) -> bool:
    """Whether a .link file may be for any card: it asks for no MAC address, and not for another kind of device."""
    match = _sections(text).get("Match", {})
    return bool(match) and not match.keys() & {"MACAddress", "PermanentMACAddress"} and _for_cards(match)


def networkmanager(text: str, file: str) -> tuple[Interface, ...]:
    """The cards that a connection profile is for; those that go with any card name none."""
    sections = _sections(text)
    connection = sections.get("connection", {})
    kind = _last(connection, "type")
    idle = _last(connection, "autoconnect").lower() == "false"
    if kind == "vlan":
        parent = card(_last(sections.get("vlan", {}), "parent"))  # may be the UUID of a profile, which is no name
        return (Interface(file, parent, idle=idle),) if parent else ()
    if kind not in _ETHERNET:
        return ()
    ethernet = _ethernet(sections)
    mac = mac_address(_old_mac(_last(ethernet, "mac-address")))
    name = card(_last(connection, "interface-name") or _last(ethernet, "interface-name"))
    if name or mac:
        return (Interface(file, name, mac, idle=idle),)
    words = _list(sections.get("match", {}), "interface-name")
    cards = ((card_or_glob(word), excluded) for word, excluded in map(element, words))
    return tuple(Interface(file, name, excluded=excluded) for name, excluded in cards if name)


def profile_matches(text: str, file: str) -> tuple[Match, ...]:
    """What a connection profile of NetworkManager asks of the machine."""
    sections = _sections(text)
    match = sections.get("match", {})
    if _last(sections.get("connection", {}), "type") not in _ETHERNET:
        return ()
    mac = mac_address(_old_mac(_last(_ethernet(sections), "mac-address")))
    section = next((name for name in _ETHERNET if name in sections), "ethernet")

    def changed(text: str, new: Rewrite) -> str:
        if not new.macs:
            return without(text, "match", ("driver",), {"match": [f"driver={new.driver};"]})
        lines = {} if mac else {section: [f"mac-address={new.macs[0].upper()}"]}
        return without(text, "match", ("path", "driver"), lines)

    paths, drivers = (list(map(element, _list(match, key))) for key in ("path", "driver"))
    return from_elements(file, paths, drivers, mac, changed, ("path", "driver"))


def _ethernet(sections: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    return {key: value for name in _ETHERNET for key, value in sections.get(name, {}).items()}


def _list(section: dict[str, list[str]], key: str) -> list[str]:
    """The elements of a list of NetworkManager's, which semicolons or spaces part."""
    return _last(section, key).replace(";", " ").split()


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
