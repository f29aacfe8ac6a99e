"""Exports, settings and a daemon for a fleet: what a test of several hosts and a soak of them share."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from hyper2kvmd.settings.model import Settings
from tests import ROOT
from tests.conftest import disk_entry, report_of, write_manifest
from tests.fleet import ACCOUNT, ENVIRONMENT, HEAD, Fleet, write_script
from tests.integration.daemon.test_daemon import free_port

EXAMPLE = ROOT / "packaging/dispatch/ssh/h2k-ssh"
METRICS = "127.0.0.1:9878"  # on the head, which has a network of its own


class Campaign:
    """A fleet that migrates: its head has the daemon, its nodes do the jobs, and all have the same settings.

    dispatch: settings of that section. ssh: jobs are placed by the shipped example for ssh, which a script plays. That
    can enter hosts only from outside, as root; so there, the machine itself is the head.
    """

    def __init__(self, nodes: int, *, ssh: bool = False, dispatch: dict[str, Any] | None = None, **more: Any) -> None:
        self.dispatch = {"engine": "slurm", "cpus": 1, "memory_mb": 100, **(dispatch or {})}
        # As the service's user, where that may read the checkout.
        account = ACCOUNT if _open_to_all(ROOT) and not ssh else "root"
        self.ssh = ssh
        self.fleet = Fleet(nodes, cpus=2, account=account, **more)

    def __enter__(self) -> Campaign:
        self.fleet.__enter__()
        fleet = self.fleet
        self.config = fleet.directory / "hyper2kvmd.json"
        shape = {
            "exports_dir": str(fleet.exports),
            "output_dir": str(fleet.images),
            "work_dir": str(fleet.work),
            "settle_seconds": 0,
            "scan_interval_seconds": 1,
            "retry": {"delay_seconds": 5, "max_delay_seconds": 10},
            "libvirt": {"import": False},
            "metrics": {"listen": METRICS if not self.ssh else f"127.0.0.1:{free_port()}"},
            "guest": {"memory_mb": 512, "accel": "tcg"},
            "dispatch": over_ssh(fleet, fleet.directory / "local", fleet.node_names)
            | {"program": ["/usr/local/bin/hyper2kvmd"]}
            if self.ssh
            else self.dispatch,
        }
        self.settings = Settings.model_validate(shape)
        self.config.write_text(self.settings.model_dump_json(by_alias=True))
        self.config.chmod(0o644)
        python = f"env PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1 {ROOT}/.venv/bin/python"
        for name, module in (("hyper2kvmd", "hyper2kvmd"), ("hyper2kvmctl", "hyper2kvmd.ctl")):
            write_script(fleet.directory / "local" / name, f'exec {python} -m {module} "$@" --config {self.config}')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.fleet.__exit__(kind, error, trace)

    def _head(self, program: str, *words: str) -> list[str]:
        """The words that run a program on the head."""
        if self.ssh:
            return [str(self.fleet.directory / "local" / program), *words]
        return self.fleet.words(HEAD, program, *words)

    def slow(self, seconds: float) -> None:
        """Have every conversion begin after so many seconds, on all hosts: long enough to be seen, and to be killed."""
        text = f'[ "$1" = convert ] && sleep {seconds:g}\nexec /usr/bin/qemu-img "$@"'
        write_script(self.fleet.directory / "local" / "qemu-img", text)

    def drop(self, name: str, size: int) -> Path:
        """Drop an export with one raw disk of random bytes, whole, as an exporter that moves it in."""
        ready = self.fleet.directory / "ready" / name
        ready.mkdir(parents=True)
        disk = ready / f"{name}-disk-0.raw"
        disk.write_bytes(os.urandom(size))
        write_manifest(ready, [{**disk_entry(disk), "local_path": disk.name}])
        for path in (ready, *ready.iterdir()):
            os.chown(path, self.fleet.uid, self.fleet.gid)
        return ready.rename(self.fleet.exports / name)

    @contextmanager
    def daemon(self) -> Iterator[subprocess.Popen[bytes]]:
        """The daemon, on the head; its output is in the head's log."""
        with (self.fleet.hosts[HEAD].directory / "log" / "hyper2kvmd").open("ab") as out:
            process = subprocess.Popen(
                self._head("hyper2kvmd", "run"),
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=ENVIRONMENT,
            )  # fmt: skip
            try:
                yield process
            finally:
                for pid in [process.pid] if self.ssh else self._daemons():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
                process.wait(60)

    def _daemons(self) -> list[int]:
        """The processes of daemons on the head, not those of nsenter, which are outside."""
        found = []
        for pid in self.fleet.hosts[HEAD].processes():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if words[1:4] == [b"-m", b"hyper2kvmd", b"run"]:
                    found.append(pid)
        return found

    def kill_daemon(self) -> None:
        """Kill the daemon on the head with SIGKILL; daemon() ends with that."""
        for pid in self._daemons():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def jobs_on(self, name: str) -> list[str]:
        """The command lines of the jobs, and of their tools, that run on a host."""
        found = []
        for pid in self.fleet.hosts[name].processes():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "run-job" in words or "qemu-img" in words:
                    found.append(words)
        return found

    def clear(self, exports: Iterable[Path]) -> None:
        """Remove exports that are done with, and their disks."""
        for export in exports:
            for host in self.fleet.hosts.values():
                for path in host.images.glob(f"{export.name}-*"):
                    path.unlink()
            shutil.rmtree(export)

    def ctl(self, *words: str) -> Any:
        """What a command of hyper2kvmctl says on the head, with --json."""
        done = subprocess.run(
            self._head("hyper2kvmctl", *words, "--json"),
            capture_output=True, text=True, check=False, timeout=120, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def hosts(self) -> dict[str, dict[str, Any]]:
        """The rows of `hosts`, by name."""
        return {row["host"]: row for row in self.ctl("hosts")["hosts"]}

    def running_on(self, host: str) -> list[str]:
        """The exports that a job works on there, as `list` on the head says."""
        rows = [row for row in self.ctl("list") if row["progress"] is not None]
        return [Path(row["export"]).name for row in rows if row["progress"]["host"] == host]

    def watch(self, exports: Sequence[Path], seconds: float, pause: float = 0.0) -> dict[str, set[str]]:
        """Wait until all have a report; return on which hosts `list` showed each of them running meanwhile.

        pause: seconds between two looks, where the machine has others to serve.
        """
        seen: dict[str, set[str]] = {export.name: set() for export in exports}

        def done() -> bool:
            time.sleep(pause)
            for row in self.ctl("list"):
                if row["progress"] is not None:
                    seen[Path(row["export"]).name].add(row["progress"]["host"])
            return all((export / "migration-report.json").exists() for export in exports)

        self.fleet.wait(done, f"{len(exports)} exports are done: {self.ctl('list')}", seconds)
        return seen

    def metrics(self) -> str:
        """The daemon's metrics."""
        url = f"http://{self.settings.metrics.listen}/metrics"
        script = f"import urllib.request as u; print(u.urlopen('{url}', timeout=5).read().decode())"
        where = [] if self.ssh else self.fleet.words(HEAD)
        return subprocess.run(
            [*where, "/usr/bin/python3", "-c", script], capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def check_disk(self, export: Path) -> None:
        """Raise AssertionError unless the disk of an export is published once, on the host of its report, and whole."""
        report = report_of(export)
        there = {
            name: sorted(path.name for path in host.images.iterdir() if re.match(rf"\.?{export.name}-", path.name))
            for name, host in self.fleet.hosts.items()
        }
        worker = report["host"]["name"]
        assert {worker: [f"{export.name}-disk-0.qcow2"]} == {name: files for name, files in there.items() if files}
        disk = self.fleet.hosts[worker].images / f"{export.name}-disk-0.qcow2"
        source = export / f"{export.name}-disk-0.raw"
        command = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(source), str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert 0 == done.returncode, done.stdout + done.stderr


def over_ssh(fleet: Fleet, directory: Path, hosts: Iterable[str]) -> dict[str, Any]:
    """The section `dispatch` that the head of the shipped example for ssh shows, with that in a directory.

    hosts: those that it knows, some of which need not be there. Only ssh itself is played by a script.
    """
    program = directory / "h2k-ssh"
    shutil.copy(EXAMPLE, program)
    there = "".join(
        f'{name}) shift; exec {shlex.join(fleet.words(name, "sh", "-c"))} "$*" ;;\n' for name in fleet.node_names
    )
    # Like ssh, it hands one string to a shell, and ends with 255 if there is no such host.
    write_script(directory / "remote", f'case $1 in\n{there}esac\necho "$1 does not answer" >&2\nexit 255')
    (directory / "h2k-ssh.conf").write_text(
        f'HOSTS="{" ".join(hosts)}"\nJOBS={fleet.directory}/here/home/jobs\nREMOTE={directory}/remote\n'
    )
    # What its head says of the settings is what is used.
    lines = [line.removeprefix("#") for line in EXAMPLE.read_text().splitlines() if line.startswith("#     ")]
    shape: dict[str, Any] = yaml.safe_load("\n".join(lines))["dispatch"]
    for words in shape["command"].values():
        words[0] = str(program)
    return shape


def _open_to_all(directory: Path) -> bool:
    """Whether everybody may read what is in a directory."""
    way = (directory, *directory.parents)
    return all(path.stat().st_mode & stat.S_IXOTH for path in way)
