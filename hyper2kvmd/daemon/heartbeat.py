"""The heartbeat: a URL that is called while all is well, so that whoever waits for the call knows when it is not."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from hyper2kvmd.messages import Kind
from hyper2kvmd.notify import request
from hyper2kvmd.notify.delivery import Undelivered
from hyper2kvmd.settings.model import Heartbeat as Receiver

log = structlog.get_logger()

SECTION = "notify.heartbeat"
ASK_SECONDS = 5.0  # how often it is asked whether all is well again
RETRY_SECONDS = 30.0  # after a call that failed


class Heartbeat:
    """Calls in a thread of its own, which ends with the program: a receiver that hangs holds up nothing.

    well: whether all is well. failed: told of every call that failed.
    """

    def __init__(self, well: Callable[[], bool], failed: Callable[[], None]) -> None:
        self._well = well
        self._failed = failed
        self._receiver = Receiver()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self._problem = ""

    def apply(self, receiver: Receiver) -> None:
        """Call as the settings say from now on, and begin at once."""
        self._receiver = receiver
        self._changed.set()
        if receiver.is_set and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            self._changed.clear()
            receiver, seconds = self._receiver, None
            if receiver.is_set:
                seconds = self._beat(receiver) if self._well() else ASK_SECONDS
            self._changed.wait(seconds)

    def _beat(self, receiver: Receiver) -> float:
        """Call once, and return the seconds until the next call."""
        try:
            request.send(receiver, SECTION, "GET")
        except Undelivered as error:
            self._failed()
            if error.message != self._problem:  # once, not at every call
                log.warning("the heartbeat failed", kind=Kind.TASK_FAILED, reason=error.message, hint=error.hint)
            self._problem = error.message
            return min(receiver.interval_seconds, RETRY_SECONDS)
        if self._problem:
            log.info("the heartbeat works again")
        self._problem = ""
        return receiver.interval_seconds
