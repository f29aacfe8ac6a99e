"""The plan of a job: everything that can be known, and can go wrong, before the first byte is copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hyper2kvmd import accel, images, importer, reserve
from hyper2kvmd.domain import DomainNic, domain_uuid, generated_mac
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.job import Job
from hyper2kvmd.manifest import Manifest, ovf

# What an overlay grows by while a guest is fixed: new initramfs images, replayed journals.
FIX_SPACE = 512 << 20


@dataclass(frozen=True)
class PlannedDisk:
    """One disk: its source, and the files that it becomes. The final name appears only when all is done."""

    source: images.Source
    overlay: Path
    partial: Path
    final: Path

    @property
    def id(self) -> str:
        """The id that the manifest gives it."""
        return self.source.disk.id


@dataclass(frozen=True)
class Card:
    """A network card of the VM: what is known of it. `pci_slot` is VMware's number, from which Linux makes a name."""

    mac: str | None
    network: str | None
    pci_slot: int | None = None


@dataclass(frozen=True)
class Plan:
    """What will be done. `disks` is in the manifest's order; stages that are False are left out.

    cards: the VM's network cards in the order of their slots, with the MACs they will have, as far as that is known.
    """

    manifest: Manifest
    disks: tuple[PlannedDisk, ...]
    format: str
    compress: bool
    verify: bool
    inspect: bool
    fix: bool
    convert: bool
    check: bool
    compare: bool
    import_: bool
    accel: str
    domain_name: str
    domain_uuid: str
    nics: tuple[DomainNic, ...]
    cards: tuple[Card, ...]

    @property
    def looks_inside(self) -> bool:
        """Whether the guest is opened at all; it cannot be fixed without having been inspected."""
        return self.inspect or self.fix


def make_plan(job: Job, manifest: Manifest, sources: tuple[images.Source, ...], ours: Iterable[Path]) -> Plan:
    """Decide everything, and check what can be checked at once.

    `ours` are outputs that an earlier attempt of this job has published already.
    Raise MigrationError for the first thing that is wrong.
    """
    settings = job.settings
    stages = manifest.stages
    format = stages.convert.format or manifest.output.format or settings.output.format
    compress = settings.output.compress if stages.convert.compress is None else stages.convert.compress
    convert = job.wants("convert", stages.convert.enabled)
    writes = convert and not job.dry_run and not manifest.options.dry_run
    directory = _output_dir(job, manifest)
    name = manifest.slug
    uuid = domain_uuid(
        *(part or "" for part in (manifest.provider, manifest.datacenter, manifest.vm_id)), manifest.vm_name
    )
    disks = tuple(_planned(job, manifest, source, directory, format) for source in sources)
    inspect, fix = job.wants("inspect", stages.inspect.enabled), job.wants("fix", stages.fix.enabled)
    defines = job.wants("import", settings.libvirt.import_)
    cards = _cards(job, manifest)
    nics = _nics(job, cards, uuid)
    import_ = defines and writes
    plan = Plan(
        manifest=manifest,
        disks=disks,
        format=format,
        compress=compress and format == "qcow2",
        verify=stages.validate_.verify_checksum and any(disk.sha256 for disk in manifest.disks),
        inspect=inspect,
        fix=fix,
        convert=writes,
        check=job.wants("validate", stages.validate_.enabled),
        compare=settings.validate_.compare and job.wants("validate", stages.validate_.enabled),
        import_=import_,
        accel=_accel(job) if inspect or fix or import_ else "tcg",
        domain_name=name,
        domain_uuid=uuid,
        nics=nics,
        # Where we define the domain, we know the address that a card without one will get.
        cards=tuple(replace(card, mac=nic.mac) for card, nic in zip(cards, nics, strict=True)) if defines else cards,
    )
    _warn(job, plan, convert_wanted=convert)
    for source in sources:
        images.check_source(job.tools, source)
    if writes:
        _check_outputs(plan, directory, set(ours))
    if plan.import_:
        networks = {nic.target for nic in plan.nics if nic.target != "user" and not nic.target.startswith("bridge:")}
        with importer.connect(settings.libvirt.uri) as connection:
            importer.preflight(connection, name, uuid, job.id, networks)
    return plan


