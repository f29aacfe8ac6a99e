"""The plan of a job: everything that can be known, and can go wrong, before the first byte is copied."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hyper2kvmd import accel
from hyper2kvmd.domain import hardware
from hyper2kvmd.domain.hardware import Card, Hardware
from hyper2kvmd.domain.machine import machine_for
from hyper2kvmd.domain.model import Domain, DomainDisk, DomainNic, domain_uuid, generated_mac
from hyper2kvmd.errors import Code, Collected, Finding, MigrationError
from hyper2kvmd.files import existing_parent
from hyper2kvmd.guest.linux.fixers.network.place import kernel_order
from hyper2kvmd.guest.options import Nic
from hyper2kvmd.guest.session import check_host
from hyper2kvmd.hypervisor.connection import connect, is_remote, virt_type
from hyper2kvmd.hypervisor.disks import check_access
from hyper2kvmd.hypervisor.preflight import preflight, runs_already, uuid_taken
from hyper2kvmd.image import qemu_img
from hyper2kvmd.image.publish import output_exists
from hyper2kvmd.image.source import Source, open_sources
from hyper2kvmd.job import reserve
from hyper2kvmd.job.context import Job
from hyper2kvmd.manifest import Manifest
from hyper2kvmd.report.sign import check_key

# What an overlay grows by while a guest is fixed: new initramfs images, replayed journals.
FIX_SPACE = 512 << 20
LUKS_MEMORY_MB = 2304


@dataclass(frozen=True)
class PlannedDisk:
    """One disk: its source, and the files that it becomes. The final name appears only when all is done."""

    source: Source
    overlay: Path
    partial: Path
    final: Path

    @property
    def id(self) -> str:
        """The id that the manifest gives it."""
        return self.source.disk.id


@dataclass(frozen=True)
class Plan:
    """What will be done; stages that are False are left out.

    disks: in the order in which the VM had them. boot_disk: the id of the one that it boots from, as far as is known
    before the disks are looked into. target: whether disks are written, were this no dry run. hardware: what the VM
    was; cards: its network cards as the domain has them, with the MACs they will have, as far as that is known.
    domain: what it will be, as far as can be said now. imported: an earlier attempt published the disks, and the domain
    that it made runs on them.
    """

    manifest: Manifest
    hardware: Hardware
    disks: tuple[PlannedDisk, ...]
    boot_disk: str
    format: str
    compress: bool
    verify: bool
    inspect: bool
    fix: bool
    target: bool
    convert: bool
    check: bool
    compare: bool
    boot: bool
    import_: bool
    accel: str
    domain: Domain
    cards: tuple[Card, ...]
    imported: bool

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of the export that the disks are read from."""
        files = (file.file_name for disk in self.disks for file in disk.source.files)
        return tuple(dict.fromkeys(files))

    @property
    def looks_inside(self) -> bool:
        """Whether the guest is opened at all; it cannot be fixed without having been inspected."""
        return self.inspect or self.fix


