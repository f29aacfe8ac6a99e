"""Network cards keep the names that the guest's configuration knows them by, so that they keep their addresses.

On VMware a card is called after its slot, ens192 say, and on KVM it would be enp1s0, for which nothing is configured.
The domain keeps the MAC addresses, so each name is bound to one, in a file that udev reads. The configuration itself,
and all that refers to the names (firewalls, routes, scripts), is left as it is.

VLANs, bridges and bonds have the MAC address of the card that they stand on. What is written matches the card alone: a
.link file by the address that the hardware has of itself, where udev knows that key, and else a rule for devices that
have a driver.

The initramfs must be built again after these edits. Its udev renames cards before the system's does, and what it has
named stays named with older systemd. initramfs-tools copies .link files and rules of one's own into every image.
dracut copies rules into images for this host only (hostonly), and .link files only where a network module is in the
image as well; an image without one has no 99-default.link either, and so renames nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.fixers import FixPlan, View, addresses, guest_yaml
from hyper2kvmd.guest.linux.fixers.network import (
    cmdline,
    dhcpcd,
    ifcfg,
    ifupdown,
    keyfile,
    leases,
    match,
    netplan,
    scripts,
    udev,
    wicked,
)
from hyper2kvmd.guest.linux.fixers.network.bind import Binding, Naming, bind
from hyper2kvmd.guest.linux.fixers.network.interface import Interface
from hyper2kvmd.guest.linux.fixers.network.match import Match
from hyper2kvmd.guest.options import Nic
from hyper2kvmd.manifest.model import Interface as Wanted
from hyper2kvmd.text import printable

__all__ = ["Nic", "plan"]

# A guest with more was made to keep us busy.
FILE_LIMIT = 500  # of one kind
INTERFACE_LIMIT = 200
_KERNEL_NAMES = re.compile(r"^[^#\n]*\bnet\.ifnames=0\b", re.MULTILINE)
_SYSTEMD = (
    "/etc/systemd/network",
    "/usr/local/lib/systemd/network",
    "/usr/lib/systemd/network",
    "/lib/systemd/network",
)
_LINK = "10-hyper2kvm-{}.link"
_PROFILES = ("/etc/NetworkManager/system-connections/*", "/usr/lib/NetworkManager/system-connections/*")
_REDHAT = "/etc/sysconfig/network-scripts/ifcfg-*"
_ETHERNET = re.compile(r"$|[*?\[]|e(?:n|th|[*?\[])|lan|wan")
_RULES_DIRECTORIES = ("/etc/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d")
_UDEV = ("/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd")
_PERMANENT = b"Match.PermanentMACAddress"  # as the program has it in its table of keys
_PROGRAM_LIMIT = 16 << 20  # bytes; it has one or two MiB
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Edited(View):
    """The guest with some of its files as they will be. texts: by path."""

    texts: Mapping[str, str] = field(default_factory=dict)

    def read(self, path: str) -> str | None:
        return self.texts[path] if path in self.texts else super().read(path)


def plan(view: View, nics: Sequence[Nic], cards: str = "virtio", wanted: Sequence[Wanted] = ()) -> FixPlan:
    """Bind the names that the guest does not pin itself, and translate what goes by the place or the driver of a card.

    nics: the domain's, in its order. cards: their model there. wanted: what the manifest configures; the files that
    hold it now are left to `addresses`.
    """
    if view.inspection.os_type != "linux":
        return FixPlan()
    driver = "virtio_net" if cards == "virtio" else cards
    permanent = _knows_permanent_addresses(view)
    kept = [edit.path for edit in addresses.plan(view, wanted).edits]
    translated, warned = match.translate(list(_matches(view, permanent=permanent)), view.read, nics, driver, kept)
    view = _Edited(view.g, view.inspection, view.names, {path: edit.after or "" for path, edit in translated.items()})
    warnings: list[Finding] = [*warned]
    found = [*_ifupdown(view), *_netplan(view, warnings), *_keyfiles(view), *_ifcfg(view), *_others(view)]
    interfaces = list(dict.fromkeys(found))
    if len(interfaces) > INTERFACE_LIMIT:
        return FixPlan(warnings=(*warnings, _too_many(interfaces)))
    if not nics:
        return FixPlan(warnings=(*warnings, *_no_nics(interfaces)))
    naming = _naming(view, permanent=permanent)
    bound = bind(interfaces, nics, _pins(view), _leases(view), naming)
    rules = udev.OTHER_RULES if view.g.is_dir(udev.RULES) else udev.RULES
    edits = link_edits(bound.bindings, view.read) if naming.links else rule_edits(bound.bindings, view.read, rules)
    return FixPlan((*translated.values(), *edits), warnings=(*warnings, *bound.warnings))


def link_edits(bindings: Sequence[Binding], read: Callable[[str], str | None]) -> tuple[Edit, ...]:
    """A .link file for each name."""
    edits = []
    for one in bindings:
        path = f"/etc/systemd/network/{_LINK.format(one.name)}"
        text = (
            "# Written by hyper2kvmd, so that the card keeps its name; may be removed if that does not matter.\n"
            f"[Match]\nPermanentMACAddress={one.mac}\n\n[Link]\nName={one.name}\n"
        )
        if (before := read(path)) != text:
            edits.append(Edit("network", path, before, text, f"{one.name} is the card {one.mac}", one.evidence))
    return tuple(edits)


def rule_edits(bindings: Sequence[Binding], read: Callable[[str], str | None], path: str) -> tuple[Edit, ...]:
    """A rule for each name, after those that the file has, where a .link file will not do."""
    if not bindings:
        return ()
    before = read(path)
    text = udev.with_rules(before or "", ((one.name, one.mac) for one in bindings))
    summary = ", ".join(f"{one.name} is the card {one.mac}" for one in bindings)
    return (Edit("network", path, before, text, summary, "; ".join(f"{o.name}: {o.evidence}" for o in bindings)),)


def _too_many(interfaces: Sequence[Interface]) -> Finding:
    return Finding(
        "network_unbound",
        f"the guest configures {len(interfaces)} network cards ({printable(interfaces[0].file)} has the first), more "
        f"than the {INTERFACE_LIMIT} that are looked at, and none was bound to its name",
        "Remove the configuration of cards that the VM does not have.",
    )


def _no_nics(interfaces: Sequence[Interface]) -> tuple[Finding, ...]:
    names = list(dict.fromkeys(one.name for one in interfaces if one.name))
    if not names:
        return ()
    return (
        Finding(
            "network_unbound",
            f"the guest configures {', '.join(map(printable, names))}, and it is not known which network cards it gets",
            "Give the network adapters with their MAC addresses in the manifest's nics.",
            "nics",
        ),
    )


def _naming(view: View, *, permanent: bool) -> Naming:
    """How udev names cards, by the rules that are there; a rule in /etc takes the place of the system's."""
    setup_link = "net_setup_link" in _rule(view, "80-net-setup-link.rules")
    name_slot = "ID_NET_NAME" in _rule(view, "80-net-name-slot.rules")  # systemd before .link files, and RHEL 7's
    # Writes a rule for each new card, and so names it before a .link file can (Debian 8, SLES 12).
    generator = bool(_rule(view, "75-persistent-net-generator.rules"))
    command_lines = (text for _, text in _files(view, *cmdline.PATHS))
    default = (text for path, text in _systemd(view, "link") if path.endswith("/99-default.link"))
    policy_off = any(not text.strip() for text in default)  # a link to /dev/null, as systemd's manual has it
    kernel_names = generator or policy_off or any(_KERNEL_NAMES.search(text) for text in command_lines)
    systemd = any(
        view.g.is_file(f"{directory}/80-net-{name}.rules")
        for directory in _RULES_DIRECTORIES[1:]
        for name in ("setup-link", "name-slot")
    )
    # The first file that fits a card is in force. A rule is, whatever file comes first.
    before = [text for path, text in _systemd(view, "link") if path.rpartition("/")[2] < _LINK.format("")]
    links = setup_link and not generator and permanent and not any(map(keyfile.is_for_many, before))
    return Naming(links, (setup_link or name_slot) and not kernel_names, swaps=not systemd)


