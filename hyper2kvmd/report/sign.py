"""Signs reports with an SSH key, and checks such signatures; ssh-keygen does all of the cryptography."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from hyper2kvmd.errors import Code, Finding, MigrationError
from hyper2kvmd.files import user_name
from hyper2kvmd.run import Done, Tools
from hyper2kvmd.text import plain

# What the signatures are for: one that the same key made for anything else is none.
NAMESPACE = "hyper2kvmd-report"
SETTING = "report.sign_key"
SECONDS = 30.0
KEY_LIMIT = 64 << 10
SIGNATURE_LIMIT = 64 << 10
_PUBLIC_KEY = re.compile(rb"(ssh|ecdsa|sk)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/=]+( [^\r\n]*)?\r?\n?")
_TRIAL = b"a trial\n"
_ANOTHER = "Make another key: `ssh-keygen -t ed25519 -N '' -f FILE`."
_CHANGED = (
    "The report, or its signature, was changed or damaged: take both from a backup. If nobody has them, `hyper2kvmctl"
    " retry` migrates the VM again."
)


def sign(tools: Tools, key: Path, data: bytes) -> bytes:
    """The signature of `data`, which is proved to be one of just that.

    Raise MigrationError (sign_key_unusable, tool_missing, tool_killed) or OSError.
    """
    _check_key(key)
    try:
        # -P: the standard input would be asked for a passphrase, and that has the data.
        done = _ssh_keygen(tools, "sign", "-P", "", "-f", str(key), stdin=data)
    except MigrationError as error:
        if error.code != Code.TOOL_FAILED:
            raise
        hint = "Use a key in a plain file: one on a token waits for somebody to touch it."
        raise _unusable(key, f"cannot sign: {error.message}", hint) from None
    if done.returncode:
        raise _refused(key, done.stderr)
    signature = done.stdout.encode()
    with _file(signature) as file:
        proof = _intact(tools, data, file)
    if proof.returncode:
        raise _unusable(key, f"makes signatures that are not good: {_last(proof.stderr)}", _ANOTHER)
    return signature


def check_key(tools: Tools, key: Path) -> None:
    """Sign something with a key. Raise like sign()."""
    sign(tools, key, _TRIAL)


def verify(tools: Tools, data: bytes, signature: bytes, signers: bytes, at: datetime) -> str | Finding:
    """Who signed `data` with which key, in the words of ssh-keygen; or why that is not known to be so.

    signers: whose signatures count, as ssh-keygen(1) has it under ALLOWED SIGNERS. at: when a key must be valid that
    has dates there, in UTC. Raise MigrationError (tool_missing, tool_failed) or OSError.
    """
    moment = f"-Overify-time={at:%Y%m%d%H%M%SZ}"
    with _file(signature) as file, _file(signers) as allowed:
        intact = _intact(tools, data, file)
        if intact.returncode:
            reason = _last(intact.stderr)
            return Finding("signature_wrong", f"the signature is not one of this report: {reason}", _CHANGED)
        who = ("-f", allowed, "-s", file, moment)
        found = _ssh_keygen(tools, "find-principals", *who)
        for name in found.stdout.splitlines() if not found.returncode else ():
            if name.startswith("!"):  # who is shut out
                continue
            done = _ssh_keygen(tools, "verify", "-I", name, *who, stdin=data)
            if not done.returncode:
                return plain(done.stdout.strip(), 400)
    key = intact.stdout.strip().partition(" with ")[2]
    # Such as that it has expired. Of other lines it says, too, what is wrong with them.
    said = [line.partition(": ")[2] for line in found.stderr.splitlines() if ": key " in line]
    return Finding(
        "signer_unknown",
        f"the signature is good, but by none of those who may sign: it is by the {plain(key, 400)}"
        + (f" ({plain(said[0], 400)})" if said else ""),
        "If you know this key as that of a host of yours, add it to the allowed signers; if not, do not trust the"
        " report.",
    )


def signers_of(public_key: bytes) -> bytes:
    """Allowed signers: only who has the key to this one public key. Raise ValueError for what is none."""
    if not _PUBLIC_KEY.fullmatch(public_key):
        raise ValueError("not one public key in the form of OpenSSH")
    return b'hyper2kvmd namespaces="' + NAMESPACE.encode() + b'" ' + public_key


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[int]:
    """A file in memory: nothing of it is left, whoever is killed, and no disk has to have room for it."""
    with open(os.memfd_create("file", os.MFD_CLOEXEC), "r+b") as file:
        file.write(data)
        file.flush()
        yield file.fileno()


def _ssh_keygen(tools: Tools, action: str, *arguments: str | int, stdin: bytes = b"") -> Done:
    """Run it so that it can ask nobody for anything; a number among the arguments is one of _file().

    Raise MigrationError.
    """
    files = [word for word in arguments if isinstance(word, int)]
    words = [f"/dev/fd/{word}" if isinstance(word, int) else word for word in arguments]
    try:
        return tools.run(
            *("ssh-keygen", "-Y", action, "-n", NAMESPACE, *words),
            pass_fds=files,
            accept=(0, 1, 255),
            timeout=SECONDS,
            stdin=stdin,
            variables={"SSH_ASKPASS_REQUIRE": "never"},
        )
    except MigrationError as error:
        if error.code != Code.TOOL_MISSING:
            raise
        hint = "Install openssh-client (Debian, Ubuntu) or openssh (Fedora, EL)."
        raise MigrationError(Code.TOOL_MISSING, error.message, hint, field=SETTING) from None


def _intact(tools: Tools, data: bytes, signature: int) -> Done:
    """Whether somebody has signed just these bytes, whoever it was."""
    return _ssh_keygen(tools, "check-novalidate", "-s", signature, stdin=data)


def _check_key(key: Path) -> None:
    """Raise MigrationError (sign_key_unusable) for a file that is no private key, or not for the service alone."""
    user = user_name(os.geteuid())
    give = f"Give it to the service's user alone: `chown hyper2kvm {key}` and `chmod 600 {key}`."
    try:
        # Not to be held up by a pipe that was put in its place.
        with open(key, "rb", opener=lambda file, flags: os.open(file, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            data = file.read(KEY_LIMIT) if stat.S_ISREG(status.st_mode) else b""
    except FileNotFoundError:
        make = f"Make one with `ssh-keygen -t ed25519 -N '' -f {key}`, and give it to the service's user."
        raise _unusable(key, "does not exist", make) from None
    except PermissionError:
        raise _unusable(key, f"cannot be read by {user}", give) from None
    except OSError as error:
        raise _unusable(key, f"cannot be read: {error.strerror}", "Name a private key in a plain file.") from None
    if _PUBLIC_KEY.fullmatch(data):
        private = key.with_suffix("") if key.suffix == ".pub" else "the file without .pub"
        raise _unusable(key, "is a public key", f"Name its private key: {private}.")
    if b"PRIVATE KEY-----" not in data:
        raise _unusable(key, "is not a private key", _ANOTHER)
    # ssh-keygen takes no key of its own user's that others can read; one of another user's it would.
    own = status.st_uid == os.geteuid()
    if status.st_mode & (0o077 if own else 0o007):
        mode, owner = stat.S_IMODE(status.st_mode), user_name(status.st_uid)
        raise _unusable(key, f"can be read by others (mode {mode:04o}, owner {owner})", give)


def _refused(key: Path, said: str) -> MigrationError:
    """Why ssh-keygen does not sign with a key."""
    if "incorrect passphrase" in said:
        return _unusable(
            key,
            "has a passphrase, for which a service has nobody to ask",
            f"Remove it (`ssh-keygen -p -N '' -f {key}`), or make a key for this alone that has none.",
        )
    if "public key" in said.lower():  # it is missing beside a key that is in PEM, or it is another one's
        hint = f"Write it again: `ssh-keygen -y -f {key} > {key}.pub`."
        return _unusable(key, f"has no public key of its own beside it: {_last(said)}", hint)
    return _unusable(key, f"is not taken by ssh-keygen: {_last(said)}", _ANOTHER)


def _unusable(key: Path, what: str, hint: str) -> MigrationError:
    return MigrationError(Code.SIGN_KEY_UNUSABLE, f"the key {key} {what}", hint, field=SETTING)


def _last(said: str) -> str:
    """What ssh-keygen complains of."""
    return plain((said.strip().splitlines() or ["(no message)"])[-1], 200)
