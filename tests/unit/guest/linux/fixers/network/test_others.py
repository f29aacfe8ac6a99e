"""Cards that kernel command lines, dracut, initramfs-tools, dhcpcd, wicked and other systems' scripts speak of."""

from __future__ import annotations

import pytest

from hyper2kvmd.guest.linux.fixers.network import cmdline, dhcpcd, wicked
from hyper2kvmd.guest.linux.fixers.network.interface import Interface
from hyper2kvmd.guest.options import Nic
from tests.unit.guest.linux.fixers.network.test_network import LINK, SETUP_LINK, A, B, C, Guest, codes, plan

DRACUT = "/etc/dracut.conf.d/network.conf"
STATIC = "ip=10.0.0.2::10.0.0.1:255.255.255.0:db01:ens192:none"


@pytest.mark.parametrize(
    "files",
    [
        {DRACUT: f'kernel_cmdline="{STATIC} nameserver=10.0.0.53"\n'},
        {"/etc/cmdline.d/net.conf": STATIC + "\n"},
        {"/boot/loader/entries/a.conf": f"title A\noptions root=/dev/vg/root ro {STATIC}\n"},
        {"/boot/grub2/grubenv": f"# GRUB Environment Block\nkernelopts=root=/dev/vg/root ro {STATIC} \n###"},
        {"/boot/grub/grub.cfg": "linux /vmlinuz root=/dev/sda1 vlan=lan:ens192 ip=lan:dhcp\n"},
        {"/etc/default/grub": 'GRUB_CMDLINE_LINUX="bond=bond0:ens192:mode=active-backup ip=bond0:dhcp"\n'},
        {"/etc/initramfs-tools/initramfs.conf": "MODULES=most\nDEVICE=ens192\n"},
        {"/etc/initramfs-tools/conf.d/dropbear": 'IP="10.0.0.2::10.0.0.1:255.255.255.0::ens192:off"\n'},
        {"/etc/dhcpcd.conf": "hostname\ninterface ens192\nstatic ip_address=10.0.0.2/24\n"},
        {"/etc/wicked/ifconfig/lan.xml": "<interface><name>ens192</name><ipv4:static/></interface>\n"},
        {"/etc/netctl/lan": "Interface=ens192\nConnection=ethernet\nIP=static\nAddress=('10.0.0.2/24')\n"},
        {"/etc/netctl/v5": "Interface=lan5\nConnection=vlan\nBindsToInterfaces=(ens192)\nVLANID=5\nIP=dhcp\n"},
        {"/etc/conf.d/net": '# config_eth9="dhcp"\nconfig_ens192="10.0.0.2/24"\nroutes_ens192="via 10.0.0.1"\n'},
        {"/etc/conf.d/net": 'slaves_bond0="ens192"\nconfig_bond0="dhcp"\n'},
        {"/etc/rc.d/rc.inet1.conf": 'IFNAME[0]="ens192"\nIPADDR[0]="10.0.0.2"\n'},
    ],
)
def test_a_card_that_is_named_there_alone_keeps_its_name(files: dict[str, str]) -> None:
    guest = Guest({**files, **SETUP_LINK})
    planned = plan(guest, Nic(A))
    assert ([edit.path for edit in planned.edits], planned.warnings) == ([LINK], ())
    unknown = plan(guest, Nic(A), Nic(B))
    assert (unknown.edits, codes(unknown)) == ((), ["network_unbound"])
    assert next(iter(files)) in unknown.warnings[0].message


def test_the_card_that_the_initramfs_names_may_have_a_profile_by_its_address() -> None:
    profile = {
        "/etc/NetworkManager/system-connections/a": f"[connection]\ntype=ethernet\n[ethernet]\nmac-address={A}\n"
    }
    line = {DRACUT: f'kernel_cmdline="{STATIC}"\n'}
    planned = plan(Guest({**profile, **line, **SETUP_LINK}), Nic(A))
    assert ([edit.path for edit in planned.edits], planned.warnings) == ([LINK], ())
    # A file of the system's that is for a card by name is for another card.
    named = {"/etc/network/interfaces": "iface ens192 inet dhcp\n"}
    assert codes(plan(Guest({**profile, **named, **SETUP_LINK}), Nic(A))) == ["network_unbound"]


