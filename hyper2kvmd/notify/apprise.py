"""Mail and chats: the library apprise brings a message to one service; it is there only where somebody wants it."""

from __future__ import annotations

import hashlib
import http
import importlib.util
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from hyper2kvmd.errors import Code, Finding
from hyper2kvmd.notify.delivery import Undelivered, credential, ends_within
from hyper2kvmd.notify.message import Ended
from hyper2kvmd.settings.model import Apprise

SETTING = "notify.apprise.urls_credential"
_ROUNDS = 100_000
_KIND = {"succeeded": "success", "cancelled": "info", "blocked": "warning"}  # as apprise calls them
_BY_HAND = "`apprise -vv --body test --config FILE`, with the file that it is in, shows why."


@dataclass(frozen=True)
class Service:
    """One line of the credential. number: of the line. scheme: the part of the URL that holds no secret."""

    url: str = field(repr=False)
    number: int
    scheme: str

    @property
    def mark(self) -> str:
        """The same for the same URL, wherever in the file its line is.

        It stands in files that everybody may read, and a URL can hold a password: to try one takes a while.
        """
        return hashlib.pbkdf2_hmac("sha256", self.url.encode(), b"hyper2kvmd", _ROUNDS, 6).hex()

    def __str__(self) -> str:
        return f"line {self.number} of {SETTING}" + (f" ({self.scheme})" if self.scheme else "")


def missing(settings: Apprise) -> Finding | None:
    """What to do if apprise is asked for and not installed."""
    if settings.urls_credential is None or importlib.util.find_spec("apprise") is not None:
        return None
    return Finding(
        Code.TOOL_MISSING,
        f"{SETTING} is set, and the library apprise is not installed",
        "Run `apt install apprise` (Debian, Ubuntu) or `dnf install python3-apprise` (Fedora, EPEL).",
    )


def services(settings: Apprise) -> list[Service]:
    """The services of the credential. Raise Undelivered if it cannot be used."""
    lines = credential(SETTING, settings.urls_credential or "").splitlines()
    found: dict[str, Service] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            scheme = re.match(r"([A-Za-z][A-Za-z0-9+-]{0,20})://", line)
            found.setdefault(line, Service(line, number, scheme[1].lower() if scheme else ""))
    if not found:
        raise Undelivered(f"{SETTING}: {settings.urls_credential} holds no URL", "Write one URL of apprise to a line.")
    return [*found.values()]


def check(settings: Apprise) -> None:
    """Raise Undelivered if the credential cannot be used, or holds a URL that apprise does not understand."""
    for service in services(settings):
        if missing(settings) is None:
            _loaded(service)


def deliver(settings: Apprise, service: Service, message: Ended) -> None:
    """Bring a message to one service. Raise Undelivered, at most `timeout_seconds` later."""
    outcome: list[Undelivered | None] = []

    def work() -> None:
        try:
            _send(service, message)
            outcome.append(None)
        except Undelivered as error:
            outcome.append(error)
        except Exception as error:  # noqa: BLE001  # of a library with a hundred services; its text can hold the URL
            outcome.append(Undelivered(f"{service}: apprise failed with {type(error).__name__}", _BY_HAND))

    if (problem := missing(settings)) is not None:
        raise Undelivered(problem.message, problem.hint)
    ends_within(settings.timeout_seconds, work, "apprise")
    if not outcome:
        raise Undelivered(
            f"{service}: it did not take the message within {settings.timeout_seconds:g} s",
            "See whether the service works; if it is slow, raise notify.apprise.timeout_seconds.",
        )
    if outcome[0] is not None:
        raise outcome[0]


class _Heard(logging.Handler):
    """Keeps what the library says from everybody: it can hold secrets. Of it, we take what is known to hold none."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Look for the status of an HTTP answer, and for a connection that failed."""
        text = record.getMessage()
        if found := re.search(r"\berror=([1-5]\d\d)\b", text):
            status = int(found[1])
            phrase = http.HTTPStatus(status).phrase if status in {*http.HTTPStatus} else ""
            self.reason = f"it answered {status} {phrase}".strip()
        elif "onnection error" in text and not self.reason:
            self.reason = "it cannot be reached, or the connection broke"


def _hearing() -> _Heard:
    """Listen to the library from here on, instead of anybody else."""
    heard = _Heard()
    for name in ("apprise", "requests", "urllib3"):
        logger = logging.getLogger(name)
        logger.propagate, logger.handlers = False, [heard if name == "apprise" else logging.NullHandler()]
    return heard


def _loaded(service: Service) -> Any:
    """Apprise with this service alone. Raise Undelivered."""
    import apprise  # only here: it takes a while, and hardly anybody needs it

    _hearing()
    asset = apprise.AppriseAsset(app_id="hyper2kvmd", app_desc="Migration to KVM", async_mode=False)
    one = apprise.Apprise.instantiate(service.url, asset=asset)
    if one is None:
        raise Undelivered(f"{service}: apprise does not understand the URL", f"Correct it. {_BY_HAND}")
    loaded = apprise.Apprise(asset=asset)
    loaded.add(one)
    return loaded


def _send(service: Service, message: Ended) -> None:
    loaded = _loaded(service)
    heard = _hearing()
    kind = _KIND.get(message.status, "failure")
    # As text: what a service wants as HTML is escaped then.
    if not loaded.notify(body=message.text, title=message.title, notify_type=kind, body_format="text"):
        reason = heard.reason or "it did not take the message"
        raise Undelivered(f"{service}: {reason}", f"See whether the service works, and correct the URL. {_BY_HAND}")
