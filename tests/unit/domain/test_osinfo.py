"""The ids of libosinfo: right for what libguestfs says, and really in the database."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hyper2kvmd.domain.model import GuestSystem
from hyper2kvmd.domain.osinfo import osinfo_id

DATABASE = Path("/usr/share/osinfo/os")
# Debian 12's database is of 2022; these came later.
NEWER = {
    "http://almalinux.org/almalinux/10",
    "http://centos.org/centos-stream/10",
    "http://debian.org/debian/12",
    "http://debian.org/debian/13",
    "http://fedoraproject.org/fedora/42",
    "http://microsoft.com/win/2k25",
    "http://opensuse.org/opensuse/15.6",
    "http://oracle.com/ol/9.0",
    "http://redhat.com/rhel/10.0",
    "http://redhat.com/rhel/8.10",
    "http://suse.com/sle/15.6",
    "http://suse.com/sles/16.0",
    "http://ubuntu.com/ubuntu/24.04",
}
LINUX = {
    ("debian", "12.0"): "http://debian.org/debian/12",
    ("debian", "12.5"): "http://debian.org/debian/12",
    ("debian", "13.0"): "http://debian.org/debian/13",
    ("debian", "3.1"): "http://debian.org/debian/3.1",
    ("ubuntu", "24.4"): "http://ubuntu.com/ubuntu/24.04",
    ("ubuntu", "20.04"): "http://ubuntu.com/ubuntu/20.04",
    ("ubuntu", "22.10"): "http://ubuntu.com/ubuntu/22.10",
    ("rhel", "5.11"): "http://redhat.com/rhel/5.11",
    ("rhel", "8.10"): "http://redhat.com/rhel/8.10",
    ("rhel", "10.0"): "http://redhat.com/rhel/10.0",
    ("centos", "6.10"): "http://centos.org/centos/6.10",
    ("centos", "7.9"): "http://centos.org/centos/7.0",
    ("centos", "8.5"): "http://centos.org/centos/8",
    ("centos", "9.0"): "http://centos.org/centos-stream/9",
    ("centos", "10.0"): "http://centos.org/centos-stream/10",
    ("fedora", "42.0"): "http://fedoraproject.org/fedora/42",
    ("fedora", "37.0"): "http://fedoraproject.org/fedora/37",
    ("almalinux", "9.4"): "http://almalinux.org/almalinux/9",
    ("almalinux", "10.0"): "http://almalinux.org/almalinux/10",
    ("rocky", "8.9"): "http://rockylinux.org/rocky/8",
    ("rocky", "9.4"): "http://rockylinux.org/rocky/9",
    ("oraclelinux", "5.4"): "http://oracle.com/oel/5.4",
    ("oraclelinux", "5.10"): "http://oracle.com/ol/5.10",
    ("oraclelinux", "7.9"): "http://oracle.com/ol/7.9",
    ("oraclelinux", "9.0"): "http://oracle.com/ol/9.0",
    ("sles", "11.4"): "http://suse.com/sles/11.4",
    ("sles", "12.0"): "http://suse.com/sles/12",
    ("sles", "12.5"): "http://suse.com/sles/12.5",
    ("sles", "15.0"): "http://suse.com/sle/15",
    ("sles", "15.6"): "http://suse.com/sle/15.6",
    ("sles", "16.0"): "http://suse.com/sles/16.0",
    ("opensuse", "15.6"): "http://opensuse.org/opensuse/15.6",
    ("opensuse", "42.3"): "http://opensuse.org/opensuse/42.3",
    ("opensuse", "20240612.0"): "http://opensuse.org/opensuse/tumbleweed",
    ("archlinux", "0.0"): "http://archlinux.org/archlinux/rolling",
}
WINDOWS = {
    ("5.0", "Microsoft Windows 2000"): "2k",
    ("5.1", "Microsoft Windows XP"): "xp",
    ("5.2", "Microsoft Windows XP"): "xp",
    ("5.2", "Microsoft Windows Server 2003 R2"): "2k3r2",
    ("5.2", ""): "2k3",
    ("6.0", "Windows (TM) Vista Business"): "vista",
    ("6.0", "Windows Server (R) 2008 Standard"): "2k8",
    ("6.1", "Windows 7 Professional"): "7",
    ("6.1", "Windows Server 2008 R2 Enterprise"): "2k8r2",
    ("6.2", "Windows 8 Pro"): "8",
    ("6.2", "Windows Server 2012 Standard"): "2k12",
    ("6.3", "Windows 8.1 Pro"): "8.1",
    ("6.3", "Windows Server 2012 R2 Datacenter"): "2k12r2",
    ("10.0", "Windows 10 Pro"): "10",
    ("10.0", "Windows 11 Pro"): "11",
    ("10.0", "Windows Server 2016 Standard"): "2k16",
    ("10.0", "Windows Server 2019 Datacenter"): "2k19",
    ("10.0", "Windows Server 2022 Standard"): "2k22",
    ("10.0", "Windows Server 2025 Standard"): "2k25",
    ("10.0", ""): "10",
}


def linux(distro: str, version: str, product: str = "") -> str | None:
    return osinfo_id(GuestSystem("linux", distro, version, None, product))


@pytest.mark.parametrize(("distro", "version"), LINUX)
def test_a_linux_has_the_id_of_its_release(distro: str, version: str) -> None:
    assert LINUX[distro, version] == linux(distro, version)


def test_centos_stream_8_is_known_by_its_name() -> None:
    assert "http://centos.org/centos-stream/8" == linux("centos", "8.0", "CentOS Stream 8")


@pytest.mark.parametrize(("version", "product"), WINDOWS)
def test_a_windows_has_the_id_of_its_product(version: str, product: str) -> None:
    guest = GuestSystem("windows", "windows", version, None, product)
    assert f"http://microsoft.com/win/{WINDOWS[version, product]}" == osinfo_id(guest)


@pytest.mark.parametrize(
    "guest",
    [
        GuestSystem("linux", "unknown", "2023.0", None, "Amazon Linux 2023"),
        GuestSystem("linux", "unknown", "5.0", None, "VMware Photon OS/Linux"),
        GuestSystem("linux", "debian", "0.0", None),
        GuestSystem("linux", "debian", "", None),
        GuestSystem("linux", "debian", "x" * 100_000, None),
        GuestSystem("linux", "debian", "9" * 100_000, None),
        GuestSystem("windows", "windows", "4.0", None, "Windows Server 2099"),
        GuestSystem("freebsd", "freebsd", "14.0", None),
        GuestSystem("unknown", "unknown", "0.0", None),
    ],
)
def test_what_the_database_does_not_have_gets_no_id(guest: GuestSystem) -> None:
    assert osinfo_id(guest) is None


def test_every_id_is_in_the_database() -> None:
    known = {id for path in DATABASE.rglob("*.xml") for id in re.findall(r'<os id="([^"]+)"', path.read_text())}
    ids = {*LINUX.values(), *(f"http://microsoft.com/win/{name}" for name in WINDOWS.values())}
    assert len(known) > 500
    assert set() == ids - known - NEWER
