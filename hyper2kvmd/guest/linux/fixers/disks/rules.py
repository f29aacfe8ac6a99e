"""Files of the guest that go by the kernel's name of a disk and that nobody can rewrite safely: a warning for each."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hyper2kvmd.domain.model import DiskBus
from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.linux.devices import changes_with_hardware
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.fixers.disks.target import DISK_NAMES
from hyper2kvmd.text import printable

# What a rule asks for of a disk, and what it does with one: it gives a name or rights.
_ASKS = re.compile(
    r"\b(?:KERNEL|KERNELS)==\"(?P<name>(?:sd|hd|xvd|vd|nvme|cciss|dasd)[^\"]*)\"|ENV\{(?:ID_SERIAL\w*|ID_PATH|ID_WWN|"
    r"DM_NAME)\}==\"(?P<id>[^\"]+)\""
)
_GIVES = re.compile(r"\b(?:SYMLINK|NAME|OWNER|GROUP|MODE|RUN|ENV\{[^}]*\})(?:\{\w+\})?\s*(?:\+|:)?=(?!=)")
_RULES = "/etc/udev/rules.d/*.rules"
_DISK = r"(?P<name>/dev/(?:sd|hd|xvd|nvme|disk/by-path/|disk/by-id/(?:scsi|ata|wwn|nvme|virtio))[^\s\"';]+)"
# Settings of Oracle's ASM and of raw devices, scripts that mount, maps of autofs, and DRBD's resources, each with what
# in it is a name of a disk.
_SETTINGS = (
    ("/etc/sysconfig/oracleasm", re.compile(r"(?m)^[ \t]*ORACLEASM_SCANORDER=[\"']?(?P<name>[^\"'\n]+)")),
    ("/etc/sysconfig/rawdevices", re.compile(r"(?m)^[ \t]*/dev/raw/\S+\s+(?P<name>/dev/\S+)")),
    *(
        (path, re.compile(rf"(?m)^[ \t]*(?:/\S{{1,40}}/)?(?:mount|swapon)[ \t](?:[^\n#]*[ \t=])?{_DISK}"))
        for path in ("/etc/rc.local", "/etc/rc.d/rc.local", "/etc/init.d/boot.local", "/etc/init.d/after.local")
    ),
    ("/etc/auto.*", re.compile(rf"(?m)^[^#\n]*[ \t]:{_DISK}")),
    ("/etc/drbd.d/*.res", re.compile(rf"(?m)^[^#\n]*\b(?:meta-)?disk[ \t]+\"?{_DISK}")),
)


def plan(view: View, bus: DiskBus) -> FixPlan:
    """Name the files, the lines and what they look for."""
    warnings = []
    new = DISK_NAMES[bus]
    for path, text in view.files(_RULES):
        for number, line in enumerate(text.replace("\\\n", "  ").split("\n"), start=1):
            found = None if line.lstrip().startswith("#") else _ASKS.search(line)
            if found and _GIVES.search(line):
                wanted = found["name"] or found["id"]
                if found["name"] and found["name"].startswith(new):
                    continue
                warnings.append(_warning(f"{path} line {number}", wanted, new))
                break
    seen: set[str] = set()  # Red Hat's rc.local has two names
    for glob, pattern in _SETTINGS:
        for path, text in view.files(glob):
            found = None if text in seen else pattern.search(text)
            seen.add(text)
            if found and not re.match(rf"(?:/dev/)?{new}", found["name"].split()[0] if found["name"].split() else ""):
                warnings.append(_warning(path, found["name"], new))
    return FixPlan(warnings=(*warnings, *_install_devices(view, new)))


def _install_devices(view: View, new: str) -> Iterator[Finding]:
    """Where updates of GRUB go: what its package on Debian asked when it was installed, and what YaST wrote."""
    package, question = ("grub-efi-amd64", "grub-efi") if view.inspection.firmware == "uefi" else ("grub-pc", "grub-pc")
    answer = re.compile(rf"(?m)^Name: {question}/install_devices\n(?:[^\n]+\n){{0,9}}?Value: (?P<name>/dev/[^\s,]+)")
    for path, pattern, remedy in (
        (
            "/var/cache/debconf/config.dat",
            answer,
            f"Run `dpkg-reconfigure {package}` in the guest, and choose the disk",
        ),
        ("/etc/default/grub_installdevice", re.compile(r"(?m)^(?P<name>/dev/\S+)"), "Write the new disk there"),
    ):
        found = pattern.search(view.read(path) or "")
        if found and changes_with_hardware(found["name"]) and not found["name"].startswith(f"/dev/{new}"):
            yield Finding(
                "grub_install_device",
                f"{path}: updates of GRUB in the guest install it to {printable(found['name'])}, a name that the old "
                "hardware gave: they will fail, and the guest starts without them",
                f"{remedy}, before the next update.",
            )


def _warning(where: str, wanted: str, new: str) -> Finding:
    return Finding(
        "disk_rule",
        f"{printable(where)} in the guest goes by the disk {printable(wanted)}, and the new disks are called {new}a, "
        f"{new}b, …: what it names, or gives rights to, will not be there",
        "Have it go by what is on the disk (/dev/disk/by-uuid, in a rule ENV{ID_FS_UUID} or ENV{ID_PART_ENTRY_UUID}), "
        "or by the new serial numbers, before the programs that need it are started.",
    )
