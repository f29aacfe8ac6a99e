"""`hyper2kvmctl migrate`: one migration by hand, with progress bars on a terminal."""

from __future__ import annotations

import argparse
import select
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hyper2kvmd.ctl import print_json
from hyper2kvmd.events import CHOICES, Event
from hyper2kvmd.options import EXIT_NOT_FOUND
from hyper2kvmd.runner import Runner
from hyper2kvmd.settings import Settings


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("migrate", help="migrate one export now, and show how it goes")
    parser.add_argument("manifest", type=Path, help="manifest, or directory of the export")
    parser.add_argument("--dry-run", action="store_true", help="check, inspect and fix on throw-away overlays only")
    parser.add_argument("--skip-fix", action="store_true", help="leave the guest as it is")
    parser.add_argument("--stages", metavar="A,B", help=f"run only these of {', '.join(CHOICES)}")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write the disks there")
    parser.add_argument("--no-import", action="store_true", help="do not define a domain")
    parser.add_argument(
        "--strict", action="store_true", help="compare every byte of the result with the source and the fix"
    )
    parser.set_defaults(run=migrate)
    return [parser]


def migrate(options: argparse.Namespace, config: Settings) -> int:
    """Run the job as a process of its own, as the daemon does, and show its events."""
    export = options.manifest if options.manifest.is_dir() else options.manifest.parent
    if not options.manifest.exists():
        print(f"hyper2kvmctl: {options.manifest}: no such manifest", file=sys.stderr)
        return EXIT_NOT_FOUND
    # The events say all there is to say here.
    update: dict[str, Any] = {"log": config.log.model_copy(update={"level": "error"})}
    if options.manifest != export:
        update["manifest_names"] = (options.manifest.name,)
    if options.output_dir is not None:
        update["output_dir"] = options.output_dir.resolve()
    if options.no_import:
        update["libvirt"] = config.libvirt.model_copy(update={"import_": False})
    if options.strict:
        update["validate_"] = config.validate_.model_copy(update={"compare": True})
    stages = options.stages
    if options.skip_fix:
        wanted = CHOICES if stages is None else stages.split(",")
        stages = ",".join(stage for stage in wanted if stage != "fix")
    arguments = [*(["--dry-run"] if options.dry_run else []), *(["--stages", stages] if stages is not None else [])]
    runner = Runner(export, config.model_copy(update=update), arguments)
    console = Console(stderr=options.json)
    try:
        status = _follow(runner, console)
    except KeyboardInterrupt:
        runner.stop()
        raise
    finally:
        runner.close()
    document = (runner.progress.finished or {}).get("report")
    if options.json:
        if document is not None:
            print_json(document)
    elif document is not None:
        print_report(console, document)
    if status < 0:
        print(f"hyper2kvmctl: the job was killed by signal {-status}; nothing was published", file=sys.stderr)
        return 128 - status
    return status


def _follow(runner: Runner, console: Console) -> int:
    """Show the events of a job until it ends; bars on a terminal, a line per event elsewhere."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        while (status := runner.poll()) is None:
            if select.select([runner.events_fd], [], [], 0.2)[0]:
                for event in runner.read():
                    _show(event, runner, bars, tasks)
        for event in runner.read():
            _show(event, runner, bars, tasks)
    return status


def _show(event: Event, runner: Runner, bars: Progress, tasks: dict[str, Any]) -> None:
    data = event.data
    if event.kind == "warning":
        bars.console.print(f"warning: {data['message']}", style="yellow", markup=False, highlight=False)
    if event.kind == "progress":
        stage = data["stage"]
        ratios = [ratio for (of, _), ratio in runner.progress.ratios.items() if of == stage]
        bars.update(tasks[stage], total=1.0, completed=sum(ratios) / len(ratios))
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
    line("VM", f"{document['vm_name'] or '?'}, job {document['job']}, attempt {document['attempts']}")
    if error := document["error"]:
        for problem in error["problems"] or [error]:
            where = f"{problem['field']}: " if problem.get("field") else ""
            line("error", f"{problem['code']} in {error['stage'] or 'plan'}: {where}{problem['message']}", "red")
            line("remedy", problem["hint"])
        if error["tail"]:
            console.print(error["tail"], markup=False, highlight=False)
    if document["next_attempt_at"]:
        line("next", f"tried again at {document['next_attempt_at']}")
    inspect = document["results"].get("inspect")
    if inspect:
        kernel = f", kernel {inspect['kernel_version']}" if inspect["kernel_version"] else ""
        line("guest", f"{inspect['product_name']}{kernel}, {inspect['firmware']}")
    fixed = document["results"].get("fix", {})
    for change in document["changes"]:
        line("change", f"{change['path']}: {change['summary']} ({change['fixer']})")
        # Who only looks wants to see it all; afterwards it is in the report.
        for part in (change["command"], change["diff"], change["evidence"]) if document["dry_run"] else ():
            for text in (part or "").splitlines():
                line("", text)
    for proof in fixed.get("proofs", []):
        line("proof", f"{proof['subject']}: {proof['claim']}")
        if document["dry_run"]:
            line("", proof["evidence"])
    for when, text in fixed.get("fstab", {}).items():
        line(f"fstab {when}"[:10], text)
    if boot := document["results"].get("boot"):
        line("boot test", f"{boot['outcome']} after {boot['seconds']:.0f} s: {boot['reason']}")
    for disk in document["disks"]:
        if disk["target"]:
            line("disk", f"{disk['id']}: {disk['target']} ({disk['virtual_size'] / 2**30:.1f} GiB)")
    if domain := document["domain"]:
        line("domain", f"{domain['name']} ({domain['uuid']}) at {domain['uri']}")
    for warning in document["warnings"]:
        line("warning", warning["message"], "yellow")
        if warning["hint"]:
            line("", warning["hint"])
    stages = ", ".join(f"{s['name']} {s['seconds']:.1f}" for s in document["stages"] if s["seconds"] is not None)
    line("seconds", f"{document['seconds']:.1f} ({stages})")
