"""Going through an HTTP proxy: which proxy, and the CONNECT request. Standard library only, no I/O.

Many networks let functions out through an HTTP proxy only. ``CONNECT host:port`` asks the proxy for a TCP connection.
After its ``200`` answer all bytes go to the relay; the proxy looks up the relay's name. We choose the proxy from the
environment as curl and Go do: HTTPS_PROXY or https_proxy, but not for the hosts in NO_PROXY, and never for this
machine itself.

The user and password in a proxy's URL are secrets: we send them to that proxy, and show them in no message and no repr.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote_to_bytes, urlsplit

from frelay.client.retry import NoRelay
from frelay.client.steps import Connection, Receive, Send, Steps
from frelay.errors import RelayUnreachable

__all__ = ["Proxy", "choose_proxy", "connect_through", "parse_proxy"]

# Proxies answer with a few hundred bytes. We refuse a longer head.
_MAX_ANSWER: Final = 65536
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[0-9] ([0-9]{3})(?: (.*))?\Z", re.DOTALL)
# How many bytes of a proxy's answer our error message repeats.
_MAX_WORDS: Final = 200


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy; ``str()`` shows no secret."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def parse_proxy(url: str) -> Proxy:
    """Read ``http://[USER:PASSWORD@]HOST[:PORT]``, where the port is 8080 if left out.

    Raises ValueError with a text that shows no secret.
    """
    text = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("proxy: this is no URL: write http://host:port") from None
    if parts.scheme != "http":
        raise ValueError(f"proxy: {parts.scheme}:// is not supported: write http://host:port")
    if not host or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("proxy: write http://host:port, with user:password@ before the host if it asks for them")
    if port == 0:
        raise ValueError("proxy: 0 is no port: write http://host:port")
    if not host.isprintable() or " " in host:
        raise ValueError("proxy: the host has characters that no name has: write http://host:port")
    authorization = None
    if parts.username is not None:
        pair = _octets(parts.username) + b":" + _octets(parts.password or "")
        authorization = "Basic " + base64.b64encode(pair).decode("ascii")
    return Proxy(host, 8080 if port is None else port, authorization)


def _octets(text: str) -> bytes:
    """The octets that a part of a URL stands for. A URL from the environment need not be UTF-8."""
    return unquote_to_bytes(text.encode("utf-8", "surrogateescape"))


def choose_proxy(proxy: str | None, host: str, port: int, environ: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy for ``host``: ``proxy`` if given (``""`` means none), else the one of the environment.

    Raises ValueError for a bad argument. A bad environment variable is no fault of the call, so it raises
    RelayUnreachable, and the text names the variable.
    """
    if proxy is not None:
        return parse_proxy(proxy) if proxy else None
    variable = "HTTPS_PROXY" if environ.get("HTTPS_PROXY") else "https_proxy"
    url = environ.get(variable, "").strip()
    if not url or _is_this_machine(host):
        return None
    exceptions = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
    if _is_excepted(host.lower().rstrip("."), port, exceptions):
        return None
    try:
        return parse_proxy(url)
    except ValueError as error:
        raise NoRelay(
            f"the environment variable {variable} cannot be used: {str(error).removeprefix('proxy: ')}; "
            "correct it, unset it, or name this host in NO_PROXY"
        ) from None


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _is_excepted(host: str, port: int, exceptions: str) -> bool:
    for item in exceptions.replace(" ", ",").lower().split(","):
        text, colon, number = item.rpartition(":")
        # A text with one colon ends in a port. With more colons it is an IPv6 address: a port follows only brackets.
        if colon and number.isascii() and number.isdigit() and (":" not in text or text.endswith("]")):
            if number.lstrip("0") != str(port):
                continue
            item = text
        item = item.strip("[]").removeprefix("*")
        if not item:
            if text or number:  # "*" alone
                return True
            continue
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(item, strict=False):
                return True
        except ValueError:
            name = item.lstrip(".")
            if host == name or host.endswith(f".{name}"):
                return True
    return False


def connect_through(
    connection: Connection, proxy: Proxy, host: str, port: int, time_left: Callable[[], float]
) -> Steps[None]:
    """Ask the proxy at the other end of ``connection`` for a connection to ``host``; raises RelayUnreachable.

    ``time_left`` returns the seconds that are left for the whole request.
    """
    try:
        name = host if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:
        raise NoRelay(f"{host} is not a host name") from None
    target = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
    request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if proxy.authorization is not None:
        request += f"Proxy-Authorization: {proxy.authorization}\r\n"
    yield Send(connection, f"{request}\r\n".encode("ascii"), time_left())
    no_http = RelayUnreachable(f"the proxy {proxy} gave no answer that is HTTP")
    answer = bytearray()
    searched = 0
    while (end := answer.find(b"\r\n\r\n", searched)) < 0:
        searched = max(0, len(answer) - 3)
        data: bytes = yield Receive(connection, time_left())
        answer += data
        # Stop at once if it does not begin like HTTP: its end may never come.
        if not data or len(answer) > _MAX_ANSWER or not b"HTTP/1.".startswith(answer[:7]):
            raise no_http
    status = _STATUS_LINE.match(bytes(answer[:end]).split(b"\r\n", 1)[0])
    if status is None:
        raise no_http
    code, words = int(status[1]), (status[2] or b"")[:_MAX_WORDS].decode("utf-8", "replace")
    if not 200 <= code < 300:
        hint = ": give user and password in its URL" if code == 407 else ""
        raise RelayUnreachable(f"the proxy {proxy} refused a connection to {target}: {code} {words}{hint}".rstrip())
    rest = len(answer) - end - 4
    if rest:
        # These bytes are not the relay's: it sends nothing before our ClientHello.
        raise RelayUnreachable(f"the proxy {proxy} sent {rest} bytes that nobody had asked for")
