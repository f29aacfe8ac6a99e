"""Families that cannot be built here, as file trees of their real layout: everything short of booting.

Each guest's programs write down how they were called, and build images with what they were told to put in.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hyper2kvmd.domain.model import Machine
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.change import Change, FixResult, encode
from hyper2kvmd.guest.inspect import Inspection, inspect
from hyper2kvmd.guest.linux.fix import fix
from hyper2kvmd.guest.linux.kernels import Kernel
from hyper2kvmd.guest.options import FixOptions, Nic
from hyper2kvmd.guest.session import read_text
from tests.appliance import Workshop
from tests.guests import phony

FIRST, SECOND = "00:50:56:9c:00:01", "00:50:56:9c:00:02"
ONE_CARD = FixOptions(nics=(Nic(FIRST),))
TWO_CARDS = FixOptions(nics=(Nic(FIRST), Nic(SECOND)))
# What the guests' images have from VMware, and what they get.
ON_VMWARE = {"mptbase", "mptscsih", "mptspi", "scsi_transport_spi", "sd_mod", "vmw_pvscsi", "vmxnet3"}
MODULES = {"virtio_blk", "virtio_net", "virtio_scsi"}
DRACUT = ["dracut", "--force", "--no-hostonly", "--no-hostonly-cmdline", "--mdadmconf", "--lvmconf"]
ADMIN_ID = "scsi-36000c29d5e8a4b7c1f3e2d1c0b9a8f7e"

pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Repaired:
    """A guest that was repaired. files: of the guest, by path, after the first time; "" for one that is not there.

    again: what was changed when it was repaired again, if it was. calls: the words of each call of the guest's programs
    that were recorded, the first time. text: fills in UUIDs.
    """

    inspection: Inspection
    result: FixResult
    again: tuple[Change, ...]
    files: Mapping[str, str]
    calls: list[list[str]]
    text: Callable[[str], str]

    def edited(self) -> dict[str, str]:
        """Which fixer changed which path; commands are left out."""
        return {change.path: change.fixer for change in self.result.changes if not change.command}

    def lines(self, path: str, word: str) -> list[str]:
        """The lines of a file that have a word in them."""
        return [line for line in self.files[path].split("\n") if word in line]


Repair = Callable[..., Repaired]


@pytest.fixture
def repair(shop: Workshop, tmp_path: Path) -> Repair:
    """A function that repairs an overlay of a family's disk and looks at it.

    reads: paths that are read besides those that were changed. written: files that the guest has, too. again: repair it
    twice, which takes twice as long.
    """

    def run(
        family: str,
        options: FixOptions = ONE_CARD,
        *,
        reads: tuple[str, ...] = (),
        written: Mapping[str, str] | None = None,
        again: bool = False,
    ) -> Repaired:
        disk = phony.disk(family)
        overlay = tmp_path / f"{family}.qcow2"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(disk.path), "-F", "raw", str(overlay)]
        subprocess.run(command, check=True)
        session = shop.put_in(overlay, "qcow2")
        inspection = inspect(session, firmware_hint="bios")
        for path, text in (written or {}).items():
            session.g.write(path, text.encode())
        result = fix(session, inspection, options)
        if again:
            repaired = inspect(session, firmware_hint="bios")
        else:
            for point in sorted(inspection.mounts, key=len):
                session.g.mount(inspection.mounts[point], point)
        paths = {*reads, *(change.path for change in result.changes)}
        files = {path: read_text(session.g, path) or "" for path in paths}
        record = read_text(session.g, phony.RECORD) or ""
        second = fix(session, repaired, options) if again else replace(result, changes=())
        calls = [line.split("\t") for line in record.splitlines()]
        assert result.proofs == second.proofs
        return Repaired(inspection, result, second.changes, files, calls, disk.text)

    return run


def drivers(*names: set[str]) -> str:
    return " ".join(sorted(set().union(*names)))


def proved(result: FixResult) -> dict[tuple[str, str], str]:
    """From kernel and driver to how it is known that the kernel has it in time."""
    found = {}
    for proof in result.proofs:
        words = proof.claim.split()
        if words[1] == "has":
            assert proof.ok
            found[words[0], words[2]] = proof.evidence
    return found


def red_hat(version: str, *, entry: int, name: str = "", rescue: bool = False) -> Kernel:
    """A kernel on the menu, as Red Hat's packages name its files."""
    name = name or version
    return Kernel(version, f"/boot/vmlinuz-{name}", f"/boot/initramfs-{name}.img", True, entry, rescue)


