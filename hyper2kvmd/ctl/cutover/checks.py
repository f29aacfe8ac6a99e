"""What must be so before a migrated VM takes the place of its source: each check is a step that passes, or ends it."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import libvirt
from pydantic import ValidationError

from hyper2kvmd import accel
from hyper2kvmd.ctl.evidence import public_half, signed_by, signers_in
from hyper2kvmd.ctl.output import say
from hyper2kvmd.domain.switch import hard_disks
from hyper2kvmd.domain.trial import thrown_away
from hyper2kvmd.domain.xml import job_of
from hyper2kvmd.exits import EXIT_BUSY, EXIT_FAILED, EXIT_NOT_FOUND
from hyper2kvmd.files import timestamp
from hyper2kvmd.guest.keys import passphrase
from hyper2kvmd.guest.session import open_guest
from hyper2kvmd.hypervisor import boottest, reach
from hyper2kvmd.hypervisor.connection import is_remote
from hyper2kvmd.image.qemu_img import create_throw_away
from hyper2kvmd.job.boot import add_console
from hyper2kvmd.job.context import job_id
from hyper2kvmd.job.main import this_host
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.queue.state import Facts
from hyper2kvmd.report.cutover import CutoverReport, CutoverStatus, StepRecord
from hyper2kvmd.report.model import DomainRecord, Report
from hyper2kvmd.report.results import Results
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

_OFF = "Shut the source down, make sure that nothing starts it again, and say so with --source-off."


class Stopped(Exception):
    """A step did not pass, so nothing is started."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class Run:
    """One cutover: what it works on, and what its steps showed so far."""

    options: argparse.Namespace
    config: Settings
    export: Path
    migrated: Report
    look: Facts
    uri: str
    earlier: CutoverReport | None
    connection: Any = None
    domain: Any = None
    xml: str = ""
    addresses: tuple[str, ...] = ()
    began: float = field(default_factory=time.time)
    autostart: bool = False
    steps: list[StepRecord] = field(default_factory=list)

    def step(
        self, name: str, status: Literal["passed", "failed", "skipped", "planned"], evidence: str, hint: str = ""
    ) -> None:
        """Note what a step showed, and say it: some of it is from reports that anybody may have written."""
        evidence, hint = plain(evidence, 1000), plain(hint, 1000)
        self.steps.append(StepRecord(name=name, status=status, evidence=evidence, hint=hint))
        if not self.options.json:
            # Whoever read along may be gone, for which rich ends the program; but a VM may have been started by now.
            with contextlib.suppress(SystemExit):
                say(f"{name:<10} {status:<8} {evidence}" + (f"; {hint}" if hint else ""))

    def stop(self, name: str, evidence: str, hint: str, status: int = EXIT_FAILED) -> Stopped:
        """What ends it at a step that did not pass."""
        self.step(name, "failed", evidence, hint)
        return Stopped(status)

    def report(self, status: CutoverStatus) -> CutoverReport:
        """The report as it is now."""
        now, over = time.time(), status not in ("running", "ready", "refused")
        assert self.migrated.domain is not None
        return CutoverReport(
            status=status,
            job=self.migrated.job,
            migrated_at=self.migrated.finished_at,
            vm_name=self.migrated.vm_name or self.export.name,
            domain=DomainRecord(name=self.migrated.domain.name, uuid=self.migrated.domain.uuid, uri=self.uri),
            addresses=self.addresses,
            started_at=timestamp(self.began),
            finished_at=timestamp(now) if over else None,
            seconds=round(now - self.began, 1),
            autostart=self.autostart,
            steps=tuple(self.steps),
            host=this_host("command"),
        )


def check_report(run: Run) -> None:
    """Know that the report is of this export, and of the manifest that is there now."""
    here, there = run.look.manifest_sha256, run.migrated.manifest.sha256
    if run.migrated.job != job_id(run.export, there or ""):
        # Whoever may write an export could put another one's report there.
        hint = f"Find out who put it there; `hyper2kvmctl show {run.export.name}` prints it."
        raise run.stop("report", f"{REPORT} is of another export: its job is {run.migrated.job}", hint)
    if run.config.report.sign_key is not None:
        _check_signature(run, run.config.report.sign_key)
    if run.look.manifest is None:
        run.step("report", "skipped", f"migrated at {run.migrated.finished_at}; the export has no manifest any more")
        return
    if here is None:
        why = run.look.problem.message if run.look.problem is not None else "it cannot be read"
        raise run.stop(
            "report", f"nobody knows whether {run.look.manifest} is the same: {why}", "Put the old one back."
        )
    if here != there:
        raise run.stop(
            "report",
            f"the export was replaced after the migration of {run.migrated.finished_at}",
            "Migrate it again with `hyper2kvmctl retry`; what would run is the older state.",
        )
    run.step("report", "passed", f"migrated at {run.migrated.finished_at}, from the export that is there")


