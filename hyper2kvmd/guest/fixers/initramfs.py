"""initramfs-tools: the virtio drivers in the initramfs of every kernel that the boot loader can choose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest import cpio
from hyper2kvmd.guest.change import Change, Edit, Proof, decode, printable
from hyper2kvmd.guest.fixers import Plan, View
from hyper2kvmd.guest.inspect import Kernel
from hyper2kvmd.run import Tools, tail

# Without the first two the root file system is not found; the others are for disks and cards added later, and for
# guests that mount their root over the network.
NEEDED = ("virtio_pci", "virtio_blk")
WANTED = ("virtio_scsi", "virtio_net")

# In /etc, where an administrator looks, and not as a file in /usr/share/initramfs-tools/modules.d, which is the
# packages' place. The file is nobody's conffile, so no upgrade asks questions about it.
MODULES = "/etc/initramfs-tools/modules"
BEGIN = "# hyper2kvmd: drivers of virtio devices"
END = "# hyper2kvmd: end"

MAX_IMAGE_BYTES = 1 << 30
# Both exist only while images are built, and never if that fails: the overlay is thrown away then.
_CONF = "/etc/initramfs-tools/conf.d/zz-hyper2kvmd"
_HOOK = "/etc/initramfs-tools/hooks/zz-hyper2kvmd"


@dataclass(frozen=True)
class Image:
    """What one kernel has to boot with: its initramfs (None: none), the modules in it, and what is built in."""

    kernel: Kernel
    size: int
    modules: frozenset[str] | None
    builtin: frozenset[str]
    depends: Mapping[str, tuple[str, ...]]  # of each module of this kernel, on which others it depends

    def has(self, driver: str) -> bool:
        """Whether the driver, and all it depends on, are there when the kernel looks for its root."""
        if driver in self.builtin:
            return True
        if self.modules is None or driver not in self.depends:
            return False
        return {driver, *self.depends[driver]} - self.builtin <= self.modules

    def lacks(self) -> tuple[str, ...]:
        """The drivers that this kernel could have in its initramfs and does not."""
        return tuple(driver for driver in (*NEEDED, *WANTED) if driver in self.depends and not self.has(driver))


def look(view: View, tools: Tools, scratch: Path) -> tuple[Image, ...]:
    """Read what every kernel that can be chosen has now; images are downloaded to `scratch`, one at a time."""
    return tuple(
        _look(view, kernel, tools, scratch) for kernel in view.inspection.kernels if kernel.chosen_by_bootloader
    )


def plan(view: View, images: Sequence[Image]) -> Plan:
    """Ask for the drivers that an image lacks, so that every later update-initramfs puts them in as well."""
    if not any(image.lacks() for image in images):
        return Plan()
    drivers = [d for d in (*NEEDED, *WANTED) if any(d in image.depends for image in images)]
    text = view.read(MODULES)
    new = with_block(text or "", drivers)
    if new == text:
        return Plan()
    return Plan((Edit("initramfs", MODULES, text, new, f"every initramfs gets {', '.join(drivers)}"),))


def with_block(text: str, drivers: Iterable[str]) -> str:
    """The list of modules with our marked block of those it does not name yet; an older block is replaced."""
    without = re.sub(rf"^{BEGIN}\n(?:.*\n)*?{END}\n?", "", text, flags=re.MULTILINE)
    named = {words[0].replace("-", "_") for line in without.split("\n") if (words := line.split())}
    missing = [driver for driver in drivers if driver not in named]
    if not missing:
        return text
    end = "" if not without or without.endswith("\n") else "\n"
    return without + end + "\n".join((BEGIN, *missing, END)) + "\n"


def check_space(g: Any, images: Sequence[Image]) -> None:
    """Raise MigrationError (guest_space) if the new images, all at once, would not fit.

    An image can be half as large again as the old one (it gets modules), and the old one stays until the new one
    is complete; unpacked in /var/tmp it is some five times as large.
    """
    new = sum(max(image.size * 3 // 2, 16 << 20) for image in images)
    for path, bytes_needed, inodes_needed in (("/boot", new, 10), ("/var/tmp", 5 * new, 100 + 1000 * len(images))):
        free = g.statvfs(path)
        bytes_free = free["bavail"] * free["frsize"]
        if bytes_free < bytes_needed:
            raise MigrationError(
                Code.GUEST_SPACE,
                f"{path} in the guest has {bytes_free >> 20} MiB free and needs {bytes_needed >> 20} MiB "
                f"to rebuild {len(images)} initramfs images",
                f"Free some space under {path} on VMware (`apt-get autoremove` removes old kernels); export again.",
            )
        # btrfs and vfat have no fixed number of inodes and say 0
        if free["files"] and free["favail"] < inodes_needed:
            raise MigrationError(
                Code.GUEST_SPACE,
                f"{path} in the guest has {free['favail']} free inodes and needs {inodes_needed}",
                f"Delete files that nobody needs under {path} on VMware, and export again.",
            )


def rebuild(view: View, images: Sequence[Image]) -> tuple[Change, ...]:
    """Build the images anew with the guest's own tools. Raise MigrationError (fix_failed)."""
    g = view.g
    hardware = _built_for_its_hardware(view)
    if hardware:
        g.write(_CONF, b"MODULES=list\n")
        g.write(_HOOK, _same_modules_hook(images).encode())
        g.chmod(0o755, _HOOK)
    versions = [image.kernel.version for image in images]
    # As many at once as there are CPUs: mkinitramfs is thousands of short processes, one after the other.
    command = f"xargs --max-procs={g.get_smp()} --max-args=1 update-initramfs -u -k"
    output = g.sh(f"printf '%s\\n' {' '.join(versions)} | {command} 2>&1; echo \"status $?\"")
    lines = output.strip().split("\n")
    if lines[-1] != "status 0":
        raise MigrationError(
            Code.FIX_FAILED,
            f"update-initramfs failed in the guest for {', '.join(versions)}: {printable((lines[-2:] or [''])[0])}",
            "Run `update-initramfs -u -k all` in the guest on VMware, mend what it says, and export it again.",
            tail=tail("\n".join(map(printable, lines))),
        )
    if hardware:
        g.rm(_CONF)
        g.rm(_HOOK)
    said = tail("\n".join(printable(line) for line in lines[:-1] if line.strip()))
    return tuple(
        Change(
            "initramfs",
            image.kernel.initrd or "",
            "built anew" + (", with the modules it had and " if hardware else " with ") + "the virtio drivers",
            command=f"update-initramfs -u -k {image.kernel.version}",
            evidence=said,
        )
        for image in images
    )


