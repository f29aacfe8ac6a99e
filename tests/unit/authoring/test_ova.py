"""Unpacking OVAs: all of it, checked, in one place, or nothing at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import resource
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper2kvmd.authoring import ova
from hyper2kvmd.errors import Code, MigrationError
from tests.pace import work_of_at_most

DISK = os.urandom(100_000)
OVF = b"<Envelope/>"

Member = tuple[str, bytes]


def mf(members: Sequence[Member], algorithm: str = "sha256") -> Member:
    lines = [f"{algorithm.upper()}({name})= {hashlib.new(algorithm, data).hexdigest()}\n" for name, data in members]
    return "web.mf", "".join(lines).encode()


def tar(members: Sequence[Member], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    """A header as it is, whatever it says, with the content and end that do not fit it."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


def unpack(archive: Path, target: Path) -> ova.Unpacked:
    with ova.unpacked(archive, target, lambda ratio: None) as content:
        return content


def refused(data: bytes, directory: Path) -> MigrationError:
    """What is said of an archive that is refused; nothing may have been written, and it may not take long."""
    archive = directory / "web.ova"
    archive.write_bytes(data)
    (directory / "out").mkdir()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with work_of_at_most(10), pytest.raises(MigrationError) as caught:
        unpack(archive, directory / "out/web")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10  # KiB
    assert [] == list((directory / "out").iterdir())
    assert ["out", "web.ova"] == sorted(path.name for path in directory.iterdir())
    assert str(archive) in caught.value.message or "web.mf" in caught.value.message
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_ova_is_unpacked_whole(tmp_path: Path, compress: Callable[[bytes], bytes], format: int) -> None:
    long = "d" * 150 + ".vmdk"  # longer than the field of a header
    members = [("web.ovf", OVF), ("web-disk1.vmdk", DISK), *([] if format == tarfile.USTAR_FORMAT else [(long, b"x")])]
    archive = tmp_path / "web.ova"
    archive.write_bytes(compress(tar([members[0], mf(members), *members[1:]], format)))
    content = unpack(archive, tmp_path / "web")
    assert {"web.mf", *dict(members)} == {path.name for path in (tmp_path / "web").iterdir()} == set(content.files)
    for name, data in members:
        assert data == (tmp_path / "web" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == content.sha256[name]
    assert () == content.warnings


def test_what_tar_makes_of_a_directory_is_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "web.ova"
    archive.write_bytes(header("./", tarfile.DIRTYPE)[:512] + tar([("./web.ovf", OVF)]))
    assert ("web.ovf",) == unpack(archive, tmp_path / "web").files


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_every_digest_of_the_mf_is_checked_wherever_it_stands(tmp_path: Path, algorithm: str, last: bool) -> None:
    good = [("web.ovf", OVF), ("disk.vmdk", DISK)]
    changed = [("web.ovf", OVF), ("disk.vmdk", DISK[:-1] + b"!" if DISK[-1:] != b"!" else DISK[:-1] + b"?")]
    sums = mf(good, algorithm)
    error = refused(tar([*changed, sums] if last else [sums, *changed]), tmp_path)
    assert Code.CHECKSUM_MISMATCH == error.code
    assert f"'disk.vmdk' in {tmp_path / 'web.ova'} has {algorithm} " in error.message
    (tmp_path / "web.ova").write_bytes(tar([*good, sums] if last else [sums, *good]))
    assert () == unpack(tmp_path / "web.ova", tmp_path / "out/web").warnings


def test_a_file_that_the_mf_names_and_the_archive_lacks_is_an_error(tmp_path: Path) -> None:
    error = refused(tar([mf([("web.ovf", OVF), ("disk.vmdk", DISK)]), ("web.ovf", OVF)]), tmp_path)
    assert Code.DISK_MISSING == error.code
    assert "has a digest of 'disk.vmdk', but not the file" in error.message


def test_files_without_digests_give_a_warning(tmp_path: Path) -> None:
    archive = tmp_path / "web.ova"
    archive.write_bytes(tar([("web.ovf", OVF), ("disk.vmdk", DISK)]))
    assert [f"{archive} holds no digests (.mf) of its files"] == [
        finding.message for finding in unpack(archive, tmp_path / "one").warnings
    ]
    archive.write_bytes(tar([mf([("web.ovf", OVF)]), ("web.ovf", OVF), ("disk.vmdk", DISK)]))
    assert [f"{archive} holds no digest of 'disk.vmdk'"] == [
        finding.message for finding in unpack(archive, tmp_path / "two").warnings
    ]


@pytest.mark.parametrize(
    "line", ["SHA256(web.ovf) " + "0" * 64, "SHA256(web.ovf)= " + "0" * 40, "\0\x1b[2J", "(" * 9999]
)
def test_a_line_of_the_mf_that_is_no_digest_is_an_error(tmp_path: Path, line: str) -> None:
    error = refused(tar([("web.ovf", OVF), ("web.mf", line.encode())]), tmp_path)
    assert Code.IMAGE_CORRUPT == error.code
    assert error.message.startswith("line 1 of web.mf is no digest: ")
    assert error.message.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        *("../web.ovf", "/etc/cron.d/web", "a/../b.vmdk", "..", "", "./", "a\x1b[2J.ovf", "\udcff.ovf", "x" * 256),
        *(".hidden/web.ovf", "a/.hyper2kvmd.hold", "a/manifest.json", "a/", "x" * 256 + "/web.ovf"),
        *(".hyper2kvmd.hold", "migration-report.json", "migration-report.7.json", "manifest.json"),
        *("artifact-manifest.json", "manifest.yml", "boot-test.png"),
    ],
)
def test_a_name_that_is_none_of_a_file_of_the_export_is_refused(tmp_path: Path, name: str) -> None:
    info = tarfile.TarInfo(name)
    data = info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape") + bytes(1024)
    error = refused(data, tmp_path)
    assert Code.EXPORT_UNSAFE == error.code
    assert error.message.isprintable()


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (tarfile.CONTTYPE, "an entry of type '7'"),
        (tarfile.XGLTYPE, "an entry of type 'g'"),
    ],
)
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: bytes, what: str) -> None:
    error = refused(header("web.ovf", kind, link="/etc/passwd"), tmp_path)
    assert Code.EXPORT_UNSAFE == error.code
    assert error.message.endswith(f"holds 'web.ovf', which is {what}")


