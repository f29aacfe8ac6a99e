"""The message that a report stands for, which receivers get when a job or a cutover is over."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from hyper2kvmd.text import duration, plain

CUTOVER = "cutover"  # the event
_CUTOVERS = "cutover-report."
Text = Annotated[str, Field(max_length=1 << 16)]


class _Part(BaseModel):
    """What is read of a report, which may be one of a later version, or anything."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Error(_Part):
    code: Text
    message: Text
    hint: Text
    stage: Text | None = None


class _Host(_Part):
    name: Text
    submitted_by: Text | None = None


class _Report(_Part):
    status: Literal["succeeded", "failed", "blocked", "rejected", "cancelled"]
    dry_run: Literal[False] = False
    job: Text
    vm_name: Text | None = None
    attempts: int = Field(ge=0, lt=1 << 53)
    finished_at: AwareDatetime
    seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    warnings: tuple[Any, ...] = ()
    error: _Error | None = None
    host: _Host


class _Step(_Part):
    name: Text
    status: Text
    evidence: Text
    hint: Text = ""


class _Cutover(_Part):
    status: Literal["verified", "unverified", "failed", "undone"]
    job: Text
    vm_name: Text
    finished_at: AwareDatetime
    seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    steps: tuple[_Step, ...] = ()
    host: _Host


@dataclass(frozen=True)
class Ended:
    """A job or a cutover that is over. `at` is when, in seconds since the epoch; `report` is all of it, as it was read.

    `event` is how a job ended, or CUTOVER, whose end `status` says. `teller` is the host that tells of it: where it
    ran, or the one that had an engine place it, which need not have anybody there who does. `title` and `text` are for
    mail and chats.
    """

    id: str
    path: Path
    vm: str
    job: str
    host: str
    teller: str
    event: str
    status: str
    summary: str
    at: float
    report: dict[str, Any]
    title: str
    text: str

    def message(self) -> bytes:
        """The message for the webhook, as docs/notify.md has it."""
        shape = {
            "id": self.id,
            "event": self.event,
            "vm": self.vm,
            "job": self.job,
            "host": self.host,
            "status": self.status,
            "summary": self.summary,
            "text": _for_chat(self.summary),
            "report_path": str(self.path),
            "report": self.report,
        }
        return json.dumps(shape).encode()


def ended(path: Path, report: dict[str, Any]) -> Ended | None:
    """What the report at `path` has to tell; None for one that is not at its end, a dry run, or no report of ours."""
    try:
        found = (_Cutover if path.name.startswith(_CUTOVERS) else _Report).model_validate(report)
        at = found.finished_at.timestamp()
        json.dumps(report, allow_nan=False)
    except (ValidationError, ValueError, OverflowError, RecursionError):
        return None
    vm = found.vm_name or path.parent.name
    if isinstance(found, _Cutover):
        return _cut_over(path, found, report, at)
    return Ended(
        id=f"{found.job}/{found.attempts}/{report['finished_at']}",
        path=path,
        vm=vm,
        job=found.job,
        host=found.host.name,
        teller=found.host.submitted_by or found.host.name,
        event=found.status,
        status=found.status,
        summary=_summary(found, vm),
        at=at,
        report=report,
        title=_for_people(f"{plain(vm)}: {found.status}"),
        text=_for_people(_text(found, path, _summary(found, vm))),
    )


def _cut_over(path: Path, found: _Cutover, report: dict[str, Any], at: float) -> Ended:
    line = f"{plain(found.vm_name)}: cutover {found.status} after {duration(found.seconds)}"
    wrong = [step for step in found.steps if step.status == "failed"]
    lines = [f"{plain(step.evidence, 500)}; {plain(step.hint, 500)}" for step in wrong]
    return Ended(
        id=f"{found.job}/{CUTOVER}/{report['finished_at']}",
        path=path,
        vm=found.vm_name,
        job=found.job,
        host=found.host.name,
        teller=found.host.name,
        event=CUTOVER,
        status=found.status,
        summary="; ".join([line, *lines[:1]]),
        at=at,
        report=report,
        title=_for_people(f"{plain(found.vm_name)}: cutover {found.status}"),
        text=_for_people("\n".join([line, *lines, f"Report: {plain(str(path), 500)} on {plain(found.host.name)}"])),
    )


def _summary(report: _Report, vm: str) -> str:
    """One line for people: how it ended, why, and what to do. No text from outside can make a second one."""
    line = f"{plain(vm)}: {report.status}"
    if report.error is None:
        count = len(report.warnings)
        warnings = f", {count} warning{'s'[: count != 1]}" if count else ""
        return f"{line} after {duration(report.seconds)}{warnings}"
    error = report.error
    where = f" in {plain(error.stage)}" if error.stage else ""
    hint = f"; {plain(error.hint, 500)}" if error.hint else ""
    return f"{line}{where}: {plain(error.code)}: {plain(error.message, 500)}{hint}"


def _text(report: _Report, path: Path, summary: str) -> str:
    """The message for mail and chats: what happened, what to do, and where all of it stands."""
    lines = [summary]
    if (error := report.error) is not None:
        where = f" in {plain(error.stage)}" if error.stage else ""
        lines = [f"{plain(error.message, 500)} ({plain(error.code)}{where})"]
        lines += [f"What to do: {plain(error.hint, 500)}"] if error.hint else []
    return "\n".join([*lines, f"Report: {plain(str(path), 500)} on {plain(report.host.name)}"])


def _for_people(text: str) -> str:
    """The same, where a VM called @all, or <!channel>, would call everybody; each service escapes the rest its way."""
    for character in "@!<":
        text = text.replace(character, f"{character}\u200b")
    return text


def _for_chat(summary: str) -> str:
    """The summary for Slack and its like, where a VM called @all, or <!channel>, would call everybody."""
    for character, harmless in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("@", "@\u200b")):
        summary = summary.replace(character, harmless)
    return summary
