"""What others see of the daemon: its web pages, the campaign's among them, and the heartbeat."""

from __future__ import annotations

import time
from collections.abc import Callable

from hyper2kvmd.daemon.health import Health
from hyper2kvmd.daemon.heartbeat import Heartbeat
from hyper2kvmd.daemon.live import LivePage
from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.daemon.web import Web
from hyper2kvmd.settings.model import Settings


class Public:
    """The daemon's health, and who is shown it."""

    def __init__(self, settings: Callable[[], Settings], metrics: Metrics, watchdog_seconds: float | None) -> None:
        self.health = Health(settings, watchdog_seconds)
        metrics.follow(self.health)
        self.live = LivePage(self.health.hangs)
        pages = {"/metrics": metrics.page, "/healthz": self.health.healthz, "/readyz": self.health.readyz}
        self._web = Web(pages, front=self.live.page)
        self._heartbeat = Heartbeat(
            lambda: self.health.all_well(time.monotonic()), lambda: metrics.task_failed("heartbeat")
        )

    def apply(self, settings: Settings) -> None:
        """Show it as the settings say from now on. Raise SettingsError; then all is as it was."""
        self._web.apply(settings.metrics)
        self._heartbeat.apply(settings.notify.heartbeat)

    def try_now(self, settings: Settings) -> None:
        """Have everything tried now that is shown; to be called last.

        A thread that tries storage which hangs holds up whoever changes the user of the process, as an outbox of root's
        does: the C library waits for every thread.
        """
        if settings.metrics.listen or settings.notify.heartbeat.is_set:
            self.health.try_now()
