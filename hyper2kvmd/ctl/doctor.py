"""`hyper2kvmctl doctor`: what the host needs, checked for real, with the remedy for what is missing."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import grp
import http.client
import itertools
import os
import pwd
import re
import shlex
import shutil
import socket
import ssl
import stat
import sys
import tempfile
import threading
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import libvirt
from rich.console import Console

from hyper2kvmd import accel
from hyper2kvmd.ctl import print_json
from hyper2kvmd.domain.model import Domain, DomainDisk, DomainNic, generated_mac
from hyper2kvmd.domain.xml import to_xml
from hyper2kvmd.errors import Cancelled, Code, Finding, MigrationError, Noted
from hyper2kvmd.exits import EXIT_DONE, EXIT_FAILED, EXIT_USAGE
from hyper2kvmd.files import existing_parent
from hyper2kvmd.guest import keys
from hyper2kvmd.guest.session import check_host, open_guest
from hyper2kvmd.hypervisor.connection import ANSWER_SECONDS as LIBVIRT_SECONDS
from hyper2kvmd.hypervisor.connection import connect, libvirt_version, unanswered, virt_type
from hyper2kvmd.hypervisor.define import define
from hyper2kvmd.hypervisor.preflight import preflight
from hyper2kvmd.image import qemu_img
from hyper2kvmd.job.plan import FIX_SPACE, LUKS_MEMORY_MB
from hyper2kvmd.memory import available
from hyper2kvmd.options import DEFAULT_PATH
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.access import user_name
from hyper2kvmd.queue.claim import unwritable
from hyper2kvmd.queue.names import LOCK
from hyper2kvmd.run import Tools, environment, qemu
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

UNIT_PROPERTIES = (
    *("Id", "LoadState", "UnitFileState", "ActiveState", "Result", "ExecMainStatus", "NeedDaemonReload", "Environment"),
    *("User", "Group", "SupplementaryGroups", "ProtectSystem", "ProtectHome", "PrivateTmp", "ReadWritePaths"),
    *("StateDirectory", "CacheDirectory", "RuntimeDirectory", "LogsDirectory", "ControlGroup"),
)
# What every job runs, and the packages that hold it.
PROGRAMS = {
    "setpriv": "util-linux",
    "prlimit": "util-linux",
    "ionice": "util-linux",
    "qemu-img": "qemu-utils (Debian, Ubuntu) or qemu-img (Fedora, RHEL)",
}
# What only guests with such an initramfs need.
UNPACKERS = ("zstd", "lz4", "lzop")
# What libguestfs has in packages of its own in some distributions.
GUEST_FEATURES = ("lvm2", "luks", "xfs", "btrfs")
VIRTIO_WIN = Path("/usr/share/virtio-win")
PREFIX = ".hyper2kvmd-doctor-"
ANSWER_SECONDS = 10.0
LAUNCH_SECONDS = 120.0
IN_CLOSE_WRITE = 0x8
NAMES_SHOWN = 5
_HINTS = {
    errno.ENOENT: "Create or mount it, or change the setting.",
    errno.EACCES: "Give the service's user access, for example with setfacl, or change the setting.",
    errno.EROFS: "Mount the file system writable (`mount -o remount,rw`), or change the setting.",
    errno.ENOSPC: "Free some space there, or change the setting.",
}


@dataclass(frozen=True)
class Host:
    """What is checked. `unit` is what systemd says of the service; empty where systemd does not run."""

    settings: Settings
    settings_file: Path
    unit: dict[str, str]


def _service_of(settings_file: Path) -> str:
    """The service that has these settings, by its name: for those of an instance, that one."""
    directory = settings_file.parent
    instance = f"@{directory.name}" if directory.parent == DEFAULT_PATH.parent else ""
    return f"hyper2kvmd{instance}.service"


class Diagnosis(Noted):
    """What a check found wrong: `errors` keep jobs from being done, `warnings` do not, or not all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[Finding] = []

    def warn(self, code: str, message: str, hint: str, field: str | None = None) -> None:
        """Note a warning."""
        self.warnings.append(Finding(code, message, hint, field))


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "doctor", help="check everything that the host needs; as root, with the rights of the service's user"
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"only these of {', '.join(CHECKS)}")
    parser.set_defaults(run=doctor)
    return [parser]


