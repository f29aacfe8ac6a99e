"""The guests that there are: for each, what is installed, its firmware and its disks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tests.guests.rootfs import Rootfs

MIB = 1 << 20
GIB = 1 << 30
# What every guest had on VMware.
CPUS, MEMORY_GIB = 2, 1
ONE_NIC = ("ens192:UP:10.0.2.15/24",)
TWO_NICS = (*ONE_NIC, "ens224:UP:10.0.3.15/24")
# A VLAN on the first card; the second in a bond, and that in a bridge.
STACKED = (*ONE_NIC, "ens224:UP:none", "bond0:UP:none", "br0:UP:10.0.3.15/24", "backup@ens192:UP:10.0.4.15/24")

COMMON = (
    *("linux-image-amd64", "zstd", "kmod", "udev", "systemd-sysv", "mount", "login", "iproute2", "open-vm-tools"),
    *("grub2-common", "e2fsprogs", "dosfstools"),
)
INITRAMFS_TOOLS = ("initramfs-tools", "busybox")

# What mkinitramfs does on VMware with MODULES=dep: no driver that was not in use there.
BUILD_INITRAMFS = (
    'sed -i "s/^MODULES=.*/MODULES=list/" /etc/initramfs-tools/initramfs.conf',
    "update-initramfs -u -k all",
)
# And dracut there, which is host-only. The options are only for this build: the guest's own configuration is
# Debian's, so what an administrator builds later is up to the machine it is then on.
VMWARE_DRIVERS = "mptspi mptsas vmw_pvscsi sd_mod ata_piix ahci xfs vmxnet3"
BUILD_DRACUT = (
    "for kernel in $(ls /lib/modules); do"
    f' dracut --force --no-hostonly --drivers "{VMWARE_DRIVERS}" /boot/initrd.img-$kernel $kernel; done',
)

DEBIAN12 = Rootfs(
    "debian12",
    "bookworm",
    (*COMMON, *INITRAMFS_TOOLS, "grub-pc-bin", "grub-efi-amd64-bin", "ifupdown"),
    ("common", "initramfs-tools", "ifupdown", "debian12"),
    BUILD_INITRAMFS,
)


@dataclass(frozen=True)
class Guest:
    """A guest. The texts are for people; how the disks come to be as they say is in native.py or appliance.py."""

    name: str
    rootfs: Rootfs
    firmware: Literal["bios", "uefi"]
    storage: str
    initramfs: str
    network: str
    disk_sizes: tuple[int, ...] = (3 * GIB,)  # bytes; in the guest's order, sda first
    fallback: bool = False  # also EFI/BOOT/BOOTX64.EFI, so that it boots without an NVRAM entry
    passphrase: str | None = None  # unlocks its encrypted disk
    # Its network interfaces as its boot-report names them. What is installed makes them so: they are not in the digest.
    cards: tuple[str, ...] = field(default=ONE_NIC, repr=False)

    @property
    def os_version(self) -> str:
        """Debian's major version."""
        return {"bullseye": "11", "bookworm": "12", "trixie": "13"}[self.rootfs.suite]

    @property
    def loader(self) -> str | None:
        """Where the firmware of the old machine had the boot loader written down, on a guest without fallback."""
        return r"\EFI\debian\grubx64.efi" if self.firmware == "uefi" and not self.fallback else None


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
    )
}
