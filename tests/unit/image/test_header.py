"""The header check by itself: what it reads from images made here, and that no bytes make it do anything but refuse."""

from __future__ import annotations

import os
import struct
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.image.header import DRIVERS, examine
from hyper2kvmd.image.header.reader import Extent, Header
from tests.pace import work_of_at_most
from tests.vmdk import vmware_stream

MIB = 1 << 20
SECTOR = 512


def look(data: bytes, declared: str) -> Header:
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        return examine(fd, len(data), declared, "disk")
    finally:
        os.close(fd)


def refusal(data: bytes, declared: str) -> MigrationError:
    with pytest.raises(MigrationError) as caught:
        look(data, declared)
    assert caught.value.message.startswith("disk ")
    assert caught.value.hint
    return caught.value


def put(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


# Images ---------------------------------------------------------------------------------------------------


def vmdk_text(extent: str) -> bytes:
    return f'# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType="vmfs"\n{extent}\n'.encode()


def qcow2() -> bytes:
    """One cluster each: header, refcount table, refcount block, L1, L2, data."""
    cluster = 65536
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, MIB, 0, 1, 3 * cluster, cluster, 1, 0, 0)
    head += struct.pack(">QQQII", 0, 0, 0, 4, 104)
    parts = [
        head,
        struct.pack(">Q", 2 * cluster),
        struct.pack(">6H", *[1] * 6),
        struct.pack(">Q", 1 << 63 | 4 * cluster),
        struct.pack(">Q", 1 << 63 | 5 * cluster),
        b"data",
    ]
    return b"".join(part.ljust(cluster, b"\0") for part in parts)


def checksummed(data: bytes, at: int) -> bytes:
    return put(data, at, struct.pack(">I", ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF))


def vhd_footer(kind: int, size: int = MIB) -> bytes:
    offset = SECTOR if kind == 3 else (1 << 64) - 1
    footer = struct.pack(
        ">8sIIQI4sIIQQHBBI", b"conectix", 2, 65536, offset, 0, b"win ", 0, 0, size, size, 30, 4, 17, kind
    )
    return checksummed(footer.ljust(SECTOR, b"\0"), 64)


def vhd_dynamic() -> bytes:
    header = struct.pack(">8sQQIII", b"cxsparse", (1 << 64) - 1, 1536, 65536, 1, 2 * MIB).ljust(1024, b"\0")
    table = struct.pack(">I", 4).ljust(SECTOR, b"\xff")
    return vhd_footer(3) + checksummed(header, 36) + table + bytes(SECTOR + 2 * MIB) + vhd_footer(3)


def vhdx() -> bytes:
    data = b"vhdxfile".ljust(64 << 10, b"\0")
    data += (b"head".ljust(8, b"\0") + struct.pack("<Q", 1)).ljust(64 << 10, b"\0")
    data += (b"head".ljust(8, b"\0") + struct.pack("<Q", 2)).ljust(64 << 10, b"\0")
    region = b"regi\0\0\0\0" + struct.pack("<II", 2, 0)
    region += uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08").bytes_le + struct.pack("<QII", MIB, MIB, 1)
    region += uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le + struct.pack("<QII", 512 << 10, 128 << 10, 1)
    data = (data + region).ljust(512 << 10, b"\0")
    items = struct.pack("<8sHH20x", b"metadata", 0, 2)
    items += uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le + struct.pack("<IIII", 65536, 8, 0, 0)
    items += uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le + struct.pack("<IIII", 65544, 8, 0, 0)
    data = (data + items).ljust((512 + 64) << 10, b"\0") + struct.pack("<IIQ", MIB, 0, MIB)
    return data.ljust(MIB, b"\0") + struct.pack("<Q", 2 << 20 | 6).ljust(MIB, b"\0") + bytes(MIB)


def vdi() -> bytes:
    head = bytes(64) + struct.pack("<IIIII", 0xBEDA107F, 0x10001, 400, 1, 0) + bytes(256)
    head += struct.pack("<IIIIIIIQIIII", 512, 1024, 0, 0, 0, 512, 0, MIB, MIB, 0, 1, 1)
    return head.ljust(512, b"\0") + struct.pack("<I", 0).ljust(512, b"\0") + bytes(MIB)


