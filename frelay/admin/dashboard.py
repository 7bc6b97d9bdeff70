"""The dashboard: one page for whoever is called at night, drawn by a browser from the API beside it.

Four static files, read once. There is no build step and nothing is loaded from elsewhere, so it works on a machine
without a way out, through ``ssh -L``. What it shows is partly made up by strangers (the subject of a refused
certificate, say): the page sets text and never markup, and the headers here let a browser run nothing else, should it
ever fail to.
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
        "require-trusted-types-for 'script'",  # innerHTML and its kin raise
    )
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # One forwarded port of localhost is this relay today and another version tomorrow.
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
