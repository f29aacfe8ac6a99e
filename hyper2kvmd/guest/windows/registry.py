"""The registry of a Windows guest, read and changed through libguestfs: hives, their keys, and the values in them."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.change import Change
from hyper2kvmd.text import printable

# Each key costs a question to the appliance. What is listed here has some hundred keys in a real guest: services,
# network cards, driver packages.
MAX_CHILDREN = 20_000
MAX_DEPTH = 64
_SHOWN_BYTES = 32
_BASE_BLOCK = 4096

_SZ, _EXPAND_SZ, _BINARY, _DWORD, _MULTI_SZ, _QWORD = 1, 2, 3, 4, 7, 11
_INTEGERS = {_DWORD: "<I", _QWORD: "<Q"}


@dataclass(frozen=True)
class Value:
    """A value of the registry: the number of its type (4 is REG_DWORD), and its bytes as they stand in the hive."""

    type: int
    data: bytes

    @property
    def number(self) -> int | None:
        """The number of a REG_DWORD or REG_QWORD; None for what is neither, or has another length."""
        layout = _INTEGERS.get(self.type)
        if layout is None or struct.calcsize(layout) != len(self.data):
            return None
        number: int = struct.unpack(layout, self.data)[0]
        return number

    @property
    def text(self) -> str | None:
        """The text of a REG_SZ or REG_EXPAND_SZ up to its first NUL; None for another type."""
        return _decode(self.data).partition("\0")[0] if self.type in (_SZ, _EXPAND_SZ) else None

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of a REG_MULTI_SZ, up to the first that is empty; none for another type."""
        if self.type != _MULTI_SZ:
            return ()
        texts = _decode(self.data).split("\0")
        return tuple(texts[: texts.index("")] if "" in texts else texts)

    def shown(self) -> str:
        """The value as the report has it: 0, 'text', 01 ff 00 00; cut if it is long."""
        if (number := self.number) is not None:
            return str(number)
        if (text := self.text) is not None:
            return f"'{printable(text)}'"
        if self.type == _MULTI_SZ:
            return printable(", ".join(f"'{text}'" for text in self.texts))
        return self.data[:_SHOWN_BYTES].hex(" ") + (" …" if len(self.data) > _SHOWN_BYTES else "")


def dword(number: int) -> Value:
    """A REG_DWORD."""
    return Value(_DWORD, struct.pack("<I", number))


def sz(text: str) -> Value:
    """A REG_SZ."""
    return Value(_SZ, _encode(text))


def expand_sz(text: str) -> Value:
    """A REG_EXPAND_SZ, in which Windows replaces %variables%."""
    return Value(_EXPAND_SZ, _encode(text))


def multi_sz(*texts: str) -> Value:
    """A REG_MULTI_SZ; none of the texts may be empty, as an empty one is its end."""
    return Value(_MULTI_SZ, b"".join(map(_encode, (*texts, ""))))


def binary(data: bytes) -> Value:
    """A REG_BINARY."""
    return Value(_BINARY, data)


def _decode(data: bytes) -> str:
    return data[: len(data) & ~1].decode("utf-16-le", "replace")


def _encode(text: str) -> bytes:
    return f"{text}\0".encode("utf-16-le")


