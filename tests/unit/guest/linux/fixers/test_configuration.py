"""What the manifest's `configuration` becomes in the guest: texts of files, commands, and what is only said."""

from __future__ import annotations

import fnmatch
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.devices import Device, Names
from hyper2kvmd.guest.linux.fixers import FixPlan, View, addresses, configuration
from hyper2kvmd.guest.linux.selinux import policy_of, relabel, topmost
from hyper2kvmd.manifest.model import Configuration, Interface, Services, User
from tests.pace import work_of_at_most


class Guest:
    """A guest's files as libguestfs shows them: text, or the target of a link; directories exist by what is in them.

    `says`: what commands that hold a word print. `labelled`: the files and directories with an SELinux label.
    """

    def __init__(self, files: Mapping[str, str], *, links: Mapping[str, str] | None = None,
                 says: Mapping[str, str] | None = None, labelled: frozenset[str] = frozenset()) -> None:  # fmt: skip
        self.files, self.links, self.says = dict(files), dict(links or {}), dict(says or {})
        self.labelled = labelled
        self.ran: list[str] = []

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        return path in self.files

    def is_dir(self, path: str, followsymlinks: bool = False) -> bool:
        return any(other.startswith(f"{path.rstrip('/')}/") for other in (*self.files, *self.links))

    def is_symlink(self, path: str) -> bool:
        return path in self.links

    def exists(self, path: str) -> bool:
        return self.is_file(path) or self.is_dir(path)

    def readlink(self, path: str) -> str:
        return self.links[path]

    def filesize(self, path: str) -> int:
        return len(self.files[path])

    def pread(self, path: str, count: int, offset: int) -> bytes:
        return self.files[path].encode("utf-8", "surrogateescape")[offset : offset + count]

    def glob_expand(self, pattern: str) -> list[str]:
        depth = pattern.count("/")
        paths = [path for path in (*self.files, *self.links) if path.count("/") == depth]
        return fnmatch.filter(paths, pattern)

    def sh(self, command: str) -> str:
        self.ran.append(command)
        answers = [answer for word, answer in self.says.items() if word in command]
        if answers == ["fail"]:
            raise RuntimeError("sh: it failed")
        return answers[0] if answers else ""

    def sh_lines(self, command: str) -> list[str]:
        return self.sh(command).splitlines()

    def touch(self, path: str) -> None:
        self.files[path] = ""

    def lgetxattrs(self, path: str) -> list[dict[str, Any]]:
        return [{"attrname": "security.selinux", "attrval": b"x"}] if path in self.labelled else []


def view(guest: Guest, *, hostname: str = "shop", package_format: str = "deb", **mounts: str) -> View:
    inspection: Any = SimpleNamespace(
        hostname=hostname,
        package_format=package_format,
        mounts={"/": "/dev/sda2", "/boot/efi": "/dev/sda1"},
        filesystems=(Device("/dev/sda2", "ext4"), Device("/dev/sda1", "vfat")),
    )
    return View(guest, inspection, Names({}, {}))


def applied(guest: Guest, plan: FixPlan) -> Guest:
    """The guest after the edits of a plan."""
    files = dict(guest.files)
    for edit in plan.edits:
        assert files.get(edit.path) == edit.before, "two edits of one file do not know of each other"
        if edit.after is None:
            del files[edit.path]
        else:
            files[edit.path] = edit.after
    return Guest(files, links=guest.links, says=guest.says)


def planned(guest: Guest, wanted: Configuration) -> FixPlan:
    """The plan; once its edits are made there is nothing left to edit."""
    plan = configuration.plan(view(guest), wanted)
    assert () == configuration.plan(view(applied(guest, plan)), wanted).edits
    return plan


def only(edits: tuple[Edit, ...], path: str) -> Edit:
    (found,) = [edit for edit in edits if edit.path == path]
    return found


# The name -------------------------------------------------------------------------------------------------

HOSTS = """\
127.0.0.1\tlocalhost
127.0.1.1\tshop.example.com shop  # shop is here
192.0.2.10  shop.example.com\tshop
192.0.2.11  shop.other.example  other
192.0.2.12  workshop
::1 localhost ip6-localhost\r
"""


