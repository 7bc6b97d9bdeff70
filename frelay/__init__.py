"""frelay: the relay that two functions dial, and the call by which a function joins it.

This package imports the standard library only, neither Trio nor OpenSSL bindings. So a function starts quickly, and
``pip install --no-deps`` installs everything that it needs. The ``frelay`` command runs the relay itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from frelay.errors import (
    CertificateError,
    CertificateRefused,
    ConnectionBroken,
    FrelayError,
    GroupBroken,
    HandOffFailed,
    ListenerClosed,
    LocalProtocolError,
    PeerGone,
    PeerIdentityMismatch,
    ProtocolError,
    Refused,
    RelayTooOld,
    RelayUnreachable,
    RemoteProtocolError,
    Truncated,
)

if TYPE_CHECKING:
    from frelay import client
    from frelay.client.blocking import connect
    from frelay.client.group.blocking import Group, group
    from frelay.client.listening import Listener, listen
    from frelay.client.retry import Retry
    from frelay.client.wire import Wire

__all__ = [
    "CertificateError",
    "CertificateRefused",
    "ConnectionBroken",
    "FrelayError",
    "Group",
    "GroupBroken",
    "HandOffFailed",
    "Listener",
    "ListenerClosed",
    "LocalProtocolError",
    "PeerGone",
    "PeerIdentityMismatch",
    "ProtocolError",
    "Refused",
    "RelayTooOld",
    "RelayUnreachable",
    "RemoteProtocolError",
    "Retry",
    "Truncated",
    "Wire",
    "__version__",
    "client",
    "connect",
    "group",
    "listen",
]

__version__: Final = "0.1.0"

# Loaded when first used: the client imports ssl and socket, which `frelay --version` does not need.
_LATER: Final = {
    "Group": "frelay.client.group.blocking",
    "Listener": "frelay.client.listening",
    "Retry": "frelay.client.retry",
    "Wire": "frelay.client.wire",
    "connect": "frelay.client.blocking",
    "group": "frelay.client.group.blocking",
    "listen": "frelay.client.listening",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name == "client":
        return import_module("frelay.client")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
