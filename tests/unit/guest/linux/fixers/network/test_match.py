"""Configuration that goes by place or driver of the old card: repaired where the card is certain, else reported."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from hyper2kvmd.guest.change import decode
from hyper2kvmd.guest.linux.devices import Names
from hyper2kvmd.guest.linux.fixers import FixPlan, View, configuration, network
from hyper2kvmd.guest.options import Nic
from hyper2kvmd.manifest.model import Configuration
from hyper2kvmd.manifest.model import Interface as Wanted
from tests.unit.guest.linux.fixers.network.test_network import LINK, SETUP_LINK, UDEV, A, B, C, Guest

RUNS = ("/etc/systemd/system/multi-user.target.wants/systemd-networkd.service",)
PROFILE = "/etc/NetworkManager/system-connections/lan.nmconnection"
IFCFG = "/etc/sysconfig/network-scripts/ifcfg-lan"
NETPLAN = "/etc/netplan/50-cloud-init.yaml"
NETWORK = "/etc/systemd/network/20-lan.network"
LAN_LINK = "/etc/systemd/network/10-lan.link"

KEYFILE = """\
[connection]
id=lan
uuid=7c3a1f0e-5d1b-4b86-9d3e-0a6a3f1f9f10
type=ethernet

[ethernet]
mtu=9000

[match]
path=pci-0000:0b:00.0;

