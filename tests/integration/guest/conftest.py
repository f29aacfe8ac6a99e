"""What the tests of guests share: one appliance, as each takes ten seconds of a processor to come up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.appliance import Workshop, workshop


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, accelerator: str) -> Iterator[Workshop]:
    """An appliance into which one disk after the other is put."""
    with workshop(tmp_path_factory.mktemp("workshop"), accelerator) as shop:
        yield shop
