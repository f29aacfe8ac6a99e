"""What the fixers do to the guest's configuration files, as text in and text out."""

from __future__ import annotations

from collections.abc import Container, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.guest.change import Edit, decode, encode
from hyper2kvmd.guest.linux.devices import Became, changes_with_hardware
from hyper2kvmd.guest.linux.fixers.disks import crypttab, fstab, resume
from hyper2kvmd.guest.linux.fixers.initramfs import initramfs_tools as initramfs
from hyper2kvmd.guest.linux.fixers.initramfs import mkinitrd
from hyper2kvmd.guest.linux.kernels import VIRTIO
from hyper2kvmd.text import printable

KNOWN = {"/dev/sda1": "UUID=efi", "/dev/sda2": "UUID=root", "/dev/sda3": "UUID=swap", "/dev/sdb1": "UUID=data"}


def rewritten(text: str, known: Mapping[str, str] = KNOWN, missing: Container[str] = ()) -> fstab.Rewritten:
    def becomes(spec: str, type: str, where: str) -> Became:
        if spec in missing or (changes_with_hardware(spec) and spec not in known):
            return Became(None, None, "it is not there")
        return Became(None, known.get(spec, spec), "")

    return fstab.rewrite(text, becomes)


def replaced(new: fstab.Rewritten) -> tuple[str, ...]:
    return tuple(name.before for name in new.names if name.after != name.before)


def unresolved(new: fstab.Rewritten) -> tuple[tuple[str, str], ...]:
    return tuple((entry.spec, entry.where) for entry, _ in new.unresolved)


FSTAB = """\
# /etc/fstab: static file system information.
#/dev/sda9 /old ext4 defaults 0 0
/dev/sda2\t/               ext4    errors=remount-ro 0       1
  /dev/sda3 none swap sw 0 0   # with a comment
UUID=abc /home ext4 defaults 0 2
LABEL=x /x xfs defaults 0 0
/dev/mapper/vg-var /var xfs defaults 0 0
/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0
/dev/fd0 /media/floppy auto rw,user,noauto 0 0
server:/srv /srv nfs defaults 0 0
tmpfs /tmp tmpfs size=1g 0 0
/dev/sdc1 /backup ext4 defaults 0 2
/dev/sdd1 /scratch\\040space ext4
/dev/sde1 /usb vfat user,noauto 0 0
/dev/sdb1 /data ext4 defaults 0 2"""


def test_fstab_changes_device_names_and_nothing_else() -> None:
    expected = (
        FSTAB.replace("\n/dev/sda2", "\nUUID=root")
        .replace("  /dev/sda3", "  UUID=swap")
        .replace("/dev/sdb1", "UUID=data")
        .replace("/backup ext4 defaults", "/backup ext4 defaults,nofail")
        .replace("/scratch\\040space ext4", "/scratch\\040space ext4 nofail")
    )
    new = rewritten(FSTAB)
    assert new.text == expected
    assert replaced(new) == ("/dev/sda2", "/dev/sda3", "/dev/sdb1")
    assert unresolved(new) == (("/dev/sdc1", "/backup"), ("/dev/sdd1", "/scratch space"))


def test_fstab_of_a_root_that_nobody_knows_does_not_get_nofail() -> None:
    assert rewritten("/dev/sdz1 / ext4 defaults 0 1\n").text == "/dev/sdz1 / ext4 defaults 0 1\n"


def test_fstab_line_of_a_file_system_that_is_on_no_disk_gets_nofail_unless_it_is_the_root_or_remote() -> None:
    text = "UUID=gone /data ext4 defaults 0 2\nUUID=gone / ext4 defaults 0 1\nUUID=gone /net ext4 _netdev 0 0\n"
    new = rewritten(text, missing={"UUID=gone"})
    assert text.replace("/data ext4 defaults", "/data ext4 defaults,nofail") == new.text
    assert (("UUID=gone", "/data"),) == unresolved(new)


def test_fstab_that_is_rewritten_twice_is_rewritten_once() -> None:
    once = rewritten(FSTAB).text
    twice = rewritten(once)
    assert (twice.text, replaced(twice)) == (once, ())


words = st.text(st.characters(blacklist_characters=" \t\n", blacklist_categories=["Cs"]), min_size=1, max_size=12)
blanks = st.text(" \t", min_size=1, max_size=3)
specs = st.sampled_from(
    [*KNOWN, "/dev/sdq7", "/dev/sr0", "UUID=a-b", "LABEL=x", "proc", "#/dev/sda2", "#", "/dev/mapper/v"]
)


@st.composite
def lines(draw: st.DrawFn) -> str:
    parts = [draw(specs | words)]
    for _ in range(draw(st.integers(0, 6))):
        parts += [draw(blanks), draw(words)]
    return draw(st.just("") | blanks) + "".join(parts) + draw(st.just("") | blanks)


@given(st.lists(lines() | st.text(max_size=30)).map("\n".join), st.booleans())
def test_fstab_keeps_every_other_byte(text: str, newline: bool) -> None:
    text += "\n" * newline
    new = rewritten(text)
    # Undoing the two things that it may do gives the old text back, line by line.
    for old_line, new_line in zip(text.split("\n"), new.text.split("\n"), strict=True):
        if old_line == new_line:
            continue
        spec = old_line.split()[0]
        name = KNOWN.get(spec)
        if name:
            assert new_line == old_line.replace(spec, name, 1)
        else:
            added = (",nofail", " nofail", " auto nofail")
            assert old_line in [new_line.replace(one, "", 1) for one in added]


