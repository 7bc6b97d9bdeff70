"""A waiting leg that leaves in any way frees its place, and is not paired afterwards.

There is room for one leg of each party, so the next one can only wait if the place is really free.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from support.party import Party, frame
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually

ONE_PLACE = """
[limits]
max_waiting_per_party = 1
ping_interval = 0.2
pong_timeout = 60
"""


async def leave(party: Party) -> None:
    await party.send_frame("LEAVE")


async def leave_with_empty_object(party: Party) -> None:
    await party.send_frame("LEAVE", {})


async def end_tls(party: Party) -> None:
    await party.stream.send_all(party.close_notify())


async def end_tls_and_tcp(party: Party) -> None:
    await party.stream.send_all(party.close_notify())
    party.close()


async def send_fin(party: Party) -> None:
    await party.send_eof()


async def vanish(party: Party) -> None:
    party.close()


async def reset(party: Party) -> None:
    party.reset()


async def break_tls(party: Party) -> None:
    await party.send_raw(b"this is no TLS record")


async def break_the_protocol(party: Party) -> None:
    await party.send_frame("JOIN", {"attempt": party.attempt})


# The log's reason for legs that say that they leave. For others the relay may notice the end in several ways.
LEFT = {
    leave: "left (LEAVE)",
    leave_with_empty_object: "left (LEAVE)",
    end_tls: "left (close_notify)",
    send_fin: "the connection ended without close_notify",
}
GOODBYES = [leave, leave_with_empty_object, end_tls, end_tls_and_tcp, send_fin, vanish, reset]


async def next_one_waits_and_is_paired(site: Site, relay: RelayInProcess) -> None:
    """The place is free for another leg, and func2 is paired with that one."""
    await eventually(lambda: relay.waiting() == (0, 0), "the place to be free")
    await eventually(lambda: relay.legs == 0, "its slot to be free")
    other = await site.party(relay, "func1")
    await other.join()
    await other.expect("WAITING")
    two = await site.party(relay, "func2")
    await two.join()
    await two.expect("WAITING")
    paired, paired2 = await other.expect("PAIRED"), await two.expect("PAIRED")
    assert paired["pairing"] == paired2["pairing"]


@pytest.mark.parametrize("goodbye", [*GOODBYES, break_tls, break_the_protocol])
async def test_a_framed_waiter_that_goes(site: Site, goodbye: Callable[[Party], Awaitable[None]]) -> None:
    async with site.relay(sections=ONE_PLACE) as relay:
        party = await site.party(relay, "func1")
        await party.join()
        await party.expect("WAITING")
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        await goodbye(party)
        await eventually(lambda: relay.waiting() == (0, 0), "the place to be free")
        if goodbye in LEFT:
            assert (await relay.log("left"))["reason"] == LEFT[goodbye]
        party.close()
        await next_one_waits_and_is_paired(site, relay)


@pytest.mark.parametrize("goodbye", [end_tls, end_tls_and_tcp, send_fin, vanish, reset, break_tls])
async def test_a_bare_waiter_that_goes(site: Site, goodbye: Callable[[Party], Awaitable[None]]) -> None:
    """Without frames the relay only sees the end of the connection, with or without a close_notify."""
    async with site.relay(sections=ONE_PLACE) as relay:
        party = await site.party(relay, "func1", alpn=())
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        party.take_in()
        await goodbye(party)
        await next_one_waits_and_is_paired(site, relay)


async def test_a_bare_waiter_with_early_data_that_is_reset(site: Site) -> None:
    """Early data, which must stay unread, hides an end that follows it; the relay notices an RST all the same."""
    async with site.relay(sections=ONE_PLACE) as relay:
        party = await site.party(relay, "func1", alpn=())
        await party.send(b"early data" * 1000)
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        party.reset()
        await next_one_waits_and_is_paired(site, relay)


async def test_a_bare_waiter_may_have_said_all_before_its_peer_comes(site: Site) -> None:
    """PROTOCOL 6: early data and then close_notify ends one direction only: the leg waits on, and nothing is lost."""
    async with site.relay(sections=ONE_PLACE) as relay:
        party = await site.party(relay, "func1", alpn=())
        await party.send(b"all that I have to say" * 2000)
        await party.stream.send_all(party.close_notify())
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        for _ in range(3):
            await trio.sleep(0.2)  # the relay checks once whether it is still there
        assert relay.waiting() == (1, 0)
        two = await site.party(relay, "func2", alpn=())
        with trio.fail_after(20):
            assert await two.receive_exactly(44000, raw=False) == b"all that I have to say" * 2000
            assert await two.receive() == b""
            await two.send(b"and the answer")
            assert await party.stream.receive_some(65536)


@pytest.mark.parametrize(
    "has_read",
    [
        True,
        False,
    ],
    ids=["reads", "never reads"],
)
async def test_a_bare_sender_may_be_gone_before_its_peer_comes(site: Site, has_read: bool) -> None:
    """PROTOCOL 6: a job that only reports writes, ends in order and closes; all that it wrote is delivered.

    If a byte from the relay were unread in its socket, its close would be an RST and destroy what it wrote.
    """
    async with site.relay(sections=ONE_PLACE + "wait_timeout = 3\n") as relay:
        party = await site.party(relay, "func1", alpn=())
        await eventually(lambda: relay.waiting() == (1, 0), "its place")
        if has_read:
            party.take_in()
        await party.send(b"report" * 1000)
        await party.stream.send_all(party.close_notify())
        party.close()
        await trio.sleep(0.4)  # the relay checks twice whether it is still there
        assert relay.waiting() == (1, 0)
        two = await site.party(relay, "func2", alpn=())
        assert await two.receive_exactly(6000, raw=False) == b"report" * 1000
        assert await two.receive() == b""


@pytest.mark.parametrize("last_word", [b"", frame("LEAVE")], ids=["silent", "LEAVE"])
async def test_join_and_go_in_one_breath(site: Site, last_word: bytes) -> None:
    """JOIN and the end in one segment: a function that has gone already takes nobody's place."""
    async with site.relay(sections=ONE_PLACE) as relay:
        for _ in range(5):
            party = await site.party(relay, "func1")
            party.tls.write(frame("JOIN", {"attempt": party.attempt}) + last_word)
            party.send_now(party.take_outgoing() + party.close_notify())
            party.close()
        await next_one_waits_and_is_paired(site, relay)


