"""`hyper2kvmctl manifest`: make manifests, fix them, and bring them from one dialect to the other."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper2kvmd.authoring import rewrite
from hyper2kvmd.ctl.manifest.create import FORMATS, create
from hyper2kvmd.ctl.output import agreed, bars, print_json, print_warnings, refuse_existing, say
from hyper2kvmd.errors import Code, Collected, Finding, MigrationError
from hyper2kvmd.exits import EXIT_BUSY, EXIT_DONE, EXIT_FAILED, EXIT_MANIFEST, EXIT_NOT_FOUND, EXIT_USAGE
from hyper2kvmd.files import open_directory, write_durably
from hyper2kvmd.image.source import check_unchanged, open_sources, sha256
from hyper2kvmd.manifest import Manifest, document, parse, wire
from hyper2kvmd.queue.claim import probe
from hyper2kvmd.queue.export import beside
from hyper2kvmd.queue.facts import read_manifest
from hyper2kvmd.queue.names import REPORT
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

_MANIFEST_CODES = (Code.MANIFEST_INVALID, Code.MANIFEST_UNREADABLE)

_Command = Callable[[argparse.Namespace, Settings], int]


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands to the parser."""
    group = commands.add_parser("manifest", help="create, fix and convert manifests")
    actions = group.add_subparsers(dest="action", required=True)

    make = actions.add_parser("create", help="make a manifest from disk files, a directory, an .ovf or an OVA")
    make.add_argument(
        "sources", nargs="+", type=Path, metavar="SOURCE", help="disk files of one VM, a directory, an .ovf or an OVA"
    )
    make.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the manifest (default: manifest.json beside the disks)"
    )
    make.add_argument("--name", metavar="VM", help="the VM's name (default: what an .ovf says, or the source's name)")
    make.add_argument("--format", choices=("json", "yaml"), help="default: by the name of FILE, or json")
    make.add_argument("--dialect", choices=("seed", "go"), default="seed", help="dialect of the keys (default: seed)")
    make.add_argument(
        "--checksum",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute the checksums, which reads every disk (default)",
    )
    make.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="unpack an OVA there, or disks that an .ovf has compressed or in chunks; it must not exist, or be empty",
    )
    make.set_defaults(run=_reported(create))

    hash_ = actions.add_parser("rehash", help="compute the checksums of a manifest's disks, and update the manifest")
    move = actions.add_parser("relocate", help="replace the leading directory of the disks' paths")
    move.add_argument("old", metavar="OLD", help="the leading directory that the paths have")
    move.add_argument("new", metavar="NEW", help="the new leading directory")
    for parser, run in ((hash_, _rehash), (move, _relocate)):
        parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="path of the manifest")
        parser.add_argument("--yes", action="store_true", help="do not ask")
        parser.set_defaults(run=_reported(run))

    schema = actions.add_parser("schema", help="print the JSON Schema of manifests")
    schema.set_defaults(run=_schema)

    upgrade = actions.add_parser("upgrade", help="convert a manifest to the other dialect")
    upgrade.add_argument("manifest", type=Path, metavar="MANIFEST", help="path of the manifest")
    upgrade.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="a new file (default: print it); JSON or YAML by its name"
    )
    upgrade.add_argument("--dialect", choices=("seed", "go"), help="default: the one that it is not in")
    upgrade.set_defaults(run=_reported(_upgrade))
    return [make, hash_, move, schema, upgrade]


def _reported(command: _Command) -> _Command:
    """The command, with everything that can be wrong on standard error, and an exit status for it."""

    def run(options: argparse.Namespace, config: Settings) -> int:
        try:
            return command(options, config)
        except MigrationError as error:
            if not error.problems:
                raise
            where = f"{options.manifest}: " if "manifest" in options else ""
            for finding in error.problems:
                print(f"hyper2kvmctl: {where}{finding}", file=sys.stderr)
            return EXIT_MANIFEST if any(found.code in _MANIFEST_CODES for found in error.problems) else EXIT_FAILED

    return run


# rehash, relocate -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A manifest as a file in an open directory: its bytes, the document in it, and what that says."""

    path: Path
    dir_fd: int
    data: bytes
    document: rewrite.Document
    manifest: Manifest


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_File]:
    """Raise ManifestError, or MigrationError if it is no file."""
    with beside(path) as export:
        _, data = read_manifest(export.fd, path.parent, (path.name,))
        yield _File(path, export.fd, data, document.load(data, path.name), parse(data, path.name))


def _rehash(options: argparse.Namespace, config: Settings) -> int:
    with _opened(options.manifest) as file:
        if probe(file.dir_fd)[0]:
            return _busy(file)
        measured = _measure(file)
        changed, changes = rewrite.rehash(file.document, measured)
        return _replace(options, file, changed, changes, ())


def _measure(file: _File) -> list[rewrite.Measured]:
    """Look at every disk of the manifest. Raise MigrationError with all that is wrong, or OSError."""
    measured, noted = list[rewrite.Measured](), Collected()
    # With a checksum, a wrong size is no error but a warning: here both are to be corrected.
    disks = [disk.model_copy(update={"sha256": disk.sha256 or "0" * 64}) for disk in file.manifest.disks]
    with contextlib.ExitStack() as stack, bars() as tell:
        sources = open_sources(file.dir_fd, file.path.parent.resolve(), disks, stack, noted)
        noted.check()
        for source in sources:
            digest = sha256(source, threading.Event(), functools.partial(tell, source.disk.id))
            check_unchanged(source)
            wrong = any(finding.code == Code.DISK_SIZE for finding in source.warnings)
            measured.append(rewrite.Measured(digest, source.size if wrong else None))
    return measured


