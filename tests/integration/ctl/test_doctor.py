"""What the doctor says of this host, and of one fault after the other, each planted for real."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hyper2kvmd.ctl.doctor import CHECKS
from hyper2kvmd.ctl.doctor.host import PROGRAMS, UNPACKERS
from hyper2kvmd.daemon.metrics import Metrics
from hyper2kvmd.daemon.web import Web
from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.run import QEMU
from hyper2kvmd.settings.model import Settings
from tests import virtiowin
from tests.conftest import MakeExport
from tests.e2e.container import Container, booted, wait_until
from tests.e2e.test_systemd import EXPORTS, configure, install_program, install_service
from tests.integration.daemon.test_metrics import certificate
from tests.libvirtd import session

pytestmark = pytest.mark.timeout(1800)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this as somebody else, or to a daemon")
NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")


@dataclass(frozen=True)
class Report:
    """What the doctor printed as JSON, and its exit status."""

    status: int
    rows: list[dict[str, Any]]

    def faults(self) -> list[tuple[str, str, str]]:
        """Check, result and code of all that is wrong."""
        return [(row["check"], row["result"], row["finding"]["code"]) for row in self.rows if row["finding"]]

    def only(self) -> tuple[str, str]:
        """Message and remedy of the one thing that is wrong."""
        ((message, hint),) = [
            (row["finding"]["message"], row["finding"]["hint"]) for row in self.rows if row["finding"]
        ]
        return message, hint

    def detail(self, check: str) -> str:
        """What a check found, of which nothing is wrong."""
        (row,) = (row for row in self.rows if row["check"] == check)
        assert ("ok", None) == (row["result"], row["finding"])
        return str(row["detail"])


Doctor = Callable[..., Report]


@pytest.fixture
def doctor(scratch: Settings, tmp_path: Path) -> Doctor:
    """Runs the named checks on `scratch`, with the appliance that libguestfs makes by itself.

    setup: what root does before, in a mount namespace of the doctor's own. program: what Python runs.
    """
    config = tmp_path / "doctor.json"
    config.write_text(scratch.model_dump_json(by_alias=True))

    def run(
        *checks: str,
        setup: str = "",
        by: tuple[str, ...] = (),
        program: tuple[str, ...] = ("-m", "hyper2kvmd.ctl"),
        **settings: Any,
    ) -> Report:
        before = by
        if setup:
            apart = ("unshare", "--user", "--map-root-user", "--mount", "--")
            before = (*apart, "sh", "-ec", f'{setup}\nexec "$@"', "sh")
        overrides = [f"--set={key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
        done = subprocess.run(
            [
                *before,
                sys.executable,
                *program,
                "doctor",
                *checks,
                "--json",
                f"--config={config}",
                *overrides,
            ],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=200,
            env={name: value for name, value in os.environ.items() if name != "LIBGUESTFS_PATH"},
        )
        assert done.stdout, done.stderr
        return Report(done.returncode, json.loads(done.stdout))

    return run


# The host ---------------------------------------------------------------------------------------------------


def test_this_host_is_in_order_and_nothing_is_left_behind(
    doctor: Doctor, make_export: MakeExport, scratch: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("LIBGUESTFS_CACHEDIR", "/var/tmp")  # where libguestfs keeps its appliance by itself
    make_export()
    with session(tmp_path) as uri, connect(uri) as connection:
        before = set(tmp_path.rglob("*"))
        report = doctor(libvirt__import=True, libvirt__uri=uri, libvirt__default_network="user")
        assert set() == set(tmp_path.rglob("*")) - before
        assert [] == connection.listAllDomains()
    assert [] == list(temporary.iterdir())
    # What a machine without KVM and without Windows guests lacks is no failure.
    unavoidable = {("kvm", "warning", "kvm_unusable"), ("windows", "warning", "virtio_win_missing")}
    lzop = {("programs", "warning", "tool_missing")}
    assert set() == {*report.faults()} - unavoidable - lzop
    assert 0 == report.status
    assert [*CHECKS] == list(dict.fromkeys(row["check"] for row in report.rows))
    assert "the appliance starts" in report.detail("libguestfs")
    assert report.detail("libvirt").endswith("a domain was defined and undefined")
    assert "exports: 1" in report.detail("exports")
    assert "2 directories" in report.detail("watching")


def test_every_fault_is_printed_with_its_remedy(ctl: Any, scratch: Settings) -> None:
    scratch.output_dir.rmdir()
    done = ctl("doctor", "locks", "output")
    lines = [
        "ok      locks: flock works",
        f"failed  output: {scratch.output_dir}: No such file or directory",
        "        Create or mount it, or change the setting.",
    ]
    assert (1, lines) == (done.returncode, done.stdout.splitlines())


def test_an_unknown_check_is_a_usage_error_that_names_the_known_ones(ctl: Any) -> None:
    done = ctl("doctor", "lock", "output")
    assert 2 == done.returncode
    assert "lock: choose from user, settings, programs, exports," in done.stderr


# Programs and machines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["setpriv", "qemu-img", "qemu-system-x86_64", "lz4"])
def test_a_missing_program_is_named_with_its_package(
    missing: str, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "bin"
    directory.mkdir()
    for program in {*PROGRAMS, QEMU[0], *UNPACKERS} - {missing}:
        # All of them are there, whatever this host lacks.
        (directory / program).symlink_to(shutil.which(program) or "/bin/true")
    monkeypatch.setenv("PATH", str(directory))
    report = doctor("programs")
    result = "warning" if missing in UNPACKERS else "failed"
    assert [("programs", result, "tool_missing")] == report.faults()
    assert (1 if result == "failed" else 0) == report.status
    message, hint = report.only()
    assert message.startswith(f"{missing} is not installed")
    assert hint.startswith(f"Install {PROGRAMS.get(missing, missing.removesuffix('_64'))}")


def test_a_program_that_does_not_run_is_a_failure(doctor: Doctor, fake: Callable[[str, str], None]) -> None:
    fake("qemu-img", "echo 'libaio.so.1: cannot open shared object file' >&2; exit 127")
    report = doctor("programs")
    assert ("programs", "failed", "tool_failed") in report.faults()
    assert any("libaio.so.1" in row["detail"] for row in report.rows)


def test_memory_for_fewer_jobs_than_workers_is_a_warning_and_for_none_a_failure(doctor: Doctor) -> None:
    some = doctor("memory", workers=256, guest__memory_mb=1024)
    assert (0, [("memory", "warning", "no_memory")]) == (some.status, some.faults())
    assert "Set workers to " in some.only()[1]
    none = doctor("memory", guest__memory_mb=1 << 30)
    assert (1, [("memory", "failed", "no_memory")]) == (none.status, none.faults())


def test_kvm_that_is_wanted_and_does_not_work_is_a_failure(
    doctor: Doctor, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIBGUESTFS_BACKEND_SETTINGS", raising=False)
    fake("qemu-system-x86_64", "echo 'error: KVM is not for you' >&2; exit 1")
    wanted = doctor("kvm", guest__accel="kvm")
    assert (1, [("kvm", "failed", "appliance_failed")]) == (wanted.status, wanted.faults())
    assert "virtualisation" in wanted.only()[1]
    if_possible = doctor("kvm")
    assert (0, [("kvm", "warning", "kvm_unusable")]) == (if_possible.status, if_possible.faults())


def test_a_host_without_a_kernel_for_the_appliance_is_told_so(doctor: Doctor) -> None:
    report = doctor("libguestfs", setup="mount -t tmpfs tmpfs /boot")
    assert (1, [("libguestfs", "failed", "appliance_failed")]) == (report.status, report.faults())
    assert "install a kernel package" in report.only()[1]


def test_drivers_for_windows_are_looked_for(doctor: Doctor, tmp_path: Path) -> None:
    setup = "mount -t tmpfs tmpfs /usr/share"
    none = doctor("windows", setup=setup)
    assert (0, [("windows", "warning", "virtio_win_missing")]) == (none.status, none.faults())
    iso = virtiowin.iso(tmp_path / "virtio-win.iso", virtiowin.tree())
    detail = doctor("windows", setup=f"{setup}; mkdir /usr/share/virtio-win; cp {iso} /usr/share/virtio-win").detail(
        "windows"
    )
    assert "/usr/share/virtio-win/virtio-win.iso: " in detail
    assert " 2k12R2 test-signed only, w10 yes, w10/x86 yes, 2k16 yes, " in detail


def test_drivers_that_cannot_be_used_are_said_of_one_family_or_of_all(doctor: Doctor, tmp_path: Path) -> None:
    files = virtiowin.tree() | {"viostor/2k22/amd64/viostor.sys": virtiowin.program("x86")}
    report = doctor("windows", fix__virtio_win=str(virtiowin.write(tmp_path / "drivers", files)))
    assert (0, [("windows", "warning", "drivers_unusable")]) == (report.status, report.faults())
    (covered,) = (row["detail"] for row in report.rows if row["result"] == "ok")
    assert " 2k19 yes, 2k22 unusable, w11 yes, " in covered
    report = doctor("windows", fix__virtio_win=str(tmp_path))
    assert (1, [("windows", "failed", "drivers_unusable")]) == (report.status, report.faults())
    assert "is not a virtio-win: there is no viostor in it" in report.only()[0]


# Directories ------------------------------------------------------------------------------------------------


def test_a_missing_exports_directory_is_named(doctor: Doctor, scratch: Settings) -> None:
    scratch.exports_dir.rmdir()
    report = doctor("exports")
    assert (1, [("exports", "failed", "io_error")]) == (report.status, report.faults())
    assert str(scratch.exports_dir) in report.only()[0]


def test_an_exports_directory_that_cannot_be_written_is_a_failure(doctor: Doctor, scratch: Settings) -> None:
    report = doctor("exports", setup=f"mount -t tmpfs -o ro tmpfs {scratch.exports_dir}")
    assert (1, [("exports", "failed", "export_unwritable")]) == (report.status, report.faults())
    assert "Read-only file system" in report.only()[0]


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody can get to, as they cannot to pytest's own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="hyper2kvmd-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@as_root
@pytest.mark.parametrize("obstacle", ["web01", "web01/disk.vmdk", "web01/.hyper2kvmd.lock"])
def test_an_export_that_the_service_cannot_use_is_a_warning_whose_remedy_works(
    obstacle: str, ctl: Any, public: Path
) -> None:
    exports = public / "exports"
    (exports / "web01").mkdir(parents=True)
    (exports / "web01/disk.vmdk").touch()
    (exports / "web01/.hyper2kvmd.lock").touch()
    for path, mode in ((exports, 0o777), (exports / "web01", 0o777), *((p, 0o666) for p in exports.glob("web01/*"))):
        path.chmod(mode)
    (exports / obstacle).chmod(0o755 if obstacle == "web01" else 0o640)

    def look() -> Report:
        command = [*NOBODY, sys.executable, "-m", "hyper2kvmd.ctl", "doctor", "exports", "--json"]
        done = subprocess.run([*command, f"--set=exports_dir={exports}"], capture_output=True, text=True, check=False)
        return Report(done.returncode, json.loads(done.stdout))

    report = look()
    assert (0, [("exports", "warning", "export_unwritable")]) == (report.status, report.faults())
    message, hint = report.only()
    assert f"nobody cannot use {obstacle} in {exports}" in message
    subprocess.run(hint.split("`")[1].split(), check=True)
    assert "exports: 1" in look().detail("exports")
    (exports / ".hyper2kvmd.hosts").mkdir(0o755)  # by a host whose service has another number
    assert (1, [("exports", "failed", "export_unwritable")]) == ((other := look()).status, other.faults())
    assert "another host reports as number 0" in other.only()[0]
    assert "same number on all hosts" in other.only()[1]


@pytest.fixture
def foreign(scratch: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A FUSE file system on the exports directory, as network file systems are; the process that serves it."""
    behind = scratch.exports_dir.parent / "behind"
    behind.mkdir()
    server = subprocess.Popen(["bindfs", "-f", behind, scratch.exports_dir])
    try:
        wait_until(scratch.exports_dir.is_mount, "bindfs is mounted", 10)
        yield server
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "--lazy", scratch.exports_dir], check=False)
        server.terminate()
        server.wait(120)


