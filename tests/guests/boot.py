"""Boot a disk image under QEMU without changing it, and read its serial console until it says what we wait for:

python -m tests.guests.boot disk.qcow2 --format qcow2 --bus virtio
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from tests.guests import nvram

# The last is what a guest without virtio gets: SATA disks and an e1000e card.
Bus = Literal["virtio", "virtio-scsi", "pvscsi", "sata", "compatible"]
Firmware = Literal["bios", "uefi", "secure-boot"]
Outcome = Literal["matched", "failed", "timeout", "exited"]

BOOTED: tuple[str, ...] = ("login:",)
# What a guest says when it will not get any further; waiting for the timeout would only cost minutes.
STUCK: tuple[str, ...] = (
    "(initramfs)",
    "Kernel panic",
    "grub rescue>",
    "grub>",
    "No bootable device",
    "No bootable option",
    "You are in emergency mode",
    "Entering emergency mode",
    # disks come first in the boot order: a firmware that tries anything else has found none of them bootable
    "Start PXE over",
    "Start HTTP Boot over",
    "UEFI Interactive Shell",
)
OVMF = Path("/usr/share/OVMF")
# The program and the variables; with Secure Boot, those have the keys that are in every machine one buys.
_OVMF = {
    "uefi": (OVMF / "OVMF_CODE_4M.fd", OVMF / "OVMF_VARS_4M.fd"),
    "secure-boot": (OVMF / "OVMF_CODE_4M.secboot.fd", OVMF / "OVMF_VARS_4M.ms.fd"),
}
# Without it the guest could write the variables itself, and this firmware does not start.
_SMM = ("-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1")
MAC = "52:54:00:12:34:56"
PVSCSI_DISKS = 15  # on one controller, as VMware has it

# The controller, and what hangs each disk on it. The NIC is the one that goes with the platform.
_CONTROLLER: dict[Bus, tuple[str, ...]] = {
    "virtio": (),
    "virtio-scsi": ("-device", "virtio-scsi-pci,id=scsi0"),
    "pvscsi": (),  # as many as it takes
    "sata": (),  # q35 has one
    "compatible": (),
}
_DISK: dict[Bus, str] = {
    "virtio": "virtio-blk-pci,drive=disk{n}",
    "virtio-scsi": "scsi-hd,drive=disk{n},bus=scsi0.0",
    "pvscsi": "scsi-hd,drive=disk{n},bus=scsi{controller}.0,scsi-id={target}",
    "sata": "ide-hd,drive=disk{n},bus=ide.{n}",
    "compatible": "ide-hd,drive=disk{n},bus=ide.{n}",
}
_NIC: dict[Bus, str] = {
    "virtio": "virtio-net-pci",
    "virtio-scsi": "virtio-net-pci",
    "pvscsi": "vmxnet3",
    "sata": "vmxnet3",
    "compatible": "e1000e",
}
# A guest on VMware calls its cards ens192, ens224 and so on, after the slots of the hypervisor's PCIe ports. The same
# slots give the same names here, provided that the ports, not ACPI, announce them.
VMWARE_SLOTS = (192, 224, 256, 161)
_VMWARE_PORTS = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
# Consoles are written for screens: colours, cursor moves, and what else ECMA-48 has
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\^_=>cNOM78])")


@dataclass(frozen=True)
class BootResult:
    outcome: Outcome  # "matched": one of `until` was seen; "failed": one of `fail`
    pattern: str  # which one, or ""
    serial_log: str  # all of the console, without escape sequences
    seconds: float

    @property
    def ok(self) -> bool:
        return self.outcome == "matched"

    @property
    def report(self) -> dict[str, str]:
        """What our guests' boot-report says ("root", "fstab-root", "swap", "net", "links", "canary", ...)."""
        found = re.search(r"GUEST-BOOTED-OK (.*)", self.serial_log)
        return dict(word.split("=", 1) for word in found[1].split()) if found else {}

    @property
    def mounts(self) -> dict[str, str]:
        """Which device is mounted where ("/boot": "/dev/vda1"), as our guests with several disks say."""
        found = re.search(r"GUEST-DISKS (.*)", self.serial_log)
        return dict(word.split("=", 1) for word in found[1].split()) if found else {}

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.serial_log.splitlines()[-lines:])


