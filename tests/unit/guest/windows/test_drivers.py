"""The drivers that an administrator gives: a directory or an ISO, whole, mixed up, cut off, or something else."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper2kvmd.errors import Code, Collected, MigrationError
from hyper2kvmd.guest.windows import drivers
from hyper2kvmd.guest.windows.drivers import FAMILIES, Catalogue, Package
from hyper2kvmd.guest.windows.iso import DIRECTORY_LIMIT, SECTOR, Iso, IsoError
from tests import virtiowin

SERVER_2022 = ("2k22", "x86_64", 20348, 3)
Files = dict[str, bytes]
PLACES: dict[str, Callable[[Path, Files], Path]] = {
    "directory": lambda path, files: virtiowin.write(path / "drivers", files),
    "directory with an ISO's names": lambda path, files: virtiowin.write(
        path / "iso", {name.upper(): data for name, data in files.items()}
    ),
    "RPM": lambda path, files: virtiowin.write(path / "rpm/drivers/by-driver", files).parents[1],
    "RPM with the ISO alone": lambda path, files: (
        virtiowin.iso(virtiowin.write(path / "rpm", {"drivers/amd64/README": b""}) / "virtio-win.iso", files).parent
    ),
    "ISO": lambda path, files: virtiowin.iso(path / "virtio-win.iso", files),
    "ISO with Joliet": lambda path, files: virtiowin.iso(path / "joliet.iso", files, rock_ridge=False),
    "ISO with Rock Ridge": lambda path, files: virtiowin.iso(path / "rr.iso", files, joliet=False),
}


def found(path: Path, driver: str = "viostor", of: tuple[str, str, int, int] = SERVER_2022) -> Package | None:
    with Catalogue.open(path) as catalogue:
        assert catalogue is not None
        return catalogue.find(driver, *of)


def refused(path: Path, driver: str = "viostor", of: tuple[str, str, int, int] = SERVER_2022) -> str:
    """What is said of a driver that cannot be used."""
    with pytest.raises(MigrationError) as caught:
        found(path, driver, of)
    assert (Code.DRIVERS_UNUSABLE, "fix.virtio_win") == (caught.value.code, caught.value.field)
    assert str(path) in caught.value.message
    assert "fix.virtio_win" in caught.value.hint
    return caught.value.message


# What is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_package_is_found_whole_wherever_it_is(tmp_path: Path, place: str) -> None:
    files = virtiowin.tree()
    package = found(PLACES[place](tmp_path, files), "NetKVM")
    assert package is not None
    names = ("netkvm.cat", "netkvm.inf", "netkvm.sys", "netkvmco.exe")  # neither the symbols nor what is not named
    assert {name: files[f"NetKVM/2k22/amd64/{name}"] for name in names} == {
        name.lower(): data for name, data in package.files.items()
    }
    assert {name: hashlib.sha256(data).hexdigest() for name, data in package.files.items()} == package.sha256
    assert ("netkvm", "netkvm.sys", "netkvm.inf") == (
        package.service.name, package.sys_name.lower(), package.inf_name.lower(),
    )  # fmt: skip
    assert "kvmnet6.ndi" == package.models["PCI\\VEN_1AF4&DEV_1041"]


@pytest.mark.parametrize("place", PLACES)
def test_each_family_and_architecture_is_covered_wherever_it_is(tmp_path: Path, place: str) -> None:
    noted = Collected()
    with Catalogue.open(PLACES[place](tmp_path, virtiowin.tree())) as catalogue:
        assert catalogue is not None
        assert {
            **dict.fromkeys(("2k8", "2k8/x86", "w7", "w7/x86", "2k8R2"), "signature unknown"),
            **dict.fromkeys(("w8", "w8/x86", "2k12", "w8.1", "w8.1/x86", "2k12R2"), "test-signed only"),
            **dict.fromkeys(("w10", "w10/x86", "2k16", "2k19", "2k22", "w11", "w11/ARM64", "2k25"), "yes"),
        } == catalogue.coverage(noted)
    assert () == noted.findings()


def test_driver_whose_inf_has_another_name_is_found(tmp_path: Path) -> None:
    package = found(virtiowin.write(tmp_path / "drivers", virtiowin.tree()), "vioserial")
    assert package is not None
    assert ("vioser.inf", "vioser.sys") == (package.inf_name, package.sys_name)


def test_iso_without_long_names_is_read_by_its_short_ones(tmp_path: Path) -> None:
    iso = virtiowin.iso(tmp_path / "plain.iso", virtiowin.tree(), rock_ridge=False, joliet=False)
    package = found(iso)
    assert package is not None
    assert "VIOSTOR.SYS" == package.sys_name


@pytest.mark.parametrize(
    ("family", "release", "signature"),
    [
        ("2k22", 204, "attested"),
        ("w10", 203, "unknown"),
        ("2k12R2", 186, "test-signed"),
        ("2k12", 185, "unknown"),
        ("w7", 271, "unknown"),
    ],
)
def test_who_signed_goes_by_the_family_and_the_number_of_the_driver(
    tmp_path: Path, family: str, release: int, signature: str
) -> None:
    newest = FAMILIES[family]
    path = virtiowin.write(tmp_path / "old", virtiowin.tree(release))
    package = found(path, of=(family, "x86_64", newest.build, newest.product_type))
    assert package is not None
    assert signature == package.signature


def test_every_family_of_the_phony_is_known_and_the_other_way_round() -> None:
    assert [*virtiowin.FAMILIES] == [*FAMILIES]


@pytest.mark.parametrize("place", PLACES)
def test_family_that_is_not_there_is_said_with_those_that_are(tmp_path: Path, place: str) -> None:
    files = {name: data for name, data in virtiowin.tree().items() if "/2k25/" not in name and "/w" not in name}
    with Catalogue.open(PLACES[place](tmp_path, files)) as catalogue:
        assert catalogue is not None
        assert catalogue.find("viostor", "2k25", "x86_64", 26100, 3) is None
        said = catalogue.lacking("viostor", "2k25", "x86_64", 26100)
    assert "has no viostor for this Windows (2k25/amd64)" in said.message
    assert said.message.endswith("families that it has: 2k8, 2k8R2, 2k12, 2k12R2, 2k16, 2k19, 2k22")
    assert "viostor/2k25/amd64" in said.hint


def test_driver_whose_inf_does_not_admit_the_build_is_not_taken(tmp_path: Path) -> None:
    path = virtiowin.write(tmp_path / "new", virtiowin.tree())
    with Catalogue.open(path) as catalogue:
        assert catalogue is not None
        assert catalogue.find("viostor", "w11", "x86_64", 14393, 1) is None
        assert "w11/amd64 is not for build 14393" in catalogue.lacking("viostor", "w11", "x86_64", 14393).message


def test_null_and_a_default_that_is_missing_are_no_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "VIRTIO_WIN", tmp_path / "missing")
    for path in (None, tmp_path / "missing"):
        with Catalogue.open(path) as catalogue:
            assert catalogue is None


def test_each_file_is_read_once(tmp_path: Path) -> None:
    path = virtiowin.write(tmp_path / "drivers", virtiowin.tree())
    with Catalogue.open(path) as catalogue:
        assert catalogue is not None
        first = catalogue.find("viostor", *SERVER_2022)
        virtiowin.write(path, dict.fromkeys(virtiowin.tree(), b""))
        assert first is not None
        assert first == catalogue.find("viostor", *SERVER_2022)


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_what_holds_something_else_is_refused_with_what_that_is(tmp_path: Path, place: str) -> None:
    files = {"EFI/BOOT/BOOTX64.EFI": b"", "dists/bookworm/Release": b"", "README.txt": b""}
    said = refused(PLACES[place](tmp_path, files))
    assert "is not a virtio-win: there is no viostor in it, but " in said
    named = {name.lower() for name in said.rpartition("but ")[2].split(", ")}
    assert ({"drivers"} if place == "RPM" else {"efi", "dists", "readme.txt"}) == named


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.write_bytes(b""), "it is not an ISO 9660 image"),
        (lambda path: path.write_bytes(b"QFI\xfb" + bytes(1 << 20)), "it is not an ISO 9660 image"),
        (lambda path: path.mkdir(), "there is no viostor in it, but nothing"),
        (os.mkfifo, "not a regular file"),
    ],
    ids=["nothing", "empty", "qcow2", "empty directory", "fifo"],
)
def test_what_is_neither_a_directory_nor_an_iso_is_refused(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    make(tmp_path / "given")
    assert says in refused(tmp_path / "given")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"viostor.sys": virtiowin.program("x86")}, "viostor/2k22/amd64/viostor.sys is for x86"),
        ({"viostor.sys": virtiowin.program("ARM64")}, "viostor.sys is for ARM64"),
        ({"viostor.sys": virtiowin.program("amd64")[:0x84]}, "viostor.sys is not a program of Windows"),
        ({"viostor.sys": b"\x7fELF" + bytes(100)}, "viostor.sys is not a program of Windows"),
        ({"viostor.sys": b"MZ" + b"\xff" * 100}, "viostor.sys is not a program of Windows"),
        ({"viostor.sys": b""}, "viostor.sys is not a program of Windows"),
        ({"viostor.sys": None}, "viostor/2k22/amd64/viostor.inf names viostor.sys, which is not there"),
        ({"viostor.cat": None}, "viostor.inf names viostor.cat, which is not there"),
        ({"viostor.inf": None}, "viostor/2k22/amd64 has no .inf, and none of the driver's name"),
        ({"viostor.inf": None, "a.inf": b"", "b.inf": b""}, "viostor/2k22/amd64 has several .inf"),
        ({"viostor.inf": b""}, "viostor.inf cannot be used: it has no [Version]"),
        ({"viostor.inf": virtiowin.inf("viostor")[:1500]}, "viostor.inf cannot be used: line"),
        ({"viostor.inf": bytes(10 << 20)}, "viostor.inf cannot be used: it is larger than 1 MiB"),
        (
            {"viostor.inf": virtiowin.inf("viostor").replace(b"viostor.sys,,,2", b"other.sys,,,2")},
            "viostor.inf does not install viostor.sys, which it starts",
        ),
        ({"viostor.inf": virtiowin.inf("viostor").replace(b"CatalogFile", b";")}, "has no catalog: nobody signed it"),
        ({"viostor.inf": virtiowin.inf("viostor").replace(b"AddService", b";")}, "does not install one service"),
    ],
)
@pytest.mark.parametrize("place", ["directory", "ISO"])
def test_package_that_is_damaged_or_mixed_up_is_refused_with_its_file(
    tmp_path: Path, place: str, change: dict[str, bytes | None], says: str
) -> None:
    files = virtiowin.tree()
    for name, data in change.items():
        if data is None:
            del files[f"viostor/2k22/amd64/{name}"]
        else:
            files[f"viostor/2k22/amd64/{name}"] = data
    path = PLACES[place](tmp_path, files)
    assert says in refused(path)
    # The others are as good as before, and doctor says which is not.
    noted = Collected()
    with Catalogue.open(path) as catalogue:
        assert catalogue is not None
        words = catalogue.coverage(noted)
    assert ("unusable", "yes") == (words["2k22"], words["2k19"])
    assert says in noted.findings()[0].message


def test_family_without_a_network_driver_is_said(tmp_path: Path) -> None:
    files = {name: data for name, data in virtiowin.tree().items() if not name.startswith("NetKVM/2k22")}
    with Catalogue.open(virtiowin.write(tmp_path / "some", files)) as catalogue:
        assert catalogue is not None
        words = catalogue.coverage(Collected())
    assert ("yes, without NetKVM", "yes") == (words["2k22"], words["2k19"])


def test_family_whose_driver_is_for_later_builds_is_said(tmp_path: Path) -> None:
    files = virtiowin.tree() | {"viostor/2k16/amd64/viostor.inf": virtiowin.inf("viostor", "2k25")}
    with Catalogue.open(virtiowin.write(tmp_path / "mixed", files)) as catalogue:
        assert catalogue is not None
        assert "not for its newest build" == catalogue.coverage(Collected())["2k16"]


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = virtiowin.write(tmp_path / "drivers", virtiowin.tree())
    (path / "viostor/2k22/amd64/viostor.cat").unlink()
    os.mkfifo(path / "viostor/2k22/amd64/viostor.cat")
    assert "viostor.cat: not a regular file" in refused(path)


# The image --------------------------------------------------------------------------------------------------


def test_iso_that_is_cut_off_anywhere_is_refused_or_gives_the_same(tmp_path: Path) -> None:
    files = {name: data for name, data in virtiowin.tree().items() if "/2k22/" in name}
    whole = virtiowin.iso(tmp_path / "whole.iso", files)
    expected, data = found(whole), whole.read_bytes()
    assert expected is not None
    cut = tmp_path / "cut.iso"
    refusals = 0
    for length in range(0, len(data), SECTOR):
        cut.write_bytes(data[:length])
        try:
            package = found(cut)
            assert package is not None
            assert expected.files == package.files
        except MigrationError:
            refusals += 1
    assert refusals > 20


def test_iso_that_is_damaged_at_random_ends_in_an_answer_or_a_defect(tmp_path: Path) -> None:
    chance = random.Random(21)
    files = {name: data for name, data in virtiowin.tree().items() if "/2k22/" in name}
    for shape in ({}, {"joliet": False}):
        data = virtiowin.iso(tmp_path / "whole.iso", files, **shape).read_bytes()
        damaged = tmp_path / "damaged.iso"
        for _ in range(150):
            broken = bytearray(data)
            for _ in range(chance.randrange(1, 40)):
                broken[chance.randrange(16 * SECTOR, len(broken))] = chance.randrange(256)
            damaged.write_bytes(broken)
            try:
                with Catalogue.open(damaged) as catalogue:
                    assert catalogue is not None
                    catalogue.coverage(Collected())
                    catalogue.find("vioscsi", *SERVER_2022)
            except MigrationError:
                continue


@pytest.mark.parametrize(
    "shape", [{}, {"joliet": False}, {"rock_ridge": False}, {"joliet": False, "rock_ridge": False}]
)
def test_directory_of_many_sectors_is_read_to_its_end(tmp_path: Path, shape: dict[str, bool]) -> None:
    names = {f"file-{number:03}.txt" for number in range(200)}
    path = virtiowin.iso(tmp_path / "many.iso", {name: name.encode() for name in names}, **shape)
    with path.open("rb") as file:
        iso = Iso(file)
        files = iso.children(iso.root)
        assert iso.root.size > SECTOR
        assert names == {iso.read(node).decode() for node in files.values()}
        assert names == {name.lower().replace("_", "-") for name in files}


def test_directory_that_holds_itself_is_not_followed_for_ever(tmp_path: Path) -> None:
    path = virtiowin.iso(tmp_path / "loop.iso", {"viostor/2k22/amd64/viostor.inf": b"x"}, joliet=False)
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        iso = Iso(file)
        at = iso.root.sector * SECTOR
        inner = iso.children(iso.root)["viostor"].sector
    # The record of viostor in the root now leads to the root.
    place = data.index(inner.to_bytes(4, "little") + inner.to_bytes(4, "big"), at, at + SECTOR)
    data[place : place + 4] = iso.root.sector.to_bytes(4, "little")
    path.write_bytes(data)
    assert found(path) is None


def test_directory_that_says_it_is_huge_is_not_read(tmp_path: Path) -> None:
    path = virtiowin.iso(tmp_path / "huge.iso", {"viostor/x": b"x"}, joliet=False, rock_ridge=False)
    data = bytearray(path.read_bytes())
    data[16 * SECTOR + 166 : 16 * SECTOR + 170] = (DIRECTORY_LIMIT + 1).to_bytes(4, "little")
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(IsoError, match="it is damaged"):
        iso = Iso(file)
        iso.children(iso.root)
