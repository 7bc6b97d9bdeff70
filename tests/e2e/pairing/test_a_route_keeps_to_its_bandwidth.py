"""``max_bytes_per_second`` limits what a route carries, in every mode, and changes nothing else about its bytes.

``tests/unit/test_bandwidth.py`` shows on a clock of its own that the rate is exact and shared equally. The tests here
show that the relay keeps to it, with real sockets and real time. They check only the upper limit for the elapsed time,
because a machine that stalls carries less.
"""

from __future__ import annotations

import pytest
import trio

from frelay.pairing.bandwidth import Bandwidth
from frelay.pairing.stream_pump import StreamPump
from frelay.protocol.messages import PartyName
from support.ends import OPEN, PAIRS_OF_MODES, PLAIN, End, Mode, block, join_all, join_ends
from support.relay import RelayInProcess
from support.site import Site
from support.through_faults import direct
from support.waiting import despite_stalls, eventually

RATE = 200_000
MODERATE = f"max_bytes_per_second = {RATE}\n"
GENEROUS = "max_bytes_per_second = 500_000_000\n"


async def flood(end: End) -> None:
    data = block(1 << 16)
    try:
        while True:
            await end.send(data)
    except trio.BrokenResourceError:
        pass


class Reader:
    """Counts the bytes that a party receives, and notes when the first came."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.count = 0

    async def run(self) -> None:
        try:
            while data := await self.end.receive():
                self.count += len(data)
        except trio.BrokenResourceError:
            pass


@pytest.mark.load
@pytest.mark.parametrize("busy", ["one way", "both ways"])
async def test_a_route_carries_its_rate(site: Site, busy: str) -> None:
    """All nine combinations of modes, and both directions, share one budget in equal parts."""

    async def carry(seconds: float) -> None:
        async with site.relay(OPEN + MODERATE) as relay, trio.open_nursery() as nursery:
            pairs = await join_all(site, relay)
            began = trio.current_time()
            readers = []
            for one, two in pairs:
                for sender, receiver in ((one, two), (two, one))[: 1 if busy == "one way" else 2]:
                    readers.append(Reader(receiver))
                    nursery.start_soon(flood, sender)
                    nursery.start_soon(readers[-1].run)
            # A tunnel's first record must come whole; raw bytes go at once. So the shares are equal when all flow.
            await eventually(lambda: all(reader.count for reader in readers), "all flow")
            before = [reader.count for reader in readers]
            await trio.sleep(seconds)
            counts, elapsed = [reader.count for reader in readers], trio.current_time() - began
            total = sum(counts)
            nursery.cancel_scope.cancel()
        # Up to a quarter of a second may be saved up before the flood.
        assert total <= RATE * (elapsed + 0.26) * 1.05
        assert total >= RATE * elapsed * 0.8
        ways = 1 if busy == "one way" else 2
        since = [count - first for count, first in zip(counts, before, strict=True)]
        each = [sum(since[at : at + ways]) for at in range(0, len(since), ways)]
        assert min(each) >= 0.6 * max(each)

    await despite_stalls(carry, 3.0)


async def test_a_neighbour_route_is_not_bound_by_it(site: Site) -> None:
    free = OPEN.replace('"demo"', '"free"')
    async with site.relay(OPEN + MODERATE + free) as relay:
        slow, fast = await join_ends(site, relay), await join_ends(site, relay, route="free")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, slow[0])
            reader = Reader(slow[1])
            nursery.start_soon(reader.run)
            nursery.start_soon(fast[0].send, block(20 * RATE))
            await fast[1].receive_exactly(20 * RATE)
            assert reader.count < 20 * RATE
            nursery.cancel_scope.cancel()


async def test_what_exceeds_the_rate_waits_at_its_sender(site: Site) -> None:
    """Back-pressure: the sender's kernel takes no more, and the relay holds one portion, not megabytes."""
    async with site.relay(OPEN + "max_bytes_per_second = 1\n") as relay:
        one, _ = await join_ends(site, relay)
        sent = 0
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                nonlocal sent
                while True:
                    await one.send(block(1 << 16))
                    sent += 1 << 16

            nursery.start_soon(send)
            pairing = next(iter(relay.relay.pairings))
            await eventually(lambda: all(pump.is_held_back for pump in [pairing._pumps["func1"]]), "it is held back")
            before = -1
            while sent != before:
                before = sent
                await trio.sleep(0.5)
            nursery.cancel_scope.cancel()
        # What the kernels at both ends of a connection hold; tcp_rmem and tcp_wmem permit a few MiB each.
        assert sent <= 16 << 20
        assert pairing.bytes_moved["func1"] <= 1024