def doctor(options: argparse.Namespace, config: Settings) -> int:
    """Run every check, or those that are named, and print what they found. A warning is not a failure."""
    if unknown := [name for name in options.checks if name not in CHECKS]:
        print(f"doctor: {', '.join(unknown)}: choose from {', '.join(CHECKS)}", file=sys.stderr)
        return EXIT_USAGE
    settings_file = (options.config or DEFAULT_PATH).absolute()
    host = Host(config, settings_file, _unit(_service_of(settings_file)))
    _become(host.unit)
    console = Console()
    rows = []
    for name in options.checks or CHECKS:
        for row in _examine(name, host):
            rows.append(row)
            if not options.json:
                _print(console, **row)
    if options.json:
        print_json(rows)
    return EXIT_FAILED if any(row["result"] == "failed" for row in rows) else EXIT_DONE


def _examine(name: str, host: Host) -> list[dict[str, Any]]:
    """Rows for what a check found: one if all is well, and one for everything that is wrong."""
    diagnosis, detail = Diagnosis(), ""
    try:
        with diagnosis:
            detail = CHECKS[name](host, diagnosis)
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "Check that the path exists and its permissions, and `journalctl -k`.")
        where = f"{error.filename}: " if error.filename else ""
        diagnosis.errors.append(MigrationError(Code.IO_ERROR, f"{where}{error.strerror or error}", hint))
    found = [("failed", finding) for finding in diagnosis.findings()]
    found += [("warning", finding) for finding in diagnosis.warnings]
    rows: list[dict[str, Any]] = []
    if detail and not diagnosis.errors:
        rows.append({"check": name, "result": "ok", "detail": detail, "finding": None})
    rows += [
        {"check": name, "result": result, "detail": finding.message, "finding": finding.as_json()}
        for result, finding in found
    ]
    return rows


def _print(console: Console, check: str, result: str, detail: str, finding: dict[str, str] | None) -> None:
    style = {"ok": "green", "warning": "yellow", "failed": "red"}[result]
    console.print(f"{result:<7} {check}: {detail}", style=style, markup=False, highlight=False, soft_wrap=True)
    if finding is not None:
        console.print(f"        {finding['hint']}", markup=False, highlight=False, soft_wrap=True)


# Whose eyes ------------------------------------------------------------------------------------------------


def _unit(service: str) -> dict[str, str]:
    """The service's properties; {} where systemd does not run."""
    try:
        shown = Tools().run(
            "systemctl", "show", f"--property={','.join(UNIT_PROPERTIES)}", service, timeout=ANSWER_SECONDS
        )
    except MigrationError:
        return {}
    unit = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    return unit if "LoadState" in unit else {}


def _become(unit: dict[str, str]) -> None:
    """Go on as the service's user, if root may: root itself would find every directory open."""
    user = unit.get("User")
    if os.geteuid() != 0 or not user:
        return
    try:
        account = pwd.getpwnam(user)
        group = grp.getgrnam(unit["Group"]).gr_gid if unit.get("Group") else account.pw_gid
        more = [grp.getgrnam(name).gr_gid for name in unit.get("SupplementaryGroups", "").split()]
    except KeyError:
        return  # the check of the service says so
    os.setgroups([*os.getgrouplist(user, group), *more])
    os.setresgid(group, group, group)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    os.chdir("/")
    os.umask(0o027)
    for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    os.environ["HOME"] = account.pw_dir
    for name, value in re.findall(r"(LIBGUESTFS_\w+)=(\S+)", unit.get("Environment", "")):
        os.environ[name] = value


def _user(host: Host, diagnosis: Diagnosis) -> str:
    """Who looks."""
    user, wanted = user_name(os.geteuid()), host.unit.get("User") or "root"
    if host.unit.get("LoadState") == "loaded" and user != wanted:
        diagnosis.warn(
            "other_user",
            f"this is what {user} can do, and the service runs as {wanted}",
            "Run `sudo hyper2kvmctl doctor`: it looks with the rights of the service's user.",
        )
    groups = []
    for number in sorted({os.getegid(), *os.getgroups()}):
        try:
            groups.append(grp.getgrgid(number).gr_name)
        except KeyError:
            groups.append(str(number))
    return f"{user}, in the groups {', '.join(groups)}"


