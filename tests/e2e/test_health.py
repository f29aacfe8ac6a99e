"""Metrics and health under a real systemd: the sandbox lets everything be tried, and hands over the files of TLS."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.container import Container, booted, wait_until
from tests.e2e.test_systemd import DROP_IN, configure, install_program, install_service

pytestmark = pytest.mark.timeout(1800)

TLS = {
    "listen": "0.0.0.0:9878",
    "tls_server_config": {
        "cert_file": "web.pem",
        "key_file": "web.key",
        "client_ca_file": "web.pem",
        "client_auth_type": "RequireAndVerifyClientCert",
    },
}


@pytest.fixture(scope="module")
def machine() -> Iterator[Container]:
    """A booted machine with the package installed, a libvirt that runs, and a certificate that only root can read."""
    with booted() as container:
        install_program(container)
        install_service(container)
        container.run(
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=kvm1", "-days", "2"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "/root/web.key", "-out", "/root/web.pem"),
        )
        credentials = "".join(f"LoadCredential=web.{kind}:/root/web.{kind}\n" for kind in ("pem", "key"))
        container.write(DROP_IN, f"[Service]\n{credentials}")
        container.run("systemctl", "daemon-reload")
        container.write("/etc/libvirt/libvirtd.conf", 'auth_unix_rw = "none"\n')  # polkit does not run in there
        container.run("systemctl", "start", "libvirtd")
        yield container


def test_with_the_rights_of_the_service_all_is_ready_over_tls_with_credentials(machine: Container) -> None:
    configure(machine, libvirt={"import": True}, metrics=TLS)
    machine.run("systemctl", "start", "hyper2kvmd")

    def page(path: str) -> str:
        ask = ["curl", "--silent", "--cacert", "/root/web.pem", "--cert", "/root/web.pem", "--key", "/root/web.key"]
        return machine.run(*ask, f"https://127.0.0.1:9878{path}")

    try:
        wait_until(lambda: json.loads(page("/readyz?format=json"))["ready"], "all is ready")
    finally:
        print(page("/readyz"), machine.run("journalctl", "-b", "--no-pager", "-u", "hyper2kvmd", "-n", "50"))
    assert "hyper2kvmd_libvirt_up 1.0" in page("/metrics")
    machine.run("systemctl", "stop", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket", "libvirtd")
    machine.run("systemctl", "reload", "hyper2kvmd")
    wait_until(lambda: "libvirt: failed: qemu:///system: " in page("/readyz"), "libvirt is missed")
    assert "ok\n" == page("/healthz")
    machine.run("systemctl", "stop", "hyper2kvmd")
