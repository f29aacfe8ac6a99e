"""Which engine the settings ask for."""

from __future__ import annotations

from hyper2kvmd.dispatch.command import Command
from hyper2kvmd.dispatch.engine import Engine
from hyper2kvmd.dispatch.slurm import Slurm
from hyper2kvmd.settings.model import Settings


def engine_of(settings: Settings) -> Engine | None:
    """What places the jobs on hosts; None if the daemon runs them itself."""
    if settings.dispatch.engine == "slurm":
        return Slurm(settings.dispatch)
    if settings.dispatch.engine == "command":
        return Command(settings.dispatch)
    return None
