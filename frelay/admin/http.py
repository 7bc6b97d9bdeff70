"""One HTTP/1.1 connection and the ASGI application that answers on it, by h11.

Only HTTP/1.1 and 1.0 are spoken: no HTTP/2, neither by its preface nor by ``Upgrade``, and no WebSocket. One stream of
HTTP/2 would be a hundred requests at once, each of them reset for nothing by who sent it; a connection here has one
request at a time, which is read only when the one before it is answered.

A task reads ahead all the while, up to a bound. So it is noticed at once that a client has gone, also by one that sends
its next requests before it has the answer, and the application is told (``http.disconnect``). What it does then is
its own affair: a change that was begun is finished. A client that has only ended its sending side counts as gone; what
can be answered without waiting is still answered, and nothing else.

Every wait for the client is bounded: for the head of a request, for the room to send an answer into, for the next
request. While it is the client's turn its place may be needed for others (:mod:`frelay.admin.places`).

What a handler may ask of the server stands in ``scope["extensions"]["frelay"]``: see :class:`Caller`.
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

from frelay.admin.places import Place
from frelay.net.sockets import close_after_linger
from frelay.net.streams import RawStream
from frelay.tls.stream import TlsStream

__all__ = ["Caller", "caller_of", "speak_http"]

# Seconds. A client that has begun a request finishes its head within the first, whether it sends one byte or many; one
# that does not begin may stay for the second (Prometheus asks every 15 to 60 s, on one connection); and one that
# reads nothing for the third is gone.
_HEAD_TIME: Final = 10.0
_IDLE_TIME: Final = 120.0
_SEND_TIME: Final = 20.0
_LINGER_TIME: Final = 1.0

_MAX_HEAD: Final = 16 * 1024
_READ_AHEAD: Final = 64 * 1024
_PIECE: Final = 16 * 1024
_FED: Final = 4 * 1024
_VERSIONS: Final = (b"1.0", b"1.1")
_EXTENSION: Final = "frelay"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: ``holder`` is whose connection it is, and ``objection`` says why they may not call now, or None.

    A connection may outlive the right to use it, so ``objection`` is to be asked for every request, and before each
    piece of an answer that goes on for long.
    """

    holder: str
    objection: Callable[[], str | None]


def caller_of(scope: Scope) -> Caller | None:
    """The caller of a request; None where the application is not served by this module."""
    found: Caller | None = scope.get("extensions", {}).get(_EXTENSION)
    return found


async def speak_http(app: ASGIApp, stream: RawStream | TlsStream, caller: Caller, place: Place) -> None:
    """Answer requests on ``stream`` until either side ends it. The socket is closed at the end, in order if it can be.

    Raises nothing of the network.
    """
    await _Http(app, stream, caller, place).run()


class _Gone(Exception):
    """The client takes or sends nothing more."""


