"""Checks of the user, the settings, programs, memory, KVM and the appliance."""

from __future__ import annotations

import grp
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from hyper2kvmd import accel
from hyper2kvmd.ctl.doctor.diagnosis import ANSWER_SECONDS, Diagnosis, Host
from hyper2kvmd.errors import Code, Collected, MigrationError
from hyper2kvmd.files import user_name
from hyper2kvmd.guest import keys
from hyper2kvmd.guest.session import check_host, open_guest
from hyper2kvmd.guest.windows.drivers import Catalogue
from hyper2kvmd.image.stream.codecs import libdeflate
from hyper2kvmd.job.plan import LUKS_MEMORY_MB
from hyper2kvmd.memory import available
from hyper2kvmd.run import Tools, environment, qemu

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
LAUNCH_SECONDS = 120.0


def check_user(host: Host, diagnosis: Diagnosis) -> str:
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


def check_settings(host: Host, diagnosis: Diagnosis) -> str:
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


def check_programs(host: Host, diagnosis: Diagnosis) -> str:
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
    inflates = "libdeflate"
    if libdeflate() is None:
        inflates = "zlib"
        diagnosis.warn(
            Code.TOOL_MISSING,
            "libdeflate is not installed: zlib inflates the disks of vSphere, which takes twice as long",
            "Install libdeflate0 (Debian, Ubuntu), or libdeflate (Fedora, EL where a repository has it).",
        )
    return f"{', '.join(versions)}; {inflates} inflates VMDKs"


def check_memory(host: Host, diagnosis: Diagnosis) -> str:
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


def check_kvm(host: Host, diagnosis: Diagnosis) -> str:
    """Start a machine."""
    chosen = accel.resolve(host.settings.guest.accel, Tools())
    if chosen.warning is not None:
        diagnosis.warnings.append(chosen.warning)
        return ""
    return {"kvm": "KVM works", "tcg": "not used (guest.accel is tcg)"}[chosen.name]


def check_libguestfs(host: Host, diagnosis: Diagnosis) -> str:
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
        with open_guest(
            [(disk, "qcow2")],
            accel=chosen.name,
            memory_mb=guest.memory_mb,
            tools=tools,
            launch_seconds=LAUNCH_SECONDS,
        ) as session:
            version = session.version()
            missing = [name for name in GUEST_FEATURES if not session.g.feature_available([name])]
    for name in missing:
        diagnosis.warn(
            "feature_missing",
            f"libguestfs knows nothing of {name}: guests that use it are not recognised",
            f"Install the package libguestfs-{name}, or what the distribution has in its place.",
        )
    return f"version {version['major']}.{version['minor']}.{version['release']}, the appliance starts"


def check_windows(host: Host, diagnosis: Diagnosis) -> str:
    """Which Windows there are drivers for: whoever has Windows guests should know."""
    path = host.settings.fix.virtio_win
    with Catalogue.open(path) as catalogue:
        if catalogue is None:
            diagnosis.warn(
                "virtio_win_missing",
                f"{f'no {path}' if path else 'fix.virtio_win is null'}: Windows guests are given no virtio drivers",
                "Linux guests need none. Windows guests without drivers of their own get SATA, which is slower; for"
                " virtio, install the package virtio-win, or name its ISO in fix.virtio_win.",
                "fix.virtio_win",
            )
            return ""
        noted = Collected()
        words = catalogue.coverage(noted)
        diagnosis.warnings += noted.findings()  # only the guests of that family wait for a person
        covered = ", ".join(f"{family} {said}" for family, said in words.items())
        return f"{catalogue.path}: {covered or 'no family that is known'}"
