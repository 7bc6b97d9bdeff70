"""A listener that is closed, cancelled or ended loses no wire, leaves nothing open, and tells the relay at once."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

import frelay
import frelay.client.asyncio
import frelay.client.trio
from frelay.client import sockets
from frelay.client.options import JoinPlan
from frelay.client.retry import Retry
from frelay.client.standing import Standing
from frelay.client.trio import TrioListener, TrioWire, join
from frelay.client.trio.listening import running
from frelay.protocol.messages import Message, Waiting
from support.clients import CLIENTS, Client, options
from support.descriptors import open_descriptors, opened_since
from support.listeners import call, serving_many
from support.services import black_hole
from support.site import Site
from support.waiting import TIMEOUT, eventually
from support.wires import in_thread, read_to_end


def given(site: Site, **more: Any) -> dict[str, Any]:
    """The arguments of a listener that is func2."""
    return {**options(site, "func2", "func1", **more), "wait": None}


def caller(site: Site, **more: Any) -> Any:
    return options(site, "func1", "func2", **more)


def threads_of_listeners() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name in ("frelay leg", "frelay listener")]


# --- all clients ------------------------------------------------------------------------------------------------------


@pytest.mark.load
@pytest.mark.parametrize("client", CLIENTS)
async def test_the_relay_is_told_at_once_and_nothing_stays_open(site: Site, client: Client) -> None:
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with serving_many(client, address, options(site, "func2", "func1")):
            await call(address, caller(site))  # now all modules and thread pools are there
        await eventually(lambda: relay.legs == 0, "the first listener has left")
        before = open_descriptors()
        async with serving_many(client, address, options(site, "func2", "func1"), standing=4):
            await eventually(lambda: relay.waiting() == (0, 4), "four legs stand")
        await eventually(lambda: relay.legs == 0, "the relay has nothing of it")
        assert len([entry for entry in relay.events if "LEAVE" in str(entry)]) >= 4
        await eventually(lambda: not opened_since(before), "all descriptors are closed")
        assert not threads_of_listeners()


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_relay_that_does_not_answer_delays_no_close(site: Site, client: Client) -> None:
    """Neither its TCP, nor the look-up of its name."""
    with black_hole() as address:
        async with serving_many(client, address, options(site, "func2", "func1")):
            await trio.testing.wait_all_tasks_blocked(0.1)
        assert not threads_of_listeners()


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_look_up_that_does_not_end_delays_no_close(
    site: Site, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, done = threading.Event(), threading.Event()

    def look_up(host: str, port: int) -> Any:
        looking.set()
        done.wait(TIMEOUT * 2)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(sockets, "look_up", look_up)
    monkeypatch.setattr("frelay.client.trio.connecting.look_up", look_up)
    async with serving_many(client, "relay.invalid:9001", options(site, "func2", "func1")):
        assert await in_thread(looking.wait, TIMEOUT)
    assert not threads_of_listeners()
    done.set()


@pytest.mark.parametrize("client", CLIENTS)
async def test_an_error_of_the_programs_own_function_ends_it(site: Site, client: Client) -> None:
    """It is raised where the program waits for callers, and not lost in a thread or a task."""

    class Own(frelay.FrelayError):
        pass

    def on_status(message: Message) -> None:
        if isinstance(message, Waiting):
            raise LookupError("the program's own")

    def on_error(error: frelay.FrelayError) -> None:
        raise Own(f"told of {type(error).__name__}")

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        with pytest.raises(LookupError, match="the program's own"):
            await serve_until_error(client, address, given(site, on_status=on_status))
        await eventually(lambda: relay.legs == 0, "nothing is held")
    with pytest.raises(Own, match="told of RelayUnreachable"):
        await serve_until_error(client, address, {**given(site), "on_error": on_error})


async def serve_until_error(client: Client, address: str, arguments: dict[str, Any]) -> None:
    """Wait for callers until an error is raised; nobody calls."""
    with trio.fail_after(TIMEOUT):
        if client == "trio":
            async with frelay.client.trio.listen(address, **arguments) as listener:
                await listener.accept()
        elif client == "blocking":

            def accept() -> None:
                with frelay.listen(address, **arguments) as listener:
                    listener.accept()

            await in_thread(accept)
        else:

            async def serve() -> None:
                async with await frelay.client.asyncio.start_server(lambda *_: None, address, **arguments) as server:
                    await server.serve_forever()

            await in_thread(asyncio.run, serve())


@pytest.mark.parametrize("client", CLIENTS)
async def test_wrong_arguments_are_errors_of_the_call(site: Site, client: Client) -> None:
    for wrong, error in (
        ({"standing": 0}, ValueError),
        ({"peer": "func1"}, ValueError),
        ({"cert": site.directory / "nowhere.pem"}, frelay.CertificateError),
        ({"patience": 3}, TypeError),
    ):
        with pytest.raises(error):
            await serve_until_error(client, "localhost:9001", {**given(site), **wrong})
    assert not threads_of_listeners()


# --- blocking ---------------------------------------------------------------------------------------------------------


async def test_close_from_another_thread_wakes_accept(site: Site) -> None:
    async with site.relay() as relay:
        listener = frelay.listen(f"127.0.0.1:{relay.port()}", **given(site))
        ended: list[object] = []

        def accept() -> None:
            try:
                listener.accept()
            except frelay.ListenerClosed as error:
                ended.append(error)

        def iterate() -> None:
            ended.append(list(listener))

        waiting = [threading.Thread(target=target) for target in (accept, iterate)]
        for thread in waiting:
            thread.start()
        await eventually(lambda: relay.waiting() == (0, 2), "two legs stand")
        await in_thread(listener.close)
        for thread in waiting:
            await in_thread(thread.join, TIMEOUT)
        assert sorted(map(str, ended)) == ["[]", "this listener is closed"]
        assert not threads_of_listeners()
        with pytest.raises(frelay.ListenerClosed):
            listener.accept(0)
        listener.close()
        assert relay.waiting() == (0, 0)


async def test_accept_has_a_timeout(site: Site) -> None:
    async with site.relay() as relay:
        with frelay.listen(f"127.0.0.1:{relay.port()}", **given(site)) as listener:
            with pytest.raises(TimeoutError, match=r"no caller came within 0\.05 s"):
                await in_thread(listener.accept, 0.05)
            with pytest.raises(TimeoutError):
                listener.accept(0)
            await in_thread(listener.close)


async def test_wires_outlive_their_listener(site: Site) -> None:
    async with site.relay() as relay, trio.open_nursery() as nursery:
        address = f"127.0.0.1:{relay.port()}"
        heard: list[bytes] = []

        async def ask() -> None:
            heard.append(await call(address, caller(site)))

        listener = frelay.listen(address, **given(site))
        nursery.start_soon(ask)
        wire = await in_thread(listener.accept, TIMEOUT)
        await in_thread(listener.close)
        wire.settimeout(TIMEOUT)
        text = await in_thread(read_to_end, wire)
        await in_thread(wire.sendall, text)
        await in_thread(wire.close)
        await eventually(lambda: heard == [b"question"], "the caller has its answer")


@pytest.mark.load
async def test_callers_that_nobody_accepted_are_cut(site: Site) -> None:
    """Two wires are ready, two more legs stood, and then callers wait at the relay. A cut is no empty answer."""
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        before = open_descriptors()
        ended: list[BaseException] = []

        async def ask() -> None:
            with pytest.raises((trio.BrokenResourceError, frelay.FrelayError)) as caught:
                await call(address, caller(site))
            ended.append(caught.value)

        listener = frelay.listen(address, **given(site))
        async with trio.open_nursery() as nursery:
            for count in range(1, 5):
                nursery.start_soon(ask)
                await eventually(lambda count=count: len(listener._ready) == count, "a wire is ready")  # type: ignore[misc]
            for _ in range(2):
                nursery.start_soon(ask)
            await eventually(lambda: relay.waiting() == (2, 0), "two callers wait at the relay")
            assert not ended
            await in_thread(listener.close)
            await eventually(lambda: len(ended) == 4, "those four are cut")
            nursery.cancel_scope.cancel()
        await eventually(lambda: relay.legs == 0, "nothing is held")
        await eventually(lambda: not opened_since(before, pipes=relay.relay.parts.forwarding.pipes), "all is closed")


# --- Trio -------------------------------------------------------------------------------------------------------------


def listener_with(site: Site, address: str, joins: Callable[..., Any]) -> TrioListener:
    """A listener whose legs join by ``joins``."""
    standing = Standing.make(address, 1, trio.current_time, given(site))  # type: ignore[arg-type]
    return TrioListener(standing, lambda told: None, joins=joins)


@pytest.mark.load
@pytest.mark.parametrize("when", ["just before", "just after"])
async def test_an_accept_that_is_cancelled_while_a_wire_comes(site: Site, when: str) -> None:
    """Just before: the next accept gets the wire. Just after: this one has it already, and gives it."""
    scope = trio.CancelScope()
    got: list[TrioWire] = []

    async def joins(plan: JoinPlan, on_status: Callable[[Message], None]) -> TrioWire:
        wire = await join(plan, on_status)
        if when == "just before":
            scope.cancel()
        return wire

    async def accept() -> None:
        with scope:
            got.append(await listener.accept())

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        listener = listener_with(site, address, joins)
        if when == "just after":
            note_change = listener._note_change

            def note_change_and_cancel() -> None:
                note_change()
                if listener._ready:
                    scope.cancel()

            listener._note_change = note_change_and_cancel  # type: ignore[method-assign]
        async with running(listener), trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            nursery.start_soon(call, address, caller(site))
            await eventually(lambda: scope.cancel_called, "the wire has come")
            await trio.testing.wait_all_tasks_blocked()
            assert len(got) == (when == "just after")
            wire = got[0] if got else await listener.accept()
            await wire.send_all(b"".join([bytes(data) async for data in wire]))
            await wire.aclose()


async def test_accepts_that_are_cancelled_again_and_again_lose_nobody(site: Site) -> None:
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with frelay.client.trio.listen(address, **given(site)) as listener, trio.open_nursery() as nursery:

            async def answer(wire: TrioWire) -> None:
                async with wire:
                    await wire.send_all(b"".join([bytes(data) async for data in wire]))

            async def accept(patience: float) -> None:
                while True:
                    with trio.move_on_after(patience):
                        wire = await listener.accept()
                        nursery.start_soon(answer, wire)

            for patience in (0.001, 0.0017, 0.0031):
                nursery.start_soon(accept, patience)
            with trio.fail_after(TIMEOUT * 3):
                async with trio.open_nursery() as calls:
                    for _ in range(12):
                        calls.start_soon(call, address, caller(site, wait=TIMEOUT * 2))
            nursery.cancel_scope.cancel()
        await eventually(lambda: relay.legs == 0, "nothing is held")


async def test_closing_ends_accept_as_trio_promises(site: Site) -> None:
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        async with frelay.client.trio.listen(address, **given(site)) as listener:
            assert isinstance(listener, trio.abc.Listener)
            async with trio.open_nursery() as nursery:

                async def accept() -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await listener.accept()

                nursery.start_soon(accept)
                await eventually(lambda: relay.waiting() == (0, 2), "two legs stand")
                await listener.aclose()
            await eventually(lambda: relay.legs == 0, "they have left")
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()


async def test_an_error_of_the_block_comes_out_as_it_is(site: Site) -> None:
    """And not in a group, although tasks of the listener run beside the block."""
    with pytest.raises(ZeroDivisionError):
        async with frelay.client.trio.listen("localhost:1", **given(site)):
            raise ZeroDivisionError


async def test_wires_that_came_before_the_end_are_given_out_first(site: Site) -> None:
    async with site.relay() as relay, trio.open_nursery() as nursery:
        address = f"127.0.0.1:{relay.port()}"
        async with frelay.client.trio.listen(address, **given(site, retry=Retry(tries=0))) as listener:
            nursery.start_soon(call, address, caller(site))
            await eventually(lambda: len(listener._ready) == 1, "a wire is ready")
            site.ca.party(dns=["stranger.demo"]).write(site.directory, "func2")
            listener._standing.stumbled(frelay.Refused("not-authorised", "as the test wants it"))
            listener._changed.set()
            await eventually(lambda: listener._error is not None, "the listener has ended")
            wire = await listener.accept()
            with pytest.raises(frelay.Refused, match="as the test wants it"):
                await listener.accept()
            async with wire:
                await wire.send_all(b"".join([bytes(data) async for data in wire]))


# --- asyncio ----------------------------------------------------------------------------------------------------------


async def in_asyncio(work: Callable[[], Any]) -> Any:
    with trio.fail_after(TIMEOUT * 2):
        return await in_thread(lambda: asyncio.run(asyncio.wait_for(work(), TIMEOUT)))


async def test_the_surface_of_asyncios_server(site: Site) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        came: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = loop.create_future()
        # The callback may be an ordinary function.
        server = await frelay.client.asyncio.start_server(
            lambda reader, writer: came.set_result((reader, writer)), address, **given(site)
        )
        assert isinstance(server, asyncio.AbstractServer)
        assert server.is_serving()
        assert server.sockets == ()
        assert server.get_loop() is loop
        await server.start_serving()
        asking = loop.create_task(frelay.client.asyncio.connect(address, **caller(site)))
        reader, writer = await came
        _, asking_writer = await asking
        server.close()
        server.close()
        assert not server.is_serving()
        with pytest.raises(RuntimeError, match="closed"):
            await server.serve_forever()
        closed = loop.create_task(server.wait_closed())
        writer.write(b"the wire outlives the server")
        await writer.drain()
        asking_writer.write_eof()
        assert await reader.read() == b""
        assert not closed.done()
        server.close_clients()
        await closed
        asking_writer.close()
        await asking_writer.wait_closed()

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        await in_asyncio(work)
        await eventually(lambda: relay.legs == 0, "nothing is held")


async def test_an_error_that_nobody_waits_for_reaches_the_loop(site: Site) -> None:
    """As does an exception of the callback, which closes its wire and ends nothing else."""
    heard: list[dict[str, Any]] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: heard.append(context))

        async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raise KeyError("odd")

        arguments = given(site, retry=0)
        async with await frelay.client.asyncio.start_server(odd, address, **arguments) as server:
            reader, writer = await frelay.client.asyncio.connect(address, **caller(site))
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            assert isinstance(heard.pop()["exception"], KeyError)
            assert server.is_serving()
            trio.from_thread.run_sync(relay.relay.stop_now)
            while server.is_serving():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert heard[0]["message"] == "a frelay server has ended"
            assert isinstance(heard[0]["exception"], frelay.FrelayError)

    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        await in_asyncio(work)
