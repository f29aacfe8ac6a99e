"""Estimates: from what earlier migrations took, and from sizes where there are none."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.queue import estimate as estimates
from hyper2kvmd.queue.estimate import KEPT, Estimate, Sample, add, critical_path, estimate, first, history, learn, total

GB = 10**9


def sample(bytes: int, *, rate: float = 100e6, fixed: float = 60.0, kind: str = ".vmdk") -> Sample:
    """A migration whose CONVERT has a rate, and whose FIX takes as long for every guest."""
    stages = {"inspect": 10.0, "fix": fixed, "convert": 5 + bytes / rate, "validate": 1.0}
    return Sample(kind, bytes, 2 * bytes, critical_path(stages), stages)


def learnt(directory: Path, *samples: Sample) -> Path:
    for one in samples:
        add(directory, one)
    return directory


def test_without_a_migration_sizes_alone_give_a_wide_range(tmp_path: Path) -> None:
    found = estimate([("web01.vmdk", 100 * GB)], tmp_path)
    assert ("none", 0, 200 * GB) == (found.confidence, found.samples, found.written)
    assert found.low < found.seconds < found.high
    assert 1000 < found.seconds < 3000, "a disk of 100 GB takes a quarter of an hour or more at 100 MB/s"


def test_a_large_disk_is_estimated_from_small_ones_by_the_rate_and_not_by_the_first_second(tmp_path: Path) -> None:
    learnt(tmp_path, *(sample(size * GB) for size in (1, 2, 3, 5, 8)))
    found = estimate([("a.vmdk", 200 * GB), ("b.vmdk", 100 * GB)], tmp_path)
    assert pytest.approx(5 + 3000 + 1, rel=0.01) == found.seconds
    assert pytest.approx(70, rel=0.01) == found.stages["inspect"] + found.stages["fix"]
    assert 600 * GB == found.written


def test_a_small_disk_takes_as_long_as_the_guest_does(tmp_path: Path) -> None:
    learnt(tmp_path, *(sample(size * GB) for size in (1, 2, 3, 5, 8)))
    assert pytest.approx(71, rel=0.01) == estimate([("a.vmdk", GB // 100)], tmp_path).seconds


def test_two_odd_migrations_of_ten_do_not_bend_the_line(tmp_path: Path) -> None:
    good = [sample(size * GB) for size in (10, 20, 30, 40, 50, 60, 70, 80)]
    learnt(tmp_path, *good, sample(15 * GB, rate=1e6), sample(25 * GB, rate=1e6))
    assert pytest.approx(5 + 1000 + 1, rel=0.1) == estimate([("a.vmdk", 100 * GB)], tmp_path).seconds


def test_disks_of_the_same_kind_count_if_there_are_some(tmp_path: Path) -> None:
    learnt(tmp_path, *(sample(size * GB, kind=".raw", rate=500e6) for size in (10, 20, 30)))
    alone = estimate([("a.vmdk", 100 * GB)], tmp_path).seconds
    learnt(tmp_path, *(sample(size * GB) for size in (10, 20, 30)))
    assert alone < estimate([("a.vmdk", 100 * GB)], tmp_path).seconds
    assert pytest.approx(206, rel=0.02) == estimate([("a.raw", 100 * GB)], tmp_path).seconds


def test_confidence_grows_with_migrations_that_agree(tmp_path: Path) -> None:
    seen = []
    for number in range(1, 26):
        add(tmp_path, sample(number * GB))
        seen.append(estimate([("a.vmdk", 10 * GB)], tmp_path).confidence)
    assert ["low"] * 4 + ["medium"] * 15 + ["high"] * 6 == seen


def test_the_range_is_where_earlier_migrations_were(tmp_path: Path) -> None:
    learnt(
        tmp_path, *(replace(sample(10 * GB), seconds=106.0 * factor) for factor in (0.8, 0.9, 1, 1, 1, 1, 1.1, 1.5, 2))
    )
    found = estimate([("a.vmdk", 10 * GB)], tmp_path)
    assert pytest.approx(106, rel=0.01) == found.seconds
    assert (0.75 * 106 < found.low < 106) and (1.4 * 106 < found.high < 2.1 * 106)


def test_lines_that_are_cut_off_or_foreign_are_passed_over(tmp_path: Path) -> None:
    learnt(tmp_path, sample(GB), sample(2 * GB))
    path = tmp_path / estimates.FILE
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([b"", b"{}", b"[1]", b"\xff", b'{"kind": 1, "stages": []}', lines[0], lines[1][:-9]]))
    assert (sample(GB),) == history(tmp_path)


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "FILE_LIMIT", 10_000)
    monkeypatch.setattr(estimates, "KEPT", 20)
    learnt(tmp_path, *(sample(size * GB) for size in range(1, 200)))
    assert (tmp_path / estimates.FILE).stat().st_size <= 10_000
    assert sample(199 * GB) == history(tmp_path)[-1]
    assert [estimates.FILE] == [path.name for path in tmp_path.iterdir()]
    assert KEPT == 200


def test_where_nothing_can_be_kept_no_migration_fails(tmp_path: Path) -> None:
    add(tmp_path / "missing", sample(GB))
    (tmp_path / estimates.FILE).symlink_to(tmp_path / "elsewhere")
    add(tmp_path, sample(GB))
    assert () == history(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_stages_that_run_at_the_same_time_count_once() -> None:
    stages = {"plan": 1.0, "verify": 50.0, "inspect": 30.0, "fix": 40.0, "convert": 60.0, "commit": 2.0, "publish": 3.0}
    assert 1 + 70 + 2 + 3 == critical_path(stages)
    assert 1 + 90 + 2 + 3 == critical_path({**stages, "verify": 90.0})


def one(seconds: float, samples: int = 10) -> Estimate:
    return Estimate(seconds, seconds / 2, seconds * 2, {"fix": seconds}, 100, samples)


def test_many_take_as_long_as_their_share_or_as_the_longest() -> None:
    shared = total([one(100), one(200), one(300)], 2)
    assert (300, 150, 600, 300, {"fix": 600}) == (
        shared.seconds,
        shared.low,
        shared.high,
        shared.written,
        shared.stages,
    )
    assert 1000 == total([one(1000), one(10)], 2).seconds
    assert "none" == total([one(100), one(100, samples=0)], 2).confidence
    assert 0 == total([], 2).seconds


@given(st.lists(st.tuples(st.integers(1, 10**13), st.floats(0.001, 1e6)), max_size=12), st.integers(1, 10**13))
def test_more_bytes_never_take_less_and_the_range_holds_the_estimate(
    points: list[tuple[int, float]], bytes: int
) -> None:
    samples = [Sample("", size, size, 1 + seconds, {"convert": seconds}) for size, seconds in points]
    of = learn(samples).of if samples else partial(first, "")
    small, large = (of(size) for size in (bytes, 2 * bytes))
    assert small.seconds <= large.seconds * (1 + 1e-9)
    for found in (small, large):
        assert 0 <= found.low <= found.seconds <= found.high
