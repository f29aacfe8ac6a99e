"""Reads the boot menus of GRUB 2, GRUB legacy, systemd-boot and extlinux: which kernel each entry starts, and how."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["grub.cfg", "bls", "grubenv", "menu.lst", "extlinux", "loader.conf"]
Read = Callable[[str], str | None]
Glob = Callable[[str], Sequence[str]]

LINUX_LINE = re.compile(r"\s*linux(?:16|efi)?\s+(?P<path>\S+)")
INITRD_LINE = re.compile(r"\s*initrd(?:16|efi)?\s")
ESP_ROOTS = ("/boot/efi", "/efi", "/boot")

# GRUB's script, as far as a menu needs it. A quote that its line does not close is a letter like any other.
_TOKEN = re.compile(
    r"(?P<blank>[^\S\n]+|\\\n|\#[^\n]*)"
    r"|(?P<end>[\n;]+)"
    r"|(?P<brace>[{}])"
    r"|(?P<word>(?:'[^'\n]*'|\"(?:[^\"\\\n]|\\.)*\"|\\.|\$\{\w+\}|[^\s;{}])+)"
)
_QUOTED = re.compile(r"'(?P<single>[^'\n]*)'|\"(?P<double>(?:[^\"\\\n]|\\.)*)\"|\\(?P<escaped>.)")
_ASSIGNMENT = re.compile(r"(?P<name>\w+)=(?P<value>.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{?(?P<name>\w+)\}?")
_BLSCFG = re.compile(r"^[ \t]*blscfg\b", re.MULTILINE)
_LOAD_ENV = re.compile(r"\bload_env[ \t]+(?:-f|--file)[ \t=]+(/[^\s;$]+)")
# An id or title that can be written into any of GRUB's files without quoting.
_PLAIN = re.compile(r"[^>\"'$`\\\r\n]+")
# Nobody nests submenus or loads environments like this; only a file made to keep us busy does.
_MAX_DEPTH = 8
_MAX_ENVIRONMENTS = 4
_MAX_OPTIONS = 8192


@dataclass(frozen=True)
class File:
    """A file that belongs to the menu."""

    path: str
    kind: Kind
    text: str


@dataclass(frozen=True)
class MenuEntry:
    """A line on the menu. `kernel` and `initrds` are paths as the menu has them, without GRUB's device.

    `name` is what makes the entry the default: GRUB's path of ids, titles or numbers (`1>0`), the stem of a BLS file, a
    label. options: the kernel's command line, with the variables that are known.
    """

    kernel: str
    initrds: tuple[str, ...]
    title: str
    name: str
    options: str = ""

    def option(self, key: str) -> str:
        """The value of an option, the last one if there are several, as the kernel reads it; "" if there is none."""
        values = (word.removeprefix(f"{key}=") for word in self.options.split() if word.startswith(f"{key}="))
        return (["", *values])[-1].strip("\"'")


@dataclass(frozen=True)
class Menu:
    """A boot menu: its files, and its entries in order. `default` starts unless somebody chooses; None: unknown."""

    loader: Literal["grub2", "grub-legacy", "systemd-boot", "extlinux"]
    files: tuple[File, ...]
    entries: tuple[MenuEntry, ...]
    default: int | None


def read(read: Read, glob: Glob) -> Menu | None:
    """The menu that the guest boots with, None if there is none with a kernel on it.

    read: from a path in the guest to its text, or None; glob: from a pattern to paths.
    What is left over from another boot loader does not count: systemd-boot goes first if its program is on the ESP,
    then GRUB 2, which has been everybody's for ten years; menu.lst comes last, as GRUB 2 leaves it where it was.
    """
    readers = [_grub2, _systemd_boot, _extlinux, _legacy]
    if any(glob(f"{root}/EFI/systemd/systemd-boot*.efi") for root in ESP_ROOTS):
        readers.insert(0, _systemd_boot)
    for reader in readers:
        menu = reader(read, glob)
        if menu is not None and menu.entries:
            return menu
    return None


def _grub2(read: Read, glob: Glob) -> Menu | None:
    files: list[File] = []
    menus: list[tuple[list[MenuEntry], int | None]] = []
    for path in ("/boot/grub2/grub.cfg", "/boot/grub/grub.cfg", *sorted(glob("/boot/efi/EFI/*/grub.cfg"))):
        text = read(path)
        # A second name of the same file is not a second menu.
        if text is None or any(file.text == text for file in files):
            continue
        environment = f"{path.rpartition('/')[0]}/grubenv"
        saved = read(environment)
        variables = environment_variables(saved or "")
        for other in list(dict.fromkeys(_LOAD_ENV.findall(text)))[:_MAX_ENVIRONMENTS]:
            # Photon keeps its kernel's name there. A path is relative to the file system that holds /boot.
            variables |= environment_variables(read(other) or read(f"/boot{other}") or "")
        bls = _bls_files(read, glob, ("/boot",)) if _BLSCFG.search(text) else []
        entries, default = _grub_entries(text, variables, bls)
        if not entries:  # a stub on the ESP, which points to the real menu
            continue
        files += [File(path, "grub.cfg", text), *([] if saved is None else [File(environment, "grubenv", saved)]), *bls]
        menus.append((entries, default))
    if not menus:
        return None
    # With a menu for each firmware, nobody knows here which one is shown; if they start the same, it does not matter.
    kernels = {None if default is None else entries[default].kernel for entries, default in menus}
    everything = tuple(entry for entries, _ in menus for entry in entries)
    return Menu("grub2", tuple(dict.fromkeys(files)), everything, menus[0][1] if len(kernels) == 1 else None)


@dataclass(eq=False)
class _Node:
    """A menuentry or submenu of GRUB. `kernel` is empty for what starts something else."""

    title: str = ""
    id: str = ""
    conditional: bool = False
    kernel: str = ""
    options: str = ""
    initrds: list[str] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)


def _grub_entries(text: str, environment: Mapping[str, str], bls: Sequence[File]) -> tuple[list[MenuEntry], int | None]:
    """The entries of a grub.cfg, and the index of the default. bls: what the command `blscfg` brings in."""
    variables = dict(environment)
    top = _Node()
    # For the braces of a function, or too many of them, the node around them is there twice.
    stack = [top]
    conditions = 0
    default = once = ""
    for words in _commands(text):
        node = stack[-1]
        match words:
            case ["menuentry" | "submenu", *arguments, "{"] if len(stack) <= _MAX_DEPTH:
                new = _Node("".join(arguments[:1]), _id(arguments), conditions > 0)
                node.children.append(new)
                stack.append(new)
            case [*_, "{"]:
                stack.append(node)
            case ["}"] if len(stack) > 1:
                closed = stack.pop()
                # SUSE's menu has a first line that is only there once a snapshot was booted.
                if closed is not stack[-1] and closed.conditional and not closed.kernel and not closed.children:
                    stack[-1].children.remove(closed)
            case ["if", *_]:
                conditions += 1
            case ["fi", *_]:
                conditions -= 1
            case ["blscfg", *_]:
                top.children += (
                    _Node(
                        entry.title, entry.name, kernel=entry.kernel, options=entry.options, initrds=list(entry.initrds)
                    )
                    for entry in _bls_entries(bls, variables)
                )
            case ["linux" | "linux16" | "linuxefi", path, *options]:
                if not node.kernel:
                    node.kernel, node.options = _path(path, variables), _expanded(" ".join(options), variables)
            case ["initrd" | "initrd16" | "initrdefi", *paths]:
                node.initrds += filter(None, (_path(path, variables) for path in paths))
            case ["set", assignment, *_] | [assignment] if said := _ASSIGNMENT.fullmatch(assignment):
                # What comes first, or from grubenv, is what counts: later lines say what to do without it.
                variables.setdefault(said["name"], said["value"])
                if said["name"] == "default" and node is top:
                    value = _VARIABLE.sub(lambda v: environment.get(v["name"], ""), said["value"])
                    if "next_entry" in said["value"]:
                        once = value
                    else:
                        default = value
    walked = list(_walk(top.children))
    entries = [MenuEntry(node.kernel, tuple(node.initrds), node.title, name, node.options) for name, node in walked]
    start = _start(top.children, once or default)
    return entries, next((number for number, (_, node) in enumerate(walked) if node is start), None)


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of a GRUB script, as words without quotes. An opening brace ends one, a closing one is one."""
    words: list[str] = []
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "word":
            word = token[0]
            if words or word not in ("then", "else", "do"):
                words.append(_unquoted(word))
        elif token.lastgroup == "end":
            if words:
                yield words
            words = []
        elif token.lastgroup == "brace":
            if token[0] == "{":
                yield [*words, "{"]
            else:
                if words:
                    yield words
                yield ["}"]
            words = []
    if words:
        yield words


