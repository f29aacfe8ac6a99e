"""Slurm as an engine: sbatch, squeue, scancel and sinfo, each called once, bounded, and never believed unread."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hyper2kvmd.dispatch.engine import PREFIX, Handed, Submission
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.run import Done, Tools, environment, tail
from hyper2kvmd.settings.model import Dispatch
from hyper2kvmd.text import plain

OUTPUT_LIMIT = 64 << 20  # of squeue --json, which takes 2.5 KB a job in 22.05
CANCELLED_AT_ONCE = 1000  # identifiers in one call of scancel
PACKAGE = "slurm-client (Debian, Ubuntu) or slurm (EL, Fedora)"

# The whole environment of a job, with what libguestfs is told here. Not --export=NONE or NIL: with those, slurmd runs
# `su - USER` on the node, which the service's user need not survive, and drains the node for it if
# requeue_setup_env_fail is set.
_JOB_ENVIRONMENT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8")

# States of slurm(1) by what they mean to us. One that is suspended or completing has its host still.
_RUNNING = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}
)
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_OVER = frozenset(
    {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"}
    | {"OUT_OF_MEMORY", "LAUNCH_FAILED", "RECONFIG_FAIL", "REVOKED"}
)

# What a person should know of the words for why a job waits, where the word alone does not say it.
_REASONS = {
    "BeginTime": "it was requeued, and may start again soon: 2 minutes, unless slurm.conf has cred_expire",
    "JobHeldUser": "it is held; `scontrol release` it, or `scancel` it and it is submitted again",
    "JobHeldAdmin": "an administrator holds it",
    "Dependency": "another job of the same export is not over",
    "Licenses": "all of dispatch.slurm.licenses are taken",
    "Resources": "its place is not free yet",
    "Priority": "others go first",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionConfig": "the partition's nodes never have what dispatch asks for",
    "PartitionTimeLimit": "the partition does not allow its time",
    "PartitionNodeLimit": "the partition does not allow it",
    "AccountNotAllowed": "the partition does not take this account: set dispatch.slurm.account",
    "QOSNotAllowed": "the partition does not take this quality of service: set dispatch.slurm.qos",
    "BadConstraints": "no node can ever have what dispatch asks for",
    "ReqNodeNotAvail": "the nodes that it could use are down, drained or reserved",
    "NodeDown": "the nodes that it could use are down",
    "InvalidAccount": "the account is not valid: set dispatch.slurm.account",
    "InvalidQOS": "the quality of service is not valid: set dispatch.slurm.qos",
}

# What stands in Slurm's messages, and the setting that it is about; the first that fits. All but the two about qos and
# wckey, which take an accounting database, were provoked with 22.05.8; those are from its slurm_errno.c.
_REFUSALS: tuple[tuple[str, str], ...] = (
    ("Invalid account or account/partition", "dispatch.slurm.account"),
    ("Invalid qos", "dispatch.slurm.qos"),
    ("Invalid partition name", "dispatch.slurm.partition"),
    ("not permitted to use this partition", "dispatch.slurm.partition"),
    ("Invalid feature", "dispatch.slurm.features"),
    ("Invalid license", "dispatch.slurm.licenses"),
    ("Memory specification", "dispatch.memory_mb"),
    ("Memory required by task", "dispatch.memory_mb"),
    ("Invalid memory specification", "dispatch.memory_mb"),
    ("Temporary disk specification", "dispatch.scratch_mb"),
    ("More processors requested", "dispatch.cpus"),
    ("CPU count", "dispatch.cpus"),
)
# What passes by itself, or is no matter of one job: the controller, munge, limits on jobs at a time.
_PASSING = (
    "Unable to contact slurm controller", "Socket timed out", "Protocol authentication error", "Munge", "munge",
    "authentication credential", "Zero Bytes were transmitted", "Unexpected message received", "standby mode",
    "temporarily unable", "job submit limit", "Required partition not available", "Required node not available",
    "Unable to establish", "Connection refused", "Connection timed out", "No route to host", "Incompatible versions",
    "Could not establish a configuration source", "Insane message length", "try again",
)  # fmt: skip
_UNKNOWN_NODE = "Invalid node name"
_NO_NODE = "node configuration is not available"


@dataclass(frozen=True)
class Node:
    """A host as Slurm knows it. state: idle, mixed, allocated, drained, down and so on. responds: its slurmd does."""

    name: str
    state: str
    responds: bool
    reason: str
    cpus: int
    memory_mb: int
    free_mb: int | None
    features: tuple[str, ...]

    @property
    def trouble(self) -> Finding | None:
        """Why Slurm gives it no job, however long one waits; None if it does."""
        silent = "" if self.responds else ", and its slurmd does not answer"
        message = f"Slurm gives {self.name} no job: it is {self.state}{silent}"
        message += f" ({self.reason})" if self.reason else ""
        resume = f"run `scontrol update nodename={self.name} state=resume` as a Slurm administrator."
        if self.state.startswith("drain"):
            return Finding("host_drained", message, f"After you fix that, {resume}")
        if self.responds and self.state not in ("down", "unknown"):
            return None
        hint = (
            "On it, look at `systemctl status slurmd munge` and at their logs. It needs the munge.key and the"
            " slurm.conf of the controller, the same time, and TCP 6817 and 6818 open between them."
            f" If it stays down after that, {resume}"
        )
        return Finding("host_down", message, hint)


@dataclass(frozen=True)
class Slurm:
    """Hands jobs to Slurm by its commands. uid: whose jobs are ours."""

    dispatch: Dispatch
    uid: int = field(default_factory=os.geteuid)

    def submit(self, submission: Submission) -> str:
        """Hand over one job and return its number.

        Two of one name never run at once: whatever was submitted twice waits for the other to end.
        """
        words = self._request(submission)
        script = f"#!/bin/sh\nexec {shlex.join(submission.words)}\n".encode()
        exclude = submission.exclude
        done = self._sbatch(words, exclude, script)
        if done.returncode and _UNKNOWN_NODE in done.stderr and exclude:
            # It refuses to exclude what is no node: some other host of the exports directory.
            known = {node.name for node in self.nodes()}
            exclude = tuple(host for host in exclude if host in known)
            done = self._sbatch(words, exclude, script)
        if done.returncode:
            raise _failure("sbatch", done, excluded=exclude)
        if not (number := re.fullmatch(r"([0-9]+)(;\S*)?", done.stdout.strip())):
            raise _rubbish("sbatch", f"{plain(done.stdout, 200)!r} instead of a job's number")
        return number[1]

    def jobs(self) -> list[Handed]:
        """All jobs of ours that Slurm has and that are not over, by one call of squeue."""
        out = bytearray()

        def keep(data: bytes) -> None:
            out.extend(data)
            if len(out) > OUTPUT_LIMIT:
                raise _rubbish("squeue", f"more than {OUTPUT_LIMIT >> 20} MiB")

        # 22.05 prints all jobs of everybody with --json, later ones heed --me.
        done = self._run("squeue", "--json", "--me", on_output=keep)
        if done.returncode:
            raise _failure("squeue", done)
        try:
            told = json.loads(out)
            # With 22.05, a controller that is down is no error: status 0, and no jobs.
            if told.get("errors"):
                complaint = _complaint(told["errors"])
                if "Unspecified error" in complaint:
                    self.nodes()  # which says what is wrong
                raise _unavailable(f"squeue: {complaint}")
            return [job for each in told["jobs"] if (job := self._handed(each))]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            what = f"{len(out)} bytes that are not its JSON ({type(error).__name__}: {plain(str(error), 200)})"
            raise _rubbish("squeue", what) from None

    def cancel(self, ids: Sequence[str]) -> None:
        """Drop jobs that wait. One that runs by now is left alone, one that is over is no error."""
        for start in range(0, len(ids), CANCELLED_AT_ONCE):
            batch = ids[start : start + CANCELLED_AT_ONCE]
            done = self._run("scancel", "--state=PENDING", "--", *batch)
            if done.returncode and any(not _gone(line) for line in done.stderr.splitlines()):
                raise _failure("scancel", done)

    def nodes(self) -> list[Node]:
        """All nodes of the partition that jobs go to, by one call of sinfo; others are none of our business."""
        wanted = self.dispatch.slurm.partition
        only = [f"--partition={wanted}"] if wanted else []
        # No JSON: 22.05 prints nodes, and 23.11 sets of nodes that are alike. This has not changed since 2008.
        done = self._run("sinfo", "--Node", "--noheader", "--format=%P|%N|%T|%c|%m|%e|%f|%E", *only)
        if done.returncode:
            raise _failure("sinfo", done)
        nodes: dict[str, Node] = {}
        defaults: set[str] = set()  # nodes of the cluster's default partition, if it has one
        for line in done.stdout.splitlines():
            try:
                partition, name, state, cpus, memory, free, features, reason = line.split("|", 7)
                if partition.endswith("*"):
                    defaults.add(name)
                nodes[name] = Node(
                    name=name,
                    state=plain(state.rstrip("*~#!%$@^-+"), 40),
                    responds="*" not in state,
                    reason="" if reason == "none" else plain(reason, 200),
                    cpus=int(cpus),
                    memory_mb=int(memory),
                    free_mb=int(free) if free.isdecimal() else None,
                    features=() if features == "(null)" else tuple(features.split(",")),
                )
            except ValueError:
                raise _rubbish("sinfo", repr(plain(line, 200))) from None
        return [node for node in nodes.values() if wanted or not defaults or node.name in defaults]

    def _request(self, job: Submission) -> list[str]:
        """The options of sbatch. Its defaults are not relied on where they would carry this host to the node."""
        slurm = self.dispatch.slurm
        optional = {
            "partition": slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "tmp": f"{job.scratch_mb}M" if job.scratch_mb else None,
            "constraint": "&".join(job.features),
            "licenses": ",".join(job.licenses),
        }
        return [
            "--parsable",
            f"--job-name={job.name}",
            "--requeue",
            "--ntasks=1",
            f"--cpus-per-task={job.cpus}",
            f"--mem={job.memory_mb}M",
            # Only those that Slurm trusts may ask for less than 0.
            f"--nice={1000 - job.priority}",
            f"--output={escaped(job.log)}",
            "--open-mode=append",
            "--dependency=singleton",
            "--export=ALL",  # of what _sbatch gives it
            "--propagate=NONE",  # the limits of slurmd on the node, not those of this daemon
            "--chdir=/",
            *(f"--{name}={value}" for name, value in optional.items() if value),
        ]

    def _sbatch(self, words: Sequence[str], exclude: Sequence[str], script: bytes) -> Done:
        more = [f"--exclude={','.join(exclude)}"] if exclude else []
        libguestfs = [f"{name}={value}" for name, value in environment().items() if name.startswith("LIBGUESTFS_")]
        return self._run("sbatch", *words, *more, stdin=script, before=("env", "-i", *_JOB_ENVIRONMENT, *libguestfs))

    def _handed(self, job: dict[str, Any]) -> Handed | None:
        """What squeue says of a job, None if it is over or not ours. Raise TypeError or KeyError for rubbish."""
        name = job["name"]
        if not isinstance(name, str) or not name.startswith(PREFIX) or job["user_id"] != self.uid:
            return None
        words = job["job_state"]
        words = {words} if isinstance(words, str) else set(words)  # a list since 24.05
        state: Literal["waiting", "running"]
        if words & _RUNNING:
            state = "running"
        elif words & _WAITING:
            state = "waiting"
        elif words & _OVER:
            return None
        else:
            state = "running"  # a word of a later version: it has the job, and that is what counts
        host = job["nodes"] if state == "running" else ""
        if not isinstance(job["job_id"], int) or not isinstance(host, str):
            raise TypeError(f"job {job['job_id']!r} on {host!r}")
        if state == "running":
            return Handed(str(job["job_id"]), name, state, plain(host, 255))
        # A node could not start it, such as one that has an old job of its number since the controller lost its state.
        stuck = "launch failed" in str(job.get("state_description"))
        return Handed(str(job["job_id"]), name, state, reason=_reason(job), stuck=stuck)

    def _run(self, program: str, *words: str, before: Sequence[str] = (), stdin: bytes = b"", **more: Any) -> Done:
        """Run a command of Slurm's. Raise MigrationError if it is not there, or does not end in time."""
        path = shutil.which(program, path=environment()["PATH"])
        if path is None:
            raise MigrationError(
                Code.TOOL_MISSING,
                f"{program} is not installed, and dispatch.engine is slurm",
                f"Install {PACKAGE} on this host, with the cluster's slurm.conf and munge key.",
                field="dispatch.engine",
            )
        seconds = self.dispatch.timeout_seconds
        try:
            return Tools().run(*before, path, *words, accept=range(256), timeout=seconds, stdin=stdin, **more)
        except MigrationError as error:
            if error.code == Code.ENGINE_UNAVAILABLE:
                raise
            # Not the words of the command: a person wants to know what is wrong with the engine.
            late = "did not end within" in error.message
            what = f"did not answer within {seconds:g} s" if late else f"was ended: {error.message}"
            raise _unavailable(f"{program} {what}", error.tail) from None


