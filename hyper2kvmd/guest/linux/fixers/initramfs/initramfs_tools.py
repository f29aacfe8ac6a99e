"""initramfs-tools, of Debian, Ubuntu and what comes from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.kernels import Bus, Image

# In /etc, where an administrator looks, and not as a file in /usr/share/initramfs-tools/modules.d, which is the
# packages' place. The file is nobody's conffile, so no upgrade asks questions about it.
MODULES = "/etc/initramfs-tools/modules"
BEGIN = "# hyper2kvmd: drivers of virtual devices"
END = "# hyper2kvmd: end"

# Both exist only while images are built, and never if that fails: the overlay is thrown away then.
_CONF = "/etc/initramfs-tools/conf.d/zz-hyper2kvmd"
_HOOK = "/etc/initramfs-tools/hooks/zz-hyper2kvmd"


def plan(view: View, drivers: Sequence[str]) -> FixPlan:
    """Name the drivers in the list of modules."""
    text = view.read(MODULES)
    new = with_block(text or "", drivers)
    if new == text:
        return FixPlan()
    return FixPlan((Edit("initramfs", MODULES, text, new, f"every initramfs gets {', '.join(drivers)}"),))


def with_block(text: str, drivers: Iterable[str]) -> str:
    """The list of modules with our marked block of those it does not name yet; an older block is replaced."""
    without = re.sub(rf"^{BEGIN}\n(?:.*\n)*?{END}\n?", "", text, flags=re.MULTILINE)
    named = {words[0].replace("-", "_") for line in without.split("\n") if (words := line.split())}
    missing = [driver for driver in drivers if driver not in named]
    if not missing:
        return text
    end = "" if not without or without.endswith("\n") else "\n"
    return without + end + "\n".join((BEGIN, *missing, END)) + "\n"


def commands(view: View, images: Sequence[Image], bus: Bus) -> Mapping[str, str]:
    """update-initramfs, which writes the new image beside the old one and renames it."""
    return {image.kernel.version: f"update-initramfs -u -k {image.kernel.version}" for image in images}


def prepare(view: View, images: Sequence[Image]) -> Callable[[], None]:
    """Where MODULES is `dep`, have the images made with the modules that they had: not for the appliance's hardware."""
    if not _built_for_its_hardware(view):
        return lambda: None
    view.g.write(_CONF, b"MODULES=list\n")
    view.g.write(_HOOK, _same_modules_hook(images).encode())
    view.g.chmod(0o755, _HOOK)

    def take_away() -> None:
        view.g.rm(_CONF)
        view.g.rm(_HOOK)

    return take_away


def _built_for_its_hardware(view: View) -> bool:
    value = "most"
    for path in ("/etc/initramfs-tools/initramfs.conf", *sorted(view.g.glob_expand("/etc/initramfs-tools/conf.d/*"))):
        for found in re.finditer(r"^[ \t]*MODULES=[\"']?(\w+)", view.read(path) or "", re.MULTILINE):
            value = found[1]
    return value == "dep"


def _same_modules_hook(images: Sequence[Image]) -> str:
    """A hook of initramfs-tools that puts into each image the modules that it had before.

    That is what the administrator's `dep` chose on the old hardware. `most` would take minutes without KVM and fill
    a small /boot; naming the modules in the configuration would load every one of them at each boot.
    """
    cases = "".join(
        f"{image.kernel.version}) manual_add_modules {' '.join(sorted(image.modules or ()))} ;;\n" for image in images
    )
    return (
        '#!/bin/sh\n[ "$1" != prereqs ] || exit 0\n. /usr/share/initramfs-tools/hook-functions\n'
        f'case "$version" in\n{cases}esac\n'
    )
