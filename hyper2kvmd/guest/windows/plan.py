"""What is changed in a Windows guest so that it starts on new hardware: which bus it gets, its registry and files."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, time
from typing import Any, Literal

from hyper2kvmd.domain.model import Machine
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.windows import chain
from hyper2kvmd.guest.windows.chain import DATABASE
from hyper2kvmd.guest.windows.drivers import Catalogue, Package
from hyper2kvmd.guest.windows.hardware import CARDS, DISKS, Function
from hyper2kvmd.guest.windows.inf import Inf
from hyper2kvmd.guest.windows.look import Windows
from hyper2kvmd.guest.windows.registry import Hive, RegistryEdit, Value, binary, dword, expand_sz, multi_sz, sz

# Of virtio-win, what drives the disks of each bus, and the network card.
DISK_DRIVERS: dict[str, str] = {"virtio": "viostor", "scsi": "vioscsi"}
CARD_DRIVER = "NetKVM"
# What else is put into the guest, for devices that our domains have, or may get.
OTHER_DRIVERS = ("Balloon", "vioserial", "viorng")
# Windows' own drivers for the SATA controller: since Windows 8, and before.
AHCI = ("storahci", "msahci", "iaStorV")
DISABLED = 4
# How well an identifier fits, as Windows notes it beside a package: the best of a device, and what stands behind it.
_BEST, _FALLBACK = binary(b"\x01\xff\x00\x00"), binary(b"\x02\xff\x00\x00")
# In the guest, below the directory of Windows; each package in a directory of its own.
PACKAGES = "Drivers/VirtIO"
_WINDOWS_EPOCH = datetime(1601, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Choice:
    """The machine that a guest gets, and where the drivers of its disks and cards come from.

    disks: "guest" if Windows, or somebody before us, has installed them; "given" if they come from fix.virtio_win.
    packages: what is put into the guest from there.
    """

    machine: Machine
    disks: Literal["guest", "given"]
    packages: tuple[Package, ...]
    warnings: tuple[Finding, ...]

    @property
    def disk(self) -> Function:
        """What has the disks."""
        return DISKS[self.machine.disks]

    @property
    def card(self) -> Function:
        """The network cards."""
        return CARDS[self.machine.cards]

    def package(self, driver: str) -> Package | None:
        """One of the packages by the name of its driver."""
        return next((package for package in self.packages if package.driver == driver), None)


def choose(
    g: Any,
    system: Hive,
    windows: Windows,
    catalogue: Catalogue | None,
    machine: Callable[[bool, bool], Machine],
) -> Choice:
    """The machine for which the guest has drivers, or can get them: virtio if possible, else SATA.

    machine: from whether the guest gets virtio, and whether its disks are on a SCSI controller, to the machine.
    Raise MigrationError (os_unsupported) if it has drivers for neither.
    """
    if (candidate := _installed_bus(g, system, windows, machine)) is not None:
        return _with_card(g, system, windows, catalogue, candidate, "guest")
    candidate = machine(True, False)
    package, why = _given(windows, catalogue, DISK_DRIVERS[candidate.disks], DISKS[candidate.disks])
    if package is not None:
        return _with_card(g, system, windows, catalogue, candidate, "given")
    plain = _plain_card(g, system, windows, machine(False, False))
    said = _why_not_installed(g, system, windows, DISKS[plain.disks])
    if said:
        raise MigrationError(
            Code.OS_UNSUPPORTED,
            f"{windows.product} has no driver for the disks that it would get. virtio: {why}. SATA: {said}",
            "Name virtio-win in fix.virtio_win (a directory or its ISO) with drivers for this Windows; or install its"
            " viostor in the guest on VMware, shut it down, and export it again.",
            field="fix.virtio_win",
        )
    warning = Finding(
        "no_virtio",
        f"{windows.product} gets SATA disks and an {plain.cards} network card, which are slower than virtio: {why}",
        "Install the drivers of virtio-win in the guest once it runs, and `hyper2kvmctl switch-bus VM virtio`; or name"
        " virtio-win in fix.virtio_win before the migration.",
        "fix.virtio_win",
    )
    return Choice(plain, "guest", (), (warning,))


def choose_bus(
    g: Any, system: Hive, windows: Windows, bus: Literal["virtio", "sata"], machine: Callable[[bool, bool], Machine]
) -> Choice:
    """The machine with this bus for a Windows as it is; with a virtio network card only if it has a driver for it.

    machine: as above. Whether Windows starts from its disks is not looked at.
    """
    if bus == "sata":
        return Choice(_plain_card(g, system, windows, machine(False, False)), "guest", (), ())
    candidate = _installed_bus(g, system, windows, machine) or machine(True, False)
    # A package that Windows has, but never used, is enough: it need not start with the loader.
    link = chain.service_of(system, windows.control_sets[0], CARDS["virtio"])
    why = "" if link.service else _why_not_installed(g, system, windows, CARDS["virtio"])
    if not why:
        return Choice(candidate, "guest", (), ())
    candidate = _plain_card(g, system, windows, candidate)
    warning = Finding(
        "no_virtio",
        f"the network cards stay as they are, as {windows.product} has no driver for those of virtio: {why}",
        "Install NetKVM of virtio-win in it, shut it down, and switch once more.",
    )
    return Choice(candidate, "guest", (), (warning,))


def _installed_bus(g: Any, system: Hive, windows: Windows, machine: Callable[[bool, bool], Machine]) -> Machine | None:
    """The machine with the first virtio bus whose driver Windows finds by itself; None if it finds none."""
    candidates = (machine(True, scsi) for scsi in (False, True))
    return next((one for one in candidates if not _why_not_installed(g, system, windows, DISKS[one.disks])), None)


def _why_not_installed(g: Any, system: Hive, windows: Windows, function: Function) -> str:
    """Why Windows does not find a driver for a device by itself, in one of its control sets; "" if it does."""
    links = (chain.installed(g, system, control_set, function, windows) for control_set in windows.control_sets)
    return next((link.said for link in links if link.service is None), "")


def _given(
    windows: Windows, catalogue: Catalogue | None, driver: str, function: Function
) -> tuple[Package | None, str]:
    """The package of a driver that this Windows takes for a device; or None, and why there is none."""
    if catalogue is None:
        return None, "fix.virtio_win names no drivers"
    package = _found(windows, catalogue, driver)
    if package is None:
        return None, catalogue.lacking(driver, windows.family, windows.arch, windows.build).message
    if package.signature == "test-signed":
        return None, f"{package.path} is only signed for tests, and Windows does not start it"
    if not _ids(package, function):
        return None, f"{package.path}/{package.inf_name} is not for the {function.title}"
    return package, ""


def _found(windows: Windows, catalogue: Catalogue, driver: str) -> Package | None:
    # What a .inf is told apart by: 1 for a client, 3 for a server.
    product_type = 1 if windows.installation_type == "Client" else 3
    return catalogue.find(driver, windows.family, windows.arch, windows.build, product_type)


def _ids(package: Package, function: Function) -> list[str]:
    """The identifiers of a device that a package is for, best first."""
    return [id for id in function.ids() if f"PCI\\{id}" in package.models]


def _with_card(
    g: Any,
    system: Hive,
    windows: Windows,
    catalogue: Catalogue | None,
    machine: Machine,
    disks: Literal["guest", "given"],
) -> Choice:
    """The choice with virtio disks: with all that virtio-win has for the guest, and a card that it has a driver for."""
    # Drivers of disks that are installed are not replaced.
    wanted = (*(DISK_DRIVERS.values() if disks == "given" else ()), CARD_DRIVER, *OTHER_DRIVERS)
    found = (_found(windows, catalogue, driver) for driver in wanted) if catalogue else ()
    packages = tuple(package for package in found if package is not None and package.signature != "test-signed")
    card, why = _given(windows, catalogue, CARD_DRIVER, CARDS["virtio"])
    if card is not None or not _why_not_installed(g, system, windows, CARDS["virtio"]):
        return Choice(machine, disks, packages, ())
    machine = _plain_card(g, system, windows, machine)
    warning = Finding(
        "no_virtio",
        f"{windows.product} gets an {machine.cards} network card, as it has no driver for that of virtio: {why}",
        "Install the drivers of virtio-win in the guest once it runs, and change the model of the card.",
        "fix.virtio_win",
    )
    return Choice(machine, disks, packages, (warning,))


def _plain_card(g: Any, system: Hive, windows: Windows, machine: Machine) -> Machine:
    """The machine with the first network card, other than virtio's, that Windows has a driver for."""
    models = [model for model in CARDS if model != "virtio"]
    known = (model for model in models if not _why_not_installed(g, system, windows, CARDS[model]))
    return replace(machine, cards=next(known, models[0]))


