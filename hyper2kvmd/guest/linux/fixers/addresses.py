"""The addresses that the manifest gives network interfaces, written where the guest keeps its own."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.fixers import FixPlan, View, guest_yaml
from hyper2kvmd.manifest.model import Interface
from hyper2kvmd.text import mac_address, printable

NETPLAN = "/etc/netplan/95-hyper2kvm.yaml"  # the last file, which netplan puts on top of the others
CLOUD_INIT = "/etc/cloud/cloud.cfg.d/99-hyper2kvm-network.cfg"
IFUPDOWN = "/etc/network/interfaces"
IFCFG = "/etc/sysconfig/network-scripts/ifcfg-"
WICKED = "/etc/sysconfig/network/ifcfg-"
WICKED_DNS = "/etc/sysconfig/network/config"
RESOLV_CONF = "/etc/resolv.conf"
_NETWORK_MANAGER = "/etc/systemd/system/multi-user.target.wants/NetworkManager.service"
_NETWORKD = "/etc/systemd/system/multi-user.target.wants/systemd-networkd.service"

# The keys of an ifcfg file that say how an interface gets its addresses; the others are kept.
_IFCFG_KEYS = re.compile(
    r"BOOTPROTO|ONBOOT|(?:IPADDR|PREFIX|NETMASK|GATEWAY|DNS)\d*|DOMAIN|DEFROUTE"
    r"|IPV6INIT|IPV6_AUTOCONF|IPV6ADDR|IPV6ADDR_SECONDARIES|IPV6_DEFAULTGW"
)
_WICKED_KEYS = re.compile(r"BOOTPROTO|STARTMODE|(?:IPADDR|PREFIXLEN|NETMASK|BROADCAST)(?:_\w+)?")
# What the kernel, and whatever is named after an interface, takes.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,14}")
# What starts anything else than an option of the stanza before it.
_STANZA = re.compile(r"[ \t]*(?:iface|auto|allow-\S+|mapping|source\S*|no-auto-down|no-scripts|template|rename)[ \t]")


def named(interfaces: Sequence[Interface]) -> tuple[tuple[Interface, ...], tuple[Finding, ...]]:
    """Those that Linux can have; a warning for each other, whose name is one of Windows."""
    unusable = (interface.name for interface in interfaces if not _NAME.fullmatch(interface.name))
    warnings = tuple(
        Finding(
            "network_unknown",
            f"no network interface of Linux is called '{name}', so nothing is configured for it",
            "Write the guest's own name for it, such as ens192.",
            "configuration.network",
        )
        for name in unusable
    )
    return tuple(interface for interface in interfaces if _NAME.fullmatch(interface.name)), warnings


def plan(view: View, interfaces: Sequence[Interface]) -> FixPlan:
    """Configure each interface where the guest does it now, or else with what the guest has for it."""
    if not interfaces:
        return FixPlan()
    if netplan := sorted(view.g.glob_expand("/etc/netplan/*.yaml")):
        written = _netplan(view, interfaces, [path for path in netplan if path != NETPLAN])
    else:
        sources = [IFUPDOWN, *sorted(view.g.glob_expand("/etc/network/interfaces.d/*"))]
        texts = {path: text for path in sources if (text := view.read(path)) is not None}
        by_ifupdown = [interface for interface in interfaces if _is_for_ifupdown(view, interface.name, texts)]
        others = [interface for interface in interfaces if interface not in by_ifupdown]
        by_wicked = [interface for interface in others if view.g.is_file(WICKED + interface.name)]
        plans = [_ifupdown(view, by_ifupdown, texts), *(_one(view, interface) for interface in others)]
        written = FixPlan.joined([*plans, _wicked_dns(view, by_wicked)])
    return FixPlan.joined([written, _cloud_init(view)]) if written.edits else written


def _one(view: View, interface: Interface) -> FixPlan:
    name = interface.name
    if (text := view.read(IFCFG + name)) is not None:
        return _edit(IFCFG + name, text, rewrite_settings(text, ifcfg(interface), _IFCFG_KEYS), name)
    if (text := view.read(WICKED + name)) is not None:
        return _wicked(view, interface, text)
    if view.g.is_symlink(_NETWORK_MANAGER):
        path = f"/etc/NetworkManager/system-connections/hyper2kvm-{name}.nmconnection"
        return _edit(path, view.read(path), keyfile(interface), name, mode=0o600)
    if view.g.is_symlink(_NETWORKD):
        path = f"/etc/systemd/network/05-hyper2kvm-{name}.network"  # the first file that fits is the one in force
        return _edit(path, view.read(path), networkd(interface), name)
    message = f"nothing that configures the network of this guest is known here, so {name} is left as it is"
    hint = "Configure the interface in the guest, on VMware or after the migration."
    return FixPlan(warnings=(Finding("network_unknown", message, hint, "configuration.network"),))


def _edit(path: str, before: str | None, after: str | None, name: str, *, mode: int = 0o644) -> FixPlan:
    if before == after:
        return FixPlan()
    return FixPlan((Edit("configuration", path, before, after, f"the manifest's addresses of {name}", mode=mode),))


# netplan --------------------------------------------------------------------------------------------------


def _netplan(view: View, interfaces: Sequence[Interface], others: Sequence[str]) -> FixPlan:
    """One file for all interfaces; files that say something else about them go, as netplan adds up what they say."""
    wanted = {interface.name: interface for interface in interfaces}
    edits: list[Edit] = []
    matches: dict[str, str] = {}
    for path in others:
        text = view.read(path) or ""
        defined = defined_by_netplan(text)
        ours = [name for name in wanted if any(fnmatchcase(name, pattern) for pattern in defined or ())]
        if defined is None or (ours and set(defined) - set(wanted)):
            what = "cannot be read" if defined is None else f"configures {', '.join(ours)} together with others"
            message = f"{printable(path)} {what}, so the manifest's addresses are not written"
            hint = "Give that file one interface only, or leave configuration.network out and edit it in the guest."
            return FixPlan(warnings=(Finding("network_shared", message, hint, "configuration.network"),))
        if ours:
            matches |= {name: mac for name in ours if (mac := defined[name])}
            edits.append(Edit("configuration", path, text, None, f"replaced by {NETPLAN}"))
    before = view.read(NETPLAN)
    # What we wrote before stays the place to learn the addresses of the hardware from.
    matches |= {name: mac for name, mac in (defined_by_netplan(before or "") or {}).items() if mac and name in wanted}
    after = netplan_file(interfaces, matches)
    return FixPlan.joined([FixPlan(tuple(edits)), _edit(NETPLAN, before, after, ", ".join(wanted), mode=0o600)])


def defined_by_netplan(text: str) -> dict[str, str] | None:
    """The devices that a netplan file defines, by name (which may be a pattern), with the MAC each must have or "".

    None for a file that cannot be read.
    """
    content = guest_yaml.load(text)
    if content is None:
        return None
    network = content.get("network")
    if not isinstance(network, dict):
        return {}
    found: dict[str, str] = {}
    for devices in network.values():
        for key, device in devices.items() if isinstance(devices, dict) else ():
            match = device.get("match") if isinstance(device, dict) else None
            match = match if isinstance(match, dict) else {}
            said = (device.get("set-name") if isinstance(device, dict) else None, match.get("name"), key)
            name = next((word for word in said if word and isinstance(word, str)), "")
            mac = match.get("macaddress")
            found[name] = (isinstance(mac, str) and mac_address(mac)) or ""
    return found


def netplan_file(interfaces: Sequence[Interface], macs: Mapping[str, str]) -> str:
    """A netplan file for all interfaces. `macs`: the MAC by which the guest knew an interface, by name."""
    lines = ["network:", "  version: 2", "  ethernets:"]
    for interface in interfaces:
        lines.append(f"    {interface.name}:")
        if mac := macs.get(interface.name):
            lines += ["      match:", f'        macaddress: "{mac}"', f"      set-name: {interface.name}"]
        lines.append(f"      dhcp4: {'true' if interface.dhcp else 'false'}")
        if interface.addresses:
            lines += ["      addresses:", *(f'        - "{address}"' for address in interface.addresses)]
        gateways = [gateway for gateway in (interface.gateway4, interface.gateway6) if gateway]
        if gateways:
            lines.append("      routes:")
        for gateway in gateways:
            # Netplan 0.9x does not know the word `default`.
            lines += [f'        - to: "{"::" if ":" in gateway else "0.0.0.0"}/0"', f'          via: "{gateway}"']
        if interface.dns or interface.search:
            lines.append("      nameservers:")
        for key, values in (("addresses", interface.dns), ("search", interface.search)):
            if values:
                lines += [f"        {key}:", *(f'          - "{value}"' for value in values)]
    return "\n".join(lines) + "\n"


def _cloud_init(view: View) -> FixPlan:
    """cloud-init would write its own idea of the network again when it sees a new machine."""
    if not view.g.is_file("/etc/cloud/cloud.cfg", followsymlinks=True):
        return FixPlan()
    before, after = view.read(CLOUD_INIT), "network: {config: disabled}\n"
    if before == after:
        return FixPlan()
    return FixPlan((Edit("configuration", CLOUD_INIT, before, after, "cloud-init leaves the network alone"),))


# NetworkManager and systemd-networkd ----------------------------------------------------------------------


def keyfile(interface: Interface) -> str:
    """A profile of NetworkManager that goes before any other profile of the interface."""
    name = interface.name
    lines = ["[connection]", f"id=hyper2kvm-{name}", "type=ethernet", f"interface-name={name}"]
    lines += ["autoconnect-priority=999", ""]
    for version, gateway, other in (
        (4, interface.gateway4, "auto" if interface.dhcp else "disabled"),
        (6, interface.gateway6, "auto"),
    ):
        addresses = _of_version(interface.addresses, version)
        method = "manual" if addresses else other
        lines += [f"[ipv{version}]", f"method={method}"]
        lines += [f"address{number}={address}" for number, address in enumerate(addresses, 1)]
        lines += [f"gateway={gateway}"] if gateway else []
        # NetworkManager refuses a profile that has a DNS server for a protocol that is off.
        for key, words in (("dns", _of_version(interface.dns, version)), ("dns-search", interface.search)):
            if words and method != "disabled":
                lines.append(f"{key}={';'.join(words)};")
        lines.append("")
    return "\n".join(lines)


def networkd(interface: Interface) -> str:
    """A .network file of systemd-networkd."""
    lines = ["[Match]", f"Name={interface.name}", "", "[Network]", f"DHCP={'ipv4' if interface.dhcp else 'no'}"]
    lines += [f"Address={address}" for address in interface.addresses]
    lines += [f"Gateway={gateway}" for gateway in (interface.gateway4, interface.gateway6) if gateway]
    lines += [f"DNS={server}" for server in interface.dns]
    lines += [f"Domains={' '.join(interface.search)}"] if interface.search else []
    return "\n".join(lines) + "\n"


# ifcfg files of the Red Hat family and of SUSE ------------------------------------------------------------


def ifcfg(interface: Interface) -> dict[str, str]:
    """The settings of a Red Hat ifcfg file that say how the interface gets its addresses."""
    settings = {"ONBOOT": "yes", "BOOTPROTO": "dhcp" if interface.dhcp else "none"}
    for number, address in enumerate(_of_version(interface.addresses, 4)):
        host, _, prefix = address.partition("/")
        settings |= {f"IPADDR{number or ''}": host, f"PREFIX{number or ''}": prefix}
    if interface.gateway4:
        settings["GATEWAY"] = interface.gateway4
    if addresses := _of_version(interface.addresses, 6):
        settings |= {"IPV6INIT": "yes", "IPV6_AUTOCONF": "no", "IPV6ADDR": addresses[0]}
        if more := addresses[1:]:
            settings["IPV6ADDR_SECONDARIES"] = " ".join(more)
    if interface.gateway6:
        settings["IPV6_DEFAULTGW"] = interface.gateway6
    settings |= {f"DNS{number}": server for number, server in enumerate(interface.dns, 1)}
    if interface.search:
        settings["DOMAIN"] = " ".join(interface.search)
    return settings


def _wicked(view: View, interface: Interface, text: str) -> FixPlan:
    name = interface.name
    addresses = {f"IPADDR{f'_{number}' if number else ''}": value for number, value in enumerate(interface.addresses)}
    settings = {"BOOTPROTO": "dhcp" if interface.dhcp else "static", "STARTMODE": "auto", **addresses}
    plans = [_edit(WICKED + name, text, rewrite_settings(text, settings, _WICKED_KEYS), name)]
    path = f"/etc/sysconfig/network/ifroute-{name}"
    gateways = [gateway for gateway in (interface.gateway4, interface.gateway6) if gateway]
    if gateways:
        routes = "".join(f"default {gateway} - {name}\n" for gateway in gateways)
        plans.append(_edit(path, view.read(path), routes, name))
    return FixPlan.joined(plans)


def _wicked_dns(view: View, interfaces: Sequence[Interface]) -> FixPlan:
    """SUSE keeps the name servers of all interfaces in one file."""
    text = view.read(WICKED_DNS)
    if text is None:
        return FixPlan()
    servers = dict.fromkeys(server for interface in interfaces for server in interface.dns)
    domains = dict.fromkeys(domain for interface in interfaces for domain in interface.search)
    for key, words in (("NETCONFIG_DNS_STATIC_SERVERS", servers), ("NETCONFIG_DNS_STATIC_SEARCHLIST", domains)):
        if words:
            text = rewrite_settings(text, {key: " ".join(words)}, re.compile(key))
    return _edit(WICKED_DNS, view.read(WICKED_DNS), text, ", ".join(interface.name for interface in interfaces))


def rewrite_settings(text: str, settings: Mapping[str, str], managed: re.Pattern[str]) -> str:
    """A file of KEY=value lines that has `settings`, and of the keys that are `managed` no others.

    A line that says so already stays; every other line of another key stays byte for byte.
    """
    missing = dict(settings)
    lines = []
    for line in text.split("\n"):
        key, _, value = line.strip().partition("=")
        if not managed.fullmatch(key):
            lines.append(line)
        elif key in missing:
            same = value.strip("\"'") == missing[key]
            lines.append(line if same else f'{key}="{missing[key]}"')
            del missing[key]
    return _appended("\n".join(lines), [f'{key}="{value}"' for key, value in missing.items()])


def _appended(text: str, lines: Sequence[str]) -> str:
    """The text with more lines at its end, the last of which ends in a newline if there are any."""
    return text + ("\n" if text and lines and not text.endswith("\n") else "") + "".join(f"{line}\n" for line in lines)


# ifupdown -------------------------------------------------------------------------------------------------


def _is_for_ifupdown(view: View, name: str, texts: Mapping[str, str]) -> bool:
    """Whether ifupdown configures the interface now, or would be the one to do it."""
    if any(has_stanza(text, name) for text in texts.values()):
        return True
    return IFUPDOWN in texts and not (view.g.is_symlink(_NETWORK_MANAGER) or view.g.is_symlink(_NETWORKD))


def _ifupdown(view: View, interfaces: Sequence[Interface], texts: Mapping[str, str]) -> FixPlan:
    """The first file that has an interface gets its new stanzas, the others lose theirs."""
    new = dict(texts)
    for interface in interfaces:
        name = interface.name
        holder = next((path for path, text in new.items() if has_stanza(text, name)), IFUPDOWN)
        auto = not any(starts(text, name) for text in new.values())
        new |= {
            path: replace_stanza(text, name, stanza(interface, auto=auto) if path == holder else "")
            for path, text in new.items()
        }
    what = ", ".join(interface.name for interface in interfaces)
    changed = FixPlan.joined([_edit(path, text, new[path], what) for path, text in texts.items()])
    servers = dict.fromkeys(server for interface in interfaces for server in interface.dns)
    if not servers or view.g.is_symlink(RESOLV_CONF) or view.g.is_file("/sbin/resolvconf", followsymlinks=True):
        return changed
    # Without resolvconf nobody reads the dns- lines.
    resolv_conf = view.read(RESOLV_CONF)
    return FixPlan.joined([changed, _edit(RESOLV_CONF, resolv_conf, resolvers(resolv_conf or "", list(servers)), what)])


def resolvers(text: str, servers: Sequence[str]) -> str:
    """/etc/resolv.conf with these name servers and no others; every other line as it was."""
    lines = text.split("\n")
    if [line.split()[1:] for line in lines if line.split()[:1] == ["nameserver"]] == [[server] for server in servers]:
        return text
    kept = "\n".join(line for line in lines if line.split()[:1] != ["nameserver"])
    return _appended(kept, [f"nameserver {server}" for server in servers])


def stanza(interface: Interface, *, auto: bool) -> str:
    """The stanzas of /etc/network/interfaces for an interface, ending in a newline. auto: and start it at boot."""
    name = interface.name
    dns = [f"    dns-nameservers {' '.join(interface.dns)}"] if interface.dns else []
    dns += [f"    dns-search {' '.join(interface.search)}"] if interface.search else []
    lines = [f"auto {name}"] if auto else []
    if interface.dhcp:
        lines += [f"iface {name} inet dhcp", *dns]
    for number, address in enumerate(interface.addresses):
        version = ipaddress.ip_interface(address).version
        family, gateway = ("inet", interface.gateway4) if version == 4 else ("inet6", interface.gateway6)
        lines += [f"iface {name} {family} static", f"    address {address}"]
        if gateway and address == _of_version(interface.addresses, version)[0]:
            lines.append(f"    gateway {gateway}")
        lines += dns if number == 0 else []
    return "\n".join(lines) + "\n"


def has_stanza(text: str, name: str) -> bool:
    """Whether an interfaces file configures the interface."""
    return any(line.split()[:2] == ["iface", name] for line in text.split("\n"))


def starts(text: str, name: str) -> bool:
    """Whether an interfaces file has the interface started at boot or when it appears."""
    words = (line.split() for line in text.split("\n"))
    return any(line[:1] in (["auto"], ["allow-auto"], ["allow-hotplug"]) and name in line[1:] for line in words)


def replace_stanza(text: str, name: str, new: str) -> str:
    """The text with `new` in place of the first stanza of an interface, and without its others.

    Without a stanza, `new` comes last. Every other line stays as it was.
    """
    if not has_stanza(text, name):
        return _appended(text, new.split("\n")[:-1])
    lines = text.split("\n")
    kept: list[str] = []
    number = 0
    pending = new.split("\n")[:-1]
    while number < len(lines):
        if lines[number].split()[:2] != ["iface", name]:
            kept.append(lines[number])
            number += 1
            continue
        end = number + 1
        while end < len(lines) and not _STANZA.match(lines[end]):
            end += 1
        # Blank lines and comments before the next stanza belong to that one.
        while end > number + 1 and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
            end -= 1
        kept += pending
        pending = []
        number = end
    return "\n".join(kept)


def _of_version(addresses: Sequence[str], version: int) -> list[str]:
    return [address for address in addresses if ipaddress.ip_interface(address).version == version]
