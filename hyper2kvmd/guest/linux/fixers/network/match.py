"""Configuration that knows its card by where or what it was on the old machine (Path=, Driver=, a property).

None of that is so on KVM. Where it is certain which card was meant, the file goes by its MAC address from now on, or
by the new driver if it was for every card; else it is left as it is, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.fixers.network.place import at, kind_of_model
from hyper2kvmd.guest.options import Nic
from hyper2kvmd.text import printable

# Drivers of cards that are the only kind of card their platform has: Hyper-V, EC2, Google, Xen.
_SOLE = ("hv_netvsc", "ena", "ixgbevf", "gve", "vif", "xen-netfront", "xen_netfront", "xennet")
_DRIVERS = {"vlance": "pcnet32", "flexible": "pcnet32", "vmxnet2": "vmxnet"}  # by model, where the names differ
# Of other devices than network cards, and of those that software makes: such a file is for no card.
_OLD = (*_SOLE, "vmxnet3", "vmxnet", "e1000", "e1000e", "pcnet32", "igb", "igbvf", "8139cp", "8139too", "tulip", "mlx*")
# How udev begins the path of a card on the bus of a virtual machine.
_CARD_PATH = re.compile(r"(?!.*usb)\*?-?(?:pci|acpi|vmbus|xen|virtio|platform)")
# A glob that fits both of these says nothing of the old machine in particular: no machine has a card at either.
_ANY_PATHS = ("pci-0000:ff:1f.7", "virtio-pci-0000:ff:1f.7")


@dataclass(frozen=True)
class Rewrite:
    """What a file is to go by instead: these MAC addresses, or else (there are none) this driver.

    known: the file goes by the MAC address already.
    """

    macs: tuple[str, ...]
    driver: str
    known: bool = False


@dataclass(frozen=True)
class Match:
    """What a file asks of its card that has to do with the machine.

    what: as a person would find it in the file. paths, drivers, properties: globs of paths and drivers, KEY=value;
    the card must fit each kind that is not empty. excluded: the file is for every card but that one. mac: the file has
    this address as well. most: of how many cards the format can name the addresses. hypervisor: not a card is asked
    for, but the old hypervisor. changed: from the text of the file to that with something else in their place; None
    where nothing but a person can change it.
    """

    file: str
    what: str
    paths: tuple[str, ...] = ()
    drivers: tuple[str, ...] = ()
    properties: tuple[str, ...] = ()
    excluded: bool = False
    mac: str | None = None
    most: int = 1
    hypervisor: bool = False
    changed: Callable[[str, Rewrite], str] | None = None


def is_old_driver(pattern: str) -> bool:
    """Whether a glob of drivers stands for a network card of another platform, or may."""
    return any(fnmatchcase(driver, pattern) for driver in _OLD) or any(fnmatchcase(pattern, old) for old in _OLD)


def is_old_path(pattern: str) -> bool:
    """Whether a glob of paths stands for the place of a network card on the old machine, and not for any place.

    Debian's systemd has a file for `*-usb-*`, as machines without virtual hardware need it.
    """
    return _CARD_PATH.match(pattern) is not None and not is_any_path(pattern)


def is_any_path(pattern: str) -> bool:
    """Whether a glob of paths stands for any place."""
    return any(fnmatchcase(path, pattern) for path in _ANY_PATHS)


def translate(
    matches: Sequence[Match], read: Callable[[str], str | None], nics: Sequence[Nic], driver: str, kept: Sequence[str]
) -> tuple[dict[str, Edit], tuple[Finding, ...]]:
    """The edits by the path of the file that the match is in, and what a person must see to.

    driver: the new cards'. kept: files that another fixer changes. A file of the distribution is copied to /etc, where
    it takes the place of the other.
    """
    edits: dict[str, Edit] = {}
    warnings = []
    paths = {path for match in matches for path in match.paths}
    for match in matches:
        cards = None if match.excluded else _cards(match, nics, only=len(paths) == 1)
        fits = any(fnmatchcase(driver, pattern) for pattern in match.drivers) and not match.paths + match.properties
        if cards == [] or (fits and (cards is None or len(cards) == len(nics))):
            continue  # it was for no card, or it is for the new ones as well
        new = None if cards is None else _rewrite(match, cards, nics, driver)
        target = in_etc(match.file)
        before = edits[match.file].after if match.file in edits else read(match.file)
        if new is None or match.changed is None or before is None or target in kept:
            warnings.append(_left(match, nics))
            continue
        which = "every machine" if match.hypervisor else ", ".join(new.macs) or f"every card with {new.driver}"
        edits[match.file] = Edit(
            "network", target, read(target), match.changed(before, new), f"for {which}",
            f"the file was for {printable(match.what)}", mode=0o600 if "/NetworkManager/" in target else 0o644,
        )  # fmt: skip
    return edits, tuple(warnings)


def in_etc(path: str) -> str:
    """Where an administrator's own version of a file of systemd's goes; for a file in /etc itself that very file."""
    directory = "NetworkManager/system-connections" if "/NetworkManager/" in path else "systemd/network"
    return path if path.startswith("/etc/") else f"/etc/{directory}/{path.rpartition('/')[2]}"


def _cards(match: Match, nics: Sequence[Nic], *, only: bool) -> list[Nic] | None:
    """The cards that the file was for on the old machine, which may be none; None if nobody can know.

    only: no other path is asked for in the guest.
    """
    if match.hypervisor:
        return list(nics)
    if match.mac and not any(nic.mac == match.mac for nic in nics):
        return None
    found = [nic for nic in nics if nic.mac == match.mac] if match.mac else list(nics)
    if match.drivers:
        driven = _driven(match.drivers, nics)
        if driven is not None:
            found = [nic for nic in found if nic in driven]
        elif len(found) > 1:
            return None
    if len(found) == 1 and (match.mac or len(nics) == 1) and (only or match.mac or not match.paths):
        return found  # it is the card, whatever its place was
    if match.properties and found:
        return None
    if match.paths and found:
        placed = at(match.paths, nics)
        return None if placed is None else [nic for nic in found if nic in placed] or None
    return found


def _driven(patterns: Sequence[str], nics: Sequence[Nic]) -> list[Nic] | None:
    """The cards that one of these drivers was for; None if that is not known."""
    models = [(nic.model or "").lower() for nic in nics]
    if all(map(kind_of_model, models)):
        drivers = [_DRIVERS.get(model, model) for model in models]
        return [nic for nic, driver in zip(nics, drivers, strict=True)
                if any(fnmatchcase(driver, pattern) for pattern in patterns)]  # fmt: skip
    sole = any(fnmatchcase(driver, pattern) for driver in _SOLE for pattern in patterns)
    return list(nics) if sole and not any(map(kind_of_model, models)) else None


def _rewrite(match: Match, cards: Sequence[Nic], nics: Sequence[Nic], driver: str) -> Rewrite | None:
    if match.hypervisor:
        return Rewrite((), driver)
    if len(cards) == len(nics) and match.drivers and not match.paths and not match.properties:
        return Rewrite((), driver)
    macs = tuple(nic.mac for nic in cards if nic.mac)
    return Rewrite(macs, driver, known=match.mac is not None) if len(macs) == len(cards) <= match.most else None


def _left(match: Match, nics: Sequence[Nic]) -> Finding:
    code = "network_driver" if match.drivers and not match.paths else "network_match"
    if match.excluded:
        return Finding(
            code,
            f"{printable(match.file)} in the guest is for every card but that with {printable(match.what)}, and no "
            "card of the new machine has that: the file is for all of them now",
            "Let the file exclude the card by its name or its MAC address instead.",
        )
    why = "the VM has no network card" if not nics else "which of the VM's cards that was is not certain"
    return Finding(
        code,
        f"{printable(match.file)} in the guest is for the card with {printable(match.what)}, which no card of the new "
        f"machine has, and {why}: what it configures is not in force on KVM",
        "Let the file match by the MAC address of the card instead (NetworkManager: mac-address in [ethernet]; "
        "netplan: macaddress; systemd: PermanentMACAddress=; ifcfg: HWADDR).",
    )


def element(word: str) -> tuple[str, bool]:
    """The glob in an element of a list of NetworkManager's, and whether it is what must not fit.

    `|` before it (any of these) is the usual way, `&` means that each has to fit; a backslash takes the meaning of what
    follows it.
    """
    word = word.removeprefix("|").removeprefix("&")
    excluded = word.startswith("!")
    return word.removeprefix("!").removeprefix("\\"), excluded


def from_elements(
    file: str,
    paths: Sequence[tuple[str, bool]],
    drivers: Sequence[tuple[str, bool]],
    mac: str | None,
    changed: Callable[[str, Rewrite], str],
    keys: tuple[str, str],
) -> tuple[Match, ...]:
    """What a file of NetworkManager's asks of the machine, from the elements of its two lists; keys: their names."""
    at_paths, by_drivers = (tuple(word for word, excluded in words if not excluded) for words in (paths, drivers))
    if not all(map(is_old_path, at_paths)):
        at_paths = ()
    if not any(map(is_old_driver, by_drivers)):
        by_drivers = ()
    not_at = [word for word, excluded in paths if excluded and is_old_path(word)]
    not_by = [word for word, excluded in drivers if excluded and is_old_driver(word)]
    without_them = tuple(
        Match(file, f"{key}={' '.join(words)}", excluded=True)
        for key, words in zip(keys, (not_at, not_by), strict=True)
        if words
    )
    named = zip(keys, (at_paths, by_drivers), strict=True)
    what = " ".join(f"{key}={' '.join(words)}" for key, words in named if words)
    if not what:
        return without_them
    return (*without_them, Match(file, what, at_paths, by_drivers, mac=mac, changed=None if without_them else changed))


def without(text: str, section: str, keys: Sequence[str], new: Mapping[str, Sequence[str]]) -> str:
    """A file of sections and keys that has no line with `keys` in a section, and new lines in sections.

    A line goes to the head of its section, which is made at the end where there is none. Every other line stays.
    """
    lines = []
    current = ""
    missing = dict(new)
    for line in text.split("\n"):
        stripped = line.strip()
        if stripped.startswith("[") and stripped.endswith("]"):
            current = stripped[1:-1]
            lines += [line, *missing.pop(current, ())]
        elif current != section or stripped.partition("=")[0].rstrip() not in keys or stripped.startswith(("#", ";")):
            lines.append(line)
    text = "\n".join(lines)
    for name, more in missing.items():
        text += ("" if not text or text.endswith("\n") else "\n") + "\n".join((f"\n[{name}]", *more, ""))
    return text
