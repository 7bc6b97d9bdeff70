"""The guard in front of the admin API: it refuses what another web page makes a browser send, and bodies too large.

A caller has been admitted by the mode of the Unix socket or by a client certificate before. A browser on the same
machine may be admitted, too, and may be on a page of an attacker. So three rules protect the API:

* ``Host`` must be a name or address of this relay: a DNS name that an attacker points here is none.
* ``Origin``, where a browser sends it, must be the same host and port.
* A page of another site gets no answer (``Sec-Fetch-Site``), unless a person followed a link to the dashboard.

The guard checks the client certificate for each request, because the connection may outlive the certificate.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import trio
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frelay.admin.http import caller_of
from frelay.admin.problems import problem_response

__all__ = ["Guard", "is_local_host"]

# A hundred times what a route needs.
_MAX_BODY: Final = 64 * 1024
# How much of a body that is too large is read and thrown away before the connection ends without an answer.
_MAX_DISCARDED: Final = 16 * _MAX_BODY
_BODY_TIMEOUT: Final = 10.0
_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})


def is_local_host(host: str) -> bool:
    """Whether a ``Host`` header is localhost or a loopback address: no DNS name of an attacker is one of these."""
    return host in _LOCAL


class Guard:
    """The ASGI application ``app`` behind the checks of this module.

    ``is_own_host`` judges the Host header, in lower case and without its port.
    """

    def __init__(self, app: ASGIApp, is_own_host: Callable[[str], bool]) -> None:
        self._app: Final = app
        self._is_own_host: Final = is_own_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            return  # Neither WebSocket nor lifespan is served.
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        objection = self._objection(scope["method"], headers)
        if objection is not None:
            await problem_response(403, "forbidden", objection)(scope, receive, send)
            return
        if not await self._may_call(scope, receive, send):
            return
        body = None
        try:
            with trio.move_on_after(_BODY_TIMEOUT):
                body = await _read(receive)
        except ClientDisconnect:
            return  # A body without its end is not what the caller meant to send.
        # The body may take a while, and the caller must still be allowed when the request is carried out.
        if not await self._may_call(scope, receive, send):
            return
        if body is None:
            text = f"a body may have at most {_MAX_BODY} bytes and must arrive within {_BODY_TIMEOUT:g} s"
            await problem_response(413, "too-large", text)(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    async def _may_call(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether the caller's certificate is still accepted; if not, answers and ends the connection."""
        caller = caller_of(scope)
        objection = None if caller is None else caller.objection()
        if objection is None:
            return True
        text = f"this certificate may not call this API any more: {objection}"
        await problem_response(403, "forbidden", text, headers={"connection": "close"})(scope, receive, send)
        return False

    def _objection(self, method: str, headers: list[tuple[bytes, str]]) -> str | None:
        # A person followed a link to the dashboard, from a wiki for example. The other page cannot read the answer.
        navigation = {(b"sec-fetch-mode", "navigate"), (b"sec-fetch-dest", "document")}
        is_navigation = method == "GET" and navigation <= {*headers}
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._is_own_host(_without_port(hosts[0].lower())):
            return "the Host header does not name this relay; use one of its own names or addresses, or localhost"
        for name, value in headers:
            if name == b"origin" and value.lower().partition("://")[2] != hosts[0].lower():
                return "a page from another origin may not use this API"
            if name == b"sec-fetch-site" and value == "cross-site" and not is_navigation:
                return "a page from another site may not use this API"
        return None


def _without_port(host: str) -> str:
    # "localhost." is "localhost".
    return re.sub(r":\d+\Z", "", host).removesuffix(".")


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None if it is too large; raises ClientDisconnect if the client disconnects before its end."""
    body, size = b"", 0
    while size <= _MAX_DISCARDED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = bytes(message.get("body", b""))
        size += len(piece)
        # Read the rest of a body that is too large, and drop it: a client that is still sending would get a reset
        # instead of our answer.
        body = body + piece if size <= _MAX_BODY else b""
        if not message.get("more_body"):
            return body if size <= _MAX_BODY else None
    return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives ``body``, which has been read already, and then the server's next messages."""
    was_given = False

    async def replay() -> Message:
        nonlocal was_given
        if was_given:
            return await receive()
        was_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
