"""What the old platform had in the guest: cloud-init's datasource, and agents, which wait for it or write the network.

cloud-init asks its datasource at every boot who this machine is. On KVM the datasource of a cloud, of vSphere or of a
drive that stayed behind is not there: cloud-init waits for it (Ec2 for two minutes), takes the machine for a new one,
makes new SSH host keys, runs its first-boot modules again, and writes a network of its own. So it is switched off in
the way that it knows, with all that it made left as it is. A mount that requires it starts it all the same: then it
does nothing, and what else starts it finds the network none of its business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hyper2kvmd.errors import Finding
from hyper2kvmd.guest.change import Command, Edit
from hyper2kvmd.guest.linux import fstab
from hyper2kvmd.guest.linux.fixers import FixPlan, View, guest_yaml, vmware
from hyper2kvmd.guest.linux.fixers.network import cmdline
from hyper2kvmd.text import printable

FIXER = "platform"
DISABLED = "/etc/cloud/cloud-init.disabled"
NETWORK = "/etc/cloud/cloud.cfg.d/99-hyper2kvm-platform.cfg"
RULES = "/etc/udev/rules.d/53-ec2-network-interfaces.rules"
_SETTINGS = ("/etc/cloud/cloud.cfg", "/etc/cloud/cloud.cfg.d/*.cfg")
_GENERATORS = tuple(
    f"{directory}/system-generators/cloud-init-generator"
    for directory in ("/usr/lib/systemd", "/lib/systemd", "/etc/systemd")
)
_CLOUD_INIT_UNITS = (
    *("cloud-init-local.service", "cloud-init.service", "cloud-init-network.service", "cloud-init-main.service"),
    *("cloud-config.service", "cloud-final.service", "cloud-init.target"),
)
_CLOUD_INIT_SCRIPTS = ("cloud-init-local", "cloud-init", "cloud-config", "cloud-final")
# Those that hold up the boot or a login's service, make new host keys, or write or move the network's configuration,
# where the platform does not answer. amazon-ssm-agent, xe-daemon, Hyper-V's daemons, Nutanix's agent and the like do
# none of that, and stay.
UNITS = (
    *("walinuxagent.service", "waagent.service", "waagent-network-setup.service", "walinuxagent-network-setup.service"),
    *("google-guest-agent.service", "google-guest-agent-manager.service", "google-startup-scripts.service"),
    *("google-shutdown-scripts.service", "google-instance-setup.service", "google-network-setup.service"),
    *("google-network-daemon.service", "google-ip-forwarding-daemon.service", "google-accounts-daemon.service"),
    *("google-clock-skew-daemon.service", "google-accounts-manager.service"),
    *("nm-cloud-setup.service", "nm-cloud-setup.timer", "elastic-network-interfaces.service"),
)
SCRIPTS = (
    *("walinuxagent", "waagent", "elastic-network-interfaces", "google-startup-scripts", "google-instance-setup"),
    *("google-network-setup", "google-network-daemon", "google-accounts-daemon", "google", "google-address-manager"),
)
UPSTART_JOBS = ("walinuxagent", "google", "google-instance-setup", "google-network-setup", "google-startup-scripts",
                "elastic-network-interfaces", "google-network-daemon", "google-accounts-daemon")  # fmt: skip
_ADMIN_UNITS = "/etc/systemd/system"
_ELSEWHERE = re.compile(r"^ConditionVirtualization=(?:microsoft|amazon|google|xen|vmware)\s*$", re.MULTILINE)
_SOURCE = re.compile(r"DataSource(?P<name>[A-Za-z0-9]{1,40})(?:Local|Net)?(?=[ \[\n]|$)(?P<details>[^\n]{0,400})\s*$")
_SEED = re.compile(r"\[(?:seed|source)=(?P<seed>[^\]]{0,200})\]")
_HOME = ("NoCloud", "None")
_REQUIRES = re.compile(r"^[^#\n]*\bx-systemd\.requires=([A-Za-z0-9@._-]{1,100})", re.MULTILINE)
_OFF = re.compile(r"^[^#\n]*\bcloud-init=disabled\b", re.MULTILINE)
_LIST = re.compile(r"^datasource_list[ \t]*:[ \t]*\[(?P<names>[^\]]{0,1000})\]", re.MULTILINE)
_PER_BOOT = "/var/lib/cloud/scripts/per-boot/*"
_INSTANCE = "/var/lib/cloud/instance"
_BOOTCMD = re.compile(r"^bootcmd:[ \t]*(?:\n[ \t]*)?(?:-|\[[^\]])", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """The datasource that cloud-init had at its last boot: Ec2, VMware... seed: where it read from, if it says so."""

    name: str
    seed: str


def plan(view: View) -> FixPlan:
    """Switch off what waits for the old platform. A guest without it is left alone."""
    if view.inspection.os_type != "linux":
        return FixPlan()
    return FixPlan.joined((_cloud_init(view), _agents(view), _logins(view)))


# cloud-init -----------------------------------------------------------------------------------------------


def _cloud_init(view: View) -> FixPlan:
    settings = list(view.files(*_SETTINGS))
    if not any(path == _SETTINGS[0] for path, _ in settings) or _is_off(view):
        return FixPlan()
    source = last_source(view.read(f"{_INSTANCE}/datasource") or view.read("/var/lib/cloud/data/previous-datasource"))
    listed = datasource_list([text for _, text in settings])
    labels = {str(device.label).lower() for device in view.inspection.filesystems}
    if stays(source, listed, seeds="cidata" in labels):
        return FixPlan()
    why = f"its datasource was {source.name}" if source else f"its datasource_list has only {', '.join(listed)}"
    edits, command = [], ""
    if any(view.g.is_file(path) for path in _GENERATORS) or any(DISABLED in text for _, text in _units(view)):
        text = f"# Written by hyper2kvmd: {printable(why)}, which this machine does not have.\n"
        edits.append(Edit(FIXER, DISABLED, None, text, "cloud-init does not start any more", printable(why)))
        edits += _required(view)
    else:
        edits += vmware.upstart(view, _CLOUD_INIT_SCRIPTS, FIXER)
        command = vmware.switch_off(view, (), _CLOUD_INIT_SCRIPTS) or _disable(view, _CLOUD_INIT_UNITS)
    if not any(_leaves_network(text) for _, text in settings):
        text = "network: {config: disabled}\n"
        edits.append(Edit(FIXER, NETWORK, None, text, "cloud-init leaves the network alone", printable(why)))
    commands = (Command(FIXER, "/etc", command, "cloud-init does not start any more"),) if command else ()
    warnings = _missed(view, why) if edits or commands else ()
    return FixPlan(tuple(edits), commands=commands, warnings=warnings)


def _required(view: View) -> Iterator[Edit]:
    """Have the units that a mount requires, and so starts all the same, do nothing, which is no failure."""
    known = "".join(text for path, text in _units(view))
    for unit in dict.fromkeys(_REQUIRES.findall(view.read(fstab.PATH) or "")):
        path = f"{_ADMIN_UNITS}/{unit}.d/10-hyper2kvm.conf"
        if unit in _CLOUD_INIT_UNITS and DISABLED not in known and view.read(path) is None:
            text = (
                f"# Written by hyper2kvmd: a mount in {fstab.PATH} requires this unit, and so starts it.\n"
                f"[Unit]\nConditionPathExists=!{DISABLED}\n"
            )
            yield Edit(FIXER, path, None, text, f"{unit} does nothing where cloud-init is switched off")


def last_source(text: str | None) -> Source | None:
    """The datasource by the file that cloud-init keeps of it: `DataSourceVMware: DataSourceVMware [seed=imc]`."""
    found = _SOURCE.search((text or "").rpartition(": ")[2].strip())
    if found is None:
        return None
    name = re.sub(r"(?:Local|Net)$", "", found["name"])
    seed = _SEED.search(found["details"])
    return Source(name, seed["seed"] if seed else "")


def datasource_list(texts: Sequence[str]) -> list[str]:
    """The datasources that the settings allow, given in the order in which they are read; empty if they do not say."""
    names: list[str] = []
    for text in texts:
        content = guest_yaml.load(text)
        value: Any = (content or {}).get("datasource_list")
        if isinstance(value, list):
            names = [name for name in value if isinstance(name, str)]
        elif content is None and (found := _LIST.search(text)):
            names = [name for word in found["names"].split(",") if (name := word.strip(" \t\n\"'"))]
    return names


def stays(source: Source | None, listed: Sequence[str], *, seeds: bool) -> bool:
    """Whether cloud-init finds on KVM what it found before. seeds: a disk of the VM's is a seed (labelled cidata)."""
    if source is None:
        return not listed or any(name in _HOME for name in listed)
    if source.name not in _HOME:
        return False
    # What firmware said stays behind, and so does a drive that held the seed, but not a disk.
    parts = source.seed.split(",")
    return "dmi" not in parts and (seeds or not any(part.startswith("/dev/") for part in parts))


