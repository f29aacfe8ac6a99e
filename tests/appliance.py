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

    def __init__(self, g: Any, monitor: Path) -> None:
        self.g = g
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(monitor))
        self._answers = self._socket.makefile()
        self._answers.readline()  # a greeting
        self._tell("qmp_capabilities")
        self._devices = self._empty()
        self._nodes: list[str] = []
        self._count = 0

    def put_in(self, disk: Path, format: str, *more: tuple[Path, str]) -> Session:
        """Take out the disks of before, whatever state they are in, and put in these."""
        self.g.umount_all()
        self.g.vg_activate_all(False)
        for array in self.g.list_md_devices():
            self.g.md_stop(array)
        for device in self._devices:
            self._tell("device_del", id=device)
        self._wait([])
        for node in self._nodes:
            self._let_go(node)
        self._devices, self._nodes = [], []
        disks = [(disk, format), *more]
        for number, (path, kind) in enumerate(disks):
            self._count += 1
            node = f"disk{self._count}"
            file = {"driver": "file", "filename": str(path)}
            self._tell("blockdev-add", **{"driver": kind, "node-name": node, "file": file, "cache": {"no-flush": True}})
            self._nodes.append(node)
            self._plug_in(node, number)
        self.g.debug("sh", ["udevadm settle"])
        return Session(self.g, tuple(path for path, _ in disks), Tools())

    def _plug_in(self, node: str, number: int) -> None:
        """Give the appliance a disk under the letter of this number, which the disk of before may have for a moment."""
        names = [f"/dev/sd{chr(ord('a') + place)}" for place in range(number + 1)]
        deadline = time.monotonic() + 120
        while True:
            self._count += 1
            device = f"drive{self._count}"
            place = {"bus": "scsi.0", "scsi-id": number, "lun": 0}
            self._tell("device_add", driver="scsi-hd", drive=node, id=device, **place)
            self._devices.append(device)
            while len(found := self._seen()) <= number:
                assert time.monotonic() < deadline, f"the appliance does not have {names}"
                time.sleep(0.05)
            if found == names:
                return
            self._tell("device_del", id=self._devices.pop())
            self._wait(names[:-1])

    def _seen(self) -> list[str]:
        """The disks that the appliance has, none while it looks for one that has just come or gone."""
        try:
            return list(self.g.list_devices())
        except RuntimeError:
            return []

    def _empty(self) -> list[str]:
        """The disks that it was launched with, as QEMU calls them."""
        listed = self._tell("qom-list", path="/machine/peripheral-anon")
        paths = [f"/machine/peripheral-anon/{one['name']}" for one in listed if one["type"] == "child<scsi-hd>"]
        drives = {f"hd{number}" for number in range(DISKS)}
        found = [path for path in paths if self._tell("qom-get", path=path, property="drive") in drives]
        assert DISKS == len(found)
        return found

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

    def _wait(self, devices: Sequence[str]) -> None:
        """Until the appliance has these disks."""
        deadline = time.monotonic() + 120
        while True:
            if list(devices) == self._seen():
                return
            assert time.monotonic() < deadline, f"the appliance does not have {devices}"
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
        for number in range(DISKS):
            empty = directory / f"empty{number}.raw"
            empty.write_bytes(bytes(1 << 20))
            g.add_drive_opts(str(empty), format="raw")
        g.launch()
        yield Workshop(g, directory / "monitor")
        g.shutdown()
    finally:
        g.close()
