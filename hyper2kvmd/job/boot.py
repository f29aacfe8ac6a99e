"""The boot test of a job: the guest is started on throw-away overlays, and what is seen of it is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import structlog

from hyper2kvmd.domain.model import Domain
from hyper2kvmd.domain.trial import thrown_away
from hyper2kvmd.domain.xml import to_xml
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import write_durably
from hyper2kvmd.guest.inspect import inspect
from hyper2kvmd.guest.linux.fix import add_serial_console
from hyper2kvmd.guest.session import Session, open_guest
from hyper2kvmd.guest.storage import KeyFor
from hyper2kvmd.hypervisor import boottest
from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.image import qemu_img
from hyper2kvmd.job.context import Job
from hyper2kvmd.job.inside import key_for
from hyper2kvmd.job.plan import Plan, PlannedDisk, appliance_mb
from hyper2kvmd.job.results import Booted
from hyper2kvmd.messages import Kind
from hyper2kvmd.queue.names import BOOT_LOG, BOOT_SCREEN
from hyper2kvmd.run import tail

log = structlog.get_logger()

BOOT_HINT = "See boot-test.log and boot-test.png beside the report; with validate.boot_failure: warn the job continues."


def boot_copy(job: Job, plan: Plan, disks: Sequence[PlannedDisk], domain: Domain) -> None:
    """Boot what is about to be published, on overlays that are thrown away, if the plan says so.

    disks: in the order of the `domain`, which boots from the first.
    """
    if not plan.boot:
        job.skip("boot")
        return
    with job.stage("boot"), contextlib.ExitStack() as stack:
        # Beside the disks, where libvirt's QEMU may read and write; under names that the next attempt removes.
        overlays = [disk.partial.with_suffix(".boot.partial") for disk in disks]
        nvram = disks[0].partial.with_suffix(".nvram.partial")
        for path in (*overlays, nvram):
            stack.callback(path.unlink, missing_ok=True)
        for disk, overlay in zip(disks, overlays, strict=True):
            qemu_img.create_throw_away(job.tools, overlay, disk.partial, plan.format)
        _add_console(job, plan, dict(zip((disk.id for disk in disks), overlays, strict=True)))
        seconds = job.settings.validate_.boot_seconds * (1 if plan.accel == "kvm" else boottest.TCG_FACTOR)
        with connect(job.settings.libvirt.uri) as connection:
            backing = [(disk.partial, plan.format) for disk in disks]
            tested = thrown_away(to_xml(domain), overlays, backing, nvram, job.settings.validate_.boot_memory_mb)
            verdict = boottest.run(connection, job.settings.libvirt.uri, tested, seconds, cancel=job.tools.cancel)
        _keep(job, verdict)
        if verdict.outcome == "passed":
            return
        message = f"the boot test {verdict.outcome}: {verdict.reason}"
        if verdict.outcome == "failed" and job.settings.validate_.boot_failure == "fail":
            raise MigrationError(
                Code.BOOT_FAILED, message, BOOT_HINT, field="validate.test_boot", tail=tail(verdict.console)
            )
        job.warn(Finding(f"boot_{verdict.outcome}", message, BOOT_HINT, "validate.test_boot"))


def _add_console(job: Job, plan: Plan, overlays: dict[str, Path]) -> None:
    found = job.record.results.inspect
    if found is None or found.os_type != "linux" or found.serial_console:
        return
    disks = [(overlays[disk.id], "qcow2") for disk in plan.disks]
    session = open_guest(disks, accel=plan.accel, memory_mb=appliance_mb(job), tools=job.tools)
    add_console(session, key_for(job, plan), found.firmware)


def add_console(guest: AbstractContextManager[Session], key_for: KeyFor, firmware: str) -> None:
    """Have a Linux guest write to its serial port, in the test alone; most write to nothing but their screen."""
    try:
        with guest as session:
            add_serial_console(session, inspect(session, key_for, firmware))
    except MigrationError as error:
        log.warning("the boot test cannot have the guest write to its serial port", reason=error.message)


def _keep(job: Job, verdict: boottest.Verdict) -> None:
    """Put the verdict on the record, and what was seen beside the report."""
    kept = {BOOT_LOG: verdict.console.encode(), BOOT_SCREEN: verdict.screen}
    for name, data in kept.items():
        if data:
            write_durably(job.export.fd, name, data, job.attempt)
    job.record.results.boot = Booted(
        outcome=verdict.outcome,
        reason=verdict.reason,
        seconds=verdict.seconds,
        serial_log=BOOT_LOG if kept[BOOT_LOG] else None,
        screenshot=BOOT_SCREEN if kept[BOOT_SCREEN] else None,
    )
    log.info("boot test", kind=Kind.BOOT_TEST, outcome=verdict.outcome, reason=verdict.reason, seconds=verdict.seconds)
