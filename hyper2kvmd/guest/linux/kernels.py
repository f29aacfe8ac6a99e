"""The kernels that the guest can start, and whether each one finds its root on the new machine's disks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyper2kvmd.domain.model import DiskBus, Machine
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.change import Proof, decode
from hyper2kvmd.guest.linux import cpio, uki
from hyper2kvmd.guest.linux.menu import Menu
from hyper2kvmd.guest.linux.names import LVM, MDADM
from hyper2kvmd.guest.session import can_be_asked_for
from hyper2kvmd.run import Tools

MAX_IMAGE_BYTES = 1 << 30
MAX_DEPTH = 16  # of directories in the name of a kernel; a menu with more was made to keep us busy
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_~-]{0,100}")
# Images with microcode only, as grub-mkconfig knows them.
_EARLY = re.compile(r"ucode|microcode|-uc\.img$")
# Programs that find the root; an image that had one and lost it does not boot any more.
_ROOT_PROGRAMS = frozenset({"cryptsetup", "systemd-cryptsetup", "lvm", "mdadm", "btrfs"})
# Settings that are copied into an initramfs and may keep it from using the new disks.
_NAME_DISKS = frozenset(path.lstrip("/") for path in (*LVM, *MDADM))
# For kernels from before modules.builtin: what the kernel's own configuration calls the drivers.
_CONFIG = {
    "virtio_pci": "VIRTIO_PCI",
    "virtio_blk": "VIRTIO_BLK",
    "virtio_scsi": "SCSI_VIRTIO",
    "virtio_net": "VIRTIO_NET",
    "ahci": "SATA_AHCI",
    "ata_piix": "ATA_PIIX",
    "piix": "BLK_DEV_PIIX",
    "ide_disk": "BLK_DEV_IDEDISK",
    "sd_mod": "BLK_DEV_SD",
    "e1000": "E1000",
    "e1000e": "E1000E",
}


@dataclass(frozen=True)
class Bus:
    """The drivers for the disks of a machine, and for its cards.

    ways: sets of drivers of which any one is enough to find the root; the first is the better one. The `wanted` ones
    are for cards, for disks added later, and for guests that mount their root over the network.
    """

    name: str
    ways: tuple[tuple[str, ...], ...]
    wanted: tuple[str, ...]


VIRTIO = Bus("virtio", (("virtio_pci", "virtio_blk"),), ("virtio_scsi", "virtio_net"))
VIRTIO_SCSI = Bus("virtio-scsi", (("virtio_pci", "virtio_scsi", "sd_mod"),), ("virtio_blk", "virtio_net"))
SATA = Bus("SATA", (("ahci", "sd_mod"),), ("e1000e",))
# libata's driver, and that of the older IDE layer, which many kernels for the older chipset have built in.
IDE = Bus("IDE", (("ata_piix", "sd_mod"), ("piix", "ide_disk")), ("e1000",))
_OLD_CARDS = frozenset(("vmxnet3", "vmxnet", "e1000", "e1000e", "pcnet32"))
_BUSES: dict[DiskBus, Bus] = {"virtio": VIRTIO, "scsi": VIRTIO_SCSI, "sata": SATA, "ide": IDE}


def bus_of(machine: Machine, disks: int) -> Bus:
    """What a guest needs for so many disks of a machine."""
    bus = _BUSES[machine.disks]
    others = [_BUSES[other] for other in sorted(machine.buses(disks) - {machine.disks})]
    if not others:
        return bus
    more = [driver for other in others for driver in other.ways[0]]
    return Bus(
        " and ".join(one.name for one in (bus, *others)),
        tuple(tuple(dict.fromkeys((*way, *more))) for way in bus.ways),
        bus.wanted,
    )


@dataclass(frozen=True)
class Kernel:
    """A kernel and its initramfs if it has one.

    `entry` is the first place on the boot menu that starts it (an index into Menu.entries), None for one that no
    entry starts. A `rescue` image is made once, when the system is installed, and never again. A `sealed` one is in one
    file with its kernel, which only the guest's own tools can make (and sign) again.
    """

    version: str
    path: str
    initrd: str | None
    chosen_by_bootloader: bool
    entry: int | None = None
    rescue: bool = False
    sealed: bool = False

    @property
    def can_be_rebuilt(self) -> bool:
        """Whether its initramfs can be built again."""
        return self.initrd is not None and not self.rescue and not self.sealed


@dataclass(frozen=True)
class Image:
    """What one kernel has to boot with: its initramfs (None: none), the modules in it, and what is built in."""

    kernel: Kernel
    size: int
    modules: frozenset[str] | None
    builtin: frozenset[str]
    depends: Mapping[str, tuple[str, ...]]  # of each module of this kernel, on which others it depends
    files: frozenset[str] = frozenset()  # the names of all files in the initramfs
    texts: Mapping[str, str] = field(default_factory=dict)  # of those of its files that name disks
    options: str = ""  # the kernel's command line, where it is in the same file

    def has(self, driver: str) -> bool:
        """Whether the driver, and all it depends on, are there when the kernel looks for its root."""
        if driver in self.builtin:
            return True
        if self.modules is None or driver not in self.depends:
            return False
        return {driver, *self.depends[driver]} - self.builtin <= self.modules

    def needs(self, bus: Bus) -> tuple[str, ...]:
        """The drivers by which this kernel finds its root on `bus`: those it has, else those it could have."""
        for there in (self.has, lambda driver: self.has(driver) or driver in self.depends):
            for way in bus.ways:
                if all(map(there, way)):
                    return way
        return bus.ways[0]

    def lacks(self, bus: Bus) -> tuple[str, ...]:
        """The drivers that this kernel could have in its initramfs and does not.

        Those that are only wanted are no reason to touch an image that finds its root, unless it has a network card of
        the old machine: then it may need one before it does.
        """
        drivers = (*self.needs(bus), *bus.wanted)
        lacking = tuple(driver for driver in drivers if driver in self.depends and not self.has(driver))
        needed = set(lacking) & set(self.needs(bus)) or (self.modules or frozenset()) & _OLD_CARDS
        return lacking if needed else ()

    def can(self, bus: Bus, *, rebuilt: bool) -> bool:
        """Whether this kernel finds its root on `bus`: as it is, or once its initramfs is `rebuilt`."""
        possible = rebuilt and self.kernel.can_be_rebuilt
        return all(self.has(driver) or (possible and driver in self.depends) for driver in self.needs(bus))


def find(g: Any, menu: Menu | None, esp: str | None) -> tuple[Kernel, ...]:
    """The kernels on the boot menu, in its order, then those in /boot that are not on it.

    esp: where the EFI system partition is mounted, as some menus name files on it.
    """
    found: dict[str, Kernel] = {}
    for number, entry in enumerate(menu.entries if menu else ()):
        path = _file(g, entry.kernel, esp)
        if path and (sealed := _sealed(g, path)):
            said = sealed.version or path.rpartition("/")[2].removesuffix(".efi")
            found.setdefault(path, Kernel(said, path, path if sealed.initrd else None, True, number, sealed=True))
            continue
        version = _version(g, path) if path else None
        if path is None or version is None:
            continue
        images = [image for name in entry.initrds if not _EARLY.search(name) and (image := _file(g, name, esp))]
        # Beside its own there may be others, with tables of ACPI, or files of the administrator's.
        initrd = next((image for image in images if version in image), images[0] if images else None)
        rescue = "rescue" in path.rpartition("/")[2]
        # Only the first entry of a kernel counts: a second one has a copy of its image, or other options.
        found.setdefault(path, Kernel(version, path, initrd, True, number, rescue))
    # Some are links to /usr/lib/modules, and some of these point to a kernel that was removed.
    names = (name for name in sorted(g.glob_expand("/boot/vmlinuz-*")) if g.is_file(name, followsymlinks=True))
    others = [path for path in dict.fromkeys(str(g.realpath(name)) for name in names) if path not in found]
    rest = (Kernel(version, path, None, False) for path in others if (version := _version(g, path)))
    return (*found.values(), *rest)


def _file(g: Any, name: str, esp: str | None) -> str | None:
    """The file in the guest that a boot menu means; it names files relative to their file system, or subvolume."""
    parts = [part for part in name.split("/") if part] if can_be_asked_for(name) else []
    if len(parts) > MAX_DEPTH:
        return None
    roots = ("/boot", "", *([esp] if esp else []))
    for skipped in range(len(parts)):
        for root in roots:
            path = "/".join((root, *parts[skipped:]))
            if g.is_file(path, followsymlinks=True):
                return str(g.realpath(path))
    return None


def _sealed(g: Any, path: str) -> uki.Image | None:
    """What is in a unified kernel image; None for any other file."""
    return uki.read(lambda at, size: bytes(g.pread(path, size, at))) if path.endswith(".efi") else None


def _version(g: Any, path: str) -> str | None:
    """The version that a kernel says of itself (x86's boot protocol 2.00), or that its name has.

    None for what is no kernel, such as a memory test.
    """
    header: bytes = g.pread(path, 16, 0x200) if g.filesize(path) > 0x210 else b""
    if header[2:6] == b"HdrS":
        said = g.pread(path, 128, int.from_bytes(header[14:16], "little") + 0x200).partition(b"\0")[0].split()
        if said and VERSION.fullmatch(own := said[0].decode("ascii", "replace")):
            return str(own)
    version: str = path.rpartition("/")[2].partition("-")[2]
    if VERSION.fullmatch(version) is None or not g.is_dir(f"/lib/modules/{version}"):
        return None
    return version


def look(g: Any, kernels: Iterable[Kernel], tools: Tools, scratch: Path) -> tuple[Image, ...]:
    """Read what each kernel has now; images are downloaded to `scratch`, one at a time."""
    return tuple(_look(g, kernel, tools, scratch) for kernel in kernels)


def _look(g: Any, kernel: Kernel, tools: Tools, scratch: Path) -> Image:
    directory = f"/lib/modules/{kernel.version}"

    def lines(path: str) -> list[str]:
        return decode(g.read_file(path)).split("\n") if g.is_file(path, followsymlinks=True) else []

    builtin = module_names(lines(f"{directory}/modules.builtin"))
    config = set(lines(f"/boot/config-{kernel.version}"))
    builtin |= {driver for driver, symbol in _CONFIG.items() if f"CONFIG_{symbol}=y" in config}
    depends = dependencies(lines(f"{directory}/modules.dep"))
    if kernel.initrd is None:
        return Image(kernel, 0, None, builtin, depends)
    size = g.filesize(kernel.initrd)
    if size > MAX_IMAGE_BYTES:
        raise MigrationError(
            Code.FIX_UNPROVED,
            f"{kernel.initrd} in the guest has {size} bytes, more than the {MAX_IMAGE_BYTES} that are read",
            "Remove what makes it so large, or the kernel, on VMware, and export again.",
        )
    local = scratch / f"initrd-{kernel.entry}"
    sealed = _sealed(g, kernel.path) if kernel.sealed else None
    if sealed and sealed.initrd:
        g.download_offset(kernel.initrd, str(local), *sealed.initrd)
    else:
        g.download(kernel.initrd, str(local))
    try:
        inside = cpio.read(local, tools, _NAME_DISKS)
    finally:
        local.unlink()
        local.with_name(local.name + ".main").unlink(missing_ok=True)
    options = sealed.options if sealed else ""
    return Image(kernel, size, module_names(inside.names), builtin, depends, inside.names, inside.texts, options)


def module_names(paths: Iterable[str]) -> frozenset[str]:
    """The names of the modules among files: `kernel/drivers/block/virtio-blk.ko.xz` is `virtio_blk`."""
    return frozenset(name for path in paths if (name := _module_name(path)))


def dependencies(lines: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """modules.dep as names: each module, and all that has to be loaded before it."""
    found = {}
    for line in lines:
        path, colon, others = line.partition(":")
        if colon:
            found[_module_name(path)] = tuple(map(_module_name, others.split()))
    return found


def _module_name(path: str) -> str:
    found = re.fullmatch(r"(?:.*/)?([A-Za-z0-9_-]+)\.ko(?:\.(?:xz|zst|gz))?", path.strip())
    return found[1].replace("-", "_") if found else ""


def prove(before: Sequence[Image], after: Sequence[Image], bus: Bus) -> tuple[Proof, ...]:
    """For each kernel: that it has the drivers that it needs, and the programs that it had, when it looks for its root.

    before, after: the same kernels in the same order.
    """
    return tuple(
        proof
        for old, new in zip(before, after, strict=True)
        for proof in (*(_prove(new, driver) for driver in new.needs(bus)), *_prove_programs(old, new))
    )


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


def _prove_programs(old: Image, new: Image) -> tuple[Proof, ...]:
    """What unlocked or assembled the root before is still there."""
    had, has = (_ROOT_PROGRAMS & {path.rpartition("/")[2] for path in image.files} for image in (old, new))
    subject = new.kernel.initrd or new.kernel.path
    return tuple(
        Proof(
            subject,
            f"{new.kernel.version} still has {name}, which opened its root",
            name in has,
            f"the initramfs {'holds' if name in has else 'lacks'} {name}",
        )
        for name in sorted(had)
    )
