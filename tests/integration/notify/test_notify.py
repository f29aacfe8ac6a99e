"""Webhooks and hooks with real receivers, real programs and real migrations."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.files import timestamp
from hyper2kvmd.notify import outbox
from hyper2kvmd.queue.names import CANCEL, CUTOVER, LOG, REPORT
from hyper2kvmd.report.cutover import CutoverReport
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport, report_of, run_job, write_manifest
from tests.integration.daemon.test_daemon import free_port, wait_until
from tests.integration.job.test_kill import is_alive, start

PROGRAM = (sys.executable, "-m", "hyper2kvmd.ctl", "notify")
Answer = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(20)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """One byte of an endless header, again and again, each well within any time limit of a socket."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(200):
        handler.wfile.write(b"x")
        time.sleep(0.1)


class Receiver:
    """An HTTP server that answers as it is told to, 200 when it was told nothing, and keeps what it got."""

    def __init__(self, port: int, context: ssl.SSLContext | None) -> None:
        self.answers: list[Answer] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.paths.append(self.path)
                outer.headers.append(dict(self.headers))
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = outer.answers.pop(0) if outer.answers else status(200)
                try:
                    answer(self)
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *values: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.url = f"http{'' if context is None else 's'}://127.0.0.1:{self.port}/hooks/sekrit-path"