def _settings(host: Host, diagnosis: Diagnosis) -> str:
    """Who can change the settings decides what the service overwrites."""
    for name in host.settings.fix.luks_keys:
        with diagnosis:
            keys.passphrase(host.settings.fix.luks_keys, name, name)
    file = host.settings_file
    if not file.exists():
        return f"no {file}: the defaults hold"
    if not os.access(file, os.R_OK, effective_ids=True):
        user = user_name(os.geteuid())
        raise MigrationError(
            Code.IO_ERROR,
            f"{user} cannot read {file}",
            f"Let the service's user read it: `setfacl -m u:{user}:r {file}`.",
        )
    # The file itself was read, so it is nobody else's; but who can replace it can write what they want.
    directory, status = file.parent, file.parent.stat()
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        mode, owner = stat.S_IMODE(status.st_mode), user_name(status.st_uid)
        diagnosis.warn(
            "settings_writable",
            f"others than root can replace files in {directory} (mode {mode:04o}, owner {owner}), and so the settings",
            f"Run `chown root {directory}` and `chmod go-w {directory}`.",
        )
    return str(file)


# Programs and machines -------------------------------------------------------------------------------------


def _programs(host: Host, diagnosis: Diagnosis) -> str:
    """Whether they are there and run."""
    path = environment()["PATH"]
    for program, package in PROGRAMS.items():
        with diagnosis:
            if shutil.which(program, path=path) is None:
                raise MigrationError(Code.TOOL_MISSING, f"{program} is not installed", f"Install {package}.")
    with diagnosis:
        qemu()
    if diagnosis.errors:
        return ""
    there = [program for program in UNPACKERS if shutil.which(program, path=path)]
    for program in (program for program in UNPACKERS if program not in there):
        diagnosis.warn(
            Code.TOOL_MISSING,
            f"{program} is not installed: guests whose initramfs is compressed with it are not migrated",
            f"Install {program}.",
        )
    versions = []
    for program in (*PROGRAMS, qemu(), *there):
        with diagnosis:
            done = Tools().run(program, "--version", timeout=ANSWER_SECONDS)
            found = re.search(r"\d+\.\d[\w.]*", done.stdout + done.stderr)
            versions.append(f"{Path(program).name} {found[0] if found else '(no version)'}")
    return ", ".join(versions)


def _memory(host: Host, diagnosis: Diagnosis) -> str:
    """Whether every worker can have its appliance, and its boot test, at the same time."""
    settings = host.settings
    luks = LUKS_MEMORY_MB if settings.fix.luks_keys else 0
    boot = settings.validate_.boot_memory_mb if settings.validate_.test_boot else 0
    one = max(settings.guest.memory_mb, luks, boot)
    memory = available(host.unit.get("ControlGroup") or None)
    if memory is None:
        return "the host does not say how much is available"
    if memory.mb < one:
        raise MigrationError(
            Code.NO_MEMORY,
            f"{memory.holder} has {memory.mb} MiB of memory available, and a job needs {one}",
            f"Lower guest.memory_mb or validate.boot_memory_mb, or {memory.remedy}.",
            field="guest.memory_mb",
        )
    if memory.mb < one * settings.workers:
        diagnosis.warn(
            Code.NO_MEMORY,
            f"{memory.holder} has {memory.mb} MiB of memory available, and {settings.workers} jobs at the same time"
            f" need {one * settings.workers}: some will wait",
            f"Set workers to {memory.mb // one}, or {memory.remedy}.",
            "workers",
        )
    return f"{memory.mb} MiB available, {one} MiB for each of {settings.workers} workers"


def _kvm(host: Host, diagnosis: Diagnosis) -> str:
    """Start a machine."""
    chosen = accel.resolve(host.settings.guest.accel, Tools())
    if chosen.warning is not None:
        diagnosis.warnings.append(chosen.warning)
        return ""
    return {"kvm": "KVM works", "tcg": "not used (guest.accel is tcg)"}[chosen.name]


def _libguestfs(host: Host, diagnosis: Diagnosis) -> str:
    """Start an appliance, with a small empty disk."""
    check_host()
    guest = host.settings.guest
    tools = Tools()
    with tempfile.TemporaryDirectory(prefix="hyper2kvmd-doctor-") as directory:
        # That of the service is made by systemd when it starts for the first time.
        if not os.path.isdir(os.environ.get("LIBGUESTFS_CACHEDIR", directory)):
            os.environ["LIBGUESTFS_CACHEDIR"] = directory
        disk = Path(directory) / "empty.qcow2"
        tools.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "16M")
        chosen = accel.resolve(guest.accel, tools)
        limit = threading.Timer(LAUNCH_SECONDS, tools.cancel.set)
        limit.start()
        try:
            with open_guest([(disk, "qcow2")], accel=chosen.name, memory_mb=guest.memory_mb, tools=tools) as session:
                version = session.version()
                missing = [name for name in GUEST_FEATURES if not session.g.feature_available([name])]
        except Cancelled:
            raise MigrationError(
                Code.APPLIANCE_FAILED,
                f"the libguestfs appliance did not start within {LAUNCH_SECONDS:g} s",
                "Look at the load of the host; run libguestfs-test-tool as this user to see where it hangs.",
            ) from None
        finally:
            limit.cancel()
    for name in missing:
        diagnosis.warn(
            "feature_missing",
            f"libguestfs knows nothing of {name}: guests that use it are not recognised",
            f"Install the package libguestfs-{name}, or what the distribution has in its place.",
        )
    return f"version {version['major']}.{version['minor']}.{version['release']}, the appliance starts"


