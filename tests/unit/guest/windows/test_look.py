"""INSPECT says of every Windows what it is, and refuses before any change what cannot be migrated as it stands."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest

from hyper2kvmd.domain.osinfo import osinfo_id
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.guest.inspect import Inspection, inspect
from hyper2kvmd.guest.session import Session
from hyper2kvmd.guest.windows.bcd import Place
from hyper2kvmd.guest.windows.look import Addresses, Windows
from hyper2kvmd.guest.windows.registry import Value, binary, dword, multi_sz, sz
from hyper2kvmd.run import Tools
from tests.windows import (
    CARDS,
    DEFAULT,
    DISK_GUID,
    FAMILIES,
    LDM_DATA,
    NETWORK,
    SIGNATURE,
    SOFTWARE,
    STORAGE_SPACES,
    SYSTEM,
    WINDOWS_GUID,
    WINDOWS_START,
    Directory,
    Disk,
    Partition,
    guest,
    program,
    unclose,
    write_hive,
)

CURRENT_VERSION = "Microsoft\\Windows NT\\CurrentVersion"
INTERFACES = "ControlSet001\\Services\\Tcpip\\Parameters\\Interfaces"


def looked(g: Directory, hint: str = "unknown") -> Inspection:
    return inspect(Session(g, (), Tools()), firmware_hint=hint)


def windows(g: Directory) -> Windows:
    found = looked(g).windows
    assert found is not None
    return found


def refused(g: Directory) -> MigrationError:
    """The error that INSPECT ends with, which changed nothing."""
    before = digest(g.at)
    with pytest.raises(MigrationError) as raised:
        looked(g)
    assert before == digest(g.at)
    return raised.value


def digest(at: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(at.rglob("*")) if path.is_file()
    }


def last(g: Directory) -> Path:
    """The directory of the partition with Windows."""
    return g.volume(g.list_partitions()[-1])


RELEASES = {
    # version, what people call it, the directory of its drivers, libosinfo's id
    "7": ("6.1", "Windows 7 Professional", "w7", "7"),
    "7-x86": ("6.1", "Windows 7 Professional", "w7", "7"),
    "2012R2": ("6.3", "Windows Server 2012 R2 Standard", "2k12R2", "2k12r2"),
    "2016": ("10.0", "Windows Server 2016 Standard", "2k16", "2k16"),
    "10": ("10.0", "Windows 10 Pro", "w10", "10"),
    "11": ("10.0", "Windows 11 Pro", "w11", "11"),
    "2019": ("10.0", "Windows Server 2019 Standard", "2k19", "2k19"),
    "2022": ("10.0", "Windows Server 2022 Datacenter", "2k22", "2k22"),
    "2025": ("10.0", "Windows Server 2025 Standard", "2k25", "2k25"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_known_by_what_is_on_its_disk(name: str, tmp_path: Path) -> None:
    g = guest(tmp_path, name)
    before = digest(tmp_path)
    inspection = looked(g)
    assert before == digest(tmp_path)
    found, family = inspection.windows, FAMILIES[name]
    version, product, drivers, id = RELEASES[name]
    assert found is not None and found.release is not None
    assert (version, product, drivers) == (found.version, found.product, found.release.family)
    assert family.build == found.build
    assert (family.arch, family.installation_type, "WIN-PHONY") == (
        found.arch, found.installation_type, found.hostname)  # fmt: skip
    assert ("/Windows", ("ControlSet001",), ()) == (
        found.system_root, found.control_sets, found.vmware_services)  # fmt: skip
    assert {"HKLM\\SYSTEM": f"/{SYSTEM}", "HKLM\\SOFTWARE": f"/{SOFTWARE}"} == found.hives
    assert not found.real_time_is_universal
    assert ("windows", product, family.firmware, family.build) == (
        inspection.os_type, inspection.product_name, inspection.firmware, inspection.build)  # fmt: skip
    assert f"http://microsoft.com/win/{id}" == osinfo_id(inspection.system(None))
    assert {"/": inspection.root} == inspection.mounts == g.mounted
    assert () == inspection.warnings


@pytest.mark.parametrize(
    ("name", "place", "path"),
    [
        ("2022", Place(DISK_GUID, WINDOWS_GUID), "/EFI/Microsoft/Boot/BCD"),
        ("2016", Place(SIGNATURE, WINDOWS_START), "/Boot/BCD"),
    ],
)
def test_the_boot_configuration_that_firmware_reads_names_the_partition_that_was_found(
    name: str, place: Place, path: str, tmp_path: Path
) -> None:
    found = windows(guest(tmp_path, name))
    assert found.boot is not None and found.boot.entry is not None
    assert ("/dev/sda1", path, DEFAULT) == (found.boot.device, found.boot.path, found.boot.entry.id)
    assert place == found.place
    assert found.boot.entry.os_device is not None
    assert place == found.boot.entry.os_device.place


def test_a_bios_guest_without_an_active_partition_has_no_boot_configuration(tmp_path: Path) -> None:
    g = guest(tmp_path, "7")
    disk = g.disks["/dev/sda"]
    g.disks["/dev/sda"] = replace(disk, partitions=tuple(replace(one, active=False) for one in disk.partitions))
    assert windows(g).boot is None


def test_names_are_found_in_whatever_case_they_are_spelt(tmp_path: Path) -> None:
    g = guest(tmp_path, "2019")
    (last(g) / "Windows").rename(last(g) / "WINDOWS")
    (last(g) / "WINDOWS/System32/config/SYSTEM").rename(last(g) / "WINDOWS/System32/config/system")
    found = windows(g)
    assert "/WINDOWS" == found.system_root
    assert "/WINDOWS/System32/config/system" == found.hives["HKLM\\SYSTEM"]


def test_a_blank_second_disk_does_not_matter(tmp_path: Path) -> None:
    g = guest(tmp_path, "2022", two_disks=True)
    with pytest.raises(RuntimeError, match="unrecognised disk label"):
        g.inspect_os()  # which is why libguestfs is not asked
    inspection = looked(g)
    assert ("/dev/sda3", 0) == (inspection.root, inspection.boot_disk)


def test_of_two_windows_the_one_on_the_disk_that_starts_is_taken_and_that_is_said(tmp_path: Path) -> None:
    g = guest(tmp_path, "11")
    g.disks["/dev/sdb"] = Disk("dos", "00000001", (Partition(1 << 20, "0x7", "ntfs"),))
    old = guest(tmp_path / "old", "7")
    last(old).rename(g.volume("/dev/sdb1"))
    inspection = looked(g)
    assert "/dev/sda3" == inspection.root
    (warning,) = inspection.warnings
    assert "several_systems" == warning.code and "/dev/sdb1" in warning.message


def test_both_control_sets_are_named_the_default_first(tmp_path: Path) -> None:
    assert ("ControlSet002", "ControlSet001") == windows(guest(tmp_path, "2012R2", two_sets=True)).control_sets


def test_what_vmware_runs_and_the_clock_are_seen(tmp_path: Path) -> None:
    g = guest(tmp_path, "2025", vmware=True)
    clock = "ControlSet001\\Control\\TimeZoneInformation"
    write_hive(last(g) / SYSTEM, {clock: {"RealTimeIsUniversal": dword(1)}})
    found = windows(g)
    assert ("VMTools", "VGAuthService", "vm3dservice") == found.vmware_services
    assert found.real_time_is_universal


def test_static_addresses_are_known_by_the_mac_of_their_cards(tmp_path: Path) -> None:
    first, second = windows(guest(tmp_path, "2022", static=True)).addresses
    assert (
        Addresses(
            guid=CARDS[0][0], name="Ethernet0", mac="00:50:56:aa:00:01", slot=160, dhcp=False,
            addresses=("192.0.2.10/24", "192.0.2.11/24"), gateways=("192.0.2.1",), dns=("192.0.2.53", "192.0.2.54"),
        ) == first
    )  # fmt: skip
    assert ("Backup LAN", "00:50:56:aa:00:02", 192) == (second.name, second.mac, second.slot)
    assert (("198.51.100.7/26",), (), ()) == (second.addresses, second.gateways, second.dns)


def test_addresses_of_ipv6_are_found_by_the_number_of_the_card(tmp_path: Path) -> None:
    first, second = windows(guest(tmp_path, "2022", static=True, ipv6=True)).addresses
    assert ("2001:db8::10/64",) == first.addresses[2:] and ("2001:db8::53",) == first.dns[2:]
    assert (True, ("198.51.100.7/26",), False) == (first.routes6, second.addresses, second.routes6)
    (card,) = windows(guest(tmp_path / "dhcp", "2022", ipv6=True)).addresses
    assert (True, ("2001:db8::10/64",)) == (card.dhcp, card.addresses)


def test_an_older_windows_knows_its_cards_by_the_slot(tmp_path: Path) -> None:
    cards = windows(guest(tmp_path, "2012R2", static=True)).addresses
    assert [("", 160), ("", 192)] == [(card.mac, card.slot) for card in cards]


def test_a_card_with_dhcp_has_no_addresses_of_its_own(tmp_path: Path) -> None:
    (card,) = windows(guest(tmp_path, "10")).addresses
    assert (True, (), ()) == (card.dhcp, card.addresses, card.dns)


def test_what_is_no_address_is_left_out(tmp_path: Path) -> None:
    g = guest(tmp_path, "10")
    junk = {
        "EnableDHCP": dword(0),
        "IPAddress": multi_sz("192.0.2.300", "192.0.2.7", "192.0.2.8", "192.0.2.9"),
        "SubnetMask": multi_sz("255.255.255.0", "255.0.255.0", "255.255.255.0"),
        "DefaultGateway": multi_sz("0.0.0.0", "gateway"),
        "NameServer": sz("192.0.2.53  nowhere,192.0.2.54"),
    }
    odd = {"EnableDHCP": sz("1"), "IPAddress": dword(7)}
    keys = {f"{INTERFACES}\\{CARDS[0][0]}": junk, f"{INTERFACES}\\{{tunnel}}": odd}
    keys["ControlSet001\\Control\\NetworkSetup2\\Interfaces\\{tunnel}\\Kernel"] = {"PermanentAddress": binary(b"\1")}
    keys[f"ControlSet001\\Control\\Network\\{NETWORK}\\{{tunnel}}\\Connection"] = {"PnpInstanceID": sz("SW\\TUNNEL")}
    write_hive(last(g) / SYSTEM, keys)
    (card,) = windows(g).addresses
    assert (("192.0.2.8/24",), (), ("192.0.2.53", "192.0.2.54")) == (card.addresses, card.gateways, card.dns)


def test_a_guest_that_does_not_say_its_kind_is_known_by_its_product_type(tmp_path: Path) -> None:
    for number, (name, kind) in enumerate((("7", "Client"), ("2012R2", "Server"))):
        g = guest(tmp_path / str(number), name)
        write_hive(last(g) / SOFTWARE, {CURRENT_VERSION: {"InstallationType": sz("")}})
        assert kind == windows(g).installation_type


def test_a_windows_older_than_vista_is_looked_at_and_has_no_release(tmp_path: Path) -> None:
    g = guest(tmp_path, "7-x86")
    said = {"CurrentBuildNumber": sz("2600"), "CurrentVersion": sz("5.1"), "ProductName": sz("Microsoft Windows XP")}
    write_hive(last(g) / SOFTWARE, {CURRENT_VERSION: said})
    found = windows(g)
    assert (None, "5.1", "Microsoft Windows XP") == (found.release, found.version, found.product)


@pytest.mark.parametrize("content", [b"", b"MZ", bytes(64), b"MZ" + bytes(62), b"MZ" + b"\xff" * 62])
def test_a_kernel_of_unknown_make_is_said(content: bytes, tmp_path: Path) -> None:
    g = guest(tmp_path, "2022")
    (last(g) / "Windows/System32/ntoskrnl.exe").write_bytes(content)
    assert "unknown" == windows(g).arch


def test_a_kernel_that_windows_compressed_is_there_and_the_registry_says_its_make(tmp_path: Path) -> None:
    g = guest(tmp_path, "10")
    kernel = last(g) / "Windows/System32/ntoskrnl.exe"
    kernel.unlink()
    kernel.symlink_to("unsupported reparse tag 0x80000017")
    assert "x86_64" == windows(g).arch


def test_an_arm_windows_is_known_by_its_kernel(tmp_path: Path) -> None:
    g = guest(tmp_path, "11")
    (last(g) / "Windows/System32/ntoskrnl.exe").write_bytes(program("aarch64"))
    assert "aarch64" == windows(g).arch


def test_files_that_wait_for_a_restart_are_said(tmp_path: Path) -> None:
    g = guest(tmp_path, "2022")
    renames = {"PendingFileRenameOperations": multi_sz("\\??\\C:\\old")}
    write_hive(last(g) / SYSTEM, {"ControlSet001\\Control\\Session Manager": renames})
    assert ["pending_renames"] == [warning.code for warning in looked(g).warnings]
    write_hive(
        last(g) / SYSTEM, {"ControlSet001\\Control\\Session Manager": {"PendingFileRenameOperations": multi_sz()}}
    )
    assert () == looked(g).warnings


# ---- what is refused


def test_a_hibernated_guest_is_refused(tmp_path: Path) -> None:
    error = refused(guest(tmp_path, "10", hibernated=True))
    assert Code.GUEST_DIRTY == error.code
    assert "fast start-up" in error.message and "powercfg /h off" in error.hint


def test_a_guest_that_ran_when_it_was_exported_is_refused(tmp_path: Path) -> None:
    g = guest(tmp_path, "2022")
    g.dirty.add("/dev/sda3")
    error = refused(g)
    assert Code.GUEST_DIRTY == error.code
    assert "was not unmounted" in error.message and "chkdsk" in error.hint


def test_a_hive_that_was_not_closed_is_refused(tmp_path: Path) -> None:
    error = refused(guest(tmp_path, "2019", unclosed=True))
    assert Code.GUEST_DIRTY == error.code and "HKLM\\SYSTEM" in error.message
    g = guest(tmp_path / "other", "2019")
    unclose(last(g) / SOFTWARE)
    assert "HKLM\\SOFTWARE" in refused(g).message


def test_bitlocker_is_refused_with_the_words_of_windows(tmp_path: Path) -> None:
    error = refused(guest(tmp_path, "11", bitlocker=True))
    assert Code.GUEST_ENCRYPTED == error.code
    assert "/dev/sda3" in error.message and "manage-bde -off C:" in error.hint


@pytest.mark.parametrize(
    ("type", "table", "word"),
    [(LDM_DATA, "gpt", "dynamic"), ("0x42", "dos", "dynamic"), (STORAGE_SPACES, "gpt", "pool")],
)
def test_dynamic_disks_and_storage_spaces_are_refused(type: str, table: str, word: str, tmp_path: Path) -> None:
    g = guest(tmp_path, "2022")
    g.disks["/dev/sdb"] = Disk(table, "0000000a", (Partition(1 << 20, type, "", "u"),))
    error = refused(g)
    assert Code.OS_UNSUPPORTED == error.code
    assert "/dev/sdb1" in error.message and word in error.message


def test_dynamic_disks_are_the_reason_where_nothing_else_can_be_seen(tmp_path: Path) -> None:
    g = Directory(tmp_path, [Disk("gpt", DISK_GUID, (Partition(1 << 20, LDM_DATA, "", "u"),))])
    assert Code.OS_UNSUPPORTED == refused(g).code


def test_an_appliance_without_ntfs_is_the_reason_where_there_is_ntfs(tmp_path: Path) -> None:
    class Bare(Directory):
        def feature_available(self, groups: list[str]) -> bool:
            return False

    g = Bare(tmp_path, [Disk("dos", SIGNATURE, (Partition(1 << 20, "0x7", "ntfs"),))])
    error = refused(g)
    assert Code.TOOL_MISSING == error.code and "ntfs-3g" in error.hint


def test_an_update_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    error = refused(guest(tmp_path, "2016", pending=True))
    assert Code.GUEST_DIRTY == error.code and "/Windows/WinSxS/pending.xml" in error.message
    for number, key in enumerate(
        ("Component Based Servicing\\RebootPending", "WindowsUpdate\\Auto Update\\RebootRequired")
    ):
        g = guest(tmp_path / str(number), "2016")
        write_hive(last(g) / SOFTWARE, {f"Microsoft\\Windows\\CurrentVersion\\{key}": {}})
        assert key in refused(g).message


@pytest.mark.parametrize(
    ("hive", "key", "name", "value", "said"),
    [
        (SYSTEM, "Select", "Current", dword(9), "ControlSet009"),
        (SYSTEM, "Select", "Default", sz("1"), "no control set"),
        (SOFTWARE, CURRENT_VERSION, "CurrentBuildNumber", sz("new"), "'new'"),
        (SOFTWARE, CURRENT_VERSION, "CurrentBuildNumber", binary(b"\1"), "''"),
    ],
)
def test_a_registry_that_makes_no_sense_is_refused_with_the_value(
    hive: str, key: str, name: str, value: Value, said: str, tmp_path: Path
) -> None:
    g = guest(tmp_path, "2022")
    write_hive(last(g) / hive, {key: {name: value}})
    error = refused(g)
    assert Code.GUEST_DIRTY == error.code
    assert said in error.message and name in error.message


@pytest.mark.parametrize("name", ["SYSTEM", "SOFTWARE"])
def test_a_guest_without_a_hive_is_refused(name: str, tmp_path: Path) -> None:
    g = guest(tmp_path, "2022")
    (last(g) / f"Windows/System32/config/{name}").unlink()
    error = refused(g)
    assert Code.GUEST_DIRTY == error.code and f"config/{name}" in error.message


def fuzz(at: Path, inputs: int, seed: int) -> tuple[int, int]:
    """Look at a guest with so many disturbed hives; how many were known, and how many refused as damaged."""
    g = guest(at, "2022", static=True)
    hives = [last(g) / SYSTEM, last(g) / SOFTWARE, g.volume("/dev/sda1") / "EFI/Microsoft/Boot/BCD"]
    whole = [path.read_bytes() for path in hives]
    chance = random.Random(seed)
    known = refusals = 0
    for _ in range(inputs):
        for path, data in zip(hives, whole, strict=True):
            new = bytearray(data)
            for _ in range(chance.randint(0, 8)):
                new[chance.randrange(4096, len(new))] = chance.randrange(256)
            path.write_bytes(new)
        try:
            looked(g)
            known += 1
        except MigrationError as error:
            assert Code.GUEST_DIRTY == error.code
            refusals += 1
        g.umount_all()
    return known, refusals


def test_a_guest_with_disturbed_hives_is_known_or_refused(tmp_path: Path) -> None:
    known, refusals = fuzz(tmp_path, 60, seed=19)
    assert known > 5 and refusals > 5
