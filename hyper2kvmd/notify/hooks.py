"""The hooks: programs of the administrator's, run before a domain is defined and after a job is over."""

from __future__ import annotations

import os
import re
import signal
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import structlog

from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Hooks
from hyper2kvmd.text import plain

log = structlog.get_logger()

OUTPUT_LIMIT = 16 << 10  # the end of what a hook writes, as it is logged
_NAME = re.compile(r"[A-Za-z0-9_-]+")  # as run-parts(8) has it: what editors and packages leave behind has other names
_FIELD = "hooks.directory"


def found(hooks: Hooks, occasion: Literal["pre-import", "post-job"]) -> list[Path]:
    """The hooks of an occasion, in the order of their names; none if the directory does not exist.

    Raise MigrationError (hook_failed) if it cannot be read.
    """
    directory = hooks.directory / occasion
    try:
        return [directory / name for name in sorted(os.listdir(directory)) if _NAME.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise MigrationError(
            Code.HOOK_FAILED,
            f"the hooks in {directory} cannot be read: {error.strerror}",
            "Let the service's user read the directory.",
            field=_FIELD,
        ) from None


def check(hook: Path) -> None:
    """Raise MigrationError (hook_failed) for a hook that cannot be run, or that others could have written."""
    for path in (hook.parent.parent, hook.parent, hook):
        try:
            status = os.stat(path, follow_symlinks=path != hook)
        except OSError as error:
            raise _unfit(path, f"cannot be looked at: {error.strerror}", "Let the service's user read it.") from None
        if path == hook and not stat.S_ISREG(status.st_mode):
            raise _unfit(path, "is not a plain file", "Put a script there that starts what you want.")
        if status.st_uid not in (0, os.geteuid()):
            raise _unfit(
                path, f"belongs to user {status.st_uid}, who could change what is run", f"Run `chown root {path}`."
            )
        if status.st_mode & 0o022:
            what = f"has mode {stat.S_IMODE(status.st_mode):04o}: others could change what is run"
            raise _unfit(path, what, f"Run `chmod go-w {path}`.")
    if not status.st_mode & 0o111:
        raise _unfit(
            hook, "is not executable", f"Run `chmod +x {hook}`, or give it a name with a dot to have it left alone."
        )


def _unfit(path: Path, what: str, remedy: str) -> MigrationError:
    return MigrationError(Code.HOOK_FAILED, f"the hook {path} {what}", remedy, field=_FIELD)


def variables(export: Path, vm: str, status: str, job: str) -> dict[str, str]:
    """What a hook finds in its environment, for those that do not read JSON. Text from outside is made harmless."""
    return {
        "H2K_EXPORT": str(export),
        "H2K_VM": plain(vm, 255),
        "H2K_STATUS": status,
        "H2K_JOB": plain(job, 255),
        "H2K_REPORT": str(export / REPORT),
    }


def run(tools: Tools, hook: Path, report: bytes, environment: dict[str, str], timeout: float) -> None:
    """Run one hook to its end, with the report on its standard input, and log what it said.

    timeout: seconds, after which it is killed with all of its process group.
    Raise MigrationError (hook_failed), OSError or Cancelled.
    """
    check(hook)
    output = bytearray()

    def keep(data: bytes) -> None:
        output.extend(data)
        del output[:-OUTPUT_LIMIT]

    # Not with the claim: what a hook leaves running would hold it, and the export would never be free.
    tools = replace(tools, claim_fd=None)
    started = time.monotonic()
    status, how = None, f"did not end within {timeout:g} s"
    try:
        done = tools.run(
            hook, accept=range(-64, 256), timeout=timeout, on_output=keep, stdin=report, variables=environment, cwd="/"
        )
        status, complaints = done.returncode, done.stderr
        how = f"was killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exited {status}"
    except MigrationError as error:
        if error.code != Code.TOOL_FAILED:
            raise
        complaints = error.tail
    said = "\n".join(filter(None, (output.decode(errors="replace").strip(), complaints.strip()[-OUTPUT_LIMIT:])))
    tell = log.info if status == 0 else log.warning
    tell(f"hook {how}", hook=str(hook), seconds=round(time.monotonic() - started, 3), tail=said)
    if status != 0:
        last = plain(said.splitlines()[-1], 200) if said else "(it said nothing)"
        raise MigrationError(
            Code.HOOK_FAILED,
            f"the hook {hook} {how}: {last}",
            "Fix what the hook reports, or the hook; then `hyper2kvmctl retry`, which converts nothing again.",
            field=_FIELD,
            tail="\n".join(said.splitlines()[-25:]),
        )
