"""What the manifest asks for in a Windows: at its first boot, in its registry, or said not to be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.guest.change import FixResult
from hyper2kvmd.guest.windows.registry import dword, expand_sz
from hyper2kvmd.manifest import Configuration
from hyper2kvmd.manifest.model import Interface, Services, User
from tests.unit.guest.windows.test_fix import diffs, repair
from tests.windows import SYSTEM, guest, write_hive

SERVICES = "ControlSet001\\Services"


def asked(at: Path, name: str = "2022", **configuration: Any) -> tuple[FixResult, str]:
    """What is done to a guest of a family with two cards for this configuration; and its scripts for the first boot."""
    g = guest(at, name, static=True, two_sets=True, vmware=True)
    spooler = {"Type": dword(0x110), "Start": dword(2), "ImagePath": expand_sz("%SystemRoot%\\System32\\spoolsv.exe")}
    both = ("ControlSet001", "ControlSet002")
    write_hive(g.volume(list(g._partitions())[-1]) / SYSTEM, {f"{one}\\Services\\Spooler": spooler for one in both})
    result = repair(g, None, configuration=Configuration(**configuration))
    scripts = (diff for path, diff in diffs(result).items() if path.startswith("C:\\Windows\\hyper2kvm"))
    return result, "\n".join(line.removeprefix("+") for diff in scripts for line in diff.split("\n"))


def said(result: FixResult) -> list[str]:
    """What is not done."""
    return [warning.message for warning in result.warnings if warning.code == "not_done"]


def test_users_are_made_with_a_password_that_nobody_knows(tmp_path: Path) -> None:
    user = User(name="ann", groups=("administrators", "remote"), comment="Ann (admin)", lock=True)
    result, script = asked(tmp_path, users=(user,), disable_users=("guest",))
    lines = script.split("\n")
    made = lines.index("if errorlevel 1 net.exe user ann /add /random >nul")
    assert ("net.exe user ann >nul 2>&1", "if errorlevel 1 exit /b 1") == (lines[made - 1], lines[made + 1])
    assert 'net.exe user ann /comment:"Ann (admin)"' in lines
    for group in user.groups:
        added = lines.index(f'if errorlevel 1 net.exe localgroup "{group}" ann /add')
        assert f'net.exe localgroup "{group}" | findstr.exe /i /x "ann" >nul' == lines[added - 1]
        assert "if errorlevel 1 set BAD=1" == lines[added + 1]
    assert "net.exe user ann /active:no" in lines and "net.exe user guest /active:no" in lines
    assert [] == said(result)


def test_what_windows_cannot_have_of_a_user_is_said_and_no_secret_is_written(tmp_path: Path) -> None:
    user = User(name="ann", uid=1001, shell="/bin/sh", home="/home/ann", ssh_keys=("ssh-ed25519 AAAA",),
                password_hash="$6$salt$secretsecret", sudo="ALL", comment='say "hi"')  # fmt: skip
    result, script = asked(tmp_path, users=(user, User(name="a-name-of-twenty-one")), disable_users=("b" * 21,))
    keys = ("uid", "shell", "home", "ssh_keys", "password_hash", "sudo", "comment")
    expected = [f"the manifest asks for {key} of ann, which is not done in Windows: " for key in keys]
    found = said(result)
    assert len(found) == len(keys) + 1, found
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=False)), found
    assert "secret" not in script and "hi" not in script
    assert "a-name-of-twenty-one /add" in script and "b" * 21 not in script


@pytest.mark.parametrize("name", ["2022", "7"])
def test_the_addresses_of_a_connection_are_those_of_the_manifest(name: str, tmp_path: Path) -> None:
    first = Interface(name="ethernet0", addresses=("203.0.113.9/28", "2001:db8::9/64"), gateway4="203.0.113.1",
                      gateway6="fe80::1", dns=("203.0.113.53", "2001:db8::53"))  # fmt: skip
    second = Interface(name="Backup LAN", dhcp=True, search=("example.com",))
    result, script = asked(tmp_path, name, interfaces=(first, second))
    if name == "7":
        for line in (
            'ipv4 set address name="%NAME%" source=static address=203.0.113.9 mask=255.255.255.240 gateway=203.0.113.1',
            'ipv6 add address interface="%NAME%" address=2001:db8::9/64',
            'ipv6 add route prefix=::/0 interface="%NAME%" nexthop=fe80::1',
            'ipv4 set dnsservers name="%NAME%" source=static address=203.0.113.53 validate=no',
            'ipv6 set dnsservers name="%NAME%" source=static address=2001:db8::53 validate=no',
        ):
            assert f"netsh.exe interface {line}\nif errorlevel 1 set BAD=1" in script
        assert 'netsh.exe interface ipv4 set address name="%NAME%" source=dhcp' in script.split("\n")
    else:
        ips = "@{ Ip = '203.0.113.9'; Prefix = 28 }, @{ Ip = '2001:db8::9'; Prefix = 64 }"
        rest = "Gateways = @('203.0.113.1', 'fe80::1'); Dns = @('203.0.113.53', '2001:db8::53') }"
        assert f"  @{{ Mac = '00-50-56-AA-00-01'; Dhcp = $false; Addresses = @({ips}); {rest}," in script
        assert "  @{ Mac = '00-50-56-AA-00-02'; Dhcp = $true; Addresses = @(); Gateways = @(); Dns = @() }" in script
    assert "192.0.2.1" not in script and "198.51.100.7" not in script
    assert ["the manifest asks for search of Backup LAN, which is not done in Windows"] == said(result)


def test_a_connection_that_is_not_there_is_said_with_those_that_are(tmp_path: Path) -> None:
    result, script = asked(tmp_path, interfaces=(Interface(name="ens192", dhcp=True),))
    message = "the manifest asks for the interface ens192, which is not done in Windows: its connections are"
    assert [f"{message} 'Ethernet0', 'Backup LAN'"] == said(result)
    assert "192.0.2.10" in script  # it keeps its own


def test_addresses_of_ipv6_are_kept_and_its_routes_are_said_to_be_lost(tmp_path: Path) -> None:
    result = repair(guest(tmp_path, "2022", static=True, ipv6=True), None)
    script = diffs(result)["C:\\Windows\\hyper2kvm\\network.ps1"]
    assert "@{ Ip = '2001:db8::10'; Prefix = 64 }" in script and "'2001:db8::53'" in script
    (warning,) = [one for one in result.warnings if one.code == "addresses_lost"]
    assert "the routes of IPv6 that somebody gave 'Ethernet0' are not kept" in warning.message


def test_services_start_or_not_in_every_control_set(tmp_path: Path) -> None:
    wanted = Services(enable=("termservice.service",), disable=("spooler.service",))
    result, _ = asked(tmp_path, services=wanted)
    for number in (1, 2):
        assert "Start: 2 → 4" == diffs(result)[f"HKLM\\SYSTEM\\ControlSet00{number}\\Services\\spooler"]
    assert len(said(result)) == 1 and "ControlSet002 has none of that name" in said(result)[0]


def test_a_service_that_is_a_driver_or_vmwares_or_none_is_left(tmp_path: Path) -> None:
    wanted = Services(enable=("VMTools.service",), disable=("disk.service", "disk\\Enum.service"), mask=("x.timer",))
    result, _ = asked(tmp_path, services=wanted)
    reasons = [message.rpartition(": ")[2] for message in said(result)]
    assert [
        "without VMware's devices it ends with an error at every start",
        "it is a driver, which Windows may need to start",
        "that is no name of a service",
        "ControlSet002 has none of that name",
    ] == reasons
    assert "Start: 2 → 4" == diffs(result)[f"HKLM\\SYSTEM\\{SERVICES}\\VMTools"]


def test_a_domain_and_hosts_are_said(tmp_path: Path) -> None:
    hosts = {"192.0.2.1": ("gate",)}
    result, script = asked(tmp_path, hostname="dc01", domain="example.com", hosts=hosts)
    assert "Rename-Computer -NewName 'dc01'" in script
    assert ["the domain example.com of the host name", "hosts"] == [
        message.removeprefix("the manifest asks for ").partition(", which")[0] for message in said(result)
    ]
