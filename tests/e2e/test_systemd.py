"""The unit file as shipped, under a real systemd, with the service's own user and sandbox."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT
from tests.conftest import disk_entry, write_manifest
from tests.e2e.container import Container, booted, wait_until
from tests.guests.build import export

UNIT = ROOT / "systemd/hyper2kvmd.service"
CATALOG = ROOT / "packaging/hyper2kvmd.catalog"
USERS = ROOT / "packaging/sysusers.conf"
CAP_FOWNER = 3
CONFIG = "/etc/hyper2kvmd/hyper2kvmd.yaml"
EXPORTS = "/var/lib/hypersdk/exports"
IMAGES = "/var/lib/libvirt/images"
DROP_IN = "/run/systemd/system/hyper2kvmd.service.d/test.conf"
SETTINGS: dict[str, Any] = {
    "settle_seconds": 0,
    "scan_interval_seconds": 1,
    "libvirt": {"import": False},
    "retry": {"delay_seconds": 1},
}
PROGRAM = """#!/bin/sh
exec /opt/hyper2kvmd/bin/python -m hyper2kvmd "$@"
"""
# Converts for real, at 1 MiB a second, beside a process that has left the job's process group and does not die with it.
SLOW_QEMU_IMG = """#!/bin/sh
[ "$1" = convert ] || exec /usr/bin/qemu-img "$@"
shift
setsid sleep 300 </dev/null >/dev/null 2>&1 &
exec /usr/bin/qemu-img convert -r 1M "$@"
"""
# Notes what it was called for (in empty files: some calls may write none), and waits as long as a file says so.
HELD_QEMU_IMG = """#!/bin/sh
mkdir -p /var/lib/hyper2kvmd/calls
case "$*" in "check "*" -f "*) what=check-target ;; *) what=$1 ;; esac
mktemp "/var/lib/hyper2kvmd/calls/$what.XXXXXX" >/dev/null
while [ "$what" = "$(cat /run/hold 2>/dev/null)" ]; do sleep 0.2; done
exec /usr/bin/qemu-img "$@"
"""
LOOKS_INSIDE = {"inspect": {"enabled": True}, "fix": {"enabled": True}, "convert": {"enabled": True}}
QEMU_IMG = "/usr/local/bin/qemu-img"  # comes before /usr/bin on the service's PATH

Drop = Callable[..., str]


# The machine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> Iterator[Container]:
    """A booted machine with the package installed and the service stopped."""
    with booted() as container:
        install_program(container)
        install_service(container)
        yield container


def install_program(machine: Container) -> None:
    """Put the program below /opt, with the libraries that it declares and nothing else."""
    machine.run("/usr/bin/python3", "-m", "venv", "--system-site-packages", "--without-pip", "/opt/hyper2kvmd")
    (target,) = (machine.root / "opt/hyper2kvmd/lib").glob("python3*/site-packages")
    for name in ("hyper2kvmd", *requirements("hyper2kvmd")):
        distribution = metadata.distribution(name)
        base = Path(str(distribution.locate_file("")))
        if not base.is_relative_to(sys.prefix):
            continue  # the system's own
        for file in distribution.files or ():
            copy = target / file
            if ".." not in file.parts:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(base / file, copy)
    for editable in target.glob("__editable__*"):
        editable.unlink()
    shutil.copytree(ROOT / "hyper2kvmd", target / "hyper2kvmd")
    machine.write("/usr/bin/hyper2kvmd", PROGRAM, 0o755)
    machine.write("/usr/bin/hyper2kvmctl", PROGRAM.replace("-m hyper2kvmd", "-m hyper2kvmd.ctl"), 0o755)


def requirements(name: str) -> set[str]:
    """What a distribution requires, directly or not."""
    names: set[str] = set()
    for requirement in metadata.requires(name) or ():
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        if match and "extra ==" not in requirement:
            names |= {match[0], *requirements(match[0])}
    return names


def install_service(machine: Container) -> None:
    """What the package does besides: the unit, the users, the directories; and a /dev/kvm that is of no use."""
    # The container shows what this machine has; whatever it has of ours is not part of the tests.
    machine.run("sh", "-c", f"rm -rf {EXPORTS} {IMAGES} /etc/systemd/system/hyper2kvmd.service*")
    machine.write("/usr/lib/systemd/system/hyper2kvmd.service", UNIT.read_text())
    machine.write("/usr/lib/systemd/catalog/hyper2kvmd.catalog", CATALOG.read_text())
    machine.run("journalctl", "--update-catalog")
    machine.write("/usr/lib/sysusers.d/hyper2kvmd.conf", USERS.read_text())
    machine.run("systemd-sysusers", "/usr/lib/sysusers.d/hyper2kvmd.conf")
    machine.run("install", "-d", "-o", "hypersdk", "-g", "hypersdk", "-m", "2775", EXPORTS)
    machine.run("install", "-d", "-g", "hyper2kvm", "-m", "0775", IMAGES)
    # The numbers of /dev/null: it can be opened, and then fails, as KVM does in many a virtual machine.
    machine.run("sh", "-c", "rm -f /dev/kvm; mknod -m 0660 /dev/kvm c 1 3; chgrp kvm /dev/kvm")
    machine.run("systemctl", "daemon-reload")


@pytest.fixture
def service(machine: Container) -> Iterator[Container]:
    """The machine with the service started, on its default test settings and an empty queue."""
    configure(machine)
    machine.run("systemctl", "start", "hyper2kvmd")
    yield machine
    # Shown by pytest if the test failed.
    print(machine.run("journalctl", "-b", "--no-pager", "-o", "short-monotonic", "-u", "hyper2kvmd", "-n", "50"))
    machine.run("rm", "-rf", QEMU_IMG, "/run/hold", "/var/lib/hyper2kvmd/calls")
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=CONT", "hyper2kvmd", accept=(0, 1))
    machine.run("systemctl", "stop", "hyper2kvmd")
    machine.run("systemctl", "reset-failed", "hyper2kvmd", accept=(0, 1))
    shutil.rmtree(machine.root / Path(DROP_IN).parent.relative_to("/"), ignore_errors=True)
    machine.run("systemctl", "daemon-reload")
    machine.run("find", EXPORTS, IMAGES, "-mindepth", "1", "-delete")


def configure(machine: Container, **changes: Any) -> None:
    machine.write(CONFIG, yaml.safe_dump({**SETTINGS, **changes}))


@pytest.fixture
def drop(service: Container, tmp_path: Path) -> Drop:
    """A function that drops an export, all at once, as the exporter's user; returns its name."""

    def drop(name: str, size: int = 1 << 20, content: bytes | None = None, mode: str = "2775", **changes: Any) -> str:
        directory = tmp_path / name
        directory.mkdir()
        disk = directory / f"{name}-disk-0.raw"
        disk.write_bytes(os.urandom(size) if content is None else content)
        write_manifest(directory, [disk_entry(disk, local_path=disk.name)], **changes)
        return hand_over(service, directory, mode)

    return drop


