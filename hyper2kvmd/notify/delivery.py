"""What all ways to reach a receiver have in common: how one fails, and secrets that are in files."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

CREDENTIAL_LIMIT = 8192


class Undelivered(Exception):
    """The receiver did not take a message: `message` says why, `hint` what to do. Neither holds the URL's path, the
    headers or what the receiver said: each of them can hold a secret.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def credential(setting: str, name: str) -> str:
    """The text of a credential: a file that systemd handed over, or an absolute path. Raise Undelivered.

    setting: the key that names it, in full.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None and not name.startswith("/"):
        raise Undelivered(
            f"{setting}: {name} names a credential, and systemd has handed over none",
            f"Add LoadCredential={name}:FILE to the unit, or write an absolute path.",
        )
    path = Path(directory or "/", name)
    try:
        # Not to be held up by a pipe that was put in its place.
        with open(path, "rb", opener=lambda file, flags: os.open(file, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            data = file.read(CREDENTIAL_LIMIT + 1) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise Undelivered(
            f"{setting}: {path} cannot be read: {error.strerror}", "Name a file that the service's user can read."
        ) from None
    if stat.S_IMODE(status.st_mode) & 0o007:
        raise Undelivered(f"{setting}: {path} can be used by everybody on this host", f"Run `chmod o= {path}`.")
    with contextlib.suppress(UnicodeDecodeError):
        if data and len(data) <= CREDENTIAL_LIMIT:
            return data.decode("ascii")
    raise Undelivered(
        f"{setting}: {path} is empty, longer than {CREDENTIAL_LIMIT} bytes, not ASCII, or not a plain file",
        "Write the secret into a plain file, as docs/notify.md shows it.",
    )
