"""Disks that an OVF descriptor has in chunks or compressed, made whole by `hyper2kvmctl manifest create`."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.ctl import main
from hyper2kvmd.settings.model import Settings
from tests.conftest import disk_entry, report_of, run_job, write_manifest
from tests.integration.ctl.test_manifest import LINUX, archive, descriptor, image, sums

Ctl = Callable[..., subprocess.CompletedProcess[str]]

MIB = 1 << 20
CHUNK = 300_000  # no multiple of anything


@pytest.fixture
def ctl(scratch: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Ctl:
    """hyper2kvmctl in this process: the tests are many, and each would spend most of its time on the start."""
    config = tmp_path / "ctl.json"
    config.write_text(scratch.model_dump_json(by_alias=True))

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        status = main([*map(str, arguments), "--config", str(config)])
        said = capsys.readouterr()
        return subprocess.CompletedProcess([*map(str, arguments)], status, said.out, said.err)

    return run


@pytest.fixture
def disk(tmp_path: Path) -> bytes:
    """A disk image that is longer than several chunks."""
    content = LINUX + random.Random(1).randbytes(MIB)
    return image(tmp_path / "made.vmdk", "vmdk", content, options="subformat=streamOptimized").read_bytes()


def ovf(href: str = "web01.vmdk", **attributes: object) -> bytes:
    """A descriptor of a VM with a disk of 8 MiB, whose file has these attributes."""
    more = "".join(f' ovf:{key}="{value}"' for key, value in attributes.items())
    return descriptor(href).replace(b'ovf:id="f0"', f'ovf:id="f0"{more}'.encode())


def chunks(data: bytes, name: str = "web01.vmdk", size: int = CHUNK) -> dict[str, bytes]:
    return {f"{name}.{n:09}": data[n * size : (n + 1) * size] for n in range(-(-len(data) // size))}


def put(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def seen(directory: Path) -> dict[str, tuple[int, int, str]]:
    """All that would change if somebody wrote into a directory."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in directory.iterdir()
    }


PACKED = {
    "chunks": lambda data: (ovf(size=len(data), chunkSize=CHUNK), chunks(data)),
    "chunks of no known size": lambda data: (ovf(), chunks(data)),
    "one chunk": lambda data: (ovf(size=len(data), chunkSize=1 << 30), chunks(data, size=1 << 30)),
    "gzip": lambda data: (ovf("web01.vmdk.gz", compression="gzip"), {"web01.vmdk.gz": gzip.compress(data)}),
    "gzip under the disk's name": lambda data: (ovf(compression="gzip"), {"web01.vmdk": gzip.compress(data)}),
    "gzip that nobody mentions": lambda data: (ovf("web01.vmdk.gz"), {"web01.vmdk.gz": gzip.compress(data)}),
    "gzip in two parts": lambda data: (
        ovf(compression="gzip"),
        {"web01.vmdk": gzip.compress(data[:50_000]) + gzip.compress(data[50_000:])},
    ),
    "gzip in chunks": lambda data: (
        ovf("web01.vmdk.gz", compression="gzip", chunkSize=CHUNK, size=len(gzip.compress(data, mtime=0))),
        chunks(gzip.compress(data, mtime=0), "web01.vmdk.gz"),
    ),
}


