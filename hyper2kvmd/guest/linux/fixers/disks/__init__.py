"""All that names disks in the guest's settings: fstab, units, crypttab, LVM, RAID, the device to resume from, udev."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from hyper2kvmd.domain.model import DiskBus
from hyper2kvmd.guest.change import Proof
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.fixers.disks import crypttab, fstab, lvm, raid, resume, rules
from hyper2kvmd.guest.linux.kernels import Image

__all__ = ["plans", "prove"]


def plans(
    view: View, bus: DiskBus, mode: Literal["stabilize-all", "bypath-only", "noop"], *, bootloader: bool
) -> Iterable[FixPlan]:
    """What has to change. bus: of the new disks. mode: how much of fstab and crypttab may be changed."""
    yield lvm.plan(view, bus)
    yield raid.plan(view, bus)
    yield rules.plan(view, bus)
    if mode != "noop":
        yield fstab.plan(view, by_path_only=mode == "bypath-only")
        yield crypttab.plan(view)
    if bootloader:
        yield resume.plan(view)


def prove(view: View, bus: DiskBus, images: Sequence[Image]) -> tuple[Proof, ...]:
    """That neither the guest's settings nor the copies of them in the images keep its disks from being used."""
    return (*lvm.prove(view, bus, images), *raid.prove(view, bus, images))
