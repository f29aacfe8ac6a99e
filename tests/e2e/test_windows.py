"""Phony Windows guests, from exports to domains: the package is installed, and libvirt is as its distribution ships it.

The service runs as its own user, and finds virtio-win where the package of that name has it.
"""

from __future__ import annotations

import hashlib
import html
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import virtiowin
from tests.conftest import disk_entry, write_manifest
from tests.e2e.conftest import READY
from tests.e2e.container import Container
from tests.e2e.test_host import ctl
from tests.e2e.test_import import attribute, virsh
from tests.e2e.test_systemd import CONFIG, EXPORTS, IMAGES, SETTINGS, hand_over, report
from tests.guests.ntfs import pour
from tests.matrix import MIGRATION_SECONDS
from tests.ovf import ENVELOPE
from tests.windows import CARDS, FAMILIES, guest

pytestmark = pytest.mark.timeout(1800)

VIRTIO_WIN = "/usr/share/virtio-win"
MACS = tuple(mac.hex(":") for _, mac, _ in CARDS)
ADDRESSES = (("192.0.2.10", "192.0.2.11"), ("198.51.100.7",))
# With the cards' slots: before Windows 10, only they tell which card had which addresses.
CARD = (
    "<Item><ResourceType>10</ResourceType><Address>{mac}</Address>"
    '<Config key="slotInfo.pciSlotNumber" value="{slot}"/></Item>'
)
TPM = "<Item><ResourceType>1</ResourceType><ResourceSubType>vmware.vtpm</ResourceSubType></Item>"


@dataclass(frozen=True)
class Case:
    """A family, and whether there is a virtio-win for it."""

    family: str
    given: bool

    def __str__(self) -> str:
        return f"{self.family} {'with' if self.given else 'without'} virtio-win"

    @property
    def virtio(self) -> bool:
        """Whether it gets virtio: what a new virtio-win has for 2012 R2 is only signed for tests."""
        return self.given and self.family != "2012R2"

    @property
    def uefi(self) -> bool:
        """Whether its firmware is UEFI; then it had Secure Boot and a TPM as well."""
        return FAMILIES[self.family].firmware == "uefi"


# One of each firmware; and on fresh systems all families, with and without.
ALL = tuple(Case(family, given) for given in (True, False) for family in FAMILIES)
CASES = (
    *((READY, case) for case in ALL if str(case) in ("2022 with virtio-win", "2012R2 without virtio-win")),
    *(pytest.param(suite, case, marks=pytest.mark.rest) for suite in ("bookworm", "trixie") for case in ALL),
)
every_case = pytest.mark.parametrize(("suite", "migrated"), CASES, indirect=True, scope="module", ids=str)


@dataclass(frozen=True)
class Migrated:
    """A phony guest that the service has migrated. name: of its export and its domain. sha256: of its disk before."""

    case: Case
    host: Container
    name: str
    sha256: str
    report: dict[str, Any]
    domain: ET.Element

    def changes(self) -> dict[str, str]:
        """What was changed in the guest, by path."""
        return {change["path"]: change["diff"] or "" for change in self.report["changes"]}


