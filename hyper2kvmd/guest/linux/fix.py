"""Fixes a guest so that it boots on new hardware: plan, check space, edit, rebuild, and prove it."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import Machine
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.change import Change, Command, Edit, FixResult, encode
from hyper2kvmd.guest.inspect import Inspection
from hyper2kvmd.guest.linux import fstab, kernels, selinux
from hyper2kvmd.guest.linux.fixers import (
    FixPlan,
    View,
    addresses,
    bootloader,
    configuration,
    disks,
    efi,
    initramfs,
    network,
    platform,
    vmware,
)
from hyper2kvmd.guest.linux.kernels import VIRTIO, VIRTIO_SCSI, Bus, Image, bus_of
from hyper2kvmd.guest.linux.menu import Menu
from hyper2kvmd.guest.mounts import device_of
from hyper2kvmd.guest.options import FixOptions
from hyper2kvmd.guest.session import Session, last_line, shell
from hyper2kvmd.run import tail
from hyper2kvmd.text import printable

# Fixers whose files are also copied into the initramfs, where the old ones must not stay.
_COPIED = frozenset({"resume", "crypttab", "lvm", "raid", "network"})


def fix(session: Session, inspection: Inspection, options: FixOptions) -> FixResult:
    """Fix the guest that `inspect` mounted, and unmount it. A guest that needs nothing is not written to.

    Raise MigrationError: os_unsupported, guest_space, guest_dirty, fix_failed, fix_unproved.
    """
    g = session.g
    tools = session.tools
    view = View(g, inspection, inspection.names)
    warnings: list[Finding] = []
    # The overlays lie in the job's own directory: what is downloaded next to them goes when they go.
    with tempfile.TemporaryDirectory(prefix="initramfs-", dir=session.disks[0].parent) as scratch:
        on_menu = [kernel for kernel in inspection.kernels if kernel.chosen_by_bootloader]
        before = kernels.look(g, on_menu, tools, Path(scratch))
        choice = choose_machine(inspection, before, options)
        plans = _plans(view, choice, options)
        warnings += [*choice.warnings, *(finding for plan in plans for finding in plan.warnings)]
        if options.rdp:
            message = (
                "the manifest asks for remote desktop connections to be enabled, which Windows has, and Linux has not"
            )
            warnings.append(Finding("not_done", message, "Leave it out.", "pipeline.fix.enable_rdp"))
        stale = _to_rebuild(choice, [edit for plan in plans for edit in plan.edits], options)
        if stale:
            initramfs.check_space(g, stale, choice.bus)
        fstab_before = view.read(fstab.PATH) or ""
        changes = _apply(g, plans, options)
        if stale:
            changes += initramfs.rebuild(view, stale, choice.bus)
        built = {
            image.kernel.path: image
            for image in kernels.look(g, [image.kernel for image in stale], tools, Path(scratch))
        }
    able = [image for image in before if image in choice.able]
    after = [built.get(image.kernel.path, image) for image in able]
    named = bootloader.prove(view, able)
    warnings += named.warnings
    proofs = (
        *kernels.prove(able, after, choice.bus),
        *disks.prove(view, choice.machine.disks, after),
        *named.proofs,
        *efi.prove(view),
    )
    if failed := [proof for proof in proofs if not proof.ok]:
        said = (f"{proof.subject}: it is not so that {proof.claim}: {proof.evidence}" for proof in failed)
        raise _unproved("; ".join(said), inspection, options)
    warnings += initramfs.missing_in_kernels(after, choice.bus)
    fstab_after = view.read(fstab.PATH) or ""
    if changes:
        changes += selinux.relabel(view, [change.path for change in changes])
    _close(g, inspection, changed=bool(changes))
    return FixResult(
        changes=tuple(changes),
        proofs=proofs,
        drivers_injected=_injected(able, after, choice.bus),
        boot_updated=any(change.fixer in ("bootloader", "efi", "initramfs") for change in changes),
        machine=choice.machine,
        fstab=(fstab_before, fstab_after),
        warnings=tuple(warnings),
        names=tuple(dict.fromkeys(name for plan in plans for name in plan.names)),
    )


@dataclass(frozen=True)
class Choice:
    """The machine, which kernels find their root on its bus, and the entry to start from now on.

    default: an index into the boot menu's entries, None to leave it as it is.
    """

    machine: Machine
    bus: Bus
    able: tuple[Image, ...]
    default: int | None
    warnings: tuple[Finding, ...]


def choose_machine(inspection: Inspection, images: Sequence[Image], options: FixOptions) -> Choice:
    """The machine of the kernel that starts: with virtio if it has the drivers or can get them, else without.

    A menu whose default has no virtio starts another of its kernels from now on, if one has.
    Raise MigrationError: os_unsupported, fix_unproved.
    """
    if inspection.os_type != "linux" or not images:
        raise _unsupported(inspection)
    rebuilt = options.drivers and options.initramfs and inspection.initramfs in initramfs.BUILDERS
    starts = _default(inspection, images)
    others = [image for image in images if image is not starts and not image.kernel.rescue]
    for virtio in (True, False):
        for image in (*([starts] if starts else []), *(others if starts is None or options.bootloader else [])):
            machine, bus = _machine(inspection, image, virtio=virtio)
            able = tuple(one for one in images if one.can(bus, rebuilt=rebuilt))
            if image not in able or all(one.kernel.rescue for one in able):
                continue
            warnings = _bus_warnings(machine, bus, able, images, inspection.menu)
            if starts is None or image is starts:
                return Choice(machine, bus, able, None, warnings)
            warning = Finding(
                "default_kernel",
                f"the boot menu started {starts.kernel.version}, which has no drivers for {bus.name} disks; "
                f"it starts {image.kernel.version} now",
                "Choose another default in the guest once its kernels are updated.",
            )
            return Choice(machine, bus, able, image.kernel.entry, (warning, *warnings))
    if inspection.initramfs not in initramfs.BUILDERS:
        raise _unsupported(inspection)
    missing = (
        f"{image.kernel.version} lacks {_lacking(image, _machine(inspection, image, virtio=True)[1])}"
        + (
            f" in {image.kernel.path}, a unified kernel image, which only the guest can make"
            if image.kernel.sealed
            else ""
        )
        for image in images
    )
    raise _unproved("; ".join(missing), inspection, options)


def _machine(inspection: Inspection, image: Image, *, virtio: bool) -> tuple[Machine, Bus]:
    """The machine of a guest that starts this kernel, and what that needs."""
    disks = len(inspection.disks)
    # One that was at home on KVM is left as it is: the image that a rebuild would give the other driver works.
    scsi = image.can(VIRTIO_SCSI, rebuilt=False) and not image.can(VIRTIO, rebuilt=False)
    system = inspection.system(image.kernel.version)
    machine = machine_for(system, inspection.firmware, disks, virtio=virtio, scsi=scsi)
    return machine, bus_of(machine, disks)


def _lacking(image: Image, bus: Bus) -> str:
    return ", ".join(driver for driver in image.needs(bus) if not image.has(driver))


def _default(inspection: Inspection, images: Sequence[Image]) -> Image | None:
    """The image that starts unless somebody chooses, None if nobody can know."""
    menu = inspection.menu
    if menu is None or menu.default is None:
        return None
    kernel = menu.entries[menu.default].kernel
    first = next(number for number, entry in enumerate(menu.entries) if entry.kernel == kernel)
    return next((image for image in images if image.kernel.entry == first), None)


def _bus_warnings(
    machine: Machine, bus: Bus, able: Sequence[Image], images: Sequence[Image], menu: Menu | None
) -> tuple[Finding, ...]:
    found = [_unable(image, bus, menu) for image in images if image not in able]
    if not machine.virtio:
        found.append(
            Finding(
                "no_virtio",
                f"no kernel that the guest starts has virtio drivers, or may be given them: the domain gets {bus.name} "
                f"disks and an {machine.cards} network card, which are slower",
                "Install a kernel with virtio_blk and virtio_net on VMware, and export again.",
            )
        )
    return tuple(found)


def _unable(image: Image, bus: Bus, menu: Menu | None) -> Finding:
    """The warning that an entry of the menu does not start: a rescue image has the version of another kernel."""
    kernel = image.kernel
    entry = menu.entries[kernel.entry] if menu is not None and kernel.entry is not None else None
    title = f"the entry {printable(entry.title)}" if entry and entry.title else f"the kernel {kernel.version}"
    file = kernel.initrd or kernel.path
    hint = "Do not choose it; remove it from the guest, or install one that has the drivers."
    if kernel.rescue:
        hint = (
            f"Do not choose it. To have one that starts, remove {file} and its kernel once the guest runs on KVM, "
            "and reinstall the newest kernel, which builds it again."
        )
    message = f"{title} on the boot menu ({file}) does not find its root on {bus.name} disks: it lacks "
    return Finding("kernel_unable", message + _lacking(image, bus), hint)


def _plans(view: View, choice: Choice, options: FixOptions) -> list[FixPlan]:
    """What every fixer that is wanted wants to do."""
    interfaces, unnamed = addresses.named(options.configuration.interfaces)
    plans = [
        FixPlan(warnings=unnamed),
        *disks.plans(view, choice.machine.disks, options.fstab, bootloader=options.bootloader),
        network.plan(view, options.nics, choice.machine.cards, interfaces),
        platform.plan(view),
    ]
    if options.bootloader:
        plans += [bootloader.plan(view, console=options.serial_console, default=choice.default), efi.plan(view)]
    if options.drivers:
        plans.append(initramfs.plan(view, choice.able, choice.bus))
    if options.remove_vmware_tools:
        plans.append(vmware.plan(view))
    plans.append(configuration.plan(view, options.configuration.model_copy(update={"interfaces": interfaces})))
    return plans


def _unsupported(inspection: Inspection) -> MigrationError:
    return MigrationError(
        Code.OS_UNSUPPORTED,
        f"{inspection.product_name} ({inspection.os_type} {inspection.distro} {inspection.version}) with initramfs "
        f"stack {inspection.initramfs}, boot loader {inspection.bootloader} and "
        f"{sum(kernel.chosen_by_bootloader for kernel in inspection.kernels)} kernels on its menu cannot be fixed",
        "If the guest holds virtio drivers already, set fix.enabled to false in its manifest; or set "
        "fix.allow_unsupported to migrate such guests unchanged, with SATA disks and an e1000e network card.",
    )


def _to_rebuild(choice: Choice, edits: Sequence[Edit], options: FixOptions) -> tuple[Image, ...]:
    """The images that lack a driver, or that hold a copy of a file that is edited."""
    if not options.initramfs:
        return ()
    copied = any(edit.fixer in _COPIED for edit in edits)
    return tuple(
        image
        for image in choice.able
        if image.kernel.can_be_rebuilt and (copied or (options.drivers and image.lacks(choice.bus)))
    )


def _apply(g: Any, plans: Sequence[FixPlan], options: FixOptions) -> list[Change]:
    """Do what was planned. An existing file keeps its inode, and so its owner, mode and labels."""
    edits = [edit for plan in plans for edit in plan.edits]
    if len({edit.path for edit in edits}) < len(edits):
        raise AssertionError(f"two fixers edit one file: {sorted(edit.path for edit in edits)}")
    changes = _back_up(g, edits, options.backup_dir)
    for edit in edits:
        if edit.after is None:
            g.rm(edit.path)
        else:
            if edit.before is None:
                g.mkdir_p(edit.path.rpartition("/")[0] or "/")
                if g.is_symlink(edit.path):  # to /dev/null, which turns a file of that name off, and would swallow it
                    g.rm(edit.path)
            g.write(edit.path, encode(edit.after))
            if edit.before is None:
                g.chmod(edit.mode, edit.path)
        changes.append(edit.done())
    for copy in (copy for plan in plans for copy in plan.copies):
        g.mkdir_p(copy.path.rpartition("/")[0])
        g.cp(copy.source, copy.path)
        changes.append(copy.done())
    for command in (command for plan in plans for command in plan.commands):
        changes.append(command.done(_run(g, command)))
    return changes


def _back_up(g: Any, edits: Sequence[Edit], directory: str) -> list[Change]:
    """Copy what is about to be edited to `directory` in the guest, with owners, modes and the directories above."""
    paths = list(dict.fromkeys(edit.path for edit in edits if edit.before is not None))
    if not directory or not paths:
        return []
    relative = shlex.join(path.lstrip("/") for path in paths)
    quoted = shlex.quote(directory)
    g.sh(f"mkdir -p -m 700 {quoted} && cd / && cp -a --parents {relative} {quoted}")
    return [Change("backup", directory, f"the originals of {', '.join(paths)}")]


def _run(g: Any, command: Command) -> str:
    status, output = shell(g, command.command)
    if status:
        raise MigrationError(
            Code.FIX_FAILED,
            f"{command.fixer}: {command.summary}: the command ended with {status} in the guest: {last_line(output)}",
            "Run it in the guest on VMware, or take the wish for it out of the manifest; then export it again.",
            tail=tail(output),
        )
    return tail(output)


def _unproved(message: str, inspection: Inspection, options: FixOptions) -> MigrationError:
    if options.drivers and options.initramfs and options.bootloader:
        builder = initramfs.BUILDERS.get(inspection.initramfs)
        hint = "See that /boot holds a kernel with virtio drivers. " + (builder.remedy if builder else "")
        if inspection.firmware == "uefi":
            hint += " For a missing EFI loader run `grub-install --removable`."
    else:
        hint = "Let the manifest's fix section allow drivers, the initramfs and the boot loader to be changed."
    return MigrationError(Code.FIX_UNPROVED, message, hint, field="pipeline.fix")


def _close(g: Any, inspection: Inspection, *, changed: bool) -> None:
    """Unmount everything, and check the file systems that could have been written to."""
    g.umount_all()
    if not changed:
        return
    types = {device.name: device.type for device in inspection.filesystems}
    for device in dict.fromkeys(map(device_of, inspection.mounts.values())):
        if types.get(device, "").startswith("ext"):
            try:
                g.e2fsck(device, correct=True)
            except RuntimeError as error:
                raise MigrationError(
                    Code.GUEST_DIRTY,
                    f"the file system on {device} is damaged: {printable(str(error), 400)}",
                    "Run fsck on it on VMware, shut the guest down properly, and export it again.",
                ) from None


def _injected(before: Sequence[Image], after: Sequence[Image], bus: Bus) -> tuple[str, ...]:
    drivers = dict.fromkeys(driver for image in after for driver in (*image.needs(bus), *bus.wanted))
    return tuple(
        d for d in drivers if any(new.has(d) and not old.has(d) for old, new in zip(before, after, strict=True))
    )


def add_serial_console(session: Session, inspection: Inspection) -> bool:
    """Have the kernels of the guest that `inspect` mounted write to the first serial port too, and unmount it.

    Return whether there was anything to change. Raise MigrationError (guest_dirty).
    """
    view = View(session.g, inspection, inspection.names)
    plan = bootloader.plan(view, console=True)
    if plan.edits:
        _apply(session.g, [plan], FixOptions())
    _close(session.g, inspection, changed=bool(plan.edits))
    return bool(plan.edits)
