"""Gives one message to one service, by the library apprise: a process of its own, which can be killed when it hangs.

It reads {"url", "title", "body", "kind"} on standard input, and writes what went wrong, or nothing, on standard output.
Without a title it only looks whether the URL is understood. Nobody reads its standard error, which can hold secrets.
"""

from __future__ import annotations

import http
import json
import logging
import os
import re
import sys

UNKNOWN = "apprise does not understand the URL"


class _Heard(logging.Handler):
    """Takes, of what the library says, only what is known to hold no secret: the status of an answer, and its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = "it did not take the message"

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if found := re.search(r"\berror=([1-5]\d\d)\b", text):
            status = int(found[1])
            phrase = http.HTTPStatus(status).phrase if status in {*http.HTTPStatus} else ""
            self.reason = f"it answered {status} {phrase}".strip()
        elif "onnection error" in text:
            self.reason = "it cannot be reached, or the connection broke"


def carry(url: str, title: str | None, body: str, kind: str) -> str:
    """Give the message to the service; what went wrong, "" for nothing."""
    import apprise  # optional, so never where nobody asks for it

    heard = _Heard()
    logger = logging.getLogger("apprise")
    logger.propagate, logger.handlers = False, [heard]
    asset = apprise.AppriseAsset(app_id="hyper2kvmd", app_desc="Migration to KVM", async_mode=False)
    service = apprise.Apprise.instantiate(url, asset=asset)
    if service is None:
        return UNKNOWN
    if title is None:
        return ""
    loaded = apprise.Apprise(asset=asset)
    loaded.add(service)
    # As text: what a service wants as HTML is escaped then.
    return "" if loaded.notify(body=body, title=title, notify_type=kind, body_format="text") else heard.reason


if __name__ == "__main__":
    print(carry(**json.load(sys.stdin)), flush=True)
    os._exit(0)  # what the library left running is not waited for: it is over
