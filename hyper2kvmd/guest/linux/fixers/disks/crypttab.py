"""/etc/crypttab: encrypted devices, keys and headers by UUID, not by a device name that changes with the controller."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Edit, Named
from hyper2kvmd.guest.linux.devices import BY_CONTENT, Became, as_path, changes_with_hardware
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.text import printable

PATH = "/etc/crypttab"
_LINE = re.compile(r"[ \t]*(?P<name>[^\s#]\S*)[ \t]+(?P<spec>\S+)(?:[ \t]+(?P<key>\S+))?(?:[ \t]+(?P<options>\S+))?")

# What a key lies on (/dev/sdb1, /dev/sdb1:/key, /key:/dev/sdb1), or a header (header=/dev/sdb1).
_BESIDES = re.compile(r"(?<![^\s:=,])/dev/(?:disk/by-path/[^\s,]+?(?=:/|[\s,]|$)|[^\s,:]+)")


def plan(view: View) -> FixPlan:
    """Replace what changes with the hardware; the boot does not wait for what is not there."""
    text = view.read(PATH)
    if text is None:
        return FixPlan()
    new = rewrite(text, lambda spec, fresh: view.names.becomes(spec, by_partition=fresh))
    warnings = tuple(
        Finding(
            "crypttab_unresolved",
            f"{PATH} line {name.line} needs {printable(name.before)} for {printable(name.use)}: {name.proof}",
            "The line got the option nofail, so that the guest starts without it. Write a UUID there, export the disk "
            "that is missing too, or delete the line.",
        )
        for name in new.unresolved
    )
    replaced = [name.before for name in new.names if name.after != name.before]
    said = f"UUIDs instead of {', '.join(map(printable, replaced))}" if replaced else "nofail for what is missing"
    edits = (Edit("crypttab", PATH, text, new.text, said),) if new.text != text else ()
    return FixPlan(edits, warnings=warnings, names=new.names)


@dataclass(frozen=True)
class Rewritten:
    """The new text, what names became, and those of them whose line got `nofail`."""

    text: str
    names: tuple[Named, ...]
    unresolved: tuple[Named, ...]


def rewrite(text: str, becomes: Callable[[str, bool], Became]) -> Rewritten:
    """The text with device names replaced, and every other byte as it was.

    becomes: from a device name to what it has to be; with True, only `PARTUUID=...` will do, because the device is
    encrypted afresh at every boot (random key), which destroys any UUID on it.
    """
    named: list[Named] = []
    unresolved: list[Named] = []
    lines = text.split("\n")
    for number, old in enumerate(lines, start=1):
        found = _LINE.match(old)
        if found is None or not found["spec"].startswith(("/dev/", *BY_CONTENT)):
            continue
        options = set((found["options"] or "").split(","))
        fresh = found["key"] in ("/dev/urandom", "/dev/random") or bool(options & {"swap", "plain", "tmp"})
        besides = _BESIDES.finditer(old, found.end("spec"), found.end())
        specs = [(other.start(), other[0]) for other in besides if changes_with_hardware(other[0])]
        new, at = "", 0
        missing = []
        for start, spec in [(found.start("spec"), found["spec"]), *specs]:
            became = becomes(spec, fresh and not at)
            after = became.name or spec
            if at:
                after = as_path(after)
            named.append(Named(PATH, number, found["name"], spec, after, became.place, became.why))
            if became.name is None:
                missing.append(named[-1])
            new, at = f"{new}{old[at:start]}{after}", start + len(spec)
        new += old[at:]
        if missing and not options & {"nofail", "noauto"}:
            unresolved += missing
            end = new.rstrip()
            key = "" if found["key"] else " none"
            new = f"{end},nofail" if found["options"] else f"{end}{key} nofail"
        lines[number - 1] = new
    return Rewritten("\n".join(lines), tuple(named), tuple(unresolved))
