"""How much work something is, whatever machine it runs on and whatever else that does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@cache
def _yardstick() -> float:
    """Seconds of processor time for a fixed piece of work, which takes a second where these tests were written."""
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        seen = {}
        for number in range(60_000):
            seen[str(number)] = number
        best = min(best, time.process_time() - began)
    return best * 60


@contextmanager
def work_of_at_most(seconds: float) -> Iterator[None]:
    """Assert that the block takes so many seconds of processor time at most, counted in those of the yardstick.

    The bounds are six times what was seen, or more: what they are to find out, such as work that grows with the square
    of a file, takes minutes. A processor whose other half works too is slower than it was: then the yardstick is laid
    on once more.
    """
    unit = _yardstick()
    began = time.process_time()
    yield
    took = time.process_time() - began
    if took > seconds * unit:
        _yardstick.cache_clear()
        unit = max(unit, _yardstick())
    assert took < seconds * unit, f"{took / unit:.1f} times a second's work"