def _knows_permanent_addresses(view: View) -> bool:
    """Whether udev knows PermanentMACAddress= in a .link file: systemd's does since 245, and where it was backported.

    It must not be written for one that does not: udev passes the key over, and the file then matches every card.
    """
    return any(
        _PERMANENT in view.g.pread(path, _CHUNK + len(_PERMANENT), start)
        for path in _UDEV
        if view.g.is_file(path, followsymlinks=True)
        for start in range(0, min(view.g.filesize(path), _PROGRAM_LIMIT), _CHUNK)
    )


def _rule(view: View, name: str) -> str:
    for directory in _RULES_DIRECTORIES:
        path = f"{directory}/{name}"
        if (text := view.read(path)) is not None:
            return text
        if view.g.is_symlink(path):  # to /dev/null, which turns the rule off
            return ""
    return ""


def _glob(view: View, pattern: str) -> list[str]:
    return sorted(view.g.glob_expand(pattern))[:FILE_LIMIT] if "*" in pattern else [pattern]


def _files(view: View, *patterns: str) -> Iterator[tuple[str, str]]:
    """Path and text of every file."""
    for pattern in patterns:
        for path in _glob(view, pattern):
            if (text := view.read(path)) is not None:
                yield path, text


def _ifupdown(view: View) -> list[Interface]:
    found: list[Interface] = []
    queue, seen = ["/etc/network/interfaces"], set[str]()
    while queue and len(seen) < FILE_LIMIT:
        pattern = queue.pop(0)
        if pattern in seen:
            continue
        seen.add(pattern)
        directory = pattern.endswith("/")
        for path, text in _files(view, pattern + "*" if directory else pattern):
            if directory and not ifupdown.IN_DIRECTORY.fullmatch(path.rpartition("/")[2]):
                continue
            parsed = ifupdown.parse(text, path)
            found += parsed.interfaces
            queue += parsed.sources
    return found


