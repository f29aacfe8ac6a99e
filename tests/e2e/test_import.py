"""The whole VM: from an export whose manifest has no network cards to a domain that runs as the VM did on VMware.

The package is installed, the service runs as its own user, and libvirt is as the distribution ships it.
"""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import matrix
from tests.cache import cached
from tests.e2e.conftest import libvirt_of
from tests.e2e.container import Container
from tests.e2e.test_systemd import CONFIG, EXPORTS, IMAGES, SETTINGS, hand_over, images, of_export, report
from tests.guests import boot
from tests.guests.boot import BootResult, boot_domain
from tests.guests.build import digest, export
from tests.guests.guest import Guest
from tests.guests.recipe import GUESTS
from tests.matrix import IDENTITY, MIGRATION_SECONDS, boot_as_on_vmware, differences, works

# The same bytes as the UUID of IDENTITY, in the spelling of libvirt.
UUID = "2b1a4d56-4d3c-6f5e-7081-92a3b4c5d6e7"


@dataclass(frozen=True)
class Imported:
    """A guest, how it was on VMware, what its job says, the domain as libvirt shows it, and how that domain boots."""

    guest: Guest
    original: BootResult
    export: Path
    report: dict[str, Any]
    domain: ET.Element
    started: BootResult


def dropped(host: Container, directory: Path) -> dict[str, Any]:
    """Hand an export over to the service, which boots what it publishes; the report."""
    domains = {"libvirt": {"default_network": "user"}, "validate": {"test_boot": True}}
    settings = {**SETTINGS, "limits": {"nice": 0}, **domains}
    host.write(CONFIG, yaml.safe_dump(settings))
    host.run("systemctl", "reload", "hyper2kvmd")
    return report(host, hand_over(host, directory), MIGRATION_SECONDS)


def original(guest: Guest) -> BootResult:
    """How it boots on VMware, which is kept: it is the same as long as the guest and the way to boot it are."""
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (boot, matrix))
    version = hashlib.sha256(digest(guest).encode() + sources).hexdigest()[:12]

    def make(into: Path) -> None:
        (into / "boot.json").write_text(json.dumps(asdict(boot_as_on_vmware(guest))))

    made = cached("guests", f"{guest.name}-on-vmware", version, make)
    return BootResult(**json.loads((made / "boot.json").read_text()))


def virsh(host: Container, *arguments: str) -> str:
    return host.run("virsh", "-c", "qemu:///system", *arguments)


def attribute(parent: ET.Element, tag: str, key: str) -> str | None:
    child = parent.find(tag)
    assert child is not None, tag
    return child.get(key)


@pytest.fixture(
    scope="module", params=(pytest.param("debian12-three-disks", marks=pytest.mark.rest), "debian12-uefi-three-disks")
)
def imported(
    request: pytest.FixtureRequest, host: Container, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Imported]:
    guest = GUESTS[request.param]
    exported = tmp_path_factory.mktemp(guest.name)
    document = dropped(host, export(guest.name, exported, vm_name="db01", dialect="go", identity=IDENTITY))
    assert "succeeded" == document["status"], json.dumps(document["error"], indent=2)
    domain = ET.fromstring(virsh(host, "dumpxml", "db01"))
    started = boot_domain(libvirt_of(host), "db01", root=host.root)
    yield Imported(guest, original(guest), host.root / f"{EXPORTS}/db01".lstrip("/"), document, domain, started)
    # The next one has its name and its addresses.
    virsh(host, "undefine", "db01", "--nvram")
    host.run("sh", "-c", f"rm -r {EXPORTS}/db01 {IMAGES}/db01-*")


def test_the_export_says_nothing_of_network_cards_and_lists_the_disks_backwards(imported: Imported) -> None:
    manifest = json.loads((imported.export / "artifact-manifest.json").read_text())
    assert not manifest.get("nics")
    assert [f"db01-disk-{number}.vmdk" for number in (2, 1, 0)] == [
        Path(disk["local_path"]).name for disk in manifest["disks"]
    ]


def test_the_boot_test_passes(imported: Imported) -> None:
    boot = imported.report["results"]["boot"]
    assert "passed" == boot["outcome"]
    assert "login prompt" in boot["reason"]
    assert "login:" in (imported.export / boot["serial_log"]).read_text()


def test_the_domain_has_the_cards_disks_firmware_uuid_and_notes_of_the_old_machine(imported: Imported) -> None:
    domain = imported.domain
    assert [*IDENTITY.macs] == [mac.get("address") for mac in domain.iterfind("devices/interface/mac")]
    # The manifest calls the last disk disk-1.
    ids = ("disk-3", "disk-2", "disk-1")
    wanted = [(f"vd{letter}", id, f"{IMAGES}/db01-{id}.qcow2") for letter, id in zip("abc", ids, strict=True)]
    assert wanted == [
        (attribute(disk, "target", "dev"), disk.findtext("serial"), attribute(disk, "source", "file"))
        for disk in domain.iterfind("devices/disk")
    ]
    assert ("efi" if imported.guest.firmware == "uefi" else None) == attribute(domain, "os", "firmware")
    assert (UUID, IDENTITY.annotation) == (domain.findtext("uuid"), domain.findtext("description"))


