"""What a real libvirt says to our domains: it defines and starts them, and names what is missing before the copy."""

from __future__ import annotations

import os
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import libvirt
import pytest

from hyper2kvmd.domain.model import Domain, DomainDisk, DomainNic, Machine
from hyper2kvmd.domain.trial import thrown_away
from hyper2kvmd.domain.xml import job_of, to_xml
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.hypervisor.connection import connect, virt_type
from hyper2kvmd.hypervisor.define import define, refresh_pools
from hyper2kvmd.hypervisor.preflight import BRIDGE_VLANS, EMULATED_X2APIC, preflight
from hyper2kvmd.image.qemu_img import create_throw_away
from hyper2kvmd.run import Tools
from tests.libvirtd import remove, session
from tests.unit.domain.test_domain import DEBIAN, PLAIN, RHEL5, VARIANTS, WINDOWS_2022, decided, disks

pytestmark = pytest.mark.timeout(1800)
USER = (DomainNic("00:50:56:aa:bb:01", "user"),)
BRIDGE = "h2kbr0"


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with session(tmp_path_factory.mktemp("libvirtd")) as uri, connect(uri) as connection:
        yield connection


@contextmanager
def defined(connection: Any, domain: Domain, *, start: bool = False) -> Iterator[Any]:
    """The domain, which is gone with its variables in the end."""
    define(connection, to_xml(domain), domain.name, domain.uuid, domain.job, autostart=False, start=start)
    found = connection.lookupByName(domain.name)
    try:
        yield found
    finally:
        remove(found)


def here(connection: Any, domain: Domain) -> Domain:
    """The domain with KVM only where this host has it, and without networks that it does not have."""
    accel = "kvm" if domain.virt_type == "kvm" else "tcg"
    nics = tuple(replace(nic, target="user") for nic in domain.nics)
    return replace(domain, virt_type=virt_type(connection, accel), nics=nics)


# Without KVM, an older QEMU refuses this one, and we with it: it has tests of its own.
MANY_CPUS = "288-cpus"


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {MANY_CPUS}))
def test_a_real_libvirt_defines_it_and_would_start_it(name: str, connection: Any) -> None:
    domain = here(connection, VARIANTS[name])
    assert [] == preflight(connection, domain, None, Path("/images"))
    with defined(connection, replace(domain, nics=VARIANTS[name].nics)) as found:
        xml = ET.fromstring(found.XMLDesc(0))
        assert domain.job == job_of(found.XMLDesc(0))
        assert [disk.get("type") for disk in xml.findall("devices/disk")] == ["file"] * len(domain.disks)
        assert {"virtio-scsi"} >= {c.get("model") for c in xml.findall("devices/controller[@type='scsi']")}
    assert [] == connection.listAllDomains()


def images(directory: Path, count: int) -> tuple[DomainDisk, ...]:
    """Disks that really exist."""
    for n in range(count):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", directory / f"{n}.qcow2", "1M"], check=True)
    return tuple(DomainDisk(directory / f"{n}.qcow2", "qcow2", f"disk-{n}", False) for n in range(count))


SMALL = replace(PLAIN, virt_type="qemu", memory_mib=128, nics=USER)
OLDER = Machine("pc", "virtio", "virtio")
TEN_NICS = tuple(DomainNic(f"00:50:56:aa:bb:{n:02}", "user") for n in range(10))
STARTED = {
    "20 disks and 10 NICs": (replace(SMALL, nics=TEN_NICS), 20),
    "20 disks and 10 NICs with UEFI": (replace(SMALL, nics=TEN_NICS, firmware="uefi"), 20),
    "20 disks and 10 NICs on pc": (replace(SMALL, nics=TEN_NICS, guest=RHEL5), 20),
    "22 disks on pc": (replace(SMALL, guest=RHEL5), 22),
    "30 disks": (SMALL, 30),
    "8 disks on SATA": (SMALL, 8),
    "5 disks on IDE and SATA": (replace(SMALL, guest=RHEL5), 5),
    "Windows": (replace(SMALL, guest=WINDOWS_2022, cpus=4, cores_per_socket=2), 1),
}


