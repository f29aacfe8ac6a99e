"""What a Linux says it is, by the files of every kind of release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from hyper2kvmd.guest.linux import fstab
from hyper2kvmd.guest.systems import release


class Tree:
    """A guest's directories and programs, as libguestfs shows them."""

    def __init__(self, directories: tuple[str, ...], programs: Mapping[str, bytes]) -> None:
        self.directories, self.programs = directories, programs

    def is_dir(self, path: str) -> bool:
        return path in self.directories

    def is_file(self, path: str, followsymlinks: bool = False) -> bool:
        return path in self.programs

    def pread(self, path: str, count: int, offset: int) -> bytes:
        return self.programs[path][offset : offset + count]


def elf(machine: int, *, big: bool = False) -> bytes:
    order: Any = "big" if big else "little"
    return b"\x7fELF\x02" + (b"\x02" if big else b"\x01") + bytes(12) + machine.to_bytes(2, order)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/etc/os-release": 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n'},
         ("debian", 12, 0, "Debian GNU/Linux 12 (bookworm)")),
        ({"/etc/os-release": "ID=ubuntu\nVERSION_ID=\"24.04\"\nPRETTY_NAME='Ubuntu 24.04 LTS'\n"},
         ("ubuntu", 24, 4, "Ubuntu 24.04 LTS")),
        ({"/etc/os-release": 'ID="centos"\nVERSION_ID="7"\nPRETTY_NAME="CentOS Linux 7 (Core)"\n',
          "/etc/redhat-release": "CentOS Linux release 7.9.2009 (Core)\n"}, ("centos", 7, 9, "CentOS Linux 7 (Core)")),
        ({"/etc/os-release": 'ID="ol"\nVERSION_ID="8.9"\n', "/etc/oracle-release": "Oracle Linux Server release 8.9\n",
          "/etc/redhat-release": "Red Hat Enterprise Linux release 8.9 (Ootpa)\n"},
         ("oraclelinux", 8, 9, "Oracle Linux Server release 8.9")),
        ({"/etc/redhat-release": "Red Hat Enterprise Linux Server release 6.10 (Santiago)\n"},
         ("rhel", 6, 10, "Red Hat Enterprise Linux Server release 6.10 (Santiago)")),
        ({"/etc/redhat-release": "CentOS release 5.11 (Final)\n"}, ("centos", 5, 11, "CentOS release 5.11 (Final)")),
        ({"/etc/SuSE-release": "SUSE Linux Enterprise Server 11 (x86_64)\nVERSION = 11\nPATCHLEVEL = 4\n"},
         ("sles", 11, 4, "SUSE Linux Enterprise Server 11 (x86_64)")),
        ({"/etc/debian_version": "7.11\n"}, ("debian", 7, 11, "Debian 7.11")),
        ({"/etc/os-release": 'ID=opensuse-tumbleweed\nVERSION_ID="20260101"\nPRETTY_NAME="openSUSE Tumbleweed"\n'},
         ("opensuse", 20260101, 0, "openSUSE Tumbleweed")),
        ({"/etc/os-release": 'ID=arch\nPRETTY_NAME="Arch Linux"\n'}, ("archlinux", 0, 0, "Arch Linux")),
        ({"/usr/lib/os-release": 'ID="amzn"\nVERSION_ID="2023"\nPRETTY_NAME="Amazon Linux 2023"\n'},
         ("amazonlinux", 2023, 0, "Amazon Linux 2023")),
        ({}, ("unknown", 0, 0, "Linux")),
        ({"/etc/os-release": "ID=\x1b[31mred\nVERSION_ID=" + "9" * 400}, ("�[31mred", 999999999, 0, "Linux")),
    ],
)  # fmt: skip
def test_a_release_is_told_by_its_own_files(files: Mapping[str, str], expected: tuple[str, int, int, str]) -> None:
    found = release(Tree((), {}), files.get)
    assert expected == (found.distro, found.major, found.minor, found.product_name)


def test_the_rest_is_told_by_what_is_there() -> None:
    files = {"/etc/hostname": "# the name\n\nweb01\n"}
    found = release(Tree(("/var/lib/rpm",), {"/bin/sh": b"#!", "/bin/bash": elf(62)}), files.get)
    assert ("x86_64", "web01", "rpm") == (found.arch, found.hostname, found.package_format)
    found = release(Tree(("/var/lib/rpm", "/var/lib/dpkg"), {"/bin/sh": elf(22, big=True)}), dict[str, str]().get)
    assert ("s390x", "unknown", "deb") == (found.arch, found.hostname, found.package_format)
    assert "db01" == release(Tree((), {}), {"/etc/sysconfig/network": 'HOSTNAME="db01"\n'}.get).hostname


def test_fstab_is_read_as_mount_reads_it() -> None:
    text = (
        "# comment\n\nLABEL=\"a b\" /x\\040y ext4\n/dev/sda1\t/boot xfs ,ro,, 1 2 3 4\r\nbroken\n"
        "tmpfs /tmp\nUUID='1' none swap sw\n"
    )  # fmt: skip
    assert [
        (4, "/dev/sda1", "/boot", "xfs", ("ro",)),
        (6, "tmpfs", "/tmp", "auto", ()),
        (7, "UUID=1", "none", "swap", ("sw",)),
    ] == [(e.number, e.spec, e.where, e.type, e.options) for e in fstab.entries(text)][1:]
    (first, *_) = fstab.entries('LABEL="a\\040b" /x\\040y ext4 subvol=/@,subvol=@/b\n')
    assert ("LABEL=a b", "/x y", "@/b") == (first.spec, first.where, first.option("subvol"))
