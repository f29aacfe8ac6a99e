"""LVM: lists and caches of devices by names that the new hardware changes, which would hide the root from the guest."""

from __future__ import annotations

import re

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.devices import changes_with_hardware
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.text import printable

FIXER = "lvm"
SYSTEM_DEVICES = "/etc/lvm/devices/system.devices"
CACHES = ("/etc/lvm/cache/.cache", "/etc/blkid.tab", "/etc/blkid/blkid.tab")
CONFIGS = ("/etc/lvm/lvm.conf", "/etc/lvm/lvmlocal.conf")
# Identifiers that come from what is on the device; all others come from the disk or its controller.
_STABLE_IDS = frozenset({"loop_file", "md_uuid", "crypt_uuid", "lvmlv_uuid"})
_FILTER = re.compile(
    r"^[ \t]*(?:devices/)?(?P<key>global_filter|filter)[ \t]*=[ \t]*\[?(?P<value>[^\]]*)", re.MULTILINE
)
_PATTERN = re.compile(r"\"([^\"\n]*)\"|'([^'\n]*)'")


def plan(view: View) -> FixPlan:
    """Remove what LVM makes anew; warn of filters, which are the administrator's."""
    edits = []
    text = view.read(SYSTEM_DEVICES)
    if text is not None and (changing := changing_ids(text)):
        # Without the file LVM looks at every device, as it did before there was one.
        names = ", ".join(map(printable, changing))
        summary = f"LVM looks at all devices, not only at {names}, which the new hardware calls otherwise"
        edits.append(Edit(FIXER, SYSTEM_DEVICES, text, None, summary))
    for path in CACHES:
        text = None if view.g.is_symlink(path) else view.read(path)
        if text is not None and any(map(changes_with_hardware, re.findall(r"/dev/[\w/:.+-]{1,200}", text))):
            edits.append(Edit(FIXER, path, text, None, "a cache of device names of the old hardware"))
    warnings = [
        Finding(
            "lvm_filter",
            f"{path} has {key} = [ {printable(value)} ], which hides virtio disks (/dev/vda) from LVM",
            f'Put "a|/dev/vd.*|" first in {key} and run `update-initramfs -u` or `dracut -f` in the guest on VMware, '
            "then export it again.",
        )
        for path in CONFIGS
        for key, value in hiding_filters(view.read(path) or "")
    ]
    return FixPlan(tuple(edits), warnings=tuple(warnings))


def changing_ids(text: str) -> list[str]:
    """The identifiers in a devices file of LVM that another controller changes."""
    found = []
    for line in text.split("\n"):
        fields = dict(word.partition("=")[::2] for word in line.split() if not line.lstrip().startswith("#"))
        if "IDTYPE" in fields and fields["IDTYPE"] not in _STABLE_IDS:
            found.append(fields.get("IDNAME", fields["IDTYPE"]))
    return found


def hiding_filters(text: str) -> list[tuple[str, str]]:
    """The filters in lvm.conf, by key and value, that reject /dev/vda. Patterns are looked at, never run."""
    without_comments = "\n".join(re.sub(r"#.*", "", line) for line in text.split("\n"))
    found = []
    for setting in _FILTER.finditer(without_comments):
        patterns = [one or other for one, other in _PATTERN.findall(setting["value"])]
        if _hides(patterns):
            found.append((setting["key"], ", ".join(f'"{pattern}"' for pattern in patterns)))
    return found


def _hides(patterns: list[str]) -> bool:
    """Whether the first pattern that fits /dev/vda rejects it; what no pattern fits is accepted."""
    for pattern in patterns:
        # A letter, a delimiter, the expression, and a delimiter.
        body = pattern[2:-1].removeprefix("^").removesuffix("$")
        fits_all = body in (".", ".*", "/", "/.*", ".*/.*", "/dev", "/dev/", "/dev/.*", "/dev/*")
        if fits_all or "vd" in body or re.search(r"\[[^\]]{0,50}v[^\]]{0,50}\]d", body):
            return pattern.startswith("r")
    return False
