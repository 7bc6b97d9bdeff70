"""One HTTP/1.1 connection and the ASGI application that answers on it, by h11.

Only HTTP/1.1 and 1.0 are spoken. HTTP/2 is refused, both by its preface and by ``Upgrade``, and so is WebSocket: an
HTTP/2 client could open a hundred requests at once and reset each of them at no cost. Here a connection has one request
at a time, and the next one is read only after the answer.

A task always reads ahead, up to a bound. So it notices at once when the client disconnects, even behind pipelined
requests, and tells the application (``http.disconnect``). The application decides what it does then: a change that it
has begun is finished. A client that has only ended its sending side counts as disconnected: its requests are still
answered if that needs no waiting.

Every wait for the client has a timeout: for the head of a request, for room to send the answer, for the next request.
While the relay waits for the client, the connection may be closed to make room (:mod:`frelay.admin.connections`).

The server passes the :class:`Caller` to the application in ``scope["extensions"]["frelay"]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import h11
import structlog
import trio
from starlette.types import ASGIApp, Message, Scope

from frelay.admin.connections import ConnectionSlot
from frelay.net.sockets import close_after_linger
from frelay.net.streams import RawStream
from frelay.tls.stream import TlsStream

__all__ = ["Caller", "caller_of", "speak_http"]

# Seconds. From the first byte of a request to the end of its head; between two requests (Prometheus asks every 15 to
# 60 s on one connection); for the client to read a piece of the answer.
_HEAD_TIMEOUT: Final = 10.0
_IDLE_TIMEOUT: Final = 120.0
_SEND_TIMEOUT: Final = 20.0
_LINGER_TIME: Final = 1.0

_MAX_HEAD: Final = 16 * 1024
_READ_AHEAD: Final = 64 * 1024
_PIECE: Final = 16 * 1024
_PARSER_PIECE: Final = 4 * 1024
_VERSIONS: Final = (b"1.0", b"1.1")
_EXTENSION: Final = "frelay"


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller: ``holder`` owns the connection, and ``objection()`` says why the caller may not call now, or None.

    A connection may outlive the right to use it. So call ``objection`` for each request, and before each piece of a
    long answer.
    """

    holder: str
    objection: Callable[[], str | None]


def caller_of(scope: Scope) -> Caller | None:
    """The caller of a request; None where the application is not served by this module."""
    found: Caller | None = scope.get("extensions", {}).get(_EXTENSION)
    return found


async def speak_http(app: ASGIApp, stream: RawStream | TlsStream, caller: Caller, slot: ConnectionSlot) -> None:
    """Answer requests on ``stream`` until either side ends it, and close its socket, by FIN if that is possible.

    It raises no network errors.
    """
    await _Http(app, stream, caller, slot).run()


class _ClientGone(Exception):
    """Control flow: the client has disconnected, or has ended its sending side."""