@contextmanager
def receiver(port: int = 0, context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    made = Receiver(port, context)
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()


def with_webhook(scratch: Settings, url: str, **webhook: Any) -> Settings:
    """The settings with a webhook that is tried again after a second."""
    shape = scratch.model_dump(by_alias=True)
    shape["notify"] = {"webhook": {"url": url, "timeout_seconds": 2, **webhook}}
    shape["retry"] = {"delay_seconds": 0, "max_delay_seconds": 0}
    shape["hooks"] = {"directory": scratch.work_dir.parent / "hooks.d"}
    return Settings.model_validate(shape)


def command(config: Settings) -> list[str]:
    path = config.work_dir.parent / "notify.json"
    path.write_text(config.model_dump_json(by_alias=True))
    return [*PROGRAM, "--config", str(path)]


def notify(config: Settings, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One run, after what is due has become so."""
    due = outbox.standing(config).due
    time.sleep(min(max((due or 0) - time.time(), 0), 5))
    return subprocess.run(
        [*command(config), *options],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env={**os.environ, **environment},
    )


def put_hook(config: Settings, occasion: str, name: str, script: str) -> Path:
    hook = config.hooks.directory / occasion / name
    hook.parent.mkdir(parents=True, exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{script}\n")
    hook.chmod(0o755)
    return hook


def one_of_each(make_export: MakeExport, config: Settings) -> dict[str, Path]:
    """A real export for every end that a job can have."""
    made = {name: make_export(name) for name in ("succeeded", "failed", "blocked", "rejected", "cancelled")}
    disk = made["failed"] / "failed-disk-0.raw"
    disk.write_bytes(os.urandom(disk.stat().st_size))
    (config.output_dir / "blocked-disk-0.qcow2").write_text("somebody else's")
    (made["rejected"] / "manifest.json").write_text("{}")
    (made["cancelled"] / CANCEL).touch()
    for name, export in made.items():
        run_job(export, config)
        assert name == report_of(export)["status"]
    return made


def test_every_end_is_told_once(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server:
        config = with_webhook(scratch, server.url)
        outbox.begin(config)
        made = one_of_each(make_export, config)
        done = notify(config)
        assert (0, "5 delivered, 0 failed; 0 pending, 0 given up so far\n") == (done.returncode, done.stdout), (
            done.stderr
        )
        assert {*made} == {body["event"] for body in server.bodies}
        for body in server.bodies:
            assert report_of(made[body["status"]]) == body["report"]
            assert str(made[body["status"]] / REPORT) == body["report_path"]
        assert 0 == notify(config).returncode
        assert 5 == len(server.bodies)
        assert {"application/json"} == {headers["Content-Type"] for headers in server.headers}
        assert {"/hooks/sekrit-path"} == set(server.paths)


def test_only_the_ends_that_are_wished_for_are_told(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server:
        config = with_webhook(scratch, server.url, events=["failed", "blocked"])
        outbox.begin(config)
        one_of_each(make_export, config)
        notify(config)
        assert {"failed", "blocked"} == {body["event"] for body in server.bodies}


def test_nothing_is_told_of_what_is_tried_again_and_of_dry_runs(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None]
) -> None:
    with receiver() as server:
        config = with_webhook(scratch, server.url)
        outbox.begin(config)
        assert 0 == run_job(make_export("dry", options={"dry_run": True}), config).returncode
        fake("qemu-img", '[ "$1" = convert ] && kill -KILL $$\nexec /usr/bin/qemu-img "$@"\n')
        export = make_export("again")
        assert 75 == run_job(export, config).returncode
        assert ("retrying", True) == (report_of(export)["status"], report_of(scratch.exports_dir / "dry")["dry_run"])
        assert (0, []) == (notify(config).returncode, server.bodies)
        fake("qemu-img", 'exec /usr/bin/qemu-img "$@"\n')
        assert 0 == run_job(export, config).returncode
        assert 0 == notify(config).returncode
        assert ["again"] == [body["vm"] for body in server.bodies]


def test_what_a_receiver_that_is_down_missed_is_delivered_later_and_once(
    scratch: Settings, make_export: MakeExport
) -> None:
    port = free_port()
    config = with_webhook(scratch, f"http://127.0.0.1:{port}/")
    outbox.begin(config)
    assert 0 == run_job(make_export(), config).returncode
    done = notify(config)
    assert 1 == done.returncode
    assert f"http://127.0.0.1:{port} cannot be reached: Connection refused" in done.stderr
    assert outbox.standing(config).due is not None
    with receiver(port) as server:
        assert 0 == notify(config).returncode
        assert 0 == notify(config).returncode
        assert ["web01"] == [body["vm"] for body in server.bodies]
    assert outbox.Standing() == outbox.standing(config)


def test_a_receiver_that_fails_three_times_gets_the_same_message_again(
    scratch: Settings, make_export: MakeExport
) -> None:
    with receiver() as server:
        server.answers = [status(500)] * 3
        config = with_webhook(scratch, server.url)
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        assert [1, 1, 1, 0, 0] == [notify(config).returncode for _ in range(5)]
        assert 4 == len(server.bodies)
        assert 1 == len({body["id"] for body in server.bodies})


def test_a_message_that_nobody_takes_is_given_up(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server:
        server.answers = [status(404)] * 9
        config = with_webhook(scratch, server.url, max_attempts=2)
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        first, second, third = (notify(config) for _ in range(3))
        assert "answered 404 Not Found" in first.stderr
        assert "correct notify.webhook.url" in first.stderr
        assert "given up" in second.stderr
        assert (1, 1, 0) == (first.returncode, second.returncode, third.returncode)
        assert (2, outbox.Standing(None, 0, 1)) == (len(server.bodies), outbox.standing(config))


def test_a_cutover_is_told_to_the_webhook_when_it_is_over_and_runs_no_hook(
    scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    with receiver() as server:
        config = with_webhook(scratch, server.url, events=["cutover"])
        put_hook(config, "post-job", "10-list", f"echo $H2K_VM >> {tmp_path}/hooked")
        outbox.begin(config)
        export = make_export("web01")
        assert 0 == run_job(export, config).returncode
        job = report_of(export)
        now = timestamp(time.time())
        made = {"uuid": "1", "name": "web01", "uri": "qemu:///system"}
        common = {"job": job["job"], "migrated_at": job["finished_at"], "vm_name": "web01", "domain": made}
        for status, finished in (("running", None), ("verified", now)):
            cutover = {**common, "status": status, "started_at": now, "finished_at": finished, "host": job["host"]}
            (export / CUTOVER).write_bytes(CutoverReport.model_validate(cutover).to_bytes())
            assert 0 == notify(config).returncode
            assert (status == "verified") == bool(server.bodies)
        assert 0 == notify(config).returncode
        assert [("cutover", "verified")] == [(body["event"], body["status"]) for body in server.bodies]
        assert "web01\n" == (tmp_path / "hooked").read_text()


@pytest.mark.parametrize("answer", [hang, drip])
def test_a_receiver_that_hangs_holds_up_neither_hooks_nor_other_messages(
    scratch: Settings, make_export: MakeExport, tmp_path: Path, answer: Answer
) -> None:
    with receiver() as server:
        server.answers = [answer]
        config = with_webhook(scratch, server.url, timeout_seconds=1)
        put_hook(config, "post-job", "10-list", f"echo $H2K_VM >> {tmp_path}/told")
        outbox.begin(config)
        for name in ("first", "second"):
            assert 0 == run_job(make_export(name), config).returncode
        started = time.monotonic()
        done = notify(config)
        assert time.monotonic() - started < 20, "as long as it hangs"
        assert "did not answer within 1 s" in done.stderr
        assert ["first", "second"] == [body["vm"] for body in server.bodies]
        assert "first\nsecond\n" == (tmp_path / "told").read_text()
        assert (0, 1) == (notify(config).returncode, len({server.bodies[0]["id"], server.bodies[2]["id"]}))


def test_a_receiver_that_never_answers_is_left_alone_after_a_few_attempts(
    scratch: Settings, make_export: MakeExport
) -> None:
    with receiver() as server:
        server.answers = [hang] * 9
        config = with_webhook(scratch, server.url, timeout_seconds=1)
        outbox.begin(config)
        for number in range(5):
            assert 0 == run_job(make_export(f"vm{number}"), config).returncode
        assert 1 == notify(config).returncode
        assert (outbox.STRIKES, 5) == (len(server.bodies), outbox.standing(config).pending)


def test_a_crash_after_the_delivery_has_the_same_message_told_again(scratch: Settings, make_export: MakeExport) -> None:
    killed = threading.Event()

    def kill(handler: BaseHTTPRequestHandler) -> None:
        process.kill()
        killed.set()

    with receiver() as server:
        server.answers = [kill]
        config = with_webhook(scratch, server.url)
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        process = subprocess.Popen(command(config), stdin=subprocess.DEVNULL)
        assert killed.wait(30)
        assert -signal.SIGKILL == process.wait(120)
        assert 0 == notify(config).returncode
        assert (2, 1) == (len(server.bodies), len({body["id"] for body in server.bodies}))
        assert (0, 2) == (notify(config).returncode, len(server.bodies))


def test_being_stopped_counts_as_no_attempt(scratch: Settings, make_export: MakeExport, tmp_path: Path) -> None:
    config = with_webhook(scratch, "https://127.0.0.1/", events=[])
    put_hook(config, "post-job", "10-slow", f"sleep 60 & echo $! >> {tmp_path}/pids; wait")
    outbox.begin(config)
    assert 0 == run_job(make_export(), config).returncode
    for count in range(1, 4):
        process = subprocess.Popen(command(config), stdin=subprocess.DEVNULL)
        wait_until(lambda n=count: (tmp_path / "pids").exists() and n == len((tmp_path / "pids").read_text().split()))  # type: ignore[misc]
        process.terminate()
        assert 130 == process.wait(120)
        assert not any(map(is_alive, map(int, (tmp_path / "pids").read_text().split())))
    assert (1, 0) == (outbox.standing(config).pending, outbox.standing(config).given_up)


def test_a_hook_that_kills_whoever_runs_it_is_given_up(
    scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    config = with_webhook(scratch, "https://127.0.0.1/", events=[])
    put_hook(config, "post-job", "10-evil", f"echo . >> {tmp_path}/runs; kill -KILL $PPID")
    outbox.begin(config)
    assert 0 == run_job(make_export(), config).returncode
    assert [-signal.SIGKILL, -signal.SIGKILL, 1, 0] == [notify(config).returncode for _ in range(4)]
    assert (2, 1) == (len((tmp_path / "runs").read_text().split()), outbox.standing(config).given_up)


def test_a_redirect_is_not_followed(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server, receiver() as elsewhere:
        server.answers = [status(307, Location=elsewhere.url)]
        config = with_webhook(scratch, server.url)
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        done = notify(config)
        assert (1, []) == (done.returncode, elsewhere.bodies)
        assert "answered 307 Temporary Redirect" in done.stderr


def test_proxies_of_the_environment_are_not_used(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server:
        config = with_webhook(scratch, server.url)
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        nowhere = f"http://127.0.0.1:{free_port()}"
        assert 0 == notify(config, http_proxy=nowhere, HTTP_PROXY=nowhere, ALL_PROXY=nowhere).returncode


def test_headers_reach_the_receiver_and_no_log(scratch: Settings, make_export: MakeExport, tmp_path: Path) -> None:
    with receiver() as server:
        server.answers = [status(401)]
        (tmp_path / "webhook").write_text("Authorization: Bearer sekrit-token\nX-Team: sekrit-ops\n")
        (tmp_path / "webhook").chmod(0o400)
        config = with_webhook(scratch, server.url, headers_credential="webhook").model_copy(
            update={"log": scratch.log.model_copy(update={"level": "debug"})}
        )
        outbox.begin(config)
        export = make_export()
        assert 0 == run_job(export, config).returncode
        refused = notify(config, CREDENTIALS_DIRECTORY=str(tmp_path))
        assert 1 == refused.returncode
        assert "headers_credential" in refused.stderr
        done = notify(config, CREDENTIALS_DIRECTORY=str(tmp_path))
        assert 0 == done.returncode
        assert ["Bearer sekrit-token"] * 2 == [headers["Authorization"] for headers in server.headers]
        assert ["sekrit-ops"] * 2 == [headers["X-Team"] for headers in server.headers]
        said = refused.stderr + refused.stdout + done.stderr + done.stdout
        logged = (export / LOG).read_text() + (config.work_dir / outbox.STATE).read_bytes().decode(errors="replace")
        assert "sekrit" not in said + logged


# TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A certificate for 127.0.0.1 with its key, which is its own authority, and another authority."""
    directory = tmp_path_factory.mktemp("tls")
    for name, address in (("good", "127.0.0.1"), ("other", "127.0.0.2")):
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
                *("-addext", f"subjectAltName=IP:{address}"),
                *("-keyout", directory / f"{name}.key", "-out", directory / f"{name}.pem"),
            ],
            check=True,
            capture_output=True,
        )
    return {path.name: path for path in directory.iterdir()}


