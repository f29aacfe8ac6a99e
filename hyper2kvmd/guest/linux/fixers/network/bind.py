"""Decides which card of the new machine each configured name belongs to, by evidence, or that nobody can know."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.linux.fixers.network.interface import Interface
from hyper2kvmd.guest.linux.fixers.network.place import BY_MODEL, BY_ORDER, at, by_place, by_slot, kernel_order
from hyper2kvmd.guest.linux.fixers.network.udev import Pin
from hyper2kvmd.guest.options import Nic
from hyper2kvmd.text import printable

_KERNEL_NAME = re.compile(r"eth(?P<number>\d{1,3})")
_CARD_GLOB = re.compile(r"e(?:n|th|[*?\[])")  # not such as veth*
_MAC_NAME = re.compile(r"enx(?P<digits>[0-9a-f]{12})")
_BY_HAND = "Write the MAC address of each network adapter into the manifest's nics, or bind it in the guest by hand."


@dataclass(frozen=True)
class Naming:
    """How udev in the guest names cards.

    links: it reads .link files, and can match a card there without what stands on it. predictable: it makes names from
    the place of the card (enp1s0) unless told otherwise. swaps: it is old enough to wait for a name that another card
    still has.
    """

    links: bool
    predictable: bool
    swaps: bool = False


@dataclass(frozen=True)
class Binding:
    """A name, the MAC address of the card that it belongs to, and how we know."""

    name: str
    mac: str
    evidence: str


@dataclass(frozen=True)
class Bound:
    """The names that have to be bound, and what a person should know."""

    bindings: tuple[Binding, ...]
    warnings: tuple[Finding, ...]


def bind(
    interfaces: Sequence[Interface],
    nics: Sequence[Nic],
    pins: Sequence[Pin],
    leases: Collection[tuple[str, str]],
    naming: Naming,
) -> Bound:
    """Find the card for each name. A name whose card is uncertain is not bound, and a warning says so.

    leases: pairs of name and MAC address.
    """
    macs = {nic.mac for nic in nics if nic.mac}
    warnings = list(_unmatched(interfaces, macs, nics, naming))
    found: dict[str, Binding | None] = {}  # None: the guest sees to it, or nobody knows
    # With a name or an address whose card nobody knows, what is left over is not that of another.
    sure = not any(one.mac and not one.name and one.mac not in macs for one in interfaces)
    files: dict[str, str] = {}
    for one in interfaces:
        if one.name and not one.is_glob:
            files.setdefault(one.name, one.file)
    minor = files.keys() - {one.name for one in interfaces if not one.minor}
    pinned = {pin.name: pin.mac for pin in pins if pin.holds and pin.mac in macs}
    pinned |= {one.name: one.mac for one in interfaces if one.pinned and one.mac and one.mac in macs}
    taken = set(pinned.values())
    nameless = {one.mac for one in interfaces if one.mac and not one.name}
    for name, file in files.items():
        wanted = {one.mac: one.file for one in interfaces if one.name == name and one.mac}
        mac = next(iter(wanted), None)
        if len(wanted) > 1 or (mac and pinned.get(name, mac) != mac):
            said = {*wanted, *([pinned[name]] if name in pinned else [])}
            warnings.append(_ambiguous(name, file, f"the guest gives it the MAC addresses {', '.join(sorted(said))}"))
            found[name], sure = None, sure and name in minor
        elif mac and mac not in macs:
            warnings.append(_unknown_mac(mac, wanted[mac]))
            found[name], sure = None, sure and name in minor
        elif name in pinned:
            found[name] = None
        elif binding := _evidence(name, wanted, nics, pins, leases, naming):
            found[name] = None if _MAC_NAME.fullmatch(name) else binding
            taken.add(binding.mac)
        elif _kept_by_kernel(name, nics, pins, naming):
            found[name] = None
    warnings += _kernel_order(files, nics, pinned, naming)
    left = [name for name in files if name not in found]
    cards = [nic for nic in nics if nic.mac is None or nic.mac not in taken | nameless]
    places = by_place(left, cards, nics) if sure else by_slot(left, cards)
    if sure and len(places) < len(left):
        # What is said in passing may be a leftover, or of a card that another file knows by its address.
        places = by_place([name for name in left if name not in minor], cards, nics)
        rest = [nic for nic in nics if nic.mac is None or nic.mac not in taken | {mac for mac, _ in places.values()}]
        places |= by_place([name for name in left if name in minor], rest, nics)
    inferred = {name: Binding(name, mac, evidence) for name, (mac, evidence) in places.items()}
    if any(binding.evidence in (BY_ORDER, BY_MODEL) for binding in inferred.values()):
        warnings.append(_inferred(inferred))
    for name in left:
        found[name] = inferred.get(name)
        if name not in inferred:
            warnings.append(_ambiguous(name, files[name], _counts(left, cards, sure=sure)))
    bindings = [binding for binding in found.values() if binding]
    return _checked(bindings, pinned, minor, files, nics, naming, warnings)


def _evidence(
    name: str,
    wanted: Mapping[str, str],
    nics: Sequence[Nic],
    pins: Sequence[Pin],
    leases: Collection[tuple[str, str]],
    naming: Naming,
) -> Binding | None:
    """The card that the guest's own files say the name belongs to."""
    macs = {nic.mac for nic in nics if nic.mac}
    for mac, file in wanted.items():
        return Binding(name, mac, f"{printable(file)} has the MAC address")
    if (made := _MAC_NAME.fullmatch(name)) and (mac := ":".join(re.findall("..", made["digits"]))) in macs:
        return Binding(name, mac, "the name is made of the MAC address")
    for pin in pins:
        if pin.name == name and pin.mac in macs:
            return Binding(name, pin.mac, f"{printable(pin.file)} gave it the name")
        if pin.name == name and pin.path and (found := at([pin.path], nics)) and len(found) == 1 and found[0].mac:
            return Binding(name, found[0].mac, f"{printable(pin.file)} gave the name to the card at {pin.path}")
    order = None if naming.predictable else kernel_order(nics)
    if (kernel := _KERNEL_NAME.fullmatch(name)) and order and order != list(nics):
        found = order[int(kernel["number"]) :][:1]
        if found and found[0].mac:
            return Binding(name, found[0].mac, "the slots in the OVF say in which order the kernel found the cards")
    leased = {mac for leased, mac in leases if leased == name and mac in macs}
    return Binding(name, leased.pop(), "a DHCP lease has the MAC address") if len(leased) == 1 else None