class _Http:
    def __init__(self, app: ASGIApp, stream: RawStream | TlsStream, caller: Caller, slot: ConnectionSlot) -> None:
        self._app: Final = app
        self._stream: Final = stream
        self._caller: Final = caller
        self._slot: Final = slot
        self._scheme: Final = "https" if isinstance(stream, TlsStream) else "http"
        self._http: Final = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._ahead = bytearray()
        self._has_news = trio.Event()
        self._has_room = trio.Event()
        self._client_gone: Final = trio.Event()
        """Set when the client has disconnected or has ended its sending side."""
        self._is_broken = False
        """Whether nothing can be sent any more."""
        self._body_error: h11.RemoteProtocolError | None = None
        """What is wrong with the body of the current request."""
        self._log: Final[Any] = structlog.get_logger("frelay.admin")

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_ahead)
                await self._answer_all()
                nursery.cancel_scope.cancel(reason="this HTTP connection has ended")
            if not self._is_broken:
                await self._end()
        finally:
            self._stream.close()

    async def _end(self) -> None:
        """Close so that the client receives the last answer although it may still be sending."""
        self._slot.clients_turn()
        try:
            with trio.move_on_after(_LINGER_TIME):
                await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            return
        await close_after_linger(self._stream.sock, _LINGER_TIME)

    # --- requests ----------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        had_an_end = False
        timeout = _HEAD_TIMEOUT
        while not self._is_broken and not had_an_end:
            had_an_end = self._client_gone.is_set()
            request = await self._next_request(timeout)
            if request is None:
                return
            self._slot.our_turn()
            if not await self._answer(request):
                return
            self._slot.clients_turn()
            timeout = _IDLE_TIMEOUT
            try:
                self._http.start_next_cycle()
            except h11.LocalProtocolError:
                return

    async def _next_request(self, timeout: float) -> h11.Request | None:
        """The next request; None if none came, or if it could not be read and was answered with an error."""
        with trio.CancelScope(deadline=trio.current_time() + timeout) as wait:

            def begin() -> None:
                wait.deadline = min(wait.deadline, trio.current_time() + _HEAD_TIMEOUT)

            try:
                event = await self._next_event(begin)
            except _ClientGone:
                return None
            except h11.RemoteProtocolError as error:
                await self._refuse(error.error_status_hint, str(error))
                return None
            if not isinstance(event, h11.Request):
                return None  # The client disconnected between two requests.
            if event.http_version not in _VERSIONS:
                await self._refuse(505, "only HTTP/1.1 is spoken here")
                return None
            return event
        return None

    async def _refuse(self, status: int, reason: str) -> None:
        """Answer a request that h11 could not read, or that the application did not answer."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = f"{reason}\n".encode("ascii", "backslashreplace")
        headers = [
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        try:
            await self._send(h11.Response(status_code=status, headers=headers))
            await self._send(h11.Data(data=body))
            await self._send(h11.EndOfMessage())
        except h11.LocalProtocolError:
            pass  # The answer to a HEAD request has no body. The connection is closed in any case.

    async def _answer(self, request: h11.Request) -> bool:
        """Have the application answer ``request``; returns whether the connection can be used for another one."""
        exchange = _Exchange(self, request)
        try:
            await self._app(self._scope(request), exchange.receive, exchange.send)
        except Exception:
            # Only this connection ends: routes and other callers must not suffer from a bug here.
            self._log.exception("a bug in frelay ended this request")
            if self._http.our_state is h11.SEND_RESPONSE:
                await self._refuse(500, "a bug in frelay ended this request")
            return False
        self._skip_body()
        if self._http.our_state is h11.SEND_RESPONSE and self._body_error is not None:
            await self._refuse(self._body_error.error_status_hint, str(self._body_error))
            return False
        if self._http.our_state is h11.SEND_RESPONSE and not self._client_gone.is_set():
            self._log.error("a bug in frelay: this request got no answer", path=request.target.decode("ascii"))
            await self._refuse(500, "this request got no answer")
            return False
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    def _skip_body(self) -> None:
        """Pass over the received part of a body that the application did not read.

        Without this the connection would end after every request, since the end of an empty body is an event, too.
        """
        try:
            while self._http.their_state is h11.SEND_BODY and self._http.next_event() is not h11.NEED_DATA:
                pass
        except h11.RemoteProtocolError:
            pass  # h11 remembers the error, and so the connection ends.

    def _scope(self, request: h11.Request) -> Scope:
        target = request.target
        if not target.startswith(b"/"):
            # The absolute form, "http://host/path": the client takes us for a proxy (RFC 9112, 3.2.2).
            _, scheme_end, rest = target.partition(b"://")
            target = b"/" + rest.partition(b"/")[2] if scheme_end else target
        path, _, query = target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.http_version.decode("ascii"),
            "method": request.method.decode("ascii").upper(),
            "scheme": self._scheme,
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": list(request.headers),
            "client": None,
            "server": None,
            "state": {},
            "extensions": {_EXTENSION: self._caller},
        }

    # --- what an exchange needs ----------------------------------------------------------------------------------

    @property
    def slot(self) -> ConnectionSlot:
        return self._slot

    async def wait_client_gone(self) -> None:
        await self._client_gone.wait()

    async def next_body_event(self) -> Any:
        """The next piece of the request's body, or its end; raises _ClientGone if the client disconnects first."""
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        self._slot.clients_turn()
        try:
            return await self._next_event()
        except h11.RemoteProtocolError as error:
            self._body_error = error
            raise _ClientGone from error
        finally:
            self._slot.our_turn()

    async def send(self, event: Any) -> None:
        await self._send(event)

    # --- bytes ---------------------------------------------------------------------------------------------------

    async def _next_event(self, begin: Callable[[], None] = lambda: None) -> Any:
        """The next event of h11; calls ``begin`` when its first bytes have arrived."""
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            while not self._ahead:
                if self._client_gone.is_set():
                    self._http.receive_data(b"")
                    event = self._http.next_event()
                    if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                        raise _ClientGone
                    return event
                self._has_news = trio.Event()
                await self._has_news.wait()
            begin()
            # In small pieces, because h11 checks the length of a head only while the head is incomplete.
            data = bytes(self._ahead[:_PARSER_PIECE])
            del self._ahead[:_PARSER_PIECE]
            self._has_room.set()
            self._http.receive_data(data)

    async def _read_ahead(self) -> None:
        try:
            while True:
                while len(self._ahead) >= _READ_AHEAD:
                    self._has_room = trio.Event()
                    await self._has_room.wait()
                data = await self._stream.receive_some(_PIECE)
                if not data:
                    break
                self._ahead += data
                self._has_news.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._is_broken = True
        self._client_gone.set()
        self._has_news.set()

    async def _send(self, event: Any) -> None:
        """Send one of h11's events; does nothing if the client has disconnected."""
        data = self._http.send(event)
        if not data or self._is_broken:
            return
        try:
            for start in range(0, len(data), _PIECE):
                was_ours = self._slot.waits_since is None
                self._slot.clients_turn()
                with trio.fail_after(_SEND_TIMEOUT):
                    await self._stream.send_all(data[start : start + _PIECE])
                if was_ours:
                    self._slot.our_turn()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            self._is_broken = True
            self._client_gone.set()
            self._has_news.set()


class _Exchange:
    """One request and its answer, as the two callables of ASGI."""

    def __init__(self, http: _Http, request: h11.Request) -> None:
        self._http: Final = http
        self._has_body_to_come = True
        self._is_head: Final = request.method == b"HEAD"
        self._sends_no_body = self._is_head

    async def receive(self) -> Message:
        if self._has_body_to_come:
            try:
                event = await self._http.next_body_event()
            except _ClientGone:
                self._has_body_to_come = False
                return {"type": "http.disconnect"}
            if isinstance(event, h11.Data):
                return {"type": "http.request", "body": bytes(event.data), "more_body": True}
            self._has_body_to_come = False
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._http.wait_client_gone()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            if self._http.slot.is_wanted and not any(name.lower() == b"connection" for name, _ in headers):
                # Another connection waits for this slot, so this one gets no further request.
                headers.append((b"connection", b"close"))
            self._sends_no_body = self._is_head or status in (204, 304)
            await self._http.send(h11.Response(status_code=status, headers=headers))
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body and not self._sends_no_body:
                await self._http.send(h11.Data(data=body))
            if not message.get("more_body", False):
                await self._http.send(h11.EndOfMessage())
