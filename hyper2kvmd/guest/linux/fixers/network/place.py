"""What VMware's slots say of a network card: the name that Linux makes of one, its PCI address, which card is which.

VMware has two kinds of slots. The older cards sit on one conventional bus (slots from 32 on: ens32, ens33...), VmxNet3
and E1000e on PCI Express bridges (slots from 160 on: ens160, ens192...). EFI machines of hardware version 20 and newer
number their slots otherwise; so the kind of a name is believed only where cards of both kinds have to be told apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from hyper2kvmd.guest.options import Nic

Kind = Literal["conventional", "express"]

BY_ORDER = "VMware numbers the slots in the order of the adapters"
BY_MODEL = "VMware puts cards of its model, and no other card of the VM, into slots with such numbers"
LAST = "it is the only name and the only card that are left"

_SLOT_NAME = re.compile(r"ens(?P<number>\d{1,5})")
_ONBOARD_NAME = re.compile(r"eno(?P<number>\d{8,10})")
_MODELS: dict[str, Kind] = {
    **dict.fromkeys(("e1000", "pcnet32", "vlance", "vmxnet", "vmxnet2", "flexible"), "conventional"),
    **dict.fromkeys(("vmxnet3", "e1000e"), "express"),
}
_BRIDGES = 4  # of PCI Express, each with eight functions; adapters take the first function of each first
# Names of PCI Express slots begin with 160; below 32 there are no cards.
_CONVENTIONAL, _EXPRESS = range(32, 64), range(160, 1 << 15)


def kind_of_model(model: str | None) -> Kind | None:
    """The kind of slot that a card of this model is in; None if that is not known."""
    return _MODELS.get((model or "").lower())


def kind_of_name(name: str) -> Kind | None:
    """The kind of slot that Linux made this name of; None if it made it of something else."""
    found = _SLOT_NAME.fullmatch(name)
    if found is None:
        return None
    number = int(found["number"])
    return "conventional" if number in _CONVENTIONAL else "express" if number in _EXPRESS else None


def slot_name(slot: int) -> str:
    """The name that Linux makes of a pciSlotNumber: 160 is ens160, and 1184 (its function 1) is ens161."""
    return f"ens{(slot & 0x3FF) + (slot >> 10)}"


def pci_address(slot: int) -> str | None:
    """Where the guest finds a pciSlotNumber: 192 at 0000:0b:00.0. None for slots that no machine of VMware's has.

    The number has the function of a bridge, the bridge, and the device behind it. The firmware numbers the buses in
    the order of the bridges: the conventional bus is 02, and the four bridges have eight buses each from 03 on.
    """
    function, bridge, device = slot >> 10, slot >> 5 & 31, slot & 31
    if function > 7:
        return None
    if bridge in (0, 1):
        return f"0000:{2 * bridge:02x}:{device:02x}.0" if function == 0 else None
    return f"0000:{3 + 8 * (bridge - 5) + function:02x}:{device:02x}.0" if 5 <= bridge <= 8 else None


def at(paths: Sequence[str], nics: Sequence[Nic]) -> list[Nic] | None:
    """The cards at these paths (globs of pci-0000:0b:00.0); None if there are none, or not every card's is known."""
    where = [(nic, pci_address(nic.pci_slot) if nic.pci_slot is not None else None) for nic in nics]
    if any(address is None for _, address in where):
        return None
    return [nic for nic, address in where if any(fnmatchcase(f"pci-{address}", path) for path in paths)] or None


def kernel_order(nics: Sequence[Nic]) -> list[Nic] | None:
    """The cards as the kernel of the old machine found them, eth0 first; None if that cannot be known.

    It goes along the buses. A fifth PCI Express card is beside the first, and cards with different drivers come as
    their drivers are loaded.
    """
    kinds = {kind_of_model(nic.model) for nic in nics}
    if len(nics) > 1 and len(kinds) > 1:
        return None
    where = [pci_address(nic.pci_slot) if nic.pci_slot is not None else None for nic in nics]
    if None in where:
        return None if len(nics) > _BRIDGES and "express" in kinds else list(nics)
    return [nic for _, nic in sorted(zip(where, nics, strict=True), key=lambda pair: pair[0] or "")]