def hand_over(service: Container, directory: Path, mode: str = "2775") -> str:
    """Put an export into the machine, all at once, as the exporter's user; return its name."""
    name = directory.name
    hidden = service.root / EXPORTS.lstrip("/") / f".{name}"
    shutil.copytree(directory, hidden)
    service.run("chown", "-R", "hypersdk:hypersdk", f"{EXPORTS}/.{name}")
    service.run("chmod", mode, f"{EXPORTS}/.{name}")
    hidden.rename(hidden.with_name(name))
    return name


def show(machine: Container, name: str) -> str:
    return machine.run("systemctl", "show", "--value", f"--property={name}", "hyper2kvmd").strip()


def main_pid(machine: Container) -> int:
    return int(show(machine, "MainPID"))


def process(machine: Container, pid: int, name: str) -> str:
    """One line of a process's /proc/PID/status."""
    lines = machine.run("cat", f"/proc/{pid}/status").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))


def processes(machine: Container) -> dict[int, str]:
    """The processes of the service's user: their numbers and command lines."""
    lines = machine.run("pgrep", "-a", "-u", "hyper2kvm", accept=(0, 1)).splitlines()
    return {int(line.split()[0]): line.partition(" ")[2] for line in lines}


def journal(machine: Container, *matches: str) -> list[dict[str, Any]]:
    """The entries of the service, of this boot, that match."""
    machine.run("journalctl", "--sync")
    output = machine.run("journalctl", "-b", "-a", "-o", "json", "--no-pager", "-u", "hyper2kvmd", *matches)
    return [json.loads(line) for line in output.splitlines()]


def jobs_that_ended(machine: Container) -> set[str]:
    """The jobs whose last entry, which says how they ended, is in the journal."""
    last = [entry for entry in journal(machine) if "H2K_OUTCOME" in entry or entry["MESSAGE"].startswith("succeeded")]
    return {entry["H2K_JOB_ID"] for entry in last}


def of_export(name: str, file: str) -> str:
    return f"{EXPORTS}/{name}/{file}"


def content(machine: Container, path: str) -> dict[str, Any] | None:
    """A JSON file of the machine, or None if it is not there."""
    try:
        loaded: dict[str, Any] = json.loads((machine.root / path.lstrip("/")).read_text())
    except FileNotFoundError:
        return None
    return loaded


def report(machine: Container, name: str, seconds: float = 300) -> dict[str, Any]:
    """The report of an export, once it is there."""
    path = of_export(name, "migration-report.json")
    wait_until(lambda: content(machine, path) is not None, f"{name} has a report", seconds)
    found = content(machine, path)
    assert found is not None
    return found


def images(machine: Container) -> list[str]:
    return sorted(path.name for path in (machine.root / IMAGES.lstrip("/")).iterdir())


def is_same(machine: Container, name: str) -> bool:
    """Whether the result holds what the export's disk holds."""
    source, target = of_export(name, f"{name}-disk-0.raw"), f"{IMAGES}/{name}-disk-0.qcow2"
    return "identical" in machine.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, target)


def start_slow_job(service: Container, drop: Drop, name: str) -> str:
    """Drop an export and return when a part of it has been converted, which goes on for a minute."""
    service.write(QEMU_IMG, SLOW_QEMU_IMG, 0o755)
    drop(name, 64 << 20)
    partial = service.root / IMAGES.lstrip("/")

    def converting() -> bool:
        return any(path.stat().st_size > 1 << 20 for path in partial.glob(f".{name}*.partial"))

    wait_until(converting, f"{name} is being converted")
    return name


