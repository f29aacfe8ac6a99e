"""How much space in the guest is enough to build its initramfs images."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.linux.fixers.initramfs import check_space
from hyper2kvmd.guest.linux.kernels import VIRTIO, Image, Kernel

MIB = 1 << 20


class Space:
    """A guest with so many MiB free in each place, in an appliance with so many CPUs."""

    def __init__(self, free: Mapping[str, int], cpus: int) -> None:
        self.free, self.cpus = free, cpus

    def get_smp(self) -> int:
        return self.cpus

    def statvfs(self, path: str) -> dict[str, int]:
        return {"bavail": self.free[path], "frsize": MIB, "files": 0, "favail": 0}


def images(*sizes: int, lacking: bool) -> list[Image]:
    """Kernels with images of so many MiB; lacking: that they have no virtio yet."""
    depends = dict.fromkeys(VIRTIO.ways[0], ()) if lacking else {}
    found = []
    for number, size in enumerate(sizes):
        kernel = Kernel(f"{number}", f"/boot/vmlinuz-{number}", f"/boot/initrd.img-{number}", True, number)
        found.append(Image(kernel, size * MIB, frozenset(), frozenset(), depends))
    return found


@pytest.mark.parametrize(
    ("sizes", "lacking", "cpus", "boot", "tmp", "enough"),
    [
        ((100, 100, 100, 100), True, 2, 400, 1500, True),  # two are built at once, and each becomes larger by half
        ((100, 100, 100, 100), True, 2, 399, 1500, False),
        ((100, 100, 100, 100), True, 4, 600, 1500, False),
        ((100, 100, 100, 100), True, 4, 600, 3000, True),
        ((60, 60, 60, 60), False, 2, 144, 660, True),  # 16.04's /boot with four kernels that have virtio built in
        ((60, 60, 60, 60), False, 2, 143, 660, False),
        ((20, 100, 20), True, 1, 170, 750, True),
        ((20, 100, 20), True, 1, 170, 749, False),  # the largest may be the one
        ((100, 100), True, 2, 299, 9000, False),  # the old ones stay in /boot until the new ones are complete
        ((1,), True, 2, 16, 80, True),
    ],
)
def test_space_is_enough_for_what_images_grow_and_those_that_are_built_at_once(
    sizes: tuple[int, ...], lacking: bool, cpus: int, boot: int, tmp: int, enough: bool
) -> None:
    guest = Space({"/boot": boot, "/var/tmp": tmp}, cpus)
    if enough:
        check_space(guest, images(*sizes, lacking=lacking), VIRTIO)
        return
    with pytest.raises(MigrationError) as caught:
        check_space(guest, images(*sizes, lacking=lacking), VIRTIO)
    assert caught.value.code is Code.GUEST_SPACE
