"""The RPM package: what it says for EL and Fedora, and installed, upgraded and erased by rpm.

There is no EL or Fedora to install it on: rpm does it on a fresh Debian of the release that the package was built on,
whose apt has brought what the package needs.
That shows its files and scriptlets at work, and none of its dependencies.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hyper2kvmd import __version__
from tests import ROOT
from tests.e2e.conftest import (
    APT,
    HOST,
    LIBRARIES,
    NEXT,
    RECOMMENDED,
    Drop,
    as_version,
    build_package,
    configure,
    exists,
    fresh_system,
    is_up,
    ours,
    relations,
    trees,
    version,
)
from tests.e2e.container import Container, booted, wait_until
from tests.e2e.test_systemd import CONFIG, SETTINGS, calls, hold, images, is_same, main_pid, processes, report, show

SPEC = ROOT / "packaging/hyper2kvmd.spec"
SYSTEMS = {"EL 10": ("--define", "rhel 10"), "Fedora 43": ("--define", "fedora 43")}
EVERYWHERE = ("/etc", "/usr", "/var", "/run", "/root")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packages of this tree by version: the one that it has (""), and the next one."""
    directory = tmp_path_factory.mktemp("rpm")
    trees = {"": ROOT, NEXT: as_version(NEXT, directory / "tree")}
    return {version: build_package("rpm", tree, directory / f"of-{version}") for version, tree in trees.items()}


def query(*words: str | Path) -> str:
    return subprocess.run(["rpm", *words], capture_output=True, text=True, check=True).stdout


# The package as a file ------------------------------------------------------------------------------------


@pytest.mark.rest
def test_the_version_is_the_programs(versions: dict[str, Path]) -> None:
    assert f"{__version__}-1" == query("-qp", "--queryformat", "%{VERSION}-%{RELEASE}", versions[""])


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_library_is_either_required_or_pinned(system: str) -> None:
    libraries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    command = ["rpmspec", "-q", "--requires", *SYSTEMS[system], str(SPEC)]
    required = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pinned = [*(ROOT / "packaging/requirements.in").read_text().splitlines(), "sdnotify>=0.3.2"]
    left = []
    for library in libraries:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", library).groups()  # type: ignore[union-attr]
        if f"python3dist({name}) >= {least}" not in required:
            left.append(library)
    assert [] == [library for library in left if library not in pinned]
    if system == "Fedora 43":
        assert ["structlog>=23"] == left, "all others are its own"
    qemu = {"EL 10": "qemu-kvm-core", "Fedora 43": "qemu-system-x86-core"}
    assert qemu[system] in required


