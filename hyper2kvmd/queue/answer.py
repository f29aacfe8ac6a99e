"""What exporters are told that wait for their VMs: one pure decision for each name, and how it is put before them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper2kvmd.errors import Code, Finding
from hyper2kvmd.files import write_durably
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.handover import Ticket
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.queue.state import FINAL, NOT_YET, Facts, State, state_of
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import show

Verdict = Finding | State | None  # what went wrong, SUCCEEDED, or None as long as that is not known


def verdict(ticket: Ticket, look: Facts | Finding | None, settings: Settings, now: float) -> Verdict:
    """How the export that a ticket means has ended. Pure.

    look: what was found of its directory: facts, why it cannot be looked at, or None if it is not there.
    """
    age = now - ticket.since

    def older_than(seconds: float) -> bool:
        return not 0 <= age < seconds  # a time in the future is a clock that jumped

    if ticket.problem is not None:
        if ticket.problem.code == Code.IO_ERROR:
            return None
        # Half-written is normal for as long as the exporter writes.
        writing = ticket.problem.code == Code.MANIFEST_UNREADABLE
        return ticket.problem if not writing or older_than(settings.incomplete_grace_seconds) else None
    if isinstance(look, Finding):
        return look if older_than(settings.incomplete_grace_seconds) else None
    if look is None or (not look.held and look.manifest_sha256 != ticket.sha256):
        return _not_there(ticket, look) if older_than(settings.settle_seconds) else None
    state, finding = state_of(look, settings, now)
    if state not in FINAL or (finding is not None and finding.code in NOT_YET):
        return None
    return state if state == State.SUCCEEDED else finding or _without_reason(ticket, state)


def _not_there(ticket: Ticket, look: Facts | None) -> Finding:
    if look is None:
        message = f"{ticket.directory}, where the manifest has its disks, is not there"
    elif look.problem is not None:
        return look.problem
    elif look.manifest is None:
        message = f"{ticket.directory} holds no manifest, and the one in the queue is a copy"
    else:
        message = f"{ticket.directory}/{look.manifest} is another manifest than the one in the queue"
    hint = "Export each VM into a directory of its own, with the manifest beside the disks; then hand it over again."
    return Finding(Code.MANIFEST_CHANGED, message, hint)


def _without_reason(ticket: Ticket, state: State) -> Finding:
    return Finding(Code.MANIFEST_CHANGED, f"{ticket.directory} is {state}", f"Look at {REPORT} there.")


@dataclass(frozen=True)
class Due:
    """What is to be said under one name, and to whom; None if that is not known yet."""

    name: str
    waiting: tuple[Ticket, ...]
    verdict: tuple[Ticket, Finding | State] | None


def due(tickets: Iterable[Ticket], judge: Callable[[Ticket], Verdict]) -> tuple[list[Due], list[Ticket]]:
    """What is to be said to those who wait, and the tickets that nobody needs any more. Pure but for `judge`.

    All who wait for one name read the same file: it must be right for each of them. So nothing is said before all is
    known, and one that went wrong goes before others that succeeded. Who has the answer is told again only if a
    failure has become a success.
    """
    names: dict[str, dict[Path, Ticket]] = {}
    obsolete = []
    for ticket in tickets:
        group = names.setdefault(ticket.name, {})
        # An export that is handed over again stands for what it was before.
        key = ticket.directory or ticket.path
        if (before := group.pop(key, None)) is not None:
            obsolete.append(before)
        group[key] = ticket
    found = []
    for name, group in names.items():
        waiting = tuple(ticket for ticket in group.values() if not ticket.answered)
        if waiting:
            obsolete += [ticket for ticket in group.values() if ticket.answered]
        verdicts = [(ticket, judge(ticket)) for ticket in waiting or group.values()]
        known = [(ticket, verdict) for ticket, verdict in verdicts if verdict is not None]
        wrong = [(ticket, verdict) for ticket, verdict in known if isinstance(verdict, Finding)]
        if waiting:
            said = (wrong or known)[-1] if len(known) == len(verdicts) else None
            found.append(Due(name, waiting, said))
        elif not wrong and len(known) == len(verdicts):
            found.append(Due(name, (), known[-1]))
    return found, obsolete


def withdraw(settings: Settings, name: str) -> None:
    """See that nothing is said: what was said the last time would be taken for the answer. Raise OSError."""
    with _answers(settings) as fd:
        _remove_link(fd, f"{name}.qcow2")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{name}.error", dir_fd=fd)


def failed_before(settings: Settings, name: str) -> bool:
    """Whether the answer so far is that it went wrong."""
    directory = settings.hypersdk.output_dir
    return directory is not None and os.path.lexists(directory / f"{name}.error")


def say(settings: Settings, ticket: Ticket, answer: Path | Finding) -> None:
    """Put the answer before whoever waits, whole and durable: the disk, or what went wrong. Raise OSError."""
    link, error = f"{ticket.name}.qcow2", f"{ticket.name}.error"
    with _answers(settings) as fd:
        _remove_link(fd, link)
        if isinstance(answer, Finding):
            where = f"export: {ticket.directory}\n" if ticket.directory else ""
            text = f"{answer.code}: {answer.message}\n{answer.hint}\n{where}"
            write_durably(fd, error, text.encode(errors="replace"), 0)
            return
        # Not a second name of the file: the disk stays where its domain has it, whoever owns it by now.
        os.symlink(answer, link, dir_fd=fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(error, dir_fd=fd)
        os.fsync(fd)


@contextlib.contextmanager
def _answers(settings: Settings) -> Iterator[int]:
    fd = os.open(settings.hypersdk.output_dir or Path(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _remove_link(fd: int, name: str) -> None:
    """Remove an answer of ours. Anything else of its name may be somebody's disk."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=fd)


