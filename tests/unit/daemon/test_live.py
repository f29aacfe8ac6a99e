"""The campaign's page as the daemon makes it: what it shows of a look, of jobs that run, and how often it is made."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from hyper2kvmd.daemon import live
from hyper2kvmd.daemon.live import LivePage, Look
from hyper2kvmd.daemon.placer import Row
from hyper2kvmd.errors import Finding
from hyper2kvmd.queue.hosts import Beat, Seen, this_host
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.queue.record import NO_RECORD, record_of
from hyper2kvmd.queue.state import Facts, State
from hyper2kvmd.report.campaign import render_campaign

EXPORTS = Path("/exports")


def row(state: State, **facts: object) -> Row:
    return Row(state, None, Facts("manifest.json", **facts), 0.0)  # type: ignore[arg-type]


def look(table: dict[str, Row], **changes: object) -> Look:
    rows = {EXPORTS / name: one for name, one in table.items()}
    shape: dict[str, object] = {"unreadable": {}, "hosts": (), "at": time.time(), **changes}
    return Look(EXPORTS, rows, **shape)  # type: ignore[arg-type]


def text(page: LivePage) -> str:
    answer = page.page("", "")
    assert 200 == answer.status
    return answer.body.decode()


@pytest.fixture(autouse=True)
def always_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "KEPT_SECONDS", -1.0)


def test_before_the_first_look_nobody_is_told_that_there_are_no_vms() -> None:
    page = LivePage()
    page.tell({}, "")
    assert (503, b"the exports have not been looked at yet\n") == (page.page("", "").status, page.page("", "").body)
    page.show(look({}))
    page.tell({}, "")
    assert "0 of 0 VMs are done" in text(page)
    page.tell({}, "no answer from /exports for 12 s")
    assert (503, b"no answer from /exports for 12 s\n") == (page.page("", "").status, page.page("", "").body)


def test_a_job_of_this_host_runs_from_its_start_and_not_from_the_next_look_on() -> None:
    page = LivePage()
    page.show(look({"web01": row(State.QUEUED)}))
    progress = Progress("web01")
    progress.apply("stage", {"stage": "convert", "status": "started", "total": 200}, 0.0)
    progress.apply("progress", {"stage": "convert", "bytes": 50}, 1.0)
    page.tell({EXPORTS / "web01": progress}, "")
    assert "convert 25 %" in text(page)
    assert f'<td data-label="Host">{this_host()}</td>' in text(page)
    progress.apply("progress", {"stage": "convert", "bytes": 50}, 2.0)
    assert "convert 25 %" in text(page), "as of when it was told"


def test_an_export_that_nobody_can_look_at_has_the_reason() -> None:
    page = LivePage()
    finding = Finding("io_error", "/exports/bad: Permission denied: the export cannot be looked at", "Check it.")
    page.show(look({"web01": row(State.SUCCEEDED)}, unreadable={EXPORTS / "bad": finding}))
    page.tell({}, "")
    shown = text(page)
    assert "1 of 2 VMs are done" in shown
    assert "Permission denied: the export cannot be looked at" in shown


def test_what_no_host_takes_says_why_and_hosts_grow_older() -> None:
    page = LivePage()
    beat = Beat("kvm1", "running", 10.0, 0.0, waits={"web01": "too <b>large</b>"})
    page.show(look({"web01": row(State.QUEUED)}, hosts=(Seen(beat, 1.0, False),), at=time.time() - 20))
    page.tell({}, "")
    shown = text(page)
    assert "no host takes it: kvm1: too &lt;b&gt;large&lt;/b&gt;" in shown
    assert "21 s ago" in shown
    page.show(look({}, hosts=(Seen(beat, 1.0, False),), at=time.time() - 1000))
    assert '<td data-label="State">gone</td>' in text(page)


def test_a_page_is_made_once_for_all_who_ask_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "KEPT_SECONDS", 60.0)
    made = []

    def counted(*args: object, **options: object) -> str:
        made.append(1)
        time.sleep(0.2)
        return render_campaign(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(live, "render_campaign", counted)
    page = LivePage()
    page.show(look({"web01": row(State.SUCCEEDED)}))
    page.tell({}, "")
    threads = [threading.Thread(target=page.page, args=("", "")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 == len(made)


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"vm_name": 3, "host": [], "attempts": "2", "seconds": True, "disks": {}, "estimate": None},
        {"seconds": float("nan"), "attempts": float("inf"), "estimate": {"seconds": -1}, "host": {"name": None}},
        {"seconds": 10**400, "attempts": -(10**400)},
    ],
)
def test_a_report_that_may_be_anything_has_nothing_that_is_none_of_ours(report: dict[str, object]) -> None:
    assert NO_RECORD == record_of(report, report)


def test_what_a_report_says_is_taken_from_it() -> None:
    disks = [{"source_bytes": 5, "target_bytes": 7}, {"source_bytes": 5, "target_bytes": None}, None]
    found = record_of({"vm_name": "a", "host": {"name": "h"}, "attempts": 2, "seconds": 1.5, "disks": disks}, {})
    assert ("a", "h", 2, 1.5, 10, 7, None) == (
        *(found.vm_name, found.host, found.attempts, found.seconds),
        *(found.source_bytes, found.target_bytes, found.estimated),
    )


def test_a_cutover_counts_for_the_migration_that_it_is_of() -> None:
    report = {"job": "a-1", "finished_at": "2026-11-24T10:00:00.000Z"}
    cutover = {"job": "a-1", "migrated_at": "2026-11-24T10:00:00.000Z", "status": "verified"}
    assert "verified" == record_of(report, cutover).cutover
    for other in ({"job": "a-2"}, {"migrated_at": "2026-11-25T10:00:00.000Z"}, {"status": 1}):
        assert "" == record_of(report, {**cutover, **other}).cutover


def test_nothing_is_shown_by_a_daemon_whose_main_loop_hangs() -> None:
    why = [""]
    page = LivePage(lambda now: why[0])
    page.show(look({"web01": row(State.SUCCEEDED)}))
    page.tell({}, "")
    assert 200 == page.page("", "").status
    why[0] = "the main loop has not come round for 99 s"
    assert (503, b"the main loop has not come round for 99 s\n") == (page.page("", "").status, page.page("", "").body)


def test_a_time_that_no_clock_shows_is_left_out() -> None:
    page = LivePage()
    page.show(look({"web01": row(State.FAILED, finished_at=-1e11, record=record_of({}, {}))}))
    page.tell({}, "")
    assert "0 of 1 VMs are done" in text(page)
