"""`hyper2kvmctl cutover` with a real libvirt and a real network, on which machines have addresses and lose them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.queue.names import CUTOVER, CUTOVER_LOG, CUTOVER_SCREEN, LOCK
from hyper2kvmd.settings.model import Settings
from tests.conftest import disk_entry, report_of, run_job, write_manifest
from tests.integration.daemon.test_daemon import wait_until
from tests.integration.hypervisor.test_boottest import MAC, NO_LOADER, says
from tests.libvirtd import remove, session

pytestmark = pytest.mark.timeout(900)
BRIDGE, OUTSIDE, NAMESPACE = "h2kcut0", "h2kcutv", f"h2kcut-{os.getpid()}"
ADDRESS, GATEWAY, SILENT = "192.0.2.10", "192.0.2.254", "192.0.2.99"
LOGIN = says("Debian GNU/Linux 12 web01 ttyS0\r\n\r\nweb01 login: ")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with session(tmp_path_factory.mktemp("libvirtd")) as uri:
        yield uri


def ip(*arguments: str, outside: bool = False) -> None:
    subprocess.run(["ip", *(["-n", NAMESPACE] if outside else []), *arguments], check=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """A bridge of this host that leads to a network, on which a gateway answers."""
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("netns", "add", NAMESPACE)
        try:
            ip("link", "add", OUTSIDE, "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE)
            ip("link", "set", OUTSIDE, "master", BRIDGE, "up")
            ip("link", "set", BRIDGE, "up")
            ip("addr", "add", "192.0.2.1/24", "dev", BRIDGE)
            ip("link", "set", "eth0", "up", outside=True)
            ip("addr", "add", f"{GATEWAY}/24", "dev", "eth0", outside=True)
            # Each of the two machines there answers for itself alone.
            sysctl = ("sysctl", "-q", "net.ipv4.conf.all.arp_ignore=1")
            subprocess.run(["ip", "netns", "exec", NAMESPACE, *sysctl], check=True)
            yield
        finally:
            ip("netns", "delete", NAMESPACE)
    finally:
        ip("link", "delete", BRIDGE)


class Machine:
    """A machine of the network with the address: the source, or whoever has the MAC address of the VM."""

    def __init__(self, mac: str) -> None:
        self.mac = mac

    def __enter__(self) -> None:
        link = ("link", "add", "link", "eth0", "name", "other", "address", self.mac, "type", "macvlan")
        ip(*link, "mode", "bridge", outside=True)
        ip("link", "set", "other", "up", outside=True)
        ip("addr", "add", f"{ADDRESS}/24", "dev", "other", outside=True)

    def __exit__(self, *exc: object) -> None:
        ip("link", "delete", "other", outside=True)


Ctl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def settings(scratch: Settings, uri: str, network: None) -> Settings:
    shape = scratch.model_dump(by_alias=True)
    shape["libvirt"] |= {"uri": uri, "import": True, "default_network": f"bridge:{BRIDGE}"}
    shape["guest"] |= {"accel": "tcg"}
    shape["validate"] |= {"boot_seconds": 5}
    return Settings.model_validate(shape)


@pytest.fixture
def command(settings: Settings, tmp_path: Path) -> list[str]:
    config = tmp_path / "cutover.json"
    config.write_text(settings.model_dump_json(by_alias=True))
    return [sys.executable, "-m", "hyper2kvmd.ctl", "cutover", "web01", "--config", str(config)]


@pytest.fixture
def cutover(command: list[str]) -> Ctl:
    def run(*arguments: str, name: str = "web01") -> subprocess.CompletedProcess[str]:
        argv = [*command[:4], name, *command[5:], *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300)

    return run


@pytest.fixture
def migrated(settings: Settings, uri: str) -> Iterator[Callable[..., Path]]:
    """Makes the VM web01 from a boot sector; what runs in the end is gone."""

    def make(sector: bytes = LOGIN, **libvirt: Any) -> Path:
        shape = settings.model_dump(by_alias=True)
        shape["libvirt"] |= libvirt
        export = settings.exports_dir / "web01"
        export.mkdir()
        disk = export / "disk.raw"
        disk.write_bytes(sector.ljust(1 << 20, b"\0"))
        write_manifest(export, [disk_entry(disk)], nics=[{"id": "nic-0", "mac": MAC, "network": "VM Network"}])
        run_job(export, Settings.model_validate(shape))
        assert "succeeded" == report_of(export)["status"], report_of(export)["error"]
        return export

    yield make
    with connect(uri) as connection:
        for domain in connection.listAllDomains():
            remove(domain)


def domain(uri: str) -> tuple[bool, bool]:
    """Whether the VM runs, and whether it starts with the host."""
    with connect(uri) as connection:
        found = connection.lookupByName("web01")
        return bool(found.isActive()), bool(found.autostart())


def written(export: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((export / CUTOVER).read_text())
    return document


def steps(document: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in document["steps"]}


def test_a_source_that_answers_keeps_the_vm_off_and_ends_its_cutover_later(
    cutover: Ctl, migrated: Callable[..., Path], uri: str, ctl: Ctl
) -> None:
    export = migrated()
    before = sorted(path.name for path in export.iterdir())
    known = ("--address", ADDRESS, "--gateway", GATEWAY)
    with Machine(MAC):
        done = cutover("-y", *known)
    assert (1, False) == (done.returncode, domain(uri)[0])
    assert f"{ADDRESS} is in use on {BRIDGE}, by {MAC}" in done.stdout
    assert "nothing was started" in done.stdout
    assert before == sorted(path.name for path in export.iterdir())

    # Up by its console, but the address is missing: it is on, and nobody says that it is well.
    done = cutover("-y", *known, "--wait", "3")
    assert 75 == done.returncode, done.stdout + done.stderr
    document = written(export)
    assert ("unverified", [ADDRESS]) == (document["status"], document["addresses"])
    wanted = {
        **dict.fromkeys(("report", "domain", "boot-test", "source", "start", "up", "screen"), "passed"),
        "addresses": "failed",
    }
    assert wanted == steps(document)
    assert "web01 login:" in (export / CUTOVER_LOG).read_text()
    assert (export / CUTOVER_SCREEN).read_bytes().startswith(b"\x89PNG")

    # The source has the same MAC address, and is not the VM. The address is remembered.
    with Machine(MAC):
        done = cutover("-y", "--wait", "20")
    assert (1, "failed") == (done.returncode, written(export)["status"])
    assert (
        f"answered by {MAC} on {BRIDGE}, and not by this VM; that is the VM's own, so its source is on" in done.stdout
    )
    assert "was cut over at" in ctl("retry", "web01").stderr


def test_a_vm_is_verified_and_that_is_undone_and_done_again(
    cutover: Ctl, migrated: Callable[..., Path], uri: str
) -> None:
    export = migrated(autostart=True)
    (export / CUTOVER_LOG).mkdir()  # what cannot be kept does not count
    done = cutover("-y", "--source-off")
    assert (0, "verified", (True, True)) == (done.returncode, written(export)["status"], domain(uri)), done.stdout
    assert {"source": "skipped", "addresses": "skipped", "screen": "skipped"}.items() <= steps(written(export)).items()
    (export / CUTOVER_LOG).rmdir()
    again = cutover("-y", "--json")
    assert (0, written(export)) == (again.returncode, json.loads(again.stdout))
    with connect(uri) as connection:
        connection.lookupByName("web01").suspend()
        suspended = cutover("-y")
        connection.lookupByName("web01").resume()
    assert (5, True) == (suspended.returncode, "web01 is suspended" in suspended.stdout)

    # It hears no button. Nothing is lost without --force.
    done = cutover("--undo", "-y", "--wait", "1")
    assert (75, "verified") == (done.returncode, written(export)["status"])
    assert "--force" in done.stdout
    done = cutover("--undo", "-y", "--wait", "1", "--force")
    assert (0, "undone", (False, False)) == (done.returncode, written(export)["status"], domain(uri)), done.stdout
    assert 1 == cutover("--undo", "-y").returncode

    done = cutover("-y", "--source-off", "--json")
    assert ("verified", (True, True)) == (json.loads(done.stdout)["status"], domain(uri)), done.stdout
    reports = sorted(path.name for path in export.glob("cutover-report*"))
    assert ["cutover-report.1.json", "cutover-report.2.json", CUTOVER] == reports


def test_silence_proves_nothing_where_nobody_would_be_heard(
    cutover: Ctl, migrated: Callable[..., Path], uri: str
) -> None:
    export = migrated()
    refused: dict[tuple[str, ...], str] = {
        (): "which addresses it had",
        ("--address", "198.51.100.7"): f"nothing shows that {BRIDGE} leads to the network of 198.51.100.7",
        ("--address", ADDRESS, "--gateway", SILENT): f"nothing shows that {BRIDGE} leads to the network of {ADDRESS}",
        ("--address", ADDRESS, "--gateway", ADDRESS): f"{ADDRESS} is an address of the VM",
        ("--address", "2001:db8::1"): "only IPv4 addresses",
    }
    for arguments, why in refused.items():
        done = cutover("-y", "--no-boot-test", *arguments)
        assert (1, True) == (done.returncode, why in done.stdout + done.stderr), done.stdout + done.stderr
    ip("link", "set", "eth0", "down", outside=True)
    try:
        done = cutover("-y", "--no-boot-test", "--address", ADDRESS, "--gateway", GATEWAY)
    finally:
        ip("link", "set", "eth0", "up", outside=True)
        wait_until(lambda: Path(f"/sys/class/net/{OUTSIDE}/brport/state").read_text() == "3\n")
    assert f"{OUTSIDE}, the way out of {BRIDGE}, has no link" in done.stdout
    assert "--source-off" in done.stdout
    ip("link", "set", OUTSIDE, "nomaster")
    try:
        done = cutover("-y", "--no-boot-test", "--address", ADDRESS)
    finally:
        ip("link", "set", OUTSIDE, "master", BRIDGE)
        wait_until(lambda: Path(f"/sys/class/net/{OUTSIDE}/brport/state").read_text() == "3\n")
    assert f"{BRIDGE} has no port that leads out of this host" in done.stdout
    assert (False, False) == (domain(uri)[0], (export / CUTOVER).exists())

    done = cutover("--dry-run", "--no-boot-test", "--address", "198.51.100.7", "--gateway", GATEWAY, "--json")
    document = json.loads(done.stdout)
    assert (0, "ready", "passed") == (done.returncode, document["status"], steps(document)["source"])
    assert (False, False) == (domain(uri)[0], (export / CUTOVER).exists())


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("<interface type='user'>", "its card 00:50:56:aa:bb:01 is of the type user"),
        ("<interface type='bridge'><source bridge='nobody0'/>", "nobody0 is no bridge of this host"),
        ("<interface type='bridge'><vlan><tag id='20'/></vlan><source bridge='h2kcut0'/>", "is in a VLAN"),
        ("<interface type='bridge'><link state='down'/><source bridge='h2kcut0'/>", "is unplugged"),
    ],
)
def test_a_card_that_leads_elsewhere_is_named(
    cutover: Ctl, migrated: Callable[..., Path], uri: str, link: str, why: str
) -> None:
    migrated()
    with connect(uri) as connection:
        xml = connection.lookupByName("web01").XMLDesc(0)
        before, _, rest = xml.partition("<interface type='bridge'>")
        source = rest[rest.index("<source") : rest.index("/>", rest.index("<source")) + 2]
        connection.defineXML(before + link + rest.replace(source, "", 1))
    done = cutover("-y", "--no-boot-test", "--address", ADDRESS)
    assert (1, True) == (done.returncode, why in done.stdout), done.stdout


def test_a_guest_that_does_not_come_up_fails_and_is_left_on_for_a_look(
    cutover: Ctl, migrated: Callable[..., Path], uri: str
) -> None:
    export = migrated(says("Kernel panic - not syncing: VFS: Unable to mount root fs\r\n"))
    done = cutover("-y", "--no-boot-test", "--address", ADDRESS, "--gateway", GATEWAY)
    assert (1, "failed", True) == (done.returncode, written(export)["status"], domain(uri)[0])
    assert "its kernel panicked" in done.stdout
    assert "cutover --undo" in done.stdout
    assert "skipped" == steps(written(export))["boot-test"]


def test_a_vm_without_a_boot_test_is_tried_on_throw_away_copies_first(
    cutover: Ctl, migrated: Callable[..., Path], uri: str, settings: Settings
) -> None:
    export = migrated(NO_LOADER)
    disk = Path(report_of(export)["disks"][0]["target"])
    before = disk.read_bytes()
    done = cutover("-y", "--source-off")
    assert (1, False) == (done.returncode, domain(uri)[0])
    assert "the firmware found no disk to boot from" in done.stdout
    assert (before, [disk]) == (disk.read_bytes(), [*settings.output_dir.iterdir()])


def test_another_machine_with_the_address_is_no_success(
    cutover: Ctl, migrated: Callable[..., Path], command: list[str]
) -> None:
    export = migrated(says("starting\r\n"))
    arguments = ("-y", "--no-boot-test", "--source-off", "--address", ADDRESS, "--wait", "30")
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    wait_until((export / CUTOVER).exists)
    with Machine("02:00:00:00:00:77"):
        said = process.communicate(timeout=60)[0]
    assert (1, "failed") == (process.returncode, written(export)["status"])
    assert f"{ADDRESS} is answered by 02:00:00:00:00:77" in said


def test_a_kill_in_the_middle_leaves_a_vm_that_the_next_command_verifies(
    cutover: Ctl, migrated: Callable[..., Path], command: list[str], uri: str
) -> None:
    export = migrated(says("starting\r\n"))
    process = subprocess.Popen([*command, "-y", "--no-boot-test", "--source-off"], stdout=subprocess.DEVNULL)
    wait_until((export / CUTOVER).exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "running" == written(export)["status"]
    done = cutover("-y", "--no-boot-test", "--source-off", "--wait", "1")
    assert (75, "unverified", True) == (done.returncode, written(export)["status"], domain(uri)[0]), done.stdout
    with connect(uri) as connection:
        assert libvirt.VIR_DOMAIN_RUNNING == connection.lookupByName("web01").state()[0]


def test_nobody_who_reads_along_is_needed(migrated: Callable[..., Path], command: list[str], uri: str) -> None:
    export = migrated()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*command, "-y", "--no-boot-test", "--source-off"], stdout=write, timeout=120, check=False)
    os.close(write)
    assert (0, "verified", True) == (done.returncode, written(export)["status"], domain(uri)[0])


def test_what_is_not_as_it_was_migrated_is_not_started(
    cutover: Ctl, migrated: Callable[..., Path], uri: str, settings: Settings
) -> None:
    export = migrated()
    arguments = ("-y", "--no-boot-test", "--source-off")

    def refused(why: str, status: int | None = None) -> None:
        done = cutover(*arguments)
        assert done.returncode in ((1, 3) if status is None else (status,)), done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert why in done.stdout + done.stderr
        assert not (export / CUTOVER).exists()

    manifest = export / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content + b"\n")
    refused("the export was replaced after the migration")
    manifest.write_bytes(content)

    report = export / "migration-report.json"
    document = report_of(export)
    for change, why in (
        ({"status": "failed"}, "ended as failed"),
        ({"dry_run": True}, "was only a dry run"),
        ({"domain": None}, "defined no domain"),
        ({"job": "web01-somebody"}, "is of another export: its job is web01-somebody"),
        ({"domain": {**document["domain"], "uuid": "\x1b[31mnope"}}, "has no domain with the UUID"),
        ({"finished_at": "\x1b[31m", "disks": []}, "has other disks than were published"),
    ):
        report.write_text(json.dumps({**document, **change}))
        refused(why)
    report.write_text(json.dumps({**document, "domain": {**document["domain"], "uri": "qemu+ssh://evil/system"}}))
    refused("was defined in qemu+ssh://evil/system")
    report.write_text(json.dumps(document))

    # Another's report, by whoever may write this export.
    other_export = export.with_name("evil")
    shutil.copytree(export, other_export)
    done = cutover(*arguments, name="evil")
    assert (1, True) == (done.returncode, "is of another export" in done.stdout), done.stdout
    shutil.rmtree(other_export)
    settings.plan_dir.mkdir()
    (settings.plan_dir / "web01.yaml").write_text("addresses: [oops\n")
    refused("web01.yaml")
    (settings.plan_dir / "web01.yaml").unlink()

    with connect(uri) as connection:
        found = connection.lookupByName("web01")
        xml = found.XMLDesc(0)
        other = ET.fromstring(xml)
        for source in other.iterfind("devices/disk/source"):
            source.set("file", f"{settings.output_dir}/other.qcow2")
        connection.defineXML(ET.tostring(other, encoding="unicode"))
        refused("web01 has other disks than were published")
        connection.defineXML(xml)
        found.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        refused("runs already, and no cutover started it", 5)
        remove(found)
        refused("has no domain with the UUID", 3)
    with (export / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("a runner or another command works on it", 5)


def test_nobody_is_asked_who_is_not_there(cutover: Ctl, migrated: Callable[..., Path], uri: str) -> None:
    migrated()
    done = cutover("--no-boot-test", "--source-off")
    assert (2, False) == (done.returncode, domain(uri)[0])
    assert "Use --yes." in done.stdout
    assert 2 == cutover("--force").returncode
    for wrong in (("--address", "192.0.2.300"), ("--gateway", "router"), ("--wait", "nan"), ("--wait", "soon")):
        done = cutover(*wrong)
        assert (2, True) == (done.returncode, f"argument {wrong[0]}: {wrong[1]!r} is no" in done.stderr), done.stderr
    done = cutover("--undo", "-y")
    assert (1, True) == (done.returncode, "no cutover of this migration" in done.stderr)
