"""The scripts of ``examples/socat-stunnel-openssl`` work unchanged as parties, and carry TLS end to end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio

from frelay.client.contexts import inner_context
from support.certs import TestAuthority
from support.ends import OPEN, block
from support.ports import reserved_port
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.tools import tool
from support.waiting import TIMEOUT, eventually

SCRIPTS: Final = Path(__file__).parents[3] / "examples/socat-stunnel-openssl"
ANY_SIZE: Final = 1024 * 1024 + 7
PROGRAMS: Final = ("socat", "stunnel", "openssl")
TWO_ENDS: Final = ("socat", "stunnel")
"""The programs that support half-close."""


def environment(site: Site, port: int, name: str, **more: str) -> dict[str, str]:
    cert, key = site.paths[name]
    return {
        **os.environ,
        # By address: if localhost is also ::1, some versions of some programs do not try 127.0.0.1.
        "RELAY": f"127.0.0.1:{port}",
        "RELAY_NAME": "localhost",
        "CERT": str(cert),
        "KEY": str(key),
        "CA": str(site.ca_path),
        **more,
    }


def script(name: str) -> str:
    tool(name)
    return str(SCRIPTS / f"{name}.sh")


async def run(name: str, env: dict[str, str], data: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run a script with ``data`` on its standard input, to its end."""
    with trio.fail_after(TIMEOUT * 2):
        return await trio.run_process(
            [script(name)], stdin=data, env=env, capture_stdout=True, capture_stderr=True, check=False
        )


