"""Disks made inside libguestfs's appliance, whose kernel knows LVM, LUKS, btrfs and XFS where the host's may not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

from tests.guests.guest import Guest
from tests.guests.shapes import FINISH, LAYOUTS
from tests.guests.shapes.partition import BOOT_DISK, shell


def make_disks(guest: Guest, rootfs: Path, disks: Sequence[Path]) -> None:
    """Turn the tarball into the raw disks of one guest: the layout by its name, the rest as an installer does it."""
    import guestfs

    for disk, size in zip(disks, guest.disk_sizes, strict=True):
        with disk.open("wb") as image:
            image.truncate(size)
    g = guestfs.GuestFS(python_return_dict=True)
    try:
        g.set_backend("direct")
        g.set_backend_settings(["force_tcg"])  # works everywhere; a /dev/kvm that is there may still not work
        g.set_memsize(1280)
        g.set_smp(2)
        for number, disk in enumerate(disks):
            label = f"disk{ascii_lowercase[number]}" if number else "boot"  # there may be nothing but letters in it
            g.add_drive_opts(str(disk), format="raw", cachemode="unsafe", label=label)
        # The tarball as one more disk: read directly it takes a third of the time it would through libguestfs. On
        # another bus, for what is on the same one may be found in any order, and then sda would be another disk.
        g.config("-drive", f"file={str(rootfs).replace(',', ',,')},format=raw,if=virtio,readonly=on")
        g.launch()
        places = LAYOUTS[guest.name](g, guest) or {}
        shell(g, "tar --extract --numeric-owner --xattrs --file /dev/vda --directory /sysroot")
        for place, value in places.items():
            shell(g, f"sed -i s,{place},{value}, /sysroot/etc/fstab")
        if guest.passphrase:
            g.sh("update-initramfs -u -k all")
        if guest.firmware == "uefi":
            # --no-nvram: there the appliance has none; and nothing in EFI/BOOT, which most installers leave alone
            g.sh("grub-install --target=x86_64-efi --efi-directory=/boot/efi --no-nvram")
        else:
            g.sh(f"grub-install --target=i386-pc {BOOT_DISK}")
        g.sh("update-grub")
        if guest.name in FINISH:
            FINISH[guest.name](g)
        g.umount_all()
        g.shutdown()
    finally:
        g.close()