def _planned(job: Job, manifest: Manifest, source: images.Source, directory: Path, format: str) -> PlannedDisk:
    name = f"{manifest.slug}-{source.disk.id}.{format}"
    if wish := manifest.output.filename:
        # One name cannot serve several disks.
        stem, suffix = os.path.splitext(wish)
        name = wish if len(manifest.disks) == 1 else f"{stem}-{source.disk.id}{suffix}"
    attempt = job.claim.attempt
    return PlannedDisk(
        source,
        overlay=job.work_dir / f"overlay-{source.disk.id}.{attempt}.qcow2",
        partial=directory / f".{name}.{job.id}.{attempt}.partial",
        final=directory / name,
    )


def _output_dir(job: Job, manifest: Manifest) -> Path:
    """Where the disks go: the manifest's wish if the settings allow it."""
    settings = job.settings
    wish = manifest.output.directory or manifest.stages.convert.output_dir
    # The vSphere exporter always names the export itself, wherever it was when it was written: no wish.
    exports = {job.claim.directory, *(Path(disk.path).parent for disk in manifest.disks if disk.path.startswith("/"))}
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


def _cards(job: Job, manifest: Manifest) -> tuple[Card, ...]:
    """The VM's network cards: the manifest's, else those of the .ovf beside the disks, which exporters leave there."""
    if manifest.nics:
        return tuple(Card(nic.mac, nic.network) for nic in manifest.nics)
    try:
        cards = _cards_of_ovf(job, manifest)
    except ovf.OvfError as error:
        job.warn(error.finding)
        cards = ()
    if cards:
        return cards
    job.warn(
        Finding(
            "no_nics",
            "neither the manifest nor an .ovf beside it has NICs: the VM gets one with a new MAC address",
            "A guest that binds its address to the old MAC needs it in the manifest's nics.",
            "nics",
        )
    )
    return (Card(None, None),)


def _cards_of_ovf(job: Job, manifest: Manifest) -> tuple[Card, ...]:
    name = ovf.choose(os.listdir(job.claim.fd), manifest.vm_name)
    if name is None:
        return ()
    # In the directory that is claimed, and nowhere else, whatever the name leads to.
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=job.claim.fd), "rb") as file:
        found = ovf.parse(file.read(ovf.SIZE_LIMIT + 1), name)
    return tuple(Card(nic.mac, nic.network, nic.pci_slot) for nic in found.nics)


def _nics(job: Job, cards: Sequence[Card], uuid: str) -> tuple[DomainNic, ...]:
    libvirt = job.settings.libvirt
    return tuple(
        DomainNic(
            card.mac or generated_mac(uuid, index), libvirt.network_map.get(card.network or "", libvirt.default_network)
        )
        for index, card in enumerate(cards)
    )


def _warn(job: Job, plan: Plan, *, convert_wanted: bool) -> None:
    if not convert_wanted:
        job.warn(Finding("not_converted", "the CONVERT stage is off: no disk is written", "Enable it in the manifest."))
    if plan.manifest.stages.validate_.test_boot:
        job.warn(
            Finding(
                "no_boot_test", "the manifest asks for a boot test, which this version does not have", "Start the VM."
            )
        )


def _check_outputs(plan: Plan, directory: Path, ours: set[Path]) -> None:
    """Check that the outputs can be written and nobody's file is in their place."""
    if not os.access(directory, os.W_OK | os.X_OK):
        raise MigrationError(
            Code.OUTPUT_DENIED,
            f"{directory} is not a directory that this service can write to",
            "Create it, give the service's user write access, or set output_dir to another one.",
            field="output_dir",
        )
    for disk in plan.disks:
        if disk.final not in ours and os.path.lexists(disk.final):
            raise images.output_exists(disk.final)


def needs(job: Job, plan: Plan, done: Callable[[PlannedDisk], bool]) -> list[reserve.Need]:
    """What the job will write where. done: whether a disk has been converted already."""
    found = []
    if plan.convert:
        for disk in plan.disks:
            bytes = 0 if done(disk) else images.measure(job.tools, disk.source, plan.format)
            # The fix is laid onto the disks at the end.
            more = FIX_SPACE // len(plan.disks) if plan.fix else 0
            found.append(reserve.Need(str(disk.final.parent), bytes + more, (str(disk.partial),), "output_dir"))
    if plan.looks_inside:
        overlays = tuple(str(disk.overlay) for disk in plan.disks)
        found.append(reserve.Need(str(job.work_dir), FIX_SPACE, overlays, "work_dir"))
    return found