[ipv4]
address1=10.0.0.2/24,10.0.0.1
method=manual
"""


def vmxnet3(mac: str | None, slot: int | None = None) -> Nic:
    return Nic(mac, slot, "VmxNet3")


def plan(guest: Guest, *nics: Nic, cards: str = "virtio", wanted: Sequence[Wanted] = ()) -> FixPlan:
    inspection: Any = SimpleNamespace(os_type="linux")
    return network.plan(View(guest, inspection, Names({}, {})), nics, cards, wanted)


def repaired(files: dict[str, str], *nics: Nic, links: tuple[str, ...] = (), cards: str = "virtio") -> dict[str, str]:
    """The files that are written. There are no warnings, and of the repaired guest nothing more is wanted."""
    guest = Guest({**files, **SETUP_LINK}, links)
    planned = plan(guest, *nics, cards=cards)
    assert planned.warnings == ()
    guest.apply(planned.edits)
    assert plan(guest, *nics, cards=cards) == FixPlan()
    return {edit.path: edit.after or "" for edit in planned.edits}


def reported(files: dict[str, str], *nics: Nic, links: tuple[str, ...] = ()) -> str:
    """The code of the one warning, which names the file and a remedy; nothing is written."""
    planned = plan(Guest({**files, **SETUP_LINK}, links), *nics)
    assert planned.edits == ()
    (finding,) = planned.warnings
    assert next(iter(files)) in finding.message
    assert "MAC address" in finding.hint
    return finding.code


# NetworkManager


def test_a_profile_for_the_place_of_the_only_card_goes_by_its_address() -> None:
    expected = KEYFILE.replace("path=pci-0000:0b:00.0;\n", "").replace(
        "[ethernet]\n", f"[ethernet]\nmac-address={A.upper()}\n"
    )
    assert repaired({PROFILE: KEYFILE}, Nic(A)) == {PROFILE: expected}


def test_a_profile_is_bound_by_the_slot_that_the_ovf_has_for_its_place() -> None:
    """Slot 192 is at 0000:0b:00.0; the address of another card would be a success that is wrong."""
    (text,) = repaired({PROFILE: KEYFILE}, vmxnet3(A, 160), vmxnet3(B, 192), vmxnet3(C, 224)).values()
    assert f"mac-address={B.upper()}\n" in text
    (text,) = repaired({PROFILE: KEYFILE.replace("0b:00", "02:01")}, Nic(A, 33, "E1000"), vmxnet3(B, 192)).values()
    assert f"mac-address={A.upper()}\n" in text


def test_a_profile_without_a_section_for_its_card_gets_one() -> None:
    text = "[connection]\ntype=ethernet\n[match]\npath=pci-0000:0b*\n"
    assert repaired({PROFILE: text}, Nic(A)) == {
        PROFILE: f"[connection]\ntype=ethernet\n[match]\n\n[ethernet]\nmac-address={A.upper()}\n"
    }


@pytest.mark.parametrize(
    ("match", "code"),
    [
        ("path=pci-0000:0b:00.0;", "network_match"),
        ("path=|pci-0000:0b:00.0;pci-0000:13:00.0;", "network_match"),
        ("path=!pci-0000:0b:00.0;", "network_match"),
        ("path=&!pci-0000:0b:00.0;", "network_match"),
        ("driver=vmxnet3;", "network_driver"),
        ("driver=!vmxnet3;", "network_match"),
    ],
)
def test_a_profile_whose_card_nobody_knows_is_reported(match: str, code: str) -> None:
    assert reported({PROFILE: KEYFILE.replace("path=pci-0000:0b:00.0;", match)}, Nic(A), Nic(B)) == code


def test_two_places_and_one_card_are_no_proof() -> None:
    files = {PROFILE: KEYFILE, "/etc/NetworkManager/system-connections/b": KEYFILE.replace("0b:00.0", "13:00.0")}
    planned = plan(Guest({**files, **SETUP_LINK}), Nic(A))
    assert planned.edits == ()
    assert [finding.code for finding in planned.warnings] == ["network_match"] * 2
    # The OVF says which of the two is a leftover.
    planned = plan(Guest({**files, **SETUP_LINK}), vmxnet3(A, 192))
    assert [edit.path for edit in planned.edits] == [PROFILE]
    assert len(planned.warnings) == 1


@pytest.mark.parametrize(
    "match",
    [
        *(
            "kernel-command-line=net.ifnames;",
            "path=pci-*;",
            "path=!*-usb-*;",
            "driver=virtio_net;",
            "driver=*;",
            "driver=vmxnet3;virtio*;",
        ),
        "interface-name=en*;",
    ],
)
def test_a_profile_that_still_fits_is_left_alone(match: str) -> None:
    assert repaired({PROFILE: KEYFILE.replace("path=pci-0000:0b:00.0;", match)}, Nic(A), Nic(B)) == {}


def test_a_name_that_a_profile_excludes_is_bound_too() -> None:
    match = "interface-name=!ens192;"
    assert list(repaired({PROFILE: KEYFILE.replace("path=pci-0000:0b:00.0;", match)}, Nic(A))) == [LINK]


def test_profiles_in_red_hats_older_format_are_repaired_alike() -> None:
    text = 'TYPE=Ethernet\nNAME=lan\nMATCH_PATH="pci-0000:0b:00.0"\nIPADDR=10.0.0.2\n'
    assert repaired({IFCFG: text}, vmxnet3(A, 224), vmxnet3(B, 192)) == {
        IFCFG: f"HWADDR={B.upper()}\nTYPE=Ethernet\nNAME=lan\nIPADDR=10.0.0.2\n"
    }
    assert repaired({IFCFG: text.replace("PATH", "DRIVER").replace("pci-0000:0b:00.0", "e1000")}, Nic(A)) == {
        IFCFG: 'MATCH_DRIVER="virtio_net"\nTYPE=Ethernet\nNAME=lan\nIPADDR=10.0.0.2\n'
    }
    assert reported({IFCFG: text}, Nic(A), Nic(B)) == "network_match"


# systemd


@pytest.mark.parametrize(
    ("match", "nics", "expected"),
    [
        ("Path=pci-0000:0b:00.0", [Nic(A)], f"PermanentMACAddress={A}"),
        ("Path=pci-0000:0b:00.0*", [vmxnet3(A, 160), vmxnet3(B, 192)], f"PermanentMACAddress={B}"),
        ("Property=ID_PATH=pci-0000:0b:00.0", [Nic(A)], f"PermanentMACAddress={A}"),
        ('Property="ID_NET_DRIVER=vmxnet3" ID_X=1', [Nic(A)], f"Property=ID_X=1\nPermanentMACAddress={A}"),
        ("Driver=vmxnet3", [Nic(A)], "Driver=virtio_net"),
        ("Driver=vmxnet3", [vmxnet3(A), vmxnet3(B)], "Driver=virtio_net"),
        ("Driver=vmxnet3", [vmxnet3(A), Nic(B, None, "E1000"), vmxnet3(C)], f"PermanentMACAddress={A} {C}"),
        ("Driver=pcnet32 e1000", [vmxnet3(A), Nic(B, None, "E1000")], f"PermanentMACAddress={B}"),
        ("Driver=hv_netvsc", [Nic(A), Nic(B)], "Driver=virtio_net"),
        (f"MACAddress={B}\nDriver=vmxnet3", [Nic(A), Nic(B)], f"MACAddress={B}"),
    ],
)
def test_networkds_file_goes_by_address_or_by_the_new_driver(match: str, nics: list[Nic], expected: str) -> None:
    text = "[Match]\n{}\n\n[Network]\nAddress=10.0.0.2/24\n"
    assert repaired({NETWORK: text.format(match)}, *nics) == {NETWORK: text.format(expected)}


def test_a_networkd_that_does_not_know_a_cards_own_address_gets_address_and_driver() -> None:
    """A VLAN has the card's address, but not its driver."""
    guest = Guest({NETWORK: "[Match]\nPath=pci-0000:0b:00.0\n", **SETUP_LINK, UDEV: "\x7fELF\0Match.MACAddress\0"})
    (edit,) = plan(guest, Nic(A)).edits
    assert edit.after == f"[Match]\nMACAddress={A}\nDriver=virtio_net\n"


