"""dracut, of RHEL and its clones from 6 on, Fedora, Amazon Linux, SLES from 12 on, and some Debian machines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.fixers.network.udev import OTHER_RULES, RULES
from hyper2kvmd.guest.linux.kernels import Bus, Image

# The number makes it one of the last that are read, and so the administrator can still come after it.
CONFIG = "/etc/dracut.conf.d/90-hyper2kvm.conf"
CRYPTTAB = "/etc/crypttab"
LINKS = "/etc/systemd/network/*.link"


def plan(view: View, drivers: Sequence[str]) -> FixPlan:
    """A drop-in that adds the drivers to every image, also where dracut builds for the hardware it sees."""
    text = view.read(CONFIG)
    # The spaces inside the quotes are needed: dracut puts the pieces from all files together as they are.
    new = f'# Written by hyper2kvmd: the drivers of virtual devices.\nadd_drivers+=" {" ".join(drivers)} "\n'
    if new == text:
        return FixPlan()
    return FixPlan((Edit("initramfs", CONFIG, text, new, f"every initramfs gets {', '.join(drivers)}"),))


def commands(view: View, images: Sequence[Image], bus: Bus) -> Mapping[str, str]:
    """dracut without looking at the hardware, which is the appliance's, and with the kernel modules it chose before.

    All the modules there are would take minutes without KVM, and fill a small /boot.
    """
    knows = view.g.sh("dracut --help 2>&1 || true")
    options = ["--force"]
    # Versions before 013 (RHEL 6) build for any hardware and have no such options.
    options += [o for o in ("--no-hostonly", "--no-hostonly-cmdline", "--mdadmconf", "--lvmconf") if o in knows]
    # An image for any hardware has udev's own rule for names, and would be the first to rename a card by it. Rules of
    # the guest's own are left out of it, where one for this hardware has them.
    rules = [path for path in (RULES, OTHER_RULES) if view.read(path) is not None]
    if names := [*view.g.glob_expand(LINKS), *(rules if "--no-hostonly" in options else ())]:
        options += ["--install", " ".join(names)]
    return {image.kernel.version: shlex.join(["dracut", *options, *_own(image, bus)]) for image in images}


def _own(image: Image, bus: Bus) -> list[str]:
    """The arguments for one image."""
    drivers = [driver for driver in (*image.needs(bus), *bus.wanted) if driver in image.depends]
    modules = sorted({*(image.modules or ()), *drivers} & {*image.depends})
    words = ["--drivers", " ".join(modules)] if image.modules else ["--add-drivers", " ".join(drivers)]
    # dracut leaves it out of an image for any hardware, and a guest whose kernel command line does not name the
    # encrypted root would not find it.
    if CRYPTTAB.lstrip("/") in image.files:
        words += ["--include", CRYPTTAB, CRYPTTAB]
    return [*words, image.kernel.initrd or "", image.kernel.version]