@dataclass
class Registry:
    """Collects what is to be set in one hive, and only what is not so already."""

    hive: Hive
    edits: list[RegistryEdit] = field(default_factory=list)

    def set(self, fixer: str, key: str, name: str, value: Value, summary: str, evidence: str = "") -> None:
        """A value that has to be this."""
        before = self.hive.value(key, name)
        if before != value:
            self.edits.append(RegistryEdit(fixer, self.hive.name, key, name, before, value, summary, evidence))

    def remove(self, fixer: str, key: str, summary: str, evidence: str = "") -> None:
        """A key that must not be there."""
        if self.hive.exists(key):
            self.edits.append(RegistryEdit(fixer, self.hive.name, key, None, None, None, summary, evidence))


@dataclass(frozen=True)
class File:
    """A file that is put into the guest. path: as libguestfs has it. sha256: of the content, in hex."""

    fixer: str
    path: str
    content: bytes
    sha256: str
    summary: str


def given_disk_driver(choice: Choice) -> Package | None:
    """The package that drives the disks, if it comes from fix.virtio_win."""
    return choice.package(DISK_DRIVERS.get(choice.machine.disks, "")) if choice.disks == "given" else None


def system_edits(system: Hive, windows: Windows, choice: Choice) -> Registry:
    """What is to be changed in the hive SYSTEM, in every control set that Windows may start with."""
    registry = Registry(system)
    package = given_disk_driver(choice)
    if package is not None:
        _register(registry, windows, package, choice.disk)
    for control_set in windows.control_sets:
        _disk_drivers(registry, windows, choice, package, control_set)
        _quiet(registry, control_set, windows.vmware_services)
        _data_disks(registry, control_set)
    return registry