def test_a_host_is_renamed_where_it_is_meant_and_nowhere_else() -> None:
    expected = HOSTS.replace("shop.example.com shop ", "web.example.com web ").replace(
        "shop.example.com\tshop", "web.example.com\tweb"
    )
    assert expected == configuration.rename_host(HOSTS, "shop", "web").replace("127.0.1.1\tweb\n", "")
    assert expected.replace("web.example.com", "web.new.example") == configuration.rename_host(
        HOSTS, "shop", "web.new.example"
    )


def test_a_host_without_an_entry_of_its_own_gets_one() -> None:
    assert "127.0.0.1 localhost\n127.0.1.1\tweb.x web\n::1 localhost\n" == configuration.rename_host(
        "127.0.0.1 localhost\n::1 localhost\n", "localhost", "web.x"
    )
    assert "127.0.1.1\tweb\n" == configuration.rename_host("", "unknown", "web")


@given(st.text(alphabet="shopweb.127 \t\r\n#", max_size=80))
def test_renaming_a_host_twice_is_renaming_it_once(text: str) -> None:
    once = configuration.rename_host(text, "shop", "web.x")
    assert once == configuration.rename_host(once, "web", "web.x")


def test_hosts_that_are_there_are_not_added_again() -> None:
    hosts = {"192.0.2.7": ("db", "db.example.com"), "2001:db8::7": ("db",)}
    text = "192.0.2.7 db # the database"
    new = configuration.add_hosts(text, hosts)
    assert "192.0.2.7 db # the database\n192.0.2.7\tdb.example.com\n2001:db8::7\tdb\n" == new
    assert new == configuration.add_hosts(new, hosts)


def test_the_host_name_is_written_where_each_system_keeps_it() -> None:
    guest = Guest({"/etc/hostname": "shop", "/etc/sysconfig/network": "NETWORKING=yes\nHOSTNAME=shop.x\n"})
    plan = planned(guest, Configuration(hostname="web", domain="example.com"))
    assert {
        "/etc/hostname": "web\n",
        "/etc/sysconfig/network": "NETWORKING=yes\nHOSTNAME=web\n",
        "/etc/hosts": "127.0.1.1\tweb.example.com web\n",
    } == {edit.path: edit.after for edit in plan.edits}


# Users ----------------------------------------------------------------------------------------------------

HASH = "$6$salt$aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBGj ann's key"
PASSWD = "root:x:0:0:root:/root:/bin/bash\nann:x:1000:1000:Ann,,,:/home/ann:/bin/sh\nbroken\n"
SHADOW = f"root:*:19000:0:99999:7:::\nann:{HASH}:19000:0:99999:7:::\n"
GROUP = "root:x:0:\nsudo:x:27:\nadm:x:4:bob,ann\nann:x:1000:\n"
ACCOUNTS = {"/etc/passwd": PASSWD, "/etc/shadow": SHADOW, "/etc/group": GROUP, "/home/ann/.profile": ""}


def commands(plan: FixPlan) -> list[str]:
    return [command.command for command in plan.commands]


def test_a_user_is_made_with_all_that_is_asked_for() -> None:
    guest = Guest(ACCOUNTS | {"/etc/sudoers.d/README": ""})
    user = User(name="eve", uid=2000, groups=("adm", "docker"), comment="Eve $(id)", shell="/bin/zsh",
                ssh_keys=(KEY,), password_hash=SecretStr(HASH), sudo="NOPASSWD: ALL")  # fmt: skip
    plan = planned(guest, Configuration(users=(user,)))
    made, keys = plan.commands
    assert (
        "groupadd --force docker && useradd --create-home --home-dir /home/eve --shell /bin/zsh --uid 2000 "
        f"--comment 'Eve $(id)' --groups adm,docker --password '{HASH}' eve"
    ) == made.command
    assert "/home/eve" == made.path
    assert "/home/eve/.ssh" == keys.path
    rule = only(plan.edits, "/etc/sudoers.d/hyper2kvm-eve")
    assert (0o440, "eve ALL=(ALL) NOPASSWD: ALL\n") == (rule.mode, rule.after)
    assert () == plan.warnings


def test_no_hash_of_a_password_is_shown() -> None:
    users = (User(name="eve", password_hash=SecretStr(HASH)), User(name="root", password_hash=SecretStr(HASH)))
    wanted = Configuration(users=users)
    plan = planned(Guest(ACCOUNTS), wanted)
    assert 2 == sum(HASH in command for command in commands(plan))
    assert HASH not in str([command.done("").as_json() for command in plan.commands])
    assert HASH not in repr(wanted)
    assert HASH not in wanted.model_dump_json()


