"""The process that converts one disk: `python -m hyper2kvmd.image.stream SOURCE START SIZE NAME TARGET FORMAT THREADS`.

START and SIZE say where in the file SOURCE the disk is. FORMAT is qcow2, qcow2-zstd (compressed) or raw. It says lines
of JSON: {"read": BYTES} a few times a second, and in the end one of {"done": {...}}, {"error": {...}} and
{"unsuitable": WHY}. An error of the system is a message on standard error, as of any tool.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from dataclasses import asdict

from hyper2kvmd.errors import MigrationError
from hyper2kvmd.image.header.reader import Image
from hyper2kvmd.image.stream.grains import Unsuitable
from hyper2kvmd.image.stream.pipeline import convert

_SAY_SECONDS = 0.2


def main(source: str, start: str, size: str, name: str, target: str, format: str, threads: str) -> int:
    """Convert, and return the exit status: 0 if one of the three last lines was said."""
    last = 0.0

    def on_read(count: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SAY_SECONDS:
            last = time.monotonic()
            _say({"read": count})

    try:
        image = Image(os.open(source, os.O_RDONLY | os.O_CLOEXEC), int(size), name, int(start))
        done = convert(image, _open(target), format, threads=int(threads), on_read=on_read)
    except MigrationError as error:
        _say({"error": error.finding().as_json()})
    except Unsuitable as why:
        _say({"unsuitable": str(why)})
    except OSError as error:
        print(f"{error.filename or target}: {error.strerror}", file=sys.stderr)
        return 1
    else:
        _say({"done": asdict(done)})
    return 0


def _open(target: str) -> int:
    """The file to write to, past the page cache if its file system can do that."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(target, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return os.open(target, flags)


def _say(line: object) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