@pytest.mark.rest
def test_rhel7_is_repaired_for_both_kernels_and_its_rescue_image_is_left_alone(repair: Repair) -> None:
    new, old = "3.10.0-1160.119.1.el7.x86_64", "3.10.0-1160.el7.x86_64"
    rules = "/etc/udev/rules.d/70-persistent-net.rules"
    options = FixOptions(nics=TWO_CARDS.nics, remove_vmware_tools=True)
    guest = repair("rhel7", options, reads=("/boot/grub2/grubenv", "/etc/default/grub"))
    found = guest.inspection
    assert ("centos", "dracut", "grub2", "bios") == (found.distro, found.initramfs, found.bootloader, found.firmware)
    assert (
        red_hat(new, entry=0),
        red_hat(old, entry=1),
        red_hat(new, entry=2, name="0-rescue-2f6e0b5d8c7a4f1e9b3d6a5c4e8f7012", rescue=True),
        Kernel("3.10.0-957.el7.x86_64", "/boot/vmlinuz-3.10.0-957.el7.x86_64", None, False),
    ) == found.kernels
    assert {
        "/etc/fstab": "fstab",
        "/boot/grub2/grub.cfg": "bootloader",
        "/etc/default/grub": "bootloader",
        "/boot/grub2/device.map": "bootloader",
        "/etc/dracut.conf.d/90-hyper2kvm.conf": "initramfs",
        rules: "network",
        "/.autorelabel": "selinux",
    } == guest.edited()
    assert [
        guest.text("UUID=@sda3@               /                       xfs     defaults        0 0"),
        guest.text("UUID=@sda1@ /boot                   xfs     defaults        0 0"),
        guest.text("UUID=@sda2@               swap                    swap    defaults        0 0"),
    ] == guest.lines("/etc/fstab", "defaults")
    assert [
        guest.text(
            f"\tlinux16 /vmlinuz-{name} root=UUID=@sda3@ ro crashkernel=auto resume=UUID=@sda2@ rhgb quiet "
            "LANG=en_US.UTF-8"
        )
        for name in (new, old, "0-rescue-2f6e0b5d8c7a4f1e9b3d6a5c4e8f7012")
    ] == guest.lines("/boot/grub2/grub.cfg", "linux16")
    assert [guest.text('GRUB_CMDLINE_LINUX="crashkernel=auto resume=UUID=@sda2@ rhgb quiet"')] == guest.lines(
        "/etc/default/grub", "CMDLINE"
    )
    modules = drivers(ON_VMWARE, MODULES, {"virtio_pci"})
    assert [
        # What an agent of the site needs is not removed, but it does not start.
        ["systemctl", "mask", "vmtoolsd.service"],
        *(
            [*DRACUT, "--install", rules, "--drivers", modules, f"/boot/initramfs-{name}.img", name]
            for name in sorted((new, old))
        ),
    ] == [guest.calls[0], *sorted(guest.calls[1:], key=lambda call: call[-1])]
    assert {(version, driver) for version in (new, old) for driver in ("virtio_pci", "virtio_blk")} <= {
        *proved(guest.result)
    }
    # ens224 is bound by Red Hat's own rule and HWADDR; systemd is too old for .link files.
    assert [
        f'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{{address}}=="{FIRST}", ATTR{{dev_id}}=="0x0", '
        'ATTR{type}=="1", NAME="ens192"'
    ] == guest.lines(rules, "SUBSYSTEM")


