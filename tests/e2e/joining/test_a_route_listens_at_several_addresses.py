"""A route has one lobby for all its addresses, and adding or removing an address disturbs nobody else.

The addresses here are of both IP versions, as for functions that have only one of them.
"""

from __future__ import annotations

import errno
import os
import socket
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import trio

from frelay.config.load import load
from frelay.errors import ConfigError
from frelay.joining.listener import Listener
from frelay.net import binding
from support.admin import ADMIN, admin
from support.commands import ask
from support.party import TLS_HEADER, Party, pair
from support.relay import RelayInProcess, RelayProcess
from support.site import Site
from support.waiting import eventually

BOTH = '["127.0.0.1:0", "[::1]:0"]'


def route(listen: str, name: str = "demo", more: str = "") -> str:
    return f"""
[[route]]
name = "{name}"
listen = {listen}
func1 = "dns:func1.demo"
func2 = "dns:func2.demo"
require_inner_tls = false
{more}
"""


@pytest.fixture(scope="module", autouse=True)
def ipv6() -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


@pytest.fixture
def port() -> int:
    """A port that is free at 127.0.0.1 and at ::1, as far as a test can know."""
    with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
        four.bind(("127.0.0.1", 0))
        six.bind(("::1", four.getsockname()[1]))
        found: int = four.getsockname()[1]
    return found


def place(text: str) -> tuple[str, int]:
    host, _, number = text.rpartition(":")
    return host.strip("[]"), int(number)


async def at(site: Site, where: str, name: str, **fields: Any) -> Party:
    """A party that has called the relay at ``where``, and joined."""
    stream = await trio.open_tcp_stream(*place(where))
    party = Party(stream, site.context(name), "localhost")
    site.parties.append(party)
    await party.handshake()
    await party.join(**fields)
    return party


async def paired(party: Party) -> dict[str, Any]:
    """What PAIRED says; a party that had to wait hears WAITING before."""
    frame = await party.next_frame()
    if frame is not None and frame[0] == "WAITING":
        frame = await party.next_frame()
    assert frame is not None
    assert frame[0] == "PAIRED"
    return frame[1]


