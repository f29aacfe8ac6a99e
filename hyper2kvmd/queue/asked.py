"""What a person asked for beyond the settings: kept in the export, so that every later attempt has it, on any host.

Whoever can write into the export cannot forge it: it counts only as a file of this user, of work_dir's owner or of
root that nobody else may write to, and only for the export whose name is in it. So it may say what no manifest may.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import existing_parent, open_file, write_durably
from hyper2kvmd.queue.export import Export
from hyper2kvmd.queue.names import ASKED

LIMIT = 1 << 16
# Settings of a daemon or of one command, which are not about the VM.
_NOT_KEPT = frozenset(
    {"exports_dir", "workers", "settle_seconds", "incomplete_grace_seconds", "scan_interval_seconds", "watch"}
    | {"retention", "metrics", "notify", "accept", "rules", "dispatch", "log", "plan_dir", "waves"}
)


@dataclass(frozen=True)
class Asked:
    """The stages to run, None for what the manifest enables; the VM's name, None for what the manifest calls it; and
    what goes before the settings, as `key.path=value`.
    """

    stages: frozenset[str] | None = None
    vm_name: str | None = None
    overrides: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """The options of `hyper2kvmctl migrate`, and of `hyper2kvmd run-job`, that say the same."""
        return [
            *(["--stages", ",".join(sorted(self.stages))] if self.stages is not None else []),
            *(["--name", self.vm_name] if self.vm_name is not None else []),
            *(word for override in self.overrides for word in ("--set", override)),
        ]

    def __str__(self) -> str:
        return shlex.join(self.options())


def keep(export: Export, asked: Asked, attempt: int) -> None:
    """Keep what was asked for in place of what was asked before; returns when that is durable. Needs the claim.

    Raise OSError.
    """
    overrides = [text for text in asked.overrides if text.partition("=")[0].partition(".")[0] not in _NOT_KEPT]
    stages = None if asked.stages is None else sorted(asked.stages)
    if stages is None and asked.vm_name is None and not overrides:
        with suppress(FileNotFoundError):
            os.unlink(ASKED, dir_fd=export.fd)
            os.fsync(export.fd)
        return
    shape = {"export": export.directory.name, "stages": stages, "name": asked.vm_name, "set": overrides}
    write_durably(export.fd, ASKED, json.dumps(shape, indent=2).encode() + b"\n", attempt)


def kept(export: Export, work_dir: Path) -> Asked:
    """What was asked for the last time. work_dir: that of the settings.

    Raise OSError, or MigrationError (asked_unusable) for a file that is not ours.
    """
    try:
        fd = open_file(ASKED, dir_fd=export.fd)
    except FileNotFoundError:
        return Asked()
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES):
            raise
        raise unusable(export, f"cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        ours = (0, os.geteuid(), existing_parent(work_dir).stat().st_uid)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in ours or status.st_mode & 0o022:
            raise unusable(export, "is not a file that only this service may write")
        data = os.read(fd, LIMIT)
    finally:
        os.close(fd)
    try:
        found = _checked(json.loads(data), export.directory.name)
    except (ValueError, RecursionError):
        found = None
    if found is None:
        raise unusable(export, "does not say what was asked for this export")
    return found


def unusable(export: Export, what: str) -> MigrationError:
    """The error for a file from which nobody can know what was asked for. what: what is wrong with it."""
    return MigrationError(
        Code.ASKED_UNUSABLE,
        f"{export.directory / ASKED} {what}",
        f"Say again what you want with `hyper2kvmctl migrate` (without options: what the manifest says), or remove"
        f" {ASKED}; then `hyper2kvmctl retry`.",
    )


def _checked(content: Any, name: str) -> Asked | None:
    """What the content of the file means; None if it means nothing."""
    shape = content if isinstance(content, dict) else {}
    stages, vm_name, overrides = (shape.get(key) for key in ("stages", "name", "set"))
    lists = [*(stages if isinstance(stages, list) else []), *(overrides if isinstance(overrides, list) else [None])]
    if shape.get("export") != name or not all(isinstance(text, str) for text in lists):
        return None
    if not isinstance(stages, list | None) or not isinstance(vm_name, str | None):
        return None
    return Asked(None if stages is None else frozenset(stages), vm_name, tuple(overrides or ()))
