"""Through an HTTP proxy: which one, and the CONNECT that opens the way. Standard library only, no I/O.

Many networks let functions out through an HTTP proxy only. ``CONNECT host:port`` asks it for a TCP connection, and
after its ``200`` the bytes are ours; the relay's name is then looked up by the proxy. Which one is used follows what
curl and Go do with the environment: HTTPS_PROXY or https_proxy, not for the hosts in NO_PROXY, and never for
this machine itself.

The user and password in a proxy's URL are secrets: they are sent to that proxy, and appear in no message and no repr.
"""

from __future__ import annotations

import base64
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

from frelay.client.steps import Line, Receive, Send, Steps
from frelay.errors import RelayUnreachable

__all__ = ["Proxy", "ask_for_way", "choose_proxy", "parse_proxy"]

# The proxies in use answer with a few hundred bytes; what is longer is an error page's problem, not ours.
_MAX_ANSWER: Final = 65536


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy; ``str()`` has no secret in it."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


def parse_proxy(url: str) -> Proxy:
    """Read ``http://[USER:PASSWORD@]HOST[:PORT]`` (port 8080 if none is given); raises ValueError, without secrets."""
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
    authorization = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
    return Proxy(host, 8080 if port is None else port, authorization)


def choose_proxy(proxy: str | None, host: str, port: int, environ: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy for ``host``: ``proxy`` if given (``""`` means none), else what the environment says."""
    if proxy is not None:
        return parse_proxy(proxy) if proxy else None
    url = environ.get("HTTPS_PROXY") or environ.get("https_proxy")
    if not url or _is_this_machine(host):
        return None
    exceptions = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
    return None if _is_excepted(host.lower().rstrip("."), port, exceptions) else parse_proxy(url)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _is_excepted(host: str, port: int, exceptions: str) -> bool:
    for item in exceptions.replace(" ", ",").lower().split(","):
        text, colon, number = item.rpartition(":")
        # One colon is a port's; with more it is an IPv6 address, which has a port only behind brackets.
        if colon and number.isdigit() and (":" not in text or text.endswith("]")):
            if int(number) != port:
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


def ask_for_way(line: Line, proxy: Proxy, host: str, port: int, patience: float) -> Steps[None]:
    """Ask ``proxy``, which ``line`` is connected to, for a connection to ``host``; raises RelayUnreachable."""
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    request = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n"
    if proxy.authorization is not None:
        request += f"Proxy-Authorization: {proxy.authorization}\r\n"
    yield Send(line, f"{request}\r\n".encode("ascii"), patience)
    answer = b""
    while b"\r\n\r\n" not in answer:
        data: bytes = yield Receive(line, patience)
        answer += data
        if not data or len(answer) > _MAX_ANSWER:
            raise RelayUnreachable(f"the proxy {proxy} gave no answer that is HTTP")
    head, _, rest = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].split(b" ", 2)
    if not status[0].startswith(b"HTTP/1.") or len(status) < 2 or not status[1].isdigit():
        raise RelayUnreachable(f"the proxy {proxy} gave no answer that is HTTP")
    code = int(status[1])
    if not 200 <= code < 300:
        words = status[2].decode("ascii", "replace") if len(status) > 2 else ""
        hint = ": give user and password in its URL" if code == 407 else ""
        raise RelayUnreachable(f"the proxy {proxy} opens no way to {place}: {code} {words}{hint}".rstrip())
    if rest:
        # Whoever speaks first on a line where we have to is not the relay.
        raise RelayUnreachable(f"the proxy {proxy} sent {len(rest)} bytes that nobody had asked for")
