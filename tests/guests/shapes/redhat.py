"""Red Hat's shape of a guest, from Debian's newest programs: BLS, host-only dracut, XFS on LVM, SELinux enforcing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.guests.guest import COMMON, GIB, ONE_NIC, Guest
from tests.guests.rootfs import Rootfs
from tests.guests.shapes.partition import (
    BIOS_BOOT,
    ESP,
    LINUX,
    LVM,
    REST,
    VMWARE_DRACUT,
    Layout,
    gpt,
    mount,
    wwid,
)

# The reference policy; Red Hat's is made from it.
_SELINUX = ("selinux-policy-default", "policycoreutils", "selinux-utils")
_MACHINE = "5a0f2d0c3b1e4c6f8d7a9e1b2c3d4e5f"
_CONSOLE = "console=tty0 console=ttyS0,115200"
# rd.retry: dracut would look for a lost root for three minutes
_KERNELOPTS = (
    f"root=/dev/mapper/rhel-root ro {_CONSOLE} resume=/dev/mapper/rhel-swap rd.lvm.lv=rhel/root rd.lvm.lv=rhel/swap"
    " rd.retry=30"
    # Debian's kernel has AppArmor where Red Hat's has SELinux. Loading its policy takes a minute here, and udev waits.
    " security=selinux systemd.default_device_timeout_sec=600"
)
# A bond on the second card, and a VLAN on it.
_BOND = (*ONE_NIC, "ens224:UP:none", "bond0:UP:10.0.3.15/24", "bond0.100@bond0:UP:10.0.4.15/24")


def _rootfs(name: str, *packages: str) -> Rootfs:
    return Rootfs(
        name,
        "forky",
        (*COMMON, "dracut", "lvm2", "xfsprogs", "network-manager", "dbus", *_SELINUX, *packages),
        ("common", "shapes/redhat"),
        (
            # NetworkManager ignores a keyfile that others can read
            "chmod 600 /etc/NetworkManager/system-connections/*",
            # Debian links them to /usr/lib/modules, which here is on another file system
            "for file in /boot/*-$(ls /lib/modules); do cp -p $file $file.new; mv $file.new $file; done",
            "rm -f /boot/initrd.img-* /etc/kernel/postinst.d/dracut /initrd.img* /vmlinuz*",
        ),
    )


_STORAGE = "XFS on LVM with a devices file, XFS /boot, GPT"
_TEXTS = ("dracut, host-only", "NetworkManager keyfiles: a bond and a VLAN on it")

GUESTS = (
    Guest(
        "redhat-shape-bios",
        _rootfs("redhat-shape-bios", "grub-pc-bin"),
        "bios",
        f"{_STORAGE}; BLS; SELinux enforcing",
        *_TEXTS,
        (4 * GIB,),
        cards=_BOND,
    ),
    Guest(
        "redhat-shape-uefi",
        _rootfs("redhat-shape-uefi", "grub-efi-amd64-bin"),
        "uefi",
        f"{_STORAGE}; BLS; SELinux enforcing",
        *_TEXTS,
        (4 * GIB,),
        cards=_BOND,
    ),
)


def _uefi(g: Any, _guest: Guest) -> Mapping[str, str]:
    gpt(g, "/dev/sda", (64, ESP), (512, LINUX), (REST, LVM))
    _rhel_vg(g)
    mount(g, "/dev/sda1", "/boot/efi", "vfat")
    return {"@BOOT@": g.vfs_uuid("/dev/sda2"), "#esp.UUID=@ESP@": f"UUID={g.vfs_uuid('/dev/sda1')}"}


def _bios(g: Any, _guest: Guest) -> Mapping[str, str]:
    gpt(g, "/dev/sda", (1, BIOS_BOOT), (512, LINUX), (REST, LVM))
    _rhel_vg(g)
    return {"@BOOT@": g.vfs_uuid("/dev/sda2"), "#esp.*": ""}


def _rhel_vg(g: Any) -> None:
    g.pvcreate("/dev/sda3")
    g.vgcreate("rhel", ["/dev/sda3"])
    g.lvcreate("swap", "rhel", 128)
    g.lvcreate_free("root", "rhel", 100)
    g.mkswap("/dev/rhel/swap")
    mount(g, "/dev/rhel/root", "/", "xfs")
    mount(g, "/dev/sda2", "/boot", "xfs")


def _complete(g: Any) -> None:
    """What the installer of Red Hat's systems leaves in /boot and /etc, which Debian's programs do not write alone."""
    _devices_file(g)
    (kernel,) = (name.removeprefix("vmlinuz-") for name in g.ls("/boot") if name.startswith("vmlinuz-"))
    g.sh(f"{VMWARE_DRACUT} --add-drivers xfs /boot/initramfs-{kernel}.img {kernel}")
    g.mkdir_p("/boot/loader/entries")
    g.write(
        f"/boot/loader/entries/{_MACHINE}-{kernel}.conf",
        f"title Debian GNU/Linux ({kernel}) 14 (Forky)\n"
        f"version {kernel}\n"
        f"linux /vmlinuz-{kernel}\n"
        f"initrd /initramfs-{kernel}.img $tuned_initrd\n"
        "options $kernelopts $tuned_params\n"
        "grub_users $grub_users\n"
        "grub_arg --unrestricted\n"
        "grub_class debian\n",
    )
    g.sh(f"grub-editenv /boot/grub/grubenv create; grub-editenv /boot/grub/grubenv set 'kernelopts={_KERNELOPTS}'")
    g.sh(f"grub-editenv /boot/grub/grubenv set saved_entry={_MACHINE}-{kernel}")
    menu = g.read_file("/usr/share/redhat-shape/grub.cfg").decode()
    g.write("/boot/grub/grub.cfg", menu.replace("@BOOT@", g.vfs_uuid("/dev/sda2")))
    # -m: it would pass over file systems of which this kernel does not say that they have labels
    g.sh("setfiles -m /etc/selinux/default/contexts/files/file_contexts /")


def _devices_file(g: Any) -> None:
    """LVM's list of the devices that it may use: the disk by the name that VMware gave it."""
    volume = g.pvuuid("/dev/sda3").replace("-", "")
    g.mkdir_p("/etc/lvm/devices")
    g.write(
        "/etc/lvm/devices/system.devices",
        "# LVM uses devices listed in this file.\n"
        "# Created by LVM command vgimportdevices pid 1042 at Tue Mar  4 09:12:55 2025\n"
        "VERSION=1.1.2\n"
        f"IDTYPE=sys_wwid IDNAME={wwid(0)} DEVNAME=/dev/sda3 PVID={volume} PART=3\n",
    )


LAYOUTS: dict[str, Layout] = {"redhat-shape-bios": _bios, "redhat-shape-uefi": _uefi}
FINISH: dict[str, Callable[[Any], None]] = dict.fromkeys(LAYOUTS, _complete)
