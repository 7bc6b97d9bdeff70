"""``frelay connect --meet KEY [--partner NAME]``: only the two that name one key are joined."""

from __future__ import annotations

from functools import partial
from typing import Final

import pytest
import trio

from support.commands import arguments, ask, command
from support.site import Site
from support.streams import read_to_end
from support.waiting import TIMEOUT

MESH: Final = """
[[route]]
name = "demo"
listen = "127.0.0.1:0"
func1 = ["dns:a.demo", "dns:b.demo", "dns:func1.demo"]
func2 = ["dns:a.demo", "dns:b.demo", "dns:func2.demo"]
"""


@pytest.fixture(autouse=True)
def ranks(site: Site) -> None:
    for name in ("a", "b"):
        site.add(name, site.ca.party(dns=[f"{name}.demo"]))


async def test_two_standard_inputs_meet_whoever_else_waits(site: Site) -> None:
    """Their certificates fit both parties; one takes its options from the environment."""
    async with site.relay(MESH) as relay:
        address = f"127.0.0.1:{relay.port()}"
        for name, fields in (("func1", {}), ("func2", {"meet": "job/2"})):
            other = await site.party(relay, name)
            await other.join(**fields)
            await other.expect("WAITING")
        one = arguments(
            site, address, "a", "b", "--meet", "job/1", "--partner", "dns:x.demo", "--partner", "dns:b.demo"
        )
        two = arguments(site, address, "b", "a")
        env = {"FRELAY_MEET": "job/1", "FRELAY_PARTNER": "dns:a.demo dns:y.demo"}
        async with command(one) as first:
            waiting = await first.say("waiting")
            assert (waiting["meet"], waiting["party"]) == ("job/1", None)
            async with command(two, env) as second:
                for sender, word in ((first, b"one"), (second, b"two")):
                    await sender.stdin.send_all(word)
                    await sender.stdin.aclose()
                assert (await first.output(), await second.output()) == (b"two", b"one")
                assert [await first.exit_code(), await second.exit_code()] == [0, 0]
                assert (await first.say("paired"))["meet"] == "job/1"
                assert {first.said("paired")[0]["role"], second.said("paired")[0]["role"]} == {"client", "server"}


async def test_a_local_port_and_a_service_meet_by_key(site: Site) -> None:
    """Each caller of the port gets a pairing with the service of the same key; the service of another key gets none."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")
        await stream.aclose()

    async with site.relay(MESH) as relay, trio.open_nursery() as nursery:
        (service,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        place = f"127.0.0.1:{service.socket.getsockname()[1]}"
        address = f"127.0.0.1:{relay.port()}"
        to = arguments(site, address, "a", "b", "--to", place, "--meet", "db")
        elsewhere = arguments(site, address, "a", "b", "--to", "127.0.0.1:1", "--meet", "other")
        port = arguments(site, address, "b", "a", "--listen", "127.0.0.1:0", "--meet", "db")
        async with command(elsewhere) as wrong, command(to) as right, command(port) as listening:
            await wrong.say("waiting")
            await right.say("waiting")
            host, _, number = (await listening.say("listening"))["address"].rpartition(":")
            for _ in range(3):
                with trio.fail_after(TIMEOUT):
                    stream = await trio.open_tcp_stream(host, int(number))
                    async with stream:
                        assert await read_to_end(stream) == b"hello"
            assert not wrong.said("paired")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--meet", "two words"), "meet='two words': 1 to 128 characters of visible ASCII expected"),
        (("--meet", "x" * 129), "1 to 128 characters of visible ASCII expected"),
        (("--partner", "dns:b.demo"), "partner: it works only together with meet"),
        (("--meet", "job", "--partner", "b.demo"), "partner: 'b.demo' is not a selector"),
    ],
)
async def test_a_wrong_option_is_named(site: Site, more: tuple[str, ...], said: str) -> None:
    _, *line = arguments(site, "127.0.0.1:1", "a", "b", *more)
    done = await ask(*line[2:])
    assert done.code == 2
    assert said in " ".join(done.stderr.split())
