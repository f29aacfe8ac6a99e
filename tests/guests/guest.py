"""What a test guest is: what is installed, its firmware, its disks, and what the old machine knew of it."""

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


_VERSIONS = {
    "bullseye": "11",
    "bookworm": "12",
    "trixie": "13",
    "forky": "14",
    "jammy": "22.04",
    "noble": "24.04",
    "resolute": "26.04",
}


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

    # What the old firmware had written down, where that is not Debian's name for it.
    loader_path: str | None = field(default=None, repr=False)
    # What it ran on, and how that exports a disk. Nobody but Xen itself can start what needs Xen's names.
    platform: Literal["vmware", "xen", "hyper-v"] = field(default="vmware", repr=False)
    exported_as: Literal["vmdk", "raw", "vhd"] = field(default="vmdk", repr=False)

    @property
    def os_version(self) -> str:
        """The distribution's version, as people say it."""
        return _VERSIONS[self.rootfs.suite]

    @property
    def os_name(self) -> str:
        """What vSphere calls it."""
        if self.rootfs.vendor == "ubuntu":
            return "Ubuntu Linux (64-bit)"
        return f"Debian GNU/Linux {self.os_version} (64-bit)"

    @property
    def os_type(self) -> str:
        """And what its API does."""
        return "ubuntu64Guest" if self.rootfs.vendor == "ubuntu" else f"debian{self.os_version}_64Guest"

    @property
    def secure_boot(self) -> bool:
        """Whether its boot loader and kernel are signed for Secure Boot, which was on."""
        return "shim-signed" in self.rootfs.packages

    @property
    def loader(self) -> str | None:
        """Where the firmware of the old machine had the boot loader written down, on a guest without fallback."""
        name = "shimx64" if self.secure_boot else "grubx64"
        found = self.loader_path or rf"\EFI\{self.rootfs.vendor}\{name}.efi"
        return found if self.firmware == "uefi" and not self.fallback else None
