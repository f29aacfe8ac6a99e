"""The HTTP server of metrics and health: few pages, GET only, and clients that cannot hold up anybody.

Not prometheus_client's own, which puts no limits on clients, and never reads a new certificate.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import structlog

from hyper2kvmd.errors import SettingsError
from hyper2kvmd.settings.model import Metrics, TlsServer

log = structlog.get_logger()

TIMEOUT_SECONDS = 5.0
CONNECTIONS = 16
PART = 1 << 16
HEAD_LIMIT = 8192  # bytes; Prometheus sends a few hundred
PLAIN = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Answer:
    """What a page answers: the HTTP status, the type of the content, the content, and headers beside those of all."""

    status: int
    kind: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


# From the query, and the value of the Accept header, to the answer.
Page = Callable[[str, str], Answer]


class Web:
    """Serves `pages`, by their paths, on the address of the settings; `front` at / if they want it."""

    def __init__(self, pages: Mapping[str, Page], front: Page | None = None) -> None:
        index = "".join(f"{path}\n" for path in pages).encode()
        self._index: Page = lambda query, accept: Answer(200, PLAIN, index)
        self._front = front or self._index
        self._pages = {"/": self._index, **pages}
        self._server: _Server | None = None
        self._listen = ""

    def apply(self, settings: Metrics) -> None:
        """Serve as the settings say from now on; the files of TLS are read again.

        Raise SettingsError for an address or files that cannot be used; then all is as it was.
        """
        context = _tls(settings.tls_server_config) if settings.listen else None
        if settings.listen != self._listen:
            before, old_context = self._listen, self._server.context if self._server else None
            self._close()  # first: the old address may be a part of the new one
            try:
                self._open(settings.listen, context)
            except (OSError, UnicodeError) as error:  # the latter from a host name with an empty part
                with contextlib.suppress(OSError):
                    self._open(before, old_context)
                raise SettingsError(
                    f"metrics.listen: {settings.listen} cannot be used: {getattr(error, 'strerror', None) or error};"
                    " set another address, or an empty one to turn metrics off"
                ) from None
        elif self._server is not None:
            self._server.context = context
        self._pages["/"] = self._front if settings.page else self._index

    def _open(self, listen: str, context: ssl.SSLContext | None) -> None:
        if listen:
            self._server = _Server(listen, context, self._pages)
            threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()
        self._listen = listen

    def _close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._server, self._listen = None, ""


class _Server(socketserver.ThreadingTCPServer):
    """A thread for each of at most CONNECTIONS connections; one more, and the oldest is dropped.

    So whoever only holds connections open does not keep Prometheus out.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, listen: str, context: ssl.SSLContext | None, pages: Mapping[str, Page]) -> None:
        host, _, port = listen.rpartition(":")
        self.context = context
        self.pages = pages
        self._free = threading.Semaphore(CONNECTIONS)
        self._open: dict[Any, socket.socket] = {}  # by the socket as it was accepted, oldest first
        self._lock = threading.Lock()
        self.address_family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        super().__init__(address, _Handler)  # type: ignore[arg-type]  # an IPv6 address has four parts

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a new connection."""
        if not self._free.acquire(blocking=False):
            with self._lock:
                oldest = next(iter(self._open.values()), None)
            if oldest is not None:
                with contextlib.suppress(OSError):  # over already
                    socket.socket.shutdown(oldest, socket.SHUT_RDWR)
            self._free.acquire()
        with self._lock:
            self._open[request] = request
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._open[request]
            self._free.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """The same, once whatever is raised is handled."""
        request.settimeout(TIMEOUT_SECONDS)
        if self.context is None:
            _Handler(request, client_address, self)
            return
        with self.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as wrapped:
            with self._lock:
                self._open[request] = wrapped
            wrapped.do_handshake()
            _Handler(wrapped, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes, dawdles or speaks something else is nothing to tell; a defect is."""
        error = sys.exception()
        if not isinstance(error, OSError):
            log.error("a request failed", exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request and closes."""

    server: _Server
    server_version = "hyper2kvmd"
    sys_version = ""
    error_content_type = PLAIN
    error_message_format = "%(code)d %(message)s\n"

    def handle(self) -> None:
        """Read the request within TIMEOUT_SECONDS, and answer it."""
        self.rfile = io.BytesIO(self._head())
        self.handle_one_request()

    def _head(self) -> bytes:
        """The request without its body; empty if it does not come, or has no end."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        head = b""
        while b"\n\r\n" not in head and b"\n\n" not in head:
            self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
            block = self.connection.recv(4096)
            if not block or len(head) > HEAD_LIMIT:
                return b""
            head += block
        self.connection.settimeout(TIMEOUT_SECONDS)
        return head

    def do_GET(self) -> None:
        """Answer with a page, or that there is none."""
        path, _, query = self.path.partition("?")
        page = self.server.pages.get(path)
        accept = ",".join(self.headers.get_all("Accept", []))
        others = " ".join(self.server.pages)
        answer = page(query, accept) if page else Answer(404, PLAIN, f"no such page; there are {others}\n".encode())
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        for name, value in answer.headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            # In parts: the time limit is one for each, and a page of thousands of VMs may come over a slow line.
            for start in range(0, len(answer.body), PART):
                self.wfile.write(answer.body[start : start + PART])

    do_HEAD = do_GET

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing: there would be a line for every scrape."""


def _tls(settings: TlsServer) -> ssl.SSLContext | None:
    """TLS as the settings have it; None for none. Raise SettingsError for files that cannot be used."""
    if settings.cert_file is None or settings.key_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}[settings.min_version]
    certificate, key = _readable("cert_file", settings.cert_file), _readable("key_file", settings.key_file)
    try:
        # Without an answer to a question for a passphrase, OpenSSL asks at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise SettingsError(
            f"metrics.tls_server_config: {certificate} and {key} cannot be used: {error.strerror or error};"
            " they must be a certificate in PEM and its private key, without a passphrase"
        ) from None
    if settings.client_ca_file is not None:
        required = settings.client_auth_type == "RequireAndVerifyClientCert"
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        authorities = _readable("client_ca_file", settings.client_ca_file)
        try:
            context.load_verify_locations(authorities)
        except OSError as error:
            raise SettingsError(
                f"metrics.tls_server_config.client_ca_file: {authorities} cannot be used: {error.strerror or error};"
                " it must hold certificates of authorities, in PEM"
            ) from None
    return context


def _readable(key: str, path: Path) -> Path:
    """The absolute path of a file of TLS, which can be read. Raise SettingsError."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if not path.is_absolute() and credentials is None:
        raise SettingsError(
            f"metrics.tls_server_config.{key}: {path} names a credential, and systemd has handed over none;"
            f" add LoadCredential={path}:FILE to the unit, or write an absolute path"
        )
    path = Path(credentials or "/") / path
    try:
        path.open("rb").close()
    except OSError as error:
        raise SettingsError(
            f"metrics.tls_server_config.{key}: {path} cannot be read: {error.strerror};"
            " name a file that the service's user can read"
        ) from None
    return path
