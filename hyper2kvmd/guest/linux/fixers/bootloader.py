"""Kernel command lines: the root and resume devices by UUID, wherever a boot loader keeps them.

The menus are edited, never generated: what generates them looks at the appliance's hardware, not at the guest's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Edit, Named, Proof
from hyper2kvmd.guest.linux import menu as boot_menu
from hyper2kvmd.guest.linux.devices import BY_CONTENT, NO_FILE_SYSTEM, Became, as_path, changes_with_hardware
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.kernels import Image
from hyper2kvmd.guest.linux.menu import INITRD_LINE, LINUX_LINE, Menu, MenuEntry
from hyper2kvmd.guest.linux.names import MENU_DEFAULTS
from hyper2kvmd.text import printable

CONSOLES = ("console=tty0", "console=ttyS0,115200")
GRUBENV_BYTES = 1024

# Words of a kernel command line that name a device. A colon belongs to names by path, and ends the others.
_WORD = re.compile(
    r"(?<![^\s\"'=,])(?P<key>root|real_root|boot|resume|source|mount\.usr|cryptdevice(?!=/dev/disk/by-path/)"
    r"|(?:rd\.)?systemd\.(?:mount|swap)-extra|logdev|rtdev|journal_path)"
    r"=(?P<spec>/dev/(?:disk/by-path/[^\s\"',;]+|[^\s\"',;:]+))"
)
_TAKE_PATHS = frozenset(("logdev", "rtdev", "journal_path"))
# The members of a btrfs in rootflags=, which find each other.
_FLAGS = re.compile(r"(?<![^\s\"'=])rootflags=(?P<flags>[^\s\"';]+)")
_NEVER = re.compile(r"(?!)")
_BY_NUMBER = re.compile(r"(?:0x)?[0-9a-f]{3,5}|\d{1,4}:\d{1,5}")
_SEARCH = re.compile(r"(?m)^[ \t]*search[ \t]([^\n]*)")
_FS_UUID = re.compile(r"[0-9A-Fa-f]{4,}(?:-[0-9A-Fa-f]{4,}){1,4}")


@dataclass(frozen=True)
class _Format:
    """Where a kind of file has kernel command lines, as patterns of the starts of lines; other lines stay as they are.

    raw: the rest of the line is one. shell: a variable is assigned one; `consoles` are those where a console is
    added, so that each kernel gets it once. single: all such lines together are one.
    """

    raw: re.Pattern[str] = _NEVER
    shell: re.Pattern[str] = _NEVER
    consoles: re.Pattern[str] = _NEVER
    single: bool = False


# What RHEL 8 starts with if grubenv lacks it.
_KERNELOPTS = re.compile(r"\s*set\s+(?:default_)?kernelopts=")
_FORMATS = {
    "grub.cfg": _Format(raw=LINUX_LINE, shell=_KERNELOPTS, consoles=_KERNELOPTS),
    "bls": _Format(raw=re.compile(r"\s*options\s"), single=True),
    "grubenv": _Format(raw=re.compile(r"kernelopts="), single=True),
    "menu.lst": _Format(raw=re.compile(r"\s*kernel[\s=]|# kopt=")),
    "extlinux": _Format(raw=re.compile(r"\s*append\s", re.IGNORECASE)),
    # What the next update of a menu is made from.
    "grub-defaults": _Format(
        shell=re.compile(r"\s*(?:export\s+)?GRUB_CMDLINE_LINUX\w*\+?="),
        consoles=re.compile(r"\s*(?:export\s+)?GRUB_CMDLINE_LINUX="),
    ),
    "grub-custom": _Format(raw=LINUX_LINE),
    "cmdline": _Format(raw=re.compile(r"\s*[^\s#]"), single=True),
    "suse": _Format(shell=re.compile(r"\s*\w*_APPEND="), consoles=re.compile(r"\s*DEFAULT_APPEND=")),
    "extlinux-defaults": _Format(
        shell=re.compile(r"\s*(?:EXTLINUX_PARAMETERS|EXTLINUX_ROOT|default_kernel_opts|root)="),
        consoles=re.compile(r"\s*(?:EXTLINUX_PARAMETERS|default_kernel_opts)="),
    ),
    "dracut": _Format(shell=re.compile(r"\s*kernel_cmdline\+?=")),
}
# The line of a GRUB menu that an entry's kernel is on.
_ENTRY = {"grub.cfg": LINUX_LINE, "grub-custom": LINUX_LINE, "menu.lst": re.compile(r"\s*(?:kernel|title)[\s=]")}
_NO_UUID = re.compile(r"(?P<lead>\s*)(?:export\s+)?GRUB_DISABLE_LINUX_UUID=[\"']?true\b")

# The places that say which entry is the default, each with the part before the value.
_VALUE = r"(?:\"[^\"\r\n]*\"|'[^'\r\n]*'|[^\s;]*)"
_SET_DEFAULT = re.compile(rf"^([ \t]*(?:set[ \t]+)?default=)(?![\"']?\$\{{?next_entry){_VALUE}", re.MULTILINE)
_SET_SAVED = re.compile(r"^[ \t]*(?:set[ \t]+)?default=[\"']?\$\{?saved_entry", re.MULTILINE)
_GRUB_DEFAULT = re.compile(rf"^([ \t]*(?:export[ \t]+)?GRUB_DEFAULT=){_VALUE}", re.MULTILINE)
_SAVED_ENTRY = re.compile(r"^(saved_entry=)[^\r\n]*", re.MULTILINE)
_NEXT_ENTRY = re.compile(r"^(next_entry=)[^\r\n]*", re.MULTILINE)
_LEGACY_DEFAULT = re.compile(r"^([ \t]*default[ \t=]+)[^\s=]+", re.MULTILINE)
_LOADER_DEFAULT = re.compile(r"^([ \t]*default[ \t]+)[^\s][^\r\n]*", re.MULTILINE)
_LABEL_DEFAULT = re.compile(r"^([ \t]*(?:default|ontimeout)[ \t]+)(?!\S+\.c32)\S[^\r\n]*", re.MULTILINE | re.IGNORECASE)
_MENU_DEFAULT = re.compile(r"^[ \t]*menu[ \t]+default[ \t]*\r?(?:\n|\Z)", re.MULTILINE | re.IGNORECASE)

# From the key, the device name, and whether only the partition's identifier will do, to `UUID=...`, or None.
Stable = Callable[[str, str, bool], str | None]


@dataclass(frozen=True)
class Rewritten:
    """A new text, the words that were replaced in it, and those whose device nobody knows."""

    text: str
    replaced: tuple[str, ...]
    unresolved: tuple[str, ...]


def plan(view: View, *, console: bool = False, default: int | None = None) -> FixPlan:
    """Edit the menu for the next boot, and what the next update of the menu is made from.

    console: have every kernel write to the first serial port as well. default: the index of the menu's entry that
    shall start from now on.
    """
    menu = view.inspection.menu
    root = view.names.devices.get(view.inspection.root)
    looked_up: dict[str, Became] = {}
    starts = menu.entries[menu.default].option("root") if menu is not None and menu.default is not None else ""

    def is_of_another(spec: str) -> bool:
        """Whether a root is that of another system, of which an entry is on the menu."""
        meant = view.names.find(spec)
        return spec != starts and meant not in (None, root) and meant.type not in NO_FILE_SYSTEM

    def stable(key: str, spec: str, by_partition: bool) -> str | None:
        is_root = key in ("root", "real_root") and not is_of_another(spec)
        if is_root and root is not None:  # found by looking, which is better than any name
            found = view.names.known_as(root, "found by looking", by_partition=by_partition)
        else:
            type = "swap" if key == "resume" else "auto"
            found = view.names.becomes(spec, type=type, by_partition=by_partition)
        looked_up[f"{key}={spec}"] = found
        name = found.name
        return as_path(name) if name and key in _TAKE_PATHS else name

    files: list[tuple[str, str, str]] = [(file.path, file.kind, file.text) for file in menu.files] if menu else []
    # The administrator's own entries, which are on the menu too. One that is not yet there tells nothing of the disks.
    for pattern, kind in (*MENU_DEFAULTS, ("/etc/grub.d/*_custom", "grub-custom")):
        paths = sorted(view.g.glob_expand(pattern)) if "*" in pattern else [pattern]
        files += [(path, kind, text) for path in paths if (text := view.read(path)) is not None]
    edits = []
    warnings = []
    named: list[Named] = []
    for path, kind, text in files:
        new = rewrite(kind, text, stable, console=console)
        after = choose(kind, new.text, menu, default) if menu is not None and default is not None else new.text
        if after != text:
            edits.append(Edit("bootloader", path, text, after, _summary(new, text, after, menu, default)))
        warnings += [_unresolved(path, word, looked_up) for word in dict.fromkeys(new.unresolved)]
        named += [_named(path, word, looked_up[word]) for word in dict.fromkeys(new.replaced) if word in looked_up]
    if menu is not None and default is not None:
        warnings += _check(view, menu, default, edits)
    for path in ("/boot/grub/device.map", "/boot/grub2/device.map"):
        device_map = view.read(path)
        if device_map is not None and any(changes_with_hardware(word) for word in device_map.split()):
            # GRUB reads it only when grub-install or update-grub runs, and then it must be right or absent.
            edits.append(Edit("bootloader", path, device_map, None, "GRUB finds the disks by itself"))
    return FixPlan(tuple(edits), warnings=tuple(warnings), names=tuple(named))


def _named(path: str, word: str, found: Became) -> Named:
    key, _, spec = word.partition("=")
    return Named(path, 0, f"{key}=", spec, found.name or spec, found.place, found.why)


def _unresolved(path: str, word: str, looked_up: Mapping[str, Became]) -> Finding:
    why = looked_up[word].why if word in looked_up else "its file has no room for the new name"
    return Finding(
        "bootloader_unresolved",
        f"{path} has {printable(word)} on a kernel command line: {why}",
        "Put a UUID there in the guest, or take the word out; or export the disk that is missing.",
    )


def _check(view: View, menu: Menu, default: int, edits: list[Edit]) -> list[Finding]:
    """A warning if the edited menu does not start what it shall."""
    texts = {edit.path: edit.after for edit in edits}
    new = boot_menu.read(lambda path: texts.get(path) or view.read(path), view.g.glob_expand)
    entry = menu.entries[default]
    if new is not None and new.default is not None and new.entries[new.default].kernel == entry.kernel:
        return []
    return [
        Finding(
            "default_unchanged",
            f"the boot menu of {menu.files[0].path} could not be set to start {printable(entry.title)} by default",
            "Choose it on the menu when the guest starts, and set it as the default in the guest.",
        )
    ]


@dataclass(frozen=True)
class Proved:
    """What was proved of the menu, and a warning for each entry that starts another root than it should."""

    proofs: tuple[Proof, ...]
    warnings: tuple[Finding, ...]


def prove(view: View, images: Sequence[Image]) -> Proved:
    """That the entries of these kernels name the root by something that only it has, and GRUB finds what it looks for.

    The entry that starts by default must; of the others it is said if they do not.
    """
    old = view.inspection.menu
    menu = boot_menu.read(view.read, view.g.glob_expand)
    if old is None or menu is None:
        return Proved((), ())
    kernels = {old.entries[image.kernel.entry].kernel: image for image in images if image.kernel.entry is not None}
    starts = menu.entries[menu.default].kernel if menu.default is not None else None
    proofs: list[Proof] = []
    warnings: list[Finding] = []
    for entry in menu.entries:
        image = kernels.get(entry.kernel)
        if image and image.options:
            entry = replace(entry, options=image.options)
        proof = _prove_root(view, menu, entry) if image and not image.kernel.rescue else None
        if proof is None:
            continue
        if proof.ok or starts in (None, entry.kernel):
            proofs.append(proof)
        else:
            warnings.append(_other_root(entry, proof))
    return Proved((*dict.fromkeys(proofs), *_prove_search(view, menu)), tuple(dict.fromkeys(warnings)))


def _prove_root(view: View, menu: Menu, entry: MenuEntry) -> Proof | None:
    """That an entry's root is the guest's; None if it names none that could be known here."""
    spec = entry.option("root")
    root = view.names.devices.get(view.inspection.root)
    path = menu.files[0].path if menu.files else entry.kernel
    claim = f"the entry {printable(entry.title)} names the guest's root, and nothing else has that name"
    if root is None or not spec or "$" in spec:
        return None
    if _BY_NUMBER.fullmatch(spec):
        return Proof(path, claim, False, f"root={spec} is a number that the old controller's driver had")
    devices = view.names.all(spec)
    if not spec.startswith(("/dev/", *BY_CONTENT)) or (re.match(r"/dev/(?:md|nfs|ram)", spec) and not devices):
        return None  # a network, a RAM disk; an array whose superblock has no name
    if changes_with_hardware(spec):
        return Proof(path, claim, False, f"root={printable(spec)} is a name that the old hardware gave")
    said = ", ".join(device.name for device in devices) or "no device here"
    return Proof(path, claim, [device.name for device in devices] == [root.name], f"root={printable(spec)} is {said}")


def _prove_search(view: View, menu: Menu) -> Iterator[Proof]:
    """That what GRUB searches for is not there twice."""
    for file in menu.files:
        searches = (found.split() for found in _SEARCH.findall(file.text) if file.kind == "grub.cfg")
        uuids = (words[-1] for words in searches if "--fs-uuid" in words[:-1] and _FS_UUID.fullmatch(words[-1]))
        for uuid in dict.fromkeys(uuids):
            devices = view.names.all(f"UUID={uuid}")
            if len(devices) > 1:
                said = " and ".join(device.name for device in devices)
                claim = f"GRUB finds the one file system with the UUID {uuid}"
                yield Proof(file.path, claim, False, f"{said} both have it")


def _other_root(entry: MenuEntry, proof: Proof) -> Finding:
    return Finding(
        "entry_root",
        f"the entry {printable(entry.title)} of the boot menu does not start this guest: {proof.evidence}",
        "Do not choose it, or correct its root in the guest.",
    )


def _summary(new: Rewritten, text: str, after: str, menu: Menu | None, default: int | None) -> str:
    said = []
    if new.replaced:
        words = ", ".join(sorted({printable(word) for word in new.replaced}))
        count = len(new.replaced)
        said.append(f"UUIDs instead of {words} in {count} place{'s' if count > 1 else ''}")
    if new.text.count(CONSOLES[-1]) > text.count(CONSOLES[-1]):
        said.append("kernels write to the first serial port too")
    if not said and new.text != text:
        said.append("the next update of the menu uses UUIDs")
    if menu is not None and default is not None and after != new.text:
        said.append(f"{printable(menu.entries[default].title)} starts by default")
    return "; ".join(said)


def rewrite(kind: str, text: str, stable: Stable, *, console: bool = False) -> Rewritten:
    """The text of one file with device names on kernel command lines replaced, and every other byte as it was."""
    form = _FORMATS.get(kind, _Format())
    lines = text.split("\n")
    replaced: list[str] = []
    unresolved: list[str] = []
    raw = [number for number, line in enumerate(lines) if form.raw.match(line)]
    has_initrd = "initrd" in text.lower()
    rest = ""  # by what the assignment of the line before goes on
    for number, line in enumerate(lines):
        if kind == "grub-defaults" and (found := _NO_UUID.match(line)):
            # With it, the next update-grub would write root=/dev/sda2 again.
            lines[number] = found["lead"] + "#" + line[found.end("lead") :]
        is_shell = bool(rest or form.shell.match(line))
        rest = _open_end(line, rest) if is_shell else ""
        if is_shell or form.raw.match(line):
            # Without an initramfs it is the kernel that looks for the device, and it knows partitions only.
            alone = (kind in ("bls", "extlinux") and not has_initrd) or _is_alone(kind, lines, number)
            lines[number] = _replace_words(line, stable, alone, replaced, unresolved)
    if console:
        together = " ".join(lines[number] for number in raw)
        for number in raw[-1:] if form.single else raw:
            lines[number] = _with_consoles(lines[number], together if form.single else lines[number])
        for number, line in enumerate(lines):
            if form.consoles.match(line):
                lines[number] = _with_consoles_in_shell(line)
    new = "\n".join(lines)
    if kind == "grubenv" and new != text:
        filled = _refilled(new)
        if filled is None:
            return Rewritten(text, (), (*replaced, *unresolved))
        new = filled
    return Rewritten(new, tuple(replaced), tuple(unresolved))


def _open_end(line: str, quote: str) -> str:
    """By what a shell's assignment goes on in the next line: an open quote, or a backslash; "" if it ends here.

    quote: the same of the line before.
    """
    quote = quote.strip("\\")
    for found in re.finditer(r"\\.|\\$|[\"']|(?<!\S)#", line):
        if found[0] == "\\" and quote != "'":
            return quote or "\\"
        if found[0] == "#" and not quote:
            return ""
        if found[0] in ("'", '"') and quote in ("", found[0]):
            quote = "" if quote else found[0]
        elif found[0] == "\\'" and quote == "'":  # in which a backslash means nothing
            quote = ""
    return quote


def _replace_words(line: str, stable: Stable, by_partition: bool, replaced: list[str], unresolved: list[str]) -> str:
    def word(found: re.Match[str]) -> str:
        if not changes_with_hardware(found["spec"]):
            return found[0]
        name = stable(found["key"], found["spec"], by_partition)
        (unresolved if name is None else replaced).append(found[0])
        return found[0] if name is None else f"{found['key']}={name}"

    def flags(found: re.Match[str]) -> str:
        parts = found["flags"].split(",")
        kept = [part for part in parts if not part.startswith("device=/dev/")]
        return found[0] if kept == parts else f"rootflags={','.join(kept)}" if kept else ""

    return _FLAGS.sub(flags, _WORD.sub(word, line))


def _is_alone(kind: str, lines: list[str], number: int) -> bool:
    """Whether the entry of a GRUB menu with a kernel on line `number` loads no initramfs."""
    start = _ENTRY.get(kind, _NEVER)
    if not start.match(lines[number]):
        return False
    for line in lines[number + 1 :]:
        if INITRD_LINE.match(line):
            return False
        if start.match(line) or line.strip() == "}":
            break
    return True


def _missing_consoles(options: str) -> str:
    """The consoles that kernel options do not name; none if a serial one is there already."""
    named = {found.partition(",")[0] for found in re.findall(r"(?<![\w.-])console=[^\s\"']+", options)}
    missing = [word for word in CONSOLES if word.partition(",")[0] not in named]
    return " ".join(missing) if CONSOLES[-1] in missing else ""


def _with_consoles(line: str, options: str) -> str:
    """A line that ends with kernel options, with the consoles that are not in all of them."""
    missing = _missing_consoles(options)
    # $kernelopts brings its own.
    if not missing or re.search(r"\$\{?kernelopts\b", options):
        return line
    body = line.rstrip()
    return f"{body}{'' if body.endswith('=') else ' '}{missing}{line[len(body) :]}"


def _with_consoles_in_shell(line: str) -> str:
    """An assignment with the consoles that are not in its value, before the quote that ends it."""
    missing = _missing_consoles(line)
    name, _, value = line.partition("=")
    found = re.match(r"\"(?:[^\"\\]|\\.)*|'[^']*|[^\s;\"']*", value)
    if not missing or found is None:
        return line
    body, rest = found[0], value[found.end() :]
    if body[:1] not in ('"', "'"):
        body, rest = f'"{body}', f'"{rest}'
    before = "" if len(body) == 1 or body.endswith(" ") else " "
    after = "" if rest.startswith(body[0]) else " "  # the value goes on in the next line
    return f"{name}={body}{before}{missing}{after}{rest}"


def _refilled(text: str) -> str | None:
    """A grubenv at its fixed size, which GRUB demands; None if it holds too much for that."""
    body = text.rstrip("#")
    missing = GRUBENV_BYTES - len(body.encode("utf-8", "surrogateescape"))
    return None if missing < 0 else body + "#" * missing


def choose(kind: str, text: str, menu: Menu, default: int) -> str:
    """The text of one file after which entry number `default` starts unless somebody chooses another one."""
    name = menu.entries[default].name
    match kind:
        case "grub.cfg" if not (_is_saved(menu) and _SET_SAVED.search(text)):
            return _replaced(_SET_DEFAULT, f'"{name}"', text) or f'set default="{name}"\n{text}'
        case "grubenv":
            body = text.rstrip("#")
            # A choice for one boot only would come first.
            new = _NEXT_ENTRY.sub(r"\1", body)
            if _is_saved(menu):
                new = _replaced(_SAVED_ENTRY, name, new) or f"{new}saved_entry={name}\n"
            return text if new == body else _refilled(new) or text
        case "grub-defaults" if not _is_saved(menu):
            return _replaced(_GRUB_DEFAULT, f'"{name}"', text) or text
        case "menu.lst":
            return _replaced(_LEGACY_DEFAULT, name, text) or f"default {name}\n{text}"
        case "loader.conf":
            file = name if name.endswith(".efi") else f"{name}.conf"
            return _replaced(_LOADER_DEFAULT, file, text) or f"default {file}\n{text}"
        case "extlinux":
            return _choose_label(text, menu, name)
    return text


def _is_saved(menu: Menu) -> bool:
    """Whether GRUB starts what grubenv has."""
    has_grubenv = any(file.kind == "grubenv" for file in menu.files)
    return has_grubenv and any(file.kind == "grub.cfg" and _SET_SAVED.search(file.text) for file in menu.files)


def _choose_label(text: str, menu: Menu, label: str) -> str:
    """A file of extlinux with another default: a line for all, or one in the section of the label, or both."""
    new = _replaced(_LABEL_DEFAULT, label, text) or text
    others = "".join(file.text for file in menu.files)
    if _LABEL_DEFAULT.search(others) and not _MENU_DEFAULT.search(others):
        return new
    section = re.compile(rf"^[ \t]*label[ \t]+{re.escape(label)}[ \t\r]*\n", re.MULTILINE | re.IGNORECASE)
    return section.sub(lambda found: f"{found[0]}  menu default\n", _MENU_DEFAULT.sub("", new), count=1)


def _replaced(pattern: re.Pattern[str], value: str, text: str) -> str | None:
    """The text with `value` after what the pattern's group matches, None if it does not match."""
    new, count = pattern.subn(lambda found: found[1] + value, text)
    return new if count else None
