"""Whatever a party with a good certificate sends inside its TLS, the relay answers in order, and serves the next one.

``tests/fuzz/test_framing.py`` checks the codec itself. These tests use real sockets and check what is around the codec:
the refusal must fit a frame, the place must be free again, and the log must name no bug (which every test with a relay
checks at its end).
"""

from __future__ import annotations

import json
import random
import ssl
import struct
from collections.abc import Callable

import pytest
import trio

from support.handoffs import client_hello, met
from support.party import TYPES, Party, frame
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually

ATTEMPT = "0f8fad5b-d9cb-469f-a165-70867728950e"
SHORT = "[limits]\njoin_timeout = 0.2\nwait_timeout = 0.2\nping_interval = 0.05\npong_timeout = 0.1\n"
ROUNDS = 60


def any_value(random_: random.Random, depth: int = 0) -> object:
    """A JSON value, sane or not."""
    kinds: list[Callable[[], object]] = [
        lambda: None,
        lambda: random_.random() < 0.5,
        lambda: random_.choice([0, -1, 1, 2**63, 10**300, -(10**300), 1e308, 0.5]),
        lambda: "".join(chr(random_.choice([0, 9, 10, 27, 65, 0x7F, 0xA0, 0xD800, 0x202E, 0x1F600])) for _ in range(9)),
        lambda: random_.choice(["func1", "func2", "handoff", "tunnel", ATTEMPT, "demo", "../demo", "\\" * 1000]),
    ]
    if depth < 3:
        kinds.append(lambda: [any_value(random_, depth + 1) for _ in range(random_.randrange(4))])
        kinds.append(
            lambda: {random_.choice("abn"): any_value(random_, depth + 1) for _ in range(random_.randrange(3))}
        )
    return random_.choice(kinds)()


def any_frame(random_: random.Random) -> bytes:
    """A frame that may be right, nearly right, or noise."""
    kind = random_.randrange(5)
    if kind == 0:
        return random_.randbytes(random_.randrange(1, 60))
    if kind == 1:
        length = random_.choice([0, 1, 4096, 4097, 65535])
        return struct.pack(">BBH", random_.randrange(256), random_.choice([0, 0, 1]), length) + bytes(length % 9)
    payload: dict[str, object] = {"attempt": ATTEMPT, "n": 1, "route": "demo"}
    for key in random_.sample(["attempt", "route", "party", "wait", "modes", "n", "later"], random_.randrange(4)):
        payload[key] = any_value(random_)
    body = json.dumps(payload).encode()[:4096]
    if kind == 2:
        body = bytes(byte ^ (random_.random() < 0.02) for byte in body)
    if kind == 3:
        body = body[:-1] + b"," + body[1:]
    types: list[str | int] = [*TYPES, *TYPES, 0x80, 0xFF]
    return frame(random_.choice(types), body[:4096])


async def last_words(party: Party) -> list[str]:
    """The names of the frames that the relay sends until it ends the connection."""
    names = []
    with trio.fail_after(TIMEOUT):
        try:
            while (found := await party.next_frame()) is not None:
                names.append(found[0])
        except (trio.BrokenResourceError, ssl.SSLError):
            names.append("(reset)")
    return names


@pytest.mark.parametrize("seed", range(4))
async def test_random_frames_are_answered_in_order(site: Site, seed: int) -> None:
    """TESTPLAN 21: the answer is a refusal, or WAITING and a refusal, or PAIRED and a cut; and nothing stays."""
    random_ = random.Random(seed)
    async with site.relay(sections=SHORT) as relay:
        for _ in range(ROUNDS):
            party = await site.party(relay, random_.choice(["func1", "func2"]))
            start = frame("JOIN", {"attempt": ATTEMPT}) if random_.random() < 0.4 else b""
            data = start + b"".join(any_frame(random_) for _ in range(random_.randrange(1, 4)))
            pieces = [data] if random_.random() < 0.5 else [data[at : at + 7] for at in range(0, len(data), 7)]
            try:
                for piece in pieces:
                    await party.send(piece)
            except trio.BrokenResourceError:
                pass  # refused in the middle of it
            names = await last_words(party)
            assert not set(names) - {"WAITING", "PING", "REFUSED", "(reset)"}
            # Only a LEAVE may get no answer; only bytes after the refusal may cause a reset.
            if names == []:
                assert frame("LEAVE")[:1] in data
            site.hang_up()
        await free_again(relay)
        await still_serves(site, relay)


@pytest.mark.parametrize("seed", range(4))
async def test_random_bytes_after_paired_go_nowhere(site: Site, seed: int) -> None:
    """TESTPLAN 21: in TLS or raw, instead of the close_notify; the other function is cut and gets no byte."""
    random_ = random.Random(seed)
    async with site.relay() as relay:
        for number in range(15):
            one, two = await met(site, relay)
            await two.hand_off()
            await one.read_to_close_notify()
            noise = any_frame(random_) if number % 2 else random_.randbytes(random_.randrange(5, 100))
            if number % 2:
                # Some frames may cross with PAIRED; here one of them is followed by bytes that may not.
                one.tls.write(noise + frame("JOIN", {"attempt": ATTEMPT}))
                noise = one.take_outgoing()
            await one.send_raw(noise + one.close_notify() + client_hello(site))
            with pytest.raises(trio.BrokenResourceError):
                await two.receive_raw()
            site.hang_up()
        await eventually(lambda: len(relay.logged("pairing ended")) == 15)
        for record in relay.logged("pairing ended"):
            assert (record["outcome"], record["side"]) in {("protocol-error", "func1"), ("handoff-aborted", "func1")}
            assert record["bytes_func1_to_func2"] == 0
        await still_serves(site, relay)


NAMES = {
    "of three bytes each": "\u4e2d" * 1300,
    "that grow when they are quoted": "\\" * 1900,
    "beyond the BMP": "\U0001f600" * 1000,
    "of control characters": "\x1b[2J\r\n" * 50,
}


@pytest.mark.parametrize("name", NAMES)
async def test_a_refusal_fits_its_frame_whatever_was_asked_for(site: Site, name: str) -> None:
    """TESTPLAN 21, 54: a route name as long as a frame allows is not repeated in full."""
    async with site.relay() as relay:
        party = await site.party(relay, "func1")
        body = json.dumps({"attempt": ATTEMPT, "route": NAMES[name]}, ensure_ascii=False).encode()
        assert len(body) <= 4096
        await party.send(frame("JOIN", body))
        refusal = await party.refusal()
        assert refusal["code"] in ("unknown-route", "not-authorised", "protocol-error")
        assert len(refusal["reason"]) < 500
        assert refusal["reason"].isprintable()


async def free_again(relay: RelayInProcess) -> None:
    """Nobody waits, and nothing is paired."""
    route = relay.relay.routes["demo"]
    await eventually(lambda: route.lobby.count("func1") == route.lobby.count("func2") == 0, "the lobby is empty")
    await eventually(lambda: not route.pairings, "nothing is paired")


async def still_serves(site: Site, relay: RelayInProcess) -> None:
    """Two good functions meet; again if this machine was too slow for the short limits that the bad ones need."""
    hello = client_hello(site)
    for attempt in range(5):
        try:
            one, two = await met(site, relay)
        except AssertionError as error:
            if "within 0." not in str(error) or attempt == 4:
                raise
            site.hang_up()
        else:
            break
    await one.hand_off(hello)
    await two.hand_off()
    assert await two.receive_exactly(len(hello)) == hello
