"""The head of a Windows program, which tells what processor it is for."""

from __future__ import annotations

from collections.abc import Callable

_MACHINES = {0x8664: "x86_64", 0x014C: "i386", 0xAA64: "aarch64"}


def architecture(read: Callable[[int, int], bytes]) -> str:
    """x86_64, i386 or aarch64, by its PE header; "unknown" for another, and for what is no program.

    read: from an offset and a count to as many of the bytes there as there are.
    """
    head = read(0, 64)
    if len(head) < 64 or not head.startswith(b"MZ"):
        return "unknown"
    header = read(int.from_bytes(head[60:], "little"), 6)
    if len(header) < 6 or not header.startswith(b"PE\0\0"):
        return "unknown"
    return _MACHINES.get(int.from_bytes(header[4:], "little"), "unknown")
