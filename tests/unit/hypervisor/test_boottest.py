"""The boot test's judgement of what a console says; that guests really boot is in tests/e2e/test_import.py."""

from __future__ import annotations

import struct
import zlib

import pytest

from hyper2kvmd.hypervisor import boottest
from hyper2kvmd.hypervisor.boottest import judge, readable
from hyper2kvmd.hypervisor.png import png

BOOTED = b"\x1b[0;1;32m  OK  \x1b[0m] Reached target \x1b[0;1;39mmulti-user.target\x1b[0m - Multi-User System.\r\r\n"


@pytest.mark.parametrize(
    ("console", "expected"),
    [
        (b"Debian GNU/Linux 12 web01 ttyS0\r\n\r\nweb01 login: ", ("passed", "a login prompt")),
        (b"\r\nUbuntu 8.04 db ttyS0\r\n\r\ndb.example.org login: [  31.2] eth0: link up", ("passed", "a login prompt")),
        (BOOTED, ("passed", "systemd reached its target")),
        (b"[  OK  ] Reached target Multi-User System.\r\n", ("passed", "systemd reached its target")),
        (b"Last login: Mon Nov  2 10:00:01 on ttyS0\r\n", None),
        (b"[  OK  ] Reached target Basic System.\r\n[  OK  ] Reached target sysinit.target\r\n", None),
        (b"", None),
    ],
)
def test_a_guest_that_came_up_is_known_by_its_prompt_or_by_systemd(
    console: bytes, expected: tuple[str, str] | None
) -> None:
    assert expected == judge(readable(console))


@pytest.mark.parametrize(
    ("console", "reason"),
    [
        ("ALERT!  /dev/sda2 does not exist.  Dropping to a shell!\n\n(initramfs) ", "shell of its initramfs"),
        ("dracut-initqueue[312]: Warning: Could not boot.\nEntering emergency mode. Exit the shell", "emergency mode"),
        ("You are in emergency mode. After logging in, type ", "emergency mode"),
        ("Cannot open access to console, the root account is locked.\n", "emergency mode"),
        ("[    2.1] Kernel panic - not syncing: VFS: Unable to mount root fs", "kernel panicked"),
        ("error: no such device: 7c6e.\nEntering rescue mode...\ngrub rescue> ", "GRUB did not find its files"),
        ("Minimal BASH-like line editing is supported.\ngrub> ", "GRUB has no configuration"),
        ("Booting from Hard Disk...\nNo bootable device.\n", "no disk to boot from"),
        ("UEFI Interactive Shell v2.2\nEDK II\n", "no boot loader"),
        (">>Start PXE over IPv4.", "no boot loader"),
    ],
)
def test_a_guest_that_is_stuck_fails_with_the_reason(console: str, reason: str) -> None:
    outcome, said = judge(console) or ("", "")
    assert "failed" == outcome
    assert reason in said


def test_a_failure_after_what_looks_like_success_is_a_failure() -> None:
    assert "failed" == (judge(readable(BOOTED + b"web01 login: \nKernel panic - not syncing: x")) or ("",))[0]


def test_a_console_is_shown_without_anything_that_moves_a_cursor() -> None:
    assert "menu\nloading\n" == readable(b"\x1b[2J\x1b[1;1Hme\x1b[7mnu\x1b[0m\r\nload\x00ing\r\n\x1b]0;title\x07")
    assert "\ufffd" == readable(b"\xff")


def test_of_an_endless_console_the_end_is_kept() -> None:
    shown = readable(b"a" * (3 << 20) + b"the end")
    assert boottest.KEPT_BYTES == len(shown)
    assert shown.endswith("the end")


def test_a_screen_becomes_a_png_with_the_same_pixels() -> None:
    pixels = bytes(range(2 * 3 * 3))
    picture = png(b"P6\n2 3\n255\n" + pixels)
    assert picture is not None and picture.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(picture):
        (length,) = struct.unpack_from(">I", picture, at)
        kind, data = picture[at + 4 : at + 8], picture[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + data) == struct.unpack_from(">I", picture, at + 8 + length)[0]
        chunks[kind], at = data, at + 12 + length
    assert (2, 3, 8, 2) == struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    rows = zlib.decompress(chunks[b"IDAT"])
    assert pixels == b"".join(rows[row * 7 + 1 : row * 7 + 7] for row in range(3))


@pytest.mark.parametrize("data", [b"", b"P5\n2 3\n255\n123456", b"P6\n2 3\n255\nshort", b"P6\n99999 99999\n255\n"])
def test_what_is_no_picture_is_none(data: bytes) -> None:
    assert png(data) is None