@pytest.mark.parametrize("two", TWO_ENDS)
@pytest.mark.parametrize("one", TWO_ENDS)
async def test_bytes_cross_both_ways(site: Site, one: str, two: str) -> None:
    """Neither ends before both have all: stunnel exits when the other side has ended, even with bytes left to send."""
    sent = {"func1": block(ANY_SIZE, 1), "func2": block(ANY_SIZE + 4, 2)}
    received = {"func1": bytearray(), "func2": bytearray()}
    all_is_there = trio.Event()

    async def feed(process: trio.Process, data: bytes) -> None:
        assert process.stdin is not None
        await process.stdin.send_all(data)
        await all_is_there.wait()
        await process.stdin.aclose()

    async def party(name: str, program: str) -> None:
        start = partial(trio.run_process, [script(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(partial(start, env=environment(site, relay.port(), name)))
            nursery.start_soon(feed, process, sent[name])
            assert process.stdout is not None
            async for chunk in process.stdout:
                received[name] += chunk
                if sum(map(len, received.values())) == sum(map(len, sent.values())):
                    all_is_there.set()

    async with site.relay() as relay:
        with trio.fail_after(TIMEOUT * 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(party, "func1", one)
                nursery.start_soon(party, "func2", two)
        assert received == {"func1": sent["func2"], "func2": sent["func1"]}
        assert (await relay.log("pairing ended"))["outcome"] == "closed"


@pytest.mark.parametrize("two", TWO_ENDS)
async def test_openssl_gets_all_that_the_other_one_sends(site: Site, two: str) -> None:
    """It exits when that has ended."""
    data = block(ANY_SIZE, 3)
    async with site.relay() as relay:
        received: list[subprocess.CompletedProcess[bytes]] = []

        async def receive() -> None:
            received.append(await run("openssl", environment(site, relay.port(), "func1"), b""))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            sent = await run(two, environment(site, relay.port(), "func2"), data)
        assert (received[0].returncode, received[0].stdout == data) == (0, True), received[0].stderr
        assert sent.returncode == 0, sent.stderr


@pytest.mark.parametrize(
    ("host", "name"),
    [("127.0.0.1", None), ("[::1]", None), ("localhost", None), ("127.0.0.1", "localhost."), ("127.0.0.1", "[::1]")],
)
@pytest.mark.parametrize("program", PROGRAMS)
async def test_the_relay_is_dialled_as_the_usage_says(site: Site, program: str, host: str, name: str | None) -> None:
    """RELAY alone is enough: the certificate must have its host, which may be an IP address."""
    address = "[::1]:0" if host == "[::1]" else "127.0.0.1:0"
    async with site.relay(OPEN.replace("127.0.0.1:0", address)) as relay:
        env1, env2 = (environment(site, 0, function) for function in ("func1", "func2"))
        for env in (env1, env2):
            env["RELAY"] = f"{host}:{relay.own_port()}"
            env["RELAY_NAME"] = name or ""
        start = partial(trio.run_process, [script(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(partial(start, env=env1))
            assert process.stdin is not None
            assert process.stdout is not None
            await relay.log("waiting", party="func1")
            nursery.start_soon(run, "socat", env2, b"hello")
            with trio.fail_after(TIMEOUT):
                received = b""
                while len(received) < 5:
                    received += await process.stdout.receive_some(5)
                # Not earlier: stunnel exits at the end of its input.
                await process.stdin.aclose()
            assert received == b"hello"


@pytest.mark.parametrize(
    "wrong",
    [
        {"RELAY": "127.0.0.1:9"},  # nobody listens there
        {"RELAY": "relay.invalid:9001"},
        {"RELAY": "127.0.0.1"},  # no port
        {"RELAY_NAME": "elsewhere.example"},
        {"RELAY_NAME": "127.0.0.2"},
        {"CA": "another.pem"},
        {"CERT": "missing.pem"},
    ],
    ids=str,
)
@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_failure_is_an_exit_code(site: Site, program: str, wrong: dict[str, str]) -> None:
    TestAuthority("another CA").write(site.directory, "another")
    if "CA" in wrong or "CERT" in wrong:
        wrong = {key: str(site.directory / value) for key, value in wrong.items()}
    async with site.relay() as relay:
        ended = await run(program, environment(site, relay.port(), "func1", **wrong), b"x")
    assert ended.returncode not in (0, -signal.SIGTERM)
    assert ended.stderr
    assert ended.stdout == b""


@pytest.mark.parametrize("program", ["socat", "openssl"])
async def test_a_cut_is_an_exit_code(site: Site, program: str) -> None:
    """The bytes before a reset are not all. The README says that stunnel takes a reset for an end."""
    async with site.relay(OPEN) as relay, trio.open_nursery() as nursery:
        start = partial(trio.run_process, [script(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
        process: trio.Process = await nursery.start(partial(start, env=environment(site, relay.port(), "func1")))
        await relay.log("waiting", party="func1")
        other = await site.party(relay, "func2")
        await other.join(modes=["tunnel"])
        await other.expect("WAITING")
        await other.expect("PAIRED")
        assert process.stdout is not None
        other.reset()
        with trio.fail_after(TIMEOUT):
            assert await process.stdout.receive_some(1) == b""
            assert await process.wait() != 0


async def test_stunnel_ends_with_its_script(site: Site) -> None:
    """A script that is stopped leaves no stunnel behind, and no file."""
    (site.directory / "tmp").mkdir()
    env = environment(site, 0, "func1", TMPDIR=str(site.directory / "tmp"))
    async with site.relay() as relay, trio.open_nursery() as nursery:
        env["RELAY"] = f"127.0.0.1:{relay.port()}"
        process: trio.Process = await nursery.start(
            partial(trio.run_process, [script("stunnel")], stdin=subprocess.PIPE, env=env, check=False)
        )
        await relay.log("waiting", party="func1")
        process.terminate()
        with trio.fail_after(TIMEOUT):
            assert await process.wait() != 0
        await eventually(lambda: relay.legs == 0, "stunnel has gone too")
        assert list((site.directory / "tmp").iterdir()) == []


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_relay_of_another_name_is_not_trusted(site: Site, program: str) -> None:
    """Its certificate has the right authority and another name: the other function gets nothing."""
    async with site.relay() as relay, trio.open_nursery() as nursery:
        # Its input stays open: at the end of it, it would exit.
        start = partial(trio.run_process, [script("socat")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
        other: trio.Process = await nursery.start(partial(start, env=environment(site, relay.port(), "func2")))
        await relay.log("waiting", party="func2")
        env = environment(site, relay.port(), "func1", RELAY_NAME="elsewhere.example")
        ended = await run(program, env, b"secret")
        assert ended.stderr
        # socat and stunnel check the name after the relay has admitted them, so the other one may be paired already.
        relay.relay.drain(reason="the other function has waited long enough")
        assert other.stdin is not None
        assert other.stdout is not None
        await other.stdin.aclose()
        with trio.fail_after(TIMEOUT):
            assert await other.stdout.receive_some(1) == b""
        assert not any(record["bytes_func1_to_func2"] for record in relay.logged("pairing ended"))


@pytest.mark.parametrize("program", PROGRAMS)
async def test_the_name_chooses_among_routes_on_one_address(site: Site, program: str) -> None:
    site.relay_paths = site.ca.relay(dns=["one.relay.test", "two.relay.test"]).write(site.directory, "relay")
    with reserved_port() as port:
        both = "".join(
            DEMO.replace('"demo"', f'"{name}"').replace("127.0.0.1:0", f"127.0.0.1:{port}") for name in ("one", "two")
        )
        async with site.relay(both) as relay, trio.open_nursery() as nursery:
            env = environment(site, port, "func1", RELAY_NAME="two.relay.test")
            process: trio.Process = await nursery.start(
                partial(trio.run_process, [script(program)], stdin=subprocess.PIPE, env=env, check=False)
            )
            assert (await relay.log("waiting"))["route"] == "two"
            process.kill()


@asynccontextmanager
async def service(site: Site, relay: RelayInProcess, program: str, name: str) -> AsyncIterator[int]:
    """A script that listens on a local port, which is returned, and joins as ``name`` when a connection comes."""
    with reserved_port() as port:
        front = {
            "stunnel": {"ACCEPT": f"127.0.0.1:{port}"},
            "socat": {"FRONT": f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr"},
        }[program]
        async with trio.open_nursery() as nursery:
            env = environment(site, relay.port(), name, **front)
            process: trio.Process = await nursery.start(
                partial(trio.run_process, [script(program)], env=env, check=False)
            )
            await eventually(lambda: _listens(port), f"{program} listens")
            try:
                yield port
            finally:
                # The script replaces itself by the program, so ending the process ends the program.
                process.send_signal(signal.SIGTERM)
                with trio.move_on_after(TIMEOUT) as scope:
                    await process.wait()
                if scope.cancelled_caught:
                    process.kill()
                    raise AssertionError(f"{program}.sh did not end on SIGTERM")


def _listens(port: int) -> bool:
    # Look in /proc instead of connecting: a connection would join the route.
    wanted = f"0100007F:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1] == wanted and line.split()[3] == "0A" for line in lines)


@pytest.mark.parametrize(("one", "two"), [("socat", "stunnel"), ("stunnel", "socat")])
async def test_tls_of_the_programs_behind_goes_through_end_to_end(site: Site, one: str, two: str) -> None:
    """As the README advises: local programs speak mTLS through the scripts, and the relay sees nothing else."""
    client = inner_context("client", *site.paths["func1"], site.ca_path)
    server = inner_context("server", *site.paths["func2"], site.ca_path)
    data = block(ANY_SIZE, 4)
    received: list[bytes] = []

    def ask(port: int) -> None:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as sock,
            client.wrap_socket(sock, suppress_ragged_eofs=False) as wire,
        ):
            wire.sendall(data)
            wire.shutdown(socket.SHUT_WR)
            received.append(wire.makefile("rb").read())

    def answer(port: int) -> None:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as sock,
            server.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as wire,
        ):
            received.append(wire.makefile("rb").read())
            wire.sendall(b"the answer")

    async with (
        site.relay(DEMO + 'require_inner_tls = "always"\n') as relay,
        service(site, relay, one, "func1") as port1,
        service(site, relay, two, "func2") as port2,
    ):
        with trio.fail_after(TIMEOUT * 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, ask, port1)
                nursery.start_soon(trio.to_thread.run_sync, answer, port2)
        assert received == [data, b"the answer"]
        assert (await relay.log("pairing ended"))["outcome"] == "closed"
