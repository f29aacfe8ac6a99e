"""`hyper2kvmctl switch-bus`: another bus for the disks of a migrated Windows, once it would start from there."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hyper2kvmd import accel
from hyper2kvmd.ctl.output import agreed, print_json, print_warnings, refuse, say
from hyper2kvmd.domain.switch import difference, hard_disks, is_q35, switched
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.exits import EXIT_DONE, EXIT_FAILED, EXIT_NOT_FOUND, EXIT_USAGE
from hyper2kvmd.guest.inspect import Inspection, inspect
from hyper2kvmd.guest.session import Session, open_guest
from hyper2kvmd.guest.windows.switch import Switch, left_behind, prove_switch
from hyper2kvmd.hypervisor.connection import connect, translated
from hyper2kvmd.hypervisor.define import redefine, settled_xml
from hyper2kvmd.image.qemu_img import create_throw_away
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import escaped


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "switch-bus", help="give a migrated Windows that is shut off another bus, if it would start from there"
    )
    parser.add_argument("vm", metavar="VM", help="the VM, as `virsh list --all` has it")
    parser.add_argument(
        "bus", choices=("virtio", "sata"), help="the new bus of its disks; its network cards change too"
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="look into the guest, and show what would change")
    parser.set_defaults(run=switch_bus)
    return [parser]


def switch_bus(options: argparse.Namespace, config: Settings) -> int:
    """Look into the guest, show what would change, ask, and define the domain again."""
    name: str = options.vm
    with connect(config.libvirt.uri) as connection:
        domain = _find(connection, name)
        if domain is None:
            return refuse(EXIT_NOT_FOUND, f"{name}: {config.libvirt.uri} has no domain of this name; see `virsh list`")
        shown, before = settled_xml(domain, name), settled_xml(domain, name, secrets=True)
        found, warnings = _look(name, shown, options.bus, config)
        change = partial(switched, machine=found.machine, cards=found.new_cards)
        diff = difference(shown, change(shown))
        if not options.json:
            _show(found, warnings, diff)
        if diff and not options.dry_run:
            if not options.yes:
                if not sys.stdin.isatty():
                    return refuse(EXIT_USAGE, "nothing was changed: there is nobody to ask; use --yes")
                if not agreed(f"Change {name}?"):
                    return refuse(EXIT_FAILED, "nothing was changed")
            redefine(connection, domain, name, before, change(before))
    changed = bool(diff) and not options.dry_run
    if options.json:
        print_json(
            {
                "domain": name,
                "changed": changed,
                "disks": found.machine.disks,
                "cards": found.machine.cards if found.new_cards else None,
                "diff": diff,
                "proofs": [asdict(proof) for proof in found.proofs],
                "warnings": [finding.as_json() for finding in warnings],
            }
        )
    elif not diff:
        say(f"{name}: nothing to change")
    else:
        say(f"{name}: changed, and not started" if changed else f"{name}: nothing was changed, as this was a dry run")
    return EXIT_DONE


def _find(connection: Any, name: str) -> Any:
    """The domain of a name, None if there is none."""
    with translated(Code.LIBVIRT_UNAVAILABLE):
        return next((domain for domain in connection.listAllDomains() if domain.name() == name), None)


def _look(name: str, xml: str, bus: Literal["virtio", "sata"], config: Settings) -> tuple[Switch, list[Finding]]:
    """Look into the disks of a domain, on overlays that are thrown away; with what a person should know.

    Raise MigrationError (os_unsupported, fix_unproved, guest_dirty and the others of INSPECT), or OSError.
    """
    if not is_q35(xml):
        raise MigrationError(
            Code.OS_UNSUPPORTED,
            f"{name} has another chipset than q35, and Windows is proved for that alone",
            "It is left alone; `virsh edit` changes it.",
        )
    try:
        disks = hard_disks(xml)
    except ValueError as error:
        raise MigrationError(
            Code.OS_UNSUPPORTED,
            f"the disk {error} of {name} is no file and no device of this host, and cannot be looked into",
            "It is left alone; `virsh edit` changes it.",
        ) from None
    tools = Tools()
    acceleration = accel.resolve(config.guest.accel, tools)
    for path, _ in disks:
        with path.open("rb"):  # what may not be read is best said by name
            pass
    with tempfile.TemporaryDirectory(prefix="hyper2kvm-switch-bus-") as scratch:
        overlays = [Path(scratch) / f"{number}.qcow2" for number in range(len(disks))]
        for overlay, (path, format) in zip(overlays, disks, strict=True):
            create_throw_away(tools, overlay, path, format)
        with open_guest(
            [(overlay, "qcow2") for overlay in overlays],
            accel=acceleration.name,
            memory_mb=config.guest.memory_mb,
            tools=tools,
        ) as session:
            inspection = _inspected(session, name)
            windows = inspection.windows
            if windows is None:
                raise MigrationError(
                    Code.OS_UNSUPPORTED,
                    f"{name} runs {inspection.product_name}, and the bus of Windows alone is changed so",
                    "Migrate it again, if its kernel has virtio now, or use `virsh edit`.",
                )
            found = prove_switch(session.g, inspection, windows, bus)
    warnings = [*([acceleration.warning] if acceleration.warning else []), *found.warnings]
    if found.new_cards and switched(xml, found.machine) != switched(xml, found.machine, cards=False):
        warnings += left_behind(windows)
    return found, warnings


def _inspected(session: Session, name: str) -> Inspection:
    try:
        return inspect(session)
    except MigrationError as error:
        if error.code is not Code.GUEST_DIRTY:
            raise
        hint = (
            f"Start {name}; in it, `powercfg /h off`, have its updates finished, `chkdsk C: /f` if it is damaged, and"
            " `shutdown /s /t 0`. Then try again."
        )
        raise MigrationError(error.code, error.message, hint) from None


def _show(found: Switch, warnings: Sequence[Finding], diff: str) -> None:
    for proof in found.proofs:
        say(f"proof      {proof.subject}: {proof.claim}: {proof.evidence}")
    print_warnings(warnings)
    for line in diff.splitlines():
        say(escaped(line, "\t"))
