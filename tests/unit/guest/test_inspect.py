"""Which tools build the initramfs, by the programs that are there."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hyper2kvmd.guest.inspect import _initramfs

UPDATE = "/usr/sbin/update-initramfs"


class Programs:
    """The programs of a guest; update-initramfs is a script that runs one of the others."""

    def __init__(self, paths: Sequence[str], runs: str) -> None:
        self.paths, self.runs = paths, runs

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        return path in self.paths

    def pread(self, path: str, count: int, offset: int) -> bytes:
        return f'#!/bin/sh\n{self.runs} -o "$1"\n'.encode()


@pytest.mark.parametrize(
    ("paths", "runs", "name"),
    [
        (("/usr/sbin/mkinitramfs", UPDATE), "mkinitramfs", "initramfs-tools"),
        (("/usr/sbin/mkinitramfs", UPDATE, "/usr/bin/dracut"), "mkinitramfs", "initramfs-tools"),  # dracut-core only
        (("/usr/sbin/mkinitramfs", "/usr/bin/dracut"), "", "dracut"),  # a Debian that was given dracut
        (("/usr/sbin/mkinitramfs", "/usr/bin/dracut", UPDATE), "dracut", "dracut"),  # with a script of the old name
        (("/sbin/dracut", "/sbin/mkinitrd"), "", "dracut"),
        (("/sbin/mkinitrd",), "", "mkinitrd"),
        (("/usr/sbin/mkinitramfs",), "", "none"),
        ((), "", "none"),
    ],
)
def test_what_builds_the_initramfs_is_known_by_its_programs(paths: tuple[str, ...], runs: str, name: str) -> None:
    assert name == _initramfs(Programs(paths, runs))
