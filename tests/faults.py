"""`make soak`: break a migration in every way in turn, and check after each that nothing is lost, doubled or left."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
from libvirt import VIR_CONNECT_LIST_DOMAINS_ACTIVE

from hyper2kvmd.daemon import runner
from hyper2kvmd.errors import MigrationError
from hyper2kvmd.hypervisor.connection import connect
from hyper2kvmd.job import steps
from hyper2kvmd.job.context import job_id
from hyper2kvmd.notify import outbox
from hyper2kvmd.queue import estimate, facts, requests, setbacks
from hyper2kvmd.queue.claim import holder
from hyper2kvmd.queue.names import BOOT_LOG, BOOT_SCREEN, CANCEL, LOCK, LOG, REPORT
from hyper2kvmd.queue.state import FINAL, State, state_of
from hyper2kvmd.report.model import Report
from hyper2kvmd.settings.model import Settings
from tests import ROOT
from tests.conftest import disk_entry, report_of, run_job, write_manifest
from tests.guests.build import export as export_guest
from tests.integration.job import test_kill
from tests.libvirtd import session

SCHEMA = ROOT / "docs" / "migration-report.schema.json"
LANES = 4  # experiments at the same time: most of one is waiting
PATIENCE_SECONDS = 300.0
JOB_SECONDS = 0.25  # about what one attempt takes from its claim on; random moments lie within
MIB = 1 << 20
# What disks are in, with options of qemu-img; our own reader converts the last one.
FORMATS: dict[str, tuple[str, ...]] = {"raw": (), "qcow2": (), "vmdk": ("-o", "subformat=streamOptimized")}
# What converts a disk, by its command line.
TOOLS = {"tool": "qemu-img convert", "reader": "hyper2kvmd.image.stream"}

# The system calls with which a job changes what is on disk: its numbered steps.
STEPS = (
    "fchmod,flock,pwrite64,ftruncate,fsync,link,linkat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir"
)
TOOL_STEPS = "pwrite64,pwritev,fallocate,ftruncate,fdatasync,fsync"

# Stands before setpriv(1), with which the daemon starts its runners and a runner its tools. A runner, or a tool whose
# command line has the wanted word, for which something is armed, leaves its process id, and runs under strace if asked.
CATCHER = """#!/bin/sh
kind=runner export=
for word; do [ "$before" = run-job ] && export=${word##*/}; before=$word; done
if [ -z "$export" ]; then
    kind=tool
    export=$(tr '\\0' '\\n' < /proc/$PPID/cmdline | sed -n '/^run-job$/{n;s#.*/##p;}')
fi
armed=ARMED/$export.$kind
if [ -f "$armed" ]; then
    { read -r word; read -r options; } < "$armed"
    case "$*" in
    *"$word"*)
        if mv "$armed" "$armed.taken" 2>/dev/null; then
            echo $$ > "$armed.new" && mv "$armed.new" "$armed.pid"
            [ -z "$options" ] || { asked=$2; shift 3; set -- --pdeathsig "$asked" -- strace -D $options "$@"; }
        fi ;;
    esac
