"""Whether the daemon works: what /healthz and /readyz say, tried in threads of its own, as what is tried may hang."""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hyper2kvmd.daemon.watch import HANG_SECONDS, mounts
from hyper2kvmd.daemon.web import PLAIN, Answer
from hyper2kvmd.errors import Code, MigrationError
from hyper2kvmd.files import existing_parent
from hyper2kvmd.hypervisor.units import unit
from hyper2kvmd.run import Tools
from hyper2kvmd.settings.model import Settings

EVERY_SECONDS = 30.0
ANSWER_SECONDS = 8.0  # less than what counts as hanging, so that there is an answer that says more
# Without a watchdog, for which systemd says how long it waits: what WatchdogSec= is in the unit.
TURN_SECONDS = 60.0
LOOKS = 3  # a look at the exports is overdue after so many intervals, but not within OVERDUE_SECONDS of a busy host
OVERDUE_SECONDS = 30.0
FREE_BYTES = 16 << 20
LOCAL_LOCKS = ("nolock", "local_lock=all", "local_lock=flock")
REMEDY = {
    "settings": "Fix what `hyper2kvmd check-config` reports, then `systemctl reload hyper2kvmd`.",
    "exports": "Mount or create the directory, repair its file server, or change exports_dir.",
}


@dataclass(frozen=True)
class Verdict:
    """How a check stands: what is wrong, if anything is, how old that is, in seconds, and what was measured."""

    problem: str = ""
    remedy: str = ""
    age: float = 0.0
    value: float = math.nan

    def __str__(self) -> str:
        return f"failed: {self.problem}; {self.remedy}" if self.problem else "ok"


class Probe:
    """One thing that is tried again and again, in a thread. An attempt may raise MigrationError or OSError."""

    def __init__(self, attempt: Callable[[], Verdict]) -> None:
        self.attempt = attempt
        self._since: float | None = time.monotonic()  # when the attempt that goes on began
        self._last = (time.monotonic(), Verdict("not tried yet", "Wait a moment."))
        self._now = threading.Event()
        self._thread: threading.Thread | None = None

    def try_now(self) -> None:
        """Try now; the first call begins. The thread ends with the program, or by a defect: then this begins again."""
        self._now.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="probe", daemon=True)
            self._thread.start()

    def state(self, now: float) -> Verdict:
        """How it stands at `now`, by the monotonic clock. An attempt without an answer is a failure, too."""
        since, (ended, verdict) = self._since, self._last
        if since is not None and now - since > HANG_SECONDS:
            return Verdict(
                f"has not answered for {now - since:.0f} s",
                "Look for what hangs: the file server, libvirt, the storage.",
                now - since,
            )
        return replace(verdict, age=now - ended)

    def _work(self) -> None:
        while True:
            self._now.clear()
            self._since = time.monotonic()
            verdict = Verdict("the check itself failed", "Its trace is in the journal; tell the authors. Then reload.")
            try:
                verdict = self.attempt()
            except MigrationError as error:
                verdict = Verdict(error.message, error.hint)
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                remedy = "Check that it exists, its permissions, and how it is mounted."
                verdict = Verdict(f"{where}{error.strerror or error}", remedy)
            finally:
                self._last = (time.monotonic(), verdict)
                self._since = None
            self._now.wait(EVERY_SECONDS)


