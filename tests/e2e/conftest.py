"""Packages of this tree, and fresh systems to install them into."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests import ROOT, appliance, cache
from tests.conftest import disk_entry, write_manifest
from tests.e2e.container import Container, booted
from tests.e2e.test_systemd import CONFIG, SETTINGS, hand_over, main_pid, processes, show
from tests.guests.rootfs import run

Drop = Callable[[str], str]

LIBRARIES = "/usr/lib/hyper2kvmd"
APPLIANCE = "/usr/lib/guestfs-of-tests"
APPLIANCE_DROP_IN = "/etc/systemd/system/hyper2kvmd.service.d/appliance.conf"
NEXT = "99.0"  # the version that comes after this one
HOST = platform.freedesktop_os_release()["VERSION_CODENAME"]
# This machine's release with all that the package needs installed, as the cache keeps it: to unpack that takes minutes.
# That apt installs it with the package, on each release, is for `make test-all`.
READY = f"{HOST}-ready"
SUITES = (READY, *(pytest.param(suite, marks=pytest.mark.rest) for suite in ("bookworm", "trixie")))

# What a KVM host has, and a fresh system has not. Of what is recommended, no more than the tests need.
RECOMMENDED = (
    "acl, libdeflate0, libguestfs-xfs, libvirt-clients, libvirt-daemon-system, linux-image-amd64, openssh-client"
)
HOST_WITH = ("bindfs", "ovmf", "rsync", "swtpm-tools")  # what the host of a test installs besides
OTHERS = ", ".join([*HOST_WITH, "build-essential", "rpm", "tini"])  # that a test installs
INCLUDED = "bash-completion,dbus,man-db,procps,systemd,systemd-sysv"
# INITRD: nobody boots this kernel but libguestfs, which makes its own. The settings stay as they were edited, without a
# question. No pty, and nothing flushed: the system lives as long as the test.
APT = shlex.split(
    "env DEBIAN_FRONTEND=noninteractive INITRD=No apt-get -q -y -o APT::Install-Recommends=false"
    " -o Dpkg::Use-Pty=false -o Dpkg::Options::=--force-confold -o Dpkg::Options::=--force-unsafe-io"
)


@pytest.fixture(scope="session", params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    """A release of Debian, by its name; with "-ready" if what the package needs is there."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def packages(suite: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packages of this tree for a release, by version: the one that it has (""), and one made from it that is newer.

    Built on this machine if it has that release, else in a fresh system, which has no network.
    """
    directory = tmp_path_factory.mktemp("package")
    if suite in (HOST, READY):
        return with_next(build_package("debian", ROOT, directory), directory)
    with booted(fresh_system(suite)) as machine:
        machine.run(*APT, "satisfy", f"build-essential, {relations('Build-Depends')}", timeout=400)
        _copy_tree(ROOT, machine.root / "root/tree")
        build = ("/root/tree/packaging/debian/build.sh", "/root/tree", "/root/dist", "/root/wheels")
        path = machine.run("env", *bring_wheels(machine, "/root/tree"), *build, timeout=300).strip()
        return with_next(Path(shutil.copy(machine.root / path.lstrip("/"), directory)), directory)


def with_next(package: Path, directory: Path) -> dict[str, Path]:
    """Packages by version: this one (""), and the next one, which is the same but for its version."""
    tree = directory / "next"
    run("dpkg-deb", "--raw-extract", package, tree)
    (module,) = tree.glob("usr/lib/hyper2kvmd/venv/lib/python3*/site-packages/hyper2kvmd/__init__.py")
    module.write_text(re.sub(r'(?m)^__version__ = ".*"$', f'__version__ = "{NEXT}"', module.read_text()))
    for compiled in module.parent.glob("__pycache__/__init__.*"):
        compiled.unlink()  # it would be believed without a look at the source
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*?-", f"Version: {NEXT}-", control.read_text()))
    following = directory / f"hyper2kvmd_{NEXT}.deb"
    run("dpkg-deb", "-Znone", "--build", tree, following)
    shutil.rmtree(tree)
    return {"": package, NEXT: following}


@pytest.fixture(scope="session")
def package(packages: dict[str, Path]) -> Path:
    """The package of this tree."""
    return packages[""]


def build_package(kind: str, tree: Path, directory: Path) -> Path:
    """Build the package of a tree into a directory, as `make deb` ("debian") and `make rpm` ("rpm") do."""
    command = [tree / f"packaging/{kind}/build.sh", tree, directory, cache.directory("wheels")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    assert "" == done.stderr, "the build is quiet"
    return Path(done.stdout.strip())


def bring_wheels(machine: Container, tree: str) -> tuple[str, ...]:
    """Fetch what a release builds the package from because its own libraries are too old; how pip finds it in there."""
    if machine.run("make", "-sn", "-C", tree, "-f", "packaging/debian/rules", "wheels"):
        wheels = cache.directory("wheels")
        python = machine.run("/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
        command = (
            *(sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "download", "--dest", str(wheels)),
            *("--require-hashes", "--no-deps", "--requirement", str(ROOT / "packaging/requirements.lock")),
            *("--only-binary", ":all:", "--python-version", python, "--platform", "manylinux_2_17_x86_64"),
        )
        run(*command)
        shutil.copytree(wheels, machine.root / "root/wheels", dirs_exist_ok=True)
    return "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/root/wheels"


def as_version(version: str, tree: Path) -> Path:
    """A copy of this tree that has another version."""
    _copy_tree(ROOT, tree)
    module, changelog = tree / "hyper2kvmd/__init__.py", tree / "packaging/debian/changelog"
    module.write_text(re.sub(r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"', module.read_text()))
    changelog.write_text(re.sub(r"\(.*?\)", f"({version}-1)", changelog.read_text(), count=1))
    spec = tree / "packaging/hyper2kvmd.spec"
    spec.write_text(re.sub(r"(?m)^(Version: +).*$", rf"\g<1>{version}", spec.read_text()))
    return tree


def _copy_tree(tree: Path, copy: Path) -> None:
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
    shutil.copytree(tree, copy, symlinks=True, ignore=left_out)


def relations(field: str) -> str:
    """The packages that debian/control names in a field, without those that are filled in when it is built."""
    control = (ROOT / "packaging/debian/control").read_text()
    found = re.search(rf"(?m)^{field}:\n((?: .*\n)+)", control)
    assert found
    return ", ".join(line.strip(" ,") for line in found[1].splitlines() if "${" not in line)


def libraries() -> list[str]:
    """The libraries that come along where the release's own are too old."""
    return re.findall(r"(?m)^([a-z-]+)>=", (ROOT / "packaging/requirements.in").read_text())


