"""The name that libosinfo, and so virt-manager, has for a guest's operating system.

By hand, as libguestfs has only libosinfo's short names, which take its database, on every host, to become ids.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyper2kvmd.domain.model import GuestSystem

_WINDOWS = {
    (5, 0): "2k",
    (5, 1): "xp",
    (5, 2): "2k3",
    (6, 0): "vista",
    (6, 1): "7",
    (6, 2): "8",
    (6, 3): "8.1",
    (10, 0): "10",
}
_WINDOWS_SERVERS = ("2k3", "2k3r2", "2k8", "2k8r2", "2k12", "2k12r2", "2k16", "2k19", "2k22", "2k25")


def osinfo_id(guest: GuestSystem) -> str | None:
    """The id in libosinfo's database, such as http://debian.org/debian/12; None if the database has none.

    A release that is newer than the database gets the id that it will have there. Amazon Linux and Photon have none.
    """
    found = re.match(r"([0-9]{1,9})(?:\.([0-9]{1,9}))?(?![0-9])", guest.version)
    major, minor = (int(found[1]), int(found[2] or 0)) if found else (0, 0)
    if guest.type == "windows":
        return _windows(major, minor, guest.product)
    if guest.type == "linux":
        return _linux(guest.distro, major, minor, guest.product)
    return None


def _linux(distro: str, major: int, minor: int, product: str) -> str | None:
    if distro == "archlinux":
        return "http://archlinux.org/archlinux/rolling"
    if major == 0:  # a release under development, or one that libguestfs does not know
        return None
    match distro:
        case "debian":
            return f"http://debian.org/debian/{'3.1' if (major, minor) == (3, 1) else major}"
        case "ubuntu":
            return f"http://ubuntu.com/ubuntu/{major}.{minor:02}"
        case "rhel":
            return f"http://redhat.com/rhel/{major}.{minor}"
        case "centos":
            if major >= 9 or "Stream" in product:
                return f"http://centos.org/centos-stream/{major}"
            return f"http://centos.org/centos/{ {7: '7.0', 8: '8'}.get(major, f'{major}.{minor}') }"
        case "fedora":
            return f"http://fedoraproject.org/fedora/{major}"
        case "almalinux":
            return f"http://almalinux.org/almalinux/{major}"
        case "rocky":
            return f"http://rockylinux.org/rocky/{major}"
        case "oraclelinux":
            return f"http://oracle.com/{'ol' if (major, minor) >= (5, 5) else 'oel'}/{major}.{minor}"
        case "sles":
            # The first of a generation has no service pack in its id; from 16 on there are none.
            release = f"{major}.{minor}" if minor or major >= 16 else str(major)
            return f"http://suse.com/{'sle' if major == 15 else 'sles'}/{release}"
        case "opensuse":
            # Tumbleweed's version is a date.
            return f"http://opensuse.org/opensuse/{'tumbleweed' if major > 10_000_000 else f'{major}.{minor}'}"
    return None


def _windows(major: int, minor: int, product: str) -> str | None:
    server = re.search(r"Server\D{0,8}20([0-9]{2})( R2)?", product)
    release = f"2k{int(server[1])}{'r2' if server[2] else ''}" if server else ""
    if release not in _WINDOWS_SERVERS:
        named = re.search(r"Windows (XP|11)(?![0-9])", product)  # versions 5.2 and 10.0 are those of others too
        release = named[1].lower() if named else _WINDOWS.get((major, minor), "")
    return f"http://microsoft.com/win/{release}" if release else None
