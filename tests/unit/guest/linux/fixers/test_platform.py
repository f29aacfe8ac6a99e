"""What waits for the old platform, or writes the network for it: what is switched off, and what is left alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from hyper2kvmd.guest.linux.devices import Device, Names
from hyper2kvmd.guest.linux.fixers import FixPlan, View, platform
from tests.unit.guest.linux.fixers.test_configuration import Guest, applied

CFG = "/etc/cloud/cloud.cfg"
DROP_IN = "/etc/cloud/cloud.cfg.d/99-vmware.cfg"
SOURCE = "/var/lib/cloud/instance/datasource"
GENERATOR = "/lib/systemd/system-generators/cloud-init-generator"
# Debian 12's, shortened; its settings of the log have aliases, and are the only file that has.
BASE = {
    CFG: "users:\n   - default\ndisable_root: true\ncloud_init_modules:\n - migrator\n - bootcmd\n - ssh\n",
    "/etc/cloud/cloud.cfg.d/05_logging.cfg": "_log:\n - &log_base |\n   [loggers]\nlog_cfgs:\n - [ *log_base ]\n",
    GENERATOR: "#!/bin/sh\n",
}
DEFAULT_LIST = {"/etc/cloud/cloud.cfg.d/90_dpkg.cfg": "datasource_list: [ NoCloud, ConfigDrive, Azure, Ec2, None ]\n"}
OFF = [platform.DISABLED, platform.NETWORK]


def plan(guest: Guest, label: str = "") -> FixPlan:
    inspection: Any = SimpleNamespace(os_type="linux", filesystems=(Device("/dev/sdb", "iso9660", label=label),))
    return platform.plan(View(guest, inspection, Names({}, {})))


def edited(files: dict[str, str], label: str = "") -> list[str]:
    """The paths that are written; once they are, nothing more is."""
    guest = Guest({**BASE, **files})
    planned = plan(guest, label)
    assert planned.commands == ()
    assert replace(plan(applied(guest, planned), label), warnings=()) == FixPlan()
    return [edit.path for edit in planned.edits]


def commands(guest: Guest) -> list[str]:
    return [command.command for command in plan(guest).commands]


# cloud-init


@pytest.mark.parametrize(
    "names",
    ["VMware", "OVF", "Azure", "Ec2", "GCE", "OpenStack", "ConfigDrive", "DigitalOcean", "Oracle", "VMware, OVF"],
)
def test_a_list_of_the_old_platforms_datasources_alone_switches_cloud_init_off(names: str) -> None:
    assert edited({DROP_IN: f"datasource_list: [ {names} ]\n"}) == OFF
    lines = "".join(f"  - {name}\n" for name in names.split(", "))
    assert edited({DROP_IN: f"# x\ndatasource_list:\n{lines}"}) == OFF


@pytest.mark.parametrize(
    "text",
    [
        "DataSourceVMware: DataSourceVMware\n",  # as Debian 12's writes it
        "DataSourceOVF: DataSourceOVF [seed=vmware-tools]\n",
        "DataSourceAzure: DataSourceAzure [seed=/dev/sr0]",
        "DataSourceEc2Local: DataSourceEc2Local\n",
        "DataSourceGCELocal: DataSourceGCELocal",
        "DataSourceConfigDrive: DataSourceConfigDrive [net,ver=2][source=/dev/sr0]\n",
        "DataSourceOpenStackLocal: DataSourceOpenStackLocal [net,ver=2]\n",
        "DataSourceDigitalOcean: DataSourceDigitalOcean\n",
        # The drive with the seed is not among the disks of an export (Proxmox, Nutanix).
        "DataSourceNoCloud: DataSourceNoCloud [seed=/dev/sr0][dsmode=net]\n",
        "DataSourceNoCloud: DataSourceNoCloud [seed=dmi,/var/lib/cloud/seed/nocloud][dsmode=net]\n",
    ],
)
def test_a_datasource_that_stays_behind_switches_cloud_init_off_whatever_may_be_looked_for(text: str) -> None:
    assert edited({SOURCE: text, **DEFAULT_LIST}) == OFF


@pytest.mark.parametrize(
    "text",
    [
        "DataSourceNone: DataSourceNone\n",
        "DataSourceNoCloud: DataSourceNoCloud [seed=/var/lib/cloud/seed/nocloud-net][dsmode=net]\n",
        "DataSourceNoCloudNet: DataSourceNoCloudNet [seed=ds_config_seedfrom,/etc/cloud/seed/][dsmode=net]\n",
        "DataSourceNoCloud: DataSourceNoCloud [seed=ds_config][dsmode=net]\n",
    ],
)
def test_a_datasource_that_comes_along_is_left_alone(text: str) -> None:
    assert edited({SOURCE: text, **DEFAULT_LIST}) == []
    assert edited({SOURCE: text, DROP_IN: "datasource_list: [ VMware, None ]\n"}) == []


def test_a_seed_on_a_disk_of_the_export_comes_along() -> None:
    text = {SOURCE: "DataSourceNoCloud: DataSourceNoCloud [seed=/dev/sdb][dsmode=net]\n"}
    assert edited(text, label="CIDATA") == []
    assert edited(text, label="data") == OFF


@pytest.mark.parametrize(
    "files",
    [
        {},
        DEFAULT_LIST,
        {DROP_IN: "datasource_list: [ VMware ]\n", platform.DISABLED: ""},
        {
            DROP_IN: "datasource_list: [ VMware ]\n",
            "/boot/grub/grub.cfg": "linux /v root=/dev/sda1 cloud-init=disabled\n",
        },
        {DROP_IN: "datasource_list: [ NoCloud, VMware ]\n"},
        {DROP_IN: "datasource_list: [ VMware ]\n", "/etc/cloud/cloud.cfg.d/99-z.cfg": "datasource_list: [None]\n"},
        {DROP_IN: "datasource_list: VMware\n"},
        {DROP_IN: "datasource_list: [\n"},
        {"/etc/cloud/cloud.cfg.d/README": "datasource_list: [ VMware ]\n"},
    ],
)
def test_cloud_init_that_is_off_or_finds_what_it_found_is_left_alone(files: dict[str, str]) -> None:
    assert edited(files) == []


def test_a_guest_without_cloud_init_is_left_alone() -> None:
    assert plan(Guest({"/etc/cloud/build.info": "x", SOURCE: "DataSourceEc2: DataSourceEc2"})) == FixPlan()


def test_a_network_that_cloud_init_leaves_alone_already_is_not_said_again() -> None:
    """Ubuntu's installer writes such a file."""
    ours = {"/etc/cloud/cloud.cfg.d/subiquity-disable-cloudinit-networking.cfg": "network: {config: disabled}\n"}
    assert edited({DROP_IN: "datasource_list: [ VMware ]\n", **ours}) == [platform.DISABLED]


