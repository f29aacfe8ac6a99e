"""What a version leaves on disk, kept for those after it: `python -m tests.state` writes tests/data/state/VERSION.

The real daemon migrates, fails, and is killed on a file system of its own, with a host name of its own. The file system
is kept as an image, because what is on disk counts on inodes and times: a copy of the files would not be what was left.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hyper2kvmd import __version__
from tests import DATA
from tests.conftest import disk_entry, write_manifest
from tests.e2e.container import wait_until

KEPT = DATA / "state"
MIB = 1 << 20
ROOT = Path("/srv/state")
EXPORTS, IMAGES, WORK = ROOT / "exports", ROOT / "images", ROOT / "work"
SETTINGS = ROOT / "settings.yaml"
TOLD = ROOT / "told"

# The state of each export, which is its name, and of those that are told apart by what is behind them.
EXPECTED = {
    "succeeded": "succeeded",
    "failed": "failed",
    "rejected": "rejected",
    "blocked": "blocked",
    "cancelled": "cancelled",
    "held": "blocked",
    "retrying": "queued",  # its time has come
    "retried": "queued",
    "fresh": "queued",
    "interrupted": "queued",  # by SIGTERM, behind its conversion
    "killed": "queued",  # by SIGKILL, behind its conversion
}

# A mount namespace with the image at ROOT, and a host name, in which "$@" is run. The command before this one may not
# have let go of the image yet.
_INSIDE = f"""
hostname kvm1
mount -t tmpfs tmpfs /srv
mkdir {ROOT}
tries=0
while used=$(losetup --noheadings --associated "$1") && [ -n "$used" ]; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || {{ echo "in use: $used" >&2; exit 1; }}
    sleep 0.1
