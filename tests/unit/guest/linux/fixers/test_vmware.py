"""VMware's tools: what is found, what is removed, and what is switched off because it cannot be removed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hyper2kvmd.guest.linux.fixers import FixPlan, vmware
from tests.unit.guest.linux.fixers.test_configuration import Guest, applied, view

UNIT_FILES = {"/lib/systemd/system/open-vm-tools.service": "", "/lib/systemd/system/vgauth.service": ""}
DEBIAN = "base-files\nopen-vm-tools\nopen-vm-tools-desktop\nxserver-xorg-video-vmware\n"
REFUSED = """\
dpkg: dependency problems prevent removal of open-vm-tools:
 ubuntu-server depends on open-vm-tools.

dpkg: error processing package open-vm-tools (--remove):
 dependency problems - not removing
1
"""
MASK = "export SYSTEMD_OFFLINE=1; systemctl mask open-vm-tools.service vgauth.service"


def commands(plan: FixPlan) -> list[str]:
    return [command.command for command in plan.commands]


def test_packages_of_debian_are_removed_together() -> None:
    guest = Guest(UNIT_FILES, says={"dpkg-query": DEBIAN, "--simulate": "Removing open-vm-tools ...\n0\n"})
    plan = vmware.plan(view(guest))
    assert [
        "DEBIAN_FRONTEND=noninteractive dpkg --remove open-vm-tools open-vm-tools-desktop "
        f"|| {{ echo 'not removed, but switched off:'; {MASK}; }}"
    ] == commands(plan)
    assert () == plan.warnings


def test_packages_that_others_depend_on_are_switched_off_and_it_is_said_why() -> None:
    guest = Guest(UNIT_FILES, says={"dpkg-query": DEBIAN, "--simulate": REFUSED})
    plan = vmware.plan(view(guest))
    assert [MASK] == commands(plan)
    assert ["ubuntu-server depends on open-vm-tools."] == [
        warning.message.partition("(")[2].partition(")")[0] for warning in plan.warnings
    ]


def test_what_is_masked_is_not_masked_again() -> None:
    links = {f"/etc/systemd/system/{name}.service": "/dev/null" for name in ("open-vm-tools", "vgauth")}
    guest = Guest(UNIT_FILES, links=links, says={"dpkg-query": DEBIAN, "--simulate": REFUSED})
    assert [] == commands(vmware.plan(view(guest)))


def test_packages_of_rpm_are_removed_together() -> None:
    installed = "bash\nopen-vm-tools\nlibvmtools0\nkmod-vmware-tools-vmxnet\nVMwareTools\nxorg-x11-drv-vmware\n"
    guest = Guest({}, says={"--query": installed, "--test": "0\n"})
    assert ["rpm --erase open-vm-tools libvmtools0 kmod-vmware-tools-vmxnet VMwareTools"] == [
        command.partition(" || ")[0] for command in commands(vmware.plan(view(guest, package_format="rpm")))
    ]


def test_a_guest_without_the_tools_is_left_alone() -> None:
    guest = Guest({"/etc/systemd/system/other.service": ""}, says={"dpkg-query": "bash\nvmware-view\n"})
    assert FixPlan() == vmware.plan(view(guest))
    assert not [command for command in guest.ran if "simulate" in command]


@pytest.mark.parametrize("package_format", ["deb", "rpm", ""])
def test_tools_without_a_package_are_switched_off(package_format: str) -> None:
    guest = Guest({vmware.TARBALL: "#!/usr/bin/perl\n", "/etc/init/vmware-tools.conf": ""},
                  links={"/etc/rc3.d/S03vmware-tools": "../init.d/vmware-tools"})  # fmt: skip
    plan = vmware.plan(view(guest, package_format=package_format))
    assert ["export SYSTEMD_OFFLINE=1; chkconfig vmware-tools off"] == commands(plan)
    assert [("/etc/init/vmware-tools.override", "manual\n")] == [(edit.path, edit.after) for edit in plan.edits]
    assert [f"Run {vmware.TARBALL} in the guest to remove them."] == [warning.hint for warning in plan.warnings]
    done = applied(guest, plan)
    done.links.clear()
    assert ((), ()) == (vmware.plan(view(done)).edits, vmware.plan(view(done)).commands)


def test_a_unit_file_in_the_place_of_the_mask_is_disabled() -> None:
    unit = "/etc/systemd/system/vmware-tools.service"
    guest = Guest({vmware.TARBALL: "", unit: ""}, links={
        "/etc/systemd/system/multi-user.target.wants/vmware-tools.service": unit})  # fmt: skip
    assert ["export SYSTEMD_OFFLINE=1; systemctl disable vmware-tools.service"] == commands(vmware.plan(view(guest)))


def test_only_names_of_vmwares_packages_are_taken() -> None:
    names = ["open-vm-tools", "open-vm-tools; reboot", "vmware-tools-core", "vmware-view-client", "open-vm-tools"]
    assert ["open-vm-tools", "vmware-tools-core"] == vmware.vmware_packages(names)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("0\n", None),
        ("Removing x\n0", None),
        (REFUSED, "ubuntu-server depends on open-vm-tools."),
        ("error: Failed dependencies:\n\topen-vm-tools is needed by (installed) a-1.x86_64\n1\n",
         "open-vm-tools is needed by (installed) a-1.x86_64"),
        ("sh: dpkg: not found\n127\n", "sh: dpkg: not found"),
        ("", "no reason given"),
        ("\x1b[0m\n1", "�[0m"),
    ],
)  # fmt: skip
def test_the_reason_of_a_refusal_is_found(output: str, reason: str | None) -> None:
    assert reason == vmware.refusal(output)


def test_tools_whose_removal_fails_are_switched_off(tmp_path: Path) -> None:
    guest = Guest(UNIT_FILES, says={"dpkg-query": DEBIAN, "--simulate": "0\n"})
    (command,) = commands(vmware.plan(view(guest)))
    fakes = f'dpkg() {{ return 1; }}; systemctl() {{ echo "$@" >> {tmp_path}/ran; }}; '
    done = subprocess.run(["sh", "-c", fakes + command], check=True, capture_output=True, text=True)
    assert "not removed, but switched off:\n" == done.stdout
    assert "mask open-vm-tools.service vgauth.service\n" == (tmp_path / "ran").read_text()
