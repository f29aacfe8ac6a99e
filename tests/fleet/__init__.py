"""Several hosts and a real Slurm on one machine, for tests: `with Fleet(nodes=2) as fleet`.

Each host is a process with namespaces of its own (processes, network, mounts, host name), and all of it hangs on that
process: when it is killed, the kernel removes what ran on the host, its mounts and its cable. Nothing has a name
outside, so any number of fleets can be there at once, and when whoever made it is killed, only its directory is left.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests import ROOT

ACCOUNT = "hyper2kvm"  # whose jobs are; the hosts know it, the machine need not
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "tini", "ip", "nsenter", "unshare", "setpriv")
HEAD = "head"  # the host with the controller, and no slurmd: the daemon runs here
START_SECONDS = 60.0
PLACES = ("work", "images", "spool", "state", "log", "home")  # of which each host has its own

CONFIGURATION = """
ClusterName=fleet
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire={cred_expire}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=1,sched_min_interval=0
PriorityType=priority/basic
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={slurmd_timeout}
TCPTimeout=1
MessageTimeout=3
KillWait=5
MinJobAge=10
StateSaveLocation={root}/here/state
SlurmdSpoolDir={root}/here/spool
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={root}/here/log/slurmctld
SlurmdLogFile={root}/here/log/slurmd
MailProg=/bin/true
Licenses=filer1:1
{nodes}
PartitionName=migrations Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=closed Nodes=ALL AllowAccounts=others AllowQos=others State=UP
PartitionName=down Nodes=ALL State=DOWN
"""
NODE = "NodeName={name} NodeAddr={address} CPUs={cpus} RealMemory={memory_mb} TmpDisk=50000 Features={features}"


@dataclass
class Host:
    """One machine of the fleet. work, images: what the test sees of its work_dir and output_dir."""

    name: str
    address: str
    directory: Path
    init: subprocess.Popen[bytes] | None = None
    pid: int = 0  # of its first process, seen from outside
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """Its work_dir, from outside."""
        return self.directory / "work"

    @property
    def images(self) -> Path:
        """Its output_dir, from outside."""
        return self.directory / "images"

    def log(self, daemon: str) -> str:
        """What a daemon of it has logged."""
        path = self.directory / "log" / daemon
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self, program: str = "") -> list[int]:
        """The processes on it, seen from outside; those of one program, if it is named."""
        found = []
        with contextlib.suppress(OSError):
            space = os.readlink(f"/proc/{self.pid}/ns/pid")
            for entry in Path("/proc").iterdir():
                with contextlib.suppress(OSError):
                    if (
                        entry.name.isdigit()
                        and os.readlink(entry / "ns/pid") == space
                        and program in ("", (entry / "comm").read_text().strip())
                    ):
                        found.append(int(entry.name))
        return sorted(found)


class Fleet:
    """A controller, nodes, and one exports directory; everything is removed at the end.

    exports, work, images: as the hosts know them; of work and images each has its own (Host.work). bin: what the
    machine that the test runs on needs on PATH to talk to this Slurm. account: who runs jobs and commands, `root` if
    the checkout lies where nobody else can read it. settings: more lines of slurm.conf. It dies with the thread that
    made it. The hosts have a /run of their own, and /tmp together with the machine.
    """

    def __init__(
        self,
        nodes: int = 2,
        *,
        cpus: int = 4,
        memory_mb: int = 8000,
        account: str = ACCOUNT,
        slurmd_timeout: int = 5,
        cred_expire: int = 5,
        settings: str = "",
        checkout: Path = ROOT,
    ) -> None:
        self.account = account
        self.checkout = checkout
        self.settings = settings
        self.cluster = {"cpus": cpus, "memory_mb": memory_mb}
        self.times = {"slurmd_timeout": slurmd_timeout, "cred_expire": cred_expire}
        self.node_names = tuple(f"kvm{number}" for number in range(1, nodes + 1))
        self.hosts: dict[str, Host] = {}

    # Beginning and end

    def __enter__(self) -> Fleet:
        for program in PROGRAMS:
            if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
                raise SystemExit(f"{program} is not installed; run `make deps`")
        # Not below a test's own directory, which is closed to all but root.
        self.directory = Path(tempfile.mkdtemp(prefix="h2k-fleet-"))
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for host in self.hosts.values():
                self._end(host)
            if hasattr(self, "switch"):
                _kill(self.switch)
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> None:
        self.directory.chmod(0o755)
        self.exports, self.work, self.images = (self.directory / name for name in ("exports", "work", "images"))
        self.bin = self.directory / "bin"
        etc = self.directory / "etc"
        for place in (self.exports, self.work, self.images, self.bin, etc, etc / "slurm", self.directory / "local"):
            place.mkdir()
        (self.directory / "here").mkdir()
        self._write_accounts(etc)
        os.chown(self.exports, self.uid, self.gid)
        for number, name in enumerate((HEAD, *self.node_names), 1):
            self.hosts[name] = Host(name, f"10.77.0.{number}", self.directory / "hosts" / name)
            for place_name in PLACES:
                place = self.hosts[name].directory / place_name
                place.mkdir(parents=True)
                if place_name in ("work", "images", "home"):
                    os.chown(place, self.uid, self.gid)
        (etc / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())
        )
        key = etc / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        nodes = "\n".join(
            NODE.format(name=name, address=self.hosts[name].address, features=f"kvm,on-{name}", **self.cluster)
            for name in self.node_names
        )
        (etc / "slurm" / "slurm.conf").write_text(
            CONFIGURATION.format(root=self.directory, nodes=nodes, **self.times) + self.settings
        )
        plugin = "cgroup/v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "cgroup/v1"
        (etc / "slurm" / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        # Children of hyper2kvmd have no PYTHONPATH, and the environment may be an editable install of another checkout.
        write_script(
            self.directory / "local" / "hyper2kvmd",
            f"exec env PYTHONPATH={self.checkout} PYTHONDONTWRITEBYTECODE=1"
            f' {self.checkout}/.venv/bin/python -m hyper2kvmd "$@"',
        )
        self.switch = _spaces("--net")
        self._switched("ip link add br0 type bridge && ip link set br0 up")
        for name in self.hosts:
            self.boot(name)
        self.wait(lambda: all(state.startswith("idle") for state in self.states().values()), "all nodes are idle")

    def _write_accounts(self, etc: Path) -> None:
        """What the hosts know of users: those of this machine, and the service's."""
        for name in ("passwd", "group"):
            shutil.copyfile(f"/etc/{name}", etc / name)
        if self.account == "root" or self.account in (known := {entry.pw_name for entry in pwd.getpwall()}):
            entry = pwd.getpwnam(self.account)
            self.uid, self.gid = entry.pw_uid, entry.pw_gid
            return
        self.uid = self.gid = next(
            number for number in range(990, 100, -1) if number not in {entry.pw_uid for entry in pwd.getpwall()}
        )
        assert self.account not in known
        with (etc / "passwd").open("a") as file:
            file.write(f"{self.account}:x:{self.uid}:{self.gid}::{self.directory}/here/home:/usr/sbin/nologin\n")
        with (etc / "group").open("a") as file:
            file.write(f"{self.account}:x:{self.gid}:\n")

    # Hosts

    def boot(self, name: str) -> None:
        """Start a host, which is new or was killed, with what runs on it."""
        host = self.hosts[name]
        etc, here = self.directory / "etc", host.directory
        binds = {
            **{etc / each: Path("/etc") / each for each in ("hosts", "passwd", "group", "slurm")},
            here: self.directory / "here",
            host.work: self.work,
            host.images: self.images,
            self.directory / "local": Path("/usr/local/bin"),
        }
        script = "set -e; mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/munge /run/lock;" + "".join(
            f" mount --bind {source} {target};" for source, target in binds.items()
        )
        host.init = _spaces("--net", "--mount", "--uts", "--mount-proc", script=f"{script} hostname {name}; cd /;")
        host.pid = _first(host.init)
        port = f"p{host.address.rpartition('.')[2]}"
        self._switched(
            f"ip link add {port} type veth peer name eth0 netns {host.pid} && ip link set {port} master br0 up"
        )
        self.shell(name, f"ip link set lo up; ip addr add {host.address}/24 dev eth0; ip link set eth0 up")
        self.start_daemon(name, "munged")
        self.start_daemon(name, "slurmctld" if name == HEAD else "slurmd")
        for program in ("sbatch", "squeue", "scancel", "sinfo", "scontrol") if name == HEAD else ():
            words = shlex.join(self.words(HEAD, f"/usr/bin/{program}"))
            write_script(self.bin / program, f'exec {words} "$@"')

    def start_daemon(self, name: str, daemon: str) -> None:
        """Start munged, slurmd or slurmctld on a host; munged answers when this returns."""
        log = f"{self.directory}/here/log"
        words: dict[str, tuple[str, ...]] = {
            "munged": (
                *("munged", "--foreground", "--force", f"--key-file={self.directory}/etc/munge.key"),
                *("--socket=/run/munge/munge.socket.2", "--pid-file=/run/munge/pid", f"--seed-file={log}/munge.seed"),
                *(f"--log-file={log}/munged", "--num-threads=2"),
            ),
            "slurmctld": ("slurmctld", "-D"),
            "slurmd": ("slurmd", "-D", "-N", name),
        }
        with (self.hosts[name].directory / "log" / f"{daemon}.out").open("ab") as out:
            self.hosts[name].children.append(
                subprocess.Popen(
                    self.words(name, *words[daemon], account="root"),
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=ENVIRONMENT,
                )
            )  # fmt: skip
        if daemon == "munged":
            self.wait(
                lambda: self.run(name, "sh", "-c", "munge -n | unmunge", account="root", check=False).returncode == 0,
                f"munged answers on {name}",
            )

    def words(self, name: str, *argv: str, account: str | None = None) -> list[str]:
        """The words that run a program on a host, as the fleet's account or as another."""
        host = self.hosts[name]
        who = self.account if account is None else account
        uid, gid = (0, 0) if who == "root" else (self.uid, self.gid)
        return [
            *("/usr/bin/nsenter", "--target", str(host.pid), "--net", "--mount", "--uts", "--pid", "--wd=/", "--"),
            *("/usr/bin/setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--"),
            *argv,
        ]

    def run(
        self,
        name: str,
        *argv: str,
        account: str | None = None,
        check: bool = True,
        timeout: float = 60,
        stdin: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host to its end, in a clean environment."""
        return subprocess.run(
            self.words(name, *argv, account=account),
            env={**ENVIRONMENT, **(variables or {})},
            input=stdin,
            check=check,
            timeout=timeout,
            capture_output=True,
            text=True,
        )

    def shell(self, name: str, script: str) -> str:
        """Run a script as root on a host; what it printed."""
        return self.run(name, "sh", "-ec", script, account="root").stdout

    # Faults

    def kill(self, name: str) -> None:
        """A host loses its power: every process on it ends at once. boot() starts it again."""
        self._end(self.hosts[name])

    def pause(self, name: str, daemon: str = "") -> None:
        """Stop every process on a host, as a machine does that hangs; or those of one daemon."""
        stopped: set[int] = set()
        while left := set(self.hosts[name].processes(daemon)) - stopped:  # what was started while we looked
            for pid in left:
                _signal(pid, signal.SIGSTOP)
            stopped |= left

    def go_on(self, name: str) -> None:
        """Let a paused host go on."""
        inside = set(self.hosts[name].processes())
        # nsenter, which is outside, stopped itself when its child was stopped.
        for pid in inside | {parent for pid in inside if (parent := _parent(pid))}:
            _signal(pid, signal.SIGCONT)

    def stop_daemon(self, name: str, daemon: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End munged, slurmd or slurmctld on a host; what else runs there goes on. start_daemon() starts it again."""
        for pid in self.hosts[name].processes(daemon):
            _signal(pid, number)
        self.wait(lambda: not self.hosts[name].processes(daemon), f"{daemon} has ended on {name}")

    def cut(self, name: str, *, whole: bool = False) -> None:
        """Pull the cable of a host, or put it back."""
        port = f"p{self.hosts[name].address.rpartition('.')[2]}"
        self._switched(f"ip link set {port} {'up' if whole else 'down'}")

    def forget(self) -> None:
        """The controller loses its state; it must not be running."""
        shutil.rmtree(self.hosts[HEAD].directory / "state")
        (self.hosts[HEAD].directory / "state").mkdir()

    # What is there

    def states(self) -> dict[str, str]:
        """The state of each node, in Slurm's words; none while the controller does not answer."""
        done = self.run(HEAD, "sinfo", "--noheader", "--Node", "--format=%N %T", "--partition=migrations", check=False)
        return dict.fromkeys(self.node_names, "unknown") | dict(line.split() for line in done.stdout.splitlines())

    def wait(self, met: Callable[[], object], what: str, seconds: float = START_SECONDS) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + seconds
        while not met():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"{n}:\n{h.log('slurmctld')[-2000:]}{h.log('slurmd')[-2000:]}" for n, h in self.hosts.items()
                )
                raise AssertionError(f"not within {seconds:g} s: {what}\n{logs}")
            time.sleep(0.1)

    def _switched(self, script: str) -> None:
        command = ["nsenter", "--target", str(_first(self.switch)), "--net", "sh", "-ec", script]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)

    def _end(self, host: Host) -> None:
        if host.init is not None:
            _kill(host.init)
            host.init = None
        for child in host.children:
            _kill(child)
        host.children.clear()


ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def _spaces(*spaces: str, script: str = "") -> subprocess.Popen[bytes]:
    """A process that holds namespaces; it ends with us, and with it all in its process namespace."""
    process = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "--pid", "--fork", "--kill-child", "--"),
            *("sh", "-c", f"{script} exec tini -s -- sh -c 'echo; exec sleep infinity'"),
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as out:
        if not out.readline():
            raise RuntimeError(f"a host could not be made: unshare exited {process.wait()}")
    return process


def _first(process: subprocess.Popen[bytes]) -> int:
    """The first process in the namespaces of another one."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(30)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