@pytest.mark.parametrize(
    "leftover",
    [
        {DRACUT: 'kernel_cmdline="ip=eth0:dhcp"\n'},
        {DRACUT: f'kernel_cmdline="ifname=boot0:{C} ip=boot0:dhcp"\n'},
        {"/etc/dhcpcd.conf": "interface eth0\nstatic ip_address=192.0.2.2/24\n"},
        {"/etc/conf.d/net": 'config_eth0="dhcp"\n'},
        {"/etc/NetworkManager/system-connections/a": "[connection]\ntype=ethernet\n[match]\ninterface-name=!ens256;\n"},
    ],
)
def test_a_name_that_is_said_in_passing_takes_no_card_from_one_that_is_configured(leftover: dict[str, str]) -> None:
    configured = {"/etc/network/interfaces": "iface ens192 inet dhcp\n"}
    planned = plan(Guest({**configured, **leftover, **SETUP_LINK}), Nic(A))
    assert [edit.path for edit in planned.edits] == [LINK]
    assert len(planned.warnings) == 1
    assert next(iter(leftover)) in planned.warnings[0].message


def test_names_of_both_sorts_are_put_in_order_together() -> None:
    files = {"/etc/network/interfaces": "iface ens192 inet dhcp\n", DRACUT: 'kernel_cmdline="ip=ens224:dhcp"\n'}
    planned = plan(Guest({**files, **SETUP_LINK}), Nic(A), Nic(B))
    assert {edit.summary for edit in planned.edits} == {f"ens192 is the card {A}", f"ens224 is the card {B}"}
    assert codes(planned) == ["network_inferred"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("ip=dhcp ip=on rd.neednet=1 nfsroot=10.0.0.1:/x", []),
        ("ip=ens192:dhcp", ["ens192"]),
        ("ip=ens192:dhcp:9000:00:50:56:aa:bb:01", ["ens192"]),
        ("ip=:::::eth0:dhcp", ["eth0"]),
        ("ip=10.0.0.2::10.0.0.1:255.255.255.0:db01:ens192:none:1500", ["ens192"]),
        ("ip=[2001:db8::2]::[2001:db8::1]:64:db01:ens192:none", ["ens192"]),
        ("ip=10.0.0.2::10.0.0.1:255.255.255.0:db01::none", []),
        ("ip=ens192.100:dhcp vlan=ens192.100:ens192", ["ens192"]),
        ("rd.route=192.0.2.0/24:10.0.0.1:ens224", ["ens224"]),
        ("rd.route=[2001:db8:f::]/48:[2001:db8::1]:ens224", ["ens224"]),
        ("bond=bond0:ens192,ens224:mode=802.3ad bridge=br0:bond0", ["ens192", "ens224"]),
        ("team=team0:ens192,ens224", ["ens192", "ens224"]),
        ("bridge=br0:ens192", ["ens192"]),
        ("bootdev=ens192 BOOTIF=01-00-50-56-aa-bb-01", ["ens192"]),
        ("vip=ens192:dhcp x.ip=ens192:dhcp", []),
        ("# ip=ens192:dhcp", []),
    ],
)
def test_options_of_the_kernel_line_name_cards(options: str, expected: list[str]) -> None:
    assert [one.name for one in cmdline.interfaces(f"{options}\n", "f")] == expected


def test_a_name_that_the_kernel_line_gives_to_an_address_is_that_cards() -> None:
    files = {"/etc/default/grub": f'GRUB_CMDLINE_LINUX="ifname=lan0:{A} ip=lan0:dhcp"\n', **SETUP_LINK}
    planned = plan(Guest(files), Nic(B), Nic(A))
    assert [edit.summary for edit in planned.edits] == [f"lan0 is the card {A}"]


def test_dhcpcds_lists_of_cards_are_read() -> None:
    text = "# interface eth9\nallowinterfaces ens192,ens2*\ndenyinterfaces veth* ens256\ninterface eth0\nstatic x=y\n"
    assert dhcpcd.interfaces(text, "f") == (
        Interface("f", "ens192", passing=True),
        Interface("f", "ens2*", passing=True),
        Interface("f", "veth*", excluded=True, passing=True),
        Interface("f", "ens256", excluded=True, passing=True),
        Interface("f", "eth0", passing=True),
    )


def test_wickeds_files_name_cards_or_their_addresses() -> None:
    text = f"""<interfaces>
      <!-- <interface><name>eth9</name></interface> -->
      <interface origin="x"><name>eth0</name><ipv4:dhcp><enabled>true</enabled></ipv4:dhcp></interface>
      <interface><name namespace="ethernet"><permanent-address>{A.upper()}</permanent-address></name></interface>
      <interface><name>br0</name></interface><interface></interface>
    </interfaces>"""
    assert wicked.interfaces(text, "f") == (Interface("f", "eth0"), Interface("f", "", A))


@pytest.mark.parametrize(("globs", "said"), [("veth*", []), ("en*", []), ("ens1*", ["network_glob"])])
def test_an_exception_that_holds_no_more_is_reported(globs: str, said: list[str]) -> None:
    planned = plan(Guest({"/etc/dhcpcd.conf": f"denyinterfaces {globs}\n", **SETUP_LINK}), Nic(A))
    assert (planned.edits, codes(planned)) == ((), said)