def test_where_others_write_too_watching_by_inotify_is_a_warning(
    doctor: Doctor, foreign: subprocess.Popen[bytes]
) -> None:
    report = doctor("watching", "locks", watch__mode="inotify")
    assert (0, [("watching", "warning", "not_seen")]) == (report.status, report.faults())
    assert "Set watch.mode to auto" in report.only()[1]
    assert "is looked at every 0.3 s" in doctor("watching").detail("watching")


def test_a_file_server_that_is_gone_is_a_failure_within_seconds(
    doctor: Doctor, foreign: subprocess.Popen[bytes], scratch: Settings
) -> None:
    foreign.send_signal(signal.SIGSTOP)
    report = doctor("exports")
    assert (1, [("exports", "failed", "io_error")]) == (report.status, report.faults())
    assert f"no answer from {scratch.exports_dir}" in report.only()[0]


def test_too_few_watches_are_a_warning_that_names_the_limit(doctor: Doctor, make_export: MakeExport) -> None:
    for n in range(3):
        make_export(f"web{n}")
    report = doctor("watching", setup="echo 2 >/proc/sys/user/max_inotify_watches")
    assert (0, [("watching", "warning", "not_watched")]) == (report.status, report.faults())
    message, hint = report.only()
    assert "4 in all, cannot be watched: No space left on device" in message
    assert "Raise fs.inotify.max_user_watches (now " in hint