done
mount -o loop "$1" {ROOT}
shift
exec "$@"
"""
_DEAF = ROOT / "deaf"  # while this is there, nobody can be told
_HOOK = f"""#!/bin/sh
[ ! -e {_DEAF} ] && echo "$H2K_VM" >>{TOLD}
"""
# Fails on one disk, as a cable does that is loose; and does not come back from two others, whose conversion is done.
_QEMU_IMG = """#!/bin/sh
case "$*" in
"convert "*retrying*) echo 'error while writing: Input/output error' >&2; exit 1 ;;
"check "*" -f qcow2 "*interrupted*|"check "*" -f qcow2 "*killed*) touch "$0.reached"; exec sleep 600 ;;
esac
exec /usr/bin/qemu-img "$@"
"""


def inside(image: Path, *argv: str, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command on the host that the image is of."""
    enter = ["unshare", "--mount", "--propagation", "private", "--uts"]
    enter += ["--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.run(
        [*enter, "sh", "-euc", _INSIDE, "sh", str(image), *argv],
        env={**os.environ, **(variables or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def unpack(kept: Path, image: Path) -> None:
    """Write the image of a version, to be changed."""
    with lzma.open(kept) as packed, image.open("wb") as file:
        while block := packed.read(MIB):
            # What is empty stays a hole.
            file.seek(len(block), os.SEEK_CUR) if not any(block) else file.write(block)
        file.truncate()


# Making one --------------------------------------------------------------------------------------------------


def _export(name: str, **changes: Any) -> Path:
    directory = EXPORTS / name
    directory.mkdir()
    disk = directory / f"{name}-disk-0.raw"
    disk.write_bytes(name.encode().ljust(64, b".") * 4096)
    write_manifest(directory, [{**disk_entry(disk), **changes.pop("disk", {})}], **changes)
    return directory


def _run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments, "--config", str(SETTINGS)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _wait(what: str, condition: Callable[[], bool]) -> None:
    wait_until(condition, what, 60)


def _status(name: str) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        status: str = json.loads((EXPORTS / name / "migration-report.json").read_text())["status"]
        return status
    return None


def _notified(query: str) -> bool:
    """Whether a query finds something in the database of what was told."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{WORK}/notified.sqlite?mode=ro", uri=True)) as db:
            return db.execute(query).fetchone() is not None
    except sqlite3.OperationalError:  # not made yet
        return False


def _leave() -> None:
    """Fill ROOT with what the daemon leaves, in every state."""
    for directory in (EXPORTS, IMAGES, WORK, ROOT / "hooks.d/post-job", ROOT / "bin"):
        directory.mkdir(parents=True)
    shape = {
        "exports_dir": str(EXPORTS),
        "output_dir": str(IMAGES),
        "work_dir": str(WORK),
        "settle_seconds": 0,
        "scan_interval_seconds": 1,
        "libvirt": {"import": False},
        "metrics": {"listen": ""},
        "hooks": {"directory": str(ROOT / "hooks.d")},
    }
    SETTINGS.write_text(yaml.safe_dump(shape))
    hook, tool = ROOT / "hooks.d/post-job/tell", ROOT / "bin/qemu-img"
    for path, text in ((hook, _HOOK), (tool, _QEMU_IMG)):
        path.write_text(text)
        path.chmod(0o755)
    os.environ["PATH"] = f"{ROOT / 'bin'}:{os.environ['PATH']}"
    reached = tool.with_name("qemu-img.reached")

    for name, command in (("held", "hold"), ("cancelled", "cancel")):
        _export(name)
        _run("hyper2kvmd.ctl", command, name)
    daemon = subprocess.Popen([sys.executable, "-m", "hyper2kvmd", "run", "--config", str(SETTINGS)])
    _wait("the daemon notes what is to be told", lambda: _notified("SELECT since FROM history"))
    _DEAF.touch()
    _export("failed", disk={"checksum": f"sha256:{'0' * 64}"})
    _wait("it was tried to tell of failed", lambda: _notified("SELECT * FROM todo WHERE attempts = 1"))
    _wait("the hook has ended", lambda: "hook exited 1" in (EXPORTS / "failed/.hyper2kvmd.log").read_text())
    _DEAF.unlink()
    _export("succeeded")
    _export("retried", disk={"checksum": f"sha256:{'0' * 64}"})
    _export("rejected", manifest_version="7.0")
    elsewhere = {"convert": {"enabled": True, "output_dir": str(ROOT / "elsewhere")}}
    _export("blocked", pipeline=elsewhere)
    _export("retrying")
    for name in ("succeeded", "failed", "rejected", "blocked", "cancelled", "retrying"):
        _wait(f"{name} is over", lambda: _status(name) == name)  # noqa: B023
    _wait("retried has failed", lambda: _status("retried") == "failed")
    over = {"succeeded", "retried", "rejected", "blocked"}  # what was over before the daemon counts as told
    _wait(f"all of {over} is told", lambda: TOLD.exists() and over <= {*TOLD.read_text().split()})

    _export("killed")
    _wait("killed is converted", reached.exists)
    reached.unlink()
    os.kill(json.loads((EXPORTS / "killed/.hyper2kvmd.lock").read_text())["pid"], signal.SIGKILL)
    _export("interrupted")
    _wait("interrupted is converted", reached.exists)
    reached.unlink()
    daemon.terminate()
    assert 0 == daemon.wait(30)
    (EXPORTS / "retried/manifest.json").unlink()
    disk = EXPORTS / "retried/retried-disk-0.raw"
    write_manifest(disk.parent, [disk_entry(disk)])
    _run("hyper2kvmd.ctl", "retry", "retried")
    _export("fresh")


def main() -> None:
    """Write the image of this version, or with --leave fill ROOT."""
    if sys.argv[1:] == ["--leave"]:
        _leave()
        return
    kept = KEPT / f"{__version__}.img.xz"
    if kept.exists():
        sys.exit(f"{kept} is there already: what a version has left is never made again")
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch, "image")
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-N", "1024", image], check=True)
        done = inside(image, sys.executable, "-m", "tests.state", "--leave", variables={"PYTHONPATH": os.getcwd()})
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        KEPT.mkdir(exist_ok=True)
        kept.write_bytes(lzma.compress(image.read_bytes(), preset=9))
    print(kept)


if __name__ == "__main__":
    main()