def sparse(real: int, stored: bytes, **records: str) -> bytes:
    """A sparse file whose map is what the records of an extended header say."""
    info = tarfile.TarInfo("disk.vmdk")
    info.size = len(stored)
    info.pax_headers = {"GNU.sparse.realsize": str(real), **records}
    return info.tobuf(tarfile.PAX_FORMAT) + stored.ljust(-(-len(stored) // 512) * 512, b"\0") + bytes(1024)


V1 = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (sparse(1 << 50, b"", **V1), "longer than the file"),
        (sparse(1024, b"x\n".ljust(512, b"\0"), **V1), "damaged map"),
        (sparse(1024, b"1\n0\n-5\n".ljust(512, b"\0"), **V1), "damaged map"),
        (sparse(1024, b"999999999\n".ljust(512, b"\0"), **V1), "in more than 131072 pieces"),
        (sparse(1024, b"2\n0\n512\n".ljust(512, b"\0"), **V1), "longer than the file"),
        (sparse(100, b"1\n0\n512\n".ljust(1024, b"\0"), **V1), "whose map is damaged"),  # behind its end
        (sparse(4096, b"2\n1024\n256\n0\n256\n".ljust(1024, b"\0"), **V1), "whose map is damaged"),  # backwards
        (sparse(4096, b"2\n0\n300\n200\n212\n".ljust(1024, b"\0"), **V1), "whose map is damaged"),  # overlapping
        (sparse(4096, b"1\n0\n100\n".ljust(1024, b"\0"), **V1), "whose map is damaged"),  # less than is stored
        (sparse(4096, b"x" * 512, **{"GNU.sparse.map": "0,512,"}), "damaged map"),
        (sparse(4096, b"x" * 512, **{"GNU.sparse.map": "0"}), "damaged map"),
        (sparse(4096, b"x" * 512, **{"GNU.sparse.map": "0,511"}), "whose map is damaged"),
        (sparse(4096, b"", **{"GNU.sparse.major": "2"}), "of a version that is not known"),
    ],
)
def test_a_sparse_file_with_a_map_that_lies_is_refused(tmp_path: Path, data: bytes, what: str) -> None:
    assert what in refused(data, tmp_path).message


