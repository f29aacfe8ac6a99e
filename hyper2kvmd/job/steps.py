"""Which steps of a job are durably done, so that the next attempt goes on where the last one was stopped.

They are in `journal.json` in the job's work directory. A step is noted after its files are on disk, and counts only as
long as these are still the very files, made from the same sources with the same wishes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hyper2kvmd.files import fsync_file, write_durably
from hyper2kvmd.job import reserve
from hyper2kvmd.job.context import Job, Record
from hyper2kvmd.job.plan import Plan, PlannedDisk
from hyper2kvmd.settings.model import VIRTIO_WIN

JOURNAL = "journal.json"


@dataclass(frozen=True)
class File:
    """A file that a step made. Inode, size and modification time tell it apart from any other, or a changed one."""

    path: str
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> File:
        """The file at `path`, made durable."""
        fsync_file(path)
        status = path.stat()
        return cls(str(path), status.st_ino, status.st_size, status.st_mtime_ns)

    def is_at(self, path: str | Path) -> bool:
        """Whether this very file is at `path`, whatever was written to it."""
        return self._matches(path, lambda status: status.st_ino == self.inode)

    def holds(self) -> bool:
        """Whether this very file is where it was, and nothing was written to it since."""
        return self._matches(
            self.path,
            lambda status: (
                (status.st_ino, status.st_size, status.st_mtime_ns) == (self.inode, self.size, self.mtime_ns)
            ),
        )

    @staticmethod
    def _matches(path: str | Path, test: Any) -> bool:
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return bool(test(status))


@dataclass(frozen=True)
class Item:
    """A finished disk: the file, which is under its temporary name or has its final one already.

    sha256: of the file as it is published; None if nobody asked for it.
    """

    disk: str
    file: File
    final: str
    sha256: str | None = None

    @property
    def is_there(self) -> bool:
        """Whether the file is under one of its names."""
        return self.file.is_at(self.final) or self.file.is_at(self.file.path)


@dataclass
class _Journal:
    """What journal.json holds. `shape` is a digest of all that decides what the steps make."""

    shape: str = ""
    made: dict[str, int] | None = None  # unfinished disks that attempts made, by path: the inode tells ours from others
    verified: dict[str, str] | None = None  # checksums by disk
    converted: dict[str, File] | None = None
    engines: dict[str, str] | None = None  # what converted which disk
    overlays: dict[str, File] | None = None  # with the fix on them
    guest: Record | None = None  # of INSPECT and FIX
    boot: str = ""  # in which boot of the host the commit began; "" before
    items: tuple[Item, ...] = ()
    record: Record | None = None  # the whole one, once there is something to publish

    def to_bytes(self) -> bytes:
        """What read() takes."""
        records = {"guest": self.guest, "record": self.record}
        plain = asdict(replace(self, guest=None, record=None))
        plain.update({name: None if record is None else record.dump() for name, record in records.items()})
        return json.dumps(plain).encode()


class Steps:
    """The steps of one job. Each method that notes something returns when that is durable. Threads may share it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._mutex = threading.Lock()
        self._journal = _read(job.work_dir)

    # What an earlier attempt did ---------------------------------------------------------------------------

    def to_publish(self) -> tuple[tuple[Item, ...], Record] | None:
        """The disks that an earlier attempt was about to publish and its record, if every file is still there."""
        journal = self._journal
        if journal.items and journal.record is not None and all(item.is_there for item in journal.items):
            return journal.items, journal.record
        return None

    def adopt(self, plan: Plan) -> Plan:
        """The plan with the files that earlier attempts finished; what does not fit the plan is forgotten."""
        journal, shape = self._journal, _shape(self._job, plan)
        if journal.shape != shape or (journal.boot and journal.boot != _boot_id()):
            # After a crash of the host nobody knows which writes of a commit are on disk.
            journal = _Journal(made=journal.made)
        holds = File.is_at if journal.boot else (lambda file, _path: file.holds())
        self._journal = replace(
            journal,
            shape=shape,
            items=(),
            record=None,
            converted={d: f for d, f in (journal.converted or {}).items() if holds(f, f.path)},
            overlays={d: f for d, f in (journal.overlays or {}).items() if holds(f, f.path)},
        )
        if journal.boot and not (self.fixed(plan) and all(self.converted(disk) for disk in plan.disks)):
            # Half of a commit can be finished, but not begun again.
            self._journal = _Journal(shape=shape, made=journal.made, verified=journal.verified)
        return replace(plan, disks=tuple(map(self._adopted, plan.disks)))

    def _adopted(self, disk: PlannedDisk) -> PlannedDisk:
        partial, overlay = (
            Path(files[disk.id].path) if files and disk.id in files else default
            for files, default in (
                (self._journal.converted, disk.partial),
                (self._journal.overlays if self._journal.guest else None, disk.overlay),
            )
        )
        return replace(disk, partial=partial, overlay=overlay)

    def verified(self, disk: PlannedDisk) -> str | None:
        """The checksum of a source that was computed already, and is the manifest's, if that has one."""
        return (self._journal.verified or {}).get(disk.id)

    def converted(self, disk: PlannedDisk) -> bool:
        """Whether a disk is converted."""
        return disk.id in (self._journal.converted or {})

    def engine(self, disk: PlannedDisk) -> str | None:
        """What converted a disk, as far as an attempt has noted that."""
        return (self._journal.engines or {}).get(disk.id)

    def fixed(self, plan: Plan) -> Record | None:
        """The record of INSPECT and FIX if both are done, and the overlays are there."""
        overlays = self._journal.overlays or {}
        return self._journal.guest if all(disk.id in overlays for disk in plan.disks) else None

    # What this one does ------------------------------------------------------------------------------------

    def note_verified(self, disk: PlannedDisk, digest: str) -> None:
        """The checksum of a source is right, or nobody knows another one."""
        with self._mutex:
            self._journal.verified = {**(self._journal.verified or {}), disk.id: digest}
            self._write()

    def note_made(self, paths: Iterable[Path]) -> None:
        """The unfinished disks were made, which are empty still."""
        made = {str(path): path.stat().st_ino for path in paths}
        with self._mutex:
            self._journal.made = {**dict(_still_made(self._journal)), **made}
            self._write()

    def note_converted(self, disk: PlannedDisk, engine: str) -> None:
        """A disk is converted, by that engine."""
        file = File.of(disk.partial)
        with self._mutex:
            self._journal.engines = {**(self._journal.engines or {}), disk.id: engine}
            self._journal.converted = {**(self._journal.converted or {}), disk.id: file}
            self._write()

    def note_fixed(self, plan: Plan, record: Record) -> None:
        """The guest is inspected and fixed, and that is on the overlays."""
        overlays = {disk.id: File.of(disk.overlay) for disk in plan.disks}
        with self._mutex:
            self._journal.overlays, self._journal.guest = overlays, record
            self._write()

    def note_commit(self) -> None:
        """From here on the converted disks change."""
        with self._mutex:
            self._journal.boot = _boot_id()
            self._write()

    def note_finished(self, plan: Plan, record: Record, digests: Mapping[str, str]) -> tuple[Item, ...]:
        """The disks are finished and only have to get their names. digests: of the files, as far as they are wanted."""
        items = tuple(
            Item(disk.id, File.of(disk.partial), str(disk.final), digests.get(disk.id)) for disk in plan.disks
        )
        with self._mutex:
            self._journal.items, self._journal.record = items, record
            self._write()
        return items

    def clean(self, plan: Plan) -> None:
        """Remove what attempts of this job left and no step that counts needs. Needs the claim."""
        journal = self._journal
        files = [
            *(journal.converted or {}).values(),
            *(journal.overlays or {}).values(),
            *(i.file for i in journal.items),
        ]
        self._remove_all_but(plan, {file.path for file in files})

    def discard(self, plan: Plan) -> None:
        """Forget everything and remove all that is not published."""
        self._remove_all_but(plan, set())  # first: what the journal does not have is nobody's
        with contextlib.suppress(FileNotFoundError):
            (self._job.work_dir / JOURNAL).unlink()
        self._journal = _Journal()

    def _remove_all_but(self, plan: Plan, keep: set[str]) -> None:
        for path, _ in _still_made(self._journal):  # also where an earlier attempt was asked to write
            if path not in keep:
                Path(path).unlink(missing_ok=True)
        _remove_all_but(self._job, plan, keep)

    def _write(self) -> None:
        self._job.work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._job.work_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            write_durably(fd, JOURNAL, self._journal.to_bytes(), self._job.attempt)
        finally:
            os.close(fd)


