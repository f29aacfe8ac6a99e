"""One HTTP request to a receiver, which is over in time whatever the receiver does."""

from __future__ import annotations

import contextlib
import http
import http.client
import re
import socket
import ssl
import threading
from typing import Literal
from urllib.parse import urlsplit

from hyper2kvmd import __version__
from hyper2kvmd.notify.delivery import Undelivered, credential
from hyper2kvmd.settings.model import Receiver, url_problem
from hyper2kvmd.text import plain

ANSWER_LIMIT = 1 << 16  # of what a receiver says beyond its status, which nobody looks at
# What the connection needs for itself, and what the body is.
_OURS = frozenset({"host", "content-length", "content-type", "transfer-encoding", "connection"})
_REMEDY = {  # {} is the section of the settings
    400: "The receiver does not take a request of this form; docs/notify.md has the form, and what to put in between.",
    401: "It needs a login: give it an Authorization header with {}.headers_credential.",
    403: "The receiver denied access: correct the token in {}.headers_credential, or its rights there.",
    404: "It does not know this URL: correct {}.url, or make a new one there.",
    410: "The URL was removed there: make a new one, and set {}.url.",
    413: "The report is too large for it: raise the receiver's limit for the size of a request.",
}


def send(receiver: Receiver, section: str, method: Literal["GET", "POST"], body: bytes | None = None) -> None:
    """Send one request, with a JSON document or without a body. Raise Undelivered, at most `timeout_seconds` later.

    section: of the settings, in full, which the receiver is from.
    """
    url = urlsplit(_url(receiver, section))
    headers = {
        **_headers(receiver, section),
        **({} if body is None else {"Content-Type": "application/json"}),
        "User-Agent": f"hyper2kvmd/{__version__}",
        "Connection": "close",
    }
    host, where = url.hostname or "", f"{url.scheme}://{url.netloc}"
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        context = _context(receiver, section)
        connection = http.client.HTTPSConnection(host, url.port, timeout=receiver.timeout_seconds, context=context)
    else:
        connection = http.client.HTTPConnection(host, url.port, timeout=receiver.timeout_seconds)
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    answers: list[int | Exception] = []

    def exchange() -> None:
        try:
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            answers.append(response.status)
            response.read(ANSWER_LIMIT)  # so that it may end its sentence
        except (OSError, http.client.HTTPException, ValueError) as error:
            answers.append(error)

    # In a thread that can be left behind. The time limit of a socket is one for each byte, so a receiver could go on
    # for ever; and nothing limits the time that finding its address takes.
    thread = threading.Thread(target=exchange, name="request", daemon=True)
    thread.start()
    thread.join(receiver.timeout_seconds)
    answer = next(iter(answers), None)  # in time: headers that the next line cuts off look like an answer
    if thread.is_alive() and (waiting := connection.sock) is not None:
        with contextlib.suppress(OSError):
            waiting.shutdown(socket.SHUT_RDWR)
    if answer is None or isinstance(answer, TimeoutError):  # the socket's limit is the same, and can be over first
        raise Undelivered(
            f"{where} did not answer within {receiver.timeout_seconds:g} s",
            f"See whether the receiver works; if it is slow, raise {section}.timeout_seconds.",
        )
    if isinstance(answer, Exception):
        raise _unreached(where, section, answer)
    if not 200 <= answer < 300:
        raise _refused(where, section, answer)


def check(receiver: Receiver, section: str) -> None:
    """Raise Undelivered if a request cannot even be put together: a file is missing, or holds something else."""
    _url(receiver, section)
    _headers(receiver, section)
    _context(receiver, section)


def _unreached(where: str, section: str, error: Exception) -> Undelivered:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Undelivered(
            f"{where}: its certificate is not accepted: {plain(error.verify_message, 200)}",
            f"Set {section}.ca_file to the certificate of the authority that signed it, or correct the receiver's.",
        )
    if isinstance(error, socket.gaierror):
        return Undelivered(f"{where}: {error.strerror}", f"Correct the name in {section}.url, or fix the DNS.")
    if isinstance(error, http.client.HTTPException | ValueError):  # its text can hold what the receiver said
        return Undelivered(
            f"{where}: what answers there does not speak HTTP ({type(error).__name__})",
            f"Correct {section}.url: its scheme, host and port.",
        )
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    return Undelivered(
        f"{where} cannot be reached: {plain(str(reason), 200)}", "See whether the receiver runs, and the way to it."
    )


def _refused(where: str, section: str, status: int) -> Undelivered:
    phrase = ""
    with contextlib.suppress(ValueError):  # a number that nobody has given a meaning
        phrase = f" {http.HTTPStatus(status).phrase}"
    if 300 <= status < 400:
        hint = f"It redirects, which is not followed: set {section}.url to the final address."
    else:
        hint = _REMEDY.get(status, "See the receiver's own log.").format(section)
    return Undelivered(f"{where} answered {status}{phrase}", hint)


def _url(receiver: Receiver, section: str) -> str:
    if receiver.url is not None:
        return receiver.url
    name = receiver.url_credential or ""
    url = credential(f"{section}.url_credential", name).strip()
    if problem := url_problem(url, allow_insecure=receiver.allow_insecure):
        raise Undelivered(f"{section}.url_credential: {name}: {problem[0]}", problem[1])
    return url


def _headers(receiver: Receiver, section: str) -> dict[str, str]:
    """The headers of the credential."""
    name = receiver.headers_credential
    headers: dict[str, str] = {}
    if name is None:
        return headers
    for number, line in enumerate(credential(f"{section}.headers_credential", name).splitlines(), start=1):
        found = re.fullmatch(r"([A-Za-z0-9!#$%&'*+.^_`|~-]+):[ \t]*([\x20-\x7e\t]*?)[ \t]*", line)
        if found is not None and found[1].lower() not in _OURS:
            headers[found[1]] = found[2]
        elif line.strip():
            what = "not of the form `Header-Name: value`" if found is None else f"{found[1]}, which is not to be set"
            raise Undelivered(
                f"{section}.headers_credential: line {number} of {name} is {what}",
                "Write one header to a line, in ASCII, such as `Authorization: Bearer TOKEN`.",
            )
    return headers


def _context(receiver: Receiver, section: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=receiver.ca_file)
    except OSError as error:
        raise Undelivered(
            f"{section}.ca_file: {receiver.ca_file} cannot be used: {error.strerror or 'not certificates in PEM'}",
            "It must hold certificates of authorities, in PEM, and the service's user must be able to read it.",
        ) from None
    if receiver.ca_file is not None:
        # From Python 3.13 on an authority must also say what its key is for, which one's own, as `openssl req -x509`
        # makes it, does not. Signatures, dates and names are checked all the same.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
