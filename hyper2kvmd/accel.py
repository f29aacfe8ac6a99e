"""Finds out, by starting a virtual machine, whether this host can really use KVM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.run import Tools

DEVICE = Path("/dev/kvm")
PROBE_SECONDS = 10.0
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

    `auto` without a working KVM is emulation with the warning `kvm_unusable`.
    Raise MigrationError (appliance_failed) if the wish is `kvm` and KVM does not work.
    """
    if wish == "tcg":
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
    # The machine ends by itself: it has no disk, so the firmware gives up and asks for a reset. KVM has
    # entered the guest by then, which is where a half-working nested KVM fails.
    probe = [
        "qemu-system-x86_64", "-machine", "q35,accel=kvm", "-cpu", "host", "-m", "64",
        "-nodefaults", "-no-user-config", "-display", "none", "-boot", "reboot-timeout=0", "-no-reboot",
    ]  # fmt: skip
    try:
        done = tools.run(*probe, accept=range(-64, 256), timeout=PROBE_SECONDS)
    except MigrationError as error:
        if error.code is not Code.TOOL_FAILED:
            raise
        return f"a machine with accel=kvm did not end within {PROBE_SECONDS:g} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
    return f"qemu cannot start a machine with accel=kvm: {reason.strip()[:200]}"
