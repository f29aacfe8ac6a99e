"""A release of Windows is known by its build number, whatever it calls itself."""

from __future__ import annotations

import pytest

from hyper2kvmd.domain.model import GuestSystem
from hyper2kvmd.domain.osinfo import osinfo_id
from hyper2kvmd.guest.windows.drivers import FAMILIES
from hyper2kvmd.guest.windows.releases import product_of, release_of


@pytest.mark.parametrize(
    ("build", "client", "server"),
    [
        (6000, "2k8", "2k8"),
        (6003, "2k8", "2k8"),
        (7600, "w7", "2k8R2"),
        (7601, "w7", "2k8R2"),
        (9200, "w8", "2k12"),
        (9600, "w8.1", "2k12R2"),
        (10240, "w10", "2k16"),
        (17762, "w10", "2k16"),
        (17763, "w10", "2k19"),
        (20347, "w10", "2k19"),
        (20348, "w10", "2k22"),
        (21999, "w10", "2k22"),
        (22000, "w11", "2k22"),
        (26099, "w11", "2k22"),
        (26100, "w11", "2k25"),
        (99999, "w11", "2k25"),
    ],
)
def test_every_build_has_its_directory_of_drivers(build: int, client: str, server: str) -> None:
    for kind, family in (("Client", client), ("Server", server), ("Server Core", server), ("Nano Server", server)):
        release = release_of(build, kind)
        assert release is not None and family == release.family


@pytest.mark.parametrize("build", [0, 2195, 2600, 3790, 5999])
def test_what_is_older_than_vista_has_none(build: int) -> None:
    assert release_of(build, "Client") is release_of(build, "Server") is None


@pytest.mark.parametrize(("build", "database"), [(7601, False), (9200, True), (26100, True)])
def test_how_drivers_are_found_goes_by_the_build(build: int, database: bool) -> None:
    release = release_of(build, "Server")
    assert release is not None and database is release.has_driver_database


def test_every_release_is_a_family_that_the_drivers_know() -> None:
    releases = {release_of(build, kind) for build in range(6000, 27000, 50) for kind in ("Client", "Server")}
    assert set(FAMILIES) == {release.family for release in releases if release}


PRODUCTS = [
    # build, kind, what the registry says; what is said to people, and libosinfo's id
    (22631, "Client", "Windows 10 Pro", "Windows 11 Pro", "11"),
    (26100, "Client", "Windows 10 Enterprise LTSC", "Windows 11 Enterprise LTSC", "11"),
    (19045, "Client", "Windows 10 Pro", "Windows 10 Pro", "10"),
    (26100, "Server", "Windows Server 2025 Standard", "Windows Server 2025 Standard", "2k25"),
    (20348, "Server Core", "Azure Stack HCI", "Windows Server 2022 (Azure Stack HCI)", "2k22"),
    (17763, "Server Core", "Hyper-V Server 2019", "Windows Server 2019 (Hyper-V Server 2019)", "2k19"),
    (26100, "Server", "", "Windows Server 2025", "2k25"),
    (9600, "Server", "Windows Server 2012 R2 Standard", "Windows Server 2012 R2 Standard", "2k12r2"),
    (9200, "Server", "Windows Server 2012 Standard", "Windows Server 2012 Standard", "2k12"),
    (9600, "Client", "Windows 8.1 Pro", "Windows 8.1 Pro", "8.1"),
    (9200, "Client", "Windows 8.1 Pro", "Windows 8 (Windows 8.1 Pro)", "8"),
    (6002, "Server", "Windows Server (R) 2008 Standard", "Windows Server 2008 Standard", "2k8"),
    (6002, "Client", "Windows Vista (TM) Business", "Windows Vista Business", "vista"),
    (7601, "Client", "Windows 7 Professional", "Windows 7 Professional", "7"),
]


@pytest.mark.parametrize(("build", "kind", "said", "product", "id"), PRODUCTS)
def test_a_product_is_called_by_its_release_and_keeps_its_edition(
    build: int, kind: str, said: str, product: str, id: str
) -> None:
    assert product == product_of(release_of(build, kind), said)
    version = {6002: "6.0", 7601: "6.1", 9200: "6.2", 9600: "6.3"}.get(build, "10.0")
    guest = GuestSystem("windows", "windows", version, None, product)
    assert f"http://microsoft.com/win/{id}" == osinfo_id(guest)


def test_an_old_one_is_called_what_it_calls_itself() -> None:
    assert ("Microsoft Windows XP", "Windows") == (product_of(None, "Microsoft Windows XP"), product_of(None, ""))
