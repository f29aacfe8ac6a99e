"""The daemon's part in what exporters hand over by themselves: it takes the manifests, and puts the answers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import structlog

from hyper2kvmd.errors import Code, Finding
from hyper2kvmd.files import explained, fsync_directory, remedy
from hyper2kvmd.queue import answer
from hyper2kvmd.queue.handover import Ticket, answered, take, tickets
from hyper2kvmd.queue.state import Facts
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()


class Handover:
    """Keeps nothing but what it has logged: all else is in the queue, and follows from it at every look.

    Two threads use it, the one that looks and the one that hears of events.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failed: Finding | None = None  # why the queue could not be emptied
        self._said: set[Finding] = set()

    def receive(self, settings: Settings) -> None:
        """Take what is in the queue, and withdraw older answers, which would be taken for the new ones."""
        queue = settings.hypersdk.queue_dir
        if queue is None:
            return
        with self._lock:
            self._failed = None
            try:
                take(queue)
                for name in {ticket.name for ticket in tickets(settings) if not ticket.answered}:
                    answer.withdraw(settings, name)
            except OSError as error:
                self._failed = _cannot(error, queue)

    def answer(self, settings: Settings, looks: Mapping[Path, Facts | Finding | None]) -> None:
        """Tell those who wait what came of their exports. looks: what was found of all exports; None: not there."""
        queue = settings.hypersdk.queue_dir
        if queue is None:
            return
        with self._lock:
            wrong = [] if self._failed is None else [self._failed]
            try:
                there = tickets(settings)
                wrong += [ticket.problem for ticket in there if ticket.problem and ticket.problem.code == Code.IO_ERROR]
                wrong += self._answer(settings, there, looks)
                fsync_directory(queue)
            except OSError as error:
                wrong.append(_cannot(error, queue))
            for finding in dict.fromkeys(wrong):
                if finding not in self._said:  # once, not at every look
                    log.error(finding.message, hint=finding.hint)
            self._said = {*wrong}

    def _answer(
        self, settings: Settings, there: list[Ticket], looks: Mapping[Path, Facts | Finding | None]
    ) -> Iterator[Finding]:
        """Say what can be said, and yield what keeps the rest from being said."""
        now = time.time()

        def judge(ticket: Ticket) -> answer.Verdict:
            if ticket.directory is None or not os.path.lexists(ticket.directory):
                return answer.verdict(ticket, None, settings, now)
            if ticket.directory not in looks:
                return None  # it came after the look, and waits for the next
            return answer.verdict(ticket, looks[ticket.directory], settings, now)

        due, obsolete = answer.due(there, judge)
        for one in due:
            try:
                _say(settings, one)
            except OSError as error:
                yield _cannot(error, settings.hypersdk.output_dir)
        # One that is kept has its directory stay an export, to be tried again, as long as that is there.
        obsolete += [one for one in there if one.answered and not os.path.lexists(one.directory or "")]
        for ticket in obsolete:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(ticket.path)


def _say(settings: Settings, due: answer.Due) -> None:
    """Say what is known, and note that it was said. Raise OSError."""
    if due.verdict is None:
        return
    ticket, verdict = due.verdict
    said = verdict if isinstance(verdict, Finding) else answer.delivered(settings, ticket)
    if due.waiting or (isinstance(said, Path) and answer.failed_before(settings, due.name)):
        answer.say(settings, ticket, said)
        if isinstance(said, Path):
            log.info("an exporter has its answer: the disk", vm=due.name, disk=str(said))
        else:
            log.warning("an exporter has its answer: the error", vm=due.name, reason=said.message, hint=said.hint)
    for ticket in due.waiting:
        os.rename(ticket.path, answered(ticket))


def _cannot(error: OSError, directory: Path | None) -> Finding:
    message = f"{explained(error, directory)}: what exporters hand over cannot be worked off"
    return Finding(Code.IO_ERROR, message, f"{remedy(error)}; `hyper2kvmctl doctor` checks the queue.")