@given(st.binary(max_size=300))
def test_text_of_any_bytes_is_written_back_as_the_same_bytes(data: bytes) -> None:
    assert encode(decode(data)) == data
    assert rewritten(decode(data), {}).text.count("\n") == data.count(b"\n")


def test_crypttab_uses_the_partition_for_what_is_encrypted_afresh_at_every_boot() -> None:
    def becomes(spec: str, fresh: bool) -> Became:
        return Became(None, "PARTUUID=p3" if fresh else KNOWN.get(spec, spec if "abc" in spec else None), "gone")

    text = (
        "# <target> <source> <key> <options>\n"
        "data /dev/sdb1 none luks,discard\n"
        "swap\t/dev/sda3\t/dev/urandom\tswap,cipher=aes-xts-plain64\n"
        "other UUID=abc none luks\n"
        "gone /dev/sdz1 none luks"
    )
    new = crypttab.rewrite(text, becomes)
    expected = text.replace("/dev/sdb1", "UUID=data").replace("/dev/sda3", "PARTUUID=p3")
    assert new.text == expected.replace("/dev/sdz1 none luks", "/dev/sdz1 none luks,nofail")
    assert [(5, "gone")] == [(name.line, name.use) for name in new.unresolved]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("data UUID=abc /dev/sdb1:/data.key luks,keyscript=/lib/cryptsetup/scripts/passdev", "/dev/disk/by-uuid/data"),
        ("data UUID=abc /data.key:/dev/sdb1 luks", "/dev/disk/by-uuid/data"),
        ("data UUID=abc none luks,header=/dev/sdb1", "/dev/disk/by-uuid/data"),
        ("data UUID=abc /root/dev/sdb1 luks", "/dev/sdb1"),
        ("data UUID=abc /dev/mapper/key none", "/dev/sdb1"),
    ],
)
def test_crypttab_finds_keys_and_headers_on_other_devices(line: str, expected: str) -> None:
    new = crypttab.rewrite(line, lambda spec, fresh: Became(None, KNOWN.get(spec, spec), ""))
    assert (line.replace("/dev/sdb1", expected), ()) == (new.text, new.unresolved)


def test_crypttab_whose_key_is_on_a_disk_that_is_missing_does_not_stop_the_boot() -> None:
    by_path = "/dev/disk/by-path/pci-0000:02:01.0-scsi-0:0:1:0-part1"
    text = f"data /dev/sdb1 {by_path}:/key luks\n"
    new = crypttab.rewrite(text, lambda spec, fresh: Became(None, KNOWN.get(spec), "no disk"))
    assert f"data UUID=data {by_path}:/key luks,nofail\n" == new.text
    assert [by_path] == [name.before for name in new.unresolved]


def test_resume_device_is_replaced_where_it_is_assigned() -> None:
    text = "# RESUME=/dev/sda3\nRESUME=/dev/sda3\nMODULES=list\n"
    assert resume.rewrite(text, KNOWN.get) == "# RESUME=/dev/sda3\nRESUME=UUID=swap\nMODULES=list\n"
    assert resume.rewrite('RESUME="/dev/sda3"', KNOWN.get) == 'RESUME="UUID=swap"'
    assert resume.rewrite("RESUME=none\n", KNOWN.get) == "RESUME=none\n"


def test_module_list_gets_the_drivers_that_it_does_not_name() -> None:
    text = "# list\nvirtio-pci\next4"
    new = initramfs.with_block(text, ["virtio_pci", "virtio_blk"])
    assert new == f"# list\nvirtio-pci\next4\n{initramfs.BEGIN}\nvirtio_blk\n{initramfs.END}\n"
    assert initramfs.with_block(new, ["virtio_pci", "virtio_blk"]) == new
    assert initramfs.with_block("virtio_blk\n", ["virtio_blk"]) == "virtio_blk\n"


@given(st.text(max_size=200))
def test_module_list_is_stable_after_one_change(text: str) -> None:
    once = initramfs.with_block(text, VIRTIO.ways[0])
    assert initramfs.with_block(once, VIRTIO.ways[0]) == once
    assert once.startswith(text) or initramfs.BEGIN in text


def test_diff_in_the_report_shows_hostile_bytes_harmlessly() -> None:
    change = Edit("fstab", "/etc/fstab", "a\x1b[31m\n", "b\n", "x").done()
    assert "\x1b" not in change.diff
    assert change.diff.startswith("--- a/etc/fstab\n+++ b/etc/fstab\n")
    assert printable("a\x00b\nc" * 100, 10) == "a�b�ca�b�…"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('INITRD_MODULES="mptspi ata_piix"\n', 'INITRD_MODULES="mptspi ata_piix virtio_blk"\n'),
        ("INITRD_MODULES='mptspi'\n", 'INITRD_MODULES="mptspi virtio_blk"\n'),
        ("INITRD_MODULES=mptspi\n", 'INITRD_MODULES="mptspi virtio_blk"\n'),
        ("INITRD_MODULES=\n", 'INITRD_MODULES="virtio_blk"\n'),
        ('INITRD_MODULES="mptspi \\\n  ata_piix"\nX=1\n', 'INITRD_MODULES="mptspi ata_piix virtio_blk"\nX=1\n'),
        ('INITRD_MODULES="mptspi\n\tvirtio_blk"\n', 'INITRD_MODULES="mptspi\n\tvirtio_blk"\n'),
        ('INITRD_MODULES="never closed\n', 'INITRD_MODULES="never closed\n'),
    ],
)
def test_suses_list_of_modules_gets_the_driver_whatever_its_quotes(text: str, expected: str) -> None:
    assert expected == mkinitrd.with_modules(text, ["virtio_blk"])
