"""The admin API: HTTP around an :class:`~frelay.admin.control.Control`, described by itself at ``/openapi.json``.

A caller has been let in already: by the mode of a Unix socket, or by the client certificate that
:mod:`frelay.admin.mtls` asked for. That certificate is judged again for each request and before each event of a
stream, since a connection may outlive it. What is left to guard against is a browser that somebody else steers. So
``Host`` must be a name that this relay goes by (a rebound DNS name is not), ``Origin``, where a browser sends one, must
be the same place, and nothing changes on GET. A body may have 64 KiB, which is a hundred times what a route needs.

Two callers who edit one route at a time must not undo each other: a route has an ``ETag``, ``If-Match`` makes a change
conditional on it, and ``If-None-Match: *`` makes a PUT add and never replace. PUT and DELETE are done when they are
answered: listening, and on disk.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Final

import trio
from fastapi import FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frelay import __version__
from frelay.admin import control as control_room
from frelay.admin.dashboard import add_dashboard
from frelay.admin.http import caller_of
from frelay.admin.model import (
    DialBody,
    EventView,
    PairingsView,
    Problems,
    ProblemView,
    ReloadedView,
    RouteBody,
    RoutesView,
    RouteView,
    StatusView,
    TrafficView,
    problem_view,
)
from frelay.journal import Entry, HandshakeDone, PairingEnded, ReloadRefused

__all__ = ["EventStream", "api", "is_local_host"]

_MAX_BODY: Final = 64 * 1024
_MAX_DISCARDED: Final = 16 * _MAX_BODY
_BODY_TIME: Final = 10.0
# A proxy or a NAT in between forgets silent connections; a comment a few times a minute keeps them.
_HEARTBEAT: Final = 15.0
# How often, in seconds, the certificate of who reads a silent event stream is judged again: it may just have expired.
_JUDGE_AGAIN: Final = 1.0
# Event streams at a time, of which one address gets half: each has a place of the server for as long as it likes.
_MAX_STREAMS: Final = 64
# What a reader that reconnects may have missed and still gets; and how far one may lag behind before it is cut.
_EVENTS_KEPT: Final = 256
_MAX_LAG: Final = 1024
# How many are sent in one write to a reader that has fallen behind: a write costs more than an event.
_EVENTS_AT_ONCE: Final = 64

_STATUS: Final[Mapping[type[control_room.ControlError], tuple[int, str]]] = {
    control_room.Unknown: (404, "not-found"),
    control_room.Invalid: (422, "invalid"),
    control_room.Conflict: (409, "conflict"),
    control_room.PreconditionFailed: (412, "precondition-failed"),
    control_room.Unwritable: (507, "not-writable"),
    control_room.Stopping: (503, "draining"),
}

_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})


def is_local_host(host: str) -> bool:
    """Whether a ``Host`` header names this machine as nothing but itself can: no DNS answer can lead there."""
    return host in _LOCAL


# --- events ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Event:
    """An event, and what all readers are sent of it."""

    view: EventView

    @cached_property
    def text(self) -> bytes:
        # Once for all readers: each leg that comes makes several, and there may be dozens to tell.
        data = json.dumps(self.view.model_dump(mode="json"))
        return f"id: {self.view.id}\nevent: {self.view.kind}\ndata: {data}\n\n".encode()


@dataclass(eq=False)
class _Reader:
    """One open event stream."""

    holder: str
    queue: deque[_Event] = field(default_factory=deque)
    news: trio.Event = field(default_factory=trio.Event)
    is_too_slow: bool = False

    def tell(self, event: _Event) -> None:
        if len(self.queue) >= _MAX_LAG:
            self.is_too_slow = True
        else:
            self.queue.append(event)
        self.news.set()


class EventStream:
    """The journal as events with numbers, for a bounded number of readers; a slow one is cut, and slows nobody.

    There are at most ``most`` readers, and of one address at most half of them.
    """

    def __init__(self, most: int = _MAX_STREAMS) -> None:
        self._most: Final = max(2, min(most, _MAX_STREAMS))
        self._last = 0
        self._kept: Final[deque[_Event]] = deque(maxlen=_EVENTS_KEPT)
        self._readers: Final[set[_Reader]] = set()

    def note(self, entry: Entry) -> None:
        """The journal's listener."""
        if isinstance(entry, HandshakeDone):
            return  # for the metrics; nobody can tell whose it was
        self._last += 1
        event = _Event(EventView(id=self._last, kind=entry.kind, at=entry.at, data=_event_data(entry)))
        self._kept.append(event)
        for reader in self._readers:
            reader.tell(event)

    def objection_to_another(self, holder: str) -> str | None:
        """Why ``holder`` cannot have one more reader now, or None."""
        if len(self._readers) >= self._most:
            return f"{self._most} event streams are open already, and there are no more at a time"
        if sum(reader.holder == holder for reader in self._readers) >= self._most // 2:
            return f"{self._most // 2} event streams of this address are open already, and it gets no more at a time"
        return None

    @contextmanager
    def reader(self, after: int | None, holder: str = "") -> Iterator[_Reader]:
        """A reader of what comes from now on; with ``after``, an event's number, of what came since as far as kept."""
        reader = _Reader(holder)
        if after is not None:
            if after > self._last:
                after = 0  # a number of the relay before this one: all that there is came since
            for event in self._kept:
                if event.view.id > after:
                    reader.tell(event)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)


