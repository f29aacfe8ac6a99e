"""The page of the campaign as the daemon sees it: made from what it knows already, so no request waits for storage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hyper2kvmd.daemon.placer import Row
from hyper2kvmd.daemon.web import PLAIN, Answer
from hyper2kvmd.errors import Finding
from hyper2kvmd.queue.campaign import campaign_of, vm_of
from hyper2kvmd.queue.hosts import Seen, this_host, untaken
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.queue.state import State
from hyper2kvmd.report.campaign import Campaign, CampaignVm, render_campaign

KEPT_SECONDS = 5.0  # a page is made at most so often, however many people look
REFRESH_SECONDS = 30


@dataclass(frozen=True)
class Look:
    """What a look at the exports found; nothing in it is changed any more. at: when, in seconds since the epoch."""

    directory: Path
    table: Mapping[Path, Row]
    unreadable: Mapping[Path, Finding]
    hosts: Sequence[Seen]
    at: float


class LivePage:
    """The main loop says what it sees, and the threads of the web server show it."""

    def __init__(self, hangs: Callable[[float], str] = lambda now: "") -> None:
        """hangs: why the main loop is taken for dead at a time of the monotonic clock, "" if it is alive."""
        self._hangs = hangs
        self._look: Look | None = None
        self._running: Mapping[Path, str] = {}
        self._trouble = "the exports have not been looked at yet"
        self._lock = threading.Lock()
        self._made = (0.0, b"")  # when (monotonic), and the page

    def show(self, look: Look) -> None:
        """Show what a look found, from now on."""
        self._look = look

    def tell(self, running: Mapping[Path, Progress], trouble: str) -> None:
        """Take note of how far the jobs of this host are, and of why the exports cannot be looked at, "" if they can.

        Their progress changes in the main loop, so what is to be shown of it is taken now.
        """
        now = time.monotonic()
        self._running = {export: progress.doing(now) for export, progress in running.items()}
        if self._look is not None:
            self._trouble = trouble

    def page(self, query: str, accept: str) -> Answer:
        """The page, or why there is none: an old one would say what may not be so any more."""
        refresh = () if "refresh=off" in query.split("&") else (("Refresh", str(REFRESH_SECONDS)),)
        look, trouble = self._look, self._trouble or self._hangs(time.monotonic())
        if look is None or trouble:
            return Answer(503, PLAIN, f"{trouble}\n".encode(errors="backslashreplace"), refresh)
        with self._lock:
            made, body = self._made
            if not body or time.monotonic() - made > KEPT_SECONDS:
                body = render_campaign(self._campaign(look), live=this_host()).encode(errors="backslashreplace")
                self._made = (time.monotonic(), body)
        return Answer(200, "text/html; charset=utf-8", body, (*_protection(), *refresh))

    def _campaign(self, look: Look) -> Campaign:
        running = self._running
        vms: list[CampaignVm] = []
        for export in sorted({*look.table, *look.unreadable}):
            seen = look.table.get(export)
            if seen is None:
                vms.append(vm_of(export, "unreadable", look.unreadable[export], None))
            elif export in running:
                here = (running[export], this_host())
                vms.append(vm_of(export, State.RUNNING, None, seen.look, running=here))
            else:
                finding = seen.finding
                if seen.state == State.QUEUED and finding is None:
                    finding = untaken(export, look.hosts)
                vms.append(vm_of(export, seen.state, finding, seen.look))
        passed = max(time.time() - look.at, 0.0)
        hosts = [replace(host, age=host.age + passed) for host in look.hosts]
        return campaign_of(look.directory, vms, hosts, look.at)


def _protection() -> tuple[tuple[str, str], ...]:
    """Headers that keep a browser from doing anything else than showing the page."""
    from hyper2kvmd.report.pages import policy  # with Jinja, which a daemon that serves no page does not need

    return (
        ("Content-Security-Policy", f"{policy()}; frame-ancestors 'none'"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
    )
