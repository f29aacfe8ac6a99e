"""VMware's tools: removed with the guest's package manager, or switched off where other packages depend on them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from shlex import quote

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Command, Edit
from hyper2kvmd.guest.linux.fixers import FixPlan, View
from hyper2kvmd.text import printable

FIXER = "vmware"
TARBALL = "/usr/bin/vmware-uninstall-tools.pl"
UNITS = (
    "open-vm-tools.service",
    "vmtoolsd.service",
    "vgauth.service",
    "vgauthd.service",
    "vmware-tools.service",
    "vmware-tools-thinprint.service",
    "run-vmblock\\x2dfuse.mount",
)
INIT_SCRIPTS = ("open-vm-tools", "vmtoolsd", "vmware-tools", "vmware-tools-thinprint", "vmware-tools-services")
UPSTART_JOBS = ("vmware-tools", "vmware-tools-thinprint")
VENDOR_UNITS = ("/usr/lib/systemd/system", "/lib/systemd/system")
_ADMIN_UNITS = "/etc/systemd/system"
_PACKAGE = re.compile(
    r"open-vm-(?:tools|toolbox|source)(?:-[a-z0-9-]+)?|libvmtools(?:0|-devel)"
    r"|VMwareTools|vmware-(?:tools|open-vm-tools)-[A-Za-z0-9_.+-]+|kmod-vmware-tools(?:-[A-Za-z0-9_.+-]+)?"
)


@dataclass(frozen=True)
class Manager:
    """How to list what is installed, one name on a line, how to try a removal without a network, and how to do it."""

    installed: str
    simulate: str
    remove: str
    database: str


# Both keep the configuration files that the administrator changed (rpm as .rpmsave).
_MANAGERS = {
    "deb": Manager(
        installed="dpkg-query --show --showformat='${Status} ${Package}\\n' | sed -n 's/^[a-z]* ok installed //p'",
        simulate="dpkg --simulate --remove",
        remove="DEBIAN_FRONTEND=noninteractive dpkg --remove",
        database="/var/lib/dpkg",
    ),
    "rpm": Manager(
        installed="rpm --query --all --queryformat '%{NAME}\\n'",
        simulate="rpm --erase --test",
        remove="rpm --erase",
        database="/var/lib/rpm",
    ),
}


def plan(view: View) -> FixPlan:
    """Remove what nothing else depends on, and switch off the rest. A guest without the tools is left alone."""
    edits = upstart(view, UPSTART_JOBS, FIXER)
    disable = switch_off(view, UNITS, INIT_SCRIPTS)
    warnings = []
    if view.g.is_file(TARBALL, followsymlinks=True):
        message = f"VMware Tools were installed without a package ({TARBALL}): they are switched off, not removed"
        warnings.append(_kept(message, f"Run {TARBALL} in the guest to remove them."))
    manager = _MANAGERS.get(view.inspection.package_format)
    packages = vmware_packages(view.g.sh_lines(f"{manager.installed} 2>/dev/null || :")) if manager else []
    if manager and packages:
        names = " ".join(map(quote, packages))
        reason = refusal(view.g.sh(f"export LC_ALL=C; {manager.simulate} {names} 2>&1; echo $?"))
        if reason is None:
            # A package's own script may fail in a system that is not running; then there is still the other way.
            command = f"{manager.remove} {names} || {{ echo 'not removed, but switched off:'; {disable or 'true'}; }}"
            summary = f"{', '.join(packages)} removed, or switched off if that fails"
            removal = Command(FIXER, manager.database, command, summary)
            return FixPlan(edits, commands=(removal,), warnings=tuple(warnings))
        message = f"{', '.join(packages)} cannot be removed alone ({reason}), and is switched off instead"
        warnings.append(_kept(message, "Nothing needs to be done: what is switched off does not start."))
    commands = (Command(FIXER, _ADMIN_UNITS, disable, "VMware's tools do not start any more"),) if disable else ()
    return FixPlan(edits, commands=commands, warnings=tuple(warnings))


def _kept(message: str, hint: str) -> Finding:
    return Finding("vmware_tools_kept", message, hint, "pipeline.fix.remove_vmware_tools")


def vmware_packages(installed: Iterable[str]) -> list[str]:
    """Those of the installed packages that are VMware's tools, each name once."""
    return list(dict.fromkeys(name for name in installed if _PACKAGE.fullmatch(name)))


