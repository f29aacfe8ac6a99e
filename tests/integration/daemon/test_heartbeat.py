"""The heartbeat of a real daemon, and a real server that waits for it."""

from __future__ import annotations

import io
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import structlog

from hyper2kvmd.daemon import heartbeat
from hyper2kvmd.daemon.heartbeat import Heartbeat
from hyper2kvmd.settings.model import Heartbeat as Receiver
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport
from tests.integration.daemon.test_daemon import change, daemon, done, free_port, wait_until
from tests.integration.daemon.test_metrics import Client


class Switch:
    """A dead man's switch: keeps what was called, and answers with `status`; with 0, it does not answer."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.times: list[float] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.times.append(time.monotonic())
                outer.calls.append((self.command, self.path))
                if outer.status == 0:
                    time.sleep(20)
                    return
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_GET

            def log_message(self, format: str, *values: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/ping/sekrit"


@contextmanager
def switch() -> Iterator[Switch]:
    made = Switch()
    threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()


def beating(scratch: Settings, url: str, port: int = 0, **more: object) -> Settings:
    listen = f"127.0.0.1:{port}" if port else ""
    return change(scratch, notify={"heartbeat": {"url": url, **more}}, metrics={"listen": listen})


def test_a_daemon_calls_while_all_is_well_and_stays_silent_while_it_is_not(
    scratch: Settings, make_export: MakeExport
) -> None:
    port = free_port()
    with switch() as server:
        server.status = 404
        with daemon(beating(scratch, server.url, port, interval_seconds=10)):
            client = Client(port)
            wait_until(client.up)
            wait_until(lambda: client.metric("task_failures_total", task="heartbeat") >= 1)
            server.status = 200
            wait_until(lambda: len(server.calls) >= 2)
            assert {("GET", "/ping/sekrit")} == set(server.calls)
            assert 9 < server.times[1] - server.times[0]
            away = scratch.exports_dir.with_name("away")
            scratch.exports_dir.rename(away)
            wait_until(lambda: time.monotonic() - server.times[-1] > 15)  # one call is missing
            silent = len(server.calls)
            away.rename(scratch.exports_dir)
            wait_until(lambda: len(server.calls) > silent)


def test_a_reload_begins_changes_and_ends_it(scratch: Settings, tmp_path: Path) -> None:
    port = free_port()
    with switch() as first, switch() as second:
        config = change(scratch, metrics={"listen": f"127.0.0.1:{port}"})
        with daemon(config) as process:
            client = Client(port)
            wait_until(client.up)
            for server in (first, second):
                changed = beating(config, server.url, port, interval_seconds=10)
                (tmp_path / "daemon.json").write_text(changed.model_dump_json(by_alias=True))
                process.send_signal(signal.SIGHUP)
                wait_until(lambda server=server: bool(server.calls))  # type: ignore[misc]
            known = len(first.calls)
            (tmp_path / "daemon.json").write_text(config.model_dump_json(by_alias=True))
            before = client.metric("config_last_reload_success_timestamp_seconds")
            process.send_signal(signal.SIGHUP)
            wait_until(lambda: client.metric("config_last_reload_success_timestamp_seconds") > before)
            ended = len(second.calls)
            time.sleep(12)
            assert (known, ended) == (len(first.calls), len(second.calls))


def test_a_receiver_that_hangs_holds_up_no_job_and_no_end(scratch: Settings, make_export: MakeExport) -> None:
    with switch() as server:
        server.status = 0
        with daemon(beating(scratch, server.url, interval_seconds=10, timeout_seconds=300)) as process:
            wait_until(lambda: bool(server.calls))
            export = make_export()
            wait_until(lambda: done(export))
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            assert time.monotonic() - began < 15, "as long as it hangs"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a heartbeat logs that does not wait long."""
    stream = io.StringIO()
    monkeypatch.setattr(heartbeat, "log", structlog.wrap_logger(structlog.PrintLogger(stream)))
    monkeypatch.setattr(heartbeat, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "RETRY_SECONDS", 0.05)
    return stream


def test_it_is_called_as_soon_as_all_is_well_again(said: io.StringIO) -> None:
    well = threading.Event()
    with switch() as server:
        beat = Heartbeat(well.is_set, lambda: None)
        beat.apply(Receiver(url=server.url))
        time.sleep(0.5)
        assert [] == server.calls
        well.set()
        wait_until(lambda: len(server.calls) == 1, 20)
        beat.apply(Receiver())


def test_a_receiver_that_fails_is_called_again_soon_said_once_and_counted_each_time(said: io.StringIO) -> None:
    failed: list[int] = []
    with switch() as server:
        server.status = 404
        beat = Heartbeat(lambda: True, lambda: failed.append(1))
        beat.apply(Receiver(url=server.url))
        wait_until(lambda: len(failed) >= 3, 20)
        server.status = 200
        wait_until(lambda: "the heartbeat works again" in said.getvalue(), 20)
        beat.apply(Receiver())
        text = said.getvalue()
        assert (1, 1) == (text.count("the heartbeat failed"), text.count("the heartbeat works again"))
        assert f"http://127.0.0.1:{server.server.server_address[1]} answered 404 Not Found" in text
        assert "correct notify.heartbeat.url" in text
        assert "sekrit" not in text