def _windows(host: Host, diagnosis: Diagnosis) -> str:
    """The drivers are not used yet; whoever has Windows guests should know."""
    if not VIRTIO_WIN.is_dir():
        diagnosis.warn(
            "virtio_win_missing",
            f"no {VIRTIO_WIN}: Windows guests have no virtio drivers",
            "Nothing is to be done for Linux guests. Windows guests are not fixed yet: with fix.allow_unsupported they"
            " get SATA and e1000e, which need no drivers; for virtio, install the package virtio-win.",
        )
        return ""
    found = sorted(path.name for path in VIRTIO_WIN.iterdir() if path.suffix == ".iso" or path.name == "drivers")
    return f"{VIRTIO_WIN}: {', '.join(found) or 'no image and no drivers'}; Windows guests are not fixed yet"


# Directories -----------------------------------------------------------------------------------------------


def _exports(host: Host, diagnosis: Diagnosis) -> str:
    """Whether locks and reports can be written, and disks read."""
    from hyper2kvmd.daemon import watch  # here, because it takes longer to load than other commands take

    directory = host.settings.exports_dir
    _answers(directory)
    exports, _ = facts.exports(host.settings)
    try:
        with _file_in(directory):
            pass
    except OSError as error:
        raise unwritable(directory, error) from None
    if obstacles := [obstacle for export in exports if (obstacle := _obstacle(export)) is not None]:
        names, user = _first(obstacles), user_name(os.geteuid())
        diagnosis.warn(
            Code.EXPORT_UNWRITABLE,
            f"{user} cannot use {names} in {directory}: directories must be writable, for locks and reports, and files"
            " readable",
            f"Run `setfacl -R -m u:{user}:rwX,d:u:{user}:rwX {shlex.quote(str(directory))}`, which holds for exports"
            " to come as well, or run the service as the exporter's user.",
            "exports_dir",
        )
    return f"{directory} ({watch.file_system(directory)}), exports: {len(exports)}"


