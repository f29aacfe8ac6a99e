"""One look at the exports directory, and at one export: it finds facts, and decides nothing."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import stat
import time
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import (
    OURS,
    explained,
    inside,
    open_directory,
    open_directory_of,
    open_file,
    remedy,
)
from hyper2kvmd.image.members import is_archive_name
from hyper2kvmd.manifest import SIZE_LIMIT, parse
from hyper2kvmd.manifest.ovf import Ovf
from hyper2kvmd.queue import progress
from hyper2kvmd.queue.access import open_shared
from hyper2kvmd.queue.claim import probe
from hyper2kvmd.queue.descriptor import Needed, candidates, mf_of, needed, outside, read_archive, several, stands_in
from hyper2kvmd.queue.descriptor import parse as parse_descriptor
from hyper2kvmd.queue.estimate import estimate
from hyper2kvmd.queue.export import is_export_name
from hyper2kvmd.queue.handover import tickets
from hyper2kvmd.queue.names import CUTOVER, REPORT
from hyper2kvmd.queue.plans import planned
from hyper2kvmd.queue.record import record_of
from hyper2kvmd.queue.requests import pending
from hyper2kvmd.queue.state import FINAL, Facts, State
from hyper2kvmd.report.cutover import CutoverReport
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import show

REPORT_LIMIT = 8 << 20  # ours are far smaller; what an exporter puts there may be anything


def look(directory: Path, settings: Settings) -> Facts:
    """Look at one export, changing nothing but who may read its manifest, if we may not.

    Raise OSError if the directory cannot be read.
    """
    fd = open_directory(directory)
    try:
        held, crashes, began_at = probe(fd)
        request = pending(fd)
        entries, written = _entries(fd)
        name, data, problem, newest = _find_manifest(fd, directory, settings, entries)
        newest = max(newest, written)
        report = _read_report(fd)
        plan = planned(settings, directory.name)
        planning = {"plan_problem": plan} if isinstance(plan, Finding) else {"plan": plan}
        if name is None:
            # A report can outlive its manifest; without either there is nothing to do yet.
            bare = Facts(None, held=held, request=request, **planning)
            return _look_report(bare, report, fd) if report else bare
        digest = hashlib.sha256(data).hexdigest() if data is not None else None
        # Of an archive that is cut short the rest may be still to come.
        half = problem is not None and problem.code == Code.IMAGE_CORRUPT
        found = Facts(name, digest, problem, half, (), newest, held, request, crashes, began_at, **planning)
        if held:
            found = replace(found, progress=progress.read(fd, time.monotonic()))
        if report is not None:
            found = _look_report(found, report, fd)
        # What is over needs no more: of thousands of manifests, only those are read that somebody waits for.
        if data is None or found.report_status == State.SUCCEEDED:
            return found
        said = _read(data, directory, name)
        problem = said.problem
        found = replace(found, vm_name=said.vm_name, tags=said.tags)
        if report is not None and found.report_status != State.RETRYING:
            return found
        files = said.files(directory, entries)
        missing, there, newest = _look_files(fd, [file.name for file in files], newest)
        sizes = tuple((file.name, there[file.name]) for file in files if file.disk and file.name in there)
        found = replace(found, sizes=sizes, estimate=estimate(sizes, settings.work_dir))
        if report is not None:
            return found
        if missing:
            problem = Finding(
                Code.DISK_MISSING, f"{directory / missing[0]} is not there yet", "Waiting for the exporter."
            )
        elif short := next((file for file in files if there.get(file.name, 0) < (file.bytes or 0)), None):
            missing = (short.name,)
            problem = Finding(
                Code.DISK_MISSING,
                f"{directory / short.name} has {there.get(short.name, 0)} of {short.bytes} bytes",
                "Waiting for the exporter.",
            )
        elif copying := _copying(entries, {name, mf_of(name), *(os.path.basename(file.name) for file in files)}):
            missing = (copying,)
            problem = Finding(
                Code.DISK_MISSING, f"{directory / copying} is still being copied", "Waiting until it has its name."
            )
        unreadable = problem is not None and problem.code == Code.MANIFEST_UNREADABLE
        return replace(found, problem=problem, unreadable=unreadable, missing=missing, settled_since=newest)
    finally:
        os.close(fd)


def look_or_reason(directory: Path, settings: Settings) -> Facts | Finding | None:
    """What a look at one export found, or why nobody can look at it; None if it is gone. One does not hide others."""
    try:
        return look(directory, settings)
    except FileNotFoundError:
        return None
    except OSError as error:
        message = f"{explained(error, directory)}: the export cannot be looked at"
        return Finding(Code.IO_ERROR, message, f"{remedy(error)}.")


def exports(settings: Settings) -> tuple[list[Path], list[Finding]]:
    """The export directories in order of name, and what is no export and was perhaps meant to be one.

    Hidden directories and symbolic links are neither. Those that were handed over from elsewhere come last.
    Raise OSError if the exports directory cannot be read.
    """
    with os.scandir(settings.exports_dir) as entries:
        kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    names = sorted(name for name, is_directory in kinds.items() if is_directory)
    good = [settings.exports_dir / name for name in names if is_export_name(name)]
    handed_over: set[Path] = set()
    with contextlib.suppress(OSError):  # told by the daemon; what lies in exports_dir is there all the same
        handed_over = {
            ticket.directory for ticket in tickets(settings) if ticket.directory and ticket.directory.is_dir()
        }
    ignored = [
        Finding("ignored", f"{name!a} is ignored: the name has control characters", "Rename it.")
        for name in names
        if not name.startswith(".") and not is_export_name(name)
    ]
    files = (name for name, is_directory in sorted(kinds.items()) if not is_directory and settings.ovf.accept)
    ignored += [outside(settings.exports_dir / name) for name in files if stands_in(name)]
    return [*good, *sorted(handed_over - {*good})], ignored


def manifest_name(directory: Path, settings: Settings) -> str | None:
    """The name of the file that an export's manifest is read from; None if there is none, or that is not clear."""
    names = os.listdir(directory) if directory.is_dir() else []
    found = next((name for name in settings.manifest_names if name in names), None)
    if found is not None or not settings.ovf.accept:
        return found
    standing_in = candidates(names)
    return standing_in[0] if len(standing_in) == 1 else None


