"""Which card of VMware's had which name: by its slot, by its model, by the order, or that nobody can know."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from hyper2kvmd.domain import hardware
from hyper2kvmd.guest.linux.fixers.network.bind import Bound, Naming, bind
from hyper2kvmd.guest.linux.fixers.network.interface import Interface
from hyper2kvmd.guest.linux.fixers.network.place import kernel_order, pci_address
from hyper2kvmd.guest.options import Nic
from hyper2kvmd.job.inside import fix_options
from hyper2kvmd.manifest import ovf, parse
from hyper2kvmd.settings.model import Settings
from tests.unit.guest.linux.fixers.network.test_network import INTERFACES, MODERN, SETUP_LINK, A, B, C, Guest, plan

D = "00:50:56:aa:bb:04"
KERNEL = Naming(links=True, predictable=False)


def e1000(mac: str | None, slot: int | None = None) -> Nic:
    return Nic(mac, slot, "E1000")


def vmxnet3(mac: str | None, slot: int | None = None) -> Nic:
    return Nic(mac, slot, "VmxNet3")


def found(names: list[str], *nics: Nic, naming: Naming = MODERN, known: dict[str, str] | None = None) -> Bound:
    """What is bound, where the guest's own files have the addresses in `known`."""
    interfaces = [Interface("file", name, (known or {}).get(name)) for name in names]
    return bind(interfaces, nics, (), (), naming)


def pairs(bound: Bound) -> dict[str, str]:
    return {binding.name: binding.mac for binding in bound.bindings}


def codes(bound: Bound) -> set[str]:
    return {finding.code for finding in bound.warnings}


@pytest.mark.parametrize("names", [["ens33", "ens160"], ["ens160", "ens33"]])
def test_an_e1000_and_a_vmxnet3_keep_their_addresses_whatever_the_order(names: list[str]) -> None:
    """E1000 sits on the conventional bus, VmxNet3 on a bridge; before, ens33 was sorted behind ens160."""
    for nics in ((e1000(A), vmxnet3(B)), (vmxnet3(B), e1000(A))):
        bound = found(names, *nics)
        assert pairs(bound) == {"ens33": A, "ens160": B}
        assert codes(bound) == {"network_inferred"}


@pytest.mark.parametrize(
    ("names", "nics", "expected"),
    [
        (["ens33", "ens34", "ens192"], [e1000(A), vmxnet3(B), e1000(C)], {"ens33": A, "ens34": C, "ens192": B}),
        (["ens32", "ens224", "ens192"], [vmxnet3(A), e1000(B), vmxnet3(C)], {"ens32": B, "ens192": A, "ens224": C}),
        # Not every card is configured: those of the kind that is go by themselves.
        (["ens192"], [e1000(A), vmxnet3(B)], {"ens192": B}),
        (["ens192", "ens33"], [e1000(A), vmxnet3(B), e1000(C)], {"ens192": B}),
        (["ens192", "ens33"], [e1000(A), vmxnet3(B), vmxnet3(C)], {"ens33": A}),
        # What is left over then has no other card either.
        (["ens33", "lan0"], [e1000(A), vmxnet3(B)], {"ens33": A, "lan0": B}),
        (["lan0", "lan1"], [e1000(A), vmxnet3(B)], {}),
        # E1000e is a PCI Express device, vlance and vmxnet are not.
        (["ens160", "ens192"], [Nic(A, None, "E1000e"), vmxnet3(B)], {"ens160": A, "ens192": B}),
        (["ens33", "ens160"], [Nic(A, None, "E1000e"), vmxnet3(B)], {}),
        (["ens33", "ens160"], [Nic(A, None, "E1000e"), Nic(B, None, "PCNet32")], {"ens33": B, "ens160": A}),
        (["ens33", "ens34"], [Nic(A, None, "vmxnet2"), e1000(B)], {"ens33": A, "ens34": B}),
        # Names of one kind for cards of two, which no order tells.
        (["ens33", "ens34"], [e1000(A), vmxnet3(B)], {}),
        (["ens192", "ens224"], [e1000(A), vmxnet3(B)], {}),
        (["eno16777736", "eno33554984"], [e1000(A), vmxnet3(B)], {}),
        (["eno33557248", "eno16777984"], [vmxnet3(A), vmxnet3(B)], {"eno16777984": A, "eno33557248": B}),
    ],
)
def test_order_is_believed_among_cards_of_one_kind_only(
    names: list[str], nics: list[Nic], expected: dict[str, str]
) -> None:
    bound = found(names, *nics)
    assert pairs(bound) == expected
    assert ("network_unbound" in codes(bound)) == (len(expected) < len(names))


