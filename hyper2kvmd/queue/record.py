"""What a list of many exports says of each report, which may be anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NUMBER_LIMIT = 1 << 63


@dataclass(frozen=True)
class Record:
    """What a report says of its job; None, or "" for the host, where it does not.

    seconds: what the last attempt took. source_bytes, target_bytes: of all disks, the latter of those that were
    published. estimated: the seconds that it was to take. cutover: how the VM's cutover ended, "" without one.
    """

    vm_name: str | None = None
    host: str = ""
    attempts: int | None = None
    seconds: float | None = None
    source_bytes: int | None = None
    target_bytes: int | None = None
    estimated: float | None = None
    cutover: str = ""


NO_RECORD = Record()


def record_of(report: Mapping[str, Any], cutover: Mapping[str, Any]) -> Record:
    """What is to be known from a report, and from that of a cutover, if it is of this migration."""
    disks = report.get("disks")
    parts = [disk for disk in disks if isinstance(disk, dict)] if isinstance(disks, list) else None
    same = [cutover.get(key) for key in ("job", "migrated_at")] == [report.get(key) for key in ("job", "finished_at")]
    name, attempts = report.get("vm_name"), _number(report.get("attempts"))
    return Record(
        vm_name=name if isinstance(name, str) else None,
        host=host if isinstance(host := _part(report, "host").get("name"), str) else "",
        attempts=None if attempts is None else int(attempts),
        seconds=_number(report.get("seconds")),
        source_bytes=_sum(parts, "source_bytes"),
        target_bytes=_sum(parts, "target_bytes"),
        estimated=_number(_part(report, "estimate").get("seconds")),
        cutover=status if same and isinstance(status := cutover.get("status"), str) else "",
    )


def _part(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return part if isinstance(part := report.get(key), dict) else {}


def _sum(disks: list[dict[str, Any]] | None, key: str) -> int | None:
    return None if disks is None else sum(int(_number(disk.get(key)) or 0) for disk in disks)


def _number(value: Any) -> float | None:
    """A number of the size that one of ours can have; None for anything else."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return value if good and 0 <= value < NUMBER_LIMIT else None  # nor what is no number at all, NaN
