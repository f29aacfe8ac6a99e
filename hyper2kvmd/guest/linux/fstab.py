"""Reads /etc/fstab as mount does, which takes more than the manual page allows."""

from __future__ import annotations

import re
from dataclasses import dataclass

PATH = "/etc/fstab"
# The device, the mount point, the type and the options, with what stands between them.
LINE = re.compile(r"[ \t]*(?P<spec>[^\s#]\S*)[ \t]+(?P<where>\S+)(?:[ \t]+(?P<type>\S+)(?:[ \t]+(?P<options>\S+))?)?")
_OCTAL = re.compile(r"\\([0-3][0-7]{2})")
# What these lines mean comes from no device of the guest.
VIRTUAL = frozenset(
    [
        "autofs",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "devtmpfs",
        "efivarfs",
        "fusectl",
        "hugetlbfs",
        "mqueue",
        "none",
        "nfsd",
        "proc",
        "pstore",
        "ramfs",
        "rpc_pipefs",
        "securityfs",
        "selinuxfs",
        "sysfs",
        "tmpfs",
        "tracefs",
        "usbfs",
    ]
)


@dataclass(frozen=True)
class Entry:
    """One line: `number` counts from 1, `spec` and `where` are decoded. options: without the commas."""

    number: int
    spec: str
    where: str
    type: str
    options: tuple[str, ...]

    @property
    def waits(self) -> bool:
        """Whether the boot stops if the device is not there."""
        return not {"nofail", "noauto", "_netdev"} & set(self.options)

    def option(self, name: str) -> str:
        """The value of an option, the last one if it is there twice; "" if it is not."""
        values = (value for key, _, value in (one.partition("=") for one in self.options) if key == name)
        return (["", *values])[-1]


def entries(text: str) -> tuple[Entry, ...]:
    """Every line that mounts something; what cannot be a line is passed over, as mount does."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if match := LINE.match(line.removesuffix("\r")):
            options = tuple(filter(None, (match["options"] or "").split(",")))
            spec, where = decoded(match["spec"]), decoded(match["where"])
            found.append(Entry(number, spec, where, match["type"] or "auto", options))
    return tuple(found)


def decoded(field: str) -> str:
    """A field with its escapes (`\\\\040` is a space) as what they stand for, without quotes that blkid would take."""
    plain = _OCTAL.sub(lambda found: chr(int(found[1], 8)), field)
    quoted = re.fullmatch(r"(?P<tag>\w+=)(?P<quote>[\"'])(?P<value>.*)(?P=quote)", plain)
    return quoted["tag"] + quoted["value"] if quoted else plain
