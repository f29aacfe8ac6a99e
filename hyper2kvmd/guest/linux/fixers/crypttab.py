"""/etc/crypttab: encrypted devices by UUID instead of by a device name that changes with the controller."""

from __future__ import annotations

import re
from collections.abc import Callable

from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.devices import changes_with_hardware
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.text import printable

PATH = "/etc/crypttab"
_LINE = re.compile(r"[ \t]*[^\s#]\S*[ \t]+(?P<spec>\S+)(?:[ \t]+(?P<key>\S+))?(?:[ \t]+(?P<options>\S+))?")


def plan(view: View) -> FixPlan:
    """Replace what changes with the hardware."""
    text = view.read(PATH)
    if text is None:
        return FixPlan()
    new, replaced = rewrite(text, lambda spec, fresh: view.names.stable(spec, by_partition=fresh))
    if new == text:
        return FixPlan()
    return FixPlan((Edit("crypttab", PATH, text, new, f"UUIDs instead of {', '.join(map(printable, replaced))}"),))


def rewrite(text: str, stable: Callable[[str, bool], str | None]) -> tuple[str, list[str]]:
    """The text with device names replaced, every other byte as it was, and the names that were replaced.

    stable: from a device name to `UUID=...` or None; with True, only `PARTUUID=...` will do, because the device
    is encrypted afresh at every boot (random key), which destroys any UUID on it.
    """
    replaced: list[str] = []

    def line(old: str) -> str:
        found = _LINE.match(old)
        if found is None or not changes_with_hardware(found["spec"]):
            return old
        options = set((found["options"] or "").split(","))
        fresh = found["key"] in ("/dev/urandom", "/dev/random") or bool(options & {"swap", "plain", "tmp"})
        name = stable(found["spec"], fresh)
        if name is None:
            return old
        replaced.append(found["spec"])
        return old[: found.start("spec")] + name + old[found.end("spec") :]

    return "\n".join(line(old) for old in text.split("\n")), replaced