def test_the_new_driver_is_that_of_the_cards_that_the_machine_gets() -> None:
    text = "[Match]\nDriver=vmxnet3\n"
    assert repaired({NETWORK: text}, Nic(A), cards="e1000e") == {NETWORK: "[Match]\nDriver=e1000e\n"}
    assert repaired({NETWORK: "[Match]\nDriver=e1000e\n"}, Nic(A), Nic(B), cards="e1000e") == {}


def test_amazons_own_network_file_is_replaced_by_one_for_the_new_card() -> None:
    """The file that brings EC2's guests of 2023 their only network, as the package has it."""
    vendor = "/usr/lib/systemd/network/80-ec2.network"
    text = "[Match]\nDriver=ena ixgbevf vif\n\n[Link]\nMTUBytes=9001\n\n[Network]\nDHCP=yes\n"
    assert repaired({vendor: text}, Nic(A), Nic(B), links=RUNS) == {
        "/etc/systemd/network/80-ec2.network": text.replace("ena ixgbevf vif", "virtio_net")
    }
    assert repaired({vendor: text}, Nic(A)) == {}, "networkd does not run there"


def test_systemds_own_files_for_containers_are_passed_over() -> None:
    shipped = {
        "80-container-ve": "Kind=veth\nName=ve-*\nDriver=veth",
        "80-container-host0": "Virtualization=container\nName=host0",
        "80-vm-vt": "Name=vt-*\nDriver=tun",
        "80-6rd-tunnel": "Name=6rd-*",
        "80-wifi-adhoc": "Type=wlan\nWLANInterfaceType=ad-hoc",
    }
    files = {f"/lib/systemd/network/{name}.network": f"[Match]\n{match}\n" for name, match in shipped.items()}
    assert repaired(files, Nic(A), links=RUNS) == {}


def test_systemds_own_link_files_are_passed_over() -> None:
    """As Debian 12 has them. A card that was taken for one on USB would be called by its address."""
    files = {
        "/lib/systemd/network/73-usb-net-by-mac.link": "[Match]\nPath=*-usb-*\n\n[Link]\nNamePolicy=mac\n",
        "/lib/systemd/network/99-default.link": "[Match]\nOriginalName=*\n\n[Link]\nMACAddressPolicy=persistent\n",
    }
    assert repaired(files, Nic(A)) == {}
    usb = "[Match]\nPath=pci-0000:02:01.0-usb-0:1:1.0\nDriver=vmxnet3\n[Link]\nName=usb0\n"
    assert repaired({LAN_LINK: usb}, Nic(A)) == {}


def test_a_file_in_etc_takes_the_place_of_the_distributions() -> None:
    files = {"/usr/lib/systemd/network/a.network": "[Match]\nDriver=ena\n", "/etc/systemd/network/a.network": ""}
    assert repaired(files, Nic(A), links=RUNS) == {}


