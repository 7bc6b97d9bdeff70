"""The errors that all rooms share: one small tree under :class:`FrelayError`. Standard library only.

* Every error that leaves the room that raises it, or whose text a person reads, derives from :class:`FrelayError`. A
  room may add subclasses of its own, such as ``admin.control.ControlError``.
* Two kinds of exceptions stand outside of the tree. A :class:`ValueError` says that an argument cannot be read. A
  control-flow signal ends a task or a call inside one room, is always caught there, and carries a decision and no
  error: ``pairing.pump.Cut``, for example, ends a pump with the outcome of its pairing. Its docstring says so.
* The modules at the border (``net/``, ``tls/``, ``client/``) translate the errors of the operating system and OpenSSL
  once. Above them only these types appear.
* The type says which side is at fault, not the text: :class:`LocalProtocolError` is a bug of ours or of the caller,
  :class:`RemoteProtocolError` is a fault of the other side.
* The text of an error is safe to print, even if a stranger wrote a part of it: :class:`FrelayError` escapes it.
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
    "GroupBroken",
    "HandOffFailed",
    "ListenerClosed",
    "LocalProtocolError",
    "PeerGone",
    "PeerIdentityMismatch",
    "Problem",
    "ProtocolError",
    "Refused",
    "RelayTooOld",
    "RelayUnreachable",
    "RemoteProtocolError",
    "Truncated",
    "holds_pem",
    "printable",
    "without_pem",
]


# Characters of a text that a peer, a proxy or a relay may have sent. More would flood a terminal or a log.
_LONGEST: Final = 3000
# A certificate may hold thousands of names.
_NAMES_SHOWN: Final = 8


def printable(text: str) -> str:
    """``text`` with every character escaped that could forge a line, move the cursor or change the text direction."""
    if text.isprintable():
        return text
    # isprintable() is false for control and format characters (bidirectional ones, too), for line and paragraph
    # separators and for surrogates.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _harmless(text: str) -> str:
    shown = printable(text[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


_PEM: Final = "-----BEGIN"


def holds_pem(value: object) -> bool:
    """Whether ``value``, a text or a list of texts, contains PEM, which is probably a private key."""
    return _PEM in str(value)


def without_pem(text: str) -> str:
    """``text`` up to the first PEM block: a key that was pasted by mistake must not appear in a message or a log."""
    before, begin, _ = text.partition(_PEM)
    return f"{before}(PEM text, which is not shown)" if begin else text


class FrelayError(Exception):
    """The base of the errors that frelay raises on purpose. Its text is one printable line of limited length."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_harmless(arg) if isinstance(arg, str) else arg for arg in args))


# --- configuration -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a configuration: where it is, what is wrong, and how to correct it.

    With ``is_conflict`` the value is valid in itself but conflicts with something else, such as an address in use.
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
    """A configuration that cannot be used; ``problems`` holds all problems, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        # Not FrelayError.__init__: this text has one line for each problem, and each line is printable already.
        Exception.__init__(self, "\n".join(str(problem) for problem in self.problems))


class CertificateError(FrelayError):
    """A certificate, key or CRL that cannot be made or read; the text names the file and the remedy."""


# --- the wire ----------------------------------------------------------------------------------------------


class ProtocolError(FrelayError):
    """One side broke the protocol frelay/1; always one of the two subclasses below, which say which side."""

    def __init__(self, message: str) -> None:
        if type(self) is ProtocolError:
            raise TypeError("raise LocalProtocolError or RemoteProtocolError: an error has an author")
        super().__init__(message)


class LocalProtocolError(ProtocolError):
    """This side tried to do something that the protocol does not allow in this state."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something that the protocol does not allow."""


class ConnectionBroken(FrelayError):
    """A connection was reset, timed out in the kernel or failed in another way; the text says how."""


class Truncated(ConnectionBroken):
    """A TLS stream ended by FIN without close_notify: an attacker or a crash may have cut it short."""


# --- a function's side -------------------------------------------------------------------------------------


class RelayUnreachable(FrelayError):
    """The relay could not be reached, or its certificate could not be verified; no join was sent. Try again later."""


class RelayTooOld(FrelayError):
    """The relay does not know ``meet`` or ``partner`` and would have paired with any function; this one has left."""


class Refused(FrelayError):
    """The relay answered REFUSED.

    ``code`` is one of the protocol's codes. ``reason`` is a sentence for a person. ``retry_after`` is how many seconds
    to wait before the next try, or None if a retry cannot help until something is changed.
    """

    def __init__(self, code: str, reason: str, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = _harmless(code)
        self.reason = _harmless(reason)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: a pool of processes pickles the errors of its tasks."""
        return type(self), (self.code, self.reason, self.retry_after)


class HandOffFailed(FrelayError):
    """The relay sent PAIRED, but the outer TLS did not end cleanly; no byte of the peer was read. Join again."""


class ListenerClosed(FrelayError):
    """``accept`` was called on a listener that is closed, or the listener was closed meanwhile."""


class PeerGone(FrelayError):
    """The other function disconnected before the inner TLS was established. Join again."""


class CertificateRefused(PeerGone):
    """The other function refused *this* function's certificate with a TLS alert; the text says why."""


class GroupBroken(FrelayError):
    """A group is of no more use: a rank died, left, aborted, stood still or was out of step. Start a new group.

    ``rank`` is the rank that failed first, as far as this rank knows; None if nobody knows.
    """

    def __init__(self, rank: int | None, text: str) -> None:
        super().__init__(text)
        self.rank = rank
        self.text = _harmless(text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: a pool of processes pickles the errors of its tasks."""
        return type(self), (self.rank, self.text)


class PeerIdentityMismatch(FrelayError):
    """The peer's certificate does not have the identity that ``peer=`` asks for; nothing was sent to the peer."""

    def __init__(self, expected: str, found: Sequence[str]) -> None:
        self.expected = expected
        self.found = tuple(_harmless(name) for name in found)
        more = len(self.found) - _NAMES_SHOWN
        shown = ", ".join(self.found[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        super().__init__(f"the peer showed {shown or 'no usable name'}, where {expected} was expected")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: a pool of processes pickles the errors of its tasks."""
        return type(self), (self.expected, self.found)
