"""A Windows guest of every family is repaired and proved; whatever breaks it afterwards is found by a proof."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.change import FixResult, Proof
from hyper2kvmd.guest.inspect import inspect
from hyper2kvmd.guest.options import FixOptions, Nic
from hyper2kvmd.guest.session import Session
from hyper2kvmd.guest.windows import fix as windows_fix
from hyper2kvmd.guest.windows import prove
from hyper2kvmd.guest.windows.registry import sz
from hyper2kvmd.run import Tools
from tests import ROOT, virtiowin
from tests.sabotage import SABOTAGE, Registry, Sabotage
from tests.windows import FAMILIES, SOFTWARE, SYSTEM, Directory, guest, write_hive

PAGE = (ROOT / "docs/windows-proofs.md").read_text()
NICS = (Nic("00:50:56:aa:00:01", 160), Nic("00:50:56:aa:00:02", 192))


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return virtiowin.write(tmp_path_factory.mktemp("virtio-win"), virtiowin.tree())


def repair(g: Directory, drivers: Path | None, **options: Any) -> FixResult:
    g.umount_all()
    found = inspect(Session(g, (), Tools()))
    assert found.windows is not None
    return windows_fix.fix(g, found, found.windows, FixOptions(virtio_win=drivers, nics=NICS, **options))


def diffs(result: FixResult) -> dict[str, str]:
    """What was changed, by path."""
    return {change.path: change.diff for change in result.changes}


@pytest.mark.parametrize("name", FAMILIES)
def test_with_drivers_a_windows_gets_virtio(name: str, tmp_path: Path, drivers: Path) -> None:
    g = guest(tmp_path, name)
    result = repair(g, drivers)
    expected = ("sata", "e1000e") if name == "2012R2" else ("virtio", "virtio")  # for that they are only test-signed
    assert expected == (result.machine.disks, result.machine.cards)
    assert all(proof.ok for proof in result.proofs)
    assert () == repair(g, drivers).changes


@pytest.mark.parametrize("name", FAMILIES)
def test_without_drivers_a_windows_gets_sata_that_it_starts_from(name: str, tmp_path: Path) -> None:
    g = guest(tmp_path, name, storahci_off=True)
    result = repair(g, None)
    assert ("sata", "e1000" if name.startswith("7") else "e1000e") == (result.machine.disks, result.machine.cards)
    assert ["no_virtio"] == [warning.code for warning in result.warnings]
    driver = "msahci" if name.startswith("7") else "storahci"
    key = f"HKLM\\SYSTEM\\ControlSet001\\Services\\{driver}"
    assert "key removed" == diffs(result)[f"{key}\\StartOverride"]
    assert () == repair(g, None).changes


@pytest.mark.parametrize("name", ["7", "2016", "2025"])
def test_drivers_that_were_installed_on_vmware_are_started(name: str, tmp_path: Path) -> None:
    g = guest(tmp_path, name, adopt=True)
    result = repair(g, None)
    assert "virtio" == result.machine.disks
    key = "HKLM\\SYSTEM\\ControlSet001\\Services\\viostor"
    assert ("Start: 3 → 0", "key removed") == (diffs(result)[key], diffs(result)[f"{key}\\StartOverride"])
    assert () == repair(g, None).changes


def test_what_is_installed_is_not_replaced(tmp_path: Path, drivers: Path) -> None:
    result = repair(guest(tmp_path, "2025", adopt=True), drivers)
    assert not [path for path in diffs(result) if "hyper2kvm-viostor" in path or path.endswith("viostor.sys")]


def test_a_network_driver_that_windows_brings_along_is_found_by_its_inf(tmp_path: Path) -> None:
    g = guest(tmp_path, "2022")
    registry = Registry(tmp_path / "sda3" / SYSTEM)
    registry.remove("DriverDatabase\\DeviceIds\\PCI\\VEN_8086&DEV_10D3")
    registry.close()
    assert "e1000" == repair(g, None).machine.cards  # the older one has an .inf
    (tmp_path / "sda3/Windows/inf/net1ic64.inf").write_text("%E10D3% = E10D3, PCI\\VEN_8086&DEV_10D3\n")
    assert "e1000e" == repair(g, None).machine.cards


def test_both_control_sets_are_repaired(tmp_path: Path, drivers: Path) -> None:
    changed = diffs(repair(guest(tmp_path, "2022", two_sets=True), drivers))
    for number in (1, 2):
        assert "Start: (none) → 0" in changed[f"HKLM\\SYSTEM\\ControlSet00{number}\\Services\\viostor"]


def test_a_windows_that_has_a_driver_for_nothing_is_refused(tmp_path: Path) -> None:
    g = guest(tmp_path, "2022")
    for path in tmp_path.rglob("storahci.sys"):
        path.unlink()
    with pytest.raises(MigrationError, match=r"virtio: .* SATA: .*storahci") as raised:
        repair(g, None)
    assert Code.OS_UNSUPPORTED == raised.value.code and "fix.virtio_win" in raised.value.hint


def test_a_bootx64_that_is_missing_is_made_and_one_that_is_there_is_left(tmp_path: Path, drivers: Path) -> None:
    g = guest(tmp_path, "2022")
    fallback = tmp_path / "sda1/EFI/Boot/bootx64.efi"
    before = fallback.read_bytes()
    repair(g, drivers)
    assert before == fallback.read_bytes()
    fallback.unlink()
    result = repair(g, drivers)
    assert ["/EFI/Boot/bootx64.efi"] == [change.path for change in result.changes] and result.boot_updated
    assert (tmp_path / "sda1/EFI/Microsoft/Boot/bootmgfw.efi").read_bytes() == fallback.read_bytes()


def test_a_key_or_a_package_is_one_change(tmp_path: Path, drivers: Path) -> None:
    result = repair(guest(tmp_path, "2022", static=True), drivers)
    assert len(result.changes) == len(diffs(result))
    service = diffs(result)["HKLM\\SYSTEM\\ControlSet001\\Services\\viostor"].split("\n")
    assert ["Type: (none) → 1", "Start: (none) → 0"] == service[:2]
    package = next(change for change in result.changes if change.path == "C:\\Windows\\Drivers\\VirtIO\\viostor")
    names = [line.partition(": SHA-256 ")[0] for line in package.evidence.split("\n")]
    assert ["viostor.cat", "viostor.inf", "viostor.sys"] == names
    script = diffs(result)["C:\\Windows\\hyper2kvm\\network.ps1"]
    assert script.startswith("--- /dev/null\n+++ b/Windows/hyper2kvm/network.ps1\n") and "\r" not in script


def test_vmwares_services_are_switched_off(tmp_path: Path, drivers: Path) -> None:
    changed = diffs(repair(guest(tmp_path, "2019", vmware=True), drivers))
    for name in ("VMTools", "VGAuthService", "vm3dservice"):
        assert "Start: 2 → 4" == changed[f"HKLM\\SYSTEM\\ControlSet001\\Services\\{name}"]


def test_files_are_what_the_administrator_gave(tmp_path: Path, drivers: Path) -> None:
    result = repair(guest(tmp_path, "2022"), drivers)
    given = (drivers / "viostor/2k22/amd64/viostor.sys").read_bytes()
    evidence = {change.path: change.evidence for change in result.changes}
    assert f"SHA-256 {hashlib.sha256(given).hexdigest()}" == evidence["C:\\Windows\\System32\\drivers\\viostor.sys"]
    assert given == (tmp_path / "sda3/Windows/System32/drivers/viostor.sys").read_bytes()


def test_drivers_that_windows_has_compressed_are_there_and_one_of_ours_is_replaced(
    tmp_path: Path, drivers: Path
) -> None:
    assert all(proof.ok for proof in repair(guest(tmp_path, "2022", compressed=True), drivers).proofs)
    given = (drivers / "viostor/2k22/amd64/viostor.sys").read_bytes()
    assert given == (tmp_path / "sda3/Windows/System32/drivers/viostor.sys").read_bytes()
    assert (tmp_path / "sda3/Windows/System32/drivers/disk.sys").is_symlink()


def test_vmware_tools_are_removed_by_their_own_uninstaller(tmp_path: Path) -> None:
    g, product = guest(tmp_path, "2022"), "{3A1B2C3D-0000-4000-8000-0123456789AB}"
    key = f"Microsoft\\Windows\\CurrentVersion\\Uninstall\\{product}"
    write_hive(tmp_path / "sda3" / SOFTWARE, {key: {"DisplayName": sz("VMware Tools")}})
    repair(g, None, remove_vmware_tools=True)
    assert f"msiexec.exe /x {product} /qn" in (tmp_path / "sda3/Windows/hyper2kvm/firstboot.cmd").read_text()


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda one: one.what)
def test_a_guest_that_is_broken_after_it_was_repaired_is_not_published(
    sabotage: Sabotage, tmp_path: Path, drivers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _, variant = sabotage.guest[0].partition(" ")
    g = guest(tmp_path, family, two_sets=variant == "two sets")
    given = drivers if sabotage.guest[1] == "virtio" else None

    failed: list[Proof] = []

    def broken_first(*arguments: Any) -> Any:
        sabotage.break_(g)
        proofs, warnings = prove.prove(*arguments)
        failed.extend(proof for proof in proofs if not proof.ok)
        return proofs, warnings

    monkeypatch.setattr(windows_fix, "prove", broken_first)
    with pytest.raises(MigrationError) as raised:
        repair(g, given)
    assert Code.FIX_UNPROVED == raised.value.code
    assert sabotage.claim in raised.value.message, raised.value.message
    assert f"\n{sabotage.row(failed[0])}" in PAGE


def test_the_page_has_every_way_to_break_a_guest_and_no_other() -> None:
    ways = re.findall(r"^- \*\*(.*?)\*\* \(", PAGE.partition("## Ways to break it")[2], flags=re.MULTILINE)
    assert [one.what for one in SABOTAGE] == ways
    assert 30 <= len(SABOTAGE) == len(set(ways))
    link = f"[{len(SABOTAGE)} ways to break them](docs/windows-proofs.md#ways-to-break-it)"
    assert link in " ".join((ROOT / "README.md").read_text().split())