@pytest.mark.parametrize(
    ("case", "source"),
    [*((case, source) for case in PACKED for source in ("descriptor", "directory", "archive"))],
)
def test_a_packed_disk_becomes_a_whole_one_in_a_new_directory(
    ctl: Ctl, scratch: Settings, tmp_path: Path, disk: bytes, case: str, source: str
) -> None:
    described, files = PACKED[case](disk)
    files = {"web01.ovf": described, **files}
    files["web01.mf"] = sums(files)
    directory = put(tmp_path / "source", files)
    if source == "archive":
        archive(tmp_path / "web01.ova", files)
    before = seen(directory)
    export = scratch.exports_dir / "web01"
    named = {"descriptor": directory / "web01.ovf", "directory": directory, "archive": tmp_path / "web01.ova"}[source]
    done = ctl("manifest", "create", named, "--directory", export, "--json")
    assert 0 == done.returncode, done.stderr
    assert before == seen(directory), "the source is never changed"
    assert {"manifest.json", "web01.ovf", "web01.vmdk"} == {path.name for path in export.iterdir()} - {"web01.mf"}
    assert disk == (export / "web01.vmdk").read_bytes()
    shown = json.loads(done.stdout)
    assert hashlib.sha256(disk).hexdigest() == shown["disks"][0]["sha256"]
    assert ("vmdk", 8 * MIB) == (shown["disks"][0]["format"], shown["disks"][0]["virtual_size"])
    assert [] == shown["warnings"]
    assert ["exports", "images", "made.vmdk", "source", "work"] == sorted(
        {path.name for path in tmp_path.iterdir()} - {"ctl.json", "web01.ova"}
    ), "nothing is left beside them"


def test_an_export_that_was_packed_is_migrated_like_any_other(
    ctl: Ctl, scratch: Settings, tmp_path: Path, disk: bytes
) -> None:
    """With its second disk, which was whole and in extents, and with the order and the cards of its descriptor."""
    files = {
        "web01.ovf": descriptor("web01.vmdk.gz", "data.vmdk").replace(b'"f0"/>', b'"f0" ovf:compression="gzip"/>'),
        "web01.vmdk.gz": gzip.compress(disk),
    }
    directory = put(tmp_path / "source", files)
    image(directory / "data.vmdk", "vmdk", size=4 * MIB, options="subformat=monolithicFlat")
    export = scratch.exports_dir / "web01"
    assert 0 == ctl("manifest", "create", directory, "--directory", export).returncode
    assert (export / "data-flat.vmdk").exists()
    done = run_job(export, scratch, "--stages", "convert,validate")
    assert 0 == done.returncode, done.stderr
    report = report_of(export)
    assert ["web01.vmdk", "data.vmdk"] == [found["source"] for found in report["disks"]]
    assert not {"ovf_differs", "no_nics", "ovf_value"} & {warning["code"] for warning in report["warnings"]}
    target = scratch.output_dir / "web01-disk-0.qcow2"
    (tmp_path / "made.raw").write_bytes(b"")
    command = ["qemu-img", "compare", "-f", "vmdk", "-F", "qcow2", str(tmp_path / "made.vmdk"), str(target)]
    assert 0 == subprocess.run(command, check=False, capture_output=True).returncode


# Chunks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_chunk_that_is_missing_is_named(ctl: Ctl, tmp_path: Path, disk: bytes, number: int, sized: bool) -> None:
    files = chunks(disk)
    name = sorted(files)[number]
    del files[name]
    attributes: dict[str, Any] = {"size": len(disk), "chunkSize": CHUNK} if sized else {"chunkSize": CHUNK}
    directory = put(tmp_path / "source", {"web01.ovf": ovf(**attributes), **files})
    done = ctl("manifest", "create", directory, "--directory", tmp_path / "out")
    assert 1 == done.returncode
    # Without the size, only the image itself can tell that its end is missing.
    what = f"{directory / name} does not exist" if sized or number != -1 else "it is truncated"
    assert what in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda files: {**files, "web01.vmdk.000000001": b"x"}, "000000001 has 1 bytes, and must have 300000"),
        (lambda files: {**files, sorted(files)[-1]: b"x" * CHUNK}, "has 300000 bytes, and must have"),
        (lambda files: {**files, "web01.vmdk.000000042": b"x"}, "000000042 is too many"),
    ],
)
def test_a_chunk_that_does_not_fit_is_named(ctl: Ctl, tmp_path: Path, disk: bytes, change: Any, says: str) -> None:
    files = {"web01.ovf": ovf(size=len(disk), chunkSize=CHUNK), **change(chunks(disk))}
    done = ctl("manifest", "create", put(tmp_path / "source", files), "--directory", tmp_path / "out")
    assert 1 == done.returncode
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_last_chunk_of_full_length_is_a_warning_where_no_size_is_given(ctl: Ctl, tmp_path: Path) -> None:
    raw = LINUX.ljust(3 * CHUNK, b"x")
    files = {"web01.ovf": ovf("web01.raw", chunkSize=CHUNK), **chunks(raw, "web01.raw")}
    done = ctl("manifest", "create", put(tmp_path / "source", files), "--directory", tmp_path / "out", "--json")
    assert 0 == done.returncode, done.stderr
    (warning,) = [found for found in json.loads(done.stdout)["warnings"] if found["code"] == "chunks_uncertain"]
    assert "whether 'web01.raw.000000002' is the last chunk cannot be known" == warning["message"]


