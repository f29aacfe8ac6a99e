"""Build a test guest once, keep it in the cache, and export it the way hypersdk would:

python -m tests.guests.build debian12-bios --export /tmp/exports --vm-name web01 --dialect seed
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from tests.cache import cached
from tests.guests import appliance, native
from tests.guests.guest import CPUS, MEMORY_GIB, Guest
from tests.guests.ovf import Identity, descriptor
from tests.guests.recipe import GUESTS
from tests.guests.rootfs import Rootfs, make_rootfs, run
from tests.guests.shapes import LAYOUTS, partition

KIND = "guests"  # of what is kept in the cache

Dialect = Literal["seed", "go"]
DiskFormat = Literal["vmdk", "raw", "qcow2", "vhd", "vhdx", "vdi"]
# what an export of VMware's and one of Azure's contains, and what qemu-img takes to make it
_OPTIONS = {"vmdk": ("-o", "subformat=streamOptimized"), "vhd": ("-o", "subformat=fixed,force_size=on")}
_QEMU = {"vhd": "vpc"}  # its own name for a format


def build(name: str) -> Path:
    """Return the guest's raw boot disk. It is shared by all tests: boot it with snapshot, never write to it."""
    return disks(name)[0]


def disks(name: str) -> list[Path]:
    """Return all raw disks of the guest, in its order; shared, like the boot disk, which is the first."""
    if name not in GUESTS:
        raise ValueError(f"no guest is called {name!r}; there are {', '.join(GUESTS)}")
    guest = GUESTS[name]
    names = _disk_names(guest, "raw")

    def make(into: Path) -> None:
        boot, *data = (into / disk for disk in names)
        if _maker(guest) is appliance:
            appliance.make_disks(guest, _rootfs(guest.rootfs), [boot, *data])
        else:
            native.make_disks(guest, _rootfs(guest.rootfs), [boot])
            for disk, size, label in zip(data, guest.disk_sizes[1:], ("data", "logs"), strict=False):
                # whole, without partitions, as a disk is that was added to a running machine
                run("mke2fs", "-q", "-t", "ext4", "-L", label, disk, f"{size >> 10}k")

    directory = cached(KIND, name, digest(guest), make)
    return [directory / disk for disk in names]


def exported_disk(name: str, disk_format: DiskFormat = "vmdk") -> Path:
    """Return the guest's boot disk in a format it would be exported in; also shared, also read-only."""
    return exported_disks(name, disk_format)[0]


def exported_disks(name: str, disk_format: DiskFormat = "vmdk") -> list[Path]:
    """Return all disks of the guest in a format they would be exported in; beside each, its SHA-256."""
    raw = disks(name)
    names = _disk_names(GUESTS[name], disk_format)

    def make(into: Path) -> None:
        options = _OPTIONS.get(disk_format, ())
        for source, target in zip(raw, (into / disk for disk in names), strict=True):
            run("qemu-img", "convert", "-f", "raw", "-O", _QEMU.get(disk_format, disk_format), *options, source, target)
            target.with_suffix(".sha256").write_text(_sha256(target))

    directory = cached(KIND, f"{name}-{disk_format}", digest(GUESTS[name]), make)
    return [directory / disk for disk in names]


def digest(guest: Guest) -> str:
    """Name this version of a guest: a change to what makes it makes it anew."""
    sha = hashlib.sha256(f"{guest}\0{guest.rootfs.digest()}\0".encode())
    for path in _made_by(guest):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


def _made_by(guest: Guest) -> list[Path]:
    if _maker(guest) is native:
        return [Path(native.__file__), *sorted(native.PER_GUEST.iterdir())]
    shape = inspect.getfile(LAYOUTS[guest.name])
    return [Path(appliance.__file__), Path(partition.__file__), Path(shape)]


def _maker(guest: Guest) -> ModuleType:
    return appliance if guest.name in LAYOUTS else native


def _disk_names(guest: Guest, suffix: str) -> list[str]:
    return [f"disk-{number}.{suffix}" for number in range(len(guest.disk_sizes))]


def export(
    name: str,
    into: Path,
    *,
    vm_name: str,
    dialect: Dialect = "seed",
    checksum: bool = True,
    disk_format: DiskFormat = "vmdk",
    mac: str | None = None,
    identity: Identity | None = None,
) -> Path:
    """Make `<into>/<vm_name>/` with the disks and, written last, the manifest. Return that directory.

    The exporter leaves `nics` out; a `mac` puts one in, as its library can. With an `identity`, vSphere's descriptor
    lies beside the disks, and the manifest lists these backwards: the exporter takes them as they come.
    """
    guest = GUESTS[name]
    directory = into / vm_name
    directory.mkdir(parents=True)
    copies, checksums = [], []
    for number, disk in enumerate(exported_disks(name, disk_format)):
        copy = directory / f"{vm_name}-disk-{number}.{disk_format}"
        # a plain copy: a link would let a program that damages its source damage the cache
        run("cp", "--reflink=auto", "--sparse=auto", disk, copy)
        copies.append(copy)
        checksums.append(f"sha256:{disk.with_suffix('.sha256').read_text()}")
    numbers = range(len(copies))
    if identity:
        text = descriptor(guest, vm_name, copies, identity)
        (directory / f"{vm_name}.ovf").write_text(text, encoding="utf-8")
        numbers = numbers[::-1]
    entries = []
    for place, number in enumerate(numbers):
        if dialect == "seed":
            entry = _seed_disk(number, guest.disk_sizes[number], copies[number])
        else:
            entry = _go_disk(place, vm_name, copies[number])
        if checksum:
            entry["checksum"] = checksums[number]
        entries.append(entry)
    if dialect == "seed":
        path = directory / "manifest.json"
        manifest = _seed_manifest(vm_name, guest, entries)
    else:
        path = directory / "artifact-manifest.json"
        manifest = _go_manifest(vm_name, guest, entries)
    if mac:
        manifest["nics"] = [{"id": "nic-0", "mac": mac, "network": "VM Network"}]
    path.write_text(json.dumps(manifest, indent=2) + ("\n" if dialect == "seed" else ""))
    return directory


