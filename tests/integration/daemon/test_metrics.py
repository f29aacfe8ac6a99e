"""Metrics and health of a real daemon, over real HTTP and TLS."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from watchdog.observers.api import EventEmitter

from hyper2kvmd.daemon.watch import Watch
from hyper2kvmd.job.events import STAGES
from hyper2kvmd.settings.model import Settings
from tests.conftest import MakeExport
from tests.integration.daemon.test_daemon import change, daemon, done, free_port, wait_until
from tests.integration.daemon.test_watch import network_directory, odd_mount
from tests.libvirtd import session

pytestmark = pytest.mark.timeout(1800)

READY = ["settings", "exports", "locks", "libvirt", "output", "work"]

# Stands in for qemu-img: says that a quarter is converted, and goes on when it is told to.
SLOW_CONVERT = """
if [ "$1" = convert ]; then
    printf '    (25.00/100%%)\\r'
    while [ ! -e RELEASE ]; do sleep 0.1; done
fi
exec /usr/bin/qemu-img "$@"
"""


class Client:
    """Asks one daemon."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{port}"
        self.port = port
        self._context = context

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """The status and the text of a page."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10, context=self._context) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def up(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(OSError):
            return self.get("/healthz")[0] == 200
        return False

    def metrics(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """Every metric by its name without the prefix: labels and value of its series."""
        status, text = self.get("/metrics")
        assert 200 == status
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name.removeprefix("hyper2kvmd_"), []).append((sample.labels, sample.value))
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series."""
        (value,) = [value for found, value in self.metrics()[name] if found == labels]
        return value

    def readiness(self) -> dict[str, str]:
        """Status and text of each check of /readyz, as far as they are not ok."""
        status, text = self.get("/readyz")
        lines = dict(line.split(": ", 1) for line in text.splitlines())
        assert READY == [*lines]
        wrong = {name: verdict for name, verdict in lines.items() if verdict != "ok"}
        assert (503 if wrong else 200) == status
        return wrong


@contextlib.contextmanager
def serving(settings: Settings, **metrics: Any) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """A daemon that serves on a port of its own, once it has begun."""
    client = Client(free_port())
    settings = change(settings, metrics={"listen": f"127.0.0.1:{client.port}", **metrics})
    with daemon(settings) as process:
        wait_until(client.up)
        wait_until(lambda: client.metric("last_scan_timestamp_seconds") > 0)
        yield process, client


def reload(process: subprocess.Popen[str]) -> None:
    """Have everything tried now, and not within half a minute."""
    process.send_signal(signal.SIGHUP)


