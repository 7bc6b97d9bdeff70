"""``frelay connect``: standard input and output, a local port, a local service, a command; half-close all the way."""

from __future__ import annotations

import signal
import socket

import pytest
import trio

from support.clients import ask, options, run_function
from support.commands import arguments, command
from support.ends import block
from support.ports import reserved_port
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
QUESTION, REPLY = block(3_000_000, 1), block(2_000_000, 2)


def address_of(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    return host.strip("[]"), int(port)


@pytest.mark.parametrize("mode", ["handoff", "ticket", "tunnel"])
async def test_two_commands_are_a_pipe(site: Site, mode: str) -> None:
    """Megabytes that go into one come out of the other, and each end of input arrives alone."""
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        async with (
            command(arguments(site, place, "func1", "func2", "--mode", mode)) as one,
            command(arguments(site, place, "func2", "func1")) as two,
            trio.open_nursery() as nursery,
        ):

            async def put() -> None:
                async with one.stdin:
                    await one.stdin.send_all(QUESTION)

            nursery.start_soon(put)
            assert await two.output() == QUESTION
            # Its other direction is still open, although the first ended long ago.
            nursery.start_soon(two.stdin.send_all, REPLY[:1000])
            assert await one.stdout.receive_some(1000) == REPLY[:1000]
            await two.stdin.aclose()
            assert await one.output() == b""
            assert (await one.exit_code(), await two.exit_code()) == (0, 0)
            assert one.said("ended")[0] == {"event": "ended", "clean": True, "sent": 3_000_000, "received": 1000}
        assert (await relay.outcome())["outcome"] == "closed"


async def test_every_option_may_come_from_the_environment(site: Site) -> None:
    """Functions are configured like this: the command line is empty."""
    cert, key = site.paths["func1"]
    async with site.relay() as relay:
        env = {
            "FRELAY_ADDRESS": f"127.0.0.1:{relay.port()}",
            "FRELAY_CERT": str(cert),
            "FRELAY_KEY": str(key),
            "FRELAY_CA": str(site.ca_path),
            "FRELAY_PEER": "dns:nobody.demo dns:func2.demo",
            "FRELAY_SERVER_NAME": "localhost",
            "FRELAY_ROUTE": "demo",
            "FRELAY_PARTY": "func1",
            "FRELAY_WAIT": "20",
            "FRELAY_MODE": "tunnel",
            "FRELAY_ALPN": "test/1",
            "FRELAY_RETRY": "3",
            "FRELAY_TRACEPARENT": TRACEPARENT,
        }
        line = arguments(site, "x:1", "func1", "func2")[:4]
        async with command(line, env) as one:
            await one.say("waiting")
            assert relay.logged("waiting", traceparent=TRACEPARENT)
            async with trio.open_nursery() as nursery:
                heard: list[bytes] = []

                async def other() -> None:
                    given = options(site, "func2", "func1", alpn=["test/1"])
                    heard.append(await run_function("trio", env["FRELAY_ADDRESS"], ask(b"hello"), given))

                nursery.start_soon(other)
                assert await one.output() == b"hello"
                await one.stdin.send_all(b"reply")
                await one.stdin.aclose()
            assert heard == [b"reply"]
            assert (await one.say("connected"))["alpn"] == "test/1"
            assert await one.exit_code() == 0


async def test_a_local_port_here_is_a_local_service_there(site: Site) -> None:
    """Several connections, one after the other and at once; each has its own pairing, and can half-close."""

    async def service(stream: trio.SocketStream) -> None:
        async with stream:
            asked = b"".join([bytes(data) async for data in stream])
            await stream.send_all(asked[::-1])

    async def call(place: str, says: bytes) -> None:
        async with await trio.open_tcp_stream(*address_of(place)) as stream:
            async with trio.open_nursery() as sending:

                async def put() -> None:
                    await stream.send_all(says)
                    await stream.send_eof()

                sending.start_soon(put)
            assert b"".join([bytes(data) async for data in stream]) == says[::-1]

    async with site.relay() as relay, trio.open_nursery() as nursery:
        place = f"127.0.0.1:{relay.port()}"
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, service, [listener])
        port = listener.socket.getsockname()[1]
        async with (
            command(arguments(site, place, "func2", "func1", "--to", f"127.0.0.1:{port}")) as there,
            command(arguments(site, place, "func1", "func2", "--listen", "127.0.0.1:0")) as here,
        ):
            await there.say("waiting")
            local = (await here.say("listening"))["address"]
            with trio.fail_after(TIMEOUT):
                await call(local, b"one")
                await call(local, QUESTION)
                async with trio.open_nursery() as calls:
                    for number in range(5):
                        calls.start_soon(call, local, str(number).encode() * 100_000)
            await there.say("waiting", 8)  # always one leg more than there were callers
            await eventually(lambda: relay.waiting() == (0, 1), "one leg waits for the next caller")
            for one in (here, there):
                one.process.send_signal(signal.SIGTERM)
                assert await one.exit_code() == 0
            await eventually(lambda: relay.legs == 0, "the signal was told to the relay")
        nursery.cancel_scope.cancel()
    assert {entry["outcome"] for entry in relay.logged("pairing ended")} == {"closed"}