@pytest.mark.parametrize(("mode1", "mode2"), [*PAIRS_OF_MODES, ("plain", "plain")])
async def test_bytes_and_half_close_are_as_without_it(site: Site, mode1: Mode, mode2: Mode) -> None:
    question, answer = block(300_000, 1), block(500_000, 2)
    async with site.relay((PLAIN if mode1 == "plain" else OPEN) + GENEROUS) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)

        async def ask() -> None:
            await one.send(question)
            await one.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            assert await two.receive_to_end() == question
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.send, answer)
            assert await one.receive_exactly(len(answer)) == answer
        await two.send_eof()
        assert await one.receive() == b""
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("closed", "both")
        assert (ended["bytes_func1_to_func2"], ended["bytes_func2_to_func1"]) == (len(question), len(answer))


@direct  # this network does not read as far as the reset while it holds bytes that are not taken
@pytest.mark.parametrize("who", ["func1", "func2"])
async def test_a_reset_is_told_while_bytes_wait_for_their_turn(site: Site, who: str) -> None:
    """What the victim sent before would take minutes at this rate, but the other party is told at the next turn."""
    async with site.relay(OPEN + "max_bytes_per_second = 10_000\n") as relay:
        pairs = await join_all(site, relay)
        if who == "func2":
            pairs = [(two, one) for one, two in pairs]
        async with trio.open_nursery() as nursery:
            for victim, _ in pairs:
                nursery.start_soon(flood, victim)
            for _, other in pairs:
                await other.receive_exactly(1)
            nursery.cancel_scope.cancel()
        for victim, _ in pairs:
            victim.party.reset()
        for _, other in pairs:
            assert await other.ended() == "reset"
        await eventually(lambda: not relay.relay.pairings, "all pairings have ended")
        assert len(relay.logged("pairing ended", outcome="reset", side=who)) == len(pairs)


def _no_turn_for_an_hour(relay: RelayInProcess) -> Bandwidth:
    budget = relay.relay.routes["demo"]._bandwidth
    assert budget is not None
    budget._next_at = trio.current_time() + 3600
    return budget


async def _held_back(relay: RelayInProcess, count: int, party: PartyName) -> None:
    def all_are() -> bool:
        pumps = [pairing._pumps.get(party) for pairing in relay.relay.pairings]
        return len(pumps) == count and all(pump is not None and pump.is_held_back for pump in pumps)

    await eventually(all_are, "all wait for their turn")


@pytest.mark.load
@direct
@pytest.mark.parametrize("who", ["func1", "func2"])
async def test_a_reset_is_told_before_its_turn_comes(site: Site, who: PartyName) -> None:
    """The turn would come in an hour, which would be too late."""
    async with site.relay(OPEN + MODERATE) as relay:
        pairs = await join_all(site, relay)
        _no_turn_for_an_hour(relay)
        if who == "func2":
            pairs = [(two, one) for one, two in pairs]
        for victim, _ in pairs:
            await victim.send(block(1000))
        await _held_back(relay, len(pairs), who)
        for victim, _ in pairs:
            victim.party.reset()
        for _, other in pairs:
            assert await other.ended() == "reset"
        await eventually(lambda: not relay.relay.pairings, "all pairings have ended")
        assert len(relay.logged("pairing ended", outcome="reset", side=who)) == len(pairs)


