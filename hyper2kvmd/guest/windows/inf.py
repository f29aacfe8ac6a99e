"""Reads the `.inf` of a driver: which devices of which Windows it is for, and what Windows would install.

By hand: no library reads the format, and Windows alone decides what a line means. The rules are those of Microsoft's
"General Syntax Rules for INF Files" and "INF Manufacturer Section". What is read is as much as a boot driver needs.
Whatever a person could mean otherwise is an error, as is a name that leads nowhere: that is how a file looks that was
cut off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date

SIZE_LIMIT = 1 << 20
LINE_LIMIT = 20_000
FIELD_LIMIT = 4096  # characters, Windows's own

# Types of registry values.
REG_SZ, REG_EXPAND_SZ, REG_BINARY, REG_DWORD, REG_MULTI_SZ, REG_QWORD = 1, 2, 3, 4, 7, 11

_MARKS = ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"), (b"\xef\xbb\xbf", "utf-8"))
_SIGNATURES = ("$windows nt$", "$chicago$", "$windows 95$")
# A quoted text and whether it ends, a comment, what parts fields, a backslash that joins lines, any other text.
_PIECE = re.compile(r'"((?:[^"]|"")*)("?)|(;.*)|([,=])|(\\\s*(?:;.*)?$)|([^",=;\\]+|\\)')
_TOKEN = re.compile(r"%([^%]*)%")
_GUID = re.compile(r"\{[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}\}", re.IGNORECASE)
_DATE = re.compile(r"([0-9]{1,2})[/-]([0-9]{1,2})[/-]([0-9]{4})")
_VERSION = re.compile(r"[0-9]{1,5}(\.[0-9]{1,5}){0,3}")
_NUMBER = re.compile(r"0x[0-9a-f]{1,16}|[0-9]{1,20}", re.IGNORECASE)
# NT and the architecture, then major, minor, type of product, suite, build, of which any can be empty.
_TARGET = re.compile(r"nt([a-z][a-z0-9]*)?((?:\.[0-9a-fx]*){0,5})", re.IGNORECASE)
_ARCHS = {"x86_64": "amd64", "i386": "x86", "aarch64": "arm64"}

# Of AddReg's flags: what kind of value it is, and what Windows does with it.
_KIND = 0xFFFF0001
_KINDS = {
    0x00000000: REG_SZ,
    0x00000001: REG_BINARY,
    0x00010000: REG_MULTI_SZ,
    0x00020000: REG_EXPAND_SZ,
    0x00010001: REG_DWORD,
    0x000B0001: REG_QWORD,
}
_UNLESS_THERE, _KEY_ALONE = 0x2, 0x10
_OF_THE_DEVICE = 0x2  # of AddService's flags: this is the service that drives the device


class InfError(ValueError):
    """A `.inf` that cannot be used. line: from 1, 0 if it is about the whole file."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(f"line {line}: {message}" if line else message)
        self.line = line


@dataclass(frozen=True)
class Entry:
    """A line of a section, as it stands there but for quotes and comments. key: what is before its `=`, if anything."""

    line: int
    key: str | None
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Version:
    """What [Version] says. number: of the driver, of four parts."""

    setup_class: str
    class_guid: str
    provider: str
    date: date
    number: tuple[int, int, int, int]


@dataclass(frozen=True)
class RegistryValue:
    """A value that is written below a service's key. path: of the key below it, "" for that itself.

    type and data: as the registry has them. Both are None for a key without a value.
    """

    path: str
    name: str
    type: int | None
    data: bytes | None


@dataclass(frozen=True)
class Service:
    """The service that drives a device. binary: where Windows puts its file, such as `%12%\\viostor.sys`."""

    name: str
    type: int
    start: int
    error_control: int
    load_order_group: str
    binary: str
    parameters: tuple[RegistryValue, ...]

    @property
    def file(self) -> str:
        """The name of its file."""
        return self.binary.rpartition("\\")[2]


