"""The boot test: starts the migrated VM on throw-away overlays, without a network, and watches what it says."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import libvirt
import libvirt_qemu
import structlog

from hyper2kvmd.domain.xml import job_of
from hyper2kvmd.errors import Cancelled, MigrationError
from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.hypervisor.disks import let_in
from hyper2kvmd.hypervisor.png import png

log = structlog.get_logger()

POLL_SECONDS = 0.25
LISTEN_SECONDS = 30.0
AGENT_SECONDS = 5.0  # between two questions to the guest agent
TCG_FACTOR = 4  # how much longer a guest may take whose CPU is emulated
KEPT_BYTES = 1 << 20

# Consoles are written for screens: colours, cursor moves, and what else ECMA-48 has.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*\x07|[@-Z\\^_=>78]|[()][0-9A-B])")
_PASSES = (
    (re.compile(r"^(?!Last )[\w.()-]{1,64} login:", re.MULTILINE), "a login prompt"),
    (
        re.compile(r"Reached target .{0,40}(?:multi-user\.target|Multi-User System|graphical\.target|Graphical Inter)"),
        "systemd reached its target",
    ),
)
# What a guest says when it will not get any further.
_FAILS = (
    ("(initramfs)", "it ended in the shell of its initramfs, which did not find the root file system"),
    ("dracut-initqueue: Warning: Could not boot", "dracut did not find the root file system"),
    ("Entering emergency mode", "it entered emergency mode"),
    ("You are in emergency mode", "it is in emergency mode"),
    ("Cannot open access to console, the root account is locked", "it is in emergency mode"),
    ("Kernel panic - not syncing", "its kernel panicked"),
    ("grub rescue>", "GRUB did not find its files"),
    ("grub>", "GRUB has no configuration"),
    ("No bootable device", "the firmware found no disk to boot from"),
    ("No bootable option or device was found", "the firmware found no disk to boot from"),
    ("UEFI Interactive Shell", "the firmware found no boot loader"),
    # Disks come first: a firmware that tries the network has found none of them bootable.
    ("Start PXE over", "the firmware found no boot loader"),
    ("Start HTTP Boot over", "the firmware found no boot loader"),
)


@dataclass(frozen=True)
class Verdict:
    """How a boot test ended. `console` is the end of what the guest wrote, `screen` a PNG of its screen, if any."""

    outcome: Literal["passed", "failed", "inconclusive"]
    reason: str
    seconds: float
    console: str
    screen: bytes | None


def judge(text: str) -> tuple[Literal["passed", "failed"], str] | None:
    """What the text on a console says about a guest; None if that is nothing yet."""
    for sign, reason in _FAILS:  # first: some of it follows what looks like success
        if sign in text:
            return "failed", reason
    for pattern, reason in _PASSES:
        if pattern.search(text):
            return "passed", reason
    return None


def run(
    connection: Any,
    uri: str,
    xml: str,
    seconds: float,
    *,
    cancel: threading.Event,
) -> Verdict:
    """Start the domain `xml`, from thrown_away(), for at most `seconds`, and end it when it has said how it does.

    uri: that of the connection, with which the domain dies, and so with this process. Raise Cancelled when `cancel` is
    set.
    """
    began = time.monotonic()
    console = bytearray()

    def verdict(outcome: Literal["passed", "failed", "inconclusive"], reason: str, screen: bytes | None) -> Verdict:
        return Verdict(outcome, reason, round(time.monotonic() - began, 1), readable(console), screen)

    try:
        with let_in(connection, xml) as started, _running(connection, uri, started, console) as guest:
            outcome, reason = _watched(guest, console, began + seconds, cancel)
            return verdict(outcome, reason, screen(connection, guest))
    except libvirt.libvirtError as error:
        # It says nothing about the guest: libvirt cannot read the disks, or went away.
        return verdict("inconclusive", f"libvirt could not run the test: {error}", None)


def readable(console: bytes | bytearray) -> str:
    """What a console shows, as text without control sequences; the last MiB of it."""
    text = _ESCAPES.sub("", bytes(console[-KEPT_BYTES:]).decode("utf-8", errors="replace"))
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(char for char in lines if char.isprintable() or char in "\n\t")


@contextlib.contextmanager
def _running(connection: Any, uri: str, xml: str, console: bytearray) -> Iterator[Any]:
    """The started domain, whose console is appended to `console`; it is gone at the end."""
    root = ET.fromstring(xml)
    for other in connection.listAllDomains():  # of an attempt that died while libvirt was away
        if other.name() == root.findtext("name") and job_of(other.XMLDesc(0)) == job_of(xml):
            other.destroy()
    system = root.find("os")
    if system is not None and system.get("firmware") != "efi":
        for old in system.findall("bios"):
            system.remove(old)
        ET.SubElement(system, "bios", useserial="yes")
    # Paused until somebody listens: what a firmware has to say comes first.
    flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY | libvirt.VIR_DOMAIN_START_VALIDATE
    guest = connection.createXML(ET.tostring(root, encoding="unicode"), flags)
    try:
        listen(uri, guest.UUIDString(), console)
        guest.resume()
        yield guest
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            guest.destroy()


def listen(uri: str, uuid: str, console: bytearray) -> None:
    """Have what a running domain writes to its console appended to `console`, from now on and until it ends."""
    listening = threading.Event()
    threading.Thread(target=_listen, args=(uri, uuid, console, listening), name="console", daemon=True).start()
    listening.wait(LISTEN_SECONDS)


def _listen(uri: str, uuid: str, console: bytearray, listening: threading.Event) -> None:
    """Take what comes from a console until it ends; `listening` is set when nothing can be missed any more."""
    # On a connection of its own: one that waits for a stream can keep another thread's call waiting for ever.
    with contextlib.suppress(libvirt.libvirtError, MigrationError), connect(uri) as connection:
        stream = connection.newStream()
        connection.lookupByUUIDString(uuid).openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE)
        listening.set()
        while data := stream.recv(65536):
            console += data
            if len(console) > 2 * KEPT_BYTES:
                del console[:KEPT_BYTES]


def _watched(
    guest: Any, console: bytearray, deadline: float, cancel: threading.Event
) -> tuple[Literal["passed", "failed", "inconclusive"], str]:
    """Wait until the guest has said how it does."""
    seen, ask_at = 0, 0.0
    while time.monotonic() < deadline:
        if cancel.wait(POLL_SECONDS):
            raise Cancelled
        if len(console) != seen:
            seen = len(console)
            if found := judge(readable(console)):
                return found
        if not guest.isActive():
            return "failed", "it switched itself off"
        if time.monotonic() >= ask_at:
            if agent_answers(guest):
                return "passed", "the guest agent answers"
            ask_at = time.monotonic() + AGENT_SECONDS
    said = "it said nothing that tells how it does" if console else "its kernel writes nothing to the serial port"
    return "inconclusive", f"{said} before the time was over"


def agent_answers(guest: Any) -> bool:
    """Whether the guest has an agent that answers."""
    channel = ET.fromstring(guest.XMLDesc(0)).find("devices/channel/target[@state='connected']")
    if channel is None:
        return False
    try:
        libvirt_qemu.qemuAgentCommand(guest, '{"execute": "guest-ping"}', 2, 0)
    except libvirt.libvirtError:
        return False
    return True


def screen(connection: Any, guest: Any) -> bytes | None:
    """A picture of the guest's screen as PNG; None if it has none."""
    picture = bytearray()
    try:
        stream = connection.newStream()
        kind = guest.screenshot(stream, 0, 0)
        stream.recvAll(lambda _stream, data, _: picture.extend(data), None)
        stream.finish()
    except libvirt.libvirtError as error:
        log.debug("no screenshot", reason=str(error))
        return None
    return bytes(picture) if kind == "image/png" else png(bytes(picture))
