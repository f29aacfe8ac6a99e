"""What hyper2kvmctl says of an error of the operating system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hyper2kvmd.ctl.output import refused
from hyper2kvmd.exits import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_PERMISSION


@pytest.mark.parametrize(
    ("number", "status", "remedy"),
    [
        (errno.EACCES, EXIT_PERMISSION, "run it as root"),
        (errno.EROFS, EXIT_PERMISSION, "mount the file system writable"),
        (errno.ENOENT, EXIT_NOT_FOUND, "check the path"),
        (errno.ENOSPC, EXIT_FAILED, "free some space"),
        (errno.EIO, EXIT_FAILED, "look at the file system"),
    ],
)
def test_each_has_its_own_remedy(number: int, status: int, remedy: str) -> None:
    got, message = refused(OSError(number, os.strerror(number), "x.tmp"))
    assert (got, True) == (status, message.startswith(f"x.tmp: {os.strerror(number)}; {remedy}")), message


@pytest.mark.parametrize(
    ("name", "path"),
    [(".a.tmp", "/srv/work/.a.tmp"), ("/srv/exports", "/srv/exports"), (None, "/srv/work"), (7, "/srv/work")],
)
def test_what_failed_is_named_by_its_whole_path(name: object, path: str) -> None:
    _, message = refused(OSError(errno.ENOSPC, "No space left on device", name), Path("/srv/work"))
    assert message == f"{path}: No space left on device; free some space there"


def test_one_that_names_nothing_says_what_it_knows() -> None:
    assert refused(OSError("strange"))[1].startswith("strange; look at")