async def say(one: Party, two: Party) -> None:
    """Send some raw bytes in each direction."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.hand_off)
        nursery.start_soon(two.hand_off)
    for sender, receiver in ((one, two), (two, one)):
        await sender.send_raw(b"word")
        assert await receiver.receive_exactly(4) == b"word"


# --- who meets ------------------------------------------------------------------------------------------------------


async def test_those_who_call_different_addresses_meet(site: Site) -> None:
    async with site.relay(route(BOTH)) as relay:
        four, six = relay.relay.bound("demo")
        assert (place(four)[0], place(six)[0]) == ("127.0.0.1", "::1")
        for where1, where2 in ((four, six), (six, four)):
            one, two = await at(site, where1, "func1"), await at(site, where2, "func2")
            await paired(one)
            await paired(two)
            await say(one, two)
        assert relay.logged("listening") == [
            {
                "event": "listening",
                "log_level": "info",
                "relay": "relay-1",
                "route": "demo",
                "address": f"{four}, {six}",
            }
        ]


@pytest.mark.parametrize("port_written", ["0", "PORT"])
async def test_localhost_is_both_of_its_addresses_at_one_port(site: Site, port: int, port_written: str) -> None:
    listen = f'"LOCALHOST.:{port_written}"'.replace("PORT", str(port))
    async with site.relay(route(listen)) as relay:
        four, six = relay.relay.bound("demo")
        assert (place(four)[0], place(six)[0]) == ("127.0.0.1", "::1")
        assert place(four)[1] == place(six)[1]
        await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))
        one, two = await at(site, six, "func1"), await at(site, four, "func2")
        await paired(one)
        await paired(two)


async def test_the_wildcards_of_both_versions_stand_beside_each_other(site: Site, port: int) -> None:
    """[::] is IPv6 only: neither takes callers of the other, in whatever order they are written."""
    async with site.relay(route(f'["[::]:{port}", "0.0.0.0:{port}"]')) as relay:
        one, two = await at(site, f"127.0.0.1:{port}", "func1"), await at(site, f"[::1]:{port}", "func2")
        await paired(one)
        await paired(two)
        assert relay.relay.pairings[0].legs["func1"].address.startswith("127.0.0.1:")
        assert relay.relay.pairings[0].legs["func2"].address.startswith("[::1]:")


async def test_a_ticket_is_good_at_every_address_of_its_route(site: Site) -> None:
    async with site.relay(route(BOTH)) as relay:
        four, six = relay.relay.bound("demo")
        one, two = await at(site, four, "func1", modes=["ticket"]), await at(site, four, "func2")
        ticket = (await paired(one))["ticket"]
        await paired(two)
        await two.hand_off()
        raw = await trio.open_tcp_stream(*place(six))
        await raw.send_all(f"FRELAY/1 {ticket}\n".encode() + TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER[:3]
        await raw.aclose()


async def test_routes_share_each_address_for_itself(site: Site, port: int) -> None:
    """Callers need not name a route that is alone at an address; if routes share it, callers say which."""
    shared = f'"127.0.0.1:{port}"'
    async with site.relay(route(f'[{shared}, "[::1]:0"]') + route(shared, "other")) as relay:
        own = relay.relay.bound("demo")[1]
        one = await at(site, own, "func1")
        assert (await one.expect("WAITING"))["route"] == "demo"
        nameless = await at(site, f"127.0.0.1:{port}", "func2")
        assert (await nameless.refusal())["code"] == "protocol-error"
        elsewhere = await at(site, own, "func1", route="other")
        assert (await elsewhere.refusal())["code"] == "unknown-route"
        two = await at(site, f"127.0.0.1:{port}", "func2", route="demo")
        await paired(one)
        await paired(two)


# --- what is not there ------------------------------------------------------------------------------------------------


def lacking(family: socket.AddressFamily, number: int) -> Callable[..., socket.socket]:
    """Make binding fail as on a machine without this IP version."""
    bind_one = binding._bind_one

    def bind(asked: socket.AddressFamily, *rest: Any) -> socket.socket:
        if asked == family:
            raise OSError(number, os.strerror(number))
        return bind_one(asked, *rest)

    return bind


@pytest.mark.parametrize(
    ("family", "number", "there", "missing"),
    [
        (socket.AF_INET6, errno.EAFNOSUPPORT, "127.0.0.1", "::1"),
        (socket.AF_INET6, errno.EADDRNOTAVAIL, "127.0.0.1", "::1"),
        (socket.AF_INET, errno.EADDRNOTAVAIL, "::1", "127.0.0.1"),
    ],
)
async def test_of_localhost_one_address_is_enough(
    site: Site, monkeypatch: pytest.MonkeyPatch, family: socket.AddressFamily, number: int, there: str, missing: str
) -> None:
    monkeypatch.setattr(binding, "_bind_one", lacking(family, number))
    async with site.relay(route('"localhost:0"')) as relay:
        assert [place(text)[0] for text in relay.relay.bound("demo")] == [there]
        (told,) = relay.logged("not all of localhost is there")
        assert (told["missing"], told["reason"]) == (missing, os.strerror(number))


async def test_localhost_that_somebody_else_has_in_part_is_not_taken_in_part(site: Site, port: int) -> None:
    """Otherwise callers would reach one program or the other by chance."""
    with socket.create_server(("::1", port), family=socket.AF_INET6), pytest.raises(ExceptionGroup) as raised:
        async with site.relay(route(f'"localhost:{port}"')):
            pass
    assert f"{site.config}: route[demo].listen: cannot listen on localhost:{port}: Address already in use" in _problems(
        raised.value
    )
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_an_address_of_an_ip_version_that_is_not_there_is_named(
    site: Site, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    """The other address of the list is released again."""
    monkeypatch.setattr(binding, "_bind_one", lacking(socket.AF_INET6, errno.EAFNOSUPPORT))
    with pytest.raises(ExceptionGroup) as raised:
        async with site.relay(route(f'["127.0.0.1:{port}", "[::]:{port}"]')):
            pass
    assert (
        f"{site.config}: route[demo].listen: cannot listen on [::]:{port}: Address family not supported by protocol: "
        "this machine has no IPv6; leave this address out, or turn IPv6 on"
    ) in _problems(raised.value)
    with socket.create_server(("127.0.0.1", port)):
        pass


def _problems(group: BaseExceptionGroup[Any]) -> list[str]:
    found = group.subgroup(ConfigError)
    assert found is not None
    errors: list[ConfigError] = []

    def collect(one: BaseException) -> None:
        if isinstance(one, BaseExceptionGroup):
            for inner in one.exceptions:
                collect(inner)
        elif isinstance(one, ConfigError):
            errors.append(one)

    collect(found)
    return [str(problem) for error in errors for problem in error.problems]


# --- reloads ----------------------------------------------------------------------------------------------------------


def sockets(relay: RelayInProcess) -> dict[str, int]:
    """The listening descriptors, by address."""
    return {text: sock.fileno() for one in _listeners(relay) for text, sock in zip(one.bound, one.sockets, strict=True)}


def _listeners(relay: RelayInProcess) -> list[Listener]:
    return list(relay.relay.parts.active.listeners.values())


async def test_an_address_that_comes_or_goes_leaves_the_route_alone(site: Site, port: int) -> None:
    """Its other sockets, its waiting legs (even those at the removed address) and its pairings stay."""
    four, six = f"127.0.0.1:{port}", f"[::1]:{port}"
    async with site.relay(route(f'"{four}"')) as relay:
        both = await at(site, four, "func1"), await at(site, four, "func2")
        for party in both:
            await paired(party)
        await say(*both)
        waiting = await at(site, four, "func1")
        await waiting.expect("WAITING")
        before = sockets(relay)

        site.write(route(f'["{four}", "{six}"]'))
        changes = await relay.relay.reload()
        assert [kept.changed for kept in changes.keep] == [("listen",)]
        assert sockets(relay)[four] == before[four]
        assert await at(site, six, "func1", party="func1") is not None

        site.write(route(f'"{six}"'))
        await relay.relay.reload()
        assert list(sockets(relay)) == [six]
        with pytest.raises(OSError, match="all attempts"):
            await trio.open_tcp_stream(*place(four))
        assert len(relay.relay.pairings) == 1
        two = await at(site, six, "func2")
        await paired(waiting)
        await paired(two)
        await say(waiting, two)
        await both[0].send_raw(b"still")
        assert await both[1].receive_exactly(5) == b"still"
        assert not relay.logged("refused")


async def test_who_waits_by_an_address_that_has_gone_is_told_of_a_drain(site: Site, port: int) -> None:
    four, six = f"127.0.0.1:{port}", f"[::1]:{port}"
    async with site.relay(route(f'["{four}", "{six}"]')) as relay:
        waiting = await at(site, four, "func1")
        await waiting.expect("WAITING")
        site.write(route(f'"{six}"'))
        await relay.relay.reload()
        relay.relay.drain(reason="maintenance")
        assert await waiting.expect("DRAINING")
        assert (await waiting.refusal())["code"] == "draining"


async def test_a_route_that_moves_altogether_is_another(site: Site, port: int) -> None:
    async with site.relay(route(f'"127.0.0.1:{port}"')) as relay:
        waiting = await at(site, f"127.0.0.1:{port}", "func1")
        await waiting.expect("WAITING")
        site.write(route(BOTH.replace(":0", f":{port}").replace("127.0.0.1", "127.0.0.2")))
        changes = await relay.relay.reload()
        assert [replaced.changed for replaced in changes.replace] == [("listen",)]
        assert (await waiting.refusal())["code"] == "route-removed"


async def test_an_address_that_cannot_be_bound_leaves_all_as_it_was(site: Site, port: int) -> None:
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        async with site.relay(route(f'"127.0.0.1:{port}"')) as relay:
            before = sockets(relay)
            site.write(route(f'["127.0.0.1:{port}", "[::1]:{port}"]'))
            with pytest.raises(ConfigError, match=rf"cannot listen on \[::1\]:{port}: Address already in use"):
                await relay.relay.reload()
            assert sockets(relay) == before
            await pair(await site.party(relay, "func1"), await site.party(relay, "func2"))


# --- many processes -----------------------------------------------------------------------------------------------


def _bound(relay: RelayProcess, name: str) -> list[str]:
    return [text for entry in relay.logged("listening", route=name) for text in entry["address"].split(", ")]


async def test_all_addresses_of_a_route_are_in_one_worker(site: Site) -> None:
    routes = "".join(route(BOTH, name) for name in ("one", "two", "three"))
    async with site.process(routes, workers=2) as relay:
        for name in ("one", "two", "three"):
            four, six = _bound(relay, name)
            one, two = await at(site, four, "func1"), await at(site, six, "func2")
            await paired(one)
            await paired(two)


async def test_a_route_that_joins_the_addresses_of_two_workers_has_both(site: Site, port: int) -> None:
    """The functions in the worker that loses its address are told so, and meet in the other worker."""
    four, six = f"127.0.0.1:{port}", f"[::1]:{port}"
    alone = route(f'"{four}"', "a") + route(f'"{six}"', "b")
    async with site.process(alone, workers=2) as relay:
        waiting = await at(site, six, "func1", route="b")
        await waiting.expect("WAITING")
        site.write(alone + route(f'["{four}", "{six}"]', "both"))
        await relay.log("reloaded")
        assert (await relay.log("an address moves to another worker"))["address"] == six
        assert (await waiting.refusal())["code"] == "route-removed"
        for name, where1, where2 in (("both", four, six), ("b", six, six), ("a", four, four), ("both", six, four)):
            one, two = await at(site, where1, "func1", route=name), await at(site, where2, "func2", route=name)
            await paired(one)
            await paired(two)


# --- what an operator sees ------------------------------------------------------------------------------------------


async def test_the_api_and_the_command_take_and_show_a_list(site: Site, port: int) -> None:
    """One address is a text and no list, in the answer as in the file."""
    four, six = f"127.0.0.1:{port}", f"[::1]:{port}"
    async with site.process(route('"127.0.0.1:0"'), sections=ADMIN) as relay, admin(site) as http:
        body = {"listen": [four, six], "func1": "dns:func1.demo", "func2": "dns:func2.demo"}
        made = (await http.put("/v1/routes/two", json=body)).json()
        assert (made["listen"], made["bound"]) == ([four, six], [four, six])
        file = site.directory / "routes.d" / "two.toml"
        assert tomllib.loads(file.read_text())["listen"] == [four, six]
        one, two = await at(site, four, "func1"), await at(site, six, "func2")
        await paired(one)
        await paired(two)

        parties = ("--func1", "dns:func1.demo", "--func2", "dns:func2.demo")
        said = await ask("route", "add", "two", "--listen", six, *parties, "-c", site.config)
        assert said.stdout == f"two: updated, listens on {six}, written to {file}\n"
        assert (await http.get("/v1/routes/two")).json()["listen"] == six
        assert tomllib.loads(file.read_text())["listen"] == six
        said = await ask("route", "add", "two", "--listen", four, "--listen", six, *parties, "-c", site.config)
        assert said.stdout == f"two: updated, listens on {four}, {six}, written to {file}\n"
        shown = await ask("route", "show", "two", "-c", site.config)
        assert f"listen                 {four}, {six}\n" in shown.stdout

        config = load(site.config)
        assert str(config.routes_by_name["two"].listen) == f"{four}, {six}"
        none = await http.put("/v1/routes/two", json={**body, "listen": []})
        assert none.status_code == 422
        assert "at least one address" in none.text
        twice = await http.put("/v1/routes/two", json={**body, "listen": [four, four]})
        assert f"names {four} twice" in twice.text
        taken = await http.put("/v1/routes/three", json={**body, "listen": [f"0.0.0.0:{port}", six]})
        assert taken.status_code == 409
        assert "overlaps" in taken.text
        await eventually(lambda: not relay.logged("a bug in frelay ended this reload"), "no bug")
