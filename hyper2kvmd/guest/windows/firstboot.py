"""What only a running Windows can do for itself: the script that it runs when it first starts, and the service for it.

The service needs no program of ours: it starts cmd.exe with a script. At most three starts of Windows run it; after
that, or as soon as all is done, it removes itself. It never restarts Windows. Its log stays in the guest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Interface, ip_interface

from hyper2kvmd.guest.windows.asked import Account, Wishes
from hyper2kvmd.guest.windows.look import Addresses, Windows
from hyper2kvmd.guest.windows.plan import PACKAGES, Choice, Registry
from hyper2kvmd.guest.windows.registry import dword, expand_sz, multi_sz, sz

SERVICE = "hyper2kvm-firstboot"
DIRECTORY = "hyper2kvm"  # below that of Windows
SCRIPT, NETWORK, LOG = "firstboot.cmd", "network.ps1", "firstboot.log"
ATTEMPTS = 3
# Older builds of pnputil know other words, which newer ones understand as well, but answer with other numbers.
_NEW_PNPUTIL = 14393
# What installers answer that means success: done, nothing to do, a restart is needed for the rest.
_DONE = (0, 259, 1641, 3010)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,14}")
_PRODUCT = re.compile(r"\{[0-9A-Fa-f-]{36}\}")


def needed(choice: Choice, addresses: Sequence[Addresses], wishes: Wishes) -> bool:
    """Whether there is anything to do for it."""
    return bool(choice.packages or addresses or wishes != Wishes())


@dataclass(frozen=True)
class Step:
    """Something to do: what it is called in the log, the command for it, and a routine that it calls, if it does."""

    title: str
    command: str
    routine: tuple[str, ...] = ()


def script(windows: Windows, choice: Choice, addresses: Sequence[Addresses], wishes: Wishes) -> str:
    """The script, for cmd.exe. Each step tells in the log how it ended, does not stop the next, and is done once."""
    steps = list(_steps(windows, choice, addresses, wishes))
    lines = [
        "@echo off",
        "setlocal enableextensions disabledelayedexpansion",
        f'set "HERE=%SystemRoot%\\{DIRECTORY}"',
        "set ATTEMPT=0",
        'if exist "%HERE%\\attempts.txt" set /p ATTEMPT=<"%HERE%\\attempts.txt"',
        "set /a ATTEMPT=ATTEMPT+1",
        '>"%HERE%\\attempts.txt" echo %ATTEMPT%',
        # Before anything can go wrong: the last time is the last, whatever becomes of it.
        f"if %ATTEMPT% geq {ATTEMPTS} sc.exe delete {SERVICE}",
        f"echo %DATE% %TIME% attempt %ATTEMPT% of {ATTEMPTS}",
        "set FAILED=0",
        *(f"call :step{number}" for number in range(1, len(steps) + 1)),
        f"if %FAILED%==0 sc.exe delete {SERVICE}",
        "echo %DATE% %TIME% end, failed=%FAILED%",
        "exit /b %FAILED%",
    ]
    for number, step in enumerate(steps, 1):
        lines += [
            "",
            f":step{number}",
            f'if exist "%HERE%\\step{number}.done" exit /b 0',
            step.command,
            "call :judge",
            # In one line: `set` makes the error forgotten.
            f'if errorlevel 1 (set FAILED=1) else (>"%HERE%\\step{number}.done" echo %CODE%)',
            f"echo %DATE% %TIME% {step.title}: %CODE%",
            "exit /b 0",
            *(["", *step.routine] if step.routine else []),
        ]
    judge = ["", ":judge", "set CODE=%ERRORLEVEL%", *(f"if %CODE%=={code} exit /b 0" for code in _DONE), "exit /b 1"]
    return "\r\n".join([*lines, *judge, ""])


def _steps(windows: Windows, choice: Choice, addresses: Sequence[Addresses], wishes: Wishes) -> Iterator[Step]:
    powershell = "powershell.exe -NoProfile -NonInteractive -ExecutionPolicy Bypass"
    modern = windows.has_driver_database
    if choice.packages:
        yield Step("drivers", "call :drivers", _drivers(windows))
    if addresses and modern:
        yield Step("addresses", f'{powershell} -File "%HERE%\\{NETWORK}"')
    for number, card in enumerate(() if modern else addresses, 1):
        yield Step(f"addresses of {card.mac}", f"call :card{number}", _card(number, card))
    if wishes.rdp:
        # The group by its resource, as its name is translated.
        group = "@FirewallAPI.dll,-28752"
        yield Step("remote desktop", f'netsh.exe advfirewall firewall set rule group="{group}" new enable=yes')
    if wishes.hostname:
        rename = (
            f"{powershell} -Command \"Rename-Computer -NewName '{wishes.hostname}' -Force\""
            if modern
            else f'wmic.exe computersystem where name="%COMPUTERNAME%" call rename name="{wishes.hostname}"'
        )
        yield Step(f"host name {wishes.hostname}, from the next start on", rename)
    for number, account in enumerate(wishes.accounts, 1):
        yield Step(f"user {account.name}", f"call :user{number}", _user(number, account))
    for name in wishes.disable:
        yield Step(f"no more logins of {name}", f"net.exe user {name} /active:no")
    if wishes.uninstall:
        yield Step("uninstall VMware Tools", f"msiexec.exe /x {wishes.uninstall} /qn /norestart")


def _drivers(windows: Windows) -> tuple[str, ...]:
    """A routine that installs every package by itself: one that fails does not keep the next from its turn."""
    words = '/add-driver "%%i" /install' if windows.build >= _NEW_PNPUTIL else '-i -a "%%i"'
    directory = f"%SystemRoot%\\{PACKAGES}".replace("/", "\\")
    return (
        ":drivers",
        "set BAD=0",
        f'for /r "{directory}" %%i in (*.inf) do (',
        "  echo %%i",
        f"  pnputil.exe {words}",
        "  call :judge",
        "  if errorlevel 1 set BAD=1",
        ")",
        "exit /b %BAD%",
    )


def _user(number: int, account: Account) -> tuple[str, ...]:
    """A routine that makes a user if there is none of that name, and puts it into its groups.

    Its password is one that Windows makes up and nobody sees: a person sets another before the first login.
    """
    name = account.name
    comment = f' /comment:"{account.comment}"' if account.comment else ""
    return (
        f":user{number}",
        f"net.exe user {name} >nul 2>&1",
        f"if errorlevel 1 net.exe user {name} /add /random >nul",
        "if errorlevel 1 exit /b 1",
        "set BAD=0",
        *(_bad_if(f"net.exe user {name}{comment}") if comment else ()),
        *(
            line
            for group in account.groups
            for line in (
                f'net.exe localgroup "{group}" | findstr.exe /i /x "{name}" >nul',
                *_bad_if(f'if errorlevel 1 net.exe localgroup "{group}" {name} /add'),
            )
        ),
        *(_bad_if(f"net.exe user {name} /active:no") if account.lock else ()),
        "exit /b %BAD%",
    )


def _bad_if(command: str) -> tuple[str, str]:
    """A command that makes the routine fail in the end, and not stop; not with `||`, which Wine's cmd gets wrong."""
    return command, "if errorlevel 1 set BAD=1"