def _seed_disk(number: int, size: int, disk: Path) -> dict[str, Any]:
    return {
        "id": f"disk-{number}",
        "source_format": disk.suffix[1:],
        "bytes": size,
        "local_path": str(disk.absolute()),
        "boot_order_hint": number,
        "disk_type": "data" if number else "boot",
    }


def _go_disk(place: int, vm_name: str, disk: Path) -> dict[str, Any]:
    """A disk as the exporter has it: stale path, no boot disk, size of the file."""
    return {
        "id": f"disk-{place + 1}",
        "source_format": disk.suffix[1:],
        "bytes": disk.stat().st_size,
        "local_path": f"/var/lib/hypersdk/exports/{vm_name}/{disk.name}",
        "boot_order_hint": place + 1,
        "label": f"disk-{place + 1}",
        "disk_type": "data",
    }


def _seed_manifest(vm_name: str, guest: Guest, disks: list[dict[str, Any]]) -> dict[str, Any]:
    """Write as the project's own manual does in its first example."""
    return {
        "manifest_version": "1.0",
        "source": {
            "provider": "vsphere",
            "vm_id": "vm-1234",
            "vm_name": vm_name,
            "datacenter": "Datacenter",
            "export_timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "export_method": "hypersdk-govc",
        },
        "vm": {
            "cpu": CPUS,
            "mem_gb": MEMORY_GIB,
            "firmware": guest.firmware,
            "os_hint": guest.rootfs.vendor,
            "os_version": guest.os_version,
            "secure_boot": guest.secure_boot,
        },
        "disks": disks,
        "pipeline": {
            "inspect": {"enabled": True, "detect_os": True, "detect_kernel": True},
            "fix": {
                "enabled": True,
                "inject_drivers": True,
                "fix_fstab": True,
                "fix_grub": True,
                "regenerate_initramfs": True,
            },
            "convert": {"enabled": True, "target_format": "qcow2", "compression": False},
            "validate": {"enabled": True, "verify_checksum": True, "test_boot": False},
        },
    }


def _go_manifest(vm_name: str, guest: Guest, disks: list[dict[str, Any]]) -> dict[str, Any]:
    """Write as hypersdk's vSphere exporter does, without NICs."""
    stamp = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}.{time.time_ns() % 10**9:09d}Z"
    return {
        "manifest_version": "1.0",
        "source": {
            "provider": "vsphere",
            "vm_id": "vm-4711",
            "vm_name": vm_name,
            "datacenter": "DC1",
            "export_timestamp": stamp,
            "export_method": "hypersdk-govc",
        },
        "vm": {
            "cpu": CPUS,
            "mem_gb": MEMORY_GIB,
            "firmware": "efi" if guest.firmware == "uefi" else guest.firmware,
            "os_hint": "linux",
            "os_version": guest.os_name,
        },
        "disks": disks,
        "notes": ["Export method: ovf"],
        "metadata": {
            "hypersdk_version": "0.1.0",
            "job_id": "vm-4711",
            "created_at": stamp,
            "tags": {
                "export_format": "ovf",
                "provider": "vsphere",
                "vcenter_url": "https://vcenter.example/sdk",
            },
        },
        "pipeline": {
            "inspect": {"enabled": True, "collect_guest_info": True},
            "fix": {
                "enabled": True,
                "backup": True,
                "update_grub": True,
                "regen_initramfs": True,
                "fstab_mode": "stabilize-all",
                "remove_vmware_tools": True,
            },
            "convert": {"enabled": True, "compress": True},
            "validate": {"enabled": True, "check_image_integrity": True},
        },
        # The exporter names the directory that it writes to itself.
        "output": {"directory": f"/var/lib/hypersdk/exports/{vm_name}", "format": "qcow2"},
    }


def _rootfs(rootfs: Rootfs) -> Path:
    made = cached(KIND, f"rootfs-{rootfs.name}", rootfs.digest(), lambda into: make_rootfs(rootfs, into / "rootfs.tar"))
    return made / "rootfs.tar"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.guests.build", description=__doc__)
    parser.add_argument("guest", choices=[*GUESTS, "all"])
    parser.add_argument("--export", type=Path, metavar="DIR", help="make an export of it below DIR")
    parser.add_argument("--vm-name", default="web01")
    parser.add_argument("--dialect", choices=get_args(Dialect), default="seed")
    parser.add_argument("--format", choices=get_args(DiskFormat), default="vmdk")
    parser.add_argument("--mac", help="also list a network card with this address")
    parser.add_argument("--no-checksum", action="store_true")
    arguments = parser.parse_args()
    if arguments.guest == "all":
        if arguments.export:
            parser.error("--export takes one guest, not 'all'")
        for name in GUESTS:
            print(*disks(name))
        return
    if not arguments.export:
        print(*disks(arguments.guest))
        return
    print(
        export(
            arguments.guest,
            arguments.export,
            vm_name=arguments.vm_name,
            dialect=arguments.dialect,
            checksum=not arguments.no_checksum,
            disk_format=arguments.format,
            mac=arguments.mac,
        )
    )


if __name__ == "__main__":
    main()
