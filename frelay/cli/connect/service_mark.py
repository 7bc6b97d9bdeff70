"""How two ``frelay connect --to`` that meet each other notice it: each would dial its service, and nobody would call.

The TLS client of the two says what it is by SNI, with a name that no other function uses; a function of any other kind
has one certificate, and ignores the name. A TLS server that is a ``--to`` knows it, and answers with a sentence that
nobody else would begin with, and an end. An alert would be the usual answer, but in the place of a ServerHello the
relay takes it for plaintext.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import trio

from frelay.client.options import JoinPlan
from frelay.client.trio import TrioWire, join
from frelay.errors import FrelayError
from frelay.protocol.messages import Message

__all__ = ["MetAnotherService", "check_first_bytes", "join_as_service"]

_MARK: Final = "to.frelay.invalid"  # RFC 2606: nobody can own it
_ANSWER: Final = b"\0frelay: I am a --to as well, and nobody calls.\n\0"
# For telling the other one, which may not read.
_PATIENCE: Final = 5.0


class MetAnotherService(FrelayError):
    """Both functions of this pairing are a ``--to``."""

    def __init__(self) -> None:
        super().__init__(
            "the other function is a `frelay connect --to` as well, so nobody calls: "
            "use --listen or another kind of function on one side of this route"
        )


async def join_as_service(plan: JoinPlan, on_status: Callable[[Message], None] | None) -> TrioWire:
    """Join, as :func:`frelay.client.trio.join` does; raises MetAnotherService where we are the TLS server of two."""
    is_marked = False

    def look_at_name(tls: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        nonlocal is_marked
        is_marked = name == _MARK

    plan.inner["server"].sni_callback = look_at_name
    wire = await join(replace(plan, inner_name=_MARK), on_status)
    if is_marked:
        try:
            with trio.move_on_after(_PATIENCE):
                await wire.send_all(_ANSWER)
                await wire.aclose()
        except trio.BrokenResourceError:
            pass  # it has noticed already, or gone
        finally:
            await trio.aclose_forcefully(wire)
        raise MetAnotherService
    return wire


def check_first_bytes(wire: TrioWire, data: bytes) -> None:
    """Raise MetAnotherService if ``data``, the first that came, is the answer to our mark."""
    if wire.paired.role == "client" and data == _ANSWER:
        raise MetAnotherService
