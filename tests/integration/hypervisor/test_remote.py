"""A libvirt on another host: it is tried before anything is copied, as it may see other disks than we do."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from hyper2kvmd.hypervisor.connection import is_remote
from hyper2kvmd.settings.model import Settings
from tests import libvirtd
from tests.conftest import MakeExport, report_of, run_job
from tests.integration.daemon.test_daemon import change

# Stands where ssh and netcat stand: between us and the socket of a libvirt elsewhere.
TUNNEL = """#!/usr/bin/python3
import os, select, socket
far = socket.socket(socket.AF_UNIX)
far.connect({socket!r})
while True:
    for ready in select.select([0, far], [], [])[0]:
        data = os.read(0, 65536) if ready == 0 else far.recv(65536)
        if not data:
            raise SystemExit
        far.sendall(data) if ready == 0 else os.write(1, data)
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A libvirt by a URI that names a host. It has mounts of its own: what is mounted from now on, it does not see."""
    directory = tmp_path_factory.mktemp("remote")
    with libvirtd.session(directory, alone=True) as uri:
        tunnel = directory / "tunnel"
        tunnel.write_text(TUNNEL.format(socket=uri.partition("?socket=")[2]))
        tunnel.chmod(0o755)
        yield f"qemu+ext://kvm7.example.com/session?command={tunnel}"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("qemu:///system", False),
        ("test:///default", False),
        ("qemu+unix:///session?socket=/run/x", False),
        ("qemu+ssh://root@kvm7/system", True),
        ("qemu+tls://[fd00::1]:16514/system", True),
    ],
)
def test_a_libvirt_is_remote_if_its_uri_names_a_host(uri: str, expected: bool) -> None:
    assert expected == is_remote(uri)


def ruled(scratch: Settings, uri: str) -> Settings:
    """Settings whose rule sends the VM of a site to that libvirt; their own one has never heard of it."""
    rule = {"tags": {"site": "bonn"}, "libvirt_uri": uri}
    return change(scratch, libvirt={"import": True, "uri": "test:///default", "default_network": "user"}, rules=[rule])


def test_a_rule_has_the_domain_defined_on_another_host_that_sees_the_disks(
    scratch: Settings, make_export: MakeExport, remote: str
) -> None:
    export = make_export("vm-there", metadata={"tags": {"site": "bonn"}})
    done = run_job(export, ruled(scratch, remote))
    report = report_of(export)
    assert "succeeded" == report["status"], (report["error"], done.stderr)
    assert remote == report["domain"]["uri"]
    connection = libvirt.open(remote)
    try:
        libvirtd.remove(connection.lookupByName("vm-there"))
    finally:
        connection.close()


def test_a_host_that_does_not_see_the_disks_ends_the_job_before_anything_is_copied(
    scratch: Settings, make_export: MakeExport, remote: str
) -> None:
    export = make_export("vm-gone", metadata={"tags": {"site": "bonn"}})
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", scratch.output_dir], check=True)
    try:
        run_job(export, ruled(scratch, remote))
        left: list[Path] = [*scratch.output_dir.iterdir()]
    finally:
        subprocess.run(["umount", scratch.output_dir], check=True)
    error = report_of(export)["error"]
    assert ("qemu_denied", "libvirt.uri") == (error["code"], error["field"])
    assert "does not see what is in" in error["message"]
    assert "Mount the storage" in error["hint"]
    assert "convert" not in [stage["name"] for stage in report_of(export)["stages"]]
    assert [] == left
