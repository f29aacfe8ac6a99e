"""Every place in the guest that names a device, and what that tells about which device is which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.linux import fstab
from hyper2kvmd.guest.linux.devices import Device, Known, Names, changes_with_hardware, work_out
from hyper2kvmd.guest.linux.menu import Menu
from hyper2kvmd.guest.mounts import NEEDED
from hyper2kvmd.text import printable

Read = Callable[[str], str | None]
Glob = Callable[[str], Sequence[str]]

UNITS = ("/etc/systemd/system/*.mount", "/etc/systemd/system/*.swap")
# What a menu is made from the next time, by the kind of its text.
MENU_DEFAULTS = (
    ("/etc/default/grub", "grub-defaults"),
    ("/etc/default/grub.d/*.cfg", "grub-defaults"),
    ("/etc/kernel/cmdline", "cmdline"),
    ("/etc/sysconfig/bootloader", "suse"),
    ("/etc/default/extlinux", "extlinux-defaults"),
    ("/etc/update-extlinux.conf", "extlinux-defaults"),
    ("/etc/dracut.conf.d/*.conf", "dracut"),
)
# Settings that are copied into an initramfs, too.
LVM = ("/etc/lvm/lvm.conf", "/etc/lvm/lvmlocal.conf")
MDADM = ("/etc/mdadm.conf", "/etc/mdadm/mdadm.conf")
_OTHERS = ("/etc/crypttab", *UNITS, *(pattern for pattern, _ in MENU_DEFAULTS), *MDADM,
           "/etc/initramfs-tools/initramfs.conf", "/etc/initramfs-tools/conf.d/*")  # fmt: skip
_DEVICE = re.compile(r"(?<![\w/])/dev/(?:disk/by-path/[^\s\"',;]{1,200}|[^\s\"',;:\[\]*?]{1,200})")
# Drives for CDs, whose name on an IDE controller is like that of a disk.
_OPTICAL = frozenset(("iso9660", "udf"))
_OPTICAL_PLACE = re.compile(r"/(?:media/|mnt/)?(?:cd|dvd)[\w-]{0,20}/?")
_FILE_LIMIT = 200  # of one kind; a guest with more was made to keep us busy


def files(read: Read, glob: Glob, *patterns: str) -> Iterator[tuple[str, str]]:
    """Path and text of each file that matches."""
    for pattern in patterns:
        for path in sorted(glob(pattern))[:_FILE_LIMIT] if "*" in pattern else [pattern]:
            if (text := read(path)) is not None:
                yield path, text


def known(
    read: Read, glob: Glob, menu: Menu | None, disks: Sequence[str], devices: Mapping[str, Device], root: str
) -> Known:
    """Which device each name in the guest is. root: the device of the root, which was found by looking."""
    entries = fstab.entries(read(fstab.PATH) or "")
    used = [entry.spec for entry in entries if not _is_optical(entry)]
    used += [value for entry in entries for option in entry.options for value in _DEVICE.findall(option)]
    texts = [text for _, text in files(read, glob, *_OTHERS)]
    texts += [file.text for file in menu.files] if menu else []
    for text in texts:
        lines = (line for line in text.split("\n") if not line.lstrip().startswith("#"))
        used += [spec for line in lines for spec in _DEVICE.findall(line)]
    named = [entry.spec for entry in entries if entry.where == "/"]
    if menu and menu.default is not None:
        named.append(menu.entries[menu.default].option("root"))
    own = next(filter(changes_with_hardware, named), None)
    device = devices.get(root)
    by_content = Names(devices, {})
    taken = {one.name for entry in entries for one in by_content.all(entry.spec)}
    types = {entry.spec: entry.type for entry in entries if "noauto" not in entry.options and entry.where != "/"}
    needed = [entry.spec for entry in entries if entry.where in NEEDED - {"/"} and "noauto" not in entry.options]
    return work_out(disks, devices, used, (own, device.disk) if own and device else None, types, taken, needed)


def _is_optical(entry: fstab.Entry) -> bool:
    """Whether a line is for a drive of CDs: `/dev/hdc /media/cdrom0 udf,iso9660 user,noauto`."""
    by_type = bool(_OPTICAL & set(entry.type.split(",")))
    return by_type or (entry.type == "auto" and bool(_OPTICAL_PLACE.fullmatch(entry.where)))


def disk_order(spec: str, root: str) -> Finding:
    """The warning that the disks are not in the order that the guest's names say."""
    return Finding(
        "disk_order",
        f"the guest calls its root {printable(spec)}, but its root is {root} here: the disks are not in the guest's "
        "order, and device names of disks that look the same are not translated",
        "List the disks in the manifest in the order of their controller slots.",
        "disks",
    )
