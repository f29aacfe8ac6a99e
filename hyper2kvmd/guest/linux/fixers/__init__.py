"""The fixers: each looks at one thing in the guest and says which edits it wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Command, Copy, Edit, Named
from hyper2kvmd.guest.inspect import Inspection
from hyper2kvmd.guest.linux.devices import Names
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


@dataclass(frozen=True)
class FixPlan:
    """What a fixer wants to do. names: the places that it looked at which name a device."""

    edits: tuple[Edit, ...] = ()
    copies: tuple[Copy, ...] = ()
    commands: tuple[Command, ...] = ()
    warnings: tuple[Finding, ...] = ()
    names: tuple[Named, ...] = ()
