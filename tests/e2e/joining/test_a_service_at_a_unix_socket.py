"""A service may be at a Unix socket of the relay's machine, and is dialled, spliced and ended like one by TCP.

A Unix socket has no RST; these tests also show what the service sees of a cut instead.
"""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import frelay.joining.dial
from frelay.config.load import load
from frelay.errors import ConfigError
from frelay.pairing.raw_pump import RawPump
from frelay.pairing.stream_pump import StreamPump
from support.admin import ADMIN, admin
from support.commands import ask
from support.ends import block
from support.party import TLS_HEADER, Party
from support.relay import RelayInProcess
from support.services import CALLERS, Caller, call, dialling, echo
from support.site import Site
from support.waiting import TIMEOUT, eventually

OPEN = "require_inner_tls = false"
Handler = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def serving(path: Path, handler: Handler) -> AsyncIterator[str]:
    """A service at ``path``; gives what a route file calls it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))

        async def handle(stream: trio.SocketStream) -> None:
            try:
                await handler(stream)
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, handle, [listener])
            yield f"unix:{path}"
            nursery.cancel_scope.cancel(reason="the test is over")


async def nothing_is_left(relay: RelayInProcess) -> None:
    await eventually(lambda: relay.legs == 0 and relay.waiting() == (0, 0), "no leg and no place is left")


async def refused(site: Site, relay: RelayInProcess) -> str:
    """What the record says about a service that cannot be reached."""
    party = await site.party(relay, "func1")
    await party.join()
    await party.expect("WAITING")
    assert (await party.refusal())["code"] == "wait-timeout"
    record = await relay.outcome()
    assert (record["outcome"], record["side"]) == ("dial-failed", "func2")
    party.close()
    await nothing_is_left(relay)
    detail: str = record["detail"]
    return detail


# --- reached ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", CALLERS)
async def test_bytes_and_ends_go_both_ways(site: Site, tmp_path: Path, caller: Caller) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        question = b""
        while data := await stream.receive_some(65536):
            question += data
        await stream.send_all(question[::-1])

    more = OPEN + ('\nhandoff = "hello"\nhello_settle = 0.05\n' if caller == "hello" else "")
    async with serving(tmp_path / "db", answer) as place, site.relay(dialling(place, more=more)) as relay:
        end = await call(site, relay, caller)
        await end.send(b"question")
        await end.send_eof()
        assert await end.receive_to_end() == b"noitseuq"
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("closed", "both")
        assert record["func2"] == f"dial:{place}"
        assert (await relay.log("dialled"))["address"] == place
        await nothing_is_left(relay)


@pytest.mark.parametrize("rate", ["", "max_bytes_per_second = 500_000_000"])
@pytest.mark.parametrize("caller", ["raw", "tunnel"])
async def test_megabytes_arrive_whole(site: Site, tmp_path: Path, caller: Caller, rate: str) -> None:
    """By splice if both legs are raw, through the process otherwise."""
    data = block(8 << 20)
    more = f"{OPEN}\n{rate}\n"
    async with serving(tmp_path / "db", echo) as place, site.relay(dialling(place, more=more)) as relay:
        end = await call(site, relay, caller)

        async def send() -> None:
            await end.send(data)
            await end.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await end.receive_exactly(1) == data[:1]
            kind = RawPump if caller == "raw" and not rate else StreamPump
            assert all(type(pump) is kind for one in relay.relay.pairings for pump in one._pumps.values())
            assert await end.receive_to_end() == data[1:]
        record = await relay.outcome()
        assert (record["outcome"], record["bytes_func1_to_func2"]) == ("closed", len(data))
        assert record["bytes_func2_to_func1"] == len(data)


async def test_paired_names_the_socket(site: Site, tmp_path: Path) -> None:
    """A relative path starts at the directory of the route file."""
    async with serving(tmp_path / "db", echo) as place, site.relay(dialling("unix:db")) as relay:
        party = await site.party(relay, "func1")
        await party.join()
        await party.expect("WAITING")
        assert (await party.expect("PAIRED"))["peer"] == f"dial:{place}"


async def test_inner_tls_is_asked_of_it(site: Site, tmp_path: Path) -> None:
    async def banner(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 welcome\r\n")
        await echo(stream)

    async with serving(tmp_path / "db", banner) as place, site.relay(dialling(place)) as relay:
        end = await call(site, relay)
        await end.send(TLS_HEADER)
        assert await end.ended() == "reset"
        assert (await relay.outcome())["outcome"] == "not-tls"


# --- cut --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["", "max_bytes_per_second = 500_000_000"])
@pytest.mark.parametrize("caller", CALLERS[:4])
async def test_a_service_that_leaves_bytes_unread_has_reset(
    site: Site, tmp_path: Path, caller: Caller, rate: str
) -> None:
    """A service at a Unix socket has no other way to cut, and its caller sees the cut."""
    may_go = trio.Event()

    async def leave(stream: trio.SocketStream) -> None:
        await may_go.wait()

    more = f"{OPEN}\n{rate}\n"
    async with serving(tmp_path / "db", leave) as place, site.relay(dialling(place, more=more)) as relay:
        end = await call(site, relay, caller)
        await end.send(b"unread")
        await eventually(lambda: sum(relay.relay.pairings[0].bytes_moved.values()) == 6, "they are there")
        may_go.set()
        assert await end.ended() in ("reset", "truncated")
        record = await relay.outcome()
        assert (record["outcome"], record["side"]) == ("reset", "func2")
        await nothing_is_left(relay)


async def test_a_service_that_closes_in_order_has_ended(site: Site, tmp_path: Path) -> None:
    async def tell(stream: trio.SocketStream) -> None:
        await stream.send_all(b"news")

    async with serving(tmp_path / "db", tell) as place, site.relay(dialling(place, more=OPEN)) as relay:
        end = await call(site, relay)
        assert await end.receive_to_end() == b"news"
        await end.send_eof()
        assert (await relay.outcome())["outcome"] in ("closed", "hung-up")


@pytest.mark.parametrize("leaves_input", [False, True])
async def test_what_the_service_sees_of_a_cut(site: Site, tmp_path: Path, leaves_input: bool) -> None:
    """ECONNRESET if the relay had left input unread; otherwise both directions end, and the service cannot write."""
    seen: list[BaseException | bytes] = []
    over = trio.Event()

    async def flood(stream: trio.SocketStream) -> None:
        try:
            while True:
                await stream.send_all(bytes(1 << 20))
        except trio.BrokenResourceError:
            pass

    async def watch(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            if leaves_input:
                nursery.start_soon(flood, stream)
            try:
                seen.append(await stream.receive_some(1))
                seen.append(await stream.receive_some(1))
                await stream.send_all(b"x")
            except trio.BrokenResourceError as error:
                seen.append(error.__cause__ or error)
            nursery.cancel_scope.cancel(reason="it has seen what there is")
        over.set()

    async with serving(tmp_path / "db", watch) as place, site.relay(dialling(place, more=OPEN)) as relay:
        end = await call(site, relay)
        await end.send(b"1")
        await eventually(lambda: seen == [b"1"], "it waits for more")
        (pairing,) = relay.relay.pairings
        if leaves_input:
            # The caller reads nothing, so the relay's buffers fill up in the end, and input stays unread.
            await eventually(lambda: pairing._pumps["func2"].is_blocked, "the relay cannot go on")
            await eventually(lambda: _unread(pairing.legs["func2"].sock) > 0, "there is more")
        end.party.reset()
        with trio.fail_after(TIMEOUT):
            await over.wait()
    if leaves_input:
        assert seen[0] == b"1"
        assert isinstance(seen[1], ConnectionResetError)
    else:
        assert seen[:2] == [b"1", b""]
        assert isinstance(seen[2], BrokenPipeError)
    assert (await relay.outcome())["outcome"] == "reset"


def _unread(sock: socket.socket) -> int:
    """How many bytes have arrived and are unread."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


