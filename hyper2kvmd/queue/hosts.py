"""The hosts that work on one exports directory: each writes a small file there, so that every one sees all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from hyper2kvmd import __version__
from hyper2kvmd.errors import Code, Finding
from hyper2kvmd.files import existing_parent, open_directory, open_file, user_name, write_whole
from hyper2kvmd.memory import available
from hyper2kvmd.queue.names import DRAIN, HOSTS
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import duration, plain

LIMIT = 1 << 20  # of a file; a planted one may be anything
SAID_LIMIT = 1000  # exports of which a host says why it does not take them
MISSED = 3  # a host that missed so many of its beats is taken for gone
SKEW_SECONDS = 10.0
HOSTS_LIMIT = 1000


@dataclass(frozen=True)
class Beat:
    """What a host says of itself. Sizes are in bytes; None is not known.

    state: running, draining (starts no job), stopped (its daemon ended), or runner (there is no daemon, but jobs of an
    engine). interval: seconds until it says so again. clock: its own, in seconds since the epoch. waits: of exports
    that it sees queued, by the name of their directories, why it does not start them.
    """

    host: str
    state: Literal["running", "draining", "stopped", "runner"]
    interval: float
    clock: float
    version: str = __version__
    engine: str = "local"
    workers: int = 0
    output_free: int | None = None
    work_free: int | None = None
    memory_mb: int | None = None
    kvm: bool | None = None
    waits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A host as another one sees it: what it said, how many seconds ago, and what is to be known of it."""

    beat: Beat
    age: float
    drained: bool

    @property
    def gone(self) -> bool:
        """Whether it has missed so many beats that it is taken for dead, or cut off."""
        return self.beat.state in ("running", "draining") and self.late

    @property
    def late(self) -> bool:
        """Whether it has missed so many beats. A host without a daemon does, as soon as no job runs there."""
        return self.age > MISSED * self.beat.interval

    @property
    def starts_jobs(self) -> bool:
        """Whether its daemon starts jobs: with an engine, it does so for other hosts while its own is drained."""
        return self.state == "running" or (
            self.beat.state == "running" and self.beat.engine != "local" and not self.gone
        )

    @property
    def state(self) -> str:
        """One word for people."""
        return "gone" if self.gone else "draining" if self.drained and self.beat.state != "stopped" else self.beat.state


def this_host() -> str:
    """The name by which this host is known to the others."""
    return socket.gethostname()


def measured(settings: Settings, state: Literal["running", "draining", "stopped", "runner"], interval: float) -> Beat:
    """What this host can say of itself without asking anybody."""

    def free(directory: Path) -> int | None:
        try:
            return shutil.disk_usage(existing_parent(directory)).free
        except OSError:
            return None

    memory = available()
    return Beat(
        host=this_host(),
        state=state,
        interval=interval,
        clock=time.time(),
        engine=settings.dispatch.engine,
        workers=settings.workers,
        output_free=free(settings.output_dir),
        work_free=free(settings.work_dir),
        memory_mb=None if memory is None else memory.mb,
    )


def beat(settings: Settings, said: Beat) -> None:
    """Say that this host is there. Raise OSError.

    The file's own time, which is the file server's for all hosts, says when; so the clocks of hosts need not agree.
    """
    directory = settings.exports_dir / HOSTS
    make_directory(settings)
    shape = {**asdict(said), "waits": dict(list(said.waits.items())[:SAID_LIMIT])}
    fd = open_directory(directory)
    try:
        name = f"{_file_name(said.host)}.json"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f".{name}.{os.getpid()}.tmp", dir_fd=fd)  # of a process that died and had our number
        write_whole(fd, name, json.dumps(shape).encode(), os.getpid())
    finally:
        os.close(fd)


def beat_for_runner(settings: Settings, interval: float) -> None:
    """Say that this host is there, if no daemon says it: jobs run here that an engine started. Raise OSError."""
    own = [seen for seen in all_hosts(settings, time.time()) if seen.beat.host == this_host()]
    if all(seen.gone or seen.beat.state in ("runner", "stopped") for seen in own):
        beat(settings, measured(settings, "runner", interval))


def make_directory(settings: Settings) -> None:
    """Make the directory in which hosts say something, if it is not there. Raise OSError."""
    directory = settings.exports_dir / HOSTS
    with contextlib.suppress(FileExistsError):
        directory.mkdir()
        directory.chmod(0o755)  # whatever the umask: everybody may see the hosts, and only the service says something


def other_number(settings: Settings) -> Finding | None:
    """What to say if hosts report as a user of another number, whose locks and reports this one cannot write."""
    directory, us = settings.exports_dir / HOSTS, os.geteuid()
    try:
        owner = os.lstat(directory).st_uid
    except OSError:
        return None
    if owner == us or os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        return None
    message = f"{user_name(us)} is number {us} here, and another host reports as number {owner} in {HOSTS}"
    hint = (
        "Give the service's user, and hypersdk, the same number on all hosts: see step 1 of docs/hosts.md. Locks and"
        " reports on the share belong to that number."
    )
    return Finding("user_number", message, hint)