def _obstacle(export: Path) -> str | None:
    """What of an export this user cannot use: the directory itself, or a file in it."""
    if not os.access(export, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        return export.name
    with contextlib.suppress(FileNotFoundError), os.scandir(export) as entries:
        for entry in entries:
            wanted = os.R_OK | os.W_OK if entry.name == LOCK else os.R_OK
            if entry.is_file(follow_symlinks=False) and not os.access(entry.path, wanted, effective_ids=True):
                return f"{export.name}/{plain(entry.name)}"
    return None


def _watching(host: Host, diagnosis: Diagnosis) -> str:
    """Watch for real: the limits hold for all that a user watches."""
    from hyper2kvmd.daemon import watch

    settings = host.settings
    directory, mode, interval = settings.exports_dir, settings.watch.mode, settings.scan_interval_seconds
    _answers(directory)
    kind = watch.file_system(directory)
    network = kind.startswith(watch.NETWORK_FILE_SYSTEMS)
    if mode == "off":
        return f"off: {directory} is looked at every {interval:g} s"
    if mode == "poll" or (mode == "auto" and network):
        return f"{directory} ({kind}) is looked at every {min(interval, watch.POLL_SECONDS):g} s"
    if network:
        diagnosis.warn(
            "not_seen",
            f"watch.mode is inotify, which on {kind} does not see what other hosts write",
            f"Set watch.mode to auto; until then, exports are found after up to {interval:g} s.",
            "watch.mode",
        )
    count, error = _watch_all(directory)
    if error:
        limits = {name: Path("/proc/sys/fs/inotify", name) for name in ("max_user_watches", "max_user_instances")}
        now = " and ".join(f"fs.inotify.{name} (now {path.read_text().strip()})" for name, path in limits.items())
        diagnosis.warn(
            "not_watched",
            f"{directory} and the directories in it, {count} in all, cannot be watched: {os.strerror(error)}",
            f"Raise {now} in a file in /etc/sysctl.d and run `sysctl --system`; until then, some exports are found"
            f" after up to {interval:g} s.",
            "exports_dir",
        )
        return ""
    return f"inotify works for {count} director{'y' if count == 1 else 'ies'} ({kind})"


def _watch_all(root: Path) -> tuple[int, int]:
    """Watch a directory and all in it; how many there are, and the number of the error that this met, or 0.

    Not with watchdog, which leaves out what it cannot watch and does not say so.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    directories = [os.fsencode(directory) for directory, _, _ in os.walk(root)]
    fd = libc.inotify_init1(os.O_CLOEXEC)
    if fd < 0:
        return len(directories), ctypes.get_errno()
    try:
        for directory in directories:
            gone = libc.inotify_add_watch(fd, directory, IN_CLOSE_WRITE) < 0
            if gone and ctypes.get_errno() != errno.ENOENT:
                return len(directories), ctypes.get_errno()
    finally:
        os.close(fd)
    return len(directories), 0


def _locks(host: Host, diagnosis: Diagnosis) -> str:
    """Whether a lock that is held keeps a second one out, on the file system of the exports."""
    from hyper2kvmd.daemon.health import check_locks  # here for the same reason

    directory = host.settings.exports_dir
    _answers(directory)
    verdict = check_locks(directory)
    if verdict.problem:
        raise MigrationError(Code.IO_ERROR, verdict.problem, verdict.remedy, field="exports_dir")
    return "flock works"


def _output(host: Host, diagnosis: Diagnosis) -> str:
    """Every directory that disks can go to."""
    found = []
    for directory, field in _output_dirs(host.settings):
        with diagnosis:
            found.append(_room(directory, field))
    return "; ".join(found)


def _output_dirs(settings: Settings) -> Iterator[tuple[Path, str]]:
    yield settings.output_dir, "output_dir"
    for directory in settings.output.allowed_dirs:
        yield directory, "output.allowed_dirs"


def _work(host: Host, diagnosis: Diagnosis) -> str:
    """The first job makes the directory, so it may be its parent that counts."""
    directory = host.settings.work_dir
    _answers(directory)
    existing = existing_parent(directory)
    if existing == directory:
        return _room(directory, "work_dir")
    by_systemd = any(_below(directory, place) and not _below(existing, place) for place in _made_by_systemd(host.unit))
    if not by_systemd and not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
        user = user_name(os.geteuid())
        raise MigrationError(
            Code.IO_ERROR,
            f"there is no {directory}, and {user} cannot make it",
            f"Run `install -d -o {user} -m 0750 {shlex.quote(str(directory))}`, or set work_dir to another directory.",
            field="work_dir",
        )
    return f"{directory} is made by the first job; {_space(existing, 'work_dir')}"


def _room(directory: Path, field: str) -> str:
    """Check that a directory can be written and has some space."""
    _answers(directory)
    detail = _space(directory, field)
    try:
        with _file_in(directory) as file:
            direct = qemu_img.direct_io(file)
    except OSError as error:
        user = user_name(os.geteuid())
        raise MigrationError(
            Code.OUTPUT_DENIED,
            f"{user} cannot write to {directory}: {error.strerror}",
            f"Run `setfacl -m u:{user}:rwx,d:u:{user}:rwX {shlex.quote(str(directory))}` or mount it writable, or set"
            f" {field} to another directory.",
            field=field,
        ) from None
    return f"{detail}, {'with' if direct else 'without'} O_DIRECT"


def _space(directory: Path, field: str) -> str:
    """Check that there is room for what every job writes, whatever its disks."""
    free = shutil.disk_usage(directory).free
    if free < FIX_SPACE:
        raise MigrationError(
            Code.NO_SPACE,
            f"{directory} has {free / 2**20:.0f} MiB free; a job needs {FIX_SPACE / 2**20:.0f} MiB besides its disks",
            f"Free some space there, or set {field} to a larger file system.",
            field=field,
        )
    return f"{directory}, {free / 2**30:.1f} GiB free"


def _answers(directory: Path) -> None:
    """Check that a file system answers at all: another process asks, which can be killed if it does not."""
    try:
        Tools().run("stat", "--", directory, accept=range(256), timeout=ANSWER_SECONDS)
    except MigrationError as error:
        if error.code is not Code.TOOL_FAILED:
            raise
        raise MigrationError(
            Code.IO_ERROR,
            f"no answer from {directory} within {ANSWER_SECONDS:g} s",
            "Mend its file server or the network to it, or unmount it (`umount --lazy`).",
        ) from None


@contextlib.contextmanager
def _file_in(directory: Path) -> Iterator[Path]:
    """A hidden file that is written, and gone in the end. Raise OSError."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=PREFIX) as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def _first(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


# libvirt ---------------------------------------------------------------------------------------------------


def _libvirt(host: Host, diagnosis: Diagnosis) -> str:
    """Ask in a thread: a call to a libvirt that hangs cannot be ended."""
    uri = host.settings.libvirt.uri
    if not host.settings.libvirt.import_ and not host.settings.validate_.test_boot:
        return "not used (libvirt.import is false)"
    found: list[str] = []
    theirs = Diagnosis()

    def ask() -> None:
        with theirs:
            found.append(_ask_libvirt(host.settings, theirs))

    thread = threading.Thread(target=ask, name="libvirt", daemon=True)
    thread.start()
    thread.join(LIBVIRT_SECONDS)
    diagnosis.errors += theirs.errors
    diagnosis.warnings += theirs.warnings
    if thread.is_alive():
        raise unanswered(uri)
    if not found and not theirs.errors:  # a defect must not look like silence
        raise RuntimeError("the check of libvirt failed; the trace is before this one")
    return "".join(found)


def _ask_libvirt(settings: Settings, diagnosis: Diagnosis) -> str:
    """All that would keep a domain from being defined, and then one that is."""
    with connect(settings.libvirt.uri) as connection:
        detail = f"{settings.libvirt.uri}, version {libvirt_version(connection)}"
        if not settings.libvirt.import_:
            return detail
        try:
            kind = virt_type(connection, "tcg" if settings.guest.accel == "tcg" else "kvm")
            domain = _trial(settings, kind)
            _preflight(connection, domain, settings, diagnosis)
            with diagnosis:
                _define(connection, domain)
            _reach(connection, settings, diagnosis)
        except libvirt.libvirtError as error:
            raise MigrationError(
                Code.LIBVIRT_UNAVAILABLE, f"libvirt: {error}", "See libvirt's log (`journalctl -u libvirtd`)."
            ) from None
    return f"{detail}; UEFI, Secure Boot and all networks are there; a domain was defined and undefined"


def _trial(settings: Settings, kind: str) -> Domain:
    """A small domain that nobody else has."""
    id = str(uuid.uuid4())
    name = f"hyper2kvmd-doctor-{id[:8]}"
    return Domain(
        name=name,
        uuid=id,
        title="hyper2kvmctl doctor",
        description="",
        cpus=1,
        cores_per_socket=None,
        memory_mib=256,
        firmware="bios",
        secure_boot=False,
        tpm=False,
        virt_type=kind,
        guest=None,
        disks=(DomainDisk(settings.output_dir / f"{name}.qcow2", "qcow2", "disk-0", False),),
        nics=(),
        job="doctor",
        source={},
        tags={},
    )


def _preflight(connection: Any, domain: Domain, settings: Settings, diagnosis: Diagnosis) -> None:
    """What a job would check, for every network, and for both kinds of firmware."""
    targets = dict.fromkeys((settings.libvirt.default_network, *settings.libvirt.network_map.values()))
    mac = generated_mac(domain.uuid, 0)
    uefi = replace(domain, firmware="uefi")
    # One at a time: a machine has too few slots for all networks at once.
    variants = [replace(domain, nics=(DomainNic(mac, target),)) for target in targets]
    for variant in (*variants, uefi, replace(uefi, secure_boot=True)):
        diagnosis.errors += preflight(connection, variant, settings.libvirt.pool, settings.output_dir)
    for error in preflight(connection, replace(domain, tpm=True), None, settings.output_dir):
        if error.code is Code.TOOL_MISSING:
            message = f"VMs with a TPM cannot be migrated: {error.message}"
            diagnosis.warnings.append(replace(error.finding(), message=message))


def _define(connection: Any, domain: Domain) -> None:
    """Define a domain, which is gone in the end, whatever happens. Raise MigrationError or libvirtError."""
    try:
        define(connection, to_xml(domain), domain.name, domain.uuid, domain.job, autostart=False, start=False)
    finally:
        for found in connection.listAllDomains():
            if found.UUIDString() == domain.uuid:
                found.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)