def wwn(number: int) -> int:
    """The name in its hardware that a disk has on VMware, which tells it to the guest with disk.EnableUUID."""
    return 0x5000C29000000000 + number


def boot(
    image: Path | Sequence[Path],
    fmt: str,
    bus: Bus,
    *,
    timeout: float = 900,
    firmware: Firmware = "bios",
    until: Sequence[str] = BOOTED,
    fail: Sequence[str] = STUCK,
    macs: Sequence[str] = (MAC,),
    cpus: int = 2,
    answers: Mapping[str, str] | None = None,
    loader: str | None = None,
    echo: IO[str] | None = None,
) -> BootResult:
    """Boot the image (or images, the first being the boot disk) until a text is seen. QEMU is gone afterwards.

    macs: of the network cards, in the guest's order. answers: text seen on the console -> line typed then, once.
    loader: path of the boot loader that the NVRAM of a UEFI machine has written down, as Windows writes paths.
    """
    images = [image] if isinstance(image, Path) else list(image)
    for path in images:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: nothing to boot")
    with tempfile.TemporaryDirectory(prefix="boot-") as scratch:
        command = _qemu_command(images, fmt, bus, firmware, macs, cpus, loader, Path(scratch))
        deadline = time.monotonic() + timeout
        return _judge(_console(command, answers or {}, deadline=deadline, scratch=scratch), deadline, until, fail, echo)


def boot_domain(uri: str, name: str, *, root: Path = Path("/"), timeout: float = 900) -> BootResult:
    """Start a domain of libvirt, whose disks are then written to, and read its console likewise. It is off afterwards.

    uri: of a libvirt on this host, which sees `root` as its file system.
    """
    # Paused until somebody listens: the firmware speaks first.
    _virsh(uri, "start", name, "--paused")
    try:
        terminal = _virsh(uri, "ttyconsole", name).lstrip("/")
        console = os.open(root / terminal, os.O_RDWR | os.O_NOCTTY)
        try:
            deadline = time.monotonic() + timeout
            _virsh(uri, "resume", name)
            return _judge(_read(console, deadline), deadline, BOOTED, STUCK)
        finally:
            os.close(console)
    finally:
        _virsh(uri, "destroy", name)