@pytest.mark.load
@direct
@pytest.mark.parametrize(("mode1", "mode2"), PAIRS_OF_MODES)
@pytest.mark.parametrize("gone", ["sender", "receiver"])
async def test_a_reset_after_one_direction_has_ended_is_told_before_its_turn_comes(
    site: Site, mode1: Mode, mode2: Mode, gone: str
) -> None:
    """No pump reads from the ended direction or writes to the other party, so no other pump would find out."""
    async with site.relay(OPEN + MODERATE) as relay:
        one, two = await join_ends(site, relay, mode1, mode2)
        await two.send_eof()
        assert await one.receive() == b""
        _no_turn_for_an_hour(relay)
        await one.send(block(1000))
        await _held_back(relay, 1, "func1")
        if gone == "sender":
            one.party.reset()
            assert await two.ended() == "reset"
            wanted = ("reset", "func1")
        else:
            two.party.reset()
            wanted = ("hung-up", "func2")
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == wanted


async def test_what_was_sent_before_an_end_arrives_though_its_sender_is_gone(site: Site) -> None:
    """A close is no reset: the bytes sent before it arrive, although their turns take a while."""
    async with site.relay(OPEN + "max_bytes_per_second = 2000\n") as relay:
        one, two = await join_ends(site, relay)
        data = block(2000)
        await one.send(data)
        one.party.close()
        assert await two.receive_to_end() == data


@pytest.mark.load
async def test_turns_of_pairings_that_are_gone_are_given_back(site: Site) -> None:
    async with site.relay(OPEN + "max_bytes_per_second = 5000\n") as relay:
        kept = await join_ends(site, relay)
        pairs = [pair for _ in range(3) for pair in await join_all(site, relay)]
        for pair in pairs:
            for end in pair:
                await end.send(block(1000))
        for pair in pairs:
            for end in pair:
                end.party.reset()
        await eventually(lambda: len(relay.relay.pairings) == 1, "the others have ended")
        budget = relay.relay.routes["demo"]._bandwidth
        assert budget is not None
        # One turn is a fifth of a second here.
        assert budget._next_at <= trio.current_time() + 0.21
        await kept[0].send(b"ten bytes.")
        assert await kept[1].receive_exactly(10) == b"ten bytes."


@pytest.mark.load
async def test_a_short_message_goes_before_the_backlog_of_others(site: Site) -> None:
    """One turn for each of thirty backlogs would take six seconds; a short message waits for one turn."""
    async with site.relay(OPEN + "max_bytes_per_second = 5000\n") as relay:
        talker = await join_ends(site, relay)
        pairs = [await join_ends(site, relay) for _ in range(30)]
        async with trio.open_nursery() as nursery:
            for one, _ in pairs:
                nursery.start_soon(flood, one)
            await _most_wait(relay, 29)
            before = sum(sum(pairing.bytes_moved.values()) for pairing in relay.relay.pairings)
            await talker[0].send(b"ten bytes.")
            assert await talker[1].receive_exactly(10) == b"ten bytes."
            # Counted in bytes, because the machine may be slow: two turns of others at most, and a late timer.
            moved = sum(sum(pairing.bytes_moved.values()) for pairing in relay.relay.pairings) - before
            nursery.cancel_scope.cancel()
        assert moved <= 10_000


async def _most_wait(relay: RelayInProcess, count: int) -> None:
    def most() -> bool:
        return sum(pump.is_held_back for one in relay.relay.pairings for pump in one._pumps.values()) >= count

    await eventually(most, "most wait for their turn")


async def test_inner_tls_is_asked_for_as_without_it(site: Site) -> None:
    async with site.relay(OPEN.replace("false", "true") + GENEROUS) as relay:
        one, two = await join_ends(site, relay)
        await one.send(b"GET / HTTP/1.1\r\n\r\n")
        assert await two.ended() == "reset"
        assert (await relay.outcome())["outcome"] == "not-tls"