def is_in(service: Container, name: str, stage: str) -> bool:
    """Whether a job is in a stage, and its disk has been converted."""
    text = show(service, "StatusText")
    return "convert" not in text and re.search(rf"\b{name}\b.* {stage}\b", text) is not None


def wait_for_stage(service: Container, name: str, stage: str) -> None:
    """Return when a job is in a stage, as the service's status tells it."""
    wait_until(lambda: f"1 running ({name} {stage}" in show(service, "StatusText"), f"{name} is in {stage}")


def hold(service: Container, command: str) -> None:
    """Have qemu-img wait before it does something, until /run/hold is removed."""
    service.write(QEMU_IMG, HELD_QEMU_IMG, 0o755)
    service.write("/run/hold", command)


def calls(service: Container, command: str) -> int:
    """How often qemu-img was called for something since it is held."""
    names = service.run("ls", "/var/lib/hyper2kvmd/calls", accept=(0, 2)).splitlines()
    return sum(name.startswith(f"{command}.") for name in names)


def look_again(service: Container, times: int = 3) -> None:
    """Return when the daemon has looked at all exports that often."""

    def looks() -> float:
        # It does not answer before it has begun.
        said = service.run("curl", "--silent", "http://127.0.0.1:9878/metrics", accept=(0, 7, 52, 56))
        found = re.search(r"^hyper2kvmd_scan_duration_seconds_count (\S+)", said, re.MULTILINE)
        return float(found[1]) if found else 0

    wanted = looks() + times
    wait_until(lambda: looks() >= wanted, f"the daemon looks {times} times")


def outlive_the_watchdog(service: Container) -> None:
    """Return when the daemon has told systemd that it lives long after the three seconds of WatchdogSec= are over."""

    def told() -> int:
        return int(show(service, "WatchdogTimestampMonotonic"))

    wanted = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6) + 4_500_000
    wait_until(lambda: told() > wanted, "systemd has heard of it")


def appliance(machine: Container) -> int | None:
    """The QEMU that libguestfs has started with the overlay of a job."""
    found = (pid for pid, command in processes(machine).items() if "qemu-system" in command and "overlay-" in command)
    return next(found, None)


def last_attempt(service: Container, name: str) -> tuple[Any, ...]:
    """What the lock says: the attempt's number, how it ended, and how many before it died."""
    lock = content(service, of_export(name, ".hyper2kvmd.lock")) or {}
    return lock["attempt"], lock["ended"], lock["crashes"]


# Starting -------------------------------------------------------------------------------------------------


def test_systemd_has_nothing_to_say_against_the_unit(machine: Container) -> None:
    assert "" == machine.run("systemd-analyze", "verify", "--man=no", "hyper2kvmd.service")


def test_the_service_is_exposed_to_little(record_property: Callable[[str, object], None]) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=yes", UNIT], capture_output=True, text=True, check=True
    )
    found = re.search(r"Overall exposure level for hyper2kvmd.service: ([0-9.]+)", done.stdout)
    assert found, done.stdout
    print(f"exposure {found[1]}")
    record_property("exposure", found[1])
    assert 2.0 >= float(found[1])


def test_start_returns_when_the_directory_is_watched(service: Container) -> None:
    assert ("active", "running") == (show(service, "ActiveState"), show(service, "SubState"))
    (watching,) = journal(service, f"_PID={main_pid(service)}", "PRIORITY=6")
    assert watching["MESSAGE"].startswith("watching: ")
    assert int(watching["__MONOTONIC_TIMESTAMP"]) <= int(show(service, "ActiveEnterTimestampMonotonic"))


def test_a_drop_right_after_the_start_is_seen_by_its_events(service: Container, drop: Drop) -> None:
    configure(service, scan_interval_seconds=3600)
    service.run("systemctl", "restart", "hyper2kvmd")
    assert "succeeded" == report(service, drop("web01"), 20)["status"]


def test_the_status_names_the_jobs_that_run(service: Container, drop: Drop) -> None:
    name = start_slow_job(service, drop, "slow")
    drop("bad", manifest_version="7.0")

    def told() -> bool:
        status = show(service, "StatusText")
        return bool(re.fullmatch(rf"1 running \({name} convert [1-9]\d? % \d+ s left\), 1 rejected", status))

    wait_until(told, "the status has both")


def test_the_status_is_one_line_that_counts(service: Container, drop: Drop) -> None:
    wait_until(lambda: "0 running" == show(service, "StatusText"), "the service tells its status")
    drop("good")
    drop("bad", manifest_version="7.0")
    wait_until(lambda: "1 rejected" in show(service, "StatusText"), "the rejected export is counted")
    wait_until(lambda: "1 done" in show(service, "StatusText"), "the migrated export is counted")
    wait_until(lambda: "0 running, 1 done, 1 rejected" == show(service, "StatusText"), "both are counted")
    status = service.run("systemctl", "status", "--no-pager", "hyper2kvmd")
    assert 'Status: "0 running, 1 done, 1 rejected"' in status


