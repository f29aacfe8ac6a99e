"""What kernel command lines, dracut's and initramfs-tools' settings say of network cards: the network before the root.

Such a card must have its name in the initramfs already, and so is as much a card of the guest as any that a file in
/etc configures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hyper2kvmd.guest.linux.fixers.network.interface import Interface, card
from hyper2kvmd.text import mac_address

# Where a command line is, or is made from; in dracut's it is a value in quotes.
PATHS = (
    *("/etc/default/grub", "/etc/default/grub.d/*.cfg", "/etc/kernel/cmdline", "/usr/lib/kernel/cmdline"),
    *("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/boot/grub2/grubenv", "/boot/grub/grubenv"),
    *("/boot/efi/EFI/*/grub.cfg", "/boot/efi/EFI/*/grubenv"),
    *("/boot/loader/entries/*.conf", "/boot/efi/loader/entries/*.conf", "/efi/loader/entries/*.conf"),
    *("/boot/grub/menu.lst", "/boot/grub/grub.conf", "/boot/extlinux/extlinux.conf", "/boot/syslinux/syslinux.cfg"),
)
DRACUT = ("/etc/cmdline", "/etc/cmdline.d/*.conf", "/etc/dracut.conf", "/etc/dracut.conf.d/*.conf",
          "/usr/lib/dracut/dracut.conf.d/*.conf")  # fmt: skip
INITRAMFS_TOOLS = ("/etc/initramfs-tools/initramfs.conf", "/etc/initramfs-tools/conf.d/*")
_OPTION = re.compile(
    r"(?<![\w.-])(?P<key>ip|ifname|rd\.route|vlan|bond|bridge|team|bootdev)=(?P<value>[^\s\"'\\]{1,500})"
)
_METHODS = frozenset(
    ("none", "off", "dhcp", "on", "any", "dhcp6", "auto6", "either6", "link6", "ibft", "link-local", "both")
)
_SETTING = re.compile(r"^[ \t]*(?:export[ \t]+)?(?P<key>DEVICE|IP)=[\"']?(?P<value>[^\s\"'#]{0,200})", re.MULTILINE)


def interfaces(text: str, file: str) -> tuple[Interface, ...]:
    """The cards that the options in a file name; lines that are comments count for nothing."""
    lines = (line for line in text.split("\n") if not line.lstrip().startswith("#"))
    options = [(option["key"], option["value"]) for line in lines for option in _OPTION.finditer(line)]
    made = {value.partition(":")[0] for key, value in options if key in ("vlan", "bond", "bridge", "team")}
    named = (pair for key, value in options for pair in _cards(key, value))
    cards = ((card(name), mac) for name, mac in named if name not in made)
    return tuple(dict.fromkeys(Interface(file, name, mac, passing=True) for name, mac in cards if name))


def initramfs_tools(text: str, file: str) -> tuple[Interface, ...]:
    """The cards that a file of settings of initramfs-tools names: in DEVICE, and in IP as the kernel has it."""
    found: dict[Interface, None] = {}
    for setting in _SETTING.finditer(text):
        key, value = setting["key"], setting["value"]
        names = [value] if key == "DEVICE" else [name for name, _ in _cards("ip", value)]
        found |= dict.fromkeys(Interface(file, named, passing=True) for name in names if (named := card(name)))
    return tuple(found)


def _cards(key: str, value: str) -> Iterator[tuple[str, str | None]]:
    """The names in the value of an option, and the MAC address where it has one."""
    fields = _fields(value)
    match key:
        case "ip":
            if len(fields) > 1 and fields[1] in _METHODS:
                yield fields[0], None  # ip=ens192:dhcp
            elif len(fields) > 5:
                yield fields[5], None  # client:peer:gateway:netmask:hostname:ens192:none
        case "ifname":
            name, _, address = value.partition(":")
            yield name, mac_address(address)
        case "rd.route":
            if len(fields) > 2:
                yield fields[2], None  # network:gateway:ens192
        case "vlan":
            if len(fields) > 1:
                yield fields[1], None
        case "bond" | "bridge" | "team":
            for name in fields[1].split(",") if len(fields) > 1 else ():
                yield name, None
        case _:
            if mac_address(value) is None:
                yield value, None


def _fields(value: str) -> list[str]:
    """What colons part; not those within the brackets of an IPv6 address."""
    fields = [""]
    inside = False
    for character in value:
        inside = (inside or character == "[") and character != "]"
        if character == ":" and not inside:
            fields.append("")
        else:
            fields[-1] += character
    return fields
