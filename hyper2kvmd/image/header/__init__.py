"""Reads the headers of a disk image and refuses what could harm, before any other program opens the file.

An image format can name other files of the host, and the programs that open images follow such names.
It can also be cut short in ways that those programs turn into zeros without a word. Both end here.
"""

from __future__ import annotations

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.image.header.qcow2 import read_qcow2
from hyper2kvmd.image.header.reader import SECTOR, VIRTUAL_SIZE_LIMIT, Extent, Header, Image
from hyper2kvmd.image.header.vdi import read_vdi
from hyper2kvmd.image.header.vhd import is_vhd_footer, read_vhd
from hyper2kvmd.image.header.vhdx import read_vhdx
from hyper2kvmd.image.header.vmdk import check_extent, is_text, read_vmdk

DRIVERS = {"vmdk": "vmdk", "qcow2": "qcow2", "raw": "raw", "vhd": "vpc", "vhdx": "vhdx", "vdi": "vdi"}


def examine(fd: int, size: int, declared: str, name: str, start: int = 0) -> Header:
    """Read the headers of the image of `size` bytes open as `fd`, which begins at `start` there.

    `declared` is the manifest's source_format, `name` how messages call the file. Raise MigrationError:
    format_mismatch, format_unsupported (a variant that is not read), image_unsafe (refers to other files,
    or claims an absurd size), image_corrupt (cut short or damaged).
    """
    image = Image(fd, size, name, start)
    if size == 0:
        raise image.corrupt("is empty")
    found = _detect(image)
    # Raw has no mark, and a fixed VHD has it at its end, where a truncated one lost it: read_vhd() says so.
    if found != declared and not (found is None and declared in ("raw", "vhd")):
        raise _mismatch(image, declared, found)
    header = _READERS[declared](image)
    if not 0 < header.virtual_size <= VIRTUAL_SIZE_LIMIT:
        raise image.absurd(header.virtual_size)
    return header


def examine_extent(fd: int, size: int, extent: Extent, name: str) -> None:
    """Check the file of `size` bytes open as `fd` against what a description says of it. Raise MigrationError."""
    image = Image(fd, size, name)
    if extent.sparse:
        check_extent(image, extent.bytes)
    elif size != extent.bytes:
        raise image.corrupt(f"has {size} bytes, but its description says {extent.bytes}")


_MAGICS = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    # Formats that are never accepted, so that a "raw" disk cannot be one of them either.
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"\x1f\x8b\x08", "gzip"),
)


def _detect(image: Image) -> str | None:
    """The format that the first bytes, and for fixed VHDs the last ones, tell."""
    start = image.peek(4096)
    for offset, magic, name in _MAGICS:
        if start.startswith(magic, offset):
            return name
    if is_text(start):
        return "vmdk"
    if image.size >= SECTOR and is_vhd_footer(image.peek(SECTOR, image.size - SECTOR)):
        return "vhd"
    return "ova" if start[257:262] == b"ustar" else None


def _mismatch(image: Image, declared: str, found: str | None) -> MigrationError:
    if found in DRIVERS:
        what = f"is a {found} image, but the manifest calls it {declared}"
        hint = f"Set source_format of this disk to {found} if that is right; otherwise export the VM again."
    elif found == "ova" and declared == "raw":
        what, hint = (
            "is a tar archive such as an OVA, not a disk",
            "Unpack it: `hyper2kvmctl manifest create` reads OVAs.",
        )
    elif found == "gzip":
        what = f"is compressed with gzip, and the manifest calls it {declared}"
        hint = (
            "Name the .ovf to `hyper2kvmctl manifest create`, which unpacks what that says is a disk; or unpack it with"
            " `gunzip -k`, and name the result."
        )
    elif found is not None:
        what, hint = f"holds {found} data, but the manifest calls it {declared}", "Unpack or convert it first."
    else:
        start = image.peek(8)
        what = f"is not a {declared} image: it starts with the bytes {start.hex(' ')}"
        hint = "Set source_format of this disk to what it is (raw, if it has no format); otherwise export the VM again."
    return MigrationError(Code.FORMAT_MISMATCH, f"{image.name} {what}", hint)


def _raw(image: Image) -> Header:
    return Header("raw", -(-image.size // SECTOR) * SECTOR)  # qemu fills the last sector up, too


_READERS = {"vmdk": read_vmdk, "qcow2": read_qcow2, "raw": _raw, "vhd": read_vhd, "vhdx": read_vhdx, "vdi": read_vdi}
