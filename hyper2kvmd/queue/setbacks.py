"""Exports that are left alone for a while although nothing in them says so: nothing can be written into them.

The daemon keeps this in work_dir, so that it outlives the daemon, and commands can tell it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import structlog

from hyper2kvmd.errors import Finding
from hyper2kvmd.files import open_directory, remove_leftovers, write_durably
from hyper2kvmd.queue.state import Setback

log = structlog.get_logger()

FILE = "setbacks.json"


def read(work_dir: Path) -> dict[Path, Setback]:
    """The setbacks by export; none of them if the file cannot be read, or is none of ours."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        content = json.loads((work_dir / FILE).read_bytes())
        return {
            Path(export): Setback(int(one["count"]), float(one["until"]), Finding(**one["finding"]))
            for export, one in content.items()
        }
    return {}


def write(work_dir: Path, setbacks: Mapping[Path, Setback]) -> None:
    """Keep the setbacks; where that is not possible, they are forgotten when the daemon ends."""
    content = {str(export): asdict(setback) for export, setback in setbacks.items()}
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        fd = open_directory(work_dir)
        try:
            remove_leftovers(fd, FILE)
            write_durably(fd, FILE, json.dumps(content, indent=2).encode() + b"\n", 0)
        finally:
            os.close(fd)
    except OSError as error:
        log.debug("setbacks are not kept", directory=str(work_dir), reason=error.strerror)