def make_plan(
    job: Job, manifest: Manifest, problems: Collected, stack: contextlib.ExitStack, published: Iterable[Path] = ()
) -> Plan:
    """Decide everything, and check what can be checked at once; all that is wrong is put into `problems`.

    The sources are open until `stack` is closed. `published` are outputs of an earlier attempt of this job.
    The plan is of use only if nothing is wrong. Raise OSError.
    """
    settings, stages = job.settings, manifest.stages
    format = stages.convert.format or manifest.output.format or settings.output.format
    compress = settings.output.compress if stages.convert.compress is None else stages.convert.compress
    inspect, fix, convert = stages.inspect.enabled, stages.fix.enabled, stages.convert.enabled
    check = stages.validate_.enabled
    dry_run = job.request.dry_run or manifest.options.dry_run
    boot = check and convert and (settings.validate_.test_boot or bool(stages.validate_.test_boot))
    defines = job.request.wants("import", settings.libvirt.import_)
    sources, directory = _sources(job, manifest, problems, stack), settings.output_dir
    with problems:
        directory = _output_dir(job, manifest)
    was, warnings = hardware.read(job.export.fd, manifest)
    for finding in warnings:
        job.warn(finding)
    _check_checksums(job, manifest, problems)
    order = [*was.disks]
    disks = [_planned(job, manifest, source, directory, format) for source in sources]
    disks.sort(key=lambda disk: order.index(disk.id))
    acceleration = "tcg"
    if inspect or fix or boot or defines:
        with problems:
            acceleration = _accel(job)
    if inspect or fix:
        with problems:
            check_host()
    if settings.report.sign_key is not None:
        with problems:
            check_key(job.tools, settings.report.sign_key)
    uuid = domain_uuid(
        *(part or "" for part in (manifest.provider, manifest.datacenter, manifest.vm_id)), manifest.vm_name
    )
    with problems:
        _check_cards(job, was)
    domain = _domain(job, manifest, was, disks, format, uuid)
    seats = _seats(was.cards)
    domain = replace(domain, nics=tuple(domain.nics[number] for number in seats))
    cards = tuple(was.cards[number] for number in seats)
    published, imported = set(published), False
    if convert:
        _check_outputs(disks, directory, published, problems)
    if convert and (defines or boot):
        with problems, connect(settings.libvirt.uri) as connection:
            domain = replace(domain, virt_type=virt_type(connection, acceleration))
            imported = defines and runs_already(connection, published, job.id)
            if defines and not imported:
                domain = _check_target(connection, job, domain, uuid, directory, problems)
            # Last, as it writes into the output directory, and starts QEMU.
            # A libvirt elsewhere is tried in any case: who can know what disks it sees?
            started = settings.libvirt.start or is_remote(settings.libvirt.uri)
            starts = {True: defines and started, False: boot and not published}
            for given_away in () if dry_run or imported or problems.errors else (True, False):
                if starts[given_away]:
                    check_access(connection, domain, directory, job.attempt, given_away=given_away)
    plan = Plan(
        manifest=manifest,
        hardware=was,
        disks=tuple(disks),
        # The manifest's order is that of the exporter, which is of less worth than the VM's own.
        boot_disk=manifest.boot_disk().id if order == [disk.id for disk in manifest.disks] else order[0],
        format=format,
        compress=compress and format == "qcow2",
        verify=(stages.validate_.verify_checksum or settings.validate_.require_checksums)
        and any(disk.sha256 for disk in manifest.disks),
        inspect=inspect,
        fix=fix,
        target=convert,
        convert=convert and not dry_run,
        check=check,
        compare=settings.validate_.compare and check,
        boot=boot and not dry_run,
        import_=defines and convert and not dry_run,
        accel=acceleration,
        domain=domain,
        # Where we define the domain, we know the address that a card without one will get.
        cards=tuple(replace(card, mac=nic.mac) for card, nic in zip(cards, domain.nics, strict=True))
        if defines
        else cards,
        imported=imported,
    )
    if not convert:
        idle = [name.upper() for name in ("validate", "import") if job.request.wants(name, enabled=False)]
        message = "the CONVERT stage is off: no disk is written" + (
            f", so that {' and '.join(idle)} ha{'ve' if len(idle) > 1 else 's'} nothing to work on" if idle else ""
        )
        job.warn(Finding("not_converted", message, "Enable it in the manifest, or name it with --stages."))
    return plan


def _sources(job: Job, manifest: Manifest, problems: Collected, stack: contextlib.ExitStack) -> tuple[Source, ...]:
    """The open disks, without those that cannot be used."""
    sources = open_sources(job.export.fd, job.export.directory, manifest.disks, stack, problems)
    for source in sources:
        for finding in source.warnings:
            job.warn(finding)
        with problems:
            qemu_img.check_source(job.tools, source)
    return sources


