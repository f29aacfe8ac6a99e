"""Exports as other tools leave them: the descriptor that ovftool wrote for a VM, with small real disks beside it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from hyper2kvmd.settings.model import Settings
from tests import ROOT

OVFTOOL = ROOT / "tests/data/ovf/ovftool.ovf"
DISKS = ("db01-disk1.vmdk", "db01-disk2.vmdk", "db01-disk3.vmdk")
NVRAM = "db01-file1.nvram"
# The least that is a descriptor, around the items of its hardware.
ENVELOPE = "<Envelope><VirtualSystem><VirtualHardwareSection>{}</VirtualHardwareSection></VirtualSystem></Envelope>"
# How tools spell a line of the .mf: ovftool and govc, and VirtualBox.
SPELLING = {"sha256": "SHA256({})= {}", "sha512": "SHA512({})= {}", "sha1": "SHA1 ({}) = {}"}


def accepting(settings: Settings, **changes: object) -> Settings:
    """The settings with such exports accepted, and nobody looking into the disks, which hold no system."""
    off = {"enabled": False}
    return Settings.model_validate(
        {
            **settings.model_dump(by_alias=True),
            "ovf": {"accept": True},
            "pipeline": {"inspect": off, "fix": off},
            **changes,
        }
    )


def export_ovf(directory: Path, digests: str | None = "sha256", mib: int = 1) -> Path:
    """Export a VM of three disks with a stream-optimized VMDK each, as ovftool does, and return the descriptor."""
    directory.mkdir()
    for number, name in enumerate(DISKS):
        raw = directory / "raw"
        raw.write_bytes(os.urandom(mib << 20 if number == 0 else 1 << 16) + bytes(1 << 20))
        vmdk(raw, directory / name)
        raw.unlink()
    (directory / NVRAM).write_bytes(os.urandom(8684))
    descriptor = directory / "db01.ovf"
    descriptor.write_text(OVFTOOL.read_text())
    describe(descriptor)
    if digests:
        write_digests(descriptor, digests)
    return descriptor


def vmdk(raw: Path, target: Path, subformat: str = "streamOptimized") -> None:
    """Make a VMDK of a raw disk."""
    argv = ("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, target)
    subprocess.run(argv, check=True)


def pack(descriptor: Path, archive: Path, names: Iterable[str] = (*DISKS, NVRAM)) -> Path:
    """Put an export into an OVA, in the order of the standard: the descriptor, the digests, the files."""
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in (descriptor, descriptor.with_suffix(".mf"), *(descriptor.with_name(name) for name in names)):
            if path.exists():
                tar.add(path, path.name)
    return archive


def describe(descriptor: Path) -> None:
    """Put the sizes of the files beside a descriptor into it."""

    def size(match: re.Match[str]) -> str:
        path = descriptor.parent / match[2]
        return f"{match[1]}{path.stat().st_size if path.exists() else match[3]}"

    text = re.sub(r'(<File ovf:href="([^"]+)" ovf:id="[^"]+" ovf:size=")(\d+)', size, descriptor.read_text())
    descriptor.write_text(text)


def write_digests(descriptor: Path, algorithm: str = "sha256", names: Iterable[str] = (*DISKS, NVRAM)) -> Path:
    """Write the .mf of an export, of the descriptor and the files of these names."""
    lines = []
    for path in (descriptor, *(descriptor.with_name(name) for name in names)):
        digest = hashlib.new(algorithm, path.read_bytes()).hexdigest()
        lines.append(SPELLING[algorithm].format(path.name, digest))
    mf = descriptor.with_suffix(".mf")
    mf.write_text("".join(f"{line}\n" for line in lines))
    return mf
