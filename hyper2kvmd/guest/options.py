"""What is wanted of FIX: for a guest of any system, what its manifest and the settings ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hyper2kvmd.manifest import Configuration


@dataclass(frozen=True)
class Nic:
    """A network card that the domain will have.

    mac: in lower case with colons, None if nobody knows it yet. pci_slot: VMware's pciSlotNumber, and model: what the
    card was (VmxNet3, E1000), where the OVF has them.
    """

    mac: str | None
    pci_slot: int | None = None
    model: str | None = None


@dataclass(frozen=True)
class FixOptions:
    """Which fixes are wanted; all that a guest needs to boot, unless the manifest says otherwise.

    backup_dir: where in the guest the originals of edited files are kept, "" for nowhere. nics: what the domain
    has, in its order. virtio_win: the drivers for Windows, None if there are none. rdp: whether Windows is to let in
    Remote Desktop.
    """

    fstab: Literal["stabilize-all", "bypath-only", "noop"] = "stabilize-all"  # /etc/fstab and /etc/crypttab
    bootloader: bool = True
    drivers: bool = True  # ask for the drivers in the configuration of the initramfs
    initramfs: bool = True  # build the initramfs again where it lacks them
    serial_console: bool = False
    remove_vmware_tools: bool = False
    backup_dir: str = ""
    nics: tuple[Nic, ...] = ()
    virtio_win: Path | None = None
    rdp: bool = False
    configuration: Configuration = field(default_factory=Configuration)