@pytest.mark.parametrize("condition", ["Virtualization=vmware", "Firmware=smbios-field(sys_vendor $= VMware*)"])
def test_a_file_for_the_old_hypervisor_is_for_the_new_one_too(condition: str) -> None:
    text = f"[Match]\nName=en*\n{condition}\n[Network]\nDHCP=yes\n"
    assert repaired({NETWORK: text}, Nic(A)) == {NETWORK: "[Match]\nName=en*\n[Network]\nDHCP=yes\n"}


@pytest.mark.parametrize(
    "match", ["Path=pci-0000:0b:00.0", "Property=ID_NET_NAME_SLOT=ens192", "Path=!pci-0000:0b:00.0"]
)
def test_a_networkd_file_whose_card_nobody_knows_is_reported(match: str) -> None:
    assert reported({NETWORK: f"[Match]\n{match}\n"}, Nic(A), Nic(B)) == "network_match"


def test_a_link_file_that_names_a_place_names_the_card_that_was_there() -> None:
    link = "[Match]\nPath=pci-0000:13:00.0\n\n[Link]\nName=lan0\nMTUBytes=9000\n"
    files = {LAN_LINK: link, NETWORK: "[Match]\nName=lan0\n[Network]\nAddress=10.0.0.2/24\n"}
    assert repaired(files, vmxnet3(A, 192), vmxnet3(B, 224)) == {
        LAN_LINK: link.replace("Path=pci-0000:13:00.0", f"PermanentMACAddress={B}")
    }
    planned = plan(Guest({**files, **SETUP_LINK}), Nic(A), Nic(B))
    assert planned.edits == ()
    assert [finding.code for finding in planned.warnings] == ["network_match", "network_unbound"]


def test_a_link_file_that_sets_no_name_may_be_for_many_cards() -> None:
    link = "[Match]\nDriver=vmxnet3\n[Link]\nMTUBytes=9000\n"
    assert repaired({LAN_LINK: link}, vmxnet3(A), vmxnet3(B)) == {LAN_LINK: link.replace("vmxnet3", "virtio_net")}


def test_a_rule_that_names_a_place_is_evidence_with_the_slots_of_the_ovf() -> None:
    for condition in ('KERNELS=="0000:13:00.0"', 'ENV{ID_PATH}=="pci-0000:13:00.0"'):
        files = {
            "/etc/udev/rules.d/10-lan.rules": f'SUBSYSTEM=="net", ACTION=="add", {condition}, NAME="lan0"\n',
            NETWORK: "[Match]\nName=lan0\n",
        }
        (text,) = repaired(files, vmxnet3(A, 192), vmxnet3(B, 224)).values()
        assert f"PermanentMACAddress={B}\n" in text
        planned = plan(Guest({**files, **SETUP_LINK}), Nic(A), Nic(B))
        assert (planned.edits, [one.code for one in planned.warnings]) == ((), ["network_unbound"])


# netplan

AZURE = """\
# This file is generated from information provided by the datasource.
network:
    ethernets:
        eth0:
            dhcp4: true
            match:
                driver: hv_netvsc  # Hyper-V
                macaddress: {a}
            set-name: eth0
        eth1:
            dhcp4: true
            match:
                driver:
                - hv_netvsc
                - vmxnet3
                macaddress: {b}
            set-name: eth1
    version: 2
"""


def test_every_entry_of_azures_netplan_file_fits_its_new_card() -> None:
    text = AZURE.format(a=A, b=B)
    expected = text.replace("driver: hv_netvsc ", "driver: virtio_net ").replace(
        "driver:\n                - hv_netvsc\n                - vmxnet3", "driver: virtio_net"
    )
    assert repaired({NETPLAN: text}, Nic(B), Nic(A)) == {NETPLAN: expected}


