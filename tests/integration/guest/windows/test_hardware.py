"""The numbers by which Windows looks for drivers are those that QEMU's devices have."""

from __future__ import annotations

import re
import subprocess

import pytest

from hyper2kvmd.guest.windows.hardware import CARDS, DISKS, Function

# As libvirt attaches them to a q35, whose ports are PCI Express: without what older guests need.
_DEVICES = {
    "virtio disk": "virtio-blk-pci,disable-legacy=on,drive=none",
    "virtio SCSI controller": "virtio-scsi-pci,disable-legacy=on",
    "virtio network card": "virtio-net-pci,disable-legacy=on",
    "e1000e network card": "e1000e",
    "e1000 network card": "e1000",
}


@pytest.fixture(scope="module")
def found() -> set[tuple[str, str]]:
    """Vendor and device, and those of the subsystem, of everything in such a machine."""
    devices = [word for device in _DEVICES.values() for word in ("-device", device)]
    done = subprocess.run(
        [
            *("qemu-system-x86_64", "-machine", "q35", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"),
            *("-drive", "if=none,id=none,file=/dev/null,format=raw,readonly=on", *devices),
        ],
        input="info pci\nquit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    numbers = r"PCI device ([0-9a-f]{4}:[0-9a-f]{4})\s+PCI subsystem ([0-9a-f]{4}:[0-9a-f]{4})"
    return set(re.findall(numbers, done.stdout))


@pytest.mark.parametrize("function", [*DISKS.values(), *CARDS.values()], ids=lambda one: one.title)
def test_a_function_is_what_qemu_has(function: Function, found: set[tuple[str, str]]) -> None:
    vendor, device = function.subsystem
    assert (f"{function.vendor:04x}:{function.device:04x}", f"{vendor:04x}:{device:04x}") in found
