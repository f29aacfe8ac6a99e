"""Build a test guest once, keep it in `.cache/guests/`, and export it the way hypersdk would:

python -m tests.guests.build debian12-bios --export /tmp/exports --vm-name web01 --dialect seed
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from tests.guests import recipe

CACHE = Path(__file__).parents[2] / ".cache" / "guests"
ROOTFS = "rootfs"

Dialect = Literal["seed", "go"]
DiskFormat = Literal["vmdk", "raw", "qcow2", "vhdx", "vdi"]
# what a VMware export contains, and what qemu-img takes to make it
_OPTIONS = {"vmdk": ("-o", "subformat=streamOptimized")}


def build(name: str) -> Path:
    """Return the guest's raw disk. It is shared by all tests: boot it with snapshot, never write to it."""
    if name not in recipe.GUESTS:
        raise ValueError(f"no guest is called {name!r}; there are {', '.join(recipe.GUESTS)}")

    def make(into: Path) -> None:
        tarball = _rootfs() / "rootfs.tar"
        recipe.make_disk(recipe.GUESTS[name], tarball, into / "disk.raw")

    return _cached(name, make) / "disk.raw"


def exported_disk(name: str, disk_format: DiskFormat = "vmdk") -> Path:
    """Return the guest's disk in a format it would be exported in; also shared, also read-only."""

    def make(into: Path) -> None:
        target = into / f"disk.{disk_format}"
        options = _OPTIONS.get(disk_format, ())
        recipe.run("qemu-img", "convert", "-f", "raw", "-O", disk_format, *options, build(name), target)
        (into / "sha256").write_text(_sha256(target))

    return _cached(f"{name}-{disk_format}", make) / f"disk.{disk_format}"


def export(
    name: str,
    into: Path,
    *,
    vm_name: str,
    dialect: Dialect = "seed",
    checksum: bool = True,
    disk_format: DiskFormat = "vmdk",
    mac: str | None = None,
) -> Path:
    """Make `<into>/<vm_name>/` with the disk and, written last, the manifest. Return that directory.

    The exporter leaves `nics` out; a `mac` puts one in, as its library can.
    """
    disk = exported_disk(name, disk_format)
    directory = into / vm_name
    directory.mkdir(parents=True)
    copy = directory / f"{vm_name}-disk-0.{disk_format}"
    # a plain copy: a link would let a program that damages its source damage the cache
    recipe.run("cp", "--reflink=auto", "--sparse=auto", disk, copy)
    sha256 = (disk.parent / "sha256").read_text() if checksum else None
    firmware = recipe.GUESTS[name].firmware
    if dialect == "seed":
        path = directory / "manifest.json"
        manifest = _seed_manifest(vm_name, copy, firmware, disk_format, sha256)
    else:
        path = directory / "artifact-manifest.json"
        manifest = _go_manifest(vm_name, copy, firmware, disk_format, sha256)
    if mac:
        manifest["nics"] = [{"id": "nic-0", "mac": mac, "network": "VM Network"}]
    path.write_text(json.dumps(manifest, indent=2) + ("\n" if dialect == "seed" else ""))
    return directory


def _seed_manifest(vm_name: str, disk: Path, firmware: str, disk_format: str, sha256: str | None) -> dict[str, Any]:
    """Write as the project's own manual does in its first example."""
    entry: dict[str, Any] = {
        "id": "disk-0",
        "source_format": disk_format,
        "bytes": recipe.DISK_SIZE,
        "local_path": str(disk.absolute()),
        "checksum": f"sha256:{sha256}",
        "boot_order_hint": 0,
        "disk_type": "boot",
    }
    if sha256 is None:
        del entry["checksum"]
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
            "cpu": 2,
            "mem_gb": 1,
            "firmware": firmware,
            "os_hint": "debian",
            "os_version": "12",
            "secure_boot": False,
        },
        "disks": [entry],
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


def _go_manifest(vm_name: str, disk: Path, firmware: str, disk_format: str, sha256: str | None) -> dict[str, Any]:
    """Write as hypersdk's vSphere exporter does: stale path, no boot disk, size of the file, no NICs."""
    stale = f"/var/lib/hypersdk/exports/{vm_name}"
    stamp = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}.{time.time_ns() % 10**9:09d}Z"
    entry: dict[str, Any] = {
        "id": "disk-1",
        "source_format": disk_format,
        "bytes": disk.stat().st_size,
        "local_path": f"{stale}/{disk.name}",
        "checksum": f"sha256:{sha256}",
        "boot_order_hint": 1,
        "label": "disk-1",
        "disk_type": "data",
    }
    if sha256 is None:
        del entry["checksum"]
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
            "cpu": 2,
            "mem_gb": 1,
            "firmware": "efi" if firmware == "uefi" else firmware,
            "os_hint": "linux",
            "os_version": "Debian GNU/Linux 12 (64-bit)",
        },
        "disks": [entry],
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
        "output": {"directory": str(disk.parent.absolute()), "format": "qcow2"},
    }


def _rootfs() -> Path:
    return _cached(ROOTFS, lambda into: recipe.make_rootfs(into / "rootfs.tar"))


def _cached(what: str, make: Callable[[Path], None]) -> Path:
    """Return `.cache/guests/<what>-<recipe>`, made by `make` if it is not there yet.

    It is made under another name and renamed when complete: what has the right name is whole.
    """
    final = CACHE / f"{what}-{recipe.digest()}"
    if final.is_dir():
        return final
    with _locked(what):
        if final.is_dir():  # somebody else made it while we waited
            return final
        for old in CACHE.glob(f"{what}-*"):
            # left by an interrupted builder (we hold the lock, so it is gone) or made by an older recipe
            if old.is_dir() and _made_for(old.name) == what:
                shutil.rmtree(old, ignore_errors=True)  # a killed builder's last tool may still be writing
        started = time.monotonic()
        print(f"building {final.name} ...", file=sys.stderr, flush=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{what}-", suffix=".partial", dir=CACHE))
        try:
            partial.chmod(0o755)  # libvirt runs QEMU as another user
            make(partial)
            os.sync()
            partial.rename(final)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
        print(f"building {final.name} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return final


def _made_for(directory: str) -> str:
    return directory.removesuffix(".partial").rpartition("-")[0]


@contextlib.contextmanager
def _locked(what: str) -> Iterator[None]:
    """Let one builder at a time make this; the kernel frees the lock whatever happens to its holder."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.guests.build", description=__doc__)
    parser.add_argument("guest", choices=[*recipe.GUESTS, "all"])
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
        for name in recipe.GUESTS:
            print(build(name))
        return
    if not arguments.export:
        print(build(arguments.guest))
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
