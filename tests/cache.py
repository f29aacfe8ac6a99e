"""What takes minutes to make is made once, and kept beside no checkout: `$XDG_CACHE_HOME/hyper2kvmd-tests`.

Every entry is a directory whose name ends with the digest of all that it was made from. It is made under another name
and renamed when it is complete: what has the right name is whole. `make clean` leaves the cache, `make clean-cache`
removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

UNUSED_DAYS = 30
_used: dict[Path, int] = {}  # the entries that this process uses: locked until it ends


def directory(name: str = "") -> Path:
    """The cache's directory, or the one in it that is called so; it is there."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home.absolute() / "hyper2kvmd-tests" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def cached(kind: str, what: str, version: str, make: Callable[[Path], None]) -> Path:
    """Return the directory `<kind>/<what>-<version>` of the cache, made by `make` if it is not there yet.

    While this process lives, nobody removes it.
    """
    cache = directory(kind)
    final = cache / f"{what}-{version}"
    if _use(final):
        return final
    with (cache / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it whatever happens to its holder
        if _use(final):  # somebody else made it while we waited
            return final
        for partial in cache.glob(f"{what}-*.partial"):
            if _what(partial) == what:  # left by a maker that was interrupted: we hold the lock, so it is gone
                shutil.rmtree(partial, ignore_errors=True)  # the last tool of one that was killed may still be writing
        started = time.monotonic()
        print(f"building {final.name} ...", file=sys.stderr, flush=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{what}-", suffix=".partial", dir=cache))
        try:
            partial.chmod(0o755)  # libvirt runs QEMU as another user
            make(partial)
            os.sync()  # the name must not outlive a power cut that the files did not
            partial.rename(final)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
        print(f"building {final.name} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        _use(final)
        _prune(cache)
    return final


def _what(entry: Path) -> str:
    return entry.name.removesuffix(".partial").rpartition("-")[0]


def _use(entry: Path) -> bool:
    """Note that an entry is used, until this process ends; False if it is not there."""
    if entry not in _used:
        try:
            file = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        fcntl.flock(file, fcntl.LOCK_SH)
        if not entry.is_dir():  # removed while we waited for the lock
            os.close(file)
            return False
        _used[entry] = file
    os.utime(entry)
    return True


def _prune(cache: Path) -> None:
    """Remove what nobody uses: all versions but the two that were used last, and what was not used for a month.

    Two, so that two checkouts with different recipes do not make everything again in turn.
    """
    kept: dict[str, int] = {}
    entries = [path for path in cache.iterdir() if path.is_dir() and not path.name.endswith(".partial")]
    oldest = time.time() - UNUSED_DAYS * 86400
    for entry in sorted(entries, key=_last_used, reverse=True):
        kept[_what(entry)] = kept.get(_what(entry), 0) + 1
        if kept[_what(entry)] > 2 or _last_used(entry) < oldest:
            with _nobody_uses(entry) as unused:
                if unused:
                    gone = entry.rename(entry.with_name(f"{entry.name}.partial"))
                    shutil.rmtree(gone, ignore_errors=True)


def _last_used(entry: Path) -> float:
    with contextlib.suppress(FileNotFoundError):  # another process prunes, too
        return entry.stat().st_mtime
    return 0


@contextlib.contextmanager
def _nobody_uses(entry: Path) -> Iterator[bool]:
    """Whether nobody uses an entry; until the end of the block, whoever wants to waits."""
    try:
        file = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(file)