def _netplan(view: View, warnings: list[Finding]) -> tuple[Interface, ...]:
    """Netplan's files in the order of their names; one in /etc takes the place of the system's of the same name."""
    texts = {path.rpartition("/")[2]: (path, text) for path, text in _files(
        view, "/lib/netplan/*.yaml", "/etc/netplan/*.yaml")}  # fmt: skip
    files = []
    for name in sorted(texts):
        path, text = texts[name]
        content = guest_yaml.load(text)
        if content is None:
            warnings.append(
                Finding(
                    "network_unreadable",
                    f"{printable(path)} in the guest is not the YAML of a netplan file: the cards that it configures "
                    "may have other names on KVM",
                    "Run `netplan generate` in the guest on VMware and fix what it reports, or bind the names by hand.",
                )
            )
        else:
            files.append((path, content))
    return netplan.interfaces(files)


def _systemd(view: View, suffix: str) -> list[tuple[str, str]]:
    """systemd's files of a kind in the order of their names; the first directory that has one of a name decides.

    One that is empty, or a link to /dev/null, turns that of the distribution off.
    """
    found: dict[str, tuple[str, str]] = {}
    for directory in _SYSTEMD:
        for path in _glob(view, f"{directory}/*.{suffix}"):
            found.setdefault(path.rpartition("/")[2], (path, view.read(path) or ""))
    return [found[name] for name in sorted(found)]


def _networks(view: View) -> list[tuple[str, str]]:
    """networkd's files; those of the distribution count where it runs."""
    runs = bool(view.g.glob_expand("/etc/systemd/system/*.wants/systemd-networkd.service"))
    return [(path, text) for path, text in _systemd(view, "network") if runs or path.startswith("/etc/")]


def _profiles(view: View) -> list[tuple[str, str]]:
    """NetworkManager's profiles; one in /etc takes the place of the distribution's of the same name."""
    found: dict[str, tuple[str, str]] = {}
    for path, text in _files(view, *_PROFILES):
        found.setdefault(path.rpartition("/")[2], (path, text))
    return list(found.values())


def _keyfiles(view: View) -> Iterator[Interface]:
    made = {keyfile.netdev(text) for _, text in _systemd(view, "netdev")}
    for path, text in _networks(view):
        for one in keyfile.networkd(text, path):
            # What the distribution brings is for containers and the like, unless it speaks of Ethernet cards.
            if one.name not in (made - {""}) and (path.startswith("/etc/") or _ETHERNET.match(one.name)):
                yield one
    for path, text in _profiles(view):
        yield from keyfile.networkmanager(text, path)


def _ifcfg(view: View) -> Iterator[Interface]:
    renames = any(view.g.is_file(f"{path}/60-net.rules", followsymlinks=True) for path in _RULES_DIRECTORIES)
    for path, text in _files(view, _REDHAT):
        yield from ifcfg.redhat(text, path, renames=renames)
    for path, text in _files(view, "/etc/sysconfig/network/ifcfg-*"):
        yield from ifcfg.suse(text, path)


def _others(view: View) -> Iterator[Interface]:
    for path, text in _files(view, *dhcpcd.PATHS):
        yield from dhcpcd.interfaces(text, path)
    for path, text in _files(view, *wicked.PATHS):
        yield from wicked.interfaces(text, path)
    for path, text in _files(view, scripts.NETCTL):
        yield from scripts.netctl(text, path)
    for path, text in _files(view, *scripts.OTHERS):
        yield from scripts.others(text, path)
    for path, text in _files(view, *cmdline.PATHS, *cmdline.DRACUT):
        yield from cmdline.interfaces(text, path)
    for path, text in _files(view, *cmdline.INITRAMFS_TOOLS):
        yield from cmdline.initramfs_tools(text, path)


def _matches(view: View, *, permanent: bool) -> Iterator[Match]:
    """All that goes by the place, the driver or a property of a card."""
    for path, text in (*_networks(view), *_systemd(view, "link")):
        yield from keyfile.matches(text, path, permanent=permanent)
    for path, text in _profiles(view):
        yield from keyfile.profile_matches(text, path)
    for path, text in _files(view, _REDHAT):
        yield from ifcfg.matches(text, path)
    for path, text in _files(view, "/etc/netplan/*.yaml"):
        if guest_yaml.load(text):
            yield from netplan.matches(text, path)


def _pins(view: View) -> list[udev.Pin]:
    rules = [pin for path, text in _files(view, "/etc/udev/rules.d/*.rules") for pin in udev.pins(text, path)]
    return rules + [pin for path, text in _systemd(view, "link") for pin in keyfile.link(text, path)]


def _leases(view: View) -> set[tuple[str, str]]:
    dhclient = (
        *("/var/lib/dhcp/*.leases", "/var/lib/dhclient/*.leases", "/var/lib/dhclient/*.lease"),
        "/var/lib/NetworkManager/dhclient-*.lease",
    )
    found = {pair for _, text in _files(view, *dhclient) for pair in leases.dhclient(text)}
    for path, text in _files(view, "/var/lib/NetworkManager/internal-*.lease"):
        found |= leases.internal(text, path)
    return found
