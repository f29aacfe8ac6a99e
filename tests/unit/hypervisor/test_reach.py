"""What a question to the network looks like, and which answers count; machines answer in the tests of cutover."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from hyper2kvmd.hypervisor import reach

MAC, OWN = bytes.fromhex("005056aabb01"), bytes.fromhex("020000000001")
ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")


def frame(**changes: int | bytes) -> bytes:
    """An answer of the machine with the address 192.0.2.10."""
    parts: dict[str, int | bytes] = {
        "to": OWN,
        "from": MAC,
        "ethertype": 0x0806,
        "hardware": 1,
        "protocol": 0x0800,
        "hlen": 6,
        "plen": 4,
        "operation": 2,
        "mac": MAC,
        "sender": bytes((192, 0, 2, 10)),
        "target": OWN,
        "asked": bytes(4),
        **changes,
    }
    return ARP.pack(*parts.values())


class Wire:
    """A socket on which these frames lie; the others of the tests are real."""

    def __init__(self, data: bytes, direction: int = 0) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        theirs.send(data)
        theirs.close()
        self.direction = direction

    def fileno(self) -> int:
        return self.ours.fileno()

    def recvfrom(self, size: int) -> tuple[bytes, tuple[str, int, int, int, bytes]]:
        return self.ours.recv(size), ("br0", 0x0806, self.direction, 1, MAC)


@pytest.fixture
def heard(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, reach.Heard]]]:
    wire = Wire(*request.param)
    yield list(reach._heard(wire, 1.0))  # type: ignore[arg-type]
    wire.ours.close()


ANSWER = [("192.0.2.10", reach.Heard("00:50:56:aa:bb:01", "br0"))]


@pytest.mark.parametrize(
    "heard",
    [
        pytest.param((frame(),), id="an answer"),
        pytest.param((frame(operation=1),), id="an announcement, or a question of its own"),
        pytest.param((frame() + bytes(18),), id="padded, as Ethernet wants it"),
    ],
    indirect=True,
)
def test_whoever_speaks_for_an_address_has_it(heard: list[tuple[str, reach.Heard]]) -> None:
    assert ANSWER == heard


@pytest.mark.parametrize(
    "heard",
    [
        pytest.param((frame(), 4), id="what we sent ourselves"),
        pytest.param((frame(ethertype=0x0800),), id="something else than ARP"),
        pytest.param((frame(protocol=0x86DD),), id="ARP for another protocol"),
        pytest.param((frame(operation=3),), id="reverse ARP"),
        pytest.param((frame()[:20],), id="cut off"),
        pytest.param((b"\0",), id="noise"),
    ],
    indirect=True,
)
def test_nothing_else_counts(heard: list[tuple[str, reach.Heard]]) -> None:
    assert [] == heard


def test_a_question_comes_from_nobodys_address_and_goes_to_everybody() -> None:
    to, sender, ethertype, *_, operation, mac, address, target, asked = ARP.unpack(reach._question(OWN, "192.0.2.10"))
    assert (b"\xff" * 6, OWN, 0x0806, 1, OWN) == (to, sender, ethertype, operation, mac)
    assert (bytes(4), bytes(6), "192.0.2.10") == (address, target, socket.inet_ntoa(asked))