def test_the_running_domain_has_the_names_addresses_and_file_systems_of_the_old_machine(imported: Imported) -> None:
    original, started = imported.original, imported.started
    assert works(original, imported.guest.cards), original.tail()
    assert works(started, imported.guest.cards), started.tail()
    assert [] == differences(original.report, started.report)


def test_the_running_domain_finds_each_file_system_on_the_disk_where_it_was(imported: Imported) -> None:
    before = imported.original.mounts
    if imported.guest.firmware == "bios":
        assert "/dev/sdc" == before["/data"][:8]
        wanted = {point: device.replace("/dev/sd", "/dev/vd") for point, device in before.items()}
    else:
        # Its controller was SATA, whose disks are called as they happen to answer.
        wanted = {"/": "/dev/vda2", "/boot/efi": "/dev/vda1", "/data": "/dev/vdb", "/logs": "/dev/vdc"}
        assert wanted.keys() == before.keys()
    assert wanted == imported.started.mounts


@pytest.mark.rest
def test_a_guest_that_is_not_fixed_fails_the_boot_test_in_its_initramfs_and_nothing_is_published(
    host: Container, tmp_path: Path
) -> None:
    directory = export("debian12-bios", tmp_path, vm_name="web01", dialect="go")
    manifest = directory / "artifact-manifest.json"
    wishes = json.loads(manifest.read_text())
    wishes["pipeline"]["fix"]["enabled"] = False
    manifest.write_text(json.dumps(wishes))
    before = images(host), virsh(host, "list", "--all", "--name")
    document = dropped(host, directory)
    assert ("failed", "boot_failed") == (document["status"], document["error"]["code"])
    boot = document["results"]["boot"]
    assert "failed" == boot["outcome"]
    assert "initramfs" in boot["reason"] and boot["reason"] in document["error"]["message"]
    assert "(initramfs)" in (host.root / of_export("web01", boot["serial_log"]).lstrip("/")).read_text()
    assert before == (images(host), virsh(host, "list", "--all", "--name"))


NETWORK = """
ip netns add source
ip link add lan0 type bridge
ip link add lan0p type veth peer name eth0 netns source
ip link set lan0p master lan0 up
ip link set lan0 up
ip addr add 10.0.2.2/24 dev lan0
ip addr add 10.0.3.2/24 dev lan0
ip -n source link set eth0 up
ip -n source addr add 10.0.2.254/24 dev eth0
ip -n source addr add 10.0.2.15/24 dev eth0
"""


def test_the_vm_takes_the_place_of_its_source_on_the_network_and_gives_it_back(
    imported: Imported, host: Container
) -> None:
    host.run("sh", "-ec", NETWORK)
    try:
        card = "<interface type='bridge'><source bridge='lan0'/>"
        xml = virsh(host, "dumpxml", "--inactive", "db01").replace("<interface type='user'>", card)
        host.write("/run/db01.xml", xml)
        virsh(host, "define", "/run/db01.xml")
        addresses = ("--address", "10.0.2.15", "--address", "10.0.3.15", "--gateway", "10.0.2.254")

        def cutover(*arguments: str, status: int = 0) -> str:
            return host.run("hyper2kvmctl", "cutover", "db01", "-y", *arguments, accept=(status,))

        said = cutover(*addresses, status=1)
        assert "10.0.2.15 is in use on lan0" in said
        assert "shut off" == virsh(host, "domstate", "db01").strip()

        host.run("ip", "-n", "source", "addr", "del", "10.0.2.15/24", "dev", "eth0")
        said = cutover(*addresses)
        assert "10.0.2.15: it answers on lan0" in said
        assert "10.0.3.15: it answers on lan0" in said
        document = json.loads((imported.export / "cutover-report.json").read_text())
        assert ("verified", "hyper2kvm") == (document["status"], document["host"]["user"]), said
        assert "running" == virsh(host, "domstate", "db01").strip()

        # Without logind it hears no power button.
        assert "use --force" in cutover("--undo", "--wait", "5", status=75)
        assert "its power was cut" in cutover("--undo", "--wait", "1", "--force")
        assert "shut off" == virsh(host, "domstate", "db01").strip()
    finally:
        ends = (
            "virsh -q -c qemu:///system destroy db01",
            "ip link del lan0p",
            "ip link del lan0",
            "ip netns del source",
        )
        for command in ends:
            host.run("sh", "-c", f"{command} || true")