def _unquoted(word: str) -> str:
    def inner(found: re.Match[str]) -> str:
        if found["double"] is not None:
            return re.sub(r"\\([\"$\\])", r"\1", found["double"])
        return found["single"] or found["escaped"] or ""

    return _QUOTED.sub(inner, word)


def _id(arguments: Sequence[str]) -> str:
    """The id of a menuentry, "" if it has none."""
    for number, word in enumerate(arguments):
        if word in ("$menuentry_id_option", "${menuentry_id_option}", "--id"):
            return "".join(arguments[number + 1 : number + 2])
        if word.startswith("--id="):
            return word.removeprefix("--id=")
    return ""


def _walk(nodes: Sequence[_Node], above: str = "") -> Iterator[tuple[str, _Node]]:
    """The nodes that start a kernel, each with the value of `default` that means it."""
    # RHEL 7 copies an entry, with its id, for each new kernel; GRUB then starts the first that has it.
    count = Counter(name for node in nodes for name in {node.id, node.title})
    for number, node in enumerate(nodes):
        unique = (name for name in (node.id, node.title) if count[name] == 1 and not name.isdigit())
        name = above + next(filter(_PLAIN.fullmatch, unique), str(number))
        if node.kernel:
            yield name, node
        yield from _walk(node.children, f"{name}>")


