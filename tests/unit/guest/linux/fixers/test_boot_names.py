"""Devices on kernel command lines: what becomes of them, and that the root's name is proved."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hyper2kvmd.guest.change import Proof
from hyper2kvmd.guest.linux.devices import Device
from hyper2kvmd.guest.linux.fixers import bootloader
from hyper2kvmd.guest.linux.kernels import Image, Kernel
from tests.pace import work_of_at_most
from tests.unit.guest.linux.fixers.test_configuration import Guest, applied
from tests.unit.guest.linux.fixers.test_disks import SDA, view

GRUB = "/boot/grub/grub.cfg"
ENTRY = (
    "menuentry 'Linux {0}' {{\n search --no-floppy --fs-uuid --set=root {2}\n"
    " linux /vmlinuz-{0} {1}\n initrd /i-{0}\n}}\n"
)


def grub(*options: str, search: str = "boot-uuid") -> dict[str, str]:
    return {GRUB: "set default=0\n" + "".join(ENTRY.format(n, line, search) for n, line in enumerate(options))}


def image(entry: int) -> Image:
    kernel = Kernel(str(entry), f"/boot/vmlinuz-{entry}", f"/boot/i-{entry}", True, entry)
    return Image(kernel, 1, frozenset(), frozenset(), {})


def repaired(options: str) -> tuple[str, list[str]]:
    """The options after the fix, and the warnings."""
    guest = Guest(grub(options))
    plan = bootloader.plan(view(guest))
    text = applied(guest, plan).files[GRUB]
    assert () == bootloader.plan(view({GRUB: text})).edits
    line = next(line for line in text.split("\n") if "linux" in line and "menuentry" not in line)
    return line.split("vmlinuz-0 ")[1], [finding.message for finding in plan.warnings]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("root=/dev/sda3 ro", "root=UUID=root ro"),
        ("root=/dev/mapper/mpatha3", "root=UUID=root"),
        ("root=/dev/xvda3 console=hvc0", "root=UUID=root console=hvc0"),
        ("root=/dev/nvme0n1p3", "root=UUID=root"),
        ("root=/dev/sda3 mount.usr=/dev/sdb1", "root=UUID=root mount.usr=UUID=data"),
        ("root=/dev/sda3 systemd.mount-extra=/dev/sdb1:/data:ext4:ro",
         "root=UUID=root systemd.mount-extra=UUID=data:/data:ext4:ro"),
        ("root=/dev/sda3 systemd.swap-extra=/dev/sda2", "root=UUID=root systemd.swap-extra=UUID=swap"),
        ("root=/dev/sda3 rootflags=subvol=@,device=/dev/sdb,device=/dev/sdc", "root=UUID=root rootflags=subvol=@"),
        ("root=/dev/sda3 rootflags=device=/dev/sda3,subvol=@ ro", "root=UUID=root rootflags=subvol=@ ro"),
        ("root=/dev/sda3 rootflags=logdev=/dev/sdb2", "root=UUID=root rootflags=logdev=/dev/disk/by-partuuid/q2"),
    ],
)  # fmt: skip
def test_every_device_on_a_kernel_line_gets_a_name_that_stays(options: str, expected: str) -> None:
    assert (expected, []) == repaired(options)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("root=/dev/sdb1 ro", "root=UUID=data ro"),  # of another system, as os-prober puts it on the menu
        ("root=/dev/disk/by-path/pci-0000:03:00.0-scsi-0:0:1:0-part1", "root=UUID=data"),
        ("root=/dev/sda1", "root=UUID=boot"),
        ("root=/dev/sda3 single", "root=UUID=root single"),
        ("root=/dev/sda2", "root=UUID=root"),  # swap, where nothing can start from
        ("root=/dev/sdb9", "root=UUID=root"),
    ],
)
def test_an_entry_of_another_system_keeps_its_own_root(other: str, expected: str) -> None:
    guest = Guest(grub("root=/dev/sda3 ro", other))
    new = applied(guest, bootloader.plan(view(guest))).files
    assert " linux /vmlinuz-0 root=UUID=root ro\n" in new[GRUB]
    assert f" linux /vmlinuz-1 {expected}\n" in new[GRUB]


def test_a_device_that_is_not_there_is_said_with_the_reason() -> None:
    options, (warning,) = repaired("root=/dev/sda3 resume=/dev/sdc2")
    assert "root=UUID=root resume=/dev/sdc2" == options
    assert f"{GRUB} has resume=/dev/sdc2 on a kernel command line: no disk of this export has that device" == warning


def test_a_resume_device_that_is_no_swap_is_not_taken() -> None:
    assert "resume=/dev/sda1" in repaired("root=/dev/sda3 resume=/dev/sda1")[0]


def proofs(files: Mapping[str, str], *devices: Device, kernels: int = 1) -> tuple[Proof, ...]:
    return bootloader.prove(view(files, *devices), [image(number) for number in range(kernels)]).proofs


@pytest.mark.parametrize(
    ("options", "ok"),
    [
        ("root=UUID=root ro", True),
        ("root=PARTUUID=p3", True),
        ("root=/dev/disk/by-uuid/root", True),
        ("root=UUID=gone", False),
        ("root=UUID=data", False),  # another file system
        ("root=/dev/sda3", False),  # not repaired
        ("root=803", False),
        ("root=8:3", False),
        ("root=/dev/mapper/vg-root", False),  # no such volume
    ],
)
def test_the_entry_that_starts_must_name_the_guests_root(options: str, ok: bool) -> None:
    assert [ok] == [proof.ok for proof in proofs(grub(options))]


@pytest.mark.parametrize("options", ["ro quiet", "root=$other ro", "root=zfs:rpool/ROOT", "root=/dev/nfs"])
def test_what_names_no_root_that_could_be_known_is_not_claimed(options: str) -> None:
    assert () == proofs(grub(options))


def test_a_root_that_two_devices_have_is_no_proof() -> None:
    twin = Device("/dev/sdb3", "xfs", "root", part_uuid="q3", disk="/dev/sdb")
    (proof,) = proofs(grub("root=UUID=root"), *SDA, Device("/dev/sdb", disk="/dev/sdb"), twin)
    assert not proof.ok
    assert "root=UUID=root is /dev/sda3, /dev/sdb3" == proof.evidence


def test_another_entry_with_another_root_is_said_and_no_reason_to_fail() -> None:
    files = grub("root=UUID=root", "root=UUID=gone")
    found = bootloader.prove(view(files), [image(0), image(1)])
    assert [True] == [proof.ok for proof in found.proofs]
    assert ["the entry Linux 1 of the boot menu does not start this guest: root=UUID=gone is no device here"] == [
        finding.message for finding in found.warnings
    ]


def test_what_grub_searches_for_must_not_be_there_twice() -> None:
    boot = "0a1b2c3d-1111-4222-8333-444455556666"
    one, other = (Device(f"/dev/{name}", "ext4", boot, disk=f"/dev/{name[:3]}") for name in ("sda1", "sdb1"))
    found = proofs(grub("root=UUID=root", search=boot), SDA[0], one, SDA[3], Device("/dev/sdb", disk="/dev/sdb"), other)
    assert [True, False] == [proof.ok for proof in found]
    assert "/dev/sda1 and /dev/sdb1 both have it" == found[1].evidence


@pytest.mark.parametrize("more", [" \n" * (1 << 18), "search " + "--fs-uuid " * (1 << 16), "search\t" * (1 << 16)])
def test_a_menu_made_to_keep_us_busy_does_not_when_it_is_proved(more: str) -> None:
    files = {GRUB: grub("root=UUID=root")[GRUB] + more}
    with work_of_at_most(5):
        assert [True] == [proof.ok for proof in proofs(files)]


def test_options_in_grubenv_and_in_bls_files_are_read_as_grub_does() -> None:
    files = {
        "/boot/grub2/grub.cfg": "load_env\nset default_kernelopts=x\nblscfg\n",
        "/boot/grub2/grubenv": "# GRUB Environment Block\nsaved_entry=a\nkernelopts=root=UUID=root ro \n####",
        "/boot/loader/entries/a.conf": "title A\nlinux /vmlinuz-0\ninitrd /i-0\noptions $kernelopts $tuned quiet\n",
    }
    guest = view(files)
    assert guest.inspection.menu is not None
    assert "UUID=root" == guest.inspection.menu.entries[0].option("root")
    assert [True] == [proof.ok for proof in proofs(files)]
