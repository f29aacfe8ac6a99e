"""Notifications that are still to be sent: the reports are the messages, a database knows which of them were delivered.

It lies in work_dir, on a local disk, and is written before and after each attempt, so after a crash a message may be
sent twice, but never not at all. A message has an id, the same whenever it is sent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import structlog

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import existing_parent
from hyper2kvmd.notify.channels import APPRISE, HOOK, SERVICE, Channel, channels
from hyper2kvmd.notify.delivery import Undelivered
from hyper2kvmd.notify.message import Ended, ended
from hyper2kvmd.queue import facts
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()

STATE = "notified.sqlite"
LOCK = "notified.lock"
HOOKS = f"{HOOK}*"
# What hangs holds up the rest for so long at most: then the hooks make way for the next receiver, and the last one for
# the next run.
PHASE_SECONDS = 300.0
STRIKES = 3  # a receiver that fails so many times in a row is left alone until later
SHORTEST_DELAY = 1.0
_REPORTS = re.compile(r"(migration|cutover)-report(\.\d+)?\.json")  # those that `retry` moved away included


# What was delivered --------------------------------------------------------------------------------------------

_SCHEMA = (
    # One row. What ended before `since` counts as delivered; `given_up` counts what never was.
    "CREATE TABLE history (since REAL NOT NULL, given_up INTEGER NOT NULL DEFAULT 0)",
    # The report files that were seen. `file` tells one apart from every other in its export; `id` is that of its
    # message, NULL if it has none; `gone_at` is since when it is not there any more.
    """CREATE TABLE reports (number INTEGER PRIMARY KEY, export TEXT NOT NULL, file TEXT NOT NULL, id TEXT UNIQUE,
        ended_at REAL, gone_at REAL, UNIQUE (export, file))""",
    # What is still to be sent to whom: how many attempts there were, and when the next one is due.
    """CREATE TABLE todo (report INTEGER NOT NULL, channel TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
        due REAL NOT NULL DEFAULT 0, PRIMARY KEY (report, channel))""",
)  # times are in seconds since the epoch
_STANDING = """SELECT (SELECT min(due) FROM todo JOIN reports ON report = number WHERE gone_at IS NULL),
    (SELECT count(*) FROM todo), given_up FROM history"""
_DUE = """SELECT number, id, channel, attempts, due FROM todo JOIN reports ON report = number
    WHERE channel GLOB ? AND due <= ? ORDER BY due, ended_at, id, channel"""
_FORGOTTEN = """SELECT id, count(*), group_concat(channel, ', ') FROM todo JOIN reports ON report = number
    WHERE gone_at <= ? GROUP BY number"""
_INSERT = "INSERT INTO reports (export, file, id, ended_at) VALUES (?, ?, ?, ?) RETURNING number"
_KEEP = "UPDATE todo SET attempts = ?, due = ? WHERE report = ? AND channel = ?"
_POSTPONE = "UPDATE todo SET due = max(due, ?) WHERE report = ?"
_POSTPONE_ONE = f"{_POSTPONE} AND channel = ?"
# What waits for all services, now that they are known.
_EXPAND = "INSERT OR IGNORE INTO todo (report, channel) SELECT report, ? FROM todo WHERE channel = ?"
_ERRNO = {
    sqlite3.SQLITE_BUSY: errno.EAGAIN,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EACCES,
}


@dataclass(frozen=True)
class Standing:
    """How it stands: how much is `pending`, what was `given_up` in all, and when the next run is `due`.

    `due` is in seconds since the epoch, None if nothing waits. `known`: whether that could be read at all.
    """

    due: float | None = None
    pending: int = 0
    given_up: int = 0
    known: bool = field(default=True, compare=False)


def standing(settings: Settings) -> Standing:
    """How it stands; cheap enough for every tick. Writes nothing, and never raises."""
    try:
        with contextlib.closing(_open(settings, "ro")) as db:
            return Standing(*db.execute(_STANDING).fetchone())
    except (sqlite3.Error, OSError, TypeError) as error:
        # A run was killed while it wrote: the next one puts the database right, and is due.
        half = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK
        return Standing(due=time.time() if half else None, known=False)


def begin(settings: Settings) -> None:
    """Notify of what ends from now on. Does nothing if that was so already. Raise OSError."""
    # A damaged one is the next run's to complain about.
    with contextlib.suppress(BlockingIOError, MigrationError), _locked(settings):
        pass


@contextlib.contextmanager
def _touching(settings: Settings) -> Iterator[None]:
    """Have the rights of work_dir's owner: SQLite follows links and old journals, and root must not follow theirs.

    Raise OSError, or MigrationError (io_error) for a database that is damaged.
    """
    root = os.geteuid() == 0
    if root:
        os.seteuid(existing_parent(settings.work_dir).stat().st_uid)
    try:
        yield
    except sqlite3.DatabaseError as error:
        if number := _ERRNO.get(getattr(error, "sqlite_errorcode", 0) & 0xFF):
            raise OSError(number, os.strerror(number), STATE) from error
        raise MigrationError(
            Code.IO_ERROR,
            f"{settings.work_dir / STATE} is damaged, so nobody knows which messages were delivered",
            "Restore it, or remove it: then no message is sent for jobs that have ended by now.",
        ) from None
    finally:
        if root:
            os.seteuid(0)


def _open(settings: Settings, mode: Literal["ro", "rw"]) -> sqlite3.Connection:
    return sqlite3.connect(f"{(settings.work_dir / STATE).absolute().as_uri()}?mode={mode}", uri=True)


def _prepare(db: sqlite3.Connection) -> None:
    """Check that the database is whole, and make its tables if it has none."""
    if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
        raise sqlite3.DatabaseError
    if db.execute("SELECT * FROM sqlite_schema").fetchone():
        return
    with db:
        db.execute("BEGIN")
        for table in _SCHEMA:
            db.execute(table)
        db.execute("INSERT INTO history (since) VALUES (?)", (time.time(),))


@contextlib.contextmanager
def _locked(settings: Settings) -> Iterator[sqlite3.Connection]:
    """Hold the lock by which one process tells at a time. Raise BlockingIOError, and like _touching()."""
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _touching(settings):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            for name in (STATE, LOCK):
                fd = os.open(f"{settings.work_dir}/{name}", flags, 0o644)
                stack.callback(os.close, fd)
                if os.fstat(fd).st_uid == os.geteuid():
                    os.fchmod(fd, 0o644)  # whatever the umask; SQLite's journal gets the same
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            db = stack.enter_context(contextlib.closing(_open(settings, "rw")))
            # What is committed stays so: FULL, the default, leaves the journal's removal to chance. Not WAL: nobody
            # could look without writing.
            db.execute("PRAGMA synchronous = EXTRA")
            _prepare(db)
        yield db


# Looking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delivery:
    """One message that is due at one receiver, by the name of its channel."""

    path: Path
    report: int
    id: str
    channel: str
    attempts: int
    due: float


def _look(settings: Settings, db: sqlite3.Connection, channels: dict[str, Channel]) -> dict[int, Path]:
    """Bring the database up to what is in the exports now; the paths of the reports, by their numbers.

    While nobody can know the services of apprise, `channels` gets those that something waits for.
    """
    with _touching(settings):
        (since,) = db.execute("SELECT since FROM history").fetchone()
        seen = db.execute("SELECT number, export, file, gone_at FROM reports").fetchall()
    known = {(export, file): number for number, export, file, _ in seen}
    paths: dict[int, Path] = {}
    new = []
    unreadable = set()
    for export in facts.exports(settings)[0]:
        try:
            files = _files(export)
        except FileNotFoundError:
            continue
        except OSError:
            unreadable.add(export.name)  # so nobody can say that a report is gone
            continue
        for path, file in files:
            if number := known.get((export.name, file)):
                paths[number] = path
            elif found := _new(settings, since, channels, path):
                new.append((path, file, *found))
    now = time.time()
    with _touching(settings), db:
        for path, file, id, ended_at, todo in new:
            row = db.execute("SELECT number FROM reports WHERE id = ?", (id,)).fetchone()
            if row:  # copied or restored: another file, the same message
                db.execute("UPDATE reports SET export = ?, file = ? WHERE number = ?", (path.parent.name, file, *row))
            else:
                row = db.execute(_INSERT, (path.parent.name, file, id, ended_at)).fetchone()
                db.executemany("INSERT INTO todo (report, channel) VALUES (?, ?)", [(*row, to) for to in todo])
            paths[row[0]] = path
        for number, export, _, gone_at in seen:
            there = number in paths
            if not there and export in unreadable:
                db.execute(_POSTPONE, (now + _delay(settings, 1), number))
            elif there != (gone_at is None):
                # Not forgotten at once: an exports directory that is not mounted is empty, and comes back.
                db.execute("UPDATE reports SET gone_at = ? WHERE number = ?", (None if there else now, number))
        if unknown := channels.get(APPRISE):
            waiting = db.execute("SELECT DISTINCT channel FROM todo WHERE channel GLOB ?", (f"{SERVICE}*",)).fetchall()
            channels.update({name: replace(unknown, name=name) for (name,) in waiting})
        else:
            db.executemany(_EXPAND, [(name, APPRISE) for name in channels if name.startswith(SERVICE)])
        # Of what was taken away meanwhile, nothing more is sent.
        db.execute(f"DELETE FROM todo WHERE channel NOT IN ({', '.join('?' * len(channels))})", [*channels])
        oldest = now - settings.retention.work_days * 86400
        for id, count, names in db.execute(_FORGOTTEN, (oldest,)).fetchall():
            db.execute("UPDATE history SET given_up = given_up + ?", (count,))
            log.warning("given up: the report is gone", message_id=id, channels=names)
        db.execute("DELETE FROM reports WHERE gone_at <= ? OR (id IS NULL AND gone_at IS NOT NULL)", (oldest,))
        db.execute("DELETE FROM todo WHERE report NOT IN (SELECT number FROM reports)")
    return paths


def _files(export: Path) -> list[tuple[Path, str]]:
    """The report files of an export, each with what tells it apart; the oldest first."""
    found = []
    with os.scandir(export) as names:
        for name in names:
            if _REPORTS.fullmatch(name.name) and name.is_file(follow_symlinks=False):
                status = name.stat(follow_symlinks=False)
                key = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
                found.append((status.st_mtime_ns, export / name.name, key))
    return [(path, key) for _, path, key in sorted(found)]


def _new(
    settings: Settings, since: float, channels: dict[str, Channel], path: Path
) -> tuple[str | None, float | None, list[str]] | None:
    """The id and time of the message of a report that was never seen, and its receivers; None if it is unreadable."""
    try:
        report = facts.read_report(path.parent, path.name)
    except OSError:
        return None
    if not report:
        return None
    message = ended(path, report)
    if message is None:
        return None, None, []
    # Each host notifies of its own jobs, so that two on one directory do not send everything twice.
    if message.at < since or message.teller != socket.gethostname():
        return message.id, message.at, []
    return message.id, message.at, [name for name, channel in channels.items() if channel.wants(message)]


def _phases(channels: dict[str, Channel]) -> list[str]:
    """The patterns of those that are served one after the other: all hooks, then everybody else by himself."""
    return [*dict.fromkeys(HOOKS if channel.is_hook else name for name, channel in channels.items())]


def _due(settings: Settings, db: sqlite3.Connection, paths: dict[int, Path], phase: str, now: float) -> list[Delivery]:
    """What is due, in the order in which it became so; hooks of one job in the order of their names."""
    with _touching(settings):
        found = db.execute(_DUE, (phase, now)).fetchall()
    return [Delivery(paths[number], number, *values) for number, *values in found if number in paths]


def pending(settings: Settings) -> list[tuple[str, str]]:
    """What a run would send now: the id of each message, and its receiver. Changes nothing. Raise like `send`."""
    now = time.time()
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        with _touching(settings):
            if (settings.work_dir / STATE).exists():
                with contextlib.closing(_open(settings, "rw")) as file:
                    file.backup(db)
            _prepare(db)
        receivers = channels(settings, Tools())
        paths = _look(settings, db, receivers)
        return [(one.id, one.channel) for phase in _phases(receivers) for one in _due(settings, db, paths, phase, now)]


# Sending -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one run did."""

    delivered: int
    failed: int
    standing: Standing


