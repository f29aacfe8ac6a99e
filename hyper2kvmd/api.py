"""What a program imports: the call that migrates one export as the daemon's jobs do, and the values that belong to it.


report = MigrationPipeline("/var/lib/hypersdk/exports/web01/manifest.json").run()
print(report.results["inspect"]["product_name"], report.disks[0].target)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import ValidationError

from hyper2kvmd.authoring.artifact import ArtifactManifest
from hyper2kvmd.authoring.builder import ManifestBuilder
from hyper2kvmd.daemon.runner import Runner
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.job.events import CHOICES, Event
from hyper2kvmd.job.request import Request
from hyper2kvmd.manifest import (
    Configuration,
    Disk,
    Manifest,
    ManifestError,
    Nic,
    Options,
    Output,
    Stages,
    VMSpec,
    parse,
)
from hyper2kvmd.manifest.model import Convert, Fix, Inspect, Interface, Services, User, Validate
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.asked import Asked
from hyper2kvmd.queue.descriptor import check_place
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.queue.progress import Progress, Stage
from hyper2kvmd.report.model import (
    ChangeRecord,
    DiskRecord,
    DomainRecord,
    ErrorRecord,
    FindingRecord,
    HostRecord,
    ManifestRecord,
    Report,
    StageRecord,
)
from hyper2kvmd.settings.load import load_settings, overridden
from hyper2kvmd.settings.model import Settings

__all__ = [
    "ArtifactManifest",
    "ChangeRecord",
    "Code",
    "Configuration",
    "Convert",
    "Disk",
    "DiskRecord",
    "DomainRecord",
    "ErrorRecord",
    "Event",
    "Finding",
    "FindingRecord",
    "Fix",
    "HostRecord",
    "Inspect",
    "Interface",
    "Manifest",
    "ManifestBuilder",
    "ManifestError",
    "ManifestRecord",
    "MigrationError",
    "MigrationFailed",
    "MigrationPipeline",
    "Nic",
    "Options",
    "Output",
    "Progress",
    "Report",
    "Services",
    "Settings",
    "Stage",
    "StageRecord",
    "Stages",
    "User",
    "VMSpec",
    "Validate",
    "load_settings",
    "parse",
]


class MigrationFailed(MigrationError):
    """A migration did not succeed. `report` is its report, if it got so far; `exit_status` that of the command."""

    def __init__(self, error: MigrationError, report: Report | None, exit_status: int) -> None:
        super().__init__(error.code, error.message, error.hint, field=error.field, tail=error.tail)
        self.report = report
        self.exit_status = exit_status


class MigrationPipeline:
    """One migration of one export. It runs as a process of its own, which ends with the thread that called `run`.

    What is asked for by `stages`, `vm_name` and `overrides` is kept in the export: it holds for every later attempt,
    whoever makes it, until another migration of the export is asked for. `settings` are not kept.

    - `manifest`: the path of a manifest, or of the directory of an export.
    - `settings`: those in force; None reads /etc/hyper2kvmd/hyper2kvmd.yaml, if there is one.
    - `stages`: those to run, of inspect, fix, convert, validate and import, and no others, whatever the manifest and
      the settings enable; None runs what these enable.
    - `dry_run`: check, inspect and fix on throw-away overlays only.
    - `vm_name`: what to call the VM, if not as the manifest does.
    - `overrides`: what goes before the settings, as `key.path=value`.
    - `on_event`: called for each event, in the thread that called `run`, with the event and how far the job is.
    """

    def __init__(
        self,
        manifest: str | os.PathLike[str],
        settings: Settings | None = None,
        *,
        stages: Iterable[str] | None = None,
        dry_run: bool = False,
        vm_name: str | None = None,
        overrides: Iterable[str] = (),
        on_event: Callable[[Event, Progress], None] = lambda event, progress: None,
    ) -> None:
        path = self._manifest = Path(manifest)
        self.export = path if path.is_dir() else path.parent
        asked = [*overrides]
        self.settings = overridden(load_settings() if settings is None else settings, asked)
        if path != self.export:
            if path.name != facts.manifest_name(self.export, self.settings):
                asked.append(f"manifest_names={json.dumps([path.name])}")
            self.settings = self.settings.model_copy(update={"manifest_names": (path.name,)})
        chosen = None if stages is None else frozenset(stages)
        if unknown := (chosen or frozenset()) - {*CHOICES}:
            raise ValueError(f"{', '.join(sorted(unknown))}: no such stage; choose from {', '.join(CHOICES)}")
        self._request = Request(Asked(chosen, vm_name, tuple(asked)), dry_run=dry_run)
        self._on_event = on_event

    def run(self) -> Report:
        """Migrate, and return the report; that of an earlier run if the export is migrated already.

        Raise MigrationFailed for every other end; OSError if no process can be started.
        """
        if not self.export.is_dir():
            hint = "Name the manifest of an existing export."
            raise MigrationError(Code.MANIFEST_UNREADABLE, f"{self.export}: no such directory", hint)
        check_place(self.export, self._manifest.name, self.settings.exports_dir)
        runner = Runner(self.export, self.settings, self._request)
        try:
            status = runner.follow(lambda event: self._on_event(event, runner.progress))
        except KeyboardInterrupt:
            runner.stop()
            raise
        finally:
            runner.close()
        finished = runner.progress.finished or {}
        document = finished.get("report")
        if status == 0 and document is None:
            document = facts.read_report(self.export)  # there was nothing to do
        try:
            report = None if document is None else Report.model_validate(document)
        except ValidationError as error:
            where = self.export / REPORT
            hint = "Read it; to migrate the export again, `hyper2kvmctl retry` it."
            raise MigrationError(Code.IO_ERROR, f"{where}: not a report of this version: {error}", hint) from None
        if status == 0 and report is not None:
            return report
        raise MigrationFailed(_error(finished, report, status), report, status)


def _error(finished: dict[str, str], report: Report | None, status: int) -> MigrationError:
    """Why there is nothing to be happy about."""
    found = report.error if report is not None else None
    if found is not None:
        return MigrationError(Code(found.code), found.message, found.hint, field=found.field, tail=found.tail)
    if "code" in finished:
        return MigrationError(Code(finished["code"]), finished["message"], finished["hint"])
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status} and said nothing"
    return MigrationError(Code.RUNNER_CRASHED, f"the job {how}", "Start it again: it resumes.")
