"""How network cards keep their names: what is configured, which card it is, and what is written for it."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.guest.change import Edit, decode, encode
from hyper2kvmd.guest.linux.devices import Names
from hyper2kvmd.guest.linux.fixers import FixPlan, View, addresses, guest_yaml, network, platform
from hyper2kvmd.guest.linux.fixers.network import ifcfg, ifupdown, keyfile, leases, netplan, udev
from hyper2kvmd.guest.linux.fixers.network.bind import Naming, bind
from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card
from hyper2kvmd.guest.options import Nic
from hyper2kvmd.text import mac_address
from tests.pace import work_of_at_most

A, B, C = "00:50:56:aa:bb:01", "00:50:56:aa:bb:02", "00:50:56:aa:bb:03"
OLD_SETUP_LINK = {"/lib/udev/rules.d/80-net-setup-link.rules": 'IMPORT{builtin}="net_setup_link"\n'}
# What the programs have in them, of systemd 241 and of 247.
UDEV = "/lib/systemd/systemd-udevd"
OLD_KEYS = "\x7fELF\0Match.MACAddress\0Match.OriginalName\0Match.Path\0Match.Driver\0Match.Type\0"
KEYS = OLD_KEYS + "Match.PermanentMACAddress\0Match.Property\0"
SETUP_LINK = {**OLD_SETUP_LINK, UDEV: KEYS}
NAME_SLOT = {"/usr/lib/udev/rules.d/80-net-name-slot.rules": 'NAME=="", NAME="$env{ID_NET_NAME_ONBOARD}"\n'}
STATIC = "auto lo\niface lo inet loopback\n\nallow-hotplug ens192\niface ens192 inet static\n  address 10.0.2.15/24\n"
INTERFACES = "/etc/network/interfaces"
LINK = "/etc/systemd/network/10-hyper2kvm-ens192.link"
MODERN = Naming(links=True, predictable=True)


class Guest:
    """The files of a guest, as libguestfs shows them. `links` are symbolic links to nothing that is a file."""

    def __init__(self, files: Mapping[str, str], links: tuple[str, ...] = ()) -> None:
        self.files = {path: encode(text) for path, text in files.items()}
        self.links = links

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        return path in self.files

    def is_symlink(self, path: str) -> bool:
        return path in self.links

    def is_dir(self, path: str, followsymlinks: bool = False) -> bool:
        return any(other.startswith(f"{path}/") for other in self.files)

    def filesize(self, path: str) -> int:
        return len(self.files[path])

    def read_file(self, path: str) -> bytes:
        return self.files[path]

    def pread(self, path: str, count: int, offset: int) -> bytes:
        return self.files[path][offset : offset + count]

    def glob_expand(self, pattern: str) -> list[str]:
        depth = pattern.count("/")
        paths = (*self.files, *self.links)
        return [path for path in paths if fnmatchcase(path, pattern) and path.count("/") == depth]

    def apply(self, edits: tuple[Edit, ...]) -> None:
        for edit in edits:
            assert edit.before == (decode(self.files[edit.path]) if edit.path in self.files else None)
            assert edit.after is not None
            self.files[edit.path] = encode(edit.after)


def plan(guest: Guest, *nics: Nic, os_type: str = "linux") -> FixPlan:
    inspection: Any = SimpleNamespace(os_type=os_type)
    return network.plan(View(guest, inspection, Names({}, {})), nics)


def codes(planned: FixPlan) -> list[str]:
    return [finding.code for finding in planned.warnings]


def names(interfaces: tuple[Interface, ...]) -> list[str]:
    return [one.name for one in interfaces]


def bound(interfaces: list[str], *nics: Nic, naming: Naming = MODERN) -> dict[str, str]:
    found = bind([Interface("file", name) for name in interfaces], nics, (), (), naming)
    return {binding.name: binding.mac for binding in found.bindings}


# The whole


def test_static_address_of_debian_is_kept_by_a_link_file() -> None:
    planned = plan(Guest({INTERFACES: STATIC, **SETUP_LINK}), Nic(A))
    assert planned == FixPlan(
        (
            Edit(
                "network",
                LINK,
                None,
                "# Written by hyper2kvmd, so that the card keeps its name; may be removed if that does not matter.\n"
                f"[Match]\nPermanentMACAddress={A}\n\n[Link]\nName=ens192\n",
                f"ens192 is the card {A}",
                "it is the only name and the only card that are left",
            ),
        )
    )


def test_where_templates_put_a_directory_in_the_way_of_udevs_rules_they_have_another_name() -> None:
    guest = Guest({INTERFACES: STATIC, **OLD_SETUP_LINK, UDEV: OLD_KEYS, f"{udev.RULES}/.keep": ""})
    (edit,) = plan(guest, Nic(A)).edits
    assert ("/etc/udev/rules.d/70-hyper2kvm-net.rules", None) == (edit.path, edit.before)
    guest.apply((edit,))
    assert FixPlan() == plan(guest, Nic(A))


@pytest.mark.parametrize("directory", ["/etc/systemd/network", "/usr/lib/systemd/network"])
def test_cards_are_called_by_the_kernel_where_systemds_policy_is_off(directory: str) -> None:
    text = "auto eth0\niface eth0 inet dhcp\nauto eth1\niface eth1 inet dhcp\n"
    off = Guest({INTERFACES: text, **SETUP_LINK}, (f"{directory}/99-default.link",))
    assert ["network_kernel_order"] == codes(plan(off, Nic(A), Nic(B)))
    on = Guest({INTERFACES: text, f"{directory}/99-default.link": "[Link]\nNamePolicy=keep path\n", **SETUP_LINK})
    assert ["network_unbound", "network_unbound"] == codes(plan(on, Nic(A), Nic(B)))


RH = "/etc/sysconfig/network-scripts/ifcfg-"
WICKED = "/etc/sysconfig/network/ifcfg-"
PROFILES = "/etc/NetworkManager/system-connections/"
PROFILE = "[connection]\ntype=ethernet\ninterface-name={}\nautoconnect={}\n"


@pytest.mark.parametrize(
    "files",
    [
        {f"{RH}ens33": "DEVICE=ens33\nONBOOT=no\n", f"{RH}ens192": "DEVICE=ens192\nONBOOT=yes\nIPADDR=10.0.0.2\n"},
        # of a card that the template had
        {f"{RH}ens160": f"DEVICE=ens160\nHWADDR={C}\nONBOOT='no'\n", f"{RH}ens192": "DEVICE=ens192\nONBOOT=yes\n"},
        {f"{PROFILES}a": PROFILE.format("ens33", "false"), f"{PROFILES}b": PROFILE.format("ens192", "true")},
        {f"{WICKED}ens33": "STARTMODE='off'\n", f"{WICKED}ens192": "STARTMODE='auto'\n"},
    ],
)
def test_a_name_that_the_boot_does_not_start_yields_to_one_that_it_starts(files: dict[str, str]) -> None:
    planned = plan(Guest({**files, **SETUP_LINK}), Nic(A))
    assert [LINK] == [edit.path for edit in planned.edits]
    (warning,) = planned.warnings
    assert "ens33" in warning.message or C in warning.message


def test_names_that_the_boot_does_not_start_are_kept_where_there_are_cards_for_them() -> None:
    files = {f"{RH}ens{slot}": f"DEVICE=ens{slot}\nONBOOT={boot}\n" for slot, boot in ((192, "yes"), (224, "no"))}
    planned = plan(Guest({**files, **SETUP_LINK}), Nic(A, 192), Nic(B, 224))
    assert [f"ens192 is the card {A}", f"ens224 is the card {B}"] == [edit.summary for edit in planned.edits]


ANY = "[Match]\nDriver=vmxnet3\n\n[Link]\nNamePolicy=slot path\nLargeReceiveOffload=no\n"


@pytest.mark.parametrize(
    ("name", "text", "by_rule"),
    [
        ("10-ethtool.link", ANY, True),
        ("00-default.link", "[Match]\nOriginalName=*\n[Link]\nMACAddressPolicy=none\n", True),
        ("05-lan.link", "[Match]\nPath=pci-*\n[Link]\nMTUBytes=9000\n", True),
        ("50-ethtool.link", ANY, False),  # behind ours
        ("10-dmz.link", f"[Match]\nMACAddress={C}\n[Link]\nName=dmz0\n", False),
        ("05-wifi.link", "[Match]\nType=wlan\n[Link]\nMTUBytes=1400\n", False),
    ],
)
def test_a_name_is_bound_by_a_rule_where_a_file_for_many_cards_comes_first(name: str, text: str, by_rule: bool) -> None:
    guest = Guest({INTERFACES: STATIC, f"/etc/systemd/network/{name}": text, **SETUP_LINK})
    edits = plan(guest, Nic(A, None, "VmxNet3")).edits
    assert [udev.RULES if by_rule else LINK] == [edit.path for edit in edits if name not in edit.path]


def test_a_profile_in_etc_takes_the_place_of_the_distributions() -> None:
    text = "[connection]\ntype=ethernet\n[match]\npath=pci-0000:0b:00.0;\n"
    paths = [f"{place}/NetworkManager/system-connections/a.nmconnection" for place in ("/etc", "/usr/lib")]
    (edit,) = plan(Guest({**dict.fromkeys(paths, text), **SETUP_LINK}), Nic(A)).edits
    assert paths[0] == edit.path


CONFIGURED = {
    "ifupdown": {INTERFACES: STATIC},
    "sourced": {INTERFACES: "source interfaces.d/*\n", "/etc/network/interfaces.d/a": "iface ens192 inet6 auto\n"},
    "netplan": {
        "/etc/netplan/01.yaml": "network:\n  ethernets:\n    ens192: {addresses: [10.0.0.2/24, 10.0.0.3/24]}\n"
    },
    "networkd": {"/etc/systemd/network/20.network": "[Match]\nName=ens192\n[Network]\nAddress=fd00::2/64\n"},
    "keyfile": {
        "/etc/NetworkManager/system-connections/a.nmconnection": "[connection]\ntype=ethernet\ninterface-name=ens192\n"
    },
    "redhat": {"/etc/sysconfig/network-scripts/ifcfg-ens192": 'TYPE="Ethernet"\nDEVICE="ens192"\nIPADDR=10.0.0.2\n'},
    "suse": {"/etc/sysconfig/network/ifcfg-ens192": "BOOTPROTO='static'\nIPADDR='10.0.0.2/24'\n"},
}


@pytest.mark.parametrize("kind", CONFIGURED)
def test_name_in_every_format_is_bound(kind: str) -> None:
    planned = plan(Guest({**CONFIGURED[kind], **SETUP_LINK}), Nic(A))
    assert [edit.path for edit in planned.edits] == [LINK]
    assert planned.warnings == ()


@pytest.mark.parametrize("rules", [SETUP_LINK, OLD_SETUP_LINK, NAME_SLOT, {}])
@pytest.mark.parametrize("kind", CONFIGURED)
def test_plan_for_the_changed_guest_is_empty(kind: str, rules: dict[str, str]) -> None:
    guest = Guest({**CONFIGURED[kind], **rules})
    first = plan(guest, Nic(A))
    guest.apply(first.edits)
    assert first.edits != ()
    assert plan(guest, Nic(A)) == FixPlan()


def test_our_link_file_is_corrected_when_the_card_gets_another_address() -> None:
    guest = Guest({INTERFACES: STATIC, **SETUP_LINK})
    guest.apply(plan(guest, Nic(A)).edits)
    guest.apply(plan(guest, Nic(B)).edits)
    assert f"PermanentMACAddress={B}\n" in decode(guest.files[LINK])
    assert plan(guest, Nic(B)) == FixPlan()


def test_rule_is_appended_where_udev_does_not_read_link_files() -> None:
    old = f'# old\nSUBSYSTEM=="net", ACTION=="add", ATTR{{address}}=="{C}", NAME="ens7"'
    (edit,) = plan(Guest({INTERFACES: STATIC, udev.RULES: old, **NAME_SLOT}), Nic(A)).edits
    assert edit.after == (
        old
        + "\n# ens192: written by hyper2kvmd, so that the card keeps its name; may be removed if that does not matter\n"
        + 'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", '
        + f'ATTR{{address}}=="{A}", ATTR{{dev_id}}=="0x0", ATTR{{type}}=="1", NAME="ens192"\n'
    )


@pytest.mark.parametrize(
    "udev_program",
    [
        {UDEV: OLD_KEYS},  # systemd 209 to 244, with or without lists and negations in Type=
        {"/usr/lib/systemd/systemd-udevd": OLD_KEYS, UDEV: OLD_KEYS},
        {"/sbin/udevd": "\x7fELF eudev\0"},
        {},
    ],
)
def test_udev_that_does_not_know_a_cards_own_address_gets_a_rule_for_real_cards(udev_program: dict[str, str]) -> None:
    """A .link file would match each VLAN on the card as well, and with a key that is unknown every card there is."""
    (edit,) = plan(Guest({INTERFACES: STATIC, **OLD_SETUP_LINK, **udev_program}), Nic(A)).edits
    assert (edit.path, edit.before) == (udev.RULES, None)
    assert edit.after is not None
    assert edit.after.split("\n")[1:] == [
        f'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{{address}}=="{A}", ATTR{{dev_id}}=="0x0", '
        'ATTR{type}=="1", NAME="ens192"',
        "",
    ]


def test_what_udev_knows_is_looked_up_where_its_program_is_whatever_the_version() -> None:
    backported = {"/usr/lib/systemd/systemd-udevd": KEYS, "/usr/lib/systemd/libsystemd-shared-239.so": "\x7fELF"}
    assert [edit.path for edit in plan(Guest({INTERFACES: STATIC, **OLD_SETUP_LINK, **backported}), Nic(A)).edits] == [
        LINK
    ]


@pytest.mark.parametrize("before", [0, (1 << 20) - 10, 3 << 20])
def test_key_is_found_wherever_it_is_in_the_program(before: int) -> None:
    program = {UDEV: "\0" * before + KEYS}
    assert [edit.path for edit in plan(Guest({INTERFACES: STATIC, **OLD_SETUP_LINK, **program}), Nic(A)).edits] == [
        LINK
    ]


def test_masked_naming_rule_means_that_link_files_are_not_read() -> None:
    guest = Guest({INTERFACES: STATIC, **SETUP_LINK}, ("/etc/udev/rules.d/80-net-setup-link.rules",))
    assert [edit.path for edit in plan(guest, Nic(A)).edits] == [udev.RULES]


def test_generator_of_rules_comes_before_link_files_and_so_a_rule_is_written() -> None:
    generator = {"/lib/udev/rules.d/75-persistent-net-generator.rules": "# writes rules\n"}
    (edit,) = plan(Guest({INTERFACES: STATIC, **SETUP_LINK, **generator}), Nic(A)).edits
    assert edit.path == udev.RULES


def test_windows_and_guests_without_configuration_are_left_alone() -> None:
    assert plan(Guest({INTERFACES: STATIC, **SETUP_LINK}), Nic(A), os_type="windows") == FixPlan()
    assert plan(Guest(SETUP_LINK), Nic(A)) == FixPlan()


def test_without_cards_the_configured_names_are_reported() -> None:
    planned = plan(Guest({INTERFACES: STATIC, **SETUP_LINK}))
    assert (planned.edits, codes(planned)) == ((), ["network_unbound"])
    assert "ens192" in planned.warnings[0].message


def test_card_without_a_known_address_is_not_bound() -> None:
    planned = plan(Guest({INTERFACES: STATIC, **SETUP_LINK}), Nic(None))
    assert (planned.edits, codes(planned)) == ((), ["network_unbound"])
    assert planned.warnings[0].field == "nics"


# What the guest sees to itself

PINNED = {
    "link": {"/etc/systemd/network/10-lan.link": f"[Match]\nMACAddress={A.upper()}\n[Link]\nName=ens192\n"},
    "permanent": {"/etc/systemd/network/10-lan.link": f"[Match]\nPermanentMACAddress={A}\n[Link]\nName=ens192\n"},
    "rule": {
        udev.RULES: f'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{{address}}=="{A}", ATTR{{dev_id}}=="0x0", '
        'ATTR{type}=="1", KERNEL=="eth*", NAME="ens192"\n'
    },
}


@pytest.mark.parametrize("kind", PINNED)
def test_name_that_the_guest_pins_is_left_alone(kind: str) -> None:
    assert plan(Guest({INTERFACES: STATIC, **PINNED[kind], **SETUP_LINK}), Nic(A), Nic(B)) == FixPlan()


@pytest.mark.parametrize(
    "rule",
    [
        f'ATTR{{address}}=="{A}", DRIVERS=="vmxnet3", NAME="ens192"',
        f'ATTR{{address}}=="{A}", KERNELS=="0000:0b:00.0", NAME="ens192"',
        f'ATTR{{address}}=="{A}", ENV{{ID_NET_DRIVER}}!="virtio_net", NAME="ens192"',
    ],
)
def test_rule_that_only_the_old_card_meets_is_evidence_for_a_new_one(rule: str) -> None:
    planned = plan(Guest({INTERFACES: STATIC, "/etc/udev/rules.d/10-a.rules": rule, **SETUP_LINK}), Nic(B), Nic(A))
    assert [(edit.path, edit.evidence) for edit in planned.edits] == [
        (LINK, "/etc/udev/rules.d/10-a.rules gave it the name")
    ]
    assert planned.edits[0].after is not None
    assert f"PermanentMACAddress={A}\n" in planned.edits[0].after


@pytest.mark.parametrize(
    "files",
    [
        {"/etc/netplan/50-cloud-init.yaml": f"network:\n  ethernets:\n    a: {{match: {{macaddress: '{A}'}}}}\n"},
        {"/etc/netplan/50.yaml": f"network:\n  ethernets:\n    a: {{match: {{macaddress: {A}}}, set-name: ens192}}"},
        {"/etc/netplan/50.yaml": "network:\n  ethernets:\n    a: {match: {name: 'en*'}, dhcp4: true}"},
        {"/etc/systemd/network/a.network": "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n"},
        {"/etc/systemd/network/a.network": "[Match]\nType=ether\n[Network]\nDHCP=yes\n"},
        {"/etc/systemd/network/a.network": f"[Match]\nMACAddress={A}\n[Network]\nDHCP=yes\n"},
        {"/etc/NetworkManager/system-connections/a": f"[connection]\ntype=ethernet\n[ethernet]\nmac-address={A}\n"},
        {"/etc/NetworkManager/system-connections/a": "[connection]\ntype=ethernet\n"},
        {"/etc/sysconfig/network-scripts/ifcfg-Wired": f"TYPE=Ethernet\nHWADDR={A.upper()}\nNAME=Wired\n"},
        {"/etc/sysconfig/network/ifcfg-eth-id-" + A: "BOOTPROTO=dhcp\n"},
        {INTERFACES: "auto enx005056aabb01\niface enx005056aabb01 inet dhcp\n"},
        {INTERFACES: "auto /en*=lan\niface lan inet dhcp\n"},
    ],
)
def test_configuration_that_still_finds_its_card_is_left_alone(files: dict[str, str]) -> None:
    assert plan(Guest({**files, **SETUP_LINK}), Nic(A)) == FixPlan()


def test_red_hats_udev_renames_by_the_ifcfg_file_and_needs_no_rule() -> None:
    file = {"/etc/sysconfig/network-scripts/ifcfg-eth1": f"DEVICE=eth1\nHWADDR={A}\n"}
    rename = {"/usr/lib/udev/rules.d/60-net.rules": 'PROGRAM="/lib/udev/rename_device"\n'}
    assert plan(Guest({**file, **NAME_SLOT, **rename}), Nic(B), Nic(A)) == FixPlan()
    assert len(plan(Guest({**file, **NAME_SLOT}), Nic(A)).edits) == 1


@pytest.mark.parametrize("path", ["/boot/grub/grub.cfg", "/etc/default/grub", "/boot/loader/entries/a.conf"])
def test_kernel_names_in_order_need_no_rule_and_of_several_cards_a_warning(path: str) -> None:
    guest = Guest({INTERFACES: "iface eth0 inet dhcp\n", path: "options quiet net.ifnames=0 ro\n", **SETUP_LINK})
    assert plan(guest, Nic(A)) == FixPlan()
    assert (plan(guest, Nic(A), Nic(B)).edits, codes(plan(guest, Nic(A), Nic(B)))) == ((), ["network_kernel_order"])


def test_kernel_name_that_old_udev_keeps_for_the_old_card_is_given_to_the_new_one() -> None:
    rule = f'SUBSYSTEM=="net", ACTION=="add", ATTR{{address}}=="{C}", KERNEL=="eth*", NAME="eth0"\n'
    (edit,) = plan(Guest({INTERFACES: "iface eth0 inet dhcp\n", udev.RULES: rule}), Nic(A)).edits
    assert edit.after is not None
    assert udev.pins(edit.after, udev.RULES)[1:] == (udev.Pin("eth0", A, udev.RULES, True),)


# What nobody can know


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"/etc/systemd/network/a.network": "[Match]\nName=ens*\n"}, "network_glob"),
        ({INTERFACES: "auto /ens*=lan\niface lan inet dhcp\n"}, "network_glob"),
        ({"/etc/netplan/a.yaml": "network: {ethernets: {a: {match: {macaddress: '%s'}}}}" % C}, "network_unknown_mac"),  # noqa: UP031
        ({"/etc/sysconfig/network-scripts/ifcfg-ens192": f"DEVICE=ens192\nHWADDR={C}\n"}, "network_unknown_mac"),
        ({"/etc/netplan/a.yaml": "network: {ethernets: [}"}, "network_unreadable"),
        ({INTERFACES: "".join(f"iface x{number} inet dhcp\n" for number in range(201))}, "network_unbound"),
        ({INTERFACES: "iface ens192 inet dhcp\niface eno16777984 inet dhcp\n"}, "network_unbound"),
    ],
)
def test_what_will_not_be_found_on_kvm_is_reported_and_nothing_is_written(files: dict[str, str], code: str) -> None:
    planned = plan(Guest({**files, **SETUP_LINK}), Nic(A))
    assert planned.edits == ()
    assert set(codes(planned)) == {code}
    assert all(next(iter(files)) in finding.message and finding.hint for finding in planned.warnings)


def test_contradicting_addresses_are_reported() -> None:
    interfaces = [Interface("one", "ens192", A), Interface("two", "ens192", B)]
    found = bind(interfaces, [Nic(A), Nic(B)], (), (), MODERN)
    assert found.bindings == ()
    assert f"{A}, {B}" in found.warnings[0].message


def test_two_names_for_one_card_are_bound_to_none() -> None:
    found = bind([Interface("f", "ens1", A), Interface("f", "ens2", A)], [Nic(A), Nic(B)], (), (), MODERN)
    assert found.bindings == ()
    assert [finding.code for finding in found.warnings] == ["network_unbound"] * 2


def test_card_that_a_rule_calls_otherwise_gets_no_second_name() -> None:
    pin = udev.Pin("lan0", A, "rules", True)
    found = bind([Interface("f", "ens192", A)], [Nic(A)], [pin], (), MODERN)
    assert (found.bindings, [finding.code for finding in found.warnings]) == ((), ["network_unbound"])


def test_kernel_names_are_not_given_where_another_card_could_have_them() -> None:
    interfaces = [Interface("f", "eth0", B), Interface("f", "eth1", A)]
    found = bind(interfaces, [Nic(A), Nic(B)], (), (), MODERN)
    assert (found.bindings, [finding.code for finding in found.warnings]) == ((), ["network_unbound"] * 2)
    old = bind(interfaces, [Nic(A), Nic(B)], (), (), Naming(links=False, predictable=False, swaps=True))
    assert {binding.name: binding.mac for binding in old.bindings} == {"eth0": B, "eth1": A}
    assert bound(["eth0"], Nic(A)) == {"eth0": A}


# Evidence


@pytest.mark.parametrize(
    ("configured", "in_order"),
    [
        (["ens224", "ens192"], ["ens192", "ens224"]),
        (["ens161", "ens256", "ens224", "ens192", "ens160"], ["ens160", "ens192", "ens224", "ens256", "ens161"]),
        (["ens34", "ens32", "ens33"], ["ens32", "ens33", "ens34"]),
        (["eno33557248", "eno16777984"], ["eno16777984", "eno33557248"]),
    ],
)
def test_vmwares_names_follow_the_order_of_the_adapters(configured: list[str], in_order: list[str]) -> None:
    macs = [f"00:50:56:00:00:0{number}" for number in range(len(in_order))]
    assert bound(configured, *map(Nic, macs)) == dict(zip(in_order, macs, strict=True))


def test_conclusion_from_the_order_is_reported_as_one() -> None:
    found = bind([Interface("f", "ens224"), Interface("f", "ens192")], [Nic(A), Nic(B)], (), (), MODERN)
    assert [finding.code for finding in found.warnings] == ["network_inferred"]
    assert f"ens192 is {A}, ens224 is {B}" in found.warnings[0].message


@pytest.mark.parametrize("names", [["ens192"], ["ens192", "eno16777984"], ["lan0", "lan1"], ["ens192", "x", "y"]])
def test_names_are_not_guessed_where_numbers_or_families_differ(names: list[str]) -> None:
    assert bound(names, Nic(A), Nic(B)) == {}


def test_slot_numbers_of_the_ovf_decide_against_any_order() -> None:
    assert bound(["ens192", "ens161"], Nic(A, 1184), Nic(B, 192), Nic(C, 256)) == {"ens161": A, "ens192": B}


def test_what_is_known_of_one_card_decides_for_the_other() -> None:
    found = bind([Interface("f", "lan0", B), Interface("f", "lan1")], [Nic(A), Nic(B)], (), (), MODERN)
    assert {binding.name: binding.mac for binding in found.bindings} == {"lan0": B, "lan1": A}


def test_leases_decide_against_the_order() -> None:
    interfaces = [Interface("f", "ens192"), Interface("f", "ens224")]
    found = bind(interfaces, [Nic(A), Nic(B)], (), {("ens192", B), ("ens192", C)}, MODERN)
    assert {binding.name: binding.mac for binding in found.bindings} == {"ens192": B, "ens224": A}


def test_leases_of_every_client_are_read() -> None:
    lease = (
        'lease {\n  interface "ens192";\n  fixed-address 10.0.0.2;\n'
        "  option dhcp-client-identifier 1:0:50:56:aa:bb:2;\n}\n"
    )
    guest = Guest(
        {
            INTERFACES: STATIC + "iface ens224 inet dhcp\n",
            "/var/lib/dhcp/dhclient.ens192.leases": 'default-duid "\\000";\n' + lease,
            "/var/lib/NetworkManager/internal-0f7e4b5e-4a0f-4bd2-8a55-3f6a3c1d1a10-ens224.lease": (
                "ADDRESS=10.0.0.3\nCLIENTID=01005056aabb01\n"
            ),
            **SETUP_LINK,
        }
    )
    planned = plan(guest, Nic(A), Nic(B))
    assert {edit.summary for edit in planned.edits} == {f"ens192 is the card {B}", f"ens224 is the card {A}"}
    assert {edit.evidence for edit in planned.edits} == {"a DHCP lease has the MAC address"}
    assert planned.warnings == ()


def test_lease_with_a_duid_says_nothing_of_the_card() -> None:
    duid = "ff:56:50:4d:98:0:1:0:1:26:3d:5c:1c:0:50:56:aa:bb:2"
    assert leases.dhclient(f'lease {{\n  interface "ens192";\n  option dhcp-client-identifier {duid};\n}}\n') == set()


# The formats


def test_interfaces_file_names_cards_and_not_what_is_made_of_them() -> None:
    text = """\
