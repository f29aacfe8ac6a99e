"""Which Windows that is: by build number and kind, as product names lie (Windows 11 calls itself Windows 10)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """A release of Windows. family: the directory of virtio-win that has its drivers. product: as people say it.

    has_driver_database: whether drivers of devices are looked up in DriverDatabase; else in CriticalDeviceDatabase.
    """

    family: str
    product: str
    has_driver_database: bool


# The first build that it is true of, and then: client and server, each as the family and the product.
_RELEASES = (
    (26100, ("w11", "Windows 11"), ("2k25", "Windows Server 2025")),
    (22000, ("w11", "Windows 11"), ("2k22", "Windows Server 2022")),
    (20348, ("w10", "Windows 10"), ("2k22", "Windows Server 2022")),
    (17763, ("w10", "Windows 10"), ("2k19", "Windows Server 2019")),
    (10240, ("w10", "Windows 10"), ("2k16", "Windows Server 2016")),
    (9600, ("w8.1", "Windows 8.1"), ("2k12R2", "Windows Server 2012 R2")),
    (9200, ("w8", "Windows 8"), ("2k12", "Windows Server 2012")),
    (7600, ("w7", "Windows 7"), ("2k8R2", "Windows Server 2008 R2")),
    (6000, ("2k8", "Windows Vista"), ("2k8", "Windows Server 2008")),
)


def release_of(build: int, installation_type: str) -> Release | None:
    """The release with this build number; None for one that is older than Vista.

    installation_type: Client, Server, Server Core, Nano Server, as the registry has it.
    """
    for first, client, server in _RELEASES:
        if build >= first:
            family, product = client if installation_type == "Client" else server
            return Release(family, product, has_driver_database=build >= 9200)
    return None


def product_of(release: Release | None, said: str) -> str:
    """The product with its edition, as the registry says it, where that is not of another release."""
    said = " ".join(re.sub(r"\((?:R|TM)\)|[®™]", " ", said).split())
    if release is None or not said or re.search(rf"{re.escape(release.product)}(?! R2|\.?[0-9])", said):
        return said or (release.product if release else "Windows")
    if release.product == "Windows 11" and said.startswith("Windows 10"):
        return said.replace("Windows 10", "Windows 11", 1)
    return f"{release.product} ({said})"
