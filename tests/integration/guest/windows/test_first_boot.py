"""The script that Windows runs when it first starts, run by Wine's cmd.exe: bounded, and each step by itself.

Wine has netsh and PowerShell that do nothing, and no pnputil: what fails and what is done once can be seen, not what
a Windows makes of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hyper2kvmd.guest.inspect import inspect
from hyper2kvmd.guest.options import FixOptions, Nic
from hyper2kvmd.guest.session import Session
from hyper2kvmd.guest.windows.firstboot import DIRECTORY, LOG, SCRIPT, SERVICE
from hyper2kvmd.guest.windows.fix import fix
from hyper2kvmd.run import Tools
from tests import virtiowin
from tests.windows import guest

SECONDS = 120


class Wine:
    """A Windows of Wine's own below `at`."""

    def __init__(self, at: Path) -> None:
        self._environment = {**os.environ, "WINEPREFIX": str(at), "WINEDEBUG": "-all", "DISPLAY": ""}
        self.windows = at / "drive_c/windows"
        self.run("wineboot", "--init")

    def run(self, *command: str) -> int:
        """Run a program of Wine, and return its exit status."""
        done = subprocess.run(
            ["wine", *command], env=self._environment, timeout=SECONDS, capture_output=True, check=False
        )
        return done.returncode

    def service_is_there(self) -> bool:
        return self.run("sc", "query", SERVICE) == 0

    def start(self) -> int:
        """What the service does."""
        place = f"C:\\windows\\{DIRECTORY}"
        return self.run("cmd", "/d", "/c", f"{place}\\{SCRIPT} >>{place}\\{LOG} 2>&1")

    def log(self) -> str:
        return (self.windows / DIRECTORY / LOG).read_text(errors="replace").replace("\r", "")


@pytest.fixture
def wine(tmp_path: Path) -> Wine:
    """Wine, with what FIX put into a Server 2022 that has two static addresses, and the service for it."""
    g = guest(tmp_path / "guest", "2022", static=True)
    drivers = virtiowin.write(tmp_path / "virtio-win", virtiowin.tree())
    found = inspect(Session(g, (), Tools()))
    assert found.windows is not None
    nics = (Nic("00:50:56:aa:00:01"), Nic("00:50:56:aa:00:02"))
    fix(g, found, found.windows, FixOptions(virtio_win=drivers, nics=nics, rdp=True))
    made = Wine(tmp_path / "wine")
    for name in (DIRECTORY, "Drivers"):
        shutil.copytree(tmp_path / "guest/sda3/Windows" / name, made.windows / name)
    assert 0 == made.run("sc", "create", SERVICE, "binPath=", "C:\\windows\\system32\\cmd.exe")
    return made


@pytest.mark.rest
def test_the_script_is_run_three_times_at_most_and_each_step_by_itself(wine: Wine) -> None:
    assert wine.service_is_there()
    ended = [(wine.start(), wine.service_is_there()) for _ in range(3)]
    assert [(1, True), (1, True), (1, False)] == ended
    log = wine.log()
    assert 3 == log.count("of 3\n") == log.count("end, failed=1\n")
    # pnputil is not there: every package had its turn, each time, and what comes after it is done, once.
    for name in ("viostor.inf", "vioscsi.inf", "netkvm.inf"):
        assert 3 == sum(line.endswith(name) for line in log.splitlines()), log
    assert 3 == log.count(" drivers: 1\n") and 1 == log.count(" addresses: 0\n") == log.count(" remote desktop: 0\n")


@pytest.mark.rest
def test_the_service_is_gone_as_soon_as_all_is_done(wine: Wine) -> None:
    shutil.rmtree(wine.windows / "Drivers")
    assert (0, False) == (wine.start(), wine.service_is_there())
    assert "end, failed=0\n" in wine.log() and "of 3" in wine.log()
