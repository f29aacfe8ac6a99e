"""Telling systemd how the daemon is doing."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence

import sdnotify

STATUS_LIMIT = 200


class Notifier:
    """sd_notify(3), made safe for text that comes from outside. Without systemd it does nothing."""

    def ready(self) -> None:
        """The daemon watches its directory."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The daemon takes up its configuration again; `ready` ends that."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The daemon is ending."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The daemon works. Always a datagram of its own, so that no text can spoil it."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """The line in `systemctl status`: ASCII, because the library silently drops anything else."""
        clean = re.sub(r"[^\x20-\x7e]", "?", text)[:STATUS_LIMIT]
        self._send(f"STATUS={clean}")

    def watchdog_interval(self) -> float | None:
        """Half of the time after which systemd takes the daemon for dead, in seconds."""
        microseconds = os.environ.get("WATCHDOG_USEC")
        return int(microseconds) / 2e6 if microseconds else None

    @staticmethod
    def _send(message: str) -> None:
        # A new one each time: the library connects once, and is silent for ever when that socket is gone.
        notifier = sdnotify.SystemdNotifier()
        notifier.notify(message)
        if notifier.socket is not None:
            notifier.socket.close()


def status_line(
    here: Sequence[str], counts: Sequence[str], running_elsewhere: int, elsewhere: Sequence[str], rest: Sequence[str]
) -> str:
    """One line: what runs, what else there is, what runs elsewhere, and what people should know.

    The counts matter more than the names of jobs: of these, as many as there is room for, this host's first.
    """
    line = ""
    for shown in range(len(here) + len(elsewhere), -1, -1):
        others = _some(elsewhere, shown - len(here))
        at_others = [f"{running_elsewhere} running elsewhere{others}"] if running_elsewhere else []
        line = ", ".join([f"{len(here)} running{_some(here, shown)}", *counts, *at_others, *rest])
        if len(line) <= STATUS_LIMIT:
            break
    return line


def _some(names: Sequence[str], shown: int) -> str:
    """The first of some names in brackets, and how many there are more; "" if none is to be shown."""
    if shown <= 0 or not names:
        return ""
    more = [f"{len(names) - shown} more"] if shown < len(names) else []
    return f" ({', '.join([*names[:shown], *more])})"
