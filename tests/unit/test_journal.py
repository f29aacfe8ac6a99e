"""Logging to journald: every field arrives, nothing from outside can forge one, nothing ever raises."""

from __future__ import annotations

import io
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import structlog

import hyper2kvmd
from hyper2kvmd.errors import Outcome
from hyper2kvmd.journal import Journald
from hyper2kvmd.messages import CATALOG, Kind


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
    send(Journald(str(tmp_path / "socket"), io.StringIO()), job_id="web01-1", stage="fix")
    got = fields(journal.recv(1 << 20))
    assert ("4", "web01-1", "fix") == (got["PRIORITY"], got["H2K_JOB_ID"], got["H2K_STAGE"])
    assert "hello: job_id=web01-1 stage=fix" == got["MESSAGE"]


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
    assert '<4>hello: vm="a\\nb"\n' == fallback.getvalue()


def test_with_nothing_left_to_write_to_nothing_is_raised(tmp_path: Path) -> None:
    closed = io.StringIO()
    closed.close()
    send(Journald(str(tmp_path / "none"), closed))


def test_no_text_from_outside_makes_a_second_line_or_moves_the_cursor(journal: socket.socket, tmp_path: Path) -> None:
    forged = "web\nNov 24 10:00:00 host hyper2kvmd[1]: all is well\x1b[2J"
    send(Journald(str(tmp_path / "socket"), io.StringIO()), event=f"the VM {forged}", vm=forged, reason=forged)
    got = fields(journal.recv(1 << 20))
    assert 1 == len(got["MESSAGE"].splitlines())
    assert "\x1b" not in got["MESSAGE"]
    assert forged == got["H2K_VM"]


def test_the_output_of_a_tool_is_below_the_message_and_cannot_pass_for_another(
    journal: socket.socket, tmp_path: Path
) -> None:
    send(Journald(str(tmp_path / "socket"), io.StringIO()), tail="qemu-img: broken\nhyper2kvmd[1]: succeeded\x1b[A")
    got = fields(journal.recv(1 << 20))
    assert ["hello", "    qemu-img: broken", "    hyper2kvmd[1]: succeeded\\x1b[A"] == got["MESSAGE"].splitlines()
    assert got["H2K_TAIL"].startswith("qemu-img: broken\n")


def test_the_kind_of_an_event_is_its_message_id(journal: socket.socket, tmp_path: Path) -> None:
    send(Journald(str(tmp_path / "socket"), io.StringIO()), kind=Kind.FAILED, error="no_space", stage=None)
    got = fields(journal.recv(1 << 20))
    assert (CATALOG[Kind.FAILED].id, "failed", "no_space") == (got["MESSAGE_ID"], got["H2K_KIND"], got["H2K_ERROR"])
    assert "H2K_STAGE" not in got


def test_every_kind_has_an_entry_with_an_id_of_its_own() -> None:
    assert set(Kind) == set(CATALOG)
    assert len(CATALOG) == len({entry.id for entry in CATALOG.values()})
    assert all(re.fullmatch("[0-9a-f]{32}", entry.id) for entry in CATALOG.values())


def test_every_kind_is_used_somewhere() -> None:
    source = "".join(path.read_text() for path in Path(hyper2kvmd.__file__).parent.rglob("*.py"))
    # How a job ends is Kind(outcome).
    ends = {*map(str, Outcome)}
    assert [] == [kind.name for kind in Kind if not re.search(rf"Kind\.{kind.name}\b", source) and kind not in ends]