def test_it_runs_as_its_own_user_with_one_privilege_which_jobs_give_up(service: Container, drop: Drop) -> None:
    pid = main_pid(service)
    assert "hyper2kvm" == service.run("ps", "-o", "user=", "-p", str(pid)).strip()
    groups = {
        service.run("getent", "group", number).split(":")[0] for number in process(service, pid, "Groups").split()
    }
    assert {"kvm", "libvirt", "hypersdk"} == groups - {"hyper2kvm"}
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert 1 << CAP_FOWNER == int(process(service, pid, capabilities), 16)
    start_slow_job(service, drop, "slow")
    job = int(service.run("pgrep", "-f", "hyper2kvmd run-job").split()[0])
    for child in (job, int(service.run("pgrep", "-P", str(job)).split()[0])):
        for capabilities in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert 0 == int(process(service, child, capabilities), 16)
    assert ("1", "2") == (process(service, pid, "NoNewPrivs"), process(service, pid, "Seccomp"))


def test_it_can_write_where_it_has_to_and_nowhere_else(service: Container) -> None:
    def can_write(directory: str) -> bool:
        """Tried as root in the service's own view: what is refused here is refused by the sandbox."""
        file = f"/proc/{main_pid(service)}/root{directory}/written-by-a-test"
        return "yes" in service.run("sh", "-c", f"touch {file} && rm {file} && echo yes", accept=(0, 1))

    writable = {directory: can_write(directory) for directory in (EXPORTS, IMAGES, "/var/cache/hyper2kvmd", "/tmp")}
    assert set(writable.values()) == {True}, writable
    closed = {directory: can_write(directory) for directory in ("/etc", "/usr/bin", "/var/lib", "/home", "/root")}
    assert set(closed.values()) == {False}, closed


# Working --------------------------------------------------------------------------------------------------


def test_exports_are_migrated_by_the_service_user(service: Container, drop: Drop) -> None:
    names = [drop(f"vm{number}") for number in range(4)]
    for name in names:
        assert "succeeded" == report(service, name)["status"], report(service, name)["error"]
        assert is_same(service, name)
    owners = service.run("sh", "-c", f"stat -c %U {IMAGES}/* {EXPORTS}/*/migration-report.json")
    assert {"hyper2kvm"} == set(owners.split())
    assert [f"{name}-disk-0.qcow2" for name in names] == images(service)


def test_reports_are_signed_inside_the_sandbox(service: Container, drop: Drop) -> None:
    key = "/etc/hyper2kvmd/report-key"
    service.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    configure(service, report={"sign_key": key})
    service.run("systemctl", "reload", "hyper2kvmd", accept=(1,))
    assert any(f"{key} cannot be read by hyper2kvm" in entry["MESSAGE"] for entry in journal(service))
    early = drop("early")
    error = report(service, early)["error"]
    assert ("sign_key_unusable", "report.sign_key") == (error["code"], error["field"])
    # As the remedy says, and the page on evidence.
    service.run("chown", "hyper2kvm", key)
    service.run("systemctl", "reload", "hyper2kvmd")
    name = drop("signed")
    assert "succeeded" == report(service, name)["status"]
    for path in (f"{name}", of_export(name, "migration-report.json")):
        said = service.run("hyper2kvmctl", "report", "verify", path, "--disks").splitlines()
        assert ["ok"] * 4 == [line.split()[0] for line in said], said
    service.run("hyper2kvmctl", "retry", early)
    assert "succeeded" == report(service, early)["status"]
    service.run("hyper2kvmctl", "report", "verify", early)
    # Where the sandbox hides it, root sees it, and the service does not.
    service.run("cp", key, f"{key}.pub", "/root")
    configure(service, report={"sign_key": "/root/report-key"})
    rows = json.loads(service.run("hyper2kvmctl", "doctor", "signing", "--json", accept=(1,)))
    assert "the sandbox of hyper2kvmd.service hides the key /root/report-key" == rows[0]["detail"]
    service.run("systemctl", "reload", "hyper2kvmd", accept=(1,))
    service.run("rm", key, f"{key}.pub")


def test_an_export_that_hypersdk_keeps_for_itself_is_migrated_all_the_same(service: Container, drop: Drop) -> None:
    """hypersdk makes its directories with mode 0755, and neither group nor default ACL lets the service write there."""
    name = drop("web01", mode="0755")
    assert "succeeded" == report(service, name)["status"]
    acl = service.run("getfacl", "-cp", f"{EXPORTS}/{name}").split()
    assert {"user::rwx", "user:hyper2kvm:rwx", "group::r-x", "other::r-x"} <= set(acl)
    assert "hypersdk" == service.run("stat", "-c", "%U", f"{EXPORTS}/{name}").strip()


def test_the_journal_finds_a_job_by_its_fields(service: Container, drop: Drop) -> None:
    job = report(service, drop("web01"))["job"]
    wait_until(
        lambda: journal(service, f"H2K_JOB_ID={job}")[-1]["MESSAGE"].startswith("succeeded"), "it is in the journal"
    )
    entries = journal(service, f"H2K_JOB_ID={job}")
    assert {"hyper2kvmd"} == {entry["SYSLOG_IDENTIFIER"] for entry in entries}
    assert {"1"} == {entry["H2K_ATTEMPT"] for entry in entries}
    assert {"6"} == {entry["PRIORITY"] for entry in entries if entry["MESSAGE"].startswith("stage ")}
    stages = [entry["H2K_STAGE"] for entry in journal(service, f"H2K_JOB_ID={job}", "H2K_STATUS=done")]
    assert {"plan", "verify", "convert", "validate", "publish"} == set(stages)
    assert {"web01"} == {entry["H2K_VM"] for entry in entries if "H2K_STAGE" in entry}