@pytest.mark.rest
def test_rhel8_keeps_its_kernel_options_in_grubenv_on_the_esp(repair: Repair) -> None:
    new, old = "4.18.0-553.el8_10.x86_64", "4.18.0-372.9.1.el8.x86_64"
    grubenv = "/boot/efi/EFI/redhat/grubenv"
    rules = "/etc/udev/rules.d/70-persistent-net.rules"
    guest = repair("rhel8", FixOptions(nics=ONE_CARD.nics, remove_vmware_tools=True))
    found = guest.inspection
    assert ("rhel", "dracut", "grub2", "uefi") == (found.distro, found.initramfs, found.bootloader, found.firmware)
    assert (
        red_hat(new, entry=0),
        red_hat(old, entry=1),
        red_hat(new, entry=2, name="0-rescue-3c1b7e0f9a2d4c5e8b6f1a0d7e9c4b23", rescue=True),
    ) == found.kernels
    assert {
        "/etc/fstab": "fstab",
        grubenv: "bootloader",
        "/boot/efi/EFI/redhat/grub.cfg": "bootloader",
        "/etc/default/grub": "bootloader",
        "/etc/dracut.conf.d/90-hyper2kvm.conf": "initramfs",
        rules: "network",
    } == guest.edited()
    assert 1024 == len(encode(guest.files[grubenv]))
    assert [
        guest.text("kernelopts=root=UUID=@sda4@ ro crashkernel=auto resume=UUID=@sda3@ rhgb quiet ")
    ] == guest.lines(grubenv, "kernelopts")
    assert [
        guest.text('  set kernelopts="root=UUID=@sda4@ ro crashkernel=auto resume=UUID=@sda3@ rhgb quiet "')
    ] == guest.lines("/boot/efi/EFI/redhat/grub.cfg", "set kernelopts")
    assert [
        guest.text("UUID=@sda4@               /                       xfs     defaults        0 0"),
        guest.text("UUID=@sda2@ /boot                   xfs     defaults        0 0"),
        guest.text("UUID=@sda3@               none                    swap    defaults        0 0"),
    ] == guest.lines("/etc/fstab", "defaults")
    modules = drivers(ON_VMWARE, MODULES)
    images = [f"/boot/initramfs-{name}.img" for name in (new, old)]
    assert ["rpm", "--erase", "open-vm-tools", "open-vm-tools-desktop"] == guest.calls[0]
    assert sorted(
        [*DRACUT, "--install", rules, "--drivers", modules, image, name]
        for image, name in zip(images, (new, old), strict=True)
    ) == sorted(guest.calls[1:-1])
    # Exactly what is new: an edited file keeps its label, and the ESP has none.
    specification = "/etc/selinux/targeted/contexts/files/file_contexts"
    assert ["setfiles", "-m", specification] == guest.calls[-1][:3]
    assert sorted(["/etc/dracut.conf.d/90-hyper2kvm.conf", rules, "/var/lib/rpm", *images]) == sorted(
        guest.calls[-1][3:]
    )
    assert "the initramfs holds virtio_blk" == proved(guest.result)[new, "virtio_blk"]
    assert "built into the kernel" == proved(guest.result)[old, "virtio_pci"]
    # Its udev reads .link files, but knows no key there that VLANs on the card do not match as well.
    assert [
        f'SUBSYSTEM=="net", ACTION=="add", DRIVERS=="?*", ATTR{{address}}=="{FIRST}", ATTR{{dev_id}}=="0x0", '
        'ATTR{type}=="1", NAME="ens192"'
    ] == guest.lines(rules, "SUBSYSTEM")


@pytest.mark.rest
def test_rhel8_is_left_alone_once_it_is_repaired(repair: Repair) -> None:
    assert () == repair("rhel8", FixOptions(nics=ONE_CARD.nics, remove_vmware_tools=True), again=True).again


