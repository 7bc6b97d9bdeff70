"""Serves the dashboard: one page for the operator on call, which a browser draws from the admin API.

It is four static files, read once, without a build step. The page loads nothing from other hosts, so it works through
``ssh -L`` on a machine without internet access. Strangers write a part of what it shows, such as the subject of a
refused certificate. So the page only sets text, never markup; if it ever failed to, the headers below would still keep
the browser from running anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["add_dashboard"]

_DIRECTORY: Final = Path(__file__).parent / "dashboard"
_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/dashboard.js": ("dashboard.js", "text/javascript"),
    "/dashboard.css": ("dashboard.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}

_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # makes innerHTML and the like raise
    )
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # The same forwarded port of localhost may lead to a relay of another version tomorrow.
    "cache-control": "no-store",
}


def add_dashboard(app: Starlette) -> None:
    """Serve the dashboard at ``/`` of ``app``."""
    for path, (name, media_type) in _FILES.items():
        _add_file(app, path, (_DIRECTORY / name).read_bytes(), media_type)


def _add_file(app: Starlette, path: str, content: bytes, media_type: str) -> None:
    async def send_file(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    app.add_route(path, send_file, methods=["GET", "HEAD"], include_in_schema=False)
