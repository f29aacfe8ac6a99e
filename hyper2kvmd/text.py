"""Values as people read them: names made harmless to terminals and logs, durations, sizes, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def show(value: object) -> str:
    """A value from a manifest for a message: in quotes if it is text, short, and harmless to terminals and logs."""
    if isinstance(value, str):
        return f"'{plain(value)}'"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return str(value)
    return "a table" if isinstance(value, dict) else "a list"


def plain(text: str, limit: int = 80) -> str:
    """Text from a manifest without what could harm terminals and logs, cut to about `limit` characters."""
    # Cut first: escaping a megabyte is work.
    kept = text[:limit] + ("…" if len(text) > limit else "")
    return kept if kept.isprintable() else ascii(kept)[1:-1]


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, if one is close."""
    if not isinstance(word, str):
        return None
    return next(iter(difflib.get_close_matches(word.lower(), list(known), n=1)), None)


def size(bytes: int) -> str:
    """Bytes for people: 512 B, 172.6 MiB, 2 GiB."""
    if bytes < 1024:
        return f"{bytes} B"
    for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB", "PiB"), 1):
        if bytes < 1024 ** (power + 1):
            return f"{bytes / 1024**power:.1f}".removesuffix(".0") + f" {unit}"
    return f"{bytes} B"


def duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