@pytest.mark.parametrize(
    ("match", "nics", "expected"),
    [
        ("{driver: vmxnet3}", [Nic(A)], "{driver: virtio_net}"),
        ('{name: "en*", driver: "vmxnet*"}', [vmxnet3(A), vmxnet3(B)], '{name: "en*", driver: virtio_net}'),
        ("{driver: [vmxnet3, e1000]}", [vmxnet3(A), Nic(B, None, "E1000")], "{driver: virtio_net}"),
        ("{driver: e1000}", [vmxnet3(A), Nic(B, None, "E1000")], f'{{macaddress: "{B}"}}'),
        ("{driver: [vmxnet3, 'virtio*']}", [Nic(A), Nic(B)], None),
    ],
)
def test_a_driver_in_netplan_becomes_the_new_one_or_an_address(
    match: str, nics: list[Nic], expected: str | None
) -> None:
    text = "network: {{version: 2, ethernets: {{lan: {{match: {}, dhcp4: true}}}}}}\n"
    assert repaired({NETPLAN: text.format(match)}, *nics) == (
        {} if expected is None else {NETPLAN: text.format(expected)}
    )


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ("{match: {driver: vmxnet3}, dhcp4: true}", "network_driver"),
        (
            "{renderer: NetworkManager, match: {}, networkmanager: {passthrough: {match.path: 'pci-0000:0b:00.0;'}}}",
            "network_match",
        ),
    ],
)
def test_a_netplan_file_whose_card_nobody_knows_is_reported(entry: str, code: str) -> None:
    assert reported({NETPLAN: f"network: {{ethernets: {{lan: {entry}}}}}\n"}, Nic(A), Nic(B)) == code


def test_what_the_manifest_configures_is_not_edited_twice() -> None:
    """`configuration.network` takes the file away, and has the addresses of its cards written again."""
    guest = Guest({NETPLAN: AZURE.format(a=A, b=B), **SETUP_LINK})
    wanted = (Wanted(name="eth0", dhcp=True), Wanted(name="eth1", dhcp=True))
    assert NETPLAN not in [edit.path for edit in plan(guest, Nic(A), Nic(B), wanted=wanted).edits]
    inspection: Any = SimpleNamespace(os_type="linux", hostname="x", package_format="deb", mounts={}, filesystems=())
    theirs = configuration.plan(View(guest, inspection, Names({}, {})), Configuration(interfaces=wanted))
    assert NETPLAN in [edit.path for edit in theirs.edits]


# Whom a mistake would reach


@pytest.mark.parametrize("nics", [[vmxnet3(A)], [vmxnet3(A), vmxnet3(B)], [vmxnet3(A), Nic(B, None, "E1000e")]])
def test_a_file_that_was_for_no_card_is_for_none_again(nics: list[Nic]) -> None:
    """A leftover of a card that was replaced, or what a distribution brings for a cloud."""
    files = {
        NETWORK: "[Match]\nDriver=e1000\n[Network]\nAddress=10.9.9.9/24\n",
        "/usr/lib/systemd/network/80-ec2.network": "[Match]\nDriver=ena ixgbevf vif\n[Network]\nDHCP=yes\n",
        PROFILE: KEYFILE.replace("path=pci-0000:0b:00.0;", "driver=e1000;"),
    }
    assert repaired(files, *nics, links=RUNS) == {}


def test_a_file_that_would_fit_more_cards_than_before_is_kept_to_its_own() -> None:
    text = "[Match]\nDriver=vmxnet3 virtio_net\n"
    assert repaired({NETWORK: text}, vmxnet3(A), Nic(B, None, "E1000")) == {
        NETWORK: f"[Match]\nPermanentMACAddress={A}\n"
    }
    assert repaired({NETWORK: "[Match]\nDriver=e1000e\n"}, vmxnet3(A), Nic(B, None, "E1000e"), cards="e1000e") == {
        NETWORK: f"[Match]\nPermanentMACAddress={B}\n"
    }


def test_an_address_is_never_written_for_a_card_without_one() -> None:
    assert reported({PROFILE: KEYFILE}, Nic(None)) == "network_match"
    assert repaired({NETWORK: "[Match]\nDriver=vmxnet3\n"}, Nic(None)) == {NETWORK: "[Match]\nDriver=virtio_net\n"}


def test_every_other_byte_of_an_edited_file_stays() -> None:
    text = KEYFILE.replace("id=lan", "id=b\udcfcro # x").replace("\n[ipv4]", "\n; [match]\n[ipv4]")
    guest = Guest({PROFILE: text, **SETUP_LINK})
    guest.apply(plan(guest, Nic(A)).edits)
    after = decode(guest.files[PROFILE])
    assert after.replace(f"mac-address={A.upper()}\n", "") == text.replace("path=pci-0000:0b:00.0;\n", "")