@pytest.mark.parametrize("name", STARTED)
def test_there_are_slots_for_all_devices_of(name: str, connection: Any, tmp_path: Path) -> None:
    domain, count = STARTED[name]
    domain = decided(replace(domain, disks=images(tmp_path, count)), virtio="SATA" not in name)
    with defined(connection, domain, start=True) as found:
        assert found.isActive()
        xml = ET.fromstring(found.XMLDesc(0))
        assert count == len(xml.findall("devices/disk"))
        assert len(domain.nics) == len(xml.findall("devices/interface"))


def test_secure_boot_and_a_tpm_start(connection: Any, tmp_path: Path) -> None:
    domain = replace(SMALL, firmware="uefi", secure_boot=True, tpm=True, disks=images(tmp_path, 1))
    with defined(connection, domain, start=True) as found:
        assert found.isActive()
        loader = ET.fromstring(found.XMLDesc(0)).findall("os/loader")
        assert ["yes"] == [element.get("secure") for element in loader]


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_a_domain_that_libvirt_has_can_be_tried_on_other_disks(
    connection: Any, tmp_path: Path, firmware: Literal["bios", "uefi"]
) -> None:
    (disk,) = images(tmp_path, 1)
    nvram, overlay = tmp_path / "nvram.fd", tmp_path / "overlay.qcow2"
    create_throw_away(Tools(), overlay, disk.path, disk.format)
    with defined(connection, replace(SMALL, firmware=firmware, disks=(disk,))) as shut_off:
        xml = shut_off.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        xml = thrown_away(xml, [overlay], [(disk.path, "qcow2")], nvram, 64)
        tried = connection.createXML(xml, libvirt.VIR_DOMAIN_START_VALIDATE | libvirt.VIR_DOMAIN_START_PAUSED)
        assert (firmware == "uefi") == nvram.exists()
        tried.destroy()
        assert not shut_off.isActive()


def codes(errors: list[MigrationError]) -> list[Code]:
    return [error.code for error in errors]


def test_firmware_that_the_host_does_not_have_is_named(connection: Any) -> None:
    # No OVMF does Secure Boot on the older chipset.
    domain = replace(SMALL, firmware="uefi", secure_boot=True, machine=OLDER)
    (found,) = preflight(connection, domain, None, Path("/images"))
    assert Code.FIRMWARE_MISSING == found.code
    assert "UEFI firmware with Secure Boot and its keys" in found.message
    assert "ovmf" in found.hint


def test_what_libvirt_would_refuse_is_said_in_its_words(connection: Any) -> None:
    nobodys = DomainDisk(Path("/images/disk"), "no-such-format", "disk-0", False)
    (found,) = preflight(connection, replace(SMALL, disks=(nobodys,)), None, Path("/images"))
    assert Code.DEFINE_FAILED == found.code
    assert "no-such-format" in found.message


def test_more_cpus_than_the_host_can_give_are_refused_with_how_many_that_is(connection: Any) -> None:
    (found,) = preflight(connection, replace(SMALL, virt_type="kvm", cpus=5000, tpm=True), None, Path("/images"))
    assert (Code.DEFINE_FAILED, "vm.cpu") == (found.code, found.field)
    assert "5000 CPUs" in found.message
    assert re.search(r"at most [0-9]+ into the manifest", found.hint)


