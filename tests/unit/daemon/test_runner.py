"""How far a job is, from its events alone."""

from __future__ import annotations

import pytest

from hyper2kvmd.job.events import Event
from hyper2kvmd.queue.progress import Progress
from hyper2kvmd.text import duration


def started(stage: str, total: int = 0) -> Event:
    return Event("stage", {"stage": stage, "status": "started", "seconds": 0.0, "total": total})


def moved(stage: str, bytes: int) -> Event:
    return Event("progress", {"stage": stage, "item": "disk-0", "ratio": 0.5, "bytes": bytes})


def after(*events: tuple[float, Event]) -> Progress:
    progress = Progress("web01")
    for now, event in events:
        progress.apply(event.kind, event.data, now)
    return progress


def test_a_stage_that_counts_has_a_ratio_a_rate_and_an_end() -> None:
    progress = after((10.0, started("convert", 1000)), (12.0, moved("convert", 100)), (15.0, moved("convert", 150)))
    stage = progress.stages["convert"]
    assert (0.25, 50.0) == (stage.ratio, stage.rate)
    assert (15.0, 10.0) == (progress.seconds_left(15.0), progress.seconds_left(20.0))


def test_before_the_first_byte_nothing_is_promised() -> None:
    progress = after((10.0, started("convert", 1000)), (10.0, started("fix")))
    assert progress.seconds_left(11.0) is None
    assert "web01 convert 0 % fix" == progress.phrase(11.0)


def test_the_slowest_of_the_stages_decides() -> None:
    progress = after(
        *((0.0, started(name, 1000)) for name in ("verify", "convert")),
        *((10.0, moved(name, done)) for name, done in (("verify", 500), ("convert", 100))),
    )
    assert 90.0 == progress.seconds_left(10.0)
    assert "web01 verify 50 % convert 10 % 2 min left" == progress.phrase(10.0)


def test_a_stage_that_is_over_is_not_shown_and_late_events_of_it_are_nothing() -> None:
    over = Event("stage", {"stage": "convert", "status": "done", "seconds": 2.0})
    progress = after((0.0, started("convert", 10)), (1.0, over), (2.0, moved("convert", 10)))
    assert "web01" == progress.phrase(3.0)


def test_what_takes_longer_than_expected_is_never_less_than_nothing() -> None:
    progress = after((0.0, started("convert", 1000)), (1.0, moved("convert", 999)))
    assert 0.0 == progress.seconds_left(100.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert text == duration(seconds)
