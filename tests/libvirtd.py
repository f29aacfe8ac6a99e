"""A libvirt of one's own for the demo and the tests: what it defines is gone when it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt


@contextmanager
def session(directory: Path, account: str = "root", *, alone: bool = False) -> Iterator[str]:
    """The URI of a libvirt with the QEMU driver that leaves the host's own alone.

    For everybody but root that is qemu:///session, which starts its own daemon. For root the same name means the
    host's libvirt, so a daemon is started whose configuration and state are on file systems of its own, in a mount
    namespace that ends with it. alone: in a network of its own, too, so that the guests of several have ports enough.
    account: as whom its QEMU runs. Root may enter the scratch directories of tests, which
    are closed to all others; what holds on a host as its distribution ships it is for the tests in tests/e2e.
    """
    if os.geteuid() != 0:
        yield "qemu:///session"
        return
    for program in ("libvirtd", "tini", "unshare"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not installed; run `make deps`")
    run = directory / "libvirt"
    run.mkdir(parents=True, exist_ok=True)
    config = run / "libvirtd.conf"
    config.write_text(f'unix_sock_dir = "{run}"\nauth_unix_ro = "none"\nauth_unix_rw = "none"\nlog_level = 3\n')
    script = (
        f"{'ip link set lo up && ' if alone else ''}"
        # The images stay in sight, for guests that are started.
        f"mkdir -p {run}/images && mount --bind /var/lib/libvirt/images {run}/images || exit 1;"
        " for d in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /run/libvirt; do"
        " mkdir -p $d && mount -t tmpfs tmpfs $d || exit 1; done;"
        f" mkdir -p /etc/libvirt/qemu /var/lib/libvirt/images; mount --bind {run}/images /var/lib/libvirt/images;"
        # No virtlogd: it would be the host's.
        f' printf \'user = "{account}"\\ngroup = "{account}"\\nsecurity_driver = "none"\\nstdio_handler = "file"\\n\''
        " > /etc/libvirt/qemu.conf;"
        # libvirtd waits for QEMUs that it ended until the init has taken leave of them. Some take seconds for each.
        f" exec tini -s -- libvirtd --config {config} --pid-file {run}/pid"
    )
    with (run / "log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", *(["--net"] if alone else []), "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        socket = run / "libvirt-sock"
        deadline = time.monotonic() + 120
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"libvirtd did not start:\n{(run / 'log').read_text()}")
            time.sleep(0.1)
        yield f"qemu+unix:///session?socket={socket}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def remove(domain: Any) -> None:
    """Stop a domain of libvirt's, and forget it with its variables."""
    if domain.isActive():
        domain.destroy()
    domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