@pytest.fixture(scope="module")
def machine(suite: str, package: Path) -> Iterator[Container]:
    """A fresh system, booted, with the package installed by apt and the service enabled."""
    ready = suite == READY
    with booted(fresh_system(suite), bound={APPLIANCE: appliance.fixed()} if ready else {}) as machine:
        print(install(machine, package, *([] if ready else RECOMMENDED.split(", "))))
        if ready:  # that libguestfs makes one in the sandbox is shown by test_systemd
            machine.write(APPLIANCE_DROP_IN, f"[Service]\nEnvironment=LIBGUESTFS_PATH={APPLIANCE}\n")
        machine.run("systemctl", "enable", "--now", "hyper2kvmd")
        yield machine


@pytest.fixture(scope="module")
def host(machine: Container) -> Container:
    """The machine with libvirt as its distribution ships it: people are root there, and QEMU is not."""
    machine.run(*APT, "install", *HOST_WITH)  # if they are not there
    written = machine.run("grep", "-Ev", "^[[:space:]]*(#|$)", "/etc/libvirt/qemu.conf", accept=(0, 1))
    assert "" == written, "qemu.conf is not the one of the distribution"
    machine.run("systemctl", "start", "libvirtd")
    return machine


def libvirt_of(host: Container) -> str:
    """The URI of a machine's libvirt, for this machine's root."""
    return f"qemu+unix:///system?socket={host.root}/run/libvirt/libvirt-sock"


