"""The unit that remedies name is the one that this host has."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyper2kvmd.hypervisor.units import unit

LIBVIRTD = "lib/systemd/system/libvirtd.service"
MODULAR = ("usr/lib/systemd/system/virtqemud.service", "usr/lib/systemd/system/virtnetworkd.service")


@pytest.mark.parametrize(
    ("files", "enabled", "expected"),
    [
        ((LIBVIRTD,), (), ("libvirtd", "libvirtd")),
        (MODULAR, (), ("virtqemud", "virtnetworkd")),
        ((LIBVIRTD, *MODULAR), (), ("libvirtd", "libvirtd")),
        ((LIBVIRTD, *MODULAR), ("virtqemud.socket",), ("virtqemud", "virtnetworkd")),
        (MODULAR[:1], ("virtqemud.socket",), ("virtqemud", "virtnetworkd")),  # the one that is to be installed
        ((), (), ("libvirtd", "libvirtd")),
    ],
)
def test_the_unit_is_that_of_the_libvirt_that_is_there(
    files: tuple[str, ...], enabled: tuple[str, ...], expected: tuple[str, str], tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wants = tmp_path / "etc/systemd/system/sockets.target.wants"
    wants.mkdir(parents=True)
    for name in enabled:
        (wants / name).symlink_to("/usr/lib/systemd/system/" + name)
    assert expected == (unit(root=tmp_path), unit("network", root=tmp_path))