def _start(nodes: Sequence[_Node], value: str) -> _Node | None:
    """The node that GRUB's `default` means: a number, an id or a title on each level, the first one if in doubt."""
    if not nodes:
        return None
    name, _, rest = value.partition(">")
    named = (node for number, node in enumerate(nodes) if name in (str(number), node.id, node.title))
    node = next(named, nodes[0]) if name else nodes[0]
    return _start(node.children, rest) if node.children else node


def environment_variables(text: str) -> dict[str, str]:
    """The variables of a grubenv."""
    lines = (line.partition("=") for line in text.split("\n") if not line.startswith("#"))
    return {name: value.removesuffix("\r") for name, equals, value in lines if equals}


def _bls_files(read: Read, glob: Glob, roots: Iterable[str]) -> list[File]:
    """The entries of the Boot Loader Specification, by name, newest first."""
    paths = [path for root in roots for path in glob(f"{root}/loader/entries/*.conf")]
    paths.sort(key=lambda path: _version_key(_stem(path)), reverse=True)
    return [File(path, "bls", text) for path in paths if (text := read(path)) is not None]


def _bls_entries(files: Iterable[File], variables: Mapping[str, str]) -> list[MenuEntry]:
    entries = []
    for file in files:
        fields = _bls_fields(file.text)
        if kernel := _path(fields.get("linux", ""), variables):
            initrds = (_path(word, variables) for word in fields.get("initrd", "").split())
            options = _expanded(fields.get("options", ""), variables)
            title = fields.get("title", "")
            entries.append(MenuEntry(kernel, tuple(filter(None, initrds)), title, _stem(file.path), options))
    return entries


def _bls_fields(text: str) -> dict[str, str]:
    """The fields of a BLS file, with those initrds and options joined by spaces that have a line each."""
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        key, value = _key_value(line)
        fields[key] = f"{fields[key]} {value}" if key in ("initrd", "options") and key in fields else value
    return fields


def _systemd_boot(read: Read, glob: Glob) -> Menu | None:
    config = _first(read, [f"{root}/loader/loader.conf" for root in ESP_ROOTS], "loader.conf")
    bls = _bls_files(read, glob, ESP_ROOTS)
    fields = {file.path: _bls_fields(file.text) for file in bls}
    # Those with a sort-key come first, by it, and the newest first among equals; the others are in the files' order.
    keyed = [file for file in bls if "sort-key" in fields[file.path]]
    keyed.sort(key=lambda file: _version_key(fields[file.path].get("version", "")), reverse=True)
    keyed.sort(key=lambda file: [fields[file.path].get(key, "") for key in ("sort-key", "machine-id")])
    rest = [file for file in bls if "sort-key" not in fields[file.path]]
    # Unified kernel images are on the menu by being there. What is in them is read with the kernels.
    images = sorted({path for root in ESP_ROOTS for path in glob(f"{root}/EFI/Linux/*.efi")})
    images.sort(key=lambda path: _version_key(_stem(path)), reverse=True)
    sealed = [MenuEntry(path, (), _stem(path), path.rpartition("/")[2]) for path in images]
    entries = [*_bls_entries([*keyed, *rest], {}), *sealed]
    said = [value for key, value in map(_key_value, config.text.split("\n")) if key == "default"] if config else []
    pattern = "".join(said[-1:]).removesuffix(".conf").lower()
    # What matches nothing, or is saved in the old machine's firmware, leaves the first. Which that is among entries of
    # both kinds is up to sort keys inside of the images.
    first = None if sealed and len(sealed) < len(entries) else 0
    named = (n for n, entry in enumerate(entries) if pattern and fnmatch.fnmatchcase(entry.name.lower(), pattern))
    return Menu("systemd-boot", (*([config] if config else []), *bls), tuple(entries), next(named, first))


