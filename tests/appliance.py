"""libguestfs's appliance, built once for all tests, and a workshop: one that runs, whose disks are changed meanwhile.

Emulated, an appliance takes ten seconds of a processor to come up. Two of them the kernel unpacks itself, so here it is
unpacked already; and several more, for each look at a guest, its Augeas reads two hundred descriptions of files, of
which libguestfs asks for two. That libguestfs makes its own appliance, and that this one serves, is shown by the tests
of the installed package, of the service under systemd, and of doctor.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import lzma
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hyper2kvmd.guest.session import Session
from hyper2kvmd.run import Tools
from tests.cache import cached
from tests.guests.rootfs import run

LENSES = "/usr/share/augeas/lenses/dist"
# fstab and mdadm.conf, and what their descriptions are made of
NEEDED = {f"{name}.aug" for name in ("build", "fstab", "mdadm_conf", "rx", "sep", "util")}
MEMORY_MB = 1280
DISKS = 3  # of a guest in the workshop, at most


def fixed() -> Path:
    """The directory of a fixed appliance of this machine's libguestfs and kernel, for LIBGUESTFS_PATH."""
    (parts,) = Path("/usr/lib").glob("*/guestfs/supermin.d")
    names = (parts / "packages").read_text().split()
    query = ["dpkg-query", "--show", *names, *("libguestfs0", "libguestfs-xfs")]
    # Of those that are not installed it says so, and goes on.
    versions = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    kernels = sorted(path.name for path in Path("/boot").glob("vmlinuz-*"))
    ours = (inspect.getsource(part) for part in (_make, unpacked))
    recipe = "\n".join([*ours, *sorted(NEEDED), *sorted(path.name for path in parts.iterdir()), *kernels, versions])
    return cached("appliances", "appliance", hashlib.sha256(recipe.encode()).hexdigest()[:12], _make)


def _make(directory: Path) -> None:
    run("libguestfs-make-fixed-appliance", directory)
    kernel = directory / "kernel"
    kernel.write_bytes(unpacked(kernel.read_bytes()))
    root = directory / "root"
    listed = subprocess.run(
        ["debugfs", "-R", f"ls -p {LENSES}", root], capture_output=True, text=True, check=True
    ).stdout
    names = set(re.findall(r"/([\w.-]+\.aug)/", listed))
    assert names >= NEEDED, "Augeas has its descriptions elsewhere"
    commands = "".join(f"rm {LENSES}/{name}\n" for name in sorted(names - NEEDED))
    subprocess.run(["debugfs", "-w", "-f", "-", root], input=commands, capture_output=True, text=True, check=True)
    for path in directory.iterdir():
        path.chmod(0o644)


def unpacked(kernel: bytes) -> bytes:
    """The kernel that an x86 boot image unpacks when it starts, which QEMU starts as well; else the image."""
    if kernel[0x202:0x206] != b"HdrS":
        return kernel
    offset, length = struct.unpack_from("<II", kernel, 0x248)
    start = (kernel[0x1F1] + 1) * 512 + offset
    packed = kernel[start : start + length]
    if packed.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(packed)
    if packed.startswith(b"\x28\xb5\x2f\xfd"):  # behind it stands the length
        return subprocess.run(["zstd", "-dcq"], input=packed[:-4], stdout=subprocess.PIPE, check=True).stdout
    return kernel


# An appliance for many guests -------------------------------------------------------------------------------