def refused(settings: Settings, tmp_path: Path, command: str = "run") -> str:
    """What is said by a daemon that does not start because of its configuration."""
    config = tmp_path / "refused.json"
    # Not as a model: it would refuse it, too.
    config.write_text(json.dumps(settings) if isinstance(settings, dict) else settings.model_dump_json(by_alias=True))
    ended = subprocess.run(
        [sys.executable, "-m", "hyper2kvmd", command, "--config", config],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert 78 == ended.returncode, ended.stderr
    return ended.stderr


# Metrics ----------------------------------------------------------------------------------------------------


def test_a_job_is_shown_while_it_runs_and_counted_when_it_ends(
    scratch: Settings, make_export: MakeExport, fake: Callable[[str, str], None], tmp_path: Path
) -> None:
    fake("qemu-img", SLOW_CONVERT.replace("RELEASE", str(tmp_path / "release")))
    with serving(change(scratch, workers=1)) as (_, client):
        assert "job_info" not in client.metrics()
        source = {"vm_id": "1", "vm_name": "wëb 日本", "provider": "vsphere"}
        export = make_export("first", source=source, metadata={"tags": {"env": "production"}})
        wait_until(lambda: client.metrics()["slot_progress_ratio"] == [({"slot": "0"}, 0.25)])
        ((labels, _),) = client.metrics()["job_info"]
        assert ("0", "wëb 日本", "1") == tuple(labels[key] for key in ("slot", "vm", "attempt"))
        assert 1 + STAGES.index("convert") == client.metric("slot_stage", slot="0")
        assert "env=production" == labels["tags"]
        assert labels["job"].startswith("first-")
        assert client.metric("slot_bytes_per_second", slot="0") > 0
        assert client.metric("slot_stage_remaining_seconds", slot="0") >= 0
        assert time.time() - 60 < client.metric("slot_last_progress_timestamp_seconds", slot="0") <= time.time()
        assert 1 == client.metric("workers_busy")

        waiting = make_export("second")
        wait_until(lambda: client.metric("jobs", state="queued") == 1)
        assert time.time() - 60 < client.metric("oldest_waiting_job_timestamp_seconds") <= time.time()
        time.sleep(1)
        (tmp_path / "release").touch()
        wait_until(lambda: done(export, waiting))
        wait_until(lambda: client.metric("jobs_completed_total", result="succeeded") == 2)
        wait_until(lambda: client.metric("workers_busy") == 0)
        after = client.metrics()
        assert "job_info" not in after
        assert [True] == [math.isnan(value) for _, value in after["slot_progress_ratio"]]
        assert client.metric("bytes_read_total", stage="convert") >= 2 << 20
        assert client.metric("bytes_written_total", format="qcow2") >= 2 << 20
        assert 2 == client.metric("claims_total", outcome="won")
        assert (2, True) == (client.metric("queue_wait_seconds_count"), client.metric("queue_wait_seconds_sum") > 1)
        assert 2 == client.metric("job_duration_seconds_count", result="succeeded")
        assert client.metric("events_total") > 0
        assert client.metric("log_messages_total", level="info") >= 2


def test_a_restart_knows_what_ended_before_it(scratch: Settings, make_export: MakeExport) -> None:
    export = make_export()
    (make_export("bad") / "bad-disk-0.raw").write_bytes(os.urandom(1 << 20))
    began = time.time()
    with daemon(scratch, "--once") as process:
        process.communicate(timeout=120)
    assert done(export)
    ended = time.time()
    with serving(scratch) as (_, client):
        wait_until(lambda: client.metric("last_job_completion_timestamp_seconds", result="succeeded") > 0)
        for result in ("succeeded", "failed"):
            assert began < client.metric("last_job_completion_timestamp_seconds", result=result) < ended
        assert 0 == client.metric("last_job_completion_timestamp_seconds", result="rejected")
        assert 0 == client.metric("jobs_completed_total", result="succeeded")


def test_promtool_has_nothing_to_say(scratch: Settings, make_export: MakeExport) -> None:
    with serving(scratch) as (_, client):
        export = make_export()
        wait_until(lambda: done(export))
        wait_until(lambda: client.metric("jobs_completed_total", result="succeeded") == 1)
        text = client.get("/metrics")[1]
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=60
    )
    assert (0, "", "") == (checked.returncode, checked.stdout, checked.stderr)


def test_each_reason_for_which_the_watch_begins_anew_is_counted(tmp_path: Path) -> None:
    told: list[str] = []
    watch, root = Watch(lambda: None, told.append), tmp_path / "exports"
    root.mkdir()
    watch.ensure(root, "inotify")
    assert [] == told, "the first time is none"
    (root / "web01").mkdir()
    wait_until(lambda: told == ["event"])
    logging.getLogger("watchdog.observers.inotify_c").warning("the queue was full")
    root.rename(tmp_path / "away")
    root.mkdir()
    watch.ensure(root, "inotify")
    root.rmdir()
    watch.ensure(root, "inotify")
    root.mkdir()
    watch.ensure(root, "inotify")
    watch.ensure(root, "auto")
    for thread in [thread for thread in threading.enumerate() if isinstance(thread, EventEmitter)]:
        thread.stop()
        thread.join()
    watch.ensure(root, "auto")
    watch.ensure(root, "off")
    assert ["event", "warning", "replaced", "replaced", "settings", "died", "settings"] == told


# The address ------------------------------------------------------------------------------------------------


def test_an_open_address_without_tls_is_refused(scratch: Settings, tmp_path: Path) -> None:
    open_to_all: Any = {**json.loads(scratch.model_dump_json(by_alias=True)), "metrics": {"listen": "0.0.0.0:9"}}
    for command in ("run", "check-config"):
        assert "metrics.listen is 0.0.0.0:9, which other hosts can reach" in refused(open_to_all, tmp_path, command)


def test_by_default_only_this_host_is_served(scratch: Settings) -> None:
    assert "127.0.0.1:9878" == Settings().metrics.listen
    with serving(scratch) as (process, client):
        listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
        addresses = [line.split()[3] for line in listening.splitlines() if f"pid={process.pid}," in line]
    assert [f"127.0.0.1:{client.port}"] == addresses


def standing(client: Client) -> dict[str, str] | None:
    """What is wrong; None while nobody listens, as when the address changes, which breaks connections."""
    with contextlib.suppress(OSError):
        return client.readiness() if client.up() else None
    return None


