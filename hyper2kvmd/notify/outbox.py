"""What is over and was not told yet: the reports beside the manifests are the messages, a file says which were told.

That file, in work_dir, is written before and after each attempt, so a crash can have something told twice, never not.
A message is known by its id, the same whenever it is told.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog

from hyper2kvmd import journal
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import open_directory, write_durably
from hyper2kvmd.notify import hooks, webhook
from hyper2kvmd.notify.message import Ended, ended
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.names import LOG
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

log = structlog.get_logger()

STATE = "notified.jsonl"
LOCK = "notified.lock"
WEBHOOK, HOOK = "webhook", "post-job/"  # what a message is told to: the webhook, or a hook by its name
HOOK_ATTEMPTS = 2
# What hangs holds up the rest for so long at most: then the hooks make way for the webhook, and that for the next run.
PHASE_SECONDS = 300.0
STRIKES = 3  # a receiver that fails so many times in a row is left alone until later
SHORTEST_DELAY = 1.0
_REPORTS = re.compile(r"migration-report(\.\d+)?\.json")  # those that `retry` moved away included


# What was told -------------------------------------------------------------------------------------------------


@dataclass
class Due:
    """One thing that is still to be done: how many attempts there were, and when the next one is due (epoch)."""

    attempts: int = 0
    at: float = 0.0


@dataclass
class Entry:
    """One report file that was seen. `file` tells it apart from every other in its export.

    `id` is that of its message, "" if it has none. `todo` is whom it is still to be told. `gone_at` is since when the
    file is not there any more.
    """

    export: str
    file: str
    id: str = ""
    at: float = 0.0
    gone_at: float | None = None
    todo: dict[str, Due] = field(default_factory=dict)


@dataclass
class State:
    """What the state file holds. What ended before `since` counts as told. `given_up` counts what was never told."""

    since: float
    given_up: int = 0
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Standing:
    """How it stands: how much is `pending`, what was `given_up` in all, and when the next run is `due`.

    `due` is in seconds since the epoch, None if nothing waits.
    """

    due: float | None = None
    pending: int = 0
    given_up: int = 0


def standing(settings: Settings) -> Standing:
    """How it stands, from the first line of the state file: cheap enough for every tick. Never raises."""
    try:
        with (settings.work_dir / STATE).open("rb") as file:
            return Standing(**json.loads(file.readline(4096))["standing"])
    except (OSError, ValueError, KeyError, TypeError):
        return Standing()


def begin(settings: Settings) -> None:
    """Have what ends from now on be told. Does nothing if that was so already. Raise OSError."""
    with contextlib.suppress(BlockingIOError), _locked(settings) as dir_fd:
        if not (settings.work_dir / STATE).exists():
            _write(dir_fd, State(time.time()))


@contextlib.contextmanager
def _locked(settings: Settings) -> Iterator[int]:
    """Hold the lock by which one process tells at a time; yield work_dir. Raise BlockingIOError, OSError."""
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        dir_fd = os.open(settings.work_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, dir_fd)
        fd = os.open(LOCK, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=dir_fd)
        stack.callback(os.close, fd)
        if os.fstat(fd).st_uid == os.geteuid():
            os.fchmod(fd, 0o644)  # whatever the umask: root and the service take turns
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield dir_fd


def _read(settings: Settings) -> State | None:
    """The state; None before the first run. Raise OSError, or MigrationError (io_error) for a file that is damaged."""
    path = settings.work_dir / STATE
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            state = State(head["since"], head["standing"]["given_up"])
            for line in file:
                shape = json.loads(line)
                todo = {channel: Due(**due) for channel, due in shape.pop("todo").items()}
                state.entries.append(Entry(**shape, todo=todo))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MigrationError(
            Code.IO_ERROR,
            f"{path} is damaged, so nobody knows what was told",
            "Restore it, or remove it: then all that has ended by now counts as told.",
        ) from None
    return state


def _write(dir_fd: int, state: State) -> None:
    waiting = [due.at for entry in state.entries if entry.gone_at is None for due in entry.todo.values()]
    pending = sum(len(entry.todo) for entry in state.entries)
    head = {"since": state.since, "standing": asdict(Standing(min(waiting, default=None), pending, state.given_up))}
    lines = (json.dumps(shape) for shape in (head, *map(_shape, state.entries)))
    with contextlib.suppress(FileNotFoundError):  # of one that was killed; the lock makes it ours
        os.unlink(f".{STATE}.0.tmp", dir_fd=dir_fd)
    write_durably(dir_fd, STATE, "\n".join(lines).encode() + b"\n", 0)


def _shape(entry: Entry) -> dict[str, Any]:
    # By hand, as asdict() takes a third of a second for ten thousand of them.
    return {**vars(entry), "todo": {channel: vars(due) for channel, due in entry.todo.items()}}


# Looking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Telling:
    """One message that is due at one receiver. `channel` is WEBHOOK, or HOOK with the name of a hook."""

    entry: Entry
    channel: str
    path: Path


def _channels(settings: Settings) -> dict[str, Path | None]:
    """What messages are told to, hooks with their files. Raise MigrationError (hook_failed)."""
    found: dict[str, Path | None] = {HOOK + hook.name: hook for hook in hooks.found(settings.hooks, "post-job")}
    return {**found, WEBHOOK: None} if settings.notify.webhook.is_set else found


def _look(settings: Settings, state: State, channels: dict[str, Path | None], now: float) -> dict[int, Path]:
    """Bring the state up to what is in the exports now; the paths of the reports, by id() of their entries."""
    by_file = {(entry.export, entry.file): entry for entry in state.entries}
    by_id = {entry.id: entry for entry in state.entries if entry.id}
    paths: dict[int, Path] = {}
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
            entry = by_file.get((export.name, file))
            if entry is None:
                entry = _new(settings, state.since, channels, path, file)
                if entry is None:
                    continue
                if entry.id in by_id:  # copied or restored: another file, the same message
                    known = by_id[entry.id]
                    known.export, known.file = entry.export, entry.file
                    entry = known
                else:
                    state.entries.append(entry)
                    by_id.update({entry.id: entry} if entry.id else {})
            paths[id(entry)] = path
    keep = []
    oldest = now - settings.retention.work_days * 86400
    for entry in state.entries:
        if id(entry) in paths:
            entry.gone_at = None
        elif entry.export in unreadable:
            _postpone(settings, entry)
        else:
            # Not at once: an exports directory that is not mounted is empty, and comes back.
            entry.gone_at = now if entry.gone_at is None else entry.gone_at
        # Of what was taken away meanwhile, nothing more is told.
        entry.todo = {channel: due for channel, due in entry.todo.items() if channel in channels}
        if entry.gone_at is None or (entry.id and entry.gone_at > oldest):
            keep.append(entry)
        elif entry.todo:
            state.given_up += len(entry.todo)
            log.warning("given up: the report is gone", message_id=entry.id, channels=", ".join(entry.todo))
    state.entries = keep
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


def _new(settings: Settings, since: float, channels: dict[str, Path | None], path: Path, file: str) -> Entry | None:
    """An entry for a report that was never seen; None if it cannot be read now."""
    try:
        report = facts.read_report(path.parent, path.name)
    except OSError:
        return None
    if not report:
        return None
    entry = Entry(path.parent.name, file)
    message = ended(path, report)
    if message is None:
        return entry
    entry.id, entry.at = message.id, message.at
    # Each host tells of its own jobs, so that two on one directory do not tell everything twice.
    if message.at >= since and message.host == socket.gethostname():
        told = message.status in settings.notify.webhook.events
        entry.todo = {channel: Due() for channel in channels if channel != WEBHOOK or told}
    return entry


def _due(state: State, paths: dict[int, Path], prefix: str, now: float) -> list[Telling]:
    """What is due, in the order in which it became so; hooks of one job in the order of their names."""
    found = [
        Telling(entry, channel, paths[id(entry)])
        for entry in state.entries
        if id(entry) in paths
        for channel, due in entry.todo.items()
        if channel.startswith(prefix) and due.at <= now
    ]
    return sorted(found, key=lambda one: (one.entry.todo[one.channel].at, one.entry.at, one.entry.id, one.channel))


def untold(settings: Settings) -> list[tuple[str, str]]:
    """What a run would tell now: the id of each message, and its receiver. Changes nothing. Raise like `tell`."""
    now = time.time()
    state = _read(settings) or State(now)
    paths = _look(settings, state, _channels(settings), now)
    return [(one.entry.id, one.channel) for prefix in (HOOK, WEBHOOK) for one in _due(state, paths, prefix, now)]


# Telling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one run did."""

    told: int
    failed: int
    standing: Standing