class Health:
    """What is known of the daemon's health. The daemon sets what is public; everything else is tried by itself."""

    def __init__(self, settings: Callable[[], Settings], watchdog_seconds: float | None) -> None:
        self._settings = settings
        self._limit = watchdog_seconds or TURN_SECONDS
        self.turned = time.monotonic()  # when the main loop last came round
        self.refused = ""  # why the settings of the last reload were
        self.looked: float | None = None  # when the last look at the exports ended
        self.interval = 0.0  # seconds between looks, with how long one takes
        self.trouble = ""  # why the exports directory cannot be read
        self.probes = {
            "locks": Probe(lambda: check_locks(settings().exports_dir)),
            "libvirt": Probe(lambda: check_libvirt(settings())),
            "output": Probe(lambda: check_room(settings().output_dir, "output_dir")),
            "work": Probe(lambda: check_room(existing_parent(settings().work_dir), "work_dir")),
        }

    def try_now(self) -> None:
        """Try everything now, and not when its time has come; the first call begins."""
        for probe in self.probes.values():
            probe.try_now()

    def hangs(self, now: float) -> str:
        """Why the main loop is taken for dead at `now`, by the monotonic clock; "" if it is alive."""
        age = now - self.turned
        return f"the main loop has not come round for {age:.0f} s" if age > self._limit else ""

    def checks(self, now: float) -> dict[str, Verdict]:
        """How everything stands that jobs need, by its name."""
        found = {
            "settings": Verdict(f"the last reload was refused: {self.refused}", REMEDY["settings"])
            if self.refused
            else Verdict(),
            "exports": self._exports(now),
            **{name: probe.state(now) for name, probe in self.probes.items()},
        }
        if not self.needs_libvirt():
            found["libvirt"] = Verdict()
        return found

    def all_well(self, now: float) -> bool:
        """Whether /healthz and /readyz have nothing to say against it."""
        return not self.hangs(now) and not any(state.problem for state in self.checks(now).values())

    def needs_libvirt(self) -> bool:
        """Whether jobs need libvirt, as far as the settings say; a manifest can ask for a boot test, too."""
        return _needs_libvirt(self._settings())

    def healthz(self, query: str, accept: str) -> Answer:
        """The page of whoever restarts what does not live."""
        hangs = self.hangs(time.monotonic())
        return Answer(503, PLAIN, f"failed: {hangs}\n".encode()) if hangs else Answer(200, PLAIN, b"ok\n")

    def readyz(self, query: str, accept: str) -> Answer:
        """The page of whoever asks why no job is done."""
        checks = self.checks(time.monotonic())
        status = 503 if any(state.problem for state in checks.values()) else 200
        if "application/json" in accept or "format=json" in query.split("&"):
            rows = {
                name: {
                    "ok": not state.problem,
                    "problem": state.problem,
                    "remedy": state.remedy,
                    "age_seconds": round(state.age, 1),
                }
                for name, state in checks.items()
            }
            return Answer(status, "application/json", json.dumps({"ready": status == 200, "checks": rows}).encode())
        lines = (f"{name}: {' '.join(str(state).split())}\n" for name, state in checks.items())
        return Answer(status, PLAIN, "".join(lines).encode(errors="backslashreplace"))

    def _exports(self, now: float) -> Verdict:
        if self.trouble:
            return Verdict(self.trouble, REMEDY["exports"])
        if self.looked is None:
            return Verdict("the exports directory has not been looked at yet", "Wait for the first look to end.")
        age = now - self.looked
        if age > max(LOOKS * self.interval, OVERDUE_SECONDS):
            return Verdict(f"the last look at the exports directory was {age:.0f} s ago", REMEDY["exports"], age)
        return Verdict(age=age)


def _needs_libvirt(settings: Settings) -> bool:
    return settings.libvirt.import_ or settings.validate_.test_boot


def check_locks(directory: Path) -> Verdict:
    """Whether a lock that is held keeps a second one out. Raise OSError.

    One host cannot try whether it keeps another one out; but whether an NFS mount asks its server, it says itself.
    """
    remedy = "Two runners could work on the same export. Mount the file system with locking (NFS: without nolock)."
    if local := _local_locks(directory):
        return Verdict(f"locks on {directory} are not seen by other hosts: it is mounted with {local}", remedy)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".hyper2kvmd-ready-") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        # Open for writing, as NFS wants it.
        with open(first.name, "r+b") as second:
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Verdict()
    return Verdict(f"flock does not exclude on {directory}", remedy)


def _local_locks(directory: Path) -> str:
    """The option that keeps a file system's locks within this host, as in nfs(5); "" if there is none."""
    device = directory.stat().st_dev
    for fields in mounts():
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            return next((option for option in fields[-1].split(",") if option in LOCAL_LOCKS), "")
    return ""


def check_libvirt(settings: Settings) -> Verdict:
    """Whether libvirt answers. Raise MigrationError (tool_missing).

    Another program asks: the library would take memory that the daemon does not need, and a call that hangs in it could
    not be ended.
    """
    if not _needs_libvirt(settings):
        return Verdict()
    uri = settings.libvirt.uri
    try:
        Tools().run("virsh", "--connect", uri, "uri", timeout=ANSWER_SECONDS)
    except MigrationError as error:
        if error.code is Code.TOOL_MISSING:
            raise
        return Verdict(
            f"{uri}: {(error.tail or error.message).splitlines()[-1]}",
            f"Start libvirt (`systemctl start {unit()}`), or restart it if it hangs; check libvirt.uri and the user's"
            " groups.",
        )
    return Verdict()


def check_room(directory: Path, field: str) -> Verdict:
    """Whether a directory can be written to, and has some space; its value is the bytes that are free.

    Raise OSError.
    """
    room = os.statvfs(directory)
    free = room.f_bavail * room.f_frsize
    # Nothing is written for the test: libvirt would see it come and go in its pool.
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        remedy = f"Mount it writable, give the service's user access, or set {field} to another directory."
        return Verdict(f"{directory} cannot be written to", remedy, value=free)
    if free < FREE_BYTES or (room.f_files and not room.f_favail):
        inodes = "" if free < FREE_BYTES else ", but no inode"
        remedy = f"Free some space there, or set {field} to a larger file system."
        return Verdict(f"{directory} has {free / 2**20:.0f} MiB free{inodes}", remedy, value=free)
    return Verdict(value=free)