def old_sparse(pieces: Sequence[tuple[int, int]], real: int, stored: bytes, more: bytes = b"\0") -> bytes:
    """A sparse file in GNU's old format, with a header that has room for four pieces."""
    block = bytearray(header("disk.vmdk", tarfile.GNUTYPE_SPARSE, len(stored))[:512])
    fields = b"".join(b"%011o\0%011o\0" % piece for piece in pieces)
    block[386 : 386 + len(fields)] = fields
    block[482:495] = more + b"%011o\0" % real
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + stored.ljust(-(-len(stored) // 512) * 512, b"\0") + bytes(1024)


def test_a_sparse_file_of_the_old_format_is_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "web.ova"
    archive.write_bytes(old_sparse([(1 << 20, 512), (3 << 20, 100), (4 << 20, 0)], 4 << 20, b"a" * 512 + b"b" * 100))
    content = unpack(archive, tmp_path / "web")
    data = bytearray(4 << 20)
    data[1 << 20 : (1 << 20) + 512], data[3 << 20 : (3 << 20) + 100] = b"a" * 512, b"b" * 100
    assert bytes(data) == (tmp_path / "web/disk.vmdk").read_bytes()
    assert hashlib.sha256(data).hexdigest() == content.sha256["disk.vmdk"]
    assert (tmp_path / "web/disk.vmdk").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (old_sparse([(0, 512)], 100, b"x" * 512), "whose map is damaged"),
        (old_sparse([(0, 100)], 4096, b"x" * 512), "whose map is damaged"),
        (old_sparse([(0, 512)], 4096, b"x" * 512, more=b"\1"), "damaged header of a sparse file"),
        (old_sparse([(0, 512)], 4096, b"", more=b"\1") + b"\1" * 512, "whose map is damaged"),
    ],
)
def test_an_old_sparse_file_with_a_map_that_lies_is_refused(tmp_path: Path, data: bytes, what: str) -> None:
    assert what in refused(data, tmp_path).message


def test_a_sparse_file_that_never_ends_its_map_is_refused(tmp_path: Path) -> None:
    """In a few kilobytes, as each of its blocks says that another one comes."""
    block = (b"\0" * 504 + b"\1").ljust(512, b"\0")
    data = old_sparse([(0, 512)], 4096, b"", more=b"\1")[:512] + block * 10_000
    assert "in more than 131072 pieces" in refused(gzip.compress(data), tmp_path).message


def test_a_sparse_file_that_is_too_large_when_it_is_whole_gets_a_way_out(tmp_path: Path) -> None:
    error = refused(sparse(1 << 50, b"1\n0\n512\n".ljust(1024, b"\0"), **V1), tmp_path)
    assert Code.NO_SPACE == error.code
    assert "Unpack it with `tar -xf` into an empty directory" in error.hint


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("size", [1 << 30, 1 << 40, 1 << 62])
def test_a_file_larger_than_the_archive_can_hold_is_refused(
    tmp_path: Path, compress: Callable[[bytes], bytes], size: int
) -> None:
    error = refused(compress(header("disk.vmdk", size=size)), tmp_path)
    assert Code.EXPORT_UNSAFE == error.code
    assert f"claims {size} bytes for 'disk.vmdk', more than it can hold" in error.message


def test_a_size_in_an_extended_header_is_held_against_the_archive_too(tmp_path: Path) -> None:
    info = tarfile.TarInfo("disk.vmdk")
    info.pax_headers = {"size": str(1 << 50)}
    error = refused(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024), tmp_path)
    assert f"claims {1 << 50} bytes for 'disk.vmdk'" in error.message