def test_a_user_who_is_there_is_changed_only_where_something_differs() -> None:
    same = User(name="ann", comment="Ann,,,", shell="/bin/sh", groups=("adm", "ann"), password_hash=SecretStr(HASH))
    assert FixPlan() == planned(Guest(ACCOUNTS), Configuration(users=(same,)))
    other = User(name="ann", comment="Ann", groups=("adm", "sudo"), lock=True)
    assert [f"groupadd --force sudo && usermod --comment Ann --append --groups sudo --password '!{HASH}' ann"] == (
        commands(planned(Guest(ACCOUNTS), Configuration(users=(other,))))
    )


def test_numbers_and_homes_of_users_who_are_there_stay() -> None:
    user = User(name="ann", uid=1001, home="/srv/ann")
    plan = planned(Guest(ACCOUNTS), Configuration(users=(user,)))
    assert [] == commands(plan)
    assert ["the number 1000, the manifest asks for 1001", "the home /home/ann, the manifest asks for /srv/ann"] == [
        warning.message.partition("keeps ")[2] for warning in plan.warnings
    ]


def test_a_number_that_is_taken_is_not_given_twice() -> None:
    plan = planned(Guest(ACCOUNTS), Configuration(users=(User(name="eve", uid=1000),)))
    assert "--uid" not in commands(plan)[0]
    assert ["the number 1000 is that of ann, so eve gets another one"] == [item.message for item in plan.warnings]


def test_a_group_of_the_same_name_is_the_new_users_own() -> None:
    plan = planned(Guest(ACCOUNTS), Configuration(users=(User(name="adm"),)))
    assert "--gid adm" in commands(plan)[0]


def test_keys_are_added_below_those_that_are_there(tmp_path: Path) -> None:
    home = str(tmp_path)
    old = "ssh-rsa AAAAB3NzaC1yc2E old"
    guest = Guest({f"{home}/.ssh/authorized_keys": f"# mine\n{old}"})
    guest.files |= {"/etc/passwd": f"ann:x:1000:1000::{home}:/bin/sh\n"}
    (command,) = planned(guest, Configuration(users=(User(name="ann", ssh_keys=(old, KEY)),))).commands
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/authorized_keys").write_text(f"# mine\n{old}")
    subprocess.run(["sh", "-c", f"chown() {{ :; }}; {command.command}"], check=True)
    assert f"# mine\n{old}\n{KEY}\n" == (tmp_path / ".ssh/authorized_keys").read_text()
    guest.files[f"{home}/.ssh/authorized_keys"] = f"# mine\n{old}\n{KEY}\n"
    assert FixPlan() == planned(guest, Configuration(users=(User(name="ann", ssh_keys=(old, KEY)),)))


def test_new_keys_are_for_their_user_alone(tmp_path: Path) -> None:
    guest = Guest({"/etc/passwd": f"ann:x:1000:1000::{tmp_path}:/bin/sh\n", f"{tmp_path}/.profile": ""})
    (command,) = planned(guest, Configuration(users=(User(name="ann", ssh_keys=(KEY,)),))).commands
    subprocess.run(["sh", "-c", f'chown() {{ echo "$@"; }}; {command.command}'], check=True)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in (".ssh", ".ssh/authorized_keys")]
    assert [0o700, 0o600] == modes
    assert command.command.endswith(f"chown ann: {tmp_path}/.ssh {tmp_path}/.ssh/authorized_keys")


@pytest.mark.parametrize("link", ["/home/ann", "/home/ann/.ssh", "/home/ann/.ssh/authorized_keys"])
def test_no_link_of_a_users_is_followed(link: str) -> None:
    guest = Guest(ACCOUNTS, links={link: "/etc"})
    plan = planned(guest, Configuration(users=(User(name="ann", ssh_keys=(KEY,)),)))
    assert [] == commands(plan)
    assert [f"the keys of ann are not written: {link} is a symbolic link"] == [item.message for item in plan.warnings]


