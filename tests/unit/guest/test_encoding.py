"""Text of a guest in an older encoding, or with control characters: libguestfs does not take it, nor does JSON."""

from __future__ import annotations

from threading import Event
from typing import Any

import pytest

from hyper2kvmd.domain.model import Machine
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.change import Named, decode
from hyper2kvmd.guest.linux import kernels
from hyper2kvmd.guest.linux.menu import Menu, MenuEntry
from hyper2kvmd.guest.session import _translated, can_be_asked_for, read_text
from hyper2kvmd.job.results import Fixed

LATIN = decode("/daten/bücher".encode("latin-1"))
MACHINE = Machine("q35", "virtio", "virtio")


class Strict:
    """A handle that takes paths as the binding does."""

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        assert "\0" not in path
        path.encode()
        return False

    def glob_expand(self, pattern: str) -> list[str]:
        return []


@pytest.mark.parametrize(("path", "can"), [("/etc/fstab", True), ("/bücher", True), (LATIN, False), ("/a\0b", False)])
def test_only_paths_that_libguestfs_takes_are_asked_for(path: str, can: bool) -> None:
    assert can == can_be_asked_for(path)
    assert read_text(Strict(), path) is None


def test_kernel_with_an_odd_name_on_the_menu_is_not_there() -> None:
    entries = tuple(MenuEntry(f"/boot/vmlinuz-{name}", (f"/{name}",), "a", "0") for name in (LATIN, "\0", "6.1"))
    assert () == kernels.find(Strict(), Menu("grub2", (), entries, 0), None)


@pytest.mark.parametrize("name", ["ifcfg-Büro", "Verbindung für eth0", "é"])
def test_a_file_name_in_an_older_encoding_is_named_with_what_to_do(name: str) -> None:
    raw = name.encode("latin-1")
    with pytest.raises(MigrationError) as caught, _translated(Event(), lambda error: pytest.fail(str(error))):
        raw.decode()  # as the binding does
    assert (Code.FIX_FAILED, f"the guest has a file whose name is not UTF-8: {name}") == (
        caught.value.code,
        caught.value.message,
    )


def test_kernel_of_a_menu_with_endless_directories_is_not_looked_for() -> None:
    entry = MenuEntry("/a" * 2000, (), "a", "0")
    assert () == kernels.find(Strict(), Menu("grub2", (), (entry,) * 2000, 0), None)


@pytest.mark.parametrize("word", [LATIN, "/a\tb\x1b[31m", "/" + "x" * 100_000])
def test_report_shows_what_a_guest_wrote_as_short_text(word: str) -> None:
    name = Named("/etc/fstab", 2, word, f"LABEL={word}", f"UUID={word}", "/dev/sda1", "no other device has that name")
    shown: Any = Fixed(
        drivers_injected=(), boot_updated=False, proofs=(), machine=MACHINE, names=(name.shown("disk 1"),)
    )
    assert len(shown.model_dump_json().encode()) < 2000
    assert "disk 1" == shown.names[0].device
    assert all(getattr(shown.names[0], key).replace("\t", "").isprintable() for key in ("use", "before", "after"))
