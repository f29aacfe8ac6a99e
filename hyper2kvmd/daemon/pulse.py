"""Says to the other hosts, now and then, that this one is there, what it has, and why it does not start what waits."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import structlog

from hyper2kvmd import accel
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.files import explained
from hyper2kvmd.queue import hosts
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()

BEAT_SECONDS = 10.0  # at most so often, however often the directory is looked at
STOP_SECONDS = 2.0


class Pulse:
    """The file of this host among the hosts' files.

    The daemon sets what is public, and replaces it as a whole; `beat` is called in the thread that looks.
    `kvm`: whether KVM works here, None until it is known. `waits`: why exports that are queued are not started here.
    """

    def __init__(self) -> None:
        self.kvm: bool | None = None
        self.waits: Mapping[str, str] = {}
        self.retiring = False
        self.interval = BEAT_SECONDS
        self._beaten = 0.0
        self._failed = False
        self._trial: threading.Thread | None = None

    def beat(self, settings: Settings, *, draining: bool) -> None:
        """Say that this host is there, unless it was said a moment ago."""
        if self._trial is None:
            # In a thread of its own: on a host whose KVM hangs it takes a while.
            self._trial = threading.Thread(target=self._try_kvm, args=(settings,), name="kvm", daemon=True)
            self._trial.start()
        now = time.monotonic()
        if self._beaten and now - self._beaten < BEAT_SECONDS:
            return
        self._beaten = now
        starts = not (draining or self.retiring)
        said = hosts.measured(settings, "running" if starts else "draining", self.interval + BEAT_SECONDS)
        try:
            hosts.beat(settings, replace(said, kvm=self.kvm, waits=self.waits))
            self._failed = False
        except OSError as error:
            if not self._failed:
                hint = "`hyper2kvmctl hosts` does not list this host. Give the service's user write access."
                number = hosts.other_number(settings)
                reason, hint = (explained(error), hint) if number is None else (number.message, number.hint)
                log.warning("this host cannot report to the other hosts", reason=reason, hint=hint)
            self._failed = True

    def stop(self, settings: Settings) -> None:
        """Say that the daemon of this host has ended. Storage that hangs does not hold it up."""

        def say() -> None:
            with contextlib.suppress(OSError):
                hosts.beat(settings, hosts.measured(settings, "stopped", BEAT_SECONDS))

        last = threading.Thread(target=say, name="pulse", daemon=True)
        last.start()
        last.join(STOP_SECONDS)

    def _try_kvm(self, settings: Settings) -> None:
        try:
            self.kvm = accel.resolve(settings.guest.accel, Tools()).name == "kvm"
        except MigrationError:
            self.kvm = False
