"""`hyper2kvmctl plan`: what is planned for each VM, from a spreadsheet and back, checked, and how long it will take."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hyper2kvmd.ctl.listing import STYLE
from hyper2kvmd.ctl.output import print_json, refuse, refuse_existing, say
from hyper2kvmd.ctl.spreadsheet import COLUMNS, CSV_LIMIT, REPORTED, as_csv, read_csv, shown
from hyper2kvmd.errors import Finding
from hyper2kvmd.exits import EXIT_CONFIG, EXIT_DONE, EXIT_NOT_FOUND
from hyper2kvmd.files import open_directory, write_whole
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.estimate import Estimate, total
from hyper2kvmd.queue.plans import SUFFIX, mistake, plan_file, planned, unknown_wave
from hyper2kvmd.queue.state import FINAL, Facts, State, clock, state_of
from hyper2kvmd.settings.model import Hypersdk, Settings
from hyper2kvmd.settings.plan import NO_PLAN, VmPlan
from hyper2kvmd.text import duration, nearest, size


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands to the parser."""
    plan = commands.add_parser("plan", help="plan a campaign: one file for each VM, and a spreadsheet for all of them")
    actions = plan.add_subparsers(dest="action", required=True)
    check = actions.add_parser("check", help="check the plans of all VMs")
    check.set_defaults(run=check_plans)
    load = actions.add_parser("import", help="make the plans from a spreadsheet in CSV, one row for each VM")
    load.add_argument("file", type=Path, metavar="CSV", help="the spreadsheet; its first row names the columns")
    load.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    load.set_defaults(run=import_plans)
    save = actions.add_parser("export", help="write all plans, with the states of their VMs, as CSV")
    save.add_argument("-o", "--output", type=Path, metavar="FILE", help="the file to write (default: standard output)")
    save.set_defaults(run=export_plans)
    guess = actions.add_parser("estimate", help="estimate how long the migrations will take, and how much they write")
    guess.add_argument("directory", type=Path, nargs="?", metavar="DIR", help="exports (default: exports_dir)")
    guess.set_defaults(run=estimate_all)
    return [check, load, save, guess]


@dataclass(frozen=True)
class Vm:
    """A VM of the campaign: its plan, what is wrong with that, and its export, as far as these are there."""

    name: str
    plan: VmPlan
    problem: Finding | None
    look: Facts | None
    state: State | None
    reason: Finding | None


def check_plans(options: argparse.Namespace, config: Settings) -> int:
    """Say what is wrong with any plan, and what may be."""
    vms = _campaign(config)
    problems = [vm.problem for vm in vms if vm.problem is not None]
    problems += _same_names(vms, config)
    notes = [*_strangers(config), *_past(vms, config), *_without_export(vms, config)]
    if options.json:
        print_json(
            {
                "plans": sum(vm.plan.model_fields_set != set() for vm in vms),
                "problems": [finding.as_json() for finding in problems],
                "warnings": [finding.as_json() for finding in notes],
            }
        )
    else:
        for finding in (*problems, *notes):
            print(f"hyper2kvmctl: {finding}", file=sys.stderr)
        good = sum(vm.problem is None and vm.plan.model_fields_set != set() for vm in vms)
        say(f"{good} plan{' is' if good == 1 else 's are'} good, {len(problems)} problems, {len(notes)} warnings")
    return EXIT_CONFIG if problems else EXIT_DONE


def _campaign(config: Settings) -> list[Vm]:
    """All VMs that have an export or a plan, in order of their names."""
    found = {}
    for export in facts.exports(config)[0]:
        look = facts.look_or_reason(export, config)
        if isinstance(look, Facts):
            state, reason = state_of(look, config, time.time())
            found[export.name] = Vm(export.name, look.plan, look.plan_problem, look, state, reason)
    for name in _planned_names(config):
        if name not in found:
            plan = planned(config, name)
            problem = plan if isinstance(plan, Finding) else None
            found[name] = Vm(name, plan if isinstance(plan, VmPlan) else NO_PLAN, problem, None, None, None)
    return [found[name] for name in sorted(found)]


def _planned_names(config: Settings) -> list[str]:
    files = _files(config)
    return [file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX) and not file.startswith(".")]