@dataclass(frozen=True)
class Inf:
    """A `.inf`. Names of sections and keys are in lower case; whatever is asked of it may raise InfError."""

    sections: Mapping[str, tuple[Entry, ...]]
    strings: Mapping[str, str]

    @property
    def version(self) -> Version:
        """What the driver is, by [Version]."""
        guid, line = self._one("version", "classguid")
        if not _GUID.fullmatch(guid):
            raise InfError(f"ClassGuid is no GUID: '{guid}'", line)
        line, fields = next(self._all("version", "driverver"), (0, []))
        found = _DATE.fullmatch(fields[0]) if fields else None
        if found is None or len(fields) < 2 or not _VERSION.fullmatch(fields[1]):
            raise InfError("DriverVer is not a date and a version such as 01/31/2024,100.94.104.24000", line)
        try:
            day = date(int(found[3]), int(found[1]), int(found[2]))
        except ValueError:
            raise InfError(f"DriverVer has a date that is none: '{fields[0]}'", line) from None
        parts = [*map(int, fields[1].split(".")), 0, 0, 0]
        if max(parts) > 0xFFFF:
            raise InfError(f"DriverVer has a version that is none: '{fields[1]}'", line)
        return Version(
            setup_class=self._one("version", "class")[0],
            class_guid=guid,
            provider=self._one("version", "provider")[0],
            date=day,
            number=(parts[0], parts[1], parts[2], parts[3]),
        )

    def catalog(self, arch: str) -> str:
        """The name of the file with the signatures, "" if there is none. arch: x86_64, i386 or aarch64."""
        for key in (f"catalogfile.nt{_ARCHS[arch]}", "catalogfile.nt", "catalogfile"):
            for _, fields in self._all("version", key):
                return fields[0]
        return ""

    def models(self, arch: str, build: int, product_type: int) -> dict[str, str]:
        """The install section for each device id that it supports, on just this Windows; none if it is not for it.

        Ids are in upper case. arch: x86_64, i386 or aarch64. product_type: as Windows has it, 1 a workstation, 2 a
        domain controller, 3 another server.
        """
        found: dict[str, str] = {}
        seen: set[str] = set()
        for maker in self._entries("manufacturer"):
            base, *targets = self._named(maker)
            targets = [target for target in targets if target]
            section = _closest(base, targets, _ARCHS[arch], build, product_type)
            if section is None:
                # What is not decorated is for x86 alone, since Windows Server 2003.
                if arch != "i386" or (targets and base.lower() not in self.sections):
                    continue
                section = base
            entries = self._entries(section, maker.line)
            if section.lower() in seen:
                continue
            seen.add(section.lower())
            for model in entries:
                install, *ids = self._named(model)
                for id in filter(None, ids):
                    found.setdefault(id.upper(), self._decorated(install, arch, model.line))
        return found

    def _decorated(self, section: str, arch: str, line: int) -> str:
        """The variant of an install section that is for an architecture."""
        for name in (f"{section}.nt{_ARCHS[arch]}", f"{section}.nt", section):
            if name.lower() in self.sections:
                return name
        raise _missing(section, line)

    def service(self, install: str) -> Service | None:
        """The service that an install section, as models() gives it, installs for the device."""
        for line, fields in self._all(f"{install}.Services", "addservice"):
            name, flags, section, *_ = (*fields, "", "")
            if name and _number(flags or "0", line) & _OF_THE_DEVICE:
                return self._service(name, section, line)
        return None

    def _service(self, name: str, section: str, line: int) -> Service:
        self._entries(section, line)
        numbers = [_number(*self._one(section, key)) for key in ("servicetype", "starttype", "errorcontrol")]
        groups = [fields[0] for _, fields in self._all(section, "loadordergroup")]
        values = [self._value(entry) for entry in self._listed(section, "addreg")]
        return Service(
            name=name,
            type=numbers[0],
            start=numbers[1],
            error_control=numbers[2],
            load_order_group=groups[0] if groups else "",
            binary=self._one(section, "servicebinary")[0],
            parameters=tuple(values),
        )

    def copied(self, install: str) -> tuple[str, ...]:
        """The names of the files, as they are in the driver's directory, that an install section copies."""
        names = [field[1:] for _, fields in self._all(install, "copyfiles") for field in fields if field[:1] == "@"]
        for entry in self._listed(install, "copyfiles"):
            target, source, *_ = (*self._texts(entry), "")
            names.append(source or target)
        return tuple(dict.fromkeys(names))

    def sources(self, arch: str) -> tuple[str, ...]:
        """The names of all files that belong to the driver, but for the `.inf` itself and the catalog."""
        names = []
        for section in (f"sourcedisksfiles.{_ARCHS[arch]}", "sourcedisksfiles"):
            for entry in self.sections.get(section, ()):
                names.append(self._text(entry.key or entry.fields[0], entry.line))
        return tuple(dict.fromkeys(names))

    def _value(self, entry: Entry) -> RegistryValue:
        """A line of AddReg."""
        fields = self._texts(entry)
        root, path, name, flags_text = (*fields, "", "", "")[:4]
        flags = _number(flags_text or "0", entry.line)
        if root.upper() != "HKR":
            raise InfError(f"a service writes outside of its own key, to '{root}', which is not read", entry.line)
        if flags & _KEY_ALONE:
            return RegistryValue(path, "", None, None)
        kind = _KINDS.get(flags & _KIND)
        if kind is None or flags & ~_KIND & ~_UNLESS_THERE:
            raise InfError(f"flags of a registry value are not known: '{flags_text}'", entry.line)
        return RegistryValue(path, name, kind, _data(kind, fields[4:] or [""], entry.line))

    def _entries(self, section: str, line: int = 0) -> tuple[Entry, ...]:
        if section.lower() not in self.sections:
            raise _missing(section, line)
        return self.sections[section.lower()]

    def _all(self, section: str, key: str) -> Iterator[tuple[int, list[str]]]:
        """The line and the fields of each entry of a section that has this key."""
        for entry in self.sections.get(section.lower(), ()):
            if entry.key == key:
                yield entry.line, self._texts(entry)

    def _listed(self, section: str, key: str) -> Iterator[Entry]:
        """The entries of the sections that a key of a section names, of each once."""
        named = ((name.lower(), line) for line, names in self._all(section, key) for name in names)
        for name, line in dict(named).items():
            if name and not name.startswith("@"):
                yield from self._entries(name, line)

    def _one(self, section: str, key: str) -> tuple[str, int]:
        """The first field of an entry that must be there, and its line."""
        for line, fields in self._all(section, key):
            if fields[0]:
                return fields[0], line
        raise InfError(f"[{section}] has no {key}")

    def _named(self, entry: Entry) -> list[str]:
        """The fields of an entry whose key is a name for people, which must be there, and whose first is a section."""
        fields = self._texts(entry)
        if not fields[0] or not self._text(entry.key or fields[0], entry.line):
            raise InfError("this names no section", entry.line)
        return fields

    def _texts(self, entry: Entry) -> list[str]:
        return [self._text(field, entry.line) for field in entry.fields]

    def _text(self, raw: str, line: int) -> str:
        """A field with the texts of [Strings] in it."""

        def put(found: re.Match[str]) -> str:
            name = found[1]
            if not name:
                return "%"
            if name.isascii() and name.isdecimal():  # a directory, by its number
                return found[0]
            if name.lower() not in self.strings:
                raise InfError(f"%{name}% is not in [Strings]", line)
            return self.strings[name.lower()]

        return _bounded(_TOKEN.sub(put, raw), line)


