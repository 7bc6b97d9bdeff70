"""A real ``frelay run`` under a stand-in for systemd: what it reports, and how it uses sockets that it is given."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from support.manager import Manager, activated, listening
from support.party import pair
from support.ports import reserved_port
from support.relay import FRELAY_RUN, RelayProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT

TWO: Final = DEMO + DEMO.replace('"demo"', '"other"')


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify")) as manager:
        yield manager


def route(port: int, name: str = "demo") -> str:
    return DEMO.replace("127.0.0.1:0", f"127.0.0.1:{port}").replace('"demo"', f'"{name}"')


@asynccontextmanager
async def relay_with(
    site: Site, sockets: Sequence[tuple[str, socket.socket]], routes: str, **more: Any
) -> AsyncIterator[RelayProcess]:
    """A relay that is passed these sockets. Once it has them the test closes its own, which systemd would not."""
    launcher, descriptors = activated(sockets)
    async with site.process(routes, launcher=launcher, pass_fds=descriptors, **more) as relay:
        for _, sock in sockets:
            sock.close()
        yield relay


async def check_that_they_meet(site: Site, port: int, route: str = "demo") -> None:
    one, two = await site.party(port, "func1"), await site.party(port, "func2")
    await pair(one, two, route=route)
    one.close()
    two.close()


# --- what it says -----------------------------------------------------------------------------------------------------


async def test_it_says_how_it_is_from_ready_to_stopping(site: Site, manager: Manager) -> None:
    async with site.process(TWO, env={"NOTIFY_SOCKET": manager.address}) as relay:
        assert await manager.hear() == "READY=1\nSTATUS=2 routes on 2 addresses"
        await check_that_they_meet(site, relay.port())
        site.write(DEMO)
        relay.signal(signal.SIGHUP)
        assert (await manager.hear()).startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert await manager.hear() == "READY=1\nSTATUS=1 route on 1 address"
        relay.signal(signal.SIGTERM)
        word = (await manager.hear()).split("\n")
        assert word == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=40000000", "STATUS=draining, 0 pairings are left to end"]
        assert await relay.exit_code() == 0
        assert manager.heard() == []


async def test_a_refused_reload_is_over_too_and_the_status_says_so(site: Site, manager: Manager) -> None:
    async with site.process(options=["--no-watch"], env={"NOTIFY_SOCKET": manager.address}) as relay:
        await manager.hear()
        site.write(DEMO + "unheard_of = 1\n")
        relay.signal(signal.SIGHUP)
        assert (await manager.hear()).startswith("RELOADING=1\n")
        refused = await manager.hear()
        assert refused.startswith("READY=1\nSTATUS=1 route on 1 address, as before: the last reload was refused: ")
        assert "unheard_of" in refused
        site.write()
        relay.signal(signal.SIGHUP)
        assert (await manager.hear()).startswith("RELOADING=1\n")
        assert await manager.hear() == "READY=1\nSTATUS=1 route on 1 address"


async def test_the_watchdog_is_fed_to_the_end_of_the_drain(site: Site, manager: Manager) -> None:
    env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
    async with site.process(env=env) as relay:
        for _ in range(5):
            while await manager.hear(watchdog=True) != "WATCHDOG=1":
                pass
        one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
        await pair(one, two, modes=["tunnel"])
        relay.signal(signal.SIGTERM)
        while not (await manager.hear()).startswith("STOPPING=1"):
            pass
        for _ in range(5):
            assert await manager.hear(watchdog=True) == "WATCHDOG=1"
        one.close()
        await relay.exit_code()


@pytest.mark.parametrize("trouble", ["not there", "never reads", "goes away"])
async def test_a_notify_socket_with_trouble_is_no_trouble_of_the_relay(
    site: Site, manager: Manager, trouble: str
) -> None:
    if trouble == "never reads":
        manager.fill_up()
    address = f"{manager.address}-not" if trouble == "not there" else manager.address
    async with site.process(env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000"}) as relay:
        if trouble == "goes away":
            manager.socket.close()
        await check_that_they_meet(site, relay.port())
        relay.signal(signal.SIGHUP)
        await relay.log("reloaded")
        await check_that_they_meet(site, relay.port())
        relay.signal(signal.SIGTERM)
        assert await relay.exit_code() in (0, 1)
        complaints = relay.logged("systemd cannot be told how this relay is")
        assert len(complaints) == (0 if trouble == "never reads" else 1)


# --- what it is given -------------------------------------------------------------------------------------------------


async def test_a_passed_socket_is_the_route_of_its_name(site: Site) -> None:
    with listening() as sock:
        port = sock.getsockname()[1]
        async with relay_with(site, [("demo", sock)], route(port)) as relay:
            assert relay.own_port() == port
            await check_that_they_meet(site, port)
            assert not [event for event in relay.events if event["level"] == "warning"]


async def test_it_survives_reloads_and_goes_with_its_route(site: Site) -> None:
    with listening() as sock:
        port = sock.getsockname()[1]
        async with relay_with(site, [("demo", sock)], route(port) + DEMO.replace('"demo"', '"other"')) as relay:
            # A route with another limit or other parties is still at the same address.
            site.write(route(port) + "wait_timeout = 7\n")
            await relay.log("reloaded", removed=["other"])
            await check_that_they_meet(site, port)
            site.write(route(port).replace("func1.demo", "func1.*") + "wait_timeout = 7\n")
            await relay.log("reloaded", replaced=["demo"])
            await check_that_they_meet(site, port)
            site.write(DEMO.replace('"demo"', '"other"'))
            await relay.log("reloaded", removed=["demo"])
            with pytest.raises(OSError, match="all attempts to connect"):
                await trio.open_tcp_stream("127.0.0.1", port)
            site.write(route(port))
            await relay.log("reloaded", added=["demo"])
            await check_that_they_meet(site, port)


async def test_a_failed_reload_leaves_a_passed_socket_for_the_next(site: Site) -> None:
    """No route needed it at first; it is kept for a later one, and a reload that fails does not lose it."""
    with listening() as sock, listening() as taken:
        port = sock.getsockname()[1]
        async with relay_with(site, [("late", sock)], DEMO) as relay:
            await relay.log("systemd passed a socket that nothing here uses", name="late")
            site.write(DEMO + route(port, "late") + route(taken.getsockname()[1], "impossible"))
            await relay.log("reload refused, the old configuration stays")
            site.write(DEMO + route(port, "late"))
            await relay.log("reloaded", added=["late"])
            await check_that_they_meet(site, port, "late")


async def test_while_systemd_holds_it_a_route_cannot_have_it_twice(site: Site) -> None:
    """systemd keeps its own copy open, so the address stays taken after the route has gone; the error says so."""
    with listening() as sock:
        port = sock.getsockname()[1]
        with socket.fromfd(sock.fileno(), sock.family, sock.type):
            async with relay_with(site, [("demo", sock)], route(port)) as relay:
                site.write(DEMO.replace('"demo"', '"other"'))
                await relay.log("reloaded", removed=["demo"])
                site.write(route(port))
                refused = await relay.log("reload refused, the old configuration stays")
                assert "systemd holds it, since it once passed it for a route that is gone" in refused["problem"]


async def test_who_dials_during_a_restart_waits(site: Site) -> None:
    """TESTPLAN 49, where systemd holds the socket: nobody is refused while there is no relay."""
    with listening() as sock:
        port = sock.getsockname()[1]
        launcher, descriptors = activated([("demo", sock)])
        async with site.process(route(port), launcher=launcher, pass_fds=descriptors) as relay:
            relay.signal(signal.SIGTERM)
            assert await relay.exit_code() == 0
        early = await site.connect(port, "func1")
        async with site.process(route(port), launcher=launcher, pass_fds=descriptors):
            with trio.fail_after(TIMEOUT):
                await early.handshake()
            await early.join()
            await early.expect("WAITING")


async def test_any_route_of_a_shared_address_may_name_it(site: Site) -> None:
    with listening() as sock:
        port = sock.getsockname()[1]
        async with relay_with(site, [("other", sock)], route(port) + route(port, "other")):
            await check_that_they_meet(site, port, "demo")
            await check_that_they_meet(site, port, "other")


async def test_a_route_with_several_addresses_takes_a_socket_for_each(site: Site) -> None:
    """All sockets have its name; the relay itself binds an address that systemd has no socket for."""
    with listening() as one, listening("127.0.0.2") as two, reserved_port() as free:
        (_, port), there = one.getsockname(), two.getsockname()
        passed = [f"127.0.0.1:{port}", f"127.0.0.2:{there[1]}"]
        own = f"127.0.0.1:{free}"
        text = route(9001).replace('"127.0.0.1:9001"', f'["{passed[0]}", "{own}", "{passed[1]}"]')
        async with relay_with(site, [("demo", two), ("demo", one)], text) as relay:
            assert (await relay.log("listening", route="demo"))["address"] == f"{passed[0]}, {own}, {passed[1]}"
            await check_that_they_meet(site, port, "demo")
            await check_that_they_meet(site, free, "demo")
            await (await trio.open_tcp_stream(*there)).aclose()


async def test_a_socket_that_nobody_claims_is_a_warning_that_says_how(site: Site) -> None:
    with listening() as sock, listening() as metrics:
        address, other = (f"127.0.0.1:{one.getsockname()[1]}" for one in (sock, metrics))
        async with relay_with(site, [("frelay.socket", sock), ("metrics", metrics)], DEMO) as relay:
            text = "systemd passed a socket that nothing here uses"
            found = await relay.log(text, name="frelay.socket", address=address)
            assert "FileDescriptorName=" in found["remedy"]
            # It is reserved, but this route file has no [metrics].
            assert relay.logged(text, name="metrics", address=other)


async def test_the_two_http_servers_take_their_sockets_by_name(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with listening() as metrics, socket.socket(socket.AF_UNIX) as admin:
        admin.bind(str(path))
        path.chmod(0o600)
        admin.listen()
        port = metrics.getsockname()[1]
        sections = f'[admin]\nlisten = "unix:admin.sock"\n[metrics]\nlisten = "127.0.0.1:{port}"\n'
        async with relay_with(site, [("admin", admin), ("metrics", metrics)], DEMO, sections=sections) as relay:
            assert not relay.logged("systemd passed a socket that nothing here uses")
            for stream in (await trio.open_unix_socket(str(path)), await trio.open_tcp_stream("127.0.0.1", port)):
                async with stream:
                    await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    with trio.fail_after(TIMEOUT):
                        assert (await stream.receive_some(9)) == b"HTTP/1.1 "


def test_an_api_without_certificates_never_comes_to_a_network(site: Site) -> None:
    """[admin] is a Unix socket here, and a unit with a TCP socket must not change that."""
    with listening() as sock:
        launcher, descriptors = activated([("admin", sock)])
        done = subprocess.run(
            [*launcher, *FRELAY_RUN, "-c", site.write(sections='[admin]\nlisten = "unix:admin.sock"\n')],
            pass_fds=descriptors,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    assert done.returncode == 1
    assert "admin.listen: cannot listen on unix:" in done.stderr
    assert "the socket 'admin' that systemd passed is bound to 127.0.0.1:" in done.stderr


def test_a_socket_that_is_bound_elsewhere_is_an_error_that_names_both(site: Site) -> None:
    with listening() as sock:
        launcher, descriptors = activated([("demo", sock)])
        done = subprocess.run(
            [*launcher, *FRELAY_RUN, "-c", site.write(route(9001))],
            pass_fds=descriptors,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        port = sock.getsockname()[1]
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "route[demo].listen: cannot listen on 127.0.0.1:9001: the socket 'demo' that systemd passed" in line
    assert f"is bound to 127.0.0.1:{port}, and not to 127.0.0.1:9001" in line
