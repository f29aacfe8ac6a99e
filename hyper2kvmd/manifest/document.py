"""Turns the bytes of a manifest into plain data; nothing in them can run code, loop or use up the machine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from hyper2kvmd.errors import Code, Finding
from hyper2kvmd.manifest.problems import ManifestError, invalid, place
from hyper2kvmd.text import plain, show

SIZE_LIMIT = 1 << 20
DEPTH_LIMIT = 32
_TOO_DEEP = f"nested deeper than {DEPTH_LIMIT} levels"
_LIBYAML_DEPTH = "exceeded maximum nesting depth"  # a newer one counts to a thousand by itself, and reads ahead

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?")
# YAML 1.1 would also read 52:54:00:12:34:56 as a number, 22:10 as one, and `no` as false: not here.
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is there


class _Refused(Exception):
    """Found while parsing: the document is whole, but nothing that we accept."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.problem = invalid(message, hint)


def load(data: bytes, name: str) -> Any:
    """The content of a manifest as dicts, lists and scalars: JSON if its name ends in .json, YAML otherwise.

    Raise ManifestError.
    """
    if len(data) > SIZE_LIMIT:
        raise _invalid(name, f"{len(data)} bytes are too much: a manifest has at most {SIZE_LIMIT}", _NOT_ONE)
    if data.startswith(b"\xef\xbb\xbf"):
        raise _invalid(name, "the file starts with a byte order mark", "Save it as UTF-8 without one.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(name, f"not UTF-8 at byte {error.start}", "Save it as UTF-8.") from None
    try:
        content = _load_json(text) if name.lower().endswith(".json") else _load_yaml(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _unreadable(name, f"not complete JSON: {error.msg} at {where}", f"Look at {where}.") from None
    except yaml.YAMLError as error:
        if getattr(error, "problem", None) == _LIBYAML_DEPTH:
            raise _invalid(name, _TOO_DEEP, _NOT_ONE) from None
        # Only the position: the text of the problem quotes the file, and this goes to logs.
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "some character in it"
        what = plain(str(getattr(error, "problem", None) or "cannot be read"))
        raise _unreadable(name, f"not complete YAML: {what} at {where}", f"Look at {where}.") from None
    except RecursionError:
        raise _invalid(name, _TOO_DEEP, _NOT_ONE) from None
    except _Refused as refused:
        raise ManifestError(Code.MANIFEST_INVALID, name, [refused.problem]) from None
    if problem := next(_unclean(content), None):
        raise ManifestError(Code.MANIFEST_INVALID, name, [problem])
    return content


_NOT_ONE = "This is not an Artifact Manifest. Export the VM again."


def _invalid(name: str, message: str, hint: str) -> ManifestError:
    return ManifestError(Code.MANIFEST_INVALID, name, [invalid(message, hint)])


def _unreadable(name: str, message: str, hint: str) -> ManifestError:
    hint = f"If the exporter is still writing it, wait. Otherwise export the VM again, or fix the file: {hint}"
    return ManifestError(Code.MANIFEST_UNREADABLE, name, [Finding(Code.MANIFEST_UNREADABLE, message, hint)])


def _load_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise _duplicate(key)
                seen.add(key)
        return table

    def constant(word: str) -> NoReturn:
        raise _Refused(f"{word} is not a number that JSON knows", "Write a finite number.")

    return json.loads(text, object_pairs_hook=unique, parse_int=_integer, parse_float=_float, parse_constant=constant)


def _load_yaml(text: str) -> Any:
    """Build the data from the parser's events, without recursion, aliases, tags or surprising types."""
    # Each level: its container and, in a mapping, the key that waits for its value.
    levels: list[tuple[dict[str, Any] | list[Any], list[str]]] = []
    documents: list[Any] = []

    def add(value: Any, key: str | None = None) -> None:
        if not levels:
            documents.append(value)
            return
        container, pending = levels[-1]
        if isinstance(container, list):
            container.append(value)
        elif pending:
            container[pending.pop()] = value
        elif key is None:
            raise _Refused(f"{show(value)} is used as a key", "Keys are plain words.")
        elif key in container:
            raise _duplicate(key)
        else:
            pending.append(key)

    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused("YAML anchors and aliases are not allowed", "Write the value out where it is used.")
        if tag := getattr(event, "tag", None):
            raise _Refused(f"the YAML tag {show(tag)} is not allowed", "Write the value without a tag.")
        if isinstance(event, yaml.ScalarEvent):
            add(_scalar(event.value) if event.implicit[0] else event.value, event.value)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            container: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
            add(container)
            levels.append((container, []))
            if len(levels) > DEPTH_LIMIT:
                raise _Refused(_TOO_DEEP, _NOT_ONE)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            levels.pop()
    if not documents:
        raise yaml.YAMLError
    if len(documents) > 1:
        raise _Refused("more than one YAML document", "A manifest is one document: remove the others.")
    return documents[0]


def _scalar(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return _integer(text)
    return _float(text) if _FLOAT.fullmatch(text) else text


def _integer(text: str) -> int:
    # Python takes the square of the number of digits, so look at their number first.
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**63:
        raise _Refused(f"the number {show(text)} is too large", "Numbers have at most 64 bits.")
    return number


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused(f"the number {show(text)} is too large", "Write a finite number.")
    return number


def _duplicate(key: str) -> _Refused:
    return _Refused(f"the key {show(key)} is there twice in one table", "Delete one of the two.")


def _unclean(content: Any) -> Iterator[Finding]:
    """What no text in a manifest may hold, whatever it means, with its place."""
    todo: list[tuple[tuple[str | int, ...], Any]] = [((), content)]
    while todo:
        path, value = todo.pop()
        if len(path) > DEPTH_LIMIT:
            yield invalid(_TOO_DEEP, _NOT_ONE, place(path[:4]) + "…")
        elif isinstance(value, dict):
            todo.extend(((*path, key), item) for key, item in value.items())
            todo.extend(((*path, key), key) for key in value if not _clean(key))
        elif isinstance(value, list):
            todo.extend(((*path, index), item) for index, item in enumerate(value))
        elif isinstance(value, str) and not _clean(value):
            what = "holds half of a character or a NUL"
            yield invalid(f"{show(value)} {what}", "Write the text again in UTF-8.", place(path))


def _clean(text: str) -> bool:
    return "\0" not in text and (text.isascii() or not re.search("[\ud800-\udfff]", text))
