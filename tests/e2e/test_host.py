"""Root at the keyboard, the service as its own user, and a libvirt as its distribution ships it: where these meet."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import disk_entry, write_manifest
from tests.e2e.conftest import Drop
from tests.e2e.container import Container, wait_until
from tests.e2e.test_systemd import (
    CONFIG,
    EXPORTS,
    IMAGES,
    QEMU_IMG,
    calls,
    content,
    hand_over,
    hold,
    images,
    of_export,
    report,
)

LIBVIRT_HOOK = "/etc/libvirt/hooks/qemu"
VIRSH = ("virsh", "-q", "-c", "qemu:///system")


@pytest.fixture
def host(host: Container) -> Iterator[Container]:
    """The host with the service started, every VM of which is started; nothing of it is left in the end."""
    shape = {
        "settle_seconds": 0,
        "scan_interval_seconds": 1,
        "retry": {"delay_seconds": 1},
        "libvirt": {"default_network": "user", "start": True},
    }
    host.write(CONFIG, yaml.safe_dump(shape))
    host.run("systemctl", "restart", "hyper2kvmd")
    yield host
    print(host.run("journalctl", "-b", "--no-pager", "-u", "hyper2kvmd", "-n", "50"))
    host.run("systemctl", "stop", "hyper2kvmd")
    host.run("rm", "-rf", QEMU_IMG, "/run/hold", "/var/lib/hyper2kvmd/calls", LIBVIRT_HOOK)
    for name in domains(host):
        host.run(*VIRSH, "destroy", name, accept=(0, 1))
        host.run(*VIRSH, "undefine", name)
    host.run("find", EXPORTS, IMAGES, "-mindepth", "1", "-delete")


def domains(host: Container) -> dict[str, str]:
    """The domains, and their states."""
    names = host.run(*VIRSH, "list", "--all", "--name").split()
    return {name: host.run(*VIRSH, "domstate", name).strip() for name in names}


def ctl(host: Container, *arguments: str, accept: tuple[int, ...] = (0,)) -> str:
    """Run hyper2kvmctl as root; all that it said."""
    return host.run("sh", "-c", 'exec hyper2kvmctl "$@" 2>&1', "sh", *arguments, accept=accept)


def qemu(host: Container) -> dict[int, str]:
    """The processes of QEMU, and whose they are."""
    lines = host.run("ps", "-o", "pid=,user:20=", "-C", "qemu-system-x86_64", accept=(0, 1)).splitlines()
    return {int(line.split()[0]): line.split()[1] for line in lines}


def foreign(host: Container) -> str:
    """What below our directories belongs to root, other than what a VM that ran gave back."""
    return host.run("find", EXPORTS, IMAGES, "/var/lib/hyper2kvmd", "-mindepth", "1", "-user", "root")


def test_root_holds_and_releases_a_job_of_the_service_and_the_vm_runs_unprivileged(host: Container, drop: Drop) -> None:
    hold(host, "convert")
    name = drop("web01")
    wait_until(lambda: 1 == calls(host, "convert"), "the conversion has begun")
    said = ctl(host, "hold", "-v", name)
    assert "hyper2kvmctl: working as hyper2kvm, the user of hyper2kvmd.service\nweb01: on hold\n" == said
    assert "hyper2kvm" == host.run("stat", "-c", "%U", of_export(name, ".hyper2kvmd.hold")).strip()
    host.run("rm", "/run/hold")
    assert "released" in ctl(host, "release", name)
    document = report(host, name)
    assert "succeeded" == document["status"], document["error"]
    assert ["libvirt-qemu"] == [*qemu(host).values()]
    assert "" == foreign(host)


def test_what_root_migrates_the_service_can_do_again(host: Container, drop: Drop) -> None:
    host.run("systemctl", "stop", "hyper2kvmd")
    name = drop("web01")
    # By a relative path, as people do.
    said = host.run("sh", "-c", f"cd {EXPORTS} && exec hyper2kvmctl migrate ./{name}")
    assert "succeeded" in said
    document = report(host, name)
    assert ("hyper2kvm", "command") == (document["host"]["user"], document["host"]["started_by"])
    assert "" == foreign(host)

    assert "already" in ctl(host, "cancel", name, accept=(1,))
    host.run(*VIRSH, "destroy", name)
    host.run(*VIRSH, "undefine", name)
    host.run("sh", "-c", f"rm {IMAGES}/{name}-*")
    assert "will be retried" in ctl(host, "retry", name)
    host.run("systemctl", "start", "hyper2kvmd")
    document = report(host, name)
    assert ("succeeded", "daemon") == (document["status"], document["host"]["started_by"]), document["error"]


def test_a_lock_that_root_left_is_not_in_the_services_way(host: Container, drop: Drop) -> None:
    host.run("systemctl", "stop", "hyper2kvmd")
    name = drop("web01")
    lock = of_export(name, ".hyper2kvmd.lock")
    host.run("sh", "-c", f"""umask 027; echo '{{"attempt": 7, "ended": "retried"}}' >{lock}""")
    host.run("systemctl", "start", "hyper2kvmd")
    document = report(host, name)
    assert ("succeeded", 8) == (document["status"], document["attempts"]), document["error"]


def test_an_exporter_that_hands_over_by_itself_finds_the_service_and_gets_its_disk(
    host: Container, tmp_path: Path
) -> None:
    """As docs/hypersdk.md has it; like the newest, the exporter lets nobody else read what it writes."""
    queue, answers = "/var/lib/hyper2kvm/queue", "/var/lib/hyper2kvm/output"

    def exported(name: str) -> str:
        directory = tmp_path / name
        directory.mkdir()
        disk = directory / "disk.raw"
        disk.write_bytes(os.urandom(1 << 20))
        write_manifest(directory, [disk_entry(disk, local_path=of_export(name, disk.name))])
        for file in directory.iterdir():
            file.chmod(0o600)
        return of_export(hand_over(host, directory, "0750"), "manifest.json")

    host.run("install", "-d", "-o", "hyper2kvm", "-g", "hypersdk", "-m", "2770", queue, answers)
    settings = {"hypersdk": {"queue_dir": queue, "output_dir": answers}}
    host.write(f"{Path(CONFIG).parent}/conf.d/hypersdk.yaml", yaml.safe_dump(settings))
    try:
        host.run("systemctl", "restart", "hyper2kvmd")
        assert "active" == host.run("systemctl", "is-active", "hyper2kvm.service").strip()
        host.run("systemctl", "enable", "hyper2kvmd@site2")
        instance = host.run("systemctl", "show", "--value", "--property=Id", "hyper2kvm@site2.service").strip()
        assert "hyper2kvmd@site2.service" == instance
        assert "manifests are taken from" in ctl(host, "doctor", "handover")
        host.run("sh", "-c", f"umask 077; cat {exported('web01')} >{queue}/artifact-manifest.json")
        wait_until(lambda: "" != host.run("ls", answers), "the exporter is told")
        assert f"{IMAGES}/web01-disk-0.qcow2" == host.run("readlink", f"{answers}/web01.qcow2").strip()
        host.run("runuser", "-u", "hypersdk", "--", "stat", "-L", f"{answers}/web01.qcow2")
        assert {"web01": "running"} == domains(host)

        host.run("systemctl", "stop", "hyper2kvmd")  # then the exporter runs a program instead
        said = host.run("hyper2kvm", exported("web02"), "-v").splitlines()
        assert f"Output: {IMAGES}/web02-disk-0.qcow2" in said
    finally:
        host.run("systemctl", "disable", "hyper2kvmd@site2")
        made = ("/var/lib/hyper2kvm", "/etc/systemd/system/hyper2kvm@site2.service")
        host.run("rm", "-rf", *made, f"{Path(CONFIG).parent}/conf.d/hypersdk.yaml")


def test_root_retries_what_was_blocked(host: Container, drop: Drop) -> None:
    host.run("touch", f"{IMAGES}/web01-disk-0.qcow2")
    name = drop("web01")
    assert "output_exists" == report(host, name)["error"]["code"]
    host.run("rm", f"{IMAGES}/web01-disk-0.qcow2")
    ctl(host, "retry", name)
    document = report(host, name)
    assert "succeeded" == document["status"], document["error"]


def test_root_cancels_a_job_of_the_service_and_nothing_is_left(host: Container, drop: Drop) -> None:
    hold(host, "convert")
    name = drop("web01")
    wait_until(lambda: 1 == calls(host, "convert"), "the conversion has begun")
    assert "web01: cancelled\n" == ctl(host, "cancel", name)
    assert ([], {}) == (images(host), domains(host))


@pytest.mark.parametrize("then", ["goes on", "is cancelled"])
@pytest.mark.parametrize("when", ["prepare", "started"])
def test_a_vm_that_was_started_by_a_runner_that_died_runs_on_with_its_disk(
    host: Container, drop: Drop, when: str, then: str
) -> None:
    """libvirt itself calls what kills the runner: while it starts the VM, and when it has."""
    cancel = f"touch {EXPORTS}/web01/.hyper2kvmd.cancel;" if then == "is cancelled" else ""
    kill = f"pkill -KILL -f 'hyper2kvmd run-job {EXPORTS}/web01 '"
    once = f"[ ! -e /run/killed ] && touch /run/killed && {{ {cancel} {kill}; }}"
    host.run("rm", "-f", "/run/killed")
    host.write(LIBVIRT_HOOK, f'#!/bin/sh\n[ "$1 $2" = "web01 {when}" ] && {once}\nexit 0\n', 0o755)
    host.run("systemctl", "restart", "libvirtd")  # which looks for hooks when it starts
    name = drop("web01")
    document = report(host, name)
    assert ("succeeded", 2) == (document["status"], document["attempts"]), document["error"]
    assert {name: "running"} == domains(host)
    assert 1 == len(qemu(host))
    assert [f"{name}-disk-0.qcow2"] == images(host)
    wait_until(lambda: content(host, of_export(name, ".hyper2kvmd.cancel")) is None, "the wish is over")


def test_a_libvirt_that_was_away_keeps_the_disks_of_a_cancelled_job(host: Container, drop: Drop) -> None:
    host.write("/etc/hyper2kvmd/hooks.d/pre-import/no", "#!/bin/sh\nexit 1\n", 0o755)
    try:
        name = drop("web01")
        assert "hook_failed" == report(host, name)["error"]["code"]
    finally:
        host.run("rm", "-r", "/etc/hyper2kvmd/hooks.d/pre-import")
    sockets = [f"libvirtd{kind}.socket" for kind in ("", "-ro", "-admin")]
    host.run("systemctl", "stop", *sockets, "libvirtd")
    said = ctl(host, "cancel", name, accept=(1,))
    assert "its disks are left as they are" in said and "libvirt did not say that no VM uses them" in said
    assert [f"{name}-disk-0.qcow2"] == images(host)
    for command in re.findall(r"`(systemctl .*?)`", said):
        host.run(*command.split())
    assert ctl(host, "cancel", name).endswith("web01: cancelled\n")
    assert [] == images(host)


# Where QEMU may not go -------------------------------------------------------------------------------------


def closed_to_others(host: Container) -> Callable[[], None]:
    host.run("setfacl", "-m", "o::---", IMAGES)

    def undo() -> None:
        host.run("setfacl", "-m", "o::--x", "-x", "u:libvirt-qemu", IMAGES)

    return undo


def squashed(host: Container) -> Callable[[], None]:
    """As NFS with root_squash: root can give nothing away. There are no access control lists, either."""
    backing = "/srv/nfs"
    host.run("sh", "-c", "[ -e /dev/fuse ] || mknod -m 0666 /dev/fuse c 10 229")
    host.run("rm", "-rf", backing)
    host.run("install", "-d", "-o", "hyper2kvm", "-m", "0711", backing)
    host.run("bindfs", "--chown-deny", "--chgrp-deny", "--xattr-none", "-o", "allow_other", backing, IMAGES)
    host.run("systemctl", "restart", "hyper2kvmd")

    def undo() -> None:
        host.run("systemctl", "stop", "hyper2kvmd")
        for name in domains(host):
            host.run(*VIRSH, "destroy", name, accept=(0, 1))
        host.run("umount", IMAGES)
        host.run("sed", "-i", "/^user = /d; /^group = /d", "/etc/libvirt/qemu.conf")
        host.run("systemctl", "restart", "libvirtd")

    return undo


@pytest.mark.parametrize("boot", [False, True], ids=["start", "boot test"])
@pytest.mark.parametrize("closed", [closed_to_others, squashed])
def test_a_directory_that_is_closed_to_qemu_is_found_before_the_copy_and_the_remedy_works(
    host: Container, drop: Drop, closed: Callable[[Container], Callable[[], None]], boot: bool
) -> None:
    undo = closed(host)
    try:
        settings = yaml.safe_load((host.root / CONFIG.lstrip("/")).read_text())
        settings |= {"validate": {"test_boot": boot, "boot_failure": "warn", "boot_seconds": 1}}
        settings["libvirt"]["start"] = not boot
        host.write(CONFIG, yaml.safe_dump(settings))
        host.run("systemctl", "reload", "hyper2kvmd")
        name = drop("web01")
        document = report(host, name)
        assert ("blocked", "qemu_denied") == (document["status"], document["error"]["code"]), document["error"]
        assert ["plan"] == [stage["name"] for stage in document["stages"]]
        assert [] == images(host)
        assert "libvirt-qemu" in document["error"]["message"]
        hint = document["error"]["hint"]
        commands = re.findall(r"`(setfacl .*?)`", hint)
        if not commands:
            assert "set user and group to hyper2kvm in /etc/libvirt/qemu.conf and restart libvirt" in hint
            conf = Path("/etc/libvirt/qemu.conf")
            commands = [f'sed -i \'$a user = "hyper2kvm"\\ngroup = "hyper2kvm"\' {conf}', "systemctl restart libvirtd"]
        for command in (*commands, f"hyper2kvmctl retry {name}"):
            host.run("sh", "-c", command)
        document = report(host, name)
        assert "succeeded" == document["status"], document["error"]
        assert {name: "shut off" if boot else "running"} == domains(host)
    finally:
        undo()
