"""The domain: XML that libvirt accepts, held in golden files, and conflicts found before any copy."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import pytest

from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import (
    Attachment,
    Domain,
    DomainDisk,
    DomainNic,
    GuestSystem,
    attachment,
    domain_uuid,
    generated_mac,
)
from hyper2kvmd.domain.xml import job_of, to_xml
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.hypervisor.define import define, refresh_pools
from hyper2kvmd.hypervisor.preflight import preflight, uuid_taken
from tests import DATA

GOLDEN = DATA / "domains"
UUID = domain_uuid("vsphere", "DC1", "vm-4711", "web-01")
POOL = Path("/default-pool")  # that of libvirt's test driver
TARGET = "{urn:hyper2kvmd:domain:1}"


def disks(count: int, format: str = "qcow2", direct_io: bool = True) -> tuple[DomainDisk, ...]:
    return tuple(
        DomainDisk(Path(f"/images/web-01-disk-{n}.{format}"), format, f"disk-{n}", direct_io) for n in range(count)
    )


DEBIAN = GuestSystem("linux", "debian", "12.0", "6.1.0-18-amd64")
RHEL5 = GuestSystem("linux", "rhel", "5.11", "2.6.18-398.el5")
WINDOWS_XP = GuestSystem("windows", "windows", "5.1", None, "Microsoft Windows XP")
WINDOWS_2022 = GuestSystem("windows", "windows", "10.0", None, "Windows Server 2022 Standard")

PLAIN = Domain(
    name="web-01",
    uuid=UUID,
    title="web-01",
    description="",
    cpus=2,
    cores_per_socket=None,
    memory_mib=4096,
    firmware="bios",
    secure_boot=False,
    tpm=False,
    virt_type="kvm",
    machine=machine_for(DEBIAN, "bios", 1, virtio=True),
    guest=DEBIAN,
    disks=disks(1),
    nics=(DomainNic("00:50:56:aa:bb:01", "default"),),
    job="web-01-0123abcd",
    source={"provider": "vsphere", "vm_id": "vm-4711", "vm_name": "web-01", "export": "web-01"},
    tags={},
)


def decided(domain: Domain, *, virtio: bool = True) -> Domain:
    """The domain with the machine for what it is."""
    machine = machine_for(domain.guest, domain.firmware, len(domain.disks), virtio=virtio)
    return replace(domain, machine=machine)


VARIANTS = {
    "bios": PLAIN,
    "uefi": replace(PLAIN, firmware="uefi"),
    "secure-boot": replace(PLAIN, firmware="uefi", secure_boot=True),
    "tpm": replace(PLAIN, firmware="uefi", secure_boot=True, tpm=True, guest=WINDOWS_2022, virt_type="qemu"),
    "tcg": replace(PLAIN, virt_type="qemu"),
    "not-inspected": replace(PLAIN, guest=None),
    "compatible": decided(replace(PLAIN, guest=None), virtio=False),
    "compatible-8-disks": decided(replace(PLAIN, guest=None, disks=disks(8)), virtio=False),
    "20-disks": decided(replace(PLAIN, disks=disks(20))),
    "21-disks": decided(replace(PLAIN, disks=disks(21))),
    "28-disks": decided(replace(PLAIN, disks=disks(28))),
    "networks": replace(
        PLAIN,
        nics=(
            DomainNic("00:50:56:aa:bb:01", "default@30"),
            DomainNic("00:50:56:aa:bb:02", "bridge:br0"),
            DomainNic("00:50:56:aa:bb:03", "ovs:ovsbr0@120"),
            DomainNic("00:50:56:aa:bb:04", "user"),
        ),
    ),
    "windows-2022": replace(PLAIN, firmware="uefi", cpus=8, cores_per_socket=8, guest=WINDOWS_2022),
    "windows-xp": decided(replace(PLAIN, guest=WINDOWS_XP, disks=disks(5)), virtio=False),
    "rhel-5": decided(replace(PLAIN, guest=RHEL5, disks=disks(22))),
    "topology": replace(PLAIN, cpus=8, cores_per_socket=4),
    "288-cpus": replace(PLAIN, cpus=288),
    "annotation": replace(
        PLAIN,
        title="Grüße\n& <Köln>\x00",
        description="Erste Zeile: Übergröße\r\n\x1b[31mzweite\x07 <b>Zeile</b> & \ud800Schluß\u202e\n",
    ),
    "tags": replace(PLAIN, tags={"Kosten<stelle>": 'Vertrieb & "IT"', "owner": "müller\x00"}),
    "raw": replace(PLAIN, disks=disks(2, "raw", direct_io=False)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_xml_is_that_of_the_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{name}.xml"
    xml = to_xml(VARIANTS[name])
    if request.config.getoption("--regenerate"):
        path.write_text(xml)
    assert path.read_text() == xml


def test_every_golden_file_is_of_a_variant() -> None:
    assert sorted(VARIANTS) == sorted(path.stem for path in GOLDEN.iterdir())


@pytest.mark.parametrize("name", VARIANTS)
def test_libvirt_accepts_the_xml(name: str) -> None:
    """The schema is checked by libvirt itself; its test driver knows no domain type but its own, and no firmware."""
    domain = replace(VARIANTS[name], virt_type="test", firmware="bios")
    with connect("test:///default") as connection:
        define(connection, to_xml(domain), domain.name, domain.uuid, domain.job, autostart=False, start=False)
        defined = connection.lookupByName("web-01")
        assert UUID == defined.UUIDString()
        assert not defined.isActive()
        assert PLAIN.job == job_of(defined.XMLDesc(0))


def test_the_uuid_follows_from_the_source() -> None:
    assert UUID == domain_uuid("vsphere", "DC1", "vm-4711", "web-01")
    assert UUID != domain_uuid("vsphere", "DC2", "vm-4711", "web-01")
    assert domain_uuid("a", "bc") != domain_uuid("ab", "c")


def test_a_generated_mac_is_stable_and_unicast() -> None:
    assert generated_mac(UUID, 0) == generated_mac(UUID, 0) != generated_mac(UUID, 1)
    assert generated_mac(UUID, 0).startswith("52:54:00:")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("default", Attachment("network", "default")),
        ("VM Network@4094", Attachment("network", "VM Network", 4094)),
        ("bridge:br0", Attachment("bridge", "br0")),
        ("bridge:br0@1", Attachment("bridge", "br0", 1)),
        ("ovs:ovsbr0@20", Attachment("ovs", "ovsbr0", 20)),
        ("user", Attachment("user", "")),
    ],
)
def test_a_target_says_where_an_interface_leads(target: str, expected: Attachment) -> None:
    assert expected == attachment(target)


@pytest.mark.parametrize(
    "target",
    ["", "bridge:", "@5", "br0@0", "br0@4095", "br0@", "br0@x", "br0@٣", "user@5", "vde:x", "a\nb", "a/b", "x@1@2"],
)
def test_a_target_that_is_none_is_refused_with_all_that_could_be_meant(target: str) -> None:
    with pytest.raises(ValueError, match=r"bridge:NAME, ovs:NAME, one of these with @VLAN \(1 to 4094\), or user"):
        attachment(target)


@pytest.mark.parametrize(
    ("guest", "machine"),
    [
        (None, "q35"),
        (DEBIAN, "q35"),
        (RHEL5, "pc"),
        (WINDOWS_XP, "pc"),
        (WINDOWS_2022, "q35"),
        (GuestSystem("linux", "centos", "6.0", "2.6.32-71.el6.x86_64"), "q35"),
        (GuestSystem("linux", "suse-based", "11.0", "2.6.25"), "q35"),
        (GuestSystem("linux", "suse-based", "10.3", "2.6.24.9-1"), "pc"),
        (GuestSystem("linux", "rhel", "3.9", "2.4.21-50.EL"), "pc"),
        (GuestSystem("linux", "debian", "12.0", None), "q35"),
        (GuestSystem("linux", "debian", "12.0", "2." + "9" * 5000), "q35"),
        (GuestSystem("windows", "windows", "5.2", None), "pc"),
        (GuestSystem("windows", "windows", "6.0", None), "q35"),
        (GuestSystem("freebsd", "freebsd", "5.1", None), "q35"),
    ],
)
def test_the_older_chipset_is_for_guests_that_know_no_other(guest: GuestSystem | None, machine: str) -> None:
    assert machine == parsed(decided(replace(PLAIN, guest=guest))).findall("os/type")[0].get("machine")


def parsed(domain: Domain) -> ET.Element:
    return ET.fromstring(to_xml(domain))


def attributes(domain: Domain, path: str, name: str) -> list[str | None]:
    return [element.get(name) for element in parsed(domain).findall(path)]


@pytest.mark.parametrize(
    ("cpus", "cores", "topology"),
    [(8, 4, ["2"]), (8, 8, ["1"]), (8, 3, []), (8, None, []), (8, 0, []), (8, -4, []), (2, 4, [])],
)
def test_cores_are_put_into_sockets_where_that_divides(cpus: int, cores: int | None, topology: list[str]) -> None:
    assert topology == attributes(replace(PLAIN, cpus=cpus, cores_per_socket=cores), "cpu/topology", "sockets")


@pytest.mark.parametrize(
    ("cpus", "cores", "remapped"),
    [
        (255, None, False),
        (256, None, True),
        (255, 5, True),  # 51 sockets of 8
        (192, 12, False),  # 16 sockets of 16, the last of which ends at 12
        (192, 3, False),  # the last is number 254; 255 means all of them
        (240, 24, True),  # 10 sockets of 32
        (240, 23, False),  # no sockets
    ],
)
def test_interrupts_are_remapped_for_cpus_that_they_do_not_reach_otherwise(
    cpus: int, cores: int | None, remapped: bool
) -> None:
    domain = replace(PLAIN, cpus=cpus, cores_per_socket=cores)
    assert (["on"] if remapped else []) == attributes(domain, "devices/iommu/driver", "eim")
    assert (["qemu"] if remapped else []) == attributes(domain, "features/ioapic", "driver")


def test_serials_are_short_and_stay_different() -> None:
    ids = ["disk-0", "a-very-long-name-of-a-disk-1", "a-very-long-name-of-a-disk-2", "a-very-long-name-o-2", "x" * 21]
    domain = replace(PLAIN, disks=tuple(DomainDisk(Path("/d"), "raw", id, False) for id in ids))
    serials = [element.text for element in parsed(domain).findall("devices/disk/serial")]
    expected = ["disk-0", "a-very-long-name-of-", "a-very-long-name-o-2", "a-very-long-name-o-3", "x" * 20]
    assert expected == serials


@pytest.mark.parametrize("count", [1, 20, 21, 300])
@pytest.mark.parametrize("virtio", [False, True])
@pytest.mark.parametrize("guest", [DEBIAN, RHEL5], ids=["q35", "pc"])
def test_every_disk_has_a_name_an_order_and_a_place_of_its_own(count: int, virtio: bool, guest: GuestSystem) -> None:
    domain = decided(replace(PLAIN, disks=disks(count), guest=guest), virtio=virtio)
    found = parsed(domain).findall("devices/disk")
    names = [str(target.get("dev")) for disk in found for target in disk.findall("target")]
    places = [tuple(sorted(place.attrib.items())) for disk in found for place in disk.findall("address")]
    assert [str(n) for n in range(1, count + 1)] == [
        boot.get("order") for disk in found for boot in disk.findall("boot")
    ]
    assert count == len(set(names))
    assert len(places) == len(set(places))


def test_scsi_disks_are_spread_over_as_many_controllers_as_hold_them() -> None:
    domain = decided(replace(PLAIN, disks=disks(300)))
    assert ["0", "1"] == attributes(domain, "devices/controller", "index")
    assert {"0": 256, "1": 44} == Counter(attributes(domain, "devices/disk/address", "controller"))
    assert "255" == max(attributes(domain, "devices/disk/address", "target"), key=lambda target: int(target or 0))


def test_a_long_annotation_is_cut() -> None:
    description = parsed(replace(PLAIN, description="x" * 1_000_000)).findtext("description")
    assert "x" * 4095 + "…" == description


def test_a_title_of_nothing_printable_is_the_name() -> None:
    assert "web-01" == parsed(replace(PLAIN, title="\x00\n ")).findtext("title")


def test_tags_are_values_whatever_they_are_called() -> None:
    tags = {"</h2k:migration>": "a", "": "b", "x y": "c"}
    found = parsed(replace(PLAIN, tags=tags)).findall(f"metadata/{TARGET}migration/{TARGET}tag")
    assert tags == {str(tag.get("name")): tag.text for tag in found}


def define_one(connection: Any, domain: Domain) -> None:
    xml = to_xml(replace(domain, virt_type="test"))
    define(connection, xml, domain.name, domain.uuid, domain.job, autostart=False, start=False)


def errors_of(connection: Any, domain: Domain, pool: str | None = None, directory: Path = POOL) -> list[MigrationError]:
    return preflight(connection, domain, pool, directory)


def test_defining_again_after_a_crash_is_harmless() -> None:
    with connect("test:///default") as connection:
        define_one(connection, PLAIN)
        assert [] == errors_of(connection, PLAIN)
        define_one(connection, PLAIN)
        assert 1 == len([d for d in connection.listAllDomains() if d.name() == "web-01"])


OTHER_MAC = (DomainNic("00:50:56:aa:bb:99", "default"),)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"job": "other-job"}, "made by another migration"),
        ({"uuid": domain_uuid("another")}, "shut off"),
        ({"name": "web-02"}, "already has the domain 'web-01'"),
    ],
)
def test_a_domain_of_somebody_else_is_refused_before_and_after_the_copy(change: dict[str, str], why: str) -> None:
    with connect("test:///default") as connection:
        define_one(connection, PLAIN)
        mine = replace(PLAIN, nics=OTHER_MAC, **change)  # type: ignore[arg-type]
        (found,) = errors_of(connection, mine)
        assert Code.DOMAIN_EXISTS == found.code
        assert why in found.message
        with pytest.raises(MigrationError, match=why):
            define_one(connection, mine)
        assert PLAIN.job == job_of(connection.lookupByName("web-01").XMLDesc(0))


def test_a_running_domain_is_never_redefined() -> None:
    with connect("test:///default") as connection:
        define_one(connection, PLAIN)
        connection.lookupByName("web-01").create()
        assert [Code.DOMAIN_EXISTS] == [error.code for error in errors_of(connection, PLAIN)]
        with pytest.raises(MigrationError, match="running"):
            define_one(connection, PLAIN)


def test_the_mac_of_another_domain_is_seen_in_any_spelling() -> None:
    with connect("test:///default") as connection:
        define_one(connection, PLAIN)
        clone = replace(PLAIN, name="clone", uuid=domain_uuid("clone"), job="clone-1")
        clone = replace(clone, nics=(DomainNic("00:50:56:AA:BB:01", "default"), *OTHER_MAC))
        (found,) = errors_of(connection, clone)
        assert Code.MAC_EXISTS == found.code
        assert "the domain 'web-01' has the MAC address 00:50:56:AA:BB:01" in found.message


def test_a_uuid_is_taken_only_by_a_domain_of_somebody_else() -> None:
    with connect("test:///default") as connection:
        assert not uuid_taken(connection, UUID, PLAIN.job)
        define_one(connection, PLAIN)
        assert not uuid_taken(connection, UUID, PLAIN.job)
        assert uuid_taken(connection, UUID, "other-job")


def test_a_missing_network_is_named_with_those_that_exist() -> None:
    with connect("test:///default") as connection:
        (found,) = errors_of(connection, replace(PLAIN, nics=(DomainNic("00:50:56:aa:bb:01", "vlan20"),)))
    assert Code.NETWORK_MISSING == found.code
    assert "no network 'vlan20'; it has default" in found.message


def test_a_network_that_is_not_active_is_in_the_way() -> None:
    with connect("test:///default") as connection:
        connection.networkLookupByName("default").destroy()
        (found,) = errors_of(connection, PLAIN)
    assert Code.NETWORK_MISSING == found.code
    assert "virsh net-start default" in found.hint


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("bridge:br7", "the host has no bridge 'br7'"),
        ("ovs:br7", "the host has no Open vSwitch bridge 'br7'"),
        ("bridge:eth1", "'eth1' of the host is not of the kind that bridge: stands for, but of type ethernet"),
    ],
)
def test_a_bridge_is_looked_up_where_libvirt_is(target: str, why: str) -> None:
    with connect("test:///default") as connection:
        (found,) = errors_of(connection, replace(PLAIN, nics=(DomainNic("00:50:56:aa:bb:01", target),)))
    assert Code.NETWORK_MISSING == found.code
    assert why in found.message


@pytest.mark.parametrize(
    ("pool", "directory", "why"),
    [
        ("vms", POOL, "no storage pool 'vms'; it has default-pool"),
        ("default-pool", Path("/elsewhere"), "is of /default-pool, the disks go to /elsewhere"),
    ],
)
def test_a_pool_that_is_not_that_of_the_directory_is_in_the_way(pool: str, directory: Path, why: str) -> None:
    with connect("test:///default") as connection:
        assert [] == errors_of(connection, PLAIN, "default-pool")
        (found,) = errors_of(connection, PLAIN, pool, directory)
    assert Code.POOL_MISSING == found.code
    assert why in found.message


def test_a_pool_that_is_not_active_is_in_the_way_and_is_not_refreshed() -> None:
    with connect("test:///default") as connection:
        assert refresh_pools(connection, POOL, None) is None
        connection.storagePoolLookupByName("default-pool").destroy()
        (found,) = errors_of(connection, PLAIN, "default-pool")
        assert Code.POOL_MISSING == found.code
        assert "virsh pool-start default-pool" in found.hint
        assert refresh_pools(connection, POOL, "default-pool") is None


class Modular:
    """A libvirt whose parts are daemons of their own, of which only the first runs: what it says of the others."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        part = {"listAllNetworks": "network", "listAllStoragePools": "storage", "interfaceLookupByName": "interface"}
        if name not in part:
            return getattr(self._connection, name)
        return lambda *args: libvirt.open(f"{part[name]}+unix:///system?socket=/nonexistent/virt{part[name]}d-sock")


