"""The exports directory as a queue: what state each export is in, and the claim that makes it ours."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import socket
import stat
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from hyper2kvmd.errors import MEANING, Code, Finding, MigrationError
from hyper2kvmd.manifest import SIZE_LIMIT, ManifestError, parse
from hyper2kvmd.report import Report
from hyper2kvmd.settings import Settings

LOCK = ".hyper2kvmd.lock"
REPORT = "migration-report.json"
# What people ask for, as files beside the manifest, so that it reaches a runner on any host that shares the directory.
HOLD = ".hyper2kvmd.hold"
CANCEL = ".hyper2kvmd.cancel"
LOG = ".hyper2kvmd.log"
# In the exports directory itself: no daemon starts another job.
DRAIN = ".hyper2kvmd.drain"
REPORT_LIMIT = 8 << 20  # ours are far smaller; what an exporter puts there may be anything
# A look at the lock takes it for an instant; a claimer that meets it there tries again for this long.
CLAIM_PATIENCE_SECONDS = 0.5


class State(StrEnum):
    """The states of an export; `state` says how they follow from what is on disk."""

    INCOMPLETE = "incomplete"
    WAITING = "waiting"
    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    BLOCKED = "blocked"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


FINAL = frozenset({State.BLOCKED, State.SUCCEEDED, State.FAILED, State.REJECTED, State.CANCELLED})


@dataclass(frozen=True)
class Look:
    """What one look at an export found; the state follows from this and the time alone.

    Times are seconds since the epoch. `settled_since` is the newest modification of manifest and disks.
    """

    manifest: str | None
    manifest_sha256: str | None = None
    problem: Finding | None = None
    unreadable: bool = False
    missing: tuple[str, ...] = ()
    settled_since: float = 0.0
    held: bool = False
    wish: Literal["hold", "cancel"] | None = None
    crashes: int = 0
    began_at: float = 0.0
    report_status: str | None = None
    report_sha256: str | None = None
    report_finding: Finding | None = None
    next_attempt_at: float | None = None


def state(look: Look, settings: Settings, now: float) -> tuple[State, Finding | None]:
    """The state of an export, and the reason where there is one. Pure: looks at nothing but its arguments."""
    if look.held:
        return State.RUNNING, None
    if look.report_status is not None:
        if look.manifest_sha256 is not None and look.report_sha256 not in (None, look.manifest_sha256):
            return State.BLOCKED, Finding(
                Code.MANIFEST_CHANGED,
                f"{REPORT} belongs to another manifest (sha256 {look.report_sha256}) than the one in the export",
                "If this is a new export of the VM, move the old report away; otherwise put the old manifest back.",
            )
        due = max(look.next_attempt_at or 0, _crash_delay(look, settings))
        if look.report_status == State.RETRYING and look.wish == "hold":
            return _on_hold()
        if look.report_status == State.RETRYING and (due <= now or look.wish == "cancel"):
            return State.QUEUED, look.report_finding
        return State(look.report_status), look.report_finding
    if look.manifest is None:
        return State.INCOMPLETE, None
    if look.wish == "hold":
        return _on_hold()
    if look.wish == "cancel":
        return State.QUEUED, None  # for a runner that says so in a report
    age = now - look.settled_since
    # A modification time in the future is a clock that jumped: waiting for it could take for ever.
    settled = age < -settings.settle_seconds or age >= settings.settle_seconds
    # Half-written is normal while the exporter works; after the grace period a runner says what is wrong.
    if (look.unreadable or look.missing) and 0 <= age < settings.incomplete_grace_seconds:
        return State.INCOMPLETE, look.problem
    if not settled:
        return State.WAITING, None
    if now < _crash_delay(look, settings):
        return State.RETRYING, None
    return State.QUEUED, None


def _on_hold() -> tuple[State, Finding]:
    return State.BLOCKED, wished("hold").finding()


def wished(wish: Literal["hold", "cancel"]) -> MigrationError:
    """What people wish as an error: held or cancelled."""
    if wish == "hold":
        return MigrationError(Code.HELD, "the export is on hold", "`hyper2kvmctl release` lets it go on.")
    return MigrationError(Code.CANCELLED, "the job was cancelled", "`hyper2kvmctl retry` starts it again.")


def wish(dir_fd: int) -> Literal["hold", "cancel"] | None:
    """What people wish for an export, by the files beside its manifest; cancelling goes first."""
    for name, meant in ((CANCEL, "cancel"), (HOLD, "hold")):
        with contextlib.suppress(OSError):
            os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            return "cancel" if meant == "cancel" else "hold"
    return None


def wish_of(directory: Path) -> Literal["hold", "cancel"] | None:
    """The same, of an export that is not open. Raise OSError."""
    fd = open_directory(directory)
    try:
        return wish(fd)
    finally:
        os.close(fd)


def ask(directory: Path, name: str) -> None:
    """Put a wish (HOLD, CANCEL or DRAIN) into a directory, if it is not there already. Raise OSError."""
    fd = open_directory(directory)
    try:
        with contextlib.suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, 0o640, dir_fd=fd)
            try:
                os.write(file, f"asked for at {timestamp(time.time())} on {socket.gethostname()}\n".encode())
            finally:
                os.close(file)
        os.fsync(fd)
    finally:
        os.close(fd)


def withdraw(directory: Path, name: str) -> bool:
    """Take a wish away again; whether it was there. Raise OSError."""
    try:
        os.unlink(directory / name)
    except FileNotFoundError:
        return False
    return True


def draining(settings: Settings) -> bool:
    """Whether somebody asked that no job is started any more."""
    return os.path.lexists(settings.exports_dir / DRAIN)


def _crash_delay(look: Look, settings: Settings) -> float:
    """When an export whose last runners died may be tried again."""
    return look.began_at + settings.retry.delay(look.crashes) if look.crashes else 0.0


def look(directory: Path, settings: Settings) -> Look:
    """Look at one export, changing nothing. Raise OSError if the directory cannot be read."""
    fd = open_directory(directory)
    try:
        held, crashes, began_at = _probe_lock(fd)
        wanted = wish(fd)
        name, data, problem, newest = _read_manifest(fd, directory, settings.manifest_names)
        report = _read_report(fd)
        if name is None:
            # A report can outlive its manifest; without either there is nothing to do yet.
            bare = Look(None, held=held, wish=wanted)
            return _look_report(bare, report) if report else bare
        digest = hashlib.sha256(data).hexdigest() if data is not None else None
        found = Look(name, digest, problem, False, (), newest, held, wanted, crashes, began_at)
        if report is not None:
            return _look_report(found, report)
        if data is None:
            return found
        paths, problem = _disk_paths(data, name)
        missing, newest = _look_disks(fd, paths, newest)
        if missing:
            problem = Finding(
                Code.DISK_MISSING, f"{directory / missing[0]} is not there yet", "Waiting for the exporter."
            )
        unreadable = problem is not None and problem.code == Code.MANIFEST_UNREADABLE
        return replace(found, problem=problem, unreadable=unreadable, missing=missing, settled_since=newest)
    finally:
        os.close(fd)


def exports(settings: Settings) -> tuple[list[Path], list[str]]:
    """The export directories in order of name, and the names of directories that cannot be exports.

    Hidden directories and symbolic links are neither. Raise OSError if the exports directory cannot be read.
    """
    with os.scandir(settings.exports_dir) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    names = [name for name in names if not name.startswith(".")]
    # A name with control characters, or that is no text, could forge lines wherever it is shown.
    good = [name for name in names if name.isprintable()]
    return [settings.exports_dir / name for name in good], [name for name in names if not name.isprintable()]


class Busy(Exception):
    """Another runner holds the claim."""


class Claim:
    """One export held by this process, until it and every tool that it handed the lock to are gone.

    `attempt` is the fencing number: whoever has the highest one owns the export. `crashes` is how many attempts in
    a row died, `retries` how many in a row ended for a passing cause; one that was stopped on purpose is neither.
    """

    def __init__(self, directory: Path, fd: int, lock_fd: int, attempt: int, crashes: int, retries: int) -> None:
        self.directory = directory
        self.fd = fd
        self.lock_fd = lock_fd
        self.attempt = attempt
        self.crashes = crashes
        self.retries = retries

    def check(self) -> None:
        """Raise MigrationError (claim_lost) unless the claim is still ours. Comes before what cannot be undone."""
        try:
            os.fsync(self.lock_fd)  # on NFS this is what notices a lock that the server has given away
            ours, named = os.fstat(self.lock_fd), os.stat(LOCK, dir_fd=self.fd, follow_symlinks=False)
            attempt = _read_lock(self.lock_fd).get("attempt")
        except OSError as error:
            raise self._lost(str(error)) from None
        if (ours.st_dev, ours.st_ino) != (named.st_dev, named.st_ino):
            raise self._lost(f"{LOCK} was replaced")
        if attempt != self.attempt:
            raise self._lost(f"attempt {attempt} has begun")

    def _lost(self, why: str) -> MigrationError:
        return MigrationError(
            Code.CLAIM_LOST,
            f"the claim on {self.directory} (attempt {self.attempt}) was lost: {why}",
            f"Nothing was published. Never remove or edit {LOCK}; check the shared file system's lock service.",
        )

    def finish(self, report: Report) -> None:
        """Write the report durably: it is complete under its name, or it is not there. Then the job is over."""
        self.check()
        write_durably(self.fd, REPORT, report.to_bytes(), self.attempt)
        waits = report.error is not None and MEANING[Code(report.error.code)].patient
        self._end("reported", self.retries + (not waits) if report.status == "retrying" else 0)

    def forget(self) -> None:
        """Begin anew: the report gets out of the way (`migration-report.N.json`), and no crash or retry counts.

        Raise OSError.
        """
        self.check()
        taken = set(os.listdir(self.fd))
        if REPORT in taken:
            name = next(name for n in itertools.count(1) if (name := f"migration-report.{n}.json") not in taken)
            os.rename(REPORT, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.fulfil(CANCEL)
        os.fsync(self.fd)
        self._end("retried", 0)

    def fulfil(self, name: str) -> None:
        """Take a wish away that is fulfilled."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def interrupted(self) -> None:
        """Note that the job was stopped on purpose, so that this attempt does not count as a crash."""
        self._end("interrupted", self.retries)

    def _end(self, how: str, retries: int) -> None:
        _write_lock(self.lock_fd, {**_read_lock(self.lock_fd), "ended": how, "crashes": 0, "retries": retries})

    def close(self) -> None:
        """Give the export up."""
        os.close(self.lock_fd)
        os.close(self.fd)