def _disk_drivers(
    registry: Registry, windows: Windows, choice: Choice, package: Package | None, control_set: str
) -> None:
    """The driver of the disks, and those of the SATA controller in any case, so that a person can go back to it."""
    services = f"{control_set}\\Services"
    if package is not None:
        service = package.service
        key, summary = f"{services}\\{service.name}", f"{service.name} from virtio-win, started while Windows boots"
        evidence = f"{package.inf_name}, DriverVer {package.inf.version.date:%m/%d/%Y}"
        registry.set("windows.disks", key, "Type", dword(service.type), summary, evidence)
        registry.set("windows.disks", key, "Start", dword(chain.BOOT_START), summary, evidence)
        registry.set("windows.disks", key, "ErrorControl", dword(service.error_control), summary, evidence)
        registry.set("windows.disks", key, "Group", sz(service.load_order_group or "SCSI miniport"), summary, evidence)
        path = f"system32\\drivers\\{service.file}"
        registry.set("windows.disks", key, "ImagePath", expand_sz(path), summary, evidence)
        for value in service.parameters:
            if value.type is not None and value.data is not None:
                where = f"{key}\\{value.path}" if value.path else key
                registry.set("windows.disks", where, value.name, Value(value.type, value.data), summary, evidence)
        registry.remove("windows.disks", f"{key}\\StartOverride", summary)
    elif choice.machine.disks != "sata":
        link = chain.service_of(registry.hive, control_set, choice.disk)
        if link.service is not None:
            _start(
                registry, control_set, link.service, f"{link.service}, which is installed, starts while Windows boots"
            )
    for name in AHCI:
        if registry.hive.exists(f"{services}\\{name}"):
            _start(registry, control_set, name, "the driver for SATA disks starts while Windows boots")


def _start(registry: Registry, control_set: str, service: str, summary: str) -> None:
    key = f"{control_set}\\Services\\{service}"
    registry.set("windows.disks", key, "Start", dword(chain.BOOT_START), summary)
    if why := chain.override(registry.hive, control_set, service):
        registry.remove("windows.disks", f"{key}\\StartOverride", summary, why)


