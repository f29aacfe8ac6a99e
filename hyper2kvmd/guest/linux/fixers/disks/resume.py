"""initramfs-tools: the device to resume from by UUID, which is also built into every initramfs."""

from __future__ import annotations

import re
from collections.abc import Callable

from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.devices import changes_with_hardware
from hyper2kvmd.guest.linux.fixers import FixPlan, View

CONFIG = "/etc/initramfs-tools/initramfs.conf"
_LINE = re.compile(r"[ \t]*(?:export[ \t]+)?RESUME=[\"']?(?P<spec>/dev/[^\s\"']+)")


def plan(view: View) -> FixPlan:
    """Replace what changes with the hardware; with a wrong name the guest waits half a minute at every boot."""
    edits = []
    for path in (CONFIG, *sorted(view.g.glob_expand("/etc/initramfs-tools/conf.d/*"))):
        text = view.read(path)
        if text is not None and (new := rewrite(text, view.names.stable)) != text:
            edits.append(Edit("resume", path, text, new, "the device to resume from by UUID"))
    return FixPlan(tuple(edits))


def rewrite(text: str, stable: Callable[[str], str | None]) -> str:
    """The text with the device name in `RESUME=` replaced, and every other byte as it was."""

    def line(old: str) -> str:
        found = _LINE.match(old)
        if found is None or not changes_with_hardware(found["spec"]):
            return old
        name = stable(found["spec"])
        return old if name is None else old[: found.start("spec")] + name + old[found.end("spec") :]

    return "\n".join(line(old) for old in text.split("\n"))