def _virsh(uri: str, *arguments: str) -> str:
    done = subprocess.run(["virsh", "-c", uri, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"virsh {shlex.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _judge(
    console: Iterable[str], deadline: float, until: Sequence[str], fail: Sequence[str], echo: IO[str] | None = None
) -> BootResult:
    """Read until a text is seen, the console ends, or the deadline has passed."""
    started = time.monotonic()
    log = ""
    for text in console:
        log += text
        if echo:
            echo.write(text)
            echo.flush()
        clean = _ESCAPES.sub("", log)
        # failures first: "(initramfs)" is final, while `until` may be a text that also precedes it
        for outcome, patterns in (("failed", fail), ("matched", until)):
            for pattern in patterns:
                if pattern in clean:
                    return _result(outcome, pattern, log, started)
    return _result("timeout" if time.monotonic() >= deadline else "exited", "", log, started)


def _result(outcome: str, pattern: str, log: str, started: float) -> BootResult:
    assert outcome in get_args(Outcome)
    clean = _ESCAPES.sub("", log).replace("\r", "")
    return BootResult(outcome, pattern, clean, time.monotonic() - started)  # type: ignore[arg-type]


def _qemu_command(
    images: Sequence[Path],
    fmt: str,
    bus: Bus,
    firmware: Firmware,
    macs: Sequence[str],
    cpus: int,
    loader: str | None,
    scratch: Path,
) -> list[str]:
    machine = "q35,smm=on" if firmware == "secure-boot" else "q35"
    command = [
        *("qemu-system-x86_64", "-machine", machine, "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", str(cpus), "-m", "1024", "-display", "none", "-nodefaults", "-no-reboot", "-serial", "stdio"),
        *_CONTROLLER[bus],
    ]
    vmware = _NIC[bus] == "vmxnet3"
    if vmware:
        command += _VMWARE_PORTS
    for number, mac in enumerate(macs):
        port = ""
        if vmware:
            slot = VMWARE_SLOTS[number]
            command += ["-device", f"pcie-root-port,id=port{slot},chassis={number + 1},slot={slot}"]
            port = f",bus=port{slot}"
        command += ["-netdev", f"user,id=net{number},restrict=on"]
        command += ["-device", f"{_NIC[bus]},netdev=net{number},mac={mac},romfile={port}"]
    if firmware == "secure-boot":
        command += _SMM
    if firmware != "bios":
        if bus == "pvscsi":
            raise ValueError("Debian's OVMF cannot read a pvscsi disk: boot UEFI guests on sata, which VMware has too")
        code, empty = _OVMF[firmware]
        if not code.is_file():
            raise FileNotFoundError(f"{code} is not there: run 'make deps' (package ovmf)")
        variables = scratch / "vars.fd"
        store = empty.read_bytes()
        variables.write_bytes(nvram.with_boot_entry(store, loader) if loader else store)
        command += ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}"]
        command += ["-drive", f"if=pflash,format=raw,unit=1,file={variables}"]
    if bus == "pvscsi":
        for controller in range(-(-len(images) // PVSCSI_DISKS)):
            command += ["-device", f"pvscsi,id=scsi{controller}"]
    for number, path in enumerate(images):
        # told an order by QEMU, OVMF forgets the one in the NVRAM
        order = "" if loader else f",bootindex={number}"
        name = os.fspath(path).replace(",", ",,")  # how QEMU's options quote a comma
        identity = f",wwn={wwn(number):#x}" if vmware else ""
        drive = f"file={name},format={fmt},if=none,id=disk{number},snapshot=on"
        controller, target = divmod(number, PVSCSI_DISKS)
        device = _DISK[bus].format(n=number, controller=controller, target=target)
        command += ["-drive", drive, "-device", device + identity + order]
    return command


def _console(command: Sequence[str], answers: Mapping[str, str], *, deadline: float, scratch: str) -> Iterator[str]:
    """Yield what comes out of QEMU's serial port, until it ends or the deadline has passed."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # QEMU's own complaints belong in the log
        env={**os.environ, "TMPDIR": scratch},  # where snapshot=on keeps what the guest writes
    )
    unanswered, log = dict(answers), ""
    assert process.stdin and process.stdout
    try:
        for text in _read(process.stdout.fileno(), deadline):
            if unanswered:
                log += text
                for question in [question for question in unanswered if question in log]:
                    process.stdin.write(unanswered.pop(question).encode() + b"\n")
                    process.stdin.flush()
            yield text
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _read(fd: int, deadline: float) -> Iterator[str]:
    """Yield what comes out of a file, until it ends or the deadline has passed."""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                return
            try:
                data = os.read(fd, 65536)
            except OSError as error:
                if error.errno != errno.EIO:  # how a terminal says that nobody is at its other end
                    raise
                return
            if not data:
                return
            yield data.decode("utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.guests.boot", description=__doc__)
    parser.add_argument("image", type=Path, nargs="+", help="boot disk first")
    parser.add_argument("--format", default="qcow2")
    parser.add_argument("--bus", choices=get_args(Bus), default="virtio")
    parser.add_argument("--firmware", choices=get_args(Firmware), default="bios")
    parser.add_argument("--timeout", type=float, default=420, metavar="SECONDS")
    parser.add_argument("--mac", action="append", help=f"of each network card (default: one, {MAC})")
    parser.add_argument("--loader", metavar="PATH", help=r"in the NVRAM of a UEFI guest: \EFI\debian\grubx64.efi")
    parser.add_argument("--answer", action="append", default=[], metavar="TEXT=LINE", help="type LINE on seeing TEXT")
    parser.add_argument("--until", action="append", metavar="TEXT", help="default: login:")
    arguments = parser.parse_args()
    result = boot(
        arguments.image,
        arguments.format,
        arguments.bus,
        timeout=arguments.timeout,
        firmware=arguments.firmware,
        until=arguments.until or BOOTED,
        macs=arguments.mac or (MAC,),
        loader=arguments.loader,
        answers=dict(answer.split("=", 1) for answer in arguments.answer),
        echo=sys.stdout,
    )
    print(f"\n{result.outcome} {result.pattern!r} after {result.seconds:.0f} s")
    sys.exit(0 if result.ok else 1)


if __name__ == "__main__":
    main()
