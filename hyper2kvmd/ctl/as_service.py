"""Working with the rights of the service's user, as systemd has it."""

from __future__ import annotations

import grp
import os
import pwd
import re
from pathlib import Path

from hyper2kvmd.errors import MigrationError
from hyper2kvmd.options import DEFAULT_PATH
from hyper2kvmd.queue.access import become_user
from hyper2kvmd.run import Tools

SYSTEMD_SECONDS = 10.0
UNIT_PROPERTIES = (
    *("Id", "LoadState", "UnitFileState", "ActiveState", "Result", "ExecMainStatus", "NeedDaemonReload", "Environment"),
    *("User", "Group", "SupplementaryGroups", "AmbientCapabilities", "UMask"),
    *("ProtectSystem", "ProtectHome", "PrivateTmp", "ReadWritePaths"),
    *("StateDirectory", "CacheDirectory", "RuntimeDirectory", "LogsDirectory", "ControlGroup"),
)


def service_of(settings_file: Path) -> str:
    """The service that has these settings, by its name: for those of an instance, that one."""
    directory = settings_file.parent
    instance = f"@{directory.name}" if directory.parent == DEFAULT_PATH.parent else ""
    return f"hyper2kvmd{instance}.service"


def unit_properties(service: str) -> dict[str, str]:
    """The service's properties; {} where systemd does not run."""
    try:
        shown = Tools().run(
            "systemctl", "show", f"--property={','.join(UNIT_PROPERTIES)}", service, timeout=SYSTEMD_SECONDS
        )
    except MigrationError:
        return {}
    unit = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    return unit if "LoadState" in unit else {}


def become_service(unit: dict[str, str]) -> str | None:
    """Go on as the service's user, with its groups and capabilities, if root may; return the user's name.

    Root would find every directory open, and what it made, such as a claim's lock, would be closed to the service. None
    if we stay who we are: somebody else than root, or there is no such service or user, as in a checkout.
    """
    user = unit.get("User")
    if os.geteuid() != 0 or not user:
        return None
    try:
        account = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
        group = grp.getgrnam(unit["Group"]).gr_gid if unit.get("Group") else account.pw_gid
        more = [grp.getgrnam(name).gr_gid for name in unit.get("SupplementaryGroups", "").split()]
    except KeyError:
        return None  # doctor's check of the service says so
    if account.pw_uid == 0:
        return None
    os.setgroups([*os.getgrouplist(account.pw_name, group), *more])
    os.setresgid(group, group, group)
    become_user(account.pw_uid, unit.get("AmbientCapabilities", "").split())
    os.umask(int(unit.get("UMask") or "0077", 8))
    for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    os.environ["HOME"] = account.pw_dir
    for name, value in re.findall(r"(LIBGUESTFS_\w+)=(\S+)", unit.get("Environment", "")):
        os.environ[name] = value
    return account.pw_name
