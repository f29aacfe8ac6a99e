"""udev's rules that give names to network cards: reading them, and writing ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hyper2kvmd.guest.linux.fixers.network.interface import card
from hyper2kvmd.text import mac_address

RULES = "/etc/udev/rules.d/70-persistent-net.rules"
# Where a directory has that name: templates put one there, so that udev cannot write the file.
OTHER_RULES = "/etc/udev/rules.d/70-hyper2kvm-net.rules"
_TOKEN = re.compile(
    r"(?<![A-Z])(?P<key>[A-Z]{1,20}(?:\{[^}\"]{1,40}\})?)"
    r"[ \t]{0,9}(?P<op>==|!=|\+=|:=|=)[ \t]{0,9}\"(?P<value>[^\"]{0,200})\""
)
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_ADDRESS = {"ATTR{address}", "ATTRS{address}", "SYSFS{address}"}
# Conditions that a virtio card meets as well as the card that the rule was written for.
_STILL_TRUE = {
    *(("SUBSYSTEM", "net"), ("SUBSYSTEMS", "?*"), ("ACTION", "add"), ("ACTION", "?*"), ("DRIVERS", "?*")),
    *(("ATTR{dev_id}", "0x0"), ("ATTR{dev_port}", "0"), ("ATTR{type}", "1"), ("NAME", "")),
    *(("KERNEL", "eth*"), ("KERNEL", "eth?*"), ("KERNEL", "e*"), ("KERNEL", "en*|eth*"), ("KERNEL", "*")),
}


@dataclass(frozen=True)
class Pin:
    """A name that a rule or a .link file gives to a MAC address, or else ("") to the card at a PCI address.

    holds: it does so on KVM, too. If not, the rule has conditions that only the old card met, and is mere evidence.
    path: such as pci-0000:0b:00.0.
    """

    name: str
    mac: str
    file: str
    holds: bool
    path: str = ""


def pins(text: str, file: str) -> tuple[Pin, ...]:
    """The names that a file of rules gives, as far as it goes by MAC addresses."""
    found = []
    for line in text.replace("\\\n", " ").split("\n"):
        if line.lstrip().startswith("#"):
            continue
        tokens = [(token["key"], token["op"], token["value"]) for token in _TOKEN.finditer(line)]
        macs = [mac_address(value) for key, op, value in tokens if key in _ADDRESS and op == "=="]
        names = [card(value) for key, op, value in tokens if key == "NAME" and op in ("=", ":=")]
        paths = [_path(key, value) for key, op, value in tokens if op == "==" and _path(key, value)]
        if len(names) == 1 and names[0] and not macs and len(paths) == 1:
            found.append(Pin(names[0], "", file, holds=False, path=paths[0]))
        if len(macs) != 1 or len(names) != 1 or macs[0] is None or not names[0]:
            continue
        conditions = {(key, value) for key, op, value in tokens if op == "==" and key not in _ADDRESS}
        holds = conditions <= _STILL_TRUE and not any(op == "!=" for _, op, _ in tokens)
        found.append(Pin(names[0], macs[0], file, holds))
    return tuple(found)


def _path(key: str, value: str) -> str:
    """The path of a card that a condition asks for, "" if it asks for something else."""
    if key in ("KERNELS", "BUS_ID") and _PCI_ADDRESS.fullmatch(value):
        return f"pci-{value}"
    return value if key == "ENV{ID_PATH}" else ""


def with_rules(text: str, names: Iterable[tuple[str, str]]) -> str:
    """The rules with one more for each name and MAC address, in the form in which udev used to write them.

    Virtual devices can have the same address, but they have no driver: DRIVERS keeps them out. KERNEL is left out,
    because the initramfs may have given another name already.
    """
    rules = "".join(
        f"# {name}: written by hyper2kvmd, so that the card keeps its name; may be removed if that does not matter\n"
        f'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{{address}}=="{mac}", ATTR{{dev_id}}=="0x0", '
        f'ATTR{{type}}=="1", NAME="{name}"\n'
        for name, mac in names
    )
    return text + ("" if not text or text.endswith("\n") else "\n") + rules
