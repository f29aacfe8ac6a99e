"""SELinux: labels for the files that were made in the guest, where no running kernel could give them theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from shlex import quote

from hyper2kvmd.guest.change import Change
from hyper2kvmd.guest.linux.fixers import View
from hyper2kvmd.text import printable

CONFIG = "/etc/selinux/config"
AUTORELABEL = "/.autorelabel"
SETFILES = ("/usr/sbin/setfiles", "/sbin/setfiles")
# What the guest's own tools write to a new file instead of in place, whichever command was run.
REPLACED_BY_TOOLS = (
    *("/etc/passwd", "/etc/shadow", "/etc/group", "/etc/gshadow", "/etc/subuid", "/etc/subgid"),
    *("/etc/passwd-", "/etc/shadow-", "/etc/group-", "/etc/gshadow-", "/etc/subuid-", "/etc/subgid-"),
    *("/etc/ld.so.cache", "/etc/machine-id", "/etc/resolv.conf"),
)
_NO_LABELS = ("vfat", "msdos", "exfat", "iso9660")


def relabel(view: View, paths: Sequence[str]) -> tuple[Change, ...]:
    """Give what was changed its labels with the guest's setfiles, or have the guest do it at its next boot.

    paths: the files and directories that were changed; directories with all that is in them. Files that kept their
    label, as those that are edited in place do, are left alone. Without SELinux in the guest nothing is done.
    """
    policy = policy_of(view.read(CONFIG) or "")
    spec = f"/etc/selinux/{policy}/contexts/files/file_contexts"
    if policy is None or not view.g.is_file(spec, followsymlinks=True) or view.g.exists(AUTORELABEL):
        return ()
    targets = _targets(view, [*paths, *REPLACED_BY_TOOLS])
    if not targets:
        return ()
    program = next((path for path in SETFILES if view.g.is_file(path, followsymlinks=True)), None)
    if program is None:
        return _at_next_boot(view, "the guest has no setfiles")
    if "/" in targets:
        return _at_next_boot(view, "the guest's root has no label, so its files may have none either")
    # Without -m it would pass over file systems, because this kernel says of none that it has labels.
    command = f"{program} -m {quote(spec)} {' '.join(map(quote, targets))}"
    try:
        view.g.sh(command)
    except RuntimeError as error:
        return _at_next_boot(view, f"setfiles failed: {printable(str(error))}")
    return (Change("selinux", targets[0], "labels for what was changed", command=command),)


def _at_next_boot(view: View, reason: str) -> tuple[Change, ...]:
    view.g.touch(AUTORELABEL)
    return (Change("selinux", AUTORELABEL, "the guest labels all its files at its next boot", evidence=reason),)


def policy_of(text: str) -> str | None:
    """The name of the policy in /etc/selinux/config, if SELinux is enforcing or permissive there."""
    found: dict[str, str] = dict(re.findall(r"(?m)^[ \t]*(SELINUX|SELINUXTYPE)=[ \t]*([\w-]{1,64})", text))
    if found.get("SELINUX", "").lower() not in ("enforcing", "permissive"):
        return None
    return found.get("SELINUXTYPE", "targeted")


def topmost(path: str, has_label: Callable[[str], bool]) -> str:
    """The topmost directory above `path` that has no label, or `path` if it lies in one that has."""
    while path != "/" and not has_label(parent := path.rpartition("/")[0] or "/"):
        path = parent
    return path


def _targets(view: View, paths: Iterable[str]) -> list[str]:
    """Where setfiles is to start: at directories, and at what has no label or lies in a directory without one."""

    def has_label(path: str) -> bool:
        return any(attribute["attrname"] == "security.selinux" for attribute in view.g.lgetxattrs(path))

    types = {device.name: device.type for device in view.inspection.filesystems}
    foreign = [f"{point}/" for point, device in view.inspection.mounts.items() if types.get(device) in _NO_LABELS]
    found: dict[str, None] = {}
    for path in paths:
        if path.startswith(tuple(foreign)) or not (view.g.exists(path) or view.g.is_symlink(path)):
            continue
        if view.g.is_dir(path) or not has_label(path):
            found[topmost(path, has_label)] = None
    return list(found)