def unfinished(work_dir: Path) -> bool:
    """Whether something may have been published that a later attempt must know as ours."""
    return bool(_read(work_dir).items)


def published(work_dir: Path) -> list[Path]:
    """The disks of a job that have their final names, and are still the files that it made."""
    return [Path(item.final) for item in _read(work_dir).items if item.file.is_at(item.final)]


def in_use(work_dir: Path) -> bool:
    """Whether a process works with a work directory now."""
    try:
        with (work_dir / reserve.FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def is_ours(work_dir: Path) -> bool:
    """Whether a directory is the work directory of a job, and not something else that somebody keeps there."""
    try:
        names = set(os.listdir(work_dir))
    except (FileNotFoundError, NotADirectoryError):
        return False
    # One in which nothing is yet belongs to a job that died at once.
    named = re.fullmatch(r"[A-Za-z0-9._-]+-[0-9a-f]{8}(\.dry-run)?", work_dir.name) is not None
    return named and not work_dir.is_symlink() and (not names or bool(names & {JOURNAL, reserve.FILE}))


def unpublished(work_dir: Path) -> list[Path]:
    """The disks outside of a job's work directory that it made and did not publish, and what its boot test made."""
    journal = _read(work_dir)
    found = {path for path, _ in _still_made(journal)}
    found |= {file.path for file in (journal.converted or {}).values() if file.is_at(file.path)}
    # Under the very names that the boot test gives to what it makes beside them.
    beside = (Path(path).with_suffix(suffix) for path in found for suffix in (".boot.partial", ".nvram.partial"))
    return sorted([*map(Path, found), *(path for path in beside if os.path.lexists(path))])


def abandon(work_dir: Path) -> None:
    """Remove what a job that is over left behind, finished steps included. Raise OSError."""
    for path in unpublished(work_dir):
        path.unlink(missing_ok=True)
    shutil.rmtree(work_dir, ignore_errors=True)


def undo(work_dir: Path) -> None:
    """Remove what a job that nobody wants any more made, published disks included."""
    for item in _read(work_dir).items:
        for path in (item.final, item.file.path):
            if item.file.is_at(path):
                Path(path).unlink(missing_ok=True)
    abandon(work_dir)


def _still_made(journal: _Journal) -> Iterator[tuple[str, int]]:
    """The unfinished disks that are still where an attempt made them, each with its inode."""
    for path, inode in (journal.made or {}).items():
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path, follow_symlinks=False).st_ino == inode:
                yield path, inode


