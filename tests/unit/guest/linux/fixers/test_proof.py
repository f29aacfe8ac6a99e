"""When an initramfs is proof enough, and when it is not."""

from __future__ import annotations

import dataclasses

import pytest

from hyper2kvmd.guest.linux import kernels
from hyper2kvmd.guest.linux.kernels import SATA, VIRTIO, Image, Kernel
from hyper2kvmd.guest.mounts import device_of
from hyper2kvmd.guest.storage import pick_root

DEPENDS = kernels.dependencies(
    (
        "kernel/drivers/virtio/virtio.ko:",
        "kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko",
        "kernel/drivers/virtio/virtio-pci.ko.xz: kernel/v/virtio_pci_modern_dev.ko.xz kernel/v/virtio_ring.ko",
        "kernel/v/virtio_pci_modern_dev.ko.xz:",
        "kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko",
    )
)
ALL = frozenset(DEPENDS)
IMAGE = Image(Kernel("6.1", "/boot/vmlinuz-6.1", "/boot/initrd.img-6.1", True), 7 << 20, ALL, frozenset(), DEPENDS)


def holds(image: Image) -> bool:
    return all(proof.ok for proof in kernels.prove([image], [image], VIRTIO))


def test_image_with_drivers_and_what_they_depend_on_is_proof() -> None:
    assert holds(IMAGE)
    assert IMAGE.lacks(VIRTIO) == ()


@pytest.mark.parametrize("module", sorted({*DEPENDS} - {"virtio"}))
def test_any_one_module_missing_is_no_proof(module: str) -> None:
    image = dataclasses.replace(IMAGE, modules=ALL - {module})
    assert not holds(image)
    assert image.lacks(VIRTIO)
    assert any(module in proof.evidence for proof in kernels.prove([image], [image], VIRTIO) if not proof.ok)


def test_what_is_built_in_needs_no_initramfs() -> None:
    assert holds(dataclasses.replace(IMAGE, modules=None, builtin=ALL, depends={}))
    # virtio_blk as a module of a kernel with the rest of virtio built in
    assert holds(dataclasses.replace(IMAGE, modules=frozenset({"virtio_blk"}), builtin=ALL - {"virtio_blk"}))


def test_kernel_without_the_driver_is_no_proof_and_asks_for_no_rebuild() -> None:
    image = dataclasses.replace(IMAGE, depends={}, modules=frozenset())
    assert not holds(image)
    assert image.lacks(VIRTIO) == ()


def test_modules_without_initramfs_are_no_proof() -> None:
    assert not holds(dataclasses.replace(IMAGE, modules=None))


def test_module_names_come_from_files_of_every_packing() -> None:
    names = kernels.module_names(
        ["usr/lib/modules/6/kernel/virtio-blk.ko.xz", "x/virtio.ko", "x/y.ko.zst", "init", "a.kof", "z.ko.gz"]
    )
    assert names == {"virtio_blk", "virtio", "y", "z"}


SNAPSHOTS = [
    "btrfsvol:/dev/sda2/@/.snapshots/1/snapshot",
    "btrfsvol:/dev/sda2/@/.snapshots/2/snapshot",
    "btrfsvol:/dev/sda2/@",
]


def test_of_many_snapshots_the_default_subvolume_is_the_system() -> None:
    assert pick_root(SNAPSHOTS, "@/.snapshots/2/snapshot") == SNAPSHOTS[1]
    assert pick_root(SNAPSHOTS, "") == SNAPSHOTS[2]
    assert pick_root(SNAPSHOTS[:2], "") == SNAPSHOTS[0]
    assert pick_root(["/dev/sda1", "/dev/sdb1"], "") == "/dev/sda1"


def test_device_of_a_subvolume_is_what_its_file_system_lies_on() -> None:
    assert "/dev/sda2" == device_of("btrfsvol:/dev/sda2/@/.snapshots/1/snapshot")
    assert "/dev/system/root" == device_of("btrfsvol:/dev/system/root/@rootfs")
    assert "/dev/mapper/sda3_crypt" == device_of("btrfsvol:/dev/mapper/sda3_crypt/@")
    assert "/dev/md127" == device_of("btrfsvol:/dev/md127/@")
    assert "/dev/vg/root" == device_of("/dev/vg/root")


def test_kernel_can_use_a_bus_if_its_image_holds_the_drivers_or_can_be_given_them() -> None:
    bare = dataclasses.replace(IMAGE, modules=frozenset())
    assert IMAGE.can(VIRTIO, rebuilt=False)
    assert (False, True) == (bare.can(VIRTIO, rebuilt=False), bare.can(VIRTIO, rebuilt=True))
    assert not IMAGE.can(SATA, rebuilt=True), "this kernel has no ahci"
    rescue = dataclasses.replace(bare, kernel=dataclasses.replace(IMAGE.kernel, rescue=True))
    assert not rescue.can(VIRTIO, rebuilt=True), "a rescue image is never made again"


def test_image_that_lost_what_opened_the_root_is_no_proof() -> None:
    old = dataclasses.replace(IMAGE, files=frozenset({"init", "sbin/cryptsetup", "sbin/lvm"}))
    new = dataclasses.replace(IMAGE, files=frozenset({"init", "usr/sbin/lvm", "etc/fstab"}))
    programs = {proof.claim.split()[3]: proof.ok for proof in kernels.prove([old], [new], VIRTIO)[2:]}
    assert {"cryptsetup": False, "lvm": True} == {name.rstrip(","): ok for name, ok in programs.items()}
