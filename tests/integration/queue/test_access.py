"""Exports and locks of somebody else, and disks that somebody else opens: who is let in, and what others get by it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyper2kvmd.errors import MigrationError
from hyper2kvmd.files import granted
from hyper2kvmd.queue.claim import claim_export
from tests import ROOT

NOBODY = 65534
# Claims an export, and shows the capabilities of a tool that is started then.
CLAIM = """
import subprocess, sys
from pathlib import Path
from hyper2kvmd.queue.access import forgo_capabilities
from hyper2kvmd.queue.claim import claim_export
claim_export(Path(sys.argv[1])).close()
forgo_capabilities()
subprocess.run(["grep", "CapEff", "/proc/self/status"])
"""


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Path]:
    """A directory as hypersdk makes it, which root owns; the way to it is open to all."""
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    directory = tmp_path / "web01"
    directory.mkdir()
    directory.chmod(0o755)
    yield directory


def claim(export: Path, *, capable: bool) -> subprocess.CompletedProcess[str]:
    """Claim an export as the user nobody, with CAP_FOWNER or without."""
    capability = ("--inh-caps=+fowner", "--ambient-caps=+fowner") if capable else ("--bounding-set=-all",)
    return subprocess.run(
        [
            *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *capability, "--"),
            *(sys.executable, "-c", CLAIM, str(export)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )


def acl(export: Path) -> list[str]:
    done = subprocess.run(["getfacl", "-cnpE", export], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_service_lets_itself_into_an_export_of_somebody_else(export: Path) -> None:
    done = claim(export, capable=True)
    assert 0 == done.returncode, done.stderr
    assert "CapEff:\t0000000000000000\n" == done.stdout
    assert NOBODY == (export / ".hyper2kvmd.lock").stat().st_uid
    assert ["user::rwx", f"user:{NOBODY}:rwx", "group::r-x", "mask::rwx", "other::r-x"] == acl(export)
    again = acl(export)
    assert 0 == claim(export, capable=True).returncode
    assert again == acl(export)


def test_files_that_the_exporter_keeps_for_itself_can_be_read_once_the_export_is_claimed(export: Path) -> None:
    elsewhere = export.parent / "elsewhere"
    for file in (export / "manifest.json", export / "disk.vmdk", elsewhere):
        file.write_text("x")
        file.chmod(0o600)
    (export / "link.vmdk").symlink_to(elsewhere)
    assert 0 == claim(export, capable=True).returncode
    for name in ("manifest.json", "disk.vmdk"):
        status = (export / name).stat()
        assert (0, 0) == (status.st_uid, status.st_mode & 0o007)
        assert {"user::rw-", "group::---", "other::---"} <= {*acl(export / name)}
        read = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "cat", export / name)
        assert "x" == subprocess.run(read, capture_output=True, text=True, check=True).stdout
    assert ["user::rw-", "group::---", "other::---"] == acl(elsewhere)


def test_a_file_with_a_second_name_may_be_anybodys_and_stays_closed(export: Path) -> None:
    secret = export.parent / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    os.link(secret, export / "disk.vmdk")
    assert 0 == claim(export, capable=True).returncode
    assert ["user::rw-", "group::---", "other::---"] == acl(secret)


def test_without_the_capability_the_export_stays_as_it_is(export: Path) -> None:
    done = claim(export, capable=False)
    assert 1 == done.returncode
    assert "PermissionError" in done.stderr
    assert ["user::rwx", "group::r-x", "other::r-x"] == acl(export)
    assert [] == os.listdir(export)


def test_nobody_else_gets_more_than_they_had(export: Path) -> None:
    # The mask keeps the group 4 and the user 5 from writing, though their entries would let them.
    subprocess.run(["setfacl", "-m", "g:4:rwx,u:5:rwx,m::r-x", export], check=True)
    assert 0 == claim(export, capable=True).returncode
    expected = ["user::rwx", "user:5:r-x", f"user:{NOBODY}:rwx", "group::r-x", "group:4:r-x", "mask::rwx", "other::r-x"]
    assert expected == acl(export)


def test_a_lock_that_root_left_is_not_in_the_services_way(export: Path) -> None:
    claim_export(export).close()
    lock = export / ".hyper2kvmd.lock"
    assert 0 == lock.stat().st_uid
    done = claim(export, capable=True)
    assert 0 == done.returncode, done.stderr
    assert ["user::rw-", f"user:{NOBODY}:rw-", "group::r--", "mask::rw-", "other::---"] == acl(lock)
    assert b'"attempt": 2' in lock.read_bytes()


def test_nobody_is_told_to_remove_a_lock_that_belongs_to_another_user(export: Path) -> None:
    assert 0 == claim(export, capable=True).returncode
    lock = export / ".hyper2kvmd.lock"
    with pytest.raises(MigrationError) as refused:
        claim_export(export)
    assert f"{lock} belongs to nobody: only nobody may claim the export, and this is root" == refused.value.message
    assert refused.value.hint.startswith("Leave the lock as it is.")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604])
def test_a_file_is_open_to_somebody_for_a_while_and_then_as_before(export: Path, mode: int) -> None:
    disk = export / "disk.qcow2"
    disk.write_bytes(b"x")
    disk.chmod(mode)
    before = acl(disk)

    def reads(*who: str) -> bool:
        command = ["setpriv", *who, "--clear-groups", "--bounding-set=-all", "cat", str(disk)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    theirs, another = (f"--reuid={NOBODY}", f"--regid={NOBODY}"), ("--reuid=4", "--regid=4")
    others = reads(*another)
    with granted(disk, NOBODY, os.R_OK | os.W_OK):
        assert f"user:{NOBODY}:rw-" in acl(disk)
        assert (True, others) == (reads(*theirs), reads(*another))
    assert (before, mode) == (acl(disk), disk.stat().st_mode & 0o777)
    assert "system.posix_acl_access" not in os.listxattr(disk)
    # One who died meanwhile left it open: the next who lets somebody in closes it.
    subprocess.run(["setfacl", "-m", f"u:{NOBODY}:rw", disk], check=True)
    with granted(disk, NOBODY, os.R_OK):
        pass
    assert (before, mode) == (acl(disk), disk.stat().st_mode & 0o777)


def test_an_access_list_that_a_file_had_is_as_before(export: Path) -> None:
    disk = export / "disk.qcow2"
    disk.write_bytes(b"x")
    subprocess.run(["setfacl", "-m", "u:5:r--", disk], check=True)
    before = acl(disk)
    with granted(disk, NOBODY, os.R_OK):
        assert {f"user:{NOBODY}:r--", "user:5:r--"} < {*acl(disk)}
    assert before == acl(disk)