DISK = (b"boot" + bytes(200_000) + b"data" * 1000 + bytes(40 * MIB) + b"end").ljust(41 * MIB, b"\0")
IMAGES: dict[str, tuple[str, bytes, Header]] = {
    "stream": ("vmdk", vmware_stream(DISK), Header("vmdk", 41 * MIB, "streamOptimized")),
    "text": (
        "vmdk",
        vmdk_text('RW 8 VMFS "web 01-flat.vmdk"'),
        Header("raw", 4096, "vmfs", (Extent("web 01-flat.vmdk", 4096, False),)),
    ),
    "qcow2": ("qcow2", qcow2(), Header("qcow2", MIB)),
    "fixed": ("vhd", bytes(MIB) + vhd_footer(2), Header("vpc", MIB, "fixed")),
    "dynamic": ("vhd", vhd_dynamic(), Header("vpc", MIB, "dynamic")),
    "vhdx": ("vhdx", vhdx(), Header("vhdx", MIB, "dynamic")),
    "vdi": ("vdi", vdi(), Header("vdi", MIB, "dynamic")),
    "raw": ("raw", bytes(1000), Header("raw", 1024)),
}


# Claims ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGES)
def test_header_says_what_the_image_is(kind: str) -> None:
    declared, data, header = IMAGES[kind]
    assert look(data, declared) == header


@pytest.mark.parametrize("declared", DRIVERS)
@pytest.mark.parametrize("kind", IMAGES)
def test_image_under_another_format_is_a_mismatch(kind: str, declared: str) -> None:
    own, data, _ = IMAGES[kind]
    if declared == own:
        return
    error = refusal(data, declared)
    if kind == "raw" and declared == "vhd":
        assert error.code == Code.IMAGE_CORRUPT  # a fixed VHD that lost its footer looks the same
        return
    assert error.code == Code.FORMAT_MISMATCH
    assert own in error.hint
    assert "source_format" in error.hint