def refusal(output: str) -> str | None:
    """Why a simulated removal would not do; None if it would. `output`: what it printed, and its exit status."""
    *lines, status = output.rstrip("\n").split("\n")
    if status == "0":
        return None
    reasons = [line.strip() for line in lines if "depends on" in line or "is needed by" in line]
    return printable((reasons or [line.strip() for line in lines if line.strip()] or ["no reason given"])[0])


def disable_command(to_mask: Sequence[str], to_disable: Sequence[str], scripts: Sequence[str], rc_program: str) -> str:
    """What keeps these units and init scripts from starting; empty if there are none. Each part is tried.

    rc_program: chkconfig or update-rc.d.
    """
    parts = [f"systemctl {verb} {' '.join(map(quote, units))}"
             for verb, units in (("disable", to_disable), ("mask", to_mask)) if units]  # fmt: skip
    parts += [f"{rc_program} {script} {'off' if rc_program == 'chkconfig' else 'disable'}" for script in scripts]
    return "; ".join(["export SYSTEMD_OFFLINE=1", *parts]) if parts else ""


def switch_off(view: View, units: Sequence[str], scripts: Sequence[str]) -> str:
    """The command that keeps those of these units and init scripts from starting that do; empty if none does."""
    program = "update-rc.d" if view.g.is_file("/usr/sbin/update-rc.d", followsymlinks=True) else "chkconfig"
    return disable_command(_to_mask(view, units), _to_disable(view, units), _started(view, scripts), program)


def _to_mask(view: View, units: Sequence[str]) -> list[str]:
    """The units of packages that are not masked yet."""
    return [
        unit
        for unit in units
        if any(view.g.is_file(f"{directory}/{unit}") for directory in VENDOR_UNITS)
        and not view.g.is_file(f"{_ADMIN_UNITS}/{unit}")
        and not (view.g.is_symlink(link := f"{_ADMIN_UNITS}/{unit}") and view.g.readlink(link) == "/dev/null")
    ]


def _to_disable(view: View, units: Sequence[str]) -> list[str]:
    """The units that are enabled and cannot be masked, because their file is where the mask would be."""
    return [
        unit
        for unit in units
        if view.g.is_file(f"{_ADMIN_UNITS}/{unit}") and view.g.glob_expand(f"{_ADMIN_UNITS}/*.wants/{unit}")
    ]


def _started(view: View, scripts: Sequence[str]) -> list[str]:
    """The init scripts that some runlevel starts."""
    runlevels = ("/etc/rc[2-5].d", "/etc/rc.d/rc[2-5].d", "/etc/init.d/rc[2-5].d")
    links = [path for runlevel in runlevels for path in view.g.glob_expand(f"{runlevel}/S[0-9][0-9]*")]
    names = {path.rpartition("/")[2][len("S00") :] for path in links}
    return [script for script in scripts if script in names]


def upstart(view: View, jobs: Sequence[str], fixer: str) -> tuple[Edit, ...]:
    """The files that keep these jobs of Upstart's from starting."""
    edits = []
    there = set(view.g.glob_expand("/etc/init/*.conf"))
    for job in jobs:
        path = f"/etc/init/{job}.override"
        if f"/etc/init/{job}.conf" in there and ((before := view.read(path)) or "").strip() != "manual":
            edits.append(Edit(fixer, path, before, "manual\n", f"the job {job} does not start any more"))
    return tuple(edits)
