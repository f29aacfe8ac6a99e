"""One migration, from manifest to domain: `migrate` is the picture, to be read from top to bottom.

              ┌─ VERIFY: checksums ─────────────────────────┐
    plan ─────┼─ INSPECT ─ FIX, on an overlay per disk ─────┼─ commit ─ VALIDATE ─ publish ─ hook ─ IMPORT
              └─ CONVERT: source → partial, side by side ───┘

The source is only ever read. The fix is laid onto the converted disk at the end, so a migration takes as long as
its slowest branch, not as long as all of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from hyper2kvmd.domain.model import Domain, DomainDisk, GuestSystem
from hyper2kvmd.domain.xml import to_xml
from hyper2kvmd.errors import Cancelled, Code, Finding, MigrationError, Noted, Outcome
from hyper2kvmd.files import write_durably
from hyper2kvmd.hypervisor import boottest
from hyper2kvmd.hypervisor.connection import connect, libvirt_version
from hyper2kvmd.hypervisor.define import define, refresh_pools
from hyper2kvmd.image import qemu_img
from hyper2kvmd.image.publish import publish
from hyper2kvmd.image.source import check_unchanged, verify_checksum
from hyper2kvmd.job import reserve
from hyper2kvmd.job.context import Job
from hyper2kvmd.job.plan import Plan, PlannedDisk, appliance_mb, make_plan, memory_mb, needs
from hyper2kvmd.job.steps import Item, Steps
from hyper2kvmd.manifest import Manifest
from hyper2kvmd.messages import Kind
from hyper2kvmd.notify import hooks
from hyper2kvmd.queue.names import BOOT_LOG, BOOT_SCREEN
from hyper2kvmd.report.model import ChangeRecord, DiskRecord, DomainRecord
from hyper2kvmd.run import tail

if TYPE_CHECKING:
    from hyper2kvmd.guest.inspect import Inspection
    from hyper2kvmd.guest.linux.fix import FixOptions

log = structlog.get_logger()

BOOT_HINT = "See boot-test.log and boot-test.png beside the report; with validate.boot_failure: warn the job goes on."


def migrate(job: Job, manifest: Manifest) -> None:
    """Migrate one export. What was done is on `job.record`, also when it fails.

    Raise MigrationError, OSError or Cancelled; then nothing is published that was not complete, and what is
    published is found again by the next attempt.
    """
    with contextlib.ExitStack() as stack:
        with job.stage("plan"):
            noted = Noted()
            steps = Steps(job)
            resumed = steps.to_publish()
            items, record = resumed or ((), {})
            plan = make_plan(job, manifest, noted, stack, ours=[Path(item.final) for item in items])
            with noted:
                for hook in hooks.found(job.settings.hooks, "pre-import") if plan.import_ else ():
                    hooks.check(hook)
            if not noted.errors:
                plan = plan if resumed else steps.adopt(plan)
                steps.clean(plan)
            if not resumed:
                with noted:
                    memory = memory_mb(job, plan, fixed=not noted.errors and steps.fixed(plan) is not None)
                    reserve.reserve(job, needs(job, plan, steps.converted), memory, stack)
            noted.check()
        if resumed:
            job.record.restore(record)
        else:
            goes_on = False
            try:
                _branches(job, plan, steps)
                if plan.convert:
                    _commit(job, plan, steps)
                    _validate(job, plan)
                    _boot(job, plan)
                    items = steps.note_finished(plan, job.record.dump())
            except (Cancelled, OSError, MigrationError) as error:
                # The next attempt can use what is done, if the job was stopped or failed for a passing cause.
                goes_on = not isinstance(error, MigrationError) or error.outcome == Outcome.RETRY
                raise
            finally:
                if items or (goes_on and plan.convert):
                    steps.clean(plan)
                else:
                    steps.discard(plan)
    if not plan.convert:
        for stage in ("validate", "import"):
            job.skip(stage)
        return
    with job.stage("publish"):
        _publish(job, items)
        _describe_targets(job, plan, {item.disk: Path(item.final) for item in items})
    if plan.import_:
        _hook(job, plan)
        with job.stage("import"):
            _import(job, plan)
    else:
        job.skip("import")


def _branches(job: Job, plan: Plan, steps: Steps) -> None:
    """Run the three branches at the same time; the first that fails ends the others."""
    job.record.tools.update(qemu_img.versions(job.tools))
    digests: dict[str, str] = {}
    branches = []
    if plan.verify:
        branches.append(partial(_verify, job, plan, steps, digests))
    else:
        job.skip("verify")
    if plan.looks_inside:
        branches.append(partial(_guest, job, plan, steps))
    else:
        job.skip("inspect")
        job.skip("fix")
    if plan.convert:
        branches.append(partial(_convert, job, plan, steps))
    else:
        job.skip("convert")
    job.together(*branches)
    boot = job.record.results.get("inspect", {}).get("boot_disk") or plan.boot_disk
    job.record.disks = [
        DiskRecord(
            id=disk.id,
            source=disk.source.name,
            source_format=disk.source.disk.format,
            source_bytes=disk.source.size,
            source_sha256=digests.get(disk.id),
            virtual_size=disk.source.virtual_size,
            boot=disk.id == boot,
        )
        for disk in plan.disks
    ]


def _verify(job: Job, plan: Plan, steps: Steps, digests: dict[str, str]) -> None:
    """Read every disk that has a checksum, once."""

    def verify(disk: PlannedDisk) -> None:
        tell = job.progress("verify", disk.id, disk.source.size)
        digests[disk.id] = verify_checksum(disk.source, job.tools.cancel, tell)
        steps.note_verified(disk, digests[disk.id])

    digests.update({disk.id: digest for disk in plan.disks if (digest := steps.verified(disk))})
    left = [disk for disk in plan.disks if disk.source.disk.sha256 is not None and disk.id not in digests]
    with job.stage("verify", sum(disk.source.size for disk in left)):
        job.together(*(partial(verify, disk) for disk in left))


def _guest(job: Job, plan: Plan, steps: Steps) -> None:
    """Look into the guest, and mend it, on overlays that can be thrown away; or take what an earlier attempt did."""
    if record := steps.fixed(plan):
        job.record.restore(record)
        return
    _inspect_and_fix(job, plan)
    done = job.record.dump()
    done["stages"] = [stage for stage in done["stages"] if stage["name"] in ("inspect", "fix")]
    steps.note_fixed(plan, done)


def _inspect_and_fix(job: Job, plan: Plan) -> None:
    # Imported here: a job that does not look inside needs none of it.
    from hyper2kvmd.guest.inspect import inspect
    from hyper2kvmd.guest.linux.fix import fix
    from hyper2kvmd.guest.session import open_guest

    manifest = plan.manifest
    with contextlib.ExitStack() as stack:
        with job.stage("inspect"):
            for disk in plan.disks:
                qemu_img.create_overlay(job.tools, disk.overlay, disk.source)
            session = stack.enter_context(
                open_guest(
                    [(disk.overlay, "qcow2") for disk in plan.disks],
                    accel=plan.accel,
                    memory_mb=appliance_mb(job),
                    tools=job.tools,
                )
            )
            version = session.version()
            job.record.tools["libguestfs"] = f"{version['major']}.{version['minor']}.{version['release']}"
            try:
                inspection = inspect(session, _key_for(job, plan), plan.hardware.firmware)
            except MigrationError as error:
                if not _tolerated(job, plan, error):
                    raise
                return
            _inspected(job, plan, inspection)
        if not plan.fix:
            job.skip("fix")
            return
        with job.stage("fix"):
            try:
                result = fix(session, inspection, _fix_options(job, plan))
            except MigrationError as error:
                if not _tolerated(job, plan, error):
                    raise
                return
            for finding in result.warnings:
                job.warn(finding)
            job.record.changes = [ChangeRecord(**change.as_json()) for change in result.changes]
            job.record.results["fix"] = {
                "drivers_injected": list(result.drivers_injected),
                "boot_updated": result.boot_updated,
                "proofs": [proof.as_json() for proof in result.proofs],
                "compatible": result.compatible,
            }
            if manifest.stages.fix.print_fstab:
                before, after = result.fstab
                job.record.results["fix"]["fstab"] = {"before": before, "after": after}
                log.info("fstab of the guest", before=before, after=after)
            stack.close()  # what the appliance could not write is an error of this stage


def _key_for(job: Job, plan: Plan) -> Callable[[str], str | None]:
    from hyper2kvmd.guest.keys import passphrase

    return partial(passphrase, job.settings.fix.luks_keys, plan.manifest.vm_name)


def _fix_options(job: Job, plan: Plan) -> FixOptions:
    """What FIX is to do: what the guest needs, and what the manifest asks for."""
    from hyper2kvmd.guest.linux.fix import FixOptions
    from hyper2kvmd.guest.linux.fixers.network import Nic

    wanted = plan.manifest.stages.fix
    return FixOptions(
        fstab=wanted.fstab_mode if wanted.fstab else "noop",
        bootloader=wanted.bootloader,
        drivers=wanted.drivers,
        initramfs=wanted.initramfs,
        serial_console=job.settings.fix.serial_console,
        remove_vmware_tools=wanted.remove_vmware_tools,
        backup_dir=f"/root/.hyper2kvmd-backup/{job.id}" if wanted.backup else "",
        nics=tuple(Nic(card.mac, card.pci_slot) for card in plan.cards),
        configuration=plan.manifest.configuration,
    )


def _tolerated(job: Job, plan: Plan, error: MigrationError) -> bool:
    """Whether a guest that cannot be looked into, or cannot be fixed, is converted all the same."""
    if not plan.fix and error.code in (Code.OS_UNKNOWN, Code.GUEST_ENCRYPTED, Code.GUEST_DIRTY):
        # Who turned FIX off says that the guest is ready as it is.
        job.warn(Finding(error.code, error.message, "FIX is off, so the disks were converted as they are."))
        return True
    if job.settings.fix.allow_unsupported and error.code in (Code.OS_UNKNOWN, Code.OS_UNSUPPORTED):
        job.warn(Finding(error.code, f"{error.message}; converted as it is, with SATA and e1000e", error.hint))
        job.record.results["fix"] = {"drivers_injected": [], "boot_updated": False, "proofs": [], "compatible": True}
        return True
    return False


def _inspected(job: Job, plan: Plan, inspection: Inspection) -> None:
    """Put on the record what was found, and where the manifest says otherwise."""
    for finding in inspection.warnings:
        job.warn(finding)
    firmware = plan.hardware.firmware
    if firmware not in ("unknown", inspection.firmware):
        job.warn(
            Finding(
                "firmware_differs",
                f"the VM had firmware {firmware}, the disks are made for {inspection.firmware}",
                f"The domain gets {inspection.firmware}.",
                "vm.firmware",
            )
        )
    boot = plan.disks[inspection.boot_disk]
    if plan.boot_disk != boot.id:
        job.warn(
            Finding(
                "boot_disk_differs",
                f"the guest boots from {boot.id}, not from {plan.boot_disk} as the export has it",
                f"The domain boots from {boot.id}.",
                "disks",
            )
        )
    kernels = sorted(inspection.kernels, key=lambda kernel: not kernel.chosen_by_bootloader)
    job.record.results["inspect"] = {
        **inspection.as_json(),
        "boot_disk": boot.id,
        "kernel_version": kernels[0].version if kernels else None,
    }


def _convert(job: Job, plan: Plan, steps: Steps) -> None:
    """Convert every disk, side by side."""

    def convert(disk: PlannedDisk) -> None:
        tell = job.progress("convert", disk.id, disk.source.virtual_size)
        qemu_img.convert(
            job.tools, disk.source, disk.partial, plan.format, compress=plan.compress, on_progress=tell
        )  # fmt: skip
        steps.note_converted(disk)

    left = [disk for disk in plan.disks if not steps.converted(disk)]
    with job.stage("convert", sum(disk.source.virtual_size for disk in left)):
        job.together(*(partial(convert, disk) for disk in left))


def _commit(job: Job, plan: Plan, steps: Steps) -> None:
    """Lay the fix onto the converted disks."""
    if not plan.fix:
        job.skip("commit")
        return
    with job.stage("commit"):
        steps.note_commit()
        for disk in plan.disks:
            qemu_img.commit(job.tools, disk.overlay, disk.partial, plan.format)


def _validate(job: Job, plan: Plan) -> None:
    """Check what is about to be published, and that the source is still what was read."""
    with job.stage("validate"):
        valid: dict[str, Any] = {}
        for disk in plan.disks:
            if plan.check:
                qemu_img.check_target(job.tools, disk.partial, plan.format, disk.source.virtual_size)
            if plan.compare:
                against = disk.overlay if plan.fix else None
                qemu_img.compare(job.tools, disk.source, against, disk.partial, plan.format)
            check_unchanged(disk.source)
            valid[disk.id] = {"checked": plan.check, "compared": plan.compare}
        looked = plan.check or plan.compare
        job.record.results["validate"] = {"all_valid": True if looked else None, "disks": valid}


def _publish(job: Job, items: Sequence[Item]) -> None:
    """Give every finished disk its name. One that has it already, from an earlier attempt, keeps it."""
    for item in items:
        job.claim.check()
        if item.file.is_at(item.file.path):
            publish(Path(item.file.path), Path(item.final))


def _describe_targets(job: Job, plan: Plan, finals: dict[str, Path]) -> None:
    """Put the published files on the record."""
    job.record.results["convert"] = {
        "disks": {disk: str(path) for disk, path in finals.items()},
        "format": plan.format,
        "compressed": plan.compress,
    }
    job.record.disks = [
        disk.model_copy(
            update={
                "target": str(finals[disk.id]),
                "target_format": plan.format,
                "target_bytes": finals[disk.id].stat().st_blocks * 512,
            }
        )
        for disk in job.record.disks
    ]


def _boot(job: Job, plan: Plan) -> None:
    """Boot what is about to be published, on overlays that are thrown away, if that is wished for."""
    if not plan.boot:
        job.skip("boot")
        return
    with job.stage("boot"), contextlib.ExitStack() as stack:
        disks = _boot_order(job, plan)
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
            domain = _as_found(job, plan, disks)
            tested = boottest.thrown_away(domain, overlays, nvram, job.settings.validate_.boot_memory_mb)
            verdict = boottest.run(job, connection, tested, seconds)
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
    """Have a Linux guest write to its serial port, in the test alone; most write to nothing but their screen."""
    from hyper2kvmd.guest.inspect import inspect
    from hyper2kvmd.guest.linux.fix import add_serial_console
    from hyper2kvmd.guest.session import open_guest

    found = job.record.results.get("inspect", {})
    if found.get("os_type") != "linux" or found["serial_console"]:
        return
    disks = [(overlays[disk.id], "qcow2") for disk in plan.disks]
    try:
        with open_guest(disks, accel=plan.accel, memory_mb=appliance_mb(job), tools=job.tools) as session:
            add_serial_console(session, inspect(session, _key_for(job, plan), found["firmware"]))
    except MigrationError as error:
        log.warning("the boot test cannot have the guest write to its serial port", reason=error.message)


def _keep(job: Job, verdict: boottest.Verdict) -> None:
    """Put the verdict on the record, and what was seen beside the report."""
    kept: dict[str, str | None] = {"serial_log": None, "screenshot": None}
    for key, name, data in (
        ("serial_log", BOOT_LOG, verdict.console.encode()),
        ("screenshot", BOOT_SCREEN, verdict.screen),
    ):
        if data:
            write_durably(job.claim.fd, name, data, job.claim.attempt)
            kept[key] = name
    job.record.results["boot"] = {
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "seconds": verdict.seconds,
        **kept,
    }
    log.info("boot test", kind=Kind.BOOT_TEST, outcome=verdict.outcome, reason=verdict.reason, seconds=verdict.seconds)


def _boot_order(job: Job, plan: Plan) -> list[PlannedDisk]:
    """The disks as the domain has them: the one that it boots from, then the others in the VM's order."""
    boots = {disk.id for disk in job.record.disks if disk.boot}
    return sorted(plan.disks, key=lambda disk: disk.id not in boots)


