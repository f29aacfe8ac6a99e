"""A cancel, or another attempt, after a runner that died at any step: no VM loses its disks, and nothing is left over.

The libvirt is one of the test's own, whose QEMU is root: what is proved is the order of steps, a hundred times. That
it holds with a libvirt as distributions ship it is in tests/e2e/test_host.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.settings.model import Settings
from tests.conftest import Ctl, MakeExport, left_in, report_of, run_job
from tests.integration.job.test_kill import start
from tests.libvirtd import session

DISK = "web01-disk-0.qcow2"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with session(tmp_path_factory.mktemp("libvirtd"), alone=True) as uri:
        yield uri


@pytest.fixture
def scratch(scratch: Settings, uri: str) -> Settings:
    """With the test's own libvirt, and a directory for hooks."""
    (hooks := scratch.work_dir.parent / "hooks").mkdir()
    (hooks / "pre-import").mkdir()
    shape = scratch.model_dump(by_alias=True)
    shape["libvirt"] |= {"uri": uri, "import": True, "default_network": "user", "start": True}
    shape["guest"] |= {"accel": "tcg"}
    shape["hooks"] |= {"directory": hooks}
    return Settings.model_validate(shape)


@pytest.fixture(autouse=True)
def nothing_is_left(uri: str) -> Iterator[None]:
    yield
    with connect(uri) as connection:
        for domain in connection.listAllDomains():
            if domain.isActive():
                domain.destroy()
            if domain.isPersistent():
                domain.undefine()


def domains(uri: str) -> dict[str, bool]:
    """The domains by name, and whether they run."""
    with connect(uri) as connection:
        return {domain.name(): bool(domain.isActive()) for domain in connection.listAllDomains()}


def virsh(uri: str, *arguments: str) -> None:
    subprocess.run(["virsh", "-q", "-c", uri, *arguments], check=True, stdout=subprocess.DEVNULL)


def stopped_by_a_hook(export: Path, settings: Settings) -> Path:
    """Have the disk published, and no domain; return the disk."""
    hook = settings.hooks.directory / "pre-import/no"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    run_job(export, settings)
    assert "hook_failed" == report_of(export)["error"]["code"]
    return settings.output_dir / DISK


def define(uri: str, disk: Path, name: str = "by-hand") -> None:
    with connect(uri) as connection:
        connection.defineXML(
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><os><type>hvm</type></os><devices>"
            f"<disk type='file'><driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda'/></disk>"
            "</devices></domain>"
        )


def dying(export: Path, settings: Settings, nth: int) -> int:
    """Run a job that is killed before its nth rename, if there are as many; how it ended."""
    calls = "rename,renameat,renameat2"
    inject = f"inject={calls}:signal=KILL:when={nth}"
    strace = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject)
    return start(export, settings, *strace).wait(timeout=120)


@pytest.mark.parametrize("then", ["cancel", "run again"])
@pytest.mark.parametrize("starts", [True, False], ids=["started", "defined"])
def test_a_runner_that_died_before_any_rename_is_brought_to_an_end(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, uri: str, starts: bool, then: str
) -> None:
    """The report, too, gets its name by a rename: before the last one, all is done but that."""
    scratch = scratch.model_copy(update={"libvirt": scratch.libvirt.model_copy(update={"start": starts})})
    seen: set[bool | None] = set()
    for nth in range(1, 20):
        export = make_export(name := f"vm{nth}")
        disk = scratch.output_dir / f"{name}-disk-0.qcow2"
        if dying(export, scratch, nth) == 0:
            assert {None, starts} == seen, "the domain was there before the report once, and before that it was not"
            return
        before = domains(uri).get(name)
        seen.add(before)
        if then == "cancel":
            done = ctl("cancel", name)
            # What runs is not cancelled any more.
            assert (1 if before else 0) == done.returncode, done.stderr
            assert ("succeeded" if before else "cancelled") == report_of(export)["status"]
            assert ({name: True} if before else {}) == domains(uri)
            assert bool(before) == disk.exists()
        else:
            assert 0 == run_job(export, scratch).returncode
            assert "succeeded" == report_of(export)["status"]
            assert {name: starts} == domains(uri)
            assert disk.exists()
        assert [] == left_in(scratch.work_dir)
        assert [] == list(scratch.output_dir.glob(".*"))
        for left in domains(uri):
            if domains(uri)[left]:
                virsh(uri, "destroy", left)
            virsh(uri, "undefine", left)
    pytest.fail("more than 20 renames")


def of_another_domain(uri: str, disk: Path) -> Callable[[], None]:
    define(uri, disk)
    return lambda: None


def of_a_running_domain(uri: str, disk: Path) -> Callable[[], None]:
    define(uri, disk)
    virsh(uri, "start", "by-hand")
    return lambda: None


def of_a_process(uri: str, disk: Path) -> Callable[[], None]:
    reader = subprocess.Popen(["qemu-io", "-r", "-f", "qcow2", disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdin and reader.stdout
    reader.stdin.write(b"read 0 512\n")
    reader.stdin.flush()
    reader.stdout.readline()

    def end() -> None:
        reader.communicate()

    return end


@pytest.mark.parametrize("use", [of_another_domain, of_a_running_domain, of_a_process])
def test_a_disk_that_somebody_uses_is_kept_and_the_remedy_works(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, uri: str, use: Callable[[str, Path], Callable[[], None]]
) -> None:
    export = make_export()
    disk = stopped_by_a_hook(export, scratch)
    end = use(uri, disk)
    done = ctl("cancel", "web01")
    assert 1 == done.returncode, done.stdout
    assert str(disk) in done.stderr
    assert disk.exists()
    report = report_of(export)
    assert ("cancelled", "output_kept") == (report["status"], report["warnings"][-1]["code"])
    before = domains(uri)

    end()
    for command in re.findall(r"`(virsh .*?)`", report["warnings"][-1]["hint"]):
        virsh(uri, *shlex.split(command)[1:])
    done = ctl("cancel", "web01")
    assert 0 == done.returncode, done.stderr
    assert not disk.exists()
    assert [] == left_in(scratch.work_dir)
    assert domains(uri) == {} or before == {}


def test_a_libvirt_that_does_not_answer_keeps_the_disks_and_a_retry_goes_on_with_them(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, uri: str
) -> None:
    export = make_export()
    disk = stopped_by_a_hook(export, scratch)
    inode = disk.stat().st_ino
    done = ctl("cancel", "web01", "--set", f"libvirt.uri={uri}-gone")
    assert 1 == done.returncode
    assert "libvirt did not say that no VM uses them" in done.stderr
    assert disk.exists()

    (scratch.hooks.directory / "pre-import/no").unlink()
    assert 0 == ctl("retry", "web01").returncode
    assert 0 == run_job(export, scratch).returncode
    assert ({"web01": True}, inode) == (domains(uri), disk.stat().st_ino)


def test_a_domain_of_the_job_that_has_run_is_not_undefined_while_it_keeps_a_saved_state(
    scratch: Settings, make_export: MakeExport, ctl: Ctl, uri: str
) -> None:
    export = make_export()
    for nth in range(1, 20):
        assert 0 != dying(export, scratch, nth), "it died before its report"
        if domains(uri).get("web01"):
            break
    virsh(uri, "managedsave", "web01")
    done = ctl("cancel", "web01")
    assert 1 == done.returncode, done.stdout
    assert "managed save" in done.stderr
    assert (scratch.output_dir / DISK).exists()
    virsh(uri, "managedsave-remove", "web01")
    assert 0 == ctl("cancel", "web01").returncode
    assert ({}, False) == (domains(uri), (scratch.output_dir / DISK).exists())
