"""`hyper2kvmctl validate`: is this export fit to be migrated? All findings at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from rich.console import Console

from hyper2kvmd import images
from hyper2kvmd.claims import open_directory
from hyper2kvmd.ctl import print_json
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.manifest import Manifest, ManifestError, parse
from hyper2kvmd.options import EXIT_DONE, EXIT_FAILED, EXIT_MANIFEST
from hyper2kvmd.run import Tools
from hyper2kvmd.settings import Settings
from hyper2kvmd.spool import read_manifest


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("validate", help="check a manifest and its disks, changing nothing")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--strict", action="store_true", help="compute the checksums too, which reads every disk")
    parser.set_defaults(run=validate)
    return [parser]


def validate(options: argparse.Namespace, config: Settings) -> int:
    """Check one export; the exit status is 1 if there are errors, 65 if the manifest itself is bad."""
    errors: list[Finding] = []
    warnings: list[Finding] = []
    path: Path = options.manifest
    status = EXIT_DONE
    manifest: Manifest | None = None
    with contextlib.ExitStack() as stack:
        try:
            fd = open_directory(path.parent.resolve())
            stack.callback(os.close, fd)
            manifest = parse(read_manifest(fd, path.parent, (path.name,))[1], path.name)
        except OSError as error:
            hint = "Name the manifest of an existing export."
            errors.append(Finding(Code.MANIFEST_UNREADABLE, f"{path.parent}: {error.strerror}", hint))
        except ManifestError as error:
            errors += error.problems
        except MigrationError as error:
            errors.append(error.finding())
        if manifest is None:
            status = EXIT_MANIFEST
        else:
            warnings += manifest.warnings
            for disk in manifest.disks:
                try:
                    (source,) = images.open_sources(fd, path.parent.resolve(), (disk,), stack)
                    warnings += source.warnings
                    images.check_source(Tools(), source)
                    if options.strict:
                        images.verify(source, threading.Event(), lambda ratio: None)
                except MigrationError as error:
                    errors.append(error.finding())
    if errors and status == EXIT_DONE:
        status = EXIT_FAILED
    if options.json:
        print_json(
            {
                "manifest": str(path),
                "valid": status == EXIT_DONE,
                "errors": [finding.as_json() for finding in errors],
                "warnings": [finding.as_json() for finding in warnings],
            }
        )
        return status
    console = Console()
    for style, label, findings in (("red", "error", errors), ("yellow", "warning", warnings)):
        for finding in findings:
            console.print(f"{label}: {finding}", style=style, markup=False, highlight=False, soft_wrap=True)
    if manifest is not None and status == EXIT_DONE:
        console.print(
            f"{path}: valid, {len(manifest.disks)} disk{'s'[: len(manifest.disks) != 1]}"
            + ("" if options.strict else "; checksums not computed (--strict does)"),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return status