def _extlinux(read: Read, glob: Glob) -> Menu | None:
    paths = ("/boot/extlinux/extlinux.conf", "/boot/extlinux.conf", "/boot/syslinux/syslinux.cfg")
    main = _first(read, paths, "extlinux")
    if main is None:
        return None
    directory = main.path.rpartition("/")[0]
    # The main file may include others; who starts what is said in either.
    others = (
        File(path, "extlinux", text)
        for path in sorted(glob(f"{directory}/*.cfg"))
        if path != main.path and (text := read(path)) is not None
    )
    files = (main, *others)
    labels: list[dict[str, str]] = []
    values: dict[str, str] = {}  # of the label that is being read; of none at first
    defaults: dict[str, str] = {}
    for key, value in (_key_value(line) for file in files for line in file.text.split("\n")):
        match key.lower(), value.lower().split():
            case "label", _:
                values = {"label": value}
                labels.append(values)
            case "menu", ["label", *_]:
                values["title"] = value[len("label") :].strip().replace("^", "")
            case "menu", ["default"]:
                defaults["menu"] = values.get("label", "")
            case ("default" | "ontimeout") as place, [word, *_] if not word.endswith(".c32"):
                defaults[place] = value
            case "kernel" | "linux", [word, *_] if not word.endswith(".c32"):
                values["kernel"] = value.split()[0]
            case ("append" | "initrd") as name, _:
                values[name] = value
    entries = []
    for values in labels:
        if "kernel" in values:
            inside = re.findall(r"(?<!\S)initrd=(\S+)", values.get("append", ""))
            initrds = ",".join([*inside, *values.get("initrd", "").split()]).split(",")
            title = values.get("title", values["label"])
            options = values.get("append", "")
            entries.append(MenuEntry(values["kernel"], tuple(filter(None, initrds)), title, values["label"], options))
    default = next((defaults[place] for place in ("ontimeout", "menu", "default") if place in defaults), None)
    named = (n for n, entry in enumerate(entries) if entry.name == default)
    return Menu("extlinux", files, tuple(entries), next(named, None if default else 0))


def _legacy(read: Read, glob: Glob) -> Menu | None:
    # Red Hat's GRUB reads grub.conf, and menu.lst is a link to it; everybody else's reads menu.lst.
    paths = ("/boot/grub/grub.conf", "/boot/grub/menu.lst", *sorted(glob("/boot/efi/EFI/*/grub.conf")))
    file = _first(read, paths, "menu.lst")
    if file is None:
        return None
    nodes: list[_Node] = []
    default = "0"
    for line in file.text.split("\n"):
        key, *rest = re.split(r"[\s=]+", line.strip(), maxsplit=1)
        value = "".join(rest)
        match key:
            case "title":
                nodes.append(_Node(value))
            case "kernel" if nodes:
                path, *options = [word for word in value.split() if not word.startswith("--")] or [""]
                nodes[-1].kernel, nodes[-1].options = _path(path), " ".join(options)
            case "initrd" if nodes:
                nodes[-1].initrds += map(_path, value.split())
            case "default":
                default = value
    entries = [
        MenuEntry(node.kernel, tuple(node.initrds), node.title, str(number), node.options)
        for number, node in enumerate(nodes)
        if node.kernel
    ]
    named = (n for n, entry in enumerate(entries) if entry.name == default)
    return Menu("grub-legacy", (file,), tuple(entries), next(named, None))


def _first(read: Read, paths: Iterable[str], kind: Kind) -> File | None:
    """The first of the files that exists."""
    return next((File(path, kind, text) for path in paths if (text := read(path)) is not None), None)


def _key_value(line: str) -> tuple[str, str]:
    """The first word of a line, and the rest without the white space around it."""
    key, *rest = line.split(None, 1) or [""]
    return key, "".join(rest).strip()


def _path(word: str, variables: Mapping[str, str] | None = None) -> str:
    """A path without GRUB's device in front of it; "" if it is in a variable that nobody knows."""
    path = re.sub(r"^\([^)]*\)", "", word)
    if variables and "$" in path:
        path = _VARIABLE.sub(lambda v: variables.get(v["name"], v[0]), path)
    return "" if "$" in path or len(path) > 4096 else path


def _expanded(options: str, variables: Mapping[str, str]) -> str:
    """A command line with the variables that are known; the values of some hold others."""
    for _ in range(3):
        if "$" not in options or len(options) > _MAX_OPTIONS:
            break
        options = _VARIABLE.sub(lambda v: variables.get(v["name"], v[0])[:_MAX_OPTIONS], options)
    return options[:_MAX_OPTIONS]


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".conf")


def _version_key(text: str) -> list[list[tuple[int, int, str]]]:
    """Sorts as rpm compares name, version and release: a tilde before the end, that before words, those before numbers.

    Numbers by value, that is by length and digits: Python refuses to convert the longest.
    """
    return [
        [_piece_key(piece) for piece in re.findall(r"\d+|[a-zA-Z]+|~", part)] + [(1, 0, "")]
        for part in text.rsplit("-", 2)
    ]


def _piece_key(piece: str) -> tuple[int, int, str]:
    if piece.isdigit():
        digits = piece.lstrip("0")
        return 3, len(digits), digits
    return (0, 0, "") if piece == "~" else (2, 0, piece)
