"""Every error that frelay raises on purpose, as one small tree. Standard library only.

Three rules keep it useful. The border modules (``tls/``, ``sockets``, ``client/``) translate what the operating system
and OpenSSL raise, once; above them only these types travel. And who is at fault is a type, not a text:
:class:`LocalProtocolError` is our own bug or a caller's, :class:`RemoteProtocolError` is the other side's. And the
text of an error does no harm where it is printed, even if a stranger wrote a part of it: :class:`FrelayError`
escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = [
    "CertificateError",
    "CertificateRefused",
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


# What a peer, a proxy or a relay sends can be long; a terminal and a log line should not be.
_LONGEST: Final = 3000
# Of the names in a certificate, which may hold thousands.
_NAMES_SHOWN: Final = 8


def printable(text: str) -> str:
    """``text`` with each character escaped that could forge a line, move a cursor or change the reading direction."""
    if text.isprintable():
        return text
    # isprintable() is false for control and format characters (the bidirectional ones among them), for separators of
    # lines and paragraphs, and for surrogates.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _harmless(text: str) -> str:
    shown = printable(text[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


_PEM: Final = "-----BEGIN"


def holds_pem(value: object) -> bool:
    """Whether ``value``, a text or a list of them, holds PEM: a key, as likely as not."""
    return _PEM in str(value)


def without_pem(text: str) -> str:
    """``text`` up to where PEM begins in it: whoever pastes a key must not find it again in a message or a log."""
    before, begin, _ = text.partition(_PEM)
    return f"{before}(PEM text, which is not shown)" if begin else text


class FrelayError(Exception):
    """The base of all errors that frelay raises on purpose. Its text is one printable line of a bounded length."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_harmless(arg) if isinstance(arg, str) else arg for arg in args))


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
        # Not by FrelayError: this text has a line for each problem, and each of those is printable.
        Exception.__init__(self, "\n".join(str(problem) for problem in self.problems))


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
        self.code = _harmless(code)
        self.reason = _harmless(reason)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its arguments, so that it arrives from a pool of processes."""
        return type(self), (self.code, self.reason, self.retry_after)


class HandOffFailed(FrelayError):
    """PAIRED arrived, but the outer TLS did not end cleanly; no byte of the peer was read. Join again."""


class PeerGone(FrelayError):
    """The other function went away before the inner TLS was up. Join again."""


class CertificateRefused(PeerGone):
    """The other function refused *this* function's certificate, and said so by a TLS alert; the text says why."""


class PeerIdentityMismatch(FrelayError):
    """The peer's certificate does not show the identity asked for with ``peer=``; nothing was sent to it."""

    def __init__(self, expected: str, found: Sequence[str]) -> None:
        self.expected = expected
        self.found = tuple(_harmless(name) for name in found)
        more = len(self.found) - _NAMES_SHOWN
        shown = ", ".join(self.found[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        super().__init__(f"the peer showed {shown or 'no usable name'}, where {expected} was expected")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its arguments, so that it arrives from a pool of processes."""
        return type(self), (self.expected, self.found)
