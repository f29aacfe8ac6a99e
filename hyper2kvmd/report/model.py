"""The migration report: what a job did and how it ended, as written beside the manifest."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

Status = Literal["succeeded", "retrying", "blocked", "failed", "rejected", "cancelled"]


class Part(BaseModel):
    """A part of the report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FindingRecord(Part):
    """Something a person should know, and what to do about it."""

    code: str = Field(description="from the closed list of codes")
    message: str = Field(description="what, with the value")
    hint: str = Field(description="what to do")
    field: str | None = Field(default=None, description="path of the manifest field or setting it is about")


class ErrorRecord(FindingRecord):
    """Why the job did not succeed."""

    stage: str | None = Field(default=None, description="the stage that failed")
    tail: str = Field(default="", description="the last lines of the output of the tool that failed")
    problems: tuple[FindingRecord, ...] = Field(
        default=(), description="all that is wrong, if it is more than one thing"
    )


class StageRecord(Part):
    """One stage of one job, by its `name`, and how many `seconds` it took; one that was skipped has no times."""

    name: str = Field(description="such as convert")
    status: Literal["done", "skipped", "failed", "cancelled"] = Field(description="how it ended")
    started_at: str | None = Field(default=None, description="RFC 3339, UTC")
    seconds: float | None = Field(default=None, description="how long it took; null if it was skipped")


class DiskRecord(Part):
    """One disk: where it came from and what it became.

    `id` and `source_format` are those of the manifest. What begins with `target` is null if no disk was published.
    """

    id: str = Field(description="as the manifest has it")
    source: str = Field(description="path of the source, relative to the export")
    source_format: str = Field(description="vmdk, qcow2, raw, vhd, vhdx or vdi")
    source_bytes: int = Field(description="size of the source file")
    source_sha256: str | None = Field(default=None, description="as computed; null if nothing read all of the file")
    source_verified: bool | None = Field(
        default=None,
        description="whether that is the checksum of the manifest; null in a report of version 0.1, where it is if"
        " there is one",
    )
    virtual_size: int = Field(description="bytes the guest sees")
    target: str | None = Field(default=None, description="absolute path of the published disk")
    target_format: str | None = Field(default=None, description="qcow2 or raw")
    target_bytes: int | None = Field(default=None, description="bytes allocated by the published disk")
    target_sha256: str | None = Field(
        default=None, description="digest of the published disk, if the settings name a key that signs reports"
    )
    engine: str | None = Field(
        default=None, description="what converted it: stream (hyper2kvmd's own reader), reflink or qemu-img"
    )
    boot: bool = Field(default=False, description="whether the guest boots from this disk")

    @property
    def verified(self) -> bool:
        """Whether the file has the checksum that the manifest gives."""
        return self.source_sha256 is not None if self.source_verified is None else self.source_verified


class ChangeRecord(Part):
    """One change inside the guest: the `fixer` that made it, the `path` of the file, and a `summary` for people.

    `diff` is what changed in a text, `command` what was run for it, `evidence` what was found that made it necessary.
    """

    fixer: str = Field(description="the part of FIX that made it")
    path: str = Field(description="the file in the guest")
    summary: str = Field(description="what was changed, in words")
    diff: str | None = Field(
        default=None,
        description="the change of a text, as a unified diff; of a key of Windows' registry, a line for each value",
    )
    command: str | None = Field(default=None, description="the command that was run in the guest")
    evidence: str | None = Field(default=None, description="why it was right to change it")


class DomainRecord(Part):
    """The domain that was defined in libvirt: its `name`, its `uuid`, and the `uri` of that libvirt."""

    name: str = Field(description="as `virsh list` has it")
    uuid: str = Field(description="its UUID, which is the VM's own where that was free")
    uri: str = Field(description="the libvirt that it is defined in")


