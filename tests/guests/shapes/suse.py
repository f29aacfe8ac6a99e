"""SUSE's shape of a guest, from Debian's programs: btrfs with snapper's subvolumes, dracut, and ifcfg files by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.guests.boot import wwn
from tests.guests.guest import COMMON, GIB, Guest
from tests.guests.rootfs import Rootfs
from tests.guests.shapes.partition import ESP, LINUX, REST, SWAP, VMWARE_DRACUT, Layout, gpt, mount, shell

_SNAPSHOT = "@/.snapshots/1/snapshot"
# In the order in which YaST makes them; none is in a snapshot of the system.
_SUBVOLUMES = ("boot/grub2/x86_64-efi", "home", "opt", "root", "srv", "tmp", "usr/local", "var")
# SUSE's GRUB begins paths at the default subvolume, and everybody else's at the top: here they say where that is.
_BOOT = f"/{_SNAPSHOT}/boot"
_MODULES = "part_gpt fat btrfs zstd normal configfile search search_fs_uuid linux echo serial loadenv test gzio"

GUESTS = (
    Guest(
        "suse-shape-uefi",
        Rootfs(
            "suse-shape-uefi",
            "trixie",
            (*COMMON, "dracut", "btrfs-progs", "grub-efi-amd64-bin"),
            ("common", "shapes/suse"),
            (
                "systemctl enable --quiet wicked-by-hand.service",
                "rm -f /boot/initrd.img-* /etc/kernel/postinst.d/dracut /initrd.img* /vmlinuz*",
            ),
        ),
        "uefi",
        "btrfs with snapper's subvolumes, GPT",
        "dracut, host-only",
        "ifcfg as wicked has it, read by a script",
        (4 * GIB,),
        loader_path=r"\EFI\opensuse\grubx64.efi",
        cards=("eth0:UP:10.0.2.15/24",),
    ),
)


def _snapper(g: Any, _guest: Guest) -> Mapping[str, str]:
    gpt(g, "/dev/sda", (64, ESP), (3800, LINUX), (REST, SWAP))
    g.mkswap("/dev/sda3")
    mount(g, "/dev/sda2", "/", "btrfs")
    for subvolume in ("@", "@/.snapshots", _SNAPSHOT, *(f"@/{name}" for name in _SUBVOLUMES)):
        g.mkdir_p(f"/{subvolume}".rpartition("/")[0] or "/")
        g.btrfs_subvolume_create(f"/{subvolume}")
    (number,) = (
        volume["btrfssubvolume_id"]
        for volume in g.btrfs_subvolume_list("/")
        if volume["btrfssubvolume_path"] == _SNAPSHOT
    )
    g.btrfs_subvolume_set_default(number, "/")
    g.umount("/")
    g.mount("/dev/sda2", "/")
    for name in (".snapshots", *_SUBVOLUMES):
        g.mkdir_p(f"/{name}")
        g.mount(f"btrfsvol:/dev/sda2/@/{name}", f"/{name}")
    mount(g, "/dev/sda1", "/boot/efi", "vfat")
    return {
        "@ROOT@": g.vfs_uuid("/dev/sda2"),
        "@ESP@": g.vfs_uuid("/dev/sda1"),
        "@SWAP@": f"wwn-{wwn(0):#x}-part3",
    }


def _complete(g: Any) -> None:
    """The boot loader and its menu as SUSE lays them out, instead of Debian's."""
    for name in ("/boot/grub", "/boot/efi/EFI"):
        g.rm_rf(name)
    (kernel,) = (name.removeprefix("vmlinuz-") for name in g.ls("/boot") if name.startswith("vmlinuz-"))
    g.sh(f"{VMWARE_DRACUT} --add-drivers btrfs /boot/initrd-{kernel} {kernel}")
    g.ln_s(f"vmlinuz-{kernel}", "/boot/vmlinuz")
    g.ln_s(f"initrd-{kernel}", "/boot/initrd")
    root = g.vfs_uuid("/dev/sda2")
    g.mkdir_p("/boot/efi/EFI/opensuse")
    loader = "/boot/efi/EFI/opensuse/grubx64.efi"
    g.sh(f"grub-mkimage --format=x86_64-efi --output={loader} --prefix=/EFI/opensuse {_MODULES}")
    g.sh("cp /usr/lib/grub/x86_64-efi/*.mod /usr/lib/grub/x86_64-efi/*.lst /boot/grub2/x86_64-efi/")
    g.write(
        "/boot/efi/EFI/opensuse/grub.cfg",
        'set btrfs_relative_path="yes"\n'
        f"search --fs-uuid --set=root {root}\n"
        f"set prefix=(${{root}}){_BOOT}/grub2\n"
        'configfile "${prefix}/grub.cfg"\n',
    )
    menu = g.read_file("/usr/share/suse-shape/grub.cfg").decode()
    for place, value in {"@ROOT@": root, "@KERNEL@": kernel, "@BOOT@": _BOOT, "@WWN@": f"{wwn(0):#x}"}.items():
        menu = menu.replace(place, value)
    g.write("/boot/grub2/grub.cfg", menu)
    # The first snapshot is the system itself; what zypper took later is read-only, and looks like one to boot.
    g.mkdir_p("/.snapshots/2")
    shell(g, "btrfs subvolume snapshot -r /sysroot /sysroot/.snapshots/2/snapshot")
    for snapshot, kind in ((1, "first root filesystem"), (2, "zypp(zypper)")):
        g.write(
            f"/.snapshots/{snapshot}/info.xml",
            f'<?xml version="1.0"?>\n<snapshot>\n  <type>single</type>\n  <num>{snapshot}</num>\n'
            f"  <date>2025-03-04 08:12:5{snapshot}</date>\n  <description>{kind}</description>\n</snapshot>\n",
        )


LAYOUTS: dict[str, Layout] = {"suse-shape-uefi": _snapper}
FINISH: dict[str, Callable[[Any], None]] = {"suse-shape-uefi": _complete}
