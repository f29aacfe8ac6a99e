"""The claim that makes an export ours, by a lock in it; needs nothing that takes long to import."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import socket
import stat
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyper2kvmd.errors import MEANING, Code, MigrationError
from hyper2kvmd.files import open_directory, open_file, remove_leftovers, timestamp, user_name, write_durably
from hyper2kvmd.queue.access import let_in, open_shared, pinned
from hyper2kvmd.queue.export import Export
from hyper2kvmd.queue.names import ASKED, CANCEL, CUTOVER, LOCK, PROGRESS, REPORT, SIGNED

if TYPE_CHECKING:
    from hyper2kvmd.report.model import Report

# A look at the lock takes it for an instant; a claimer that meets it there tries again for this long.
CLAIM_PATIENCE_SECONDS = 0.5
FILES_LIMIT = 1000  # of an export; a hostile one could have millions


def numbered(report: str, taken: Collection[str]) -> str:
    """The name that an earlier report is kept under: the first x.N.json, for x.json, that is not taken."""
    stem = report.removesuffix(".json")
    return next(name for n in itertools.count(1) if (name := f"{stem}.{n}.json") not in taken)


class Busy(Exception):
    """Another runner holds the claim."""


class Claim:
    """One export held by this process, until it and every tool that it handed the lock to are gone.

    `attempt` is the fencing number: whoever has the highest one owns the export. `crashes` is how many attempts in
    a row died, `retries` how many in a row ended for a passing cause; one that was stopped on purpose is neither.
    """

    def __init__(self, export: Export, lock_fd: int, attempt: int, crashes: int, retries: int) -> None:
        self.export = export
        self.lock_fd = lock_fd
        self.attempt = attempt
        self.crashes = crashes
        self.retries = retries

    def check(self) -> None:
        """Raise MigrationError (claim_lost) unless the claim is still ours. Comes before what cannot be undone."""
        try:
            os.fsync(self.lock_fd)  # on NFS this is what notices a lock that the server has given away
            ours, named = os.fstat(self.lock_fd), os.stat(LOCK, dir_fd=self.export.fd, follow_symlinks=False)
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
            f"the claim on {self.export.directory} (attempt {self.attempt}) was lost: {why}",
            f"Nothing was published. Never remove or edit {LOCK}; check the shared file system's lock service.",
        )

    def finish(self, report: Report, signature: bytes | None = None) -> None:
        """Write the report durably: it is complete under its name, or it is not there. Then the job is over.

        The signature of its bytes comes first: a report that can be seen has the one that it is to have. One without a
        report, after a crash, is overwritten by the next attempt.
        """
        self.check()
        if signature is None:
            self.fulfil(REPORT + SIGNED)  # which is that of an earlier attempt's report
        else:
            write_durably(self.export.fd, REPORT + SIGNED, signature, self.attempt)
        write_durably(self.export.fd, REPORT, report.to_bytes(), self.attempt)
        waits = report.error is not None and MEANING[Code(report.error.code)].patient
        self._end("reported", self.retries + (not waits) if report.status == "retrying" else 0)

    def forget(self) -> None:
        """Begin again: the report gets out of the way (`migration-report.N.json`), and no crash or retry counts.

        Raise OSError.
        """
        self.check()
        taken = os.listdir(self.export.fd)
        if REPORT in taken:
            name = numbered(REPORT, taken)
            # The signature first: after a crash between the two, the report gets the same name the next time.
            for suffix in (SIGNED, ""):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(REPORT + suffix, name + suffix, src_dir_fd=self.export.fd, dst_dir_fd=self.export.fd)
        self.fulfil(CANCEL)
        os.fsync(self.export.fd)
        self._end("retried", 0)

    def fulfil(self, name: str) -> None:
        """Take a file of ours away that has had its time, such as a wish that is fulfilled."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.export.fd)

    def interrupted(self) -> None:
        """Note that the job was stopped on purpose, so that this attempt does not count as a crash."""
        self._end("interrupted", self.retries)

    def _end(self, how: str, retries: int) -> None:
        _write_lock(self.lock_fd, {**_read_lock(self.lock_fd), "ended": how, "crashes": 0, "retries": retries})

    def close(self) -> None:
        """Give the export up."""
        os.close(self.lock_fd)
        os.close(self.export.fd)


