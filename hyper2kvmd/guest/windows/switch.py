"""Says what a Windows, as it is, gets for another bus of its disks, and proves that it starts from there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from hyper2kvmd.domain.model import Machine
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.change import Proof
from hyper2kvmd.guest.inspect import Inspection
from hyper2kvmd.guest.windows.fix import machine_of
from hyper2kvmd.guest.windows.look import SYSTEM, Windows
from hyper2kvmd.guest.windows.plan import choose_bus
from hyper2kvmd.guest.windows.prove import prove_bus
from hyper2kvmd.guest.windows.registry import open_hive

_REMEDIES = {
    "virtio": "Install virtio-win in it, and let it meet a virtio disk once: give it a small one with `virsh"
    " attach-disk VM FILE vdz --driver qemu --subdriver qcow2 --config`, start it, and wait until Device Manager shows"
    " the disk. Where a StartOverride is named, `reg delete` that key in it. Shut it down, and try again.",
    "sata": "Start it as it is; in it, `sc config storahci start= boot` (before Windows 8 msahci), and `reg delete` the"
    " key StartOverride of the same service if there is one. Shut it down, and try again.",
}


@dataclass(frozen=True)
class Switch:
    """The machine that a Windows starts on, and how that is known. new_cards: whether its cards are to be those."""

    machine: Machine
    new_cards: bool
    proofs: tuple[Proof, ...]
    warnings: tuple[Finding, ...]


def prove_switch(g: Any, inspection: Inspection, windows: Windows, bus: Literal["virtio", "sata"]) -> Switch:
    """Look into the Windows that is mounted.

    Raise MigrationError: fix_unproved if it would not start from this bus, guest_dirty.
    """
    with open_hive(g, windows.hives[SYSTEM], SYSTEM) as system:
        choice = choose_bus(g, system, windows, bus, partial(machine_of, inspection))
        proofs = prove_bus(g, system, windows, choice)
    if failed := next((proof for proof in proofs if not proof.ok), None):
        raise MigrationError(
            Code.FIX_UNPROVED,
            f"{windows.product} would not start from {bus}. {failed.subject}: it is not so that {failed.claim}:"
            f" {failed.evidence}",
            _REMEDIES[bus],
        )
    return Switch(choice.machine, choice.machine.cards == "virtio" or bus == "sata", tuple(proofs), choice.warnings)


def left_behind(windows: Windows) -> list[Finding]:
    """What Windows forgets when its network cards get another model: it takes them for others."""
    return [
        Finding(
            "addresses_lost",
            f"the addresses {', '.join(card.addresses)} of '{card.name or card.guid}' stay with the old network card:"
            " Windows takes one of another model for a new one",
            "Give them to the new card in Windows, at its console.",
        )
        for card in windows.addresses
        if card.static
    ]
