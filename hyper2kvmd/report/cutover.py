"""The cutover report: how a migrated VM took the place of its source, as written beside the migration report."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, IPvAnyAddress

from hyper2kvmd.report.model import DomainRecord, HostRecord, Part

# Of these, `ready` and `refused` are answers of the command alone: nothing was done, so nothing is written.
CutoverStatus = Literal["ready", "refused", "running", "verified", "unverified", "failed", "undone"]


class StepRecord(Part):
    """One step of a cutover, by its `name`, and what it showed."""

    name: str = Field(
        description="report, domain, boot-test, source, confirm, start, up, addresses, screen or shutdown"
    )
    status: Literal["passed", "failed", "skipped", "planned"] = Field(
        description="how it ended; planned: a dry run only says what it would do"
    )
    evidence: str = Field(description="what was seen, or why the step was skipped or failed")
    hint: str = Field(default="", description="what to do about a step that failed")


class CutoverReport(Part):
    """How one cutover went. While the VM starts, the status is `running` and there is no end."""

    schema_version: Literal["1.0"] = "1.0"
    status: CutoverStatus = Field(description="how it ended, or that it runs")
    job: str = Field(description="the job that made the domain, as the migration report has it")
    migrated_at: str = Field(description="when that job ended: the report's `finished_at`")
    vm_name: str = Field(description="the VM's name")
    domain: DomainRecord
    addresses: tuple[IPvAnyAddress, ...] = Field(
        default=(), description="the IP addresses that the VM was expected to have"
    )
    started_at: str = Field(description="RFC 3339, UTC")
    finished_at: str | None = Field(default=None, description="RFC 3339, UTC; null while it runs")
    seconds: float = Field(default=0, description="how long it took")
    autostart: bool = Field(
        default=False, description="whether the host is to start the VM with itself; an undo turns that off"
    )
    steps: tuple[StepRecord, ...] = ()
    host: HostRecord

    def to_bytes(self) -> bytes:
        """The report as it is written to a file."""
        return self.model_dump_json(indent=2).encode() + b"\n"
