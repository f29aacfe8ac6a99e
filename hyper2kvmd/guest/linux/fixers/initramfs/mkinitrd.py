"""mkinitrd, of SLES up to 11 and RHEL up to 5: two programs of one name, told apart by SUSE's configuration file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.kernels import Bus, Image

SUSE = "/etc/sysconfig/kernel"
# A value in quotes may go on in the next line.
_MODULES = re.compile(
    r"^(?P<lead>[ \t]*INITRD_MODULES=)(?P<value>\"[^\"]*\"|'[^']*'|[^\s\"';]*(?=[\s;]|\Z))", re.MULTILINE
)


def plan(view: View, drivers: Sequence[str]) -> FixPlan:
    """SUSE's list of modules. RHEL's has none that could be edited safely: each build is told."""
    text = view.read(SUSE)
    if text is None or (new := with_modules(text, drivers)) == text:
        return FixPlan()
    return FixPlan((Edit("initramfs", SUSE, text, new, f"every initramfs gets {', '.join(drivers)}"),))


def with_modules(text: str, drivers: Sequence[str]) -> str:
    """INITRD_MODULES with the drivers that it does not name yet, and every other byte as it was."""

    def longer(found: re.Match[str]) -> str:
        words = [word for word in found["value"].strip("\"'").split() if word != "\\"]
        missing = [driver for driver in drivers if driver not in words]
        return f'{found["lead"]}"{" ".join([*words, *missing])}"' if missing else found[0]

    return _MODULES.sub(longer, text, count=1)


def commands(view: View, images: Sequence[Image], bus: Bus) -> Mapping[str, str]:
    """One call for each image; the root is named, as the one of the appliance is not the guest's."""
    # Red Hat has a file of this name too.
    suse = _MODULES.search(view.read(SUSE) or "") is not None
    # SUSE's makes the boot menu again when it is done, for the appliance's disks.
    no_menu = ["-B"] if suse and re.search(r"(?m)^\s*-B\b", view.g.sh("mkinitrd -h 2>&1 || true")) else []
    root = view.names.devices.get(view.inspection.root)
    device = f"/dev/disk/by-uuid/{root.uuid}" if root and root.uuid else view.inspection.root
    found = {}
    for image in images:
        drivers = [driver for driver in (*image.needs(bus), *bus.wanted) if driver in image.depends]
        kernel, initrd = image.kernel, image.kernel.initrd or ""
        if suse:
            modules = " ".join(sorted({*(image.modules or ()), *drivers} & {*image.depends}))
            words = ["mkinitrd", *no_menu, "-k", kernel.path, "-i", initrd, "-m", modules, "-d", device]
        else:
            words = ["mkinitrd", "-f", *(f"--with={driver}" for driver in drivers), initrd, kernel.version]
        found[kernel.version] = shlex.join(words)
    return found