def test_no_file_tells_cloud_init_to_take_the_machine_for_another() -> None:
    """Its list of datasources stays, and what it keeps of its instance: that of the machine decides about host keys."""
    planned = plan(Guest({**BASE, SOURCE: "DataSourceAzure: DataSourceAzure [seed=/dev/sr0]\n"}))
    assert {edit.path: edit.after for edit in planned.edits} == {
        platform.DISABLED: "# Written by hyper2kvmd: its datasource was Azure, which this machine does not have.\n",
        platform.NETWORK: "network: {config: disabled}\n",
    }
    assert {edit.before for edit in planned.edits} == {None}


def test_units_that_look_for_the_file_themselves_need_no_generator() -> None:
    files = {path: text for path, text in BASE.items() if path != GENERATOR}
    unit = f"[Unit]\nConditionPathExists=!{platform.DISABLED}\n"
    guest = Guest({**files, DROP_IN: "datasource_list: [Ec2]\n", "/usr/lib/systemd/system/cloud-init.service": unit})
    assert [edit.path for edit in plan(guest).edits] == OFF


REQUIRED = "defaults,nofail,x-systemd.requires=cloud-init.service,_netdev,comment=cloudconfig"
DROPPED = "/etc/systemd/system/cloud-init.service.d/10-hyper2kvm.conf"


@pytest.mark.parametrize(
    ("line", "more"),
    [
        (f"/dev/disk/cloud/azure_resource-part1 /mnt auto {REQUIRED} 0 2", [DROPPED]),
        (f"# /dev/sdb1 /mnt auto {REQUIRED} 0 2", []),
        ("/dev/sdb1 /mnt auto x-systemd.requires=network-online.target 0 2", []),
        ("/dev/sdb1 /mnt auto x-systemd.after=cloud-init.service 0 2", []),
    ],
)
def test_a_mount_that_requires_cloud_init_does_not_have_it_fail(line: str, more: list[str]) -> None:
    """cloud-init writes such lines; its mark alone does not keep it from being started by them."""
    guest = Guest({**BASE, DROP_IN: "datasource_list: [Azure]\n", "/etc/fstab": line + "\n"})
    planned = {edit.path: edit.after or "" for edit in plan(guest).edits}
    assert sorted([*OFF, *more]) == sorted(planned)
    if more:
        assert f"[Unit]\nConditionPathExists=!{platform.DISABLED}\n" in planned[DROPPED]


def test_a_cloud_init_too_old_for_the_file_is_taken_out_of_its_runlevels() -> None:
    files = {path: text for path, text in BASE.items() if path != GENERATOR}
    old = {**files, DROP_IN: "datasource_list: [Ec2]\n"}
    sysv = Guest(old, links={f"/etc/rc3.d/S5{number}{name}": "x" for number, name in
                             enumerate(("cloud-init-local", "cloud-init"))})  # fmt: skip
    off = "chkconfig cloud-init-local off; chkconfig cloud-init off"
    assert commands(sysv) == [f"export SYSTEMD_OFFLINE=1; {off}"]
    assert [edit.path for edit in plan(sysv).edits] == [platform.NETWORK]
    upstart = Guest({**old, "/etc/init/cloud-init.conf": "start on mounted\n"})
    assert ["/etc/init/cloud-init.override", platform.NETWORK] == [edit.path for edit in plan(upstart).edits]
    systemd = Guest(old, links={"/etc/systemd/system/multi-user.target.wants/cloud-init.service": "x"})
    assert commands(systemd) == ["export SYSTEMD_OFFLINE=1; systemctl disable cloud-init.service"]


