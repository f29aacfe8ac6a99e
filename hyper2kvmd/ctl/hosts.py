"""`hyper2kvmctl hosts`: which hosts work on the exports directory, with what, and how long ago they said so."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hyper2kvmd import __version__
from hyper2kvmd.ctl.output import print_json, refuse
from hyper2kvmd.dispatch.engines import engine_of
from hyper2kvmd.dispatch.slurm import Node, Slurm
from hyper2kvmd.errors import Finding, MigrationError
from hyper2kvmd.exits import EXIT_DONE, EXIT_NOT_FOUND
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.hosts import Seen, all_hosts, forget, skew, wrong_clock
from hyper2kvmd.queue.state import Facts
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import duration, size

STYLE = {"gone": "red", "down": "red", "draining": "yellow", "stopped": "yellow"}


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("hosts", help="list the hosts that work on the exports directory")
    parser.add_argument("--forget", metavar="NAME", help="remove a host that is gone from the list")
    parser.set_defaults(run=hosts)
    return [parser]


def hosts(options: argparse.Namespace, config: Settings) -> int:
    """Print a table of the hosts, and what is wrong with any of them."""
    if options.forget is not None:
        if not forget(config, options.forget):
            return refuse(EXIT_NOT_FOUND, f"{options.forget}: no such host; `hyper2kvmctl hosts` lists them")
        if not options.json:
            print(f"{options.forget} is forgotten; it comes back when it says something")
    now = time.time()
    seen = all_hosts(config, now)
    looks = (facts.look_or_reason(export, config) for export in facts.exports(config)[0])
    running = Counter(look.progress.host for look in looks if isinstance(look, Facts) and look.progress is not None)
    nodes: Sequence[Node] = ()
    findings = _strange(seen, now)
    engine = engine_of(config)
    if isinstance(engine, Slurm):
        try:
            nodes = engine.nodes()
        except MigrationError as error:
            findings.append(error.finding())
    findings += [trouble for node in nodes if (trouble := node.trouble) is not None]
    rows = [_row(one, running, nodes) for one in seen]
    known = {one.beat.host for one in seen}
    rows += [_node_row(node, running) for node in nodes if node.name not in known]
    if options.json:
        print_json({"hosts": rows, "findings": [finding.as_json() for finding in findings]})
        return EXIT_DONE
    table = Table(box=None, pad_edge=False)
    headings = ["HOST", "STATE", "JOBS", "OUTPUT FREE", "WORK FREE", "MEMORY", "KVM", "VERSION", "SEEN"]
    for heading in (*headings, *(["SLURM"] if nodes else [])):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row, bool(nodes)), style=STYLE.get(row["state"] or row["slurm"]))
    Console().print(table)
    for finding in findings:
        print(f"hyper2kvmctl: {finding}", file=sys.stderr)
    return EXIT_DONE


def _row(seen: Seen, running: Counter[str], nodes: Sequence[Node]) -> dict[str, Any]:
    beat = seen.beat
    return {
        "host": beat.host,
        "state": seen.state,
        "jobs": running[beat.host],
        "workers": beat.workers,
        "output_free_bytes": beat.output_free,
        "work_free_bytes": beat.work_free,
        "memory_mb": beat.memory_mb,
        "kvm": beat.kvm,
        "version": beat.version,
        "engine": beat.engine,
        "seen_seconds_ago": round(seen.age, 1),
        "slurm": next((_slurm(node) for node in nodes if node.name == beat.host), None),
    }


def _node_row(node: Node, running: Counter[str]) -> dict[str, Any]:
    """A node of Slurm on which no job of ours has run yet."""
    unknown = ("workers", "output_free_bytes", "work_free_bytes", "kvm", "version", "engine", "seen_seconds_ago")
    found = {"host": node.name, "state": None, "jobs": running[node.name], "memory_mb": node.memory_mb}
    return {**found, **dict.fromkeys(unknown), "slurm": _slurm(node)}


def _slurm(node: Node) -> str:
    return node.state + (f" ({node.reason})" if node.reason else "")


def _cells(row: dict[str, Any], with_slurm: bool) -> list[Text]:
    def sized(value: int | None) -> str:
        return "" if value is None else size(value)

    jobs = f"{row['jobs']}" + (f"/{row['workers']}" if row["workers"] else "")
    memory = None if row["memory_mb"] is None else row["memory_mb"] << 20
    seen = "never" if row["seen_seconds_ago"] is None else f"{duration(row['seen_seconds_ago'])} ago"
    words = [
        *(row["host"], row["state"] or "", jobs, sized(row["output_free_bytes"]), sized(row["work_free_bytes"])),
        *(sized(memory), {True: "yes", False: "no", None: ""}[row["kvm"]], row["version"] or "", seen),
        *([row["slurm"] or ""] if with_slurm else []),
    ]
    return [Text(word) for word in words]


def _strange(seen: Sequence[Seen], now: float) -> list[Finding]:
    """What is wrong with hosts, and what to do."""
    found = []
    for one in seen:
        host, version, ahead = one.beat.host, one.beat.version, skew(one, now)
        if one.gone:
            hint = f"See whether it runs and has the directory mounted; or `hyper2kvmctl hosts --forget {host}`."
            found.append(Finding("host_gone", f"{host} has said nothing for {duration(one.age)}", hint))
        elif version != __version__:
            hint = "An upgrade concerns one host after the other; this one is to follow."
            found.append(Finding("host_version", f"{host} has hyper2kvmd {version}, and this host {__version__}", hint))
        # What it said long ago is not so any more.
        if not one.late and (clock := wrong_clock(host, ahead)) is not None:
            found.append(clock)
    return found
