"""A whole campaign at a glance: what became of every VM, as a page for people and as a table for a spreadsheet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

ATTENTION = ("unreadable", "blocked", "failed", "rejected")
MOVING = ("running", "retrying")
OVER = ("succeeded", "cancelled")
SLOWEST = 10
_TONE = {**dict.fromkeys(ATTENTION, "failed"), "succeeded": "ok", "blocked": "doubt", "retrying": "doubt"}


@dataclass(frozen=True)
class CampaignVm:
    """One VM, as of now. What is not known is None, or "" where it is text; texts are harmless already.

    name: of its export's directory. since: when it came into its state, in RFC 3339. doing: how far its job is.
    seconds: what its last attempt took. estimated: seconds that it will take, or was to take. source_bytes and
    target_bytes: of the files that were exported, and of its disks. cutover: how that ended, "" without one. page: its
    own page, relative to the campaign's.
    """

    name: str
    vm: str
    wave: str
    state: str
    reason: str
    remedy: str
    code: str
    since: str
    doing: str
    host: str
    attempts: int | None
    seconds: float | None
    estimated: float | None
    source_bytes: int | None
    target_bytes: int | None
    notes: str
    cutover: str = ""
    page: str = ""

    @property
    def tone(self) -> str:
        """How the state is coloured."""
        return _TONE.get(self.state, "none")


@dataclass(frozen=True)
class CampaignHost:
    """A host that works on the campaign, its state and how many jobs it runs."""

    name: str
    state: str
    jobs: int
    seen: str


@dataclass(frozen=True)
class Campaign:
    """All VMs, and the hosts, at one moment (RFC 3339)."""

    directory: str
    made_at: str
    vms: tuple[CampaignVm, ...]
    hosts: tuple[CampaignHost, ...]

    @property
    def states(self) -> dict[str, int]:
        """How many VMs are in each state, those that need a person first."""
        counted = Counter(vm.state for vm in self.vms)
        order = (*ATTENTION, *MOVING, "queued", "waiting", "incomplete", *OVER)
        return {state: counted[state] for state in order if counted[state]}

    @property
    def waves(self) -> list[tuple[str, list[CampaignVm]]]:
        """The VMs of each wave, by the waves' names as people order them, 2 before 10; those without one come last."""
        found: dict[str, list[CampaignVm]] = {}
        for vm in self.vms:
            found.setdefault(vm.wave, []).append(vm)
        return sorted(found.items(), key=lambda item: (item[0] == "", _natural(item[0])))

    @property
    def slowest(self) -> list[CampaignVm]:
        """Those that took longest, of the VMs that are done."""
        done = [vm for vm in self.vms if vm.state == "succeeded" and vm.seconds is not None]
        return sorted(done, key=lambda vm: -(vm.seconds or 0))[:SLOWEST]

    @property
    def totals(self) -> dict[str, Any]:
        """Numbers of VMs and bytes, seconds of the migrations that succeeded, and what those to come will take."""
        done = [vm for vm in self.vms if vm.state == "succeeded"]
        left = [vm for vm in self.vms if vm.state not in OVER]
        return {
            "vms": len(self.vms),
            "done": len(done),
            "cut_over": sum(vm.cutover == "verified" for vm in done),
            "source_bytes": sum(vm.source_bytes or 0 for vm in done),
            "target_bytes": sum(vm.target_bytes or 0 for vm in done),
            "seconds": sum(vm.seconds or 0 for vm in done),
            "estimated_left": sum(vm.estimated or 0 for vm in left),
        }

    def as_json(self) -> dict[str, Any]:
        """The campaign for a program."""
        return {
            **{key: getattr(self, key) for key in ("directory", "made_at", "totals", "states")},
            "vms": [asdict(vm) for vm in self.vms],
            "hosts": [asdict(host) for host in self.hosts],
        }

    def rows(self) -> Iterable[list[str]]:
        """The VMs as a table: a heading, and a row for each."""
        columns = [field.name for field in fields(CampaignVm) if field.name != "page"]
        yield columns
        for vm in self.vms:
            values = [getattr(vm, column) for column in columns]
            yield [
                "" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value) for value in values
            ]


def part(vms: Sequence[CampaignVm], *states: str) -> list[CampaignVm]:
    """Those of the VMs that are in one of the states."""
    return [vm for vm in vms if vm.state in states]


def render_campaign(campaign: Campaign, live: str = "") -> str:
    """The page. Pure: the same arguments give the same page. live: the host whose daemon serves it, if one does."""
    from hyper2kvmd.report.pages import template  # only here: a daemon that serves no page needs no Jinja

    made_at = datetime.fromisoformat(campaign.made_at)
    return template("campaign.html.j2").render(
        campaign=campaign,
        live=live,
        part=part,
        attention=ATTENTION,
        moving=MOVING,
        over=OVER,
        ago=lambda stamp: max((made_at - datetime.fromisoformat(stamp)).total_seconds(), 0.0),
        made_at=made_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A key by which numbers in names sort as numbers."""
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in re.findall(r"\d+|\D+", text)]