def prove(images: Sequence[Image]) -> tuple[Proof, ...]:
    """For each kernel and driver: whether it, with all it depends on, is in the initramfs or built in."""
    return tuple(_prove(image, driver) for image in images for driver in NEEDED)


def _prove(image: Image, driver: str) -> Proof:
    subject = image.kernel.initrd or image.kernel.path
    claim = f"{image.kernel.version} has {driver} when it looks for its root"
    if driver in image.builtin:
        return Proof(subject, claim, True, "built into the kernel")
    if driver not in image.depends:
        return Proof(subject, claim, False, f"this kernel has no {driver}")
    if image.modules is None:
        return Proof(subject, claim, False, "there is no initramfs")
    needed = (driver, *image.depends[driver])
    absent = [name for name in needed if name not in image.builtin and name not in image.modules]
    if absent:
        return Proof(subject, claim, False, f"the initramfs lacks {', '.join(absent)}")
    return Proof(subject, claim, True, f"the initramfs holds {', '.join(n for n in needed if n in image.modules)}")


def _look(view: View, kernel: Kernel, tools: Tools, scratch: Path) -> Image:
    g, directory = view.g, f"/lib/modules/{kernel.version}"
    builtin = view.g.read_file(f"{directory}/modules.builtin") if g.is_file(f"{directory}/modules.builtin") else b""
    dep = g.read_file(f"{directory}/modules.dep") if g.is_file(f"{directory}/modules.dep") else b""
    size, modules = 0, None
    if kernel.initrd is not None:
        size = g.filesize(kernel.initrd)
        if size > MAX_IMAGE_BYTES:
            raise MigrationError(
                Code.FIX_UNPROVED,
                f"{kernel.initrd} in the guest has {size} bytes, more than the {MAX_IMAGE_BYTES} that are read",
                "Remove what makes it so large, or the kernel, on VMware, and export again.",
            )
        local = scratch / f"initrd-{kernel.version}"
        g.download(kernel.initrd, str(local))
        try:
            modules = module_names(cpio.file_names(local, tools))
        finally:
            local.unlink()
            local.with_name(local.name + ".main").unlink(missing_ok=True)
    return Image(kernel, size, modules, module_names(decode(builtin).split("\n")), dependencies(decode(dep)))


def module_names(paths: Iterable[str]) -> frozenset[str]:
    """The names of the modules among files: `kernel/drivers/block/virtio-blk.ko.xz` is `virtio_blk`."""
    return frozenset(name for path in paths if (name := _module_name(path)))


def dependencies(text: str) -> dict[str, tuple[str, ...]]:
    """modules.dep as names: each module, and all that has to be loaded before it."""
    found = {}
    for line in text.split("\n"):
        path, colon, others = line.partition(":")
        if colon:
            found[_module_name(path)] = tuple(map(_module_name, others.split()))
    return found


def _module_name(path: str) -> str:
    found = re.fullmatch(r"(?:.*/)?([A-Za-z0-9_-]+)\.ko(?:\.(?:xz|zst|gz))?", path.strip())
    return found[1].replace("-", "_") if found else ""


def _built_for_its_hardware(view: View) -> bool:
    """Whether MODULES is `dep`: the image would be made for the appliance's hardware, not for the guest's."""
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


def missing_in_kernels(images: Sequence[Image]) -> tuple[Finding, ...]:
    """A warning for each kernel that has no driver at all for devices that the domain may get."""
    return tuple(
        Finding(
            "driver_missing",
            f"the kernel {image.kernel.version} has no {driver}",
            "Choose another kernel in the boot menu if the guest needs it.",
        )
        for image in images
        for driver in WANTED
        if driver not in image.builtin and driver not in image.depends
    )
