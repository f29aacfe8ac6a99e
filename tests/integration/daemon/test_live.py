"""The campaign's page of a real daemon, over real HTTP and TLS, and in a real browser."""

from __future__ import annotations

import http.client
import json
import re
import signal
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from selenium import webdriver

from hyper2kvmd.queue.hosts import this_host
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport
from tests.integration.daemon.test_daemon import change, daemon, done, free_port, wait_until
from tests.integration.daemon.test_metrics import (
    SLOW_CONVERT,
    Client,
    certificates,  # noqa: F401  # a fixture
    serving,
    tls,
    trusting,
)
from tests.integration.report.conftest import browser  # noqa: F401  # a fixture

INDEX = "/metrics\n/healthz\n/readyz\n"
HOSTILE = "<script>alert(1)</script> & \"'{{ 7*7 }}"


def answer(port: int, path: str = "/", method: str = "GET") -> tuple[int, dict[str, str], str]:
    """The status, the headers and the text of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        found = connection.getresponse()
        return found.status, dict(found.getheaders()), found.read().decode()
    finally:
        connection.close()


def shows(client: Client, *texts: str) -> bool:
    """Whether the page has all of them, now or as soon as it is made again."""
    page = client.get("/")[1]
    return all(text in page for text in texts)


def test_the_page_is_there_if_it_is_asked_for_and_a_reload_is_enough(scratch: Settings, tmp_path: Path) -> None:
    with serving(scratch) as (process, client):
        assert (200, INDEX) == client.get("/")
        for page, expected in ((True, "0 of 0 VMs are done"), (False, INDEX)):
            config = change(scratch, metrics={"listen": f"127.0.0.1:{client.port}", "page": page})
            (tmp_path / "daemon.json").write_text(config.model_dump_json(by_alias=True))
            process.send_signal(signal.SIGHUP)
            wait_until(lambda expected=expected: expected in client.get("/")[1])  # type: ignore[misc]
            assert (404, "no such page; there are / /metrics /healthz /readyz\n") == client.get("/vm/web01")


def test_it_follows_each_job_to_its_end(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    fake("qemu-img", SLOW_CONVERT.replace("RELEASE", str(tmp_path / "release")))
    scratch.plan_dir.mkdir(exist_ok=True)
    (scratch.plan_dir / "later.yaml").write_text("wave: '7'\nhold: true\nnotes: ask Ann\n")
    with serving(change(scratch, convert={"engine": "qemu-img"}), page=True) as (_, client):
        make_export("later")
        export = make_export("web01", format="qcow2")
        wait_until(lambda: shows(client, "0 of 2 VMs are done", "convert 25 %", "Wave 7", "ask Ann"))
        assert "its plan puts it on hold" in client.get("/")[1]
        (tmp_path / "release").touch()
        wait_until(lambda: done(export))
        wait_until(lambda: shows(client, "1 of 2 VMs are done"))
        assert "convert 25 %" not in client.get("/")[1]
        assert this_host() in client.get("/")[1]


def test_it_can_only_be_read_and_is_kept_by_nobody(scratch: Settings) -> None:
    with serving(scratch, page=True) as (_, client):
        status, headers, text = answer(client.port)
        assert (200, "text/html; charset=utf-8") == (status, headers["Content-Type"])
        assert ("no-store", "nosniff", "30") == (
            *(headers[name] for name in ("Cache-Control", "X-Content-Type-Options", "Refresh")),
        )
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"] + text
        assert "<script" not in text
        assert {"/", "/?refresh=off"} == set(re.findall(r'href="(/[^"]*)"', text)), "no page that is not there"
        assert "Refresh" not in answer(client.port, "/?refresh=off")[1]
        assert (200, headers["Content-Length"], "") == (
            (found := answer(client.port, method="HEAD"))[0],
            found[1]["Content-Length"],
            found[2],
        )
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert 501 == answer(client.port, method=method)[0]


def test_a_hostile_name_is_text(
    scratch: Settings,
    make_export: MakeExport,
    browser: webdriver.Chrome,  # noqa: F811
) -> None:
    make_export("evil <b>&", source={"provider": "vsphere", "vm_id": HOSTILE, "vm_name": HOSTILE})
    scratch.plan_dir.mkdir(exist_ok=True)
    (scratch.plan_dir / "evil <b>&.yaml").write_text(json.dumps({"hold": True, "notes": HOSTILE}))
    with serving(scratch, page=True) as (_, client):
        wait_until(lambda: shows(client, "of 1 VMs are done"))
        browser.get_log("browser")  # type: ignore[no-untyped-call]
        browser.get(client.url)
        shown = str(browser.execute_script("return document.body.textContent"))
        assert "evil <b>&" in shown
        assert HOSTILE in shown
        assert 0 == browser.execute_script("return document.querySelectorAll('script, main b, img').length")
        assert [] == browser.get_log("browser"), "nothing that the policy refused"  # type: ignore[no-untyped-call]
        colour = browser.execute_script("return getComputedStyle(document.querySelector('.verdict')).color")
        assert "rgb(0, 0, 0)" != colour, "the style sheet is in use"


def test_with_tls_it_is_for_those_who_may_read_the_metrics(
    scratch: Settings,
    certificates: Path,  # noqa: F811
) -> None:
    port = free_port()
    served = tls(
        certificates, client_auth_type="RequireAndVerifyClientCert", client_ca_file=str(certificates / "ca.pem")
    )
    with daemon(change(scratch, metrics={"listen": f"127.0.0.1:{port}", "tls_server_config": served, "page": True})):
        client = Client(port, trusting(certificates, "client"))
        wait_until(client.up)
        wait_until(lambda: shows(client, "0 of 0 VMs are done"))
        with pytest.raises((ssl.SSLError, OSError)):
            Client(port, trusting(certificates)).get("/")
        with pytest.raises((http.client.HTTPException, OSError)):
            answer(port)


def test_it_shows_no_old_news_when_the_exports_cannot_be_read(scratch: Settings, make_export: MakeExport) -> None:
    make_export("web01")
    with serving(change(scratch, scan_interval_seconds=1), page=True) as (_, client):
        wait_until(lambda: shows(client, "1 of 1 VMs are done"))
        away = scratch.exports_dir.with_name("away")
        scratch.exports_dir.rename(away)
        wait_until(lambda: client.get("/")[0] == 503)
        assert f"cannot read {scratch.exports_dir}: No such file or directory\n" == client.get("/")[1]
        away.rename(scratch.exports_dir)
        wait_until(lambda: shows(client, "1 of 1 VMs are done"))


def test_many_readers_cost_one_page_and_hold_up_no_scrape(scratch: Settings, make_export: MakeExport) -> None:
    make_export("web01")
    with serving(scratch, page=True) as (_, client):
        wait_until(lambda: shows(client, "1 of 1 VMs are done"))
        stamps = set()
        began = time.monotonic()
        for _ in range(50):
            stamps.add(client.get("/")[1])
            assert 200 == client.get("/metrics")[0]
        assert len(stamps) <= 2 + (time.monotonic() - began) / 5
