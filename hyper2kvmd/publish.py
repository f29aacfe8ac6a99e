"""Publishing: the finished disks get their final names, once, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyper2kvmd import images, spool
from hyper2kvmd.job import Job
from hyper2kvmd.plan import Plan

JOURNAL = "journal.json"


@dataclass(frozen=True)
class Item:
    """A finished disk under its temporary name. Inode and size tell it apart from anybody else's file."""

    disk: str
    partial: str
    final: str
    inode: int
    size: int

    def is_at(self, path: str) -> bool:
        """Whether this very file is at `path`."""
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (status.st_ino, status.st_size) == (self.inode, self.size)


def intend(job: Job, plan: Plan, facts: dict[str, Any]) -> tuple[Item, ...]:
    """Note durably which finished files are to get which names; from here on a retry only publishes."""
    items = []
    for disk in plan.disks:
        status = disk.partial.stat()
        items.append(Item(disk.id, str(disk.partial), str(disk.final), status.st_ino, status.st_size))
    content = {"items": [asdict(item) for item in items], "facts": facts}
    job.work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(job.work_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        spool.write_durably(fd, JOURNAL, json.dumps(content).encode(), job.claim.attempt)
    finally:
        os.close(fd)
    return tuple(items)


def intended(job: Job) -> tuple[tuple[Item, ...], dict[str, Any]] | None:
    """What an earlier attempt was about to publish, if every file of it is still there."""
    try:
        content = json.loads((job.work_dir / JOURNAL).read_bytes())
    except FileNotFoundError:
        return None
    items = tuple(Item(**item) for item in content["items"])
    if all(item.is_at(item.final) or item.is_at(item.partial) for item in items):
        return items, content["facts"]
    return None


def unfinished(job: Job) -> bool:
    """Whether something may have been published that a later attempt must know as ours."""
    return (job.work_dir / JOURNAL).exists()


def publish(job: Job, items: tuple[Item, ...]) -> None:
    """Give every file its final name. A file that has it already, from an earlier attempt, keeps it."""
    for item in items:
        job.claim.check()
        if item.is_at(item.partial):
            images.publish(Path(item.partial), Path(item.final))


def clean(job: Job, plan: Plan, items: tuple[Item, ...]) -> None:
    """Remove what dead attempts of this job left, but not what is still to be published. Needs the claim."""
    keep = {item.partial for item in items}
    for directory in {disk.partial.parent for disk in plan.disks}:
        for leftover in directory.glob(f".*.{job.id}.*.partial"):
            if str(leftover) not in keep:
                leftover.unlink(missing_ok=True)
    if job.work_dir.is_dir():
        for leftover in job.work_dir.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)  # where FIX read initramfs images
            elif leftover.name != JOURNAL or not items:
                leftover.unlink(missing_ok=True)
