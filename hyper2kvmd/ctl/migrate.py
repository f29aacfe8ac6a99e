"""`hyper2kvmctl migrate`: one migration by hand, with progress bars on a terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hyper2kvmd.api import MigrationFailed, MigrationPipeline
from hyper2kvmd.ctl.output import print_json
from hyper2kvmd.exits import EXIT_DONE, EXIT_NOT_FOUND
from hyper2kvmd.job.events import CHOICES, Event
from hyper2kvmd.queue.answer import boot_disk
from hyper2kvmd.queue.progress import Progress as JobProgress
from hyper2kvmd.report.model import Report
from hyper2kvmd.report.results import Results
from hyper2kvmd.settings.load import writing_to
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

_STAGES = f"run these of {', '.join(CHOICES)}, whatever the manifest enables, and no others"


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("migrate", help="migrate one export now, and show how it goes")
    parser.add_argument("manifest", type=Path, help="manifest, or directory of the export")
    add_migration_options(parser)
    parser.add_argument("--name", metavar="VM", help="name of the VM, instead of the manifest's")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write the disks there")
    parser.add_argument(
        "--print-output",
        action="store_true",
        help="print a line `Output: PATH` with the disk that the VM boots from, which hypersdk's exporters read",
    )
    parser.set_defaults(run=migrate)
    return [parser]


def add_migration_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that migrates."""
    parser.add_argument("--dry-run", action="store_true", help="check, inspect and fix on throw-away overlays only")
    parser.add_argument("--skip-fix", action="store_true", help="leave the guest as it is")
    parser.add_argument("--stages", type=_stages, metavar="A,B", help=_STAGES)
    parser.add_argument("--no-import", action="store_true", help="do not define a domain")
    parser.add_argument(
        "--strict", action="store_true", help="compare every byte of the result with the source and the fix"
    )


def _stages(text: str) -> tuple[str, ...]:
    stages = tuple(text.split(","))
    if unknown := set(stages) - set(CHOICES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(CHOICES)}")
    return stages


def stages_wanted(options: argparse.Namespace) -> frozenset[str] | None:
    """The stages that a person wants; None: those that the manifest enables."""
    if options.stages is None:
        return None
    left_out = {"fix"} if options.skip_fix else set()
    return frozenset(options.stages) - left_out - ({"import"} if options.no_import else set())


def overrides_wanted(options: argparse.Namespace) -> list[str]:
    """What a person wants beyond the settings: --set, and what other options say of settings."""
    found = [*options.overrides]
    if options.skip_fix:
        found.append("pipeline.fix.enabled=false")
    if options.no_import:
        found.append("libvirt.import=false")
    if options.strict:
        found.append("validate.compare=true")
    return found


def quiet(config: Settings) -> Settings:
    """The settings with the log left to what is shown of the events."""
    return config.model_copy(update={"log": config.log.model_copy(update={"level": "error"})})


def migrate(options: argparse.Namespace, config: Settings) -> int:
    """Run the job as a process of its own, as the daemon does, and show its events."""
    if not options.manifest.exists():
        print(f"hyper2kvmctl: {options.manifest}: no such manifest", file=sys.stderr)
        return EXIT_NOT_FOUND
    overrides = overrides_wanted(options)
    if options.output_dir is not None:
        overrides += writing_to(options.output_dir.resolve())
    console = Console(stderr=options.json)
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    report: Report | None
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}
        pipeline = MigrationPipeline(
            options.manifest,
            quiet(config),
            stages=stages_wanted(options),
            dry_run=options.dry_run,
            vm_name=options.name,
            overrides=overrides,
            on_event=lambda event, progress: _show(event, progress, bars, tasks),
        )
        try:
            report, status = pipeline.run(), EXIT_DONE
        except MigrationFailed as failed:
            report, status = failed.report, failed.exit_status
    if report is not None:
        document = report.model_dump(mode="json")
        if options.print_output and status == EXIT_DONE and (disk := boot_disk(document)) is not None:
            # At once, and not wrapped: the exporter reads the second word of the line, and only as long as we run.
            print(f"Output: {disk[0]}", file=sys.stderr if options.json else sys.stdout, flush=True)
        if options.json:
            print_json(document)
        else:
            print_report(console, document)
    if status < 0:
        print(f"hyper2kvmctl: the job was killed by signal {-status}; nothing was published", file=sys.stderr)
        return 128 - status
    return status


