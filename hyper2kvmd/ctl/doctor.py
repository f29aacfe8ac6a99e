"""`hyper2kvmctl doctor`: what the host needs, checked for real, with the remedy for what is missing."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from hyper2kvmd import accel, images, importer
from hyper2kvmd.ctl import print_json
from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.guest.session import open_guest
from hyper2kvmd.options import EXIT_DONE, EXIT_FAILED
from hyper2kvmd.run import Tools
from hyper2kvmd.settings import Settings

PROGRAMS = ("qemu-img", "qemu-system-x86_64", "setpriv", "prlimit", "zstd", "lz4")


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command to the parser."""
    parser = commands.add_parser("doctor", help="check everything that the host needs")
    parser.set_defaults(run=doctor)
    return [parser]


def doctor(options: argparse.Namespace, config: Settings) -> int:
    """Run every check and print what it found. A warning is not a failure."""
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("programs", _programs),
        ("exports directory", _exports),
        ("locks", _locks),
        ("output directory", lambda config: _writable(config.output_dir, "output_dir")),
        ("work directory", lambda config: _writable(config.work_dir, "work_dir")),
        ("acceleration", _acceleration),
        ("libguestfs", _libguestfs),
        ("libvirt", _libvirt),
    ]
    console = Console()
    results = []
    for name, check in checks:
        try:
            result, text, finding = "ok", check(config), None
        except MigrationError as error:
            result, text, finding = "failed", error.message, error.finding()
        except OSError as error:
            result, text = "failed", str(error)
            finding = Finding(Code.IO_ERROR, text, "Check that the path exists and its permissions.")
        results.append({"check": name, "result": result, "detail": text, "finding": finding and finding.as_json()})
        if not options.json:
            style = {"ok": "green", "failed": "red"}[result]
            console.print(f"{result:<7} {name}: {text}", style=style, markup=False, highlight=False, soft_wrap=True)
            if finding is not None:
                console.print(f"        {finding.hint}", markup=False, highlight=False, soft_wrap=True)
    if options.json:
        print_json(results)
    return EXIT_FAILED if any(result["result"] == "failed" for result in results) else EXIT_DONE


def _programs(config: Settings) -> str:
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise MigrationError(Code.TOOL_MISSING, f"{program} is not installed", "Install the package that holds it.")
    return Tools().run("qemu-img", "--version").stdout.splitlines()[0]


def _exports(config: Settings) -> str:
    names = list(config.exports_dir.iterdir())
    return f"{config.exports_dir}, {len(names)} entries"


def _locks(config: Settings) -> str:
    """Whether a lock that is held keeps a second one out, on the file system of the exports."""
    with tempfile.NamedTemporaryFile(dir=config.exports_dir, prefix=".hyper2kvmd-doctor-") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        second = os.open(file.name, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "flock works"
        finally:
            os.close(second)
    raise MigrationError(
        Code.IO_ERROR,
        f"flock does not exclude on {config.exports_dir}",
        "Two runners could work on the same export. Mount the file system with locking (NFS: without nolock).",
        field="exports_dir",
    )


def _writable(directory: Path, field: str) -> str:
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".hyper2kvmd-doctor-") as file:
        direct = "with" if images.direct_io(Path(file.name)) else "without"
    free = shutil.disk_usage(directory).free / 2**30
    return f"{directory}, {free:.1f} GiB free, {direct} O_DIRECT"


def _acceleration(config: Settings) -> str:
    chosen = accel.resolve(config.guest.accel, Tools())
    return chosen.name if chosen.warning is None else f"{chosen.name}: {chosen.warning.message}"


def _libguestfs(config: Settings) -> str:
    """Start an appliance for real, with a small empty disk."""
    tools = Tools()
    with tempfile.TemporaryDirectory(prefix="hyper2kvmd-doctor-") as directory:
        disk = Path(directory) / "empty.qcow2"
        tools.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "16M")
        chosen = accel.resolve(config.guest.accel, tools)
        with open_guest([(disk, "qcow2")], accel=chosen.name, memory_mb=config.guest.memory_mb, tools=tools) as guest:
            version = guest.version()
    return f"version {version['major']}.{version['minor']}.{version['release']}, the appliance starts"


def _libvirt(config: Settings) -> str:
    if not config.libvirt.import_:
        return "not used (libvirt.import is false)"
    with importer.connect(config.libvirt.uri) as connection:
        return f"{connection.getURI()}, version {importer.version(connection)}"
