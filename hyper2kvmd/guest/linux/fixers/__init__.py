"""The fixers: each looks at one thing in the guest and says which edits it wants."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Command, Copy, Edit, Named
from hyper2kvmd.guest.inspect import Inspection
from hyper2kvmd.guest.linux.devices import Names
from hyper2kvmd.guest.linux.names import files
from hyper2kvmd.guest.session import read_text


@dataclass(frozen=True)
class View:
    """What a fixer may look at: the mounted guest (read only, by agreement), what is known of it, its names."""

    g: Any
    inspection: Inspection
    names: Names

    def read(self, path: str) -> str | None:
        """The text of a file in the guest (at most 1 MiB), or None if there is no such file."""
        return read_text(self.g, path)

    def files(self, *patterns: str) -> Iterator[tuple[str, str]]:
        """Path and text of each file that matches one of the patterns."""
        return files(self.read, self.g.glob_expand, *patterns)


@dataclass(frozen=True)
class FixPlan:
    """What a fixer wants to do. names: the places that it looked at which name a device."""

    edits: tuple[Edit, ...] = ()
    copies: tuple[Copy, ...] = ()
    commands: tuple[Command, ...] = ()
    warnings: tuple[Finding, ...] = ()
    names: tuple[Named, ...] = ()

    @classmethod
    def joined(cls, plans: Iterable[FixPlan]) -> FixPlan:
        """All that several plans want, in their order."""
        every = list(plans)
        return cls(
            edits=tuple(edit for plan in every for edit in plan.edits),
            copies=tuple(copy for plan in every for copy in plan.copies),
            commands=tuple(command for plan in every for command in plan.commands),
            warnings=tuple(finding for plan in every for finding in plan.warnings),
            names=tuple(name for plan in every for name in plan.names),
        )
