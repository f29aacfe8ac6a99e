"""The check of whom the daemon notifies: what their settings name is there, and can be used. It sends nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from hyper2kvmd.ctl.doctor.diagnosis import Diagnosis, Host
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.notify import apprise, request
from hyper2kvmd.notify.delivery import Undelivered
from hyper2kvmd.settings.model import Notify


def check_notify(host: Host, diagnosis: Diagnosis) -> str:
    """Who is notified, if it can be."""
    said = []
    for name, credentials, check in _receivers(host.settings.notify):
        kept = [one for one in credentials if one is not None and not one.startswith("/")]
        if kept and "CREDENTIALS_DIRECTORY" not in os.environ:
            said.append(f"{name} (not checked: only the service can read the credential {', '.join(kept)})")
            continue
        said.append(name)
        with diagnosis:
            try:
                check()
            except Undelivered as error:
                raise MigrationError(Code.IO_ERROR, error.message, error.hint, field=f"notify.{name}") from None
    if (problem := apprise.missing(host.settings.notify.apprise)) is not None:
        diagnosis.errors.append(MigrationError(Code(problem.code), problem.message, problem.hint))
    return ", ".join(said) or "nobody is notified"


def _receivers(notify: Notify) -> list[tuple[str, tuple[str | None, ...], Callable[[], None]]]:
    """Those that are set: the section, its credentials, and what raises Undelivered if they cannot be used."""
    found: list[tuple[str, tuple[str | None, ...], Callable[[], None]]] = [
        (name, (one.url_credential, one.headers_credential), partial(request.check, one, f"notify.{name}"))
        for name, one in (("webhook", notify.webhook), ("heartbeat", notify.heartbeat))
        if one.is_set
    ]
    if notify.apprise.urls_credential is not None:
        found.append(("apprise", (notify.apprise.urls_credential,), partial(apprise.check, notify.apprise)))
    return found
