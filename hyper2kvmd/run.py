"""The only place a process is started: clean environment, no shell, nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import structlog

from hyper2kvmd.errors import Cancelled, Code, MigrationError

log = structlog.get_logger()

TAIL_LINES = 25
KILL_AFTER_SECONDS = 5.0
_KEPT_ENVIRONMENT = (
    *("PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "JOURNAL_STREAM"),
    "CREDENTIALS_DIRECTORY",  # the path; the files in it are for the service's user alone
)
_LIBGUESTFS_PREFIX = "LIBGUESTFS_"
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))
_STORAGE = tuple(map(os.strerror, (errno.EIO, errno.EROFS, errno.ESTALE)))  # the tools speak LC_ALL=C


@dataclass(frozen=True)
class Done:
    """A process that ended: its exit status and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Tools:
    """Runs the tools of one job.

    `claim_fd` is handed to every tool, so that the claim stays held while any of them lives.
    `cancel` ends the tool that is running, with its whole process group, and raises Cancelled.
    """

    claim_fd: int | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    def run(
        self,
        *argv: str | os.PathLike[str],
        accept: Sequence[int] = (0,),
        timeout: float | None = None,
        on_output: Callable[[bytes], None] | None = None,
        limits: Sequence[str] = (),
        stdin: bytes = b"",
        variables: Mapping[str, str] | None = None,
        cwd: str | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Done:
        """Run a tool to its end and return what it wrote.

        accept: exit statuses that are not errors. timeout: seconds.
        on_output: gets standard output as it comes, instead of it being collected.
        limits: options for prlimit(1), in plain bytes and seconds. stdin: what it finds on its standard input.
        variables: what its environment has besides ours. cwd: its working directory, if not this process's.
        pass_fds: descriptors that it gets under their numbers.
        Raise MigrationError (tool_missing, tool_failed) or Cancelled.
        """
        command = [os.fspath(word) for word in argv]
        limited = [*(["prlimit", *limits] if limits else []), *command]
        with _holding(stdin) as input_fd:
            fds = (*pass_fds, *(() if self.claim_fd is None else (self.claim_fd,)))
            process = spawn(limited, pass_fds=fds, stdin=input_fd, variables=variables, cwd=cwd)
        log.debug("tool started", command=shlex.join(command), pid=process.pid)
        started = time.monotonic()
        try:
            stdout, stderr = self._communicate(process, on_output, timeout, command)
        finally:
            end(process)
            process.stdout.close()  # type: ignore[union-attr]  # both are pipes, see spawn()
            process.stderr.close()  # type: ignore[union-attr]
        log.debug(
            "tool ended",
            command=command[0],
            pid=process.pid,
            status=process.returncode,
            seconds=round(time.monotonic() - started, 3),
        )
        done = Done(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))
        if done.returncode not in accept:
            raise _failure(command, done)
        return done

    def _communicate(
        self,
        process: subprocess.Popen[bytes],
        on_output: Callable[[bytes], None] | None,
        timeout: float | None,
        command: list[str],
    ) -> tuple[bytes, bytes]:
        """Read both pipes until the tool ends, looking at `cancel` at least five times a second."""
        assert process.stdout and process.stderr
        collected = {process.stdout: bytearray(), process.stderr: bytearray()}
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for pipe in collected:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                if self.cancel.is_set():
                    raise Cancelled
                if deadline is not None and time.monotonic() > deadline:
                    raise MigrationError(
                        Code.TOOL_FAILED,
                        f"{shlex.join(command)} did not end within {timeout:g} s",
                        "Look at the host's load and storage; run the command by hand to see where it hangs.",
                        tail=tail(collected[process.stderr].decode(errors="replace")),
                    )
                ended = process.poll() is not None  # asked first: what it said before it ended is there to be read
                ready = selector.select(timeout=0.2)
                if not ready and ended:
                    break  # a child of the tool that outlives it holds the pipes; what it says is of no interest
                for key, _ in ready:
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stdout and on_output is not None:
                        on_output(data)
                    else:
                        kept = collected[key.fileobj]  # type: ignore[index]
                        kept += data
                        # Only the end of an endless error stream is of use, and only that is kept.
                        if key.fileobj is process.stderr and len(kept) > 1 << 20:
                            del kept[: len(kept) - (1 << 16)]
        process.wait()
        return bytes(collected[process.stdout]), bytes(collected[process.stderr])


