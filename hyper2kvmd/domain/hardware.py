"""What the VM was: its virtual hardware, from the manifest, and where that is silent from the .ovf beside the disks."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

from hyper2kvmd.errors import Finding
from hyper2kvmd.files import open_file
from hyper2kvmd.manifest import Manifest, ovf
from hyper2kvmd.manifest.model import Nic
from hyper2kvmd.text import show

DEFAULT_CPU = 2  # the contract's own defaults, for what nobody says
DEFAULT_MEMORY_MIB = 4096
CPU_LIMITS = range(1, 4096 + 1)
MEMORY_MIB_LIMITS = range(4, (64 << 20) + 1)

_SHOWN = 5  # of the things in a list that a message names

T = TypeVar("T")


@dataclass(frozen=True)
class Card:
    """A network card of the VM: what is known of it. `model` is VMware's word (VmxNet3, E1000).

    pci_slot: VMware's number, from which Linux makes a name such as ens192.
    """

    mac: str | None
    network: str | None
    model: str | None
    pci_slot: int | None


@dataclass(frozen=True)
class Hardware:
    """The virtual hardware of the VM as it was at its source.

    cores_per_socket: a divisor of `cpus`, or None where it is not known.
    cards: in the order of their slots; there is always one.
    disks: the ids of all the manifest's disks, in the order in which the guest saw them.
    uuid: the BIOS UUID, as libvirt spells it.
    annotation: the notes on the VM, of any number of lines; empty if there are none.
    os: VMware's osType such as debian12_64Guest, or else words that were meant for people.
    """

    cpus: int
    cores_per_socket: int | None
    memory_mib: int
    firmware: Literal["bios", "uefi", "unknown"]
    secure_boot: bool
    tpm: bool
    cards: tuple[Card, ...]
    disks: tuple[str, ...]
    uuid: str | None
    annotation: str
    os: str | None


def read(dir_fd: int, manifest: Manifest) -> tuple[Hardware, tuple[Finding, ...]]:
    """The hardware, and what a person should know of it. `dir_fd` is the export's directory.

    An .ovf that cannot be used is one of the warnings. Raise OSError if the directory cannot be listed.
    """
    try:
        found = manifest.made.descriptor if manifest.made else _descriptor(dir_fd, manifest.vm_name)
    except ovf.OvfError as error:
        hardware, warnings = merge(manifest, None)
        return hardware, (error.finding, *warnings)
    return merge(manifest, found)


def _descriptor(dir_fd: int, vm_name: str) -> ovf.Ovf | None:
    name = ovf.choose(os.listdir(dir_fd), vm_name)
    if name is None:
        return None
    try:
        # In this directory, and nowhere else, whatever the name leads to.
        fd = open_file(name, dir_fd=dir_fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ovf.unreadable(name, "it is not a plain file")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(ovf.SIZE_LIMIT + 1)
        finally:
            os.close(fd)
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else f"it cannot be read: {error.strerror}"
        raise ovf.unreadable(name, why) from None
    return ovf.parse(data, name)


def merge(manifest: Manifest, found: ovf.Ovf | None) -> tuple[Hardware, tuple[Finding, ...]]:
    """What the manifest says, else what the descriptor says, else a default; and what a person should know of it."""
    vm, other = manifest.vm, found or ovf.Ovf("")
    name, warnings = other.name, list(other.warnings)
    cpus = _number("the number of CPUs", vm.cpu, other.cpus, CPU_LIMITS, name, "vm.cpu", warnings)
    if cpus is None:
        cpus = DEFAULT_CPU
        warnings.append(Finding("no_cpu", f"the number of CPUs is not given: using {cpus}", "Add it.", "vm.cpu"))
    memory_mib = vm.memory_mib
    if manifest.dialect == "go" and other.memory_mib and other.memory_mib // 1024 * 1024 == memory_mib:
        memory_mib = other.memory_mib  # the Go exporter drops what is less than a GiB
    memory_mib = _number(
        "the memory in MiB", memory_mib, other.memory_mib, MEMORY_MIB_LIMITS, name, "vm.mem_gb", warnings
    )
    if memory_mib is None:
        memory_mib = DEFAULT_MEMORY_MIB
        message = f"the memory is not given: using {memory_mib} MiB"
        warnings.append(Finding("no_memory", message, "Add it; 0.5 is 512 MiB.", "vm.mem_gb"))
    said: Literal["bios", "uefi"] | None = None if vm.firmware == "unknown" else vm.firmware
    firmware: Literal["bios", "uefi"] | None = _either(
        "the firmware", said, other.firmware, name, "vm.firmware", warnings
    )
    secure_boot = _either("Secure Boot", vm.secure_boot, other.secure_boot, name, "vm.secure_boot", warnings)
    if firmware == "uefi" and secure_boot is None:
        message = "neither the manifest nor an .ovf beside it says whether the VM uses Secure Boot"
        warnings.append(Finding("secure_boot_unknown", message, "Set it if the guest depends on it.", "vm.secure_boot"))
    hardware = Hardware(
        cpus=cpus,
        cores_per_socket=_cores_per_socket(cpus, other, warnings),
        memory_mib=memory_mib,
        firmware=firmware or "unknown",
        secure_boot=secure_boot or False,
        tpm=other.tpm,
        cards=_cards(manifest, other, warnings),
        disks=_disks(manifest, other, warnings),
        uuid=other.uuid,
        annotation=other.annotation,
        # The one word that is taken from the .ovf first: the exporters' dialects share no vocabulary for it.
        os=other.os or " ".join(word for word in (vm.os_hint, vm.os_version) if word) or None,
    )
    return hardware, tuple(warnings)


def _either(what: str, ours: T | None, theirs: T | None, name: str, field: str, warnings: list[Finding]) -> T | None:
    """`ours`, which is the manifest's, or else `theirs`, which the descriptor in the file `name` says."""
    if ours is None:
        return theirs
    if theirs is not None and theirs != ours:
        warnings.append(_differs(what, show(ours), show(theirs), name, field))
    return ours


