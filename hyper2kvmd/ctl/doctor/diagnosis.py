"""What a check is given, and what it found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hyper2kvmd.errors import Collected, Finding
from hyper2kvmd.settings.model import Settings

ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Host:
    """What is checked. `unit` is what systemd says of the service; empty where systemd does not run."""

    settings: Settings
    settings_file: Path
    unit: dict[str, str]


class Diagnosis(Collected):
    """What a check found wrong: `errors` keep jobs from being done, `warnings` do not, or not all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[Finding] = []

    def warn(self, code: str, message: str, hint: str, field: str | None = None) -> None:
        """Note a warning."""
        self.warnings.append(Finding(code, message, hint, field))


def output_dirs(settings: Settings) -> Iterator[tuple[Path, str]]:
    """Every directory that disks can go to, and the setting that names it."""
    yield settings.output_dir, "output_dir"
    for directory in settings.output.allowed_dirs:
        yield directory, "output.allowed_dirs"


def handover_dirs(settings: Settings) -> Iterator[tuple[Path, str]]:
    """The directories of exporters that hand over by themselves, and the settings that name them; none without them."""
    if settings.hypersdk.queue_dir is not None:
        yield settings.hypersdk.queue_dir, "hypersdk.queue_dir"
    if settings.hypersdk.output_dir is not None:
        yield settings.hypersdk.output_dir, "hypersdk.output_dir"
    for directory in settings.hypersdk.allowed_dirs:
        yield directory, "hypersdk.allowed_dirs"