class Hive:
    """A hive that `open_hive` opened. Keys are paths from its root, with backslashes, in any case; "" is the root.

    All of it raises MigrationError (guest_dirty) where the hive is damaged.
    """

    def __init__(self, g: Any, path: str, name: str) -> None:
        self.path = path
        self.name = name
        self.changed = False
        self._g = g
        self._nodes: dict[str, int] = {}  # of keys that were found, by their lower-cased paths

    def exists(self, key: str) -> bool:
        """Whether there is such a key."""
        return self._node(key) is not None

    def keys(self, key: str) -> tuple[str, ...]:
        """The names of the keys right below one; none if it is not there."""
        with self._sound(key):
            return tuple(self._g.hivex_node_name(child) for child in self._children(key, self._node(key)))

    def values(self, key: str) -> dict[str, Value]:
        """The values of a key by their names as they are spelt, "" for the default one; none if it is not there."""
        node = self._node(key)
        with self._sound(key):
            found = self._g.hivex_node_values(node) if node is not None else []
            self._bound(key, len(found))
            return {
                self._g.hivex_value_key(value["hivex_value_h"]): self._value(value["hivex_value_h"]) for value in found
            }

    def value(self, key: str, name: str) -> Value | None:
        """A value of a key by its name in any case, "" for the default one; None if one of the two is not there."""
        node = self._node(key)
        with self._sound(key):
            found = self._g.hivex_node_get_value(node, name) if node is not None and "\0" not in name else 0
            return self._value(found) if found else None

    def set(self, key: str, name: str, value: Value) -> None:
        """Set a value, and make its key and those above where they are not there."""
        with self._sound(key):
            self.changed = True
            self._g.hivex_node_set_value(self._make(key), name, value.type, value.data)

    def delete(self, key: str) -> None:
        """Remove a key with all that is in it; nothing if it is not there."""
        node = self._node(key)
        if node is None:
            return
        # What libguestfs runs follows the keys below without looking where it was before.
        self._walk(key, node)
        with self._sound(key):
            self.changed = True
            self._g.hivex_node_delete_child(node)
        self._nodes.clear()

    def _node(self, key: str) -> int | None:
        """The handle of a key, None if it is not there."""
        place = key.lower()
        if place in self._nodes:
            return self._nodes[place]
        self._bound_depth(key, key.count("\\"))
        if "\0" in key:  # allowed in a hive, but there is no way to ask for it
            return None
        above, _, name = key.rpartition("\\")
        with self._sound(key):
            if not key:
                node = self._g.hivex_root()
            elif (parent := self._node(above)) is None:
                return None
            else:
                node = self._g.hivex_node_get_child(parent, name)
        if not node:
            return None
        self._nodes[place] = node
        return int(node)

    def _make(self, key: str) -> int:
        node = self._node(key)
        if node is None:
            above, _, name = key.rpartition("\\")
            node = int(self._g.hivex_node_add_child(self._make(above), name))
        return node

    def _children(self, key: str, node: int | None) -> list[int]:
        found = self._g.hivex_node_children(node) if node is not None else []
        self._bound(key, len(found))
        return [child["hivex_node_h"] for child in found]

    def _walk(self, key: str, node: int) -> None:
        """Look at all keys below one; raise MigrationError if they are too many, too deep, or in a circle."""
        seen = {node}
        level, depth = [node], 0
        with self._sound(key):
            while level:
                self._bound_depth(key, depth)
                level = [child for one in level for child in self._children(key, one)]
                if seen & set(level) or len(set(level)) < len(level):
                    self._damaged(key, "a key is below itself, or in two places")
                seen |= set(level)
                self._bound(key, len(seen))
                depth += 1

    def _value(self, handle: int) -> Value:
        return Value(int(self._g.hivex_value_type(handle)), bytes(self._g.hivex_value_value(handle)))

    def _bound(self, key: str, count: int) -> None:
        if count > MAX_CHILDREN:
            self._damaged(key, f"it has {count} entries, and {MAX_CHILDREN} are more than any Windows has there")

    def _bound_depth(self, key: str, depth: int) -> None:
        if depth >= MAX_DEPTH:
            self._damaged(key, f"keys are nested more than {MAX_DEPTH} deep")

    @contextlib.contextmanager
    def _sound(self, key: str) -> Iterator[None]:
        """What libguestfs cannot do in here is a defect of the hive: all but the commit happens in memory."""
        try:
            yield
        except RuntimeError as error:
            if not self._g.is_ready():
                raise _ended(self.name, self.path) from None
            self._damaged(key, str(error))

    def _damaged(self, key: str, why: str) -> NoReturn:
        where = f"{self.name}\\{printable(key)}" if key else self.name
        raise _damaged(where, self.path, why) from None


@contextlib.contextmanager
def open_hive(g: Any, path: str, name: str, *, write: bool = False) -> Iterator[Hive]:
    """Open a hive of the mounted guest, and close it; changes are written if the block ends without an error.

    libguestfs opens one at a time, and reads all of it: emulated, that is seconds for the largest.
    path: as it is spelt on the disk. name: as people know it, `HKLM\\SYSTEM`.
    Raise MigrationError (guest_dirty) for a hive that Windows did not close, or that is damaged.
    """
    _check_base_block(g, path, name)
    try:
        g.hivex_open(path, write=write)
    except RuntimeError as error:
        raise (_damaged(name, path, str(error)) if g.is_ready() else _ended(name, path)) from None
    try:
        hive = Hive(g, path, name)
        yield hive
        if hive.changed:
            _commit(g, hive)
    finally:
        # A defect can end the appliance, and then the error of before says more.
        with contextlib.suppress(RuntimeError):
            g.hivex_close()