def _files(config: Settings) -> list[str]:
    try:
        return sorted(os.listdir(config.plan_dir))
    except FileNotFoundError:
        return []


def _same_names(vms: Iterable[Vm], config: Settings) -> list[Finding]:
    """Two VMs cannot be called the same."""
    first: dict[str, str] = {}
    found = []
    for vm in vms:
        name = vm.plan.name or vm.name
        if other := first.get(name):
            message = f"{plan_file(config, vm.name)}: name: {name} is the name of {other}, too"
            found.append(mistake(message, "Give one of them another name."))
        first[name] = vm.name
    return found


def _strangers(config: Settings) -> list[Finding]:
    """Files that look as if somebody took them for plans."""
    return [
        mistake(f"{config.plan_dir / file} is not read", f"A plan is called NAME{SUFFIX}; rename it, or move it away.")
        for file in _files(config)
        if not file.startswith(".") and not file.endswith(SUFFIX)
    ]


def _past(vms: Iterable[Vm], config: Settings) -> list[Finding]:
    found = []
    for vm in vms:
        over = vm.plan.window(config).not_after
        if over is not None and over.timestamp() <= time.time() and vm.state != State.SUCCEEDED:
            message = f"{plan_file(config, vm.name)}: the window of {vm.name} is over since {clock(over)}"
            found.append(mistake(message, "Give it a later not_after, or its wave in the settings."))
    return found


def _without_export(vms: Sequence[Vm], config: Settings) -> list[Finding]:
    """Plans that nothing follows: a name that is misspelt, or an export that is still to come."""
    exports = [vm.name for vm in vms if vm.look is not None]
    found = []
    for vm in vms:
        if vm.look is None:
            close = nearest(vm.name, exports)
            hint = f"Did you mean {close}?" if close else "The plan counts as soon as the export is there."
            found.append(mistake(f"{plan_file(config, vm.name)}: no export {vm.name} in {config.exports_dir}", hint))
    return found


def import_plans(options: argparse.Namespace, config: Settings) -> int:
    """Write a file for each row, if all rows are good; say which are new and which have changed."""
    try:
        with options.file.open("rb") as file:
            data = file.read(CSV_LIMIT + 1)
    except FileNotFoundError:
        return refuse(EXIT_NOT_FOUND, f"{options.file}: no such file; name a spreadsheet in CSV")
    plans, problems = read_csv(data, str(options.file))
    for name, plan in plans.items():
        if wrong := unknown_wave(plan, config, f"{options.file}: {name}"):
            problems.append(wrong)
    if problems:
        for problem in problems:
            print(f"hyper2kvmctl: {problem}", file=sys.stderr)
        return refuse(EXIT_CONFIG, f"{options.file}: nothing was written")
    changed = {name: _change(config, name, plan) for name, plan in plans.items()}
    if not options.dry_run:
        _write(config, {name: plan for name, plan in plans.items() if changed[name] != "unchanged"})
    kept = sorted({*_planned_names(config)} - {*plans})
    if options.json:
        print_json({"plans": changed, "not_in_file": kept, "dry_run": options.dry_run})
        return EXIT_DONE
    for name, what in changed.items():
        if what != "unchanged":
            say(f"{name}: {what}")
    counts = [f"{sum(what == kind for what in changed.values())} {kind}" for kind in ("new", "changed", "unchanged")]
    say(", ".join(counts) + (" (dry run: nothing is written)" if options.dry_run else ""))
    if kept:
        say(f"{len(kept)} plans are not in {options.file} and stay as they are: {', '.join(kept)}")
    return EXIT_DONE


def _change(config: Settings, name: str, plan: VmPlan) -> str:
    if not plan_file(config, name).exists():
        return "new"
    return "unchanged" if planned(config, name) == plan else "changed"


def _write(config: Settings, plans: Mapping[str, VmPlan]) -> None:
    """Write the files, each at once and whole. Raise OSError."""
    config.plan_dir.mkdir(parents=True, exist_ok=True)
    fd = open_directory(config.plan_dir)
    try:
        for name, plan in plans.items():
            values = plan.model_dump(mode="json", exclude_unset=True)
            text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
            write_whole(fd, f"{name}{SUFFIX}", text.encode(), os.getpid())
    finally:
        os.close(fd)


