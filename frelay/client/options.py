"""The arguments of ``connect``: the list of them, their checks, and the plan that they make. Standard library only.

:class:`Options` is the list. The signatures of the three clients, the options of ``frelay connect`` and the table in
docs/functions.md are compared with it by tests/unit/test_client_signatures.py, so a new argument begins here.
"""

from __future__ import annotations

import math
import re
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypedDict, Unpack

from frelay.client.contexts import StrPath, inner_context, outer_context
from frelay.client.peer import read_selectors, without_root
from frelay.client.proxy import Proxy, choose_proxy
from frelay.client.retry import Retry, read_retry
from frelay.errors import LocalProtocolError, holds_pem
from frelay.protocol import messages
from frelay.protocol.identity import Selector
from frelay.protocol.messages import MODES, Message, Mode, PartyName, Role

__all__ = ["JoinPlan", "Options", "RequiredOptions", "read_server_name", "split_address"]

_ADDRESS: Final = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})\Z")
_ROLES: Final[tuple[Role, ...]] = ("client", "server")
# A JOIN is encoded to check its length, with values that take as much room as any: an attempt, and seconds to wait.
_ANY_ATTEMPT: Final = "00000000-0000-0000-0000-000000000000"
_LONGEST_NUMBER: Final = -sys.float_info.min
# Arguments that hold no file name and no text of ours. An ill-formed traceparent is ignored, whatever it holds.
_NEVER_PEM: Final = frozenset({"wait", "on_status", "retry", "traceparent"})


class RequiredOptions(TypedDict):
    """The arguments of ``connect`` that have no default."""

    cert: StrPath
    ca: StrPath
    peer: str | Sequence[str]


class Options(RequiredOptions, total=False):
    """The arguments of all three ``connect``; :func:`frelay.connect` describes them."""

    key: StrPath | None
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
    meet: str | None
    partner: str | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class JoinPlan:
    """All that is known before the first step: the arguments are checked and the files are read."""

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
    meet: str | None
    partner: tuple[str, ...] | None
    inner_name: str | None = None
    """The SNI that this function sends as the client of the inner TLS. ``make`` sets none."""
    wait_ends_when_paired: bool = False
    """Whether ``wait`` covers the steps up to PAIRED only. ``make`` sets False: it covers everything."""

    @classmethod
    def make(cls, address: str, **options: Unpack[Options]) -> JoinPlan:
        """The plan for these arguments of ``connect``.

        Raises TypeError, ValueError, CertificateError or RelayUnreachable.
        """
        _check_names(options)
        _forbid_pem({"address": address, **options})
        host, port = split_address(address)
        mode, wait, proxy = options.get("mode", "handoff"), options.get("wait"), options.get("proxy")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not a mode: write {', '.join(MODES)}")
        if wait is not None and math.isnan(wait):
            raise ValueError("wait: this is not a number: write seconds, or None for no limit")
        cert, key, ca = options["cert"], options.get("key"), options["ca"]
        inner_cert, alpn, traceparent = options.get("inner_cert"), options.get("alpn"), options.get("traceparent")
        inner_key, inner_ca = options.get("inner_key") if inner_cert else key, options.get("inner_ca") or ca
        plan = cls(
            host=host,
            port=port,
            server_name=read_server_name(options.get("server_name") or host),
            outer=outer_context(cert, key, ca),
            inner={role: inner_context(role, inner_cert or cert, inner_key, inner_ca, alpn) for role in _ROLES},
            alpn=tuple(alpn or ()),
            expected=read_selectors(options["peer"]),
            wait=None if wait == math.inf else wait,
            route=options.get("route"),
            party=options.get("party"),
            mode=mode,
            proxy=choose_proxy(proxy, host, port),
            retry=read_retry(options.get("retry")),
            traceparent=None if traceparent is None else messages.read_traceparent(traceparent),
            meet=_read_meet(options.get("meet")),
            partner=_read_partner(options.get("partner"), options.get("meet")),
        )
        try:
            messages.encode(plan.join(_ANY_ATTEMPT, _LONGEST_NUMBER))
        except LocalProtocolError as error:
            raise ValueError(f"partner and the other arguments make JOIN too long: {error}") from None
        return plan

    def join(self, attempt: str, wait: float | None) -> messages.Join:
        """The JOIN of one try; ``wait`` is the rest of the time in seconds."""
        return messages.Join(
            attempt,
            self.route,
            self.party,
            wait=wait,
            modes=(self.mode,),
            traceparent=self.traceparent,
            meet=self.meet,
            partner=self.partner,
        )

    def is_echoed_by(self, message: messages.Waiting | messages.Paired) -> bool:
        """Whether the relay says that it keeps to ``meet`` and ``partner``; an older relay does not know them."""
        return message.meet == self.meet and (self.partner is None or message.partner is True)


def _check_names(options: Mapping[str, object]) -> None:
    """Raise TypeError where a function with these arguments would."""
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(f"connect() got an unexpected keyword argument {name!r}")
    for name in RequiredOptions.__annotations__:
        if name not in options:
            raise TypeError(f"connect() missing required keyword-only argument: {name!r}")


def _forbid_pem(arguments: Mapping[str, object]) -> None:
    """Raise ValueError for an argument that holds a key instead of naming its file, before a message can repeat it."""
    for name, value in arguments.items():
        if name not in _NEVER_PEM and holds_pem(value):
            raise ValueError(f"{name}: this is PEM text; write it into a file, and name that file here")


def _read_meet(meet: str | None) -> str | None:
    if meet is None:
        return None
    try:
        return messages.read_key(meet)
    except ValueError as error:
        raise ValueError(f"meet={meet!r}: {error}") from None


def _read_partner(partner: str | Sequence[str] | None, meet: str | None) -> tuple[str, ...] | None:
    if partner is None:
        return None
    if meet is None:
        raise ValueError("partner: it works only together with meet; peer= alone also checks who the other function is")
    texts = [partner] if isinstance(partner, str) else list(partner)
    try:
        return messages.read_partners([without_root(text) if str(text).startswith("dns:") else text for text in texts])
    except ValueError as error:
        raise ValueError(f"partner: {error}") from None


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` as a pair; raises ValueError."""
    found = _ADDRESS.match(address)
    # A space or a newline would also be written into the request to a proxy.
    if found is None or not 0 < int(found["port"]) < 65536 or not address.isprintable() or " " in address:
        raise ValueError(f"{address!r} is not an address: write host:port, or [v6]:port")
    return found["v6"] or found["host"], int(found["port"])


def read_server_name(name: str) -> str:
    """The name to expect in the relay's certificate, given as a host or a ``server_name``; raises ValueError."""
    # An IPv6 address may end in "%" and an interface of this machine, which is no part of the relay's name.
    found = name.partition("%")[0] if ":" in name else without_root(name)
    try:
        found.encode("idna")  # the ssl module does this too, but only in the middle of the joining
    except UnicodeError:
        found = ""
    if not found or found.startswith(".") or not found.isprintable() or " " in found:
        raise ValueError(f"server_name: {name!r} is not a host name")
    return found