def spawn(
    argv: Sequence[str],
    *,
    claim_fd: int | None = None,
    pass_fds: Sequence[int] = (),
    stderr: int | None = subprocess.PIPE,
    stdout: int | None = subprocess.PIPE,
    stdin: int = subprocess.DEVNULL,
    variables: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in its own session that dies with the thread that started it.

    Raise MigrationError (tool_missing) if the program is not there.
    """
    fds = (*pass_fds, *(() if claim_fd is None else (claim_fd,)))
    # setpriv asks the kernel to kill the tool when we die, SIGKILL included; preexec_fn is not safe in threads.
    try:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=fds,
            env={**environment(), **(variables or {})},
            cwd=cwd,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise _missing("setpriv") from None
    return process


@contextlib.contextmanager
def _holding(data: bytes) -> Iterator[int]:
    """A descriptor that a child can read `data` from. No pipe: nobody has to write while the child reads."""
    if not data:
        yield subprocess.DEVNULL
        return
    with open(os.memfd_create("stdin", os.MFD_CLOEXEC), "r+b") as file:
        file.write(data)
        file.seek(0)
        yield file.fileno()


def become(argv: Sequence[str]) -> NoReturn:
    """Become another program, in the environment that this one has. Raise OSError."""
    os.execvp(argv[0], [*argv])


def environment() -> dict[str, str]:
    """The environment of every child: a short list of ours, a fixed locale, no notification socket."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_ENVIRONMENT or name.startswith(_LIBGUESTFS_PREFIX)
    }
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **kept, "LC_ALL": "C.UTF-8"}


def end(process: subprocess.Popen[bytes], patience: float = KILL_AFTER_SECONDS) -> None:
    """End a process and its group: TERM, and KILL for what is left after `patience` seconds."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        # Also when the process has ended by now: what it had started need not have.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(text: str) -> str:
    """The last lines of a tool's output, where the reason of a failure stands."""
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])


# RHEL has it under another name, where no PATH leads.
QEMU = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm")


def qemu() -> str:
    """The path of QEMU for x86_64. Raise MigrationError (tool_missing) if there is none."""
    for program in QEMU:
        if found := shutil.which(program, path=environment()["PATH"]):
            return found
    hint = "Install qemu-system-x86 (Debian, Ubuntu), qemu-system-x86-core (Fedora) or qemu-kvm-core (RHEL)."
    raise MigrationError(Code.TOOL_MISSING, f"{QEMU[0]} is not installed", hint)


def _missing(program: str) -> MigrationError:
    return MigrationError(
        Code.TOOL_MISSING,
        f"{program} is not installed",
        f"Install the package that holds {program}; `hyper2kvmctl doctor` lists what the host needs.",
    )


def storage_failed(what: str, done: Done) -> MigrationError | None:
    """The error (io_error) if a tool says that the storage failed, None if it says nothing of that."""
    if not any(reason in done.stderr for reason in _STORAGE):
        return None
    return MigrationError(
        Code.IO_ERROR,
        f"{what}: {tail(done.stderr).splitlines()[-1]}",
        "Check the storage: `journalctl -k`, and the mount's state and options; the daemon retries the job.",
        tail=tail(done.stderr),
    )


def _failure(command: list[str], done: Done) -> MigrationError:
    if done.returncode == 127 and "No such file or directory" in done.stderr:  # setpriv could not find it
        return _missing(command[0])
    if any(reason in done.stderr for reason in _FULL):
        return MigrationError(
            Code.NO_SPACE,
            f"{command[0]} ran out of space: {tail(done.stderr).splitlines()[-1]}",
            "Free some space on that file system, or set output_dir or work_dir to a larger one.",
            tail=tail(done.stderr),
        )
    # What a tool could not read is the source's fault, not the storage's: see qemu_img.convert().
    if "while reading" not in done.stderr and (error := storage_failed(shlex.join(command), done)):
        return error
    if done.returncode in (-signal.SIGKILL, -signal.SIGTERM):
        return MigrationError(
            Code.TOOL_KILLED,
            f"{shlex.join(command)} was killed by {signal.Signals(-done.returncode).name}",
            "Most often the kernel killed it for lack of memory: see `journalctl -k`, and lower workers.",
            tail=tail(done.stderr),
        )
    how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"exited {done.returncode}"
    return MigrationError(
        Code.TOOL_FAILED,
        f"{shlex.join(command)} {how}: {(tail(done.stderr).splitlines() or ['(no message)'])[-1]}",
        "The last lines of its output are in the report; run the command by hand to see more.",
        tail=tail(done.stderr),
    )
