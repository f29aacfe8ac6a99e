"""How much memory can be had: the host's, or what the tightest control group leaves of it.

By hand, as psutil knows nothing of control groups.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_MEMINFO, _OWN_GROUP, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """MiB that can be had without swapping, who has them, and what gives it more."""

    mb: int
    holder: str
    remedy: str


def available(group: str | None = None) -> Memory | None:
    """The memory of the host, or of the control group with the tightest limit around `group` (default: our own).

    None if the host does not say. Of control groups, those of version 2 are looked at: the kernel's
    Documentation/admin-guide/cgroup-v2.rst has their files. What a group has in caches, it can have again.
    """
    try:
        host = re.search(r"^MemAvailable:\s*(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    if host is None:
        return None
    found = [Memory(int(host[1]) >> 10, "the host", "free some memory")]
    with contextlib.suppress(OSError):
        if group is None:
            own = re.search(r"^0::(/.*)$", _OWN_GROUP.read_text(), re.MULTILINE)
            group = own[1] if own else "/"
        # A container sees its own group as the root, and may see others' above it.
        inner = Path("/") if ".." in Path(group).parts else Path(group)
        for path in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # a root, which has no limit; or "max"
                found.append(_of_group(path))
    return min(found, key=lambda memory: memory.mb)


def _of_group(path: Path) -> Memory:
    files = _GROUPS / path.relative_to("/")
    limit, used = (int((files / name).read_text()) for name in ("memory.max", "memory.current"))
    caches = re.findall(r"^(?:in)?active_file (\d+)$", (files / "memory.stat").read_text(), re.MULTILINE)
    return Memory(
        max(0, limit - used + sum(map(int, caches))) >> 20,
        f"the control group {path}, with a limit of {limit >> 20} MiB,",
        "raise its limit (MemoryMax of the unit, or the container's)",
    )


def resident_mb(root: int) -> int:
    """MiB of memory that a process and all that it started have in use."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        parents[int(entry.name)] = int(fields[1])
        resident[int(entry.name)] = int(fields[21])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    pages = sum(resident.get(pid, 0) for pid in family)
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20
