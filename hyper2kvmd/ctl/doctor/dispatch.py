"""The check of what places jobs on hosts: a job that changes nothing is sent to every host, and comes back."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper2kvmd import __version__
from hyper2kvmd.ctl.doctor.diagnosis import Diagnosis, Host
from hyper2kvmd.dispatch.engine import PREFIX, Engine, Submission
from hyper2kvmd.dispatch.engines import engine_of
from hyper2kvmd.dispatch.slurm import Slurm
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import user_name
from hyper2kvmd.queue.hosts import make_directory, wrong_clock
from hyper2kvmd.queue.names import HOSTS
from hyper2kvmd.settings.model import Settings

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.5
_LIMIT = 1 << 16


@dataclass(frozen=True)
class _Trial:
    """A job that was sent, where it should run ("" for anywhere), and the file that it answers in."""

    id: str
    host: str
    answer: Path


def check_dispatch(host: Host, diagnosis: Diagnosis) -> str:
    """Whether the engine answers, and every host of it can do a job."""
    settings = host.settings
    engine = engine_of(settings)
    if engine is None:
        return "dispatch.engine is local: each daemon runs its jobs itself"
    engine.jobs()
    make_directory(settings)
    token = secrets.token_hex(4)
    mark = settings.exports_dir / HOSTS / f".doctor-{token}"
    mark.touch(0o644)
    trials: list[_Trial] = []
    try:
        trials += _send(engine, settings, token, mark, diagnosis)
        answers = _wait(engine, trials, diagnosis)
    finally:
        engine.cancel([trial.id for trial in trials])
        for path in (mark, *(trial.answer for trial in trials)):
            path.unlink(missing_ok=True)
    good = [said["host"] for trial, said in answers if _judge(trial, said, settings, diagnosis)]
    if not good and not diagnosis.errors:
        message = "no host has done the job that was sent"
        diagnosis.errors.append(MigrationError(Code.ENGINE_UNAVAILABLE, message, "See the warnings, then try again."))
    return f"{settings.dispatch.engine}: {', '.join(sorted(good))} can do jobs"


def _send(engine: Engine, settings: Settings, token: str, mark: Path, diagnosis: Diagnosis) -> list[_Trial]:
    """Send a job to every host; to any host, where the engine does not say which there are."""
    hosts, useless = [""], dict[str, Finding]()
    if isinstance(engine, Slurm):
        nodes = engine.nodes()
        # Without a node, such as for a partition that does not exist, sbatch says why.
        hosts = [node.name for node in nodes] or [""]
        useless = {node.name: trouble for node in nodes if (trouble := node.trouble) is not None}
    sent = []
    for number, name in enumerate(hosts):
        if (trouble := useless.get(name)) is not None:
            if trouble.code == "host_drained":  # which a person wanted
                diagnosis.warnings.append(trouble)
            else:
                diagnosis.errors.append(MigrationError(Code.ENGINE_UNAVAILABLE, trouble.message, trouble.hint))
            continue
        answer = mark.with_name(f"doctor-{token}-{number}.out")
        submission = Submission(
            name=f"{PREFIX}doctor-{token}-{number}",
            words=(*settings.dispatch.program, "check-host", str(mark)),
            log=answer,
            cpus=1,
            memory_mb=64,
            priority=1000,
            exclude=tuple(other for other in hosts if other != name),
        )
        try:
            sent.append(_Trial(engine.submit(submission), name, answer))
        except MigrationError as error:
            where = f"{name}: " if name else ""
            diagnosis.errors.append(MigrationError(error.code, f"{where}{error.message}", error.hint))
    return sent


def _wait(engine: Engine, trials: Sequence[_Trial], diagnosis: Diagnosis) -> list[tuple[_Trial, dict[str, Any]]]:
    """The answers that come within WAIT_SECONDS."""
    answers: dict[str, tuple[_Trial, dict[str, Any]]] = {}
    deadline = time.monotonic() + WAIT_SECONDS
    there = {job.id: job for job in engine.jobs()}
    while True:
        for trial in trials:
            if trial.id not in answers and (said := _answer(trial.answer)) is not None:
                answers[trial.id] = (trial, said)
        if len(answers) == len(trials) or not there or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
        ids = {trial.id for trial in trials} - {*answers}
        there = {job.id: job for job in engine.jobs() if job.id in ids}
    for trial in trials:
        if trial.id in answers:
            continue
        name, job = trial.host or "the engine", there.get(trial.id)
        if job is not None:
            what = f"its job {'waits' if job.state == 'waiting' else 'runs'} still after {WAIT_SECONDS:g} s"
            what += f": {job.reason}" if job.reason else ""
            hint = (
                "A host that is busy answers later."
                if job.state == "waiting"
                else "Look at the engine's log on that host: for Slurm, `journalctl -u slurmd -u munge`. Its clock or"
                " its munge.key may differ from the controller's."
            )
            diagnosis.warn("host_silent", f"{name}: {what}", hint)
            continue
        text = _text(trial.answer)
        us = os.geteuid()
        hint = (
            "On that host, install hyper2kvmd (dispatch.program is its name), mount the exports directory at the"
            f" same path, and see that `id {user_name(us)}` shows the number {us}, as here, and the same groups."
        )
        what = f"its job ended and said {text!r}" if text else "its job ended and left nothing in the exports directory"
        diagnosis.errors.append(MigrationError(Code.TOOL_FAILED, f"{name}: {what}", hint))
    return [*answers.values()]


def _judge(trial: _Trial, said: dict[str, Any], settings: Settings, diagnosis: Diagnosis) -> bool:
    """Whether the host that answered can do jobs."""
    host, found, mine = said["host"], [], user_name(os.geteuid())
    if said["version"] != __version__:
        hint = "Install the same version everywhere; two that differ in the first two numbers do not work together."
        found.append((f"has hyper2kvmd {said['version']}, and this host {__version__}", hint))
    if said["uid"] != os.geteuid():
        hint = "Give the service's user the same number on all hosts: its locks and files belong to that."
        found.append((f"runs jobs as user {said['uid']}, and this host as {os.geteuid()}", hint))
    elif (user := said.get("user", mine)) != mine:
        knows = "has no user of that number" if user == str(said["uid"]) else f"calls that user {user}"
        hint = f"Give {mine} the same number on all hosts: its locks and files belong to that."
        found.append((f"runs jobs as user {said['uid']}, which is {mine} here, but {knows}", hint))
    if not said["shared"]:
        hint = "Mount the same file system there, at the same path, and set exports_dir in its settings."
        found.append((f"does not see this host's {settings.exports_dir}, or has another exports_dir", hint))
    found += [(problem["message"], problem["hint"]) for problem in said["problems"]]
    for what, hint in found:
        diagnosis.errors.append(MigrationError(Code.TOOL_FAILED, f"{host} {what}", hint))
    with contextlib.suppress(KeyError, TypeError):  # which another version may not say
        if (clock := wrong_clock(host, said["clock"] - said["written"])) is not None:
            diagnosis.warnings.append(clock)
    if trial.host and trial.host != host:
        hint = "hyper2kvmctl compares hosts by name: have `hostname` say what slurm.conf calls the node."
        diagnosis.warn("host_name", f"Slurm's node {trial.host} calls itself {host}", hint)
    return not found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_LIMIT).decode(errors="replace").strip()[-300:]
    except OSError:
        return ""


def _answer(path: Path) -> dict[str, Any] | None:
    """What `hyper2kvmd check-host` said, once it is there as a whole."""
    try:
        lines = path.read_bytes()[:_LIMIT].splitlines()
        said = json.loads(lines[-1]) if lines else None
        written = path.stat().st_mtime
    except (OSError, ValueError):
        return None
    wanted = {"host", "version", "uid", "shared", "problems"}
    return {**said, "written": written} if isinstance(said, dict) and wanted <= {*said} else None
