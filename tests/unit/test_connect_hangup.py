"""Which caller has hung up, if the kernel knows the caller's socket and if it does not."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import trio

from frelay.cli.connect import hangup
from frelay.cli.connect.hangup import wait_hung_up
from support.waiting import TIMEOUT

Pair = tuple[socket.socket, trio.socket.SocketType]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A caller, and the connection that was accepted from it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        accepted.setblocking(False)
        with caller, accepted:
            yield caller, trio.socket.from_stdlib_socket(accepted)


async def is_found_gone(sock: trio.socket.SocketType) -> bool:
    """Whether a few checks find that the caller is gone."""
    with trio.move_on_after(TIMEOUT) as limit:
        await wait_hung_up(sock)
    return not limit.cancelled_caught


async def stays(sock: trio.socket.SocketType) -> bool:
    with trio.move_on_after(0.3) as limit:
        await wait_hung_up(sock)
    return limit.cancelled_caught


@pytest.fixture
def from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangup, "_has_owner", lambda *_: None)


@pytest.mark.usefixtures("from_elsewhere")
async def test_from_elsewhere_an_end_without_a_byte_is_the_end(pair: Pair) -> None:
    caller, accepted = pair
    assert await stays(accepted)
    caller.shutdown(socket.SHUT_WR)
    assert await is_found_gone(accepted)


@pytest.mark.usefixtures("from_elsewhere")
async def test_from_elsewhere_an_end_after_bytes_waits_for_an_answer(pair: Pair) -> None:
    caller, accepted = pair
    caller.sendall(b"a question")
    caller.shutdown(socket.SHUT_WR)
    assert await stays(accepted)
    assert await accepted.recv(100) == b"a question"


@pytest.mark.usefixtures("from_elsewhere")
async def test_from_elsewhere_a_reset_is_the_end(pair: Pair) -> None:
    caller, accepted = pair
    caller.sendall(b"a question")
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    caller.close()
    assert await is_found_gone(accepted)


def owner(pair: Pair) -> bool | None:
    accepted = pair[1]
    return hangup._has_owner(accepted.family, accepted.getpeername(), accepted.getsockname())


def test_the_kernel_tells_an_end_from_a_close(pair: Pair) -> None:
    assert owner(pair) is True
    pair[0].shutdown(socket.SHUT_WR)
    assert owner(pair) is True
    pair[0].close()
    assert owner(pair) is False


def test_a_listener_with_the_callers_port_is_not_the_caller() -> None:
    """The kernel answers for the listener if it has no such connection."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        place = ("127.0.0.1", listener.getsockname()[1])
        assert hangup._has_owner(socket.AF_INET, place, ("127.0.0.1", 9)) is None


def test_a_sandbox_that_forbids_the_question(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> socket.socket:
        raise PermissionError

    monkeypatch.setattr("frelay.cli.connect.hangup.socket.socket", forbidden)
    assert owner(pair) is None
