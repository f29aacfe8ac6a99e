"""What the manifest asks for in a Windows guest, as far as Windows can have it; and what of it is not done, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.options import FixOptions
from hyper2kvmd.guest.windows.look import VMWARE_SERVICES, Addresses, Windows
from hyper2kvmd.guest.windows.plan import DISABLED, Registry
from hyper2kvmd.guest.windows.registry import dword
from hyper2kvmd.manifest import Configuration
from hyper2kvmd.manifest.model import User

AUTOMATIC = 2
PROGRAMS = 0x30  # of a service's type: it has a process of its own, or shares one; it is no driver
USER_LENGTH = 20  # of the name of a local user
COMMENT_LENGTH = 48
# What of a user is for Linux alone, and what to do about it.
_OF_LINUX = {
    "uid": "Windows numbers its users itself",
    "shell": "Windows has no login shells",
    "home": "Windows makes it when the user first logs in",
    "ssh_keys": "they belong to OpenSSH Server, where there is one",
    "password_hash": "Windows takes no such hash, and a password in plain text is not left on a disk",
    "sudo": "Windows has none: put the user into the group of the administrators",
}


@dataclass(frozen=True)
class Account:
    """A user that is made at the first boot if there is none of that name."""

    name: str
    comment: str = ""
    groups: tuple[str, ...] = ()
    lock: bool = False


@dataclass(frozen=True)
class Wishes:
    """What is to be done at the first boot besides drivers and addresses.

    hostname: "" to leave it. rdp: whether Remote Desktop is to be let in. uninstall: the product code of VMware Tools,
    "" to leave them. disable: names of users.
    """

    hostname: str = ""
    rdp: bool = False
    uninstall: str = ""
    accounts: tuple[Account, ...] = ()
    disable: tuple[str, ...] = ()


def wishes(windows: Windows, options: FixOptions) -> tuple[Wishes, list[Finding]]:
    """What Windows is to do for itself, with what of it is not done."""
    asked = options.configuration
    warnings = [*_of_host(asked)]
    accounts = []
    for user in asked.users:
        warnings += _of_user(user)
        if len(user.name) <= USER_LENGTH:
            comment = user.comment if user.comment and not _unwritable(user.comment) else ""
            accounts.append(Account(user.name, comment, user.groups, user.lock))
    disabled = [name for name in asked.disable_users if len(name) <= USER_LENGTH]
    warnings += [_too_long(name) for name in asked.disable_users if name not in disabled]
    tools = windows.vmware_tools if options.remove_vmware_tools else ""
    return Wishes(asked.hostname or "", options.rdp, tools, tuple(accounts), tuple(disabled)), warnings


def _of_host(asked: Configuration) -> Iterator[Finding]:
    if asked.domain:
        yield _not_done("hostname", f"the domain {asked.domain} of the host name", "Join it in Windows.")
    if asked.hosts:
        yield _not_done("hostname", "hosts", "Write them into System32\\drivers\\etc\\hosts in the guest.")


def _of_user(user: User) -> Iterator[Finding]:
    if len(user.name) > USER_LENGTH:
        yield _too_long(user.name)
        return
    for key, why in _OF_LINUX.items():
        if getattr(user, key):
            yield _not_done("users", f"{key} of {user.name}", "Set what is needed in the guest.", why)
    if user.comment and (why := _unwritable(user.comment)):
        yield _not_done("users", f"comment of {user.name}", "Write it in the guest.", why)


def _unwritable(comment: str) -> str:
    """Why a script for cmd.exe, which has an alphabet of its own, cannot have a comment; "" if it can."""
    if len(comment) > COMMENT_LENGTH:
        return f"Windows takes {COMMENT_LENGTH} characters"
    return "" if comment.isascii() and not set(comment) & set('"%^&|<>!') else "a script cannot spell it"


def _too_long(name: str) -> Finding:
    return _not_done("users", name, "Shorten it.", f"Windows takes {USER_LENGTH} characters for the name of a user")


def connections(windows: Windows, configuration: Configuration) -> tuple[dict[str, Addresses], list[Finding]]:
    """The cards whose connections the manifest names, by their GUIDs, with what they are set to then."""
    found: dict[str, Addresses] = {}
    warnings = []
    for wanted in configuration.interfaces:
        card = next((one for one in windows.addresses if one.name.lower() == wanted.name.lower()), None)
        if card is None:
            names = ", ".join(f"'{one.name}'" for one in windows.addresses if one.name) or "none"
            said = f"its connections are {names}"
            hint = "Write the name of the connection, as `ipconfig` shows it behind the word adapter."
            warnings.append(_not_done("network", f"the interface {wanted.name}", hint, said))
            continue
        if wanted.search:
            warnings.append(_not_done("network", f"search of {wanted.name}", "Set the suffixes in the guest."))
        gateways = tuple(one for one in (wanted.gateway4, wanted.gateway6) if one)
        found[card.guid] = replace(
            card, dhcp=wanted.dhcp, addresses=wanted.addresses, gateways=gateways, dns=wanted.dns, routes6=False
        )
    return found, warnings


def services(registry: Registry, control_sets: Sequence[str], configuration: Configuration) -> list[Finding]:
    """Plan which services start with Windows, and which not; what is not done of it."""
    asked = configuration.services
    wanted = [
        *((unit, AUTOMATIC) for unit in asked.enable),
        *((unit, DISABLED) for unit in (*asked.disable, *asked.mask)),
    ]
    warnings = []
    for unit, start in wanted:
        name = unit.removesuffix(".service")
        if why := _no_service(registry, control_sets, name, start):
            hint = "Write the name of a service as `sc query` shows it behind SERVICE_NAME."
            warnings.append(_not_done("services", f"the service {name}", hint, why))
            continue
        summary = f"the manifest has {name} {'start with Windows' if start == AUTOMATIC else 'not start'}"
        for control_set in control_sets:
            key = f"{control_set}\\Services\\{name}"
            registry.set("windows.configuration", key, "Start", dword(start), summary)
    return warnings


def _no_service(registry: Registry, control_sets: Sequence[str], name: str, start: int) -> str:
    """Why a service is left alone, "" if it is not."""
    if "\\" in name:
        return "that is no name of a service"
    if start == AUTOMATIC and name.lower() in {one.lower() for one in VMWARE_SERVICES}:
        return "without VMware's devices it ends with an error at every start"
    for control_set in control_sets:
        key = f"{control_set}\\Services\\{name}"
        if not registry.hive.exists(key):
            return f"{control_set} has none of that name"
        kind = registry.hive.value(key, "Type")
        if kind is None or not (kind.number or 0) & PROGRAMS:
            return "it is a driver, which Windows may need to start"
    return ""


def _not_done(field: str, what: str, hint: str, why: str = "") -> Finding:
    because = f": {why}" if why else ""
    return Finding(
        "not_done",
        f"the manifest asks for {what}, which is not done in Windows{because}",
        hint,
        f"configuration.{field}",
    )
