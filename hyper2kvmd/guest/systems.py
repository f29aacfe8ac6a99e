"""Finds the systems on the disks without reading their settings, and says what a mounted Linux is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hyper2kvmd.guest.linux.devices import Device
from hyper2kvmd.guest.session import spelt
from hyper2kvmd.text import printable

# File systems that a Linux has its root on.
_ROOTS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "jfs", "reiserfs", "f2fs")
_MARKS = ("etc/os-release", "etc/fstab", "etc/hosts", "etc/passwd")
# How systems are called that call themselves otherwise; what is not here keeps its own name.
_DISTROS = {
    "ol": "oraclelinux",
    "arch": "archlinux",
    "kali": "kalilinux",
    "amzn": "amazonlinux",
    "sled": "sles",
    "sles_sap": "sles",
    "opensuse-leap": "opensuse",
    "opensuse-tumbleweed": "opensuse",
    "void": "voidlinux",
    "openEuler": "openeuler",
}
# Files of systems that have no os-release, or say only half of their version there: what it is if the words match.
_RELEASES = (
    ("/etc/oracle-release", r"Oracle Linux", "oraclelinux"),
    ("/etc/rocky-release", r"Rocky Linux", "rocky"),
    ("/etc/almalinux-release", r"AlmaLinux", "almalinux"),
    ("/etc/centos-release", r"CentOS", "centos"),
    ("/etc/redhat-release", r"CentOS", "centos"),
    ("/etc/redhat-release", r"Fedora", "fedora"),
    ("/etc/redhat-release", r"Scientific Linux", "scientificlinux"),
    ("/etc/redhat-release", r"Red Hat", "rhel"),
    ("/etc/system-release", r"Amazon Linux", "amazonlinux"),
)
_MACHINES = {3: "i386", 62: "x86_64", 40: "arm", 183: "aarch64", 21: "ppc64", 22: "s390x", 243: "riscv64"}
_PROGRAMS = ("/bin/sh", "/bin/bash", "/usr/bin/sh", "/sbin/init", "/usr/sbin/init", "/bin/ls", "/bin/mount")


@dataclass(frozen=True)
class Release:
    """What a Linux says it is. package_format: deb, rpm, pacman, apk or unknown."""

    distro: str
    major: int
    minor: int
    product_name: str
    arch: str
    hostname: str
    package_format: str


def linux_roots(g: Any, devices: Sequence[Device]) -> list[str]:
    """What a Linux can be started from: devices, and subvolumes as libguestfs calls them (`btrfsvol:/dev/sda2/@`).

    Everything is unmounted before and after. What cannot be mounted is passed over.
    """
    found: list[str] = []
    seen: set[str] = set()
    for device in devices:
        # The members of one btrfs are one file system.
        key = device.uuid if device.type == "btrfs" and device.member else device.name
        if device.type not in _ROOTS or key in seen:
            continue
        try:
            # 5 is the number of what holds all subvolumes.
            g.mount_options("ro,subvolid=5" if device.type == "btrfs" else "ro", device.name, "/")
            if _is_root(g, ""):
                found.append(device.name)
            if device.type == "btrfs":
                paths = [one["btrfssubvolume_path"] for one in g.btrfs_subvolume_list("/")]
                found += [f"btrfsvol:{device.name}/{path}" for path in paths if _is_root(g, f"/{path}")]
            seen.add(key)
        except RuntimeError:
            continue
        finally:
            g.umount_all()
    return found


def windows(g: Any, devices: Iterable[Device]) -> list[str]:
    """The file systems of Windows that hold one, with everything unmounted before and after."""
    found = []
    for device in devices:
        if device.type != "ntfs":
            continue
        try:
            g.mount_ro(device.name, "/")
            if spelt(g, "/Windows/System32/ntoskrnl.exe"):
                found.append(device.name)
        except RuntimeError:
            continue
        finally:
            g.umount_all()
    return found


def _is_root(g: Any, at: str) -> bool:
    """Whether a directory looks like the root of a Linux; links are not followed, as they lead out of it."""

    def there(path: str) -> bool:
        return bool(g.exists(f"{at}/{path}") or g.is_symlink(f"{at}/{path}"))

    return bool(g.is_dir(f"{at}/etc")) and any(map(there, _MARKS)) and (there("bin") or there("usr/bin"))


def release(g: Any, read: Callable[[str], str | None]) -> Release:
    """What the mounted Linux says it is. read: from a path in the guest to its text, or None."""
    text = read("/etc/os-release") or read("/usr/lib/os-release") or ""
    said = dict(re.findall(r"(?m)^([A-Z_]{1,40})=[\"']?([^\"'\n\r]*)", text))
    distro = _DISTROS.get(said.get("ID", ""), said.get("ID", ""))
    version = said.get("VERSION_ID", "")
    product = said.get("PRETTY_NAME", "")
    for path, words, name in _RELEASES:
        line = (read(path) or "").partition("\n")[0]
        if re.match(words, line) and distro in ("", name):
            found = re.search(r"release (\d{1,4}(?:\.\d{1,4})?)", line)
            # CentOS 7 has only the 7 in os-release.
            version = found[1] if found and "." not in version else version
            distro, product = name, product or line.strip()
            break
    if not distro and (suse := read("/etc/SuSE-release")):
        first = suse.partition("\n")[0]
        numbers = dict(re.findall(r"(?m)^(VERSION|PATCHLEVEL) *= *(\d{1,4})", suse))
        distro = "opensuse" if "openSUSE" in first else "sles"
        version, product = f"{numbers.get('VERSION', '0')}.{numbers.get('PATCHLEVEL', '0')}", first.strip()
    if not distro and (debian := read("/etc/debian_version")):
        distro, version, product = "debian", debian.strip(), f"Debian {debian.strip()}"
    numbers_in = re.match(r"(\d{1,9})(?:\.(\d{1,9}))?", version)
    return Release(
        distro=printable(distro or "unknown", 60),
        major=int(numbers_in[1]) if numbers_in else 0,
        minor=int(numbers_in[2] or 0) if numbers_in else 0,
        product_name=printable(product or "Linux"),
        arch=_arch(g),
        hostname=_hostname(read),
        package_format=_package_format(g),
    )


def _arch(g: Any) -> str:
    """The architecture of the guest's own programs, from the head of one of them."""
    for path in _PROGRAMS:
        if g.is_file(path, followsymlinks=True):
            head: bytes = g.pread(path, 20, 0)
            if head[:4] == b"\x7fELF":
                return _MACHINES.get(int.from_bytes(head[18:20], "little" if head[5] == 1 else "big"), "unknown")
    return "unknown"


def _hostname(read: Callable[[str], str | None]) -> str:
    for path in ("/etc/hostname", "/etc/HOSTNAME"):
        lines = (line.strip() for line in (read(path) or "").split("\n"))
        if name := next((line for line in lines if line and not line.startswith("#")), ""):
            return printable(name)
    found = re.search(r"(?m)^[ \t]*HOSTNAME=[\"']?([^\"'\s]+)", read("/etc/sysconfig/network") or "")
    return printable(found[1]) if found else "unknown"


def _package_format(g: Any) -> str:
    for format, database in (
        ("deb", "/var/lib/dpkg"), ("rpm", "/var/lib/rpm"), ("rpm", "/usr/lib/sysimage/rpm"),
        ("pacman", "/var/lib/pacman"), ("apk", "/lib/apk"),
    ):  # fmt: skip
        if g.is_dir(database):
            return format
    return "unknown"