def by_place(names: Sequence[str], nics: Sequence[Nic], vm: Sequence[Nic]) -> dict[str, tuple[str, str]]:
    """The MAC address, and the reason, for each name that nothing in the guest tells, as far as it can be known.

    names, nics: those that are left. vm: all cards of the VM. What was left over is paired if there is as much of
    both, within one kind of slots: no order says which of an E1000 and a VmxNet3 is which.
    """
    found = by_slot(names, nics)
    names, nics = _rest(names, nics, found)
    kinds = {kind_of_model(nic.model) for nic in vm}
    mixed = {"conventional", "express"} <= kinds
    if mixed and None not in kinds:
        for kind in ("conventional", "express"):
            ours = [name for name in names if kind_of_name(name) == kind]
            found |= _paired(ours, [nic for nic in nics if kind_of_model(nic.model) == kind], BY_MODEL)
        names, nics = _rest(names, nics, found)
    if len(names) > 1 and len(kinds) > 1:
        return found  # a model that is not known, such as that of SR-IOV, may be of either kind
    if mixed and any(_contradict(name, nic) for name in names for nic in nics):
        return found
    return found | _paired(names, nics, LAST)


def by_slot(names: Sequence[str], nics: Sequence[Nic]) -> dict[str, tuple[str, str]]:
    """The same, where the OVF has the number of the slot that the name was made of."""
    slots = {slot_name(nic.pci_slot): nic.mac for nic in nics if nic.pci_slot is not None}
    return {
        name: (mac, f"the OVF says that this adapter was in VMware's slot {name[3:]}")
        for name in names
        if (mac := slots.get(name))
    }


def _rest(
    names: Sequence[str], nics: Sequence[Nic], found: Mapping[str, tuple[str, str]]
) -> tuple[list[str], list[Nic]]:
    taken = {mac for mac, _ in found.values()}
    return [name for name in names if name not in found], [nic for nic in nics if nic.mac not in taken]


def _contradict(name: str, nic: Nic) -> bool:
    kinds = (kind_of_name(name), kind_of_model(nic.model))
    return None not in kinds and kinds[0] != kinds[1]


def _paired(names: Sequence[str], nics: Sequence[Nic], only: str) -> dict[str, tuple[str, str]]:
    """Names and cards of one kind, if there are as many of both. only: the reason where it is one of each."""
    if len(names) != len(nics) or any(nic.mac is None for nic in nics):
        return {}
    if any(nic.pci_slot is not None for nic in nics) and any(map(_SLOT_NAME.fullmatch, names)):
        return {}  # the OVF knows the slot of a card, and it is another one
    ordered = names if len(names) == 1 else _in_slot_order(names)
    evidence = only if len(names) == 1 else BY_ORDER
    return {name: (nic.mac or "", evidence) for name, nic in zip(ordered or (), nics, strict=bool(ordered))}


def _in_slot_order(names: Sequence[str]) -> list[str] | None:
    """Names of one of VMware's families in the order in which it fills the slots; None if they are mixed.

    ens160, 192, 224, 256 are the first functions of four bridges, then come 161, 193... The numbers after eno count
    the adapters in their highest byte.
    """
    if all(_ONBOARD_NAME.fullmatch(name) for name in names):
        return sorted(names, key=_number)
    if all(_SLOT_NAME.fullmatch(name) for name in names) and len({_number(name) < 64 for name in names}) == 1:
        return sorted(names, key=_slot_order)
    return None


def _slot_order(name: str) -> tuple[int, int]:
    number = _number(name)
    # Below 64 they are the places on one conventional bus: ens32, ens33...
    return (0, number) if number < 64 else (number % 32, number // 32)


def _number(name: str) -> int:
    return int(name[3:])
