"""One migration, from manifest to domain: `migrate` is the picture, to be read from top to bottom.

              ┌─ VERIFY: checksums ─────────────────────────┐
    plan ─────┼─ INSPECT ─ FIX, on an overlay per disk ─────┼─ commit ─ VALIDATE ─ publish ─ hook ─ IMPORT
              └─ CONVERT: source → partial, side by side ───┘

The source is only ever read, and once where our own reader converts it: what that reads, VERIFY takes the checksum of.
The fix is laid onto the converted disk at the end, so a migration takes as long as its slowest branch, not as long as
all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from hyper2kvmd.domain.machine import check_cpus, machine_for
from hyper2kvmd.domain.model import Domain, DomainDisk
from hyper2kvmd.domain.xml import to_xml
from hyper2kvmd.errors import Cancelled, Collected, MigrationError, Outcome
from hyper2kvmd.files import open_file
from hyper2kvmd.hypervisor.connection import connect, libvirt_version
from hyper2kvmd.hypervisor.define import define, refresh_pools
from hyper2kvmd.image import qemu_img
from hyper2kvmd.image.convert import THREADS_LIMIT, copy, stream, streams
from hyper2kvmd.image.publish import publish
from hyper2kvmd.image.source import check_checksum, check_unchanged, digest_of, sha256
from hyper2kvmd.job import reserve
from hyper2kvmd.job.boot import boot_copy
from hyper2kvmd.job.context import AT_ONCE, Job, Record
from hyper2kvmd.job.inside import look_inside
from hyper2kvmd.job.plan import Plan, PlannedDisk, make_plan, memory_mb, needs
from hyper2kvmd.job.results import Checked, Converted, Imported, Validated
from hyper2kvmd.job.steps import Item, Steps
from hyper2kvmd.manifest import Manifest
from hyper2kvmd.notify import hooks
from hyper2kvmd.queue.claim import Claim
from hyper2kvmd.report.model import DiskRecord, DomainRecord

log = structlog.get_logger()


def migrate(job: Job, claim: Claim, manifest: Manifest) -> tuple[str, ...]:
    """Migrate one export, and return the names of its files that were read. What was done is on `job.record`.

    Raise MigrationError, OSError or Cancelled; then nothing is published that was not complete, and what is
    published is found again by the next attempt.
    """
    with contextlib.ExitStack() as stack:
        with job.stage("plan"):
            problems = Collected()
            steps = Steps(job)
            resumed = steps.to_publish()
            items, record = resumed or ((), Record())
            plan = make_plan(job, manifest, problems, stack, published=[Path(item.final) for item in items])
            with problems:
                for hook in hooks.found(job.settings.hooks, "pre-import") if plan.import_ else ():
                    hooks.check(hook)
            if not problems.errors:
                plan = plan if resumed else steps.adopt(plan)
                steps.clean(plan)
            if not resumed:
                with problems:
                    memory = memory_mb(job, plan, fixed=not problems.errors and steps.fixed(plan) is not None)
                    reserve.reserve(job, needs(job, plan, steps.converted), memory, stack)
            problems.check()
        if resumed:
            job.record.take_over(record)
        else:
            goes_on = False
            try:
                _branches(job, plan, steps)
                disks = _boot_order(job, plan)
                domain = _as_found(job, plan, disks)
                if job.request.wants("import", job.settings.libvirt.import_):
                    check_cpus(domain)
                if plan.convert:
                    _commit(job, plan, steps)
                    digests = _validate(job, plan)
                    boot_copy(job, plan, disks, domain)
                    items = steps.note_finished(plan, deepcopy(job.record), digests)
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
        return plan.sources
    with job.stage("publish"):
        _publish(claim, items)
        _describe_targets(job, plan, {item.disk: item for item in items})
    if plan.import_:
        if not plan.imported:
            _hook(job, claim, plan)
        with job.stage("import"):
            _import(job, claim, plan)
    else:
        job.skip("import")
    return plan.sources


def _branches(job: Job, plan: Plan, steps: Steps) -> None:
    """Run the three branches at the same time; the first that fails ends the others."""
    job.record.tools.update(qemu_img.versions(job.tools))
    digests = {disk.id: digest for disk in plan.disks if (digest := steps.verified(disk))}
    reads = {disk.id: _Read() for disk in plan.disks if plan.convert and _streams(job, plan, steps, disk)}
    branches = []
    if plan.verify:
        branches.append(partial(_verify, job, plan, steps, digests, reads))
    else:
        job.skip("verify")
    if plan.looks_inside:
        branches.append(partial(look_inside, job, plan, steps))
    else:
        job.skip("inspect")
        job.skip("fix")
    if plan.convert:
        branches.append(partial(_convert, job, plan, steps, reads))
    else:
        job.skip("convert")
    job.together(*branches)
    digests.update({disk: read.digest for disk, read in reads.items() if read.digest})
    inspected = job.record.results.inspect
    boot = inspected.boot_disk if inspected else plan.boot_disk
    job.record.disks = [
        DiskRecord(
            id=disk.id,
            source=disk.source.name,
            source_format=disk.source.disk.format,
            source_bytes=disk.source.size,
            source_sha256=digests.get(disk.id),
            source_verified=plan.verify and disk.source.disk.sha256 is not None,
            virtual_size=disk.source.virtual_size,
            engine=steps.engine(disk),
            boot=disk.id == boot,
        )
        for disk in plan.disks
    ]


def _streams(job: Job, plan: Plan, steps: Steps, disk: PlannedDisk) -> bool:
    """Whether our own reader is to convert a disk."""
    engine = job.settings.convert.engine
    return not steps.converted(disk) and streams(disk.source, engine, compress=plan.compress)


class _Read:
    """The one read of a source: how far CONVERT is with it, and once it is over the checksum, for VERIFY.

    digest: None if our own reader was not for this disk after all.
    """

    def __init__(self) -> None:
        self.ratio = 0.0
        self.digest: str | None = None
        self.over = threading.Event()


def _verify(job: Job, plan: Plan, steps: Steps, digests: dict[str, str], reads: dict[str, _Read]) -> None:
    """Check every disk that has a checksum; what is not converted by our own reader is read for that."""

    def verify(disk: PlannedDisk) -> None:
        with job.progress("verify", disk.id, disk.source.size) as tell:
            digest = _digest_of(reads[disk.id], job, tell) if disk.id in reads else None
            digest = digest or sha256(disk.source, job.tools.cancel, tell)
        check_checksum(disk.source, digest)
        digests[disk.id] = digest
        steps.note_verified(disk, digest)

    left = [disk for disk in plan.disks if disk.source.disk.sha256 is not None and disk.id not in digests]
    left.sort(key=lambda disk: disk.id in reads)  # who waits for another keeps nobody from reading
    with job.stage("verify", sum(disk.source.size for disk in left)):
        job.together(*(partial(verify, disk) for disk in left))


def _digest_of(read: _Read, job: Job, tell: Callable[[float], None]) -> str | None:
    """The checksum that a conversion computes on its way, once it is done. Raise Cancelled."""
    while not read.over.wait(0.2):
        if job.tools.cancel.is_set():
            raise Cancelled
        tell(read.ratio)
    return read.digest


def _convert(job: Job, plan: Plan, steps: Steps, reads: dict[str, _Read]) -> None:
    """Convert every disk, side by side."""
    left = [disk for disk in plan.disks if not steps.converted(disk)]
    # What runs at the same time shares the processors.
    shares = min(AT_ONCE, len(left)) * (1 + reserve.others(job))
    threads = max(1, min(THREADS_LIMIT, len(os.sched_getaffinity(0)) // max(1, shares)))

    def one(disk: PlannedDisk) -> None:
        what, copied = (job.tools, disk.source, disk.partial, plan.format), None
        with job.progress("convert", disk.id, disk.source.virtual_size) as tell:
            if read := reads.get(disk.id):

                def told(ratio: float) -> None:
                    tell(ratio)
                    read.ratio = ratio

                copied = stream(*what, compress=plan.compress, threads=threads, on_progress=told)
                read.digest = copied.sha256 if copied else None
                read.over.set()
            if copied is None:
                reflink = job.settings.convert.engine == "auto"
                copied = copy(*what, reflink=reflink, compress=plan.compress, on_progress=tell)
        steps.note_converted(disk, copied.engine)
        if copied.sha256 is not None and disk.source.disk.sha256 is None:
            steps.note_verified(disk, copied.sha256)
        elif copied.sha256 is not None and not plan.verify:
            _warn_of_mismatch(job, disk, copied.sha256)
        counted = {"read": copied.read, "inflated": copied.inflated, "written": copied.written}
        job.events.emit("converted", item=disk.id, engine=copied.engine, **counted)

    with job.stage("convert", sum(disk.source.virtual_size for disk in left)):
        for disk in left:
            qemu_img.make_target(disk.partial)
        if left:
            steps.note_made([disk.partial for disk in left])
        job.together(*(partial(one, disk) for disk in left))
    # Compressed, it can be a fraction of what was reserved, and what is checked and booted then takes long.
    reserve.lower(job, needs(job, plan, steps.converted))


def _warn_of_mismatch(job: Job, disk: PlannedDisk, digest: str) -> None:
    """Say that a checksum is wrong which nobody asked to be verified."""
    try:
        check_checksum(disk.source, digest)
    except MigrationError as error:
        hint = f"{error.hint} It is a warning because verify_checksum is off."
        job.warn(replace(error.finding(), hint=hint))


def _commit(job: Job, plan: Plan, steps: Steps) -> None:
    """Lay the fix onto the converted disks."""
    if not plan.fix:
        job.skip("commit")
        return
    sizes = {disk.id: disk.overlay.stat().st_size for disk in plan.disks}
    with job.stage("commit", sum(sizes.values())):
        steps.note_commit()
        for disk in plan.disks:
            with job.progress("commit", disk.id, sizes[disk.id]) as tell:
                qemu_img.commit(job.tools, disk.overlay, disk.partial, plan.format, on_progress=tell)


def _validate(job: Job, plan: Plan) -> dict[str, str]:
    """Check what is about to be published, and that the source is still what was read.

    Return the digests of what is to be published, if a signed report is to have them.
    """
    signs = job.settings.report.sign_key is not None
    sizes = {disk.id: disk.partial.stat().st_size if signs else 0 for disk in plan.disks}
    compared = sum(disk.source.virtual_size for disk in plan.disks) if plan.compare else 0
    digests: dict[str, str] = {}
    with job.stage("validate", compared + sum(sizes.values())):
        checked: dict[str, Checked] = {}
        for disk in plan.disks:
            if plan.check:
                qemu_img.check_target(job.tools, disk.partial, plan.format, disk.source.virtual_size)
            if plan.compare:
                against = disk.overlay if plan.fix else None
                with job.progress("validate", disk.id, disk.source.virtual_size) as tell:
                    qemu_img.compare(job.tools, disk.source, against, disk.partial, plan.format, on_progress=tell)
            check_unchanged(disk.source)
            checked[disk.id] = Checked(checked=plan.check, compared=plan.compare)
            if signs:
                size = sizes[disk.id]
                with job.progress("validate", disk.id, size) as tell, open(open_file(disk.partial), "rb") as file:
                    digests[disk.id] = digest_of(file.fileno(), size, job.tools.cancel, tell)
        looked = plan.check or plan.compare
        job.record.results.validate_ = Validated(all_valid=True if looked else None, disks=checked)
    return digests


def _publish(claim: Claim, items: Sequence[Item]) -> None:
    """Give every finished disk its name. One that has it already, from an earlier attempt, keeps it."""
    for item in items:
        claim.check()
        if item.file.is_at(item.file.path):
            publish(Path(item.file.path), Path(item.final))


def _describe_targets(job: Job, plan: Plan, items: dict[str, Item]) -> None:
    """Put the published files on the record."""
    job.record.results.convert = Converted(
        disks={disk: item.final for disk, item in items.items()}, format=plan.format, compressed=plan.compress
    )
    job.record.disks = [
        disk.model_copy(
            update={
                "target": items[disk.id].final,
                "target_format": plan.format,
                "target_bytes": os.stat(items[disk.id].final).st_blocks * 512,
                "target_sha256": items[disk.id].sha256,
            }
        )
        for disk in job.record.disks
    ]


def _boot_order(job: Job, plan: Plan) -> list[PlannedDisk]:
    """The disks as the domain has them: the one that it boots from, then the others in the VM's order."""
    boots = {disk.id for disk in job.record.disks if disk.boot}
    return sorted(plan.disks, key=lambda disk: disk.id not in boots)


