"""What a fixer says it will do, what was done, and what was proved: the values that end up in the report."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hyper2kvmd.domain.model import Machine
from hyper2kvmd.errors import Finding
from hyper2kvmd.text import printable

DIFF_BYTES = 8192
_DIFF_LINES = 2000  # of a file that difflib compares


@dataclass(frozen=True)
class Edit:
    """A file that a fixer wants to change; `before` None creates it (and its directory), `after` None removes it.

    mode: of a file that is created, which belongs to root; one that exists keeps its owner, mode and labels.
    """

    fixer: str
    path: str
    before: str | None
    after: str | None
    summary: str
    evidence: str = ""
    mode: int = 0o644

    def done(self) -> Change:
        """The edit as a change that was made."""
        diff = unified_diff(self.path, self.before, self.after)
        return Change(self.fixer, self.path, self.summary, diff=diff, evidence=self.evidence)


@dataclass(frozen=True)
class Copy:
    """A file that a fixer wants to copy within the guest; the directory is made if it is missing."""

    fixer: str
    source: str
    path: str

    def done(self) -> Change:
        """The copy as a change that was made."""
        return Change(self.fixer, self.path, f"a copy of {self.source}")


@dataclass(frozen=True)
class Command:
    """A command that a fixer wants to run in the guest, as its root, with /bin/sh, after all edits and copies.

    path: what it changes for the most part. shown: what the report says instead, where `command` has a secret in it.
    """

    fixer: str
    path: str
    command: str
    summary: str
    shown: str = ""
    evidence: str = ""

    def done(self, output: str) -> Change:
        """The command as a change that was made; `output` is printable."""
        evidence = "\n".join(part for part in (self.evidence, output) if part)
        return Change(self.fixer, self.path, self.summary, command=self.shown or self.command, evidence=evidence)


@dataclass(frozen=True)
class Change:
    """One change inside the guest: a file with its unified diff, or a command that was run."""

    fixer: str
    path: str
    summary: str
    diff: str = ""
    command: str = ""
    evidence: str = ""

    def as_json(self) -> dict[str, str | None]:
        """The change as it stands in the report; what is empty is null."""
        return {key: value or None for key, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Named:
    """A place in the guest that names a device: what it said, what it says now, and which device that is.

    line: from 1, 0 where the file is not read by lines. use: a mount point, or a word of a kernel command line.
    device: as the appliance has it, "" if it is not there, or nobody can know it. proof: how that is known, or why not.
    """

    path: str
    line: int
    use: str
    before: str
    after: str
    device: str
    proof: str

    def shown(self, device: str) -> Named:
        """The place as the report has it: with a device as people know it, and what the guest wrote as text."""
        path, use, before, after, proof = map(printable, (self.path, self.use, self.before, self.after, self.proof))
        return Named(path, self.line, use, before, after, device, proof)


@dataclass(frozen=True)
class Proof:
    """One claim about the changed guest, whether it holds, and how we know."""

    subject: str  # a path in the guest
    claim: str
    ok: bool
    evidence: str


@dataclass(frozen=True)
class FixResult:
    """What was changed, and what was proved of the result.

    machine: what the guest was proved for. fstab: its text before and after. names: every device that the guest names.
    """

    changes: tuple[Change, ...]
    proofs: tuple[Proof, ...]
    drivers_injected: tuple[str, ...]
    boot_updated: bool
    machine: Machine
    fstab: tuple[str, str]
    warnings: tuple[Finding, ...]
    names: tuple[Named, ...] = ()


def unified_diff(path: str, before: str | None, after: str | None) -> str:
    """What became of a file, None where it is not there, as a unified diff in printable text, cut at 8 KiB."""
    old, new = (before or "").split("\n"), (after or "").split("\n")
    names = (f"a{path}" if before is not None else "/dev/null", f"b{path}" if after is not None else "/dev/null")
    if max(len(old), len(new)) > _DIFF_LINES:
        lines: Iterable[str] = (f"--- {names[0]}", f"+++ {names[1]}", *_hunks(old, new))
    else:
        lines = difflib.unified_diff(old, new, *names, lineterm="", n=1)
    text = "\n".join(printable(line, 400) for line in lines)
    return text if len(text) <= DIFF_BYTES else text[:DIFF_BYTES] + "\n[cut]"


def _hunks(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """What differs, place by place: for files in which difflib would search for hours for what has moved."""
    if len(old) == len(new):
        places = [(number, number + 1, number + 1) for number, line in enumerate(old) if line != new[number]]
    else:
        pairs = zip(old, new, strict=False)
        start = next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(old), len(new)))
        ends = zip(reversed(old[start:]), reversed(new[start:]), strict=False)
        same = next((number for number, (one, other) in enumerate(ends) if one != other),
                    min(len(old), len(new)) - start)  # fmt: skip
        places = [(start, len(old) - same, len(new) - same)]
    for start, end, new_end in places:
        yield f"@@ -{start + 1},{end - start} +{start + 1},{new_end - start} @@"
        yield from (f"-{line}" for line in old[start:end])
        yield from (f"+{line}" for line in new[start:new_end])


def decode(data: bytes) -> str:
    """A guest's file as text from which `encode` makes the very same bytes, whatever they were."""
    return data.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """The bytes of text that came from `decode`."""
    return text.encode("utf-8", "surrogateescape")
