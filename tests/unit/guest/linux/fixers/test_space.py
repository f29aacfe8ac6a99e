"""How much space in the guest is enough to build its initramfs images."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.linux.fixers.initramfs import check_space
from hyper2kvmd.guest.linux.kernels import Image, Kernel

MIB = 1 << 20


class Space:
    """A guest with so many MiB free in each place, in an appliance with so many CPUs."""

    def __init__(self, free: Mapping[str, int], cpus: int) -> None:
        self.free, self.cpus = free, cpus

    def get_smp(self) -> int:
        return self.cpus

    def statvfs(self, path: str) -> dict[str, int]:
        return {"bavail": self.free[path], "frsize": MIB, "files": 0, "favail": 0}


def images(*sizes: int) -> list[Image]:
    """Kernels with images of so many MiB."""
    found = []
    for number, size in enumerate(sizes):
        kernel = Kernel(f"{number}", f"/boot/vmlinuz-{number}", f"/boot/initrd.img-{number}", True, number)
        found.append(Image(kernel, size * MIB, frozenset(), frozenset(), {}))
    return found


@pytest.mark.parametrize(
    ("sizes", "cpus", "boot", "tmp", "enough"),
    [
        ((100, 100, 100, 100), 2, 600, 1500, True),  # two are built at once
        ((100, 100, 100, 100), 4, 600, 1500, False),
        ((100, 100, 100, 100), 4, 600, 3000, True),
        ((20, 100, 20), 1, 210, 750, True),
        ((20, 100, 20), 1, 210, 749, False),  # the largest may be the one
        ((100, 100), 2, 299, 9000, False),  # the old ones stay in /boot until the new ones are complete
        ((1,), 2, 16, 80, True),
    ],
)
def test_space_is_enough_for_all_new_images_and_those_that_are_built_at_once(
    sizes: tuple[int, ...], cpus: int, boot: int, tmp: int, enough: bool
) -> None:
    guest = Space({"/boot": boot, "/var/tmp": tmp}, cpus)
    if enough:
        check_space(guest, images(*sizes))
        return
    with pytest.raises(MigrationError) as caught:
        check_space(guest, images(*sizes))
    assert caught.value.code is Code.GUEST_SPACE
