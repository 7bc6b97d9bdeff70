"""The arguments of ``connect``: the list of them, their checks, and the plan that they make. Standard library only."""

from __future__ import annotations

import math
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Required, TypedDict

from frelay.client.contexts import StrPath, inner_context, outer_context
from frelay.client.peer import read_selectors, without_root
from frelay.client.proxy import Proxy, choose_proxy
from frelay.client.retry import Retry, read_retry
from frelay.errors import holds_pem
from frelay.protocol import messages
from frelay.protocol.identity import Selector
from frelay.protocol.messages import MODES, Message, Mode, PartyName, Role

__all__ = ["JoinPlan", "Options", "read_server_name", "split_address"]

_ADDRESS: Final = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})\Z")
_ROLES: Final[tuple[Role, ...]] = ("client", "server")


class Options(TypedDict, total=False):
    """The arguments of all three ``connect``; they are described at :func:`frelay.connect`."""

    cert: Required[StrPath]
    key: StrPath | None
    ca: Required[StrPath]
    peer: Required[str | Sequence[str]]
    wait: float | None
    route: str | None
    party: PartyName | None
    server_name: str | None
    inner_cert: StrPath | None
    inner_key: StrPath | None
    inner_ca: StrPath | None
    alpn: Sequence[str] | None
    mode: Mode
    on_status: Callable[[Message], None] | None
    proxy: str | None
    retry: Retry | bool | int | None
    traceparent: str | None


@dataclass(frozen=True, slots=True)
class JoinPlan:
    """All that is known before the first step: files are read and arguments judged."""

    host: str
    port: int
    server_name: str
    outer: ssl.SSLContext
    inner: Mapping[Role, ssl.SSLContext]
    alpn: tuple[str, ...]
    expected: tuple[Selector, ...]
    wait: float | None
    route: str | None
    party: PartyName | None
    mode: Mode
    proxy: Proxy | None
    retry: Retry | None
    traceparent: str | None
    inner_name: str | None = None
    """The SNI that this function sends as the client of the inner TLS; none unless somebody has put it here."""

    @classmethod
    def make(
        cls,
        address: str,
        *,
        cert: StrPath,
        key: StrPath | None = None,
        ca: StrPath,
        peer: str | Sequence[str],
        wait: float | None = None,
        route: str | None = None,
        party: PartyName | None = None,
        server_name: str | None = None,
        inner_cert: StrPath | None = None,
        inner_key: StrPath | None = None,
        inner_ca: StrPath | None = None,
        alpn: Sequence[str] | None = None,
        mode: Mode = "handoff",
        on_status: Callable[[Message], None] | None = None,
        proxy: str | None = None,
        retry: Retry | bool | int | None = None,
        traceparent: str | None = None,
    ) -> JoinPlan:
        """The plan for these arguments of ``connect``; raises ValueError, CertificateError or RelayUnreachable."""
        _forbid_pem(address=address, peer=peer, mode=mode, route=route, party=party, server_name=server_name)
        _forbid_pem(cert=cert, key=key, ca=ca, inner_cert=inner_cert, inner_key=inner_key, inner_ca=inner_ca)
        _forbid_pem(proxy=proxy, alpn=alpn)
        host, port = split_address(address)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one: write {', '.join(MODES)}")
        if wait is not None and math.isnan(wait):
            raise ValueError("wait: this is not a number: write seconds, or None for no limit")
        own = (inner_cert or cert, inner_key if inner_cert else key, inner_ca or ca)
        return cls(
            host=host,
            port=port,
            server_name=read_server_name(server_name or host),
            outer=outer_context(cert, key, ca),
            inner={role: inner_context(role, *own, alpn=alpn) for role in _ROLES},
            alpn=tuple(alpn or ()),
            expected=read_selectors(peer),
            wait=None if wait == math.inf else wait,
            route=route,
            party=party,
            mode=mode,
            proxy=choose_proxy(proxy, host, port),
            retry=read_retry(retry),
            traceparent=None if traceparent is None else messages.read_traceparent(traceparent),
        )


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` as a pair; raises ValueError."""
    found = _ADDRESS.match(address)
    # A space or a newline would be written into a proxy's request, too.
    if found is None or not 0 < int(found["port"]) < 65536 or not address.isprintable() or " " in address:
        raise ValueError(f"{address!r} is not an address: write host:port, or [v6]:port")
    return found["v6"] or found["host"], int(found["port"])


def read_server_name(name: str) -> str:
    """The name to expect in the relay's certificate, of a host or a ``server_name``; raises ValueError."""
    # An IPv6 address may name the interface that it is reached by, which is of this machine only.
    found = name.partition("%")[0] if ":" in name else without_root(name)
    try:
        found.encode("idna")  # as ssl will, in the middle of the joining
    except UnicodeError:
        found = ""
    if not found or found.startswith(".") or not found.isprintable() or " " in found:
        raise ValueError(f"server_name: {name!r} is not a host name")
    return found


def _forbid_pem(**arguments: object) -> None:
    """Raise ValueError for an argument that holds a key instead of naming its file, before anybody repeats it."""
    for name, value in arguments.items():
        if holds_pem(value):
            raise ValueError(f"{name}: this is PEM text; write it into a file, and name that file here")
