"""One migration, from manifest to domain: `migrate` is the picture, to be read from top to bottom.

              ┌─ VERIFY: checksums ─────────────────────────┐
    plan ─────┼─ INSPECT ─ FIX, on an overlay per disk ─────┼─ commit ─ VALIDATE ─ publish ─ IMPORT
              └─ CONVERT: source → partial, side by side ───┘

The source is only ever read. The fix is laid onto the converted disk at the end, so a migration takes as long as
its slowest branch, not as long as all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from hyper2kvmd import images, importer, report, reserve
from hyper2kvmd.domain import Domain, DomainDisk, to_xml
from hyper2kvmd.errors import Cancelled, Code, Finding, MigrationError, Outcome
from hyper2kvmd.job import Job
from hyper2kvmd.manifest import Manifest
from hyper2kvmd.plan import Plan, PlannedDisk, make_plan, needs
from hyper2kvmd.steps import Item, Steps

if TYPE_CHECKING:
    from hyper2kvmd.guest.fix import FixOptions
    from hyper2kvmd.guest.inspect import Inspection

log = structlog.get_logger()

LUKS_MEMORY_MB = 2304


def migrate(job: Job, manifest: Manifest) -> None:
    """Migrate one export. What was done is on `job.record`, also when it fails.

    Raise MigrationError, OSError or Cancelled; then nothing is published that was not complete, and what is
    published is found again by the next attempt.
    """
    with contextlib.ExitStack() as stack:
        with job.stage("plan"):
            sources = images.open_sources(job.claim.fd, job.claim.directory, manifest.disks, stack)
            job.sources = tuple(dict.fromkeys(f.name for source in sources for f in (source.file, source.data)))
            for source in sources:
                for finding in source.warnings:
                    job.warn(finding)
            steps = Steps(job)
            resumed = steps.to_publish()
            items, record = resumed or ((), {})
            plan = make_plan(job, manifest, sources, ours=[Path(item.final) for item in items])
            if not resumed:
                plan = steps.adopt(plan)
            steps.clean(plan)
            if not resumed:
                memory = _memory_mb(job) if plan.looks_inside and not steps.fixed(plan) else 0
                reserve.reserve(job, needs(job, plan, steps.converted), memory, stack)
        if resumed:
            job.record.restore(record)
        else:
            goes_on = False
            try:
                _branches(job, plan, steps)
                if plan.convert:
                    _commit(job, plan, steps)
                    _validate(job, plan)
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
        return
    with job.stage("publish"):
        _publish(job, items)
        _describe_targets(job, plan, {item.disk: Path(item.final) for item in items})
    if plan.import_:
        with job.stage("import"):
            _import(job, plan)
    else:
        job.skip("import")


def _branches(job: Job, plan: Plan, steps: Steps) -> None:
    """Run the three branches at the same time; the first that fails ends the others."""
    job.record.tools.update(images.versions(job.tools))
    digests: dict[str, str] = {}
    branches = []
    if plan.verify:
        branches.append(partial(_verify, job, plan, steps, digests))
    else:
        job.skip("verify")
    if plan.looks_inside:
        branches.append(partial(_guest, job, plan, steps))
    if plan.convert:
        branches.append(partial(_convert, job, plan, steps))
    job.together(*branches)
    boot = job.record.results.get("inspect", {}).get("boot_disk") or plan.manifest.boot_disk().id
    job.record.disks = [
        report.DiskRecord(
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
    with job.stage("verify"):

        def verify(disk: PlannedDisk) -> None:
            if disk.source.disk.sha256 is None:
                return
            if digest := steps.verified(disk):
                digests[disk.id] = digest
                return
            tell = job.progress("verify", disk.id, disk.source.size)
            digests[disk.id] = images.verify(disk.source, job.tools.cancel, tell)
            steps.note_verified(disk, digests[disk.id])

        job.together(*(partial(verify, disk) for disk in plan.disks))


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
    from hyper2kvmd.guest.fix import fix
    from hyper2kvmd.guest.inspect import inspect
    from hyper2kvmd.guest.keys import passphrase
    from hyper2kvmd.guest.session import open_guest

    settings = job.settings
    manifest = plan.manifest
    with contextlib.ExitStack() as stack:
        with job.stage("inspect"):
            for disk in plan.disks:
                images.create_overlay(job.tools, disk.overlay, disk.source)
            session = stack.enter_context(
                open_guest(
                    [(disk.overlay, "qcow2") for disk in plan.disks],
                    accel=plan.accel,
                    memory_mb=_memory_mb(job),
                    tools=job.tools,
                )
            )
            version = session.version()
            job.record.tools["libguestfs"] = f"{version['major']}.{version['minor']}.{version['release']}"
            try:
                key_for = partial(passphrase, settings.fix.luks_keys, manifest.vm_name)
                inspection = inspect(session, key_for, manifest.vm.firmware)
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
            job.record.changes = [report.ChangeRecord(**change.as_json()) for change in result.changes]
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


def _memory_mb(job: Job) -> int:
    """MiB of memory for the appliance."""
    settings = job.settings
    # A key derivation that was made to be slow on a computer with much memory needs up to 1 GiB of it.
    return max(settings.guest.memory_mb, LUKS_MEMORY_MB if settings.fix.luks_keys else 0)


def _fix_options(job: Job, plan: Plan) -> FixOptions:
    """What FIX is to do: what the guest needs, and what the manifest asks for."""
    from hyper2kvmd.guest.fix import FixOptions
    from hyper2kvmd.guest.fixers.network import Nic

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
    firmware = plan.manifest.vm.firmware
    if firmware not in ("unknown", inspection.firmware):
        job.warn(
            Finding(
                "firmware_differs",
                f"the manifest says firmware {firmware}, the disks are made for {inspection.firmware}",
                f"The domain gets {inspection.firmware}.",
                "vm.firmware",
            )
        )
    boot = plan.disks[inspection.boot_disk]
    expected = plan.manifest.boot_disk().id
    if expected != boot.id:
        job.warn(
            Finding(
                "boot_disk_differs",
                f"the guest boots from {boot.id}, not from {expected} as the manifest has it",
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
        if steps.converted(disk):
            return
        tell = job.progress("convert", disk.id, disk.source.virtual_size)
        images.convert(
            job.tools, disk.source, disk.partial, plan.format, compress=plan.compress, on_progress=tell
        )  # fmt: skip
        steps.note_converted(disk)

    with job.stage("convert"):
        job.together(*(partial(convert, disk) for disk in plan.disks))


def _commit(job: Job, plan: Plan, steps: Steps) -> None:
    """Lay the fix onto the converted disks."""
    if not plan.fix:
        job.skip("commit")
        return
    with job.stage("commit"):
        steps.note_commit()
        for disk in plan.disks:
            images.commit(job.tools, disk.overlay, disk.partial, plan.format)


def _validate(job: Job, plan: Plan) -> None:
    """Check what is about to be published, and that the source is still what was read."""
    with job.stage("validate"):
        valid: dict[str, Any] = {}
        for disk in plan.disks:
            if plan.check:
                images.check_target(job.tools, disk.partial, plan.format, disk.source.virtual_size)
            if plan.compare:
                against = disk.overlay if plan.fix else None
                images.compare(job.tools, disk.source, against, disk.partial, plan.format)
            images.unchanged(disk.source)
            valid[disk.id] = {"checked": plan.check, "compared": plan.compare}
        looked = plan.check or plan.compare
        job.record.results["validate"] = {"all_valid": True if looked else None, "disks": valid}


def _publish(job: Job, items: Sequence[Item]) -> None:
    """Give every finished disk its name. One that has it already, from an earlier attempt, keeps it."""
    for item in items:
        job.claim.check()
        if item.file.is_at(item.file.path):
            images.publish(Path(item.file.path), Path(item.final))


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


def _import(job: Job, plan: Plan) -> None:
    """Define the domain."""
    manifest, libvirt = plan.manifest, job.settings.libvirt
    inspected = job.record.results.get("inspect", {})
    order = [disk.id for disk in manifest.ordered()]
    disks = sorted(job.record.disks, key=lambda disk: (not disk.boot, order.index(disk.id)))
    firmware = inspected.get("firmware", manifest.vm.firmware)
    job.claim.check()
    with importer.connect(libvirt.uri) as connection:
        job.record.tools["libvirt"] = importer.version(connection)
        domain = Domain(
            name=plan.domain_name,
            uuid=plan.domain_uuid,
            title=manifest.vm_name,
            cpus=manifest.vm.cpu,
            memory_mib=manifest.vm.memory_mib,
            firmware="uefi" if firmware == "uefi" else "bios",
            secure_boot=bool(manifest.vm.secure_boot),
            virt_type=importer.virt_type(connection, plan.accel),
            disks=tuple(
                DomainDisk(target, plan.format, disk.id, images.direct_io(target))
                for disk in disks
                if (target := Path(disk.target or ""))
            ),
            nics=plan.nics,
            job=job.id,
            source={
                "provider": manifest.provider or "",
                "vm_id": manifest.vm_id or "",
                "vm_name": manifest.vm_name,
                "export": job.claim.directory.name,
            },
            compatible=job.record.results.get("fix", {}).get("compatible", False),
        )
        importer.define(
            connection,
            to_xml(domain),
            domain.name,
            domain.uuid,
            job.id,
            autostart=libvirt.autostart,
            start=libvirt.start,
        )
    job.record.domain = report.DomainRecord(name=domain.name, uuid=domain.uuid, uri=libvirt.uri)
    job.record.results["import"] = {"domain": domain.name, "uuid": domain.uuid}
