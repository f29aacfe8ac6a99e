"""What the VM was: the manifest first, then the .ovf beside the disks, and what is said where the two are at odds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.domain import hardware
from hyper2kvmd.domain.hardware import Card, Hardware
from hyper2kvmd.errors import Finding
from hyper2kvmd.manifest import Manifest, ovf, parse
from hyper2kvmd.manifest.ovf import Ovf, OvfDisk, OvfNic
from tests import DATA

OVFTOOL = (DATA / "ovf" / "ovftool.ovf").read_bytes()
GO = json.loads((DATA / "manifests" / "go-vsphere.json").read_bytes())

MACS = ("00:50:56:00:00:01", "00:50:56:00:00:02")
FULL = Ovf(
    name="web01.ovf",
    cpus=8,
    cores_per_socket=4,
    memory_mib=1536,
    firmware="uefi",
    secure_boot=True,
    tpm=True,
    nics=(OvfNic(MACS[0], "DMZ", "VmxNet3", 192), OvfNic(MACS[1], "LAN", "E1000", 224)),
    uuid="d2a64d56-0617-4363-dc2d-9959b533a7b3",
    annotation="Orders\nOwner: Ann",
    os="debian12_64Guest",
)
SILENT = Ovf("web01.ovf")


def manifest(**changes: Any) -> Manifest:
    """A manifest that says nothing of the hardware; `changes` replace top-level keys."""
    disk = {"id": "disk-0", "source_format": "vmdk", "bytes": 1, "local_path": "/exports/web01/web01-disk1.vmdk"}
    content = {"manifest_version": "1.0", "source": {"vm_name": "web01"}, "disks": [disk], **changes}
    return parse(json.dumps(content).encode(), "manifest.json")


def disks(*names: str, **more: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifest's disks of the files with these names, whose ids are d-NAME; `more` by name."""
    shape = {"source_format": "vmdk", "bytes": 1}
    return [{"id": f"d-{name}", "local_path": f"/exports/{name}.vmdk", **shape, **more.get(name, {})} for name in names]


def with_disks(*files: str | None) -> Ovf:
    return replace(SILENT, disks=tuple(OvfDisk(file, None, None, None, None) for file in files))


def codes(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.code for finding in findings]


def differs(findings: tuple[Finding, ...]) -> Finding:
    """The only finding of a contradiction."""
    (finding,) = [finding for finding in findings if finding.code == "ovf_differs"]
    assert finding.hint != ""
    return finding


