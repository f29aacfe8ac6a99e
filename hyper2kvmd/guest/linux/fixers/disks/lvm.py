"""LVM: filters, lists and caches of devices by names of the old hardware, which would hide the root from the guest."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hyper2kvmd.domain.model import DiskBus
from hyper2kvmd.guest.change import Edit, Proof
from hyper2kvmd.guest.linux.devices import changes_with_hardware
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.fixers.disks.target import DISK_NAMES, copies
from hyper2kvmd.guest.linux.kernels import Image
from hyper2kvmd.guest.linux.names import LVM
from hyper2kvmd.text import printable

FIXER = "lvm"
SYSTEM_DEVICES = "/etc/lvm/devices/system.devices"
CACHES = ("/etc/lvm/cache/.cache", "/etc/blkid.tab", "/etc/blkid/blkid.tab")
# Identifiers that come from what is on the device; all others come from the disk or its controller.
_STABLE_IDS = frozenset({"loop_file", "md_uuid", "crypt_uuid", "lvmlv_uuid"})
_FILTER = re.compile(
    r"^(?P<lead>(?:[ \t]*devices[ \t]*\{)?[ \t]*(?:devices/)?(?P<key>global_filter|filter)[ \t]*=[ \t]*)"
    r"(?P<value>\[[^\]\[]*(?:\[[^\]\n]*\][^\]\[]*)*\]|\"[^\"\n]*\"|'[^'\n]*')",
    re.MULTILINE,
)
_PATTERN = re.compile(r"\"([^\"\n]*)\"|'([^'\n]*)'")
_ALL = (".", ".*", "", "/", "/.*", ".*/.*", ".*/", "/dev", "/dev/", "/dev/.*", "/dev/*")


def plan(view: View, bus: DiskBus) -> FixPlan:
    """Remove what LVM makes by itself, and have filters accept the new disks: none of them can know those."""
    edits = []
    text = view.read(SYSTEM_DEVICES)
    if text is not None and (changing := changing_ids(text)):
        # Without the file LVM looks at every device, as it did before there was one.
        names = ", ".join(map(printable, changing))
        summary = f"LVM looks at all devices, not only at {names}, which the new hardware calls otherwise"
        edits.append(Edit(FIXER, SYSTEM_DEVICES, text, None, summary))
    for path in CACHES:
        text = None if view.g.is_symlink(path) else view.read(path)
        if text is not None and any(map(changes_with_hardware, re.findall(r"/dev/[\w/:.+-]{1,200}", text))):
            edits.append(Edit(FIXER, path, text, None, "a cache of device names of the old hardware"))
    for path in LVM if _has_volumes(view) else ():
        text = view.read(path)
        if text is not None and (hiding := hiding_filters(text, bus)):
            said = "; ".join(f"{key} = [ {printable(value)} ]" for key, value in hiding)
            summary = f"LVM uses /dev/{DISK_NAMES[bus]}*, which {said} hides"
            edits.append(Edit(FIXER, path, text, accepting(text, bus), summary))
    return FixPlan(tuple(edits))


def prove(view: View, bus: DiskBus, images: Sequence[Image]) -> tuple[Proof, ...]:
    """That no filter hides the new disks, in the guest and in the copy that an initramfs has."""
    if not _has_volumes(view):
        return ()
    return tuple(
        Proof(
            path,
            f"LVM may use /dev/{DISK_NAMES[bus]}*",
            not hiding,
            "; ".join(f"{key} = [ {printable(value)} ] hides them" for key, value in hiding) or "no filter hides them",
        )
        for path, text in copies(view, LVM, images)
        for hiding in [hiding_filters(text, bus)]
    )


def _has_volumes(view: View) -> bool:
    """Whether LVM lies on a disk; on RAID or LUKS it is found by names that stay."""
    return any(device.type == "LVM2_member" and device.disk for device in view.names.devices.values())


def changing_ids(text: str) -> list[str]:
    """The identifiers in a devices file of LVM that another controller changes."""
    found = []
    for line in text.split("\n"):
        fields = dict(word.partition("=")[::2] for word in line.split() if not line.lstrip().startswith("#"))
        if "IDTYPE" in fields and fields["IDTYPE"] not in _STABLE_IDS:
            found.append(fields.get("IDNAME", fields["IDTYPE"]))
    return found


def hiding_filters(text: str, bus: DiskBus) -> list[tuple[str, str]]:
    """The filters in lvm.conf, by key and value, that do not accept every disk of `bus`.

    Patterns are looked at, never run.
    """
    found = []
    for setting in _FILTER.finditer(_without_comments(text)):
        patterns = [one or other for one, other in _PATTERN.findall(setting["value"])]
        if _hides(patterns, DISK_NAMES[bus]):
            found.append((setting["key"], ", ".join(f'"{pattern}"' for pattern in patterns)))
    return found


def _without_comments(text: str) -> str:
    """The text with blanks for comments, so that every other byte is where it was. A pattern may have a `#`, too."""
    return re.sub(r"\"[^\"\n]*\"|(?P<comment>#[^\n]*)", lambda f: " " * len(f[0]) if f["comment"] else f[0], text)


def _hides(patterns: list[str], name: str) -> bool:
    """Whether the first pattern that fits all disks of this name rejects them, or only some are accepted.

    What no pattern fits is accepted.
    """
    whole = re.compile(rf"(?:/dev/)?(?:{name}|\[\w*{name[0]}\w*\]d)(?:\[a-z\]|\.)?[+*]?(?:\[0-9\][+*]?)?(?:/?\.\*)?")
    for pattern in patterns:
        # A letter, a delimiter, the expression, and a delimiter.
        body = pattern[2:-1].removeprefix("^").removesuffix("$")
        if body in _ALL or whole.fullmatch(body):
            return pattern.startswith("r")
        if pattern.startswith("r") and _may_fit(body.removeprefix("/dev/"), name):
            return True
    return False


def _may_fit(body: str, name: str) -> bool:
    """Whether an expression may fit every disk of this name, by how it begins; one for a single disk does not."""
    if found := re.match(r"\[(?P<no>\^?)(?P<set>[^\]\[]+)\]", body):
        chars = re.sub(r"(.)-(.)", lambda f: "".join(map(chr, range(ord(f[1]), ord(f[2]) + 1)[:256])), found["set"])
        return (name[0] in chars) != bool(found["no"])
    if found := re.match(r"\((?P<words>[\w|/.*-]+)\)", body):
        return any(_may_fit(word, name) for word in found["words"].split("|"))
    word = re.match(r"[\w/-]*", body)
    return word is None or name.startswith(word[0])


def accepting(text: str, bus: DiskBus) -> str:
    """lvm.conf with the new disks first in every filter that hides them, and every other byte as it was."""
    new, shift = text, 0
    first = f'"a|^/dev/{DISK_NAMES[bus]}|"'
    for setting in _FILTER.finditer(_without_comments(text)):
        patterns = [one or other for one, other in _PATTERN.findall(setting["value"])]
        if not _hides(patterns, DISK_NAMES[bus]):
            continue
        start, end = setting.start("value") + shift, setting.end("value") + shift
        value = new[start:end]
        changed = f"[ {first}," + value[1:] if value.startswith("[") else f"[ {first}, {value} ]"
        new = new[:start] + changed + new[end:]
        shift += len(changed) - len(value)
    return new
