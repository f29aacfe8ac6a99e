"""Mail and chats, by the library apprise, which is there only where somebody wants it: the services, and their URLs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass, field

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.notify.carrier import UNKNOWN
from hyper2kvmd.notify.delivery import Undelivered, credential
from hyper2kvmd.notify.message import Ended
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Apprise

SETTING = "notify.apprise.urls_credential"
_ROUNDS = 100_000
_KIND = {  # as apprise calls them; all else is a failure
    "succeeded": "success",
    "cancelled": "info",
    "blocked": "warning",
    "verified": "success",
    "undone": "info",
    "unverified": "warning",
}
_BY_HAND = "`apprise -vv --body test --config FILE`, with the file of that setting, shows why."


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
        _carry(settings, Tools(), service, title=None, body="", kind="info")


def deliver(settings: Apprise, tools: Tools, service: Service, message: Ended) -> None:
    """Give a message to one service. Raise Undelivered, at most `timeout_seconds` and a moment later, or Cancelled."""
    kind = _KIND.get(message.status, "failure")
    _carry(settings, tools, service, title=message.title, body=message.text, kind=kind)


def _carry(settings: Apprise, tools: Tools, service: Service, **message: str | None) -> None:
    if (problem := missing(settings)) is not None:
        raise Undelivered(problem.message, problem.hint)
    stdin = json.dumps({"url": service.url, **message}).encode()
    argv = (sys.executable, "-P", "-m", "hyper2kvmd.notify.carrier")
    try:
        done = tools.run(*argv, accept=range(-64, 256), timeout=settings.timeout_seconds, stdin=stdin, cwd="/")
    except MigrationError as error:
        if error.code != Code.TOOL_FAILED:
            raise
        raise Undelivered(
            f"{service}: it did not take the message within {settings.timeout_seconds:g} s",
            "See whether the service works; if it is slow, raise notify.apprise.timeout_seconds.",
        ) from None
    said = done.stdout.strip()
    if done.returncode != 0:  # its trace can hold the URL
        raise Undelivered(f"{service}: apprise ended with status {done.returncode}", _BY_HAND)
    if said:
        hint = "Correct the URL." if said == UNKNOWN else "See whether the service works, and correct the URL."
        raise Undelivered(f"{service}: {said}", f"{hint} {_BY_HAND}")