@pytest.mark.parametrize(
    ("names", "nics", "expected"),
    [
        (["ens33", "ens160"], [Nic(A), Nic(B)], {}),
        (["ens160", "ens192"], [Nic(A), Nic(B)], {"ens160": A, "ens192": B}),
        (["ens160", "ens192"], [vmxnet3(A), Nic(B, None, "vmware.sriov")], {}),
        (["ens160", "ens192"], [vmxnet3(A), Nic(B)], {}),
        (["ens33", "ens160"], [e1000(A), vmxnet3(B), Nic(C)], {}),
        # A card of a kind whose name the machine's new layout gives (EFI, hardware version 20): they are all of it.
        (["ens33"], [vmxnet3(A)], {"ens33": A}),
        (["ens34", "ens33"], [vmxnet3(A), vmxnet3(B)], {"ens33": A, "ens34": B}),
    ],
)
def test_names_of_two_kinds_are_not_guessed_where_models_are_unknown(
    names: list[str], nics: list[Nic], expected: dict[str, str]
) -> None:
    assert pairs(found(names, *nics)) == expected


def test_the_last_name_is_not_given_to_a_card_of_the_other_kind() -> None:
    """ens224 is what is left of a card that is gone; lan0 has the VmxNet3, and the E1000 is not configured."""
    bound = found(["lan0", "ens224"], vmxnet3(A), e1000(B), known={"lan0": A})
    assert pairs(bound) == {"lan0": A}
    assert codes(bound) == {"network_unbound"}


def test_the_last_name_is_not_bound_where_another_name_has_an_address_that_nobody_knows() -> None:
    """Whose ens192 is may be the one card that there is; ens224 may be a leftover."""
    bound = found(["ens192", "ens224"], vmxnet3(A), known={"ens192": C})
    assert (pairs(bound), codes(bound)) == ({}, {"network_unknown_mac", "network_unbound"})
    nameless = bind([Interface("f", "", C), Interface("f", "ens224")], [vmxnet3(A)], (), (), MODERN)
    assert (pairs(nameless), codes(nameless)) == ({}, {"network_unknown_mac", "network_unbound"})


def test_slots_of_the_ovf_go_before_models_and_order() -> None:
    bound = found(["ens33", "ens160"], e1000(A, 160), vmxnet3(B, 33))
    assert pairs(bound) == {"ens33": B, "ens160": A}
    assert codes(bound) == set()


def test_a_card_whose_slot_is_known_gets_no_name_of_another_slot() -> None:
    assert pairs(found(["ens224"], vmxnet3(A, 192))) == {}
    assert pairs(found(["ens224", "ens256"], vmxnet3(A, 192), vmxnet3(B, 160))) == {}
    assert pairs(found(["lan0"], vmxnet3(A, 192))) == {"lan0": A}


def test_more_than_four_cards_are_paired_as_the_bridges_are_filled() -> None:
    macs = [f"00:50:56:00:00:{number:02x}" for number in range(10)]
    names = ["ens160", "ens192", "ens224", "ens256", "ens161", "ens193", "ens225", "ens257", "ens162", "ens194"]
    bound = found(sorted(names), *map(vmxnet3, macs))
    assert pairs(bound) == dict(zip(names, macs, strict=True))


# What the kernel calls them


def test_names_in_the_kernels_order_are_left_where_that_order_is_the_domains() -> None:
    bound = found(["eth0", "eth1"], vmxnet3(A), vmxnet3(B), naming=KERNEL)
    assert (pairs(bound), codes(bound)) == ({}, {"network_kernel_order"})


