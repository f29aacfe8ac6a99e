"""A real systemd in a container on an overlay of this machine's file system, or of another one.

Everything is mounted in a mount namespace and runs in a process id namespace that belong to the container alone,
and both end with the thread that started it: however a test ends, SIGKILL included, nothing of it is left running or
mounted, and this machine's files are never changed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BOOT_SECONDS = 600
END_SECONDS = 60

# $1 is an empty directory, $2 the name, $3 the file system to boot, $4 options; the rest are control groups to run in.
# The overlay's own files are in memory: they must not lie below its lower directory.
_START = """
directory=$1 name=$2 lower=$3 options=$4
shift 4
for group; do echo $$ >"$group/cgroup.procs"; done
mount -t tmpfs -o mode=0755 container "$directory"
mkdir "$directory/upper" "$directory/work" "$directory/root"
mount -t overlay -o "lowerdir=$lower,upperdir=$directory/upper,workdir=$directory/work" overlay "$directory/root"
systemd-nspawn --quiet --directory="$directory/root" --machine="$name" --register=no --keep-unit \
    --private-network --link-journal=no --resolv-conf=off --timezone=off --console=pipe $options \
    --boot systemd.unit=basic.target
"""


@dataclass(frozen=True)
class Container:
    """A booted container. `leader` is the process id, outside, of its init."""

    leader: int

    @property
    def root(self) -> Path:
        """The container's file system, as seen from outside, with all its mounts."""
        return Path(f"/proc/{self.leader}/root")

    def run(self, *argv: str, accept: tuple[int, ...] = (0,), timeout: float = 600) -> str:
        """Run a command inside as root and return what it wrote to standard output."""
        enter = ["nsenter", f"--target={self.leader}", *("-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w"), "--"]
        # A machine of its own: what these tests have found out about this one is not for it.
        variables = {name: value for name, value in os.environ.items() if not name.startswith("LIBGUESTFS_")}
        done = subprocess.run(
            [*enter, *argv],
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode in accept, f"{' '.join(argv)} exited {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file inside, and the directories that it needs."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)


@contextlib.contextmanager
def booted(root: Path = Path("/"), *, bound: Mapping[str, Path] | None = None) -> Iterator[Container]:
    """Boot a container with no services but the basic ones; it is switched off, not shut down, at the end.

    root: the file system that it has an overlay of. bound: directories of this machine, by where they are seen.
    """
    assert os.geteuid() == 0, "a container can be started by root only: run the tests as root"
    name = f"hyper2kvmd-{os.getpid()}"
    options = " ".join(f"--bind-ro={source}:{place}" for place, source in (bound or {}).items())
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as scratch, _control_groups(name) as groups:
        log = Path(scratch, "console.log")
        mount_point = Path(scratch, "mnt")
        mount_point.mkdir()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"),
                    *("--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
                    *("sh", "-euc", _START, "sh", str(mount_point), name, str(root), options, *map(str, groups)),
                ],
                # The newer kind of control groups alone: without it the systemd of Debian 13 does not boot, and libvirt
                # finds none that it may make its own in.
                env={**os.environ, "UNIFIED_CGROUP_HIERARCHY": "yes"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield _boot(process, log)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _control_groups(name: str) -> Iterator[list[Path]]:
    """Control groups for one container, so that several can run at once and none leaves any behind."""
    hierarchies = [Path("/sys/fs/cgroup", hierarchy) for hierarchy in ("systemd", "unified", "")]
    groups = [hierarchy / name for hierarchy in hierarchies if os.access(hierarchy / "cgroup.procs", os.W_OK)]
    for group in groups:
        group.mkdir(exist_ok=True)
    try:
        yield groups
    finally:
        for group in groups:
            wait_until(lambda: _is_empty(group), f"the processes of {group} have ended", END_SECONDS)  # noqa: B023
            for directory, _, _ in os.walk(group, topdown=False):
                Path(directory).rmdir()


def _is_empty(group: Path) -> bool:
    """Whether no process is in a control group or below it."""
    return not any(Path(directory, "cgroup.procs").read_text() for directory, _, _ in os.walk(group))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def _boot(process: subprocess.Popen[bytes], log: Path) -> Container:
    """Wait until the container is up."""
    deadline = time.monotonic() + BOOT_SECONDS
    state = "without an init"
    while process.poll() is None and time.monotonic() < deadline:
        leader = _leader(process.pid)
        if leader is not None:
            container = Container(leader)
            state = container.run("systemctl", "is-system-running", accept=tuple(range(-64, 256))).strip()
            if state in ("running", "degraded"):
                return container
        time.sleep(0.1)
    console = log.read_text(errors="replace")[-4000:]
    raise AssertionError(f"the container did not boot ({state}, systemd-nspawn: {process.poll()}):\n{console}")


def _leader(outer: int) -> int | None:
    """The container's init: number 1 in a process id namespace within the one that `outer` made."""
    parents: dict[int, int] = {}
    inits = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines())
        except (OSError, ValueError):
            continue  # it ended while we looked
        parents[int(entry.name)] = int(fields["PPid"])
        if fields["NSpid"].split()[-1] == "1":
            inits.append(int(entry.name))
    for init in inits:
        line = []
        ancestor = parents[init]
        while ancestor not in (0, outer):
            line.append(ancestor)
            ancestor = parents.get(ancestor, 0)
        # Others may have containers, too.
        if ancestor == outer and set(line) & set(inits):
            return init
    return None
