"""What becomes of what a cancelled job has published: it is removed, unless a VM has it."""

from __future__ import annotations

import fcntl
import os
import shlex
import struct
from collections.abc import Sequence
from pathlib import Path

import libvirt

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.hypervisor.connection import connect, translated
from hyper2kvmd.hypervisor.preflight import runs_already, users_of
from hyper2kvmd.job import steps
from hyper2kvmd.job.context import Job
from hyper2kvmd.text import show

OUTPUT_KEPT = "output_kept"


def is_imported(job: Job) -> bool:
    """Whether the domain that this job made runs on what the job published: then the import is done.

    A libvirt that does not answer cannot say so.
    """
    files = steps.published(job.work_dir)
    try:
        if files:
            with connect(job.settings.libvirt.uri) as connection:
                return runs_already(connection, files, job.id)
    except MigrationError:
        pass
    return False


def undo(job: Job) -> Finding | None:
    """Remove what the job made, and the domain that it defined and nobody started.

    If anything else refers to a published disk, or nobody can say, all is left as it is, and the finding says why.
    """
    files = steps.published(job.work_dir)
    if files:
        try:
            with connect(job.settings.libvirt.uri) as connection, translated(Code.LIBVIRT_UNAVAILABLE):
                users = users_of(connection, files)
                if other := next((one for one in users if one.job != job.id or one.active), None):
                    how, virsh = ("runs on", ["destroy"]) if other.active else ("has", [])
                    # Its own domain is undefined by the next cancel.
                    commands = [*virsh, *(["undefine"] if other.job != job.id else [])]
                    remedy = " and ".join(f"`virsh {command} {shlex.quote(other.name)}`" for command in commands)
                    return _kept(files, f"the domain {show(other.name)} {how} them", f"run {remedy}")
                if opened := next((file for file in files if _in_use(file)), None):
                    return _kept(files, f"a process uses {opened}", f"find it with `fuser -v {opened}`, and end it")
                for domain in users:
                    connection.lookupByUUIDString(domain.uuid).undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
        except MigrationError as error:
            return _kept(files, f"libvirt did not say that no VM uses them: {error.message}", error.hint)
    steps.undo(job.work_dir)
    steps.remove_partials(job.id, (job.settings.output_dir, *job.settings.output.allowed_dirs))
    return None


def _kept(files: Sequence[Path], why: str, remedy: str) -> Finding:
    names = ", ".join(map(str, files))
    return Finding(
        OUTPUT_KEPT,
        f"the job is cancelled, but its disks are left as they are ({names}): {why}",
        f"If nobody needs them, {remedy[0].lower()}{remedy[1:].rstrip('.')}; then run `hyper2kvmctl cancel` once more,"
        " which removes them.",
    )


def _in_use(file: Path) -> bool:
    """Whether a process of this host, such as a QEMU that somebody started without libvirt, has locked a disk."""
    try:
        with file.open("rb") as opened:
            # linux/fcntl.h: struct flock, for the whole file. QEMU locks bytes of every image that it opens.
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            found = fcntl.fcntl(opened, _F_OFD_GETLK, asked)
    except PermissionError:
        return False  # a VM had it, to whose account libvirt gave it; by now libvirt knows of none
    return bool(struct.unpack("hhqqi4x", found)[0] != fcntl.F_UNLCK)


_F_OFD_GETLK = 36