def _card(number: int, card: Addresses) -> tuple[str, ...]:
    """A routine for a Windows without PowerShell's network: it finds the connection by its MAC address."""
    # wmic ends its lines with two carriage returns, of which the inner loop takes one away.
    query = f"wmic.exe nic where \"MACAddress='{card.mac.upper()}'\" get NetConnectionID /value"
    return (
        f":card{number}",
        'set "NAME="',
        f'for /f "tokens=2 delims==" %%a in (\'{query} 2^>nul\') do for /f "delims=" %%b in ("%%a") do set "NAME=%%b"',
        "if not defined NAME (",
        f"  echo no card has {card.mac}",
        "  exit /b 1",
        ")",
        "set BAD=0",
        # It answers with an error where that is so already.
        *(['netsh.exe interface ipv4 set address name="%NAME%" source=dhcp'] if card.dhcp else []),
        *(line for command in _netsh(card) for line in _bad_if(command)),
        "exit /b %BAD%",
    )


def _netsh(card: Addresses) -> Iterator[str]:
    """The commands that give a connection its addresses."""
    name = 'name="%NAME%"'
    interfaces = [ip_interface(address) for address in card.addresses]
    first = True
    for interface in interfaces:
        if isinstance(interface, IPv6Interface):
            yield f'netsh.exe interface ipv6 add address interface="%NAME%" address={interface}'
            continue
        ip = f"address={interface.ip} mask={interface.netmask}"
        gateway = next((one for one in card.gateways if ":" not in one), "none")
        words = f"set address {name} source=static {ip} gateway={gateway}" if first else f"add address {name} {ip}"
        yield f"netsh.exe interface ipv4 {words}"
        first = False
    for gateway in card.gateways:
        if ":" in gateway:
            yield f'netsh.exe interface ipv6 add route prefix=::/0 interface="%NAME%" nexthop={gateway}'
    for kind in ("ipv4", "ipv6"):
        for number, server in enumerate((one for one in card.dns if (":" in one) == (kind == "ipv6")), 1):
            words = f"add dnsservers {name} index={number}" if number > 1 else f"set dnsservers {name} source=static"
            yield f"netsh.exe interface {kind} {words} address={server} validate=no"


