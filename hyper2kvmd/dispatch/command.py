"""Programs of the administrator's as an engine: words from the settings, filled in, without a shell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hyper2kvmd.dispatch.engine import PREFIX, Handed, Submission
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.run import Done, Tools, tail
from hyper2kvmd.settings.model import PLACEHOLDER, Dispatch
from hyper2kvmd.text import plain

OUTPUT_LIMIT = 64 << 20
REFUSED = 2  # the exit status of `submit` for a job that it does not take
_ID = re.compile(r"[^\s-]\S{0,254}")  # a word that no program takes for an option


@dataclass(frozen=True)
class Command:
    """Hands jobs to the programs of dispatch.command; its descriptions are the contract."""

    dispatch: Dispatch

    def submit(self, submission: Submission) -> str:
        """Hand over one job and return the identifier that the program printed."""
        values = {
            "name": submission.name,
            "log": str(submission.log),
            "cpus": str(submission.cpus),
            "memory_mb": str(submission.memory_mb),
            "scratch_mb": str(submission.scratch_mb),
            "priority": str(submission.priority),
            "features": ",".join(submission.features),
            "licenses": ",".join(submission.licenses),
            "exclude": ",".join(submission.exclude),
        }
        done = self._run("submit", filled(self.dispatch.command.submit, values, submission.words))
        last = (done.stdout.strip().splitlines() or [""])[-1].strip()
        if not (_ID.fullmatch(last) and last.isprintable()):
            raise _rubbish("submit", last, "The last line has to be the identifier of the job, one word.")
        return last

    def jobs(self) -> list[Handed]:
        """All jobs of ours that the program lists."""
        lines = self._run("list", self.dispatch.command.list).stdout.splitlines()
        return [job for line in lines if line.strip() and (job := _handed(line))]

    def cancel(self, ids: Sequence[str]) -> None:
        """Drop jobs that wait, one after the other."""
        for id in ids:
            self._run("cancel", filled(self.dispatch.command.cancel, {"id": id}))

    def _run(self, which: Literal["submit", "list", "cancel"], words: Sequence[str]) -> Done:
        """Run one of the three. Raise MigrationError if it fails, hangs, or is not there."""
        setting = f"dispatch.command.{which}"
        out = bytearray()

        def keep(data: bytes) -> None:
            out.extend(data)
            if len(out) > OUTPUT_LIMIT:
                raise _unavailable(which, f"{words[0]} printed more than {OUTPUT_LIMIT >> 20} MiB")

        seconds = self.dispatch.timeout_seconds
        try:
            done = Tools().run(*words, accept=range(256), timeout=seconds, on_output=keep)
        except MigrationError as error:
            if error.code == Code.ENGINE_UNAVAILABLE:
                raise
            late = "did not end within" in error.message
            what = f"did not end within {seconds:g} s" if late else f"was ended: {error.message}"
            raise _unavailable(which, f"{words[0]} {what}", error.tail) from None
        if done.returncode in (126, 127) and "setpriv: failed to execute" in done.stderr:
            raise MigrationError(
                Code.TOOL_MISSING,
                f"{words[0]} cannot be run: {done.stderr.strip().rpartition(': ')[2]}",
                f"Set {setting} to a program that is there, and that the service's user may execute.",
                field=setting,
            )
        if done.returncode:
            said = plain((tail(done.stderr).splitlines() or ["(no message)"])[-1], 400)
            if which == "submit" and done.returncode == REFUSED:
                remedy = f"Change what it asks for in dispatch, or what {words[0]} takes."
                message = f"{words[0]} does not take the job: {said}"
                raise MigrationError(Code.ENGINE_REFUSED, message, remedy, field=setting, tail=tail(done.stderr))
            raise _unavailable(which, f"{words[0]} exited {done.returncode}: {said}", tail(done.stderr))
        return Done(0, out.decode(errors="replace"), done.stderr)


def filled(template: Sequence[str], values: Mapping[str, str], words: Sequence[str] = ()) -> list[str]:
    """The words of a template with its placeholders filled in; what was filled in is not looked at again."""
    result: list[str] = []
    for word in template:
        if word == "{words}":
            result += words
        else:
            result.append(PLACEHOLDER.sub(lambda found: values[found[1]], word))
    return result


def _handed(line: str) -> Handed | None:
    """What a line of `list` says, None if it is about somebody else's job."""
    id, name, state, more = [*line.split(maxsplit=3), "", "", "", ""][:4]
    if not (_ID.fullmatch(id) and line.isprintable() and state in ("waiting", "running")):
        raise _rubbish("list", line, "A line has an identifier, a name, and `running` and a host, or `waiting`.")
    if not name.startswith(PREFIX):
        return None
    if state == "waiting":
        return Handed(id, name, "waiting", reason=plain(more.strip(), 200))
    if len(more.split()) > 1:
        raise _rubbish("list", line, "After `running`, there is the name of the host and nothing else.")
    return Handed(id, name, "running", host=plain(more.strip(), 255))


def _rubbish(which: str, line: str, remedy: str) -> MigrationError:
    return MigrationError(
        Code.ENGINE_UNAVAILABLE,
        f"dispatch.command.{which} printed {plain(line, 200)!r}",
        remedy,
        field=f"dispatch.command.{which}",
    )


def _unavailable(which: str, what: str, output: str = "") -> MigrationError:
    return MigrationError(
        Code.ENGINE_UNAVAILABLE,
        what,
        f"Run the words of dispatch.command.{which} by hand as the service's user; the daemon retries it.",
        field=f"dispatch.command.{which}",
        tail=output,
    )