def _read(work_dir: Path) -> _Journal:
    """The journal; an empty one if there is none, or one that only a defect could have written."""
    try:
        content = json.loads((work_dir / JOURNAL).read_bytes())
        for name in ("converted", "overlays"):
            content[name] = {disk: File(**file) for disk, file in (content[name] or {}).items()}
        for name in ("guest", "record"):
            content[name] = None if content[name] is None else Record.load(content[name])
        content["items"] = tuple(
            Item(i["disk"], File(**i["file"]), i["final"], i.get("sha256")) for i in content["items"]
        )
        return _Journal(**content)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return _Journal()


def _shape(job: Job, plan: Plan) -> str:
    """A digest of what the steps depend on: the sources' very bytes, the wishes, and the names of the results.

    Not on the device that a source is on: many file systems have another number after the next boot.
    """
    # A disk of one file is there twice, as it was in 0.1.0, whose work is gone on with.
    sources = [
        [disk.id, file.name, file.inode, file.size, file.mtime_ns]
        for disk in plan.disks
        for file in disk.source.files * (2 if len(disk.source.files) == 1 else 1)
    ]
    wishes = [plan.format, plan.compress, plan.inspect, plan.fix, [str(disk.final) for disk in plan.disks]]
    guest = [
        _asked(plan.manifest.stages.fix),
        _asked(job.settings.fix),
        [asdict(card) for card in plan.cards],
    ]
    return hashlib.sha256(json.dumps([sources, wishes, guest]).encode()).hexdigest()


# What can be asked for since 0.1.0, and what it is where nobody asks: the work of an older version is gone on with.
_UNASKED = {"enable_rdp": False, "virtio_win": str(VIRTIO_WIN)}


def _asked(wishes: BaseModel) -> dict[str, Any]:
    return {key: value for key, value in wishes.model_dump(mode="json").items() if _UNASKED.get(key, ...) != value}


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def remove_partials(id: str, directories: Iterable[Path], keep: Set[str] = frozenset()) -> None:
    """Remove what attempts of a job have in the directories that disks go to, also what none could note any more."""
    for directory in directories:
        for leftover in directory.glob(f".*.{id}.*.partial"):
            if str(leftover) not in keep:
                leftover.unlink(missing_ok=True)


def _remove_all_but(job: Job, plan: Plan, keep: set[str]) -> None:
    remove_partials(job.id, {disk.final.parent for disk in plan.disks} if plan.convert else (), keep)
    if job.work_dir.is_dir():
        for leftover in job.work_dir.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)  # where FIX read initramfs images
            elif leftover.name not in (JOURNAL, reserve.FILE) and str(leftover) not in keep:
                leftover.unlink(missing_ok=True)
