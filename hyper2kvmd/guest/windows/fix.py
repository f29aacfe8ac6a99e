"""Fixes a Windows guest: decides its bus, plans, changes registry and files, and proves that it starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import Machine
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.change import Change, FixResult, Proof, unified_diff
from hyper2kvmd.guest.inspect import Inspection
from hyper2kvmd.guest.mounts import mount_one
from hyper2kvmd.guest.options import FixOptions, Nic
from hyper2kvmd.guest.session import spelt
from hyper2kvmd.guest.windows import asked, bcd, firstboot
from hyper2kvmd.guest.windows.asked import Wishes
from hyper2kvmd.guest.windows.drivers import Catalogue
from hyper2kvmd.guest.windows.look import SOFTWARE, SYSTEM, Addresses, Boot, Windows
from hyper2kvmd.guest.windows.plan import Choice, File, Registry, choose, files, software_edits, system_edits
from hyper2kvmd.guest.windows.prove import FALLBACK, MANAGER, prove
from hyper2kvmd.guest.windows.registry import binary, open_hive

GRAPHICS_DISABLED = "16000046"  # graphicsmodedisabled, an element of an entry of the BCD


def fix(g: Any, inspection: Inspection, windows: Windows, options: FixOptions) -> FixResult:
    """Fix the Windows that is mounted, and unmount it.

    Raise MigrationError: os_unsupported, guest_dirty, fix_failed, fix_unproved.
    """
    if windows.release is None or windows.arch not in ("x86_64", "i386"):
        raise MigrationError(
            Code.OS_UNSUPPORTED,
            f"{windows.product} (build {windows.build}, {windows.arch}) cannot be fixed: it is older than Windows Vista"
            " and Server 2008, or for another processor than the domain's",
            "Set fix.allow_unsupported to migrate it unchanged, with IDE disks and an e1000 network card.",
        )
    machine = partial(machine_of, inspection)
    wishes, not_done = asked.wishes(windows, options)
    if why := firstboot.unusable(wishes):
        raise MigrationError(Code.FIX_FAILED, why, "Correct it in the manifest.", field="configuration")
    wanted, unknown = asked.connections(windows, options.configuration)
    addresses, warnings = _kept(windows, options.nics, wanted)
    warnings += [*not_done, *unknown]
    given = options.virtio_win if options.drivers else None
    with Catalogue.open(given) as catalogue, open_hive(g, windows.hives[SYSTEM], SYSTEM, write=True) as system:
        choice = choose(g, system, windows, catalogue, machine)
        put = [*files(windows, choice)]
        edits = system_edits(system, windows, choice)
        if firstboot.needed(choice, addresses, wishes):
            put += _first_boot(windows, choice, addresses, wishes)
            for control_set in windows.control_sets:
                firstboot.register(edits, control_set)
        warnings += asked.services(edits, windows.control_sets, options.configuration)
        changes = _apply(edits)
    if choice.packages:
        with open_hive(g, windows.hives[SOFTWARE], SOFTWARE, write=True) as software:
            changes += _apply(software_edits(software, choice))
    changes = [*_put(g, put), *changes]
    warnings = [*choice.warnings, *warnings]
    hashes = {file.path.lower(): file.sha256 for file in put}
    g.umount_all()
    if options.bootloader and inspection.firmware == "uefi" and windows.boot is not None:
        changes += _loader(g, windows, windows.boot)
    mount_one(
        g, "/", inspection.root, {device.name: device.type for device in inspection.filesystems}, {}, [], waits=True
    )
    proofs, said = prove(g, windows, inspection.firmware, inspection.root, choice, hashes)
    warnings += said
    if failed := [proof for proof in proofs if not proof.ok]:
        raise _unproved(failed)
    return FixResult(
        changes=tuple(changes),
        proofs=tuple(proofs),
        drivers_injected=tuple(package.driver for package in choice.packages),
        boot_updated=any(change.fixer == "windows.loader" for change in changes),
        machine=choice.machine,
        fstab=("", ""),
        warnings=tuple(warnings),
    )


def machine_of(inspection: Inspection, virtio: bool, scsi: bool) -> Machine:
    """The machine of a Windows; scsi: whether its virtio disks are on a SCSI controller."""
    guest, disks = inspection.system(None), len(inspection.disks)
    return machine_for(guest, inspection.firmware, disks, virtio=virtio, scsi=scsi)


def _kept(
    windows: Windows, nics: Sequence[Nic], wanted: Mapping[str, Addresses]
) -> tuple[tuple[Addresses, ...], list[Finding]]:
    """The cards with addresses of their own, each with the MAC address by which the new one is known.

    Windows takes the new cards for others, which have no addresses yet. wanted: what the manifest gives cards instead,
    by GUID.
    """
    slots: dict[int | None, str | None] = {nic.pci_slot: nic.mac for nic in nics if nic.pci_slot is not None}
    macs = {nic.mac for nic in nics}
    kept, warnings = [], []
    for old in windows.addresses:
        card = wanted.get(old.guid, old)
        if not card.static and card is old:
            continue
        mac = card.mac or slots.get(card.slot) or (nics[0].mac if len(nics) == 1 == len(windows.addresses) else None)
        if mac and mac in macs:
            kept.append(replace(card, mac=mac))
            if card.routes6:
                warnings.append(_routes_lost(card))
            continue
        why = f"its MAC address {mac} is of no card of the new VM" if mac else "nobody knows which card it was"
        what = f"the addresses {', '.join(card.addresses)}" if card.addresses else "DHCP"
        warnings.append(
            Finding(
                "addresses_lost",
                f"{what} of '{card.name or card.guid}' {'are' if card.addresses else 'is'} not set: {why}",
                "Give the addresses to the card in Windows, or export again with all cards in the manifest's nics.",
                "nics",
            )
        )
    return tuple(kept), warnings


def _routes_lost(card: Addresses) -> Finding:
    return Finding(
        "addresses_lost",
        f"the routes of IPv6 that somebody gave '{card.name or card.guid}' are not kept: Windows has them in a form"
        " that nobody has described",
        "Give them to the card in Windows (`netsh interface ipv6 add route`), unless a router announces them; or name"
        " the connection with its gateway6 in the manifest's configuration.network.",
        "nics",
    )


def _first_boot(windows: Windows, choice: Choice, addresses: Sequence[Addresses], wishes: Wishes) -> list[File]:
    """The files for what Windows does when it first starts."""
    directory = f"{windows.system_root}/{firstboot.DIRECTORY}"
    texts = {firstboot.SCRIPT: firstboot.script(windows, choice, addresses, wishes)}
    if addresses and windows.has_driver_database:
        texts[firstboot.NETWORK] = firstboot.network_script(addresses)
    summary = "what Windows does when it first starts"
    return [
        File("windows.firstboot", f"{directory}/{name}", data, hashlib.sha256(data).hexdigest(), summary)
        for name, data in ((name, text.encode()) for name, text in texts.items())
    ]


def _put(g: Any, put: Sequence[File]) -> list[Change]:
    """Write the files that are not there already."""
    changes = []
    for file, path in zip(put, _places(g, put), strict=True):
        if g.is_file(path) and g.checksum("sha256", path) == file.sha256:
            continue
        if g.is_symlink(path):  # what Windows has compressed, see `spelt`
            g.rm(path)
        directory, _, name = path.rpartition("/")
        g.mkdir_p(directory)
        g.write(path, file.content)
        if file.fixer == "windows.drivers":  # a package is one thing
            changes.append(
                Change(file.fixer, _shown(directory), file.summary, evidence=f"{name}: SHA-256 {file.sha256}")
            )
            continue
        text = file.content.decode().replace("\r\n", "\n") if file.fixer == "windows.firstboot" else None
        diff = "" if text is None else unified_diff(path, None, text)
        changes.append(Change(file.fixer, _shown(path), file.summary, diff=diff, evidence=f"SHA-256 {file.sha256}"))
    return _merged(changes)


def _shown(path: str) -> str:
    """A path as Windows has it."""
    return f"C:{path}".replace("/", "\\")


def _places(g: Any, put: Sequence[File]) -> list[str]:
    """Where the files are, or will be, with what is there spelt as on the disk: no name may be there in two cases."""
    directories: dict[str, tuple[str, dict[str, str]]] = {}
    found = []
    for file in put:
        above, _, name = file.path.rpartition("/")
        if above not in directories:
            at = _place(g, above)
            directories[above] = at, {one.lower(): one for one in (g.ls(at) if g.is_dir(at) else ())}
        at, names = directories[above]
        found.append(f"{at}/{names.get(name.lower(), name)}")
    return found


def _place(g: Any, path: str) -> str:
    """A path with what is there of it as it is spelt on the disk."""
    above, _, name = path.rpartition("/")
    return spelt(g, path) or f"{_place(g, above) if above else ''}/{name}"


def _apply(registry: Registry) -> list[Change]:
    """Change a hive that is open for writing as it was planned; where that is nothing, it is not written."""
    for edit in registry.edits:
        edit.apply(registry.hive)
    return _merged(edit.done() for edit in registry.edits)


def _merged(changes: Iterable[Change]) -> list[Change]:
    """Several changes of one key or directory, for the same reason, as one: so people read them."""
    found: dict[tuple[str, str, str], Change] = {}
    for change in changes:
        place = (change.fixer, change.path, change.summary)
        if (before := found.get(place)) is not None:
            diff = "\n".join(filter(None, (before.diff, change.diff)))
            evidence = "\n".join(dict.fromkeys(filter(None, (before.evidence, change.evidence))))
            change = replace(before, diff=diff, evidence=evidence)
        found[place] = change
    return list(found.values())


def _loader(g: Any, windows: Windows, boot: Boot) -> list[Change]:
    """Have firmware without a memory of the old machine find the boot manager, and Windows draw as OVMF lets it.

    Nothing is mounted before, nor after. What is in EFI/Boot already is left: it may be another system's.
    """
    changes = []
    g.mount(boot.device, "/")
    try:
        manager, path = spelt(g, MANAGER), f"/EFI/Boot/{FALLBACK[windows.arch]}"
        if manager and spelt(g, path) is None:
            place = _place(g, path)
            g.mkdir_p(place.rpartition("/")[0])
            g.cp(manager, place)
            changes.append(Change("windows.loader", place, f"a copy of {manager}, which firmware finds by itself"))
        if boot.entry is not None:
            key = f"Objects\\{boot.entry.id}\\Elements\\{GRAPHICS_DISABLED}"
            with open_hive(g, boot.path, bcd.NAME, write=True) as store:
                registry = Registry(store)
                registry.set(
                    "windows.loader", key, "Element", binary(b"\1"), "Windows keeps the firmware's screen mode"
                )
                changes += _apply(registry)
    finally:
        g.umount_all()
    return changes


def _unproved(failed: Sequence[Proof]) -> MigrationError:
    first = failed[0]
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return MigrationError(
        Code.FIX_UNPROVED,
        f"{first.subject}: it is not so that {first.claim}: {first.evidence}{more}",
        "Fix it in Windows on VMware, see that it starts there, shut it down, and export it again. To migrate it as it"
        " is, set fix.enabled to false in its manifest.",
        field="pipeline.fix",
    )
