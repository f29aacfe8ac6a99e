"""`hyper2kvmctl report verify`: whether a report, its manifest and its disks are what they were when it was signed."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from hyper2kvmd.ctl.output import bars, print_check, print_json, refuse
from hyper2kvmd.errors import Finding
from hyper2kvmd.exits import EXIT_DONE, EXIT_FAILED, EXIT_NOT_FOUND, EXIT_PERMISSION, EXIT_USAGE
from hyper2kvmd.files import explained, open_file, timestamp
from hyper2kvmd.image.source import digest_of
from hyper2kvmd.manifest import SIZE_LIMIT
from hyper2kvmd.queue.facts import REPORT_LIMIT
from hyper2kvmd.queue.names import SIGNED
from hyper2kvmd.report.model import DiskRecord, Report
from hyper2kvmd.report.sign import SIGNATURE_LIMIT, signers_of, verify
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

SIGNERS_LIMIT = 1 << 20
Tell = Callable[[float], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only `report verify` has."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--allowed-signers",
        type=Path,
        metavar="FILE",
        help="with verify: whose signatures count, as ssh-keygen(1) has it under ALLOWED SIGNERS",
    )
    group.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="with verify: only signatures by this key count",
    )
    parser.add_argument(
        "--disks", action="store_true", help="with verify: compare the published disks, too, which reads them whole"
    )


def verify_report(options: argparse.Namespace, config: Settings, path: Path) -> int:
    """Check the signature of a report, its manifest, and if that is wanted its disks; print what was found."""
    try:
        signers = _signers(options, config)
    except ValueError as error:
        return refuse(EXIT_USAGE, str(error))
    except OSError as error:
        statuses = {"PermissionError": EXIT_PERMISSION, "FileNotFoundError": EXIT_NOT_FOUND}
        message = f"{explained(error)}; name a file that holds the public key, or the allowed signers"
        return refuse(statuses.get(type(error).__name__, EXIT_USAGE), message)
    rows: list[dict[str, Any]] = []
    with bars() as tell:
        for check, result, found in _checks(path, signers, tell, disks=options.disks):
            said = found if isinstance(found, str) else found.message
            finding = None if isinstance(found, str) else found.as_json()
            rows.append({"check": check, "result": result, "detail": said, "finding": finding})
    holds = all(row["result"] != "failed" for row in rows)
    if options.json:
        print_json({"report": str(path), "holds": holds, "checks": rows})
    else:
        for row in rows:
            print_check(Console(), **row)
    return EXIT_DONE if holds else EXIT_FAILED


def _signers(options: argparse.Namespace, config: Settings) -> bytes:
    """Whose signatures count. Raise ValueError if nobody says so, or OSError."""
    if options.allowed_signers is not None:
        return _read(options.allowed_signers, SIGNERS_LIMIT)
    key = config.report.sign_key
    path = options.public_key or (None if key is None else public_half(key))
    if path is None:
        raise ValueError(
            "verify: say whose signature it must be, with --public-key FILE or --allowed-signers FILE; without"
            " them, it must be by the key of report.sign_key, and that is null here"
        )
    return signers_in(path)


def public_half(key: Path) -> Path:
    """Where ssh-keygen puts the public half of a key."""
    return key.with_name(f"{key.name}.pub")


def signers_in(path: Path) -> bytes:
    """A file with a public key as the one signer who counts. Raise ValueError for what is none, or OSError."""
    try:
        return signers_of(_read(path, SIGNERS_LIMIT))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; `ssh-keygen -y -f KEY` prints that of a private key") from None


def signed_by(path: Path, signers: bytes) -> tuple[bytes, str | Finding]:
    """The bytes of a report, and who signed them, or why that is not known. Raise OSError or MigrationError.

    signers: whose signatures count, as ssh-keygen(1) has it under ALLOWED SIGNERS.
    """
    data = _read(path, REPORT_LIMIT)
    try:
        signed = _read(path.with_name(path.name + SIGNED), SIGNATURE_LIMIT)
    except FileNotFoundError:
        return data, _unsigned(path, data)
    # As git does: by its own word, of a report that is not trusted yet. The dates of a key are for changing keys.
    return data, verify(Tools(), data, signed, signers, _written_at(data))


def _checks(
    path: Path, signers: bytes, tell: Callable[[str, float], None], *, disks: bool
) -> Iterator[tuple[str, str, str | Finding]]:
    """What is checked, the result, and what was found. Raise OSError or MigrationError."""
    data, found = signed_by(path, signers)
    if isinstance(found, Finding):
        # What the report says of manifest and disks is then anybody's word.
        yield "signature", "failed", found
        return
    yield "signature", "ok", found
    try:
        report = Report.model_validate_json(data)
    except ValidationError:
        hint = "Use the version of hyper2kvmctl that wrote it, or a later one."
        yield "report", "failed", Finding("report_unknown", f"{path} is signed, and no report that is known here", hint)
        return
    # Another VM's signed report is one that holds: people have to see whose it is.
    name = plain(report.vm_name or "(no name)")
    yield "report", "ok", f"VM {name}, {report.status} at {plain(report.finished_at)}, job {plain(report.job)}"
    yield "manifest", *_manifest(path.parent, report)
    if not disks:
        return
    published = [disk for disk in report.disks if disk.target is not None]
    if not published:
        hint = "You need not do anything."
        yield "disks", "warning", Finding("no_disks", "the report names no disk that was published", hint)
    for disk in published:
        name = f"disk {plain(disk.id)}"
        yield name, *_disk(disk, report, partial(tell, name))


def _unsigned(path: Path, data: bytes) -> Finding:
    """Why a report has no signature."""
    why = "it was written without report.sign_key, or the signature was removed or not copied along"
    try:
        for warning in Report.model_validate_json(data).warnings:
            why = plain(warning.message, 400) if warning.code == "report_unsigned" else why
    except ValidationError:
        why = "it is no report that is known here"
    return Finding(
        "unsigned",
        f"{path} has no signature beside it ({path.name}{SIGNED}): {why}",
        "Nothing proves what this report says. Reports are signed when report.sign_key is set; see docs/evidence.md.",
    )


def _written_at(data: bytes) -> datetime:
    """When a report says that it was written; now, if it says nothing of the kind."""
    try:
        return datetime.fromisoformat(json.loads(data)["finished_at"]).astimezone(UTC)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return datetime.now(UTC)


def _manifest(directory: Path, report: Report) -> tuple[str, str | Finding]:
    """Whether the manifest still is that of the report."""
    name, expected = report.manifest.name, report.manifest.sha256
    if not name or "/" in name or expected is None:
        hint = "You need not do anything."
        return "warning", Finding("manifest_unknown", "the report has no digest of the manifest", hint)
    path = directory / name
    try:
        digest = hashlib.sha256(_read(path, SIZE_LIMIT)).hexdigest()
    except FileNotFoundError:
        hint = f"Its sha256 was {expected}."
        return "warning", Finding("manifest_missing", f"{path} is not there, so it was not compared", hint)
    if digest != expected:
        return "failed", Finding(
            "manifest_changed",
            f"{path} has sha256 {digest}, the report says {expected}",
            "The manifest was changed or replaced after the migration.",
        )
    return "ok", f"{path} is the one that was migrated"


def _disk(disk: DiskRecord, report: Report, tell: Tell) -> tuple[str, str | Finding]:
    """Whether a published disk still is what was published. Raise OSError if it cannot be read."""
    target = str(disk.target)
    if disk.target_sha256 is None:
        hint = "Only reports of jobs that ran with report.sign_key have the digests of their disks."
        return "failed", Finding("disk_unrecorded", f"{target}: the report has no digest of it", hint)
    try:
        fd = open_file(target)
    except FileNotFoundError:
        hint = "It was moved or deleted since. `virsh domblklist` says which disks the VM has now."
        return "failed", Finding("disk_missing", f"{target} is not there any more", hint)
    with open(fd, "rb"):
        status = os.fstat(fd)
        digest = digest_of(fd, status.st_size, threading.Event(), tell) if stat.S_ISREG(status.st_mode) else "(no file)"
    if digest == disk.target_sha256:
        return "ok", f"{target} is as it was published"
    written, ended = timestamp(status.st_mtime), report.finished_at
    if status.st_mtime > datetime.fromisoformat(ended).timestamp():
        return "failed", Finding(
            "disk_changed",
            f"{target} has changed since it was published: it was last written to at {written}, and the migration ended"
            f" at {ended}",
            "If the VM has run since, it has changed its disk, and nothing shows whether anybody else did:"
            " compare before the VM starts for the first time.",
        )
    return "failed", Finding(
        "disk_differs",
        f"{target} differs from what was published, though nothing was written to it since ({written}), by its times",
        "The VM has not changed it: look at the storage (`journalctl -k`), and at who can write there. The disk in the"
        " export is as it was: `hyper2kvmctl retry` migrates it again.",
    )


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a plain file. Raise OSError, also for one that is too long."""
    with open(open_file(path), "rb") as file:
        status = os.fstat(file.fileno())
        data = file.read(limit + 1) if stat.S_ISREG(status.st_mode) else b""
    if not stat.S_ISREG(status.st_mode) or len(data) > limit:
        raise OSError(0, f"it is not a plain file of at most {limit} bytes", str(path))
    return data