class Workshop:
    """An appliance that runs on and on: what is its /dev/sda is taken out and put in as one does with a real disk.

    To libguestfs and to us it is as if it had just been launched with that disk, but for the ten seconds.
    """

    def __init__(self, g: Any, monitor: Path, empties: Sequence[Path]) -> None:
        self.g = g
        self._empties = empties
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(monitor))
        self._answers = self._socket.makefile()
        self._answers.readline()  # a greeting
        self._tell("qmp_capabilities")
        self._inside = self._empty()
        self._count = 0
        # libguestfs calls a disk by its place at the launch, the kernel by the order in which it found the disks: the
        # places, in the order in which the kernel gives its letters again.
        links = self.g.debug("sh", ["for n in 0 1 2; do readlink -f /dev/disk/by-path/*scsi-0:0:$n:0; done"]).split()
        assert DISKS == len(links)
        self._places = sorted(range(DISKS), key=links.__getitem__)

    def put_in(self, disk: Path, format: str, *more: tuple[Path, str]) -> Session:
        """Take out the disks of before, whatever state they are in, and put in these."""
        self.g.umount_all()
        self.g.vg_activate_all(False)
        for array in self.g.list_md_devices():
            self.g.md_stop(array)
        self._take_out(self._inside)
        disks = [(disk, format), *more]
        # What only takes a letter that comes before those that are wanted goes again.
        stand_ins: list[tuple[str, str]] = []
        self._inside = []
        for place in self._places:
            if place < len(disks):
                self._inside.append(self._plug_in(*disks[place], place))
            elif len(self._inside) < len(disks):
                stand_ins.append(self._plug_in(self._empties[place], "raw", place))
        self._take_out(stand_ins)
        names = [f"/dev/sd{chr(ord('a') + place)}" for place in range(len(disks))]
        assert names == self._seen(), f"the appliance calls them {self._seen()}"
        self.g.debug("sh", ["udevadm settle"])
        return Session(self.g, tuple(path for path, _ in disks), Tools())

    def _plug_in(self, path: Path, format: str, place: int) -> tuple[str, str]:
        """Give the appliance a disk, and return what QEMU calls it and its file."""
        before = len(self._seen())
        self._count += 1
        node, device = f"disk{self._count}", f"drive{self._count}"
        file = {"driver": "file", "filename": str(path)}
        options = {"driver": format, "node-name": node, "file": file, "cache": {"no-flush": True}}
        self._tell("blockdev-add", **options)
        where = {"bus": "scsi.0", "scsi-id": place, "lun": 0}
        self._tell("device_add", driver="scsi-hd", drive=node, id=device, **where)
        self._wait(before + 1)
        return device, node

    def _take_out(self, disks: Sequence[tuple[str, str]]) -> None:
        left = len(self._seen()) - len(disks)
        for device, _ in disks:
            self._tell("device_del", id=device)
        self._wait(left)
        for _, node in disks:
            if node:
                self._let_go(node)

    def _seen(self) -> list[str]:
        """The disks that the appliance has."""
        while True:
            try:
                return list(self.g.list_devices())
            except RuntimeError:  # it looks for one that has just come or gone
                time.sleep(0.05)

    def _empty(self) -> list[tuple[str, str]]:
        """The disks that it was launched with, as QEMU calls them; their files are libguestfs's."""
        listed = self._tell("qom-list", path="/machine/peripheral-anon")
        paths = [f"/machine/peripheral-anon/{one['name']}" for one in listed if one["type"] == "child<scsi-hd>"]
        drives = {f"hd{number}" for number in range(DISKS)}
        found = [path for path in paths if self._tell("qom-get", path=path, property="drive") in drives]
        assert DISKS == len(found)
        return [(path, "") for path in found]

    def _tell(self, command: str, **arguments: Any) -> Any:
        """Say something to QEMU, and return its answer."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (said := json.loads(self._answers.readline())):
            pass
        assert "return" in said, f"{command}: {said}"
        return said["return"]

    def _let_go(self, node: str) -> None:
        """Close the file of a disk: QEMU has it a while longer than the appliance does."""
        deadline = time.monotonic() + 120
        while True:
            try:
                self._tell("blockdev-del", **{"node-name": node})
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _wait(self, count: int) -> None:
        """Until the appliance has so many disks."""
        deadline = time.monotonic() + 120
        while len(self._seen()) != count:
            assert time.monotonic() < deadline, f"the appliance does not have {count} disks"
            time.sleep(0.05)


@contextmanager
def workshop(directory: Path, accelerator: str) -> Iterator[Workshop]:
    """A workshop, with empty disks in it: as many as one will want at once, for their letters come before its own."""
    import guestfs

    g = guestfs.GuestFS(python_return_dict=True)
    try:
        g.set_backend("direct")
        g.set_backend_settings(["force_tcg"] if accelerator == "tcg" else [])
        g.set_memsize(MEMORY_MB)
        g.set_smp(2)
        g.config("-qmp", f"unix:{directory / 'monitor'},server=on,wait=off")
        empties = [directory / f"empty{number}.raw" for number in range(DISKS)]
        for empty in empties:
            empty.write_bytes(bytes(1 << 20))
            g.add_drive_opts(str(empty), format="raw")
        g.launch()
        yield Workshop(g, directory / "monitor", empties)
        g.shutdown()
    finally:
        g.close()