class _EventResponse(Response):
    """An endless answer: server-sent events until the client goes, or is too slow.

    A class and not a generator in a StreamingResponse, which nobody would close in time.
    """

    media_type = "text/event-stream"

    def __init__(self, events: EventStream, after: int | None) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events: Final = events
        self._after: Final = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = caller_of(scope)
        holder = "" if caller is None else caller.holder
        objection = self._events.objection_to_another(holder)
        if objection is not None:
            await _problem(429, "too-many", objection)(scope, receive, send)
            return

        async def wait_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel(reason="the reader of this event stream has gone")

        def may_read() -> bool:
            return caller is None or caller.objection() is None

        with self._events.reader(self._after, holder) as reader:
            # Only now: who has read the head of this answer must miss nothing that happens from there on.
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_gone)
                await self._tell(reader, send, may_read)
                nursery.cancel_scope.cancel(reason="this event stream has ended")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, reader: _Reader, send: Send, may_read: Callable[[], bool]) -> None:
        """Tell ``reader`` what there is, until it is too slow or may read no more."""

        async def put(text: bytes) -> None:
            await send({"type": "http.response.body", "body": text, "more_body": True})

        # Says at once that the stream is open; a client would otherwise wait for the first event to know.
        await put(b": frelay events\n\n")
        beats_at = trio.current_time() + _HEARTBEAT
        while may_read():
            if reader.queue:
                several = [reader.queue.popleft() for _ in range(min(len(reader.queue), _EVENTS_AT_ONCE))]
                await put(b"".join(event.text for event in several))
                continue
            if reader.is_too_slow:
                return
            if trio.current_time() >= beats_at:
                beats_at = trio.current_time() + _HEARTBEAT
                await put(b": still here\n\n")
            reader.news = trio.Event()
            with trio.move_on_after(_JUDGE_AGAIN):
                await reader.news.wait()


def _event_data(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, PairingEnded):
        record = asdict(entry.record)
        return {**record, "outcome": entry.record.outcome.value}
    if isinstance(entry, ReloadRefused):
        return {"problems": [problem_view(problem).model_dump() for problem in entry.problems]}
    data = asdict(entry)
    del data["at"]
    return data


# --- who may not ------------------------------------------------------------------------------------------------