def tell(settings: Settings, tools: Tools) -> Result:
    """Tell everything that is due, the hooks first: a receiver that hangs does not hold them up.

    Raise BlockingIOError if another process tells, OSError, or MigrationError (io_error, hook_failed) if it cannot be
    known what is to be told to whom. What a receiver does wrong is logged, and tried again later.
    """
    now = time.time()
    with _locked(settings) as dir_fd:
        channels = _channels(settings)
        state = _read(settings) or State(now)
        paths = _look(settings, state, channels, now)

        def save() -> None:
            _write(dir_fd, state)

        save()
        told = failed = 0
        for prefix in (HOOK, WEBHOOK):
            deadline, strikes = time.monotonic() + PHASE_SECONDS, 0
            waiting = _due(state, paths, prefix, now)
            for number, one in enumerate(waiting):
                if time.monotonic() > deadline:
                    break
                if prefix == WEBHOOK and strikes == STRIKES:
                    for other in waiting[number:]:
                        _postpone(settings, other.entry)
                    save()
                    break
                message = _reread(one)
                if message is None:
                    _postpone(settings, one.entry)
                    continue
                good = _attempt(settings, tools, state, one, message, channels[one.channel], save)
                told, failed = told + good, failed + (not good)
                strikes = 0 if good else strikes + 1
    return Result(told, failed, standing(settings))