def install(machine: Container, package: Path, *more: str) -> str:
    """Install a package file, by its name as people would; what apt said."""
    shutil.copy(package, machine.root / "root/hyper2kvmd.deb")
    command = (*APT, "install", "--reinstall", "/root/hyper2kvmd.deb", *more)
    return machine.run("sh", "-c", 'exec "$@" 2>&1', "sh", *command, timeout=400)


def fresh_system(suite: str) -> Path:
    """The root of a fresh Debian that has all that the package may need, in apt's cache only, or installed if "-ready".

    It has no network.
    """
    release, _, ready = suite.partition("-")
    needed = [relations("Depends"), RECOMMENDED]
    get = "apt-get -q -y -o APT::Install-Recommends=false satisfy"
    if ready:
        # The libraries are there for apt alone: of a release that has newer ones, the package depends on them.
        fetched = ", ".join(f"python3-{name}" for name in libraries())
        # Without the option, the dpkg that apt runs is this machine's, on this machine.
        inside = f'{get} -o DPkg::Chroot-Directory="$1"'
        gets = [
            f"{inside} {shlex.quote(', '.join([*needed, *HOST_WITH, 'tini']))}",
            f"{get} --download-only {shlex.quote(fetched)}",
        ]
    else:
        gets = [f"{get} --download-only {shlex.quote(', '.join([OTHERS, relations('Build-Depends'), *needed]))}"]
    command = (
        *("mmdebstrap", "--mode=root", "--variant=apt", f"--include={INCLUDED}", "--skip=cleanup/apt"),
        *("--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=force-unsafe-io"),
        *(f'--customize-hook=APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" {get}' for get in gets),
        release,
    )
    environment = {"INITRD": "No", "DEBIAN_FRONTEND": "noninteractive"}
    digest = hashlib.sha256(repr((command, environment)).encode()).hexdigest()[:12]

    def make(into: Path) -> None:
        run(*command, into, env=environment)

    return cache.cached("systems", suite, digest, make)


# What the tests of both kinds of packages do ---------------------------------------------------------------


@pytest.fixture
def drop(machine: Container, tmp_path: Path) -> Drop:
    """A function that drops an export with one small disk, as the exporter's user; returns its name."""

    def drop(name: str) -> str:
        directory = tmp_path / name
        directory.mkdir()
        disk = directory / f"{name}-disk-0.raw"
        disk.write_bytes(os.urandom(1 << 20))
        write_manifest(directory, [disk_entry(disk, local_path=disk.name)])
        return hand_over(machine, directory)

    return drop


@pytest.fixture(autouse=True)
def tells_and_lets_go(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shown by pytest if the test failed; and a test that failed holds up no other."""
    yield
    if "machine" in request.fixturenames:
        machine: Container = request.getfixturevalue("machine")
        machine.run("rm", "-f", "/run/hold")
        print(machine.run("journalctl", "-b", "--no-pager", "-u", "hyper2kvmd*", "-n", "50", accept=(0, 1)))


def configure(machine: Container) -> None:
    machine.write(CONFIG, yaml.safe_dump(SETTINGS))
    machine.run("systemctl", "reload", "hyper2kvmd")


def version(machine: Container) -> str:
    """The version that the daemon runs: that of the tree which its interpreter was started from."""
    command = machine.run("cat", f"/proc/{main_pid(machine)}/cmdline").split("\0")[0]
    found = re.fullmatch(rf"{LIBRARIES}/(.*?)-1\b.*\.\w{{6}}/bin/python", command)
    assert found, command
    return found[1]


def is_up(machine: Container) -> bool:
    """Whether the daemon has said that it is ready."""
    return "active" == show(machine, "ActiveState")


def trees(machine: Container) -> list[str]:
    """The versions that are there."""
    listed = machine.run("ls", LIBRARIES).split()
    return sorted(name.partition("-1")[0] for name in listed if re.fullmatch(r".*-1\b.*\.\w{6}", name))


def ours(machine: Container) -> dict[int, str]:
    """The processes of the daemon and of its jobs."""
    return {pid: command for pid, command in processes(machine).items() if " -m hyper2kvmd run" in command}


def exists(machine: Container, path: str) -> bool:
    return (machine.root / path.lstrip("/")).exists()
