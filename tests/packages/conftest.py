"""Packages of this tree, and fresh systems to install them into."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.container import Container, booted
from tests.guests.rootfs import run

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache/packages"
NEXT = "99.0"  # the version that comes after this one

# What a KVM host has, and a fresh system has not. Of what is recommended, no more than the tests need.
RECOMMENDED = "acl, libguestfs-xfs, libvirt-clients, libvirt-daemon-system, linux-image-amd64"
INCLUDED = "bash-completion,dbus,man-db,procps,systemd,systemd-sysv"
NO_RECOMMENDS = "APT::Install-Recommends=false"

Build = Callable[[str], Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A function that builds the package of this tree, as the version that it has ("") or as another."""
    made: dict[str, Path] = {}

    def build(version: str) -> Path:
        if version not in made:
            directory = tmp_path_factory.mktemp("package")
            tree = ROOT if not version else _as_version(version, directory / "tree")
            made[version] = build_package(tree, directory)
        return made[version]

    return build


def build_package(tree: Path, directory: Path) -> Path:
    """Build the package of a tree into a directory, as `make deb` does."""
    command = [ROOT / "packaging/debian/build.sh", tree, directory, ROOT / ".cache/wheels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    assert "" == done.stderr, "the build is quiet"
    return Path(done.stdout.strip())


def _as_version(version: str, tree: Path) -> Path:
    """A copy of this tree that has another version."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left_out)
    module, changelog = tree / "hyper2kvmd/__init__.py", tree / "packaging/debian/changelog"
    module.write_text(re.sub(r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"', module.read_text()))
    changelog.write_text(re.sub(r"\(.*?\)", f"({version}-1)", changelog.read_text(), count=1))
    return tree


@pytest.fixture(scope="session")
def package(build: Build) -> Path:
    """The package of this tree."""
    return build("")


@pytest.fixture(scope="module")
def machine(package: Path) -> Iterator[Container]:
    """A fresh system, booted, with the package installed by apt and the service enabled."""
    depends = subprocess.run(["dpkg-deb", "--field", package, "Depends"], capture_output=True, text=True, check=True)
    with booted(_fresh_system(f"{depends.stdout.strip()}, {RECOMMENDED}")) as machine:
        print(install(machine, package, *re.split(", ", RECOMMENDED)))
        machine.run("systemctl", "enable", "--now", "hyper2kvmd")
        yield machine


def install(machine: Container, package: Path, *more: str) -> str:
    """Install a package file, by its name as people would; what apt said."""
    shutil.copy(package, machine.root / "root/hyper2kvmd.deb")
    # INITRD: nobody boots this kernel but libguestfs, which makes its own.
    words = ["env", "DEBIAN_FRONTEND=noninteractive", "INITRD=No", "apt-get", "-q", "-y", "-o", NO_RECOMMENDS]
    # The settings stay as they were edited, without a question.
    words += [
        "-o",
        "Dpkg::Use-Pty=false",
        "-o",
        "Dpkg::Options::=--force-confold",
        "install",
        "--reinstall",
        "/root/hyper2kvmd.deb",
        *more,
    ]
    return machine.run(*words, timeout=400)


def _fresh_system(packages: str) -> Path:
    """The root of a Debian 12 that has the given packages, as in Depends:, in apt's cache only: it has no network."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + packages.encode()).hexdigest()[:12]
    system = CACHE / f"bookworm-{digest}"
    if not system.exists():
        # One that was begun and not finished, or made by another recipe.
        shutil.rmtree(CACHE, ignore_errors=True)
        CACHE.mkdir(parents=True)
        download = f"apt-get -q -y -o {NO_RECOMMENDS} satisfy --download-only {shlex.quote(packages)}"
        half = CACHE / "half"
        run(
            *("mmdebstrap", "--mode=root", "--variant=apt", f"--include={INCLUDED}", "--skip=cleanup/apt"),
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            f'--customize-hook=APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" {download}',
            *("bookworm", half),
        )
        half.rename(system)
    return system
