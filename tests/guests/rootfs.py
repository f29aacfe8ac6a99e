"""The software of a guest: a release of Debian or Ubuntu, packages, and files of ours, installed into a tarball."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OVERLAYS = Path(__file__).parent / "overlays"  # each is copied over the installed system as it is

# Nothing here is needed by a headless machine; without it the image and every initramfs rebuild are half the size.
LEFT_OUT = (
    *("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"),
    *(
        f"{lib}/modules/*/kernel/{directory}/*"
        for lib in ("/lib", "/usr/lib")  # Debian 13's kernel packages name the latter
        for directory in (
            *("sound", "drivers/gpu", "drivers/media", "drivers/staging", "drivers/net/wireless"),
            *("drivers/infiniband", "drivers/iio", "drivers/isdn"),
        )
    ),
)

UNRELEASED = ("forky",)


@dataclass(frozen=True)
class Rootfs:
    """What is installed; `commands` are run in it when all is in place, and make its initramfs images."""

    name: str
    suite: str
    packages: tuple[str, ...]
    overlays: tuple[str, ...]
    commands: tuple[str, ...]
    vendor: Literal["debian", "ubuntu"] = "debian"

    def digest(self) -> str:
        """Name this version of it: a change to this file, to the fields or to the overlays makes another one."""
        sha = hashlib.sha256(Path(__file__).read_bytes() + repr(self).encode())
        for overlay in self.overlays:
            for path in sorted((OVERLAYS / overlay).rglob("*")):
                if path.is_file():
                    sha.update(f"{path.relative_to(OVERLAYS)}\0".encode() + path.read_bytes() + b"\0")
        return sha.hexdigest()[:12]


def make_rootfs(rootfs: Rootfs, tarball: Path) -> None:
    """Install it into a tarball. Needs root and the Debian archive."""
    if os.geteuid() != 0:
        raise RuntimeError("building a guest needs root (mmdebstrap, file owners): run it with sudo")
    in_guest = (
        # a machine that has been running for years has an id; without one every boot would be a first boot
        "echo 5a0f2d0c3b1e4c6f8d7a9e1b2c3d4e5f >/etc/machine-id",
        "echo root:root | chpasswd",
        "systemctl enable --quiet boot-report.service",
        *rootfs.commands,
    )
    hooks = (
        # not with cp -a: whoever checked the files out must not own them in the guest
        *(f'cp --recursive --no-target-directory {shlex.quote(str(OVERLAYS / o))} "$1"' for o in rootfs.overlays),
        *(f'chroot "$1" sh -ec {shlex.quote(command)}' for command in in_guest),
    )
    with tempfile.TemporaryDirectory(prefix="keyring-") as scratch:
        keyring = [f"--keyring={_ubuntu_keyring(Path(scratch))}"] if rootfs.vendor == "ubuntu" else []
        _mmdebstrap(rootfs, keyring, hooks, tarball)


def _ubuntu_keyring(scratch: Path) -> Path:
    """The key of Ubuntu's archive, from a package of Debian 13: so it is signed by the key that we have."""
    scratch.chmod(0o755)  # apt reads keys as another user
    tarball = scratch / "keyring.tar"
    run("mmdebstrap", "--mode=root", "--variant=extract", "--include=ubuntu-keyring", "trixie", tarball)
    keyring = "usr/share/keyrings/ubuntu-archive-keyring.gpg"
    run("tar", "--extract", "--file", tarball, "--directory", scratch, f"./{keyring}")
    return scratch / keyring


def _mmdebstrap(rootfs: Rootfs, keyring: list[str], hooks: Sequence[str], tarball: Path) -> None:
    run(
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar", *keyring),
        "--include=" + ",".join(rootfs.packages),
        '--aptopt=APT::Install-Recommends "false"',
        # A mirror's copy of a suite that changes daily may be older than the suite says it may be.
        *(['--aptopt=Acquire::Check-Valid-Until "false"'] if rootfs.suite in UNRELEASED else []),
        *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
        *(f"--customize-hook={hook}" for hook in hooks),
        *(rootfs.suite, tarball),
    )


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a tool; when it fails, raise with the end of what it said."""
    argv = [os.fspath(word) for word in command]
    try:
        subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
            check=True,
        )
    except FileNotFoundError as error:
        raise RuntimeError(f"{argv[0]} is not installed: run 'make deps'") from error
    except subprocess.CalledProcessError as error:
        tail = "\n".join(error.stdout.decode(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"{shlex.join(argv)} ended with {error.returncode}:\n{tail}") from error
