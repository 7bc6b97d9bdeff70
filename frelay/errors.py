"""Every error that frelay raises on purpose, as one small tree. Standard library only.

Two rules keep it useful. The border modules (``tls/``, ``sockets``, ``client/``) translate what the operating system
and OpenSSL raise, once; above them only these types travel. And who is at fault is a type, not a text:
:class:`LocalProtocolError` is our own bug or a caller's, :class:`RemoteProtocolError` is the other side's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "CertificateError",
    "ConfigError",
    "ConnectionBroken",
    "FrelayError",
    "HandOffFailed",
    "LocalProtocolError",
    "PeerGone",
    "PeerIdentityMismatch",
    "Problem",
    "ProtocolError",
    "Refused",
    "RelayUnreachable",
    "RemoteProtocolError",
    "Truncated",
    "holds_pem",
    "printable",
    "without_pem",
]


def printable(text: str) -> str:
    """``text`` as it is, or escaped if it could forge a line or move a cursor, as a file's name may."""
    return text if text.isprintable() else text.encode("unicode_escape", "surrogatepass").decode("ascii")


_PEM: Final = "-----BEGIN"


def holds_pem(value: object) -> bool:
    """Whether ``value``, a text or a list of them, holds PEM: a key, as likely as not."""
    return _PEM in str(value)


def without_pem(text: str) -> str:
    """``text`` up to where PEM begins in it: whoever pastes a key must not find it again in a message or a log."""
    before, begin, _ = text.partition(_PEM)
    return f"{before}(PEM text, which is not shown)" if begin else text


class FrelayError(Exception):
    """The base of all errors that frelay raises on purpose."""


# --- configuration -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a configuration: where it is, what it is, and how to mend it.

    ``is_conflict`` tells what is wrong only beside something else, such as an address that is taken already.
    """

    file: Path
    message: str
    key: str | None = None
    line: int | None = None
    is_conflict: bool = False

    def __str__(self) -> str:
        name = printable(str(self.file))
        place = name if self.line is None else f"{name}:{self.line}"
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class ConfigError(FrelayError):
    """A configuration that cannot be used; ``problems`` holds all that was found, not just the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class CertificateError(FrelayError):
    """A certificate, key or CRL that cannot be made or read; the text names the file and the remedy."""


# --- the wire ----------------------------------------------------------------------------------------------


class ProtocolError(FrelayError):
    """frelay/1 was broken; always one of the two subclasses below, which say by whom."""

    def __init__(self, message: str) -> None:
        if type(self) is ProtocolError:
            raise TypeError("raise LocalProtocolError or RemoteProtocolError: an error has an author")
        super().__init__(message)


class LocalProtocolError(ProtocolError):
    """This side tried something that the protocol does not allow now."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something that the protocol does not allow."""


class ConnectionBroken(FrelayError):
    """A connection was reset, timed out in the kernel or failed otherwise; the text says how."""


class Truncated(ConnectionBroken):
    """A TLS stream ended by FIN without close_notify: an attacker or a crash may have cut it short."""


# --- a function's side -------------------------------------------------------------------------------------


class RelayUnreachable(FrelayError):
    """No connection to the relay, or its TLS could not be verified; nothing was joined. Try again later."""


class Refused(FrelayError):
    """The relay answered REFUSED.

    ``code`` is one of the protocol's codes, ``reason`` a sentence for a person, and ``retry_after`` the seconds
    to wait before another try, or None where a retry does not help without a change.
    """

    def __init__(self, code: str, reason: str, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.retry_after = retry_after


class HandOffFailed(FrelayError):
    """PAIRED arrived, but the outer TLS did not end cleanly; no byte of the peer was read. Join again."""


class PeerGone(FrelayError):
    """The other function went away before the inner TLS was up. Join again."""


class PeerIdentityMismatch(FrelayError):
    """The peer's certificate does not show the identity asked for with ``peer=``; nothing was sent to it."""

    def __init__(self, expected: str, found: Sequence[str]) -> None:
        shown = ", ".join(found) or "no usable name"
        super().__init__(f"the peer showed {shown}, where {expected} was expected")
        self.expected = expected
        self.found = tuple(found)