def _reach(connection: Any, settings: Settings, diagnosis: Diagnosis) -> None:
    """Warn of directories that libvirt's QEMU, which is another user, cannot get to."""
    account = _qemu_account(connection)
    if account is None:
        return
    uid, gids = account
    wanted = dict.fromkeys(directory for directory, _ in _output_dirs(settings))
    if settings.validate_.test_boot:
        wanted[settings.work_dir] = None
    places = dict.fromkeys(place for directory in wanted for place in _way(directory))
    for place in places:
        if not _may_enter(place, uid, gids):
            user = user_name(uid)
            diagnosis.warn(
                "qemu_kept_out",
                f"QEMU runs as {user}, who may not enter {place}: no guest whose disks lie below it can start",
                f"Run `setfacl -m u:{user}:x {shlex.quote(str(place))}`, or set output_dir to a directory that {user}"
                " can get to.",
                "output_dir",
            )


def _qemu_account(connection: Any) -> tuple[int, set[int]] | None:
    """User and groups of libvirt's QEMU; None if it is root, somebody like us, or on another host."""
    if connection.getHostname() != socket.gethostname():
        return None
    capabilities = ET.fromstring(connection.getCapabilities())
    label = capabilities.findtext("host/secmodel[model='dac']/baselabel[@type='qemu']", "")
    found = re.fullmatch(r"\+(\d+):\+(\d+)", label)
    if found is None or int(found[1]) in (0, os.geteuid()):
        return None
    uid, gid = int(found[1]), int(found[2])
    try:
        return uid, {gid, *os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)}
    except KeyError:
        return uid, {gid}


