"""The guests by whose installer made them: their disks, and for those that are not Debian's, what is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.guests.shapes import arrays, clouds, debian, redhat, suse, ubuntu
from tests.guests.shapes.partition import Layout

_SHAPES = (debian, ubuntu, redhat, suse, clouds, arrays)
LAYOUTS: dict[str, Layout] = {name: layout for shape in _SHAPES for name, layout in shape.LAYOUTS.items()}
# What is done to a guest that is complete
FINISH: dict[str, Callable[[Any], None]] = {name: finish for shape in _SHAPES for name, finish in shape.FINISH.items()}