def _check_signature(run: Run, key: Path) -> None:
    """Have the report signed by the key of the settings. Raise Stopped, OSError or MigrationError."""
    try:
        data, found = signed_by(run.export / REPORT, signers_in(public_half(key)))
    except (ValueError, OSError) as error:
        hint = f"Put the public key there: `ssh-keygen -y -f {key} > {public_half(key)}`."
        raise run.stop("signature", f"the public half of report.sign_key cannot be used: {error}", hint) from None
    if not isinstance(found, str):
        hint = f"{found.hint} Only a signed report says what may be started, as report.sign_key is set."
        raise run.stop("signature", found.message, hint)
    if Report.model_validate_json(data) != run.migrated:
        raise run.stop("signature", f"{REPORT} was changed meanwhile", "Try again.", EXIT_BUSY)
    run.step("signature", "passed", found)


def find_domain(run: Run) -> bool:
    """Find the domain that the job made; whether it runs. Raise Stopped."""
    record = run.migrated.domain
    assert record is not None
    found = [one for one in run.connection.listAllDomains() if one.UUIDString() == record.uuid]
    if not found:
        hint = f"See `virsh -c {run.uri} list --all`; `hyper2kvmctl retry {run.export.name}` migrates it again."
        raise run.stop("domain", f"{run.uri} has no domain with the UUID {record.uuid}", hint, EXIT_NOT_FOUND)
    run.domain = found[0]
    run.xml = run.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    # An undo turns it off, and the next cutover on again.
    run.autostart = bool(run.domain.autostart()) or (run.earlier is not None and run.earlier.autostart)
    if job_of(run.xml) != run.migrated.job:
        hint = "Look at it with `virsh dumpxml`."
        raise run.stop("domain", f"{run.domain.name()} was made by another job than this report's", hint)
    return bool(run.domain.isActive())


def check_domain(run: Run, running: bool) -> None:
    """Know that the domain is as it was made, and that nobody else has started it. Raise Stopped."""
    name = run.domain.name()
    targets = {disk.target for disk in run.migrated.disks}
    try:
        disks = {str(path) for path, _ in hard_disks(run.xml)}
    except ValueError as error:
        disks = {f"its disk {error}"}
    if disks != targets:
        changed = ", ".join(sorted(plain(str(path), 200) for path in disks ^ targets))
        hint = "Give it these disks alone, or start it with `virsh start`; its boot test says nothing about others."
        raise run.stop("domain", f"{name} has other disks than were published: {changed}", hint)
    if not is_remote(run.uri) and (gone := [path for path in sorted(disks) if not Path(path).exists()]):
        raise run.stop("domain", f"{gone[0]} is not there", f"Restore it, or `hyper2kvmctl retry {run.export.name}`.")
    if run.domain.hasManagedSaveImage(0):
        hint = f"Run `virsh managedsave-remove {name}`, or start it with `virsh start`."
        raise run.stop("domain", f"{name} is suspended to a file, and would go on from there", hint, EXIT_BUSY)
    if running and (run.earlier is None or run.earlier.status == "undone"):
        hint = "Shut it down, if its source is to be checked first."
        raise run.stop("domain", f"{name} runs already, and no cutover started it", hint, EXIT_BUSY)
    paused = running and run.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    if paused and (run.earlier is None or run.earlier.status != "running"):
        raise run.stop("domain", f"{name} is suspended", f"Run `virsh resume {name}`.", EXIT_BUSY)
    run.step("domain", "passed", f"{name} {'runs' if running else 'is shut off'}, with the disks that were published")


def check_boot(run: Run) -> None:
    """Have a boot test that passed: that of the migration, or one of the domain as it is now."""
    before = _results(run).boot
    if before is not None and before.outcome == "passed":
        run.step("boot-test", "passed", f"in the migration: {plain(before.reason, 200)}")
    elif run.options.no_boot_test:
        run.step("boot-test", "skipped", "--no-boot-test")
    elif is_remote(run.uri):
        hint = "Try it there by hand, and say --no-boot-test."
        raise run.stop("boot-test", "none has passed, and its disks are on another host", hint)
    elif run.options.dry_run:
        run.step("boot-test", "planned", "none has passed yet, so one would run now, on throw-away copies")
    else:
        verdict = _tested(run)
        if verdict.outcome != "passed":
            hint = "See its screen with `virt-viewer`, fix what is wrong, or say --no-boot-test if you know better."
            raise run.stop("boot-test", f"{verdict.outcome}: {verdict.reason}", hint)
        run.step("boot-test", "passed", f"now: {verdict.reason}, after {verdict.seconds:g} s")


