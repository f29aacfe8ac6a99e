"""Runs the commands of a page of the documentation, and says what they printed: `python -m tests.docs PAGE`.

A command is a line in a ```console block that begins with `# `. They are run one after another in a mount namespace
where the directories that the page names hold a few small exports, and nothing of this machine's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT
from tests.conftest import disk_entry, write_manifest
from tests.libvirtd import session
from tests.ovf import export_ovf

DOCS = ROOT / "docs"
EXPORTS = Path("/var/lib/hypersdk/exports")
OWN = ("/var/lib/hypersdk", "/var/lib/hyper2kvmd", "/etc/hyper2kvmd", "/var/lib/libvirt/images", "/srv")


@dataclass(frozen=True)
class Command:
    """One command of a page, and the lines that the page says it prints; … stands for anything."""

    line: int
    text: str
    prints: tuple[str, ...]


def commands(page: Path) -> list[Command]:
    """The commands of a page, in order."""
    found: list[Command] = []
    for match in re.finditer(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        number = page.read_text()[: match.start()].count("\n") + 1
        for offset, line in enumerate(match[1].splitlines(), start=1):
            if line.startswith("# "):
                found.append(Command(number + offset, line.removeprefix("# "), ()))
            else:
                last = found.pop()
                found.append(Command(last.line, last.text, (*last.prints, line)))
    return found


def blocks(page: Path, language: str) -> Iterator[str]:
    """The fenced blocks of a page in one language."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        yield match[1]


def export(name: str) -> Path:
    """An export with one small disk that nobody looks into."""
    directory = EXPORTS / name
    directory.mkdir(parents=True)
    disk = directory / f"{name}-disk-0.raw"
    disk.write_bytes(os.urandom(1 << 20))
    address = ":".join(f"{byte:02x}" for byte in hashlib.sha256(name.encode()).digest()[:3])
    nics = [{"id": "nic-0", "mac": f"00:50:56:{address}", "network": "VM Network"}]
    write_manifest(directory, [disk_entry(disk)], nics=nics)
    return directory


# What each page takes for granted ------------------------------------------------------------------------------


def _migrate() -> None:
    for name in ("web01", "web02", "web03", "web04"):
        export(name)


def _batch() -> None:
    for name in ("web01", "web02", "db01"):
        export(name)


def _trouble() -> None:
    for name in ("web01", "web02", "web03"):
        export(name)
    hyper2kvmctl("migrate", str(EXPORTS / "web01"), "--dry-run")
    (EXPORTS / "web01/web01-disk-0.raw").write_bytes(os.urandom(1 << 20))
    hyper2kvmctl("migrate", str(EXPORTS / "web01"))
    moved = EXPORTS / "web02/disks/web02-disk-0.raw"
    moved.parent.mkdir()
    manifest = EXPORTS / "web02/manifest.json"
    (EXPORTS / "web02/web02-disk-0.raw").rename(moved)
    manifest.write_text(manifest.read_text().replace(str(EXPORTS / "web02"), "/old/path"))
    xml = "<domain type='qemu'><name>web03</name><memory>1024</memory><os><type>hvm</type></os></domain>"
    subprocess.run(["virsh", "define", "/dev/stdin"], input=xml, text=True, check=True, capture_output=True)
    (EXPORTS / "hyperv01").mkdir()
    disk = EXPORTS / "hyperv01/hyperv01.vhdx"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vhdx", disk, "64M"], check=True)


def _plan() -> None:
    for name in ("web01", "web02", "db01"):
        export(name)


def _deliver() -> None:
    source = Path("/srv/source")
    source.mkdir()
    for name in ("web01", "web02", "web03", "web04"):
        shutil.move(export(name), source / name)


def _operations() -> None:
    for name in ("web01", "web02"):
        export(name)


def _evidence() -> None:
    export("web01")


def _ovf() -> None:
    off = {"enabled": False}  # the disks hold no system
    pipeline = {"inspect": off, "fix": off}
    settings = {"settle_seconds": 0, "ovf": {"accept": True}, "pipeline": pipeline, "libvirt": {"import": False}}
    Path("/etc/hyper2kvmd/hyper2kvmd.yaml").write_text(json.dumps(settings))
    EXPORTS.mkdir()
    export_ovf(EXPORTS / "db01")


SETUP: dict[str, Callable[[], None]] = {
    "migrate.md": _migrate,
    "batch.md": _batch,
    "plan.md": _plan,
    "trouble.md": _trouble,
    "operations.md": _operations,
    "evidence.md": _evidence,
    "deliver.md": _deliver,
    "sizing.md": _plan,
    "firewall.md": _plan,
    "backup.md": _operations,
    "pools.md": _operations,
    "remote-libvirt.md": _operations,
    "ovf.md": _ovf,
}


def hyper2kvmctl(*arguments: str) -> None:
    """Run a command whose outcome the page will show."""
    subprocess.run(["hyper2kvmctl", *arguments], check=False, capture_output=True, stdin=subprocess.DEVNULL)


def run(page: Path) -> list[dict[str, object]]:
    """Run the commands of a page, and return what each printed and how it ended."""
    results = []
    with tempfile.TemporaryDirectory() as scratch, session(Path(scratch)) as uri:
        (Path("/etc/hyper2kvmd") / "hyper2kvmd.yaml").write_text(
            f"settle_seconds: 0\nlibvirt: {{uri: '{uri}', default_network: user}}\n"
        )
        programs = Path(sys.executable).parent
        os.environ.update(PATH=f"{programs}:{os.environ['PATH']}", LIBVIRT_DEFAULT_URI=uri)
        SETUP[page.name]()
        os.chdir("/srv")
        Path("/srv/images").mkdir()
        for number, text in enumerate(blocks(page, "yaml")):
            name = re.match(r"# (\S+\.yaml)", text)
            Path(name[1] if name else f"block-{number}.yaml").write_text(text)
        for table in blocks(page, "csv"):
            Path("plan.csv").write_text(table)
        for command in commands(page):
            done = subprocess.run(
                ["bash", "-c", command.text],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                env={**os.environ, "COLUMNS": "200"},
                timeout=120,
            )
            results.append({"line": command.line, "status": done.returncode, "output": done.stdout})
        running = subprocess.run(["virsh", "list", "--name"], capture_output=True, text=True, check=True)
        for name_ in running.stdout.split():
            subprocess.run(["virsh", "destroy", name_], check=True, capture_output=True)
    return results


def main() -> None:
    """Make the world of a page, run its commands, and print the results as JSON."""
    page = Path(sys.argv[1])
    for directory in OWN:
        Path(directory).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "docs", directory], check=True)
    print(json.dumps(run(page)))


if __name__ == "__main__":
    main()
