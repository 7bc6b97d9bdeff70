"""The admin API: HTTP around a :class:`~frelay.admin.control.Control`, described by itself at ``/openapi.json``.

:mod:`frelay.admin.guard` stands in front of it and decides whether a request may pass; nothing changes on GET.

Two callers who edit one route at the same time must not undo each other's work. So a route has an ``ETag``: with
``If-Match`` a change is made only if the route is still the one that the caller read, and with ``If-None-Match: *`` a
PUT only adds a route and never replaces one. When PUT and DELETE are answered, the change is in force and on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Scope

from frelay import __version__
from frelay.admin.control import Control, ControlError, InvalidRequest
from frelay.admin.dashboard import add_dashboard
from frelay.admin.events import EventResponse, EventStream
from frelay.admin.guard import Guard, is_local_host
from frelay.admin.model import (
    PairingsView,
    ProblemView,
    ReloadedView,
    RouteBody,
    RoutesView,
    RouteView,
    StatusView,
    TrafficView,
)
from frelay.admin.problems import control_error_response, error_answers, problem_response, value_problems

__all__ = ["api"]

_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_Name = Annotated[str, Path(description="The name of a route.", pattern=_NAME_PATTERN)]
_IfMatch = Annotated[
    str | None, Header(description='Only if the route has one of these etags; "*": only if it exists.')
]
_EVENTS: Final = """Each event has `id`, `kind` (also its SSE event name), `at` and `data`, which depends on its kind:

- `waiting`: `route`, `party`, `identity`, `address`, `mode`, `meet`
- `paired`: `pairing`, `route`, `func1`, `func2`, `waited`, `meet`
- `ended`: `pairing`, `route`, `func1`, `func2`, `outcome`, `side`, `detail`, `bytes_func1_to_func2`,
  `bytes_func2_to_func1`, `duration`, `meet`
- `refused`: `code`, `reason`, `address`, `route`, `party`, `identity`, `meet`, `certificate`, `count`
- `reloaded`: `kept`, `added`, `removed`, `replaced`, `restart_only`
- `reload-refused`: `problems`
- `draining`: `reason`, `seconds`

`meet` is the key by which a leg meets its partner, or null. `party` is `either` for a leg with a key whose certificate
fits both parties; who of a pairing is func1 and who is func2 is always decided."""
_IfNoneMatch = Annotated[str | None, Header(description='"*": add the route only if it does not exist yet.')]


def _etags(header: str | None) -> frozenset[str] | None:
    """The etags of an If-Match header; None without the header, ``{"*"}`` for any."""
    if header is None:
        return None
    return frozenset(tag.strip() for tag in header.split(","))


def api(control: Control, events: EventStream, *, is_own_host: Callable[[str], bool] = is_local_host) -> ASGIApp:
    """The ASGI application. ``is_own_host`` is that of :class:`~frelay.admin.guard.Guard`.

    ``events`` must listen to the control's journal as long as the application is served.
    """
    app = FastAPI(
        title="frelay",
        version=__version__,
        summary="Routes, pairings and the state of one relay.",
        docs_url=None,  # This page and the next load scripts from other hosts.
        redoc_url=None,
        responses=error_answers(),
    )
    _add_error_handlers(app)
    _add_queries(app, control, events)
    _add_changes(app, control)
    add_dashboard(app)
    return Guard(app, is_own_host)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ControlError)
    async def refused(request: Request, error: ControlError) -> JSONResponse:
        return control_error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(422, "invalid", "the request has wrong values", value_problems(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: "not-found", 405: "method-not-allowed", 400: "invalid"}
        headers = {"allow": _allowed(app, request.scope)} if error.status_code == 405 else error.headers
        return problem_response(
            error.status_code, words.get(error.status_code, "invalid"), error.detail, headers=headers
        )


def _allowed(app: FastAPI, scope: Scope) -> str:
    """All methods of a path. Starlette tells only those of the first route that matches, and here each has its own."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in route.methods or ()}))


def _add_queries(app: FastAPI, control: Control, events: EventStream) -> None:
    @app.get("/v1/status", summary="The relay as a whole")
    async def status() -> StatusView:
        return await control.status()

    @app.get("/v1/config", summary="The configuration in force, in the shape of a route file")
    async def configuration() -> dict[str, Any]:
        return control.configuration()

    @app.get("/v1/routes", summary="All routes in force")
    async def routes() -> RoutesView:
        return await control.routes()

    @app.get("/v1/routes/{name}", summary="One route", responses=error_answers(404))
    async def route(name: _Name, response: Response) -> RouteView:
        view = await control.route(name)
        response.headers["etag"] = view.etag
        return view

    @app.get("/v1/traffic", summary="The traffic of all routes; cheaper than /v1/routes, for callers that poll")
    async def traffic() -> TrafficView:
        return await control.traffic()

    @app.get("/v1/pairings", summary="All running pairings")
    async def pairings() -> PairingsView:
        return await control.pairings()

    @app.get(
        "/v1/events",
        summary="Events as they happen (server-sent events)",
        description=_EVENTS,
        response_class=StreamingResponse,
        responses={
            200: {"content": {"text/event-stream": {}}, "description": "An endless stream of EventView"},
            **error_answers(429),
        },
    )
    async def event_stream(
        last_event_id: Annotated[
            str | None, Header(description="The id of the last event that the caller has received; later ones follow.")
        ] = None,
        after: Annotated[
            int | None,
            Query(
                ge=0,
                lt=2**63,
                description="The same as Last-Event-ID, which a browser does not send with its first request.",
            ),
        ] = None,
    ) -> Response:
        known = last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit()
        if known and last_event_id is not None:
            after = int(last_event_id[:18])
        return EventResponse(events, after)


def _add_changes(app: FastAPI, control: Control) -> None:
    @app.put(
        "/v1/routes/{name}",
        summary="Add or replace a route; the answer comes when the route listens and its file is on disk",
        response_description="The route was replaced",
        responses={
            201: {"model": RouteView, "description": "The route was added"},
            **error_answers(409, 412, 503, 507),
        },
    )
    async def put_route(
        name: _Name,
        body: RouteBody,
        response: Response,
        if_match: _IfMatch = None,
        if_none_match: _IfNoneMatch = None,
    ) -> RouteView:
        if body.name not in (None, name):
            raise InvalidRequest(
                "the body names another route than the path",
                [ProblemView(key="name", message=f"is {body.name!r}, and the path says {name!r}: leave it out")],
            )
        if if_none_match not in (None, "*"):
            raise InvalidRequest('If-None-Match can only be "*" here')
        view, is_new = await control.put_route(
            name, body.table(name), if_match=_etags(if_match), must_be_new=if_none_match is not None
        )
        response.status_code = 201 if is_new else 200
        response.headers["etag"] = view.etag
        return view

    @app.delete(
        "/v1/routes/{name}",
        summary="Remove a route; the answer comes when its port is free and its file is removed",
        response_description="The route was removed",
        status_code=204,
        responses=error_answers(404, 409, 412, 503, 507),
    )
    async def delete_route(name: _Name, if_match: _IfMatch = None) -> None:
        await control.delete_route(name, if_match=_etags(if_match))

    @app.post(
        "/v1/reload",
        summary="Read the configuration files again and put them in force",
        response_description="The configuration is in force",
        responses=error_answers(409, 503),
    )
    async def reload() -> ReloadedView:
        return await control.reload()
