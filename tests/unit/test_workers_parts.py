"""The parts of a relay with workers, one at a time: which worker gets an address, and what the channel carries."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from frelay.admin.control import Counts
from frelay.config.address import Address
from frelay.config.model import Route
from frelay.config.plan import ListenerKey, listener_keys
from frelay.errors import Problem
from frelay.journal import (
    Draining,
    Entry,
    HandshakeDone,
    Journal,
    LegRefused,
    LegWaits,
    PairingEnded,
    PairingStarted,
)
from frelay.net.channel import Channel, ChannelEnded
from frelay.protocol.outcome import Outcome, Record
from frelay.relay.prepare import TlsFiles
from frelay.relay.workers.codec import (
    counts_from_json,
    counts_to_json,
    entry_from_json,
    entry_to_json,
    is_told,
    key_from_json,
    key_to_json,
    problem_from_json,
    problem_to_json,
    tls_files_from_json,
    tls_files_to_json,
)
from frelay.relay.workers.outbox import Outbox
from frelay.relay.workers.placement import clusters, spread

KEYS = [ListenerKey(Address("127.0.0.1", port)) for port in range(9001, 9009)]

# --- which worker has an address -----------------------------------------------------------------------------------


def alone(keys: list[ListenerKey]) -> list[tuple[ListenerKey, ...]]:
    """Each address with routes that have no other."""
    return [(key,) for key in dict.fromkeys(keys)]


def test_addresses_are_dealt_out_in_their_order() -> None:
    assert list(spread(alone(KEYS[:5]), (1, 2), {}).values()) == [1, 2, 1, 2, 1]


def test_a_new_address_goes_to_the_worker_with_the_fewest() -> None:
    before = spread(alone(KEYS[:4]), (1, 2), {})
    left = [key for key in KEYS[:4] if before[key] == 2]
    after = spread(alone([*left, *KEYS[4:]]), (1, 2), before)
    assert [after[key] for key in KEYS[4:]] == [1, 1, 1, 2]


@given(st.lists(st.sampled_from(KEYS)), st.lists(st.sampled_from(KEYS)), st.integers(1, 4))
def test_what_stays_does_not_move_and_new_ones_are_even(
    first: list[ListenerKey], second: list[ListenerKey], n: int
) -> None:
    workers = range(1, n + 1)
    before = spread(alone(first), workers, {})
    after = spread(alone(second), workers, before)
    assert after.keys() == set(second)
    assert set(after.values()) <= set(workers)
    assert all(after[key] == before[key] for key in before.keys() & after.keys())
    loads = [list(before.values()).count(worker) for worker in workers]
    assert max(loads) - min(loads) <= 1


def _route(name: str, *ports: int) -> Route:
    listen = [f"127.0.0.1:{port}" for port in ports]
    return Route.model_validate({"name": name, "listen": listen, "func1": (), "func2": (), "source": Path(name)})


@given(st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True), max_size=8), st.integers(1, 4))
def test_a_route_is_in_one_worker_whatever_it_shares(lists: list[list[int]], n: int) -> None:
    routes = [_route(f"r{at}", *ports) for at, ports in enumerate(lists)]
    found = clusters(routes)
    assert sorted(key for cluster in found for key in cluster) == sorted(
        {key for one in routes for key in listener_keys(one)}
    )
    placed = spread(found, range(1, n + 1), {})
    for one in routes:
        assert len({placed[key] for key in listener_keys(one)}) == 1


def test_a_route_that_joins_two_clusters_moves_the_smaller() -> None:
    routes = [_route("a", 1, 2), _route("b", 3)]
    before = spread(clusters(routes), (1, 2), {})
    assert sorted(before.values()) == [1, 1, 2]
    after = spread(clusters([*routes, _route("c", 2, 3)]), (1, 2), before)
    assert set(after.values()) == {1}
    # When that route goes again, nothing moves back.
    assert spread(clusters(routes), (1, 2), after) == after


# --- the channel ---------------------------------------------------------------------------------------------------


@contextmanager
def channels() -> Iterator[tuple[Channel, Channel]]:
    one, two = socket.socketpair()
    one.setblocking(False)
    two.setblocking(False)
    with closing(Channel(one)) as first, closing(Channel(two)) as second:
        yield first, second


async def test_messages_arrive_whole_and_in_order() -> None:
    """Also messages that the kernel takes in many pieces."""
    messages = [{"text": "x" * size} for size in (0, 1, 1_000_000, 5)]
    with channels() as (one, two):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                for message in messages:
                    await one.send(message)

            nursery.start_soon(send)
            assert [(await two.receive()).message for _ in messages] == messages


async def test_more_sockets_than_the_kernel_takes_at_once() -> None:
    """Each message comes with its own sockets."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock, channels() as (one, two):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await one.send({"n": 1}, [sock] * 300)
                await one.send({"n": 2})
                await one.send({"n": 3}, [sock])

            nursery.start_soon(send)
            for number, count in ((1, 300), (2, 0), (3, 1)):
                received = await two.receive()
                assert (received.message, len(received.sockets)) == ({"n": number}, count)
                assert received.is_complete
                assert not any(one.get_inheritable() for one in received.sockets)
                received.close()