def escaped(path: Path) -> str:
    """A path as --output takes it: % begins a pattern there, unless there is a backslash, which then quotes."""
    text = str(path)
    return text.replace("\\", "\\\\") if "\\" in text else text.replace("%", "%%")


def _gone(line: str) -> bool:
    return "Invalid job id specified" in line or "already completing or completed" in line


def _reason(job: dict[str, Any]) -> str:
    """Why a job waits: Slurm's word, and what it says besides or means."""
    word = str(job.get("state_reason") or "")
    if word in ("", "None"):
        return ""
    more = str(job.get("state_description") or "") or _REASONS.get(word, "")
    return plain(f"{word}: {more}" if more else word, 200)


def _complaint(errors: Any) -> str:
    """What stands in the errors of JSON, in one line."""
    first = errors[0]
    words = dict.fromkeys(str(first.get(key) or "") for key in ("source", "description", "error"))
    return plain(": ".join(word for word in words if word), 200)


def _said(done: Done) -> str:
    """What a command of Slurm's complains of, without its name."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in tail(done.stderr).splitlines()]
    return plain("; ".join(dict.fromkeys(line for line in lines if line)), 400) or "(no message)"


def _failure(program: str, done: Done, excluded: Sequence[str] = ()) -> MigrationError:
    """The error for a command that did not do what it was to do."""
    said = _said(done)
    if re.search(r"unrecognized option '?--(json|me)|JSON serializer|serializer plugin|Invalid option.*json", said):
        what = f"{program} cannot print JSON: {said}"
        remedy = "Slurm 21.08 or later is needed on this host, with its serializer/json plugin; see `squeue --version`."
        return MigrationError(Code.ENGINE_UNAVAILABLE, what, remedy, field="dispatch.engine", tail=tail(done.stderr))
    if program != "sbatch" or any(words in said for words in _PASSING):
        return _unavailable(f"{program}: {said}", tail(done.stderr))
    name = next((name for words, name in _REFUSALS if words in said), None)
    if name is None and _NO_NODE in said and excluded:
        # With these hosts it might be taken, and they come back: nothing for a person to change.
        what = f"Slurm has no node for it besides the excluded {', '.join(excluded)}: {said}"
        hint = "If you drained them, run `hyper2kvmctl resume --host HOST`."
        return MigrationError(Code.ENGINE_UNAVAILABLE, what, hint, field="dispatch.engine", tail=tail(done.stderr))
    remedy = (
        f"Set {name} to what the cluster has: see `scontrol show partition`, `scontrol show node`, `scontrol show lic`."
        if name
        else "Compare dispatch in the settings with `scontrol show partition` and `scontrol show node`, and submit"
        " something by hand as the service's user."
    )
    return MigrationError(Code.ENGINE_REFUSED, f"Slurm refuses: {said}", remedy, field=name, tail=tail(done.stderr))


def _unavailable(what: str, output: str = "") -> MigrationError:
    return MigrationError(
        Code.ENGINE_UNAVAILABLE,
        what,
        "Look at `scontrol ping`, and at slurmctld's log and munge's on the controller; on this host, at"
        " `systemctl status munge` and slurm.conf.",
        field="dispatch.engine",
        tail=output,
    )


def _rubbish(program: str, what: str) -> MigrationError:
    return MigrationError(
        Code.ENGINE_UNAVAILABLE,
        f"{program} printed {what}",
        f"Run `{program}` by hand as the service's user: its version and that of slurmctld have to fit.",
        field="dispatch.engine",
    )