def test_a_part_of_libvirt_that_does_not_run_is_no_reason_to_end_the_job() -> None:
    nics = (PLAIN.nics[0], DomainNic("00:50:56:aa:bb:06", "bridge:br7"))
    warnings: list[Finding] = []
    with connect("test:///default") as connection:
        modular, domain = Modular(connection), replace(PLAIN, nics=nics)
        assert [] == preflight(modular, domain, "default-pool", POOL, warn=warnings.append)
        assert ["network_unknown", "interface_unknown", "storage_unknown"] == [warning.code for warning in warnings]
        assert all(str(warning.field).startswith("libvirt.") for warning in warnings)
        assert "Failed to connect socket to '/nonexistent/virtnetworkd-sock'" in warnings[0].message
        assert "no VM that is connected to a network of libvirt can start before" in warnings[0].hint
        assert refresh_pools(modular, POOL, None) is None
        assert refresh_pools(modular, POOL, "default-pool") is not None
        # To start it is to need the network now.
        (error,) = preflight(modular, domain, None, POOL, start=True)
        assert (Code.NETWORK_MISSING, warnings[0].message) == (error.code, error.message)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    with connect("test:///default") as connection:
        define_one(connection, PLAIN)
        nics = (PLAIN.nics[0], DomainNic("00:50:56:aa:bb:05", "vlan20"), DomainNic("00:50:56:aa:bb:06", "bridge:br7"))
        found = errors_of(connection, replace(PLAIN, job="other-job", nics=nics), "vms")
    codes = [Code.DOMAIN_EXISTS, Code.MAC_EXISTS, Code.NETWORK_MISSING, Code.NETWORK_MISSING, Code.POOL_MISSING]
    assert codes == [error.code for error in found]
    assert all(error.hint and error.field for error in found)


def test_libvirt_that_is_away_is_named() -> None:
    with (
        pytest.raises(MigrationError, match="qemu\\+unix") as caught,
        connect("qemu+unix:///system?socket=/nonexistent/sock"),
    ):
        pass
    assert caught.value.code == Code.LIBVIRT_UNAVAILABLE