def _kept_by_kernel(name: str, nics: Sequence[Nic], pins: Sequence[Pin], naming: Naming) -> bool:
    """Whether the kernel itself gives the name: the cards are eth0, eth1... in order, and nothing changes that.

    A stale rule does: it keeps the name for the old card, and old udev then gives the next free one to the new card.
    So does an order on the old machine that was not that of the adapters.
    """
    kernel = _KERNEL_NAME.fullmatch(name)
    in_order = kernel is not None and int(kernel["number"]) < len(nics) and kernel_order(nics) == list(nics)
    return in_order and not naming.predictable and not any(pin.name == name for pin in pins)


def _checked(
    bindings: Sequence[Binding],
    pinned: Mapping[str, str],
    minor: Collection[str],
    files: Mapping[str, str],
    nics: Sequence[Nic],
    naming: Naming,
    warnings: list[Finding],
) -> Bound:
    """The bindings that do not collide with one another, or with names that the kernel gives meanwhile."""
    kept = []
    for binding in bindings:
        weighty = [other for other in bindings if binding.name in minor or other.name not in minor]
        given = [*pinned.items(), *((other.name, other.mac) for other in weighty)]
        others = [name for name, mac in given if mac == binding.mac and name != binding.name]
        if others:
            warnings.append(
                _ambiguous(binding.name, files[binding.name], f"{others[0]} has the card {binding.mac} too")
            )
        elif _KERNEL_NAME.fullmatch(binding.name) and len(nics) > 1 and not naming.swaps:
            # udev would find the name in use by a card that the kernel has just found, and give up.
            why = f"it belongs to {binding.mac}, and the kernel may give it to another card at first"
            warnings.append(_ambiguous(binding.name, files[binding.name], why))
        else:
            kept.append(binding)
    return Bound(tuple(kept), tuple(dict.fromkeys(warnings)))


