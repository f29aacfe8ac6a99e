"""One migration, from claim to report: what `hyper2kvmd run-job` does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shlex
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import structlog

from hyper2kvmd import journal
from hyper2kvmd.authoring.accepted import manifest_of
from hyper2kvmd.errors import MEANING, Cancelled, Code, Finding, MigrationError, Outcome, SettingsError
from hyper2kvmd.exits import EXIT_BUSY, EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_MANIFEST, EXIT_TEMPORARY
from hyper2kvmd.files import OURS, explained, timestamp, trouble, user_name, write_durably
from hyper2kvmd.job import steps
from hyper2kvmd.job.beacon import Beacon
from hyper2kvmd.job.context import Job, finding_records, job_id
from hyper2kvmd.job.events import CHOICES, Emitter
from hyper2kvmd.job.pipeline import migrate
from hyper2kvmd.job.request import Request
from hyper2kvmd.job.supervise import overseen
from hyper2kvmd.job.undo import is_imported, undo
from hyper2kvmd.manifest import Manifest
from hyper2kvmd.messages import Kind
from hyper2kvmd.queue import estimate, facts, requests
from hyper2kvmd.queue.asked import Asked, kept, unusable
from hyper2kvmd.queue.claim import Claim, unwritable
from hyper2kvmd.queue.estimate import Sample, kind_and_bytes
from hyper2kvmd.queue.export import Export
from hyper2kvmd.queue.names import CANCEL, LOG, REPORT
from hyper2kvmd.queue.placement import placement
from hyper2kvmd.queue.plans import plan_file
from hyper2kvmd.queue.state import FINAL, JITTER, Facts, State, request_error, state_of
from hyper2kvmd.report.model import ErrorRecord, EstimateRecord, HostRecord, ManifestRecord, Report
from hyper2kvmd.report.sign import NAMESPACE, SETTING, sign
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.load import overridden
from hyper2kvmd.settings.model import Settings

log = structlog.get_logger()

_NOBODY = 2**32 - 1

EXIT_OF = {
    "succeeded": EXIT_DONE,
    "failed": EXIT_FAILED,
    "cancelled": EXIT_FAILED,
    "blocked": EXIT_FAILED,
    "rejected": EXIT_MANIFEST,
    "retrying": EXIT_TEMPORARY,
}


def run_job(claim: Claim, settings: Settings, tools: Tools, events: Emitter, request: Request) -> int:
    """Migrate an export that was claimed and return the exit status. Whatever happens to it, its report is written."""
    export = claim.export
    began = time.time()
    request, settings, unknown = _as_asked(export, request, settings)
    # What the daemon saw may be over since: only what is found under the claim counts.
    look = replace(facts.look(export.directory, settings), held=False)
    if request.planned not in (None, look.plan.digest):
        claim.interrupted()
        events.emit("finished", status="nothing")
        print(
            f"{export.directory}: the plan of the VM in {settings.plan_dir} is not the one on {request.submitted_by};"
            " put plan_dir on storage that all hosts share",
            file=sys.stderr,
        )
        return EXIT_CONFIG
    request, settings, mistake = as_planned(look, export, request, settings)
    unknown = unknown or mistake
    state, finding = state_of(look, settings, began, any_time=not request.if_ready)
    # Written to since it was seen; or this host is to start no job, and what placed it here did not know.
    if request.if_ready and (state in (State.INCOMPLETE, State.WAITING) or requests.draining(settings)):
        claim.interrupted()
        events.emit("finished", status="nothing")
        return EXIT_TEMPORARY
    wanted = requests.pending(export.fd)
    job = Job(
        job_id(export.directory, look.manifest_sha256 or ""),
        export,
        claim.attempt,
        request,
        settings,
        tools,
        events,
    )
    if wanted == "cancel" and state not in FINAL and is_imported(job):
        claim.fulfil(CANCEL)  # which came too late: the VM runs
        wanted = None
    given_up = wanted == "cancel" and state not in (State.SUCCEEDED, State.FAILED, State.REJECTED)
    if state in FINAL and not request.dry_run and not given_up:
        claim.interrupted()
        claim.fulfil(CANCEL)  # which came too late
        # What a runner that died right after its report could not remove any more.
        if state == State.SUCCEEDED or not steps.unfinished(job.work_dir):
            steps.abandon(job.work_dir)
        found = {} if finding is None else finding.as_json()
        events.emit("finished", status="nothing", **found)
        print(f"{export.directory}: {state} already" + (f": {finding}" if finding else ""), file=sys.stderr)
        return EXIT_DONE if state == State.SUCCEEDED else EXIT_BUSY
    structlog.contextvars.bind_contextvars(job_id=job.id, attempt=claim.attempt)
    journal.also_to(export.fd, LOG)
    _be_nice(settings, tools)
    beacon = Beacon(claim, None if request.submitted_by is None else settings)
    events.also = beacon.note
    try:
        return _run(job, claim, look, began, wanted, unknown, beacon)
    finally:
        beacon.close()


def _run(
    job: Job,
    claim: Claim,
    look: Facts,
    began: float,
    wanted: Literal["hold", "cancel"] | None,
    unknown: MigrationError | None,
    beacon: Beacon,
) -> int:
    """Do the job, and conclude it.

    wanted: what a person asks for. unknown: why it is not known what was asked for, if it is not.
    """
    export, request, settings, events = job.export, job.request, job.settings, job.events
    manifest: Manifest | None = None
    error: MigrationError | None = None
    sources: tuple[str, ...] = ()
    try:
        events.emit("claimed", job=job.id, vm=export.directory.name, attempt=claim.attempt)
        beacon.show()
        log.info("claimed", kind=Kind.CLAIMED, export=str(export.directory))
        if wanted is not None and not request.dry_run:
            job.verdict = request_error(wanted)
            raise Cancelled
        if unknown is not None:
            raise unknown
        if claim.crashes >= settings.retry.max_attempts:
            raise MigrationError(
                Code.RUNNER_CRASHED,
                f"the runner died {claim.crashes} times in a row"
                + (f", at last {request.died}" if request.died else ""),
                "Look for the reason in the journal (out of memory? a crash of a library?); then `hyper2kvmctl retry`.",
            )
        name, data = facts.find_manifest(export.fd, export.directory, settings)
        if hashlib.sha256(data).hexdigest() != look.manifest_sha256:  # replaced just now; the next look begins again
            raise Cancelled
        with overseen(job, beacon.show):
            manifest = _manifest(job, name, data)
            structlog.contextvars.bind_contextvars(vm=manifest.vm_name)
            events.emit("manifest", vm=manifest.vm_name, tags=manifest.tags)
            sources = migrate(job, claim, manifest)
    except Cancelled:
        if job.verdict is not None and job.verdict.code != Code.HELD:
            return _conclude(job, claim, manifest, look, began, job.verdict, sources)
        claim.interrupted()
        stopped = job.verdict or MigrationError(Code.INTERRUPTED, "the job was stopped", "Start it again; it resumes.")
        events.emit("finished", status="interrupted", **stopped.finding().as_json())
        log.info("interrupted; the next attempt resumes it", kind=Kind.INTERRUPTED)
        return EXIT_TEMPORARY
    except MigrationError as problem:
        error = _arriving(job, look, problem) or problem
    except OSError as problem:
        error = _from_os(problem)
    except Exception as problem:  # the only one: a defect ends the job, with its trace in the journal
        log.exception("defect")
        error = MigrationError(
            Code.INTERNAL,
            f"{type(problem).__name__}: {problem}",
            "This is a defect in hyper2kvmd; please report it with the trace from the journal.",
        )
    return _conclude(job, claim, manifest, look, began, error, sources)


def _manifest(job: Job, name: str, data: bytes) -> Manifest:
    """The manifest that the file `name` holds, or one made of it. Raise MigrationError, OSError or Cancelled."""

    def tell(file: str, ratio: float) -> None:
        if job.tools.cancel.is_set():
            raise Cancelled
        job.reporting[f"reading {file}"] = time.monotonic()  # storage that hangs is no reason to wait for ever

    pipeline = job.request.pipeline(job.settings.pipeline)
    try:
        return manifest_of(
            *(job.export, name, data, job.settings, job.tools),
            pipeline=pipeline,
            vm_name=job.request.vm_name,
            on_progress=tell,
        )
    finally:
        job.reporting.clear()


def _as_asked(export: Export, request: Request, settings: Settings) -> tuple[Request, Settings, MigrationError | None]:
    """The request and the settings with what was asked the last time, if that is wanted; or why it is not known."""
    if request.asked is not None:
        return request, settings, None
    try:
        asked = kept(export, settings.work_dir)
        if unknown := (asked.stages or frozenset()) - {*CHOICES}:
            raise unusable(export, f"names stages that do not exist: {', '.join(sorted(unknown))}")
        return replace(request, asked=asked), overridden(settings, asked.overrides), None
    except SettingsError as error:
        problem = unusable(export, f"asks for what this version does not know: {error}")
    except MigrationError as error:
        problem = error
    except OSError as error:
        problem = _from_os(error)
    return replace(request, asked=Asked()), settings, problem


def as_planned(
    look: Facts, export: Export, request: Request, settings: Settings
) -> tuple[Request, Settings, MigrationError | None]:
    """The request and the settings with what rules and the plan say of this VM, and what is wrong with the plan.

    A person's word goes before both.
    """
    if look.plan_problem is not None:
        return request, settings, MigrationError(Code.PLAN_INVALID, look.plan_problem.message, look.plan_problem.hint)
    uri = placement(settings, export.directory.name, look).libvirt_uri
    elsewhere = [f"libvirt.uri={json.dumps(uri)}"] if uri != settings.libvirt.uri else []
    overrides = [*look.plan.overrides(settings), *elsewhere]
    asked = request.asked or Asked()
    if asked.vm_name is None and look.plan.name is not None:
        request = replace(request, asked=replace(asked, vm_name=look.plan.name))
    try:
        settings = overridden(settings, [*overrides, *asked.overrides]) if overrides else settings
    except SettingsError as error:
        path = plan_file(settings, export.directory.name)
        return request, settings, MigrationError(Code.PLAN_INVALID, f"{path}: {error}", "Correct the plan.")
    return request, settings, None


# What a disk looks like of which only the beginning is there.
_CUT_OFF = frozenset({Code.DISK_MISSING, Code.DISK_SIZE, Code.FORMAT_MISMATCH, Code.IMAGE_CORRUPT}) | {
    *(Code.CHECKSUM_MISMATCH, Code.SOURCE_CHANGED),
}


def _arriving(job: Job, before: Facts, error: MigrationError) -> MigrationError | None:
    """What is really wrong, if it is a disk that got longer since the job began: somebody is still copying it."""
    if error.code not in _CUT_OFF:
        return None
    sizes = dict(before.sizes)
    for path, size in facts.look(job.export.directory, job.settings).sizes:
        if size > sizes.get(path, 0):
            return MigrationError(
                Code.EXPORT_INCOMPLETE,
                f"{job.export.directory / path} is still being written: it had {sizes.get(path, 0)} bytes when the job"
                f" began, and has {size} now",
                "You need not do anything: the daemon retries it. Next time, copy the export beside exports_dir, and"
                " `mv` it in when it is complete.",
            )
    return None


def _be_nice(settings: Settings, tools: Tools) -> None:
    """Let the guests that run on this host go first; the tools inherit it."""
    if os.nice(0) < settings.limits.nice:
        os.nice(settings.limits.nice - os.nice(0))
    if settings.limits.io_class != "none":
        number = {"best-effort": "2", "idle": "3"}[settings.limits.io_class]
        level = ("-n", "7") if settings.limits.io_class == "best-effort" else ()
        tools.run("ionice", "-c", number, *level, "-p", str(os.getpid()), accept=range(256))


def _conclude(
    job: Job,
    claim: Claim,
    manifest: Manifest | None,
    look: Facts,
    began: float,
    error: MigrationError | None,
    sources: tuple[str, ...],
) -> int:
    """Write the report and say how the job ended."""
    settings, request = job.settings, job.request
    outcome = _outcome(error, claim.retries + 1, settings)
    if outcome == Outcome.CANCELLED and (kept := undo(job)):
        job.warn(kept)
    now = time.time()
    due = (
        now + settings.retry.delay(claim.retries + 1) * random.uniform(1, JITTER) if outcome == Outcome.RETRY else None
    )
    problems = finding_records(error.problems if error else ())
    dry_run = request.dry_run or (manifest is not None and manifest.options.dry_run)
    document = Report(
        status=outcome,
        dry_run=dry_run,
        job=job.id,
        vm_name=manifest.vm_name if manifest else None,
        manifest=ManifestRecord(
            name=look.manifest or "",
            sha256=look.manifest_sha256,
            dialect=manifest.dialect if manifest else None,
            made=manifest.made.document if manifest and manifest.made else None,
        ),
        attempts=claim.attempt,
        started_at=timestamp(began),
        finished_at=timestamp(now),
        seconds=round(now - began, 3),
        next_attempt_at=None if due is None else timestamp(due),
        error=None
        if error is None
        else ErrorRecord(
            **error.finding().as_json(), stage=job.record.failed_stage, tail=error.tail, problems=problems
        ),
        warnings=finding_records([*(manifest.warnings if manifest else ()), *job.record.warnings]),
        stages=tuple(job.record.stages),
        results=job.record.results.as_json(),
        disks=tuple(job.record.disks),
        changes=tuple(job.record.changes),
        domain=job.record.domain,
        tags=manifest.tags if manifest else {},
        plan=look.plan.model_dump(mode="json", exclude_unset=True),
        estimate=None if look.estimate is None else EstimateRecord(**look.estimate.as_json()),
        tools=job.record.tools,
        host=this_host("daemon" if request.if_ready else "command", request.submitted_by),
        overrides={
            **settings.pipeline.model_dump(by_alias=True, exclude_none=True),
            **({} if request.vm_name is None else {"vm_name": request.vm_name}),
        },
    )
    if not request.writes:
        claim.interrupted()  # asked for on the command line: the export stays as it was, to be migrated
    elif error is None or error.code != Code.CLAIM_LOST:
        document, signature = _signed(job, claim, document)
        try:
            _write_report(claim, manifest, document, signature)
        except (OSError, MigrationError) as problem:
            # No report, so the job is not over: the next attempt finds in the work directory what is done. The claim
            # can be lost here, too; then it is somebody else's job by now.
            lost = problem if isinstance(problem, MigrationError) else unwritable(job.export.directory, problem)
            job.events.emit("finished", status="unreported", **lost.finding().as_json())
            print(lost, file=sys.stderr)
            return EXIT_TEMPORARY
    _learn(settings.work_dir, look, document)
    # What is published without a domain is ours still, and the next attempt goes on with what is done.
    if outcome == Outcome.CANCELLED:
        claim.fulfil(CANCEL)
    elif error is None or (outcome != Outcome.RETRY and not steps.unfinished(job.work_dir)):
        steps.abandon(job.work_dir)
    if error is None and settings.cleanup_source:
        _remove_sources(job, sources)
    finished: dict[str, Any] = {"status": str(outcome), "seconds": document.seconds}
    if error is not None:
        finished["code"] = str(error.code)
        log.error(
            error.message,
            kind=Kind(outcome),
            error=str(error.code),
            hint=error.hint,
            outcome=str(outcome),
            stage=job.record.failed_stage,
            tail=error.tail,
        )
    else:
        log.info("succeeded", kind=Kind.SUCCEEDED, seconds=document.seconds, warnings=len(document.warnings))
    job.events.emit("finished", **finished, report=document.model_dump(mode="json"))
    return EXIT_OF[outcome]


def _learn(work_dir: Path, look: Facts, document: Report) -> None:
    """Keep what a whole migration took, for the estimates of others. What was resumed is only a part of one."""
    if document.status != "succeeded" or document.attempts > 1 or document.dry_run or not look.sizes:
        return
    took = {stage.name: stage.seconds for stage in document.stages if stage.status == "done" and stage.seconds}
    written = sum(disk.target_bytes or 0 for disk in document.disks)
    estimate.add(work_dir, Sample(*kind_and_bytes(look.sizes), written, document.seconds, took))


def this_host(started_by: Literal["daemon", "command"], submitted_by: str | None = None) -> HostRecord:
    """Where this process runs, and for whom."""
    # The kernel keeps this number through sudo and su; it is all ones where nobody logged in.
    login = _NOBODY
    with contextlib.suppress(FileNotFoundError):
        login = int(Path("/proc/self/loginuid").read_text())
    return HostRecord(
        name=socket.gethostname(),
        pid=os.getpid(),
        user=user_name(os.geteuid()),
        login_user=None if login == _NOBODY else user_name(login),
        started_by=started_by,
        submitted_by=submitted_by,
    )


def _remove_sources(job: Job, sources: Iterable[str]) -> None:
    """Delete the exported disks, now that the report says that they are published as something else."""
    if not all(disk.target for disk in job.record.disks):
        return  # nothing was converted
    for name in sources:
        try:
            os.unlink(name, dir_fd=job.export.fd)
            log.info("source removed", file=name)
        except OSError as error:
            log.warning("source cannot be removed", file=name, reason=error.strerror)


def _outcome(error: MigrationError | None, tries: int, settings: Settings) -> str:
    if error is None:
        return "succeeded"
    if error.outcome == Outcome.RETRY and tries >= settings.retry.max_attempts and not MEANING[error.code].patient:
        return str(Outcome.FAILED)
    return str(error.outcome)


def _signed(job: Job, claim: Claim, document: Report) -> tuple[Report, bytes | None]:
    """The report with its signature. One that cannot be signed says why: the migration is not undone for that."""
    key = job.settings.report.sign_key
    if key is None:
        return document, None
    try:
        # With tools of its own: those of the job end when that is stopped.
        return document, sign(Tools(claim.lock_fd), key, document.to_bytes())
    except (MigrationError, OSError) as problem:
        error = problem if isinstance(problem, MigrationError) else _from_os(problem)
        path = claim.export.directory / REPORT
        by_hand = ["ssh-keygen", "-Y", "sign", *("-n", NAMESPACE), *("-f", str(key)), str(path)]
        finding = Finding(
            "report_unsigned",
            f"the report is not signed: {error.message}",
            f"{error.hint} Then sign it by hand: `{shlex.join(by_hand)}`.",
            SETTING,
        )
        job.warn(finding)
        return document.model_copy(update={"warnings": (*document.warnings, *finding_records([finding]))}), None


def _write_report(claim: Claim, manifest: Manifest | None, document: Report, signature: bytes | None) -> None:
    """Write the report, and the copy that the manifest asks for."""
    if manifest is not None and manifest.options.report_path:
        name = manifest.options.report_path
        there = facts.read_report(claim.export.directory, name)
        ours = name.startswith(".") or (name != REPORT and OURS.fullmatch(name))
        if ours or (there is not None and "schema_version" not in there):
            log.warning("no extra copy of the report: the manifest gives it the name of another file", name=name)
        elif name != REPORT:
            write_durably(claim.export.fd, name, document.to_bytes(), document.attempts)
    claim.finish(document, signature)


def _from_os(error: OSError) -> MigrationError:
    """An error of the operating system as one of ours."""
    if trouble(error) == "full":
        return MigrationError(Code.NO_SPACE, explained(error), "Free some space there; the daemon retries the job.")
    return MigrationError(
        Code.IO_ERROR, explained(error), "Check that the path exists, its permissions and its storage."
    )
