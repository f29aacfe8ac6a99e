"""FIX chooses the machine that the kernel which starts finds its root on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hyper2kvmd.domain.model import Machine
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.change import Edit
from hyper2kvmd.guest.inspect import Inspection
from hyper2kvmd.guest.linux import kernels
from hyper2kvmd.guest.linux.devices import Names
from hyper2kvmd.guest.linux.fix import _apply, choose_machine
from hyper2kvmd.guest.linux.fixers import FixPlan
from hyper2kvmd.guest.linux.fixers.network.udev import RULES
from hyper2kvmd.guest.linux.kernels import Image, Kernel
from hyper2kvmd.guest.linux.menu import Menu, MenuEntry
from hyper2kvmd.guest.options import FixOptions

VIRTIO = ("virtio", "virtio_ring", "virtio_pci", "virtio_blk")


def image(version: str, *drivers: str, entry: int = 0, builtin: tuple[str, ...] = ()) -> Image:
    """A kernel whose initramfs holds these drivers, which are all that it has."""
    kernel = Kernel(version, f"/boot/vmlinuz-{version}", f"/boot/initrd-{version}", True, entry)
    return Image(kernel, 1 << 20, frozenset(drivers), frozenset(builtin), dict.fromkeys(drivers, ()))


def inspection(*images: Image, disks: int = 1, default: int = 0) -> Inspection:
    """A guest with BIOS whose menu has these kernels."""
    entries = tuple(MenuEntry(one.kernel.path, (), one.kernel.version, one.kernel.version) for one in images)
    return Inspection(
        os_type="linux", distro="rhel", version="5.11", product_name="RHEL", arch="x86_64", hostname="a",
        package_format="rpm", root="/dev/sda1", mounts={"/": "/dev/sda1"},
        kernels=tuple(one.kernel for one in images), initramfs="mkinitrd", bootloader="grub", firmware="bios",
        firmware_evidence="", esp=None, boot_disk=0, disks=tuple(f"/dev/sd{n}" for n in range(disks)), filesystems=(),
        locked=(), menu=Menu("grub-legacy", (), entries, default), names=Names({}, {}), serial_console=False,
        warnings=(),
    )  # fmt: skip


class Links:
    """A guest in which some paths are links, through which nothing may be written."""

    def __init__(self, *links: str) -> None:
        self.links, self.files = set(links), dict[str, bytes]()

    def is_symlink(self, path: str) -> bool:
        return path in self.links

    def mkdir_p(self, path: str) -> None:
        assert path not in self.links

    def rm(self, path: str) -> None:
        self.links.remove(path)

    def write(self, path: str, content: bytes) -> None:
        assert path not in self.links
        self.files[path] = content

    def chmod(self, mode: int, path: str) -> None:
        assert path in self.files


@pytest.mark.parametrize("path", [RULES, "/etc/systemd/network/10-hyper2kvm-ens192.link", "/etc/default/new"])
def test_a_file_that_is_made_is_not_written_through_a_link_to_dev_null(path: str) -> None:
    guest = Links(path, "/etc/other")
    edit = Edit("network", path, None, "a rule\n", "a card keeps its name")
    assert [path] == [change.path for change in _apply(guest, [FixPlan((edit,))], FixOptions())]
    assert ({path: b"a rule\n"}, {"/etc/other"}) == (guest.files, guest.links)


OLD = "2.6.18-398.el5"


@pytest.mark.parametrize(
    "there",
    [image(OLD, "ata_piix", "sd_mod"), image(OLD, "piix", "ide_disk"), image(OLD, builtin=("piix", "ide_disk"))],
    ids=["libata", "the older layer", "built in"],
)
def test_an_old_kernel_without_virtio_is_proved_for_ide_which_its_domain_gets(there: Image) -> None:
    choice = choose_machine(inspection(there), [there], FixOptions())
    assert Machine("pc", "ide", "e1000") == choice.machine
    assert all(proof.ok for proof in kernels.prove(choice.able, choice.able, choice.bus))
    (warning,) = choice.warnings
    assert "the domain gets IDE disks and an e1000 network card" in warning.message


def test_an_old_kernel_that_has_only_ahci_does_not_find_the_disks_of_its_domain() -> None:
    there = image(OLD, "ahci", "sd_mod")
    with pytest.raises(MigrationError) as raised:
        choose_machine(inspection(there), [there], FixOptions())
    assert Code.FIX_UNPROVED == raised.value.code


def test_what_does_not_fit_on_ide_needs_ahci_too() -> None:
    without, with_it = image(OLD, "ata_piix", "sd_mod"), image(OLD, "ata_piix", "sd_mod", "ahci")
    assert "IDE and SATA" == choose_machine(inspection(with_it, disks=5), [with_it], FixOptions()).bus.name
    with pytest.raises(MigrationError):
        choose_machine(inspection(without, disks=5), [without], FixOptions())


def test_many_disks_of_an_old_kernel_stay_on_virtio_blk() -> None:
    there = image(OLD, *VIRTIO)
    choice = choose_machine(inspection(there, disks=22), [there], FixOptions())
    assert Machine("pc", "virtio", "virtio") == choice.machine
    assert kernels.VIRTIO == choice.bus


def test_many_disks_of_a_newer_kernel_need_virtio_scsi() -> None:
    blk, scsi = image("6.1.0", *VIRTIO), image("6.1.0", *VIRTIO, "virtio_scsi", "sd_mod")
    assert "scsi" == choose_machine(inspection(scsi, disks=21), [scsi], FixOptions()).machine.disks
    with pytest.raises(MigrationError):
        choose_machine(inspection(blk, disks=21), [blk], FixOptions())


def test_the_kernel_that_starts_decides_about_the_machine() -> None:
    old, new = image(OLD, *VIRTIO, entry=0), image("6.1.0", *VIRTIO, entry=1)
    for default, expected in ((0, "pc"), (1, "q35")):
        choice = choose_machine(inspection(old, new, default=default), [old, new], FixOptions())
        assert (expected, None) == (choice.machine.type, choice.default)


def test_a_default_without_virtio_gives_way_to_a_kernel_with_it_and_to_its_machine() -> None:
    old, new = image(OLD, "piix", "ide_disk", entry=0), image("6.1.0", *VIRTIO, entry=1)
    choice = choose_machine(inspection(old, new), [old, new], FixOptions())
    assert (Machine("q35", "virtio", "virtio"), 1, (new,)) == (choice.machine, choice.default, choice.able)
    kept = choose_machine(inspection(old, new), [old, new], FixOptions(bootloader=False))
    assert (Machine("pc", "ide", "e1000"), None) == (kept.machine, kept.default)


def test_a_rescue_image_alone_is_no_reason_for_a_machine() -> None:
    there = image("6.1.0", *VIRTIO)
    rescue = replace(there, kernel=replace(there.kernel, rescue=True))
    with pytest.raises(MigrationError):
        choose_machine(inspection(rescue), [rescue], FixOptions())


AHV = image("5.14.0", "virtio_pci", "virtio_scsi", "sd_mod")  # what dracut puts in where disks are virtio-scsi
AHV = replace(AHV, depends={**AHV.depends, "virtio_blk": (), "virtio_net": (), "vmxnet3": ()})


def test_a_guest_that_was_at_home_on_virtio_scsi_stays_there_and_its_image_is_left_alone() -> None:
    choice = choose_machine(inspection(AHV), [AHV], FixOptions())
    assert (Machine("q35", "scsi", "virtio"), ()) == (choice.machine, choice.warnings)
    assert () == AHV.lacks(choice.bus)
    assert all(proof.ok for proof in kernels.prove(choice.able, choice.able, choice.bus))


def test_a_guest_with_both_drivers_gets_virtio_blk() -> None:
    both = replace(AHV, modules=frozenset((*(AHV.modules or ()), "virtio_blk")))
    assert "virtio" == choose_machine(inspection(both), [both], FixOptions()).machine.disks
    assert () == both.lacks(kernels.VIRTIO)


def test_an_image_that_brings_up_an_old_network_card_is_given_the_new_one() -> None:
    """Such as one that asks a key server for the key of its root."""
    remote = replace(AHV, modules=frozenset((*(AHV.modules or ()), "vmxnet3")))
    assert ("virtio_blk", "virtio_net") == remote.lacks(kernels.VIRTIO_SCSI)


def test_a_rescue_entry_that_does_not_start_is_named_by_its_title_and_its_file() -> None:
    there = image("6.1.0", *VIRTIO)
    rescue = replace(
        image("6.1.0", entry=1),
        kernel=Kernel("6.1.0", "/boot/vmlinuz-0-rescue-a", "/boot/initramfs-0-rescue-a.img", True, 1, rescue=True),
    )
    found = inspection(there, rescue)
    assert found.menu is not None
    titled = replace(found.menu, entries=(found.menu.entries[0], replace(found.menu.entries[1], title="Rescue")))
    (warning,) = choose_machine(replace(found, menu=titled), [there, rescue], FixOptions()).warnings
    assert (
        "the entry Rescue on the boot menu (/boot/initramfs-0-rescue-a.img) does not find its root" in warning.message
    )
    assert "remove /boot/initramfs-0-rescue-a.img" in warning.hint
