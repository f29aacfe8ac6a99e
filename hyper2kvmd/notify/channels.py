"""Whom a message is sent to: the webhook, every service of apprise and every hook, all the same to the outbox."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from hyper2kvmd import journal
from hyper2kvmd.files import open_directory
from hyper2kvmd.notify import apprise, hooks, request
from hyper2kvmd.notify.delivery import Undelivered
from hyper2kvmd.notify.message import CUTOVER, Ended
from hyper2kvmd.queue.names import LOG
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

# By these names the database knows them, those of a hook with its name behind it, those of a service with its mark.
# APPRISE alone stands for all services, as long as the file that names them cannot be read.
HOOK, WEBHOOK, APPRISE = "post-job/", "webhook", "apprise"
SERVICE = f"{APPRISE}/"
HOOK_ATTEMPTS = 2


@dataclass(frozen=True)
class Channel:
    """Somebody who gets messages, of the ends in `events`, and each at most `max_attempts` times.

    deliver: has a message taken. Raises Undelivered, MigrationError or OSError if it was not.
    """

    name: str
    deliver: Callable[[Ended], None]
    max_attempts: int
    events: frozenset[str] | None = None  # None for all that are ends of jobs

    @property
    def is_hook(self) -> bool:
        """Whether it is a program of the administrator's."""
        return self.name.startswith(HOOK)

    def wants(self, message: Ended) -> bool:
        """Whether it gets this message."""
        return message.event != CUTOVER if self.events is None else message.event in self.events


def channels(settings: Settings, tools: Tools) -> dict[str, Channel]:
    """Everybody who gets messages, by name, the hooks first in their order. Raise MigrationError (hook_failed)."""
    found = [
        Channel(HOOK + hook.name, partial(_run, settings, tools, hook), HOOK_ATTEMPTS)
        for hook in hooks.found(settings.hooks, "post-job")
    ]
    webhook, chats = settings.notify.webhook, settings.notify.apprise
    if webhook.is_set:
        found.append(
            Channel(
                WEBHOOK,
                lambda message: request.send(webhook, "notify.webhook", "POST", message.message()),
                webhook.max_attempts,
                frozenset(webhook.events),
            )
        )
    if chats.urls_credential is not None:
        ways: dict[str, Callable[[Ended], None]]
        try:
            services = apprise.services(chats)
            ways = {SERVICE + service.mark: partial(apprise.deliver, chats, tools, service) for service in services}
        except Undelivered as error:
            ways = {APPRISE: partial(_fail, error)}
        found += [Channel(name, way, chats.max_attempts, frozenset(chats.events)) for name, way in ways.items()]
    return {channel.name: channel for channel in found}


def _fail(error: Undelivered, message: Ended) -> None:
    raise error


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
