"""Which initramfs is the one of a kernel on the menu."""

from __future__ import annotations

import pytest

from hyper2kvmd.guest.linux import kernels
from hyper2kvmd.guest.linux.menu import Menu, MenuEntry

VERSION = "6.1.0-18-amd64"


class Boot:
    """A guest in which every file in /boot is there, and one kernel has modules."""

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        return path.startswith("/boot/") and not path.startswith("/boot/boot/")

    def is_dir(self, path: str) -> bool:
        return path == f"/lib/modules/{VERSION}"

    def filesize(self, path: str) -> int:
        return 0

    def realpath(self, path: str) -> str:
        return path

    def glob_expand(self, pattern: str) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("initrds", "own"),
    [
        ((f"initrd.img-{VERSION}",), f"initrd.img-{VERSION}"),
        (("intel-ucode.img", f"initrd.img-{VERSION}"), f"initrd.img-{VERSION}"),
        (("intel-uc.img", "amd-uc.img", "initramfs-linux.img"), "initramfs-linux.img"),
        (("microcode.cpio", f"initrd.img-{VERSION}"), f"initrd.img-{VERSION}"),
        (("acpi_override.cpio", f"initrd.img-{VERSION}"), f"initrd.img-{VERSION}"),  # GRUB_EARLY_INITRD_LINUX_CUSTOM
        ((f"initramfs-{VERSION}.img", "tuned.img"), f"initramfs-{VERSION}.img"),
        (("initrd", "more.img"), "initrd"),
        (("early_ucode.cpio",), None),
        ((), None),
    ],
)
def test_initramfs_of_a_kernel_is_told_from_what_is_loaded_beside_it(initrds: tuple[str, ...], own: str | None) -> None:
    entry = MenuEntry(f"/vmlinuz-{VERSION}", tuple(f"/{name}" for name in initrds), "Linux", "0")
    (found,) = kernels.find(Boot(), Menu("grub2", (), (entry,), 0), None)
    assert (f"/boot/{own}" if own else None) == found.initrd