def test_rhel9_on_lvm_loses_the_list_of_devices_and_nothing_else_is_edited(repair: Repair) -> None:
    version = "5.14.0-427.13.1.el9_4.x86_64"
    link = "/etc/systemd/network/10-hyper2kvm-ens192.link"
    guest = repair("rhel9")
    found = guest.inspection
    assert ("rocky", "dracut", "grub2", "uefi") == (found.distro, found.initramfs, found.bootloader, found.firmware)
    assert {"/": "/dev/rl/root", "/boot": "/dev/sda2", "/boot/efi": "/dev/sda1"} == found.mounts
    assert (
        red_hat(version, entry=0),
        red_hat(version, entry=1, name="0-rescue-9d2f4e6a8b0c41d3a5e7f90b1c2d3e4f", rescue=True),
    ) == found.kernels
    assert {
        "/etc/lvm/devices/system.devices": "lvm",
        "/etc/dracut.conf.d/90-hyper2kvm.conf": "initramfs",
        link: "network",
    } == guest.edited()
    assert "" == guest.files["/etc/lvm/devices/system.devices"]
    modules = drivers(ON_VMWARE, MODULES)
    image = f"/boot/initramfs-{version}.img"
    assert [*DRACUT, "--install", link, "--drivers", modules, image, version] == guest.calls[0]
    assert ["setfiles"] == [call[0] for call in guest.calls[1:]]
    assert f"{version} still has lvm, which opened its root" in [proof.claim for proof in guest.result.proofs]
    assert {(version, "virtio_pci"), (version, "virtio_blk")} <= {*proved(guest.result)}


@pytest.mark.rest
def test_rhel10_by_uuid_needs_drivers_and_the_name_of_its_card_only(repair: Repair) -> None:
    version = "6.12.0-55.9.1.el10_0.x86_64"
    link = "/etc/systemd/network/10-hyper2kvm-ens33.link"
    guest = repair("rhel10")
    assert {"/etc/dracut.conf.d/90-hyper2kvm.conf": "initramfs", link: "network"} == guest.edited()
    assert [f"PermanentMACAddress={FIRST}"] == guest.lines(link, "MACAddress")
    assert [version, "setfiles"] == [guest.calls[0][-1], guest.calls[1][0]]
    assert {(version, "virtio_pci"), (version, "virtio_blk")} <= {*proved(guest.result)}
    assert [True, False] == [not kernel.rescue for kernel in guest.inspection.kernels]


@pytest.mark.rest
def test_cards_of_two_models_keep_their_addresses_and_their_names_in_the_initramfs(repair: Repair) -> None:
    """ens192 has a profile by name, the other card one by its driver; dracut's network names it ens33."""
    profile = "/etc/NetworkManager/system-connections/storage.nmconnection"
    line = 'kernel_cmdline="ip=10.1.0.2::10.1.0.1:255.255.255.0:web01:ens33:none"\n'
    written = {
        profile: "[connection]\nid=storage\ntype=ethernet\n\n[match]\ndriver=e1000;\n\n[ipv4]\naddress1=10.1.0.2/24\n",
        "/etc/dracut.conf.d/10-network.conf": line,
    }
    cards = FixOptions(nics=(Nic(FIRST, None, "E1000"), Nic(SECOND, None, "VmxNet3")))
    guest = repair("rhel9", cards, written=written, again=True)
    links = {name: f"/etc/systemd/network/10-hyper2kvm-{name}.link" for name in ("ens33", "ens192")}
    assert [f"PermanentMACAddress={FIRST}"] == guest.lines(links["ens33"], "MACAddress")
    assert [f"PermanentMACAddress={SECOND}"] == guest.lines(links["ens192"], "MACAddress")
    assert [f"mac-address={FIRST.upper()}"] == guest.lines(profile, "mac-address")
    assert [] == guest.lines(profile, "driver")
    assert set(links.values()) <= {*" ".join(guest.calls[0]).split()}
    codes = [warning.code for warning in guest.result.warnings]
    assert ["network_inferred"] == [code for code in codes if code.startswith("network")]
    assert () == guest.again


