"""`hyper2kvmctl validate`: is this export fit to be migrated? All findings at once."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from hyper2kvmd import journal
from hyper2kvmd.authoring.accepted import manifest_of
from hyper2kvmd.ctl.output import bars, print_json
from hyper2kvmd.errors import Collected, Finding
from hyper2kvmd.exits import EXIT_DONE, EXIT_FAILED
from hyper2kvmd.image.source import verify_checksum
from hyper2kvmd.job import reserve
from hyper2kvmd.job.context import Job, job_id
from hyper2kvmd.job.events import Emitter
from hyper2kvmd.job.main import as_planned
from hyper2kvmd.job.plan import make_plan, memory_mb, needs
from hyper2kvmd.job.request import Request
from hyper2kvmd.manifest import Manifest
from hyper2kvmd.queue.export import beside
from hyper2kvmd.queue.facts import look, read_manifest, read_report
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("validate", help="check a manifest and its disks, changing nothing")
    parser.add_argument("manifest", type=Path, help="path of the manifest")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="compute the checksums too, which reads every disk; and treat unknown keys as errors",
    )
    parser.set_defaults(run=validate)
    return [parser]


def validate(options: argparse.Namespace, config: Settings) -> int:
    """Check one export; the exit status is 1 if there are errors, of whatever kind."""
    warnings: list[Finding] = []
    path: Path = options.manifest
    manifest: Manifest | None = None
    problems = Collected()
    journal.configure("error")  # what is to be said is printed below
    with contextlib.ExitStack() as stack, problems:
        manifest = _check(path, config, problems, warnings, stack, checksums=options.strict)
    errors = problems.findings()
    if options.strict:  # what stops no migration is still a slip of the pen
        errors += tuple(finding for finding in warnings if finding.code == "unknown_key")
        warnings = [finding for finding in warnings if finding.code != "unknown_key"]
    status = EXIT_FAILED if errors else EXIT_DONE
    if options.json:
        print_json(
            {
                "manifest": str(path),
                "valid": status == EXIT_DONE,
                "errors": [finding.as_json() for finding in errors],
                "warnings": [finding.as_json() for finding in warnings],
            }
        )
        return status
    console = Console()
    for style, label, findings in (("red", "error", errors), ("yellow", "warning", warnings)):
        for finding in findings:
            console.print(f"{label}: {finding}", style=style, markup=False, highlight=False, soft_wrap=True)
    if manifest is not None and status == EXIT_DONE:
        console.print(
            f"{path}: valid, {len(manifest.disks)} disk{'s'[: len(manifest.disks) != 1]}"
            + ("" if options.strict else "; checksums not computed (--strict does)"),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return status


def _check(
    path: Path,
    config: Settings,
    problems: Collected,
    warnings: list[Finding],
    stack: contextlib.ExitStack,
    *,
    checksums: bool,
) -> Manifest:
    """Make the plan of the job, as a runner would, without a claim. Raise MigrationError for a bad manifest."""
    export = stack.enter_context(beside(path))
    _, data = read_manifest(export.fd, path.parent, (path.name,))
    tools = Tools()
    request, config, mistake = as_planned(look(path.parent, config), export, Request(), config)
    with problems:
        if mistake is not None:
            raise mistake
    with bars() as tell:
        manifest = manifest_of(
            *(export, path.name, data, config, tools), pipeline=config.pipeline, check=checksums, on_progress=tell
        )
    warnings += manifest.warnings
    # Nothing is locked, so nothing may be written: whoever may read an export may check it.
    job = Job(job_id(export.directory, manifest.sha256), export, 0, request, config, tools, Emitter(None))
    report = read_report(export.directory) or {}
    disks = report.get("disks", ()) if report.get("job") == job.id else ()
    published = [Path(disk["target"]) for disk in disks if disk["target"]]
    plan = make_plan(job, manifest, problems, stack, published)
    with problems:
        reserve.check(job, needs(job, plan, lambda disk: disk.final in published), memory_mb(job, plan, fixed=False))
    with bars() as tell:
        for disk in plan.disks if checksums else ():
            if disk.source.disk.sha256 is None:
                continue
            with problems:
                verify_checksum(disk.source, job.tools.cancel, partial(tell, disk.id))
    warnings += job.record.warnings
    return manifest