def _results(run: Run) -> Results:
    try:
        return Results.model_validate(run.migrated.results)
    except ValidationError:  # of another version, or planted: it proves nothing
        return Results()


def _tested(run: Run) -> boottest.Verdict:
    """Boot the domain as it is defined, on overlays that are thrown away."""
    tools, disks = Tools(), hard_disks(run.xml)
    overlays = [path.with_name(f".{path.name}.cutover.partial") for path, _ in disks]
    nvram = overlays[0].with_suffix(".nvram.partial")
    try:
        for overlay, (path, format) in zip(overlays, disks, strict=True):
            overlay.unlink(missing_ok=True)  # of an attempt that died
            create_throw_away(tools, overlay, path, format)
        system = _results(run).inspect
        if system is not None and system.os_type == "linux":
            guest = open_guest(
                [(overlay, "qcow2") for overlay in overlays],
                accel=accel.resolve(run.config.guest.accel, tools).name,
                memory_mb=run.config.guest.memory_mb,
                tools=tools,
            )
            name = run.migrated.vm_name or run.export.name
            add_console(guest, lambda id: passphrase(run.config.fix.luks_keys, name, id), system.firmware)
        xml = thrown_away(run.xml, overlays, disks, nvram, run.config.validate_.boot_memory_mb)
        return boottest.run(run.connection, run.uri, xml, boot_seconds(run), cancel=tools.cancel)
    finally:
        for leftover in (*overlays, nvram):
            leftover.unlink(missing_ok=True)


def boot_seconds(run: Run) -> float:
    """How long the VM may take to come up, in seconds."""
    return run.config.validate_.boot_seconds * (1 if "<domain type='kvm'" in run.xml else boottest.TCG_FACTOR)


def check_source(run: Run, leads: list[reach.Lead]) -> None:
    """Know that the source is off, from its silence or from a person."""
    if run.options.source_off:
        run.step("source", "skipped", "--source-off says that it is off")
        return
    if not run.addresses:
        hint = f"Name them with --address, or as `addresses` in its plan. {_OFF}"
        raise run.stop("source", "nobody has said which addresses it had, so it cannot be asked", hint)
    if six := [address for address in run.addresses if ipaddress.ip_address(address).version == 6]:
        raise run.stop("source", f"{six[0]}: only IPv4 addresses can be asked for", _OFF)
    asker: socket.socket | None = run.options.asker
    if asker is None:
        raise run.stop("source", "only root may ask the network (ARP)", f"Run the command as root. {_OFF}")
    proving = sorted({lead.interface for lead in leads if lead.interface and not lead.why})
    proved: dict[str, str] = {}
    for interface in proving:
        _ask(run, asker, interface, proved)
    if unproved := [address for address in run.addresses if address not in proved]:
        dead = next((lead.why for lead in leads if lead.why), "")
        if not proving:
            why = f"its silence would prove nothing: {dead or 'the VM has no network card'}"
            raise run.stop("source", why, _OFF)
        hint = f"Name a machine of that network that answers, with --gateway. {_OFF}"
        why = f"nothing shows that {' or '.join(proving)} leads to the network of {unproved[0]}"
        raise run.stop("source", f"{why}: no other machine of it answers there", hint)
    run.step(
        "source",
        "passed",
        "; ".join(f"nobody answers for {address} on {where}" for address, where in proved.items()),
    )


def _ask(run: Run, asker: socket.socket, interface: str, proved: dict[str, str]) -> None:
    """Ask one network for all addresses; `proved` gets those for which silence there is a proof. Raise Stopped.

    It is if another machine of the same network answers there: then the way to it is there, too.
    """
    known = {address: reach.neighbours(Tools(), interface, address) for address in run.addresses}
    others = [*run.options.gateway, *(one for found in known.values() for one in found)]
    try:
        answers = reach.who_has(asker, interface, [*dict.fromkeys([*run.addresses, *others])])
    except OSError as error:
        hint = f"See `ip link show {interface}`. {_OFF}"
        raise run.stop("source", f"{interface} cannot be asked on: {error.strerror}", hint) from None
    for address in run.addresses:
        if heard := answers.get(address):
            hint = "Shut the source down, or whoever has the address, and try again."
            macs = ", ".join(sorted({one.mac for one in heard}))
            raise run.stop("source", f"{address} is in use on {interface}, by {macs}", hint)
        witnesses = [one for one in (*run.options.gateway, *known[address]) if one in answers]
        if witnesses:
            proved.setdefault(address, f"{interface}, where {witnesses[0]} does")