def draining_all(settings: Settings) -> bool:
    """Whether somebody asked that no job is started any more on any host."""
    return os.path.lexists(settings.exports_dir / DRAIN)


def all_hosts(settings: Settings, now: float) -> list[Seen]:
    """Every host that ever said something, by name. now: seconds since the epoch. Raise OSError."""
    directory = settings.exports_dir / HOSTS
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    drained = _drained(names)
    everywhere = draining_all(settings)  # which a host says itself only a little later
    found = []
    for name in [name for name in names if name.endswith(".json") and not name.startswith(".")][:HOSTS_LIMIT]:
        with contextlib.suppress(OSError):
            fd = open_file(directory / name)
            try:
                written, data = os.fstat(fd).st_mtime, os.read(fd, LIMIT)
            finally:
                os.close(fd)
            if (said := _beat(data)) is not None:
                if everywhere and said.state == "running":
                    said = replace(said, state="draining")
                found.append(Seen(said, max(now - written, 0.0), _file_name(said.host) in drained))
    return found


def skew(seen: Seen, now: float) -> float:
    """By how many seconds the clock of a host is ahead of the file server's, when it last said something."""
    return seen.beat.clock - (now - seen.age)


def wrong_clock(host: str, ahead: float) -> Finding | None:
    """What to say of a host whose clock is so many seconds ahead of the file server's; None if it is near enough."""
    if abs(ahead) <= SKEW_SECONDS:
        return None
    way = "ahead of" if ahead > 0 else "behind"
    message = f"the clock of {host} is {duration(abs(ahead))} {way} that of the file server"
    return Finding("host_clock", message, "Let NTP set it: the clock decides when jobs are retried.")


def untaken(export: Path, hosts: Sequence[Seen]) -> Finding | None:
    """Why no host starts a queued export: there is none, or each of them has said why. hosts: all that are known."""
    working = [seen for seen in hosts if seen.starts_jobs]
    if hosts and not working:
        said = ", ".join(f"{seen.beat.host} is {seen.state}" for seen in hosts if seen.beat.state != "runner")
        hint = (
            "After a drain, run `hyper2kvmctl resume`, or `resume --host HOST` for one host. Where the daemon is"
            " stopped or gone, run `systemctl start hyper2kvmd`."
        )
        return Finding("no_host", "no host starts jobs" + (f": {said}" if said else ""), hint)
    why = {seen.beat.host: seen.beat.waits.get(export.name) for seen in working}
    if not why or None in why.values():
        return None
    said = "; ".join(f"{host}: {text}" for host, text in why.items())
    if any(seen.beat.engine != "local" for seen in working):
        return Finding("placed_later", said, "The engine decides; `hyper2kvmctl doctor dispatch` tries every host.")
    hint = "Change `accept` on one of them and reload its daemon; or `hyper2kvmctl migrate` it on the host you want."
    return Finding(Code.NOT_ACCEPTED, f"no host takes it: {said}", hint)


def forget(settings: Settings, host: str) -> bool:
    """Take a host off the list that is not there any more; whether it was on it. Raise OSError."""
    try:
        os.unlink(settings.exports_dir / HOSTS / f"{_file_name(host)}.json")
    except FileNotFoundError:
        return False
    return True


def drain_request(host: str) -> str:
    """The name, below exports_dir, of the request that a host starts no job."""
    return f"{HOSTS}/{_file_name(host)}{_DRAIN}"


def drained_hosts(settings: Settings) -> frozenset[str]:
    """The hosts that are to start no job, as their files are called. Raise OSError."""
    try:
        names = os.listdir(settings.exports_dir / HOSTS)
    except FileNotFoundError:
        return frozenset()
    return _drained(names)


_DRAIN = ".drain"


def _drained(names: Iterable[str]) -> frozenset[str]:
    """The hosts that the requests among the files of the directory are for."""
    return frozenset(name.removesuffix(_DRAIN) for name in names if name.endswith(_DRAIN))


def _file_name(host: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", host).lstrip(".")[:200] or "-"


def _beat(data: bytes) -> Beat | None:
    """What a file says; None if it is none of ours. A newer version may say more."""
    try:
        shape: dict[str, Any] = json.loads(data)
        known = {one.name: shape[one.name] for one in fields(Beat) if one.name in shape}
        said = Beat(**known)
        numbers = (said.interval, said.clock, said.workers, said.output_free, said.work_free, said.memory_mb)
        good = all(number is None or math.isfinite(number) for number in numbers)
        texts = (said.host, said.state, said.version, said.engine, *said.waits, *said.waits.values())
        if not good or said.interval <= 0 or not all(isinstance(text, str) for text in texts):
            return None
        waits = {plain(name, 255): plain(why, 500) for name, why in said.waits.items()}
        words = {key: plain(getattr(said, key)) for key in ("host", "state", "version", "engine")}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return Beat(**{**known, **words, "waits": waits})