def _relocate(options: argparse.Namespace, config: Settings) -> int:
    with _opened(options.manifest) as file:
        if probe(file.dir_fd)[0]:
            return _busy(file)
        changed, changes = rewrite.relocate(file.document, options.old, options.new)
        if not changes:
            paths = ", ".join(plain(disk.path, 300) for disk in file.manifest.disks[:5])
            print(f"hyper2kvmctl: no disk in {file.path} lies in {options.old}: the paths are {paths}", file=sys.stderr)
            return EXIT_NOT_FOUND
        missing = [
            Finding(
                Code.DISK_MISSING,
                f"{plain(str(change.new), 200)} does not exist",
                "Copy the disk there, or relocate it once more.",
                change.field,
            )
            for change in changes
            if change.field.startswith("disks") and not os.path.lexists(file.path.parent / str(change.new))
        ]
        return _replace(options, file, changed, changes, missing)


def _replace(
    options: argparse.Namespace,
    file: _File,
    changed: rewrite.Document,
    changes: Sequence[rewrite.Rewritten],
    warnings: Sequence[Finding],
) -> int:
    """Show the changes, ask, and write them; the old file is kept beside the new one."""
    data = rewrite.dump(changed, file.path.name)
    parse(data, file.path.name)
    backup = None
    if file.path.suffix.lower() != ".json" and re.search(rb"(?m)(^|\s)#", file.data):
        lost = Finding(
            "comments", f"the comments in {file.path} are not kept", "The old file, which is kept, has them."
        )
        warnings = (*warnings, lost)
    if not options.json:
        print_warnings(warnings)
        for change in changes:
            old = "none" if change.old is None else plain(str(change.old), 200)
            say(f"{change.field}: {old} -> {plain(str(change.new), 200)}")
    changes = [change for change in changes if change.old != change.new]
    if changes:
        if not options.yes:
            if not sys.stdin.isatty():
                print("hyper2kvmctl: nothing was changed: there is nobody to ask; use --yes", file=sys.stderr)
                return EXIT_USAGE
            if not agreed(f"Change {file.path}?"):
                print("hyper2kvmctl: nothing was changed", file=sys.stderr)
                return EXIT_FAILED
        backup = _write(file, data)
    if options.json:
        print_json(
            {
                "manifest": str(file.path),
                "backup": backup,
                "changes": [{"field": change.field, "old": change.old, "new": change.new} for change in changes],
                "warnings": [finding.as_json() for finding in warnings],
            }
        )
    elif backup is None:
        say(f"{file.path}: nothing to change")
    else:
        say(f"{file.path}: changed; the old one is {backup}")
        if os.path.lexists(file.path.parent / REPORT):
            say("It has been migrated before: `hyper2kvmctl retry` has the new manifest taken.")
    return EXIT_DONE


def _write(file: _File, data: bytes) -> str:
    """Write the manifest durably, and return the name that the old one is kept under. Raise OSError."""
    if read_manifest(file.dir_fd, file.path.parent, (file.path.name,))[1] != file.data:
        raise MigrationError(
            Code.MANIFEST_CHANGED,
            f"{file.path} was changed by somebody else in the meantime",
            "Nothing was written. Look at it, and run the command again.",
        )
    taken = set(os.listdir(file.dir_fd))
    backup, number = f"{file.path.name}.bak", 0
    while backup in taken:
        number += 1
        backup = f"{file.path.name}.bak.{number}"
    write_durably(file.dir_fd, backup, file.data, os.getpid())
    write_durably(file.dir_fd, file.path.name, data, os.getpid())
    return backup


def _busy(file: _File) -> int:
    print(
        f"hyper2kvmctl: {file.path.parent}: a runner works on it; `hyper2kvmctl hold` or `cancel` stops it",
        file=sys.stderr,
    )
    return EXIT_BUSY


# schema, upgrade ------------------------------------------------------------------------------------------


def _schema(options: argparse.Namespace, config: Settings) -> int:
    shape = wire.Document.model_json_schema()
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **shape, "title": "Artifact Manifest 1.0"})
    return EXIT_DONE


def _upgrade(options: argparse.Namespace, config: Settings) -> int:
    with _opened(options.manifest) as file:
        dialect: rewrite.Dialect = options.dialect or ("go" if file.manifest.dialect == "seed" else "seed")
        changed, warnings = rewrite.upgrade(file.document, dialect)
    output: Path | None = options.output
    name = file.path.name if output is None else output.name
    if output is not None and output.suffix.lower() not in FORMATS:
        print(f"hyper2kvmctl: {output} does not end in .json, .yaml or .yml", file=sys.stderr)
        return EXIT_USAGE
    data = rewrite.dump(changed, name)
    parse(data, name)
    if output is not None:
        refuse_existing(output)
        fd = open_directory(output.parent.resolve())
        try:
            write_durably(fd, name, data, os.getpid())
        finally:
            os.close(fd)
    if options.json:
        print_json(
            {
                "dialect": dialect,
                "output": None if output is None else str(output),
                "manifest": changed,
                "warnings": [finding.as_json() for finding in warnings],
            }
        )
        return EXIT_DONE
    print_warnings(warnings)
    if output is None:
        sys.stdout.write(data.decode())
    else:
        say(f"{output}: {rewrite.CALLED[dialect]} dialect")
    return EXIT_DONE
