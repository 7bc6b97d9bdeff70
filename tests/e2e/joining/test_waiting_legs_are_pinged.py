"""The relay pings a waiting function from time to time; its answer never gets into the stream of its peer."""

from __future__ import annotations

import pytest
import trio

from support.party import TLS_HEADER, Party, frame
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually

PINGS = """
[limits]
ping_interval = 0.1
pong_timeout = 60
"""


async def waiter(site: Site, relay: RelayInProcess, name: str = "func1", **fields: object) -> Party:
    party = await site.party(relay, name)
    await party.join(**fields)
    await party.expect("WAITING")
    return party


async def test_pings_are_numbered_and_one_is_under_way_at_a_time(site: Site) -> None:
    async with site.relay(sections=PINGS) as relay:
        party = await waiter(site, relay)
        for number in (1, 2, 3):
            assert await party.expect("PING") == {"n": number}
            # The relay does not repeat a PING without an answer.
            with trio.move_on_after(0.4) as silence:
                raise AssertionError(await party.next_frame())
            assert silence.cancelled_caught
            await party.send_frame("PONG", {"n": number})
        assert relay.waiting() == (1, 0)


async def test_who_answers_waits_on(site: Site) -> None:
    limits = "[limits]\nping_interval = 0.05\npong_timeout = 20\n"
    async with site.relay(sections=limits) as relay:
        party = await waiter(site, relay)
        for _ in range(10):
            await party.send_frame("PONG", await party.expect("PING"))
        assert relay.waiting() == (1, 0)


@pytest.mark.load
async def test_who_does_not_answer_gives_up_its_place(site: Site) -> None:
    limits = "[limits]\nping_interval = 0.1\npong_timeout = 0.3\nmax_waiting_per_party = 1\n"
    async with site.relay(sections=limits) as relay:
        party = await site.party(relay, "func1")
        began = trio.current_time()
        await party.join()
        await party.expect("WAITING")
        await party.expect("PING")
        assert await party.refusal() == {
            "code": "pong-timeout",
            "reason": "no PONG within 0.3 s",
            "retry_after": 0.0,
        }
        assert (await relay.log("refused"))["reason"] == "no PONG within 0.3 s"
        assert trio.current_time() - began >= 0.4
        party.close()
        await eventually(lambda: relay.legs == 0, "its slot")
        again = await waiter(site, relay)
        await waiter(site, relay, "func2")
        await again.expect("PAIRED")


async def test_a_pong_drop_by_drop_gains_no_time(site: Site) -> None:
    """Single bytes do not count as an answer: they neither delay the PING nor give its answer more time."""
    limits = "[limits]\nping_interval = 0.3\npong_timeout = 0.3\n"
    async with site.relay(sections=limits) as relay:
        party = await waiter(site, relay)

        async def drip() -> None:
            for byte in frame("PONG", {"n": 1, "padding": "x" * 3000}):
                await party.send(bytes([byte]))
                await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            await party.expect("PING")
            assert (await party.refusal())["code"] == "pong-timeout"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("n", [0, 2, 2**63 - 1])
async def test_a_pong_that_nobody_asked_for_is_a_protocol_error(site: Site, n: int) -> None:
    async with site.relay(sections=PINGS) as relay:
        party = await waiter(site, relay)
        await party.expect("PING")
        await party.send_frame("PONG", {"n": n})
        assert await party.refusal() == {
            "code": "protocol-error",
            "reason": "PONG while waiting",
            "retry_after": None,
        }
        assert (await relay.log("refused"))["reason"] == "PONG while waiting"
        unasked = await site.party(relay, "func1")
        await unasked.send_frame("PONG", {"n": 1})
        assert (await unasked.refusal())["code"] == "protocol-error"