@pytest.fixture
def export(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """An export's directory and a descriptor of it."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield tmp_path, fd
    os.close(fd)


# Who is believed --------------------------------------------------------------------------------------------


def test_silent_manifest_gets_all_of_the_ovf() -> None:
    assert (
        Hardware(
            cpus=8,
            cores_per_socket=4,
            memory_mib=1536,
            firmware="uefi",
            secure_boot=True,
            tpm=True,
            cards=(Card(MACS[0], "DMZ", "VmxNet3", 192), Card(MACS[1], "LAN", "E1000", 224)),
            disks=("disk-0",),
            uuid="d2a64d56-0617-4363-dc2d-9959b533a7b3",
            annotation="Orders\nOwner: Ann",
            os="debian12_64Guest",
        ),
        (),
    ) == hardware.merge(manifest(), FULL)


@pytest.mark.parametrize("found", [None, SILENT])
def test_what_nobody_says_gets_defaults_and_warnings(found: Ovf | None) -> None:
    got, warnings = hardware.merge(manifest(), found)
    assert got == Hardware(
        cpus=2,
        cores_per_socket=None,
        memory_mib=4096,
        firmware="unknown",
        secure_boot=False,
        tpm=False,
        cards=(Card(None, None, None, None),),
        disks=("disk-0",),
        uuid=None,
        annotation="",
        os=None,
    )
    assert ["no_cpu", "no_memory", "no_nics"] == codes(warnings)
    assert ["vm.cpu", "vm.mem_gb", "nics"] == [finding.field for finding in warnings]


def test_manifest_wins_and_every_contradiction_is_said() -> None:
    said = {"cpu": 4, "mem_gb": 2, "firmware": "bios", "secure_boot": False}
    got, warnings = hardware.merge(manifest(vm=said, nics=[{"mac": MACS[1]}, {"mac": MACS[0]}]), FULL)
    assert (4, 2048, "bios", False) == (got.cpus, got.memory_mib, got.firmware, got.secure_boot)
    assert [MACS[1], MACS[0]] == [card.mac for card in got.cards]
    assert ["ovf_differs"] * 5 == codes(warnings)
    assert [
        "the number of CPUs: the manifest says 4, and 'web01.ovf' says 8; what the manifest says is used",
        "the memory in MiB: the manifest says 2048, and 'web01.ovf' says 1536; what the manifest says is used",
        "the firmware: the manifest says 'bios', and 'web01.ovf' says 'uefi'; what the manifest says is used",
        "Secure Boot: the manifest says false, and 'web01.ovf' says true; what the manifest says is used",
        f"the MAC addresses: the manifest says {MACS[1]}, {MACS[0]}, and 'web01.ovf' says {MACS[0]}, {MACS[1]}; "
        "what the manifest says is used",
    ] == [finding.message for finding in warnings]


def test_manifest_and_ovf_that_agree_need_no_warning() -> None:
    said = {"cpu": 8, "mem_gb": 1.5, "firmware": "efi", "secure_boot": True}
    got, warnings = hardware.merge(manifest(vm=said, nics=[{"mac": mac.upper()} for mac in MACS]), FULL)
    assert (hardware.merge(manifest(), FULL)[0], ()) == (got, warnings)


def test_what_was_wrong_with_the_ovf_is_said_first() -> None:
    finding = Finding("ovf_value", "bad", "repair it")
    assert hardware.merge(manifest(), replace(FULL, warnings=(finding,)))[1] == (finding,)


@pytest.mark.parametrize(
    ("vm", "found", "warned"),
    [
        ({"firmware": "uefi"}, SILENT, True),
        ({"firmware": "unknown"}, replace(SILENT, firmware="uefi"), True),
        ({"firmware": "uefi"}, replace(SILENT, secure_boot=False), False),
        ({"firmware": "uefi", "secure_boot": False}, SILENT, False),
        ({"firmware": "bios"}, SILENT, False),
    ],
)
def test_secure_boot_is_unknown_only_where_nobody_says_it_of_uefi(vm: dict[str, Any], found: Ovf, warned: bool) -> None:
    got, warnings = hardware.merge(manifest(vm=vm), found)
    assert (False, warned) == (got.secure_boot, "secure_boot_unknown" in codes(warnings))


# Numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mem_gb", "ovf_mib", "memory_mib"),
    [(1, 1536, 1536), (0, 512, 512), (4, 4096, 4096), (1, 1023, 1024), (1, 2048, 1024)],
)
def test_memory_that_the_go_exporter_rounded_is_that_of_the_ovf(mem_gb: int, ovf_mib: int, memory_mib: int) -> None:
    said = parse(json.dumps({**GO, "vm": {**GO["vm"], "mem_gb": mem_gb}}).encode(), "manifest.json")
    got, warnings = hardware.merge(said, replace(FULL, cpus=2, cores_per_socket=None, memory_mib=ovf_mib))
    assert memory_mib == got.memory_mib
    assert (["ovf_differs"] if memory_mib != ovf_mib else []) == codes(warnings)


@pytest.mark.parametrize(
    ("found", "field"),
    [
        (replace(FULL, cpus=0), "vm.cpu"),
        (replace(FULL, cpus=4097), "vm.cpu"),
        (replace(FULL, memory_mib=3), "vm.mem_gb"),
        (replace(FULL, memory_mib=(64 << 20) + 1), "vm.mem_gb"),
    ],
)
def test_number_that_no_vm_has_counts_as_not_said(found: Ovf, field: str) -> None:
    got, warnings = hardware.merge(manifest(vm={"cpu": 4, "mem_gb": 1.5}), replace(found, cores_per_socket=None))
    assert (4, 1536) == (got.cpus, got.memory_mib)
    assert [("hardware_impossible", field)] == [
        (finding.code, finding.field) for finding in warnings if finding.code != "ovf_differs"
    ]
    assert "'web01.ovf'" in warnings[0].message


@pytest.mark.parametrize(("cpus", "memory_mib"), [(1, 4), (4096, 64 << 20)])
def test_smallest_and_largest_vm_are_possible(cpus: int, memory_mib: int) -> None:
    found = replace(FULL, cpus=cpus, cores_per_socket=1, memory_mib=memory_mib)
    got, warnings = hardware.merge(manifest(), found)
    assert (cpus, memory_mib, ()) == (got.cpus, got.memory_mib, warnings)


def test_memory_of_the_manifest_that_no_vm_has_counts_as_not_said() -> None:
    got, warnings = hardware.merge(manifest(vm={"mem_gb": 0.002}), FULL)
    assert (1536, ["hardware_impossible"]) == (got.memory_mib, codes(warnings))
    assert "the manifest says 2 for the memory in MiB" in warnings[0].message


@pytest.mark.parametrize(("cpus", "cores"), [(1, None), (6, None), (4, 4), (8, 4)])
def test_cores_per_socket_are_kept_where_they_divide_the_cpus(cpus: int, cores: int | None) -> None:
    got, warnings = hardware.merge(manifest(vm={"cpu": cpus}), replace(FULL, cpus=None))
    assert cores == got.cores_per_socket
    assert ([] if cores else ["hardware_impossible"]) == codes(warnings)


# Network cards ------------------------------------------------------------------------------------------------


def test_card_of_the_manifest_gets_model_and_slot_of_the_one_with_its_mac_address() -> None:
    got, warnings = hardware.merge(manifest(nics=[{"mac": MACS[1], "network": "Other"}, {"mac": MACS[0]}]), FULL)
    assert (Card(MACS[1], "Other", "E1000", 224), Card(MACS[0], "DMZ", "VmxNet3", 192)) == got.cards
    assert "nics" == differs(warnings).field


def test_card_of_the_manifest_gets_model_and_slot_of_the_one_on_its_network_where_addresses_are_missing() -> None:
    nics = [{"mac": MACS[1], "network": "LAN"}, {"mac": MACS[0], "network": "DMZ"}]
    without = replace(FULL, nics=tuple(replace(nic, mac=None) for nic in FULL.nics))
    got, _ = hardware.merge(manifest(nics=nics), without)
    assert (Card(MACS[1], "LAN", "E1000", 224), Card(MACS[0], "DMZ", "VmxNet3", 192)) == got.cards
    # Two on one network are not told apart, and one with another address is another card.
    same = [{**nic, "network": "LAN"} for nic in nics]
    got, _ = hardware.merge(manifest(nics=same), without)
    assert [None, None] == [card.model for card in got.cards]
    others = [{**nic, "mac": f"00:50:56:00:00:1{number}"} for number, nic in enumerate(nics)]
    got, _ = hardware.merge(manifest(nics=others), FULL)
    assert [None, None] == [card.model for card in got.cards]


def test_cards_without_a_mac_address_are_named() -> None:
    nics = tuple(replace(nic, mac=None) for nic in FULL.nics)
    got, warnings = hardware.merge(manifest(), replace(FULL, nics=nics))
    assert (Card(None, "DMZ", "VmxNet3", 192), Card(None, "LAN", "E1000", 224)) == got.cards
    assert [("no_mac", True)] == [(finding.code, "card 1, 2 is not given" in finding.message) for finding in warnings]


def test_many_addresses_make_no_long_message() -> None:
    many = [{"mac": f"00:50:56:00:01:{number:02x}"} for number in range(64)]
    assert len(differs(hardware.merge(manifest(nics=many), FULL)[1]).message) < 300


# Disks --------------------------------------------------------------------------------------------------------


def test_disks_have_the_order_of_the_ovf() -> None:
    got, warnings = hardware.merge(manifest(disks=disks("a", "b", "c")), with_disks("c.vmdk", None, "a.vmdk", "b.vmdk"))
    assert (("d-c", "d-a", "d-b"), False) == (got.disks, "ovf_differs" in codes(warnings))


def test_disks_that_the_ovf_does_not_name_come_last_as_listed() -> None:
    got, _ = hardware.merge(manifest(disks=disks("x", "b", "y", "a")), with_disks("a.vmdk", "b.vmdk", "gone.vmdk"))
    assert ("d-a", "d-b", "d-x", "d-y") == got.disks


@pytest.mark.parametrize("found", [None, with_disks(None, None)])
def test_disks_without_an_order_in_the_ovf_come_as_listed(found: Ovf | None) -> None:
    listed = disks("b", "a", a={"boot_order_hint": 0, "disk_type": "boot"})
    got, warnings = hardware.merge(manifest(disks=listed), found)
    assert (("d-b", "d-a"), False) == (got.disks, "ovf_differs" in codes(warnings))


@pytest.mark.parametrize("name", ["my disk", "my%20disk", "50%25"])
def test_file_is_found_under_its_name_and_as_a_uri(name: str) -> None:
    listed = disks("a", name)
    listed[1]["id"] = "b"
    written = name if "%" in name else "my%20disk"
    got, _ = hardware.merge(manifest(disks=listed), with_disks(f"{written}.vmdk", "a.vmdk"))
    assert ("b", "d-a") == got.disks


@pytest.mark.parametrize(
    "more",
    [
        {"a": {"disk_type": "boot"}, "b": {"disk_type": "data"}},
        {"c": {"boot_order_hint": 0}, "a": {"boot_order_hint": 1}, "b": {"boot_order_hint": 2}},
    ],
)
def test_order_that_the_manifest_states_is_compared(more: dict[str, dict[str, Any]]) -> None:
    listed = disks("a", "b", "c", **more)
    got, warnings = hardware.merge(manifest(disks=listed), with_disks("b.vmdk", "a.vmdk", "c.vmdk"))
    assert ("d-b", "d-a", "d-c") == got.disks
    assert "'web01.ovf' says d-b, d-a, d-c; what the .ovf says is used" in differs(warnings).message


def test_numbers_that_only_repeat_the_list_are_no_order() -> None:
    more = {name: {"boot_order_hint": number, "disk_type": "data"} for number, name in enumerate("ab", 1)}
    got, warnings = hardware.merge(manifest(disks=disks("a", "b", **more)), with_disks("b.vmdk", "a.vmdk"))
    assert (("d-b", "d-a"), False) == (got.disks, "ovf_differs" in codes(warnings))


# Reading it ---------------------------------------------------------------------------------------------------


def test_ovf_in_the_export_is_read(export: tuple[Path, int]) -> None:
    directory, fd = export
    (directory / "anything.ovf").write_bytes(OVFTOOL)
    assert hardware.merge(manifest(), ovf.parse(OVFTOOL, "anything.ovf")) == hardware.read(fd, manifest())


def test_export_without_an_ovf_has_what_the_manifest_says(export: tuple[Path, int]) -> None:
    assert hardware.merge(manifest(), None) == hardware.read(export[1], manifest())


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "directory", "large", "broken"])
def test_ovf_that_cannot_be_used_is_a_warning(export: tuple[Path, int], kind: str) -> None:
    directory, fd = export
    path = directory / "web01.ovf"
    match kind:
        case "link":
            (directory / "elsewhere").write_bytes(OVFTOOL)
            path.symlink_to("elsewhere")
        case "dangling":
            path.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "large":
            path.write_bytes(b" " * (ovf.SIZE_LIMIT + 1))
        case "broken":
            path.write_bytes(OVFTOOL[:-20])
    before = len(os.listdir("/proc/self/fd"))
    got, (first, *others) = hardware.read(fd, manifest())
    assert before == len(os.listdir("/proc/self/fd"))
    assert hardware.merge(manifest(), None) == (got, tuple(others))
    assert ("ovf_unreadable", True) == (first.code, "'web01.ovf'" in first.message)


def test_link_is_called_a_link(export: tuple[Path, int]) -> None:
    directory, fd = export
    (directory / "web01.ovf").symlink_to("/etc/passwd")
    assert "it is a symbolic link" in hardware.read(fd, manifest())[1][0].message


def test_ovf_that_may_not_be_read_is_a_warning(export: tuple[Path, int]) -> None:
    directory, fd = export
    directory.chmod(0o755)
    (directory / "web01.ovf").touch(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        warning = hardware.read(fd, manifest())[1][0]
    finally:
        os.seteuid(user)
    assert "Permission denied" in warning.message


def test_several_ovfs_are_a_warning(export: tuple[Path, int]) -> None:
    directory, fd = export
    for name in ("a.ovf", "b.ovf"):
        (directory / name).write_bytes(OVFTOOL)
    assert "ovf_ambiguous" == hardware.read(fd, manifest())[1][0].code