def test_a_file_larger_than_the_free_space_is_refused_before_it_is_written(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    size = status.f_bavail * status.f_frsize + (1 << 30)
    # A sparse file of the needed length: what is behind the header is never read.
    archive = tmp_path / "web.ova"
    archive.write_bytes(header("disk.vmdk", size=size))
    os.truncate(archive, size + 4096)
    (tmp_path / "out").mkdir()
    with pytest.raises(MigrationError) as caught:
        unpack(archive, tmp_path / "out/web")
    assert Code.NO_SPACE == caught.value.code
    assert [] == list((tmp_path / "out").iterdir())


def test_a_hundred_thousand_files_are_refused_after_a_thousand(tmp_path: Path) -> None:
    data = b"".join(tarfile.TarInfo(f"{number}.vmdk").tobuf() for number in range(100_000)) + bytes(1024)
    error = refused(gzip.compress(data, 1), tmp_path)
    assert error.message.endswith("holds more than 1000 files")


@pytest.mark.parametrize("prefix", ["web/", "./web/", "a/b/c/"])
def test_members_in_a_directory_are_unpacked_without_it(tmp_path: Path, prefix: str) -> None:
    """With digests that name them with it, or without."""
    good = [("web.ovf", OVF), ("disk.vmdk", DISK)]
    named = [(prefix + name, data) for name, data in good]
    for number, sums in enumerate((mf(good), mf(named))):
        archive = tmp_path / "web.ova"
        members = [(prefix + "web.mf", sums[1]), *named]
        archive.write_bytes(header(prefix, tarfile.DIRTYPE)[:512] + tar(members))
        content = unpack(archive, tmp_path / str(number))
        assert {"web.mf", "web.ovf", "disk.vmdk"} == {*content.files}
        assert () == content.warnings
        assert DISK == (tmp_path / str(number) / "disk.vmdk").read_bytes()


def test_members_of_one_name_in_two_directories_get_a_way_out(tmp_path: Path) -> None:
    error = refused(tar([("a/web.ovf", OVF), ("b/web.ovf", OVF)]), tmp_path)
    assert error.message.endswith("holds 'web.ovf' twice")
    assert "Unpack it with `tar -xf` into an empty directory, and name the .ovf" in error.hint


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_what_macos_adds_to_an_archive_is_left_out(tmp_path: Path, format: int) -> None:
    good = [("web.ovf", OVF), ("disk.vmdk", DISK)]
    apple = b"\0\5\x16\7" + bytes(700)
    members = [("web/._web.ovf", apple), ("web/web.ovf", OVF), ("._web", apple), ("web/.DS_Store", apple)]
    members += [
        ("web/._disk.vmdk", apple),
        ("web/disk.vmdk", DISK),
        ("__MACOSX/web/x", apple),
        ("web/web.mf", mf(good)[1]),
    ]
    archive = tmp_path / "web.ova"
    archive.write_bytes(tar(members, format))
    content = unpack(archive, tmp_path / "web")
    assert (
        {"web.mf", "web.ovf", "disk.vmdk"} == {*content.files} == {path.name for path in (tmp_path / "web").iterdir()}
    )
    assert () == content.warnings


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    error = refused(tar([("web.ovf", OVF), ("./web.ovf", b"other")]), tmp_path)
    assert error.message.endswith("holds 'web.ovf' twice")


def test_headers_take_no_more_memory_than_they_need(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 28
    archive = tmp_path / "web.ova"
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(archive, 1 << 29)
    with pytest.raises(MigrationError) as caught:
        unpack(archive, tmp_path / "web")
    assert "has a header of 268435456 bytes" in caught.value.message


def test_a_second_header_of_a_kind_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 512
    one = info.tobuf(tarfile.GNU_FORMAT) + b"a" * 512
    error = refused(one * 3 + bytes(1024), tmp_path)
    assert error.message.endswith("has two headers of a kind for one file")


@pytest.mark.parametrize("data", [b"", b"12", b"99999 a=b\n", b"5 a=b", b"0 \n", b"1 \n", b"6 a=b\n6 a=b!"])
def test_a_damaged_extended_header_is_refused(tmp_path: Path, data: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(data)
    whole = info.tobuf(tarfile.GNU_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0") + tar([("web.ovf", OVF)])
    if data:
        assert refused(whole, tmp_path).message.endswith("has a damaged extended header")
    else:
        (tmp_path / "web.ova").write_bytes(whole)
        assert ("web.ovf",) == unpack(tmp_path / "web.ova", tmp_path / "web").files


@pytest.mark.parametrize("cut", [100, 512, 700, 1536, 60_000])
def test_an_archive_that_was_cut_short_is_no_archive(tmp_path: Path, cut: int) -> None:
    whole = tar([("web.ovf", OVF), ("disk.vmdk", DISK)])
    assert len(whole) > 100_000
    error = refused(whole[:cut], tmp_path)
    assert error.code in (Code.IMAGE_CORRUPT, Code.EXPORT_UNSAFE)


@pytest.mark.parametrize("cut", [20, 5000, -8, -1])
def test_a_compressed_archive_that_was_cut_short_is_no_archive(tmp_path: Path, cut: int) -> None:
    whole = gzip.compress(tar([("web.ovf", OVF), ("disk.vmdk", DISK)]))
    assert Code.IMAGE_CORRUPT == refused(whole[:cut], tmp_path).code


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    whole = bytearray(tar([("web.ovf", OVF), ("disk.vmdk", DISK)]))
    whole[1024 + 10] ^= 1
    assert refused(bytes(whole), tmp_path).message.endswith("has a damaged header")


@pytest.mark.parametrize(
    "data",
    [b"#!/bin/sh\n" * 100, gzip.compress(b"x" * 2000), os.urandom(2000)],
    ids=["script", "gzip", "random"],  # which pytest would take from the bytes, and those differ each time
)
def test_what_is_no_tar_archive_is_called_so(tmp_path: Path, data: bytes) -> None:
    error = refused(data, tmp_path)
    assert Code.FORMAT_UNSUPPORTED == error.code
    assert error.message.endswith("is not a tar archive")


@settings(max_examples=100)
@given(st.data())
def test_no_damage_does_more_than_an_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("ova")
    members = [("web.ovf", OVF), ("disk.vmdk", DISK[:3000])]
    whole = bytearray(tar([mf(members), *members], tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 4095))] = data.draw(st.integers(0, 255))
    (directory / "web.ova").write_bytes(whole)
    try:
        content = unpack(directory / "web.ova", directory / "web")
    except MigrationError:
        assert ["web.ova"] == [path.name for path in directory.iterdir()]
    else:
        assert {"web", "web.ova"} == {path.name for path in directory.iterdir()}
        assert set(content.files) == {path.name for path in (directory / "web").iterdir()}


def test_nothing_is_unpacked_over_what_is_there(tmp_path: Path) -> None:
    archive = tmp_path / "web.ova"
    archive.write_bytes(tar([("web.ovf", OVF)]))
    (tmp_path / "web").mkdir()
    (tmp_path / "web/other").touch()
    with pytest.raises(MigrationError) as caught:
        unpack(archive, tmp_path / "web")
    assert Code.OUTPUT_EXISTS == caught.value.code
    (tmp_path / "web/other").unlink()
    unpack(archive, tmp_path / "web")
    assert ["web.ovf"] == [path.name for path in (tmp_path / "web").iterdir()]


def test_nothing_is_left_when_the_block_fails(tmp_path: Path) -> None:
    archive = tmp_path / "web.ova"
    archive.write_bytes(tar([("web.ovf", OVF)]))
    with pytest.raises(KeyboardInterrupt), ova.unpacked(archive, tmp_path / "web", lambda ratio: None) as content:
        assert content.directory.name.startswith(".")  # no daemon takes it for an export
        assert OVF == (content.directory / "web.ovf").read_bytes()
        raise KeyboardInterrupt
    assert ["web.ova"] == [path.name for path in tmp_path.iterdir()]


def test_what_is_no_plain_file_is_not_opened_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "web.ova")
    with pytest.raises(OSError, match="not a plain file"):
        ova.is_archive(tmp_path / "web.ova")


def test_progress_goes_to_the_end(tmp_path: Path) -> None:
    archive = tmp_path / "web.ova"
    archive.write_bytes(tar([("web.ovf", OVF), ("disk.vmdk", DISK)]))
    ratios: list[float] = []
    with ova.unpacked(archive, tmp_path / "web", ratios.append):
        pass
    assert sorted(ratios) == ratios
    assert 0.9 < ratios[-1] <= 1.0
