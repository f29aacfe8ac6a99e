"""Passphrases of encrypted guests, from the files that the setting fix.luks_keys names."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from hyper2kvmd.errors import Code, MigrationError

MAX_BYTES = 8192


def passphrase(keys: Mapping[str, Path], vm_name: str, uuid: str) -> str | None:
    """The passphrase of one LUKS container: the key under its UUID, or else under the VM's name; None without one.

    One line end at the end of the file does not belong to the passphrase. Raise MigrationError (guest_encrypted).
    """
    path = keys.get(uuid) or keys.get(vm_name)
    if path is None:
        return None
    field = f"fix.luks_keys.{uuid if uuid in keys else vm_name}"
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}", "Let the service's user read it.", field) from None
    if mode & 0o007:
        raise _unusable(path, f"has mode {mode:04o}: everybody on this host can use it", f"chmod o= {path}", field)
    content = content.removesuffix(b"\n").removesuffix(b"\r")
    if not content or len(content) > MAX_BYTES or b"\0" in content:
        remedy = "Give a passphrase of the container: `cryptsetup luksAddKey` makes another one."
        raise _unusable(path, "is empty, longer than 8 KiB or not text", remedy, field)
    try:
        return content.decode()
    except UnicodeDecodeError:
        remedy = "Give a passphrase of the container: `cryptsetup luksAddKey` makes another one."
        raise _unusable(path, "is not UTF-8 text", remedy, field) from None


def _unusable(path: Path, what: str, remedy: str, field: str) -> MigrationError:
    return MigrationError(Code.GUEST_ENCRYPTED, f"the key file {path} {what}", remedy, field=field)
