"""The Debian package: built, held against what it says, and installed, upgraded and removed on fresh systems."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from hyper2kvmd import __version__
from tests import ROOT
from tests.e2e.conftest import (
    APPLIANCE_DROP_IN,
    HOST,
    LIBRARIES,
    NEXT,
    Drop,
    build_package,
    configure,
    exists,
    install,
    is_up,
    ours,
    trees,
    version,
)
from tests.e2e.container import Container, wait_until
from tests.e2e.test_systemd import (
    CONFIG,
    EXPORTS,
    IMAGES,
    SETTINGS,
    calls,
    content,
    hold,
    images,
    is_same,
    main_pid,
    of_export,
    processes,
    report,
    show,
)
from tests.ovf import DISKS, export_ovf, pack

# The package as a file ------------------------------------------------------------------------------------


def field(package: Path, name: str) -> str:
    done = subprocess.run(["dpkg-deb", "--field", package, name], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def names(relations: str) -> set[str]:
    """The packages of a list such as Depends:."""
    return set(re.findall(r"(?:^|[,|])\s*([a-z0-9.+-]+)", relations))


def test_the_version_is_the_programs(package: Path) -> None:
    assert field(package, "Version").startswith(f"{__version__}-1+debian1")


def test_it_depends_on_or_recommends_all_that_a_host_needs_to_run_it(package: Path) -> None:
    lines = (ROOT / "packaging/debian-packages.txt").read_text().splitlines()
    wanted = {
        re.split(r"[|\s]", line)[0] for line in lines if line.split()[1:2] == ["run"] and not line.startswith("#")
    }
    assert {"qemu-utils", "python3-guestfs"} < wanted
    wanted.remove("python3-venv")  # which made the environment that the package brings
    assert set() == wanted - names(field(package, "Depends")) - names(field(package, "Recommends"))


def test_every_library_is_either_a_dependency_or_pinned(package: Path) -> None:
    libraries = {
        re.split(r"[<>=]", requirement)[0]: requirement
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    pinned = set(re.findall(r"(?m)^([a-z-]+)>=.*$", (ROOT / "packaging/requirements.in").read_text()))
    locked = set(re.findall(r"(?m)^([a-z-]+)==", (ROOT / "packaging/requirements.lock").read_text()))
    assert pinned <= locked
    for name in pinned:
        assert f"\n{libraries[name]}\n" in (ROOT / "packaging/requirements.in").read_text()
    debian = {"libvirt-python": "libvirt", "pyyaml": "yaml"}
    of_debian = {f"python3-{debian.get(name, name)}" for name in libraries if name not in pinned}
    assert set() == of_debian - names(field(package, "Depends"))


@pytest.mark.rest
def test_lintian_has_nothing_to_say(suite: str, package: Path) -> None:
    # Newer versions no longer know a tag that we override for older ones.
    command = ["lintian", "--display-info", "--fail-on", "none", "--suppress-tags", "alien-tag", str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()
    if not suite.startswith(HOST):  # where units lie is a rule of each release's own
        said = [line for line in said if not line.startswith("E: hyper2kvmd: aliased-location [lib/")]
    assert (0, []) == (done.returncode, said)


@pytest.mark.rest
@pytest.mark.parametrize("suite", [HOST], indirect=True)
def test_two_builds_are_the_same(package: Path, tmp_path: Path) -> None:
    assert package.read_bytes() == build_package("debian", ROOT, tmp_path).read_bytes()


def test_no_file_names_the_directory_in_which_it_was_built(package: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True)
    search = ("grep", "--recursive", "--files-with-matches", "-e", "/tmp/tmp[.]", "-e", "debian/hyper2kvmd")
    done = subprocess.run([*search, tmp_path], capture_output=True, text=True, check=False)
    assert (1, "") == (done.returncode, done.stdout)


# Installed ------------------------------------------------------------------------------------------------


def test_the_service_is_up_and_reads_its_settings(machine: Container) -> None:
    assert ("active", "enabled") == (show(machine, "ActiveState"), show(machine, "UnitFileState"))
    assert __version__ == version(machine)
    assert f"hyper2kvmd {__version__}" == machine.run("hyper2kvmd", "--version").strip()
    assert '"exports_dir": "/var/lib/hypersdk/exports"' in machine.run("hyper2kvmd", "check-config")
    assert "" == machine.run("systemd-analyze", "verify", "hyper2kvmd.service", "hyper2kvmd@site.service")


def test_the_service_is_exposed_to_little(machine: Container) -> None:
    text = machine.run("systemd-analyze", "security", "--no-pager", "hyper2kvmd.service")
    found = re.search(r"Overall exposure level for hyper2kvmd.service: ([0-9.]+)", text)
    assert found
    assert 2.0 >= float(found[1])


def test_the_users_groups_and_directories_are_as_the_unit_wants_them(machine: Container) -> None:
    assert {"hyper2kvm", "kvm", "libvirt", "hypersdk"} == set(machine.run("id", "-Gn", "hyper2kvm").split())
    assert "2770 hypersdk hypersdk" == machine.run("stat", "-c", "%a %U %G", EXPORTS).strip()
    assert "user:hyper2kvm:rwx\n" in machine.run("getfacl", "-cp", IMAGES), "nothing narrows it"


def test_a_configuration_of_libvirts_package_takes_nothing_from_the_service(machine: Container) -> None:
    machine.run("chmod", "0711", IMAGES)
    assert "#effective:--x" in machine.run("getfacl", "-cp", IMAGES)
    machine.run("dpkg-trigger", "--no-await", IMAGES)
    machine.run("dpkg", "--configure", "--pending")
    assert "user:hyper2kvm:rwx\n" in machine.run("getfacl", "-cp", IMAGES)


def test_the_manual_pages_are_there(machine: Container) -> None:
    for page in ("hyper2kvmd", "hyper2kvmctl", "hyper2kvmd.yaml", "migration-report"):
        machine.run("man", "-w", page)
    text = machine.run("man", "--pager=cat", "hyper2kvmd.yaml")
    assert "systemctl reload hyper2kvmd" in " ".join(text.split())


def test_the_journals_catalog_is_there(machine: Container) -> None:
    assert "hyper2kvmd: A VM was migrated" in machine.run("journalctl", "--list-catalog")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["hyper2kvmctl", "mani"], ["manifest"]),
        (["hyper2kvmctl", "manifest", "re"], ["rehash", "relocate"]),
        (["hyper2kvmctl", "manifest", "create", "--format", ""], ["json", "yaml"]),
        (["hyper2kvmctl", "drain", "--no"], ["--no-wait"]),
        (["hyper2kvmctl", "show", "etc"], []),
        (["hyper2kvmd", "check"], ["check-config", "check-host"]),
    ],
)
def test_bash_completes(machine: Container, words: list[str], offered: list[str]) -> None:
    script = """
    . /usr/share/bash-completion/bash_completion
    _completion_loader "$1"
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
    "_$1" && echo "${COMPREPLY[*]}"
    """
    assert offered == machine.run("bash", "-c", script, "bash", *words).split()


def test_an_export_is_migrated_by_the_services_user(machine: Container, drop: Drop) -> None:
    configure(machine)
    name = drop("web01")
    document = report(machine, name)
    assert "succeeded" == document["status"], document["error"]
    assert is_same(machine, name)
    files = (of_export(name, "migration-report.json"), f"{IMAGES}/{name}-disk-0.qcow2")
    assert {"hyper2kvm"} == set(machine.run("stat", "-c", "%U", *files).split())


def test_reports_are_signed_as_the_page_on_evidence_says(machine: Container, drop: Drop) -> None:
    page = (ROOT / "docs/evidence.md").read_text()
    commands = re.findall(r"(?m)^    ((?:ssh-keygen|chown|chmod) .*)$", page)
    assert 3 == len(commands)
    for command in commands:
        machine.run("sh", "-c", command)
    key = "/etc/hyper2kvmd/report-key"
    machine.write(CONFIG, yaml.safe_dump({**SETTINGS, "report": {"sign_key": key}}))
    machine.run("systemctl", "reload", "hyper2kvmd")
    assert f"{key} signs reports" in machine.run("hyper2kvmctl", "doctor", "signing")
    name = drop("signed")
    assert "succeeded" == report(machine, name)["status"]
    assert 4 == machine.run("hyper2kvmctl", "report", "verify", name, "--disks").count("ok      ")
    # Without us, as any other host can.
    path, line = of_export(name, "migration-report.json"), 'printf "kvm1 "; cat'
    verify = f"ssh-keygen -Y verify -f /root/signers -I kvm1 -n hyper2kvmd-report -s {path}.sig <{path}"
    assert "Good" in machine.run("sh", "-c", f"({line} {key}.pub) >/root/signers; {verify}")
    # The group of those who may look may verify, too; the key itself is for the service alone.
    other = ("setpriv", "--reuid=hypersdk", "--regid=hypersdk", "--clear-groups")
    machine.run(*other, "hyper2kvmctl", "report", "verify", name)
    machine.run(*other, "cat", key, accept=(1,))
    configure(machine)


def test_what_other_tools_export_is_migrated_by_the_services_user(machine: Container, tmp_path: Path) -> None:
    off = {"enabled": False}  # the disks hold no system
    settings = {**SETTINGS, "ovf": {"accept": True}, "pipeline": {"inspect": off, "fix": off}}
    machine.write(CONFIG, json.dumps(settings))
    machine.run("systemctl", "reload", "hyper2kvmd")
    export_ovf(tmp_path / "db01")
    descriptor = export_ovf(tmp_path / "files", None)
    descriptor.write_text(descriptor.read_text().replace("<Name>db01</Name>", "<Name>db02</Name>"))
    pack(descriptor, tmp_path / "db02" / "db02.ova")
    exports = machine.root / EXPORTS.lstrip("/")
    for name in ("db01", "db02"):  # by root, who thinks of no group
        shutil.copytree(tmp_path / name, exports / f".{name}")
        (exports / f".{name}").rename(exports / name)
    for name, files in (("db01", tmp_path / "db01"), ("db02", descriptor.parent)):
        document = report(machine, name)
        assert "succeeded" == document["status"], document["error"]
        assert "hyper2kvm" == document["host"]["user"]
        for number, disk in enumerate(DISKS):
            target = machine.root / IMAGES.lstrip("/") / f"{name}-disk-{number}.qcow2"
            argv = ("qemu-img", "compare", "-f", "vmdk", "-F", "qcow2", files / disk, target)
            subprocess.run(argv, check=True, capture_output=True)
    assert "db02" in machine.run("hyper2kvmctl", "list")
    configure(machine)


def test_the_service_keeps_to_the_plan_that_root_imports(machine: Container, drop: Drop) -> None:
    configure(machine)
    machine.write("/root/plan.csv", "vm,name,hold\nplanned,shop,\nplanned-later,,yes\n")
    machine.run("hyper2kvmctl", "plan", "import", "/root/plan.csv")
    later, planned = drop("planned-later"), drop("planned")
    assert ("succeeded", "shop") == (report(machine, planned)["status"], report(machine, planned)["vm_name"])
    rows = json.loads(machine.run("hyper2kvmctl", "list", "--json"))
    assert ["held"] == [row["reason"]["code"] for row in rows if row["export"] == f"{EXPORTS}/{later}"]
    assert not exists(machine, of_export(later, "migration-report.json"))
    machine.run("rm", "-r", "/etc/hyper2kvmd/plan.d")
    assert "succeeded" == report(machine, later)["status"]


def test_an_upgrade_waits_for_the_jobs_that_run(machine: Container, drop: Drop, packages: dict[str, Path]) -> None:
    hold(machine, "convert")
    first = drop("first")
    wait_until(lambda: 1 == calls(machine, "convert"), "the conversion has begun")
    before = ours(machine)
    assert 2 == len(before), "the daemon and the job"

    said = install(machine, packages[NEXT])
    assert "hyper2kvmd.service: starts no more jobs, and restarts when the running ones are over\n" in said
    assert f"hyper2kvmd {NEXT}" == machine.run("hyper2kvmd", "--version").strip()
    second = drop("second")
    told = r"1 running \(first .*\), 1 queued, .*, ends with its last job, then restarts"
    wait_until(lambda: bool(re.fullmatch(told, show(machine, "StatusText"))), "the second waits")
    assert before == ours(machine), "the old daemon and its job are alive"
    assert __version__ == version(machine)
    assert [__version__, NEXT] == trees(machine), "the job finds the rest of its own version"

    machine.run("rm", "/run/hold")
    for name in (first, second):
        document = report(machine, name)
        assert ("succeeded", 1) == (document["status"], document["attempts"]), document["error"]
        assert is_same(machine, name)
    assert NEXT == version(machine)
    assert [NEXT] == trees(machine)


def test_an_upgrade_that_does_not_accept_the_settings_lets_the_old_version_go_on(
    machine: Container, packages: dict[str, Path]
) -> None:
    machine.write(CONFIG, "worker: 2\n")
    pid = main_pid(machine)
    said = install(machine, packages[NEXT])
    assert "did you mean workers?" in said
    assert "hyper2kvmd.service: keeps running the old version" in said
    assert pid == main_pid(machine)
    configure(machine)
    machine.run("/bin/sh", "-c", said.split("Correct them, then run: ")[1].splitlines()[0])
    wait_until(lambda: main_pid(machine) not in (0, pid) and is_up(machine), "the new daemon runs")
    assert [NEXT] == trees(machine)


def test_several_instances_work_beside_each_other(machine: Container, drop: Drop) -> None:
    """As docs/install.md has it: settings, exports and work of its own; the rest is shared."""
    settings = {
        **SETTINGS,
        "exports_dir": "/srv/exports",
        "work_dir": "/var/lib/hyper2kvmd/instances/site2/work",
        "metrics": {"listen": "127.0.0.1:9879"},
    }
    settings_file = "/etc/hyper2kvmd/site2/hyper2kvmd.yaml"
    machine.write(settings_file, yaml.safe_dump(settings))
    example = "/usr/share/doc/hyper2kvmd/examples/exports.conf"
    machine.run("install", "-D", "-m", "0644", example, "/etc/systemd/system/hyper2kvmd@site2.service.d/exports.conf")
    machine.run("install", "-d", "-o", "hypersdk", "-g", "hypersdk", "-m", "2770", "/srv/exports")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "hyper2kvmd@site2")
    name = drop("elsewhere")
    assert "succeeded" == report(machine, name)["status"]
    machine.run("mv", f"{EXPORTS}/{name}", f"/srv/exports/{name}2")
    machine.run("sh", "-c", f"rm /srv/exports/{name}2/migration-report.json {IMAGES}/{name}*")
    wait_until(lambda: content(machine, f"/srv/exports/{name}2/migration-report.json") is not None, "it is migrated")
    document = content(machine, f"/srv/exports/{name}2/migration-report.json")
    assert document is not None
    assert "succeeded" == document["status"], document["error"]
    doctor = ("hyper2kvmctl", "doctor", "--config", settings_file, "--json", "service", "metrics")
    found = json.loads(machine.run(*doctor, accept=(0, 1)))
    details = {row["check"]: (row["result"], row["detail"]) for row in found}
    assert ("warning", "hyper2kvmd@site2.service is disabled: after the next boot of the host nothing is migrated") == (
        details["service"]
    )
    assert "ok" == details["metrics"][0], details
    machine.run("systemctl", "stop", "hyper2kvmd@site2")
    machine.run("rm", "-r", "/etc/systemd/system/hyper2kvmd@site2.service.d")
    assert "active" == show(machine, "ActiveState"), "the other one is not concerned"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "systemd/examples").iterdir()))
def test_systemd_has_nothing_to_say_against_an_example(machine: Container, name: str) -> None:
    directory = "/run/systemd/system/hyper2kvmd.service.d"
    machine.run("install", "-D", "-t", directory, "-m", "0644", f"/usr/share/doc/hyper2kvmd/examples/{name}")
    try:
        assert "" == machine.run("systemd-analyze", "verify", "hyper2kvmd.service")
    finally:
        machine.run("rm", "-r", directory)


def test_purged_it_leaves_nothing_but_exports_and_images(machine: Container) -> None:
    machine.run("rm", "-rf", str(Path(APPLIANCE_DROP_IN).parent))
    kept = images(machine)
    assert kept
    machine.run("apt-get", "-q", "-y", "remove", "hyper2kvmd")
    assert "inactive" == show(machine, "ActiveState")
    assert {} == processes(machine)
    assert not exists(machine, LIBRARIES)
    assert exists(machine, CONFIG), "only a purge removes what people wrote"

    machine.run("apt-get", "-q", "-y", "purge", "hyper2kvmd")
    machine.run("getent", "passwd", "hyper2kvm", accept=(2,))
    places = ("/etc", "/usr", "/lib", "/var", "/run", "/root")
    everywhere = machine.run("find", *places, "-xdev", "-name", "*hyper2kvm*", timeout=120).split()
    # What apt and man keep of all packages, and the file that was installed.
    others = (EXPORTS, "/var/lib/apt/", "/var/cache/apt/", "/var/cache/man/", "/root/")
    left = [path for path in everywhere if not path.startswith(others)]
    assert [] == left
    assert kept == images(machine)
    assert {"root"} == set(machine.run("sh", "-c", f"stat -c %U {IMAGES}/*").split())
    assert content(machine, of_export("web01", "migration-report.json")) is not None
    assert "hyper2kvm" not in machine.run("getfacl", "-cp", IMAGES)