def send(settings: Settings, tools: Tools) -> Result:
    """Send everything that is due, the hooks first: a receiver that hangs does not hold them up.

    Raise BlockingIOError if another process sends, OSError, or MigrationError (io_error, hook_failed) if it cannot be
    known what is to be sent to whom. What a receiver does wrong is logged, and tried again later.
    """
    now = time.time()
    with _locked(settings) as db:
        receivers = channels(settings, tools)
        paths = _look(settings, db, receivers)
        delivered = failed = 0
        for phase in _phases(receivers):
            deadline, strikes, postponed = time.monotonic() + PHASE_SECONDS, 0, []
            for one in _due(settings, db, paths, phase, now):
                if time.monotonic() > deadline:
                    break
                message = None if phase != HOOKS and strikes == STRIKES else _reread(one)
                if message is None:
                    postponed.append(one)  # which is no attempt
                    continue
                good = _attempt(settings, db, one, message, receivers[one.channel])
                delivered, failed = delivered + good, failed + (not good)
                strikes = 0 if good else strikes + 1
            later = time.time() + _delay(settings, 1)
            with _touching(settings), db:
                db.executemany(_POSTPONE_ONE, [(later, one.report, one.channel) for one in postponed])
    return Result(delivered, failed, standing(settings))


def _attempt(settings: Settings, db: sqlite3.Connection, one: Delivery, message: Ended, channel: Channel) -> bool:
    """Send one message to one receiver; whether it took it."""
    limit = channel.max_attempts
    attempt, delay = one.attempts + 1, _delay(settings, one.attempts + 1)

    def keep(attempts: int, due: float) -> None:
        with _touching(settings), db:
            db.execute(_KEEP, (attempts, due, one.report, one.channel))

    def write_off(given_up: bool) -> None:
        with _touching(settings), db:
            db.execute("DELETE FROM todo WHERE report = ? AND channel = ?", (one.report, one.channel))
            db.execute("UPDATE history SET given_up = given_up + ?", (given_up,))

    with structlog.contextvars.bound_contextvars(job_id=message.job, vm=message.vm):
        words = {"message_id": message.id, "receiver": one.channel}
        try:
            if attempt > limit:
                raise MigrationError(Code.RUNNER_CRASHED, "every attempt was killed", "See the journal of that time.")
            keep(attempt, time.time() + delay)  # first, so that one that kills us every time is given up, too
            channel.deliver(message)
        except KeyboardInterrupt:
            keep(one.attempts, one.due)  # stopped on purpose: it does not count
            raise
        except (Undelivered, MigrationError, OSError) as error:
            reason, hint = (str(error), "") if isinstance(error, OSError) else (error.message, error.hint)
            if attempt < limit:
                keep(attempt, time.time() + delay)
                log.warning(
                    "notification not delivered",
                    reason=reason,
                    hint=hint,
                    **words,
                    next_attempt_in_seconds=round(delay),
                )
            else:
                write_off(given_up=True)
                log.warning("notification given up", reason=reason, hint=hint, **words)
            return False
        write_off(given_up=False)
        log.info("notification delivered", **words)
        return True


def _reread(one: Delivery) -> Ended | None:
    """The message; None if its report was changed or moved since we looked: the next look says more."""
    try:
        report = facts.read_report(one.path.parent, one.path.name)
    except OSError:
        return None
    message = ended(one.path, report) if report else None
    return message if message is not None and message.id == one.id else None


def _delay(settings: Settings, attempt: int) -> float:
    return max(settings.retry.delay(attempt), SHORTEST_DELAY)