def _attempt(
    settings: Settings,
    tools: Tools,
    state: State,
    one: Telling,
    message: Ended,
    hook: Path | None,
    save: Callable[[], None],
) -> bool:
    """Tell one message to one receiver, the webhook if `hook` is None; whether it took it."""
    limit = HOOK_ATTEMPTS if hook else settings.notify.webhook.max_attempts
    before = one.entry.todo.pop(one.channel)
    attempt, delay = before.attempts + 1, _delay(settings, before.attempts + 1)
    with structlog.contextvars.bound_contextvars(job_id=message.job, vm=message.vm):
        words = {"message_id": message.id, "receiver": one.channel}
        try:
            if attempt > limit:
                raise MigrationError(Code.RUNNER_CRASHED, "every attempt was killed", "See the journal of that time.")
            # First, so that one that kills us every time is given up, too.
            one.entry.todo[one.channel] = Due(attempt, time.time() + delay)
            save()
            if hook is None:
                webhook.post(settings.notify.webhook, message.message())
            else:
                _run(settings, tools, hook, message)
        except KeyboardInterrupt:
            one.entry.todo[one.channel] = before  # stopped on purpose: it does not count
            save()
            raise
        except (webhook.Undelivered, MigrationError, OSError) as error:
            reason, hint = (str(error), "") if isinstance(error, OSError) else (error.message, error.hint)
            if attempt < limit:
                one.entry.todo[one.channel] = Due(attempt, time.time() + delay)
                log.warning("not told", reason=reason, hint=hint, **words, next_attempt_in_seconds=round(delay))
            else:
                one.entry.todo.pop(one.channel, None)
                state.given_up += 1
                log.warning("not told, and given up", reason=reason, hint=hint, **words)
            save()
            return False
        del one.entry.todo[one.channel]
        save()
        log.info("told", **words)
        return True


def _reread(one: Telling) -> Ended | None:
    """The message; None if its report was changed or moved since we looked: the next look says more."""
    try:
        report = facts.read_report(one.path.parent, one.path.name)
    except OSError:
        return None
    message = ended(one.path, report) if report else None
    return message if message is not None and message.id == one.entry.id else None


def _postpone(settings: Settings, entry: Entry) -> None:
    """Have nothing of an entry told for a while. That is no attempt."""
    for due in entry.todo.values():
        due.at = max(due.at, time.time() + _delay(settings, 1))


def _delay(settings: Settings, attempt: int) -> float:
    return max(settings.retry.delay(attempt), SHORTEST_DELAY)


def _run(settings: Settings, tools: Tools, hook: Path, message: Ended) -> None:
    """Run a hook, and put what it says into the log of its job as well."""
    export = message.path.parent
    environment = hooks.variables(export, message.vm, message.status, message.job)
    before = structlog.get_config()
    with contextlib.ExitStack() as stack:
        dir_fd = open_directory(export)
        stack.callback(os.close, dir_fd)
        if (log_fd := journal.also_to(dir_fd, LOG)) is not None:
            stack.callback(os.close, log_fd)
        stack.callback(lambda: structlog.configure(**before))
        hooks.run(
            tools,
            hook,
            json.dumps(message.report).encode(),
            {**environment, "H2K_REPORT": str(message.path), "H2K_ID": plain(message.id, 400)},
            settings.hooks.timeout_seconds,
        )