def _is_off(view: View) -> bool:
    return view.g.is_file(DISABLED) or any(_OFF.search(text) for _, text in view.files(*cmdline.PATHS))


def _leaves_network(text: str) -> bool:
    network = (guest_yaml.load(text) or {}).get("network")
    return isinstance(network, dict) and network.get("config") == "disabled"


def _missed(view: View, why: str) -> tuple[Finding, ...]:
    """What the administrator had cloud-init do at every boot, which nobody does any more."""
    scripts = sorted(path for path in view.g.glob_expand(_PER_BOOT) if view.g.is_file(path))
    commands = [path for path, text in view.files(f"{_INSTANCE}/cloud-config.txt", *_SETTINGS)
                if _BOOTCMD.search(text)]  # fmt: skip
    if not scripts and not commands:
        return ()
    return (
        Finding(
            "cloud_init_off",
            f"cloud-init is switched off ({printable(why)}), and so is what it ran at every boot: "
            + ", ".join(map(printable, [*scripts, *(f"bootcmd in {path}" for path in commands)])),
            "Start it from a systemd unit instead; or give the VM a NoCloud seed with the instance-id in "
            f"/var/lib/cloud/data/instance-id and remove {DISABLED}.",
        ),
    )


# Agents ---------------------------------------------------------------------------------------------------


