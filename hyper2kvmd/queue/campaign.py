"""The campaign as of a look at the exports: what a page and a table say of each, for the daemon and for commands."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from hyper2kvmd.errors import Finding
from hyper2kvmd.files import timestamp
from hyper2kvmd.queue.hosts import Seen
from hyper2kvmd.queue.state import FINAL, Facts, State
from hyper2kvmd.report.campaign import Campaign, CampaignHost, CampaignVm
from hyper2kvmd.text import duration, escaped

TEXT_LIMIT = 1000
_NOT_OVER = (State.RUNNING, State.QUEUED, State.WAITING, State.INCOMPLETE)


def campaign_of(directory: Path, vms: Iterable[CampaignVm], hosts: Iterable[Seen], now: float) -> Campaign:
    """The campaign. now: when all that was seen, in seconds since the epoch."""
    vms = tuple(vms)
    running = Counter(vm.host for vm in vms if vm.state == State.RUNNING)
    seen = [
        CampaignHost(_short(one.beat.host), one.state, running[_short(one.beat.host)], f"{duration(one.age)} ago")
        for one in hosts
    ]
    return Campaign(_short(str(directory)), timestamp(now), vms, tuple(seen))


def vm_of(
    export: Path,
    state: State | Literal["unreadable"],
    finding: Finding | None,
    look: Facts | None,
    *,
    running: tuple[str, str] | None = None,
    page: str = "",
) -> CampaignVm:
    """One VM. look: None if nobody can look. running: what its job does and on which host, if the caller knows better.

    page: its own page, relative to the campaign's.
    """
    look = look or Facts(None)
    record = look.record
    if running is None and look.progress is not None:
        running = look.progress.doing(time.monotonic()), look.progress.host
    doing, host = running or ("", record.host)
    over = state in FINAL - {State.BLOCKED}
    estimate = look.estimate.seconds if look.estimate is not None and not over else record.estimated
    return CampaignVm(
        name=_short(export.name),
        vm=_short(record.vm_name or look.vm_name or ""),
        wave=_short(look.plan.wave or ""),
        state=str(state),
        reason=_short(finding.message) if finding is not None else "",
        remedy=_short(finding.hint) if finding is not None else "",
        code=_short(str(finding.code)) if finding is not None else "",
        since=_stamp(look.finished_at) if state not in _NOT_OVER else "",
        doing=doing,
        host=_short(host),
        attempts=record.attempts,
        seconds=record.seconds,
        estimated=estimate,
        source_bytes=record.source_bytes or sum(size for _, size in look.sizes) or None,
        target_bytes=record.target_bytes,
        notes=_short(look.plan.notes),
        cutover=_short(record.cutover),
        page=page,
    )


def _short(text: str) -> str:
    """A text of an export, which may be anything, as harmless as a table needs it."""
    return escaped(text[:TEXT_LIMIT])


def _stamp(seconds: float | None) -> str:
    try:
        return "" if seconds is None else timestamp(seconds)
    except (ValueError, OverflowError):  # in a year that only a planted report is from
        return ""