def test_what_cloud_init_ran_at_every_boot_is_named() -> None:
    script, config = "/var/lib/cloud/scripts/per-boot/10-routes.sh", "/var/lib/cloud/instance/cloud-config.txt"
    quiet = {**BASE, DROP_IN: "datasource_list: [ Ec2 ]\n", config: "#cloud-config\nruncmd: [x]\nbootcmd: []\n"}
    assert plan(Guest(quiet)).warnings == ()
    (finding,) = plan(Guest({**quiet, script: "#!/bin/sh\n", config: "bootcmd:\n  - [ip, route]\n"})).warnings
    assert finding.code == "cloud_init_off"
    assert script in finding.message
    assert config in finding.message
    assert platform.DISABLED in finding.hint


# Agents


def enabled(*units: str) -> dict[str, str]:
    return {f"/etc/systemd/system/multi-user.target.wants/{unit}": f"/lib/systemd/system/{unit}" for unit in units}


@pytest.mark.parametrize(
    "unit",
    [
        *("walinuxagent.service", "waagent.service", "google-guest-agent.service", "google-startup-scripts.service"),
        *("nm-cloud-setup.timer", "nm-cloud-setup.service", "google-instance-setup.service"),
    ],
)
def test_an_agent_that_waits_or_writes_the_network_is_masked(unit: str) -> None:
    files = {f"/lib/systemd/system/{unit}": "[Unit]\nAfter=network-online.target\n"}
    assert commands(Guest(files, links=enabled(unit))) == [f"export SYSTEMD_OFFLINE=1; systemctl mask {unit}"]
    masked = {**enabled(unit), f"/etc/systemd/system/{unit}": "/dev/null"}
    assert commands(Guest(files, links=masked)) == []
    assert commands(Guest(files)) == [], "nothing starts it"


@pytest.mark.parametrize(
    "unit",
    [
        *("amazon-ssm-agent.service", "qemu-guest-agent.service", "xe-daemon.service", "hv-kvp-daemon.service"),
        *("nutanix_guest_agent.service", "do-agent.service", "google-osconfig-agent.service"),
    ],
)
def test_an_agent_that_does_no_harm_stays(unit: str) -> None:
    files = {f"/lib/systemd/system/{unit}": "[Unit]\nAfter=network.target\n"}
    assert plan(Guest(files, links=enabled(unit))) == FixPlan()


def test_an_agent_that_starts_on_its_own_hypervisor_only_stays() -> None:
    """As Debian's package has it."""
    text = "[Unit]\nDescription=Azure Linux Agent\nAfter=multi-user.target\nConditionVirtualization=microsoft\n"
    files = {"/lib/systemd/system/walinuxagent.service": text}
    assert plan(Guest(files, links=enabled("walinuxagent.service"))) == FixPlan()


def test_azures_agent_in_a_runlevel_is_taken_out_of_it() -> None:
    guest = Guest({}, links={"/etc/rc.d/rc3.d/S99waagent": "../init.d/waagent"})
    assert commands(guest) == ["export SYSTEMD_OFFLINE=1; chkconfig waagent off"]


def test_amazons_rules_for_new_cards_become_comments() -> None:
    rules = (
        "# Copyright\n\n"
        'ACTION=="add", SUBSYSTEM=="net", KERNEL=="eth*", IMPORT{program}="/bin/sleep 1"\n'
        'SUBSYSTEM=="net", RUN+="/etc/sysconfig/network-scripts/ec2net.hotplug"\n'
    )
    guest = Guest({platform.RULES: rules})
    (edit,) = plan(guest).edits
    assert edit.after == rules.replace('SUBSYSTEM=="net", RUN', '# SUBSYSTEM=="net", RUN')
    assert plan(applied(guest, plan(guest))) == FixPlan()


def test_accounts_of_google_are_reported() -> None:
    (finding,) = plan(Guest({"/etc/nsswitch.conf": "passwd: files cache_oslogin oslogin\ngroup: files\n"})).warnings
    assert finding.code == "platform_login"
    assert plan(Guest({"/etc/nsswitch.conf": "passwd: files systemd # oslogin\n"})) == FixPlan()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("", None),
        ("x" * 100_000, None),
        ("DataSourceGCELocal: DataSourceGCELocal", platform.Source("GCE", "")),
        ("DataSourceNone: DataSourceNone", platform.Source("None", "")),
        ("DataSourceNoCloudNet: DataSourceNoCloudNet [seed=a,b][dsmode=net]", platform.Source("NoCloud", "a,b")),
    ],
)
def test_the_last_datasource_is_read_as_cloud_init_writes_it(
    text: str | None, expected: platform.Source | None
) -> None:
    assert platform.last_source(text) == expected
