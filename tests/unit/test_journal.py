"""Logging to journald: every field arrives, nothing from outside can forge one, nothing ever raises."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import pytest
import structlog

from hyper2kvmd.journal import Journald


def fields(datagram: bytes) -> dict[str, str]:
    """Decode journald's native protocol, length-prefixed fields only."""
    found = {}
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        size = int.from_bytes(rest[:8], "little")
        found[name.decode()] = rest[8 : 8 + size].decode()
        assert rest[8 + size : 9 + size] == b"\n"
        datagram = rest[9 + size :]
    return found


def send(sender: Journald, **event: Any) -> None:
    with pytest.raises(structlog.DropEvent):
        sender(None, "info", {"event": "hello", "level": "warning", **event})


@pytest.fixture
def journal(tmp_path: Path) -> socket.socket:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(tmp_path / "socket"))
    return receiver


def test_fields_arrive_with_priority_and_message(journal: socket.socket, tmp_path: Path) -> None:
    send(Journald(str(tmp_path / "socket"), io.StringIO()), job="web01-1", stage="fix")
    got = fields(journal.recv(1 << 20))
    assert ("4", "web01-1", "fix") == (got["PRIORITY"], got["H2K_JOB"], got["H2K_STAGE"])
    assert "hello: job=web01-1 stage=fix" == got["MESSAGE"]


def test_a_name_with_newlines_forges_nothing(journal: socket.socket, tmp_path: Path) -> None:
    send(Journald(str(tmp_path / "socket"), io.StringIO()), vm="x\nPRIORITY=0\nMESSAGE=all is well")
    got = fields(journal.recv(1 << 20))
    assert "4" == got["PRIORITY"]
    assert {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "H2K_VM"} == set(got)


def test_an_endless_value_is_cut_and_sent(journal: socket.socket, tmp_path: Path) -> None:
    fallback = io.StringIO()
    send(Journald(str(tmp_path / "socket"), fallback), tail="x" * 10_000_000)
    assert "" == fallback.getvalue()
    assert fields(journal.recv(1 << 20))["H2K_TAIL"].startswith("xxx")


def test_without_a_journal_the_line_goes_to_standard_error(tmp_path: Path) -> None:
    fallback = io.StringIO()
    send(Journald(str(tmp_path / "none"), fallback), vm="a\nb")
    assert "<4>hello: vm=a\\nb\n" == fallback.getvalue()


def test_with_nothing_left_to_write_to_nothing_is_raised(tmp_path: Path) -> None:
    closed = io.StringIO()
    closed.close()
    send(Journald(str(tmp_path / "none"), closed))
