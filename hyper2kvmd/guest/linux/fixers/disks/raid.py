"""md RAID: mdadm.conf must not name the members by what the old hardware called them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from hyper2kvmd.domain.model import DiskBus
from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Edit, Proof
from hyper2kvmd.guest.linux.devices import changes_with_hardware
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.fixers.disks.target import DISK_NAMES, copies
from hyper2kvmd.guest.linux.kernels import Image
from hyper2kvmd.guest.linux.names import MDADM
from hyper2kvmd.text import printable

FIXER = "raid"
# A line that begins with white space goes on with the one before.
_STATEMENT = re.compile(r"^(?P<key>[A-Za-z]+)(?P<rest>(?:[ \t][^\n]*)?(?:\n[ \t]+[^\s#][^\n]*)*)", re.MULTILINE)
_DEVICES = re.compile(r"\s+devices=(?P<list>\S+)", re.IGNORECASE)
_IDENTITY = re.compile(r"\s(?:uuid|name|super-minor|container)=", re.IGNORECASE)


def plan(view: View, bus: DiskBus) -> FixPlan:
    """Let mdadm look at all partitions, and find arrays by their UUID."""
    if not _has_arrays(view):
        return FixPlan()
    edits: list[Edit] = []
    warnings: list[Finding] = []
    for path in MDADM:
        text = view.read(path)
        if text is None:
            continue
        new, unknown = rewrite(text, bus)
        if new != text:
            edits.append(Edit(FIXER, path, text, new, "arrays are found by their UUID, whatever the disks are called"))
        warnings += [
            Finding(
                "raid_unresolved",
                f"{path} knows the array {printable(name)} by its members only, which have other names now",
                "Run `mdadm --detail --scan` in the guest, and write the UUID of the array into the file.",
            )
            for name in unknown
        ]
    return FixPlan(tuple(edits), warnings=tuple(warnings))


def _has_arrays(view: View) -> bool:
    return any(device.type == "linux_raid_member" for device in view.names.devices.values())


def rewrite(text: str, bus: DiskBus) -> tuple[str, tuple[str, ...]]:
    """mdadm.conf without names of the old hardware, and the arrays that nothing else identifies."""
    unknown: list[str] = []

    def statement(found: re.Match[str]) -> str:
        key, rest = found["key"], found["rest"]
        if key.lower() in ("device", "dev"):
            return found[0] if _permits(rest.split(), bus) else f"{key} partitions"
        if key.lower() == "array" and (named := _DEVICES.search(rest)):
            if not any(changes_with_hardware(re.sub(r"\[.*|[*?].*", "a", one)) for one in named["list"].split(",")):
                return found[0]
            if not _IDENTITY.search(rest):
                unknown.append(rest.split()[0])
                return found[0]
            return key + _DEVICES.sub("", rest)
        return found[0]

    return _STATEMENT.sub(statement, text), tuple(unknown)


def _permits(words: Sequence[str], bus: DiskBus) -> bool:
    """Whether a DEVICE statement lets mdadm look at the new disks."""
    if any(word in ("partitions", "containers") for word in words):
        return "partitions" in words
    # Without a glob of its own kind of disk, mdadm takes no other.
    disk = f"/dev/{DISK_NAMES[bus]}a"
    return any(fnmatchcase(disk, word) or fnmatchcase(f"{disk}1", word) for word in words)


def prove(view: View, bus: DiskBus, images: Sequence[Image]) -> tuple[Proof, ...]:
    """That mdadm may use the new disks, by the guest's file and by the copy that an initramfs has."""
    if not _has_arrays(view):
        return ()
    proofs = []
    for path, text in copies(view, MDADM, images):
        new, unknown = rewrite(text, bus)
        ok = new == text and not unknown
        evidence = "it names no member by the old hardware" if ok else "it permits only names of the old hardware"
        proofs.append(Proof(path, f"mdadm may use /dev/{DISK_NAMES[bus]}*", ok, evidence))
    return tuple(proofs)