def parse(data: bytes) -> Inf:
    """The `.inf` in the bytes of its file, in UTF-16 or UTF-8 with a byte order mark, UTF-8 or cp1252. Raise InfError.

    Only what is asked for later is looked at closely.
    """
    lines = re.split(r"\r\n|\r|\n", _decode(data))
    if len(lines) > LINE_LIMIT:
        raise InfError(f"it has more than {LINE_LIMIT} lines")
    sections: dict[str, list[Entry]] = {}
    section: list[Entry] | None = None
    rest = iter(enumerate(lines, 1))
    for number, text in rest:
        text = text.strip()
        if text.startswith("["):
            name, closed, _ = text[1:].partition("]")
            if not closed:
                raise InfError("the name of a section has no end", number)
            section = sections.setdefault(name.strip().lower(), [])
            continue
        entry = _entry(number, text, rest)
        if entry is None:
            continue
        if section is None:
            raise InfError("this stands before any section", number)
        section.append(entry)
    signatures = [entry.fields[0] for entry in sections.get("version", []) if entry.key == "signature"]
    if not signatures or signatures[0].lower() not in _SIGNATURES:
        raise InfError("it has no [Version] with a Signature of Windows: it is not the .inf of a driver")
    strings = {entry.key: ",".join(entry.fields) for entry in reversed(sections.get("strings", [])) if entry.key}
    return Inf({name: tuple(entries) for name, entries in sections.items()}, strings)


def _decode(data: bytes) -> str:
    if len(data) > SIZE_LIMIT:
        raise InfError(f"it is larger than {SIZE_LIMIT >> 20} MiB")
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", ""))
    try:
        text = data[len(mark) :].decode(encoding or "utf-8")
    except UnicodeDecodeError:
        if encoding:
            raise InfError("it holds what is no text, or ends in the middle of a character") from None
        text = data.decode("cp1252", "replace")
    if "\0" in text:
        raise InfError("it holds zero bytes: it is no text", text.count("\n", 0, text.index("\0")) + 1)
    return text


