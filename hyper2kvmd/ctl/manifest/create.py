"""`hyper2kvmctl manifest create`: makes an export of disks that came without a manifest."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hyper2kvmd.authoring import create as authoring
from hyper2kvmd.authoring import ova
from hyper2kvmd.authoring.contents import replace_packed
from hyper2kvmd.ctl.output import bars, print_json, print_warnings, refuse_existing, say
from hyper2kvmd.errors import Finding, MigrationError
from hyper2kvmd.exits import EXIT_DONE, EXIT_NOT_FOUND, EXIT_USAGE
from hyper2kvmd.manifest import Manifest
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings
from hyper2kvmd.text import plain

FORMATS = {".json": "json", ".yaml": "yaml", ".yml": "yaml"}


def create(options: argparse.Namespace, config: Settings) -> int:
    """Make a manifest of what is named."""
    sources: list[Path] = options.sources
    for source in sources:
        if not os.path.lexists(source):
            print(f"hyper2kvmctl: {source}: no such file or directory", file=sys.stderr)
            return EXIT_NOT_FOUND
    output: Path | None = options.output
    written = FORMATS.get("" if output is None else output.suffix.lower())
    if output is not None and (written is None or written != (options.format or written)):
        print(f"hyper2kvmctl: {output} does not end in .{options.format or 'json, .yaml or .yml'}", file=sys.stderr)
        return EXIT_USAGE
    name = output.name if output is not None else f"manifest.{options.format or 'json'}"
    first = sources[0]
    archive = first.is_file() and first.suffix.lower() != ".ovf" and ova.is_archive(first)
    if len(sources) > 1 and (archive or any(source.is_dir() or source.suffix.lower() == ".ovf" for source in sources)):
        print("hyper2kvmctl: several sources must all be disk files of one VM", file=sys.stderr)
        return EXIT_USAGE
    if archive:
        return _create_from_archive(options, first, name)
    find: Callable[[Path], authoring.Found]
    if first.is_dir():
        source, find = (
            first,
            functools.partial(authoring.in_directory, vm_name=options.name, default=first.resolve().name),
        )
    elif first.suffix.lower() == ".ovf":
        source, find = first.parent, lambda directory: authoring.of_descriptor(directory / first.name, options.name)
    else:
        source, find = (
            first.parent,
            lambda _: authoring.of_files(sources, output.parent if output else first.parent, options.name),
        )
    found = find(source)
    if found.packed:
        return _create_unpacked(options, first, found, find, name)
    if options.directory is not None:
        what = "OVAs, and for disks that are compressed or in chunks"
        print(f"hyper2kvmctl: --directory is for {what}; {first} is neither", file=sys.stderr)
        return EXIT_USAGE
    path = found.directory / name if output is None else output
    if path.parent.resolve() != found.directory.resolve():
        print(f"hyper2kvmctl: {path} is not in {found.directory}, where the disks are", file=sys.stderr)
        return EXIT_USAGE
    refuse_existing(path)
    with bars() as tell:
        described = _describe(options, found, {}, tell)
        manifest = described.builder.write(name, options.dialect)
    return _say_created(options, path, manifest, described, ())


def _create_from_archive(options: argparse.Namespace, archive: Path, name: str) -> int:
    stem = Path(archive.name.removesuffix(".gz")).stem
    target = _target(options, stem)
    if target is None:
        return EXIT_USAGE
    with bars() as tell, ova.unpacked(archive, target, lambda ratio: tell(archive.name, ratio)) as content:
        descriptors = [file for file in content.files if file.lower().endswith(".ovf")]

        def find() -> authoring.Found:
            if len(descriptors) == 1:
                return authoring.of_descriptor(content.directory / descriptors[0], options.name)
            return authoring.in_directory(content.directory, options.name, stem)

        with _called(content.directory, archive):
            found = find()
            for disk in found.packed:
                replace_packed(content.directory, disk, tell)
            if packed := {disk.name for disk in found.packed}:
                found = replace(find(), warnings=found.warnings)
            sha256 = {file: digest for file, digest in content.sha256.items() if file not in packed}
            described = _describe(options, found, sha256, tell)
            manifest = described.builder.write(name, options.dialect)
    return _say_created(options, target / name, manifest, described, content.warnings)


def _create_unpacked(
    options: argparse.Namespace, first: Path, found: authoring.Found, find: Callable[[Path], authoring.Found], name: str
) -> int:
    """Make an export of a source with disks that are in chunks or compressed. The source stays as it is."""
    target = _target(options, first.resolve().name.removesuffix(".ovf"))
    if target is None:
        return EXIT_USAGE
    if target.resolve().is_relative_to(found.directory.resolve()):
        print(
            f"hyper2kvmctl: {plain(found.packed[0].pieces[0])} is to be unpacked, and {target} is in {found.directory}:"
            " name a new directory elsewhere with --directory",
            file=sys.stderr,
        )
        return EXIT_USAGE
    with bars() as tell, ova.new_directory(found.directory, target) as directory:
        authoring.unpack(found, directory, check=options.checksum, on_progress=tell)
        with _called(directory, found.directory):
            whole = replace(find(directory), warnings=found.warnings, digests=found.unpacked_digests())
            described = _describe(options, whole, {}, tell)
            manifest = described.builder.write(name, options.dialect)
    return _say_created(options, target / name, manifest, described, ())


def _target(options: argparse.Namespace, stem: str) -> Path | None:
    """The new directory that is to become the export; None if it is not where the manifest is to be, which is said."""
    output: Path | None = options.output
    target: Path = options.directory or (Path(stem) if output is None else output.parent)
    if output is None or output.parent.resolve() == target.resolve():
        return target
    print(f"hyper2kvmctl: {output} is not in {target}, where the disks are unpacked", file=sys.stderr)
    return None


@contextlib.contextmanager
def _called(directory: Path, source: Path) -> Iterator[None]:
    """Have errors speak of the source of a directory that will be gone when somebody reads them."""
    try:
        yield
    except MigrationError as error:
        error.message = error.message.replace(str(directory), str(source))
        error.problems = tuple(
            replace(finding, message=finding.message.replace(str(directory), str(source))) for finding in error.problems
        )
        raise


def _describe(
    options: argparse.Namespace, found: authoring.Found, digests: dict[str, str], tell: Callable[[str, float], None]
) -> authoring.Described:
    known = digests if options.checksum else {}
    return authoring.describe(
        found, options.dialect, checksum=options.checksum, digests=known, tools=Tools(), on_progress=tell
    )


def _say_created(
    options: argparse.Namespace,
    path: Path,
    manifest: Manifest,
    described: authoring.Described,
    warnings: Sequence[Finding],
) -> int:
    warnings = (*warnings, *described.warnings, *manifest.warnings)
    if options.json:
        print_json(
            {
                "manifest": str(path),
                "vm_name": manifest.vm_name,
                "firmware": manifest.vm.firmware,
                "boot_disk": manifest.boot_disk().id,
                "disks": [
                    {
                        "id": disk.id,
                        "path": disk.path,
                        "format": disk.format,
                        "bytes": disk.bytes,
                        "virtual_size": described.virtual_sizes[disk.id],
                        "sha256": disk.sha256,
                    }
                    for disk in manifest.disks
                ],
                "warnings": [finding.as_json() for finding in warnings],
            }
        )
        return EXIT_DONE
    print_warnings(warnings)
    for disk in manifest.disks:
        size = described.virtual_sizes[disk.id] / 2**30
        boot = ", boots" if disk == manifest.boot_disk() else ""
        say(f"{disk.id:<10} {disk.path}: {disk.format}, {size:.1f} GiB{boot}")
    say(f"{'VM':<10} {manifest.vm_name}: firmware {manifest.vm.firmware}, {len(manifest.nics)} network cards")
    say(f"{'manifest':<10} {path}")
    return EXIT_DONE