@pytest.mark.parametrize(
    "nics", [[e1000(A), vmxnet3(B)], [vmxnet3(f"00:50:56:00:00:0{number}") for number in range(5)]]
)
def test_names_in_the_kernels_order_are_reported_where_nobody_knows_that_order(nics: list[Nic]) -> None:
    bound = found(["eth0", "eth1"], *nics, naming=KERNEL)
    assert (pairs(bound), "network_unbound" in codes(bound)) == ({}, True)


def test_slots_tell_the_kernels_order_to_a_udev_that_can_swap() -> None:
    """A fifth card is beside the first, on the next bus: the kernel found it second."""
    slots = [160, 192, 224, 256, 1184]
    nics = [vmxnet3(f"00:50:56:00:00:0{number}", slot) for number, slot in enumerate(slots)]
    names = [f"eth{number}" for number in range(5)]
    order = [nics[number].mac for number in (0, 4, 1, 2, 3)]
    old = found(names, *nics, naming=Naming(links=False, predictable=False, swaps=True))
    assert pairs(old) == dict(zip(names, order, strict=True))
    new = found(names, *nics, naming=KERNEL)
    assert (pairs(new), "network_unbound" in codes(new)) == ({}, True)


@pytest.mark.parametrize(
    ("slot", "address"),
    [
        (17, "0000:00:11.0"),
        (32, "0000:02:00.0"),
        (33, "0000:02:01.0"),
        (160, "0000:03:00.0"),
        (1184, "0000:04:00.0"),
        (192, "0000:0b:00.0"),
        (1216, "0000:0c:00.0"),
        (224, "0000:13:00.0"),
        (256, "0000:1b:00.0"),
        (7424, "0000:22:00.0"),
        (96, None),
        (99999, None),
    ],
)
def test_slot_numbers_say_where_the_guest_finds_a_card(slot: int, address: str | None) -> None:
    assert pci_address(slot) == address


def test_order_of_the_kernel_is_not_made_up() -> None:
    assert kernel_order([Nic(A), Nic(B)]) == [Nic(A), Nic(B)]
    assert kernel_order([e1000(A, 33), vmxnet3(B, 160)]) is None
    assert kernel_order([vmxnet3(A, 192), vmxnet3(B, 160)]) == [vmxnet3(B, 160), vmxnet3(A, 192)]


# From the export to the guest


def test_an_export_whose_ovf_has_no_slots_keeps_two_models_apart() -> None:
    """The cards of the manifest have addresses, those of the descriptor models; the guest has its two names."""
    manifest = {
        "manifest_version": "1.0",
        "source": {"vm_name": "gns3"},
        "disks": [{"id": "d", "source_format": "vmdk", "bytes": 1, "local_path": "/exports/gns3/d.vmdk"}],
        "nics": [{"mac": A, "network": "Host"}, {"mac": B, "network": "NAT"}],
    }
    items = "".join(
        f"<Item><rasd:AddressOnParent>{number}</rasd:AddressOnParent><rasd:Connection>{network}</rasd:Connection>"
        f"<rasd:ResourceSubType>{model}</rasd:ResourceSubType><rasd:ResourceType>10</rasd:ResourceType></Item>"
        for number, network, model in ((8, "NAT", "VmxNet3"), (7, "Host", "E1000"))
    )
    descriptor = (
        '<Envelope xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">'
        f"<VirtualSystem><VirtualHardwareSection>{items}</VirtualHardwareSection></VirtualSystem></Envelope>"
    )
    read = parse(json.dumps(manifest).encode(), "manifest.json")
    was, _ = hardware.merge(read, ovf.parse(descriptor.encode(), "gns3.ovf"))
    job: Any = SimpleNamespace(settings=Settings(), id="job")
    planned: Any = SimpleNamespace(manifest=read, cards=was.cards)
    nics = fix_options(job, planned).nics
    addresses = "iface ens160 inet static\n  address 10.0.0.2/24\niface ens33 inet static\n  address 10.1.0.2/24\n"
    edits = plan(Guest({INTERFACES: addresses, **SETUP_LINK}), *nics).edits
    assert {edit.path: (edit.after or "").split("\n")[2] for edit in edits} == {
        "/etc/systemd/network/10-hyper2kvm-ens33.link": f"PermanentMACAddress={A}",
        "/etc/systemd/network/10-hyper2kvm-ens160.link": f"PermanentMACAddress={B}",
    }
