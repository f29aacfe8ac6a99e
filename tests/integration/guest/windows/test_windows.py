"""Phony Windows guests in real NTFS, in a real appliance: what it does is what the stand-in of the unit tests does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.errors import MigrationError
from hyper2kvmd.guest.fix import fix
from hyper2kvmd.guest.inspect import Inspection, inspect
from hyper2kvmd.guest.options import FixOptions, Nic
from hyper2kvmd.guest.session import Session
from hyper2kvmd.guest.windows.registry import Value, binary, dword, expand_sz, multi_sz, sz
from hyper2kvmd.run import Tools
from tests import virtiowin
from tests.appliance import Workshop
from tests.guests.ntfs import pour
from tests.guests.rootfs import run
from tests.windows import SYSTEM, Directory, guest

NICS = (Nic("00:50:56:aa:00:01", 160), Nic("00:50:56:aa:00:02", 192))

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return virtiowin.write(tmp_path_factory.mktemp("virtio-win"), virtiowin.tree())


def put_in(shop: Workshop, g: Directory, directory: Path) -> tuple[Session, list[Path]]:
    """Put a guest's disks into the appliance, as overlays; and where the disks are."""
    disks = pour(g, directory)
    overlays = []
    for disk in disks:
        overlay = disk.with_suffix(".qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", overlay)
        overlays.append((overlay, "qcow2"))
    return shop.put_in(*overlays[0], *overlays[1:]), disks


def alike(found: Inspection) -> Inspection:
    """What was found, without what the stand-in does not have: what file systems are called."""
    devices = tuple(replace(device, uuid="", label="", part_label="", member="") for device in found.filesystems)
    return replace(found, filesystems=devices, names=replace(found.names, devices={}))


# Whether there are drivers for it, and what else is with it. One of UEFI goes through a whole job, in test_job.py.
GUESTS = {
    "7": (True, {"static": True}),
    "2016": (False, {"two_disks": True, "storahci_off": True, "compressed": True}),
}


@pytest.mark.parametrize("family", GUESTS)
def test_a_guest_is_repaired_as_its_directory_is(family: str, shop: Workshop, drivers: Path, tmp_path: Path) -> None:
    given, variant = GUESTS[family]
    options = FixOptions(virtio_win=drivers if given else None, nics=NICS)
    (tmp_path / "tree").mkdir()
    stand_in = guest(tmp_path / "tree", family, **variant)
    session, disks = put_in(shop, stand_in, tmp_path)
    before = [disk.stat().st_mtime_ns for disk in disks]
    found = inspect(session)
    result = fix(session, found, options)
    expected = Session(stand_in, (), Tools())
    assert alike(inspect(expected)) == alike(found)
    assert fix(expected, found, options) == result
    assert result.proofs and all(proof.ok for proof in result.proofs)
    assert ("virtio" if given else "sata") == result.machine.disks
    again = fix(session, inspect(session), options)
    assert () == again.changes and all(proof.ok for proof in again.proofs)
    assert before == [disk.stat().st_mtime_ns for disk in disks]


def answers(g: Any) -> list[Any]:
    """What a hive says to everything that is asked of one, and to some things that are not."""
    said: list[Any] = []

    def ask(name: str, *arguments: Any, **options: Any) -> Any:
        try:
            said.append(getattr(g, name)(*arguments, **options))
        except RuntimeError:
            said.append(f"{name} is refused")
        return said[-1]

    def tell(node: int) -> None:
        for value in ask("hivex_node_values", node):
            for name in ("key", "type", "value"):
                ask(f"hivex_value_{name}", value["hivex_value_h"])

    def walk(node: int) -> None:
        ask("hivex_node_name", node)
        tell(node)
        for child in ask("hivex_node_children", node):
            walk(child["hivex_node_h"])

    path = f"/{SYSTEM}"
    ask("hivex_open", f"{path}.none", write=False)
    ask("hivex_open", "/Windows/System32/ntoskrnl.exe", write=False)
    ask("hivex_open", path, write=True)
    root = ask("hivex_root")
    walk(root)
    select = ask("hivex_node_get_child", root, "sElEcT")
    for name in ("cUrrent", "nowhere", ""):
        ask("hivex_node_get_value", select, name)
    ask("hivex_node_get_child", root, "nowhere")
    made = ask("hivex_node_add_child", select, "Schlüssel")
    for name, value in VALUES.items():
        ask("hivex_node_set_value", made, name, value.type, value.data)
    ask("hivex_node_set_value", made, "NUMBER", 4, bytes(4))
    ask("hivex_node_add_child", made, "below")
    ask("hivex_node_add_child", made, "BELOW")
    walk(made)
    ask("hivex_node_delete_child", ask("hivex_node_get_child", root, "MountedDevices"))
    ask("hivex_node_get_child", root, "MountedDevices")
    ask("hivex_commit", None)
    ask("hivex_close")
    ask("hivex_open", path, write=False)
    walk(ask("hivex_root"))
    ask("hivex_node_add_child", root, "read only")
    ask("hivex_commit", None)
    ask("hivex_close")
    said.append(g.checksum("sha256", path))
    return said


# Of each type, and what is longer than a cell of a hive, whose parts stand in several.
VALUES = {
    "": sz("what a key is worth"),
    "Number": dword(7),
    "64 bits": Value(11, bytes(range(8))),
    "text": expand_sz("%SystemRoot%\\inf"),
    "texts": multi_sz("one", "two"),
    "nothing": binary(b""),
    "odd": Value(1, b"a\0b"),
    "unknown": Value(0xFFFF0012, b"1"),
    "long": binary(bytes(range(256)) * 200),
    "Größe": sz("Größe"),
}


def test_a_hive_says_what_that_of_the_stand_in_says(shop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    stand_in = guest(tmp_path / "tree", "7")
    session, _ = put_in(shop, stand_in, tmp_path)
    for g in (session.g, stand_in):
        g.mount("/dev/sda2", "/")
    assert answers(stand_in) == answers(session.g)


REFUSED = ("hibernated", "in use", "BitLocker")


@pytest.mark.parametrize("state", REFUSED)
def test_a_windows_that_must_not_be_touched_is_refused(state: str, shop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    stand_in = guest(tmp_path / "tree", "2016", hibernated=state == "hibernated", bitlocker=state == "BitLocker")
    if state == "in use":
        stand_in.dirty.add("/dev/sda2")
    session, _ = put_in(shop, stand_in, tmp_path)
    said = []
    for one in (Session(stand_in, (), Tools()), session):
        with pytest.raises(MigrationError) as raised:
            inspect(one)
        said.append((raised.value.code, str(raised.value)))
    assert said[0] == said[1]