source /etc/network/interfaces.d/*
source-directory more.d
source $(ls)/x
# iface ens1 inet dhcp
auto lo ens192 \\
     bond0 ens224.100
iface lo inet loopback
iface ens192 inet static\r
    address 10.0.0.2/24
    hwaddress ether 00:50:56:aa:bb:01
iface ens192 inet6 auto
iface ens192:0 inet static
iface ens224.100 inet static
iface vlan7 inet static
    vlan-raw-device ens225
iface bond0 inet static
    bond-slaves ens256 ens161
    bond-mode 1
iface lan inet dhcp
    bridge_ports ens193 regex none
iface br0 inet manual
iface wg0 inet manual
iface tun1 inet manual
iface uplink inet manual"""
    parsed = ifupdown.parse(text, INTERFACES)
    expected = {"ens192", "ens224", "ens225", "ens256", "ens161", "ens193", "uplink"}
    assert set(names(parsed.interfaces)) == expected
    assert len(parsed.interfaces) == len(expected)
    assert {one.mac for one in parsed.interfaces} == {None}
    assert parsed.sources == ("/etc/network/interfaces.d/*", "/etc/network/more.d/")


def test_stanzas_that_a_mapping_chooses_are_no_cards() -> None:
    text = "auto ens192\nmapping ens192\n  script /usr/bin/where\n  map home office\niface home inet dhcp\n"
    assert names(ifupdown.parse(text + "iface ens192 inet dhcp\n", INTERFACES).interfaces) == ["ens192"]


def test_backup_in_a_directory_of_interfaces_is_not_read() -> None:
    directory = {"/etc/network/more.d/a": STATIC, "/etc/network/more.d/a.bak": "iface ens224 inet dhcp\n"}
    planned = plan(Guest({INTERFACES: "source-directory more.d\n", **directory, **SETUP_LINK}), Nic(A))
    assert ([edit.path for edit in planned.edits], planned.warnings) == ([LINK], ())


def test_files_that_source_each_other_are_read_once() -> None:
    guest = Guest({INTERFACES: STATIC + "source interfaces\nsource interfaces*\n", **SETUP_LINK})
    assert len(plan(guest, Nic(A)).edits) == 1


def test_later_netplan_files_override_earlier_ones() -> None:
    files = {
        "/lib/netplan/10.yaml": "network: {ethernets: {ens1: {}}}",
        "/etc/netplan/10.yaml": "network: {version: 2, renderer: networkd, ethernets: {ens192: {dhcp4: yes}}}",
        "/etc/netplan/20.yaml": f"network: {{ethernets: {{ens192: {{match: {{macaddress: {B}}}, set-name: ens192}}}}}}",
    }
    planned = plan(Guest({**files, **SETUP_LINK}), Nic(A))
    assert codes(planned) == ["network_unknown_mac"]
    assert "/etc/netplan/20.yaml" in planned.warnings[0].message


def test_netplan_matches_become_interfaces() -> None:
    text = """\
network:
  ethernets:
    ens192: {}
    lan: {match: {name: ens224, macaddress: 52:54:00:12:34:56}}
    any: {match: {name: "ens*", driver: [vmxnet3, "virtio*"]}}
  bonds: {bond0: {interfaces: [ens192, lan]}}
  vlans: {ens192.7: {id: 7, link: ens192}}
"""
    content = guest_yaml.load(text)
    assert content is not None
    assert netplan.interfaces([("f", content)]) == (
        Interface("f", "ens192"),
        Interface("f", "ens224", "52:54:00:12:34:56"),
        Interface("f", "ens*"),
    )


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]\n",
        "[" * 20_000,
        "- " * 20_000,
        "x" * (guest_yaml.SIZE_LIMIT + 1),
        '"\\UFFFFFFFF"',
        "{[a]: b}",
        "just text",
        "\udcff: a",
        "a: [",
    ],
)
def test_yaml_that_is_broken_or_hostile_is_no_netplan_file(text: str) -> None:
    assert guest_yaml.load(text) is None


@pytest.mark.parametrize("key", ["macaddress", "driver", "name"])
@pytest.mark.parametrize("value", ["[x]", "{a: b}", "[[x]]", "~", "[]"])
def test_match_of_netplan_with_an_odd_value_raises_nothing(key: str, value: str) -> None:
    text = f"network: {{ethernets: {{a: {{match: {{driver: vmxnet3, {key}: {value}}}, set-name: {value}}}}}}}\n"
    assert len(plan(Guest({"/etc/netplan/1.yaml": text, **SETUP_LINK}), Nic(A)).edits) <= 2
    assert addresses.defined_by_netplan(text) is not None


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))


@pytest.mark.parametrize(
    "entry", ["ens192: *a19", "ens192: {match: *a19}", "ens192: {match: {name: *a19}, set-name: *a19}",
              "ens192: {match: {driver: *a19, macaddress: *a19}}", "ens192: {networkmanager: {passthrough: *a19}}"]
)  # fmt: skip
def test_aliases_that_stand_for_gigabytes_keep_nobody_busy(entry: str) -> None:
    text = f"{BOMB}network: {{ethernets: {{{entry}}}}}\ndatasource_list: *a19\n"
    with work_of_at_most(5):
        plan(Guest({"/etc/netplan/1.yaml": text, **SETUP_LINK}), Nic(A))
        addresses.defined_by_netplan(text)
        platform.datasource_list([text])


@pytest.mark.parametrize(
    "text",
    [
        "network:\n  ethernets:\n    ens192: &card {dhcp4: true}\n    ens224: *card\n",
        "network:\n  ethernets:\n    ens192: {nameservers: &ns {search: [a]}}\n    ens224: {nameservers: *ns}\n",
    ],
)
def test_netplan_file_with_aliases_is_one(text: str) -> None:
    planned = plan(Guest({"/etc/netplan/1.yaml": text, **SETUP_LINK}), Nic(A, 192), Nic(B, 224))
    assert [f"ens192 is the card {A}", f"ens224 is the card {B}"] == [edit.summary for edit in planned.edits]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "network:\n",
        "network: {ethernets: [a]}",
        "network: {ethernets: {a: {match: x}}}",
    ],
)
def test_netplan_file_of_odd_shape_raises_nothing(text: str) -> None:
    content = guest_yaml.load(text)
    assert content is not None
    assert set(names(netplan.interfaces([("f", content)]))) <= {"a"}


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("Name=ens192", [Interface("f", "ens192")]),
        ("Name=ens192 ens224\nName=en*", [Interface("f", "ens192"), Interface("f", "ens224"), Interface("f", "en*")]),
        (f"Name=ens192\nMACAddress={A.upper()}", [Interface("f", "ens192", A)]),
        (f"Name=ens192 ens224\nMACAddress={A} {B}", [Interface("f", "ens192"), Interface("f", "ens224")]),
        (f"PermanentMACAddress={A}", [Interface("f", "", A)]),
        ("Name=!ens192 lo", [Interface("f", "ens192", excluded=True)]),
        ("Name=bond0", []),
        ("Name=wl*\nType=wlan", []),
        ("Name=ens192\nKind=vlan", []),
        ("#Name=ens192", [Interface("f")]),
    ],
)
def test_match_section_of_networkd_becomes_interfaces(match: str, expected: list[Interface]) -> None:
    assert list(keyfile.networkd(f"[Match]\n{match}\n[Network]\nDHCP=yes\n", "f")) == expected


NETDEVS = {"backup": "vlan", "uplink": "bond", "lan": "bridge"}


def test_devices_that_networkd_makes_are_no_cards_whatever_they_are_called() -> None:
    """Of a single card that its file matches by a pattern, the one name that is left would be taken for the card's."""
    files = {"/etc/systemd/network/10.network": "[Match]\nName=en*\n[Network]\nVLAN=backup\nBond=uplink\n"}
    for name, kind in NETDEVS.items():
        files[f"/etc/systemd/network/{name}.netdev"] = f"[NetDev]\nName={name}\nKind={kind}\n"
        files[f"/etc/systemd/network/{name}.network"] = f"[Match]\nName={name}\n[Network]\nAddress=10.0.4.2/24\n"
    assert plan(Guest({**files, **SETUP_LINK}), Nic(A)) == FixPlan()
    both = files | {"/etc/systemd/network/9.network": "[Match]\nName=ens192\n[Network]\nVLAN=backup\n"}
    planned = plan(Guest({**both, **SETUP_LINK}), Nic(A))
    assert ([edit.path for edit in planned.edits], planned.warnings) == ([LINK], ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[connection]\ntype=ethernet\ninterface-name=ens192\n", [Interface("f", "ens192")]),
        (
            "[connection]\ntype=802-3-ethernet\ninterface-name=ens192\n[802-3-ethernet]\nmac-address=0;80;86;170;187;1;\n",
            [Interface("f", "ens192", A)],
        ),
        ("[connection]\ntype=ethernet\n[ethernet]\ncloned-mac-address=00:50:56:aa:bb:09\n", []),
        ("[connection]\ntype=ethernet\nmaster=bond0\ninterface-name=ens192\n", [Interface("f", "ens192")]),
        ("[connection]\ntype=vlan\ninterface-name=ens192.7\n[vlan]\nparent=ens192\n", [Interface("f", "ens192")]),
        ("[connection]\ntype=bond\ninterface-name=bond0\n", []),
        ("[connection]\ntype=wifi\ninterface-name=wlp1s0\n", []),
        ("[connection]\ntype=ethernet\n[match]\ninterface-name=ens*;\n", [Interface("f", "ens*")]),
        (
            "[connection]\ntype=ethernet\n[match]\ninterface-name=|ens192;&ens2*;!ens256;&!ens224;\\ens1;\n",
            [
                *(Interface("f", "ens192"), Interface("f", "ens2*"), Interface("f", "ens256", excluded=True)),
                *(Interface("f", "ens224", excluded=True), Interface("f", "ens1")),
            ],
        ),
        ("type=ethernet\n[\n=\n", []),
    ],
)
def test_profile_of_networkmanager_becomes_interfaces(text: str, expected: list[Interface]) -> None:
    assert list(keyfile.networkmanager(text, "f")) == expected


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        ("ens192", "ONBOOT=yes\n", ["ens192"]),
        ("Wired_1", "DEVICE='ens192' # first\nTYPE=Ethernet\n", ["ens192"]),
        ("ens192", "DEVICE=ens192\nMASTER=bond0\nSLAVE=yes\n", ["ens192"]),
        ("ens192", "DEVICE=ens192\nBRIDGE=br0\n", ["ens192"]),
        ("ens192:1", "DEVICE=ens192:1\n", ["ens192"]),
        ("ens192.7", "DEVICE=ens192.7\nVLAN=yes\n", ["ens192"]),
        ("vlan7", "TYPE=Vlan\nPHYSDEV=ens192\nVLAN=yes\nDEVICE=vlan7\n", ["ens192"]),
        ("bond0", "DEVICE=bond0\nTYPE=Bond\nBONDING_MASTER=yes\n", []),
        ("lan", "DEVICE=lan\nTYPE=Bridge\n", []),
        ("uplink", "DEVICE=uplink\nDEVICETYPE=Team\n", []),
        ("ens192", "DEVICE=ens192\nDEVICETYPE=TeamPort\nTEAM_MASTER=uplink\n", ["ens192"]),
        ("lo", "DEVICE=lo\n", []),
        ("ens192.bak", "DEVICE=ens192\n", []),
        ("ens192", "#DEVICE=ens224\nMACADDR=00:50:56:aa:bb:09\n", ["ens192"]),
        # NetworkManager's for any card, which is not called so
        ("static", "TYPE=Ethernet\nNAME=static\nUUID=5f0c-1\nIPADDR=10.0.0.2\n", []),
        ("Profile_1", "TYPE=Ethernet\nNAME='Profile 1'\nUUID=5f0c-2\nONBOOT=yes\n", []),
        ("eth0", "NAME=eth0\nUUID=5f0c-3\nBOOTPROTO=dhcp\n", ["eth0"]),
        ("mgmt", "BOOTPROTO=dhcp\n", ["mgmt"]),
        # Open vSwitch
        ("ens192", "DEVICE=ens192\nDEVICETYPE=ovs\nTYPE=OVSPort\nOVS_BRIDGE=br-ex\n", ["ens192"]),
        ("br-ex", "DEVICE=br-ex\nDEVICETYPE=ovs\nTYPE=OVSBridge\nIPADDR=10.0.0.2\n", []),
        ("vlan9", "DEVICE=vlan9\nDEVICETYPE=ovs\nTYPE=OVSIntPort\nOVS_BRIDGE=br-ex\n", []),
        ("bond7", "DEVICE=bond7\nTYPE=OVSBond\nBOND_IFACES='ens192 ens224'\n", ["ens192", "ens224"]),
    ],
)
def test_red_hats_ifcfg_file_names_its_card(suffix: str, text: str, expected: list[str]) -> None:
    found = ifcfg.redhat(text, f"/etc/sysconfig/network-scripts/ifcfg-{suffix}", renames=False)
    assert names(found) == expected
    assert {one.mac for one in found} <= {None}


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        ("eth0", "LLADDR='00:50:56:aa:bb:09'\n", ["eth0"]),
        ("bond0", "BONDING_MASTER='yes'\nBONDING_SLAVE_0='eth0'\nBONDING_SLAVE_1='eth1'\n", ["eth0", "eth1"]),
        ("br0", "BRIDGE='yes'\nBRIDGE_PORTS='eth0 eth1'\n", ["eth0", "eth1"]),
        ("vlan7", "ETHERDEVICE='eth0'\nVLAN_ID='7'\n", ["eth0"]),
        ("eth0.7", "ETHERDEVICE=eth0\n", ["eth0"]),
        ("lo", "IPADDR=127.0.0.1/8\n", []),
        ("eth0.rpmsave", "BOOTPROTO=dhcp\n", []),
    ],
)
def test_suses_ifcfg_file_names_its_cards(suffix: str, text: str, expected: list[str]) -> None:
    assert names(ifcfg.suse(text, f"/etc/sysconfig/network/ifcfg-{suffix}")) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[Match]\nMACAddress=\n[Link]\nName=ens192\n",
        f"[Match]\nMACAddress={A} {B}\n[Link]\nName=ens192\n",
        f"[Match]\nMACAddress={A}\n[Link]\nMTUBytes=9000\n",
        f"[Match]\nMACAddress={A}\n[Link]\nName=../../x\n",
    ],
)
def test_link_file_that_names_no_single_card_pins_nothing(text: str) -> None:
    assert keyfile.link(text, "f") == ()


@pytest.mark.parametrize(
    ("text", "mac"),
    [
        ("00-50-56-AA-BB-01", A),
        ("0050.56aa.bb01", A),
        (f" {A}\n", A),
        ("00:50:56:aa:bb", None),
        ("permanent", None),
        ("", None),
    ],
)
def test_mac_addresses_are_read_in_every_notation(text: str, mac: str | None) -> None:
    assert mac_address(text) == mac


@pytest.mark.parametrize("word", ["", "lo", "br-lan", "docker0", "../x", "a/b", "ens192\n", "x" * 16, "wlan0", "-x"])
def test_words_that_name_no_card(word: str) -> None:
    assert card(word) == ""


# Hostile guests

PATHS = [
    *(INTERFACES, "/etc/netplan/a.yaml", "/etc/systemd/network/a.network", "/etc/systemd/network/a.link", udev.RULES),
    "/etc/systemd/network/a.netdev",
    *("/etc/NetworkManager/system-connections/a", "/etc/sysconfig/network-scripts/ifcfg-a", "/var/lib/dhcp/a.leases"),
    *("/etc/sysconfig/network/ifcfg-a", "/etc/default/grub", "/etc/dracut.conf", "/boot/grub2/grubenv"),
    *("/etc/dhcpcd.conf", "/etc/wicked/ifconfig/a.xml", "/etc/initramfs-tools/conf.d/a"),
    *("/etc/netctl/a", "/etc/conf.d/net"),
]


@given(st.dictionaries(st.sampled_from(PATHS), st.binary(max_size=300).map(decode)))
def test_no_file_makes_the_plan_raise(files: dict[str, str]) -> None:
    planned = plan(Guest({**files, **SETUP_LINK}), Nic(A))
    assert all(finding.message.isprintable() for finding in planned.warnings)


@pytest.mark.parametrize(
    "piece",
    [
        *("A", " ", "\n", "\t\n", "lease {\n", "\\\n", "[", '"', "iface ", "=", "A{", "*", "x=a "),
        *("ip=:", "<interface><name", "<!--", "[Match]\nPath=p\n", "bond=a:x,", "interface "),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_no_file_takes_long_to_read(path: str, piece: str) -> None:
    guest = Guest({path: piece * ((1 << 19) // len(piece)), **SETUP_LINK})
    with work_of_at_most(5):
        assert len(plan(guest, Nic(A)).edits) <= 1