@pytest.mark.parametrize("home", ["", "home", "/nowhere", "/h\udcff", "/h\x1b[0m"])
def test_a_home_that_is_not_there_gets_no_keys(home: str) -> None:
    guest = Guest({"/etc/passwd": f"ann:x:1000:1000::{home}:/bin/sh\n"})
    plan = planned(guest, Configuration(users=(User(name="ann", ssh_keys=(KEY,)),)))
    assert [] == commands(plan)
    assert ["ssh_keys"] == [warning.code for warning in plan.warnings]
    assert plan.warnings[0].message.isprintable()


def test_a_disabled_user_has_neither_password_nor_account() -> None:
    plan = planned(Guest(ACCOUNTS), Configuration(disable_users=("ann", "eve")))
    assert ["usermod --lock --expiredate 1 ann"] == commands(plan)
    assert ["eve is to be disabled, and the guest has no such user"] == [item.message for item in plan.warnings]
    disabled = ACCOUNTS | {"/etc/shadow": f"ann:!{HASH}:19000:0:99999:7::1:\n"}
    assert FixPlan() == planned(Guest(disabled), Configuration(disable_users=("ann",)))


def test_sudo_that_is_not_installed_is_said() -> None:
    plan = planned(Guest(ACCOUNTS), Configuration(users=(User(name="ann", sudo="ALL"),)))
    assert ["sudo_missing"] == [warning.code for warning in plan.warnings]
    assert () == plan.edits


@given(st.text(alphabet="an:x01\n\r/*!", max_size=60), st.text(alphabet="an:x01,\n\r", max_size=60))
def test_broken_account_files_never_raise(passwd: str, group: str) -> None:
    for account in configuration.read_accounts(passwd, passwd, group).users.values():
        assert account.name


# Services -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "state", "command"),
    [
        ("enable", "disabled", "systemctl enable x.service"),
        ("enable", "masked", "systemctl unmask x.service && systemctl enable x.service"),
        ("enable", "enabled", None),
        ("disable", "enabled", "systemctl disable x.service"),
        ("disable", "masked", None),
        ("disable", "static", None),
        ("mask", "static", "systemctl mask x.service"),
        ("mask", "masked", None),
    ],
)
def test_a_unit_is_changed_only_if_its_state_differs(verb: str, state: str, command: str | None) -> None:
    change = configuration.change_unit(verb, "x.service", state)
    assert not isinstance(change, Finding)
    assert command == (change and change.command.removeprefix("export SYSTEMD_OFFLINE=1; "))


@pytest.mark.parametrize(("verb", "state"), [("enable", ""), ("mask", "not-found"), ("enable", "static")])
def test_a_unit_that_cannot_be_changed_is_said(verb: str, state: str) -> None:
    change = configuration.change_unit(verb, "x.service", state)
    assert isinstance(change, Finding)
    assert "x.service" in change.message


def test_each_unit_is_asked_for_by_itself() -> None:
    guest = Guest({"/usr/bin/systemctl": "", "/etc/systemd/system/own.service": ""},
                  says={"chrony": "disabled\n", "cups": "redirecting\nenabled\n", "own": "enabled"})  # fmt: skip
    wanted = Services(enable=("chrony.service",), disable=("cups.service",), mask=("own.service", "none.service"))
    plan = planned(guest, Configuration(services=wanted))
    assert ["enable chrony.service", "disable cups.service"] == [command.summary for command in plan.commands]
    assert ["service_kept", "service_unknown"] == [warning.code for warning in plan.warnings]


def test_services_of_a_guest_without_systemd_are_left_alone() -> None:
    plan = planned(Guest({}), Configuration(services=Services(enable=("x.service",))))
    assert ["services_unsupported"] == [warning.code for warning in plan.warnings]


# Addresses ------------------------------------------------------------------------------------------------

STATIC = Interface(
    name="ens192",
    addresses=("192.0.2.10/24", "192.0.2.11/24", "2001:db8::10/64"),
    gateway4="192.0.2.1",
    gateway6="2001:db8::1",
    dns=("192.0.2.53", "2001:db8::53"),
    search=("example.com",),
)
DHCP = Interface(name="ens224", dhcp=True)
BOTH = Configuration(interfaces=(STATIC, DHCP))


