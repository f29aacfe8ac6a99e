"""UEFI: a boot loader where firmware without memory of this machine looks for one, \\EFI\\BOOT on the ESP."""

from __future__ import annotations

from collections.abc import Sequence

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Copy, Proof
from hyper2kvmd.guest.linux.fixers import FixPlan, View

# The suffix of EFI programs, by architecture.
_ARCH = {"x86_64": "x64", "i386": "ia32", "aarch64": "aa64"}


def plan(view: View) -> FixPlan:
    """Copy the distribution's boot loader to the fallback path if nothing is there.

    VMware's firmware remembers the boot entry that the installer made; that memory does not come with the export.
    """
    if view.inspection.firmware != "uefi":
        return FixPlan()
    esp = _mount_point(view)
    if esp is None or view.g.is_file(_fallback(view, esp)):
        return FixPlan()
    suffix = _suffix(view)
    directories = [
        name
        for name in view.g.ls(f"{esp}/EFI")
        if name.lower() not in ("boot", "microsoft") and view.g.is_dir(f"{esp}/EFI/{name}")
    ]
    directories.sort(key=lambda name: name.lower() != view.inspection.distro)
    for directory in directories:
        source = f"{esp}/EFI/{directory}"
        if copies := _copies(source, f"{esp}/EFI/BOOT", suffix, view.g.ls(source)):
            return FixPlan(copies=copies)
    return FixPlan(
        warnings=(
            Finding(
                "no_fallback_loader",
                f"the ESP has no {_fallback(view, esp)} and no boot loader to make it from",
                "Run `grub-install --removable` in the guest on VMware, and export it again.",
            ),
        )
    )


def prove(view: View) -> tuple[Proof, ...]:
    """Whether firmware that knows no boot entry finds a program to start."""
    if view.inspection.firmware != "uefi":
        return ()
    claim = "firmware without a boot entry for this guest finds a boot loader"
    esp = _mount_point(view)
    if esp is None:
        return (Proof(view.inspection.esp or "", claim, False, "the EFI system partition cannot be mounted"),)
    path = _fallback(view, esp)
    if not view.g.is_file(path):
        return (Proof(path, claim, False, "there is no such file"),)
    is_program = view.g.pread(path, 2, 0) == b"MZ"
    return (Proof(path, claim, is_program, "an EFI program" if is_program else "the file is no EFI program"),)


def _copies(source: str, target: str, suffix: str, names: Sequence[str]) -> tuple[Copy, ...]:
    """What to copy where. Shim starts the GRUB beside it, and MokManager if it has to; other loaders start alone.

    names: the files in `source`. GRUB and shim find their configuration by a path that is built into them, except
    GRUB legacy (RHEL 6), which looks for one beside itself, under its own name.
    """
    present = {name.lower(): name for name in names}
    fallback = f"{target}/BOOT{suffix.upper()}.EFI"

    def first(*wanted: str) -> str | None:
        return next((present[name] for name in wanted if name in present), None)

    grub = first(f"grub{suffix}.efi", "grub.efi")
    shim = first(f"shim{suffix}.efi", "shim.efi")
    if grub is None:
        loader = first(f"systemd-boot{suffix}.efi")
        return (Copy("efi", f"{source}/{loader}", fallback),) if loader else ()
    if shim is None:
        copies = [Copy("efi", f"{source}/{grub}", fallback)]
        if legacy := first("grub.conf"):
            copies.append(Copy("efi", f"{source}/{legacy}", f"{target}/BOOT{suffix.upper()}.conf"))
        return tuple(copies)
    # Every name that a shim might be built to start: SUSE's starts grub.efi though grubx64.efi lies there too.
    others = (f"grub{suffix}.efi", "grub.efi", f"mm{suffix}.efi", "mokmanager.efi")
    return (
        Copy("efi", f"{source}/{shim}", fallback),
        *(Copy("efi", f"{source}/{present[name]}", f"{target}/{present[name]}") for name in others if name in present),
    )


def _mount_point(view: View) -> str | None:
    return next((point for point, device in view.inspection.mounts.items() if device == view.inspection.esp), None)


def _fallback(view: View, esp: str) -> str:
    return f"{esp}/EFI/BOOT/BOOT{_suffix(view).upper()}.EFI"


def _suffix(view: View) -> str:
    return _ARCH.get(view.inspection.arch, "x64")
