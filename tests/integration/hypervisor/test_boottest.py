"""The boot test on disks of one sector that do what a guest does: come up, hang, or not boot at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.queue.names import BOOT_LOG, BOOT_SCREEN
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, disk_entry, report_of, run_job, write_manifest
from tests.integration.daemon.test_daemon import wait_until
from tests.libvirtd import session

NO_LOADER = bytes(512)
# Writes what follows it to the first serial port, and stops there, as far as anybody can see.
SAYS = bytes.fromhex("fa 31c0 8ed8 be157c baf803 ac 84c0 7403 ee ebf8 ebfe")
MAC = "00:50:56:aa:bb:01"


def says(text: str) -> bytes:
    """A boot sector that writes a text to the serial port and hangs."""
    return (SAYS + text.encode() + b"\0").ljust(510, b"\0") + b"\x55\xaa"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with session(tmp_path_factory.mktemp("libvirtd")) as uri:
        yield uri


@pytest.fixture
def settings(scratch: Settings, uri: str) -> Callable[..., Settings]:
    def make(**validate: Any) -> Settings:
        shape = scratch.model_dump(by_alias=True)
        shape["libvirt"] |= {"uri": uri, "import": True, "default_network": "user"}
        shape["guest"] |= {"accel": "tcg"}
        shape["validate"] |= {"test_boot": True, "boot_seconds": 20, **validate}
        return Settings.model_validate(shape)

    return make


@pytest.fixture
def drop(scratch: Settings) -> Callable[..., Path]:
    def drop(sector: bytes, name: str = "web01", **changes: Any) -> Path:
        export = scratch.exports_dir / name
        export.mkdir()
        disk = export / "disk.raw"
        disk.write_bytes(sector.ljust(1 << 20, b"\0"))
        nics = [{"id": "nic-0", "mac": MAC if name == "web01" else None, "network": "VM Network"}]
        write_manifest(export, [disk_entry(disk)], nics=nics, **changes)
        return export

    return drop


@pytest.fixture(autouse=True)
def nothing_is_left(scratch: Settings, uri: str) -> Iterator[None]:
    """However a test ends: no machine runs, and no temporary file is there."""
    yield
    with connect(uri) as connection:
        for domain in connection.listAllDomains():
            assert not domain.isActive(), f"{domain.name()} still runs"
            assert not domain.name().endswith(".boot-test")
            domain.undefine()
    assert [] == [path.name for path in scratch.output_dir.iterdir() if path.name.startswith(".")]


def running(uri: str) -> list[Any]:
    with connect(uri) as connection:
        return [domain.name() for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)]


def test_a_guest_that_comes_up_passes_and_what_it_said_is_kept(
    settings: Callable[..., Settings], drop: Callable[..., Path]
) -> None:
    export = drop(says("Debian GNU/Linux 12 web01 ttyS0\r\n\r\nweb01 login: "))
    run_job(export, settings())
    document = report_of(export)
    assert "succeeded" == document["status"], document["error"]
    verdict = document["results"]["boot"]
    assert ("passed", "a login prompt") == (verdict["outcome"], verdict["reason"])
    assert "web01 login:" in (export / BOOT_LOG).read_text()
    assert (export / BOOT_SCREEN).read_bytes().startswith(b"\x89PNG")
    assert "web01" == document["domain"]["name"]


def test_a_guest_without_a_boot_loader_fails_its_job_and_nothing_is_published(
    settings: Callable[..., Settings], drop: Callable[..., Path]
) -> None:
    export = drop(NO_LOADER)
    assert 1 == run_job(export, settings()).returncode
    document = report_of(export)
    assert ("failed", "boot_failed") == (document["status"], document["error"]["code"])
    assert "the firmware found no disk to boot from" in document["error"]["message"]
    assert "No bootable device" in document["error"]["tail"]
    assert [] == list(Path(settings().output_dir).iterdir())


def test_a_failure_is_a_warning_if_the_settings_say_so(
    settings: Callable[..., Settings], drop: Callable[..., Path]
) -> None:
    export = drop(NO_LOADER)
    assert 0 == run_job(export, settings(boot_failure="warn")).returncode
    assert "boot_failed" in [warning["code"] for warning in report_of(export)["warnings"]]


def test_a_guest_that_says_nothing_is_no_pass(settings: Callable[..., Settings], drop: Callable[..., Path]) -> None:
    export = drop(says("starting up\r\n"))
    assert 0 == run_job(export, settings(boot_seconds=2)).returncode
    document = report_of(export)
    assert "inconclusive" == document["results"]["boot"]["outcome"]
    assert "boot_inconclusive" in [warning["code"] for warning in document["warnings"]]


def test_a_manifest_can_ask_for_it(settings: Callable[..., Settings], drop: Callable[..., Path]) -> None:
    pipeline = {
        "inspect": {"enabled": False},
        "fix": {"enabled": False},
        "convert": {"enabled": True},
        "validate": {"enabled": True, "test_boot": True},
    }
    for name, asked in (("asks", pipeline), ("silent", {**pipeline, "validate": {"enabled": True}})):
        export = drop(says("\r\nx login: "), name, pipeline=asked)
        run_job(export, settings(test_boot=False))
        assert (name == "asks") == ("boot" in report_of(export)["results"])


def start(export: Path, settings: Settings) -> subprocess.Popen[bytes]:
    config = settings.work_dir.parent / "settings.json"
    config.write_text(settings.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "hyper2kvmd", "run-job", str(export), "--config", str(config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_kill_in_the_middle_leaves_nothing_and_the_next_attempt_goes_on(
    settings: Callable[..., Settings], drop: Callable[..., Path], uri: str
) -> None:
    export = drop(says("starting up\r\n"))
    process = start(export, settings())
    wait_until(lambda: running(uri) == ["web01.boot-test"])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: running(uri) == [], 10)
    assert 0 == run_job(export, settings(boot_seconds=1)).returncode
    document = report_of(export)
    assert ("succeeded", 2) == (document["status"], document["attempts"])


def test_a_cancel_ends_it_long_before_its_time(
    settings: Callable[..., Settings], drop: Callable[..., Path], uri: str, ctl: Ctl
) -> None:
    export = drop(says("starting up\r\n"))
    process = start(export, settings())
    wait_until(lambda: running(uri) == ["web01.boot-test"])
    assert 0 == ctl("cancel", "web01").returncode
    process.wait(120)
    assert [] == running(uri)
    assert "cancelled" == report_of(export)["status"]
    assert [] == list(Path(settings().output_dir).iterdir())


def test_the_network_of_the_source_is_never_touched(
    settings: Callable[..., Settings], drop: Callable[..., Path], uri: str
) -> None:
    process = start(drop(says("starting up\r\n")), settings(boot_seconds=3))
    wait_until(lambda: running(uri) == ["web01.boot-test"])
    with connect(uri) as connection:
        xml = connection.lookupByName("web01.boot-test").XMLDesc(0)
    assert 1 == xml.count("<link state='down'/>") == xml.count(f"<mac address='{MAC}'/>")
    process.wait(60)
