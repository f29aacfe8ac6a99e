"""OVAs as the real GNU tar makes them."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from hyper2kvmd.authoring import ova

MIB = 1 << 20
WAYS = {
    "old": ("--format=gnu",),
    "oldest": ("--format=oldgnu",),
    "0.0": ("--format=posix", "--sparse-version=0.0"),
    "0.1": ("--format=posix", "--sparse-version=0.1"),
    "1.0": ("--format=posix", "--sparse-version=1.0"),
    "1.0 compressed": ("--format=posix", "--sparse-version=1.0", "-z"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pieces", [0, 1, 3, 5, 200])
def test_sparse_disks_are_unpacked_as_they_were(tmp_path: Path, way: str, pieces: int) -> None:
    """In each of GNU tar's formats, with maps that fit into the header and such that do not, from a directory."""
    directory = tmp_path / "web"
    directory.mkdir()
    (directory / "web.ovf").write_text("<Envelope/>")
    generator = random.Random(pieces)
    with (directory / "disk.img").open("wb") as file:
        for number in range(pieces):
            file.seek(number * MIB // 4 + 65536)
            file.write(generator.randbytes(5000))
        file.truncate(pieces * MIB // 4 + 300_001)
    (directory / "last.img").write_bytes(b"behind it")
    archive = tmp_path / "web.ova"
    files = ("web/web.ovf", "web/disk.img", "web/last.img")
    subprocess.run(["tar", "-C", tmp_path, "-S", *WAYS[way], "-cf", archive, *files], check=True)
    with ova.unpacked(archive, tmp_path / "out", lambda ratio: None) as content:
        assert {"web.ovf", "disk.img", "last.img"} == {*content.files}
    for name in ("web.ovf", "disk.img", "last.img"):
        assert (directory / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    subprocess.run(["sha256sum", "-c", "-"], input=sums(content), cwd=directory, check=True, text=True)
    taken = (tmp_path / "out/disk.img").stat().st_blocks * 512
    assert taken <= (directory / "disk.img").stat().st_blocks * 512 + 65536, "holes stay holes"


def sums(content: ova.Unpacked) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in content.sha256.items())