def test_dracut_that_leaves_a_driver_out_is_found_out(repair: Repair) -> None:
    with pytest.raises(MigrationError) as caught:
        repair("rhel9", written={"/usr/share/phony/forgets": "virtio_blk.ko.xz\n"})
    assert Code.FIX_UNPROVED is caught.value.code
    assert "5.14.0-427.13.1.el9_4.x86_64 has virtio_blk" in caught.value.message
    assert "the initramfs lacks virtio_blk" in caught.value.message
    assert "dracut --force --regenerate-all" in caught.value.hint


RHEL6 = ("2.6.32-754.35.1.el6.x86_64", "2.6.32-754.el6.x86_64")


@pytest.mark.rest
def test_rhel6_gets_no_options_that_its_dracut_does_not_know(repair: Repair) -> None:
    rules = "/etc/udev/rules.d/70-persistent-net.rules"
    guest = repair("rhel6", TWO_CARDS, again=True)
    found = guest.inspection
    assert ("rhel", "dracut", "grub-legacy", "bios") == (
        *(found.distro, found.initramfs, found.bootloader, found.firmware),
    )
    assert tuple(red_hat(version, entry=number) for number, version in enumerate(RHEL6)) == found.kernels
    assert {
        "/etc/fstab": "fstab",
        "/boot/grub/grub.conf": "bootloader",
        "/boot/grub/device.map": "bootloader",
        "/etc/dracut.conf.d/90-hyper2kvm.conf": "initramfs",
        rules: "network",
    } == guest.edited()
    roots = [line.split()[3] for line in guest.lines("/boot/grub/grub.conf", "\tkernel")]
    assert [guest.text("root=UUID=@sda3@")] * 2 == roots
    modules = drivers(ON_VMWARE, MODULES, {"virtio_pci"})
    assert sorted(
        ["dracut", "--force", "--mdadmconf", "--lvmconf", "--drivers", modules, f"/boot/initramfs-{v}.img", v]
        for v in RHEL6
    ) == sorted(guest.calls)
    assert {(version, driver) for version in RHEL6 for driver in ("virtio_pci", "virtio_blk")} == {
        *proved(guest.result)
    }
    # eth0 has its rule; the card that was eth1 is gone.
    assert 1 == len(guest.lines(rules, FIRST))
    assert ['NAME="eth1"'] == [line.split(", ")[-1] for line in guest.lines(rules, SECOND)]
    assert () == guest.again


@pytest.mark.rest
def test_guest_whose_kernels_have_no_virtio_is_proved_for_sata(repair: Repair) -> None:
    guest = repair("rhel6-without-virtio", TWO_CARDS)
    assert not guest.result.machine.virtio
    assert {(version, driver) for version in RHEL6 for driver in ("ahci", "sd_mod")} == {*proved(guest.result)}
    assert {drivers(ON_VMWARE, {"ahci", "sd_mod", "e1000e"})} == {call[5] for call in guest.calls}
    assert "no_virtio" in [warning.code for warning in guest.result.warnings]


@pytest.mark.rest
def test_rhel5_is_told_the_drivers_at_each_build(repair: Repair) -> None:
    version = "2.6.18-398.el5"
    guest = repair("rhel5", reads=("/etc/sysconfig/kernel",))
    found = guest.inspection
    assert ("rhel", "mkinitrd", "grub-legacy") == (found.distro, found.initramfs, found.bootloader)
    image = f"/boot/initrd-{version}.img"
    assert (Kernel(version, f"/boot/vmlinuz-{version}", image, True, 0),) == found.kernels
    # A disk that is not in the export must not stop the boot.
    assert {"/etc/fstab": "fstab"} == guest.edited()
    assert ["/dev/sdb1               /backup                 ext3    defaults,nofail        1 2"] == guest.lines(
        "/etc/fstab", "/backup"
    )
    options = [f"--with={name}" for name in ("virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net")]
    assert [["mkinitrd", "-f", *options, image, version]] == guest.calls
    assert {(version, "virtio_pci"), (version, "virtio_blk")} == {*proved(guest.result)}