class ManifestRecord(Part):
    """The manifest that this report belongs to. `dialect` says whose keys it has: seed or go.

    `made` is set where no file holds it: it was made of the .ovf or .ova `name`. Then `sha256` is that of the .ovf.
    """

    name: str = Field(description="file name")
    sha256: str | None = Field(description="digest of its bytes; null if it could not be read")
    dialect: str | None = Field(default=None, description="seed (the guide's) or go (the exporter's)")
    made: dict[str, Any] | None = Field(
        default=None,
        description="what the manifest says that was made of an .ovf or .ova, which `name` is of then, and `sha256` of"
        " the .ovf; null if the export has a manifest",
    )


class HostRecord(Part):
    """Where the job ran, and for whom: the `name` of the host, the `pid` of the process, and who started it."""

    name: str = Field(description="host name")
    pid: int = Field(description="process id of the last attempt")
    user: str | None = Field(default=None, description="the user with whose rights it ran")
    login_user: str | None = Field(default=None, description="who had logged in to start it; null for a service")
    started_by: Literal["daemon", "command"] | None = Field(
        default=None, description="the daemon, or a command that a person ran"
    )
    submitted_by: str | None = Field(
        default=None, description="the host whose daemon handed the job over to an engine; null without an engine"
    )


class EstimateRecord(Part):
    """What the job was to take, by what was known when it began; the report's `seconds` are what it took."""

    seconds: float = Field(description="the most likely duration")
    low: float = Field(description="one of ten jobs takes less")
    high: float = Field(description="one of ten jobs takes more")
    stages: dict[str, float] = Field(description="seconds of each stage")
    written: int = Field(description="bytes that its disks were to take")
    samples: int = Field(description="how many earlier migrations of that host this was made of; 0: of sizes alone")
    confidence: str = Field(description="none, low, medium or high")


class Report(Part):
    """How the job of one export ended. While the report exists, no job starts, unless the status is `retrying`.

    The times, and the `seconds` it took, are those of the last attempt. `warnings`, `stages`, `disks` and `changes` are
    in the order in which they came about.
    """

    schema_version: Literal["1.0"] = "1.0"
    status: Status = Field(description="how the job ended")
    dry_run: bool = Field(default=False, description="whether everything was done on throw-away overlays only")
    job: str = Field(description="identifier of the job: the same for every attempt at this manifest")
    vm_name: str | None = Field(default=None, description="the VM's name; null if the manifest could not be read")
    manifest: ManifestRecord
    attempts: int = Field(description="how many times the job was started; the last one wrote this report")
    started_at: str = Field(description="RFC 3339, UTC")
    finished_at: str = Field(description="RFC 3339, UTC")
    seconds: float = Field(description="how long the last attempt took")
    next_attempt_at: str | None = Field(default=None, description="RFC 3339, UTC; only when the status is `retrying`")
    error: ErrorRecord | None = None
    warnings: tuple[FindingRecord, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    results: dict[str, dict[str, Any]] = Field(default_factory=dict, description="results of each stage, by its name")
    disks: tuple[DiskRecord, ...] = ()
    changes: tuple[ChangeRecord, ...] = ()
    domain: DomainRecord | None = None
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="what the settings and the command line put in place of the manifest's wishes"
    )
    tags: dict[str, str] = Field(default_factory=dict, description="tags of the manifest")
    plan: dict[str, Any] = Field(default_factory=dict, description="what was planned for the VM, as its file says")
    estimate: EstimateRecord | None = None
    tools: dict[str, str] = Field(default_factory=dict, description="versions of the tools that were used")
    host: HostRecord

    def to_bytes(self) -> bytes:
        """The report as it is written to a file."""
        return self.model_dump_json(indent=2).encode() + b"\n"


class _Schema(GenerateJsonSchema):
    """Writes the same whichever version of pydantic it is: older ones leave out that a table may hold anything."""

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        made = super().dict_schema(schema)
        if "patternProperties" not in made:
            made.setdefault("additionalProperties", True)
        return made


def report_schema() -> dict[str, Any]:
    """The JSON Schema of the report; published as docs/migration-report.schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Report.model_json_schema(schema_generator=_Schema),
    }
