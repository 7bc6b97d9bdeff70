"""Through an HTTP proxy by CONNECT, for a network that lets functions out only by it."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, get_args

import pytest
import trio

import frelay
from frelay.protocol.messages import Mode
from support.clients import CLIENTS, Client, answer, ask, meet, options, run_function
from support.commands import arguments, command
from support.ports import free_port
from support.site import Site
from support.tools import running, tool, wait_listening
from support.waiting import TIMEOUT, eventually


class SmallProxy:
    """An HTTP proxy that supports only CONNECT, and keeps the requests."""

    def __init__(self, port: int, user: str | None) -> None:
        self.port = port
        self.heads: list[bytes] = []
        self._wanted = None if user is None else b"Basic " + base64.b64encode(user.encode())

    async def serve(self, client: trio.SocketStream) -> None:
        async with client:
            head = b""
            while b"\r\n\r\n" not in head:
                data = await client.receive_some(1000)
                if not data:
                    return
                head += data
            self.heads.append(head)
            if self._wanted is not None and b"Proxy-Authorization: " + self._wanted not in head:
                await client.send_all(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            host, _, port = head.split(b" ")[1].decode().rpartition(":")
            async with await trio.open_tcp_stream(host.strip("[]"), int(port)) as relay:
                # Byte by byte: the head of an answer may arrive in any number of pieces.
                for byte in b"HTTP/1.0 200 Connection established\r\nVia: test\r\n\r\n":
                    await client.send_all(bytes([byte]))
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._carry, client, relay)
                        nursery.start_soon(self._carry, relay, client)
                except* trio.BrokenResourceError:
                    pass

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()


@asynccontextmanager
async def small_proxy(user: str | None = None) -> AsyncIterator[SmallProxy]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy = SmallProxy(listener.socket.getsockname()[1], user)
        nursery.start_soon(trio.serve_listeners, proxy.serve, [listener])
        yield proxy
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_function_behind_a_proxy_meets_one_that_is_not(site: Site, client: Client, mode: Mode) -> None:
    """In every mode, also for the second connection of a ticket; the proxy gets the password."""
    async with site.relay() as relay, small_proxy("me:p@ss") as proxy:
        address = f"127.0.0.1:{relay.port()}"
        given = (
            options(site, "func1", "func2", mode=mode, proxy=f"http://me:p%40ss@127.0.0.1:{proxy.port}"),
            options(site, "func2", "func1"),
        )
        parts = (ask(b"question" * 10_000), answer(b"reply" * 10_000))
        assert await meet((client, "blocking"), address, parts, given) == (b"reply" * 10_000, b"question" * 10_000)
        wanted = f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n".encode()
        assert [head.startswith(wanted) for head in proxy.heads] == [True] * (2 if mode == "ticket" else 1)


async def test_what_a_proxy_says_is_told_and_its_password_is_not(site: Site) -> None:
    async with small_proxy("me:right") as proxy:
        given = options(site, "func1", "func2", proxy=f"http://me:wr0ng@127.0.0.1:{proxy.port}")
        with pytest.raises(frelay.RelayUnreachable, match="407") as caught:
            await run_function("trio", "relay.nowhere:9001", ask(b""), given)
        error: BaseException | None = caught.value
        while error is not None:
            assert "wr0ng" not in str(error)
            error = error.__cause__ or error.__context__


@pytest.mark.parametrize("says", [b"SSH-2.0-nothing\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nand more", b"", b"x" * 100_000])
async def test_what_is_no_proxy_is_no_way(site: Site, says: bytes) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(1000)
            try:
                await stream.send_all(says)
                await stream.send_eof()
                await stream.receive_some(1)
            except trio.BrokenResourceError:
                pass

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        given: Any = options(site, "func1", "func2", proxy=f"127.0.0.1:{listener.socket.getsockname()[1]}")
        with pytest.raises(frelay.RelayUnreachable):
            await run_function("blocking", "relay.nowhere:9001", ask(b""), given)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("local", [(), ("--listen", "127.0.0.1:0"), ("--to", "127.0.0.1:1", "--retry", "always")])
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
async def test_a_proxy_of_the_environment_that_cannot_be_used_is_a_failure_that_names_it(
    site: Site, variable: str, local: tuple[str, ...]
) -> None:
    """The command line is right, so this is no usage error; and there is no retry, which could not help."""
    line = arguments(site, "relay.acme:9001", "func1", "func2", *local)
    env = {"HTTPS_PROXY": "", "https_proxy": "", variable: "https://me:s3cret@proxy.acme:3128"}
    async with command(line, env) as one:
        assert await one.exit_code() == 1
        await one.say("failed")
        assert variable in one.stderr
        assert "s3cret" not in one.stderr
        assert "Usage" not in one.stderr


async def test_a_proxy_of_the_command_line_that_cannot_be_used_is_usage(site: Site) -> None:
    line = arguments(site, "relay.acme:9001", "func1", "func2", "--proxy", "https://proxy.acme:3128")
    async with command(line) as one:
        assert await one.exit_code() == 2


@asynccontextmanager
async def tinyproxy(site: Site) -> AsyncIterator[str]:
    """Debian's tinyproxy, which asks for a password; yields its URL."""
    program, port = tool("tinyproxy"), free_port()
    config = site.directory / "tinyproxy.conf"
    lines = [f"Port {port}", "Listen 127.0.0.1", "Timeout 600", "MaxClients 20", "Allow 127.0.0.1"]
    config.write_text("\n".join([*lines, "BasicAuth me secret", ""]))
    async with running([program, "-d", "-c", str(config)]):
        await wait_listening(port)
        yield f"http://me:secret@127.0.0.1:{port}"


async def test_debians_tinyproxy_is_a_way(site: Site) -> None:
    """Both functions behind it, in mode tunnel: half-close goes through, as its close_notify needs no FIN."""
    async with tinyproxy(site) as way, site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        tunnel = ("--mode", "tunnel")
        async with (
            command(arguments(site, place, "func1", "func2", *tunnel, "--exec", "cat"), {"FRELAY_PROXY": way}) as one,
            command(arguments(site, place, "func2", "func1", *tunnel, "--proxy", way)) as two,
            trio.open_nursery() as nursery,
        ):

            async def put() -> None:
                async with two.stdin:
                    await two.stdin.send_all(b"there and back" * 50_000)

            nursery.start_soon(put)
            assert await two.output() == b"there and back" * 50_000
            assert (await one.exit_code(), await two.exit_code()) == (0, 0)
        await eventually(lambda: relay.legs == 0, "nothing is held")


@pytest.mark.parametrize("mode", ["handoff", "ticket"])
async def test_tinyproxy_carries_raw_legs(site: Site, mode: str) -> None:
    """A request and its answer; then the function that asked ends first.

    tinyproxy ends both directions after one FIN, so a raw leg behind it cannot half-close: see docs/functions.md.
    """
    async with tinyproxy(site) as way, site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        async with (
            command(arguments(site, place, "func1", "func2", "--mode", mode, "--exec", "cat", "--proxy", way)),
            command(arguments(site, place, "func2", "func1", "--mode", mode, "--proxy", way)) as two,
        ):
            got = b""
            with trio.fail_after(TIMEOUT):
                await two.stdin.send_all(b"there and back")
                while len(got) < 14:
                    got += await two.stdout.receive_some()
            assert got == b"there and back"
