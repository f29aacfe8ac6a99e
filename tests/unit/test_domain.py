"""The domain: XML that libvirt accepts, held in golden files, and conflicts found before any copy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd import importer
from hyper2kvmd.domain import Domain, DomainDisk, DomainNic, domain_uuid, generated_mac, job_of, to_xml
from hyper2kvmd.errors import Code, MigrationError

GOLDEN = Path(__file__).parents[1] / "data/domains"
UUID = domain_uuid("vsphere", "DC1", "vm-4711", "web-01")

PLAIN = Domain(
    name="web-01",
    uuid=UUID,
    title="web-01",
    cpus=2,
    memory_mib=4096,
    firmware="bios",
    secure_boot=False,
    virt_type="kvm",
    disks=(DomainDisk(Path("/images/web-01-disk-0.qcow2"), "qcow2", "disk-0", True),),
    nics=(DomainNic("00:50:56:aa:bb:01", "default"),),
    job="web-01-0123abcd",
    source={"provider": "vsphere", "vm_id": "vm-4711", "vm_name": "web-01", "export": "web-01"},
)
VARIANTS = {
    "bios": PLAIN,
    "uefi": replace(PLAIN, firmware="uefi"),
    "secure-boot": replace(PLAIN, firmware="uefi", secure_boot=True),
    "tcg": replace(PLAIN, virt_type="qemu"),
    "compatible": replace(PLAIN, compatible=True),
    "many": replace(
        PLAIN,
        title="Grüße & <Köln>",
        disks=tuple(DomainDisk(Path(f"/images/d{i}.img"), "raw", f"disk-{i}", False) for i in range(28)),
        nics=(
            DomainNic("00:50:56:aa:bb:01", "default"),
            DomainNic("00:50:56:aa:bb:02", "bridge:br0"),
            DomainNic("00:50:56:aa:bb:03", "user"),
        ),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_xml_is_that_of_the_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{name}.xml"
    xml = to_xml(VARIANTS[name])
    if request.config.getoption("--regenerate"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(xml)
    assert path.read_text() == xml


@pytest.mark.parametrize("name", VARIANTS)
def test_libvirt_accepts_the_xml(name: str) -> None:
    """The schema is checked by libvirt itself; its test driver knows no domain type but its own, and no firmware."""
    domain = replace(VARIANTS[name], virt_type="test", firmware="bios")
    with importer.connect("test:///default") as connection:
        importer.define(connection, to_xml(domain), domain.name, domain.uuid, domain.job, autostart=False, start=False)
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


def define(connection: Any, domain: Domain) -> None:
    xml = to_xml(replace(domain, virt_type="test"))
    importer.define(connection, xml, domain.name, domain.uuid, domain.job, autostart=False, start=False)


def test_defining_again_after_a_crash_is_harmless() -> None:
    with importer.connect("test:///default") as connection:
        define(connection, PLAIN)
        importer.preflight(connection, PLAIN.name, UUID, PLAIN.job, {"default"})
        define(connection, PLAIN)
        assert 1 == len([d for d in connection.listAllDomains() if d.name() == "web-01"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"job": "other-job"}, "made by another migration"),
        ({"uuid": domain_uuid("another")}, "shut off"),
        ({"name": "web-02"}, "already has the domain 'web-01'"),
    ],
)
def test_a_domain_of_somebody_else_is_refused_before_and_after_the_copy(change: dict[str, str], why: str) -> None:
    with importer.connect("test:///default") as connection:
        define(connection, PLAIN)
        mine = replace(PLAIN, **change)  # type: ignore[arg-type]
        with pytest.raises(MigrationError, match=why) as caught:
            importer.preflight(connection, mine.name, mine.uuid, mine.job, set())
        assert caught.value.code == Code.DOMAIN_EXISTS
        with pytest.raises(MigrationError, match=why):
            define(connection, mine)
        assert PLAIN.job == job_of(connection.lookupByName("web-01").XMLDesc(0))


def test_a_running_domain_is_never_redefined() -> None:
    with importer.connect("test:///default") as connection:
        define(connection, PLAIN)
        connection.lookupByName("web-01").create()
        with pytest.raises(MigrationError, match="running"):
            define(connection, PLAIN)


def test_a_missing_network_is_named_with_those_that_exist() -> None:
    with importer.connect("test:///default") as connection, pytest.raises(MigrationError) as caught:
        importer.preflight(connection, "x", domain_uuid("x"), "j", {"vlan20"})
    assert caught.value.code == Code.NETWORK_MISSING
    assert "no network 'vlan20'; it has default" in caught.value.message


def test_libvirt_that_is_away_is_named() -> None:
    with (
        pytest.raises(MigrationError, match="qemu\\+unix") as caught,
        importer.connect("qemu+unix:///system?socket=/nonexistent/sock"),
    ):
        pass
    assert caught.value.code == Code.LIBVIRT_UNAVAILABLE