def test_the_journal_explains_how_a_job_ended(service: Container, drop: Drop) -> None:
    denied = {"convert": {"enabled": True, "output_dir": "/etc"}, "validate": {"enabled": True}}
    good, bad = drop("web01"), drop("web02", pipeline=denied)
    jobs = {name: report(service, name)["job"] for name in (good, bad)}
    wait_until(lambda: {*jobs.values()} <= jobs_that_ended(service), "the journal has both")
    explained = {
        name: service.run("journalctl", "-b", "-x", "--no-pager", f"H2K_JOB_ID={jobs[name]}", f"H2K_KIND={kind}")
        for name, kind in ((good, "succeeded"), (bad, "blocked"))
    }
    assert "Subject: A VM was migrated" in explained[good]
    assert "Subject: A migration waits for you" in explained[bad]
    assert "error=output_denied" in explained[bad]
    assert "Add /etc to output.allowed_dirs" in explained[bad]
    assert "man:hyper2kvmd(8)" in explained[bad]


def test_logs_has_the_jobs_records_and_the_daemons_from_the_journal(service: Container, drop: Drop) -> None:
    names = [drop("web01"), drop("web02")]
    jobs = [report(service, name)["job"] for name in names]
    wait_until(lambda: {*jobs} <= jobs_that_ended(service), "the journal has both")
    lines = service.run("hyper2kvmctl", "logs", "--journal", "--json", "web01").splitlines()
    entries = [json.loads(line) for line in lines]
    found = {entry.get("H2K_JOB_ID") for entry in entries}
    assert (True, False) == (jobs[0] in found, jobs[1] in found)
    assert "started" in {entry["MESSAGE"].partition(":")[0] for entry in entries if "H2K_JOB_ID" not in entry}


def test_hostile_names_forge_nothing(service: Container, drop: Drop) -> None:
    hostile = "web\nPRIORITY=0\nH2K_JOB_ID=forged\nMESSAGE=forged\nMAINPID=1\n"
    one_line = "wëb 日本 STATUS=x\tH2K_JOB_ID=forged PRIORITY=0"
    source = {"provider": "vsphere", "vm_id": "vm-1"}
    names = [
        drop("lines", source={**source, "vm_name": hostile}),
        drop("words", source={**source, "vm_name": one_line.replace("\t", " ")}),
        drop("key", **{hostile: 1}),
    ]
    reports = [report(service, name) for name in names]
    assert ["rejected", "succeeded"] == [document["status"] for document in reports[:2]]
    jobs = {document["job"] for document in reports}
    wait_until(lambda: jobs == jobs_that_ended(service) & jobs, "the journal has it all")
    assert [] == journal(service, "H2K_JOB_ID=forged")
    assert [] == journal(service, "MESSAGE=forged")
    assert [] == journal(service, "PRIORITY=0")
    pids = [str(main_pid(service)), *(str(document["host"]["pid"]) for document in reports)]
    entries = [entry for pid in pids for entry in journal(service, f"_PID={pid}")]
    assert jobs == {entry["H2K_JOB_ID"] for entry in entries if "H2K_JOB_ID" in entry}
    wait_until(lambda: "0 running" in show(service, "StatusText"), "the status is as ever")
    assert "\n" not in show(service, "StatusText")


def test_a_guest_is_looked_into_inside_the_sandbox_without_kvm(service: Container, drop: Drop) -> None:
    drop("empty", content=bytes(4 << 20), pipeline=LOOKS_INSIDE)
    wait_until(lambda: appliance(service) is not None, "the appliance starts")
    pid = appliance(service)
    assert pid is not None
    assert "accel=tcg" in processes(service)[pid]
    assert ("2", "0000000000000000") == (process(service, pid, "Seccomp"), process(service, pid, "CapEff"))
    document = report(service, "empty", 120)
    assert ("blocked", "os_unknown") == (document["status"], document["error"]["code"]), document["error"]
    assert "libguestfs" in document["tools"]
    (warning,) = (warning for warning in document["warnings"] if warning["code"] == "kvm_unusable")
    assert "Permission denied" not in warning["message"], "the service may open /dev/kvm; that is not what is wrong"
    assert [] == images(service)


# Stopping and dying ---------------------------------------------------------------------------------------


def test_stop_interrupts_a_job_within_seconds_and_start_does_it_again(service: Container, drop: Drop) -> None:
    name = start_slow_job(service, drop, "slow")
    began = time.monotonic()
    service.run("systemctl", "stop", "hyper2kvmd")
    assert time.monotonic() - began < 50, "as long as the conversion would take"
    assert {} == processes(service)
    assert ("success", "0") == (show(service, "Result"), show(service, "ExecMainStatus"))
    assert None is content(service, of_export(name, "migration-report.json"))
    assert [] == images(service)
    assert (1, "interrupted", 0) == last_attempt(service, name)

    (service.root / QEMU_IMG.lstrip("/")).unlink()
    service.run("systemctl", "start", "hyper2kvmd")
    document = report(service, name)
    assert ("succeeded", 2) == (document["status"], document["attempts"])
    assert (2, "reported", 0) == last_attempt(service, name)
    assert is_same(service, name)