def _show(event: Event, progress: JobProgress, bars: Progress, tasks: dict[str, Any]) -> None:
    data = event.data
    if event.kind == "warning":
        bars.console.print(f"warning: {data['message']}", style="yellow", markup=False, highlight=False)
    if event.kind == "progress":
        bars.update(tasks[data["stage"]], total=1.0, completed=progress.stages[data["stage"]].ratio)
    if event.kind != "stage":
        return
    stage, status = data["stage"], data["status"]
    if status == "started":
        tasks[stage] = bars.add_task(stage, total=None)
    elif status == "done":
        bars.update(tasks[stage], total=1.0, completed=1.0)
    if stage in tasks and status != "started":
        bars.stop_task(tasks[stage])
    if not bars.console.is_terminal:
        seconds = f" {data['seconds']:.1f} s" if status == "done" else ""
        bars.console.print(f"{stage}: {status}{seconds}", markup=False, highlight=False)


def print_report(console: Console, document: dict[str, Any]) -> None:
    """Print what a person wants to know of a report."""

    def line(label: str, text: object, style: str = "") -> None:
        console.print(f"{label:<10} {text}", style=style, markup=False, highlight=False, soft_wrap=True)

    good = document["status"] == "succeeded"
    dry = " (dry run: nothing was written)" if document["dry_run"] else ""
    line("status", f"{document['status']}{dry}", "green" if good else "red")
    where = plain(document["host"]["name"])
    line("VM", f"{document['vm_name'] or '?'}, job {document['job']}, attempt {document['attempts']} on {where}")
    if error := document["error"]:
        for problem in error["problems"] or [error]:
            where = f"{problem['field']}: " if problem.get("field") else ""
            line("error", f"{problem['code']} in {error['stage'] or 'plan'}: {where}{problem['message']}", "red")
            line("remedy", problem["hint"])
        if error["tail"]:
            console.print(error["tail"], markup=False, highlight=False)
    if document["next_attempt_at"]:
        line("next", f"retried at {document['next_attempt_at']}")
    results = Results.model_validate(document["results"])
    if (inspect := results.inspect) is not None:
        kernel = f", kernel {inspect.kernel_version}" if inspect.kernel_version else ""
        line("guest", f"{inspect.title}{kernel}, {inspect.firmware}")
    if (fix := results.fix) is not None and fix.machine is not None:
        line("devices", fix.machine.title)
    if fix is not None and fix.drivers_injected:
        line("drivers", ", ".join(fix.drivers_injected))
    for change in document["changes"]:
        line("change", f"{change['path']}: {change['summary']} ({change['fixer']})")
        # Who only looks wants to see it all; afterwards it is in the report.
        for part in (change["command"], change["diff"], change["evidence"]) if document["dry_run"] else ():
            for text in (part or "").splitlines():
                line("", text)
    for proof in fix.proofs if fix else ():
        line("proof", f"{proof.subject}: {proof.claim}")
        if document["dry_run"]:
            line("", proof.evidence)
    for when, text in fix.fstab.items() if fix else ():
        line(f"fstab {when}"[:10], text)
    if (boot := results.boot) is not None:
        line("boot test", f"{boot.outcome} after {boot.seconds:.0f} s: {boot.reason}")
    for disk in document["disks"]:
        if disk["target"]:
            by = f", by {engine}" if (engine := disk.get("engine")) else ""  # which 0.1 did not say
            line("disk", f"{disk['id']}: {disk['target']} ({disk['virtual_size'] / 2**30:.1f} GiB{by})")
    if domain := document["domain"]:
        line("domain", f"{domain['name']} ({domain['uuid']}) at {domain['uri']}")
    for warning in document["warnings"]:
        line("warning", warning["message"], "yellow")
        if warning["hint"]:
            line("", warning["hint"])
    stages = ", ".join(f"{s['name']} {s['seconds']:.1f}" for s in document["stages"] if s["seconds"] is not None)
    line("seconds", f"{document['seconds']:.1f} ({stages})")
    if estimated := document.get("estimate"):  # which older versions did not have
        line("estimate", f"{estimated['seconds']:.0f} s ({estimated['low']:.0f} to {estimated['high']:.0f})")
    for key, value in document.get("plan", {}).items():
        line("plan", f"{key}: {value}")