@pytest.mark.parametrize("check", ["output", "work"])
def test_a_full_file_system_is_a_failure(check: str, doctor: Doctor, scratch: Settings) -> None:
    directory = {"output": scratch.output_dir, "work": scratch.work_dir}[check]
    report = doctor(check, setup=f"mount -t tmpfs -o size=64m tmpfs {directory}")
    assert (1, [(check, "failed", "no_space")]) == (report.status, report.faults())
    message, hint = report.only()
    assert f"{directory} has 64 MiB free; a job needs 512 MiB" in message
    assert f"set {check}_dir to a larger file system" in hint


@pytest.mark.parametrize("check", ["output", "work"])
def test_a_directory_that_cannot_be_written_is_a_failure(check: str, doctor: Doctor, scratch: Settings) -> None:
    directory = {"output": scratch.output_dir, "work": scratch.work_dir}[check]
    report = doctor(check, setup=f"mount -t tmpfs -o ro tmpfs {directory}")
    assert (1, [(check, "failed", "output_denied")]) == (report.status, report.faults())
    assert f"cannot write to {directory}: Read-only file system" in report.only()[0]


def test_every_output_directory_is_checked(doctor: Doctor, tmp_path: Path) -> None:
    report = doctor("output", output__allowed_dirs=[str(tmp_path), str(tmp_path / "none")])
    assert (1, [("output", "failed", "io_error")]) == (report.status, report.faults())
    assert str(tmp_path / "none") in report.only()[0]


