"""Reads GRUB 2's menu: which kernels it can start."""

from __future__ import annotations

import re

GRUB_CFG = "/boot/grub/grub.cfg"
LINUX_LINE = re.compile(r"\s*linux(?:16|efi)?\s+(?P<path>\S+)")
INITRD_LINE = re.compile(r"\s*initrd(?:16|efi)?\s")


def kernels(text: str) -> list[str]:
    """The file names of the kernels on all menu entries, submenus included, in order and without repetition."""
    found = (LINUX_LINE.match(line) for line in text.split("\n"))
    return list(dict.fromkeys(match["path"].strip("\"'").rpartition("/")[2] for match in found if match))
