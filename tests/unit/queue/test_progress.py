"""How far a job is, as it writes it beside its lock: what is read is what was written, and never what was planted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.files import OURS
from hyper2kvmd.queue import progress
from hyper2kvmd.queue.names import PROGRESS
from hyper2kvmd.queue.progress import Progress


@pytest.fixture
def export(tmp_path: Path) -> int:
    """A directory that is open."""
    return os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)


def running() -> Progress:
    """A job that converts since 20 seconds, got further 4 seconds ago, and fixes, by a clock that says 1000."""
    found = Progress("export", host="kvm2")
    for when, kind, data in (
        (980.0, "claimed", {"job": "export-01234567", "vm": "export", "attempt": 3}),
        (980.0, "manifest", {"vm": "web01", "tags": {"env": "test"}}),
        (980.0, "stage", {"stage": "convert", "status": "started", "total": 1000}),
        (990.0, "stage", {"stage": "fix", "status": "started", "total": 0}),
        (996.0, "progress", {"stage": "convert", "item": "disk-0", "ratio": 0.4, "bytes": 400}),
    ):
        found.apply(kind, data, when)
    return found


def test_a_host_whose_clock_is_another_one_reads_the_same_rate_and_the_same_end(export: int) -> None:
    written = running()
    progress.write(export, written, 1000.0)
    read = progress.read(export, 5.0)
    assert read is not None
    assert ("web01", "export-01234567", 3, "kvm2", True) == (read.vm, read.job, read.attempt, read.host, read.known)
    assert ["convert", "fix"] == [*read.stages]
    assert 25.0 == written.stages["convert"].rate == read.stages["convert"].rate
    assert written.seconds_left(1000.0) == read.seconds_left(5.0) == 20.0
    assert "web01 convert 40 % 20 s left fix on kvm2" == read.phrase(5.0)
    assert "convert 40 % 20 s left fix on kvm2" == read.doing(5.0)


def test_what_it_says_in_json_has_numbers_or_null(export: int) -> None:
    shape = running().as_json(1000.0)
    assert ("kvm2", 3) == (shape["host"], shape["attempt"])
    convert = {"stage": "convert", "ratio": 0.4, "bytes_per_second": 25.0, "seconds_left": 20.0}
    assert [convert, {"stage": "fix", "ratio": None, "bytes_per_second": None, "seconds_left": None}] == shape["stages"]
    json.dumps(shape, allow_nan=False)


def test_the_file_and_what_a_dead_writer_left_of_it_are_ours_and_no_part_of_the_export() -> None:
    assert OURS.fullmatch(PROGRESS)
    assert OURS.fullmatch(f".{PROGRESS}.3.tmp")


def test_a_job_that_is_over_leaves_nothing(export: int, tmp_path: Path) -> None:
    progress.write(export, running(), 1000.0)
    progress.remove(export)
    progress.remove(export)
    assert [] == os.listdir(tmp_path)


def test_a_directory_that_cannot_be_written_is_an_error_and_leaves_the_old_file(export: int, tmp_path: Path) -> None:
    progress.write(export, running(), 1000.0)
    before = (tmp_path / PROGRESS).read_bytes()
    (tmp_path / f".{PROGRESS}.3.tmp").mkdir()
    with pytest.raises(FileExistsError):
        progress.write(export, running(), 1010.0)
    assert before == (tmp_path / PROGRESS).read_bytes()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.binary(max_size=200))
def test_bytes_that_somebody_planted_say_nothing(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    assert _read(tmp_path_factory.mktemp("export"), data) is None


@given(key=st.sampled_from(["job", "vm", "host", "attempt", "stages", "known"]), value=values)
def test_values_of_other_types_do_no_harm(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    shape = {"job": "j", "vm": "v", "host": "h", "attempt": 1, "known": True, "stages": [], key: value}
    read = _read(tmp_path_factory.mktemp("export"), json.dumps(shape).encode())
    if read is not None:
        assert read.phrase(0.0).isprintable()
        json.dumps(read.as_json(0.0), allow_nan=False)


@given(key=st.sampled_from(["stage", "total", "done", "began", "moved"]), value=values)
def test_stages_of_other_types_do_no_harm(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    stage = {"stage": "convert", "total": 10, "done": 1, "began": 1.0, "moved": 0.0, key: value}
    shape = {"job": "j", "vm": "v", "host": "h", "attempt": 1, "known": True, "stages": [stage]}
    read = _read(tmp_path_factory.mktemp("export"), json.dumps(shape).encode())
    if read is not None:
        assert read.phrase(0.0).isprintable()
        json.dumps(read.as_json(0.0), allow_nan=False)


def test_a_link_is_not_followed(export: int, tmp_path: Path) -> None:
    progress.write(export, running(), 1000.0)
    (tmp_path / PROGRESS).rename(tmp_path / "elsewhere")
    (tmp_path / PROGRESS).symlink_to("elsewhere")
    assert progress.read(export, 0.0) is None


def _read(directory: Path, data: bytes) -> Progress | None:
    (directory / PROGRESS).write_bytes(data)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return progress.read(fd, 0.0)
    finally:
        os.close(fd)