@pytest.mark.parametrize(("cpus", "cores"), [(288, None), (240, 24)])
@pytest.mark.parametrize("type_", ["kvm", "qemu"])
def test_a_domain_whose_interrupts_are_remapped_starts_or_is_refused_before(
    type_: str, cpus: int, cores: int | None, connection: Any, tmp_path: Path
) -> None:
    domain = here(connection, replace(SMALL, virt_type=type_, cpus=cpus, cores_per_socket=cores))
    # QEMU's own CPU: a KVM that is nested may not be able to give a guest the host's.
    xml = to_xml(replace(domain, disks=images(tmp_path, 1))).replace('<cpu mode="host-model"', "<cpu")
    problems = preflight(connection, domain, None, Path("/images"))
    if domain.virt_type == "qemu" and connection.getVersion() < EMULATED_X2APIC:
        assert [(Code.DEFINE_FAILED, "vm.cpu")] == [(problem.code, problem.field) for problem in problems]
        with pytest.raises(libvirt.libvirtError, match="X2APIC"):
            connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
        return
    assert [] == problems
    started = connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
    try:
        assert ET.fromstring(started.XMLDesc(0)).findall("devices/iommu/driver[@eim='on']")
    finally:
        started.destroy()


def test_a_tpm_needs_a_program_that_emulates_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for directory in reversed(os.environ["PATH"].split(":")):
        for program in Path(directory).iterdir() if Path(directory).is_dir() else ():
            if not program.name.startswith("swtpm"):
                (programs / program.name).unlink(missing_ok=True)
                (programs / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(programs))
    with session(tmp_path) as uri, connect(uri) as connection:
        (found,) = preflight(connection, replace(SMALL, tpm=True), None, Path("/images"))
        # With no firmware either, both are told.
        both = replace(SMALL, tpm=True, firmware="uefi", secure_boot=True, machine=OLDER)
        assert [Code.FIRMWARE_MISSING, Code.TOOL_MISSING] == codes(preflight(connection, both, None, Path("/images")))
    assert Code.TOOL_MISSING == found.code
    assert "swtpm" in found.hint


@contextmanager
def pool(connection: Any, directory: Path) -> Iterator[Any]:
    found = connection.storagePoolDefineXML(
        f"<pool type='dir'><name>vms</name><target><path>{directory}</path></target></pool>"
    )
    try:
        yield found
    finally:
        if found.isActive():
            found.destroy()
        found.undefine()


@pytest.mark.parametrize("name", ["vms", None])
def test_a_refreshed_pool_shows_the_disks(name: str | None, connection: Any, tmp_path: Path) -> None:
    with pool(connection, tmp_path) as vms:
        vms.create()
        images(tmp_path, 2)
        assert [] == vms.listVolumes()
        linked = tmp_path.parent / f"{tmp_path.name}-link"
        linked.symlink_to(tmp_path)
        assert refresh_pools(connection, linked, name) is None
        assert ["0.qcow2", "1.qcow2"] == sorted(vms.listVolumes())


def test_a_pool_that_cannot_be_refreshed_is_a_warning(connection: Any, tmp_path: Path) -> None:
    target = tmp_path / "images"
    target.mkdir()
    with pool(connection, target) as vms:
        vms.create()
        target.rmdir()
        warning = refresh_pools(connection, target, "vms")
    assert warning is not None
    assert "pool_not_refreshed" == warning.code
    assert str(target) in warning.message


def network(connection: Any, content: str = "") -> Any:
    """A network of that bridge, not active."""
    return connection.networkDefineXML(
        f"<network><name>vms</name><forward mode='bridge'/><bridge name='{BRIDGE}'/>{content}</network>"
    )


def test_a_network_must_be_active(connection: Any) -> None:
    domain = replace(SMALL, nics=(DomainNic("00:50:56:aa:bb:01", "vms"),))
    vms = network(connection)
    try:
        (found,) = preflight(connection, domain, None, Path("/images"))
        assert (Code.NETWORK_MISSING, "Run `virsh net-start vms` and `virsh net-autostart vms`.") == (
            found.code,
            found.hint,
        )
        vms.create()
        assert [] == preflight(connection, domain, None, Path("/images"))
    finally:
        if vms.isActive():
            vms.destroy()
        vms.undefine()


