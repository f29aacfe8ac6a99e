"""What is wrong with a manifest, and how a hostile value is shown without harm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.text import plain

PROBLEM_LIMIT = 100  # a hostile file can have a hundred thousand; nobody reads that many


class ManifestError(MigrationError):
    """A manifest that cannot be used. `problems` holds all that was found; the error itself is the first.

    The code is MANIFEST_UNREADABLE for what is not complete JSON or YAML, which may be still being
    written, and MANIFEST_INVALID for what was read and is wrong, which waiting does not fix.
    """

    def __init__(
        self,
        code: Literal[Code.MANIFEST_UNREADABLE, Code.MANIFEST_INVALID],
        name: str,
        problems: Sequence[Finding],
    ) -> None:
        first, *others = problems
        more = f"; {len(others)} more problem{'s' * (len(others) > 1)}" if others else ""
        super().__init__(code, f"{first.message} (in {plain(name)}{more})", first.hint, field=first.field)
        self.problems = tuple(problems)


def invalid(message: str, hint: str, field: str | None = None) -> Finding:
    """A problem with the content of a manifest."""
    return Finding(Code.MANIFEST_INVALID, message, hint, field)


def place(parts: Iterable[str | int]) -> str:
    """The path of a field as people write it: `disks[0].checksum`."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += ("." if path else "") + plain(part, 40)
    return path