# --- not reached ------------------------------------------------------------------------------------------------------


async def test_no_such_socket(site: Site, tmp_path: Path) -> None:
    async with site.relay(dialling(f"unix:{tmp_path}/nowhere")) as relay:
        assert await refused(site, relay) == "no such file or directory"


async def test_a_socket_that_nobody_listens_at(site: Site, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "left"))
    async with site.relay(dialling(f"unix:{tmp_path}/left")) as relay:
        assert await refused(site, relay) == "connection refused"


async def test_what_is_no_socket(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with site.relay(dialling(f"unix:{tmp_path}/file")) as relay:
        assert await refused(site, relay) == "connection refused"


async def test_a_socket_that_may_not_be_written(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, because the tests may run as root, which may write anywhere."""

    async def forbidden(path: str) -> socket.socket:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(frelay.joining.dial, "connect_unix", forbidden)
    async with site.relay(dialling(f"unix:{tmp_path}/db")) as relay:
        detail = await refused(site, relay)
        assert detail.startswith("permission denied: user ")
        assert detail.endswith("needs write permission on the socket")


async def test_a_full_queue_is_waited_for(site: Site, tmp_path: Path) -> None:
    """TCP waits by itself; at a Unix socket connect_timeout ends the wait, not the first EAGAIN."""
    path = str(tmp_path / "db")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as crowd:
        listener.bind(path)
        listener.listen(0)
        crowd.connect(path)
        async with site.relay(dialling(f"unix:{path}", options=", connect_timeout = 0.4")) as relay:
            assert await refused(site, relay) == "no answer within 0.4 s"
        async with site.relay(dialling(f"unix:{path}", options=", connect_timeout = 60")) as relay:
            party = await site.party(relay, "func1")
            await party.join()
            await party.expect("WAITING")
            await trio.sleep(0.2)
            assert relay.waiting() == (1, 0)
            listener.accept()[0].close()
            assert (await party.expect("PAIRED"))["peer"] == f"dial:unix:{path}"


# --- written ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("unix:", "is not a path"),
        (f"unix:/{'a' * 107}", "at most 107 bytes, and this has 108"),
        (f"unix:{'a' * 107}", "at most 107 bytes"),
        ("unix", "write HOST:PORT"),
    ],
)
def test_a_path_that_cannot_be_one(site: Site, place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load(site.write(dialling(place)))
    assert [problem.key for problem in raised.value.problems] == ["route[demo].func2.dial"]
    assert load(site.write(dialling(f"unix:/{'a' * 106}"))).routes


async def test_the_api_and_the_command_take_it(site: Site, tmp_path: Path) -> None:
    """Also in a worker, which gets its configuration from its supervisor."""
    async with (
        serving(tmp_path / "db", echo) as place,
        site.process(sections=ADMIN, workers=2) as relay,
        admin(site) as http,
    ):
        body = {"listen": "127.0.0.1:0", "func1": "dns:func1.demo", "func2": {"dial": place}}
        made = (await http.put("/v1/routes/two", json=body)).json()
        assert made["func2"] == {"dial": place, "connect_timeout": 5.0}
        options = ("--listen", "127.0.0.1:0", "--func1", "dns:func1.demo", "--func2", f"dial:{place}")
        said = await ask("route", "add", "three", *options, "-c", site.config)
        assert (said.code, said.stderr) == (0, "")
        shown = await ask("route", "show", "three", "-c", site.config)
        assert f"dial:{place}" in shown.stdout
        for name in ("two", "three"):
            party: Party = await site.party(relay, "func1", route=name)
            await party.join()
            await party.expect("WAITING")
            assert (await party.expect("PAIRED"))["peer"] == f"dial:{place}"