def test_netplan_gets_one_file_in_place_of_those_that_it_would_be_added_to() -> None:
    old = 'network:\n  ethernets:\n    ens192:\n      match: {macaddress: "00:50:56:AA:bb:01"}\n      dhcp4: true\n'
    guest = Guest({"/etc/netplan/50-cloud-init.yaml": old, "/etc/netplan/01.yaml": "network: {version: 2}\n"})
    plan = planned(guest, BOTH)
    assert None is only(plan.edits, "/etc/netplan/50-cloud-init.yaml").after
    assert {"/etc/netplan/50-cloud-init.yaml", addresses.NETPLAN} == {edit.path for edit in plan.edits}
    written = only(plan.edits, addresses.NETPLAN)
    assert 0o600 == written.mode
    assert {
        "version": 2,
        "ethernets": {
            "ens192": {
                "match": {"macaddress": "00:50:56:aa:bb:01"},
                "set-name": "ens192",
                "dhcp4": False,
                "addresses": ["192.0.2.10/24", "192.0.2.11/24", "2001:db8::10/64"],
                "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}, {"to": "::/0", "via": "2001:db8::1"}],
                "nameservers": {"addresses": ["192.0.2.53", "2001:db8::53"], "search": ["example.com"]},
            },
            "ens224": {"dhcp4": True},
        },
    } == yaml.safe_load(written.after or "")["network"]


@pytest.mark.parametrize(
    "text",
    [
        "network: {ethernets: {ens192: {dhcp4: true}, ens999: {dhcp4: true}}}",
        "network: {ethernets: {ens192: {dhcp4: true}}, bridges: {br0: {interfaces: [ens192]}}}",
        "network: {ethernets: {all: {match: {name: 'en*'}, dhcp4: true}}}",
        "network: {ethernets: [",
        "[" * 5000,
        "&a [*a]",
        "network: \udcff",
    ],
)
def test_a_netplan_file_that_others_need_is_not_touched(text: str) -> None:
    plan = planned(Guest({"/etc/netplan/00.yaml": text}), BOTH)
    assert () == plan.edits
    assert ["network_shared"] == [warning.code for warning in plan.warnings]
    assert "/etc/netplan/00.yaml" in plan.warnings[0].message


@given(st.text(alphabet="network:ens192 !&*a{}[]\n-'\"|", max_size=80))
def test_a_broken_netplan_file_never_raises(text: str) -> None:
    for body in (text, f"network: {{ethernets: {{ens192: {text}}}}}", "network: !!bool x", "network: {a: !!int ''}"):
        assert isinstance(addresses.defined_by_netplan(body), dict | None)


@pytest.mark.parametrize("text", ["[" * 200_000, "{" * 200_000, "- " * 200_000])
def test_a_netplan_file_made_to_keep_us_busy_does_not(text: str) -> None:
    with work_of_at_most(5):
        assert addresses.defined_by_netplan(text) is None


def test_cloud_init_does_not_write_over_the_addresses() -> None:
    guest = Guest({"/etc/netplan/00.yaml": "", "/etc/cloud/cloud.cfg": ""})
    assert "network: {config: disabled}\n" == only(planned(guest, BOTH).edits, addresses.CLOUD_INIT).after


INTERFACES = """\
# The loopback
auto lo
iface lo inet loopback

allow-hotplug ens192
iface ens192 inet static
\taddress 10.0.0.5/24
\t# the old gateway
\tgateway 10.0.0.1

# The second
auto ens256
iface ens256 inet dhcp
iface ens192 inet6 auto
source /etc/network/interfaces.d/*"""


def test_ifupdown_gets_its_stanzas_where_the_old_ones_stood() -> None:
    guest = Guest({"/etc/network/interfaces": INTERFACES, "/etc/resolv.conf": "search x\nnameserver 10.0.0.1\n"})
    plan = planned(guest, BOTH)
    assert (
        """\
# The loopback
auto lo
iface lo inet loopback

allow-hotplug ens192
iface ens192 inet static
    address 192.0.2.10/24
    gateway 192.0.2.1
    dns-nameservers 192.0.2.53 2001:db8::53
    dns-search example.com
iface ens192 inet static
    address 192.0.2.11/24
iface ens192 inet6 static
    address 2001:db8::10/64
    gateway 2001:db8::1

# The second
auto ens256
iface ens256 inet dhcp
source /etc/network/interfaces.d/*
auto ens224
iface ens224 inet dhcp
"""
        == only(plan.edits, "/etc/network/interfaces").after
    )
    assert "search x\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n" == only(plan.edits, "/etc/resolv.conf").after