def delivered(settings: Settings, ticket: Ticket) -> Path | Finding:
    """The disk to tell of, or why it cannot be told of although the VM was migrated. Raise OSError."""
    disk = boot_disk(facts.read_report(ticket.directory or Path()) or {})
    if disk is None:
        message = "the VM was migrated without writing a disk: by a dry run, or without the stage convert"
        return Finding(Code.OUTPUT_DENIED, message, "Change that in the manifest or the settings if a disk is wanted.")
    path, format = disk
    # The report lies in the exporter's directory, where anybody could have planted one.
    if path.parent not in (settings.output_dir, *settings.output.allowed_dirs):
        message = f"the VM was migrated to {path}, which is in no directory that the settings name"
        return Finding(Code.OUTPUT_DENIED, message, "Take it from there, or add its directory to output.allowed_dirs.")
    if not path.is_file():
        return Finding(Code.DISK_MISSING, f"the VM was migrated to {path}, which is gone since", "Export it again.")
    if format != "qcow2":
        message = f"the VM was migrated to {path}, whose format is {show(format)}; the exporter waits for qcow2"
        return Finding(Code.FORMAT_MISMATCH, message, "Take it from there, or set output.format to qcow2.")
    link = (settings.hypersdk.output_dir or Path()) / f"{ticket.name}.qcow2"
    if os.path.lexists(link) and not link.is_symlink():
        message = f"the VM was migrated to {path}, but {link} is a file that somebody else put there"
        hint = "Move it away: exporters take it for the answer."
        return Finding(Code.OUTPUT_EXISTS, message, hint, "hypersdk.output_dir")
    return path


def boot_disk(report: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The published disk that the VM boots from and its format, by a report; None if none was published."""
    disks = report.get("disks")
    published = [disk for disk in disks if isinstance(disk, dict)] if isinstance(disks, list) else []
    published = [disk for disk in published if isinstance(disk.get("target"), str)]
    if not published:
        return None
    disk = next((disk for disk in published if disk.get("boot") is True), published[0])
    return Path(disk["target"]), str(disk.get("target_format"))