async def test_sockets_belong_to_their_message_however_many_are_read_at_once() -> None:
    """All of it is there before the first read; each read ends behind the bytes that came with sockets."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock, channels() as (one, two):
        sent = [0, 1, 0, 0, 2, 3, 0]
        for number, count in enumerate(sent):
            await one.send({"n": number}, [sock] * count)
        for number, count in enumerate(sent):
            received = await two.receive()
            assert (received.message, len(received.sockets)) == ({"n": number}, count)
            assert received.is_complete
            received.close()


async def test_an_end_is_told_and_not_a_message() -> None:
    with channels() as (one, two):
        await one.send({"last": True})
        one.close()
        assert (await two.receive()).message == {"last": True}
        with pytest.raises(ChannelEnded):
            await two.receive()
        with pytest.raises(ChannelEnded):
            await two.send({})


async def test_a_worker_that_is_not_listened_to_drops_the_oldest() -> None:
    """Traffic does not wait, memory is bounded, and an answer comes after what was noted before it."""
    with channels() as (one, two):
        outbox = Outbox(one)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.run)
            # A message on its way fills the kernel's buffers, and the supervisor does not read it.
            outbox.answer({"answer": 1, "value": "x" * 2_000_000})
            await trio.testing.wait_all_tasks_blocked()
            for number in range(10_000):
                outbox.note(PairingStarted(pairing=str(number), route="r", func1="a", func2="b", waited=0.0))
            outbox.answer({"answer": 2, "value": None})
            assert (await two.receive()).message["answer"] == 1
            told = (await two.receive()).message
            assert [entry["pairing"] for entry in told["entries"]] == [
                str(number) for number in range(10_000 - 4096, 10_000)
            ]
            assert (told["dropped"], told["answer"]) == (10_000 - 4096, 2)
            nursery.cancel_scope.cancel()


# --- what is told --------------------------------------------------------------------------------------------------

# All characters that a key may have, so also those that JSON and HTML escape.
KEY = "".join(map(chr, range(ord("!"), ord("~") + 1)))
RECORD = Record("id", "r", "dns:a", "dns:b", Outcome.HUNG_UP, "func1", None, 1, 2, 3.5)
ENTRIES = (
    LegWaits(route="r", party="func1", identity="dns:a", address="[::1]:1", mode="raw"),
    LegRefused(code="limit", reason="so", address="127.0.0.1:1", party="func2"),
    PairingStarted(pairing="id", route="r", func1="dns:a", func2="dns:b", waited=0.25),
    PairingEnded(record=RECORD),
    LegWaits(route="r", party="either", identity="dns:a", address="[::1]:1", mode="tunnel", meet=KEY),
    LegRefused(code="wait-timeout", reason="so", address="127.0.0.1:1", party="either", identity="dns:a", meet=KEY),
    PairingStarted(pairing="id", route="r", func1="dns:a", func2="dns:b", waited=0.25, meet=KEY),
    PairingEnded(record=replace(RECORD, meet=KEY)),
)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.kind)
def test_an_entry_is_the_same_at_the_other_end(entry: Entry) -> None:
    assert is_told(entry)
    assert entry_from_json(json.loads(json.dumps(entry_to_json(entry)))) == entry


def test_what_is_the_supervisors_own_is_not_told() -> None:
    assert not any(map(is_told, (HandshakeDone(seconds=1.0), Draining(reason="SIGTERM", seconds=1.0))))


def test_counts_are_the_same_at_the_other_end() -> None:
    journal = Journal()
    journal.note(HandshakeDone(seconds=0.02))
    counts = Counts(
        pairings={"r": 2},
        waiting={("r", "func1"): 1, ("r", "either"): 2},
        keys={"r": 2},
        bytes_moved={("r", "func2"): 10**12},
        outcomes={("r", "closed"): 3},
        refusals={("", "limit"): 4},
        reloaded_at=0.0,
        reload_was_accepted=True,
        certificates=(),
        durations=journal.durations,
        loop_lag=0.5,
        tasks=7,
    )
    assert counts_from_json(counts_to_json(counts)) == counts


def test_small_things_are_the_same_at_the_other_end() -> None:
    for key in (ListenerKey(Address("::1", 1)), ListenerKey(Address("localhost", 0), "r")):
        assert key_from_json([*key_to_json(key)]) == key
    problem = Problem(Path("/a/b.toml"), "no", key="route[0].listen", line=3, is_conflict=True)
    assert problem_from_json(problem_to_json(problem)) == problem
    files = TlsFiles({Path("/a/key.pem"): b"\0secret"}, 1.5)
    assert tls_files_from_json(tls_files_to_json(files)) == files
    assert "secret" not in repr(files)
