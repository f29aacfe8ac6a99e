"""The script that Windows runs when it first starts, run by Wine's cmd.exe: bounded, and each step by itself.

Wine has netsh, PowerShell and a net that do nothing, and no pnputil: what fails and what is done
once can be seen, not what a Windows makes of it.
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
from hyper2kvmd.manifest import Configuration
from hyper2kvmd.manifest.model import Interface, User
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


CONFIGURATION = Configuration(
    users=(User(name="ann", groups=("administrators",), comment="Ann (admin)"),),
    disable_users=("guest",),
    interfaces=(Interface(name="Backup LAN", addresses=("203.0.113.9/28", "2001:db8::9/64"), dns=("2001:db8::53",)),),
)


@pytest.fixture
def wine(request: pytest.FixtureRequest, tmp_path: Path) -> Wine:
    """Wine, with what FIX put into a Windows that has two static addresses, and the service for it.

    The parameter is the family, Server 2022 without one, and what its manifest asks for.
    """
    family, configuration = getattr(request, "param", ("2022", Configuration()))
    g = guest(tmp_path / "guest", family, static=True)
    drivers = virtiowin.write(tmp_path / "virtio-win", virtiowin.tree())
    found = inspect(Session(g, (), Tools()))
    assert found.windows is not None
    nics = (Nic("00:50:56:aa:00:01", 160), Nic("00:50:56:aa:00:02", 192))
    options = FixOptions(virtio_win=drivers, nics=nics, rdp=True, configuration=configuration)
    fix(g, found, found.windows, options)
    made = Wine(tmp_path / "wine")
    for name in (DIRECTORY, "Drivers"):
        shutil.copytree(
            Path(found.root.replace("/dev", str(tmp_path / "guest"))) / "Windows" / name, made.windows / name
        )
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


@pytest.mark.rest
@pytest.mark.parametrize("wine", [("2022", CONFIGURATION), ("7", CONFIGURATION)], indirect=True, ids=["2022", "7"])
def test_what_the_manifest_asks_for_has_its_turn_until_it_is_done(wine: Wine) -> None:
    ended = [(wine.start(), wine.service_is_there()) for _ in range(3)]
    assert [(1, True), (1, True), (1, False)] == ended
    log = wine.log()
    for step in ("user ann", "no more logins of guest", "remote desktop"):
        assert 1 == log.count(f" {step}: 0\n"), log
    if "addresses of 00:50:56:aa:00:02" in log:  # of Windows 7, which asks wmic for its connections
        assert 3 == log.count("no card has 00:50:56:aa:00:02\n") == log.count(" addresses of 00:50:56:aa:00:02: 1\n")
