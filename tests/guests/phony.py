"""Guests of families that cannot be built here: file trees of their real layout, for everything short of booting.

The files of a family lie in `tests/data/families`. Its kernels and initramfs images are made here: empty files under
the real names. Its programs are shell scripts, for which busybox does the work; they write down how they were called.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
import struct
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tests import DATA
from tests.cache import cached
from tests.guests.rootfs import run

TREES = DATA / "families"
BUSYBOX = Path("/usr/bin/busybox")
# Not busybox's, for its shell prefers its own applets to the programs on PATH, and its xargs has no long options.
HOST_PROGRAMS = {"bin/sh": Path("/usr/bin/dash"), "usr/bin/xargs": Path("/usr/bin/xargs")}
APPLETS = (
    *("awk", "cat", "chmod", "cp", "cpio", "dirname", "find", "grep", "gzip", "ln", "ls", "mkdir", "mktemp", "mv"),
    *("printf", "rm", "sed", "sort", "touch", "tr", "true"),
)
RECORD = "/var/log/recorded"  # every call of a guest's program, one on a line, its words separated by tabs

MIB = 1 << 20
SECTORS = MIB // 512
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
LVM = "E6D6D379-F507-44C2-A23C-238F2A3DF928"
SWAP = "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F"

# Where kernels keep a driver, and what has to be loaded before it.
_RING = ("virtio_ring", "virtio")
_SPI = ("mptscsih", "mptbase", "scsi_transport_spi")
DRIVERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "virtio": ("virtio", ()),
    "virtio_ring": ("virtio", ("virtio",)),
    "virtio_pci": ("virtio", _RING),
    "virtio_blk": ("block", _RING),
    "virtio_scsi": ("scsi", _RING),
    "virtio_net": ("net", _RING),
    "libata": ("ata", ()),
    "libahci": ("ata", ("libata",)),
    "ahci": ("ata", ("libahci", "libata")),
    "sd_mod": ("scsi", ()),
    "e1000e": ("net/ethernet/intel/e1000e", ()),
    "vmxnet3": ("net/vmxnet3", ()),
    "vmw_pvscsi": ("scsi", ()),
    "scsi_transport_spi": ("scsi", ()),
    "mptbase": ("message/fusion", ()),
    "mptscsih": ("message/fusion", ("mptbase",)),
    "mptspi": ("message/fusion", _SPI),
}
VIRTIO = ("virtio", "virtio_ring", "virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net")
# What an image has that was built on VMware, for VMware
VMWARE = ("mptspi", *_SPI, "vmw_pvscsi", "sd_mod", "vmxnet3")


@dataclass(frozen=True)
class Kernel:
    """A kernel and its modules.

    name: of the file in /boot, and `image` that of its initramfs. header: whether it says its version itself, where
    x86's boot protocol has it. builtin, absent: drivers that are no modules.
    """

    version: str
    name: str
    image: str
    suffix: str = ".ko.xz"
    builtin: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    header: bool = True
    pack: Literal["gzip", "xz", "zstd"] = "gzip"
    microcode: bool = True

    def modules(self) -> dict[str, tuple[str, ...]]:
        """The path of each module below /lib/modules/<version>, and those that it depends on."""
        out = {*self.builtin, *self.absent}
        paths = {name: f"kernel/drivers/{place}/{name}{self.suffix}" for name, (place, _) in DRIVERS.items()}
        return {
            paths[name]: tuple(paths[other] for other in needed if other not in out)
            for name, (_, needed) in DRIVERS.items()
            if name not in out
        }


@dataclass(frozen=True)
class Volume:
    """A partition, or a logical volume in the group that its partition is. size: in MiB; kind: as the table has it."""

    size: int
    kind: str
    fstype: str = ""
    point: str = ""
    label: str = ""
    inside: tuple[Volume, ...] = ()


@dataclass(frozen=True)
class Family:
    """A guest of one family.

    tree: the directory with its files. programs: from paths in the guest to scripts. contents: the files, other than
    modules, in its initramfs images. flat: modules lie in /lib of an image. labels: whether its files have SELinux's.
    """

    name: str
    tree: str
    table: Literal["gpt", "mbr"]
    volumes: tuple[Volume, ...]
    kernels: tuple[Kernel, ...]
    programs: Mapping[str, str]
    contents: tuple[str, ...]
    options: tuple[str, ...] = ()
    merged: bool = True  # /bin is /usr/bin, and so on
    group: str = ""  # the name of the volume group
    subvolumes: tuple[str, ...] = ()  # btrfs: the first is the root
    loaders: tuple[str, ...] = ()  # programs on the ESP
    hybrid: bool = False  # GRUB is in the boot sector although there is an ESP
    flat: bool = False
    labels: bool = False
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Disk:
    """A family's disk, raw, and the UUIDs by the names that its files have for them, such as @sda1@."""

    path: Path
    ids: Mapping[str, str]

    def text(self, template: str) -> str:
        """A text with the UUIDs in it."""
        for name, value in self.ids.items():
            template = template.replace(name, value)
        return template