@pytest.mark.parametrize(
    "command", [pytest.param("stop", marks=pytest.mark.rest), "kill --kill-whom=main --signal=KILL"]
)
def test_no_appliance_outlives_the_service(service: Container, drop: Drop, command: str) -> None:
    drop("empty", content=bytes(4 << 20), pipeline=LOOKS_INSIDE)
    wait_until(lambda: appliance(service) is not None, "the appliance starts")
    before = set(processes(service))
    service.run("systemctl", *command.split(), "hyper2kvmd")
    wait_until(lambda: set() == before & set(processes(service)), "all processes have ended", 10)
    assert None is content(service, of_export("empty", "migration-report.json"))
    assert [] == [name for name in images(service) if not name.startswith(".")]


def test_a_killed_daemon_is_started_again_and_the_job_is_done_once(service: Container, drop: Drop) -> None:
    name = start_slow_job(service, drop, "slow")
    before = processes(service)
    assert any("run-job" in command for command in before.values())
    assert any("/usr/bin/qemu-img convert" in command for command in before.values())
    assert any("sleep 300" in command for command in before.values())
    (service.root / QEMU_IMG.lstrip("/")).unlink()
    service.run("kill", "-KILL", str(main_pid(service)))
    wait_until(lambda: "1" == show(service, "NRestarts") and "active" == show(service, "ActiveState"), "it is back")
    assert set() == set(before) & set(processes(service))
    document = report(service, name)
    assert ("succeeded", 2) == (document["status"], document["attempts"])
    assert (2, "reported", 0) == last_attempt(service, name)
    assert [f"{name}-disk-0.qcow2"] == images(service)
    assert is_same(service, name)
    machine_log = service.run("journalctl", "-b", "--no-pager", "-u", "hyper2kvmd")
    assert "left-over process" not in machine_log
    claimed = [entry for entry in journal(service, f"H2K_JOB_ID={document['job']}") if "claimed" in entry["MESSAGE"]]
    assert ["1", "2"] == [entry["H2K_ATTEMPT"] for entry in claimed]


def test_a_killed_runner_is_noticed_and_the_job_is_done_once(service: Container, drop: Drop) -> None:
    hold(service, "convert")
    name = drop("web01")
    wait_until(lambda: 1 == calls(service, "convert"), "the conversion has begun")
    pid = main_pid(service)
    (runner,) = (number for number, command in processes(service).items() if "run-job" in command)
    service.run("kill", "-KILL", str(runner))
    service.run("rm", "/run/hold")
    document = report(service, name)
    assert ("succeeded", 2) == (document["status"], document["attempts"])
    assert (pid, "0") == (main_pid(service), show(service, "NRestarts"))
    assert [f"{name}-disk-0.qcow2"] == images(service)
    assert is_same(service, name)


@pytest.mark.parametrize(
    ("stage", "held", "conversions"),
    [("plan", "check", 1), ("convert", "convert", 2), ("validate", "check-target", 1)],
    ids=["plan", "convert", "validate"],
)
def test_a_restart_in_a_stage_goes_on_with_it(
    service: Container, drop: Drop, stage: str, held: str, conversions: int
) -> None:
    hold(service, held)
    name = drop("web01")
    wait_for_stage(service, name, stage)
    wait_until(lambda: 1 == calls(service, held), "the tool has begun")
    check_restart(service, name)
    assert conversions == calls(service, "convert"), "what is done is not done again"


@pytest.mark.rest
def test_a_restart_while_a_guest_is_inspected_fixed_and_committed_loses_nothing(
    service: Container, tmp_path: Path
) -> None:
    configure(service, convert={"engine": "qemu-img"})  # whose calls are counted
    hold(service, "commit")
    name = hand_over(service, export("debian12-bios", tmp_path, vm_name="web01"))
    for stage in ("inspect", "fix", "commit"):
        wait_until(partial(is_in, service, name, stage), stage, 600)
        time.sleep(2)
        service.run("systemctl", "restart", "hyper2kvmd", timeout=90)
    service.run("rm", "/run/hold")
    document = report(service, name, 600)
    assert ("succeeded", 4) == (document["status"], document["attempts"]), document["error"]
    assert 1 == calls(service, "convert"), "the disk was converted again"
    assert all(proof["ok"] for proof in document["results"]["fix"]["proofs"])
    assert [f"{name}-disk-0.qcow2"] == images(service)
    work = service.root / "var/lib/hyper2kvmd/work"
    wait_until(lambda: not [*work.glob(f"{name}-*")], "the work directory is removed, once the report is there")


