"""The drivers of the new machine in the initramfs of every kernel that the boot loader can choose.

One module for each family of tools that builds them; which one is decided by what is installed in the guest.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.change import Change
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.guest.linux.fixers.initramfs import dracut, initramfs_tools, mkinitrd
from hyper2kvmd.guest.linux.kernels import Bus, Image
from hyper2kvmd.guest.session import last_line, shell
from hyper2kvmd.run import tail


@dataclass(frozen=True)
class Builder:
    """A family of tools.

    plan: the edits after which every later build has the drivers as well.
    prepare: writes what only this build needs, and returns how to take it away again.
    commands: for each image, the shell command that builds it in place.
    """

    plan: Callable[[View, Sequence[str]], FixPlan]
    commands: Callable[[View, Sequence[Image], Bus], Mapping[str, str]]
    prepare: Callable[[View, Sequence[Image]], Callable[[], None]]
    remedy: str


BUILDERS = {
    "initramfs-tools": Builder(
        initramfs_tools.plan,
        initramfs_tools.commands,
        initramfs_tools.prepare,
        "Run `update-initramfs -u -k all` in the guest on VMware, fix the errors that it reports, and export it again "
        "(update_initramfs=no in /etc/initramfs-tools/update-initramfs.conf turns it off).",
    ),
    "dracut": Builder(
        dracut.plan,
        dracut.commands,
        lambda view, images: _nothing,
        "Run `dracut --force --regenerate-all` in the guest on VMware, fix the errors that it reports, and export it"
        " again.",
    ),
    "mkinitrd": Builder(
        mkinitrd.plan,
        mkinitrd.commands,
        lambda view, images: _nothing,
        "Run `mkinitrd` in the guest on VMware, fix the errors that it reports, and export it again.",
    ),
}


def _nothing() -> None:
    """Nothing to take away."""


def plan(view: View, images: Sequence[Image], bus: Bus) -> FixPlan:
    """Ask for the drivers that an image lacks, so that every later build puts them in as well."""
    if not any(image.lacks(bus) for image in images):
        return FixPlan()
    asked = dict.fromkeys(driver for image in images for driver in (*image.needs(bus), *bus.wanted))
    drivers = [driver for driver in asked if any(driver in image.depends for image in images)]
    return BUILDERS[view.inspection.initramfs].plan(view, drivers)


def check_space(g: Any, images: Sequence[Image], bus: Bus) -> None:
    """Raise MigrationError (guest_space) if the new images would not fit.

    An image that gets modules can be half as large again as the old one; one that only gets settings hardly grows. As
    many are built at once as there are CPUs: the old one of each stays until the new one is complete, and unpacked in
    /var/tmp that is some five times as large.
    """
    sizes = [(image, max(image.size * (15 if image.lacks(bus) else 11) // 10, 16 << 20)) for image in images]
    at_once = sorted(sizes, key=lambda one: one[1], reverse=True)[: g.get_smp()]
    wanted = [
        *((_place(image), size - image.size, 10) for image, size in sizes),
        *((_place(image), image.size, 10) for image, _ in at_once),
        *(("/var/tmp", 5 * size, 1100) for _, size in at_once),
    ]
    needed: dict[str, tuple[int, int]] = {}
    for path, more_bytes, more_inodes in wanted:
        bytes_so_far, inodes_so_far = needed.get(path, (0, 0))
        needed[path] = bytes_so_far + more_bytes, inodes_so_far + more_inodes
    for path, (bytes_needed, inodes_needed) in needed.items():
        free = g.statvfs(path)
        bytes_free = free["bavail"] * free["frsize"]
        if bytes_free < bytes_needed:
            raise MigrationError(
                Code.GUEST_SPACE,
                f"{path} in the guest has {bytes_free >> 20} MiB free and needs {bytes_needed >> 20} MiB "
                f"to rebuild {len(images)} initramfs images",
                f"Free some space under {path} on VMware (old kernels can be removed); export again.",
            )
        # btrfs and vfat have no fixed number of inodes and say 0
        if free["files"] and free["favail"] < inodes_needed:
            raise MigrationError(
                Code.GUEST_SPACE,
                f"{path} in the guest has {free['favail']} free inodes and needs {inodes_needed}",
                f"Delete files that nobody needs under {path} on VMware, and export again.",
            )


def _place(image: Image) -> str:
    """The directory of an image."""
    return (image.kernel.initrd or "").rpartition("/")[0]


def rebuild(view: View, images: Sequence[Image], bus: Bus) -> tuple[Change, ...]:
    """Build the images again with the guest's own tools. Raise MigrationError (fix_failed)."""
    g = view.g
    builder = BUILDERS[view.inspection.initramfs]
    take_away = builder.prepare(view, images)
    commands = builder.commands(view, images, bus)
    # As many at once as there are CPUs: building is thousands of short processes, one after the other.
    words = " ".join(shlex.quote(command) for command in commands.values())
    status, output = shell(g, f"printf '%s\\0' {words} | xargs -0 --max-procs={g.get_smp()} --max-args=1 sh -c")
    if status:
        raise MigrationError(
            Code.FIX_FAILED,
            f"the initramfs of {', '.join(image.kernel.version for image in images)} cannot be built in the guest: "
            f"{last_line(output)}",
            builder.remedy,
            tail=tail(output),
        )
    take_away()
    return tuple(
        Change(
            "initramfs",
            image.kernel.initrd or "",
            f"rebuilt with the {bus.name} drivers"
            if image.lacks(bus)
            else "rebuilt with the changed settings, of which it has copies",
            command=commands[image.kernel.version],
            evidence=tail(output),
        )
        for image in images
    )


def missing_in_kernels(images: Sequence[Image], bus: Bus) -> tuple[Finding, ...]:
    """A warning for each kernel that has no driver at all for devices that the domain may get."""
    return tuple(
        Finding(
            "driver_missing",
            f"the kernel {image.kernel.version} has no {driver}",
            "Choose another kernel in the boot menu if the guest needs it.",
        )
        for image in images
        for driver in bus.wanted
        if driver not in image.builtin and driver not in image.depends
    )