fi
exec /usr/bin/setpriv "$@"
"""


# How a request to libvirt, and the one to define a domain, begin in what strace shows of a write (remote_protocol.x).
REQUEST = r" \0\200\206"
DEFINE = r" \0\200\206\0\0\0\1\0\0\1^"


# The site ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vm:
    """An export as the exporter left it. `files` are the digests of what it wrote, `disks` the sources by their id."""

    name: str
    files: dict[str, str]
    disks: dict[str, tuple[Path, str]]
    fixed: bool = False


@dataclass
class Site:
    """A host of its own: directories, at least one daemon, perhaps a libvirt; and the exports that were dropped."""

    root: Path
    settings: Settings
    libvirt: Libvirt | None = None
    vms: list[Vm] = field(default_factory=list)
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    number: int = 0  # which of the experiments with this fault it is, from 0
    seconds: float = 10.0  # how long an experiment goes on that has no end of its own

    # Exports

    def drop(self, rng: random.Random, name: str = "web01", disks: int | None = None, format: str | None = None) -> Vm:
        """Drop an export with one or two small disks, the manifest last. format: of all; by chance if there is none."""
        directory = self.settings.exports_dir / name
        directory.mkdir()
        entries: list[dict[str, Any]] = []
        sources: dict[str, tuple[Path, str]] = {}
        for number in range(disks or rng.choice((1, 1, 2))):
            id, path = f"disk-{number}", directory / f"{name}-{number}.img"
            kind = format or rng.choice(tuple(FORMATS))
            path.write_bytes(rng.randbytes(rng.randrange(1, 8) << 16))
            os.truncate(path, MIB)
            if kind != "raw":
                raw = path.rename(path.with_suffix(".raw"))
                command = ["qemu-img", "convert", "-f", "raw", "-O", kind, *FORMATS[kind], str(raw), str(path)]
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
                raw.unlink()
            entries.append(disk_entry(path, kind, id, disk_type="data" if number else "boot"))
            sources[id] = (path, kind)
        if disks is None and rng.random() < 0.3:
            entries[0].pop("checksum")
        write_manifest(directory, entries)
        return self._dropped(Vm(name, digests(directory), sources))

    def drop_guest(self, guest: str) -> Vm:
        """Drop an export of a guest that FIX has work with."""
        directory = export_guest(guest, self.settings.exports_dir, vm_name=guest)
        disks = {"disk-0": (next(directory.glob("*.vmdk")), "vmdk")}
        return self._dropped(Vm(guest, digests(directory), disks, fixed=True))

    def _dropped(self, vm: Vm) -> Vm:
        self.vms.append(vm)
        return vm

    def export(self, vm: Vm) -> Path:
        return self.settings.exports_dir / vm.name

    def finals(self, vm: Vm) -> dict[str, Path]:
        """What the disks of a VM are to become, by their id."""
        return {id: self.settings.output_dir / f"{vm.name}-{id}.qcow2" for id in vm.disks}

    def paths(self, vm: Vm) -> dict[str, Path]:
        """What the first attempt at a VM opens and writes."""
        export = self.export(vm)
        job = job_id(export, vm.files["manifest.json"])
        final = self.finals(vm)["disk-0"]
        return {
            "export": export,
            "lock": export / LOCK,
            "report": export / f".{REPORT}.1.tmp",
            "work": self.settings.work_dir / job,
            "journal": self.settings.work_dir / job / f".{steps.JOURNAL}.1.tmp",
            "partial": final.with_name(f".{final.name}.{job}.1.partial"),
            "output": self.settings.output_dir,
        }

    def state(self, vm: Vm) -> State:
        return state_of(facts.look(self.export(vm), self.settings), self.settings, time.time())[0]

    # Processes

    def start(self) -> None:
        """Start one more daemon."""
        config = self.root / "settings.json"
        config.write_text(self.settings.model_dump_json(by_alias=True))
        environment = {"PATH": f"{self.root}/bin:{os.environ['PATH']}", "TMPDIR": f"{self.root}/tmp"}
        with (self.root / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "hyper2kvmd", "run", "--config", str(config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **environment},
            )  # fmt: skip
        self.daemons.append(process)

    def end(self, daemon: subprocess.Popen[bytes], number: signal.Signals) -> None:
        daemon.send_signal(number)
        daemon.wait(60)
        self.daemons.remove(daemon)

    def arm(self, vm: Vm, kind: str = "runner", options: Sequence[str] = (), word: str = "") -> None:
        """Have the next runner of a VM, or the next tool with `word` in its command line, caught."""
        armed = self.root / "armed" / f"{vm.name}.{kind}"
        armed.with_name(f"{armed.name}.pid").unlink(missing_ok=True)
        self.trace(vm, kind).unlink(missing_ok=True)
        if options:
            options = ["-o", str(self.trace(vm, kind)), *options, "--"]
        armed.with_suffix(".arming").write_text(f"{word}\n{' '.join(options)}\n")
        armed.with_suffix(".arming").rename(armed)

    def trace(self, vm: Vm, kind: str = "runner") -> Path:
        """What strace wrote about the process that was caught."""
        return self.root / "armed" / f"{vm.name}.{kind}.trace"

    def caught(self, vm: Vm, kind: str = "runner") -> int:
        """The process that walked into what was armed; 0 if the job ended without it."""
        pid_file = self.root / "armed" / f"{vm.name}.{kind}.pid"
        for _ in waiting(f"no {kind} was started"):
            if pid_file.exists():
                return int(pid_file.read_text())
            if self.state(vm) in FINAL:
                return 0
        return 0

    def log(self) -> str:
        """What all daemons and runners said."""
        return (self.root / "log").read_text(errors="replace")


@dataclass
class Libvirt:
    """A libvirtd that can be ended and started again with what it had defined."""

    directory: Path
    uri: str
    pid: int
    namespace: int  # keeps the mounts that hold its configuration
    again: subprocess.Popen[bytes] | None = None

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        os.kill(self.pid, number)
        for _ in waiting("libvirtd does not end"):
            if not is_alive(self.pid):
                break
        if self.again:
            self.again.wait()

    def start(self) -> None:
        for name in ("libvirt-sock", "libvirt-sock-ro", "libvirt-admin-sock"):
            (self.directory / name).unlink(missing_ok=True)
        options = ["--config", str(self.directory / "libvirtd.conf"), "--pid-file", str(self.directory / "pid")]
        with (self.directory / "log").open("ab") as log:
            self.again = subprocess.Popen(
                ["nsenter", f"--mount=/proc/self/fd/{self.namespace}", "libvirtd", *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[self.namespace],
            )  # fmt: skip
        self.pid = self.again.pid
        for _ in waiting("libvirtd does not come back"):
            if (self.directory / "libvirt-sock").exists():
                break


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    with contextlib.suppress(ProcessLookupError):  # it may end while it is looked at
        return test_kill.is_alive(pid)
    return False


def waiting(what: str, seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Turns of a loop that waits for something, until that takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.005)
    raise AssertionError(f"{what} within {seconds:g} s")


def listing(directory: Path) -> set[Path]:
    """What is in a directory, but for what a file system puts there."""
    return {path for path in directory.iterdir() if path.name != "lost+found"}


def digests(directory: Path) -> dict[str, str]:
    """The digest of every file in a directory, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in listing(directory)}


@contextlib.contextmanager
def site(**mounts: str) -> Iterator[Site]:
    """A site in a scratch directory; `mounts` says which of its directories are small file systems of which kind.

    With "libvirt" it has one of its own, whose QEMU has the account that is named.
    """
    root = Path(tempfile.mkdtemp(prefix="hyper2kvmd-faults-", dir="/var/tmp"))
    root.chmod(0o711)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root)
        for name in ("exports", "images", "work", "tmp", "bin", "armed"):
            (root / name).mkdir()
            if name in mounts:
                stack.enter_context(_small(root / name, mounts[name]))
        catcher = root / "bin" / "setpriv"
        catcher.write_text(CATCHER.replace("ARMED", str(root / "armed")))
        catcher.chmod(0o755)
        libvirt = stack.enter_context(_libvirt(root, mounts["libvirt"])) if "libvirt" in mounts else None
        here = Site(root, _settings(root, libvirt), libvirt)
        stack.callback(_end_all, here)
        yield here


def _settings(root: Path, libvirt: Libvirt | None) -> Settings:
    return Settings.model_validate(
        {
            "exports_dir": root / "exports",
            "output_dir": root / "images",
            "work_dir": root / "work",
            "settle_seconds": 0,
            "scan_interval_seconds": 1,
            "metrics": {"listen": ""},
            # Quick, and never so often that a job is given up: what is asked here is whether it can go on.
            "retry": {"max_attempts": 1000, "delay_seconds": 0.2, "max_delay_seconds": 1},
            "libvirt": {"uri": libvirt.uri, "default_network": "user"} if libvirt else {"import": False},
            "validate": {"compare": True},
        }
    )