@pytest.mark.rest
def test_sles15_on_btrfs_is_repaired_in_the_subvolume_that_boots(repair: Repair) -> None:
    version = "5.14.21-150500.55.52-default"
    guest = repair("sles15", again=True)
    found = guest.inspection
    assert ("sles", "dracut", "grub2", "bios") == (found.distro, found.initramfs, found.bootloader, found.firmware)
    assert {"/", "/var", "/home", "/.snapshots", "/boot/grub2/i386-pc"} == {*found.mounts}
    kernel = Kernel(version, f"/boot/vmlinuz-{version}", f"/boot/initrd-{version}", True, 0)
    # Somebody made links there: one is a second name of the kernel, one points to a kernel that is gone.
    assert (kernel,) == found.kernels
    assert {
        "/etc/fstab": "fstab",
        "/boot/grub2/grub.cfg": "bootloader",
        "/etc/default/grub": "bootloader",
        "/etc/dracut.conf.d/90-hyper2kvm.conf": "initramfs",
    } == guest.edited()
    assert [guest.text("UUID=@sda3@  swap                    swap   defaults                      0  0")] == (
        guest.lines("/etc/fstab", " swap ")
    )
    assert [] == guest.lines("/boot/grub2/grub.cfg", ADMIN_ID)
    assert 2 == len(guest.lines("/boot/grub2/grub.cfg", guest.text("resume=UUID=@sda3@")))
    modules = drivers(ON_VMWARE, MODULES, {"virtio_pci"})
    rules = "/etc/udev/rules.d/70-persistent-net.rules"  # which it has
    assert [[*DRACUT, "--install", rules, "--drivers", modules, kernel.initrd, version]] == guest.calls
    assert f"{version} still has btrfs, which opened its root" in [proof.claim for proof in guest.result.proofs]
    assert {(version, "virtio_pci"), (version, "virtio_blk")} == {*proved(guest.result)}
    assert () == guest.again


def test_sles11_is_built_with_its_own_mkinitrd_and_keeps_its_menu(repair: Repair) -> None:
    version = "3.0.101-63-default"
    rules = "/etc/udev/rules.d/70-persistent-net.rules"
    guest = repair("sles11", again=True)
    found = guest.inspection
    assert ("sles", "mkinitrd", "grub-legacy") == (found.distro, found.initramfs, found.bootloader)
    kernel = Kernel(version, f"/boot/vmlinuz-{version}", f"/boot/initrd-{version}", True, 0)
    assert (kernel,) == found.kernels
    assert {
        "/etc/fstab": "fstab",
        "/boot/grub/menu.lst": "bootloader",
        "/boot/grub/device.map": "bootloader",
        "/etc/sysconfig/bootloader": "bootloader",
        "/etc/sysconfig/kernel": "initramfs",
        rules: "network",
    } == guest.edited()
    assert [
        guest.text("UUID=@sda1@ swap                 swap       defaults              0 0"),
        guest.text("UUID=@sda2@ /                    ext3       acl,user_xattr        1 1"),
    ] == guest.lines("/etc/fstab", "UUID")
    # An entry and its failsafe twin, with their comments: mkinitrd must not have made the menu again.
    assert [guest.text("root=UUID=@sda2@")] * 2 == [
        line.split()[2] for line in guest.lines("/boot/grub/menu.lst", "    kernel")
    ]
    assert [] == guest.lines("/boot/grub/menu.lst", ADMIN_ID)
    assert 2 == len(guest.lines("/boot/grub/menu.lst", "YaST2 identifier"))
    assert [
        'INITRD_MODULES="mptspi ata_piix ata_generic ext3 virtio_pci virtio_blk virtio_scsi virtio_net"',
        'DOMU_INITRD_MODULES="xennet xenblk"',
    ] == guest.lines("/etc/sysconfig/kernel", "INITRD_MODULES=")
    modules = drivers(ON_VMWARE, MODULES, {"virtio_pci"})
    device = guest.text("/dev/disk/by-uuid/@sda2@")
    assert [["mkinitrd", "-B", "-k", kernel.path, "-i", kernel.initrd, "-m", modules, "-d", device]] == guest.calls
    assert {(version, "virtio_pci"), (version, "virtio_blk")} == {*proved(guest.result)}
    # The rule that udev wrote is for vmxnet3 only.
    assert ['NAME="eth0"', 'NAME="eth0"'] == [line.split(", ")[-1] for line in guest.lines(rules, FIRST)]
    assert () == guest.again