def _as_found(job: Job, plan: Plan, disks: Sequence[PlannedDisk]) -> Domain:
    """The plan's domain, with what the disks say of it."""
    inspected, fixed = job.record.results.inspect, job.record.results.fix
    firmware = inspected.firmware if inspected else plan.domain.firmware
    guest = inspected.guest if inspected else None
    return replace(
        plan.domain,
        firmware=firmware,
        secure_boot=plan.domain.secure_boot and firmware == "uefi",
        guest=guest,
        disks=tuple(DomainDisk(disk.final, plan.format, disk.id, False) for disk in disks),
        machine=fixed.machine if fixed else machine_for(guest, firmware, len(disks), virtio=True),
    )


def _hook(job: Job, claim: Claim, plan: Plan) -> None:
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
            "attempts": job.attempt,
            **job.record.dump(),
            "domain": {"name": plan.domain.name, "uuid": plan.domain.uuid, "uri": job.settings.libvirt.uri},
            "tags": plan.manifest.tags,
        }
        environment = hooks.variables(job.export.directory, name, status, job.id)
        for hook in found:
            claim.check()
            hooks.run(job.tools, hook, json.dumps(document).encode(), environment, job.settings.hooks.timeout_seconds)


def _import(job: Job, claim: Claim, plan: Plan) -> None:
    """Define the domain."""
    libvirt = job.settings.libvirt
    claim.check()
    with connect(libvirt.uri) as connection:
        job.record.tools["libvirt"] = libvirt_version(connection)
        domain = _as_found(job, plan, _boot_order(job, plan))
        if not plan.imported:
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
    job.record.results.import_ = Imported(domain=domain.name, uuid=domain.uuid, machine=domain.machine)
