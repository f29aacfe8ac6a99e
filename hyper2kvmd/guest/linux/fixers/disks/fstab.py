"""/etc/fstab and mount units: file systems and swap by UUID instead of by names that change with the hardware."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from shlex import quote

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Command, Edit, Named, encode
from hyper2kvmd.guest.linux import fstab
from hyper2kvmd.guest.linux.devices import BY_CONTENT, Became, as_path, changes_with_hardware, is_removable
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.fstab import PATH, Entry
from hyper2kvmd.guest.linux.names import UNITS
from hyper2kvmd.text import printable

# File systems that the old hypervisor serves.
_OF_THE_HOST = frozenset(("vmhgfs", "fuse.vmhgfs-fuse", "vmhgfs-fuse", "vboxsf", "prl_fs", "prl_fsd"))
_OF_HOST_SPEC = re.compile(r"\.host:.*|vmhgfs-fuse(?:#.*)?")
# Options that name another device of the same file system.
_DEVICE_OPTION = re.compile(r"(?P<key>device|logdev|rtdev|journal_path|journal_dev)=(?P<spec>/dev/\S+)")
_UNIT_LINE = re.compile(
    r"(?m)^(?P<lead>[ \t]*(?P<key>What|Where|Options|Type)[ \t]*=[ \t]*)(?P<value>[^\r\n]*?)(?P<end>[ \t\r]*)$"
)
_SYSTEM = "/etc/systemd/system"


@dataclass(frozen=True)
class Rewritten:
    """The new text, what names became, and the lines that got `nofail`, each with the reason."""

    text: str
    names: tuple[Named, ...]
    unresolved: tuple[tuple[Entry, str], ...]


def plan(view: View, *, by_path_only: bool = False) -> FixPlan:
    """Replace what changes with the hardware; what is not on the new machine must not stop the boot (`nofail`).

    by_path_only: look at /dev/disk/by-path names alone.
    """

    def becomes(spec: str, type: str, where: str) -> Became:
        root = view.names.devices.get(view.inspection.root)
        if where == "/" and root is not None:  # found by looking, which is better than any name
            how = "found by looking"
            return view.names.known_as(root, how) if changes_with_hardware(spec) else Became(root, spec, how)
        found = view.names.becomes(spec, type=type)
        if found.device is None and not changes_with_hardware(spec) and not is_removable(spec):
            # What lies in a container that stays locked cannot be seen, nor can what is made when the guest starts.
            seen = spec.startswith(tuple(BY_CONTENT)) and not view.inspection.locked
            return found if seen else Became(None, spec, "it cannot be seen before the guest runs")
        return found

    units = () if by_path_only else view.files(*UNITS)
    plans = (_table(view, becomes, by_path_only), *(_unit(view, path, text, becomes) for path, text in units))
    joined = FixPlan.joined(plans)
    # Two swap units of one device become one.
    return replace(joined, edits=tuple({edit.path: edit for edit in joined.edits}.values()))


# From a device name, the type of what is on it and the mount point to what it has to be.
Becomes = Callable[[str, str, str], Became]


def _table(view: View, becomes: Becomes, by_path_only: bool) -> FixPlan:
    text = view.read(PATH)
    if text is None:
        return FixPlan()
    new = rewrite(text, becomes, by_path_only=by_path_only)
    warnings = tuple(
        Finding(
            "fstab_unresolved",
            f"{PATH} line {entry.number} mounts {printable(entry.spec)} on {printable(entry.where)}: {why}",
            "The line got the option nofail, so that the guest starts without it. Write the UUID of the file system "
            "there (`blkid` shows it), export the disk that is missing too, or delete the line.",
        )
        for entry, why in new.unresolved
    )
    if new.text == text:
        return FixPlan(warnings=warnings, names=new.names)
    replaced = [name.before for name in new.names if name.before != name.after]
    said = "UUIDs instead of " + ", ".join(map(printable, replaced)) if replaced else "nofail for what is missing"
    return FixPlan((Edit("fstab", PATH, text, new.text, said),), warnings=warnings, names=new.names)


def rewrite(text: str, becomes: Becomes, *, by_path_only: bool = False) -> Rewritten:
    """The text with device names replaced, and every other byte as it was."""
    named: list[Named] = []
    unresolved: list[tuple[Entry, str]] = []
    lines = text.split("\n")
    for entry in fstab.entries(text):
        old = lines[entry.number - 1]
        if not _concerns(entry) or (by_path_only and not entry.spec.startswith("/dev/disk/by-path/")):
            continue
        found = _becomes(entry, becomes)
        match = fstab.LINE.match(old)
        if match is None:
            continue
        if found.name is not None and found.name != entry.spec:
            old = old[: match.start("spec")] + found.name + old[match.end("spec") :]
        options, why = _options(entry, becomes)
        why = found.why if found.name is None else why
        if why and entry.where != "/" and entry.waits:
            options = (*options, "nofail")
            unresolved.append((entry, why))
        if options != entry.options:
            old = _with_options(old, options)
        after = found.name or entry.spec
        named.append(Named(PATH, entry.number, entry.where, entry.spec, after, found.place, found.why))
        lines[entry.number - 1] = old
    return Rewritten("\n".join(lines), tuple(named), tuple(unresolved))


def _concerns(entry: Entry) -> bool:
    """Whether a line mounts what is on a device, or what the old hypervisor has."""
    is_device = entry.spec.startswith(("/dev/", *BY_CONTENT)) and not {"bind", "rbind"} & set(entry.options)
    virtual = entry.type in fstab.VIRTUAL or entry.spec.startswith(("/dev/shm", "/dev/pts", "/dev/loop", "/dev/zram"))
    return _is_of_host(entry) or (is_device and not virtual)


def _is_of_host(entry: Entry) -> bool:
    return entry.type in _OF_THE_HOST or bool(_OF_HOST_SPEC.fullmatch(entry.spec))


def _becomes(entry: Entry, becomes: Becomes) -> Became:
    """What the device of a line has to be."""
    if _is_of_host(entry):
        return Became(None, None, "the old hypervisor served that, and the new one does not")
    return becomes(entry.spec, entry.type, entry.where)


def _options(entry: Entry, becomes: Becomes) -> tuple[tuple[str, ...], str]:
    """The options with the devices in them as they have to be, and why one of them cannot be known, "" if all can.

    The members of a btrfs find each other; what names them can only be wrong.
    """
    kept, why = [], ""
    for option in entry.options:
        found = _DEVICE_OPTION.fullmatch(option)
        if found is None or not changes_with_hardware(found["spec"]):
            kept.append(option)
        elif found["key"] != "device":
            became = becomes(found["spec"], "auto", "")
            kept.append(option if became.name is None else f"{found['key']}={as_path(became.name)}")
            why = why or ("" if became.name else f"its {found['key']} is {found['spec']}, and {became.why}")
    return tuple(kept), why


def _with_options(line: str, options: tuple[str, ...]) -> str:
    """A line with other options, and its white space as it was."""
    match = fstab.LINE.match(line)
    if match is None:
        return line
    said = ",".join(options) or "defaults"
    if match["options"] is not None:
        before = [one for one in match["options"].split(",") if one]
        if options[: len(before)] == tuple(before):  # only added to: commas that stand there stay
            said = match["options"] + "".join(f",{one}" for one in options[len(before) :])
        return line[: match.start("options")] + said + line[match.end("options") :]
    end = match.end()
    missing = f" auto {said}" if match["type"] is None else f" {said}"
    return line[:end] + missing + line[end:]


# Units ------------------------------------------------------------------------------------------------------


def _unit(view: View, path: str, text: str, becomes: Becomes) -> FixPlan:
    """What a mount or swap unit names, as fstab does."""
    fields = {match["key"]: match["value"] for match in _UNIT_LINE.finditer(text)}
    kind = "swap" if path.endswith(".swap") else fields.get("Type", "auto")
    options = tuple(filter(None, fields.get("Options", "").split(",")))
    entry = Entry(0, fields.get("What", ""), fields.get("Where", "swap"), kind, options)
    if not _concerns(entry):
        return FixPlan()
    found = _becomes(entry, becomes)
    name = Named(path, 0, entry.where, entry.spec, as_path(found.name or entry.spec), found.place, found.why)
    if found.name == entry.spec:
        return FixPlan(names=(name,))
    unit = path.rpartition("/")[2]
    if found.name is not None:
        value = as_path(found.name)
        new = _UNIT_LINE.sub(lambda m: m[0] if m["key"] != "What" else m["lead"] + value + m["end"], text)
        new = _with_device(new, entry.spec, value)
        summary = f"{value} instead of {printable(entry.spec)}"
        if kind == "swap":
            return replace(_renamed(view, path, text, new, f"{_unit_name(value)}.swap", summary), names=(name,))
        return FixPlan((Edit("fstab", path, text, new, summary),), names=(name,))
    warning = Finding(
        "fstab_unresolved",
        f"{printable(path)} in the guest mounts {printable(entry.spec)} on {printable(entry.where)}: {found.why}",
        "The guest starts without it. Write the UUID of the file system there, export the disk that is missing too, or "
        "disable the unit.",
    )
    required = _links(view, unit, "requires")
    if not required:
        return FixPlan(warnings=(warning,), names=(name,))
    # What a target requires stops the boot in emergency mode; what it wants does not.
    moves = [
        f"mkdir -p {quote(wants)} && mv {quote(link)} {quote(wants)}/"
        for link in required
        for wants in [link.rpartition("/")[0].removesuffix(".requires") + ".wants"]
    ]
    summary = f"the boot does not wait for {printable(unit)}, which is not there"
    return FixPlan(commands=(Command("fstab", path, " && ".join(moves), summary),), warnings=(warning,), names=(name,))


def _links(view: View, unit: str, *kinds: str) -> list[str]:
    """What has a target want or require a unit, whose name a glob could not be given: it has backslashes."""
    links = [link for kind in kinds for link in view.g.glob_expand(f"{_SYSTEM}/*.{kind}/*")]
    return [link for link in links if link.rpartition("/")[2] == unit]


def _unit_name(path: str) -> str:
    """A path as systemd writes it in the names of units: /dev/disk/by-uuid/1-a is dev-disk-by\\x2duuid-1\\x2da."""
    plain = re.compile(r"[A-Za-z0-9:_./]")
    escaped = (c if plain.fullmatch(c) else "".join(f"\\x{byte:02x}" for byte in encode(c)) for c in path.strip("/"))
    return "".join(escaped).replace("/", "-")


def _with_device(text: str, old: str, new: str) -> str:
    """A unit that waits for another device (Requires=dev-sdb1.device)."""
    name = re.escape(f"{_unit_name(old)}.device")
    return re.sub(rf"(?<![\w\\:.-]){name}(?!\S)", lambda found: f"{_unit_name(new)}.device", text)


def _renamed(view: View, path: str, text: str, new: str, unit: str, summary: str) -> FixPlan:
    """A swap unit under the name of its new device: systemd loads none that is called otherwise."""
    target = f"{_SYSTEM}/{unit}"
    edits = (Edit("fstab", path, text, None, summary), Edit("fstab", target, view.read(target), new, summary))
    links = _links(view, path.rpartition("/")[2], "wants", "requires")
    moves = [f"ln -sf {quote(target)} {quote(link.rpartition('/')[0])}/ && rm {quote(link)}" for link in links]
    commands = (Command("fstab", target, " && ".join(moves), f"{printable(unit)} is started"),) if moves else ()
    return FixPlan(edits, commands=commands)