def _way(directory: Path) -> Iterable[Path]:
    """The directories that one goes through, from the root; those that do not exist yet are left out."""
    real = Path(os.path.realpath(directory))
    return itertools.takewhile(os.path.isdir, reversed((real, *real.parents)))


def _may_enter(directory: Path, uid: int, gids: set[int]) -> bool:
    """Whether a user may enter a directory, as far as its mode says; an access list may say anything else."""
    with contextlib.suppress(OSError):
        if "system.posix_acl_access" in os.listxattr(directory):
            return True
    status = directory.stat()
    bit = stat.S_IXUSR if status.st_uid == uid else stat.S_IXGRP if status.st_gid in gids else stat.S_IXOTH
    return bool(status.st_mode & bit)


# The service -----------------------------------------------------------------------------------------------


def _service(host: Host, diagnosis: Diagnosis) -> str:
    """Whether systemd will start it, and lets it get to its directories."""
    unit = host.unit
    if not unit:
        return "systemd does not run here, or does not answer"
    service = unit["Id"]
    if unit["LoadState"] != "loaded":
        diagnosis.warn(
            "service_missing",
            f"systemd cannot use {service}: {unit['LoadState']}",
            f"Copy it from systemd/ to /etc/systemd/system (masked: `systemctl unmask {service}`), run"
            f" `systemctl daemon-reload`, then `systemctl enable --now {service}`.",
        )
        return ""
    diagnosis.errors += [*_unknown_accounts(unit), *_confined(unit, host.settings)]
    if unit.get("NeedDaemonReload") == "yes":
        diagnosis.warn(
            "service_changed",
            f"{service} or one of its drop-ins was changed, and systemd has the old one",
            "Run `systemctl daemon-reload`.",
        )
    enabled, active = unit.get("UnitFileState", ""), unit.get("ActiveState", "")
    if enabled in ("disabled", "linked", "indirect"):
        diagnosis.warn(
            "service_disabled",
            f"{service} is {enabled}: after the next boot of the host nothing is migrated",
            f"Run `systemctl enable {service}`.",
        )
    if active == "failed":
        status = unit.get("ExecMainStatus")
        raise MigrationError(
            Code.TOOL_FAILED,
            f"{service} has failed ({unit.get('Result')}, exit status {status})",
            ("Mend what `hyper2kvmd check-config` says" if status == "78" else f"See `journalctl -u {service} -n 50`")
            + f", then run `systemctl restart {service}`.",
        )
    if active != "active":
        diagnosis.warn("service_inactive", f"{service} does not run ({active})", f"Run `systemctl start {service}`.")
    return f"{service} is {enabled or 'loaded'} and {active}"


def _unknown_accounts(unit: dict[str, str]) -> Iterator[MigrationError]:
    """The user and groups of the unit that the host does not have."""
    service = unit["Id"]
    hint = f"Create it with systemd-sysusers or by hand, or name another one in `systemctl edit {service}`."
    user = unit.get("User", "")
    groups = [unit.get("Group", ""), *unit.get("SupplementaryGroups", "").split()]
    try:
        if user and not user.isdigit():
            pwd.getpwnam(user)
    except KeyError:
        yield MigrationError(Code.TOOL_FAILED, f"{service} cannot start: there is no user {user}", hint)
    for group in groups:
        try:
            if group and not group.isdigit():
                grp.getgrnam(group)
        except KeyError:
            yield MigrationError(Code.TOOL_FAILED, f"{service} cannot start: there is no group {group}", hint)