@pytest.mark.rest
def test_amazon_linux_with_virtio_built_in_is_not_written_to(repair: Repair) -> None:
    version = "5.10.177-158.645.amzn2.x86_64"
    guest = repair("amazon2")
    found = guest.inspection
    assert ("Amazon Linux 2", "dracut", "grub2") == (found.product_name, found.initramfs, found.bootloader)
    assert (red_hat(version, entry=0),) == found.kernels
    assert () == guest.result.changes
    assert [] == guest.calls
    assert {
        (version, "virtio_pci"): "built into the kernel",
        (version, "virtio_blk"): "built into the kernel",
    } == proved(guest.result)


@pytest.mark.rest
def test_photon_names_its_kernel_in_a_file_beside_it(repair: Repair) -> None:
    version = "5.10.152-4.ph4"
    guest = repair("photon")
    found = guest.inspection
    assert ("VMware Photon OS/Linux", "dracut", "grub2", "bios") == (
        *(found.product_name, found.initramfs, found.bootloader, found.firmware),
    )
    image = f"/boot/initrd.img-{version}"
    assert (Kernel(version, f"/boot/vmlinuz-{version}", image, True, 0),) == found.kernels
    # Partitions are named by their own UUIDs already.
    assert {"/etc/dracut.conf.d/90-hyper2kvm.conf": "initramfs"} == guest.edited()
    modules = drivers(ON_VMWARE, MODULES, {"virtio_pci"})
    assert [[*DRACUT, "--drivers", modules, image, version]] == guest.calls
    assert {(version, "virtio_pci"), (version, "virtio_blk")} == {*proved(guest.result)}


def test_a_guest_that_was_at_home_on_kvm_is_not_changed(tmp_path: Path, shop: Workshop) -> None:
    """As Nutanix exports it: said to have BIOS whatever is so, without NICs, and with nothing but virtio-scsi."""
    overlay = tmp_path / "rhel10.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b"]
    subprocess.run([*command, str(phony.disk("rhel10").path), str(overlay)], check=True)
    session = shop.put_in(overlay, "qcow2")
    inspection = inspect(session, firmware_hint="bios")
    assert "uefi" == inspection.firmware
    for kernel in inspection.kernels:
        place = f"usr/lib/modules/{kernel.version}/kernel/drivers"
        names = ("init", f"{place}/scsi/virtio_scsi.ko.xz", f"{place}/scsi/sd_mod.ko.xz")
        session.g.write(kernel.initrd, phony.initramfs(names, "zstd", microcode=True))
    result = fix(session, inspection, FixOptions())
    assert [] == [(change.fixer, change.path) for change in result.changes]
    assert Machine("q35", "scsi", "virtio") == result.machine
    assert {"virtio_scsi", "sd_mod"} <= {driver for kernel, driver in proved(result)}