def export_plans(options: argparse.Namespace, config: Settings) -> int:
    """Write a row for each VM: its plan, its state, and how long it takes or took."""
    vms = _campaign(config)
    if options.json:
        print_json([_as_json(vm) for vm in vms])
        return EXIT_DONE
    text = as_csv([(*COLUMNS, *REPORTED), *map(_row, vms)])
    if options.output is None:
        sys.stdout.write(text)
        return EXIT_DONE
    refuse_existing(options.output)
    fd = open_directory(options.output.absolute().parent)
    try:
        write_whole(fd, options.output.name, text.encode(), os.getpid())
    finally:
        os.close(fd)
    say(f"{options.output}: {len(vms)} VMs")
    return EXIT_DONE


def _row(vm: Vm) -> list[str]:
    values = vm.plan.model_dump(mode="json", exclude_unset=True)
    plan = [shown(values.get(key)) for key in VmPlan.model_fields]
    estimate = vm.look.estimate if vm.look else None
    took = vm.look.record.seconds if vm.look and vm.state == State.SUCCEEDED else None
    reason = vm.problem or vm.reason
    return [
        vm.name,
        *plan,
        str(vm.state or "no export"),
        reason.message if reason else "",
        f"{estimate.seconds:.0f}" if estimate and vm.state not in FINAL - {State.BLOCKED} else "",
        f"{took:.0f}" if took is not None else "",
    ]


def _as_json(vm: Vm) -> dict[str, Any]:
    reason = vm.problem or vm.reason
    return {
        "vm": vm.name,
        "plan": vm.plan.model_dump(mode="json", exclude_unset=True),
        "state": vm.state,
        "reason": None if reason is None else reason.as_json(),
        "estimate": None if vm.look is None or vm.look.estimate is None else vm.look.estimate.as_json(),
    }


def estimate_all(options: argparse.Namespace, config: Settings) -> int:
    """Print what each VM that is still to be migrated will take, and what all of them will."""
    if options.directory is not None:
        config = config.model_copy(update={"exports_dir": options.directory.resolve(), "hypersdk": Hypersdk()})
    left = [
        (vm, vm.look, vm.look.estimate)
        for vm in _campaign(config)
        if vm.look is not None and vm.look.estimate is not None and vm.state not in FINAL - {State.BLOCKED}
    ]
    left.sort(key=lambda one: (one[0].plan.wave or "", one[0].name))
    waves: dict[str, list[Estimate]] = {}
    for vm, _, one in left:
        waves.setdefault(vm.plan.wave or "", []).append(one)
    whole = total([one for _, _, one in left], config.workers)
    if options.json:
        shape = {name: total(each, config.workers).as_json() for name, each in waves.items() if name}
        print_json({"vms": [_as_json(vm) for vm, _, _ in left], "waves": shape, "total": whole.as_json()})
        return EXIT_DONE
    table = Table(box=None, pad_edge=False)
    for heading in ("VM", "WAVE", "STATE", "READS", "WRITES", "TIME", "FROM", "TO", "CONFIDENCE"):
        table.add_column(heading, overflow="fold")
    for vm, look, one in left:
        bytes = sum(bytes for _, bytes in look.sizes)
        style = None if vm.state is None else STYLE.get(vm.state)
        table.add_row(Text(vm.name), Text(vm.plan.wave or ""), vm.state, size(bytes), *_cells(one), style=style)
    for name in sorted(waves) if len(waves) > 1 else ():
        heading = f"wave {name}" if name else "no wave"
        table.add_row(Text(heading), "", "", "", *_cells(total(waves[name], config.workers)), style="bold")
    table.add_row(f"all {len(left)}", "", f"{config.workers} at a time", "", *_cells(whole), style="bold")
    Console().print(table)
    if whole.samples == 0 and left:
        say("This host has migrated nothing yet: the times come from sizes alone, and can be off by a factor of three.")
    return EXIT_DONE


def _cells(one: Estimate) -> tuple[str, ...]:
    times = (duration(one.seconds), duration(one.low), duration(one.high))
    return (size(one.written), *times, one.confidence)