def tls(certificates: dict[str, Path], name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates[f"{name}.pem"], certificates[f"{name}.key"])
    return context


def test_tls_needs_a_certificate_of_the_authority_and_for_the_address(
    scratch: Settings, make_export: MakeExport, certificates: dict[str, Path]
) -> None:
    exported = make_export()
    with receiver(context=tls(certificates, "good")) as good, receiver(context=tls(certificates, "other")) as other:
        right = with_webhook(scratch, good.url, ca_file=certificates["good.pem"])
        outbox.begin(right)
        assert 0 == run_job(exported, right).returncode
        for config in (
            with_webhook(scratch, good.url),  # the system's authorities
            with_webhook(scratch, good.url, ca_file=certificates["other.pem"]),
            with_webhook(scratch, other.url, ca_file=certificates["other.pem"]),  # for another address
        ):
            done = notify(config)
            assert 1 == done.returncode
            assert "its certificate is not accepted" in done.stderr
        done = notify(with_webhook(scratch, good.url, ca_file=certificates["good.key"]))
        assert "notify.webhook.ca_file" in done.stderr
        assert ([], []) == (good.bodies, other.bodies)
        assert 0 == notify(right).returncode
        assert ["web01"] == [body["vm"] for body in good.bodies]


def test_a_receiver_that_speaks_no_tls_says_so(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server:
        config = with_webhook(scratch, server.url.replace("http:", "https:"))
        outbox.begin(config)
        assert 0 == run_job(make_export(), config).returncode
        done = notify(config)
        assert 1 == done.returncode
        assert "cannot be reached: " in done.stderr


# Hostile exports ------------------------------------------------------------------------------------------------


def test_hostile_names_make_valid_json_and_one_line(scratch: Settings, make_export: MakeExport) -> None:
    name = 'x"\\\n[2026] web01: succeeded \u2028 <!channel>'
    with receiver() as server:
        config = with_webhook(scratch, server.url)
        outbox.begin(config)
        export = make_export("evil", source={"provider": name, "vm_id": name, "vm_name": name})
        run_job(export, config)
        done = notify(config)
        assert 0 == done.returncode, done.stderr
        (body,) = server.bodies
        assert report_of(export)["status"] == body["status"]
        for line in (body["summary"], body["text"]):
            assert 1 == len(line.splitlines())
        assert "<!channel>" not in body["text"]


# The command ----------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_told_and_tells_nothing(scratch: Settings, make_export: MakeExport) -> None:
    with receiver() as server:
        config = with_webhook(scratch, server.url)
        put_hook(config, "post-job", "10-cmdb", "exit 1")
        outbox.begin(config)
        export = make_export()
        assert 0 == run_job(export, config).returncode
        before = (config.work_dir / outbox.STATE).read_bytes()
        done = notify(config, "--dry-run")
        document = report_of(export)
        id = f"{document['job']}/1/{document['finished_at']}"
        assert (0, f"{id}: post-job/10-cmdb\n{id}: webhook\n") == (done.returncode, done.stdout)
        assert ([], before) == (server.bodies, (config.work_dir / outbox.STATE).read_bytes())
        shape = json.loads(notify(config, "--dry-run", "--json").stdout)
        assert [{"id": id, "receiver": "post-job/10-cmdb"}, {"id": id, "receiver": "webhook"}] == shape


def test_a_directory_that_cannot_be_written_is_named(scratch: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    argv = [*command(scratch), "--set", f"work_dir={tmp_path}/file/work"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    said = f"hyper2kvmctl: {tmp_path}/file/work: Not a directory; check the path, here or in the settings\n"
    assert (3, said) == (done.returncode, done.stderr)


# The hooks after the end ----------------------------------------------------------------------------------------


def test_hooks_after_the_end_run_in_order_once_and_what_they_say_is_in_the_log(
    scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    config = with_webhook(scratch, "https://127.0.0.1/", events=[])
    for name in ("20-second", "10-first"):
        put_hook(config, "post-job", name, f"echo {name} >> {tmp_path}/order; echo said by {name} of $H2K_VM")
    put_hook(config, "post-job", "30-report", f"cat > {tmp_path}/stdin; env > {tmp_path}/env")
    put_hook(config, "post-job", "40-old.dpkg-old", f"touch {tmp_path}/old")
    outbox.begin(config)
    exports = [make_export(name) for name in ("web01", "web02")]
    for export in exports:
        assert 0 == run_job(export, config).returncode
    done = notify(config)
    assert (0, "6 delivered, 0 failed; 0 pending, 0 given up so far\n") == (done.returncode, done.stdout), done.stderr
    assert 0 == notify(config).returncode
    assert ["10-first", "20-second"] * 2 == (tmp_path / "order").read_text().split()
    assert report_of(exports[1]) == json.loads((tmp_path / "stdin").read_text())
    found = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    report = exports[1] / REPORT
    expected = ("web02", "succeeded", str(exports[1]), str(report))
    assert expected == tuple(found[f"H2K_{name}"] for name in ("VM", "STATUS", "EXPORT", "REPORT"))
    for export, other in (exports, exports[::-1]):
        text = (export / LOG).read_text()
        assert f"said by 10-first of {export.name}" in text
        assert f"of {other.name}" not in text
    assert not (tmp_path / "old").exists()


def test_a_hook_that_others_could_have_written_is_not_run_and_holds_up_no_other(
    scratch: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    config = with_webhook(scratch, "https://127.0.0.1/", events=[])
    bad = put_hook(config, "post-job", "10-bad", f"touch {tmp_path}/bad")
    bad.chmod(0o777)
    put_hook(config, "post-job", "20-good", f"touch {tmp_path}/good")
    outbox.begin(config)
    assert 0 == run_job(make_export(), config).returncode
    done = notify(config)
    assert 1 == done.returncode
    assert f"the hook {bad} has mode 0777" in done.stderr
    assert (False, True) == ((tmp_path / "bad").exists(), (tmp_path / "good").exists())
    bad.chmod(0o755)
    assert 0 == notify(config).returncode
    assert (tmp_path / "bad").exists()


# The hooks before the import ------------------------------------------------------------------------------------


@pytest.fixture
def importing(scratch: Settings) -> Settings:
    """Settings that define domains in libvirt's test driver, which forgets them with its process."""
    shape = scratch.model_dump(by_alias=True)
    shape["libvirt"] = {"uri": "test:///default", "import": True, "default_network": "default"}
    shape["hooks"] = {"directory": scratch.work_dir.parent / "hooks.d", "timeout_seconds": 5}
    return Settings.model_validate(shape)


def test_hooks_before_the_import_see_the_disks_and_the_domain_that_is_to_be(
    importing: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    put_hook(importing, "pre-import", "20-b", f"echo b >> {tmp_path}/order; echo looked at $H2K_VM")
    put_hook(importing, "pre-import", "10-a", f"echo a >> {tmp_path}/order; cat > {tmp_path}/stdin")
    export = make_export(metadata={"tags": {"owner": "ops"}})
    done = run_job(export, importing)
    assert 0 == done.returncode, done.stderr
    assert "a\nb\n" == (tmp_path / "order").read_text()
    seen, document = json.loads((tmp_path / "stdin").read_text()), report_of(export)
    assert ("importing", document["job"], "web01") == (seen["status"], seen["job"], seen["vm_name"])
    assert (document["disks"], document["domain"]) == (seen["disks"], seen["domain"])
    assert Path(seen["disks"][0]["target"]).exists()
    assert document["tags"] == seen["tags"]
    assert ["publish", "hook", "import"] == [stage["name"] for stage in document["stages"]][-3:]
    assert "looked at web01" in (export / LOG).read_text()


def test_without_hooks_there_is_no_such_stage(importing: Settings, make_export: MakeExport) -> None:
    export = make_export()
    assert 0 == run_job(export, importing).returncode
    assert "hook" not in [stage["name"] for stage in report_of(export)["stages"]]


def test_a_hook_that_says_no_blocks_the_job_and_after_mending_nothing_is_converted_again(
    importing: Settings, make_export: MakeExport, fake: Callable[[str, str], None]
) -> None:
    hook = put_hook(importing, "pre-import", "10-window", "echo no change window before monday >&2; exit 7")
    export = make_export()
    assert 1 == run_job(export, importing).returncode
    document = report_of(export)
    error = document["error"]
    assert ("blocked", "hook_failed", "hook") == (document["status"], error["code"], error["stage"])
    assert f"the hook {hook} exited 7: no change window before monday" == error["message"]
    assert "no change window before monday" in error["tail"]
    (disk,) = importing.output_dir.iterdir()
    before = disk.stat()
    put_hook(importing, "pre-import", "10-window", "exit 0")
    fake("qemu-img", '[ "$1" = convert ] && exit 1\nexec /usr/bin/qemu-img "$@"\n')
    retry = subprocess.run(
        [sys.executable, "-m", "hyper2kvmd.ctl", "retry", "web01", "--set", f"exports_dir={importing.exports_dir}"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert 0 == retry.returncode, retry.stderr
    done = run_job(export, importing)
    assert 0 == done.returncode, done.stderr
    assert ("succeeded", "web01") == (report_of(export)["status"], report_of(export)["domain"]["name"])
    assert (before.st_ino, before.st_mtime_ns) == (disk.stat().st_ino, disk.stat().st_mtime_ns)


def test_a_hook_that_hangs_blocks_the_job_when_its_time_is_over(importing: Settings, make_export: MakeExport) -> None:
    shape = {**importing.model_dump(by_alias=True)}
    shape["hooks"]["timeout_seconds"] = 1
    config = Settings.model_validate(shape)
    put_hook(config, "pre-import", "10-slow", "echo asking; sleep 60")
    export = make_export()
    assert 1 == run_job(export, config).returncode
    assert "did not end within 1 s: asking" in report_of(export)["error"]["message"]


def test_a_hook_that_cannot_be_run_is_found_before_the_copy(importing: Settings, make_export: MakeExport) -> None:
    put_hook(importing, "pre-import", "10-open", "exit 0").chmod(0o777)
    export = make_export()
    assert 1 == run_job(export, importing).returncode
    document = report_of(export)
    assert ("blocked", "hook_failed", "plan") == (
        document["status"],
        document["error"]["code"],
        document["error"]["stage"],
    )
    assert "has mode 0777" in document["error"]["message"]
    assert [] == list(importing.output_dir.iterdir())


def test_hooks_are_not_asked_where_no_domain_is_defined(
    importing: Settings, make_export: MakeExport, tmp_path: Path
) -> None:
    put_hook(importing, "pre-import", "10-a", f"touch {tmp_path}/ran")
    assert 0 == run_job(make_export("dry"), importing, "--dry-run").returncode
    assert 0 == run_job(make_export("none"), importing, "--set", "libvirt.import=false").returncode
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["cancel", "SIGTERM"])
def test_a_job_can_be_stopped_in_a_hook(importing: Settings, make_export: MakeExport, tmp_path: Path, how: str) -> None:
    shape = importing.model_dump(by_alias=True)
    shape["hooks"]["timeout_seconds"] = 600
    config = Settings.model_validate(shape)
    put_hook(config, "pre-import", "10-slow", f"sleep 300 & echo $$ $! > {tmp_path}/pids; wait")
    export = make_export()
    runner = start(export, config)
    wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().strip() != "", 60)
    if how == "cancel":
        (export / CANCEL).touch()
    else:
        runner.terminate()
    assert (1 if how == "cancel" else 75) == runner.wait(20)
    assert not any(map(is_alive, map(int, (tmp_path / "pids").read_text().split())))
    if how == "cancel":
        assert ("cancelled", []) == (report_of(export)["status"], list(config.output_dir.iterdir()))
        return
    assert not (export / REPORT).exists()
    put_hook(config, "pre-import", "10-slow", "exit 0")
    assert 0 == run_job(export, config).returncode


def test_a_manifest_has_no_say_in_hooks(importing: Settings, make_export: MakeExport, tmp_path: Path) -> None:
    """A directory in the export that is called like one of ours is nobody's."""
    export = make_export()
    put = importing.hooks.directory
    assert not put.exists()
    hook = export / "hooks.d/pre-import/10-evil"
    hook.parent.mkdir(parents=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    write_manifest(export, json.loads((export / "manifest.json").read_text())["disks"], hooks={"directory": str(put)})
    run_job(export, importing)
    assert not (tmp_path / "ran").exists()
