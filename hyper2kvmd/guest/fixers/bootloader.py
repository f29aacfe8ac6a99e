"""GRUB 2: the root and resume devices on kernel command lines by UUID; the menu itself is never regenerated."""

from __future__ import annotations

import re
from collections.abc import Callable

from hyper2kvmd.guest.change import Edit, printable
from hyper2kvmd.guest.devices import changes_with_hardware
from hyper2kvmd.guest.fixers import Plan, View
from hyper2kvmd.guest.grub import GRUB_CFG, INITRD_LINE, LINUX_LINE

DEFAULTS = "/etc/default/grub"
DEVICE_MAP = "/boot/grub/device.map"
_WORD = re.compile(r"(?<=[\s\"'])(?P<key>root|resume)=(?P<spec>/dev/[^\s\"']+)")
_CMDLINE = re.compile(r"\s*(?:export\s+)?GRUB_CMDLINE_LINUX\w*\+?=")
_NO_UUID = re.compile(r"(?P<lead>\s*)(?:export\s+)?GRUB_DISABLE_LINUX_UUID=[\"']?true\b")

Stable = Callable[[str, str, bool], str | None]


def plan(view: View) -> Plan:
    """Edit grub.cfg for the next boot, and the defaults so that the next update-grub says the same."""
    root = view.names.devices.get(view.inspection.root)

    def stable(key: str, spec: str, by_partition: bool) -> str | None:
        if key == "root" and not by_partition and root is not None and root.uuid:
            return f"UUID={root.uuid}"  # found by looking, which is better than any name
        return view.names.stable(spec, by_partition=by_partition)

    edits = []
    menu = view.read(GRUB_CFG)
    if menu is not None:
        new, replaced = rewrite_menu(menu, stable)
        if new != menu:
            words = ", ".join(sorted({printable(word) for word in replaced}))
            edits.append(Edit("bootloader", GRUB_CFG, menu, new, f"UUIDs instead of {words} in {len(replaced)} places"))
    for path in (DEFAULTS, *sorted(view.g.glob_expand(f"{DEFAULTS}.d/*.cfg"))):
        text = view.read(path)
        if text is not None and (new := rewrite_defaults(text, stable)) != text:
            edits.append(Edit("bootloader", path, text, new, "the next update-grub uses UUIDs, not device names"))
    device_map = view.read(DEVICE_MAP)
    if device_map is not None and any(changes_with_hardware(word) for word in device_map.split()):
        # GRUB reads it only when grub-install or update-grub runs, and then it must be right or absent.
        edits.append(Edit("bootloader", DEVICE_MAP, device_map, None, "GRUB finds the disks by itself"))
    return Plan(tuple(edits))


def rewrite_menu(text: str, stable: Stable) -> tuple[str, list[str]]:
    """grub.cfg with `root=` and `resume=` device names replaced on kernel lines, and what was replaced.

    stable: from the key, the device name, and whether only the partition's identifier will do, to `UUID=...`.
    """
    lines = text.split("\n")
    replaced: list[str] = []
    for number, line in enumerate(lines):
        if LINUX_LINE.match(line):
            # Without an initramfs it is the kernel that looks for the device, and it knows partitions only.
            alone = not _has_initrd(lines, number)
            lines[number] = _rewrite_words(line, stable, alone, replaced)
    return "\n".join(lines), replaced


def rewrite_defaults(text: str, stable: Stable) -> str:
    """/etc/default/grub with the same replaced in GRUB_CMDLINE_LINUX*, and GRUB_DISABLE_LINUX_UUID=true commented."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if _CMDLINE.match(line):
            lines[number] = _rewrite_words(line, stable, False, [])
        elif found := _NO_UUID.match(line):
            # With it, the next update-grub would write root=/dev/sda2 again.
            lines[number] = found["lead"] + "#" + line[found.end("lead") :]
    return "\n".join(lines)


def _rewrite_words(line: str, stable: Stable, by_partition: bool, replaced: list[str]) -> str:
    def word(found: re.Match[str]) -> str:
        key, spec = found["key"], found["spec"]
        name = stable(key, spec, by_partition) if changes_with_hardware(spec) else None
        if name is None:
            return found[0]
        replaced.append(found[0])
        return f"{key}={name}"

    return _WORD.sub(word, line)


def _has_initrd(lines: list[str], linux: int) -> bool:
    """Whether the menu entry with a kernel on line `linux` loads an initramfs."""
    for line in lines[linux + 1 :]:
        if INITRD_LINE.match(line):
            return True
        if LINUX_LINE.match(line) or line.strip() == "}":
            return False
    return False
