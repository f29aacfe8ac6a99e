"""What several tests need: settings on a scratch directory, exports, programs that record their arguments."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import structlog

from hyper2kvmd import accel
from hyper2kvmd.queue import estimate
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from tests import appliance, order
from tests.order import (
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_xdist_make_scheduler,
)

__all__ = [  # hooks of pytest
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_runtest_makereport",
    "pytest_xdist_make_scheduler",
]

# No example may take long by the clock, which depends on what else the machine does: tests.pace has what does not.
hypothesis.settings.register_profile("by no clock", deadline=None)
hypothesis.settings.load_profile("by no clock")

MakeExport = Callable[..., Path]
Ctl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def unconfigured_log() -> Iterator[None]:
    """A command that ran in this process must not decide what the next test's log says."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def accelerator() -> str:
    """What appliances run on, tried once: on a host whose KVM hangs, every try takes a while."""
    return accel.resolve("auto", Tools()).name


@pytest.fixture(scope="session", autouse=True)
def known_accelerator(request: pytest.FixtureRequest) -> None:
    """Jobs of tests that emulate anyway do not try again. What a job does that finds it out has tests of its own.

    And no appliance is made, since one is there.
    """
    if all("unit" in item.path.parts for item in request.session.items):
        return
    if "tcg" == request.getfixturevalue("accelerator"):
        os.environ["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
    os.environ["LIBGUESTFS_PATH"] = str(appliance.fixed())


@pytest.fixture
def scratch(tmp_path: Path) -> Settings:
    """Settings whose directories all lie below the test's own, and which wait for nothing."""
    for name in ("exports", "images", "work"):
        (tmp_path / name).mkdir()
    return Settings.model_validate(
        {
            "exports_dir": tmp_path / "exports",
            "output_dir": tmp_path / "images",
            "work_dir": tmp_path / "work",
            "plan_dir": tmp_path / "plan.d",
            "settle_seconds": 0,
            "scan_interval_seconds": 0.3,
            "libvirt": {"import": False},
            "metrics": {"listen": ""},
        }
    )


def write_manifest(directory: Path, disks: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a small manifest in the seed's dialect, without FIX; `changes` replace top-level keys."""
    shape: dict[str, Any] = {
        "manifest_version": "1.0",
        "source": {"provider": "vsphere", "vm_id": f"vm-{directory.name}", "vm_name": directory.name},
        "vm": {"cpu": 1, "mem_gb": 1, "firmware": "bios", "os_hint": "linux"},
        "disks": disks,
        "pipeline": {
            "inspect": {"enabled": False},
            "fix": {"enabled": False},
            "convert": {"enabled": True, "target_format": "qcow2"},
            "validate": {"enabled": True, "verify_checksum": True},
        },
        **changes,
    }
    path = directory / "manifest.json"
    path.write_text(json.dumps(shape, indent=2))
    return path


def disk_entry(path: Path, format: str = "raw", id: str = "disk-0", **changes: Any) -> dict[str, Any]:
    """The entry of a manifest for a disk file that is there, with its checksum."""
    return {
        "id": id,
        "source_format": format,
        "bytes": path.stat().st_size,
        "local_path": str(path),
        "checksum": "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(),
        "boot_order_hint": 0,
        "disk_type": "boot",
        **changes,
    }


@pytest.fixture
def make_export(scratch: Settings) -> MakeExport:
    """A function that makes an export with one raw disk of 1 MiB of random bytes."""

    def make(name: str = "web01", size: int = 1 << 20, **changes: Any) -> Path:
        directory = scratch.exports_dir / name
        directory.mkdir()
        disk = directory / f"{name}-disk-0.raw"
        disk.write_bytes(os.urandom(size))
        write_manifest(directory, changes.pop("disks", [disk_entry(disk)]), **changes)
        return directory

    return make


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A function that puts a shell script on PATH under the name of a program."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def put(name: str, script: str) -> None:
        path = directory / name
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put


@pytest.fixture
def ctl(scratch: Settings, tmp_path: Path) -> Ctl:
    """Runs hyper2kvmctl as a process of its own, with the settings of `scratch`."""
    config = tmp_path / "ctl.json"
    config.write_text(scratch.model_dump_json(by_alias=True))
    program = (sys.executable, "-m", "hyper2kvmd.ctl")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, *arguments, "--config", str(config)],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=600,
        )

    return run


def left_in(work_dir: Path) -> list[str]:
    """What is in a work directory besides what stays there on purpose: how long migrations took."""
    return sorted(path.name for path in work_dir.iterdir() if path.name != estimate.FILE)


def run_job(
    export: Path,
    settings: Settings,
    *options: str,
    timeout: float = 900,
    program: Sequence[str] = ("-m", "hyper2kvmd"),
) -> subprocess.CompletedProcess[str]:
    """Run `hyper2kvmd run-job` as a process of its own; `program` is what Python runs."""
    config = settings.work_dir.parent / "settings.json"
    config.write_text(settings.model_dump_json(by_alias=True))
    return subprocess.run(
        [sys.executable, *program, "run-job", str(export), "--config", str(config), *options],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def report_of(export: Path) -> dict[str, Any]:
    """The report of an export."""
    content: dict[str, Any] = json.loads((export / "migration-report.json").read_text())
    return content


def pytest_addoption(parser: pytest.Parser) -> None:
    """Golden files are rewritten on request, and then looked at."""
    order.pytest_addoption(parser)
    parser.addoption("--regenerate", action="store_true", help="rewrite the golden files")