@pytest.mark.parametrize("mode", ["handoff", "tunnel"])
@pytest.mark.parametrize("answer", ["late", "in two pieces", "with the first bytes", "across the pairing"])
async def test_a_pong_that_crosses_with_paired_is_not_in_the_stream(site: Site, mode: str, answer: str) -> None:
    """PROTOCOL 2 and 5: the relay sent PING, then PAIRED. What comes is the PONG, not the first bytes of func1."""
    async with site.relay(sections=PINGS) as relay:
        one = await waiter(site, relay, modes=[mode])
        ping = await one.expect("PING")
        pong = frame("PONG", ping)
        if answer == "across the pairing":
            await one.send(pong[:6])
            await trio.sleep(0.05)
        two = await waiter(site, relay, "func2", modes=["tunnel"])
        await two.expect("PAIRED")
        assert (await one.expect("PAIRED", pong=False))["mode"] == mode
        hello = TLS_HEADER + b"hello"
        if mode == "handoff" and answer == "with the first bytes":
            # The raw bytes are not in TLS, so they cannot share a record with the PONG, but they can share a segment.
            one.tls.write(pong)
            record = one.take_outgoing()
            await one.read_to_close_notify()
            await one.stream.send_all(record + one.close_notify() + hello)
        else:
            match answer:
                case "late":
                    await trio.sleep(0.05)
                    await one.send(pong)
                case "in two pieces":
                    await one.send(pong[:3])
                    await trio.sleep(0.05)
                    await one.send(pong[3:])
                case "across the pairing":
                    await one.send(pong[6:])
                case "with the first bytes":
                    await one.send(pong + hello)
            if mode == "handoff":
                await one.hand_off(hello)
            elif answer != "with the first bytes":
                await one.send(hello)
        assert await two.receive_exactly(len(hello), raw=False) == hello
        await two.send(TLS_HEADER + b"and back")
        assert await one.receive_exactly(11, raw=mode == "handoff") == TLS_HEADER + b"and back"
        await one.send_raw(one.close_notify()) if mode == "tunnel" else await one.send_eof()
        assert await two.receive() == b""


@pytest.mark.parametrize("mode", ["handoff", "tunnel"])
async def test_a_leave_that_crosses_with_paired_while_a_pong_is_due(site: Site, mode: str) -> None:
    """LEAVE ends the pairing; func2 gets no byte of it."""
    async with site.relay(sections=PINGS) as relay:
        one = await waiter(site, relay, modes=[mode])
        await one.expect("PING")
        two = await waiter(site, relay, "func2", modes=["tunnel"])
        await two.expect("PAIRED")
        await one.send_frame("LEAVE")
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("handoff-aborted", "func1")
        assert await two.ended() == "reset"
        assert ended["detail"] == "as it was paired: left (LEAVE)"
        assert ended["bytes_func1_to_func2"] == 0


async def test_a_tunnel_that_ends_instead_of_its_pong(site: Site) -> None:
    """It has sent no byte of its stream, so this is not an empty stream: the function has left."""
    async with site.relay(sections=PINGS) as relay:
        one = await waiter(site, relay, modes=["tunnel"])
        await one.expect("PING")
        two = await waiter(site, relay, "func2", modes=["tunnel"])
        await two.expect("PAIRED")
        await one.expect("PAIRED", pong=False)
        await one.send_raw(one.close_notify())
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("handoff-aborted", "func1")
        assert ended["detail"] == "as it was paired: left (close_notify)"
        assert await two.ended() == "reset"


async def test_a_tunnel_that_owes_its_pong_is_not_begun_without_it(site: Site) -> None:
    """What it sends could be its PONG or its stream; it has handoff_timeout to send the PONG."""
    async with site.relay(sections=PINGS + "handoff_timeout = 0.4\n") as relay:
        one = await waiter(site, relay, modes=["tunnel"])
        await one.expect("PING")
        two = await waiter(site, relay, "func2", modes=["tunnel"])
        await two.expect("PAIRED")
        assert await two.ended() == "reset"
        ended = await relay.outcome()
        assert (ended["outcome"], ended["side"]) == ("handoff-timeout", "func1")