def _as_found(job: Job, plan: Plan, disks: Sequence[PlannedDisk]) -> Domain:
    """The plan's domain, with what the disks say of it."""
    inspected = job.record.results.get("inspect", {})
    firmware = inspected.get("firmware", plan.domain.firmware)
    guest = None
    if inspected:
        guest = GuestSystem(
            *(inspected[key] for key in ("os_type", "distro", "version", "kernel_version", "product_name"))
        )
    return replace(
        plan.domain,
        firmware=firmware,
        secure_boot=plan.domain.secure_boot and firmware == "uefi",
        guest=guest,
        disks=tuple(DomainDisk(disk.final, plan.format, disk.id, False) for disk in disks),
        compatible=job.record.results.get("fix", {}).get("compatible", False),
    )


def _hook(job: Job, plan: Plan) -> None:
    """Run the hooks that may have a say before the domain is defined, if there are any."""
    found = hooks.found(job.settings.hooks, "pre-import")
    if not found:
        return
    with job.stage("hook"):
        name, status = plan.manifest.vm_name, "importing"
        # The fields of a report, as far as they are known. Its domain is that which is to be.
        document = {
            "schema_version": "1.0",
            "status": status,
            "job": job.id,
            "vm_name": name,
            "attempts": job.claim.attempt,
            **job.record.dump(),
            "domain": {"name": plan.domain.name, "uuid": plan.domain.uuid, "uri": job.settings.libvirt.uri},
            "tags": plan.manifest.tags,
        }
        environment = hooks.variables(job.claim.directory, name, status, job.id)
        for hook in found:
            job.claim.check()
            hooks.run(job.tools, hook, json.dumps(document).encode(), environment, job.settings.hooks.timeout_seconds)


def _import(job: Job, plan: Plan) -> None:
    """Define the domain."""
    libvirt = job.settings.libvirt
    job.claim.check()
    with connect(libvirt.uri) as connection:
        job.record.tools["libvirt"] = libvirt_version(connection)
        domain = _as_found(job, plan, _boot_order(job, plan))
        disks = tuple(replace(disk, direct_io=qemu_img.direct_io(disk.path)) for disk in domain.disks)
        define(
            connection,
            to_xml(replace(domain, disks=disks)),
            domain.name,
            domain.uuid,
            job.id,
            autostart=libvirt.autostart,
            start=libvirt.start,
        )
        for directory in dict.fromkeys(disk.path.parent for disk in domain.disks):
            if warning := refresh_pools(connection, directory, libvirt.pool):
                job.warn(warning)
    job.record.domain = DomainRecord(name=domain.name, uuid=domain.uuid, uri=libvirt.uri)
    job.record.results["import"] = {"domain": domain.name, "uuid": domain.uuid}
