"""Health and metrics over plain HTTP: ``/healthz``, ``/readyz`` and ``/metrics``."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from frelay.admin.office import Office

__all__ = ["metrics_app"]


def metrics_app(office: Office) -> ASGIApp:
    """The ASGI application of ``[metrics]``."""

    async def healthz(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> PlainTextResponse:
        ready = office.is_ready
        return PlainTextResponse("ready\n" if ready else "draining\n", 200 if ready else 503)

    return Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz)])
