"""What the running jobs of this host still need of space and memory, so that the next one waits and does not fail."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyper2kvmd.errors import Code, Collected, MigrationError
from hyper2kvmd.job.context import Job
from hyper2kvmd.memory import available, resident_mb

FILE = "reserved.json"


@dataclass(frozen=True)
class Need:
    """Bytes that a job will write into a directory. `files` is what they become; `field` is the setting to change."""

    directory: str
    bytes: int
    files: tuple[str, ...]
    field: str

    def left(self) -> int:
        """The bytes that are still to be written."""
        return max(0, self.bytes - sum(allocated(file) for file in self.files))


def reserve(job: Job, needs: Sequence[Need], memory_mb: int, stack: contextlib.ExitStack) -> None:
    """Reserve what the job needs, until `stack` is closed or the process ends, however it ends.

    Raise MigrationError (no_space, no_memory) if it is not there, with what other jobs have reserved left alone.
    """
    job.work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    # One after the other: two jobs that look at the same time would both find the same space.
    with _locked(job.settings.work_dir):
        check(job, needs, memory_mb)
        path = job.work_dir / FILE
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX)  # whoever looks at it has it for an instant
        content = {"pid": os.getpid(), "needs": [asdict(need) for need in needs], "memory_mb": memory_mb}
        os.write(fd, json.dumps(content).encode())


def lower(job: Job, needs: Sequence[Need]) -> None:
    """Reserve only this from now on, of what the job has reserved: a disk has become smaller than it could."""
    path = job.work_dir / FILE
    before = path.read_bytes()
    content = {**json.loads(before), "needs": [asdict(need) for need in needs]}
    with path.open("r+b", buffering=0) as file:
        file.write(json.dumps(content).encode().ljust(len(before)))  # at once: others read it meanwhile


def check(job: Job, needs: Sequence[Need], memory_mb: int) -> None:
    """Check that what a job needs is there, with what other jobs have reserved left alone.

    Raise MigrationError (no_space, no_memory), with all that is missing as its problems.
    """
    problems = Collected()
    others = _others(job)
    for device in dict.fromkeys(_device(need.directory) for need in needs):
        if device is None:
            continue  # a directory that is not there is an error of its own
        ours = [need for need in needs if _device(need.directory) == device]
        reserved = sum(other.left() for _, taken, _ in others for other in taken if _device(other.directory) == device)
        with problems:
            _check_space(ours, reserved)
    if memory_mb:
        with problems:
            _check_memory(memory_mb, sum(max(0, memory - resident_mb(pid)) for pid, _, memory in others))
    problems.check()


def _check_space(needs: Sequence[Need], reserved: int) -> None:
    """Check what a job needs on one file system."""
    directory, bytes = needs[0].directory, sum(need.left() for need in needs)
    free = shutil.disk_usage(directory).free
    if free - reserved < bytes:
        others = f", of which running jobs still need {reserved / 2**20:.0f} MiB" if reserved else ""
        raise MigrationError(
            Code.NO_SPACE,
            f"{directory} has {free / 2**20:.0f} MiB free{others}; the job needs {bytes / 2**20:.0f} MiB",
            f"Free some space there, or set {needs[0].field} to a larger file system; the job waits for it.",
            field=needs[0].field,
        )


def _check_memory(memory_mb: int, reserved: int) -> None:
    memory = available()
    if memory is not None and memory.mb - reserved < memory_mb:
        others = f", of which running jobs still need {reserved}" if reserved else ""
        raise MigrationError(
            Code.NO_MEMORY,
            f"{memory.holder} has {memory.mb} MiB of memory available{others}; the appliance needs {memory_mb}",
            f"Lower workers or guest.memory_mb, or {memory.remedy}; the job waits for it.",
            field="guest.memory_mb",
        )


def others(job: Job) -> int:
    """How many other jobs of this host run."""
    return len(_others(job))


@contextlib.contextmanager
def _locked(directory: Path) -> Any:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _others(job: Job) -> list[tuple[int, tuple[Need, ...], int]]:
    """The process, needs and memory of every job that runs; what a dead one reserved is free."""
    found = []
    for path in job.settings.work_dir.glob(f"*/{FILE}"):
        if path.parent == job.work_dir:
            continue
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                content = json.load(file)
                needs = tuple(Need(**{**need, "files": tuple(need["files"])}) for need in content["needs"])
                found.append((content["pid"], needs, content["memory_mb"]))
    return found


def _device(directory: str) -> int | None:
    try:
        return os.stat(directory).st_dev
    except OSError:
        return None


def allocated(file: str | Path) -> int:
    """The bytes that a file takes, 0 if it is not there."""
    try:
        return os.stat(file).st_blocks * 512
    except OSError:
        return 0
