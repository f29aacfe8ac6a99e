"""Logging: structured events to journald in its native protocol, or to the terminal.

The protocol is spoken by hand, as python-systemd drops events without a word where there is no journal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import stat
import sys
import time
from collections.abc import MutableMapping
from typing import Any, NoReturn, TextIO

import structlog

from hyper2kvmd.messages import CATALOG
from hyper2kvmd.text import escaped

JOURNAL_SOCKET = "/run/systemd/journal/socket"
# A datagram has a limit of about 200 KiB; what is longer is cut, not lost.
VALUE_LIMIT = 60_000
FILE_LIMIT = 4 << 20
PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def configure(level: str, *, stream: TextIO | None = None) -> None:
    """Send every log event to journald if standard error goes there, else to `stream` (standard error)."""
    output = stream or sys.stderr
    shared = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
    ]
    threshold = logging.getLevelNamesMapping()[level.upper()]
    if stream is None and _is_journal(output):
        final: Any = Journald(JOURNAL_SOCKET, output)
        processors: list[Any] = [*shared, final]
    else:
        processors = [
            *shared,
            _without_kind,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=output.isatty()),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(output),
        cache_logger_on_first_use=False,
    )


def also_to(dir_fd: int, name: str) -> int | None:
    """Write every event from now on to a file as well: what is known of a job beside its export, on any host.

    An old file is begun again when it has become too large. Without write access there is no such file. Return its
    descriptor, for who goes back to the configuration before.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, 0o640, dir_fd=dir_fd)
    except OSError:
        return None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:  # planted: what is written would end up elsewhere
        os.close(fd)
        return None
    with contextlib.suppress(OSError):
        os.fchmod(fd, 0o640)  # whatever the umask: the group may read it
    if status.st_size > FILE_LIMIT:
        os.ftruncate(fd, 0)
    *others, final = structlog.get_config()["processors"]
    # What places jobs on hosts has their standard error go to that very file.
    last = _drop if _is_file(sys.stderr, status) else final
    structlog.configure(processors=[*others, _File(fd), last])
    return fd


def _is_file(stream: TextIO, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), status)
    except (OSError, ValueError):
        return False


def _drop(logger: Any, method: str, event: MutableMapping[str, Any]) -> NoReturn:
    """The last processor where there is nobody else to tell."""
    raise structlog.DropEvent


def _without_kind(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Leave out what only the journal has a use for."""
    event.pop("kind", None)
    return event


class _File:
    """A structlog processor that appends each event as one line; it passes events on unchanged and never raises."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        words = {key: value for key, value in event.items() if key not in _NOT_IN_FILE}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        details = " ".join(f"{key}={_one_line(value)}" for key, value in words.items())
        line = f"{stamp} {event.get('level', method):<7} {_one_line(event.get('event', ''))} {details}".rstrip()
        with contextlib.suppress(OSError):
            os.write(self._fd, line.encode("utf-8", "replace") + b"\n")
        return event


# Each line of the file is about the one job of the one VM.
_NOT_IN_FILE = ("event", "level", "timestamp", "job_id", "vm", "kind")


def _one_line(value: object) -> str:
    """A value as it stands in a line of a log; a guest's or an exporter's text cannot make a second line."""
    text = str(value)[:VALUE_LIMIT]
    return text if text.isprintable() and " " not in text and text else json.dumps(text)


class Journald:
    """The last structlog processor: sends the event as one datagram and drops it from structlog.

    Fields get the prefix H2K_, so that `journalctl H2K_JOB_ID=...` finds them; the kind of the event gives it its
    MESSAGE_ID. If the journal does not take the datagram, the line goes to standard error with its priority; logging
    never raises.
    """

    def __init__(self, path: str, fallback: TextIO) -> None:
        self._path = path
        self._fallback = fallback
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def __call__(self, logger: Any, method: str, event: dict[str, Any]) -> Any:
        message = str(event.pop("event", ""))
        event = {key: value for key, value in event.items() if value is not None}
        kind = event.pop("kind", None)
        priority = PRIORITY.get(str(event.pop("level", method)), 6)
        fields = {
            "MESSAGE": _text(message, event),
            "PRIORITY": str(priority),
            "SYSLOG_IDENTIFIER": "hyper2kvmd",
            **({"MESSAGE_ID": CATALOG[kind].id, "H2K_KIND": str(kind)} if kind is not None else {}),
            **{_field_name(key): str(value) for key, value in event.items()},
        }
        datagram = b"".join(_encode(name, value) for name, value in fields.items())
        try:
            self._socket.sendto(datagram, socket.MSG_DONTWAIT, self._path)
        except OSError:
            line = fields["MESSAGE"].replace("\n", "\\n")
            try:
                self._fallback.write(f"<{priority}>{line}\n")
                self._fallback.flush()
            except (OSError, ValueError):
                pass  # nowhere left to say it
        raise structlog.DropEvent


def _text(message: str, event: dict[str, Any]) -> str:
    """What `journalctl` shows: a line with the message and its values, and below it, indented, what a tool said."""
    values = " ".join(f"{key}={_one_line(value)}" for key, value in event.items() if key not in _BELOW)
    text = f"{escaped(message[:VALUE_LIMIT])}: {values}" if values else escaped(message[:VALUE_LIMIT])
    below = (line for key in _BELOW for line in str(event.get(key, ""))[:VALUE_LIMIT].splitlines())
    # Indented and without what moves a cursor: no line of them can pass for a record of its own.
    return "\n".join([text, *(f"    {escaped(line[:VALUE_LIMIT])}" for line in below)])


_BELOW = ("exception", "tail")


def _field_name(key: str) -> str:
    return "H2K_" + re.sub(r"[^A-Z0-9]", "_", key.upper())


def _encode(name: str, value: str) -> bytes:
    """One field, length-prefixed, so that no value can forge another field."""
    data = value.encode(errors="replace")[:VALUE_LIMIT]
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"


def _is_journal(stream: TextIO) -> bool:
    """Whether a stream is the one that systemd connected to the journal."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return stat.S_ISSOCK(status.st_mode) and (str(status.st_dev), str(status.st_ino)) == (device, inode)
