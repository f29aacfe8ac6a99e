"""What hyper2kvmctl says of an error of the operating system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hyper2kvmd.ctl import refused
from hyper2kvmd.options import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_PERMISSION


@pytest.mark.parametrize(
    ("number", "status", "remedy"),
    [
        (errno.EACCES, EXIT_PERMISSION, "run as root"),
        (errno.EROFS, EXIT_PERMISSION, "mount the file system writable"),
        (errno.ENOENT, EXIT_NOT_FOUND, "check the path"),
        (errno.ENOSPC, EXIT_FAILED, "free some space"),
        (errno.EIO, EXIT_FAILED, "look at the file system"),
    ],
)
def test_each_has_its_own_remedy(number: int, status: int, remedy: str) -> None:
    got, message = refused(OSError(number, os.strerror(number), "x.tmp"))
    assert (got, True) == (status, message.startswith(f"x.tmp: {os.strerror(number)}; {remedy}")), message


def test_a_name_that_is_relative_to_something_gives_way_to_the_path() -> None:
    _, message = refused(OSError(errno.ENOSPC, "No space left on device", ".a.tmp"), Path("/srv/work"))
    assert message == "/srv/work: No space left on device; free some space there"


def test_one_that_names_nothing_says_what_it_knows() -> None:
    assert refused(OSError("strange"))[1].startswith("strange; look at")