def _check_checksums(job: Job, manifest: Manifest, problems: Collected) -> None:
    """Check that each disk has a checksum, if the settings want that."""
    if not job.settings.validate_.require_checksums:
        return
    option, command = "hypersdk's -manifest-checksum option", "`hyper2kvmctl manifest rehash` on the manifest"
    if manifest.made:
        option, command = (
            "digests (`ovftool --shaAlgorithm=SHA256`)",
            f"`hyper2kvmctl manifest create` on {manifest.made.file}",
        )
    for index, disk in enumerate(manifest.disks):
        if disk.sha256 is None:
            hint = (
                f"Export the VM again with {option}; or, if the disks are known to be good,"
                f" run {command}, and `hyper2kvmctl retry`."
            )
            message = f"disk {disk.id} has no checksum, which validate.require_checksums demands"
            problems.errors.append(
                MigrationError(Code.CHECKSUM_MISSING, message, hint, field=f"disks[{index}].checksum")
            )


def _planned(job: Job, manifest: Manifest, source: Source, directory: Path, format: str) -> PlannedDisk:
    name = f"{manifest.slug}-{source.disk.id}.{format}"
    if wish := manifest.output.filename:
        # One name cannot serve several disks.
        stem, suffix = os.path.splitext(wish)
        name = wish if len(manifest.disks) == 1 else f"{stem}-{source.disk.id}{suffix}"
    attempt = job.attempt
    return PlannedDisk(
        source,
        overlay=job.work_dir / f"overlay-{source.disk.id}.{attempt}.qcow2",
        partial=directory / f".{name}.{job.id}.{attempt}.partial",
        final=directory / name,
    )


def _output_dir(job: Job, manifest: Manifest) -> Path:
    """Where the disks go: the manifest's wish if the settings allow it."""
    settings = job.settings
    wish = manifest.stages.convert.output_dir or manifest.output.directory
    # The vSphere exporter always names the export itself, wherever it was when it was written: no wish.
    exports = {job.export.directory, *(Path(disk.path).parent for disk in manifest.disks if disk.path.startswith("/"))}
    if wish is None or _same(wish, exports):
        return settings.output_dir
    if _same(wish, {settings.output_dir, *settings.output.allowed_dirs}):
        return Path(wish)
    raise MigrationError(
        Code.OUTPUT_DENIED,
        f"the manifest asks for the output directory {wish}, which is not allowed",
        f"Add {wish} to output.allowed_dirs (and to ReadWritePaths= of the service), or change the manifest.",
        field="output.directory",
    )


def _same(wish: str, directories: Iterable[Path]) -> bool:
    return os.path.normpath(wish) in {os.path.normpath(directory) for directory in directories}


def _accel(job: Job) -> str:
    found = accel.resolve(job.settings.guest.accel, job.tools)
    if found.warning is not None:
        job.warn(found.warning)
    return found.name


def _check_cards(job: Job, was: Hardware) -> None:
    """Check that the VM has the network cards that something is planned for."""
    if len(job.settings.vm.networks) > len(was.cards):
        raise MigrationError(
            Code.PLAN_INVALID,
            f"networks are planned for {len(job.settings.vm.networks)} network cards, and the VM has {len(was.cards)}",
            "Correct `networks` in the plan of the VM (vm.networks), or the nics in the manifest.",
            field="vm.networks",
        )


def nics_of(cards: Sequence[Card]) -> tuple[Nic, ...]:
    """The cards as FIX knows them, in the same order."""
    return tuple(Nic(card.mac, card.pci_slot, card.model) for card in cards)


def _seats(cards: Sequence[Card]) -> list[int]:
    """The numbers of the cards, from 0, in the order in which the domain has them.

    It is that in which the old kernel found them, as far as that is known: the new one finds the domain's in their
    order, and a guest that calls them eth0, eth1... has nothing else to go by.
    """
    nics = nics_of(cards)
    found = kernel_order(nics) or nics
    return sorted(range(len(nics)), key=lambda number: found.index(nics[number]))


