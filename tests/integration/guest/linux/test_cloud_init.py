"""cloud-init as Debian has it, on a guest that leaves vSphere: who it takes the machine for, and what it writes.

Its own generator and stages run in a tree, with a network of their own: what systemd would start of them is started.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hyper2kvmd.guest.linux.devices import Names
from hyper2kvmd.guest.linux.fixers import View, platform
from tests.cache import cached
from tests.guests.rootfs import run

pytestmark = [pytest.mark.rest, pytest.mark.timeout(1800)]

SUITE, PACKAGES = "bookworm", ("cloud-init", "netplan.io", "systemd", "udev", "iproute2", "openssh-server")
METADATA = """\
instance-id: vm-1
local-hostname: web01
network: {version: 2, ethernets: {ens192: {addresses: [10.0.0.2/24]}}}
"""
# A tap is a card like any other to cloud-init, which passes over what is known to be virtual.
STAGE = """
cd "$1" && mount --make-rprivate / && mount -t proc proc proc && mount -t sysfs sysfs sys && mount -t tmpfs tmpfs run
mount --bind /dev dev
ip tuntap add dev "$2" mode tap && ip link set "$2" address 00:50:56:aa:bb:01 && ip link set "$2" up
exec chroot . sh -c "echo it boots; $3"
"""
# The generator decides whether systemd starts cloud-init at all.
BOOT = """
mkdir -p /run/normal /run/early /run/late
/lib/systemd/system-generators/cloud-init-generator /run/normal /run/early /run/late
[ -e /run/early/multi-user.target.wants/cloud-init.target ] || exit 0
cloud-init init --local; cloud-init init; cloud-init modules --mode=config
"""


class Tree:
    """A guest's files in a directory, as libguestfs shows them: links lead to what they name in the guest."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, path: str, *, follow: bool = True) -> Path:
        here, parts = self.root, path.strip("/").split("/")
        for number, part in enumerate(parts):
            here = here / part
            if here.is_symlink() and (follow or number < len(parts) - 1):
                target = os.readlink(here)
                above = "" if target.startswith("/") else str(here.parent.relative_to(self.root))
                here = self._path(os.path.normpath(f"/{above}/{target}"))
        return here

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        real = self._path(path, follow=followsymlinks)
        return real.is_file() and not real.is_symlink()

    def is_symlink(self, path: str) -> bool:
        return self._path(path, follow=False).is_symlink()

    def readlink(self, path: str) -> str:
        return os.readlink(self._path(path, follow=False))

    def filesize(self, path: str) -> int:
        return self._path(path).stat().st_size

    def pread(self, path: str, count: int, offset: int) -> bytes:
        return self._path(path).read_bytes()[offset : offset + count]

    def glob_expand(self, pattern: str) -> list[str]:
        directory, _, name = pattern.rpartition("/")
        if any(character in directory for character in "*?["):
            return [path for parent in self.glob_expand(directory) for path in self.glob_expand(f"{parent}/{name}")]
        return sorted(f"{directory}/{found.name}" for found in self._path(directory).glob(name))


def boot(root: Path, card: str, script: str = BOOT, **env: str) -> None:
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--uts", "sh", "-ec", STAGE, "sh"]
    clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "KERNEL_CMDLINE": "root=/dev/vda1 ro"}
    command += [str(root), card, script]
    # How cloud-init ends says little: without systemd it cannot have the network applied.
    said = subprocess.run(command, env={**clean, **env}, capture_output=True, text=True, timeout=600, check=False)
    assert said.stdout.startswith("it boots"), said.stderr


def fixed(root: Path) -> list[str]:
    """Do what the fixer wants, and return the paths."""
    inspection: Any = SimpleNamespace(os_type="linux", filesystems=())
    planned = platform.plan(View(Tree(root), inspection, Names({}, {})))
    assert planned.commands == ()
    for edit in planned.edits:
        assert edit.after is not None
        (root / edit.path.lstrip("/")).write_text(edit.after)
    return [edit.path for edit in planned.edits]


def identity(root: Path) -> dict[str, str]:
    """What must not change: the network, the host keys, and who cloud-init takes the machine for."""
    files = [*root.glob("etc/netplan/*"), *root.glob("etc/ssh/ssh_host_*_key"), root / "var/lib/cloud/data/instance-id"]
    return {str(file.relative_to(root)): file.read_text() for file in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest that cloud-init made from vSphere's metadata."""
    words = ",".join((SUITE, *PACKAGES))

    def make(directory: Path) -> None:
        include = f"--include={','.join(PACKAGES)}"
        run("mmdebstrap", "--mode=root", "--variant=minbase", include, SUITE, directory / "root.tar")

    tarball = cached("guests", "cloud-init", hashlib.sha256(words.encode()).hexdigest()[:12], make) / "root.tar"
    root = tmp_path_factory.mktemp("guest")
    run("tar", "--extract", "--file", tarball, "--directory", root, "--exclude=./dev/*")
    (root / "etc/cloud/cloud.cfg.d/99-vmware.cfg").write_text("datasource_list: [ VMware ]\n")
    metadata = base64.b64encode(METADATA.encode()).decode()
    boot(root, "ens192", VMX_GUESTINFO="1", VMX_GUESTINFO_METADATA=metadata, VMX_GUESTINFO_METADATA_ENCODING="base64")
    before = identity(root)
    assert "10.0.0.2/24" in before["etc/netplan/50-cloud-init.yaml"]
    assert before["var/lib/cloud/data/instance-id"] == "vm-1\n"
    return root


@pytest.fixture
def guest(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    run("cp", "--archive", made, tmp_path / "guest")
    return tmp_path / "guest"


def test_cloud_init_takes_the_machine_for_a_new_one_where_nothing_is_done(guest: Path) -> None:
    """What the others are held against: the address is gone, and the host keys are others."""
    before = identity(guest)
    boot(guest, "enp1s0")
    after = identity(guest)
    assert {path for path in before if before[path] != after.get(path)} == set(before)
    assert "dhcp4: true" in after["etc/netplan/50-cloud-init.yaml"]


def test_cloud_init_that_is_switched_off_changes_nothing(guest: Path) -> None:
    before = identity(guest)
    assert fixed(guest) == [platform.DISABLED, platform.NETWORK]
    boot(guest, "enp1s0")
    assert identity(guest) == before
    assert fixed(guest) == []


def test_a_mount_that_starts_cloud_init_all_the_same_changes_nothing(guest: Path) -> None:
    """cloud-init writes `x-systemd.requires=cloud-init.service` into fstab, which asks no generator."""
    before = identity(guest)
    fixed(guest)
    log = guest / "var/log/cloud-init.log"
    log.write_text("")
    boot(guest, "enp1s0", "cloud-init init")
    assert identity(guest) == before
    assert "network config is disabled by system_cfg" in log.read_text()
