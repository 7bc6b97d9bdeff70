"""How two ``frelay connect --to`` notice that they are paired. Each would dial its service, and neither would call.

The one that is the TLS client sends an SNI that no other function uses. Any other kind of TLS server ignores it. A
``--to`` that is the TLS server recognises it, finishes the handshake, and sends a sentence that no other function would
begin with, and an end. A TLS alert would be the usual answer, but the relay takes an alert in place of a ServerHello
for plaintext.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import replace
from typing import Final
from weakref import WeakSet

import trio

from frelay.client.options import JoinPlan
from frelay.client.trio import TrioWire, join
from frelay.errors import FrelayError
from frelay.protocol.messages import Message

__all__ = ["MetAnotherService", "check_first_bytes", "join_as_service"]

_SERVICE_SNI: Final = "to.frelay.invalid"  # RFC 2606: no one can own this name
_ANSWER: Final = b"\0frelay: I am a --to as well, and nobody calls.\n\0"
# For sending the answer: the other function may not read.
_ANSWER_TIMEOUT: Final = 5.0


# All wires share one TLS context, and a context has one callback. So it notes which of them it was.
_CALLED_BY_SERVICE: Final[WeakSet[ssl.SSLSocket | ssl.SSLObject]] = WeakSet()


class MetAnotherService(FrelayError):
    """Both functions of this pairing are a ``frelay connect --to``."""

    def __init__(self) -> None:
        super().__init__(
            "the other function is a `frelay connect --to` as well, so nobody calls: "
            "use --listen or another kind of function on one side of this route"
        )


async def join_as_service(plan: JoinPlan, on_status: Callable[[Message], None] | None) -> TrioWire:
    """Join like :func:`frelay.client.trio.join`. If the peer is a ``--to`` and we are the server, MetAnotherService."""
    plan.inner["server"].sni_callback = _note_sni
    wire = await join(replace(plan, inner_name=_SERVICE_SNI, wait_ends_when_paired=True), on_status)
    if wire.ssl_object in _CALLED_BY_SERVICE:
        try:
            with trio.move_on_after(_ANSWER_TIMEOUT):
                await wire.send_all(_ANSWER)
                await wire.aclose()
        except trio.BrokenResourceError:
            pass  # the other function has noticed it already, or is gone
        finally:
            await trio.aclose_forcefully(wire)
        raise MetAnotherService
    return wire


def _note_sni(tls: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
    if name == _SERVICE_SNI:
        _CALLED_BY_SERVICE.add(tls)


def check_first_bytes(wire: TrioWire, data: bytes) -> None:
    """Raise MetAnotherService if ``data``, the first bytes of the peer, is the answer to our SNI."""
    if wire.paired.role == "client" and data == _ANSWER:
        raise MetAnotherService
