"""`hyper2kvmctl cutover`: a migrated VM takes the place of its source, and shows that it does; or that is undone."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hyper2kvmd.ctl.cutover.checks import (
    Run,
    Stopped,
    boot_seconds,
    check_boot,
    check_domain,
    check_report,
    check_source,
    find_domain,
)
from hyper2kvmd.ctl.listing import find
from hyper2kvmd.ctl.output import agreed, print_json, refuse, refused, say
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.exits import EXIT_BUSY, EXIT_DONE, EXIT_FAILED, EXIT_NOT_FOUND, EXIT_TEMPORARY, EXIT_USAGE
from hyper2kvmd.files import explained, open_file, write_durably
from hyper2kvmd.hypervisor import boottest, reach
from hyper2kvmd.hypervisor import cutover as vm
from hyper2kvmd.hypervisor.connection import connect, translated
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.claim import Busy, Claim, claim_export, numbered
from hyper2kvmd.queue.names import CUTOVER, CUTOVER_LOG, CUTOVER_SCREEN, REPORT
from hyper2kvmd.queue.placement import placement
from hyper2kvmd.report.cutover import CutoverReport, CutoverStatus
from hyper2kvmd.report.model import Report
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

SHUTDOWN_SECONDS, DAY = 300.0, 86400.0
_EXIT: dict[CutoverStatus, int] = {"unverified": EXIT_TEMPORARY, "failed": EXIT_FAILED, "refused": EXIT_FAILED}


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "cutover", help="start a migrated VM in the place of its source, and verify that it is up; or undo that"
    )
    parser.add_argument("export", metavar="EXPORT", help="directory of the export, or its name, or the VM's name")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="check, and say what each step would do")
    parser.add_argument("--undo", action="store_true", help="shut the VM down, so that the source can run again")
    parser.add_argument(
        "--address",
        action="append",
        default=[],
        type=_address,
        metavar="IP",
        help="an address that the source had and the VM is to have; repeatable; default: those of its plan",
    )
    parser.add_argument(
        "--gateway",
        action="append",
        default=[],
        type=_address4,
        metavar="IP",
        help="a machine that answers on the source's network, which shows that this host asks there; repeatable;"
        " default: those that this host knows",
    )
    parser.add_argument(
        "--source-off", action="store_true", help="you know that the source is off; the network is not asked"
    )
    parser.add_argument(
        "--no-boot-test", action="store_true", help="start the VM although no boot test of it has passed"
    )
    parser.add_argument(
        "--wait", type=_seconds, metavar="SECONDS", help="how long the VM may take; default: as long as a boot test"
    )
    parser.add_argument(
        "--force", action="store_true", help="with --undo: cut the power of a VM that does not shut down"
    )
    parser.set_defaults(run=cutover, prepare=_prepare)
    return [parser]


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no IP address, such as 192.0.2.10") from None


def _address4(text: str) -> str:
    if ipaddress.ip_address(_address(text)).version != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no IPv4 address, such as 192.0.2.1")
    return _address(text)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= DAY:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, up to a day")


def _prepare(options: argparse.Namespace) -> None:
    """Open what root alone may open, before its rights are given up."""
    options.asker = reach.arp_socket()


def cutover(options: argparse.Namespace, config: Settings) -> int:
    """Check, start, watch and report; or undo that."""
    if options.force and not options.undo:
        return refuse(EXIT_USAGE, "--force is for --undo")
    export = find(options.export, config)
    if export is None:
        message = f"{options.export}: no export of this name in {config.exports_dir}; see `hyper2kvmctl list`"
        return refuse(EXIT_NOT_FOUND, message)
    try:
        claim = claim_export(export)
    except Busy:
        return refuse(EXIT_BUSY, f"{export.name}: a runner or another command works on it; try again when it is over")
    except OSError as error:
        return refuse(*refused(error, export))
    try:
        run = _run(options, config, export)
        if isinstance(run, str):
            return refuse(EXIT_FAILED, f"{export.name}: {run}")
        with connect(run.uri) as run.connection, translated(Code.LIBVIRT_UNAVAILABLE):
            return _undo(run, claim) if options.undo else _cut_over(run, claim)
    finally:
        claim.interrupted()
        claim.close()


def _run(options: argparse.Namespace, config: Settings, export: Path) -> Run | str:
    """What there is to work on, or why there is nothing. Raise OSError."""
    document = facts.read_report(export)
    if document is None:
        return f"it has no report, so it was not migrated; see `hyper2kvmctl show {export.name}`"
    try:
        migrated = Report.model_validate(document)
    except ValidationError:
        return f"{REPORT} is not a report of this version; use the version that wrote it"
    if migrated.status != "succeeded" or migrated.dry_run:
        how = "was only a dry run" if migrated.dry_run else f"ended as {migrated.status}"
        return f"its migration {how}; see `hyper2kvmctl show {export.name}`"
    if migrated.domain is None:
        return "its migration defined no domain; set libvirt.import, or define one with virsh"
    look = facts.look(export, config)
    uri = placement(config, export.name, look).libvirt_uri
    if uri != migrated.domain.uri:
        return (
            f"its domain was defined in {plain(migrated.domain.uri)}, and the settings say {uri}; if that is the same"
            f" libvirt as seen from here, use `--set libvirt.uri={plain(migrated.domain.uri)}`"
        )
    if look.plan_problem is not None:
        return str(look.plan_problem)
    run = Run(options, config, export, migrated, look, uri, facts.read_cutover(export, document))
    before = run.earlier.addresses if run.earlier is not None else ()
    run.addresses = tuple(dict.fromkeys(options.address or map(str, (*look.plan.addresses, *before))))
    if both := {*run.addresses} & {*options.gateway}:
        return f"{both.pop()} is an address of the VM; --gateway names another machine"
    return run


# Cutting over ------------------------------------------------------------------------------------------------------


def _cut_over(run: Run, claim: Claim) -> int:
    console = bytearray()
    try:
        check_report(run)
        running = find_domain(run)
        check_domain(run, running)
        if running and run.earlier is not None and run.earlier.status == "verified" and _covers(run.earlier, run):
            return _answer(run, run.earlier, f"it was verified at {run.earlier.finished_at}, and runs")
        leads = reach.leads(run.connection, run.xml)
        if not running:
            check_boot(run)
            if run.options.dry_run:
                check_source(run, leads)
                _plan(run)
                return _answer(run, run.report("ready"), "nothing was started, as this was a dry run")
            _confirm(run, f"Start the VM {run.domain.name()} now? Its source must stay off from here on.")
            check_source(run, leads)  # last: a person may take a while to say yes
            _keep_earlier(claim)
        elif run.options.dry_run:
            return _answer(run, run.report("ready"), "it runs already, and would be verified; this was a dry run")
    except Stopped as stopped:
        return _answer(run, run.report("refused"), "nothing was started", stopped.status)
    _keep(claim, CUTOVER, run.report("running").to_bytes())
    try:
        vm.start(run.connection, run.uri, run.domain, console)
    except MigrationError as error:
        run.step("start", "failed", error.message, error.hint)
        return _conclude(run, claim, "failed", "libvirt could not start it")
    run.step("start", "passed", "it runs already, and is verified again" if running else "started")
    seconds = run.options.wait if run.options.wait is not None else boot_seconds(run)
    seen = vm.watch(run.connection, run.domain, console, run.addresses, leads, run.options.asker, seconds)
    return _over(run, claim, console, seen)


def _over(run: Run, claim: Claim, console: bytearray, seen: vm.Watched) -> int:
    """Note what was seen, and write the report."""
    look = f"Look at it with `virsh console {run.domain.name()}`"
    if seen.up and seen.outcome != "failed":
        run.step("up", "passed", seen.up)
    else:
        run.step("up", "failed", seen.reason, f"{look}; `hyper2kvmctl cutover --undo` shuts it down.")
    for address in run.addresses:
        if how := seen.found.get(address):
            run.step("addresses", "passed", f"{address}: {how}")
        else:
            run.step("addresses", "failed", f"{address} was not seen", f"{look}, and try again to verify it.")
    if not run.addresses:
        run.step("addresses", "skipped", "none is known; --address or its plan can name them")
    try:
        if console:
            _keep(claim, CUTOVER_LOG, boottest.readable(console).encode())
        if run.domain.isActive() and (picture := boottest.screen(run.connection, run.domain)):
            _keep(claim, CUTOVER_SCREEN, picture)
            run.step("screen", "passed", f"its picture is {CUTOVER_SCREEN}, beside the report")
        else:
            run.step("screen", "skipped", "it shows none")
    except OSError as error:  # what was seen of the VM counts for more
        run.step("screen", "skipped", f"nothing could be kept: {explained(error, run.export)}")
    if seen.outcome == "verified" and run.autostart:
        run.domain.setAutostart(1)
    return _conclude(run, claim, seen.outcome, seen.reason)


def _plan(run: Run) -> None:
    wait = run.options.wait if run.options.wait is not None else boot_seconds(run)
    run.step("start", "planned", "the domain would start, with its network")
    run.step("up", "planned", f"its console or guest agent would show within {wait:g} s that it is up")
    run.step("addresses", "planned", f"{', '.join(run.addresses) or 'none is known, so none'} would be looked for")
    run.step("screen", "planned", f"its picture would be {CUTOVER_SCREEN}")


# Undoing -----------------------------------------------------------------------------------------------------------


def _undo(run: Run, claim: Claim) -> int:
    """Shut the VM down; its disks keep what it wrote."""
    if run.earlier is None or run.earlier.status == "undone":
        return refuse(EXIT_FAILED, f"{run.export.name}: no cutover of this migration is there to undo")
    run.addresses = tuple(map(str, run.earlier.addresses))
    try:
        check_report(run)
        find_domain(run)
        if run.options.dry_run:
            run.step("shutdown", "planned", "the VM would be shut down, and no longer start with the host")
            return _answer(run, run.report("ready"), "nothing was shut down, as this was a dry run")
        _confirm(run, f"Shut the VM {run.domain.name()} down?")
    except Stopped as stopped:
        return _answer(run, run.report("refused"), "nothing was shut down", stopped.status)
    run.domain.setAutostart(0)  # else it would come up beside the source, when the host starts again
    seconds = run.options.wait if run.options.wait is not None else SHUTDOWN_SECONDS
    how = vm.shut_down(run.domain, seconds, force=run.options.force)
    if how is None:
        hint = "Shut it down from within and try again, or use --force, which loses what it has not written."
        run.step("shutdown", "failed", f"it still runs after {seconds:g} s", hint)
        return _answer(run, run.report("unverified"), "it was asked to shut down, and still runs")
    run.step("shutdown", "passed", f"{how}; its disks keep what it wrote, and the source may run again")
    _keep_earlier(claim)
    return _conclude(run, claim, "undone", how)


def _confirm(run: Run, question: str) -> None:
    """Ask, unless told not to. Raise Stopped for anything but a yes."""
    if run.options.yes:
        return
    if not sys.stdin.isatty():
        raise run.stop("confirm", "there is nobody to ask", "Use --yes.", EXIT_USAGE)
    if not agreed(question):
        raise run.stop("confirm", "you did not say yes", "")


def _covers(earlier: CutoverReport, run: Run) -> bool:
    """Whether an earlier verification is of all that is wanted now."""
    return {*run.addresses} <= {*map(str, earlier.addresses)}


def _keep_earlier(claim: Claim) -> None:
    """Keep the report of an earlier cutover under another name. It stays until the new one takes its place."""
    names = os.listdir(claim.export.fd)
    if CUTOVER in names:
        with open(open_file(CUTOVER, dir_fd=claim.export.fd), "rb") as file:
            data = file.read(facts.REPORT_LIMIT)
        _keep(claim, numbered(CUTOVER, names), data)


def _keep(claim: Claim, name: str, data: bytes) -> None:
    claim.check()
    write_durably(claim.export.fd, name, data, claim.attempt)


def _conclude(run: Run, claim: Claim, status: CutoverStatus, text: str) -> int:
    """Write the report at the end, and say the same."""
    report = run.report(status)
    _keep(claim, CUTOVER, report.to_bytes())
    return _answer(run, report, text)


def _answer(run: Run, report: CutoverReport, text: str, exit_status: int | None = None) -> int:
    """Say how it ended; the exit status."""
    if run.options.json:
        print_json(report.model_dump(mode="json"))
    else:
        say(f"{run.export.name}: {report.status}: {plain(text, 500)}")
    return _EXIT.get(report.status, EXIT_DONE) if exit_status is None else exit_status