def disk(name: str) -> Disk:
    """The disk of a family, which is kept in the cache: nobody may write to it.

    It is made with others, for one appliance makes them all; but those that `make test` needs do not wait for the rest.
    """
    kind = "quick" if name in QUICK else "rest"
    families = [family for family in FAMILIES if (family.name in QUICK) == (kind == "quick")]
    sha = hashlib.sha256(Path(__file__).read_bytes())
    sources = {path for tree in ("programs", *(family.tree for family in families)) for path in _files(tree)}
    for path in sorted({*sources, BUSYBOX, *HOST_PROGRAMS.values()}):
        place = path.relative_to(TREES) if path.is_relative_to(TREES) else path  # the same for all checkouts
        sha.update(f"{place}\0{path.readlink() if path.is_symlink() else ''}\0".encode() + path.read_bytes())

    def make(into: Path) -> None:
        (into / "ids.json").write_text(json.dumps(build(families, into)))

    made = cached("families", kind, sha.hexdigest()[:12], make)
    return Disk(made / f"{name}.raw", json.loads((made / "ids.json").read_text())[name])


def _files(tree: str) -> Iterator[Path]:
    return (path for path in (TREES / tree).rglob("*") if path.is_file())


def build(families: Sequence[Family], directory: Path) -> dict[str, dict[str, str]]:
    """Make the disks of all families in one appliance, and return their UUIDs."""
    import guestfs

    paths = [directory / f"{family.name}.raw" for family in families]
    for family, path in zip(families, paths, strict=True):
        _partition(family, path)
    g = guestfs.GuestFS(python_return_dict=True)
    try:
        g.set_backend("direct")
        g.set_backend_settings(["force_tcg"])
        g.set_memsize(1024)
        for path in paths:
            g.add_drive_opts(str(path), format="raw", cachemode="unsafe")
        g.launch()
        found = [_make_disk(g, device, family) for device, family in zip(g.list_devices(), families, strict=True)]
        g.shutdown()
    finally:
        g.close()
    return {family.name: ids for family, ids in zip(families, found, strict=True)}


def _partition(family: Family, path: Path) -> None:
    """Make a raw disk with the partitions of a family; on the host, as the appliance takes a second for each."""
    with path.open("wb") as image:
        image.truncate((sum(volume.size for volume in family.volumes) + 2) * MIB)
    start = SECTORS
    options: list[str] = []
    table = bytearray(64)
    for number, volume in enumerate(family.volumes, start=1):
        size = volume.size * SECTORS
        options += [f"--new={number}:{start}:{start + size - 1}", f"--typecode={number}:{volume.kind}"]
        options += [f"--partition-guid={number}:{_part_uuid(family, number)}"]
        if family.table == "mbr":
            entry = (0x80 if number == 1 else 0, 0, 0, 0, int(volume.kind, 16), 0, 0, 0, start, size)
            struct.pack_into("<8B2I", table, 16 * (number - 1), *entry)
        start += size
    if family.table == "gpt":
        run("sgdisk", *options, path)
    with path.open("r+b") as image:
        if family.table == "mbr":
            image.seek(0x1BE)
            image.write(table + b"\x55\xaa")
        if not any(volume.kind == ESP for volume in family.volumes) or family.hybrid:
            image.seek(0x180)  # where GRUB's boot sector says what it is
            image.write(b"GRUB \0Geom\0Hard Disk\0Read\0 Error\r\n\0")


