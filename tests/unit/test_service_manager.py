"""What systemd is told, word for word, and how the sockets that it passes are used."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog
import trio

from frelay.config.model import Address, parse_address
from frelay.net.binding import addresses_of
from frelay.net.passed_sockets import PassedSockets
from frelay.relay.service_manager import ServiceManager
from support.manager import Manager, activated, listening

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


@pytest.fixture(autouse=True)
def _nobody_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@frelay-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with Manager(address) as manager:
        yield manager


# --- words ------------------------------------------------------------------------------------------------------------


def test_every_word_is_one_of_sd_notify(manager: Manager) -> None:
    us = ServiceManager.from_environment()
    us.ready("3 routes on 2 addresses")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    us.reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    us.ready("4 routes on 2 addresses")
    us.status("5 routes on 2 addresses")
    us.stopping("draining, 7 pairings are left to end", 30)
    ready, reloading, again, status, stopping = manager.heard()
    assert ready == "READY=1\nSTATUS=3 routes on 2 addresses"
    first, _, microseconds = reloading.partition("\nMONOTONIC_USEC=")
    assert first == "RELOADING=1"
    assert before <= int(microseconds) <= after
    assert again == "READY=1\nSTATUS=4 routes on 2 addresses"
    assert status == "STATUS=5 routes on 2 addresses"
    # systemd would kill a drain that is longer than its TimeoutStopSec=, unless it is told.
    assert stopping == "STOPPING=1\nEXTEND_TIMEOUT_USEC=40000000\nSTATUS=draining, 7 pairings are left to end"


def test_nothing_takes_a_stop_back(manager: Manager) -> None:
    """A reload that was under way when the drain began ends after it; and a drain begins once."""
    us = ServiceManager.from_environment()
    us.reloading()
    us.stopping("draining", 1)
    us.ready("ready")
    us.reloading()
    us.status("ready")
    us.stopping("draining", 1)
    assert [word.partition("\n")[0] for word in manager.heard()] == ["RELOADING=1", "STOPPING=1"]


def test_a_status_cannot_say_anything_else(manager: Manager) -> None:
    ServiceManager.from_environment().ready("a file\nMAINPID=1\n\u202e\u4e2d\x1b[2J" + "x" * 1000)
    (word,) = manager.heard()
    assert word.startswith(r"READY=1" "\n" r"STATUS=a file\nMAINPID=1\n\u202e\u4e2d\x1b[2Jxxx")
    assert len(word) < 300


async def test_without_a_notify_socket_nothing_happens() -> None:
    us = ServiceManager.from_environment()
    with structlog.testing.capture_logs() as events:
        us.ready("ready")
        us.reloading()
        us.stopping("draining", 1)
        await us.run()
    assert events == []


async def test_a_notify_socket_that_is_not_there_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with structlog.testing.capture_logs() as events:
        us = ServiceManager.from_environment()
        us.ready("ready")
        await us.run()
    assert [(event["log_level"], event["reason"]) for event in events] == [("warning", "No such file or directory")]


def test_a_notify_socket_that_goes_away_is_told_once(manager: Manager) -> None:
    us = ServiceManager.from_environment()
    us.ready("ready")
    manager.socket.close()
    with structlog.testing.capture_logs() as events:
        for _ in range(3):
            us.reloading()
            us.ready("ready")
    assert [event["reason"] for event in events] == ["Connection refused"]


async def test_a_manager_that_does_not_read_costs_no_time_and_hears_it_later(
    manager: Manager, autojump_clock: trio.testing.MockClock
) -> None:
    us = ServiceManager.from_environment()
    manager.fill_up()
    us.ready("one")
    for _ in range(100):
        us.reloading()
    us.ready("two")
    assert set(manager.heard()) == {"STATUS=somebody else"}
    words: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(us.run)
        for _ in range(4):  # its queue may be as short as ten
            await trio.sleep(1)
            words += manager.heard()
        nursery.cancel_scope.cancel()
    # Only the last messages, in order: those before them are out of date.
    assert len(words) == 16
    assert words[-1] == "READY=1\nSTATUS=two"
    assert all(word.startswith("RELOADING=1") for word in words[:-1])


# --- the watchdog -----------------------------------------------------------------------------------------------------


async def test_the_watchdog_is_fed_at_half_of_its_time(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    us = ServiceManager.from_environment()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(us.run)
        await trio.sleep(21)
        nursery.cancel_scope.cancel()
    assert manager.everything() == ["WATCHDOG=1"] * 5  # at 0, 5, 10, 15 and 20 seconds


@pytest.mark.parametrize(
    ("limit", "process"), [("10000000", "1"), ("0", None), ("", None), ("-1", None), ("x", None), (None, None)]
)
async def test_a_watchdog_that_is_not_ours_is_not_fed(
    manager: Manager,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    limit: str | None,
    process: str | None,
) -> None:
    if limit is not None:
        monkeypatch.setenv("WATCHDOG_USEC", limit)
    if process is not None:
        monkeypatch.setenv("WATCHDOG_PID", process)
    us = ServiceManager.from_environment()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(us.run)
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert manager.everything() == []


async def test_a_loop_that_hangs_feeds_nobody(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    us = ServiceManager.from_environment()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(us.run)
        assert await manager.hear(watchdog=True) == "WATCHDOG=1"
        manager.everything()
        time.sleep(0.2)  # noqa: ASYNC251  this is the hang
        assert manager.everything() == []
        assert await manager.hear(watchdog=True) == "WATCHDOG=1"
        nursery.cancel_scope.cancel()


# --- sockets ----------------------------------------------------------------------------------------------------------

TELL = """
import fcntl, os
from frelay.net.passed_sockets import PassedSockets
inherited = PassedSockets.from_environment()
for name in inherited.unclaimed:
    for sock in inherited.take(name):
        is_safe = bool(fcntl.fcntl(sock.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC) and not sock.getblocking()
        print(name, sock.fileno(), sock.getsockname()[1], is_safe)
print([name for name in os.environ if name.startswith("LISTEN_")])
"""


def test_the_sockets_of_the_environment_come_by_name() -> None:
    with listening() as one, listening() as two, listening() as three:
        launcher, descriptors = activated([("demo", one), ("other", two), ("demo", three)])
        done = subprocess.run(
            [*launcher, sys.executable, "-c", TELL], pass_fds=descriptors, capture_output=True, text=True, check=True
        )
        ports = [sock.getsockname()[1] for sock in (one, two, three)]
    assert done.stdout.splitlines() == [
        f"demo 3 {ports[0]} True",
        f"demo 5 {ports[2]} True",
        f"other 4 {ports[1]} True",
        "[]",
    ]


def test_what_is_no_socket_is_passed_over(tmp_path: Path) -> None:
    with listening() as sock, (tmp_path / "file").open("w") as file:
        launcher, descriptors = activated([("demo", sock)])
        launcher[3] += f",{file.fileno()}"
        done = subprocess.run(
            [*launcher, sys.executable, "-c", TELL],
            pass_fds=[*descriptors, file.fileno()],
            capture_output=True,
            text=True,
            check=True,
        )
        port = sock.getsockname()[1]
    warning, *others = done.stdout.splitlines()
    assert "systemd passed what is no socket" in warning
    assert others == [f"demo 3 {port} True", "[]"]


@pytest.mark.parametrize(("process", "count"), [("1", "2"), ("", "2"), (None, "many"), (None, "")])
def test_sockets_that_are_not_for_us_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, process: str | None, count: str
) -> None:
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()) if process is None else process)
    monkeypatch.setenv("LISTEN_FDNAMES", "demo:demo")
    assert PassedSockets.from_environment().unclaimed == {}
    assert not [name for name in os.environ if name.startswith("LISTEN_")]


def opened_by(inherited: PassedSockets, names: list[str], *listen: Address) -> list[socket.socket]:
    """What a relay would open for the first of ``listen``, at all of which the routes ``names`` listen."""
    places = {address: addresses_of(address) for address in listen}
    return inherited.open(dict.fromkeys(names, places), places[listen[0]])


def test_a_socket_is_opened_as_often_as_wanted_until_it_is_taken() -> None:
    with listening() as sock:
        port = sock.getsockname()[1]
        inherited = PassedSockets([("demo", sock.dup())])
        for _ in range(2):
            (mine,) = opened_by(inherited, ["demo"], parse_address(f"127.0.0.1:{port}"))
            with mine:
                assert not mine.getblocking()
                assert not mine.get_inheritable()
        assert inherited.unclaimed == {"demo": [f"127.0.0.1:{port}"]}
        assert not inherited.were_taken(["demo"])
        for original in inherited.take("demo"):
            original.close()
        assert inherited.were_taken(["other", "demo"])
        assert opened_by(inherited, ["demo"], parse_address(f"127.0.0.1:{port}")) == []


def test_any_name_of_those_that_share_an_address_will_do() -> None:
    with listening() as sock:
        inherited = PassedSockets([("two", sock.dup())])
        (mine,) = opened_by(inherited, ["one", "two"], parse_address(f"127.0.0.1:{sock.getsockname()[1]}"))
        mine.close()
        inherited.close()
        assert inherited.unclaimed == {}


@pytest.mark.parametrize("name", ["admin", "metrics"])
def test_the_reserved_names_are_for_no_route(name: str) -> None:
    with listening() as sock:
        inherited = PassedSockets([(name, sock.dup())])
        assert opened_by(inherited, [name], parse_address(f"127.0.0.1:{sock.getsockname()[1]}")) == []
        (taken,) = inherited.take(name)
        taken.close()


@pytest.mark.parametrize("name", ["admin", "metrics"])
def test_a_server_takes_only_what_is_bound_where_it_listens(name: str) -> None:
    with listening() as sock:
        port = sock.getsockname()[1]
        inherited = PassedSockets([(name, sock.dup())])
        with pytest.raises(ValueError, match=rf"bound to 127\.0\.0\.1:{port}, and not to 127\.0\.0\.1:1"):
            inherited.take(name, parse_address("127.0.0.1:1"))
        (taken,) = inherited.take(name, parse_address(f"127.0.0.1:{port}"))
        taken.close()
        assert inherited.take(name, parse_address("127.0.0.1:1")) == []


def test_the_api_of_a_unix_socket_never_takes_another(tmp_path: Path) -> None:
    """A Unix socket asks for no certificate: only the mode of the socket guards it."""
    path = tmp_path / "admin.sock"
    with ExitStack() as stack:
        tcp = stack.enter_context(listening())
        elsewhere, mute, right = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3))
        elsewhere.bind(str(tmp_path / "other.sock"))
        elsewhere.listen()
        mute.bind(str(path))
        path.chmod(0o600)
        for sock, complaint in (
            (tcp, "bound to 127.0.0.1:.* and not to .*admin.sock"),
            (elsewhere, "bound to .*other.sock, and not to .*admin.sock"),
            (mute, "is no listening stream socket"),
        ):
            inherited = PassedSockets([("admin", sock.dup())])
            with pytest.raises(ValueError, match=complaint):
                inherited.take("admin", path)
            inherited.close()
        path.unlink()
        right.bind(str(path))
        right.listen()
        path.chmod(0o666)
        inherited = PassedSockets([("admin", right.dup())])
        with pytest.raises(ValueError, match="lets everybody in: write SocketMode=0600"):
            inherited.take("admin", path)
        path.chmod(0o660)
        (taken,) = inherited.take("admin", path)
        taken.close()


def test_port_0_is_whatever_systemd_chose() -> None:
    with listening() as sock:
        inherited = PassedSockets([("demo", sock.dup())])
        (mine,) = opened_by(inherited, ["demo"], parse_address("127.0.0.1:0"))
        mine.close()
        inherited.close()


def test_a_name_may_stand_for_several_addresses() -> None:
    with listening("127.0.0.1") as four, listening("::1", four.getsockname()[1]) as six:
        inherited = PassedSockets([("demo", four.dup()), ("demo", six.dup())])
        opened = opened_by(inherited, ["demo"], parse_address(f"localhost:{four.getsockname()[1]}"))
        assert {sock.family for sock in opened} == {socket.AF_INET, socket.AF_INET6}
        for sock in opened:
            sock.close()
        inherited.close()


def test_a_route_with_several_addresses_gets_a_socket_for_each() -> None:
    """All sockets have one name, in any order; one that is at no address of the route is a mistake in the unit."""
    with listening("127.0.0.1") as four, listening("::1", four.getsockname()[1]) as six, listening() as stray:
        port = four.getsockname()[1]
        both = [parse_address(f"127.0.0.1:{port}"), parse_address(f"[::1]:{port}")]
        inherited = PassedSockets([("demo", six.dup()), ("demo", four.dup())])
        for listen, family in ((both, socket.AF_INET), (both[::-1], socket.AF_INET6)):
            (mine,) = opened_by(inherited, ["demo"], *listen)
            with mine:
                assert mine.family == family
        inherited.close()
        inherited = PassedSockets([("demo", four.dup())])
        assert opened_by(inherited, ["demo"], *both[::-1]) == []
        inherited.close()
        inherited = PassedSockets([("demo", four.dup()), ("demo", stray.dup())])
        with pytest.raises(ValueError, match=rf"and not to 127\.0\.0\.1:{port} or \[::1\]:{port}: make"):
            opened_by(inherited, ["demo"], *both)
        inherited.close()


@pytest.mark.parametrize(
    ("host", "listen"),
    [
        ("127.0.0.1", "127.0.0.1:1"),
        ("127.0.0.1", "0.0.0.0:PORT"),
        ("0.0.0.0", "127.0.0.1:PORT"),
        ("127.0.0.1", "[::1]:PORT"),
        ("127.0.0.1", "127.0.0.2:0"),
        ("::1", "127.0.0.1:PORT"),
    ],
)
def test_a_socket_that_is_bound_elsewhere_is_an_error_that_names_both(host: str, listen: str) -> None:
    with listening(host) as sock:
        inherited = PassedSockets([("demo", sock.dup())])
        port = sock.getsockname()[1]
        address = parse_address(listen.replace("PORT", str(port)))
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        with pytest.raises(ValueError, match="bound to") as raised:
            opened_by(inherited, ["demo"], address)
        assert str(raised.value) == (
            f"the socket 'demo' that systemd passed is bound to {place}, and not to {address}: "
            "make ListenStream= there and listen here agree"
        )
        inherited.close()


def test_an_ipv6_socket_must_not_take_ipv4_with_it() -> None:
    with listening("::") as sock:
        address = parse_address(f"[::]:{sock.getsockname()[1]}")
        inherited = PassedSockets([("demo", sock.dup())])
        (mine,) = opened_by(inherited, ["demo"], address)
        mine.close()
        inherited.close()
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both:
        inherited = PassedSockets([("demo", both.dup())])
        with pytest.raises(ValueError, match=r"takes IPv4 as well.*BindIPv6Only=ipv6-only"):
            opened_by(inherited, ["demo"], parse_address(f"[::]:{both.getsockname()[1]}"))
        inherited.close()


def test_only_a_listening_tcp_socket_will_do(tmp_path: Path) -> None:
    with ExitStack() as stack:
        connected, _ = (stack.enter_context(sock) for sock in socket.socketpair())
        bound = stack.enter_context(socket.socket())
        datagram = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        for sock in (connected, bound, datagram, unix):
            inherited = PassedSockets([("demo", sock.dup())])
            with pytest.raises(ValueError, match=r"no listening TCP socket: write ListenStream=127\.0\.0\.1:9001"):
                opened_by(inherited, ["demo"], parse_address("127.0.0.1:9001"))
            inherited.close()