async def test_a_drain_lets_what_waits_for_its_turn_arrive(site: Site) -> None:
    data = block(100_000)
    async with site.relay(OPEN + MODERATE) as relay:
        one, two = await join_ends(site, relay)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, data)
            await two.receive_exactly(1)
            relay.relay.drain(reason="maintenance")
            assert await two.receive_exactly(len(data) - 1) == data[1:]
        await one.send_eof()
        await two.send_eof()
        assert (await relay.outcome())["outcome"] == "closed"


async def test_being_held_back_is_no_silence(site: Site) -> None:
    """A byte takes a second here, and the limits for silence are shorter than that."""
    limits = "[limits]\nidle_timeout = 0.4\nhalf_close_timeout = 0.4\nstall_timeout = 60\n"
    async with site.relay(OPEN + "max_bytes_per_second = 1\n", sections=limits) as relay:
        one, two = await join_ends(site, relay)
        data = block(4)
        await one.send(data)
        await one.send_eof()
        assert await two.receive_to_end() == data
        await two.send_eof()
        assert (await relay.outcome())["outcome"] == "closed"


async def _rate(relay: RelayInProcess, one: End, two: End, seconds: float) -> float:
    reader = Reader(two)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, one)
        nursery.start_soon(reader.run)
        began = trio.current_time()
        await trio.sleep(seconds)
        elapsed = trio.current_time() - began
        nursery.cancel_scope.cancel()
    return reader.count / elapsed


@pytest.mark.load
async def test_a_reload_changes_the_rate_of_those_who_share_it(site: Site) -> None:
    """A budget that a reload sets limits only later pairings; pairings after its removal are spliced again."""
    async with site.relay(OPEN) as relay:
        free = await join_ends(site, relay)
        site.write(OPEN + MODERATE)
        await relay.relay.reload()
        bound = await join_ends(site, relay)
        assert await _rate(relay, *bound, 0.6) <= 1.6 * RATE
        assert await _rate(relay, *free, 0.6) > 1.6 * RATE
        site.write(OPEN + GENEROUS)
        await relay.relay.reload()
        assert await _rate(relay, *bound, 0.6) > 1.6 * RATE
        site.write(OPEN + MODERATE)
        await relay.relay.reload()
        # Measured with a new pairing: what the kernels still hold for the others comes at any rate.
        assert await _rate(relay, *await join_ends(site, relay), 0.6) <= 1.6 * RATE
        site.write(OPEN)
        await relay.relay.reload()
        assert await _rate(relay, *bound, 0.6) > 1.6 * RATE
        await join_ends(site, relay)
        pumps = [list(pairing._pumps.values()) for pairing in relay.relay.pairings]
        # The last one takes no turns.
        assert [isinstance(one, StreamPump) for one, _ in pumps] == [False, True, True, False]


@pytest.mark.load
async def test_a_replaced_route_and_its_old_pairings_share_one_budget(site: Site) -> None:
    """Otherwise a change of the route's parties would double its rate while the old pairings last."""
    sections = "[relay]\npolicy_ends_pairings = false\n"
    async with site.relay(OPEN + MODERATE, sections=sections) as relay:
        old = await join_ends(site, relay)
        budget = _no_turn_for_an_hour(relay)
        site.write((OPEN + MODERATE).replace('"dns:func1.demo"', '"dns:*.demo"'), sections=sections)
        changes = await relay.relay.reload()
        assert [replaced.changed for replaced in changes.replace] == [("func1",)]
        await old[0].send(block(1000))
        old_pairing = next(iter(relay.relay.pairings))
        await eventually(lambda: old_pairing._pumps["func1"].is_held_back, "the old one waits")
        assert relay.relay.routes["demo"]._bandwidth is budget
        site.write(OPEN.replace('"dns:func1.demo"', '"dns:*.demo"'), sections=sections)
        await relay.relay.reload()
        # No rate at all, not even for those that wait for a turn of the old one.
        assert await old[1].receive_exactly(1000) == block(1000)
