"""What every engine that places jobs can do: take one, list those it has, and drop some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

PREFIX = "h2k-"  # of the names of our jobs in an engine; the job's identifier follows


@dataclass(frozen=True)
class Submission:
    """One job for an engine.

    name: PREFIX and the identifier of the job. words: the program to be run, and its arguments. log: the file, in the
    export, that its output is appended to. memory_mb, scratch_mb: MiB that it needs of memory, and below work_dir (0:
    not asked for). features: what its host must have. licenses: of what there is only so much for all hosts, such as
    filer1:1. priority: -1000 to 1000; the higher goes first. exclude: hosts that must not get it.
    """

    name: str
    words: tuple[str, ...]
    log: Path
    cpus: int
    memory_mb: int
    scratch_mb: int = 0
    features: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    priority: int = 0
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Handed:
    """A job that an engine has: its identifier there, our name of it, and where it is.

    state: waiting for a host, or running. host: where it runs, "" if it does not. reason: why it waits, in the
    engine's words, "" if it says nothing. stuck: whether it waits for ever, unless it is handed over again.
    """

    id: str
    name: str
    state: Literal["waiting", "running"]
    host: str = ""
    reason: str = ""
    stuck: bool = False


class Engine(Protocol):
    """What places jobs on hosts. It never claims an export and never reports: the program that it starts does.

    Every method is bounded in time, and raises MigrationError (engine_unavailable, engine_refused, tool_missing).
    """

    def submit(self, submission: Submission) -> str:
        """Hand over one job and return its identifier there."""

    def jobs(self) -> list[Handed]:
        """All jobs of ours that it has and that are not over, by one call."""

    def cancel(self, ids: Sequence[str]) -> None:
        """Drop jobs that wait; one that is over by now is not an error."""
