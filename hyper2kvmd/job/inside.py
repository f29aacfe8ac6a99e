"""What a job does inside the guest: INSPECT and FIX, on overlays that can be thrown away."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Literal

import structlog

from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.fix import fix
from hyper2kvmd.guest.inspect import Inspection, inspect
from hyper2kvmd.guest.keys import passphrase
from hyper2kvmd.guest.linux.kernels import bus_of
from hyper2kvmd.guest.options import FixOptions
from hyper2kvmd.guest.session import open_guest
from hyper2kvmd.image import qemu_img
from hyper2kvmd.job.context import Job
from hyper2kvmd.job.plan import Plan, appliance_mb, nics_of
from hyper2kvmd.job.results import Fixed, Inspected
from hyper2kvmd.job.steps import Steps
from hyper2kvmd.report.model import ChangeRecord
from hyper2kvmd.text import escaped

log = structlog.get_logger()


def look_inside(job: Job, plan: Plan, steps: Steps) -> None:
    """Look into the guest, and fix it, on overlays that can be thrown away; or take what an earlier attempt did."""
    if record := steps.fixed(plan):
        job.record.take_over(record)
        return
    _inspect_and_fix(job, plan)
    done = copy.deepcopy(job.record)
    done.stages = [stage for stage in done.stages if stage.name in ("inspect", "fix")]
    steps.note_fixed(plan, done)


def _inspect_and_fix(job: Job, plan: Plan) -> None:
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
                inspection = inspect(session, key_for(job, plan), plan.hardware.firmware)
            except MigrationError as error:
                if not _tolerated(job, plan, error):
                    raise
                return
            _note_inspected(job, plan, inspection)
        if not plan.fix:
            job.skip("fix")
            return
        with job.stage("fix"):
            try:
                result = fix(session, inspection, fix_options(job, plan))
            except MigrationError as error:
                if not _tolerated(job, plan, error):
                    raise
                return
            for finding in result.warnings:
                job.warn(finding)
                if job.settings.vm.mac == "new" and finding.code in _BY_OLD_MAC:
                    raise MigrationError(
                        Code.PLAN_INVALID,
                        f"its cards are to get new MAC addresses, but {finding.message}",
                        "Set `mac: keep` in the plan of the VM (vm.mac), or change that in the guest and export again.",
                        field="vm.mac",
                    )
            job.record.changes = [ChangeRecord(**change.as_json()) for change in result.changes]
            fstab: dict[Literal["before", "after"], str] | None = None
            if plan.manifest.stages.fix.print_fstab:
                before, after = (escaped(text, "\t\n") for text in result.fstab)
                fstab = {"before": before, "after": after}
                log.info("fstab of the guest", **fstab)
            job.record.results.fix = Fixed(
                drivers_injected=result.drivers_injected,
                boot_updated=result.boot_updated,
                proofs=result.proofs,
                machine=result.machine,
                fstab=fstab,
                names=tuple(name.shown(_on_disk(name.device, inspection, plan)) for name in result.names),
            )
            stack.close()  # what the appliance could not write is an error of this stage


# What FIX says of a guest that loses an address with its card's old MAC.
_BY_OLD_MAC = frozenset({"network_unknown_mac", "addresses_lost"})


def _on_disk(device: str, inspection: Inspection, plan: Plan) -> str:
    """A device as people know it, by the disk of the export; what may span several keeps the guest's name."""
    disk = next((one.disk for one in inspection.filesystems if one.name == device), "")
    if not disk:
        return device
    part = device.removeprefix(disk)
    name = plan.disks[inspection.disks.index(disk)].id
    return f"{name}, partition {part}" if part else name


def key_for(job: Job, plan: Plan) -> Callable[[str], str | None]:
    """A function from the UUID of a LUKS container to its passphrase, None if the settings have none."""
    return partial(passphrase, job.settings.fix.luks_keys, plan.manifest.vm_name)


def fix_options(job: Job, plan: Plan) -> FixOptions:
    """What FIX is to do: what the guest needs, and what the manifest asks for."""
    wanted = plan.manifest.stages.fix
    return FixOptions(
        fstab=wanted.fstab_mode if wanted.fstab else "noop",
        bootloader=wanted.bootloader,
        drivers=wanted.drivers,
        initramfs=wanted.initramfs,
        serial_console=job.settings.fix.serial_console,
        remove_vmware_tools=wanted.remove_vmware_tools,
        backup_dir=f"/root/.hyper2kvmd-backup/{job.id}" if wanted.backup else "",
        nics=nics_of(plan.cards),
        virtio_win=job.settings.fix.virtio_win,
        rdp=wanted.enable_rdp,
        configuration=plan.manifest.configuration,
    )


def _tolerated(job: Job, plan: Plan, error: MigrationError) -> bool:
    """Whether a guest that cannot be looked into, or cannot be fixed, is converted all the same."""
    unseen = (
        Code.OS_UNKNOWN, Code.OS_UNSUPPORTED, Code.GUEST_ENCRYPTED, Code.GUEST_DIRTY, Code.APPLIANCE_TOO_OLD,
        Code.TOOL_MISSING,
    )  # fmt: skip
    if not plan.fix and error.code in unseen:
        # Who turned FIX off says that the guest is ready as it is.
        job.warn(Finding(error.code, error.message, "FIX is off, so the disks were converted as they are."))
        return True
    unable = (Code.OS_UNKNOWN, Code.OS_UNSUPPORTED, Code.APPLIANCE_TOO_OLD)
    if job.settings.fix.allow_unsupported and error.code in unable:
        found = job.record.results.inspect
        machine = machine_for(
            found.guest if found else None,
            found.firmware if found else plan.domain.firmware,
            len(plan.disks),
            virtio=False,
        )
        hardware = f"{bus_of(machine, len(plan.disks)).name} and {machine.cards}"
        job.warn(Finding(error.code, f"{error.message}; converted as it is, with {hardware}", error.hint))
        job.record.results.fix = Fixed(drivers_injected=(), boot_updated=False, proofs=(), machine=machine)
        return True
    return False


def _note_inspected(job: Job, plan: Plan, inspection: Inspection) -> None:
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
    job.record.results.inspect = Inspected.of(inspection, boot.id)
