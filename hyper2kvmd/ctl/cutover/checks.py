"""What must be so before a migrated VM takes the place of its source: each check is a step that passes, or ends it."""

from __future__ import annotations

import argparse
import ipaddress
import socket
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import libvirt

from hyper2kvmd import accel
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
from hyper2kvmd.job.main import this_host
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
        """Note what a step showed, and say it."""
        self.steps.append(StepRecord(name=name, status=status, evidence=evidence, hint=hint))
        if not self.options.json:
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
    here, there = run.look.manifest_sha256, run.migrated.manifest.sha256
    if here is not None and there is not None and here != there:
        raise run.stop(
            "report",
            f"the export was replaced after the migration of {run.migrated.finished_at}",
            "Migrate it anew with `hyper2kvmctl retry`; what runs would be the older state.",
        )
    run.step("report", "passed", f"migrated at {run.migrated.finished_at}, from the export that is there")


def check_domain(run: Run) -> bool:
    """Find the domain, and check that it is the one that was made; whether it runs."""
    record = run.migrated.domain
    assert record is not None
    identity = str(uuid.UUID(record.uuid))
    found = [one for one in run.connection.listAllDomains() if one.UUIDString() == identity]
    if not found:
        hint = f"See `virsh -c {run.uri} list --all`; `hyper2kvmctl retry {run.export.name}` migrates it anew."
        raise run.stop("domain", f"{run.uri} has no domain with the UUID {identity}", hint, EXIT_NOT_FOUND)
    run.domain = found[0]
    run.xml = run.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    running, saved = bool(run.domain.isActive()), bool(run.domain.hasManagedSaveImage(0))
    # An undo turns it off, and the next cutover on again.
    run.autostart = bool(run.domain.autostart()) or (run.earlier is not None and run.earlier.autostart)
    name = run.domain.name()
    if job_of(run.xml) != run.migrated.job:
        raise run.stop(
            "domain", f"{name} was made by another job than this report's", "Look at it with `virsh dumpxml`."
        )
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
    if saved:
        hint = f"Run `virsh managedsave-remove {name}`, or start it with `virsh start`."
        raise run.stop("domain", f"{name} is suspended to a file, and would go on from there", hint, EXIT_BUSY)
    if running and (run.earlier is None or run.earlier.status == "undone"):
        hint = "Shut it down, if its source is to be checked first."
        raise run.stop("domain", f"{name} runs already, and no cutover started it", hint, EXIT_BUSY)
    run.step("domain", "passed", f"{name} {'runs' if running else 'is shut off'}, with the disks that were published")
    return running


def check_boot(run: Run) -> None:
    """Have a boot test that passed: that of the migration, or one of the domain as it is now."""
    before = Results.model_validate(run.migrated.results).boot
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


def _tested(run: Run) -> boottest.Verdict:
    """Boot the domain as it is defined, on overlays that are thrown away."""
    tools, disks = Tools(), hard_disks(run.xml)
    overlays = [path.with_name(f".{path.name}.cutover.partial") for path, _ in disks]
    nvram = overlays[0].with_suffix(".nvram.partial")
    try:
        for overlay, (path, format) in zip(overlays, disks, strict=True):
            overlay.unlink(missing_ok=True)  # of an attempt that died
            create_throw_away(tools, overlay, path, format)
        system = Results.model_validate(run.migrated.results).inspect
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
    if dead := [lead for lead in leads if lead.interface is None]:
        raise run.stop("source", f"its silence would prove nothing: {dead[0].why}", _OFF)
    asker: socket.socket | None = run.options.asker
    if asker is None:
        raise run.stop("source", "only root may ask the network (ARP)", f"Run the command as root. {_OFF}")
    interfaces = sorted({lead.interface for lead in leads if lead.interface})
    if not interfaces:
        raise run.stop("source", "the VM has no network card, so there is no network to ask on", _OFF)
    for interface in interfaces:
        _check_silence(run, asker, interface)
    run.step("source", "passed", f"{', '.join(run.addresses)}: nobody answers on {', '.join(interfaces)}")


def _check_silence(run: Run, asker: socket.socket, interface: str) -> None:
    gateway = run.options.gateway
    try:
        answers = reach.who_has(asker, interface, [*run.addresses, *([gateway] if gateway else [])])
    except OSError as error:
        hint = f"See `ip link show {interface}`. {_OFF}"
        raise run.stop("source", f"{interface} cannot be asked on: {error.strerror}", hint) from None
    if gateway:
        if not answers.pop(gateway, None):
            hint = f"Name a machine that answers there. {_OFF}"
            raise run.stop("source", f"{gateway} does not answer on {interface} either: silence proves nothing", hint)
    elif far := [one for one in run.addresses if not reach.on_link(Tools(), interface, one)]:
        hint = f"Name a machine of that network that answers, with --gateway. {_OFF}"
        raise run.stop("source", f"nothing shows that {interface} leads to the network of {far[0]}", hint)
    for address, macs in answers.items():
        hint = "Shut the source down, or whoever has the address, and try again."
        raise run.stop("source", f"{address} is in use on {interface}, by {', '.join(sorted(macs))}", hint)