def find_manifest(dir_fd: int, directory: Path, settings: Settings) -> tuple[str, bytes]:
    """The name and the bytes of an export's manifest, or of the OVF descriptor that stands in for one.

    Raise MigrationError if there is none, or if it is not a plain file that can be read.
    """
    names = os.listdir(dir_fd)
    found = _find_manifest(dir_fd, directory, settings, names)
    if found[0] is None and (others := candidates(names)):
        message = f"{directory} holds no manifest, and {show(others[0])} is not accepted as one"
        raise MigrationError(Code.MANIFEST_UNREADABLE, message, "Set ovf.accept to true.")
    return _required(directory, settings.manifest_names, found)


def read_manifest(dir_fd: int, directory: Path, names: tuple[str, ...]) -> tuple[str, bytes]:
    """The name and the bytes of the first of `names` that is there. Raise MigrationError as find_manifest() does."""
    return _required(directory, names, _read_manifest(dir_fd, directory, names))


_Read = tuple[str | None, bytes | None, Finding | None, float]


def _required(directory: Path, names: tuple[str, ...], found: _Read) -> tuple[str, bytes]:
    name, data, problem, _ = found
    if problem is not None:
        raise MigrationError(Code(problem.code), problem.message, problem.hint)
    if name is None or data is None:
        raise MigrationError(
            Code.MANIFEST_UNREADABLE,
            f"{directory} holds no manifest ({', '.join(names)})",
            "Export the VM with hypersdk's -manifest option, or add the file's name to manifest_names.",
        )
    return name, data


def read_report(directory: Path, name: str = REPORT) -> dict[str, Any] | None:
    """The report of an export as plain data; None if there is none, {} if the file is something else."""
    fd = open_directory(directory)
    try:
        return _read_report(fd, name)
    finally:
        os.close(fd)