async def hand_off_if_paired(party: Party) -> None:
    try:
        await party.expect("PAIRED")
        await party.hand_off()
    except trio.BrokenResourceError:
        pass  # cut, since the other one was gone


@pytest.mark.parametrize("delay", range(8))
@pytest.mark.parametrize("goodbye", ["LEAVE", "close_notify", "garbage"])
async def test_leaving_at_the_moment_of_being_paired(site: Site, delay: int, goodbye: str) -> None:
    """The first of the two events wins, and both functions learn it, even if the relay had read the LEAVE already.

    ``delay`` is the number of scheduler passes between the JOIN of one and the last frame of the other, so that it hits
    every step of the matching.
    """
    outcomes = {
        "LEAVE": {"handoff-aborted"},
        "garbage": {"protocol-error"},
        # For a leg that is paired already it is the answer of its hand-off, then an end without a byte: FIN, and RST
        # for what the relay had sent meanwhile. The network decides how much of that has arrived by then.
        "close_notify": {"handoff-aborted", "closed", "reset", "hung-up"},
    }
    async with site.relay() as relay:
        for _ in range(6):
            one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
            await one.join()
            await one.expect("WAITING")
            await eventually(lambda: relay.waiting() == (1, 0), "its place")
            two.tls.write(frame("JOIN", {"attempt": two.attempt}))
            if goodbye == "close_notify":
                last_word = one.close_notify()
            else:
                one.tls.write(frame("LEAVE") if goodbye == "LEAVE" else frame("JOIN", {"attempt": one.attempt}))
                last_word = one.take_outgoing()
            two.send_now(two.take_outgoing())
            for _ in range(delay):
                await trio.lowlevel.cancel_shielded_checkpoint()
            one.send_now(last_word)
            if goodbye == "close_notify":
                one.close()
            await two.expect("WAITING")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hand_off_if_paired, two)
                # Paired or not, the relay soon knows that one has gone; two waits, or has lost its pairing.
                await eventually(
                    lambda: relay.waiting() == (0, 1) or bool(relay.logged("pairing ended")), "an end of it"
                )
                nursery.cancel_scope.cancel()
            assert {str(record["outcome"]) for record in relay.logged("pairing ended")} <= outcomes[goodbye]
            one.close()
            two.close()
            await eventually(lambda: relay.legs == 0, "both gone")
            relay.events.clear()