def _register(registry: Registry, windows: Windows, package: Package, function: Function) -> None:
    """Tell Windows that the driver is that of the device, for when it meets it while it boots.

    Under a name of our own: the driver's may be that of a package that is installed, which must not be replaced.
    """
    service = package.service
    ids = _ids(package, function)
    summary = f"{service.name} is the driver of the {function.title}"
    evidence = f"{package.inf_name} has {', '.join(ids)} for build {windows.build}"
    if not registry.hive.exists(DATABASE):
        for control_set in windows.control_sets:
            for id in ids:
                key = f"{control_set}\\Control\\CriticalDeviceDatabase\\PCI#{id}"
                registry.set("windows.disks", key, "Service", sz(service.name), summary, evidence)
                registry.set("windows.disks", key, "ClassGUID", sz(package.inf.version.class_guid), summary, evidence)
        return
    inf = f"hyper2kvm-{service.name}.inf"
    arch = {"x86_64": "amd64", "i386": "x86", "aarch64": "arm64"}[windows.arch]
    label, configuration = f"{inf}_{arch}_0000000000000000", f"{service.name}_hyper2kvm"
    files, top = f"{DATABASE}\\DriverInfFiles\\{inf}", f"{DATABASE}\\DriverPackages\\{label}"
    for key, name, value in (
        (files, "", multi_sz(label)),
        (files, "Active", sz(label)),
        (files, "Configurations", multi_sz(configuration)),
        (top, "Version", binary(_version(package.inf))),
        (f"{top}\\Configurations\\{configuration}", "ConfigFlags", dword(0)),
        (f"{top}\\Configurations\\{configuration}", "Service", sz(service.name)),
    ):
        registry.set("windows.disks", key, name, value, summary, evidence)
    for number, id in enumerate(ids):
        key = f"{DATABASE}\\DeviceIds\\PCI\\{id}"
        registry.set("windows.disks", key, inf, _FALLBACK if number else _BEST, summary, evidence)
        registry.set(
            "windows.disks", f"{top}\\Descriptors\\PCI\\{id}", "Configuration", sz(configuration), summary, evidence
        )


def _version(inf: Inf) -> bytes:
    """What the kernel's Plug and Play wants to know of a package: its class, date and version, in 48 bytes."""
    version = inf.version
    since = datetime.combine(version.date, time(), UTC) - _WINDOWS_EPOCH
    number = 0
    for part in version.number:
        number = number << 16 | part
    guid = uuid.UUID(version.class_guid).bytes_le
    return struct.pack("<II16sQQ8x", 0x0009FF00, 0, guid, since.days * 86_400 * 10_000_000, number)


def _quiet(registry: Registry, control_set: str, services: Sequence[str]) -> None:
    """VMware's services are not started (its drivers stay: one may be a filter), and a Windows that stops shows why."""
    for name in services:
        key = f"{control_set}\\Services\\{name}"
        if registry.hive.exists(key):
            registry.set("windows.vmware", key, "Start", dword(DISABLED), f"{name} of VMware is not started")
    key = f"{control_set}\\Control\\CrashControl"
    registry.set("windows.crash", key, "AutoReboot", dword(0), "a Windows that stops with an error shows it")


def _data_disks(registry: Registry, control_set: str) -> None:
    """Disks that Windows has not seen before come online, as servers leave them offline; not those of a cluster."""
    cluster = registry.hive.value(f"{control_set}\\Services\\ClusSvc", "Start")
    if cluster is not None and cluster.number != DISABLED:
        return
    key = f"{control_set}\\Services\\partmgr\\Parameters"
    registry.set("windows.disks", key, "SanPolicy", dword(1), "disks that are new to Windows come online")


def software_edits(software: Hive, choice: Choice) -> Registry:
    """What is to be changed in the hive SOFTWARE: where Windows looks for drivers of devices that it meets."""
    registry = Registry(software)
    key = "Microsoft\\Windows\\CurrentVersion"
    before = software.value(key, "DevicePath")
    parts = [part for part in ((before.text if before else None) or "%SystemRoot%\\inf").split(";") if part]
    known = {part.lower() for part in parts}
    for package in choice.packages:
        part = f"%SystemRoot%\\{PACKAGES}\\{package.driver}".replace("/", "\\")
        parts += [part] if part.lower() not in known else []
    registry.set(
        "windows.drivers", key, "DevicePath", expand_sz(";".join(parts)), "Windows finds the drivers by itself"
    )
    return registry


def files(windows: Windows, choice: Choice) -> Sequence[File]:
    """The files of the drivers: each package as it is, and the driver of the disks where its service starts it."""
    found = []
    for package in choice.packages:
        summary = f"{package.driver} of virtio-win for {package.family}"
        directory = f"{windows.system_root}/{PACKAGES}/{package.driver}"
        for name, content in sorted(package.files.items()):
            found.append(File("windows.drivers", f"{directory}/{name}", content, package.sha256[name], summary))
    if (disks := given_disk_driver(choice)) is not None:
        name = disks.sys_name
        path = f"{windows.system_root}/System32/drivers/{name}"
        found.append(File("windows.disks", path, disks.files[name], disks.sha256[name], "the driver of the disks"))
    return found