# gzip -----------------------------------------------------------------------------------------------------


def test_a_bomb_ends_at_what_the_disk_can_take(ctl: Ctl, tmp_path: Path) -> None:
    """8 MiB it is to have, and unpacks to a hundred times that."""
    files = {"web01.ovf": ovf("web01.vmdk.gz", compression="gzip"), "web01.vmdk.gz": gzip.compress(bytes(800 * MIB), 1)}
    done = ctl("manifest", "create", put(tmp_path / "source", files), "--directory", tmp_path / "out")
    assert 1 == done.returncode
    limit = 8 * MIB + 8 * MIB // 64 + 16 * MIB
    assert f"web01.vmdk.gz unpacks to more than the {limit} bytes that its disk can take" in done.stderr
    assert {"ctl.json", "source", "exports", "images", "work"} == {path.name for path in tmp_path.iterdir()}


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("case", ["gzip", "chunks", "archive", "whole"])
def test_what_does_not_fit_is_no_space_and_leaves_nothing(ctl: Ctl, tmp_path: Path, small: Path, case: str) -> None:
    raw = bytes(6 * MIB)
    no_capacity = ovf("web01.vmdk.gz", compression="gzip").replace(b'ovf:capacity="8"', b"")
    files = {"web01.ovf": no_capacity, "web01.vmdk.gz": gzip.compress(raw)}
    if case == "chunks":
        files = {"web01.ovf": ovf("web01.raw"), **chunks(raw, "web01.raw", MIB)}
    if case == "whole":
        files = {"web01.ovf": descriptor("web01.vmdk.gz", "b.raw"), "web01.vmdk.gz": gzip.compress(LINUX), "b.raw": raw}
    source = put(tmp_path / "source", files)
    if case == "archive":
        source = archive(tmp_path / "web01.ova", files)
    done = ctl("manifest", "create", source, "--directory", small / "out")
    assert 1 == done.returncode
    assert f"cannot be unpacked into {small}, which has " in done.stderr
    assert "Free some space there, or name another place with --directory" in done.stderr
    assert [] == list(small.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-9],
        lambda data: data[:5000],
        lambda data: data[:-6] + b"x" + data[-5:],
        lambda data: data + b"junk",
    ],
    ids=["without its end", "cut short", "damaged", "with more behind it"],
)
def test_damaged_gzip_data_is_named(ctl: Ctl, tmp_path: Path, disk: bytes, change: Any) -> None:
    files = {"web01.ovf": ovf(compression="gzip"), "web01.vmdk": change(gzip.compress(disk))}
    done = ctl("manifest", "create", put(tmp_path / "source", files), "--directory", tmp_path / "out")
    assert 1 == done.returncode
    assert f"{tmp_path}/source/web01.vmdk cannot be decompressed" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_called_compressed_and_is_not_is_taken_as_it_is(ctl: Ctl, tmp_path: Path, disk: bytes) -> None:
    """Somebody unpacked it, and left the descriptor alone."""
    directory = put(tmp_path / "source", {"web01.ovf": ovf("web01.vmdk.gz", compression="gzip"), "web01.vmdk": disk})
    done = ctl("manifest", "create", directory / "web01.ovf", "--json")
    assert 0 == done.returncode, done.stderr
    shown = json.loads(done.stdout)
    assert ["not_packed"] == [warning["code"] for warning in shown["warnings"]]
    assert (str(directory / "manifest.json"), "web01.vmdk") == (shown["manifest"], shown["disks"][0]["path"])