def test_a_work_directory_may_be_missing_if_it_can_be_made(doctor: Doctor, scratch: Settings) -> None:
    work = str(scratch.work_dir / "not/yet")
    assert f"{work} is made by the first job" in doctor("work", work_dir=work).detail("work")
    report = doctor("work", setup=f"mount -t tmpfs -o ro tmpfs {scratch.work_dir}", work_dir=work)
    assert (1, [("work", "failed", "io_error")]) == (report.status, report.faults())
    assert f"install -d -o root -m 0750 {work}" in report.only()[1]


# Settings ---------------------------------------------------------------------------------------------------


def test_settings_that_others_can_change_are_a_warning(doctor: Doctor, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    report = doctor("settings")
    assert (0, [("settings", "warning", "settings_writable")]) == (report.status, report.faults())
    assert f"chmod go-w {tmp_path}" in report.only()[1]


def test_a_key_that_everybody_can_read_is_a_failure(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    report = doctor("settings", fix__luks_keys={"web01": str(tmp_path / "key")})
    assert (1, [("settings", "failed", "guest_encrypted")]) == (report.status, report.faults())
    assert "secret" not in json.dumps(report.rows)


def test_a_metrics_address_that_another_program_has_is_a_failure(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        report = doctor("metrics", metrics__listen=listen)
    assert (1, [("metrics", "failed", "io_error")]) == (report.status, report.faults())
    assert f"{listen} cannot be used: Address already in use" in report.only()[0]
    assert f"{listen} is free" == doctor("metrics", metrics__listen=listen).detail("metrics")


def test_a_metrics_address_that_the_daemon_has_is_in_order(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    Web({"/metrics": Metrics().page}).apply(Settings.model_validate({"metrics": {"listen": listen}}).metrics)
    assert f"{listen}, served by hyper2kvmd" == doctor("metrics", metrics__listen=listen).detail("metrics")


def test_a_metrics_address_with_tls_is_in_order_if_who_has_it_has_our_certificate(
    doctor: Doctor, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    for name in ("server", "other"):
        certificate(tmp_path, name)
    pair = {"cert_file": f"{tmp_path}/server.pem", "key_file": f"{tmp_path}/server.key"}
    closed = {**pair, "client_ca_file": pair["cert_file"], "client_auth_type": "RequireAndVerifyClientCert"}
    metrics = {"listen": listen, "tls_server_config": closed}
    Web({}).apply(Settings.model_validate({"metrics": metrics}).metrics)
    found = doctor("metrics", metrics__listen=listen, metrics__tls_server_config=closed)
    assert f"{listen}, served by hyper2kvmd" == found.detail("metrics")
    others = {"cert_file": f"{tmp_path}/other.pem", "key_file": f"{tmp_path}/other.key"}
    found = doctor("metrics", metrics__listen=listen, metrics__tls_server_config=others)
    assert [("metrics", "failed", "io_error")] == found.faults()


def test_a_metrics_address_that_the_host_does_not_have_is_a_failure(doctor: Doctor) -> None:
    report = doctor("metrics", metrics__listen="192.0.2.1:9878", metrics__allow_insecure=True)
    assert (1, [("metrics", "failed", "io_error")]) == (report.status, report.faults())


# libvirt ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URI of a libvirt, and the directory of its daemon."""
    directory = tmp_path_factory.mktemp("libvirtd")
    with session(directory) as uri:
        yield uri, directory / "libvirt"


def about(uri: str, **changes: Any) -> dict[str, Any]:
    return {"libvirt__import": True, "libvirt__uri": uri, "libvirt__default_network": "user", **changes}


def test_libvirt_that_is_not_there_is_a_failure(doctor: Doctor, tmp_path: Path) -> None:
    report = doctor("libvirt", **about(f"qemu+unix:///system?socket={tmp_path}/none"))
    assert (1, [("libvirt", "failed", "libvirt_unavailable")]) == (report.status, report.faults())
    assert "systemctl start libvirtd" in report.only()[1]


def test_every_network_and_pool_of_the_settings_must_be_there(doctor: Doctor, libvirtd: tuple[str, Path]) -> None:
    networks = {"VM Network": "lan", "DMZ": "dmz@20", "Other": "lan"}
    report = doctor("libvirt", **about(libvirtd[0], libvirt__network_map=networks, libvirt__pool="disks"))
    faults = ["network_missing", "network_missing", "pool_missing"]
    assert (1, faults) == (report.status, sorted(code for _, _, code in report.faults()))
    text = " ".join(row["detail"] for row in report.rows)
    assert all(f"'{name}'" in text for name in ("lan", "dmz", "disks"))


@contextlib.contextmanager
def hidden(daemon: Path, setup: str, path: str) -> Iterator[None]:
    """Something mounted over a path, for a daemon only."""
    enter = ["nsenter", f"--target={(daemon / 'pid').read_text().strip()}", "--mount", "--"]
    subprocess.run([*enter, *setup.split(), path], check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "umount", path], check=True)


@as_root
def test_missing_uefi_firmware_is_a_failure(doctor: Doctor, libvirtd: tuple[str, Path]) -> None:
    uri, daemon = libvirtd
    with hidden(daemon, "mount -t tmpfs tmpfs", "/usr/share/qemu/firmware"):
        report = doctor("libvirt", **about(uri))
    assert (1, [("libvirt", "failed", "firmware_missing")] * 2) == (report.status, report.faults())
    assert {"Install the package ovmf (edk2-ovmf outside Debian and Ubuntu)."} == {
        row["finding"]["hint"] for row in report.rows
    }


@as_root
def test_a_missing_tpm_emulator_is_a_warning(doctor: Doctor, libvirtd: tuple[str, Path]) -> None:
    uri, daemon = libvirtd
    with hidden(daemon, "mount --bind /dev/null", shutil.which("swtpm") or ""):
        report = doctor("libvirt", **about(uri))
    assert (0, [("libvirt", "warning", "tool_missing")]) == (report.status, report.faults())
    assert "Install the packages swtpm" in report.only()[1]


# hyper2kvmctl that waits for an answer for seconds only.
IMPATIENT = """
import sys
from hyper2kvmd.hypervisor import connection
connection.ANSWER_SECONDS = 3.0
from hyper2kvmd.ctl import main
sys.exit(main())
"""


@as_root
def test_libvirt_that_hangs_is_a_failure_within_seconds(doctor: Doctor, libvirtd: tuple[str, Path]) -> None:
    uri, daemon = libvirtd
    pid = int((daemon / "pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        report = doctor("libvirt", program=("-c", IMPATIENT), **about(uri))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (1, [("libvirt", "failed", "libvirt_unavailable")]) == (report.status, report.faults())
    assert "systemctl restart libvirtd" in report.only()[1]


@as_root
def test_directories_that_libvirts_qemu_may_not_enter_are_named(doctor: Doctor, public: Path, tmp_path: Path) -> None:
    images = public / "closed/images"
    images.mkdir(parents=True)
    images.parent.chmod(0o700)
    with session(tmp_path, account="libvirt-qemu") as uri:
        report = doctor("libvirt", **about(uri, output_dir=str(images)))
        assert (0, [("libvirt", "warning", "qemu_denied")]) == (report.status, report.faults())
        message, hint = report.only()
        assert f"libvirt's QEMU, which runs as libvirt-qemu, cannot open a disk in {images}:" in message
        assert f"libvirt-qemu may not enter {images.parent}." in hint
        subprocess.run(hint.split("`")[1].split(), check=True)
        assert [] == doctor("libvirt", **about(uri, output_dir=str(images))).faults()


# The service ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> Iterator[Container]:
    """A machine with a real systemd and the program, but without the service."""
    if os.geteuid() != 0:
        pytest.skip("a container can be started by root only")
    with booted() as container:
        install_program(container)
        container.run(
            "rm", "-f", "/etc/systemd/system/hyper2kvmd.service", "/usr/lib/systemd/system/hyper2kvmd.service"
        )
        container.run("systemctl", "daemon-reload")
        yield container


@pytest.fixture
def service(machine: Container) -> Iterator[Container]:
    """The machine with the service installed and its settings at their defaults; as new."""
    install_service(machine)
    configure(machine)
    yield machine
    machine.run("systemctl", "disable", "--now", "hyper2kvmd")
    machine.run("systemctl", "reset-failed", "hyper2kvmd", accept=(0, 1))


def inside(machine: Container, *checks: str, by: tuple[str, ...] = ()) -> Report:
    """What the doctor says who is called by root in there."""
    program = ("/opt/hyper2kvmd/bin/python", "-m", "hyper2kvmd.ctl", "doctor", "--json")
    rows = json.loads(machine.run(*by, *program, *checks, accept=(0, 1)))
    return Report(int(any(row["result"] == "failed" for row in rows)), rows)


def test_a_service_that_is_not_installed_is_a_warning(machine: Container) -> None:
    report = inside(machine, "user", "service")
    assert [("service", "warning", "service_missing")] == report.faults()
    assert "/etc/systemd/system" in report.only()[1]


def test_a_service_that_neither_runs_nor_will_is_a_warning_and_one_that_does_is_in_order(service: Container) -> None:
    report = inside(service, "service")
    faults = [("service", "warning", "service_disabled"), ("service", "warning", "service_inactive")]
    assert (0, faults) == (report.status, report.faults())
    service.run("systemctl", "enable", "--now", "hyper2kvmd")
    report = inside(service, "service", "metrics")
    assert "hyper2kvmd.service is enabled and active" == report.detail("service")
    assert "served by hyper2kvmd" in report.detail("metrics")


def test_root_sees_what_the_user_of_the_service_sees(service: Container) -> None:
    user, groups = inside(service, "user").detail("user").split(", in the groups ")
    # by their numbers, which each system gives them in an order of its own
    assert ("hyper2kvm", ["hyper2kvm", "hypersdk", "kvm", "libvirt"]) == (user, sorted(groups.split(", ")))
    service.run("chmod", "0700", EXPORTS)
    report = inside(service, "exports")
    assert (1, [("exports", "failed", "io_error")]) == (report.status, report.faults())
    assert f"{EXPORTS}: Permission denied" == report.only()[0]


def test_a_queue_that_exporters_do_not_find_or_that_we_cannot_use_is_named(service: Container) -> None:
    configure(service, hypersdk={"queue_dir": "/var/lib/hyper2kvm/queue", "output_dir": "/srv/answers"})
    try:
        report = inside(service, "handover", "service")
        assert [("io_error", "hypersdk.queue_dir"), ("io_error", "hypersdk.output_dir")] == [
            (row["finding"]["code"], row["finding"]["field"])
            for row in report.rows
            if row["check"] == "handover" and row["result"] == "failed"
        ]
        assert any("ReadWritePaths=/srv/answers" in row["finding"]["hint"] for row in report.rows if row["finding"])
        for row in report.rows:
            if row["check"] == "handover" and row["result"] == "failed":
                command = row["finding"]["hint"].split("`")[1]
                assert command.startswith("install -d -o hyper2kvm -g hypersdk -m 2770 ")
                service.run(*command.split())
        service.run("systemctl", "disable", "hyper2kvmd")
        report = inside(service, "handover")
        assert (0, [("handover", "warning", "handover_unseen")]) == (report.status, report.faults())
        service.run(*report.only()[1].split("`")[1].split())
        assert [] == inside(service, "handover").faults()
    finally:
        service.run("rm", "-rf", "/var/lib/hyper2kvm", "/srv/answers")


def test_somebody_else_is_told_so_and_what_they_lack(service: Container) -> None:
    service.run("rm", "-rf", "/var/lib/hyper2kvmd/work")
    report = inside(service, "user", "exports", "work", "kvm", by=NOBODY)
    faults = [
        ("user", "warning", "other_user"),
        ("exports", "failed", "export_unwritable"),
        ("work", "failed", "io_error"),
        ("kvm", "warning", "kvm_unusable"),
    ]
    assert faults == report.faults()


def test_directories_outside_of_the_sandbox_are_named_with_the_line_to_write(service: Container) -> None:
    configure(service, output_dir="/srv/images", output={"allowed_dirs": ["/home/images", "/var/tmp/images"]})
    report = inside(service, "service")
    lines = {
        "/srv/images": "[Service], ReadWritePaths=/srv/images,",
        "/home/images": "[Service], ProtectHome=no, ReadWritePaths=/home/images,",
        "/var/tmp/images": "[Service], PrivateTmp=no, ReadWritePaths=/var/tmp/images,",
    }
    found = [row["finding"] for row in report.rows if row["result"] == "failed"]
    assert ["output_denied"] * 3 == [finding["code"] for finding in found]
    for finding, (directory, line) in zip(found, lines.items(), strict=True):
        assert f"keeps it from writing to {directory} " in finding["message"]
        assert line in finding["hint"]
    drop_in = "[Service]\nReadWritePaths=-/srv/images -/home/images -/var/tmp/images\nPrivateTmp=no\nProtectHome=no\n"
    service.write("/etc/systemd/system/hyper2kvmd.service.d/paths.conf", drop_in)
    service.run("systemctl", "daemon-reload")
    assert 0 == inside(service, "service").status
    service.run("rm", "-r", "/etc/systemd/system/hyper2kvmd.service.d")


def test_a_service_that_has_failed_is_a_failure(service: Container) -> None:
    configure(service, metrics={"listen": "192.0.2.1:9878", "allow_insecure": True})
    service.run("systemctl", "start", "hyper2kvmd", accept=(0, 1))
    report = inside(service, "service", "metrics")
    assert [("service", "tool_failed"), ("metrics", "io_error")] == [
        (check, code) for check, result, code in report.faults() if result == "failed"
    ]
    (failed,) = (row["finding"] for row in report.rows if (row["check"], row["result"]) == ("service", "failed"))
    assert "exit status 78" in failed["message"]
    assert "hyper2kvmd check-config" in failed["hint"]


def test_what_keeps_the_service_from_starting_is_a_failure(service: Container) -> None:
    unit = "[Service]\nSupplementaryGroups=nogroup-of-ours\nReadWritePaths=/srv/none\n"
    service.write("/etc/systemd/system/hyper2kvmd.service.d/bad.conf", unit)
    service.run("systemctl", "daemon-reload")
    report = inside(service, "service")
    messages = [row["detail"] for row in report.rows if row["result"] == "failed"]
    assert [
        "hyper2kvmd.service cannot start: there is no group nogroup-of-ours",
        "hyper2kvmd.service cannot start: ReadWritePaths= names /srv/none, which does not exist",
    ] == messages
    service.run("rm", "-r", "/etc/systemd/system/hyper2kvmd.service.d")