def read_cutover(directory: Path, report: dict[str, Any]) -> CutoverReport | None:
    """How the VM that this report is of was cut over, None if it was not. Raise OSError."""
    try:
        found = CutoverReport.model_validate(read_report(directory, CUTOVER))
    except ValidationError:
        return None
    return found if (found.job, found.migrated_at) == (report.get("job"), report.get("finished_at")) else None


def _find_manifest(dir_fd: int, directory: Path, settings: Settings, entries: Iterable[str]) -> _Read:
    """Likewise of the manifest, or else of the only .ovf or .ova among the names, if the settings accept that."""
    found = _read_manifest(dir_fd, directory, settings.manifest_names)
    if found[0] is not None or not settings.ovf.accept:
        return found
    standing_in = candidates(entries)
    if len(standing_in) > 1:
        return standing_in[0], None, several(directory, standing_in), 0.0
    return _read_manifest(dir_fd, directory, tuple(standing_in))


def _read_manifest(dir_fd: int, directory: Path, names: tuple[str, ...]) -> _Read:
    """Name, bytes and problem of the first manifest that is there, and when it was written."""
    for name in names:
        try:
            fd = open_shared(name, dir_fd=dir_fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno == errno.ELOOP:
                return name, None, _unsafe_manifest(directory / name, "is a symbolic link"), 0.0
            finding = Finding(
                Code.IO_ERROR, f"{directory / name} cannot be read: {error.strerror}", "Check its permissions."
            )
            return name, None, finding, 0.0
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return name, None, _unsafe_manifest(directory / name, "is not a regular file"), _written(status)
            if status.st_nlink != 1:
                return name, None, _unsafe_manifest(directory / name, "has a second name (hard link)"), _written(status)
            if is_archive_name(name):
                try:
                    return name, read_archive(fd, directory / name)[1], None, _written(status)
                except MigrationError as error:
                    return name, None, error.finding(), _written(status)
            if status.st_size > SIZE_LIMIT:
                finding = Finding(
                    Code.MANIFEST_INVALID,
                    f"{directory / name} has {status.st_size} bytes; a manifest has at most {SIZE_LIMIT}",
                    "This is not a manifest. Export the VM again.",
                )
                return name, None, finding, _written(status)
            data = bytearray()
            while block := os.read(fd, SIZE_LIMIT + 1 - len(data)):
                data += block
            return name, bytes(data), None, _written(status)
        finally:
            os.close(fd)
    return None, None, None, 0.0


def _unsafe_manifest(path: Path, what: str) -> Finding:
    return Finding(
        Code.EXPORT_UNSAFE, f"{path} {what}", "A manifest is a plain file. Export the VM again into a new directory."
    )


@dataclass(frozen=True)
class _Said:
    """What a manifest says, or the descriptor in its place, as far as a look needs it; or what is wrong with it."""

    problem: Finding | None = None
    vm_name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    descriptor: Ovf | None = None

    def files(self, directory: Path, entries: Collection[str]) -> tuple[Needed, ...]:
        """The files that the export must have."""
        if self.descriptor is not None:
            return needed(self.descriptor, entries)
        return tuple(Needed(inside(path, directory), disk=True, bytes=None) for path in self.paths)


@functools.lru_cache(maxsize=1024)  # a queue of a thousand is looked at again and again
def _read(data: bytes, directory: Path, name: str) -> _Said:
    try:
        if stands_in(name):
            found = parse_descriptor(data, directory, name)
            vm_name = found.vm_name or Path(name).stem
            if is_archive_name(name):
                return _Said(vm_name=vm_name, paths=(name,))  # all its files are there once it is
            return _Said(vm_name=vm_name, descriptor=found)
        manifest = parse(data, name)
    except MigrationError as error:
        return _Said(error.finding())
    return _Said(None, manifest.vm_name, manifest.tags, tuple(disk.path for disk in manifest.disks))


def _entries(dir_fd: int) -> tuple[list[str], float]:
    """The names in an export that are not ours, and when the newest of them was written, renamed or given its times.

    The change time tells what tools hide that keep old modification times, such as `cp -p`, `rsync -a` and unzip.
    """
    names, newest = [], 0.0
    with os.scandir(dir_fd) as entries:
        for entry in itertools.islice((entry for entry in entries if not OURS.fullmatch(entry.name)), _ENTRY_LIMIT):
            with contextlib.suppress(OSError):  # gone since it was listed
                status = entry.stat(follow_symlinks=False)
                newest = max(newest, _written(status))
            names.append(entry.name)
    return names, newest


def _written(status: os.stat_result) -> float:
    return max(status.st_mtime, status.st_ctime)


def _copying(names: Iterable[str], wanted: Container[str]) -> str | None:
    """The first temporary name, of those that tools give to what they copy, of a file that is wanted."""
    for name in names:
        found = _TEMPORARY.fullmatch(name)
        if found and (found["name"] or found["other"] or "") in wanted:
            return name
    return None


# What rsync, and programs for scp and sftp, call a file until it is complete.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[A-Za-z0-9]{6}|(?P<other>.+)\.(?:filepart|part|partial)")
_ENTRY_LIMIT = 1000  # of an export; a hostile one could have millions


def _look_files(dir_fd: int, paths: Iterable[str], newest: float) -> tuple[tuple[str, ...], dict[str, int], float]:
    """Which files are not there; those that are, with their sizes; and when the newest of these was written.

    Only whether they can be migrated is decided later, under the claim; here a name that is there is enough.
    """
    missing, sizes = [], dict[str, int]()
    for path in paths:
        if ".." in path.split("/"):
            continue  # the runner says what is wrong with it
        try:
            fd = open_directory_of(dir_fd, path)
            try:
                status = os.stat(os.path.basename(path), dir_fd=fd, follow_symlinks=False)
            finally:
                os.close(fd)
        except (OSError, ValueError):
            missing.append(os.path.basename(path))
            continue
        sizes[path] = status.st_size
        newest = max(newest, _written(status))
    return tuple(missing), sizes, newest


def _read_report(dir_fd: int, name: str = REPORT) -> dict[str, Any] | None:
    """The report as plain data; {} for a file that is not a report, which still means that nothing must be done."""
    try:
        fd = open_file(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    except OSError:
        return {}
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return {}
    with open(fd, "rb") as file:
        try:
            data = file.read(REPORT_LIMIT + 1)
            content = json.loads(data) if len(data) <= REPORT_LIMIT else {}
        except (ValueError, OSError, RecursionError):
            return {}
    return content if isinstance(content, dict) else {}


def _look_report(found: Facts, report: dict[str, Any], dir_fd: int) -> Facts:
    """Add to a look what the report says. The file may be anything: nothing in it is trusted to have a type."""
    status = str(report.get("status"))
    finding = None
    if status not in {*FINAL, State.RETRYING}:
        status = State.BLOCKED.value
        finding = Finding(
            Code.MANIFEST_CHANGED,
            f"{REPORT} is not a report of this program",
            "Move it away to have the VM migrated.",
        )
    elif isinstance(error := report.get("error"), dict):
        code, message, hint = (str(error.get(key, "")) for key in ("code", "message", "hint"))
        finding = Finding(code, message, hint, str(error["field"]) if error.get("field") else None)
    manifest = report.get("manifest")
    return replace(
        found,
        report_status=status,
        report_sha256=manifest.get("sha256") if isinstance(manifest, dict) else None,
        report_finding=finding,
        next_attempt_at=_seconds(report.get("next_attempt_at")),
        finished_at=_seconds(report.get("finished_at")),
        record=record_of(report, _read_report(dir_fd, CUTOVER) or {} if status == State.SUCCEEDED else {}),
    )


def _seconds(stamp: object) -> float | None:
    """A time of a report as seconds since the epoch; None for what is none."""
    try:
        return datetime.fromisoformat(str(stamp)).timestamp()
    except (ValueError, OverflowError):
        return None
