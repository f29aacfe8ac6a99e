"""The reader of `.inf` files, on as many broken ones as take a while."""

from __future__ import annotations

import random

import pytest

from tests.unit.guest.windows.test_inf import fuzz


@pytest.mark.rest
def test_a_hundred_thousand_broken_ones_end_in_an_answer_or_a_defect() -> None:
    fuzz(random.Random(20), 100_000)