def test_no_reload_ends_the_daemon(scratch: Settings, tmp_path: Path) -> None:
    """Whatever is written into the settings: it goes on, says what is wrong, and takes what is right again."""
    config, file = tmp_path / "daemon.json", tmp_path / "file"
    file.touch()
    with odd_mount(tmp_path) as way, serving(change(scratch, exports_dir=way)) as (process, client):
        wait_until(lambda: client.readiness() == {})
        good = config.read_text()
        document = json.loads(good)
        metrics = document["metrics"]
        for wrong, check, reason in (
            ({"exports_dir": str(file)}, "exports", "Not a directory"),
            ({"exports_dir": "/a\0b"}, "settings", "exports_dir"),
            ({"output_dir": str(file)}, "output", "cannot be written to"),
            (
                {"metrics": {**metrics, "listen": "a..b:80", "allow_insecure": True}},
                "settings",
                "a..b:80 cannot be used",
            ),
            ({"workers": [[]] * 2}, "settings", "workers"),
        ):
            config.write_text(json.dumps({**document, **wrong}))
            reload(process)
            wait_until(lambda check=check: check in (standing(client) or {}), 60)  # type: ignore[misc]
            assert reason in client.readiness()[check]
            config.write_text(good)
            reload(process)
            wait_until(lambda: standing(client) == {})


def test_an_address_that_another_has_is_refused_and_a_reload_keeps_the_old_one(
    scratch: Settings, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        moved = change(scratch, metrics={"listen": taken})
        assert f"metrics.listen: {taken} cannot be used: Address already in use" in refused(moved, tmp_path)
        with serving(scratch) as (process, client):
            (tmp_path / "daemon.json").write_text(moved.model_dump_json(by_alias=True))
            reload(process)

            def told() -> bool:
                with contextlib.suppress(OSError):  # the old address is closed for an instant
                    return "settings" in client.readiness()
                return False

            wait_until(told)
            assert taken in client.readiness()["settings"]
            assert 0 == client.metric("config_last_reload_successful")
            elsewhere = Client(free_port())
            moved = change(scratch, metrics={"listen": f"127.0.0.1:{elsewhere.port}"})
            (tmp_path / "daemon.json").write_text(moved.model_dump_json(by_alias=True))
            reload(process)
            wait_until(elsewhere.up)
            wait_until(lambda: elsewhere.metric("config_last_reload_successful") == 1)
            wait_until(lambda: elsewhere.readiness() == {})
            assert not client.up()


def test_there_are_four_pages_and_they_can_only_be_read(scratch: Settings) -> None:
    with serving(scratch) as (_, client):
        assert (200, "/metrics\n/healthz\n/readyz\n") == client.get("/")
        for path in ("/etc/passwd", "/../etc/passwd", "/metrics/", "/favicon.ico"):
            assert 404 == client.get(path)[0]
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)
        for method, status, length in (("HEAD", 200, 0), ("POST", 501, None), ("DELETE", 501, None)):
            connection.request(method, "/metrics")
            answer = connection.getresponse()
            body = answer.read()
            assert status == answer.status
            assert length in (None, len(body))
            connection.close()
        assert "application/openmetrics-text" in urllib.request.urlopen(
            urllib.request.Request(client.url + "/metrics", headers={"Accept": "application/openmetrics-text"}),
            timeout=10,
        ).headers.get("Content-Type")
        wait_until(lambda: client.get("/readyz")[0] == 200)
        found = json.loads(client.get("/readyz?format=json")[1])
        assert (True, READY) == (found["ready"], [*found["checks"]])


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01" * 500, b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 100_000, b"\n\n", b"G"]
)
def test_senseless_requests_harm_nobody(scratch: Settings, garbage: bytes) -> None:
    with serving(scratch) as (process, client):
        for _ in range(20):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", client.port)) as connection:
                connection.sendall(garbage)
        assert client.up()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output


def test_five_hundred_idle_connections_keep_nobody_out(scratch: Settings, make_export: MakeExport) -> None:
    with serving(scratch) as (process, client), contextlib.ExitStack() as stack:
        threads = len(os.listdir(f"/proc/{process.pid}/task"))
        for number in range(500):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", client.port), timeout=10))
            if number % 2:
                connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert 200 == client.get("/metrics")[0]
        assert len(os.listdir(f"/proc/{process.pid}/task")) <= threads + 20
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 60
        export = make_export()
        wait_until(lambda: done(export))
        assert client.up()


# TLS --------------------------------------------------------------------------------------------------------