class _Http:
    def __init__(self, app: ASGIApp, stream: RawStream | TlsStream, caller: Caller, place: Place) -> None:
        self._app: Final = app
        self._stream: Final = stream
        self._caller: Final = caller
        self._place: Final = place
        self._scheme: Final = "https" if isinstance(stream, TlsStream) else "http"
        self._http: Final = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._ahead = bytearray()
        self._news = trio.Event()
        self._room = trio.Event()
        self._gone: Final = trio.Event()
        """Set when nothing more comes: the client has ended its sending side, or the connection."""
        self._is_broken = False
        """Whether nothing can be sent any more."""
        self._fault: h11.RemoteProtocolError | None = None
        """What was wrong with the body of the request at hand."""
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
        """Close so that the client gets the last answer, although it may still be sending."""
        self._place.clients_turn()
        try:
            with trio.move_on_after(_LINGER_TIME):
                await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            return
        await close_after_linger(self._stream.sock, _LINGER_TIME)

    # --- requests ----------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        had_an_end = False
        patience = _HEAD_TIME
        while not self._is_broken and not had_an_end:
            had_an_end = self._gone.is_set()
            request = await self._next_request(patience)
            if request is None:
                return
            self._place.our_turn()
            if not await self._answer(request):
                return
            self._place.clients_turn()
            patience = _IDLE_TIME
            try:
                self._http.start_next_cycle()
            except h11.LocalProtocolError:
                return

    async def _next_request(self, patience: float) -> h11.Request | None:
        """The next request; None if there is none, or none that can be understood, which was answered then."""
        with trio.CancelScope(deadline=trio.current_time() + patience) as wait:

            def begin() -> None:
                wait.deadline = min(wait.deadline, trio.current_time() + _HEAD_TIME)

            try:
                event = await self._next_event(begin)
            except _Gone:
                return None
            except h11.RemoteProtocolError as error:
                await self._refuse(error.error_status_hint, str(error))
                return None
            if not isinstance(event, h11.Request):
                return None  # the client has ended the connection between two requests
            if event.http_version not in _VERSIONS:
                await self._refuse(505, "only HTTP/1.1 is spoken here")
                return None
            return event
        return None

    async def _refuse(self, status: int, reason: str) -> None:
        """Answer a request that h11 could not read, or that never became one."""
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
            pass  # a HEAD request has no body; the connection is closed in any case

    async def _answer(self, request: h11.Request) -> bool:
        """Have the application answer; whether the connection can be used for more."""
        exchange = _Exchange(self, request)
        try:
            await self._app(self._scope(request), exchange.receive, exchange.send)
        except Exception:
            # The routes go on without it; it must not take them along, nor those who use other connections.
            self._log.exception("a bug in frelay ended this request")
            if self._http.our_state is h11.SEND_RESPONSE:
                await self._refuse(500, "a bug in frelay ended this request")
            return False
        self._skip_what_came_of_the_body()
        if self._http.our_state is h11.SEND_RESPONSE and self._fault is not None:
            await self._refuse(self._fault.error_status_hint, str(self._fault))
            return False
        if self._http.our_state is h11.SEND_RESPONSE and not self._gone.is_set():
            self._log.error("a bug in frelay: this request got no answer", path=request.target.decode("ascii"))
            await self._refuse(500, "this request got no answer")
            return False
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    def _skip_what_came_of_the_body(self) -> None:
        """An application need not read a body; without this, one that has none would end the connection."""
        try:
            while self._http.their_state is h11.SEND_BODY and self._http.next_event() is not h11.NEED_DATA:
                pass
        except h11.RemoteProtocolError:
            pass  # h11 remembers it, and so the connection ends

    def _scope(self, request: h11.Request) -> Scope:
        target = request.target
        if not target.startswith(b"/"):
            # The absolute form, "http://host/path", which a client uses that takes us for a proxy (RFC 9112, 3.2.2).
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
    def place(self) -> Place:
        return self._place

    async def wait_gone(self) -> None:
        await self._gone.wait()

    async def next_body_event(self) -> Any:
        """The next piece of a request's body, or its end; raises _Gone if there is neither."""
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        self._place.clients_turn()
        try:
            return await self._next_event()
        except h11.RemoteProtocolError as error:
            self._fault = error
            raise _Gone from error
        finally:
            self._place.our_turn()

    async def send(self, event: Any) -> None:
        await self._send(event)

    # --- bytes ---------------------------------------------------------------------------------------------------

    async def _next_event(self, begin: Callable[[], None] = lambda: None) -> Any:
        """What h11 makes of the next bytes; ``begin`` is called once the first of them are there."""
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            while not self._ahead:
                if self._gone.is_set():
                    self._http.receive_data(b"")
                    event = self._http.next_event()
                    if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                        raise _Gone
                    return event
                self._news = trio.Event()
                await self._news.wait()
            begin()
            # In small pieces: h11 looks at how long a head is only while that is not whole.
            data = bytes(self._ahead[:_FED])
            del self._ahead[:_FED]
            self._room.set()
            self._http.receive_data(data)

    async def _read_ahead(self) -> None:
        try:
            while True:
                while len(self._ahead) >= _READ_AHEAD:
                    self._room = trio.Event()
                    await self._room.wait()
                data = await self._stream.receive_some(_PIECE)
                if not data:
                    break
                self._ahead += data
                self._news.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._is_broken = True
        self._gone.set()
        self._news.set()

    async def _send(self, event: Any) -> None:
        """Send one of h11's events. A client that is gone gets nothing, which is no error."""
        data = self._http.send(event)
        if not data or self._is_broken:
            return
        try:
            for start in range(0, len(data), _PIECE):
                was_ours = self._place.waits_since is None
                self._place.clients_turn()
                with trio.fail_after(_SEND_TIME):
                    await self._stream.send_all(data[start : start + _PIECE])
                if was_ours:
                    self._place.our_turn()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            self._is_broken = True
            self._gone.set()
            self._news.set()


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
            except _Gone:
                self._has_body_to_come = False
                return {"type": "http.disconnect"}
            if isinstance(event, h11.Data):
                return {"type": "http.request", "body": bytes(event.data), "more_body": True}
            self._has_body_to_come = False
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._http.wait_gone()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            if self._http.place.is_wanted and not any(name.lower() == b"connection" for name, _ in headers):
                # Somebody else waits for this place, and every connection gets one request at a time.
                headers.append((b"connection", b"close"))
            self._sends_no_body = self._is_head or status in (204, 304)
            await self._http.send(h11.Response(status_code=status, headers=headers))
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body and not self._sends_no_body:
                await self._http.send(h11.Data(data=body))
            if not message.get("more_body", False):
                await self._http.send(h11.EndOfMessage())