@pytest.fixture(scope="module")
def virtio_win(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return virtiowin.iso(tmp_path_factory.mktemp("virtio-win") / "virtio-win.iso", virtiowin.tree())


@pytest.fixture(scope="module")
def migrated(
    request: pytest.FixtureRequest, host: Container, virtio_win: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Migrated]:
    """A guest with two cards that have addresses, and with VMware's services, after its migration."""
    case: Case = request.param
    name = f"win-{case.family.lower()}"
    directory, tree = tmp_path_factory.mktemp("export") / name, tmp_path_factory.mktemp("tree")
    directory.mkdir()
    (disk,) = pour(guest(tree, case.family, static=True, vmware=True, storahci_off=True), directory)
    cards = [CARD.format(mac=mac, slot=160 + 32 * number) for number, mac in enumerate(MACS)]
    (directory / f"{name}.ovf").write_text(ENVELOPE.format("".join([*cards, TPM if case.uefi else ""])))
    firmware = {"firmware": "uefi", "secure_boot": True} if case.uefi else {"firmware": "bios"}
    write_manifest(
        directory,
        [disk_entry(disk, local_path=disk.name)],
        vm={"cpu": 2, "mem_gb": 2, "os_hint": "windows", **firmware},
        nics=[{"id": f"nic-{number}", "mac": mac, "network": "LAN"} for number, mac in enumerate(MACS)],
        pipeline={"inspect": {"enabled": True}, "fix": {"enabled": True}, "convert": {"enabled": True}},
    )
    sha256 = hashlib.sha256(disk.read_bytes()).hexdigest()
    host.run("rm", "-rf", VIRTIO_WIN)
    if case.given:
        host.run("mkdir", VIRTIO_WIN)
        shutil.copy(virtio_win, host.root / VIRTIO_WIN.lstrip("/"))
    host.write(CONFIG, yaml.safe_dump({**SETTINGS, "libvirt": {"default_network": "user"}}))
    host.run("systemctl", "reload", "hyper2kvmd")
    document = report(host, hand_over(host, directory), MIGRATION_SECONDS)
    assert "succeeded" == document["status"], document["error"]
    yield Migrated(case, host, name, sha256, document, ET.fromstring(virsh(host, "dumpxml", name)))
    virsh(host, "undefine", name, *(["--nvram"] if case.uefi else []))
    host.run("sh", "-c", f"rm -r {EXPORTS}/{name} {IMAGES}/{name}-*")


@every_case
def test_the_domain_is_one_that_windows_starts_on(migrated: Migrated) -> None:
    case, domain = migrated.case, migrated.domain
    card = "virtio" if case.virtio else "e1000" if case.family.startswith("7") else "e1000e"
    assert ["virtio" if case.virtio else "sata"] == [one.get("bus") for one in domain.iterfind("devices/disk/target")]
    assert [card] * 2 == [one.get("type") for one in domain.iterfind("devices/interface/model")]
    assert [*MACS] == [one.get("address") for one in domain.iterfind("devices/interface/mac")]
    assert "localtime" == attribute(domain, "clock", "offset")
    assert "-q35-" in f"-{attribute(domain, 'os/type', 'machine')}-"
    assert ("kvm" == domain.get("type")) == (domain.find("features/hyperv") is not None)
    assert (["yes"] * 2 if case.uefi else []) == [one.get("enabled") for one in domain.iterfind("os/firmware/feature")]
    assert (["2.0"] if case.uefi else []) == [one.get("version") for one in domain.iterfind("devices/tpm/backend")]


@every_case
def test_what_was_exported_is_as_it_was_and_every_proof_holds(migrated: Migrated) -> None:
    (disk,) = (migrated.host.root / f"{EXPORTS}/{migrated.name}".lstrip("/")).glob("*.raw")
    assert migrated.sha256 == hashlib.sha256(disk.read_bytes()).hexdigest()
    results = migrated.report["results"]
    assert FAMILIES[migrated.case.family].build == results["inspect"]["build"]
    assert results["fix"]["proofs"] and all(proof["ok"] for proof in results["fix"]["proofs"])
    codes = [warning["code"] for warning in migrated.report["warnings"]]
    assert (not migrated.case.virtio) == ("no_virtio" in codes)
    assert "addresses_lost" not in codes


@every_case
def test_each_card_gets_its_addresses_at_the_first_boot_by_its_mac_address(migrated: Migrated) -> None:
    changes = migrated.changes()
    if migrated.case.family.startswith("7"):
        script = changes["C:\\Windows\\hyper2kvm\\firstboot.cmd"]
        _, *cards = re.split(r"\+:card\d\n", script)
        macs = [mac.upper() for mac in MACS]
    else:
        script = changes["C:\\Windows\\hyper2kvm\\network.ps1"]
        cards = [line for line in script.splitlines() if "Mac = '" in line]
        macs = [mac.upper().replace(":", "-") for mac in MACS]
    found = [re.findall(r"(?:address=|Ip = ')([0-9.]+)", card) for card in cards]
    dns = ["192.0.2.53", "192.0.2.54"] if migrated.case.family.startswith("7") else []  # which are addresses, too
    assert [[*ADDRESSES[0], *dns], [*ADDRESSES[1]]] == found, script
    assert [True] * 2 == [mac in card for mac, card in zip(macs, cards, strict=True)], script


@every_case
def test_people_are_told_what_was_done_in_words_of_windows(migrated: Migrated) -> None:
    host, page = migrated.host, "/root/page.html"
    product = FAMILIES[migrated.case.family].product
    shown = ctl(host, "show", migrated.name)
    ctl(host, "report", migrated.name, "--html", page)
    told = html.unescape((host.root / page.lstrip("/")).read_text())
    for said in (shown, told):
        assert (product.replace("10", "11") if migrated.case.family == "11" else product) in said
        assert "HKLM\\SYSTEM\\ControlSet001\\Services\\VMTools" in said and "VMTools of VMware is not started" in said
        assert "Windows starts a driver for its" in said and "C: is the partition that Windows is on" in said
    assert "Start: 2 → 4" in told


@every_case
def test_doctor_says_as_the_services_user_which_windows_there_are_drivers_for(migrated: Migrated) -> None:
    said = ctl(migrated.host, "doctor", "windows", accept=(0, 1))
    if migrated.case.given:
        assert f"{VIRTIO_WIN}/virtio-win.iso: " in said and "2k22 yes" in said and "2k12R2 test-signed only" in said
    else:
        assert f"no {VIRTIO_WIN}: Windows guests are given no virtio drivers" in said


@pytest.mark.parametrize(
    ("suite", "migrated"),
    [case for case in CASES if "2022" in str(case) and READY not in str(case)],  # each looks in, which takes a while
    indirect=True,
    scope="module",
    ids=str,
)
def test_the_bus_is_switched_only_to_one_that_windows_starts_from(migrated: Migrated) -> None:
    host, name, to = migrated.host, migrated.name, "sata" if migrated.case.virtio else "virtio"
    done = ctl(host, "switch-bus", name, to, "-y", accept=(0, 1, 4))
    domain = ET.fromstring(virsh(host, "dumpxml", name))
    print(done)
    assert ["sata"] == [one.get("bus") for one in domain.iterfind("devices/disk/target")]
    if migrated.case.virtio:
        assert f"{name}: changed, and not started" in done
    else:
        assert "would not start from virtio" in done and "Install virtio-win in it" in done
