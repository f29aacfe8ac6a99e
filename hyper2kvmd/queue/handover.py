"""The queue of exporters that hand over by themselves: manifests are taken out of it, and become tickets.

Such an exporter copies its manifest there under a name that all its VMs share, and waits for a file named after the VM.
A ticket is that copy under a name of its own, so the next one overwrites nothing and a crash forgets nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import explained, fsync_directory
from hyper2kvmd.manifest import SIZE_LIMIT, ManifestError, parse
from hyper2kvmd.manifest.document import load
from hyper2kvmd.queue.access import open_shared
from hyper2kvmd.queue.export import is_export_name
from hyper2kvmd.queue.names import ANSWERED, TAKEN
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import show

NAME_LIMIT = 200  # bytes of a name that others are made from


@dataclass(frozen=True)
class Ticket:
    """A manifest that was taken out of the queue.

    `path` is where it is now; tickets sort by it as they came. `since`: when it was written, or taken, in seconds since
    the epoch. `name`: what the answer is called after. `directory`: the export that it means, or None if `problem`
    says why there is none.
    """

    path: Path
    answered: bool
    since: float
    name: str
    sha256: str
    directory: Path | None
    problem: Finding | None

    @property
    def number(self) -> int:
        """What it is sorted by."""
        return _number(self.path.name)


def take(queue: Path) -> None:
    """Take every manifest out of the queue. Raise OSError.

    It may be half-written; then its exporter goes on writing into the ticket.
    """
    with os.scandir(queue) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    manifests = sorted(name for name, is_dir in found if _MANIFEST.fullmatch(name) and not is_dir)
    last = max((_number(name) for name, _ in found), default=0)
    for name in manifests:
        last = max(time.time_ns(), last + 1)  # in order, whatever the clock does
        kept = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-150:]
        with contextlib.suppress(FileNotFoundError):  # taken by another thread
            os.rename(queue / name, queue / f"{TAKEN}{last:020}-{os.urandom(4).hex()}.{kept}")
    if manifests:
        fsync_directory(queue)


def tickets(settings: Settings) -> list[Ticket]:
    """The tickets, in the order in which they came; [] without a queue. Raise OSError."""
    queue = settings.hypersdk.queue_dir
    if queue is None:
        return []
    found = []
    for name in sorted(os.listdir(queue), key=_number):
        if _TICKET.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                found.append(_read(queue / name, settings))
    return found


def answered(ticket: Ticket) -> Path:
    """What a ticket is called whose exporter has the answer."""
    return ticket.path.with_name(ticket.path.name.replace(TAKEN, ANSWERED, 1))


_COPY = "Copy the manifest itself into the queue."
_MANIFEST = re.compile(r"(?!\.).*\.(json|ya?ml)", re.IGNORECASE | re.DOTALL)
_TICKET = re.compile(
    rf"({re.escape(TAKEN)}|{re.escape(ANSWERED)})(?P<number>\d{{20}})-[0-9a-f]{{8}}\.(?P<name>.+)", re.DOTALL
)


def _number(name: str) -> int:
    ticket = _TICKET.fullmatch(name)
    return int(ticket["number"]) if ticket else 0


def _read(path: Path, settings: Settings) -> Ticket:
    match = _TICKET.fullmatch(path.name)
    original = match["name"] if match else path.name
    data, since, problem = b"", 0.0, None
    try:
        with open(open_shared(path), "rb") as file:
            status = os.fstat(file.fileno())
            since = max(status.st_mtime, status.st_ctime)
            if stat.S_ISREG(status.st_mode):
                data = file.read(SIZE_LIMIT + 1)
            else:
                problem = Finding(Code.EXPORT_UNSAFE, f"{original} is not a regular file", _COPY)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            problem = Finding(Code.EXPORT_UNSAFE, f"{original} is a symbolic link", _COPY)
        else:
            hint = "Run the service by its unit, or give its user access; the daemon retries it."
            problem = Finding(Code.IO_ERROR, f"{explained(error, path)}: the manifest cannot be read", hint)
    name, directory = _stem(original), None
    if problem is None:
        roots = (settings.exports_dir, *settings.hypersdk.allowed_dirs)
        name, directory, problem = _read_manifest(data, original, roots)
    digest = hashlib.sha256(data).hexdigest()
    return Ticket(path, path.name.startswith(ANSWERED), since, name, digest, directory, problem)


@functools.lru_cache(maxsize=1024)  # looked at again and again, like the exports
def _read_manifest(data: bytes, name: str, roots: tuple[Path, ...]) -> tuple[str, Path | None, Finding | None]:
    """What the answer to a manifest is called, and the export that it means, or why it means none."""
    try:
        content = load(data, name)
        answer = _answer_name(content) or _stem(name)
    except ManifestError as error:
        return _stem(name), None, error.finding()
    try:
        return answer, export_of((disk.path for disk in parse(data, name).disks), roots), None
    except MigrationError as error:
        return answer, None, error.finding()


def _answer_name(content: object) -> str | None:
    """What the exporter waits for: the name of the VM as it stands there, or `vm` if there is none.

    None for a name that no file can have: then nobody waits.
    """
    source = content.get("source") if isinstance(content, dict) else None
    name = source.get("vm_name") if isinstance(source, dict) else None
    if name is None or name == "":
        return "vm"
    if not isinstance(name, str) or "/" in name or len(name.encode()) > NAME_LIMIT:
        return None
    return name


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def export_of(disks: Iterable[str], roots: tuple[Path, ...]) -> Path:
    """The export that the disks of a manifest in the queue lie in: a directory in one of `roots`, as they are spelt.

    By the paths alone: they may name anything, such as a file server that is gone. Raise MigrationError.
    """
    directories = {}
    for disk in disks:
        if not disk.startswith("/"):
            raise _refused(
                f"the disk {show(disk)} has no directory, so it cannot be known which export the manifest is a copy of",
                "Have the exporter write absolute paths.",
            )
        directories[PurePosixPath(disk).parent] = disk
    if len(directories) > 1:
        first, second = [*directories.values()][:2]
        raise _refused(
            f"the disks {show(first)} and {show(second)} lie in different directories",
            "An export is one directory: export the VM again, with all its disks into one.",
        )
    directory = directories.popitem()[0]
    for root in roots:
        if PurePosixPath(root) == directory.parent and is_export_name(directory.name):
            return root / directory.name
    raise _refused(
        f"the disks lie in {show(str(directory))}, which is no directory of {' or '.join(map(str, roots))}",
        f"Export into a directory there, or add {show(str(directory.parent))} to hypersdk.allowed_dirs, spelt as here.",
        "hypersdk.allowed_dirs",
    )


def _refused(message: str, hint: str, field: str | None = None) -> MigrationError:
    return MigrationError(Code.EXPORT_UNSAFE, message, hint, field=field)
