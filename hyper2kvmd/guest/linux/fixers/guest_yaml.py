"""Reads YAML of the guest, which may be made to keep us busy: netplan's files, cloud-init's settings."""

from __future__ import annotations

from typing import Any

import yaml

SIZE_LIMIT = 1 << 16
DEPTH_LIMIT = 30


def load(text: str) -> dict[str, Any] | None:
    """A file as dicts, lists and strings; None if it is not YAML or no file that a person would write.

    A few lines of aliases can stand for gigabytes: nobody may walk through all that is in a value, or write it out. All
    scalars are strings, as YAML would read some MAC addresses as numbers to the base of sixty.
    """
    if len(text) > SIZE_LIMIT:
        return None
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEPTH_LIMIT:
                return None
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, OverflowError):  # the last two: an escaped character that does not exist
        return None
    if content in (None, ""):
        return {}
    return content if isinstance(content, dict) else None