@pytest.mark.parametrize(("switch", "refused"), [("", True), ("<virtualport type='openvswitch'/>", False)])
def test_a_vlan_needs_a_network_that_tags(switch: str, refused: bool, connection: Any) -> None:
    refused = refused and connection.getLibVersion() < BRIDGE_VLANS
    vms = network(connection, switch)
    try:
        vms.create()
        domain = replace(SMALL, nics=(DomainNic("00:50:56:aa:bb:01", "vms@20"),))
        found = preflight(connection, domain, None, Path("/images"))
        assert [Code.NETWORK_MISSING] * refused == codes(found)
        assert all("'vms@20'" in error.message for error in found)
    finally:
        vms.destroy()
        vms.undefine()


@pytest.fixture
def bridge() -> Iterator[str]:
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    try:
        yield BRIDGE
    finally:
        subprocess.run(["ip", "link", "delete", BRIDGE], check=True)


def test_a_bridge_is_told_from_other_interfaces(bridge: str, connection: Any) -> None:
    expected = {f"bridge:{bridge}": 0, f"ovs:{bridge}": 1, "bridge:lo": 1, "ovs:lo": 0, "bridge:h2knone": 1}
    found = {}
    for target in expected:
        domain = replace(SMALL, nics=(DomainNic("00:50:56:aa:bb:01", target),))
        errors = preflight(connection, domain, None, Path("/images"))
        assert {Code.NETWORK_MISSING} >= set(codes(errors))
        found[target] = len(errors)
    assert expected == found


def test_everything_that_is_wrong_is_told_at_once(connection: Any, tmp_path: Path) -> None:
    nics = (*USER, DomainNic("00:50:56:aa:bb:05", "vlan20"), DomainNic("00:50:56:aa:bb:06", "bridge:h2knone"))
    with defined(connection, replace(SMALL, disks=disks(1))):
        domain = replace(SMALL, job="other-job", guest=DEBIAN, nics=nics, cpus=5000)
        found = preflight(connection, domain, "none", tmp_path)
    assert [
        Code.DOMAIN_EXISTS,
        Code.MAC_EXISTS,
        Code.NETWORK_MISSING,
        Code.NETWORK_MISSING,
        Code.POOL_MISSING,
        Code.DEFINE_FAILED,
    ] == codes(found)


def test_a_libvirt_with_nothing_but_the_driver_of_qemu_defines_a_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = next(Path("/usr/lib").glob("*/libvirt/connection-driver/libvirt_driver_qemu.so"))
    drivers = tmp_path / "drivers"
    drivers.mkdir()
    (drivers / installed.name).symlink_to(installed)
    monkeypatch.setenv("LIBVIRT_DRIVER_DIR", str(drivers))
    warnings: list[Finding] = []
    nics = (DomainNic("00:50:56:aa:bb:01", "default"), DomainNic("00:50:56:aa:bb:02", "bridge:br7"))
    with session(tmp_path) as uri, connect(uri) as connection:
        domain = replace(SMALL, nics=nics)
        assert [] == preflight(connection, domain, "default", Path("/images"), warn=warnings.append)
        assert ["network_unknown", "interface_unknown", "storage_unknown"] == [warning.code for warning in warnings]
        assert [Code.NETWORK_MISSING] == codes(preflight(connection, domain, None, Path("/images"), start=True))
        with defined(connection, domain) as found:
            assert not found.isActive()
        with pytest.raises(MigrationError), defined(connection, domain, start=True):
            pass
        assert refresh_pools(connection, Path("/images"), None) is None


def test_a_libvirt_that_goes_away_is_tried_again(tmp_path: Path) -> None:
    with session(tmp_path) as uri:
        connection = libvirt.open(uri)
    with pytest.raises(MigrationError) as caught:
        preflight(connection, SMALL, None, Path("/images"))
    assert Code.LIBVIRT_UNAVAILABLE == caught.value.code
    warning = refresh_pools(connection, Path("/images"), None)
    assert warning is not None
