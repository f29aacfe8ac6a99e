"""An export's directory, open: whoever has it looks at the same directory, whatever happens to its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import open_directory


@dataclass(frozen=True)
class Export:
    """`directory` is the path by which messages call it, `fd` a descriptor of it that its owner closes."""

    directory: Path
    fd: int


def is_export_name(name: str) -> bool:
    """Whether a directory of this name can be an export: hidden ones are none.

    One with control characters, or that is no text, could forge lines wherever it is shown.
    """
    return name != "" and not name.startswith(".") and name.isprintable()


@contextmanager
def beside(manifest: Path) -> Iterator[Export]:
    """The export that a manifest lies in, closed in the end; nobody claims it. Raise MigrationError."""
    directory = manifest.parent.resolve()
    try:
        fd = open_directory(directory)
    except OSError as error:
        hint = "Name the manifest of an existing export."
        raise MigrationError(Code.MANIFEST_UNREADABLE, f"{manifest.parent}: {error.strerror}", hint) from None
    try:
        yield Export(directory, fd)
    finally:
        os.close(fd)