def network_script(addresses: Sequence[Addresses]) -> str:
    """The script for PowerShell that gives each card, by its MAC address, what the old one had."""
    cards = []
    for card in addresses:
        pairs = (address.split("/") for address in card.addresses)
        ips = ", ".join(f"@{{ Ip = '{ip}'; Prefix = {prefix} }}" for ip, prefix in pairs)
        gateways, dns = (", ".join(f"'{one}'" for one in some) for some in (card.gateways, card.dns))
        mac = card.mac.upper().replace(":", "-")
        dhcp = "$true" if card.dhcp else "$false"
        cards.append(
            f"  @{{ Mac = '{mac}'; Dhcp = {dhcp}; Addresses = @({ips}); Gateways = @({gateways}); Dns = @({dns}) }}"
        )
    return "\r\n".join(
        [
            "$ErrorActionPreference = 'Stop'",
            "$failed = 0",
            "$cards = @(",
            ",\r\n".join(cards),
            ")",
            "foreach ($card in $cards) {",
            "  try {",
            "    $adapter = $null",
            "    # Its driver may have been installed a moment ago.",
            "    for ($try = 0; -not $adapter -and $try -lt 30; $try++) {",
            "      if ($try) { Start-Sleep -Seconds 2 }",
            "      $adapter = Get-NetAdapter -Physical | Where-Object MacAddress -EQ $card.Mac |",
            "          Select-Object -First 1",
            "    }",
            '    if (-not $adapter) { throw "no card has $($card.Mac)" }',
            "    $index = $adapter.ifIndex",
            "    if ($card.Dhcp) { Set-NetIPInterface -InterfaceIndex $index -AddressFamily IPv4 -Dhcp Enabled }",
            "    foreach ($address in $card.Addresses) {",
            "      if (Get-NetIPAddress -InterfaceIndex $index -ErrorAction SilentlyContinue |",
            "          Where-Object { $_.IPAddress -eq $address.Ip -and $_.PrefixOrigin -eq 'Manual' }) { continue }",
            "      New-NetIPAddress -InterfaceIndex $index -IPAddress $address.Ip -PrefixLength $address.Prefix |",
            "          Out-Null",
            "    }",
            "    foreach ($gateway in $card.Gateways) {",
            "      $to = if ($gateway -like '*:*') { '::/0' } else { '0.0.0.0/0' }",
            "      if (Get-NetRoute -InterfaceIndex $index -DestinationPrefix $to -ErrorAction SilentlyContinue |",
            "          Where-Object { $_.NextHop -eq $gateway }) { continue }",
            "      New-NetRoute -InterfaceIndex $index -DestinationPrefix $to -NextHop $gateway | Out-Null",
            "    }",
            "    if ($card.Dns) { Set-DnsClientServerAddress -InterfaceIndex $index -ServerAddresses $card.Dns }",
            '    Write-Output "$($card.Mac): $($adapter.Name) has its addresses"',
            "  } catch {",
            "    $failed = 1",
            '    Write-Output "$($card.Mac): $_"',
            "  }",
            "}",
            "exit $failed",
            "",
        ]
    )


def unusable(wishes: Wishes) -> str:
    """What of the wishes a script cannot be trusted with, "" if nothing."""
    if wishes.hostname and not _NAME.fullmatch(wishes.hostname):
        return f"'{wishes.hostname}' is no name of a computer: Windows takes up to 15 letters, digits and hyphens"
    if wishes.uninstall and not _PRODUCT.fullmatch(wishes.uninstall):
        return f"'{wishes.uninstall}' is no product code"
    return ""


def register(registry: Registry, control_set: str) -> None:
    """Have Windows run the script when it starts, as a service.

    The service ends at once, with an error in the event log that says so: cmd.exe does not answer as services do. The
    script goes on, in a process of its own.
    """
    key = f"{control_set}\\Services\\{SERVICE}"
    shell = "%SystemRoot%\\System32\\cmd.exe /d /c"
    place = f"%SystemRoot%\\{DIRECTORY}"
    command = f'{shell} start "{SERVICE}" /b {shell} "{place}\\{SCRIPT} >>{place}\\{LOG} 2>&1"'
    for name, value in (
        ("Type", dword(0x10)),
        ("Start", dword(2)),
        ("ErrorControl", dword(0)),
        ("ImagePath", expand_sz(command)),
        ("ObjectName", sz("LocalSystem")),
        ("DisplayName", sz("hyper2kvm: what is left to do after the migration")),
        ("DependOnService", multi_sz("PlugPlay")),
    ):
        registry.set("windows.firstboot", key, name, value, "Windows does the rest when it first starts")
