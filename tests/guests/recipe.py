"""The guests that there are: for each, what is installed, its firmware and its disks."""

from __future__ import annotations

from tests.guests.guest import (
    BUILD_DRACUT,
    BUILD_INITRAMFS,
    COMMON,
    GIB,
    INITRAMFS_TOOLS,
    MIB,
    STACKED,
    TWO_NICS,
    Guest,
)
from tests.guests.rootfs import Rootfs
from tests.guests.shapes import arrays, clouds, redhat, suse, ubuntu

DEBIAN12 = Rootfs(
    "debian12",
    "bookworm",
    (*COMMON, *INITRAMFS_TOOLS, "grub-pc-bin", "grub-efi-amd64-bin", "ifupdown"),
    ("common", "initramfs-tools", "ifupdown", "debian12"),
    BUILD_INITRAMFS,
)


def _debian(name: str, suite: str, packages: tuple[str, ...], *overlays: str, commands: tuple[str, ...]) -> Rootfs:
    return Rootfs(name, suite, (*COMMON, *packages), ("common", *overlays, name), commands)


PLAIN = ("ext4, GPT", "initramfs-tools", "ifupdown", (2 * GIB,))

GUESTS = {
    guest.name: guest
    for guest in (
        Guest("debian12-bios", DEBIAN12, "bios", *PLAIN),
        Guest("debian12-uefi", DEBIAN12, "uefi", *PLAIN),
        Guest("debian12-uefi-fallback", DEBIAN12, "uefi", *PLAIN, fallback=True),
        Guest(
            "debian13-uefi-lvm",
            _debian(
                "debian13-uefi-lvm",
                "trixie",
                (*INITRAMFS_TOOLS, "grub-efi-amd64-bin", "lvm2", "netplan.io"),
                "initramfs-tools",
                # netplan refuses to read what everybody can
                commands=("chmod 600 /etc/netplan/*", "systemctl enable systemd-networkd", *BUILD_INITRAMFS),
            ),
            "uefi",
            "LVM, GPT, no fallback loader",
            "initramfs-tools",
            "netplan",
        ),
        Guest(
            "debian12-dracut-xfs",
            _debian(
                "debian12-dracut-xfs",
                "bookworm",
                ("dracut", "grub-pc-bin", "xfsprogs"),
                commands=("systemctl enable systemd-networkd", *BUILD_DRACUT),
            ),
            "bios",
            "XFS, GPT",
            "dracut",
            "systemd-networkd",
        ),
        Guest(
            "debian11-btrfs",
            _debian(
                "debian11-btrfs",
                "bullseye",
                (*INITRAMFS_TOOLS, "grub-pc-bin", "btrfs-progs", "ifupdown"),
                *("initramfs-tools", "ifupdown"),
                commands=BUILD_INITRAMFS,
            ),
            "bios",
            "btrfs subvolumes and snapshots, MBR",
            "initramfs-tools",
            "ifupdown",
            (4 * GIB,),
        ),
        Guest(
            "debian12-luks",
            _debian(
                "debian12-luks",
                "bookworm",
                (*INITRAMFS_TOOLS, "grub-pc-bin", "lvm2", "cryptsetup-initramfs", "ifupdown"),
                *("initramfs-tools", "ifupdown"),
                # cryptsetup looks at the real devices to know what to put in, so that is done on the disk
                commands=BUILD_INITRAMFS[:1],
            ),
            "bios",
            "LVM on LUKS2, GPT",
            "initramfs-tools",
            "ifupdown",
            passphrase="correct horse battery staple",
        ),
        Guest(
            "debian12-three-disks",
            _debian(
                "debian12-three-disks",
                "bookworm",
                (*INITRAMFS_TOOLS, "grub-pc-bin", "lvm2", "ifupdown"),
                *("initramfs-tools", "disks"),
                commands=BUILD_INITRAMFS,
            ),
            "bios",
            "LVM over two disks, /data on a third, MBR and GPT",
            "initramfs-tools",
            "ifupdown",
            (1 * GIB, 2 * GIB, 1 * GIB),
            cards=TWO_NICS,
        ),
        Guest(
            "debian12-uefi-three-disks",
            _debian(
                "debian12-uefi-three-disks",
                "bookworm",
                (*INITRAMFS_TOOLS, "grub-efi-amd64-bin"),
                *("initramfs-tools", "debian12", "disks"),
                commands=("systemctl enable --quiet data.mount logs.mount systemd-networkd", *BUILD_INITRAMFS),
            ),
            "uefi",
            "ext4, GPT; /data and /logs on disks of their own, by label",
            "initramfs-tools",
            "systemd-networkd: a VLAN, and a bond in a bridge",
            (2 * GIB, 256 * MIB, 512 * MIB),
            cards=STACKED,
        ),
        Guest(
            "debian12-networkmanager",
            _debian(
                "debian12-networkmanager",
                "bookworm",
                (*INITRAMFS_TOOLS, "grub-pc-bin", "network-manager"),
                "initramfs-tools",
                # NetworkManager ignores a keyfile that others can read
                commands=("chmod 600 /etc/NetworkManager/system-connections/*", *BUILD_INITRAMFS),
            ),
            "bios",
            "ext4, swap in a logical partition, MBR",
            "initramfs-tools",
            "NetworkManager",
        ),
        Guest(
            "debian12-two-kernels",
            _debian(
                "debian12-two-kernels",
                "bookworm",
                ("linux-image-rt-amd64", *INITRAMFS_TOOLS, "grub-pc-bin", "ifupdown"),
                *("initramfs-tools", "ifupdown"),
                # a kernel that was built for VMware only; being first on the menu it is the default
                commands=(
                    "for kernel in $(ls /lib/modules | grep -- -rt-); do"
                    " find /lib/modules/$kernel -name 'virtio*.ko' -delete; depmod $kernel; done",
                    *BUILD_INITRAMFS,
                ),
            ),
            "bios",
            "ext4, MBR; the default kernel has no virtio",
            "initramfs-tools",
            "ifupdown",
        ),
        Guest(
            "debian12-no-virtio",
            Rootfs(
                "debian12-no-virtio",
                "bookworm",
                (*COMMON, *INITRAMFS_TOOLS, "grub-pc-bin", "ifupdown"),
                ("common", "initramfs-tools", "ifupdown", "debian12-two-kernels"),
                (
                    "find /lib/modules -name 'virtio*.ko' -delete; depmod $(ls /lib/modules)",
                    *BUILD_INITRAMFS,
                ),
            ),
            "bios",
            "ext4, MBR; no kernel has virtio, so it gets SATA",
            "initramfs-tools",
            "ifupdown",
        ),
        *ubuntu.GUESTS,
        *redhat.GUESTS,
        *suse.GUESTS,
        *clouds.GUESTS,
        *arrays.GUESTS,
    )
}