def certificate(directory: Path, name: str, signer: str | None = None) -> None:
    """Make NAME.pem and NAME.key: an authority, or what `signer` signs for 127.0.0.1."""
    run = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    run += ["-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
    if signer is None:
        run += ["-addext", "keyUsage=critical,keyCertSign"]
    else:
        run += ["-CA", f"{signer}.pem", "-CAkey", f"{signer}.key", "-addext", "basicConstraints=critical,CA:FALSE"]
        run += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(run, cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an authority, a server, its renewal, a client, and a client of somebody else."""
    directory = tmp_path_factory.mktemp("tls")
    for name, signer in (
        *(("ca", None), ("server", "ca"), ("renewed", "ca"), ("client", "ca")),
        *(("foreign", None), ("stranger", "foreign")),
    ):
        certificate(directory, name, signer)
    return directory


def trusting(certificates: Path, client: str | None = None) -> ssl.SSLContext:
    """What a client needs that trusts our authority."""
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    if client is not None:
        context.load_cert_chain(certificates / f"{client}.pem", certificates / f"{client}.key")
    return context


def tls(certificates: Path, **changes: str) -> dict[str, str]:
    return {"cert_file": str(certificates / "server.pem"), "key_file": str(certificates / "server.key"), **changes}


def subject(port: int, certificates: Path) -> str:
    """Whom the server's certificate names."""
    context = trusting(certificates)
    raw = socket.create_connection(("127.0.0.1", port), timeout=10)
    with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
        names: Any = (connection.getpeercert() or {})["subject"]
    return str(names[0][0][1])


def test_with_tls_every_host_may_be_served_and_a_renewed_certificate_takes_a_reload(
    scratch: Settings, certificates: Path, tmp_path: Path
) -> None:
    for kind in ("pem", "key"):
        (tmp_path / f"web.{kind}").write_bytes((certificates / f"server.{kind}").read_bytes())
    client = Client(free_port(), trusting(certificates))
    pair = tls(certificates, cert_file=str(tmp_path / "web.pem"), key_file=str(tmp_path / "web.key"))
    settings = change(scratch, metrics={"listen": f"0.0.0.0:{client.port}", "tls_server_config": pair})
    with daemon(settings) as process:
        wait_until(client.up)
        assert 200 == client.get("/metrics")[0]
        assert not Client(client.port).up(), "it answers without TLS"
        assert "server" == subject(client.port, certificates)
        for kind in ("pem", "key"):
            (tmp_path / f"web.{kind}").write_bytes((certificates / f"renewed.{kind}").read_bytes())
        reload(process)
        wait_until(lambda: subject(client.port, certificates) == "renewed")
        (tmp_path / "web.key").write_text("nonsense")
        reload(process)
        wait_until(lambda: "metrics.tls_server_config" in client.readiness().get("settings", ""))
        assert "renewed" == subject(client.port, certificates), "the old one stays in force"


@pytest.mark.parametrize(
    ("kind", "welcome"),
    [
        ("RequireAndVerifyClientCert", {None: False, "client": True, "stranger": False}),
        ("VerifyClientCertIfGiven", {None: True, "client": True, "stranger": False}),
    ],
)
def test_clients_are_asked_for_certificates(
    scratch: Settings, certificates: Path, kind: str, welcome: dict[str | None, bool]
) -> None:
    known = Client(free_port(), trusting(certificates, "client"))
    pair = tls(certificates, client_auth_type=kind, client_ca_file=str(certificates / "ca.pem"))
    with daemon(change(scratch, metrics={"listen": f"127.0.0.1:{known.port}", "tls_server_config": pair})):
        wait_until(known.up)
        found = {name: Client(known.port, trusting(certificates, name)).up() for name in welcome}
    assert welcome == found


def test_files_of_tls_can_be_credentials(
    scratch: Settings, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(free_port(), trusting(certificates))
    pair = {"cert_file": "server.pem", "key_file": "server.key"}
    settings = change(scratch, metrics={"listen": f"127.0.0.1:{client.port}", "tls_server_config": pair})
    assert "add LoadCredential=server.pem:FILE to the unit" in refused(settings, tmp_path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(certificates))
    with daemon(settings):
        wait_until(client.up)


def test_what_cannot_be_used_for_tls_is_refused_with_its_name(
    scratch: Settings, certificates: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    lock = ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", str(certificates / "server.key")]
    subprocess.run([*lock, "-out", str(tmp_path / "locked.key")], check=True, capture_output=True)
    for changes, problem in (
        ({"cert_file": "/none.pem"}, "cert_file: /none.pem cannot be read: No such file or directory"),
        ({"key_file": str(certificates / "client.key")}, "they must be a certificate in PEM and its private key"),
        ({"key_file": str(tmp_path / "locked.key")}, "without a passphrase"),
        (
            {"client_ca_file": str(tmp_path / "empty"), "client_auth_type": "RequireAndVerifyClientCert"},
            "client_ca_file",
        ),
    ):
        pair = tls(certificates, **changes)
        settings = change(scratch, metrics={"listen": "127.0.0.1:9", "tls_server_config": pair})
        assert problem in refused(settings, tmp_path), changes


# Health -----------------------------------------------------------------------------------------------------


def test_what_keeps_jobs_from_being_done_is_told_and_when_it_is_over(scratch: Settings, tmp_path: Path) -> None:
    with session(tmp_path) as uri:
        socket_file = tmp_path / "libvirt/libvirt-sock"
        settings = change(scratch, libvirt={"uri": uri, "import": True}, work_dir=str(tmp_path / "not-yet"))
        with serving(settings) as (process, client):
            wait_until(lambda: client.readiness() == {})
            assert 1 == client.metric("libvirt_up")

            settings.exports_dir.rename(tmp_path / "away")
            socket_file.rename(tmp_path / "libvirt/away")
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", settings.output_dir], check=True)
            reload(process)
            wait_until(lambda: {"exports", "locks", "libvirt", "output"} == {*client.readiness()})
            wrong = client.readiness()
            assert "failed: cannot read" in wrong["exports"]
            assert "; Mount or create the directory" in wrong["exports"]
            assert "libvirt-sock" in wrong["libvirt"]
            assert "systemctl start libvirtd" in wrong["libvirt"]
            assert f"{settings.output_dir} cannot be written to; Mount it writable" in wrong["output"]
            assert 0 == client.metric("libvirt_up")
            assert [0, 0, 1] == [client.metric("ready", check=check) for check in ("output", "exports", "work")]
            assert client.up(), "whoever restarts it now would change nothing"

            subprocess.run(["umount", settings.output_dir], check=True)
            (tmp_path / "libvirt/away").rename(socket_file)
            (tmp_path / "away").rename(settings.exports_dir)
            reload(process)
            wait_until(lambda: client.readiness() == {})
            assert client.metric("destination_free_bytes", pool="output") > 0


def test_a_full_file_system_is_not_ready_and_its_last_bytes_are_told(scratch: Settings) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", scratch.output_dir], check=True)
    try:
        with serving(scratch) as (_, client):
            wait_until(lambda: "has 1 MiB free; Free some" in client.readiness().get("output", ""))
            assert 1 << 20 == client.metric("destination_free_bytes", pool="output")
    finally:
        subprocess.run(["umount", scratch.output_dir], check=True)


def test_a_file_server_that_is_gone_is_told_by_pages_that_answer(scratch: Settings) -> None:
    settings = change(scratch, watch={"mode": "off"})
    with network_directory(settings) as (_, server), serving(settings) as (process, client):
        wait_until(lambda: client.readiness() == {})
        server.send_signal(signal.SIGSTOP)
        reload(process)
        wait_until(lambda: {"exports", "locks"} == {*client.readiness()})
        wrong = client.readiness()
        assert f"no answer from {settings.exports_dir}" in wrong["exports"]
        assert "has not answered for" in wrong["locks"]
        assert client.up(), "the main loop turns"
        assert 200 == client.get("/metrics")[0]
        server.send_signal(signal.SIGCONT)
        wait_until(lambda: client.readiness() == {})


def test_a_libvirt_that_hangs_holds_up_nothing(scratch: Settings, fake: Callable[[str, str], None]) -> None:
    fake("virsh", "exec sleep 600\n")
    with serving(change(scratch, libvirt={"import": True})) as (process, client):
        wait_until(lambda: {"libvirt"} == {*client.readiness()})
        wait_until(lambda: "did not end within" in client.readiness()["libvirt"], 30)
        assert client.up()
        fake("virsh", "exec true\n")
        reload(process)
        wait_until(lambda: client.readiness() == {})


def test_a_main_loop_that_hangs_is_not_alive(scratch: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs for real: whoever is to read what it logs does not, and the pipe is full."""
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    with serving(scratch) as (process, client):
        assert process.stdout
        pipe = os.open(f"/proc/self/fd/{process.stdout.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(pipe, b"x" * 4096)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(pipe, b"x")
        reload(process)
        wait_until(lambda: client.get("/healthz")[0] == 503)
        assert "failed: the main loop has not come round for" in client.get("/healthz")[1]
        os.close(pipe)
        os.read(process.stdout.fileno(), 1 << 20)
        wait_until(client.up)
