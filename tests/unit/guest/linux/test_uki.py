"""Unified kernel images: what is in them, that it is proved, and that nobody tries to build one again."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.linux import kernels, menu, uki
from hyper2kvmd.guest.linux.devices import Names
from hyper2kvmd.guest.linux.fix import choose_machine
from hyper2kvmd.guest.linux.fixers import View, bootloader
from hyper2kvmd.guest.options import FixOptions
from hyper2kvmd.run import Tools
from tests.guests import phony
from tests.unit.guest.linux.fixers.test_disks import SDA, SDB
from tests.unit.guest.linux.test_fix import inspection

VERSION = "6.12.9-1"
DIRECTORY = f"usr/lib/modules/{VERSION}/kernel/drivers"
MODULES = (f"{DIRECTORY}/virtio/virtio_pci.ko", f"{DIRECTORY}/block/virtio_blk.ko")
PATH = "/boot/efi/EFI/Linux/arch.efi"


def image(*sections: tuple[str, bytes], virtual: int | None = None) -> bytes:
    """An EFI program with these sections. virtual: the length in memory of each, if it is another."""
    head = bytearray(b"MZ".ljust(60, b"\0") + struct.pack("<I", 64))
    head += b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, 16, 0) + bytes(16)
    at = len(head) + 40 * len(sections)
    body = b""
    for name, content in sections:
        padded = content.ljust(-(-len(content) // 512) * 512, b"\0")
        size = len(content) if virtual is None else virtual
        head += struct.pack("<8sIIII16x", name.encode(), size, 0, len(padded), at + len(body))
        body += padded
    return bytes(head) + body


def unified(*modules: str, options: str = "root=UUID=root rw") -> bytes:
    initramfs = phony.initramfs(["init", *modules], "gzip", microcode=True)
    parts = ((".uname", VERSION.encode()), (".cmdline", f"{options}\n\0".encode()), (".initrd", initramfs))
    return image((".text", b"code"), *parts, (".linux", b"kernel"))


class Guest:
    """A guest with one file on its ESP, and the list of modules of its kernel."""

    def __init__(self, content: bytes) -> None:
        modules = "".join(f"kernel/drivers/{path.partition('drivers/')[2]}:\n" for path in MODULES).encode()
        self.files = {PATH: content, f"/lib/modules/{VERSION}/modules.dep": modules}

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        return path in self.files

    def realpath(self, path: str) -> str:
        return path

    def filesize(self, path: str) -> int:
        return len(self.files[path])

    def pread(self, path: str, count: int, offset: int) -> bytes:
        return self.files[path][offset : offset + count]

    def read_file(self, path: str) -> bytes:
        return self.files[path]

    def download_offset(self, path: str, local: str, offset: int, size: int) -> None:
        Path(local).write_bytes(self.files[path][offset : offset + size])

    def glob_expand(self, pattern: str) -> list[str]:
        return [PATH] if pattern == "/boot/efi/EFI/Linux/*.efi" else []


def looked(guest: Guest, scratch: Path) -> tuple[menu.Menu, kernels.Image]:
    found = menu.read(lambda path: None, guest.glob_expand)
    assert found is not None
    (kernel,) = kernels.find(guest, found, None)
    (there,) = kernels.look(guest, [kernel], Tools(), scratch)
    return found, there


def test_an_image_is_read_by_its_sections() -> None:
    content = image((".uname", b"6.1\0"), (".cmdline", b"ro quiet\0"), (".linux", b"k"), (".initrd", b"i" * 700))
    found = uki.read(lambda at, size: content[at : at + size])
    assert found is not None
    assert ("6.1", "ro quiet") == (found.version, found.options)
    assert found.initrd is not None
    assert b"i" * 700 == content[found.initrd[0] : sum(found.initrd)]


@pytest.mark.parametrize(
    "content",
    [b"", b"MZ", b"MZ".ljust(64, b"\xff"), image((".text", b"grub")), image((".linux", b"k"))[:100], bytes(4096)],
    ids=["empty", "short", "no header", "another program", "cut off", "zeros"],
)
def test_what_is_no_unified_kernel_image_is_none(content: bytes) -> None:
    assert uki.read(lambda at, size: content[at : at + size]) is None


def test_a_kernel_with_virtio_in_its_image_is_proved_with_the_root_that_it_names(tmp_path: Path) -> None:
    guest = Guest(unified(*MODULES))
    found, there = looked(guest, tmp_path)
    assert (VERSION, True, True) == (
        there.kernel.version,
        there.kernel.sealed,
        there.can(kernels.VIRTIO, rebuilt=False),
    )
    assert [True, True] == [proof.ok for proof in kernels.prove([there], [there], kernels.VIRTIO)]
    by_name = {device.name: device for device in (*SDA, *SDB)}
    stand_in: Any = SimpleNamespace(root="/dev/sda3", menu=found)
    for options, ok in (("root=UUID=root", True), ("root=UUID=data", False), ("root=/dev/sda3", False)):
        view = View(guest, stand_in, Names(by_name, {("sd", (0,)): "/dev/sda"}))
        assert [ok] == [proof.ok for proof in bootloader.prove(view, [replace(there, options=options)]).proofs]


def test_an_image_without_virtio_is_refused_and_nobody_builds_it(tmp_path: Path) -> None:
    found, there = looked(Guest(unified()), tmp_path)
    assert not there.can(kernels.VIRTIO, rebuilt=True)
    guest = replace(inspection(there), menu=found, initramfs="dracut")
    with pytest.raises(MigrationError) as raised:
        choose_machine(guest, [there], FixOptions())
    assert Code.FIX_UNPROVED == raised.value.code
    assert f"in {PATH}, a unified kernel image, which only the guest can make" in raised.value.message


def test_images_and_other_entries_together_start_nobody_knows_which() -> None:
    files = {"/boot/efi/loader/entries/a.conf": "title A\nlinux /k\n", "/boot/efi/loader/loader.conf": "timeout 3\n"}

    def glob(pattern: str) -> list[str]:
        return [path for path in (*files, PATH) if path.rpartition("/")[0] == pattern.rpartition("/")[0]]

    found = menu.read(files.get, glob)
    assert found is not None
    assert (["a", "arch.efi"], None) == ([entry.name for entry in found.entries], found.default)
    files["/boot/efi/loader/loader.conf"] = "default arch*\n"
    named = menu.read(files.get, glob)
    assert named is not None
    assert 1 == named.default
