"""The webhook: one HTTP POST, which is over in time whatever the receiver does."""

from __future__ import annotations

import contextlib
import http
import http.client
import os
import re
import socket
import ssl
import stat
import threading
from pathlib import Path
from urllib.parse import urlsplit

from hyper2kvmd import __version__
from hyper2kvmd.settings.model import Webhook, url_problem
from hyper2kvmd.text import plain

CREDENTIAL_LIMIT = 8192
ANSWER_LIMIT = 1 << 16  # of what a receiver says beyond its status, which nobody looks at
# What the connection needs for itself, and what the body is.
_OURS = frozenset({"host", "content-length", "content-type", "transfer-encoding", "connection"})
_REMEDY = {
    400: "The receiver does not take a message of this form; docs/notify.md has the form, and what to put in between.",
    401: "It wants to know who we are: give it an Authorization header with notify.webhook.headers_credential.",
    403: "The receiver denied access: correct the token in notify.webhook.headers_credential, or its rights there.",
    404: "It has nothing under this URL: correct notify.webhook.url, or make the webhook anew.",
    410: "The webhook was removed there: make it anew, and set notify.webhook.url.",
    413: "The report is too long for it: raise the receiver's limit for the size of a request.",
}


class Undelivered(Exception):
    """The receiver did not take a message: `message` says why, `hint` what to do. Neither holds the URL's path, the
    headers or what the receiver said: each of them can hold a secret.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def post(webhook: Webhook, body: bytes) -> None:
    """Deliver one message, a JSON document. Raise Undelivered, at most `timeout_seconds` later."""
    url = urlsplit(_url(webhook))
    headers = {
        **_headers(webhook),
        "Content-Type": "application/json",
        "User-Agent": f"hyper2kvmd/{__version__}",
        "Connection": "close",
    }
    host, where = url.hostname or "", f"{url.scheme}://{url.netloc}"
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, url.port, timeout=webhook.timeout_seconds, context=_context(webhook)
        )
    else:
        connection = http.client.HTTPConnection(host, url.port, timeout=webhook.timeout_seconds)
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    answers: list[int | Exception] = []

    def exchange() -> None:
        try:
            connection.request("POST", target, body, headers)
            response = connection.getresponse()
            answers.append(response.status)
            response.read(ANSWER_LIMIT)  # so that it may end its sentence
        except (OSError, http.client.HTTPException, ValueError) as error:
            answers.append(error)

    # In a thread that can be left behind. The time limit of a socket is one for each byte, so a receiver could go on
    # for ever; and nothing limits the time that finding its address takes.
    thread = threading.Thread(target=exchange, name="webhook", daemon=True)
    thread.start()
    thread.join(webhook.timeout_seconds)
    answer = next(iter(answers), None)  # in time: headers that the next line cuts off look like an answer
    if thread.is_alive() and (waiting := connection.sock) is not None:
        with contextlib.suppress(OSError):
            waiting.shutdown(socket.SHUT_RDWR)
    if answer is None or isinstance(answer, TimeoutError):  # the socket's limit is the same, and can be over first
        raise Undelivered(
            f"{where} did not answer within {webhook.timeout_seconds:g} s",
            "See whether the receiver works; if it is slow, raise notify.webhook.timeout_seconds.",
        )
    if isinstance(answer, Exception):
        raise _unreached(where, answer)
    if not 200 <= answer < 300:
        raise _refused(where, answer)


def _unreached(where: str, error: Exception) -> Undelivered:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Undelivered(
            f"{where}: its certificate is not accepted: {plain(error.verify_message, 200)}",
            "Set notify.webhook.ca_file to the certificate of the authority that signed it, or correct the receiver's.",
        )
    if isinstance(error, socket.gaierror):
        return Undelivered(f"{where}: {error.strerror}", "Correct the name in notify.webhook.url, or fix the DNS.")
    if isinstance(error, http.client.HTTPException | ValueError):  # its text can hold what the receiver said
        return Undelivered(
            f"{where}: what answers there does not speak HTTP ({type(error).__name__})",
            "Correct notify.webhook.url: its scheme, host and port.",
        )
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    return Undelivered(
        f"{where} cannot be reached: {plain(str(reason), 200)}", "See whether the receiver runs, and the way to it."
    )


def _refused(where: str, status: int) -> Undelivered:
    phrase = ""
    with contextlib.suppress(ValueError):  # a number that nobody has given a meaning
        phrase = f" {http.HTTPStatus(status).phrase}"
    if 300 <= status < 400:
        hint = "It sends us elsewhere, where we do not go: set notify.webhook.url to the final address."
    else:
        hint = _REMEDY.get(status, "See the receiver's own log.")
    return Undelivered(f"{where} answered {status}{phrase}", hint)


def _url(webhook: Webhook) -> str:
    if webhook.url is not None:
        return webhook.url
    name = webhook.url_credential or ""
    url = _credential("url_credential", name).strip()
    if problem := url_problem(url, allow_insecure=webhook.allow_insecure):
        raise Undelivered(f"notify.webhook.url_credential: {name}: {problem[0]}", problem[1])
    return url


def _headers(webhook: Webhook) -> dict[str, str]:
    """The headers of the credential."""
    name = webhook.headers_credential
    headers: dict[str, str] = {}
    if name is None:
        return headers
    for number, line in enumerate(_credential("headers_credential", name).splitlines(), start=1):
        found = re.fullmatch(r"([A-Za-z0-9!#$%&'*+.^_`|~-]+):[ \t]*([\x20-\x7e\t]*?)[ \t]*", line)
        if found is not None and found[1].lower() not in _OURS:
            headers[found[1]] = found[2]
        elif line.strip():
            what = "not of the form `Header-Name: value`" if found is None else f"{found[1]}, which is not to be set"
            raise Undelivered(
                f"notify.webhook.headers_credential: line {number} of {name} is {what}",
                "Write one header to a line, in ASCII, such as `Authorization: Bearer TOKEN`.",
            )
    return headers


def _credential(key: str, name: str) -> str:
    """The text of a credential: a file that systemd handed over, or an absolute path."""
    setting, directory = f"notify.webhook.{key}", os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None and not name.startswith("/"):
        raise Undelivered(
            f"{setting}: {name} names a credential, and systemd has handed over none",
            f"Add LoadCredential={name}:FILE to the unit, or write an absolute path.",
        )
    path = Path(directory or "/", name)
    try:
        # Not to be held up by a pipe that was put in its place.
        with open(path, "rb", opener=lambda file, flags: os.open(file, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            data = file.read(CREDENTIAL_LIMIT + 1) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise Undelivered(
            f"{setting}: {path} cannot be read: {error.strerror}", "Name a file that the service's user can read."
        ) from None
    if stat.S_IMODE(status.st_mode) & 0o007:
        raise Undelivered(f"{setting}: {path} can be used by everybody on this host", f"Run `chmod o= {path}`.")
    with contextlib.suppress(UnicodeDecodeError):
        if data and len(data) <= CREDENTIAL_LIMIT:
            return data.decode("ascii")
    raise Undelivered(
        f"{setting}: {path} is empty, longer than {CREDENTIAL_LIMIT} bytes, not ASCII, or not a plain file",
        "Write the secret into a plain file, as docs/notify.md shows it.",
    )


def _context(webhook: Webhook) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=webhook.ca_file)
    except OSError as error:
        raise Undelivered(
            f"notify.webhook.ca_file: {webhook.ca_file} cannot be used: {error.strerror or 'not certificates in PEM'}",
            "It must hold certificates of authorities, in PEM, and the service's user must be able to read it.",
        ) from None
    if webhook.ca_file is not None:
        # From Python 3.13 on an authority must also say what its key is for, which one's own, as `openssl req -x509`
        # makes it, does not. Signatures, dates and names are checked all the same.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