class _Guard:
    """Refuses what a browser can be tricked into, and what is too large, before anything else sees it."""

    def __init__(self, app: ASGIApp, is_own_host: Callable[[str], bool]) -> None:
        self._app: Final = app
        self._is_own_host: Final = is_own_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there is nothing else here
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        objection = self._objection(scope["method"], headers)
        if objection is not None:
            await _problem(403, "forbidden", objection)(scope, receive, send)
            return
        if not await self._may_call(scope, receive, send):
            return
        body = None
        try:
            with trio.move_on_after(_BODY_TIME):
                body = await _read(receive)
        except ClientDisconnect:
            return  # half a body is not what the caller wanted
        # The body may have taken a while, and what counts is whether the caller may do this when it is done.
        if not await self._may_call(scope, receive, send):
            return
        if body is None:
            text = f"a body has at most {_MAX_BODY} bytes here, and comes within {_BODY_TIME:g} s"
            await _problem(413, "too-large", text)(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    async def _may_call(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether the caller's certificate is still accepted; answers and ends the connection if it is not."""
        caller = caller_of(scope)
        objection = None if caller is None else caller.objection()
        if objection is None:
            return True
        text = f"this certificate may not call this API any more: {objection}"
        await _problem(403, "forbidden", text, headers={"connection": "close"})(scope, receive, send)
        return False

    def _objection(self, method: str, headers: list[tuple[bytes, str]]) -> str | None:
        # Somebody followed a link to the dashboard, from a wiki say: the other page gets to see nothing of it.
        is_a_visit = method == "GET" and {(b"sec-fetch-mode", "navigate"), (b"sec-fetch-dest", "document")} <= {
            *headers
        }
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._is_own_host(_without_port(hosts[0].lower())):
            return "this relay is not called by that Host; use an address of its own, or localhost"
        for name, value in headers:
            if name == b"origin" and value.lower().partition("://")[2] != hosts[0].lower():
                return "a page from another origin may not use this API"
            if name == b"sec-fetch-site" and value == "cross-site" and not is_a_visit:
                return "a page from another site may not use this API"
        return None


def _without_port(host: str) -> str:
    # A name with a dot at its end is the same name.
    return re.sub(r":\d+\Z", "", host).removesuffix(".")


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None if it is larger than any may be; raises ClientDisconnect if it ends before its end."""
    body, size = b"", 0
    while size <= _MAX_DISCARDED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = bytes(message.get("body", b""))
        size += len(piece)
        # Read on, and let go of it: a client that is still sending would take an early answer for a reset.
        body = body + piece if size <= _MAX_BODY else b""
        if not message.get("more_body"):
            return body if size <= _MAX_BODY else None
    return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` for a body that has been read; behind it come the server's own messages."""
    was_given = False

    async def replay() -> Message:
        nonlocal was_given
        if was_given:
            return await receive()
        was_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _problem(
    status: int, error: str, message: str, problems: list[ProblemView] | None = None, headers: Any = None
) -> JSONResponse:
    body = Problems(error=error, message=message, problems=problems or [])
    return JSONResponse(body.model_dump(), status, headers=headers)


# --- the application --------------------------------------------------------------------------------------------

_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_Name = Annotated[str, Path(description="The name of a route.", pattern=_NAME_PATTERN)]
_IfMatch = Annotated[str | None, Header(description='Only if the route has one of these etags; "*": if it is there.')]
_IfNoneMatch = Annotated[str | None, Header(description='"*": only if there is no such route yet.')]


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    names = {
        400: "The request could not be read",
        403: "Not from there",
        404: "No such route",
        409: "It cannot be beside what is there",
        412: "It is not as the caller believes",
        413: "Too large",
        422: "Its values are wrong, each named by its key",
        429: "Too many of them are open at a time",
        503: "The relay drains",
        507: "It could not be written",
    }
    return {code: {"model": Problems, "description": names[code]} for code in (400, 403, 413, 422, *codes)}


def _etags(header: str | None) -> frozenset[str] | None:
    """The etags of an If-Match header; None where there is none, ``{"*"}`` for any."""
    if header is None:
        return None
    return frozenset(tag.strip() for tag in header.split(","))


def api(
    control: control_room.Control, events: EventStream, *, is_own_host: Callable[[str], bool] = is_local_host
) -> ASGIApp:
    """The ASGI application. ``is_own_host`` judges the Host header, in lower case and without its port.

    ``events`` must be a listener of the control's journal, for as long as the application is served.
    """
    app = FastAPI(
        title="frelay",
        version=__version__,
        summary="Routes, pairings and the state of one relay.",
        docs_url=None,  # they load from other hosts
        redoc_url=None,
        responses=_errors(),
    )
    _add_error_handlers(app)
    _add_looks(app, control, events)
    _add_changes(app, control)
    add_dashboard(app)
    return _Guard(app, is_own_host)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(control_room.ControlError)
    async def refused(request: Request, error: control_room.ControlError) -> JSONResponse:
        status, word = _STATUS[type(error)]
        return _problem(status, word, error.message, error.problems)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _problem(422, "invalid", "the request has wrong values", _value_problems(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: "not-found", 405: "method-not-allowed", 400: "invalid"}
        headers = {"allow": _allowed(app, request.scope)} if error.status_code == 405 else error.headers
        return _problem(error.status_code, words.get(error.status_code, "invalid"), error.detail, headers=headers)


def _allowed(app: FastAPI, scope: Scope) -> str:
    """The methods of a path. Starlette knows those of the first route that matches, and each method is a route here."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in route.methods or ()}))


def _key_path(place: tuple[Any, ...]) -> str:
    """``func1[2]`` for ``("body", "func1", "list[str]", 2)``: without where it was found and which type was tried."""
    path = ""
    for depth, step in enumerate(place[1:]):
        if isinstance(step, int):
            path += f"[{step}]"
        elif depth == 0 or step in DialBody.model_fields:
            path += f".{step}" if path else step
    return path or str(place[0])


def _value_problems(errors: Sequence[Any]) -> list[ProblemView]:
    """One problem a key, although pydantic has one for each type that a value could have had."""
    messages: dict[str, list[str]] = {}
    for found in errors:
        messages.setdefault(_key_path(found["loc"]), []).append(str(found["msg"]))
    return [ProblemView(key=key, message="; or: ".join(texts)) for key, texts in messages.items()]


def _add_looks(app: FastAPI, control: control_room.Control, events: EventStream) -> None:
    @app.get("/v1/status", summary="The relay as a whole")
    async def status() -> StatusView:
        return await control.status()

    @app.get("/v1/config", summary="The configuration in force, in the shape of a route file")
    async def configuration() -> dict[str, Any]:
        return control.configuration()

    @app.get("/v1/routes", summary="All routes in force")
    async def routes() -> RoutesView:
        return await control.routes()

    @app.get("/v1/routes/{name}", summary="One route", responses=_errors(404))
    async def route(name: _Name, response: Response) -> RouteView:
        view = await control.route(name)
        response.headers["etag"] = view.etag
        return view

    @app.get("/v1/traffic", summary="What goes on at all routes: cheap, for whoever asks again and again")
    async def traffic() -> TrafficView:
        return await control.traffic()

    @app.get("/v1/pairings", summary="All pairings that run")
    async def pairings() -> PairingsView:
        return await control.pairings()

    @app.get(
        "/v1/events",
        summary="What happens, as it happens (server-sent events)",
        response_class=StreamingResponse,
        responses={
            200: {"content": {"text/event-stream": {}}, "description": "An endless stream of EventView"},
            **_errors(429),
        },
    )
    async def event_stream(
        last_event_id: Annotated[str | None, Header(description="The last event that the caller has.")] = None,
        after: Annotated[
            int | None, Query(ge=0, lt=2**63, description="The same for a first request, where a browser sends none.")
        ] = None,
    ) -> Response:
        known = last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit()
        if known and last_event_id is not None:
            after = int(last_event_id[:18])
        return _EventResponse(events, after)


def _add_changes(app: FastAPI, control: control_room.Control) -> None:
    @app.put(
        "/v1/routes/{name}",
        summary="Add a route or replace it: it listens, and is on disk, when this is answered",
        responses={201: {"model": RouteView, "description": "It is new"}, **_errors(409, 412, 503, 507)},
    )
    async def put_route(
        name: _Name,
        body: RouteBody,
        response: Response,
        if_match: _IfMatch = None,
        if_none_match: _IfNoneMatch = None,
    ) -> RouteView:
        if body.name not in (None, name):
            raise control_room.Invalid(
                "the body names another route than the path",
                [ProblemView(key="name", message=f"is {body.name!r}, and the path says {name!r}: leave it out")],
            )
        if if_none_match not in (None, "*"):
            raise control_room.Invalid('If-None-Match can only be "*" here')
        view, is_new = await control.put_route(
            name, body.table(name), if_match=_etags(if_match), must_be_new=if_none_match is not None
        )
        response.status_code = 201 if is_new else 200
        response.headers["etag"] = view.etag
        return view

    @app.delete(
        "/v1/routes/{name}",
        summary="Remove a route: its port is free, and its file gone, when this is answered",
        status_code=204,
        responses=_errors(404, 409, 412, 503, 507),
    )
    async def delete_route(name: _Name, if_match: _IfMatch = None) -> None:
        await control.delete_route(name, if_match=_etags(if_match))

    @app.post("/v1/reload", summary="Read the files again", responses=_errors(409, 503))
    async def reload() -> ReloadedView:
        return await control.reload()
