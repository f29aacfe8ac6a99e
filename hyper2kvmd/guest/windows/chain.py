"""Follows Windows from a device to the driver that starts it: the databases of drivers, the service, and its file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyper2kvmd.guest.session import spelt
from hyper2kvmd.guest.windows.hardware import Function
from hyper2kvmd.guest.windows.look import Windows, architecture
from hyper2kvmd.guest.windows.registry import Hive

DATABASE = "DriverDatabase"
KERNEL_DRIVERS = (1, 2)  # SERVICE_KERNEL_DRIVER, SERVICE_FILE_SYSTEM_DRIVER
BOOT_START = 0
NETWORK = 2  # the class of network cards among PCI devices
INF_BYTES = 1 << 20


@dataclass(frozen=True)
class Link:
    """Where the search for a driver ended. service: None if there is none; said: the way there, or what is missing."""

    service: str | None
    said: str


def service_of(system: Hive, control_set: str, function: Function) -> Link:
    """The service that Windows starts for a PCI function that it meets for the first time while it boots.

    It takes the best of the function's identifiers for which anything is registered: by the driver database since
    Windows 8, by the critical devices of the control set before.
    """
    modern = system.exists(DATABASE)
    for id in function.ids():
        link = _by_database(system, id) if modern else _by_critical_device(system, control_set, id)
        if link is not None:
            return link
    where = f"{DATABASE}\\DeviceIds\\PCI" if modern else f"{control_set}\\Control\\CriticalDeviceDatabase"
    return Link(None, f"{where} has none of the identifiers of the {function.title} ({function.ids()[0]} and shorter)")


def _by_critical_device(system: Hive, control_set: str, id: str) -> Link | None:
    key = f"{control_set}\\Control\\CriticalDeviceDatabase\\PCI#{id}"
    if not system.exists(key):
        return None
    service = system.value(key, "Service")
    if service is None or not service.text:
        return Link(None, f"{key} names no Service")
    if system.value(key, "ClassGUID") is None:
        return Link(None, f"{key} has no ClassGUID")
    return Link(service.text, f"{key}: {service.text}")


def _by_database(system: Hive, id: str) -> Link | None:
    """Follow every package that is registered for an identifier: nobody here can tell which one Windows prefers."""
    infs = [name for name in system.values(f"{DATABASE}\\DeviceIds\\PCI\\{id}") if name]
    links = [_by_package(system, id, inf) for inf in infs]
    broken = next((link for link in links if link.service is None), None)
    if broken or not links:
        return broken
    services = {(link.service or "").lower() for link in links}
    if len(services) > 1:
        ways = "; ".join(link.said for link in links)
        return Link(None, f"{id} leads to several services, and which one Windows takes cannot be known: {ways}")
    return links[0]


def _by_package(system: Hive, id: str, inf: str) -> Link:
    files = f"{DATABASE}\\DriverInfFiles\\{inf}"
    active = system.value(files, "Active")
    names = system.value(files, "")
    package = (active.text if active else None) or next(iter(names.texts if names else ()), None)
    if not package:
        return Link(None, f"{id} names {inf}, and {files} names no package")
    top = f"{DATABASE}\\DriverPackages\\{package}"
    if system.value(top, "Version") is None:  # the kernel's Plug and Play passes over such a package
        return Link(None, f"{inf} leads to {package}, and {top} has no Version")
    described = system.value(f"{top}\\Descriptors\\PCI\\{id}", "Configuration")
    if described is None or not described.text:
        return Link(None, f"{inf} leads to {package}, and {top}\\Descriptors\\PCI\\{id} names no Configuration")
    configuration = f"{top}\\Configurations\\{described.text}"
    service = system.value(configuration, "Service")
    if service is None or not service.text:
        return Link(None, f"{package} leads to {described.text}, and {configuration} names no Service")
    flags = system.value(configuration, "ConfigFlags")
    if flags is not None and flags.number:
        return Link(None, f"{configuration} has ConfigFlags {flags.shown()}: the device is disabled")
    return Link(service.text, f"{id}: {inf}, {package}, {described.text}: {service.text}")


def override(system: Hive, control_set: str, service: str) -> str:
    """The StartOverride of a service that keeps it from being started while Windows boots; "" if none does."""
    key = f"{control_set}\\Services\\{service}\\StartOverride"
    for name, value in system.values(key).items():
        if value.number != BOOT_START:
            return f"{key} {name or '(Default)'} is {value.shown()}"
    return ""


def late(system: Hive, control_set: str, service: str) -> str:
    """Why the loader does not start a service that is there; "" if it does."""
    key = f"{control_set}\\Services\\{service}"
    start = system.value(key, "Start")
    if start is None or start.number != BOOT_START:
        return f"{key} Start is {'missing' if start is None else start.shown()}, and has to be {BOOT_START}"
    return override(system, control_set, service)


def driver_path(system: Hive, control_set: str, service: str, system_root: str) -> str:
    """Where the file of a driver is in the guest, as the registry spells it: /Windows/system32/drivers/viostor.sys."""
    value = system.value(f"{control_set}\\Services\\{service}", "ImagePath")
    path = (value.text if value else None) or f"System32\\drivers\\{service}.sys"
    path = path.strip().strip('"').removeprefix("\\??\\").replace("\\", "/")
    lower = path.lower()
    for prefix in ("/systemroot/", "%systemroot%/", "%windir%/"):
        if lower.startswith(prefix):
            return f"{system_root}/{path[len(prefix) :]}"
    if lower[1:3] == ":/":  # a letter; the system's own is the only one that is mounted
        return path[2:]
    return f"{system_root}/{path.lstrip('/')}"


def unfit(g: Any, system: Hive, control_set: str, service: str, windows: Windows, *, boots: bool = True) -> str:
    """Why a driver does not start while Windows boots; "" if it does.

    boots: whether it has to be started by the loader; the file and its kind are looked at in any case.
    """
    key = f"{control_set}\\Services\\{service}"
    if not system.exists(key):
        return f"there is no {key}"
    kind = system.value(key, "Type")
    if kind is None or kind.number not in KERNEL_DRIVERS:
        return f"{key} Type is {'missing' if kind is None else kind.shown()}, and no kernel driver"
    if boots and (why := late(system, control_set, service)):
        return why
    wanted = driver_path(system, control_set, service, windows.system_root)
    path = spelt(g, wanted)
    if path is None:
        return f"{wanted}, the file of {service}, is not there"
    machine = architecture(g, path, windows.arch)
    if machine != windows.arch:
        return f"{path} is {'no driver' if machine == 'unknown' else f'for {machine}'}, and Windows is {windows.arch}"
    return ""


def installed(g: Any, system: Hive, control_set: str, function: Function, windows: Windows) -> Link:
    """The driver that Windows has for a device, whether or not it starts it while it boots.

    Network cards have no critical devices, and a driver that Windows brings along and never needed is not in the
    database of SYSTEM, but in that of the hive DRIVERS, which Windows loads once it runs. What is there has an
    `.inf` file, and a search through those says the same without a third hive.
    """
    link = service_of(system, control_set, function)
    if link.service is not None:
        why = unfit(g, system, control_set, link.service, windows, boots=False)
        return Link(None, f"{why}; the way there: {link.said}") if why else link
    registered = any(system.exists(f"{DATABASE}\\DeviceIds\\PCI\\{id}") for id in function.ids())
    if registered or function.kind >> 16 != NETWORK:
        return link
    wanted = f"VEN_{function.vendor:04X}&DEV_{function.device:04X}"
    directory = spelt(g, f"{windows.system_root}/inf")
    for name in g.ls(directory) if directory else ():
        if name.lower().startswith(("net", "oem")) and name.lower().endswith(".inf"):
            text = g.pread(f"{directory}/{name}", INF_BYTES, 0).upper()
            if wanted.encode() in text or wanted.encode("utf-16-le") in text:
                return Link(name, f"{directory}/{name} has {wanted}")
    return Link(None, f"no net*.inf or oem*.inf in {windows.system_root}/inf has {wanted}")