def claim_export(directory: Path) -> Claim:
    """Claim an export for this process.

    Raise Busy if another process holds it, MigrationError (export_unsafe) if the lock is not a plain file of
    ours, OSError if the directory cannot be used.
    """
    fd = open_directory(directory)
    try:
        try:
            lock_fd = _open_lock(fd)
        except PermissionError:
            let_in(fd)
            with contextlib.suppress(FileNotFoundError), pinned(LOCK, dir_fd=fd) as (lock, status):
                # As a command of root's makes it where there is no service's user.
                if status is not None and status.st_uid == 0:
                    let_in(lock)
            lock_fd = _open_lock(fd)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.ELOOP:
            raise _unsafe_lock(directory) from None
        raise
    try:
        status = os.fstat(lock_fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise _unsafe_lock(directory)
        if status.st_uid not in (0, os.geteuid()):
            raise _foreign_lock(directory, status.st_uid)
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
        _let_in_files(fd)
        for name in (REPORT, REPORT + SIGNED, CUTOVER, ASKED, PROGRESS):
            remove_leftovers(fd, name)  # of attempts that died; the claim makes them ours
        return Claim(Export(directory, fd), lock_fd, attempt, crashes, retries)
    except BaseException:
        os.close(lock_fd)
        os.close(fd)
        raise


def _let_in_files(dir_fd: int) -> None:
    """Have the files of an export open to us, and to tools without our capabilities; who cannot says so later."""
    with os.scandir(dir_fd) as entries:
        for entry in itertools.islice(entries, FILES_LIMIT):
            if not os.access(entry.name, os.R_OK, dir_fd=dir_fd, effective_ids=True):
                with contextlib.suppress(OSError):
                    os.close(open_shared(entry.name, dir_fd=dir_fd))


def _open_lock(dir_fd: int) -> int:
    return os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o640, dir_fd=dir_fd)


def holder(directory: Path) -> dict[str, Any]:
    """What the lock file says about the last process that claimed the export; {} if nobody ever did."""
    try:
        fd = open_file(directory / LOCK)
    except OSError:
        return {}
    try:
        return _read_lock(fd)
    finally:
        os.close(fd)


def unwritable(export: Path, error: OSError) -> MigrationError:
    """What an error of the operating system means that keeps us from claiming an export, or from reporting."""
    return MigrationError(
        Code.EXPORT_UNWRITABLE,
        f"{export}: the lock and the report cannot be written there: {error.strerror}",
        "Give the user of the service write access (run it as the exporter's user with User= in a drop-in,"
        " or set an ACL), or free some space; the daemon retries it.",
    )


def _unsafe_lock(directory: Path) -> MigrationError:
    return MigrationError(
        Code.EXPORT_UNSAFE,
        f"{directory / LOCK} is not a plain file",
        "Somebody put it there. Find out who, then remove it.",
    )


def _foreign_lock(directory: Path, owner: int) -> MigrationError:
    """Another user's claim. To remove the lock would let two in at once."""
    them, us = user_name(owner), user_name(os.geteuid())
    return MigrationError(
        Code.EXPORT_UNSAFE,
        f"{directory / LOCK} belongs to {them}: only {them} may claim the export, and this is {us}",
        f"Leave the lock as it is. If the service runs as {them}, do this as root or as {them}. If it does not, find"
        f" out who put the lock there; when no process uses it (`fuser {directory / LOCK}`), remove it.",
    )


def probe(dir_fd: int) -> tuple[bool, int, float]:
    """Whether the claim on an open export is held; else how many attempts in a row died, and when the last began."""
    try:
        fd = open_file(LOCK, dir_fd=dir_fd)
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