def test_a_restart_while_checksums_are_computed_computes_them_again(service: Container, drop: Drop) -> None:
    size = 2 << 30
    name = drop("web01")
    disk = service.root / of_export(name, f"{name}-disk-0.raw").lstrip("/")
    report(service, name)
    service.run("systemctl", "stop", "hyper2kvmd")
    service.run("sh", "-c", f"rm -r {EXPORTS}/{name}/migration-report.json {IMAGES}/*")
    os.truncate(disk, size)
    manifest = disk.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    digest = service.run("sha256sum", of_export(name, disk.name)).split()[0]
    content["disks"][0].update(bytes=size, checksum=f"sha256:{digest}")
    manifest.write_text(json.dumps(content))
    service.run("systemctl", "start", "hyper2kvmd")
    wait_for_stage(service, name, "verify")
    service.run("systemctl", "restart", "hyper2kvmd")
    document = report(service, name)
    assert ("succeeded", 3) == (document["status"], document["attempts"])
    assert digest == document["disks"][0]["source_sha256"]
    assert [f"{name}-disk-0.qcow2"] == images(service)


def test_a_death_while_libvirt_does_not_answer_defines_the_domain_once(service: Container, drop: Drop) -> None:
    configure(service, libvirt={"import": True, "uri": "qemu:///system", "default_network": "user"})
    # Who may connect is not what is tested, and polkit does not run here.
    service.write("/etc/libvirt/libvirtd.conf", 'auth_unix_rw = "none"\n')
    service.run("systemctl", "start", "libvirtd")
    service.run("systemctl", "restart", "hyper2kvmd")
    libvirt = service.run("systemctl", "show", "--value", "--property=MainPID", "libvirtd").strip()
    try:
        hold(service, "check-target")
        name = drop("web01")
        wait_for_stage(service, name, "validate")
        service.run("kill", "-STOP", libvirt)
        service.run("rm", "/run/hold")
        wait_for_stage(service, name, "import")
        service.run("systemctl", "kill", "--signal=KILL", "hyper2kvmd")
        service.run("kill", "-CONT", libvirt)
        service.run("systemctl", "restart", "hyper2kvmd")
        document = report(service, name)
        assert ("succeeded", 2) == (document["status"], document["attempts"]), document["error"]
        assert 1 == calls(service, "convert")
        assert [f"{name}-disk-0.qcow2"] == images(service)
        assert "web01" == service.run("virsh", "-c", "qemu:///system", "list", "--all", "--name").strip()
        service.run("virsh", "-c", "qemu:///system", "undefine", "web01")
    finally:
        service.run("kill", "-CONT", libvirt)
        service.run("systemctl", "stop", "libvirtd")


def check_restart(service: Container, name: str) -> None:
    """Restart the service, and see that the job, whose tool is held, is interrupted and then done once."""
    before = set(processes(service))
    service.run("systemctl", "restart", "hyper2kvmd")
    assert set() == before & set(processes(service))
    service.run("rm", "/run/hold")
    document = report(service, name)
    assert ("succeeded", 2) == (document["status"], document["attempts"])
    assert (2, "reported", 0) == last_attempt(service, name)
    assert [f"{name}-disk-0.qcow2"] == images(service)
    assert is_same(service, name)


def test_a_drain_finishes_what_runs_and_starts_nothing(service: Container, drop: Drop) -> None:
    hold(service, "check-target")
    first = drop("first")
    wait_for_stage(service, first, "validate")
    service.write(f"{EXPORTS}/.hyper2kvmd.drain", "")
    second = drop("second")
    wait_until(lambda: "1 queued" in show(service, "StatusText"), "the second waits")
    service.run("rm", "/run/hold")
    document = report(service, first)
    assert ("succeeded", 1) == (document["status"], document["attempts"])
    wait_until(lambda: show(service, "StatusText").startswith("0 running, 1 queued"), "nothing runs any more")
    look_again(service)
    assert None is content(service, of_export(second, ".hyper2kvmd.lock"))
    assert "draining" in show(service, "StatusText")
    # A new start drains as well: who asked for it has not said otherwise.
    service.run("systemctl", "restart", "hyper2kvmd")
    look_again(service)
    assert None is content(service, of_export(second, ".hyper2kvmd.lock"))
    service.run("rm", f"{EXPORTS}/.hyper2kvmd.drain")
    document = report(service, second)
    assert ("succeeded", 1) == (document["status"], document["attempts"])


def test_after_sigquit_the_service_starts_anew_when_its_jobs_are_over(service: Container, drop: Drop) -> None:
    hold(service, "check-target")
    first = drop("first")
    wait_for_stage(service, first, "validate")
    pid = main_pid(service)
    service.run("systemctl", "kill", "--kill-whom=main", "--signal=QUIT", "hyper2kvmd")
    second = drop("second")
    ends = rf"1 running \({first} validate.*\), 1 queued, ends with its last job, then restarts"
    wait_until(lambda: bool(re.fullmatch(ends, show(service, "StatusText"))), "the status tells")
    assert pid == main_pid(service)
    service.run("rm", "/run/hold")
    for name in (first, second):
        document = report(service, name)
        assert ("succeeded", 1) == (document["status"], document["attempts"])
    assert main_pid(service) not in (0, pid)
    assert ("success", "1") == (show(service, "Result"), show(service, "NRestarts"))


def test_a_service_that_ends_with_its_last_job_can_be_stopped_before(service: Container, drop: Drop) -> None:
    hold(service, "check-target")
    name = drop("web01")
    wait_for_stage(service, name, "validate")
    service.run("systemctl", "kill", "--kill-whom=main", "--signal=QUIT", "hyper2kvmd")
    wait_until(lambda: "then restarts" in show(service, "StatusText"), "the status tells")
    service.run("systemctl", "stop", "hyper2kvmd")
    assert ("inactive", "0") == (show(service, "ActiveState"), show(service, "ExecMainStatus"))
    assert (1, "interrupted", 0) == last_attempt(service, name)