async def test_a_cut_is_passed_on_as_a_cut(site: Site) -> None:
    """The service resets within its answer: the local client sees a reset, not an end that looks complete."""

    async def service(stream: trio.SocketStream) -> None:
        await stream.send_all(b"half of it")
        await stream.receive_some(1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        stream.socket.close()

    async with site.relay() as relay, trio.open_nursery() as nursery:
        place = f"127.0.0.1:{relay.port()}"
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, service, [listener])
        port = listener.socket.getsockname()[1]
        async with (
            command(arguments(site, place, "func2", "func1", "--to", f"127.0.0.1:{port}")),
            command(arguments(site, place, "func1", "func2", "--listen", "127.0.0.1:0")) as here,
        ):
            local = (await here.say("listening"))["address"]
            async with await trio.open_tcp_stream(*address_of(local)) as stream:
                with trio.fail_after(TIMEOUT):
                    assert await stream.receive_some(100) == b"half of it"
                    await stream.send_all(b"x")
                    with pytest.raises(trio.BrokenResourceError):
                        await stream.receive_some(100)
        nursery.cancel_scope.cancel()


async def test_a_command_is_joined_to_one_pairing(site: Site) -> None:
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        async with (
            command(arguments(site, place, "func2", "func1", "--exec", "tr a-z A-Z")) as there,
            command(arguments(site, place, "func1", "func2")) as here,
        ):
            await here.stdin.send_all(b"in capitals")
            await here.stdin.aclose()
            assert await here.output() == b"IN CAPITALS"
            assert (await here.exit_code(), await there.exit_code()) == (0, 0)


async def test_exit_codes_say_what_happened(site: Site) -> None:
    """3 refused, 4 nobody came, 1 no relay or a missing file, 2 usage; and one line of output."""
    site.add("stranger", site.ca.party(dns=["stranger.demo"]))
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        with reserved_port() as nobody:
            cases = [
                (arguments(site, place, "stranger", "func2"), 3, "not-authorised"),
                (arguments(site, place, "func1", "func2", "--wait", "0.5"), 4, "wait-timeout"),
                (arguments(site, f"127.0.0.1:{nobody}", "func1", "func2"), 1, "no connection to"),
                (arguments(site, place, "func1", "func2", "--ca", "nowhere.pem"), 1, "there is no file nowhere.pem"),
                (arguments(site, "nowhere", "func1", "func2"), 2, "write host:port"),
                (arguments(site, place, "func1", "func2", "--mode", "fast"), 2, "handoff, ticket or tunnel"),
                (arguments(site, place, "func1", "func2", "--to", "h:1", "--listen", "h:2"), 2, "only one of"),
            ]
            for line, code, text in cases:
                with trio.fail_after(TIMEOUT):
                    done = await trio.run_process(line, capture_stderr=True, capture_stdout=True, check=False)
                assert (done.returncode, done.stdout) == (code, b""), done.stderr
                assert text in done.stderr.decode(), line
                assert code == 2 or done.stderr.count(b"\n") == 1, done.stderr


async def test_the_service_side_survives_its_relay(site: Site) -> None:
    """``--to`` outlives a relay that is restarted, and is there again for the next caller."""
    with reserved_port() as port:
        routes = DEMO.replace(":0", f":{port}")
        line = arguments(site, f"127.0.0.1:{port}", "func2", "func1", "--to", "127.0.0.1:9")
        async with command(line) as there:
            for count in (1, 2):
                async with site.relay(routes) as relay:
                    await there.say("waiting", count)
                    await eventually(lambda relay=relay: relay.waiting() == (0, 1), "it waits")  # type: ignore[misc]
                assert there.process.returncode is None
            there.process.send_signal(signal.SIGINT)
            assert await there.exit_code() == 0
        assert there.said("retrying")