def _agents(view: View) -> FixPlan:
    directories = (*vmware.VENDOR_UNITS, _ADMIN_UNITS)
    wanted = {path.rpartition("/")[2] for place in directories for path in view.g.glob_expand(f"{place}/*.wants/*")}
    units = [unit for unit in UNITS if unit in wanted and not _starts_elsewhere(view, unit)]
    edits = [*vmware.upstart(view, UPSTART_JOBS, FIXER)]
    if (rules := view.read(RULES)) is not None and (after := _without_hotplug(rules)) != rules:
        edits.append(Edit(FIXER, RULES, rules, after, "cards are not configured by EC2's metadata any more"))
    command = vmware.switch_off(view, units, SCRIPTS)
    commands = (Command(FIXER, "/etc", command, "agents of the old platform do not start any more"),) if command else ()
    return FixPlan(tuple(edits), commands=commands)


def _starts_elsewhere(view: View, unit: str) -> bool:
    """Whether a unit starts on the hypervisor of its platform only."""
    directories = (*vmware.VENDOR_UNITS, _ADMIN_UNITS)
    texts = [text for directory in directories if (text := view.read(f"{directory}/{unit}")) is not None]
    return bool(texts and _ELSEWHERE.search(texts[-1]))


def _without_hotplug(text: str) -> str:
    """Rules in which those that ask EC2's metadata service for each card are comments."""
    return "\n".join(
        f"# {line}" if not line.lstrip().startswith("#") and ("ec2net" in line or "ec2-ifup" in line) else line
        for line in text.split("\n")
    )


def _disable(view: View, units: Sequence[str]) -> str:
    enabled = [unit for unit in units if view.g.glob_expand(f"/etc/systemd/system/*.wants/{unit}")]
    return vmware.disable_command((), enabled, (), "") if enabled else ""


def _logins(view: View) -> FixPlan:
    """Accounts that only Google's metadata service knows."""
    path = "/etc/nsswitch.conf"
    if not re.search(r"^passwd:[^#\n]*\b(?:cache_)?oslogin\b", view.read(path) or "", re.MULTILINE):
        return FixPlan()
    finding = Finding(
        "platform_login",
        f"{path} in the guest has accounts from Google's OS Login, which is not there on KVM: their owners cannot log "
        "in, and each look-up of a name that is not known waits for it",
        "Give configuration.users in the manifest an account with a key, and run `google_oslogin_control deactivate` "
        "in the guest.",
    )
    return FixPlan(warnings=(finding,))


def _units(view: View) -> Iterator[tuple[str, str]]:
    return view.files(*(f"{directory}/cloud-init*.service" for directory in vmware.VENDOR_UNITS))