def _unmatched(interfaces: Sequence[Interface], macs: set[str], nics: Sequence[Nic], naming: Naming) -> list[Finding]:
    """What configuration without a plain name asks for and will not find."""
    expected = [f"enp{number}s0" if naming.predictable else f"eth{number - 1}" for number in range(1, len(nics) + 1)]
    found = []
    for one in interfaces:
        if one.mac and not one.name and one.mac not in macs:
            found.append(_unknown_mac(one.mac, one.file))
        if not one.is_glob:
            continue
        if one.excluded:
            fits = all(fnmatchcase(name, one.name) for name in expected) or not _CARD_GLOB.match(one.name)
            what, hint = "excludes cards", "Let the file exclude en*, or cards by MAC address."
        else:
            globs = [other.name for other in interfaces if other.file == one.file and other.is_glob]
            fits = any(fnmatchcase(name, glob) for name in expected for glob in globs)
            what, hint = "matches cards", "Let the file match en*, or by MAC address."
        if not fits:
            found.append(
                Finding(
                    "network_glob",
                    f"{printable(one.file)} in the guest {what} by the name {printable(one.name)}, and the new "
                    f"cards will be called {', '.join(expected)}",
                    hint,
                )
            )
    return found


def _kernel_order(
    files: Mapping[str, str], nics: Sequence[Nic], pinned: Mapping[str, str], naming: Naming
) -> list[Finding]:
    names = [name for name in files if _KERNEL_NAME.fullmatch(name) and name not in pinned]
    if naming.predictable or len(nics) < 2 or not names:
        return []
    return [
        Finding(
            "network_kernel_order",
            f"the guest has several network cards, and nothing in it but their order says which of them is "
            f"{', '.join(names)}",
            "See after the first boot that each network reaches the right card. The order is that of VMware's slots if "
            "the .ovf has them, and else that of the manifest.",
        )
    ]


def _unknown_mac(mac: str, file: str) -> Finding:
    return Finding(
        "network_unknown_mac",
        f"{printable(file)} in the guest is for the MAC address {mac}, which no network card of the VM has",
        "Write this MAC address into the manifest's nics if the VM had it; otherwise correct the file in the guest.",
        "nics",
    )


def _ambiguous(name: str, file: str, why: str) -> Finding:
    return Finding(
        "network_unbound",
        f"nobody can know which network card {name} in {printable(file)} is: {why}. It may have another name on KVM, "
        "and so no address",
        _BY_HAND,
        "nics",
    )


def _inferred(bindings: Mapping[str, Binding]) -> Finding:
    pairs = ", ".join(f"{name} is {binding.mac}" for name, binding in bindings.items())
    return Finding(
        "network_inferred",
        f"which card is which was concluded from VMware's order of slots and its models of cards: {pairs}",
        "See after the first boot that each network reaches the right card.",
    )


def _counts(names: Sequence[str], nics: Sequence[Nic], *, sure: bool) -> str:
    if not nics:
        return "the VM has no card for it"
    if any(nic.mac is None for nic in nics):
        return "the MAC address that the card will have is not known"
    if not sure:
        return "other configuration of the guest is for a card that is not known either"
    models = ", ".join(f"{nic.mac} ({printable(nic.model or 'of an unknown model')})" for nic in nics)
    return f"nothing says which of {', '.join(names)} is which card of those that are left: {models}"