def test_another_compression_is_named_with_a_way_out(ctl: Ctl, tmp_path: Path) -> None:
    files = {"web01.ovf": ovf("web01.vmdk.bz2", compression="bzip2"), "web01.vmdk.bz2": b"BZh9" + bytes(5000)}
    done = ctl("manifest", "create", put(tmp_path / "source", files) / "web01.ovf")
    assert 1 == done.returncode
    assert "web01.vmdk.bz2 is compressed with 'bzip2', which is not read" in done.stderr
    assert "Unpack it, and name the disk files instead of the descriptor" in done.stderr


def test_a_disk_that_is_there_packed_and_whole_is_not_guessed(ctl: Ctl, tmp_path: Path, disk: bytes) -> None:
    files = {"web01.ovf": ovf("web01.vmdk.gz"), "web01.vmdk.gz": gzip.compress(disk), "web01.vmdk": disk}
    done = ctl("manifest", "create", put(tmp_path / "source", files))
    assert 1 == done.returncode
    assert "has both 'web01.vmdk.gz' and 'web01.vmdk'" in done.stderr


# Where it goes, and what is checked -----------------------------------------------------------------------


def test_the_new_directory_is_never_in_the_source(
    ctl: Ctl, tmp_path: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by the default, which is a directory of the VM's name here."""
    directory = put(tmp_path / "web", {"web01.ovf": ovf(), "web01.vmdk": gzip.compress(disk)})
    before = seen(directory)
    monkeypatch.chdir(directory)
    for options in ((), ("--directory", directory / "new"), ("-o", directory / "manifest.json")):
        done = ctl("manifest", "create", "web01.ovf", *options)
        assert 2 == done.returncode
        assert "name a new directory elsewhere with --directory" in done.stderr
    assert before == seen(directory)
    monkeypatch.chdir(tmp_path)
    assert 0 == ctl("manifest", "create", "web/web01.ovf").returncode
    assert {"manifest.json", "web01.ovf", "web01.vmdk"} == {path.name for path in (tmp_path / "web01").iterdir()}
    done = ctl("manifest", "create", "web/web01.ovf")
    assert 1 == done.returncode
    assert "web01 already exists" in done.stderr


def test_a_directory_is_not_for_what_needs_no_unpacking(ctl: Ctl, tmp_path: Path, disk: bytes) -> None:
    directory = put(tmp_path / "source", {"web01.ovf": ovf(), "web01.vmdk": disk})
    done = ctl("manifest", "create", directory, "--directory", tmp_path / "out")
    assert 2 == done.returncode
    assert "--directory is for OVAs, and for disks that are compressed or in chunks" in done.stderr


@pytest.mark.parametrize("case", ["whole", "gzip", "chunks"])
@pytest.mark.parametrize("source", ["", "web01.ovf"])
def test_a_file_beside_a_descriptor_that_is_not_what_the_mf_says_is_refused(
    ctl: Ctl, tmp_path: Path, disk: bytes, case: str, source: str
) -> None:
    files = {"web01.vmdk": disk}
    if case != "whole":
        files = PACKED[case](disk)[1]
    described = PACKED[case](disk)[0] if case != "whole" else ovf()
    good = sums(files)
    last = sorted(files)[-1]
    directory = put(tmp_path / "source", {"web01.ovf": described, **files, "web01.mf": good})
    options = ["--directory", tmp_path / "out"] if case != "whole" else []
    # Somebody corrected the descriptor, which the .mf does not know: that is theirs to do.
    (directory / "web01.mf").write_bytes(good + b"SHA256(web01.ovf)= " + b"0" * 64 + b"\n")
    assert 0 == ctl("manifest", "create", directory / source, *options).returncode
    for made in (*(tmp_path / "out").glob("*"), directory / "manifest.json"):
        made.unlink(missing_ok=True)
    damaged = bytearray(files[last])
    damaged[len(damaged) // 2] ^= 1
    (directory / last).write_bytes(damaged)
    if case == "gzip":
        (directory / last).write_bytes(gzip.compress(disk[:-1] + b"!"))
    done = ctl("manifest", "create", directory / source, *options)
    assert 1 == done.returncode
    assert f"{directory / last} has sha256 " in done.stderr
    assert ", its .mf says " in done.stderr
    assert not (directory / "manifest.json").exists()
    assert 0 == ctl("manifest", "create", directory / source, "--no-checksum", *options).returncode


def test_an_extent_that_is_not_what_the_mf_says_is_refused(ctl: Ctl, tmp_path: Path) -> None:
    directory = put(tmp_path / "source", {"web01.ovf": ovf()})
    image(directory / "web01.vmdk", "vmdk", LINUX, options="subformat=twoGbMaxExtentFlat")
    files = {path.name: path.read_bytes() for path in directory.glob("*.vmdk")}
    assert {"web01.vmdk", "web01-f001.vmdk"} == {*files}
    (directory / "web01.mf").write_bytes(sums(files))
    assert 0 == ctl("manifest", "create", directory / "web01.ovf").returncode
    (directory / "manifest.json").unlink()
    (directory / "web01-f001.vmdk").write_bytes(files["web01-f001.vmdk"][:-1] + b"!")
    done = ctl("manifest", "create", directory / "web01.ovf")
    assert 1 == done.returncode
    assert "web01-f001.vmdk has sha256 " in done.stderr


def test_a_compressed_disk_that_is_named_by_itself_gets_a_way_out(ctl: Ctl, tmp_path: Path, disk: bytes) -> None:
    done = ctl("manifest", "create", put(tmp_path / "source", {"a.vmdk.gz": gzip.compress(disk)}) / "a.vmdk.gz")
    assert 1 == done.returncode
    assert "is to be unpacked (`gunzip -k`), or named by its .ovf" in done.stderr


def test_files_without_digests_and_unknown_algorithms_are_warnings(ctl: Ctl, tmp_path: Path, disk: bytes) -> None:
    directory = put(tmp_path / "source", {"web01.ovf": ovf(), "web01.vmdk": disk})
    (directory / "web01.mf").write_text("RIPEMD160(web01.vmdk)= 00\n")
    done = ctl("manifest", "create", directory, "--json")
    warnings = [(warning["code"], warning["message"]) for warning in json.loads(done.stdout)["warnings"]]
    assert ["digest_unknown", "no_digests"] == [code for code, _ in warnings]
    assert "web01.mf holds no digest of 'web01.vmdk'" == warnings[1][1]


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (
            {"web.vmdk.gz": b"\x1f\x8b\x08"},
            "web.vmdk.gz is compressed, and no .ovf says what it is: unpack it (`gunzip -k`)",
        ),
        ({"web.raw.000000000": b"x", "web.raw.000000001": b"x"}, "join them (`cat web.raw.0* > web.raw`)"),
    ],
)
def test_packed_disks_without_a_descriptor_get_a_way_out(
    ctl: Ctl, tmp_path: Path, files: dict[str, bytes], hint: str
) -> None:
    done = ctl("manifest", "create", put(tmp_path / "source", files))
    assert 1 == done.returncode
    assert hint in done.stderr


def test_a_manifest_that_names_a_packed_disk_says_how_to_unpack_it(scratch: Settings, disk: bytes) -> None:
    one = put(scratch.exports_dir / "one", {"web.vmdk": gzip.compress(disk)})
    write_manifest(one, [disk_entry(one / "web.vmdk", "vmdk")])
    run_job(one, scratch)
    assert "is compressed with gzip, and the manifest calls it vmdk" in report_of(one)["error"]["message"]
    assert "`hyper2kvmctl manifest create`" in report_of(one)["error"]["hint"]
    two = put(scratch.exports_dir / "two", {"web.vmdk": disk})
    write_manifest(two, [disk_entry(two / "web.vmdk", "vmdk")])
    os.rename(two / "web.vmdk", two / "web.vmdk.000000000")
    run_job(two, scratch)
    assert "disk_missing" == report_of(two)["error"]["code"]
    assert "It is there in chunks" in report_of(two)["error"]["hint"]
