"""What a hive can do to a real appliance: be as large as those of old servers, and end it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import hivex
import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.fix import fix
from hyper2kvmd.guest.inspect import inspect
from hyper2kvmd.guest.options import FixOptions
from hyper2kvmd.guest.session import open_guest
from hyper2kvmd.guest.windows.registry import Hive, Value, expand_sz, sz
from hyper2kvmd.run import Tools
from tests import virtiowin
from tests.appliance import MEMORY_MB
from tests.guests import ntfs
from tests.guests.rootfs import run
from tests.windows import SOFTWARE, Directory, guest

pytestmark = [pytest.mark.timeout(1800), pytest.mark.rest]

LARGE = 230 << 20
# From some GiB on, ntfs-3g takes more than 4096 bytes at a time; every real Windows is on such a partition.
REAL_MIB = 12 << 10


def overlay_of(g: Directory, at: Path) -> tuple[Path, str]:
    (disk,) = ntfs.pour(g, at)
    overlay = at / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", overlay)
    return overlay, "qcow2"


def grow(path: Path, size: int) -> None:
    """Put classes into a hive until it is so large, as installers do."""
    opened = hivex.Hivex(str(path), write=True)
    classes = opened.node_add_child(opened.root(), "Classes")
    number = 0
    while number * 1100 < size:
        group = opened.node_add_child(classes, f"Group{number:07}")
        for _ in range(100):
            number += 1
            at = opened.node_add_child(group, f"{{{number:08X}-0000-4000-8000-0123456789AB}}")
            server = opened.node_add_child(at, "InprocServer32")
            for node, values in (
                (at, {"": sz("Some description"), "AppId": sz(f"{{{number:08X}-0000-4000-8000-0123456789AB}}")}),
                (server, {"": expand_sz("%SystemRoot%\\system32\\some.dll"), "ThreadingModel": sz("Both")}),
            ):
                rows = [{"key": name, "t": one.type, "value": one.data} for name, one in values.items()]
                opened.node_set_values(node, rows)
    opened.commit(None)


def test_a_registry_of_230_mib_is_changed(accelerator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ntfs, "LAST_MIB", REAL_MIB)
    (tmp_path / "tree").mkdir()
    g = guest(tmp_path / "tree", "2016")
    hive = tmp_path / "tree/sda2" / SOFTWARE
    grow(hive, LARGE)
    assert hive.stat().st_size > LARGE
    drivers = virtiowin.write(tmp_path / "virtio-win", virtiowin.tree())
    with open_guest([overlay_of(g, tmp_path)], accel=accelerator, memory_mb=MEMORY_MB, tools=Tools()) as session:
        result = fix(session, inspect(session), FixOptions(virtio_win=drivers))
    assert all(proof.ok for proof in result.proofs)
    assert "HKLM\\SOFTWARE\\Microsoft\\Windows\\CurrentVersion" in {change.path for change in result.changes}


def test_an_appliance_that_ends_over_a_hive_ends_the_job_with_a_remedy(
    accelerator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def aborts(hive: Hive, key: str, name: str, value: Value) -> None:
        with contextlib.suppress(RuntimeError):
            hive._g.debug("sh", ["kill -ABRT $PPID"])  # what waits for the shell is the daemon of libguestfs
        set_value(hive, key, name, value)

    (tmp_path / "tree").mkdir()
    disk = overlay_of(guest(tmp_path / "tree", "2016"), tmp_path)
    set_value = Hive.set
    monkeypatch.setattr(Hive, "set", aborts)
    with (
        pytest.raises(MigrationError, match=r"the libguestfs appliance ended .* HKLM\\SYSTEM") as raised,
        open_guest([disk], accel=accelerator, memory_mb=MEMORY_MB, tools=Tools()) as session,
    ):
        fix(session, inspect(session), FixOptions())
    assert Code.GUEST_DIRTY == raised.value.code and "chkdsk" in raised.value.hint