def test_ifupdown_keeps_an_interface_in_the_file_that_has_it() -> None:
    main, own = "source /etc/network/interfaces.d/*\n", "auto ens224\niface ens224 inet manual\n"
    guest = Guest({"/etc/network/interfaces": main, "/etc/network/interfaces.d/b": own}, links={"/etc/resolv.conf": ""})
    plan = planned(guest, Configuration(interfaces=(DHCP,)))
    assert [("/etc/network/interfaces.d/b", "auto ens224\niface ens224 inet dhcp\n")] == [
        (edit.path, edit.after) for edit in plan.edits
    ]


@given(st.text(alphabet="ifaceuto ens192\n\t#\\", max_size=120))
def test_replacing_a_stanza_twice_is_replacing_it_once(text: str) -> None:
    new = addresses.stanza(STATIC, auto=False)
    once = addresses.replace_stanza(text, "ens192", new)
    assert once == addresses.replace_stanza(once, "ens192", new)


def test_an_ifcfg_file_keeps_what_is_not_about_addresses() -> None:
    old = '# by anaconda\nTYPE="Ethernet"\nBOOTPROTO="dhcp"\nONBOOT=yes\nHWADDR=00:50:56:aa:bb:01\nDNS1=10.0.0.1\n'
    guest = Guest({"/etc/sysconfig/network-scripts/ifcfg-ens192": old})
    plan = planned(guest, Configuration(interfaces=(STATIC,)))
    assert (
        """\
# by anaconda
TYPE="Ethernet"
BOOTPROTO="none"
ONBOOT=yes
HWADDR=00:50:56:aa:bb:01
DNS1="192.0.2.53"
IPADDR="192.0.2.10"
PREFIX="24"
IPADDR1="192.0.2.11"
PREFIX1="24"
GATEWAY="192.0.2.1"
IPV6INIT="yes"
IPV6_AUTOCONF="no"
IPV6ADDR="2001:db8::10/64"
IPV6_DEFAULTGW="2001:db8::1"
DNS2="2001:db8::53"
DOMAIN="example.com"
"""
        == only(plan.edits, "/etc/sysconfig/network-scripts/ifcfg-ens192").after
    )


def test_suse_gets_address_route_and_name_servers_in_its_three_files() -> None:
    guest = Guest(
        {
            "/etc/sysconfig/network/ifcfg-ens192": "BOOTPROTO='dhcp'\nSTARTMODE='auto'\nZONE=public\n",
            "/etc/sysconfig/network/config": 'NETCONFIG_DNS_POLICY="auto"\nNETCONFIG_DNS_STATIC_SERVERS=""\n',
        }
    )
    edits = planned(guest, Configuration(interfaces=(STATIC,))).edits
    assert 'BOOTPROTO="static"\nSTARTMODE=\'auto\'\nZONE=public\nIPADDR="192.0.2.10/24"\n' == "".join(
        (only(edits, "/etc/sysconfig/network/ifcfg-ens192").after or "").splitlines(keepends=True)[:4]
    )
    assert "default 192.0.2.1 - ens192\ndefault 2001:db8::1 - ens192\n" == (
        only(edits, "/etc/sysconfig/network/ifroute-ens192").after
    )
    assert 'NETCONFIG_DNS_STATIC_SERVERS="192.0.2.53 2001:db8::53"\n' in (
        only(edits, "/etc/sysconfig/network/config").after or ""
    )


def test_networkmanager_gets_a_profile_that_only_root_can_read() -> None:
    guest = Guest({}, links={"/etc/systemd/system/multi-user.target.wants/NetworkManager.service": "/x"})
    static, dhcp = planned(guest, BOTH).edits
    assert ("/etc/NetworkManager/system-connections/hyper2kvm-ens192.nmconnection", 0o600) == (static.path, static.mode)
    assert (
        """\
[connection]
id=hyper2kvm-ens192
type=ethernet
interface-name=ens192
autoconnect-priority=999

[ipv4]
method=manual
address1=192.0.2.10/24
address2=192.0.2.11/24
gateway=192.0.2.1
dns=192.0.2.53;
dns-search=example.com;

[ipv6]
method=manual
address1=2001:db8::10/64
gateway=2001:db8::1
dns=2001:db8::53;
dns-search=example.com;
"""
        == static.after
    )
    assert "[ipv4]\nmethod=auto\n" in (dhcp.after or "")


