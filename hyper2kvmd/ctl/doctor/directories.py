"""Checks of the exports, the output and the work directory, and of how they are watched and locked."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hyper2kvmd.ctl.as_service import unit_properties
from hyper2kvmd.ctl.doctor.diagnosis import ANSWER_SECONDS, Diagnosis, Host, handover_dirs, output_dirs
from hyper2kvmd.ctl.doctor.service import is_below, made_by_systemd
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import existing_parent, explained, user_name
from hyper2kvmd.image import qemu_img
from hyper2kvmd.job.plan import FIX_SPACE
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.claim import unwritable
from hyper2kvmd.queue.hosts import other_number
from hyper2kvmd.queue.names import LOCK
from hyper2kvmd.run import Tools
from hyper2kvmd.text import plain

PREFIX = ".hyper2kvmd-doctor-"
IN_CLOSE_WRITE = 0x8
NAMES_SHOWN = 5


def check_exports(host: Host, diagnosis: Diagnosis) -> str:
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
    is_service = host.unit.get("User", us := user_name(os.geteuid())) == us  # and not somebody in a group
    if is_service and (number := other_number(host.settings)) is not None:
        raise MigrationError(Code.EXPORT_UNWRITABLE, number.message, number.hint, field="exports_dir")
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


def check_watching(host: Host, diagnosis: Diagnosis) -> str:
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


def check_locks(host: Host, diagnosis: Diagnosis) -> str:
    """Whether a lock that is held keeps a second one out, on the file system of the exports."""
    from hyper2kvmd.daemon.health import check_locks  # here for the same reason

    directory = host.settings.exports_dir
    _answers(directory)
    verdict = check_locks(directory)
    if verdict.problem:
        raise MigrationError(Code.IO_ERROR, verdict.problem, verdict.remedy, field="exports_dir")
    return "flock works"


def check_handover(host: Host, diagnosis: Diagnosis) -> str:
    """Whether exporters find a service to hand over to, and this user can take from them and answer."""
    if host.settings.hypersdk.queue_dir is None:
        return "off"
    for directory, field in [*handover_dirs(host.settings)][:2]:  # of the others, what is in them counts
        _answers(directory)
        with diagnosis:
            try:
                with _file_in(directory):
                    pass
            except OSError as error:
                user = user_name(os.geteuid())
                raise MigrationError(
                    Code.IO_ERROR,
                    f"{explained(error, directory)}: {user} cannot write there",
                    f"Run `install -d -o {user} -g hypersdk -m 2770 {shlex.quote(str(directory))}`, and allow the unit"
                    " to write there (ReadWritePaths=).",
                    field=field,
                ) from None
    if host.unit:
        service = host.unit["Id"]
        alias = service.replace("hyper2kvmd", "hyper2kvm")
        if unit_properties(alias).get("Id") != service:
            diagnosis.warn(
                "handover_unseen",
                f"exporters look for {alias}, which is not {service}: they submit nothing",
                f"Run `systemctl enable {service}`, which gives it this name, too.",
            )
    return f"manifests are taken from {host.settings.hypersdk.queue_dir}"


def check_output(host: Host, diagnosis: Diagnosis) -> str:
    """Every directory that disks can go to."""
    found = []
    for directory, field in output_dirs(host.settings):
        with diagnosis:
            found.append(_room(directory, field))
    return "; ".join(found)


def check_work(host: Host, diagnosis: Diagnosis) -> str:
    """The first job makes the directory, so it may be its parent that counts."""
    directory = host.settings.work_dir
    _answers(directory)
    existing = existing_parent(directory)
    if existing == directory:
        return _room(directory, "work_dir")
    by_systemd = any(
        is_below(directory, place) and not is_below(existing, place) for place in made_by_systemd(host.unit)
    )
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
            "Repair its file server or the network to it, or unmount it (`umount --lazy`).",
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
