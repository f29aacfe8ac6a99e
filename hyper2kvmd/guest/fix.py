"""Mends a guest so that it boots on virtio: plan, check space, edit, rebuild, and prove it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.change import Change, Copy, Edit, Proof, encode, printable
from hyper2kvmd.guest.devices import Names, changes_with_hardware
from hyper2kvmd.guest.fixers import View, bootloader, crypttab, efi, fstab, initramfs, resume
from hyper2kvmd.guest.inspect import Inspection
from hyper2kvmd.guest.session import Session


@dataclass(frozen=True)
class FixOptions:
    """Which fixes are wanted; all of them, unless the manifest says otherwise."""

    fstab: bool = True  # /etc/fstab and /etc/crypttab
    bootloader: bool = True
    drivers: bool = True  # ask for the drivers in the configuration of the initramfs
    initramfs: bool = True  # build the initramfs anew where it lacks them


@dataclass(frozen=True)
class FixResult:
    """What was changed, and what was proved of the result."""

    changes: tuple[Change, ...]
    proofs: tuple[Proof, ...]
    drivers_injected: tuple[str, ...]
    boot_updated: bool
    warnings: tuple[Finding, ...]


def fix(session: Session, inspection: Inspection, options: FixOptions) -> FixResult:
    """Mend the guest that `inspect` mounted, and unmount it. A guest that needs nothing is not written to.

    Raise MigrationError: os_unsupported, guest_space, guest_dirty, fix_failed, fix_unproved.
    """
    _refuse_unsupported(inspection)
    g = session.g
    tools = session.tools
    names, warnings = _names(g, inspection)
    view = View(g, inspection, names)
    # The overlays lie in the job's own directory: what is downloaded next to them goes when they go.
    with tempfile.TemporaryDirectory(prefix="initramfs-", dir=session.disks[0].parent) as scratch:
        before = initramfs.look(view, tools, Path(scratch))
        plans = [
            *([fstab.plan(view), crypttab.plan(view)] if options.fstab else []),
            *([resume.plan(view), bootloader.plan(view), efi.plan(view)] if options.bootloader else []),
            *([initramfs.plan(view, before)] if options.drivers else []),
        ]
        edits = [edit for plan in plans for edit in plan.edits]
        copies = [copy for plan in plans for copy in plan.copies]
        stale = _to_rebuild(before, edits) if options.initramfs else ()
        if stale:
            initramfs.check_space(g, stale)
        _apply(g, edits, copies)
        changes = [*(edit.done() for edit in edits), *(copy.done() for copy in copies)]
        if stale:
            changes += initramfs.rebuild(view, stale)
        rebuilt = {image.kernel.version for image in stale}
        built = {image.kernel.version: image for image in initramfs.look(_only(view, rebuilt), tools, Path(scratch))}
    after = [built.get(image.kernel.version, image) for image in before]
    if not after:
        raise _unproved("the boot menu names no kernel that is in /boot", options)
    proofs = (*initramfs.prove(after), *efi.prove(view))
    if failed := [proof for proof in proofs if not proof.ok]:
        said = (f"{proof.subject}: it is not so that {proof.claim}: {proof.evidence}" for proof in failed)
        raise _unproved("; ".join(said), options)
    warnings += [finding for plan in plans for finding in plan.warnings] + list(initramfs.missing_in_kernels(after))
    _close(g, inspection, changed=bool(changes))
    return FixResult(
        changes=tuple(changes),
        proofs=proofs,
        drivers_injected=_injected(before, after),
        boot_updated=any(change.fixer in ("bootloader", "efi", "initramfs") for change in changes),
        warnings=tuple(warnings),
    )


def _refuse_unsupported(inspection: Inspection) -> None:
    if inspection.os_type == "linux" and inspection.initramfs == "initramfs-tools" and inspection.bootloader == "grub2":
        return
    raise MigrationError(
        Code.OS_UNSUPPORTED,
        f"{inspection.product_name} ({inspection.os_type} {inspection.distro} {inspection.version}) with initramfs "
        f"stack {inspection.initramfs} and boot loader {inspection.bootloader} cannot be fixed yet",
        "If the guest holds virtio drivers already, set fix.enabled to false in its manifest; or set "
        "fix.allow_unsupported to migrate such guests unchanged, with SATA disks and an e1000e network card.",
    )


def _names(g: Any, inspection: Inspection) -> tuple[Names, list[Finding]]:
    """The guest's device names, if its disks are in the order that the names say.

    The root's own line in fstab is the test: looking told where the root is.
    """
    names = Names(inspection.disks, {device.name: device for device in inspection.filesystems})
    text = View(g, inspection, names).read(fstab.PATH) or ""
    line = re.search(r"^[ \t]*(/dev/\S+)[ \t]+/[ \t]", text, re.MULTILINE)
    if line is None or not changes_with_hardware(line[1]):
        return names, []
    device = names.find(line[1])
    if device is not None and device.name == inspection.root:
        return names, []
    if device is None and len(inspection.disks) > 1 and "/dev/disk/" in line[1]:
        return names, []  # an address, which says nothing about the order
    warning = Finding(
        "disk_order",
        f"the guest calls its root {line[1]}, but its root is {inspection.root} here: the disks are not in the guest's "
        "order, and device names of disks that cannot be told apart are not translated",
        "List the disks in the manifest in the order of their controller slots.",
        "disks",
    )
    return names.corrected(line[1], inspection.root), [warning]


def _to_rebuild(images: Sequence[initramfs.Image], edits: Sequence[Edit]) -> tuple[initramfs.Image, ...]:
    """The images that lack a driver, or that hold a copy of a file that is edited."""
    copied = any(edit.fixer in ("resume", "crypttab") for edit in edits)
    return tuple(image for image in images if image.kernel.initrd and (copied or image.lacks()))


def _only(view: View, versions: set[str]) -> View:
    kernels = tuple(kernel for kernel in view.inspection.kernels if kernel.version in versions)
    return replace(view, inspection=replace(view.inspection, kernels=kernels))


def _apply(g: Any, edits: Sequence[Edit], copies: Sequence[Copy]) -> None:
    """Make the edits and copies. An existing file keeps its inode, and so its owner, mode and labels."""
    for edit in edits:
        if edit.after is None:
            g.rm(edit.path)
        else:
            g.write(edit.path, encode(edit.after))
    for copy in copies:
        g.mkdir_p(copy.path.rpartition("/")[0])
        g.cp(copy.source, copy.path)


def _unproved(message: str, options: FixOptions) -> MigrationError:
    if options.drivers and options.initramfs and options.bootloader:
        hint = (
            "See that /boot holds a kernel with virtio drivers, and that `update-initramfs -u -k all` works in the "
            "guest on VMware (update_initramfs=no in /etc/initramfs-tools/update-initramfs.conf turns it off); "
            "for a missing EFI loader run `grub-install --removable`. Then export it again."
        )
    else:
        hint = "Let the manifest's fix section allow drivers, the initramfs and the boot loader to be changed."
    return MigrationError(Code.FIX_UNPROVED, message, hint, field="pipeline.fix")


def _close(g: Any, inspection: Inspection, *, changed: bool) -> None:
    """Unmount everything, and check the file systems that could have been written to."""
    g.umount_all()
    if not changed:
        return
    types = {device.name: device.type for device in inspection.filesystems}
    for device in dict.fromkeys(inspection.mounts.values()):
        if types.get(device, "").startswith("ext"):
            try:
                g.e2fsck(device, correct=True)
            except RuntimeError as error:
                raise MigrationError(
                    Code.GUEST_DIRTY,
                    f"the file system on {device} is damaged: {printable(str(error), 400)}",
                    "Run fsck on it on VMware, shut the guest down properly, and export it again.",
                ) from None


def _injected(before: Sequence[initramfs.Image], after: Sequence[initramfs.Image]) -> tuple[str, ...]:
    drivers = (*initramfs.NEEDED, *initramfs.WANTED)
    return tuple(
        d for d in drivers if any(new.has(d) and not old.has(d) for old, new in zip(before, after, strict=True))
    )
