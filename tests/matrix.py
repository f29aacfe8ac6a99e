"""Every test guest, seen booting as on VMware, failing on virtio, being migrated, and booting on virtio:

python -m tests.matrix [GUEST ...] [--jobs N] [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyper2kvmd.settings.model import Settings
from tests.conftest import report_of, run_job
from tests.guests.boot import BootResult, Bus, boot
from tests.guests.build import disks, export
from tests.guests.guest import ONE_NIC, Guest
from tests.guests.ovf import Identity
from tests.guests.recipe import GUESTS
from tests.guests.rootfs import UNRELEASED
from tests.pages import wrapped

# Of a guest's cards, as far as it has them, and what else an export says of it.
IDENTITY = Identity(
    macs=("00:50:56:aa:bb:01", "00:50:56:aa:bb:02"),
    uuid="564d1a2b-3c4d-5e6f-7081-92a3b4c5d6e7",
    annotation="Orders & stock\nOwner: Jürgen",
)
# How a guest is started whose disks are on this bus by the report; what has no virtio has no such card either.
_BUSES: dict[str, Bus] = {"virtio": "virtio", "scsi": "virtio-scsi", "sata": "compatible"}
BOOT_SECONDS = 900
MIGRATION_SECONDS = 1200


@dataclass(frozen=True)
class Migration:
    """What `run-job` made of an export: its report, and the disks in the guest's order."""

    report: dict[str, Any]
    disks: tuple[Path, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return bool(self.report.get("status") == "succeeded")


@dataclass(frozen=True)
class Row:
    """The story of one guest. `after` is None if there was nothing to boot, `original` if only Xen can boot it."""

    guest: Guest
    original: BootResult | None
    before: BootResult
    migration: Migration
    after: BootResult | None

    def problems(self) -> list[str]:
        """What is not as it should be."""
        found = []
        cards = self.guest.cards
        if self.original and not works(self.original, cards):
            found.append(f"the original does not work as on VMware: {_said(self.original)}")
        if self.before.outcome not in ("failed", "matched") or works(self.before, cards):
            found.append(f"the original should not work on virtio: {_said(self.before)}")
        if self.after is None:
            found.append(f"the migration failed: {json.dumps(self.migration.report.get('error'))}")
        elif not works(self.after, cards):
            found.append(f"the result does not work on virtio: {_said(self.after)}")
        elif self.original and works(self.original, cards):
            found += differences(self.original.report, self.after.report)
        return found


def works(result: BootResult, cards: Sequence[str] = ONE_NIC) -> bool:
    """Whether the guest booted with all that it was told to use: file systems, swap, addresses, services."""
    said = result.report
    return (
        result.ok
        and bool(said)
        and "failed" not in said["mounts"]
        and "none" != said["swap"]
        and sorted(cards) == _sorted(said["net"])
        and "none" == said["failed"]
    )


def boot_as_on_vmware(guest: Guest) -> BootResult:
    """Boot the original on the controller and the network cards it knows, whose slots name them ens192 and ens224."""
    # A machine of Hyper-V's first generation boots from IDE.
    bus: Bus = "sata" if guest.firmware == "uefi" or guest.platform == "hyper-v" else "pvscsi"
    # A kernel calls disks as they happen to answer, also those of one controller, and this guest goes by these names.
    for _ in range(3 if len(guest.disk_sizes) > 1 else 1):
        result = boot(disks(guest.name), "raw", bus, **_machine(guest), loader=guest.loader)
        if works(result, guest.cards):
            break
    return result


def boot_before(guest: Guest) -> BootResult:
    """Boot the original on virtio, which is expected to fail."""
    return boot(disks(guest.name), "raw", "virtio", **_machine(guest))


def boot_after(guest: Guest, migration: Migration) -> BootResult:
    """Boot the result on what its report says it is fit for, with network cards that have the old MAC addresses."""
    bus = _BUSES[migration.report["results"]["fix"]["machine"]["disks"]]
    return boot(migration.disks, "qcow2", bus, **_machine(guest))


def _machine(guest: Guest) -> dict[str, Any]:
    return {
        "firmware": "secure-boot" if guest.secure_boot else guest.firmware,
        "macs": identity(guest).macs,
        # The newest kernels change their own code under the other CPU's feet, for which QEMU's emulation is not fit.
        "cpus": 1 if guest.rootfs.suite in UNRELEASED else 2,
        "answers": {"Please unlock disk": guest.passphrase} if guest.passphrase else {},
        "timeout": BOOT_SECONDS,
    }


def identity(guest: Guest) -> Identity:
    """What the export says of the guest besides its disks."""
    return replace(IDENTITY, macs=IDENTITY.macs[: len(guest.cards)])


def migrate(guest: Guest, scratch: Path) -> Migration:
    """Export the guest below `scratch`, which is empty, and run one job on it, without libvirt."""
    for name in ("exports", "images", "work"):
        (scratch / name).mkdir()
    shape: dict[str, Any] = {
        "exports_dir": scratch / "exports",
        "output_dir": scratch / "images",
        "work_dir": scratch / "work",
        "libvirt": {"import": False},
    }
    if guest.passphrase:
        key = scratch / "key"
        key.touch(0o600)
        key.write_text(guest.passphrase)
        shape["fix"] = {"luks_keys": {guest.name: key}}
    if guest.platform == "vmware":
        dropped = export(guest.name, scratch / "exports", vm_name=guest.name, identity=identity(guest))
    else:
        # Only vSphere writes a descriptor; of other platforms an export says in its manifest which card there was.
        form, (mac,) = guest.exported_as, identity(guest).macs
        dropped = export(guest.name, scratch / "exports", vm_name=guest.name, disk_format=form, mac=mac)
    started = time.monotonic()
    done = run_job(dropped, Settings.model_validate(shape), timeout=MIGRATION_SECONDS)
    seconds = time.monotonic() - started
    try:
        report = report_of(dropped)
    except FileNotFoundError:  # it did not come as far as that
        error = {"code": f"exit status {done.returncode}", "message": done.stderr[-2000:]}
        report = {"status": "failed", "error": error}
    made = [scratch / "images" / f"{guest.name}-disk-{number}.qcow2" for number in range(len(guest.disk_sizes))]
    return Migration(report, tuple(made), seconds)


def differences(original: dict[str, str], after: dict[str, str]) -> list[str]:
    """What two guests that work say of themselves that should be the same; device and kernel names need not."""
    same = ("mounts", "net", "links", "canary")
    return [
        f"{key}: {original[key]} became {after[key]}" for key in same if _sorted(original[key]) != _sorted(after[key])
    ]


def _sorted(words: str) -> list[str]:
    """Interfaces are listed as the kernel numbered them, and networkd makes its own in no order."""
    return sorted(words.split(","))


def run(guest: Guest, say: Callable[[str], None]) -> Row:
    """Take one guest all the way; `say` is told what happens."""
    original = None if guest.platform == "xen" else boot_as_on_vmware(guest)
    if original:
        say(f"{guest.name}: as on {guest.platform}: {_said(original)}")
    before = boot_before(guest)
    say(f"{guest.name}: before, on virtio: {_said(before)}")
    scratch = Path(tempfile.mkdtemp(prefix="hyper2kvmd-matrix-", dir="/var/tmp"))
    try:
        migration = migrate(guest, scratch)
        say(f"{guest.name}: migration: {migration.report['status']} after {migration.seconds:.0f} s")
        after = boot_after(guest, migration) if migration.ok else None
        if after:
            say(f"{guest.name}: after, on virtio: {_said(after)}")
    finally:
        shutil.rmtree(scratch)
    row = Row(guest, original, before, migration, after)
    for problem in row.problems():
        say(f"{guest.name}: NOT AS EXPECTED: {problem}")
    return row


def _said(result: BootResult) -> str:
    report = result.report
    if result.ok and report:
        words = " ".join(f"{key}={report[key]}" for key in ("mounts", "swap", "net", "failed") if key in report)
        return f"boots in {result.seconds:.0f} s: {words}"
    return f"{result.outcome} {result.pattern!r} after {result.seconds:.0f} s"


def _broken(before: BootResult, cards: Sequence[str]) -> str:
    """Where the original stops on virtio, or what it comes up without: Ubuntu's kernels have virtio built in."""
    said = before.report
    if before.outcome != "matched" or not said:
        return f"`{before.pattern or before.outcome}`"
    if sorted(cards) != _sorted(said["net"]):
        return f"comes up with {_literal(said['net'])}"
    return "comes up with " + ", ".join(f"`{key}={said[key]}`" for key in ("mounts", "swap", "failed"))


def _literal(words: str) -> str:
    return ", ".join(f"`{word}`" for word in words.split(","))


def table(rows: Sequence[Row]) -> str:
    """The table of the README."""
    lines = [
        "| guest | firmware | storage | initramfs | migration |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        guest = row.guest
        cells = (
            *(guest.name, guest.firmware.upper(), guest.storage, guest.initramfs),
            f"{row.migration.seconds:.0f} s" if row.migration.ok else row.migration.report["error"]["code"],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "".join(f"{line}\n" for line in lines)


def listing(rows: Sequence[Row]) -> str:
    """The list of docs/guests.md."""
    text = ""
    for row in rows:
        problems = row.problems()
        after = "; ".join(problems) if problems else _literal(row.after.report["net"]) if row.after else "nothing"
        text += f"- **{row.guest.name}** ({row.guest.network}). Before: {_broken(row.before, row.guest.cards)}. "
        text += f"After: {after}\n"
    return wrapped(text)


def as_json(row: Row) -> dict[str, Any]:
    """One row, for a program."""

    def shape(result: BootResult | None) -> dict[str, Any] | None:
        if result is None:
            return None
        return {
            "outcome": result.outcome,
            "pattern": result.pattern,
            "seconds": round(result.seconds, 1),
            "report": result.report,
        }

    return {
        "guest": row.guest.name,
        "original": shape(row.original),
        "before": shape(row.before),
        "migration": {
            "status": row.migration.report["status"],
            "error": row.migration.report.get("error"),
            "warnings": [warning["code"] for warning in row.migration.report.get("warnings", [])],
            "seconds": round(row.migration.seconds, 1),
        },
        "after": shape(row.after),
        "problems": row.problems(),
    }


def main() -> int:
    """Run the guests that are named, or all of them; the exit status is 1 if one is not as expected."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("guests", nargs="*", choices=[[], *GUESTS], metavar="GUEST", help=f"of {', '.join(GUESTS)}")
    parser.add_argument("--json", action="store_true", help="print a document instead of the tables")
    parser.add_argument("--jobs", type=int, default=2, help="guests at a time (default: 2, which takes two CPUs)")
    arguments = parser.parse_args()

    def said(name: str) -> Row:
        return run(GUESTS[name], lambda text: print(text, file=sys.stderr, flush=True))

    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(said, arguments.guests or GUESTS))
    if arguments.jobs > 1:
        # Emulated, and beside another, a guest can be so slow that its own systemd gives a device up after 90 seconds.
        for number, row in enumerate(rows):
            if row.problems():
                print(f"{row.guest.name}: once more, alone", file=sys.stderr, flush=True)
                rows[number] = said(row.guest.name)
    print(json.dumps([as_json(row) for row in rows], indent=2) if arguments.json else f"{table(rows)}\n{listing(rows)}")
    return 1 if any(row.problems() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
