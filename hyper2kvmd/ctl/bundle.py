"""`hyper2kvmctl bundle`: all that is needed to find out why one migration went wrong, in one file, without secrets."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from hyper2kvmd import __version__
from hyper2kvmd.ctl.doctor import CHECKS
from hyper2kvmd.ctl.listing import find
from hyper2kvmd.ctl.logs import journal_matches
from hyper2kvmd.ctl.output import print_json, refuse, refuse_existing, say
from hyper2kvmd.ctl.pages import beside
from hyper2kvmd.ctl.redact import redacted
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.exits import EXIT_DONE, EXIT_NOT_FOUND, EXIT_USAGE
from hyper2kvmd.files import create_file, explained, open_directory
from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.queue import facts
from hyper2kvmd.queue.names import (
    ASKED,
    BOOT_LOG,
    BOOT_SCREEN,
    CUTOVER_LOG,
    CUTOVER_SCREEN,
    LOCK,
    LOG,
    PROGRESS,
)
from hyper2kvmd.queue.placement import placement
from hyper2kvmd.queue.plans import plan_file
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings

LIMIT = 8 << 20  # of each member: the end of a log that is longer
JOURNAL_LINES = "20000"
SECONDS = 300.0
PNG = b"\x89PNG\r\n\x1a\n"
# These start an appliance, or jobs on other hosts, which nobody asked for.
_LEFT_OUT = ("libguestfs", "dispatch")
_PACKAGES = ("libvirt-python", "pydantic", "prometheus-client", "structlog", "watchdog", "PyYAML", "rich")

Part = Callable[[], bytes]


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "bundle", help="collect report, logs, settings and versions in one file, without secrets, to send to somebody"
    )
    parser.add_argument("export", help="directory of the export, or its name, or the VM's name")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the file to write: NAME.tar.zst or NAME.tar.gz",
    )
    parser.set_defaults(run=bundle)
    return [parser]


def bundle(options: argparse.Namespace, config: Settings) -> int:
    """Write the bundle, which only its owner can read, and say what is missing in it."""
    output: Path = options.output
    if not output.name.endswith((".tar.zst", ".tar.gz")):
        return refuse(EXIT_USAGE, f"{output}: the name must end in .tar.zst or .tar.gz")
    refuse_existing(output)
    export = find(options.export, config)
    if export is None:
        message = f"{options.export}: no export of this name in {config.exports_dir}; see `hyper2kvmctl list`"
        return refuse(EXIT_NOT_FOUND, message)
    known = _known_secrets(config)
    members: dict[str, bytes] = {}
    missing: dict[str, str] = {}
    for name, part in _parts(export, config, options.config).items():
        try:
            data = part()
        except MigrationError as error:
            missing[name] = str(error)
        except OSError as error:
            missing[name] = explained(error)
        else:
            if data:
                members[name] = data if name.endswith(".png") else redacted(_text(data), known).encode()
    contents = {
        "export": str(export),
        "made_by": f"hyper2kvmctl {__version__}",
        "members": [*members],
        "missing": missing,
    }
    members["contents.json"] = redacted(json.dumps(contents), known).encode()
    _write(output, _packed(output.name, members))
    if options.json:
        print_json({"file": str(output), "members": [*members], "missing": missing})
        return EXIT_DONE
    for name, why in missing.items():
        print(f"hyper2kvmctl: {name} is missing: {why}", file=sys.stderr)
    say(f"{output}: {len(members)} files, without secrets. Names and addresses are in them: read them first.")
    return EXIT_DONE


def _text(data: bytes) -> str:
    """The member as text; of one that was too long, no line that is not whole, of which half a secret could be left."""
    text = data.decode(errors="replace")
    return text if len(data) < LIMIT else text.partition("\n")[2]


def _parts(export: Path, config: Settings, config_file: Path | None) -> dict[str, Part]:
    """What goes into the bundle, by its name there."""
    options = [] if config_file is None else ["--config", str(config_file)]
    checks = [name for name in CHECKS if name not in _LEFT_OUT]
    report = facts.read_report(export) or {}
    found: dict[str, Part] = {
        "settings.json": lambda: config.model_dump_json(by_alias=True, indent=2).encode(),
        "plan.yaml": lambda: _file(plan_file(config, export.name)),
        "versions.txt": lambda: "".join(f"{name}: {what}\n" for name, what in _versions()).encode(),
        "doctor.json": lambda: _output(
            *(sys.executable, "-m", "hyper2kvmd.ctl", "doctor", "--json", *checks, *options), accept=range(256)
        ),
        "journal.txt": lambda: _output(
            *("journalctl", "--no-pager", "-o", "short-iso", "-n", JOURNAL_LINES, *journal_matches(export, config))
        ),
        "domain.xml": lambda: _domain(export, config, report),
    }
    for name in _names(export, config):
        found[f"export/{name.lstrip('.')}"] = _member(export, name)
    return found


def _names(export: Path, config: Settings) -> Iterator[str]:
    """The files of the export that say something: those of ours, the manifests, and descriptors."""
    ours = (LOCK, LOG, ASKED, PROGRESS, BOOT_LOG, BOOT_SCREEN, CUTOVER_LOG, CUTOVER_SCREEN, *config.manifest_names)
    for name in sorted(os.listdir(export)):
        report = name.startswith(("migration-report.", "cutover-report.")) and name.endswith(".json")
        if name in ours or report or name.endswith((".ovf", ".mf")):
            yield name


def _member(export: Path, name: str) -> Part:
    def read() -> bytes:
        fd = open_directory(export)
        try:
            data = beside(fd, name, LIMIT)
        finally:
            os.close(fd)
        # A picture cannot be searched for secrets, so it has to be one.
        return data if not name.endswith(".png") or data.startswith(PNG) else b""

    return read


def _file(path: Path) -> bytes:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return file.read(LIMIT)
    return b""


def _output(*argv: str, accept: range = range(1)) -> bytes:
    return Tools().run(*argv, accept=accept, timeout=SECONDS).stdout.encode()


def _domain(export: Path, config: Settings, report: dict[str, Any]) -> bytes:
    """The domain as libvirt has it, which leaves its own secrets out; by the settings' URI, and not the report's."""
    domain = report.get("domain")
    if not isinstance(domain, dict):
        return b""
    try:
        identity = str(uuid.UUID(str(domain.get("uuid"))))
    except ValueError:
        return b""
    uri = placement(config, export.name, facts.look(export, config)).libvirt_uri
    with connect(uri) as connection:
        for one in connection.listAllDomains():
            if one.UUIDString() == identity:
                return str(one.XMLDesc(0)).encode()
    return b""


def _versions() -> Iterator[tuple[str, str]]:
    yield "hyper2kvmd", __version__
    yield "system", " ".join(platform.freedesktop_os_release().get(key, "") for key in ("NAME", "VERSION_ID"))
    yield "kernel", platform.release()
    yield "python", platform.python_version()
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)
    for program in ("qemu-img", "virsh", "guestfish", "systemctl"):
        try:
            yield program, Tools().run(program, "--version", timeout=SECONDS).stdout.partition("\n")[0]
        except MigrationError as error:
            yield program, error.message


def _known_secrets(config: Settings) -> list[str]:
    """The URLs that are called, and the passphrases of guests, as far as whoever runs this may read them."""
    found = [config.notify.webhook.url or "", config.notify.heartbeat.url or ""]
    for path in config.fix.luks_keys.values():
        with contextlib.suppress(OSError):
            found += [line for line in _file(path).decode(errors="replace").splitlines() if len(line) > 3]
    return [secret for secret in found if secret]


def _packed(name: str, members: dict[str, bytes]) -> bytes:
    directory = name.partition(".tar.")[0]
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz" if name.endswith(".gz") else "w") as archive:
        for member, data in members.items():
            entry = tarfile.TarInfo(f"{directory}/{member}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(data))
    if name.endswith(".gz"):
        return target.getvalue()
    chunks: list[bytes] = []
    Tools().run("zstd", "--quiet", "--stdout", stdin=target.getvalue(), on_output=chunks.append, timeout=SECONDS)
    return b"".join(chunks)


def _write(path: Path, data: bytes) -> None:
    """Write a file that others cannot read, under its name only when it is whole, and in place of no other."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = create_file(temporary, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.link(temporary, path)
    finally:
        temporary.unlink()
