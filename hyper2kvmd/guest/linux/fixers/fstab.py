"""/etc/fstab: file systems and swap by UUID instead of by a device name that changes with the controller."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.devices import changes_with_hardware
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.storage import BY_CONTENT, resolve
from hyper2kvmd.text import printable

PATH = "/etc/fstab"
# Device, mount point and type, then perhaps options, with the white space between them kept apart.
_LINE = re.compile(
    r"(?P<lead>[ \t]*)(?P<spec>[^\s#]\S*)(?P<middle>[ \t]+(?P<where>\S+)[ \t]+\S+)(?P<options>[ \t]+\S+)?"
)


@dataclass(frozen=True)
class Rewritten:
    """The new text, the device names that were replaced, and the lines whose device nobody can know."""

    text: str
    replaced: tuple[str, ...]
    unresolved: tuple[tuple[str, str], ...]  # device name, mount point


def plan(view: View, *, by_path_only: bool = False) -> FixPlan:
    """Replace what changes with the hardware; what cannot be resolved must not stop the boot (`nofail`).

    by_path_only: look at /dev/disk/by-path names alone.
    """
    text = view.read(PATH)
    if text is None:
        return FixPlan()
    devices = view.inspection.filesystems
    root = view.names.devices.get(view.inspection.root)

    def stable(spec: str, where: str) -> str | None:
        if where == "/" and root is not None and root.uuid:
            return f"UUID={root.uuid}"  # found by looking, which is better than any name
        return view.names.stable(spec)

    def changes(spec: str) -> bool:
        return changes_with_hardware(spec) and (not by_path_only or spec.startswith("/dev/disk/by-path/"))

    def missing(spec: str) -> bool:
        # What lies in a container that stays locked cannot be seen.
        visible = not by_path_only and not view.inspection.locked and spec.startswith(tuple(BY_CONTENT))
        return visible and not resolve(spec, view.inspection.disks, devices)

    new = rewrite(text, changes, stable, missing)
    warnings = tuple(
        Finding(
            "fstab_unresolved",
            f"{PATH} mounts {printable(device)} on {printable(where)}, and no disk of this export is that device",
            "The line got the option nofail, so that the guest boots without it; export that disk too, or delete it.",
        )
        for device, where in new.unresolved
    )
    if new.text == text:
        return FixPlan(warnings=warnings)
    summary = (
        "UUIDs instead of " + ", ".join(map(printable, new.replaced)) if new.replaced else "nofail for missing disks"
    )
    return FixPlan((Edit("fstab", PATH, text, new.text, summary),), warnings=warnings)


def rewrite(
    text: str,
    changes: Callable[[str], bool],
    stable: Callable[[str, str], str | None],
    missing: Callable[[str], bool],
) -> Rewritten:
    """The text with device names replaced, and every other byte as it was.

    changes: whether a device name changes with the hardware. stable: from such a name and its mount point to
    `UUID=...`, or None if nobody knows. missing: whether another name is certainly of no disk of this export.
    """
    replaced: list[str] = []
    unresolved: list[tuple[str, str]] = []

    def line(old: str) -> str:
        found = _LINE.match(old)
        if found is None:
            return old
        spec, where = found["spec"], found["where"]
        if changes(spec):
            if name := stable(spec, where):
                replaced.append(spec)
                return old[: found.start("spec")] + name + old[found.end("spec") :]
        elif not missing(spec):
            return old
        options = (found["options"] or "").strip()
        if where == "/" or {"nofail", "noauto", "_netdev"} & set(options.split(",")):
            return old
        unresolved.append((spec, where))
        at = found.end()
        return old[:at] + (",nofail" if options else " nofail") + old[at:]

    return Rewritten("\n".join(line(old) for old in text.split("\n")), tuple(replaced), tuple(unresolved))