def _commit(g: Any, hive: Hive) -> None:
    """Write a hive, as a whole, over what it was."""
    try:
        g.hivex_commit(None)
    except RuntimeError as error:
        if not g.is_ready():
            raise _ended(hive.name, hive.path) from None
        raise MigrationError(
            Code.FIX_FAILED,
            f"the registry hive {hive.name} ({printable(hive.path)}) cannot be written: {printable(str(error), 400)}",
            "See that C: has as much space as its largest file in System32\\config, and export the guest again.",
        ) from None


def _check_base_block(g: Any, path: str, name: str) -> None:
    """Read how a hive begins, which says whether Windows closed it, and how long it is."""
    head: bytes = g.pread(path, _BASE_BLOCK, 0)
    if len(head) < _BASE_BLOCK or not head.startswith(b"regf"):
        raise _damaged(name, path, "it does not begin like a hive")
    first, second = struct.unpack_from("<II", head, 4)
    if first != second:
        raise MigrationError(
            Code.GUEST_DIRTY,
            f"Windows did not close its registry hive {name} ({printable(path)}, sequence numbers {first} and"
            f" {second}): its log holds changes that it would write over ours",
            "Start the guest on VMware, shut it down from within (`shutdown /s /t 0`, not with Power Off), and export"
            " it again.",
        )
    bins = struct.unpack_from("<I", head, 40)[0]
    size = g.filesize(path)
    if bins == 0 or bins % _BASE_BLOCK or _BASE_BLOCK + bins > size:
        raise _damaged(name, path, f"it is {size} bytes long, and its header says {_BASE_BLOCK + bins}")


def _damaged(name: str, path: str, why: str) -> MigrationError:
    return MigrationError(
        Code.GUEST_DIRTY,
        f"the registry of Windows is damaged at {name} ({printable(path)}): {printable(why, 400)}",
        "Start the guest on VMware, run `chkdsk C: /f` and `sfc /scannow` in it, shut it down, and export it again; or"
        " go back to a backup from before the damage.",
    )


def _ended(name: str, path: str) -> MigrationError:
    """What libguestfs runs aborts where a hive contradicts itself in a way that it does not expect."""
    return MigrationError(
        Code.GUEST_DIRTY,
        f"the libguestfs appliance ended while it worked on the registry hive {name} ({printable(path)}): the hive is"
        " damaged, or larger than the appliance's memory",
        "Raise guest.memory_mb if the hive has hundreds of MiB. Else start the guest on VMware, run `chkdsk C: /f` and"
        " `sfc /scannow` in it, shut it down, and export it again; or go back to a backup from before the damage.",
    )


@dataclass(frozen=True)
class RegistryEdit:
    """A value that a fixer wants to set, or a key that it wants to remove: then name and `after` are None.

    hive: as people know it, `HKLM\\SYSTEM`. name: "" for a key's default value. before: None for one that is not there.
    One value alone cannot be removed: libguestfs has no call for it.
    """

    fixer: str
    hive: str
    key: str
    name: str | None
    before: Value | None
    after: Value | None
    summary: str
    evidence: str = ""

    def __post_init__(self) -> None:
        if (self.name is None) != (self.after is None):
            raise ValueError(f"{self.key}: an edit sets one value, or removes a whole key")

    def apply(self, hive: Hive) -> None:
        """Make the change in its hive, which is open for writing."""
        if self.name is None or self.after is None:
            hive.delete(self.key)
        else:
            hive.set(self.key, self.name, self.after)

    def done(self) -> Change:
        """The edit as a change that was made; its diff is `Start: (none) → 0`."""
        before = "(none)" if self.before is None else self.before.shown()
        after = "(none)" if self.after is None else self.after.shown()
        diff = "key removed" if self.name is None else f"{self.name or '(Default)'}: {before} → {after}"
        return Change(self.fixer, f"{self.hive}\\{self.key}", self.summary, diff=diff, evidence=self.evidence)