def _part_uuid(family: Family, number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{number}.{family.name}"))


def _make_disk(g: Any, disk: str, family: Family) -> dict[str, str]:
    """Make the file systems, mount them and fill them; return the UUIDs."""
    made: list[tuple[str, Volume]] = []
    ids = {f"@part-sda{number}@": _part_uuid(family, number) for number, _ in enumerate(family.volumes, start=1)}
    for number, volume in enumerate(family.volumes, start=1):
        if volume.inside:
            g.pvcreate(f"{disk}{number}")
            g.vgcreate(family.group, [f"{disk}{number}"])
            for logical in volume.inside:
                g.lvcreate(logical.label, family.group, logical.size)
                made.append((f"/dev/{family.group}/{logical.label}", logical))
        else:
            made.append((f"{disk}{number}", volume))
    for device, volume in made:
        if volume.fstype == "swap":
            g.mkswap(device, **({"label": volume.label} if volume.label else {}))
        elif volume.fstype:
            g.mkfs(volume.fstype, device, **({"label": volume.label} if volume.label and not family.group else {}))
        if volume.fstype and device.startswith(disk):
            ids[f"@sda{device.removeprefix(disk)}@"] = g.vfs_uuid(device)
    _mount(g, family, sorted(((v.point, device) for device, v in made if v.point), key=lambda pair: len(pair[0])))
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        labelled = _write_tree(Path(file.name), family, Disk(Path(), ids))
        g.tar_in(file.name, "/")
    if family.labels:
        for path in labelled:
            label = "system_u:object_r:boot_t:s0" if path.startswith("/boot") else "system_u:object_r:etc_t:s0"
            g.lsetxattr("security.selinux", label, len(label), path)
    g.umount_all()
    if family.group:
        g.vg_activate_all(False)
    return ids


def _mount(g: Any, family: Family, points: Iterable[tuple[str, str]]) -> None:
    for point, device in points:
        if point != "/":
            g.mkdir_p(point)
        g.mount(device, point)
        if point == "/" and family.subvolumes:
            # Every subvolume is named by its path, and the first is the one that boots.
            root, *others = family.subvolumes
            for subvolume in sorted(family.subvolumes, key=len):
                g.mkdir_p(f"/{subvolume}".rpartition("/")[0] or "/")
                g.btrfs_subvolume_create(f"/{subvolume}")
            number = next(v["btrfssubvolume_id"] for v in g.btrfs_subvolume_list("/")
                          if v["btrfssubvolume_path"] == root)  # fmt: skip
            g.btrfs_subvolume_set_default(number, "/")
            g.umount_all()
            g.mount(f"btrfsvol:{device}/{root}", "/")
            for subvolume in others:
                where = "/" + subvolume.removeprefix("@").lstrip("/")
                if where != "/":
                    g.mkdir_p(where)
                    g.mount(f"btrfsvol:{device}/{subvolume}", where)


def _write_tree(archive: Path, family: Family, disk: Disk) -> list[str]:
    """Write all files of the guest into a tar file, and return the paths that may have labels."""
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    tree = TREES / family.tree
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if path.is_symlink():
            links[name] = str(path.readlink())
        elif path.is_file():
            text = disk.text(path.read_text())
            # GRUB demands its fixed size.
            files[name] = text.encode().ljust(1024, b"#") if path.name == "grubenv" else text.encode()
    files |= {name: disk.text(text).encode() for name, text in family.extra.items()}
    if family.merged:
        links |= {name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")}
    prefix = "usr/" if family.merged else ""
    files[f"{prefix}bin/busybox"] = BUSYBOX.read_bytes()
    links |= {f"{prefix}bin/{applet}": "busybox" for applet in APPLETS}
    for target, program in (*HOST_PROGRAMS.items(), *_libraries(HOST_PROGRAMS.values())):
        files[target if target.startswith("usr/") else f"{prefix}{target}"] = program.read_bytes()
    for target, script in family.programs.items():
        files[target] = (TREES / "programs" / script).read_bytes()
    files["usr/share/phony/common.sh"] = (TREES / "programs" / "common.sh").read_bytes()
    files["usr/share/phony/contents"] = "".join(f"{name}\n" for name in family.contents).encode()
    files["usr/share/phony/dracut-options"] = "".join(f"  {option}\n" for option in family.options).encode()
    files["usr/share/phony/mkinitrd-options"] = files["usr/share/phony/dracut-options"]
    files["etc/hostname"] = b"web01\n"
    files["var/log/recorded"] = b""
    directories = ["dev", "proc", "sys", "root", "tmp", "var/tmp", "var/lib/rpm", "etc/dracut.conf.d"]
    directories += ["etc/systemd/network", "etc/udev/rules.d"] if family.merged else []
    for kernel in family.kernels:
        files |= _kernel(kernel, family)
    files |= {f"boot/efi/{name}": b"MZ" + name.encode() for name in family.loaders}
    with tarfile.open(archive, "w") as tar:
        for name in directories:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o755 if data.startswith((b"#!", b"\x7fELF")) else 0o644
            tar.addfile(member, io.BytesIO(data))
    names = (part for name in (*directories, *links, *files) for part in (*_parents(name), name))
    return ["/", *dict.fromkeys(f"/{name}" for name in names if not name.startswith("boot/efi"))]


def _libraries(programs: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """The shared libraries of programs of the host, each with the path, below /, where it is looked for."""
    said = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=True).stdout
    for path in dict.fromkeys(re.findall(r"(/lib\S+) \(0x", said)):
        yield path.lstrip("/"), Path(path)


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _kernel(kernel: Kernel, family: Family) -> Iterator[tuple[str, bytes]]:
    """A kernel with all that belongs to it."""
    directory = f"{'usr/' if family.merged else ''}lib/modules/{kernel.version}"
    modules = kernel.modules()
    lines = [f"{path}: {' '.join(needed)}".rstrip() for path, needed in modules.items()]
    if family.flat:  # depmod of that time wrote whole paths
        lines = [" ".join(f"/{directory}/{word}" for word in line.split()) for line in lines]
    yield f"{directory}/modules.dep", "".join(f"{line}\n" for line in lines).encode()
    yield from ((f"{directory}/{path}", b"") for path in modules)
    if family.flat:
        yield f"boot/config-{kernel.version}", b"CONFIG_BLK_DEV_SD=m\nCONFIG_VIRTIO_PCI=m\n"
    else:
        builtin = (f"kernel/drivers/{DRIVERS[name][0]}/{name}.ko\n" for name in kernel.builtin)
        yield f"{directory}/modules.builtin", "".join(builtin).encode()
    yield f"boot/{kernel.name}", bzimage(kernel.version) if kernel.header else bytes(4096)
    place = "lib/" if family.flat else f"usr/lib/modules/{kernel.version}/"
    inside = [
        place + (path.rpartition("/")[2] if family.flat else path)
        for path in modules
        if path.rpartition("/")[2].removesuffix(kernel.suffix) in VMWARE
    ]
    yield f"boot/{kernel.image}", initramfs([*family.contents, *inside], kernel.pack, microcode=kernel.microcode)


def bzimage(version: str) -> bytes:
    """The beginning of an x86 kernel, with its version where the boot protocol has it."""
    image = bytearray(0x4000)
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = b"HdrS"
    image[0x206:0x208] = (0x020D).to_bytes(2, "little")
    image[0x20E:0x210] = (0x3000).to_bytes(2, "little")
    said = f"{version} (mockbuild@builder) #1 SMP Wed Jan 1 00:00:00 UTC 2020\0".encode()
    image[0x3200 : 0x3200 + len(said)] = said
    return bytes(image)


def initramfs(names: Sequence[str], pack: Literal["gzip", "xz", "zstd"], *, microcode: bool) -> bytes:
    """An initramfs with empty files of these names, after an archive with microcode as dracut puts it there."""
    early = cpio(["early_cpio", "kernel/x86/microcode/GenuineIntel.bin"]) if microcode else b""
    main = cpio(names)
    match pack:
        case "gzip":
            return early + gzip.compress(main)
        case "xz":
            return early + lzma.compress(main, check=lzma.CHECK_CRC32)
        case "zstd":
            return early + subprocess.run(["zstd", "-q", "-c"], input=main, stdout=subprocess.PIPE, check=True).stdout


def cpio(names: Sequence[str]) -> bytes:
    """An archive (newc) of empty files, with the directories that they are in, padded to whole blocks."""
    directories = dict.fromkeys(part for name in names for part in _parents(name))
    entries = [*((name, 0o40755) for name in directories), *((name, 0o100644) for name in names), ("TRAILER!!!", 0)]
    archive = bytearray()
    for inode, (name, mode) in enumerate(entries, start=1):
        fields = (inode, mode, 0, 0, 1, 0, 0, 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + "".join(f"{value:08X}" for value in fields).encode() + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
    return bytes(archive + bytes(-len(archive) % 512))


def _dracut_kernels(*versions: str, **options: Any) -> tuple[Kernel, ...]:
    """Kernels as Red Hat's packages name them; a rescue image has the version of the one it was made from."""
    return tuple(
        Kernel(versions[0] if "rescue" in version else version, f"vmlinuz-{version}", f"initramfs-{version}.img",
               **options)
        for version in versions
    )  # fmt: skip


_SWAP = Volume(16, SWAP, "swap")
_ROOT = 384  # MiB: three images are unpacked in /var/tmp at once, as far as the check of free space is concerned
_DRACUT = ("init", "etc/initrd-release", "usr/bin/systemctl", "usr/lib/systemd/systemd", "usr/sbin/modprobe")
_DRACUT_OLD = ("init", "dracut-004-411.el6", "sbin/modprobe", "sbin/udevd")
_OPTIONS_004 = ("--force", "--drivers", "--add-drivers", "--include", "--install", "--mdadmconf", "--lvmconf")
_OPTIONS = (*_OPTIONS_004, "--no-hostonly", "--no-hostonly-cmdline", "--kver")
_RED_HAT = {
    "usr/bin/dracut": "dracut",
    "usr/bin/rpm": "rpm",
    "usr/sbin/setfiles": "setfiles",
    "usr/bin/systemctl": "systemctl",
}
_HOSTONLY = {"usr/lib/dracut/dracut.conf.d/01-dist.conf": 'hostonly="yes"\n'}
_LOADERS = ("EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/fbx64.efi")


def _red_hat_loaders(vendor: str) -> tuple[str, ...]:
    return (*_LOADERS, *(f"EFI/{vendor}/{name}" for name in ("shimx64.efi", "grubx64.efi", "mmx64.efi")))


QUICK = ("rhel7-ready", "rhel9", "sles11")  # of which `make test` mends some

_RHEL7 = Family(
    "rhel7",
    "rhel7",
    "mbr",
    (Volume(320, "0x83", "xfs", "/boot"), Volume(16, "0x82", "swap"), Volume(_ROOT, "0x83", "xfs", "/")),
    _dracut_kernels(
        "3.10.0-1160.119.1.el7.x86_64",
        "3.10.0-1160.el7.x86_64",
        "3.10.0-957.el7.x86_64",
        "0-rescue-2f6e0b5d8c7a4f1e9b3d6a5c4e8f7012",
    ),
    {**_RED_HAT, "usr/sbin/dracut": "dracut"},
    _DRACUT,
    _OPTIONS,
    extra=_HOSTONLY,
)

FAMILIES = (
    _RHEL7,
    # Its kernels have virtio, so that what takes the time, a new initramfs, is not needed.
    replace(
        _RHEL7,
        name="rhel7-ready",
        kernels=_dracut_kernels(
            "3.10.0-1160.119.1.el7.x86_64",
            "3.10.0-1160.el7.x86_64",
            "0-rescue-2f6e0b5d8c7a4f1e9b3d6a5c4e8f7012",
            builtin=VIRTIO,
        ),
    ),
    Family(
        "rhel8",
        "rhel8",
        "gpt",
        (
            Volume(64, ESP, "vfat", "/boot/efi"),
            Volume(320, LINUX, "xfs", "/boot"),
            _SWAP,
            Volume(_ROOT, LINUX, "xfs", "/"),
        ),
        _dracut_kernels(
            "4.18.0-553.el8_10.x86_64",
            "4.18.0-372.9.1.el8.x86_64",
            "0-rescue-3c1b7e0f9a2d4c5e8b6f1a0d7e9c4b23",
            builtin=("virtio", "virtio_ring", "virtio_pci"),
        ),
        _RED_HAT,
        _DRACUT,
        _OPTIONS,
        loaders=_red_hat_loaders("redhat"),
        labels=True,
        extra=_HOSTONLY,
    ),
    Family(
        "rhel9",
        "rhel9",
        "gpt",
        (
            Volume(64, ESP, "vfat", "/boot/efi"),
            Volume(320, LINUX, "xfs", "/boot"),
            Volume(_ROOT + 24, LVM, inside=(Volume(_ROOT, "", "xfs", "/", "root"), Volume(16, "", "swap", "", "swap"))),
        ),
        _dracut_kernels(
            "5.14.0-427.13.1.el9_4.x86_64",
            "0-rescue-9d2f4e6a8b0c41d3a5e7f90b1c2d3e4f",
            builtin=("virtio", "virtio_ring", "virtio_pci"),
        ),
        _RED_HAT,
        (*_DRACUT, "usr/sbin/lvm", "etc/lvm/lvm.conf"),
        _OPTIONS,
        group="rl",
        loaders=_red_hat_loaders("rocky"),
        labels=True,
        extra=_HOSTONLY,
    ),
    Family(
        "rhel10",
        "rhel10",
        "gpt",
        (Volume(64, ESP, "vfat", "/boot/efi"), Volume(320, LINUX, "xfs", "/boot"), Volume(_ROOT, LINUX, "xfs", "/")),
        _dracut_kernels(
            "6.12.0-55.9.1.el10_0.x86_64",
            "0-rescue-5b7c9d1e3f2a4b6c8d0e1f3a5c7b9d2e",
            builtin=("virtio", "virtio_ring", "virtio_pci"),
            pack="zstd",
        ),
        _RED_HAT,
        _DRACUT,
        _OPTIONS,
        loaders=_red_hat_loaders("almalinux"),
        labels=True,
        extra=_HOSTONLY,
    ),
    Family(
        "rhel6",
        "rhel6",
        "mbr",
        (Volume(96, "0x83", "ext4", "/boot"), Volume(16, "0x82", "swap"), Volume(_ROOT, "0x83", "ext4", "/")),
        _dracut_kernels(*("2.6.32-754.35.1.el6.x86_64", "2.6.32-754.el6.x86_64"), suffix=".ko", microcode=False),
        {"sbin/dracut": "dracut", "bin/rpm": "rpm", "sbin/setfiles": "setfiles"},
        _DRACUT_OLD,
        _OPTIONS_004,
        merged=False,
    ),
    Family(
        "rhel6-without-virtio",
        "rhel6",
        "mbr",
        (Volume(96, "0x83", "ext4", "/boot"), Volume(16, "0x82", "swap"), Volume(_ROOT, "0x83", "ext4", "/")),
        _dracut_kernels(
            *("2.6.32-754.35.1.el6.x86_64", "2.6.32-754.el6.x86_64"), suffix=".ko", microcode=False, absent=VIRTIO
        ),
        {"sbin/dracut": "dracut", "bin/rpm": "rpm", "sbin/setfiles": "setfiles"},
        _DRACUT_OLD,
        _OPTIONS_004,
        merged=False,
    ),
    Family(
        "rhel5",
        "rhel5",
        "mbr",
        (
            Volume(96, "0x83", "ext3", "/boot", "/boot"),
            Volume(16, "0x82", "swap", "", "SWAP-sda2"),
            Volume(256, "0x83", "ext3", "/", "/"),
        ),
        (Kernel("2.6.18-398.el5", "vmlinuz-2.6.18-398.el5", "initrd-2.6.18-398.el5.img", ".ko", microcode=False),),
        {"sbin/mkinitrd": "mkinitrd-redhat", "bin/rpm": "rpm"},
        ("init", "bin/nash", "bin/insmod"),
        merged=False,
        flat=True,
    ),
    Family(
        "sles15",
        "sles15",
        "gpt",
        (Volume(8, BIOS_BOOT), Volume(768, LINUX, "btrfs", "/"), _SWAP),
        (
            Kernel(
                "5.14.21-150500.55.52-default",
                "vmlinuz-5.14.21-150500.55.52-default",
                "initrd-5.14.21-150500.55.52-default",
                ".ko.zst",
                pack="xz",
            ),
        ),
        {"usr/bin/dracut": "dracut", "bin/rpm": "rpm", "sbin/mkinitrd": "mkinitrd-suse"},
        (*_DRACUT, "usr/sbin/btrfs"),
        _OPTIONS,
        merged=False,
        subvolumes=("@/.snapshots/1/snapshot", "@", "@/var", "@/home", "@/.snapshots", "@/boot/grub2/i386-pc"),
    ),
    Family(
        "sles11",
        "sles11",
        "mbr",
        (Volume(16, "0x82", "swap"), Volume(_ROOT, "0x83", "ext3", "/")),
        (
            Kernel(
                "3.0.101-63-default",
                "vmlinuz-3.0.101-63-default",
                "initrd-3.0.101-63-default",
                ".ko",
                header=False,
                microcode=False,
            ),
        ),
        {"sbin/mkinitrd": "mkinitrd-suse", "bin/rpm": "rpm"},
        ("init", "bin/linuxrc", "sbin/modprobe"),
        ("-k", "-i", "-m", "-d", "-B"),
        merged=False,
    ),
    Family(
        "amazon2",
        "amazon2",
        "gpt",
        (Volume(1, BIOS_BOOT), Volume(_ROOT, LINUX, "xfs", "/")),
        _dracut_kernels("5.10.177-158.645.amzn2.x86_64", suffix=".ko", builtin=VIRTIO),
        _RED_HAT,
        _DRACUT,
        _OPTIONS,
    ),
    Family(
        "photon",
        "photon",
        "gpt",
        (Volume(4, BIOS_BOOT), Volume(48, ESP, "vfat", "/boot/efi"), Volume(_ROOT, LINUX, "ext4", "/")),
        (Kernel("5.10.152-4.ph4", "vmlinuz-5.10.152-4.ph4", "initrd.img-5.10.152-4.ph4", microcode=False),),
        {"usr/bin/dracut": "dracut", "usr/bin/rpm": "rpm"},
        _DRACUT,
        _OPTIONS,
        loaders=("EFI/BOOT/bootx64.efi", "EFI/BOOT/grubx64.efi"),
        hybrid=True,
    ),
)
