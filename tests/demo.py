"""`make demo`: a guest that cannot boot on virtio is dropped, migrated by the daemon, and defined in libvirt."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tests.guests.build import export, exported_disk
from tests.libvirtd import session

GUEST = "debian12-bios"
LIMIT_SECONDS = 480


def main() -> int:
    """Run the demo in a scratch directory that is removed at the end; the exit status is 0 if all went well."""
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(f"\n[bold]{text}[/bold]")

    scratch = Path(tempfile.mkdtemp(prefix="hyper2kvmd-demo-", dir="/var/tmp"))
    try:
        with session(scratch) as uri:
            return _demo(scratch, uri, say)
    finally:
        shutil.rmtree(scratch)


def _demo(scratch: Path, uri: str, say: Callable[[str], None]) -> int:
    for name in ("exports", "images", "work"):
        (scratch / name).mkdir()
    config = scratch / "hyper2kvmd.yaml"
    config.write_text(
        f"exports_dir: {scratch}/exports\noutput_dir: {scratch}/images\nwork_dir: {scratch}/work\n"
        f"settle_seconds: 1\nlibvirt: {{uri: '{uri}', default_network: user}}\n"
        "metrics: {listen: '127.0.0.1:9879'}\nlog: {level: error}\n"
    )
    programs = Path(sys.executable).parent
    ctl = [str(programs / "hyper2kvmctl")]
    options = ["--config", str(config)]

    say("1. A small Debian guest as VMware would have it: fstab by /dev/sda, no virtio in its initramfs")
    exported_disk(GUEST)

    say("2. The daemon watches an empty exports directory. Its status, as `systemctl status` would show it:")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as status:
        status.bind(str(scratch / "notify"))
        daemon = subprocess.Popen(
            [programs / "hyper2kvmd", "run", *options],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "NOTIFY_SOCKET": str(scratch / "notify")},
        )
        try:
            say("3. The export is dropped into it, manifest last; from here on nobody does anything")
            dropped = export(GUEST, scratch / "exports", dialect="seed", vm_name="web01", mac="00:50:56:aa:bb:01")
            subprocess.run(["ls", "-sh", dropped], check=True)
            if not _follow(dropped, status, daemon):
                print(f"no report within {LIMIT_SECONDS} s", file=sys.stderr)
                return 1
        finally:
            daemon.terminate()
            daemon.wait(timeout=60)

    say("4. What was done: hyper2kvmctl show web01")
    subprocess.run([*ctl, "show", "web01", *options], check=True)
    if json.loads((dropped / "migration-report.json").read_text())["status"] != "succeeded":
        return 1
    say("5. The domain: virsh dumpxml web01")
    subprocess.run(["virsh", "-c", uri, "list", "--all"], check=True)
    subprocess.run(["virsh", "-c", uri, "dumpxml", "web01"], check=True)
    say("Done. The scratch directory is removed; `make test` also boots the result.")
    return 0


def _follow(export: Path, status: socket.socket, daemon: subprocess.Popen[bytes]) -> bool:
    """Print what the daemon tells systemd, whenever it changes, until there is a report."""
    began = time.monotonic()
    status.settimeout(1)
    last = ""
    while time.monotonic() - began < LIMIT_SECONDS and daemon.poll() is None:
        try:
            message = status.recv(4096).decode()
        except TimeoutError:
            message = ""
        if message.startswith("STATUS=") and message != last:
            print(f"{time.monotonic() - began:6.1f} s  {message.removeprefix('STATUS=')}", flush=True)
            last = message
        if (export / "migration-report.json").exists():
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
