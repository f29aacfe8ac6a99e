"""The migration report as one HTML page for people: no script, nothing loaded from elsewhere, safe to mail."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from hyper2kvmd.domain.hardware import Hardware
from hyper2kvmd.manifest import Manifest
from hyper2kvmd.report.model import Report, StageRecord, Status
from hyper2kvmd.report.pages import template
from hyper2kvmd.report.results import Results
from hyper2kvmd.text import escaped, exact_duration, size

LOG_LINES = 200
LOG_LINE_LENGTH = 2000
_DEPTH_LIMIT = 20  # of what stages put on the record
_NUMBER_LIMIT = 1 << 63
_CLOCK_SECONDS = 1.0  # by which two readings of the clock may differ
_PNG = b"\x89PNG\r\n\x1a\n"
_SCREEN_LIMIT = 4096  # pixels; what is larger was not drawn by a guest that boots
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200)

LineKind = Literal["file", "place", "added", "removed", "same"]

_UNFINISHED: dict[Status, str] = {
    "retrying": "The migration has not succeeded yet. It is retried.",
    "blocked": "The migration cannot go on until a person changes something.",
    "failed": "The migration is not retried.",
    "rejected": "The export was not accepted. Nothing of it was migrated.",
    "cancelled": "The migration was cancelled.",
}


@dataclass(frozen=True)
class Check:
    """A claim and whether it holds. result: "ok", "failed", or "none" for what was not looked at; said: in words."""

    subject: str
    claim: str
    result: Literal["ok", "failed", "none"]
    said: str
    evidence: str


@dataclass(frozen=True)
class Bar:
    """One stage on the timeline. `left` and `width` are percentages, None where there is nothing to draw."""

    name: str
    status: str
    began: str
    took: str
    left: float | None
    width: float | None


def checked(document: Any) -> tuple[Report, Results]:
    """A report that anybody may have written, as one that can be shown: its shape is known, its text is harmless.

    Raise pydantic.ValidationError for what is not a report.
    """
    report = Report.model_validate(_harmless(document))
    return report, Results.model_validate(report.results)


def render(
    document: dict[str, Any],
    log: str,
    screen: bytes | None,
    source: tuple[Manifest, Hardware] | None = None,
    *,
    signed: bool = False,
) -> str:
    """The page. Pure: the same arguments give the same page.

    document: the report as plain data. log: the end of what its attempts logged. screen: the boot test's PNG; what is
    no PNG is left out. source: the manifest that the report belongs to, and what the VM was, where that is still
    known. signed: whether there is a signature, which the page cannot show to be good.
    Raise pydantic.ValidationError if the document is not a report.
    """
    report, results = checked(document)
    bars, ticks = timeline(report)
    return template("page.html.j2").render(
        moment=moment,
        diff_lines=diff_lines,
        report=report,
        results=results,
        headline=_headline(report),
        run_by=_run_by(report),
        problems=() if report.error is None else report.error.problems or (report.error,),
        machine=_machine(report, results, source),
        cards=None if source is None else _cards(source[1]),
        checks=checks(report, results),
        bars=bars,
        ticks=ticks,
        overrides=list(_flat(report.overrides)),
        log=[escaped(line[:LOG_LINE_LENGTH], "\n\t") for line in log.rstrip("\n").split("\n")[-LOG_LINES:] if line],
        screen=_picture(screen),
        signed=signed,
    )


def _harmless(value: Any, depth: int = 0) -> Any:
    """Plain data that is safe to show: no text acts on a terminal or on the direction of what is read.

    Numbers that no report of ours has (infinite, or more bytes than a file can have) are taken out.
    """
    if isinstance(value, str):
        return escaped(value, "\n\t")
    if isinstance(value, int | float):
        return value if -_NUMBER_LIMIT < value < _NUMBER_LIMIT else None
    if depth == _DEPTH_LIMIT:
        return "…"
    if isinstance(value, dict):
        return {_harmless(key): _harmless(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_harmless(item, depth + 1) for item in value]
    return value


def moment(timestamp: str) -> str:
    """An RFC 3339 timestamp for people, to the second; one that is none stays as it is."""
    at = _instant(timestamp)
    return timestamp if at is None else at.strftime("%Y-%m-%d %H:%M:%S UTC")


def diff_lines(diff: str) -> list[tuple[LineKind, str]]:
    """The lines of a unified diff, each with what it is; of a change in a registry, all are the same."""
    kinds: dict[str, LineKind] = {"+": "added", "-": "removed", "@": "place"}
    lines = diff.split("\n")
    files = 2 if lines[0].startswith("--- ") else 0
    return [("file" if number < files else kinds.get(line[:1], "same"), line) for number, line in enumerate(lines)]


def timeline(report: Report) -> tuple[list[Bar], list[tuple[float, str]]]:
    """The stages as bars, and the marks of their axis: (percentage, label). The axis begins with the last attempt."""
    zero = _instant(report.started_at)
    offsets = [_offset(zero, stage) for stage in report.stages]
    # What an earlier attempt did can lie days back: its bars would leave no room for those of this one.
    ends = [
        offset + (stage.seconds or 0)
        for offset, stage in zip(offsets, report.stages, strict=True)
        if offset is not None and offset >= -_CLOCK_SECONDS
    ]
    total = max([*ends, report.seconds])
    bars = []
    for offset, stage in zip(offsets, report.stages, strict=True):
        began, left, width = "", None, None
        if offset is not None and offset < -_CLOCK_SECONDS:
            began = "earlier attempt"
        elif offset is not None and stage.seconds is not None:
            began = f"+{exact_duration(max(offset, 0))}"
            if total > 0:
                left, width = (round(max(part, 0) / total * 100, 3) for part in (offset, stage.seconds))
        bars.append(Bar(stage.name, stage.status, began, exact_duration(stage.seconds), left, width))
    if all(bar.left is None for bar in bars):
        return bars, []
    step = next((step for step in _STEPS if total / step <= 6), total / 4)
    marks = [number * step for number in range(int(total / step) + 1)]
    return bars, [(round(mark / total * 100, 3), _mark(mark)) for mark in marks]


def _offset(zero: datetime | None, stage: StageRecord) -> float | None:
    """Seconds from the beginning of the attempt to that of a stage."""
    began = None if stage.started_at is None else _instant(stage.started_at)
    return None if zero is None or began is None else (began - zero).total_seconds()


def checks(report: Report, results: Results) -> list[Check]:
    """Everything that was checked, from the source to the boot test, and what was left out."""
    found = []
    for disk in report.disks:
        found.append(
            Check(
                disk.source,
                "has the SHA-256 that the manifest gives",
                "ok" if disk.verified else "none",
                "verified" if disk.verified else "not verified",
                disk.source_sha256 or "",
            )
        )
    for id, disk_checks in (results.validate_.disks if results.validate_ else {}).items():
        for claim, done in (
            ("is a sound image of the right size", disk_checks.checked),
            ("holds, byte for byte, the source and the fix", disk_checks.compared),
        ):
            found.append(Check(id, claim, "ok" if done else "none", "passed" if done else "left out", ""))
    for proof in results.fix.proofs if results.fix else ():
        said = "proved" if proof.ok else "not so"
        found.append(Check(proof.subject, proof.claim, "ok" if proof.ok else "failed", said, proof.evidence))
    if boot := results.boot:
        words: dict[str, Literal["ok", "failed", "none"]] = {"passed": "ok", "failed": "failed"}
        evidence = f"{boot.reason}, after {exact_duration(boot.seconds)}"
        found.append(Check("boot test", "the guest comes up", words.get(boot.outcome, "none"), boot.outcome, evidence))
    return found


def _headline(report: Report) -> str:
    if report.status != "succeeded":
        return _UNFINISHED[report.status]
    if report.dry_run:
        return "The dry run succeeded. Nothing was written."
    if not any(disk.target for disk in report.disks):
        return "The job succeeded. It was not asked to write any disk."
    if report.domain is None:
        return "The disks were migrated. No domain was defined."
    return "The VM was migrated, and is defined in libvirt."


def _machine(report: Report, results: Results, source: tuple[Manifest, Hardware] | None) -> list[tuple[str, str, str]]:
    """What the VM was, and what it is: (label, before, after), without what nobody knows."""
    domain, inspect, fix = report.domain, results.inspect, results.fix
    firmware = {"bios": "BIOS", "uefi": "UEFI"}
    before, after = {"Name": report.vm_name or ""}, {}
    if source is not None:
        manifest, hardware = source
        cores = f"{hardware.cores_per_socket} cores per socket" if hardware.cores_per_socket else None
        extras = (("Secure Boot", hardware.secure_boot), ("TPM", hardware.tpm))
        before = {
            "Name": manifest.vm_name,
            "Platform": _join(manifest.provider, manifest.datacenter),
            "Identifier": manifest.vm_id or "",
            "UUID": hardware.uuid or "",
            "Exported": moment(manifest.export_timestamp or ""),
            "CPUs": _join(str(hardware.cpus), cores),
            "Memory": size(hardware.memory_mib << 20),
            "Firmware": _join(firmware.get(hardware.firmware), *(name for name, there in extras if there)),
            "Operating system": hardware.os or "",
        }
    if domain:
        after = {"Name": domain.name, "Platform": f"libvirt, {domain.uri}", "UUID": domain.uuid}
        if source is not None:
            after |= {"CPUs": "unchanged", "Memory": "unchanged"}
        after["Devices"] = "virtio disks, virtio network cards"
        if fix is not None and fix.machine is not None:
            after["Devices"] = fix.machine.title
        elif fix is not None and fix.compatible:  # a report from before the machine was recorded
            after["Devices"] = "SATA disks, Intel network cards"
    if inspect:
        after |= {
            "Firmware": firmware.get(inspect.firmware, inspect.firmware),
            "Operating system": inspect.title,
        }
    rows = [(label, escaped(before.get(label, ""), "\n\t"), after.get(label, "")) for label in {**before, **after}]
    return [row for row in rows if row[1] or row[2]]


def _cards(hardware: Hardware) -> list[tuple[str, str, str, str]]:
    """The network cards: (MAC, network, model, slot), as far as they are known."""
    return [
        (
            card.mac or "",
            escaped(card.network or "", "\n\t"),
            escaped(card.model or "", "\n\t"),
            str(card.pci_slot or ""),
        )
        for card in hardware.cards
    ]


def _run_by(report: Report) -> str:
    host = report.host
    if not host.user:  # a report from before this was recorded
        return ""
    by = "the daemon" if host.started_by == "daemon" else "a command"
    login = f" of {host.login_user}" if host.login_user else ""
    return f"{by}{login}, with the rights of {host.user}"


def _picture(screen: bytes | None) -> tuple[str, int, int] | None:
    """A PNG as a data URI, its width and its height."""
    if screen is None or not screen.startswith(_PNG) or len(screen) < 24:
        return None
    width, height = struct.unpack(">II", screen[16:24])
    if not (0 < width <= _SCREEN_LIMIT and 0 < height <= _SCREEN_LIMIT):
        return None
    return f"data:image/png;base64,{base64.b64encode(screen).decode()}", width, height


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested tables, each with its path."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def _join(*words: str | None) -> str:
    return ", ".join(word for word in words if word)


def _mark(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit and seconds % unit == 0:
            return f"{seconds / unit:g} {name}"
    return f"{seconds:g} s"


def _instant(timestamp: str) -> datetime | None:
    """A timestamp in UTC, None for what is none."""
    try:
        at = datetime.fromisoformat(timestamp)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