def claim(directory: Path) -> Claim:
    """Claim an export for this process.

    Raise Busy if another process holds it, MigrationError (export_unsafe) if the lock is not a plain file of
    ours, OSError if the directory cannot be used.
    """
    fd = open_directory(directory)
    try:
        lock_fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o640, dir_fd=fd)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.ELOOP:
            raise _unsafe_lock(directory) from None
        raise
    try:
        status = os.fstat(lock_fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid not in (0, os.geteuid()):
            raise _unsafe_lock(directory)
        if status.st_uid == os.geteuid():
            os.fchmod(lock_fd, 0o640)  # whatever the umask: the group may look at who holds the claim
        deadline = time.monotonic() + CLAIM_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Busy(str(directory)) from None
                time.sleep(0.02)
        before = _read_lock(lock_fd)
        attempt, retries = _number(before, "attempt") + 1, _number(before, "retries")
        crashes = _crashes(before)
        _write_lock(
            lock_fd,
            {
                "attempt": attempt,
                "crashes": crashes,
                "retries": retries,
                "ended": None,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": timestamp(time.time()),
            },
        )
        os.fsync(fd)
        _remove_leftovers(fd)
        return Claim(directory, fd, lock_fd, attempt, crashes, retries)
    except BaseException:
        os.close(lock_fd)
        os.close(fd)
        raise


def holder(directory: Path) -> dict[str, Any]:
    """What the lock file says about the last process that claimed the export; {} if nobody ever did."""
    try:
        fd = os.open(directory / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return {}
    try:
        return _read_lock(fd)
    finally:
        os.close(fd)


def read_manifest(dir_fd: int, directory: Path, names: tuple[str, ...]) -> tuple[str, bytes]:
    """The name and the bytes of the first of `names` that is in a directory.

    Raise MigrationError if there is none, or if it is not a plain file that can be read.
    """
    name, data, problem, _ = _read_manifest(dir_fd, directory, names)
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


def write_durably(dir_fd: int, name: str, data: bytes, attempt: int) -> None:
    """Write a file so that after a crash it is the old one or the new one, whole.

    Raise OSError; then the old one is still there.
    """
    temporary = f".{name}.{attempt}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=dir_fd)
    try:
        try:
            os.fchmod(fd, 0o644)  # whatever the umask: reports are for reading
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        raise
    os.fsync(dir_fd)


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def open_directory(directory: Path) -> int:
    """A descriptor of an export's directory. Raise OSError, also for a symbolic link."""
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _unsafe_lock(directory: Path) -> MigrationError:
    return MigrationError(
        Code.EXPORT_UNSAFE,
        f"{directory / LOCK} is not a plain file that belongs to this service",
        "Somebody put it there. Find out who, then remove it.",
    )


def _remove_leftovers(dir_fd: int) -> None:
    """Remove the half-written reports of attempts that died; the claim makes them ours."""
    for name in os.listdir(dir_fd):
        if re.fullmatch(rf"\.{re.escape(REPORT)}\.\d+\.tmp", name):
            os.unlink(name, dir_fd=dir_fd)


def _probe_lock(dir_fd: int) -> tuple[bool, int, float]:
    """Whether the claim is held; and if not, how many attempts in a row died and when the last one began."""
    try:
        fd = os.open(LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    except PermissionError:
        raise  # who may not look cannot know, and must not be told "free"
    except OSError:
        return False, 0, 0.0
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True, 0, 0.0
        return False, _crashes(_read_lock(fd)), os.fstat(fd).st_mtime
    finally:
        os.close(fd)


def _read_lock(fd: int) -> dict[str, Any]:
    """The JSON in the lock file. It is written in place, so a crash can leave half of it: the number comes first."""
    data = os.pread(fd, 4096, 0)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        match = re.match(rb'\{"attempt": (\d+),', data)
        return {"attempt": int(match[1])} if match else {}
    return content if isinstance(content, dict) else {}


def _number(content: dict[str, Any], key: str) -> int:
    """A count in the lock file; 0 for what is none, as the file may have been planted."""
    value = content.get(key)
    return value if isinstance(value, int) and 0 <= value < 1 << 53 else 0


def _crashes(content: dict[str, Any]) -> int:
    """How many attempts in a row died, the last one included if it did not say how it ended."""
    return _number(content, "crashes") + (bool(content.get("attempt")) and content.get("ended") is None)


def _write_lock(fd: int, content: dict[str, Any]) -> None:
    """Write the JSON in the lock file in place (a rename would let a second process lock a new file), and fsync it."""
    data = json.dumps({"attempt": content.pop("attempt", 0), **content}).encode() + b"\n"
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, len(data))
    os.fsync(fd)


def _read_manifest(
    dir_fd: int, directory: Path, names: tuple[str, ...]
) -> tuple[str | None, bytes | None, Finding | None, float]:
    """Name, bytes, problem and modification time of the first manifest that is there."""
    for name in names:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
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
                return name, None, _unsafe_manifest(directory / name, "is not a regular file"), status.st_mtime
            if status.st_nlink != 1:
                return name, None, _unsafe_manifest(directory / name, "has a second name (hard link)"), status.st_mtime
            if status.st_size > SIZE_LIMIT:
                finding = Finding(
                    Code.MANIFEST_INVALID,
                    f"{directory / name} has {status.st_size} bytes; a manifest has at most {SIZE_LIMIT}",
                    "This is not a manifest. Export the VM again.",
                )
                return name, None, finding, status.st_mtime
            data = bytearray()
            while block := os.read(fd, SIZE_LIMIT + 1 - len(data)):
                data += block
            return name, bytes(data), None, status.st_mtime
        finally:
            os.close(fd)
    return None, None, None, 0.0


def _unsafe_manifest(path: Path, what: str) -> Finding:
    return Finding(
        Code.EXPORT_UNSAFE, f"{path} {what}", "A manifest is a plain file. Export the VM again into a new directory."
    )


@functools.lru_cache(maxsize=1024)  # a queue of a thousand is looked at again and again
def _disk_paths(data: bytes, name: str) -> tuple[tuple[str, ...], Finding | None]:
    """The disks that a manifest names, or what is wrong with it."""
    try:
        return tuple(disk.path for disk in parse(data, name).disks), None
    except ManifestError as error:
        return (), error.finding()


def _look_disks(dir_fd: int, paths: tuple[str, ...], newest: float) -> tuple[tuple[str, ...], float]:
    """Which disks are not there, and the newest modification time of those that are.

    Only whether they can be migrated is decided later, under the claim; here a name that is there is enough.
    """
    missing = []
    for path in paths:
        for candidate in (path, os.path.basename(path)):
            try:
                # An absolute path ignores dir_fd, which is what the exporter means by it.
                status = os.stat(candidate, dir_fd=dir_fd, follow_symlinks=False)
            except (OSError, ValueError):
                continue
            newest = max(newest, status.st_mtime)
            break
        else:
            missing.append(os.path.basename(path))
    return tuple(missing), newest


def _read_report(dir_fd: int, name: str = REPORT) -> dict[str, Any] | None:
    """The report as plain data; {} for a file that is not a report, which still means that nothing must be done."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    except OSError:
        return {}
    with open(fd, "rb") as file:
        try:
            data = file.read(REPORT_LIMIT + 1)
            content = json.loads(data) if len(data) <= REPORT_LIMIT else {}
        except (ValueError, OSError, RecursionError):
            return {}
    return content if isinstance(content, dict) else {}


def _look_report(found: Look, report: dict[str, Any]) -> Look:
    """Add to a look what the report says. The file may be anything: nothing in it is trusted to have a type."""
    status = str(report.get("status"))
    finding = None
    if status not in {*FINAL, State.RETRYING}:
        status = State.BLOCKED.value
        finding = Finding(
            Code.MANIFEST_CHANGED, f"{REPORT} is not a report of this program", "Move it away to have the VM migrated."
        )
    elif isinstance(error := report.get("error"), dict):
        code, message, hint = (str(error.get(key, "")) for key in ("code", "message", "hint"))
        finding = Finding(code, message, hint, str(error["field"]) if error.get("field") else None)
    try:
        due = datetime.fromisoformat(str(report.get("next_attempt_at"))).timestamp()
    except (ValueError, OverflowError):
        due = None
    manifest = report.get("manifest")
    return replace(
        found,
        report_status=status,
        report_sha256=manifest.get("sha256") if isinstance(manifest, dict) else None,
        report_finding=finding,
        next_attempt_at=due,
    )