def _domain(
    job: Job, manifest: Manifest, was: Hardware, disks: Sequence[PlannedDisk], format: str, uuid: str
) -> Domain:
    """The domain as far as it is known before the disks are looked into."""
    libvirt, vm = job.settings.libvirt, job.settings.vm
    cpus = vm.cpus or was.cpus
    whole_sockets = was.cores_per_socket is not None and cpus % was.cores_per_socket == 0
    targets = [*vm.networks, *[None] * len(was.cards)]
    firmware: Literal["bios", "uefi"] = "uefi" if was.firmware == "uefi" else "bios"
    return Domain(
        name=manifest.slug,
        uuid=was.uuid or uuid,
        title=manifest.vm_name,
        description=was.annotation,
        cpus=cpus,
        cores_per_socket=was.cores_per_socket if whole_sockets else None,
        memory_mib=vm.memory_mb or was.memory_mib,
        firmware=firmware,
        secure_boot=was.secure_boot,
        tpm=was.tpm,
        virt_type="qemu",
        machine=machine_for(None, firmware, len(disks), virtio=True),
        guest=None,
        disks=tuple(DomainDisk(disk.final, format, disk.id, False) for disk in disks),
        nics=tuple(
            DomainNic(
                (card.mac if vm.mac == "keep" else None) or generated_mac(uuid, index),
                targets[index] or libvirt.network_map.get(card.network or "", libvirt.default_network),
            )
            for index, card in enumerate(was.cards)
        ),
        job=job.id,
        source={
            "provider": manifest.provider or "",
            "vm_id": manifest.vm_id or "",
            "vm_name": manifest.vm_name,
            "export": job.export.directory.name,
        },
        tags=manifest.tags,
    )


def _check_target(connection: Any, job: Job, domain: Domain, uuid: str, directory: Path, problems: Collected) -> Domain:
    """Ask libvirt for all that would keep it from defining the domain; return the domain with a UUID that is free.

    uuid: the one to take if somebody has the VM's own. Raise MigrationError (libvirt_unavailable).
    """
    if domain.uuid != uuid and uuid_taken(connection, domain.uuid, job.id):
        job.warn(
            Finding(
                "uuid_taken",
                f"another domain has the UUID of the VM ({domain.uuid}): this one gets {uuid}",
                "A guest that is licensed by its UUID needs the old one: undefine the other domain first.",
            )
        )
        domain = replace(domain, uuid=uuid)
    settings = job.settings.libvirt
    problems.errors += preflight(connection, domain, settings.pool, directory, start=settings.start, warn=job.warn)
    return domain


def _check_outputs(disks: Iterable[PlannedDisk], directory: Path, published: set[Path], problems: Collected) -> None:
    """Check that the outputs can be written and nobody's file is in their place."""
    if not os.access(directory, os.W_OK | os.X_OK):
        with problems:
            raise MigrationError(
                Code.OUTPUT_DENIED,
                f"{directory} is not a directory that this service can write to",
                "Create it, give the service's user write access, or set output_dir to another one.",
                field="output_dir",
            )
    for disk in disks:
        if disk.final not in published and os.path.lexists(disk.final):
            problems.errors.append(output_exists(disk.final))


def needs(job: Job, plan: Plan, done: Callable[[PlannedDisk], bool]) -> list[reserve.Need]:
    """What the job will write where. done: whether a disk has been converted already."""
    found = []
    if plan.target:
        for disk in plan.disks:
            bytes = reserve.allocated(disk.partial) if done(disk) else qemu_img.measure(job.tools, disk.source)
            # The fix is laid onto the disks at the end.
            more = FIX_SPACE // len(plan.disks) if plan.fix else 0
            found.append(reserve.Need(str(disk.final.parent), bytes + more, (str(disk.partial),), "output_dir"))
    if plan.looks_inside:
        overlays = tuple(str(disk.overlay) for disk in plan.disks)
        directory = existing_parent(job.settings.work_dir)
        found.append(reserve.Need(str(directory), FIX_SPACE, overlays, "work_dir"))
    return found


def memory_mb(job: Job, plan: Plan, *, fixed: bool) -> int:
    """MiB of memory for the largest machine that the job starts. fixed: whether the guest has been looked into."""
    return max(
        appliance_mb(job) if plan.looks_inside and not fixed else 0,
        min(plan.domain.memory_mib, job.settings.validate_.boot_memory_mb) if plan.boot else 0,
    )


def appliance_mb(job: Job) -> int:
    """MiB of memory for the appliance."""
    settings = job.settings
    # A key derivation that was made to be slow on a computer with much memory needs up to 1 GiB of it.
    return max(settings.guest.memory_mb, LUKS_MEMORY_MB if settings.fix.luks_keys else 0)