@pytest.mark.rest
def test_rpmlint_has_nothing_to_say(versions: dict[str, Path]) -> None:
    config = ROOT / "packaging/rpm/rpmlint.toml"
    done = subprocess.run(["rpmlint", "-c", config, versions[""], SPEC], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout
    assert " 0 errors, 0 warnings" in done.stdout, done.stdout


@pytest.mark.rest
def test_two_builds_are_the_same(versions: dict[str, Path], tmp_path: Path) -> None:
    assert versions[""].read_bytes() == build_package("rpm", ROOT, tmp_path).read_bytes()


@pytest.mark.rest
@pytest.mark.parametrize("suite", [HOST], indirect=True)
def test_it_has_the_files_of_the_debian_package(versions: dict[str, Path], packages: dict[str, Path]) -> None:
    """But for what each distribution has in a place of its own."""
    listed = subprocess.run(["dpkg-deb", "--contents", packages[""]], capture_output=True, text=True, check=True).stdout
    deb = {line.split(" ./")[1].split(" -> ")[0] for line in listed.splitlines() if " ./" in line}
    rpm = {path.lstrip("/") for path in query("-qpl", versions[""]).splitlines()}
    own = re.compile(
        r"lintian|needrestart|usr/share/doc/hyper2kvmd/(copyright|changelog)|usr/share/zsh|/sdnotify"
        r"|lib/systemd/system/hyper2kvmd.service$"
    )
    of_both = [
        {path.removesuffix(".gz") for path in paths if path.split("/")[-1] and not own.search(path)}
        for paths in (deb, rpm)
    ]
    directories = {path for path in of_both[1] if any(other.startswith(f"{path}/") for other in of_both[1])}
    assert of_both[0] == of_both[1] - directories


# Installed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before() -> set[str]:
    """What was on the machine before; filled when it has been started."""
    return set()


@pytest.fixture(scope="module")
def machine(versions: dict[str, Path], before: set[str]) -> Iterator[Container]:
    """A fresh system, booted, with the package installed by rpm and the service enabled."""
    needed = f"rpm, {relations('Depends')}, {RECOMMENDED}, {relations('Build-Depends')}"
    with booted(fresh_system(HOST)) as machine:
        machine.run(*APT, "satisfy", needed, timeout=400)
        before |= files(machine)
        print(install(machine, versions[""], "--install"))
        machine.run("systemctl", "enable", "--now", "hyper2kvmd")
        yield machine


def files(machine: Container) -> set[str]:
    listed = machine.run("find", *EVERYWHERE, "-xdev", "-not", "-type", "d", timeout=120).splitlines()
    # What rpm, the journal and the machine itself write all the time.
    changing = r"/root/.rpmdb/|/var/(log|lib/systemd|cache)/|/run/|/etc/.*-$"
    return {path for path in listed if not re.match(changing, path)}


def install(machine: Container, package: Path, how: str) -> str:
    shutil.copy(package, machine.root / "root/hyper2kvmd.rpm")
    return machine.run("sh", "-c", f"rpm {how} --nodeps /root/hyper2kvmd.rpm 2>&1", timeout=120)


@pytest.mark.rest
def test_the_service_is_up_as_its_own_user(machine: Container) -> None:
    assert ("active", "enabled") == (show(machine, "ActiveState"), show(machine, "UnitFileState"))
    assert f"hyper2kvmd {__version__}" == machine.run("hyper2kvmd", "--version").strip()
    assert {"hyper2kvm", "kvm", "libvirt", "hypersdk"} == set(machine.run("id", "-Gn", "hyper2kvm").split())
    assert "hyper2kvmd: A VM was migrated" in machine.run("journalctl", "--list-catalog")
    machine.run("man", "-w", "hyper2kvmd.yaml")


@pytest.mark.rest
def test_an_upgrade_waits_for_the_jobs_that_run(machine: Container, drop: Drop, versions: dict[str, Path]) -> None:
    configure(machine)
    hold(machine, "convert")
    first = drop("first")
    wait_until(lambda: 1 == calls(machine, "convert"), "the conversion has begun")
    old, pid = ours(machine), main_pid(machine)

    said = install(machine, versions[NEXT], "--upgrade")
    assert "hyper2kvmd.service: starts no more jobs, and restarts when the running ones are over\n" in said
    assert old == ours(machine), "the old daemon and its job are alive"
    assert [__version__, NEXT] == trees(machine)
    assert yaml.safe_dump(SETTINGS) == (machine.root / CONFIG.lstrip("/")).read_text(), "as they were edited"

    machine.run("rm", "/run/hold")
    document = report(machine, first)
    assert ("succeeded", 1) == (document["status"], document["attempts"]), document["error"]
    assert is_same(machine, first)
    wait_until(lambda: main_pid(machine) not in (0, pid) and is_up(machine), "the new daemon runs")
    assert NEXT == version(machine)
    wait_until(lambda: [NEXT] == trees(machine), "the old version is gone")


@pytest.mark.rest
def test_erased_it_leaves_settings_exports_and_images(machine: Container, before: set[str]) -> None:
    kept = images(machine)
    assert kept
    machine.run("rpm", "--erase", "hyper2kvmd")
    assert "inactive" == show(machine, "ActiveState")
    assert {} == processes(machine)
    assert not exists(machine, LIBRARIES)
    assert kept == images(machine)
    left = {path for path in files(machine) - before if not path.startswith(("/var/lib/hypersdk", "/var/lib/libvirt"))}
    # The user stays, as files may be its; and settings that were edited.
    expected = {f"{CONFIG}.rpmsave", "/root/hyper2kvmd.rpm", "/usr/local/bin/qemu-img"}
    assert expected == {path for path in left if not path.startswith("/var/lib/hyper2kvmd/")}
