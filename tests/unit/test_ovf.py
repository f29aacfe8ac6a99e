"""What is read from the OVF descriptor beside the disks, and how a broken or hostile one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.manifest import ovf
from hyper2kvmd.manifest.ovf import OvfError, OvfNic

DATA = Path(__file__).parents[1] / "data" / "ovf"
VSPHERE = (DATA / "vsphere.ovf").read_bytes()


def problem(data: bytes) -> str:
    with pytest.raises(OvfError) as caught:
        ovf.parse(data, "web01.ovf")
    assert caught.value.finding.code == "ovf_unreadable"
    assert caught.value.finding.hint != ""
    return caught.value.finding.message


def envelope(*items: str) -> bytes:
    """A descriptor without namespaces whose devices have these properties."""
    devices = "".join(f"<Item><ResourceType>10</ResourceType>{item}</Item>" for item in items)
    return f"<Envelope><VirtualSystem>{devices}</VirtualSystem></Envelope>".encode()


def test_vsphere_descriptor_gives_the_nics_in_order() -> None:
    assert ovf.parse(VSPHERE, "web01.ovf").nics == (
        OvfNic("00:50:56:aa:bb:01", "DMZ", "VmxNet3", 192),
        OvfNic(None, "Backup & Storage", "E1000", None),
    )


def test_ovf_2_descriptor_of_virtualbox_gives_its_nic() -> None:
    data = (DATA / "virtualbox-2.ovf").read_bytes()
    assert ovf.parse(data, "web01.ovf").nics == (OvfNic(None, "NAT", "E1000", None),)


def test_namespaces_and_prefixes_do_not_matter() -> None:
    other = VSPHERE.replace(b"rasd:", b"r:").replace(b"xmlns:rasd", b"xmlns:r")
    other = other.replace(b"ovf/envelope/1", b"ovf/envelope/9")
    assert other != VSPHERE
    assert ovf.parse(other, "web01.ovf") == ovf.parse(VSPHERE, "web01.ovf")


def test_nics_come_in_the_order_of_their_numbers_on_the_parent() -> None:
    data = envelope(
        "<AddressOnParent>10</AddressOnParent><Connection>second</Connection>",
        "<AddressOnParent>9</AddressOnParent><Connection>first</Connection>",
    )
    assert [nic.network for nic in ovf.parse(data, "web01.ovf").nics] == ["first", "second"]


@pytest.mark.parametrize("number", ["", "<AddressOnParent>7</AddressOnParent>", "<AddressOnParent>x</AddressOnParent>"])
def test_nics_without_numbers_of_their_own_come_as_listed(number: str) -> None:
    data = envelope(f"{number}<Connection>b</Connection>", f"{number}<Connection>a</Connection>")
    assert [nic.network for nic in ovf.parse(data, "web01.ovf").nics] == ["b", "a"]


def test_mac_address_with_dashes_is_normalised() -> None:
    (nic,) = ovf.parse(envelope("<Address>00-50-56-AA-BB-CC</Address>"), "web01.ovf").nics
    assert nic.mac == "00:50:56:aa:bb:cc"


def test_vm_without_network_adapters_has_no_nics() -> None:
    assert ovf.parse(envelope(), "web01.ovf").nics == ()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no complete XML at line 1"),
        (VSPHERE[:1500], "no complete XML at line"),
        (b"<?xml version='1.0' encoding='klingon'?><Envelope/>", "no complete XML"),
        (b"<html/>", "its root element is 'html'"),
        (b"<Envelope/>", "describes 0 virtual machines"),
        (b"<Envelope><VirtualSystem/><VirtualSystem/></Envelope>", "describes 2 virtual machines"),
        (b"<!DOCTYPE a [<!ENTITY b 'c'>]><Envelope>&b;</Envelope>", "it has a DTD"),
        (b"<!DOCTYPE a SYSTEM 'file:///etc/passwd'><Envelope/>", "it has a DTD"),
        (b"<Envelope>" + b" " * ovf.SIZE_LIMIT, "more than the 1048576 that are read"),
        (envelope("<Address>7</Address>"), "'7' is not the MAC address"),
        (envelope("<Address>01:00:5e:00:00:01</Address>"), "'01:00:5e:00:00:01' is not the MAC address"),
        (envelope(*["<Address>00:50:56:00:00:01</Address>"] * 2), "two network adapters have the MAC address"),
        (envelope(*[""] * 65), "65 network adapters"),
    ],
)
def test_descriptor_that_cannot_be_used_says_why_and_names_the_file(data: bytes, says: str) -> None:
    message = problem(data)
    assert says in message
    assert "'web01.ovf'" in message


def test_deeply_nested_descriptor_is_refused_without_harm() -> None:
    assert "virtual machines" in problem(b"<Envelope>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</Envelope>")


def test_control_characters_of_a_descriptor_do_not_reach_the_message() -> None:
    message = problem(envelope("<Address>\x9b31m</Address>"))
    assert "31m" in message
    assert "\x9b" not in message


@given(st.binary(max_size=200) | st.builds(lambda cut, byte: VSPHERE[:cut] + byte, st.integers(0, 3500), st.binary()))
def test_parse_raises_nothing_but_ovf_errors(data: bytes) -> None:
    try:
        assert len(ovf.parse(data, "web01.ovf").nics) <= 2
    except OvfError as error:
        assert error.finding.code == "ovf_unreadable"


def test_the_only_descriptor_is_chosen_whatever_its_name() -> None:
    assert ovf.choose(["a.vmdk", "export.OVF", "a.mf"], "web01") == "export.OVF"


def test_export_without_a_descriptor_has_none() -> None:
    assert ovf.choose(["manifest.json", "disk-0.vmdk"], "web01") is None


def test_of_several_descriptors_the_one_named_like_the_vm_is_chosen() -> None:
    assert ovf.choose(["web02.ovf", "web01.ovf", "web01-old.ovf"], "web01") == "web01.ovf"


def test_several_descriptors_without_one_named_like_the_vm_are_refused() -> None:
    with pytest.raises(OvfError) as caught:
        ovf.choose(["b.ovf", "a.ovf"], "web01")
    finding = caught.value.finding
    assert (finding.code, finding.hint) == (
        "ovf_ambiguous",
        "Remove those of other VMs, or name this one web01.ovf.",
    )
    assert "('a.ovf', 'b.ovf')" in finding.message
