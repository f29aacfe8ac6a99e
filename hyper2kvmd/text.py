"""Values as people read them: names made harmless to terminals and logs, durations, sizes, what was probably meant."""

from __future__ import annotations

import difflib
import re
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


def printable(text: str, limit: int = 200) -> str:
    """Text from a guest, made safe for terminals and logs: one line, no control characters, bounded."""
    kept = "".join(char if char.isprintable() or char == "\t" else "�" for char in text[: limit + 1])
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def mac_address(text: str) -> str | None:
    """The MAC address in lower case with colons; None if the text is not one. `-` and Cisco's dots are read, too."""
    text = text.strip().lower().replace("-", ":")
    if re.fullmatch(r"[0-9a-f]{4}(?:\.[0-9a-f]{4}){2}", text):
        digits = text.replace(".", "")
        text = ":".join(digits[at : at + 2] for at in range(0, 12, 2))
    return text if re.fullmatch(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}", text) else None


def is_card_mac(mac: str) -> bool:
    """Whether a MAC address, as mac_address() writes it, can be that of one network card."""
    return not int(mac[:2], 16) & 1 and mac != "00:00:00:00:00:00"


def exact_duration(seconds: float | None) -> str:
    """Seconds for people: 34 ms, 20.3 s, 1 min 42 s, 3 h 07 min; empty for what is not known."""
    if seconds is None or seconds < 0:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def escaped(text: str, keep: str = "\t") -> str:
    """Text with each character that could harm a terminal or a log written as an escape, but for those in `keep`."""
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)