def test_a_daemon_that_hangs_is_killed_and_started_again(service: Container) -> None:
    service.write(DROP_IN, "[Service]\nWatchdogSec=3\n")
    configure(service, scan_interval_seconds=3600, watch={"mode": "off"})
    service.run("systemctl", "daemon-reload")
    service.run("systemctl", "restart", "hyper2kvmd")
    pid = main_pid(service)
    outlive_the_watchdog(service)
    assert (pid, "0") == (main_pid(service), show(service, "NRestarts")), "a daemon that has nothing to do is alive"
    service.run("kill", "-STOP", str(pid))
    wait_until(lambda: "watchdog" == show(service, "Result"), "systemd notices")
    wait_until(lambda: "1" == show(service, "NRestarts") and "active" == show(service, "ActiveState"), "it is back")
    assert main_pid(service) not in (0, pid)


def test_a_daemon_whose_file_server_is_gone_is_not_killed_for_it(service: Container, drop: Drop) -> None:
    """Nobody is helped by a restart; the status says what is wrong, and the work goes on when it is back."""
    service.run("systemctl", "stop", "hyper2kvmd")
    service.write(DROP_IN, "[Service]\nWatchdogSec=3\n")
    service.run("systemctl", "daemon-reload")
    service.run("sh", "-c", "test -c /dev/fuse || mknod -m 0666 /dev/fuse c 10 229")
    service.run("bindfs", "-o", "allow_other,attr_timeout=0,entry_timeout=0", EXPORTS, EXPORTS)
    server = service.run("pgrep", "-x", "bindfs").strip()
    try:
        service.run("systemctl", "start", "hyper2kvmd")
        pid = main_pid(service)
        assert "succeeded" == report(service, drop("before"))["status"]
        service.run("kill", "-STOP", server)
        wait_until(lambda: f"no answer from {EXPORTS}" in show(service, "StatusText"), "the status tells", 20)
        outlive_the_watchdog(service)
        service.run("kill", "-CONT", server)
        assert "succeeded" == report(service, drop("after"))["status"]
        assert (pid, "0") == (main_pid(service), show(service, "NRestarts"))
    finally:
        service.run("kill", "-CONT", server)
        service.run("systemctl", "stop", "hyper2kvmd")
        service.run("umount", EXPORTS)


def test_a_systemd_that_executes_itself_anew_goes_on_hearing_from_the_daemon(service: Container) -> None:
    """An update of systemd does that."""
    service.write(DROP_IN, "[Service]\nWatchdogSec=3\n")
    service.run("systemctl", "daemon-reload")
    service.run("systemctl", "restart", "hyper2kvmd")
    pid = main_pid(service)
    service.run("systemctl", "daemon-reexec")
    outlive_the_watchdog(service)
    assert (pid, "0", "active") == (
        main_pid(service),
        show(service, "NRestarts"),
        show(service, "ActiveState"),
    )


# Configuration --------------------------------------------------------------------------------------------


def test_a_reload_with_a_bad_file_changes_nothing_and_says_why(service: Container, drop: Drop) -> None:
    pid = main_pid(service)
    service.write(CONFIG, "worker: 2\nretry: {delay_seconds: soon}\n")
    service.run("systemctl", "reload", "hyper2kvmd", accept=(1,))
    wait_until(lambda: bool(journal(service, f"_PID={pid}", "PRIORITY=3")), "the journal says why")
    (entry,) = journal(service, f"_PID={pid}", "PRIORITY=3")
    assert "the new configuration is bad, the old one stays in force" in entry["MESSAGE"]
    first, second = sorted(entry["H2K_REASON"].splitlines())
    assert f"{CONFIG}:1: worker: unknown setting; did you mean workers?" == first
    assert second.startswith(f"{CONFIG}:2: retry.delay_seconds: ")
    assert ("active", pid) == (show(service, "ActiveState"), main_pid(service))
    assert "succeeded" == report(service, drop("web01"))["status"], "the old configuration is at work"

    configure(service, workers=3)
    service.run("systemctl", "reload", "hyper2kvmd")
    wait_until(lambda: bool(journal(service, f"_PID={pid}", "H2K_WORKERS=3")), "the good file is taken")
    assert pid == main_pid(service)


def test_a_start_with_a_bad_file_ends_with_78_and_is_not_tried_again(service: Container) -> None:
    service.run("systemctl", "stop", "hyper2kvmd")
    service.write(CONFIG, "worker: 2\n")
    service.write(DROP_IN, "[Service]\nRestartSec=100ms\n")
    service.run("systemctl", "daemon-reload")
    service.run("systemctl", "start", "hyper2kvmd", accept=(1,))
    # What is to be tried again is "activating" from its end on.
    assert ("failed", "78", "0") == tuple(
        show(service, name) for name in ("ActiveState", "ExecMainStatus", "NRestarts")
    )
    messages = [entry["MESSAGE"] for entry in journal(service)]
    assert f"hyper2kvmd: {CONFIG}:1: worker: unknown setting; did you mean workers?" in messages
