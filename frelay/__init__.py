"""frelay: the relay that two functions dial, and the call with which a function joins it.

Importing this package loads the standard library only, neither Trio nor OpenSSL bindings, so that a function starts
quickly and ``pip install --no-deps frelay`` is enough for it. The relay itself lives behind the ``frelay`` command.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from frelay.errors import (
    FrelayError,
    HandOffFailed,
    PeerGone,
    PeerIdentityMismatch,
    Refused,
    RelayUnreachable,
)

if TYPE_CHECKING:
    from frelay.client.blocking import connect
    from frelay.client.retry import Retry

__all__ = [
    "FrelayError",
    "HandOffFailed",
    "PeerGone",
    "PeerIdentityMismatch",
    "Refused",
    "RelayUnreachable",
    "Retry",
    "__version__",
    "connect",
]

__version__: Final = "0.1.0"


def __getattr__(name: str) -> Any:
    # The client pulls in ssl and socket; `frelay --version` and the relay's leaves need neither.
    if name == "connect":
        return import_module("frelay.client.blocking").connect
    if name == "Retry":
        return import_module("frelay.client.retry").Retry
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
