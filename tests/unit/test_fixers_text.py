"""What the fixers do to the guest's configuration files, as text in and text out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hyper2kvmd.guest.change import Edit, decode, encode, printable
from hyper2kvmd.guest.fixers import bootloader, crypttab, fstab, initramfs, resume
from hyper2kvmd.guest.grub import kernels

KNOWN = {"/dev/sda1": "UUID=efi", "/dev/sda2": "UUID=root", "/dev/sda3": "UUID=swap", "/dev/sdb1": "UUID=data"}


def by_mount(spec: str, where: str) -> str | None:
    return KNOWN.get(spec)


def by_key(key: str, spec: str, by_partition: bool) -> str | None:
    name = KNOWN.get(spec)
    return f"PART{name}" if name and by_partition else name


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
    new = fstab.rewrite(FSTAB, by_mount)
    assert new.text == expected
    assert new.replaced == ("/dev/sda2", "/dev/sda3", "/dev/sdb1")
    assert new.unresolved == (("/dev/sdc1", "/backup"), ("/dev/sdd1", "/scratch\\040space"))


def test_fstab_of_a_root_that_nobody_knows_does_not_get_nofail() -> None:
    assert fstab.rewrite("/dev/sdz1 / ext4 defaults 0 1\n", by_mount).text == "/dev/sdz1 / ext4 defaults 0 1\n"


def test_fstab_that_is_rewritten_twice_is_rewritten_once() -> None:
    once = fstab.rewrite(FSTAB, by_mount).text
    twice = fstab.rewrite(once, by_mount)
    assert (twice.text, twice.replaced) == (once, ())


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
    new = fstab.rewrite(text, by_mount)
    # Undoing the two things that it may do gives the old text back, line by line.
    for old_line, new_line in zip(text.split("\n"), new.text.split("\n"), strict=True):
        if old_line == new_line:
            continue
        spec = old_line.split()[0]
        name = KNOWN.get(spec)
        if name:
            assert new_line == old_line.replace(spec, name, 1)
        else:
            assert new_line.replace(",nofail", "", 1).replace(" nofail", "", 1) == old_line


@given(st.binary(max_size=300))
def test_text_of_any_bytes_is_written_back_as_the_same_bytes(data: bytes) -> None:
    assert encode(decode(data)) == data
    assert fstab.rewrite(decode(data), lambda spec, where: None).text.count("\n") == data.count(b"\n")


def test_crypttab_uses_the_partition_for_what_is_encrypted_afresh_at_every_boot() -> None:
    def stable(spec: str, fresh: bool) -> str | None:
        return "PARTUUID=p3" if fresh else KNOWN.get(spec)

    text = (
        "# <target> <source> <key> <options>\n"
        "data /dev/sdb1 none luks,discard\n"
        "swap\t/dev/sda3\t/dev/urandom\tswap,cipher=aes-xts-plain64\n"
        "other UUID=abc none luks\n"
        "gone /dev/sdz1 none luks"
    )
    new, replaced = crypttab.rewrite(text, stable)
    assert new == text.replace("/dev/sdb1", "UUID=data").replace("/dev/sda3", "PARTUUID=p3")
    assert replaced == ["/dev/sdb1", "/dev/sda3"]


def test_resume_device_is_replaced_where_it_is_assigned() -> None:
    text = "# RESUME=/dev/sda3\nRESUME=/dev/sda3\nMODULES=list\n"
    assert resume.rewrite(text, KNOWN.get) == "# RESUME=/dev/sda3\nRESUME=UUID=swap\nMODULES=list\n"
    assert resume.rewrite('RESUME="/dev/sda3"', KNOWN.get) == 'RESUME="UUID=swap"'
    assert resume.rewrite("RESUME=none\n", KNOWN.get) == "RESUME=none\n"


MENU = """\
set root='hd0,gpt2'
if [ x$feature_platform_search_hint = xy ]; then
  search --no-floppy --fs-uuid --set=root abc
