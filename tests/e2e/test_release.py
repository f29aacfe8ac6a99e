"""The files of a release: what is in them, and that the wheel passes the tests without its tree."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from hyper2kvmd import __version__
from tests import ROOT

NAME = f"hyper2kvmd-{__version__}"
pytestmark = pytest.mark.rest


def make(directory: Path, tree: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tree / "packaging/release.sh", directory], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two directories with the files of a release of this tree, made side by side."""
    directories = [tmp_path_factory.mktemp("release") for _ in range(2)]
    with ThreadPoolExecutor() as both:
        for directory, done in zip(directories, both.map(make, directories), strict=True):
            assert (0, "") == (done.returncode, done.stderr)
            assert f"{directory}/{NAME}.tar.gz\n" == done.stdout
    return directories


@pytest.fixture
def release(releases: list[Path]) -> Path:
    """A directory with the files of a release of this tree."""
    return releases[0]


def test_a_release_is_source_wheel_libraries_and_checksums(release: Path) -> None:
    names = {f"{NAME}.tar.gz", f"{NAME}-py3-none-any.whl", f"{NAME}.cdx.json"}
    assert {*names, "SHA256SUMS"} == {path.name for path in release.iterdir()}
    sums = {f"{hashlib.sha256((release / name).read_bytes()).hexdigest()}  {name}" for name in names}
    assert sums == {*(release / "SHA256SUMS").read_text().splitlines()}


def test_two_releases_of_one_tree_are_the_same(releases: list[Path]) -> None:
    one, other = ((directory / "SHA256SUMS").read_text() for directory in releases)
    assert one == other


def test_a_version_that_the_changelog_does_not_know_is_not_released(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "packaging", tree / "packaging")
    (tree / "hyper2kvmd").mkdir()
    (tree / "hyper2kvmd/__init__.py").write_text('__version__ = "99.0"\n')
    shutil.copy(ROOT / "CHANGELOG.md", tree)
    done = make(tmp_path / "release", tree)
    assert (1, "") == (done.returncode, done.stdout)
    assert "CHANGELOG.md has no section '## 99.0 (YEAR-MONTH-DAY)'" in done.stderr
    assert not (tmp_path / "release").exists()


def test_a_tree_that_lacks_a_file_of_git_is_not_released(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", tree], check=True)
    shutil.copy(ROOT / "packaging/release.sh", tree / "packaging")
    (tree / ".venv").symlink_to(ROOT / ".venv")
    (tree / "docs/batch.md").unlink()
    done = make(tmp_path / "release", tree)
    assert (1, "") == (done.returncode, done.stdout)
    assert "docs/batch.md" in done.stderr
    assert "restore it, or remove it with git rm" in done.stderr
    assert [] == [*(tmp_path / "release").iterdir()]


def test_the_source_has_all_that_is_in_the_tree(release: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    assert {"Makefile", "tests/conftest.py", "packaging/debian/rules", ".ci/run"} < wanted
    with tarfile.open(release / f"{NAME}.tar.gz") as source:
        names = {name.removeprefix(f"{NAME}/") for name in source.getnames()}
    assert {".gitignore"} == wanted - names


def test_the_wheel_has_the_program_and_nothing_else(release: Path) -> None:
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "hyper2kvmd").rglob("*") if path.suffix in (".py", ".j2")}
    with zipfile.ZipFile(release / f"{NAME}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    assert tree == names
    assert f"\nVersion: {__version__}\n" in metadata


def test_the_list_of_libraries_is_that_of_the_lock_with_their_licences(release: Path) -> None:
    text = (release / f"{NAME}.cdx.json").read_text()
    sbom: dict[str, Any] = json.loads(text)
    assert JsonStrictValidator(SchemaVersion.from_version(sbom["specVersion"])).validate_str(text) is None
    assert ("hyper2kvmd", __version__) == tuple(sbom["metadata"]["component"][key] for key in ("name", "version"))
    locked = dict(re.findall(r"(?m)^([a-z-]+)==(\S+)", (ROOT / "packaging/requirements.lock").read_text()))
    assert {"pydantic", "watchdog"} < set(locked)
    listed = {re.sub("_", "-", part["name"].lower()): part["version"] for part in sbom["components"]}
    assert locked == listed
    assert [] == [part["name"] for part in sbom["components"] if not part.get("licenses")]


# The wheel, installed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(releases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The source of the release without the program, and an environment beside it that has the wheel."""
    release = releases[0]
    directory = tmp_path_factory.mktemp("installed")
    subprocess.run(["tar", "-xzf", release / f"{NAME}.tar.gz", "-C", directory], check=True)
    shutil.rmtree(directory / NAME / "hyper2kvmd")
    environment = directory / "venv"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--system-site-packages", environment], check=True)
    wheel = release / f"{NAME}-py3-none-any.whl"
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    tests = [requirement for requirement in dev if re.match("pytest|hypothesis|jsonschema", requirement)]
    pip: list[str] = [str(environment / "bin/pip"), "-qq", "--disable-pip-version-check", "install", str(wheel), *tests]
    subprocess.run(pip, check=True)
    yield directory / NAME
    shutil.rmtree(directory)


def run(source: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in the source."""
    command = [str(source.parent / "venv/bin" / words[0]), *words[1:]]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)


def test_the_installed_programs_run(installed: Path) -> None:
    assert f"hyper2kvmd {__version__}\n" == run(installed, "hyper2kvmd", "--version").stdout
    assert "manifest" in run(installed, "hyper2kvmctl", "--help").stdout
    where = run(installed, "python", "-c", "import hyper2kvmd; print(hyper2kvmd.__file__)").stdout
    assert Path(where).is_relative_to(installed.parent / "venv")


def test_the_unit_tests_pass_with_the_wheel(installed: Path) -> None:
    done = run(installed, "python", "-m", "pytest", "-q", "--tb=short", "tests/unit")
    assert 0 == done.returncode, done.stdout[-8000:]
