"""Finds out, by starting a virtual machine, whether this host can really use KVM."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.run import Tools, qemu

DEVICE = Path("/dev/kvm")
KERNELS = Path("/boot")
PROBE_SECONDS = 15.0  # a kernel that boots with KVM takes one or two
HINT = (
    "Check that the CPU's virtualisation is on in the firmware (or nested "
    "virtualisation in the outer hypervisor), that the kvm_intel or kvm_amd module is loaded, and that this "
    "user may open /dev/kvm. Set guest.accel: tcg to use emulation without this warning."
)


@dataclass(frozen=True)
class Accel:
    """What the appliance runs on, and a warning if that is not what one would wish for."""

    name: Literal["kvm", "tcg"]
    warning: Finding | None = None


def resolve(wish: Literal["auto", "kvm", "tcg"], tools: Tools) -> Accel:
    """Decide what the setting `guest.accel` means on this host.

    `auto` without a working KVM is emulation with the warning `kvm_unusable`; if libguestfs is told to emulate, by
    `force_tcg` in LIBGUESTFS_BACKEND_SETTINGS, that is `tcg`.
    Raise MigrationError (appliance_failed) if the wish is `kvm` and KVM does not work.
    """
    forced = "force_tcg" in os.environ.get("LIBGUESTFS_BACKEND_SETTINGS", "").split(":")
    if wish == "tcg" or (wish == "auto" and forced):
        return Accel("tcg")
    problem = _problem(tools)
    if problem is None:
        return Accel("kvm")
    if wish == "kvm":
        raise MigrationError(Code.APPLIANCE_FAILED, f"guest.accel is kvm, but {problem}", HINT, field="guest.accel")
    return Accel(
        "tcg",
        Finding("kvm_unusable", f"{problem}; emulating the CPU instead, which is several times slower", HINT),
    )


def _problem(tools: Tools) -> str | None:
    """Why KVM cannot be used, or None. A device that is there and opens is no proof: start a machine."""
    if not DEVICE.exists():
        return f"{DEVICE} does not exist"
    try:
        done = tools.run(*probe("kvm"), accept=range(-64, 256), timeout=PROBE_SECONDS)
    except MigrationError as error:
        if error.code is not Code.TOOL_FAILED:
            raise
        return f"a machine with accel=kvm did not boot within {PROBE_SECONDS:g} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
    return f"qemu cannot start a machine with accel=kvm: {reason.strip()[:200]}"


def probe(accel: str) -> list[str]:
    """The command that boots a small machine which ends by itself.

    What it boots is a kernel, which has no root file system, panics, and resets: many a half-working nested KVM runs
    the firmware, and hangs as soon as a kernel leaves it. Without a kernel that can be read, the firmware must do:
    it finds no disk, and resets, too.
    """
    kernel = next((path for path in kernels() if os.access(path, os.R_OK)), None)
    boot = ["-boot", "reboot-timeout=0"] if kernel is None else ["-kernel", str(kernel), "-append", "quiet panic=-1"]
    return [
        qemu(), "-machine", f"q35,accel={accel}", "-cpu", "host" if accel == "kvm" else "max", "-m", "256",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", *boot,
    ]  # fmt: skip


def kernels() -> list[Path]:
    """The kernels that an appliance may be made from, the newest first."""
    if own := os.environ.get("SUPERMIN_KERNEL"):
        return [Path(own)]
    if path := os.environ.get("LIBGUESTFS_PATH"):
        return [Path(directory, "kernel") for directory in path.split(":")]
    found = (path for path in KERNELS.glob("vmlinuz-*") if not path.name.endswith(".old"))
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