fi
menuentry 'Debian' --class debian {
\techo 'root=/dev/sda2 in a message'
\tlinux\t/boot/vmlinuz-6.1.0-1-amd64 root=/dev/sda2 ro quiet resume=/dev/sda3
\tinitrd\t/boot/initrd.img-6.1.0-1-amd64
}
submenu 'Advanced' {
\tmenuentry 'old' {
\t\tlinuxefi /boot/vmlinuz-5.10.0-1-amd64 root=/dev/sda2 ro myroot=/dev/sda2 rootflags=x
\t\tinitrdefi /boot/initrd.img-5.10.0-1-amd64
\t}
\tmenuentry 'own kernel' {
\t\tlinux16 /boot/vmlinuz-own root=/dev/sda2 ro
\t}
\tmenuentry 'lvm' {
\t\tlinux /vmlinuz-6.1.0-1-amd64 root=/dev/mapper/vg-root
\t\tinitrd /initrd.img-6.1.0-1-amd64
\t}
}"""


def test_menu_changes_only_root_and_resume_on_kernel_lines() -> None:
    new, replaced = bootloader.rewrite_menu(MENU, by_key)
    expected = (
        MENU.replace("amd64 root=/dev/sda2", "amd64 root=UUID=root")
        .replace(" resume=/dev/sda3", " resume=UUID=swap")
        .replace("vmlinuz-own root=/dev/sda2", "vmlinuz-own root=PARTUUID=root")
    )
    assert new == expected
    assert len(replaced) == 4
    assert bootloader.rewrite_menu(new, by_key) == (new, [])


def test_menu_names_the_kernels_that_can_be_chosen_once_each() -> None:
    assert kernels(MENU) == ["vmlinuz-6.1.0-1-amd64", "vmlinuz-5.10.0-1-amd64", "vmlinuz-own"]


def test_grub_defaults_do_not_bring_the_device_name_back() -> None:
    text = (
        'GRUB_CMDLINE_LINUX_DEFAULT="quiet resume=/dev/sda3"\n'
        "GRUB_CMDLINE_LINUX='root=/dev/sda2 console=ttyS0'\n"
        "#GRUB_DISABLE_LINUX_UUID=true\n"
        "GRUB_DISABLE_LINUX_UUID=true # old habits\n"
        "GRUB_DEVICE=/dev/sda2"
    )
    assert bootloader.rewrite_defaults(text, by_key) == (
        'GRUB_CMDLINE_LINUX_DEFAULT="quiet resume=UUID=swap"\n'
        "GRUB_CMDLINE_LINUX='root=UUID=root console=ttyS0'\n"
        "#GRUB_DISABLE_LINUX_UUID=true\n"
        "#GRUB_DISABLE_LINUX_UUID=true # old habits\n"
        "GRUB_DEVICE=/dev/sda2"
    )


def test_module_list_gets_the_drivers_that_it_does_not_name() -> None:
    text = "# list\nvirtio-pci\next4"
    new = initramfs.with_block(text, ["virtio_pci", "virtio_blk"])
    assert new == f"# list\nvirtio-pci\next4\n{initramfs.BEGIN}\nvirtio_blk\n{initramfs.END}\n"
    assert initramfs.with_block(new, ["virtio_pci", "virtio_blk"]) == new
    assert initramfs.with_block("virtio_blk\n", ["virtio_blk"]) == "virtio_blk\n"


@given(st.text(max_size=200))
def test_module_list_is_stable_after_one_change(text: str) -> None:
    once = initramfs.with_block(text, initramfs.NEEDED)
    assert initramfs.with_block(once, initramfs.NEEDED) == once
    assert once.startswith(text) or initramfs.BEGIN in text


def test_diff_in_the_report_shows_hostile_bytes_harmlessly() -> None:
    change = Edit("fstab", "/etc/fstab", "a\x1b[31m\n", "b\n", "x").done()
    assert "\x1b" not in change.diff
    assert change.diff.startswith("--- a/etc/fstab\n+++ b/etc/fstab\n")
    assert printable("a\x00b\nc" * 100, 10) == "a�b�ca�b�…"