@contextlib.contextmanager
def _small(directory: Path, kind: str) -> Iterator[None]:
    """A file system of 8 MiB and a few inodes on `directory`, until the end."""
    image = directory.with_suffix(".ext4")
    if kind == "tmpfs":
        what = ["-t", "tmpfs", "-o", "size=8m,nr_inodes=64", "tmpfs"]
    else:
        image.touch()
        os.truncate(image, 8 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-N", "64", "-m", "0", image], check=True, stdin=subprocess.DEVNULL)
        what = ["-o", "loop", str(image)]
    subprocess.run(["mount", *what, directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
        image.unlink(missing_ok=True)


@contextlib.contextmanager
def _libvirt(root: Path, account: str) -> Iterator[Libvirt]:
    with session(root, account, alone=True) as uri:
        pid = int((root / "libvirt" / "pid").read_text())
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        libvirt = Libvirt(root / "libvirt", uri, pid, namespace)
        try:
            yield libvirt
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(libvirt.pid, signal.SIGCONT)
            with contextlib.suppress(MigrationError), connect(uri) as connection:
                for domain in connection.listAllDomains(VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                    domain.destroy()
            if libvirt.again and libvirt.again.poll() is None:
                libvirt.end()
            os.close(namespace)


def _end_all(here: Site) -> None:
    """End every process of a site, whatever became of it."""
    for process in here.daemons:
        process.terminate()
    for process in here.daemons:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    left = set(references(here)) | {process.pid for process in here.daemons if process.poll() is None}
    for pid in left - ({here.libvirt.pid} if here.libvirt else set()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in here.daemons:
        process.wait(120)


# The invariants ------------------------------------------------------------------------------------------------


def settle(here: Site, patience: float = PATIENCE_SECONDS) -> None:
    """Wait until the daemons have brought every export to an end."""
    for _ in waiting("the exports do not come to an end", patience):
        assert all(daemon.poll() is None for daemon in here.daemons), "a daemon is dead"
        if all(here.state(vm) in FINAL for vm in here.vms):
            break


def invariants(here: Site, patience: float = 20) -> None:
    """What holds after every fault, once the daemons have brought all to an end. Raise AssertionError.

    patience: seconds for what still tells of the end, or is being ended; what is niced gets little of a busy processor.
    """
    assert here.daemons and all(daemon.poll() is None for daemon in here.daemons), "a daemon is dead"
    published: set[Path] = set()
    domains: dict[str, set[str]] = {}
    works: set[str] = set()
    for vm in here.vms:
        document = _one_report(here, vm)
        now = digests(here.export(vm))
        assert vm.files == {name: now.get(name) for name in vm.files}, f"{vm.name}: the source changed"
        there = {id: final for id, final in here.finals(vm).items() if final.exists()}
        for id, final in there.items():
            _complete(vm, *vm.disks[id], final)
        published |= set(there.values())
        for final in there.values() if not here.settings.libvirt.start else ():
            _ours(final)
        if document["status"] == "succeeded":
            assert there.keys() == vm.disks.keys(), f"{vm.name}: reported, and not published"
            targets = {disk["target"] for disk in document["disks"]}
            assert {str(path) for path in there.values()} == targets, f"{vm.name}: reported to be {targets}"
            domains[vm.name] = {str(path) for path in there.values()}
        elif there:
            # Published without a domain: the next attempt must know that these files are ours.
            works.add(document["job"])
    assert published == listing(here.settings.output_dir), "left in the output directory"
    claims = re.findall(r"claimed +attempt=(\d+).* job_id=(\S+)", here.log())
    assert len(set(claims)) == len(claims), "two runners had the same attempt"
    if here.libvirt:
        assert domains == _domains(here.libvirt.uri), "the domains are not those that were reported"
    deadline = time.monotonic() + patience
    while left := _leftovers(here, works):
        assert time.monotonic() < deadline, "; ".join(left)
        time.sleep(0.1)


def _leftovers(here: Site, works: set[str]) -> list[str]:
    """What is in the work directory beside `works`, and the processes that still run."""
    ours = {outbox.STATE, f"{outbox.STATE}-journal", outbox.LOCK, setbacks.FILE, estimate.FILE}
    names = {path.name for path in listing(here.settings.work_dir)} - ours - works
    left = [f"left in the work directory: {names}"] if names else []
    orphans = references(here)
    return [*left, f"processes are left over: {orphans}"] if orphans else left


def _one_report(here: Site, vm: Vm) -> dict[str, Any]:
    """The report of a VM: there is one, it is whole, and it is by whoever had the claim."""
    export = here.export(vm)
    assert {path.name for path in listing(export)} - vm.files.keys() - {LOG, BOOT_LOG, BOOT_SCREEN} == {LOCK, REPORT}, (
        f"{vm.name}: in the export are {sorted(path.name for path in export.iterdir())}"
    )
    document = report_of(export)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    Report.model_validate_json((export / REPORT).read_bytes())
    assert document["status"] in FINAL, f"{vm.name}: {document['status']} is not an end"
    assert document["manifest"]["sha256"] == vm.files["manifest.json"], f"{vm.name}: the report of another manifest"
    last = holder(export)["attempt"]
    assert 1 <= document["attempts"] <= last, f"{vm.name}: attempt {document['attempts']} of {last} wrote the report"
    return document


def _complete(vm: Vm, source: Path, format: str, final: Path) -> None:
    """Check that a published disk is whole, and holds what the source holds."""
    # -U: a VM may run on it.
    command = ["qemu-img", "check", "-q", "-U", "-f", "qcow2", str(final)]
    if not vm.fixed:
        # What FIX wrote is proved by the product itself (validate.compare); here it is only known to differ.
        command = ["qemu-img", "compare", "-U", "-f", format, "-F", "qcow2", str(source), str(final)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{final.name} is published and not whole: {done.stdout}{done.stderr}"
    links = final.stat().st_nlink
    assert links == 1, f"{final.name} has {links} names"


def _ours(final: Path) -> None:
    """Check that a published disk of a VM that does not run is the service's, and open to nobody else."""
    status = final.stat()
    assert (status.st_uid, status.st_mode & 0o077) == (os.geteuid(), 0), f"{final.name} was given away"
    assert "system.posix_acl_access" not in os.listxattr(final), f"{final.name} is open to another user"


def _domains(uri: str) -> dict[str, set[str]]:
    """The domains of a libvirt and their disks."""
    with connect(uri) as connection:
        found = [(domain.name(), domain.XMLDesc()) for domain in connection.listAllDomains()]
    assert len(found) == len(dict(found))
    return {name: set(re.findall(r"<source file='([^']+)'", xml)) for name, xml in found}


def _parent(pid: int) -> int:
    """The parent of a process; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def references(here: Site) -> dict[int, str]:
    """The processes that have to do with a site, by id, but for its daemons and libvirt."""
    libvirt = {here.libvirt.pid, _parent(here.libvirt.pid)} - {os.getpid()} if here.libvirt else set()
    ours = {os.getpid(), *(daemon.pid for daemon in here.daemons), *libvirt}
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            links = [os.readlink(link) for link in (entry / "cwd", *(entry / "fd").iterdir())]
        except OSError:  # it ended, or is not ours
            continue
        # libvirtd starts QEMU now and then, to see what it can do.
        if pid not in ours and _parent(pid) not in libvirt and is_alive(pid) and str(here.root) in f"{words!r}{links}":
            found[pid] = words.partition(b"\0\0")[0].replace(b"\0", b" ").decode(errors="replace")[:200]
    return found


# The faults ----------------------------------------------------------------------------------------------------

Inject = Callable[[Site, random.Random], int]


@dataclass(frozen=True)
class Fault:
    """One way to break a migration. `inject` starts the daemons, does it, and returns how many times it did.

    times: experiments in a round. mounts: see `site`. guest: takes minutes, for it migrates a real one. cancels: the
    job may end cancelled, too.
    """

    name: str
    what: str
    inject: Inject
    times: int = 1
    mounts: dict[str, str] = field(default_factory=dict)
    guest: bool = False
    cancels: bool = False


def kill(here: Site, runner: int, *, victims: str, number: signal.Signals = signal.SIGKILL) -> int:
    """Signal the runner, its tools, the daemon (which comes back) or all of them; return how many there were."""
    pids = {
        "runner": [runner],
        "tool": children(runner),
        "daemon": [],
        "all": [runner, *children(runner)],
    }[victims]
    daemons = list(here.daemons) if victims in ("daemon", "all") else []
    hit = 0
    for daemon in daemons:
        here.end(daemon, number)
        hit += 1
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            hit += 1
    for _ in daemons:
        here.start()
    return hit


def children(runner: int) -> list[int]:
    """The children of a process."""
    try:
        tasks = list(Path(f"/proc/{runner}/task").iterdir())
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:
        return []


def _status(pid: int) -> dict[str, str]:
    """What the kernel says about a process."""
    pairs = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value.strip() for name, _, value in pairs}


def at_random(victims: str, number: signal.Signals = signal.SIGKILL) -> Inject:
    """Signal at a random moment of an attempt."""

    def inject(here: Site, rng: random.Random) -> int:
        vm = here.drop(rng)
        here.arm(vm)
        here.start()
        runner = here.caught(vm)
        in_the_middle(here, vm, runner, rng)
        while victims == "tool" and is_alive(runner) and not children(runner):
            time.sleep(0.001)
        if not is_alive(runner):
            return 0
        return min(kill(here, runner, victims=victims, number=number), 1)

    return inject


def in_the_middle(here: Site, vm: Vm, runner: int, rng: random.Random) -> None:
    """Wait for a random moment after a runner claimed its export."""
    for _ in waiting("nothing is claimed"):
        if (here.export(vm) / LOCK).exists() or not is_alive(runner):
            break
    time.sleep(rng.uniform(0, JOB_SECONDS))


def at_step(victims: str, inside: str = "runner") -> Inject:
    """Kill while the runner, or what converts for it, stands still right after its n-th change on disk."""

    def inject(here: Site, rng: random.Random) -> int:
        numbers = list(range(1, steps_of(inside) + 1))
        random.Random(0).shuffle(numbers)  # so that few experiments are spread over the job, and many leave none out
        vm = step_through(here, inside)
        pid, step = here.caught(vm, process(inside)), numbers[here.number % len(numbers)]
        if stop_at(pid, here.trace(vm, process(inside)), step) < step:
            return 0
        runner = pid if inside == "runner" else int(_status(pid)["PPid"])
        return min(kill(here, runner, victims=victims), 1)

    return inject


def process(inside: str) -> str:
    """What the catcher calls it: whatever converts is a tool."""
    return "tool" if inside in TOOLS else inside


@functools.cache
def steps_of(inside: str) -> int:
    """How many numbered steps an undisturbed job has: changes on disk by the runner, or by what converts for it."""
    with site() as here:
        vm = step_through(here, inside)
        return stop_at(here.caught(vm, process(inside)), here.trace(vm, process(inside)), 1 << 20)


def step_through(here: Site, inside: str) -> Vm:
    """Start a job whose runner, or what converts for it, stops after every step."""
    vm = here.drop(random.Random(0), disks=1, format="vmdk" if inside == "reader" else "qcow2")
    subprocess.run(["sync", "--file-system", here.settings.exports_dir], check=True)
    calls, word = (TOOL_STEPS, TOOLS[inside]) if inside in TOOLS else (STEPS, "")
    # A runner's tools are left alone; but a tool is executed by what limits it.
    alone = ["-b", "execve"] if inside == "runner" else []
    here.arm(vm, process(inside), ["-f", *alone, "-e", f"trace={calls}", "-e", f"inject={calls}:signal=STOP"], word)
    here.start()
    return vm


def stop_at(pid: int, trace: Path, step: int, words: str = "") -> int:
    """Let a process that stops after every step go on until it has done `step` of them; return how many it did.

    words: only steps count that strace shows with these.
    """
    seen, done, told = 0, 0, time.monotonic()
    for _ in waiting("the process does not go on"):
        if not is_alive(pid):
            break
        parts = (trace.read_text(errors="replace") if trace.exists() else "").split("--- SIGSTOP {")
        # A stop has two lines, and only behind the second one can it be ended.
        stops = [before for before, behind in itertools.pairwise(parts) if "--- stopped by SIGSTOP ---" in behind]
        done = sum(words in before for before in stops)
        if done >= step:
            return done
        if len(stops) > seen or time.monotonic() > told + 0.2:
            seen, told = len(stops), time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return done


def failing(calls: str, error: str) -> Inject:
    """Have a system call of the runner or of its tools fail, once or from then on until the attempt ends."""

    def inject(here: Site, rng: random.Random) -> int:
        vm = here.drop(rng)
        path = here.paths(vm)[rng.choice(CALLS[calls].on)] if CALLS[calls].on else None
        when = f"{rng.randint(1, CALLS[calls].times)}{rng.choice(['', '+'])}"
        names = CALLS[calls].names
        here.arm(
            vm,
            options=[
                *("-f", "-e", f"trace={names}", "-e", f"inject={names}:error={error}:when={when}"),
                *(["-P", str(path)] if path else []),
            ],
        )
        here.start()
        runner = here.caught(vm)
        until_dead(runner)
        return int("(INJECTED)" in here.trace(vm).read_text(errors="replace"))

    return inject


def until_stage(here: Site, runner: int, stage: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for the beginning of a stage, or the end of the runner."""
    for _ in waiting(f"{stage} does not begin", seconds):
        if re.search(rf"stage started .* stage={stage} ", here.log()) or not is_alive(runner):
            break


def until_dead(runner: int) -> None:
    """Wait for the end of a runner."""
    for _ in waiting("the runner does not end"):
        if not is_alive(runner):
            break


def paused(here: Site, rng: random.Random) -> int:
    """Stop a runner, ask another one for the export, let the first go on."""
    vm = here.drop(rng)
    here.arm(vm)
    here.start()
    runner = here.caught(vm)
    in_the_middle(here, vm, runner, rng)
    if not is_alive(runner):
        return 0
    os.kill(runner, signal.SIGSTOP)
    try:
        held = here.state(vm) == State.RUNNING
        other = run_job(here.export(vm), here.settings)
        assert not held or other.returncode == 5, "a claim that is held was given away"
    finally:
        os.kill(runner, signal.SIGCONT)
    return int(held)


def stolen(here: Site, rng: random.Random) -> int:
    """Stop a runner, have the lock lost as a file server can lose it, let another one finish, wake the first."""
    vm = step_through(here, "runner")
    runner, step = here.caught(vm), rng.randint(6, steps_of("runner"))  # the claim takes the first five
    if stop_at(runner, here.trace(vm), step) < step:
        return 0
    if any(final.exists() for final in here.finals(vm).values()):
        let_go(runner)  # too late: nobody but this host can know that what is published is of this job
        return 0
    lock = here.export(vm) / LOCK
    copy = shutil.copy2(lock, lock.with_name(".copy"))
    os.rename(copy, lock)
    # As on another host, which shares the exports and the output, not the work.
    elsewhere = here.root / "elsewhere" / "work"
    elsewhere.mkdir(parents=True)
    done = run_job(here.export(vm), here.settings.model_copy(update={"work_dir": elsewhere}))
    assert done.returncode in (0, 5), f"whoever has the claim cannot work:\n{done.stderr}"
    let_go(runner)
    until_dead(runner)
    return 1


def power_cut(here: Site, rng: random.Random) -> int:
    """Stop a job at a step, and go on with what its file systems had written to their devices by then."""
    numbers = list(range(1, steps_of("runner") + 1))
    random.Random(0).shuffle(numbers)
    vm = step_through(here, "runner")
    step = numbers[here.number % len(numbers)]
    if stop_at(here.caught(vm), here.trace(vm), step) < step:
        return 0
    images = [here.root / f"{name}.ext4" for name in ("exports", "images", "work")]
    for image in images:
        shutil.copy(image, image.with_suffix(".then"))
    for daemon in list(here.daemons):
        here.end(daemon, signal.SIGKILL)
    for _ in waiting("the runner does not end"):
        if not references(here):
            break
    for image in images:
        subprocess.run(["umount", image.with_suffix("")], check=True)
        image.with_suffix(".then").replace(image)
        subprocess.run(["mount", "-o", "loop", image, image.with_suffix("")], check=True)
    here.start()
    return 1


def full(directory: str, what: str) -> Inject:
    """Fill a directory's file system, before the job or in the middle of it; make room after an attempt."""

    def inject(here: Site, rng: random.Random) -> int:
        vm = here.drop(rng)
        here.arm(vm)
        early = rng.random() < 0.6
        if early:
            ballast = fill(here.root / directory, what, rng)
        here.start()
        runner = here.caught(vm)
        if not early:
            in_the_middle(here, vm, runner, rng)
            ballast = fill(here.root / directory, what, rng)
        until_dead(runner)
        time.sleep(0.5)
        assert all(daemon.poll() is None for daemon in here.daemons), "the daemon died of a full file system"
        for path in ballast:
            path.unlink()
        return 1

    return inject


def fill(directory: Path, what: str, rng: random.Random) -> list[Path]:
    """Take all space (`space`) or all names (`inodes`) but for a random rest; return the files that do it."""
    ballast: list[Path] = []
    try:
        for number in itertools.count():
            with (directory / f".ballast-{number}").open("wb", buffering=0) as file:
                ballast.append(directory / f".ballast-{number}")
                while what == "space":
                    file.write(bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    if what == "space":
        os.truncate(ballast[0], max(0, ballast[0].stat().st_size - rng.choice((0, 1, 2, 4, 16, 64)) * 4096))
    else:
        for _ in range(rng.randrange(4)):
            ballast.pop().unlink()
    return ballast


def libvirt_before(here: Site, rng: random.Random) -> int:
    """libvirtd is not there when the job begins; it comes after the first attempt."""
    assert here.libvirt
    vm = here.drop(rng)
    here.arm(vm)
    here.libvirt.end(signal.SIGTERM)
    here.start()
    runner = here.caught(vm)
    until_dead(runner)
    here.libvirt.start()
    return 1


def at_request(here: Site, rng: random.Random, *, defines: float, others: tuple[int, int]) -> tuple[Vm, int, bool]:
    """A VM whose runner stands still after a request to libvirt, the runner, and whether it came as far as that.

    defines: how often the request is that to define the domain; else it is one of those with a number in `others`.
    """
    vm = here.drop(rng)
    here.arm(vm, options=["-f", "-b", "execve", "-e", "trace=write", "-e", "inject=write:signal=STOP"])
    here.start()
    runner = here.caught(vm)
    words, wanted = (DEFINE, 1) if rng.random() < defines else (REQUEST, rng.randint(*others))
    return vm, runner, stop_at(runner, here.trace(vm), wanted, words) == wanted


def in_define(how: str) -> Inject:
    """Do it to libvirtd when the runner has just asked it to define the domain, or for something else."""

    def inject(here: Site, rng: random.Random) -> int:
        assert here.libvirt
        _, runner, hit = at_request(here, rng, defines=0.5, others=(1, 16))
        if hit and how == "paused":
            os.kill(here.libvirt.pid, signal.SIGSTOP)
        elif hit:
            here.libvirt.end(signal.SIGTERM if how == "stopped" else signal.SIGKILL)
        let_go(runner)
        time.sleep(rng.uniform(0, 2))
        if hit and how == "paused":
            os.kill(here.libvirt.pid, signal.SIGCONT)
        elif hit:
            here.libvirt.start()
        return int(hit)

    return inject


def cancelled(here: Site, rng: random.Random) -> int:
    """Kill the runner after a request to libvirt, which may have started the VM, and have the job cancelled."""
    assert here.libvirt
    here.settings = _changed(here.settings, "libvirt", start=True)
    vm, runner, hit = at_request(here, rng, defines=0.3, others=(8, 30))
    if hit:
        requests.ask(here.export(vm), CANCEL)
        kill(here, runner, victims="runner")
    else:
        let_go(runner)
    return int(hit)


def in_boot_test(here: Site, rng: random.Random) -> int:
    """Kill the runner while libvirt's QEMU, which is another user, has its disks in the boot test."""
    here.settings = _changed(here.settings, "validate_", test_boot=True, boot_failure="warn", boot_seconds=1)
    vm = here.drop(rng)
    here.arm(vm)
    here.start()
    runner = here.caught(vm)
    until_stage(here, runner, "boot")
    time.sleep(rng.uniform(0, 1.5))
    return kill(here, runner, victims="runner") if is_alive(runner) else 0


def _changed(settings: Settings, section: str, **changes: Any) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=changes)})


def copied(here: Site, rng: random.Random) -> int:
    """Copy an export in, the manifest first, in pieces, with its old times."""
    here.settings = here.settings.model_copy(update={"settle_seconds": 3})
    vm = here.drop(rng)
    export, staged = here.export(vm), here.root / "staged"
    export.rename(staged)
    here.start()
    export.mkdir()
    for source in sorted(staged.iterdir(), key=lambda path: path.name != "manifest.json"):
        data, at = source.read_bytes(), 0
        with (export / source.name).open("wb") as file:
            while at < len(data):
                at += file.write(data[at : at + rng.randrange(1, MIB // 2)])
                file.flush()
                time.sleep(rng.uniform(0, 0.3))
        shutil.copystat(source, export / source.name)
    shutil.copystat(staged, export)
    settle(here)
    assert report_of(export)["attempts"] == 1, "a job began before all was there"
    return 1


def let_go(pid: int) -> None:
    """Let a process go on that stopped after a step, and have it stop no more."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        tracer = int(_status(pid)["TracerPid"])
        if tracer:
            os.kill(tracer, signal.SIGKILL)  # told to end, it would wait for the process that stands still
        for _ in waiting("strace does not end"):
            if not is_alive(tracer):
                break
        os.kill(pid, signal.SIGCONT)


def two_daemons(here: Site, rng: random.Random) -> int:
    """Two daemons on one directory, fed all the time, and something is killed again and again."""
    for _ in range(2):
        here.start()
    end, hits, numbers = time.monotonic() + here.seconds, 0, itertools.count()
    while time.monotonic() < end:
        if sum(here.state(vm) not in FINAL for vm in here.vms) < 6:
            here.drop(rng, f"vm{next(numbers)}")
        time.sleep(rng.uniform(0, 0.6))
        daemon = rng.choice(here.daemons)
        runners = children(daemon.pid)
        victims = {"runner": runners, "tool": [pid for runner in runners for pid in children(runner)]}
        if rng.random() < 0.15:
            here.end(daemon, signal.SIGKILL)
            here.start()
            hits += 1
        elif pids := victims[rng.choice(("runner", "tool"))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)
                hits += 1
    return hits


def in_stage(stage: str, seconds: float) -> Inject:
    """Kill the runner, or all, at a random moment of the first `seconds` of a stage on a real guest."""

    def inject(here: Site, rng: random.Random) -> int:
        vm = here.drop_guest("debian12-bios")
        here.arm(vm)
        here.start()
        runner = here.caught(vm)
        until_stage(here, runner, stage, 600)
        time.sleep(rng.uniform(0, seconds))
        if not is_alive(runner):
            return 0
        return min(kill(here, runner, victims=rng.choice(("runner", "all"))), 1)

    return inject


@dataclass(frozen=True)
class Call:
    """A system call that can fail: its variants, which of a job's files it is made on (all if empty), how often."""

    names: str
    times: int
    on: tuple[str, ...] = ()


CALLS = {
    "open": Call("openat", 2, ("export", "work", "journal", "partial", "report")),
    "write": Call("write,pwrite64,pwritev", 2, ("lock", "journal", "partial", "report")),
    "fsync": Call("fsync,fdatasync", 1, ("export", "lock", "work", "journal", "partial", "output", "report")),
    "rename": Call("rename,renameat,renameat2", 2),
    "link": Call("link,linkat", 1),
    "flock": Call("flock", 2),
}
ERRORS = {
    "ENOSPC": "no space left",
    "EIO": "input/output error",
    "EROFS": "read-only file system",
    "ESTALE": "stale file handle",
}
DIRECTORIES = {"output": "images", "exports": "exports", "work": "work", "tmp": "tmp"}

FAULTS = (
    Fault("kill-runner-at-step", "SIGKILL of the runner after its n-th change on disk", at_step("runner"), 15),
    Fault("kill-tool-at-step", "SIGKILL of qemu-img convert after its n-th write", at_step("tool", "tool"), 5),
    Fault("kill-runner-in-tool", "SIGKILL of the runner while qemu-img convert stands still after its n-th write",
          at_step("runner", "tool"), 3),
    Fault("kill-reader-at-step", "SIGKILL of our own reader after its n-th write", at_step("tool", "reader"), 5),
    Fault("kill-runner-in-reader", "SIGKILL of the runner while our own reader stands still after its n-th write",
          at_step("runner", "reader"), 3),
    Fault("kill-daemon-at-step", "SIGKILL of the daemon after the runner's n-th change on disk", at_step("daemon"), 15),
    Fault("kill-all-at-step", "SIGKILL of all of them after the runner's n-th change on disk", at_step("all"), 15),
    Fault("kill-runner", "SIGKILL of the runner at a random moment", at_random("runner"), 25),
    Fault("kill-tool", "SIGKILL of a tool at a random moment", at_random("tool"), 25),
    Fault("kill-daemon", "SIGKILL of the daemon at a random moment", at_random("daemon"), 25),
    Fault("kill-all", "SIGKILL of all of them at a random moment", at_random("all"), 25),
    Fault("stop-runner", "SIGTERM of the runner at a random moment", at_random("runner", signal.SIGTERM), 2),
    Fault("stop-daemon", "SIGTERM of the daemon at a random moment", at_random("daemon", signal.SIGTERM), 2),
    Fault("pause-runner", "SIGSTOP of the runner while another wants its export, then SIGCONT", paused, 5),
    Fault("claim-stolen", "the lock is lost while the runner sleeps, and another one does the job", stolen, 4),
    *(
        Fault(f"{name}-{error}", f"{name} fails with {error} ({meaning})", failing(name, error), 2)
        for name in CALLS
        for error, meaning in ERRORS.items()
    ),
    Fault("power-cut", "a reset after the runner's n-th change on disk: what was not flushed is lost", power_cut, 10,
          mounts={"exports": "ext4", "images": "ext4", "work": "ext4"}),
    *(
        Fault(
            f"{'full' if what == 'space' else 'inodes'}-{name}-{kind}",
            f"the {name} directory is a small {kind} without {'space' if what == 'space' else 'inodes'} for a while",
            full(directory, what),
            mounts={directory: kind},
        )
        for name, directory in DIRECTORIES.items()
        for what in ("space", "inodes")
        for kind in ("tmpfs", "ext4")
    ),
    Fault("libvirt-away", "libvirtd is stopped, and comes back after an attempt", libvirt_before,
          mounts={"libvirt": "root"}),
    Fault("libvirt-stopped", "SIGTERM of libvirtd right after a request, often that to define; then started",
          in_define("stopped"), 2, mounts={"libvirt": "root"}),
    Fault("libvirt-killed", "SIGKILL of libvirtd right after a request, often that to define; then started",
          in_define("killed"), 2, mounts={"libvirt": "root"}),
    Fault("libvirt-paused", "SIGSTOP of libvirtd right after a request, often that to define; SIGCONT seconds later",
          in_define("paused"), 2, mounts={"libvirt": "root"}),
    Fault("vm-runs-in-cancel", "SIGKILL of the runner when it may have started the VM, and a cancel", cancelled, 5,
          mounts={"libvirt": "root"}, cancels=True),
    Fault("qemu-is-another", "SIGKILL of the runner in a boot test; libvirt's QEMU is another user", in_boot_test, 3,
          mounts={"libvirt": "libvirt-qemu"}),
    Fault("copy-in-progress", "an export is copied in by pieces, the manifest first, with its old times", copied, 3),
    Fault("two-daemons", "two daemons, fed all the time; a runner, a tool or a daemon killed every half second",
          two_daemons),
    Fault("kill-in-inspect", "SIGKILL of the runner, or of all, while a guest is inspected", in_stage("inspect", 15),
          guest=True),
    Fault("kill-in-fix", "SIGKILL of the runner, or of all, while a guest is fixed", in_stage("fix", 30), guest=True),
    Fault("kill-in-commit", "SIGKILL of the runner, or of all, while the fix is laid onto the disk",
          in_stage("commit", 0.5), guest=True),
)  # fmt: skip


# Experiments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How one experiment went: how often something was injected, and how many attempts the job took."""

    fault: str
    hits: int
    attempts: int
    problem: str = ""


def experiment(fault: Fault, seed: str, number: int = 0, seconds: float = 10) -> Result:
    """Do it once on a site of its own, and check the invariants when all has come to an end."""
    rng = random.Random(seed)
    hits, attempts, problem, log = 0, 0, "", ""
    try:
        with site(**fault.mounts) as here:
            here.number, here.seconds = number, seconds
            try:
                hits = fault.inject(here, rng)
                conclude(here, 400 if fault.guest else PATIENCE_SECONDS)
                # None of the faults lasts, so nobody needs to do anything.
                errors = [error for vm in here.vms if (error := report_of(here.export(vm))["error"])]
                errors = [error for error in errors if error["code"] != "cancelled" or not fault.cancels]
                assert not errors, f"it does not go on by itself: {errors}"
                attempts = max((report_of(here.export(vm))["attempts"] for vm in here.vms), default=0)
            finally:
                log = here.log() if (here.root / "log").exists() else ""
    except (AssertionError, OSError, ValueError, subprocess.SubprocessError, jsonschema.ValidationError):
        problem = (
            f"{fault.name}, seed {seed}, number {number}: to do it again:\n"
            f"    python -m tests.faults --only {fault.name} --again {seed} --number {number}\n"
            f"{traceback.format_exc()}\nthe end of the log:\n{log[-3000:]}"
        )
    return Result(fault.name, hits, attempts, problem)


def conclude(here: Site, patience: float) -> None:
    """Wait for the end of all exports, and check the invariants."""
    settle(here, patience)
    # What a runner leaves that was killed between its report and its tidying. The daemon does this every hour.
    assert runner.spawn(here.settings, "hyper2kvmd.ctl", "prune", stdout=subprocess.DEVNULL).wait(60) == 0
    invariants(here)


def plan(faults: Sequence[Fault], seed: int, rounds: int | None) -> Iterator[tuple[Fault, str, int]]:
    """The experiments, round by round, each in another order: the fault, the seed, the number among its like."""
    for number in itertools.count() if rounds is None else range(rounds):
        turn = [(fault, index) for fault in faults for index in range(fault.times)]
        random.Random(f"{seed}/{number}").shuffle(turn)
        turn.sort(key=lambda one: one[1])  # if time runs out, every fault has had its turn
        for fault, index in turn:
            yield fault, f"{seed}/{number}/{fault.name}/{index}", number * fault.times + index


def soak(
    faults: Sequence[Fault],
    *,
    seed: int,
    rounds: int | None,
    seconds: float,
    lanes: int = LANES,
    endless: float = 10,
    stop: threading.Event | None = None,
    say: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Do experiments, `lanes` at a time, until the rounds are done or `seconds` have passed.

    endless: seconds for one that has no end of its own. stop: set when no more of them are to begin.
    """
    stop = stop or threading.Event()
    experiments, mutex, results = plan(faults, seed, rounds), threading.Lock(), list[Result]()
    deadline = time.monotonic() + seconds

    def lane() -> None:
        while time.monotonic() < deadline and not stop.is_set():
            with mutex:
                following = next(experiments, None)
            if following is None:
                return
            fault, own, number = following
            for turn in range(4):
                # A moment may come too late, or a call that is to fail may not be made: then another one.
                result = experiment(fault, f"{own}/{turn}", number, endless)
                with mutex:
                    results.append(result)
                    say(result)
                if result.hits or result.problem or time.monotonic() > deadline:
                    break

    with ThreadPoolExecutor(lanes) as pool:
        try:
            for future in [pool.submit(lane) for _ in range(lanes)]:
                future.result()
        finally:
            stop.set()
    return results


def table(faults: Sequence[Fault], results: Sequence[Result]) -> str:
    """What was injected how often and what came of it, as a table in Markdown."""
    lines = ["| fault | what is done | injected | attempts: median | most |", "|---|---|--:|--:|--:|"]
    for fault in faults:
        mine = [result for result in results if result.fault == fault.name and result.hits]
        attempts = sorted(result.attempts for result in mine) or [0]
        injected = sum(result.hits for result in mine)
        lines.append(f"| {fault.name} | {fault.what} | {injected} | {attempts[len(attempts) // 2]} | {attempts[-1]} |")
    return "\n".join(lines)


def main() -> int:
    """`python -m tests.faults`: the exit status is 0 if every invariant held."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, help="how many rounds (default: as many as there is time for)")
    parser.add_argument("--seconds", type=float, default=600, help="how long (default: 600)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--only", help="names of faults, separated by commas")
    parser.add_argument("--again", help="the seed of one experiment, to repeat it")
    parser.add_argument("--number", type=int, default=0, help="with --again: its number")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else [fault.name for fault in FAULTS]
    faults = [fault for fault in FAULTS if fault.name in only]
    if len(faults) < len(only):
        parser.error(f"--only: choose from {', '.join(fault.name for fault in FAULTS)}")
    if options.again:
        result = experiment(faults[0], options.again, options.number)
        print(result.problem or result)
        return int(bool(result.problem))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # not before what runs has been tidied away
    print(f"seed {options.seed}", flush=True)
    began = time.monotonic()

    def say(result: Result) -> None:
        print(
            f"{time.monotonic() - began:6.0f} s  {result.fault:22}"
            f"{'RED' if result.problem else '' if result.hits else 'missed'}",
            flush=True,
        )

    guests, quick = [fault for fault in faults if fault.guest], [fault for fault in faults if not fault.guest]
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(soak, guests, seed=options.seed, rounds=1, seconds=math.inf, lanes=1, stop=stop, say=say)
        try:
            results = soak(
                quick, seed=options.seed, rounds=options.rounds, seconds=options.seconds, endless=60, say=say
            )
        except BaseException:
            stop.set()
            raise
        results += slow.result()
    print(f"\n{table(faults, results)}\n")
    red = [result.problem for result in results if result.problem]
    print(f"{len(results)} experiments, {sum(result.hits for result in results)} injections, {len(red)} red")
    print("\n\n".join(red), file=sys.stderr)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