def _differs(what: str, ours: str, theirs: str, name: str, field: str, used: str = "the manifest") -> Finding:
    return Finding(
        "ovf_differs",
        f"{what}: the manifest says {ours}, and {show(name)} says {theirs}; what {used} says is used",
        "Correct the one that is wrong.",
        field,
    )


def _number(
    what: str, ours: int | None, theirs: int | None, limits: range, name: str, field: str, warnings: list[Finding]
) -> int | None:
    """Likewise, without what no VM has."""
    for where, value in (("the manifest", ours), (show(name), theirs)):
        if value is not None and value not in limits:
            message = f"{where} says {value} for {what}, which no VM has: this was not used"
            hint = f"It must be at least {limits.start} and at most {limits.stop - 1}."
            warnings.append(Finding("hardware_impossible", message, hint, field))
    ours, theirs = (value if value is not None and value in limits else None for value in (ours, theirs))
    return _either(what, ours, theirs, name, field, warnings)


def _cores_per_socket(cpus: int, other: ovf.Ovf, warnings: list[Finding]) -> int | None:
    cores = other.cores_per_socket
    if not cores or cpus % cores == 0:
        return cores or None
    message = f"{show(other.name)} says {cores} cores per socket, which does not divide {cpus} CPUs: it was not used"
    warnings.append(Finding("hardware_impossible", message, "A licence that counts sockets may be affected."))
    return None


def _cards(manifest: Manifest, other: ovf.Ovf, warnings: list[Finding]) -> tuple[Card, ...]:
    if manifest.nics:
        ours, theirs = ([nic.mac for nic in nics if nic.mac] for nics in (manifest.nics, other.nics))
        if ours and theirs and ours != theirs:
            warnings.append(_differs("the MAC addresses", _few(ours), _few(theirs), other.name, "nics"))
        twins = [(nic, _twin(nic, manifest.nics, other.nics)) for nic in manifest.nics]
        cards = tuple(Card(nic.mac, nic.network or twin.network, twin.model, twin.pci_slot) for nic, twin in twins)
    else:
        cards = tuple(Card(nic.mac, nic.network, nic.model, nic.pci_slot) for nic in other.nics)
    hint = "A guest that binds its address to the old MAC needs it in the manifest's nics."
    if not cards:
        message = "neither the manifest nor an .ovf beside it has NICs: the VM gets one with a new MAC address"
        warnings.append(Finding("no_nics", message, hint, "nics"))
        return (Card(None, None, None, None),)
    if without := [str(number) for number, card in enumerate(cards, 1) if card.mac is None]:
        message = f"the MAC address of network card {_few(without)} is not given: a new one is made"
        warnings.append(Finding("no_mac", message, hint, "nics"))
    return cards


def _twin(nic: Nic, ours: Sequence[Nic], theirs: Sequence[ovf.OvfNic]) -> ovf.OvfNic:
    """The descriptor's entry for a card of the manifest: by its MAC address, or as the only one on its network.

    Many descriptors have no addresses. Two lists in the same order are no proof.
    """
    found = [other for other in theirs if nic.mac and other.mac == nic.mac]
    if not found and nic.network and sum(one.network == nic.network for one in ours) == 1:
        found = [other for other in theirs if other.network == nic.network]
    usable = len(found) == 1 and found[0].mac in (None, nic.mac)
    return found[0] if usable else ovf.OvfNic(None, None, None, None)


def _disks(manifest: Manifest, other: ovf.Ovf, warnings: list[Finding]) -> tuple[str, ...]:
    """The descriptor's order for the files that it names, then the others as the manifest lists them."""
    places: dict[str, int] = {}
    for place, disk in enumerate(other.disks):
        for name in disk.names:
            places.setdefault(name, place)
    names = {disk.id: disk.path.rpartition("/")[2] for disk in manifest.disks}
    disks = tuple(sorted(names, key=lambda id: places.get(names[id], len(other.disks))))
    # The Go exporter numbers the disks as it lists them, and knows no boot disk: that says nothing of the VM.
    wished = manifest.ordered()
    stated = wished != manifest.disks or any(disk.kind == "boot" for disk in manifest.disks)
    ours = tuple(disk.id for disk in wished)
    if stated and ours != disks and any(name in places for name in names.values()):
        warnings.append(
            _differs("the order of the disks", _few(ours), _few(disks), other.name, "disks", used="the .ovf")
        )
    return disks


def _few(words: Iterable[str]) -> str:
    first = list(islice(words, _SHOWN + 1))
    return ", ".join([*first[:_SHOWN], *(["..."] if len(first) > _SHOWN else [])])