def _entry(number: int, text: str, rest: Iterator[tuple[int, str]]) -> Entry | None:
    """The entry that begins with a line, and goes on in those that a backslash joins to it; None for an empty one."""
    key: str | None = None
    fields: list[str] = []
    pieces = [""]  # of the field so far: every other one was quoted
    joined = True
    while joined:
        joined = False
        for found in _PIECE.finditer(text):
            quoted, closed, _, mark, join, plain = found.groups()
            if quoted is not None:
                if not closed:
                    raise InfError("a quoted text has no end", number)
                pieces += [quoted.replace('""', '"'), ""]
            elif mark == "=" and key is None and not fields:
                key, pieces = _field(pieces, number), [""]
            elif mark == ",":
                fields.append(_field(pieces, number))
                pieces = [""]
            elif join is not None:
                number_of_next, text = next(rest, (0, ""))
                if not number_of_next:
                    raise InfError("it ends in the middle of an entry", number)
                joined = True
                break
            elif mark or plain:
                pieces[-1] = _bounded(pieces[-1] + (mark or plain), number)
    if key is None and not fields and len(pieces) == 1 and not pieces[0].strip():
        return None
    fields.append(_field(pieces, number))
    return Entry(number, key.lower() if key is not None else None, tuple(fields))


def _field(pieces: list[str], line: int) -> str:
    """A field of its pieces, without the space around it that is not quoted."""
    pieces[0] = pieces[0].lstrip()
    pieces[-1] = pieces[-1].rstrip()
    return _bounded("".join(pieces), line)


def _bounded(text: str, line: int) -> str:
    if len(text) > FIELD_LIMIT:
        raise InfError(f"a value has more than {FIELD_LIMIT} characters", line)
    return text


def _closest(base: str, targets: list[str], arch: str, build: int, product_type: int) -> str | None:
    """The name of the decorated section of models that Windows chooses, if one is for it."""
    best: tuple[tuple[int, ...], str] | None = None
    for target in targets:
        rank = _rank(target, arch, build, product_type)
        if rank is not None and (best is None or rank > best[0]):
            best = rank, f"{base}.{target}"
    return best[1] if best is not None else None


def _rank(target: str, arch: str, build: int, product_type: int) -> tuple[int, ...] | None:
    """How close a decoration such as NTamd64.10.0...16299 is to this Windows; None if it is for another one.

    One that names a suite is for another one, as nobody here knows of suites.
    """
    found = _TARGET.fullmatch(target)
    if found is None:
        return None
    try:
        numbers = [int(part, 0) if part else 0 for part in found[2].split(".")[1:]]
    except ValueError:
        return None
    major, minor, type, suite, least = (*numbers, 0, 0, 0, 0, 0)[:5]
    named = (found[1] or "x86").lower()
    windows = _windows_version(build)
    if named != arch or suite or type not in (0, product_type) or (major, minor) > windows:
        return None
    if (major, minor) == windows and least > build:
        return None
    return major, minor, least, bool(type), bool(found[1])


def _windows_version(build: int) -> tuple[int, int]:
    """The version of Windows that a build is of."""
    firsts = ((10240, (10, 0)), (9600, (6, 3)), (9200, (6, 2)), (7600, (6, 1)))
    return next((version for first, version in firsts if build >= first), (6, 0))


def _number(text: str, line: int) -> int:
    if not _NUMBER.fullmatch(text):
        raise InfError(f"not a number: '{text}'", line)
    return int(text, 16) if text.lower().startswith("0x") else int(text)


def _data(kind: int, fields: list[str], line: int) -> bytes:
    """The fields of a registry value as the registry has it."""
    size = {REG_DWORD: 4, REG_QWORD: 8}.get(kind)
    if size is not None and len(fields) == 1:
        number = _number(fields[0] or "0", line)
        if number >> (8 * size):
            raise InfError(f"a number of more than {size} bytes: '{fields[0]}'", line)
        return number.to_bytes(size, "little")
    if size is not None or kind == REG_BINARY:
        try:
            data = bytes(int(field, 16) for field in fields if field)
        except ValueError:
            raise InfError("not bytes in hexadecimal", line) from None
        if size not in (None, len(data)):
            raise InfError(f"a number of {len(data)} bytes that should have {size}", line)
        return data
    text = "".join(f"{field}\0" for field in fields) if kind == REG_MULTI_SZ else fields[0]
    return f"{text}\0".encode("utf-16-le")


def _missing(section: str, line: int) -> InfError:
    return InfError(f"there is no section [{section}]: was the file cut off?", line)