@pytest.mark.parametrize("kind", [kind for kind in IMAGES if kind not in ("raw", "text")])
def test_image_without_its_end_is_corrupt(kind: str) -> None:
    declared, data, _ = IMAGES[kind]
    for missing in (1, 512, 1024, 1536, len(data) // 3, len(data) // 2):
        if kind == "fixed" or missing < len(data) - 3 * SECTOR:
            assert refusal(data[:-missing], declared).code == Code.IMAGE_CORRUPT


def test_stream_with_a_footer_of_another_disk_is_refused() -> None:
    _, data, _ = IMAGES["stream"]
    footer = len(data) - 2 * SECTOR
    for offset, value in ((12, 1), (20, 8), (44, 1), (8, 3)):
        assert refusal(put(data, footer + offset, struct.pack("<I", value)), "vmdk").code == Code.IMAGE_UNSAFE
    assert refusal(put(data, footer + 56, b"\xff" * 8), "vmdk").code == Code.IMAGE_CORRUPT
    assert refusal(put(data, footer + 56, struct.pack("<Q", 1 << 60)), "vmdk").code == Code.IMAGE_CORRUPT


def test_fixed_vhd_that_starts_like_another_is_refused() -> None:
    """qemu would believe the first sector, which is the guest's."""
    assert refusal(vhd_footer(3) + bytes(MIB - SECTOR) + vhd_footer(2), "vhd").code == Code.IMAGE_UNSAFE
    assert refusal(vhd_footer(4) + bytes(MIB) + vhd_footer(4), "vhd").code == Code.IMAGE_UNSAFE


def test_raw_disk_with_vhd_footer_is_a_mismatch_only_if_its_checksum_holds() -> None:
    assert refusal(bytes(MIB) + vhd_footer(2), "raw").code == Code.FORMAT_MISMATCH
    assert look(bytes(MIB) + put(vhd_footer(2), 500, b"x"), "raw").virtual_size == MIB + SECTOR


def test_message_names_the_extension_of_qcow2_that_leads_out() -> None:
    extension = struct.pack(">II8s", 0x44415441, 8, b"/etc/pas")
    error = refusal(put(qcow2(), 104, extension), "qcow2")
    assert (error.code, "external data file" in error.message) == (Code.IMAGE_UNSAFE, True)
    behind_a_harmless_one = struct.pack(">II8s", 0x6803F857, 8, b"x" * 8) + extension
    assert refusal(put(qcow2(), 104, behind_a_harmless_one), "qcow2").code == Code.IMAGE_UNSAFE
    assert look(put(qcow2(), 104, struct.pack(">II8s", 0x6803F857, 8, b"x" * 8)), "qcow2").virtual_size == MIB


@pytest.mark.parametrize("size", [0, (64 << 40) + 512, 1 << 63])
def test_absurd_size_is_refused(size: int) -> None:
    assert refusal(put(qcow2(), 24, struct.pack(">Q", size)), "qcow2").code == Code.IMAGE_UNSAFE


@pytest.mark.parametrize(
    ("start", "name"),
    [(b"\x1f\x8b\x08", "gzip"), (b"disk.ovf".ljust(257, b"\0") + b"ustar", "ova"), (b"QED\0", "qed")],
)
def test_what_it_is_instead_is_said(start: bytes, name: str) -> None:
    error = refusal(start + bytes(2000), "vmdk")
    assert error.code == Code.FORMAT_MISMATCH
    assert name in error.message


# Any bytes ------------------------------------------------------------------------------------------------


def interesting(kind: str) -> list[int]:
    """Where the fields are that mean something."""
    _, data, _ = IMAGES[kind]
    starts = {"vhdx": [0, 65536, 131072, 196608, 524288, 589824, MIB], "qcow2": [0, 65536, 131072, 196608, 262144]}
    return [*starts.get(kind, [0, 512]), max(len(data) - 1536, 0)]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    kind = draw(st.sampled_from([kind for kind in IMAGES if kind != "raw"]))
    declared, data, _ = IMAGES[kind]
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.sampled_from(interesting(kind))) + draw(st.integers(0, 600))
        numbers = st.sampled_from([0, 1, 2, 1 << 9, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1]).map(
            lambda n: struct.pack("<I", n)
        )
        value = draw(numbers | numbers.map(lambda number: number[::-1]) | st.binary(min_size=1, max_size=8))
        data = put(data, min(offset, len(data) - 8), value)[: len(data)]
    return declared, data


@settings(max_examples=1500)
@given(damaged())
def test_damage_is_refused_or_harmless(image: tuple[str, bytes]) -> None:
    declared, data = image
    try:
        with work_of_at_most(2):
            header = look(data, declared)
    except MigrationError as error:
        assert error.message
    else:
        assert 0 < header.virtual_size <= 64 << 40
        assert not any("/" in extent.file for extent in header.extents)


@settings(max_examples=300)
@given(st.sampled_from(sorted(DRIVERS)), st.binary(max_size=3000))
def test_any_bytes_are_refused_or_raw(declared: str, data: bytes) -> None:
    magics = {
        "vmdk": b"KDMV",
        "qcow2": b"QFI\xfb\0\0\0\3",
        "raw": b"",
        "vhd": b"conectix",
        "vhdx": b"vhdxfile",
        "vdi": bytes(64) + b"\x7f\x10\xda\xbe",
    }
    try:
        with work_of_at_most(2):
            header = look(magics[declared] + data, declared)
    except MigrationError:
        return
    assert header.format == DRIVERS[declared]


def test_extent_may_have_a_name_of_any_script() -> None:
    for encoded in ("Köln 日本-flat.vmdk".encode(), "Köln-flat.vmdk".encode("latin-1")):
        header = look(vmdk_text('RW 8 FLAT "NAME" 0').replace(b"NAME", encoded), "vmdk")
        assert header.extents[0].file in ("Köln 日本-flat.vmdk", "Köln-flat.vmdk")


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", "nbd:x", ".", "..", ".x", "", "a..b"])
def test_extent_that_is_not_the_name_of_a_file_beside_it_is_unsafe(name: str) -> None:
    assert refusal(vmdk_text(f'RW 8 FLAT "{name}" 0'), "vmdk").code == Code.IMAGE_UNSAFE
