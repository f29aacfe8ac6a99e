"""The plans of single VMs, as files in plan_dir: one that holds a mistake blocks its own VM, and no other."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from hyper2kvmd.errors import Code, Finding, SettingsError
from hyper2kvmd.files import explained
from hyper2kvmd.settings.load import load_file
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.settings.plan import NO_PLAN, VmPlan

SUFFIX = ".yaml"


def plan_file(settings: Settings, export: str) -> Path:
    """Where the plan of a VM is, by the name of its export's directory."""
    return settings.plan_dir / f"{export}{SUFFIX}"


def planned(settings: Settings, export: str) -> VmPlan | Finding:
    """The plan of a VM, empty if it has none, or what is wrong with it. export: the name of its directory."""
    path = plan_file(settings, export)
    try:
        status = os.stat(path)
        plan = _read(path, (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size))
    except FileNotFoundError:
        return NO_PLAN
    except SettingsError as error:
        return mistake(str(error), "Correct the file; `hyper2kvmctl plan check` shows every mistake.")
    except OSError as error:
        return mistake(explained(error, path), "Let the service's user read plan_dir and the files in it.")
    return unknown_wave(plan, settings, str(path)) or plan


def unknown_wave(plan: VmPlan, settings: Settings, where: str) -> Finding | None:
    """What is wrong with the wave of a plan, if the settings have waves, and not this one."""
    if plan.wave is not None and settings.waves and plan.wave not in settings.waves:
        waves = ", ".join(settings.waves)
        message = f"{where}: wave: there is no wave {plan.wave!r}; `waves` in the settings has {waves}"
        return mistake(message, "Correct one of the two.")
    return None


def mistake(message: str, hint: str) -> Finding:
    """A finding about a plan."""
    return Finding(Code.PLAN_INVALID, message, hint)


@functools.lru_cache(maxsize=4096)  # a look reads them all; a plan changes rarely
def _read(path: Path, _version: tuple[int, ...]) -> VmPlan:
    return load_file(VmPlan, path)