def test_networkd_gets_a_file_that_goes_before_the_others() -> None:
    guest = Guest({}, links={"/etc/systemd/system/multi-user.target.wants/systemd-networkd.service": "/x"})
    (edit,) = planned(guest, Configuration(interfaces=(STATIC,))).edits
    assert "/etc/systemd/network/05-hyper2kvm-ens192.network" == edit.path
    assert "[Match]\nName=ens192\n\n[Network]\nDHCP=no\nAddress=192.0.2.10/24\n" in (edit.after or "")


def test_a_network_that_nobody_knows_is_said() -> None:
    plan = planned(Guest({}), BOTH)
    assert ["network_unknown"] * 2 == [warning.code for warning in plan.warnings]
    assert "ens192" in plan.warnings[0].message


# SELinux --------------------------------------------------------------------------------------------------


def test_a_name_that_only_windows_has_is_for_no_file() -> None:
    good, windows = Interface(name="ens192", dhcp=True), Interface(name="Ethernet 2", dhcp=True)
    kept, (warning,) = addresses.named((good, windows))
    assert (good,) == kept
    assert ("network_unknown", True) == (warning.code, "'Ethernet 2'" in warning.message)


SELINUX = {
    "/etc/selinux/config": "# the mode\nSELINUX=enforcing\nSELINUXTYPE=targeted\n",
    "/etc/selinux/targeted/contexts/files/file_contexts": "",
    "/usr/sbin/setfiles": "",
}
DIRECTORIES = frozenset({"/", "/etc", "/home", "/boot"})


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("SELINUX=enforcing\nSELINUXTYPE=mls\n", "mls"),
        ("SELINUX=Permissive\n", "targeted"),
        ("SELINUX=disabled\nSELINUXTYPE=targeted\n", None),
        ("#SELINUX=enforcing\n", None),
        ("SELINUX=enforcing\nSELINUXTYPE=../../etc\n", "targeted"),
        ("", None),
    ],
)
def test_the_policy_is_read_from_the_configuration(text: str, policy: str | None) -> None:
    assert policy == policy_of(text)


def test_the_topmost_directory_without_a_label_is_found() -> None:
    assert "/a/b" == topmost("/a/b/c/d", lambda path: path in ("/", "/a"))
    assert "/a/b" == topmost("/a/b", lambda path: path in ("/", "/a"))
    assert "/" == topmost("/a/b", lambda path: False)


def test_only_files_without_a_label_get_one() -> None:
    files = SELINUX | {"/etc/new": "", "/etc/old": "", "/home/ann/.ssh/k": "", "/boot/efi/EFI/x": ""}
    guest = Guest(files, labelled=DIRECTORIES | {"/etc/old"})
    changes = relabel(view(guest), ["/etc/new", "/etc/old", "/home/ann/.ssh/k", "/boot/efi/EFI/x", "/etc/gone"])
    command = "/usr/sbin/setfiles -m /etc/selinux/targeted/contexts/files/file_contexts /etc/new /home/ann"
    assert [command] == [change.command for change in changes]
    assert [command] == guest.ran
    assert "/.autorelabel" not in guest.files


@pytest.mark.parametrize("broken", ["missing", "fails", "unlabelled"])
def test_what_cannot_be_labelled_now_is_labelled_at_the_next_boot(broken: str) -> None:
    files = {path: text for path, text in SELINUX.items() if broken != "missing" or "setfiles" not in path}
    labelled = DIRECTORIES if broken != "unlabelled" else frozenset[str]()
    guest = Guest(files | {"/etc/new": ""}, labelled=labelled, says={"setfiles": "fail"} if broken == "fails" else {})
    assert ["/.autorelabel"] == [change.path for change in relabel(view(guest), ["/etc/new"])]
    assert "/.autorelabel" in guest.files
    assert () == relabel(view(guest), ["/etc/new"])


def test_a_guest_without_selinux_is_left_alone() -> None:
    guest = Guest(SELINUX | {"/etc/selinux/config": "SELINUX=disabled\n", "/etc/new": ""})
    assert () == relabel(view(guest), ["/etc/new"])
    assert [] == guest.ran
