"""The parts of a group where an event comes at an unusual moment, without a relay."""

from __future__ import annotations

import math
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from frelay.client.group.frames import Kind, make_tag
from frelay.client.group.link import Link, Ongoing, Outgoing
from frelay.client.group.mesh import Mesh
from frelay.client.group.poll import Poll
from frelay.client.group.schedule import in_order
from frelay.client.group.wires import PeerWire
from frelay.client.group.work import Transfers
from frelay.client.tls_engine import Engine
from support.site import Site

SEND = make_tag(Kind.SEND)


def shake_hands(client: Engine, server: Engine) -> None:
    done = [False, False]
    while not all(done):
        for at, (one, other) in enumerate(((client, server), (server, client))):
            done[at] = one.handshake()
            if data := one.take():
                other.feed(data)


@contextmanager
def two_wires(site: Site) -> Iterator[tuple[PeerWire, PeerWire]]:
    """The wires of ranks 0 and 1 to each other, over a pair of sockets."""
    acceptor = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    acceptor.load_cert_chain(*site.relay_paths)
    client, server = Engine(site.context(alpn=()), server_hostname="localhost"), Engine(acceptor, server_side=True)
    shake_hands(client, server)
    polls = Poll(), Poll()
    sockets = socket.socketpair(socket.AF_UNIX)
    wires = [
        PeerWire(sock, engine, Link(1 - rank, 2, engine, Ongoing()), poll)
        for rank, (sock, engine, poll) in enumerate(zip(sockets, (client, server), polls, strict=True))
    ]
    try:
        yield wires[0], wires[1]
    finally:
        for wire, poll in zip(wires, polls, strict=True):
            wire.close()
            poll.close()


def move(*wires: PeerWire) -> None:
    scratch = memoryview(bytearray(65536))
    for _ in range(5):
        for wire in wires:
            wire.ready(~0)  # perhaps not true, and then a read finds nothing
            wire.move(scratch)


def test_a_rank_whose_other_side_has_ended_first_still_ends_its_own_direction(site: Site) -> None:
    """The end of the other rank can come while this one is still in the barrier of ``close``."""
    with two_wires(site) as (early, late):
        early.end()
        move(early, late)
        assert late.link.has_ended
        assert not early.is_finished
        late.end()
        move(late, early)
        assert late.is_finished
        assert early.is_finished


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_wire_whose_other_side_is_gone_is_finished_at_once(site: Site, is_cut: bool) -> None:
    with two_wires(site) as (gone, left):
        gone.close()
        if is_cut:
            left.cut()
        else:
            left.end()
        move(left)
        assert left.is_finished


class MeshWithOneLink:
    """Stands for a mesh whose link to the other rank is made by the next turn."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._is_there = False

    def link(self, rank: int) -> Link | None:
        return self._link if self._is_there else None

    def turn(self) -> None:
        self._is_there = True

    moved = 0
    plan = type("Plan", (), {"timeout": 3600.0})

    def wakes_in(self) -> float:
        return 0.0 if self._link.has_output else math.inf


def test_a_message_goes_to_its_link_in_the_turn_that_makes_the_link(site: Site) -> None:
    """After that turn the kernel may have nothing more to report, and nobody would look again for half a timeout."""
    with two_wires(site) as (wire, _):
        mesh = cast(Mesh, MeshWithOneLink(wire.link))
        transfers = Transfers(mesh, "send")
        transfers.post([(1, Outgoing(SEND, memoryview(b"abc")))])
        assert not wire.link.take()
        assert not transfers.advance()
        assert transfers.wakes_in() == 0
        assert wire.link.take()


def test_ranks_0_and_1_join_with_each_other_first() -> None:
    """Rank 0 joins with nobody before. Then the ranks join in rounds, and nobody waits in a circle."""
    for size in range(2, 20):
        orders: dict[int, list[int]] = {rank: in_order(rank, size) for rank in range(size)}
        assert orders[0][0] == 1
        assert orders[1][0] == 0
        assert all(sorted(order) == [r for r in range(size) if r != rank] for rank, order in orders.items())
        linked: set[frozenset[int]] = set()
        while any(orders.values()):
            # Each rank waits for the first that is left, as with at_once=1.
            met: list[Any] = [rank for rank, order in orders.items() if order and orders[order[0]][:1] == [rank]]
            assert met, f"{size} ranks wait in a circle: {orders}"
            for rank in met:
                linked.add(frozenset((rank, orders[rank].pop(0))))
        assert len(linked) == size * (size - 1) // 2