def _confined(unit: dict[str, str], settings: Settings) -> Iterator[MigrationError]:
    """The directories of the settings that the sandbox keeps the service from, and paths that keep it from starting."""
    service, paths = unit["Id"], unit.get("ReadWritePaths", "").split()
    for path in paths:
        if path.startswith("/") and not os.path.lexists(path):
            yield MigrationError(
                Code.IO_ERROR,
                f"{service} cannot start: ReadWritePaths= names {path}, which does not exist",
                f"Create or mount it, or run `systemctl edit {service}` and write ReadWritePaths=-{path}.",
            )
    writable = [*(path.lstrip("-+") for path in paths), *_made_by_systemd(unit)]
    wanted = [
        (settings.exports_dir, "exports_dir", Code.EXPORT_UNWRITABLE),
        (settings.work_dir, "work_dir", Code.IO_ERROR),
        *((directory, field, Code.OUTPUT_DENIED) for directory, field in _output_dirs(settings)),
    ]
    for directory, field, code in wanted:
        lines = []
        if unit.get("PrivateTmp") == "yes" and _below(directory, "/tmp", "/var/tmp"):
            lines.append("PrivateTmp=no")
        if unit.get("ProtectHome") in ("yes", "tmpfs") and _below(directory, "/home", "/root", "/run/user"):
            lines.append("ProtectHome=no")
        if unit.get("ProtectSystem") == "strict" and not _below(directory, *writable):
            lines.append(f"ReadWritePaths={directory}")
        if lines:
            yield MigrationError(
                code,
                f"the sandbox of {service} keeps it from writing to {directory} ({field})",
                f"Run `systemctl edit {service}`, write the lines {', '.join(['[Service]', *lines])}, then"
                f" `systemctl restart {service}`.",
                field=field,
            )


def _made_by_systemd(unit: dict[str, str]) -> list[str]:
    """The directories that systemd makes for the service when it starts."""
    bases = {
        "StateDirectory": "/var/lib",
        "CacheDirectory": "/var/cache",
        "RuntimeDirectory": "/run",
        "LogsDirectory": "/var/log",
    }
    return [f"{base}/{name}" for option, base in bases.items() for name in unit.get(option, "").split()]


def _below(path: Path, *directories: str | Path) -> bool:
    """Whether a path is one of the directories or in one of them."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(directory)) for directory in directories)


def _metrics(host: Host, diagnosis: Diagnosis) -> str:
    """Whether the address is free, or it is the daemon that has it."""
    listen = host.settings.metrics.listen
    if not listen:
        return "off"
    name, _, port = listen.rpartition(":")
    name = name.strip("[]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        tls = host.settings.metrics.tls_server_config.cert_file
        kept = Path("/run/credentials", _service_of(host.settings_file))  # by systemd, what it hands over
        taken = error.errno == errno.EADDRINUSE
        if taken and (_has(name, int(port), kept / tls) if tls else _is_ours(name, int(port))):
            return f"{listen}, served by hyper2kvmd"
        raise MigrationError(
            Code.IO_ERROR,
            f"metrics.listen: {listen} cannot be used: {error.strerror or error}",
            f"`ss -ltnp` shows who has port {port}. Set metrics.listen to another address, or to an empty one.",
            field="metrics.listen",
        ) from None
    return f"{listen} is free"


def _is_ours(host: str, port: int) -> bool:
    """Whether it is hyper2kvmd that serves metrics there."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/metrics")
        return b"hyper2kvmd_build_info" in connection.getresponse().read(65536)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _has(host: str, port: int, certificate: Path) -> bool:
    """Whether it is who has our certificate that serves there; what it serves may be for those that have one, too."""
    try:
        ours = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", certificate.read_text(), re.DOTALL)
        return ours is not None and ssl.PEM_cert_to_DER_cert(ours[0]) == ssl.PEM_cert_to_DER_cert(
            ssl.get_server_certificate((host, port), timeout=2)
        )
    except (OSError, ValueError):
        return False


CHECKS: dict[str, Callable[[Host, Diagnosis], str]] = {
    "user": _user,
    "settings": _settings,
    "programs": _programs,
    "exports": _exports,
    "watching": _watching,
    "locks": _locks,
    "output": _output,
    "work": _work,
    "memory": _memory,
    "kvm": _kvm,
    "libguestfs": _libguestfs,
    "libvirt": _libvirt,
    "windows": _windows,
    "service": _service,
    "metrics": _metrics,
}
