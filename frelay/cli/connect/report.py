"""What ``frelay connect`` tells on stderr: failures always, steps on a terminal, and all as JSON with ``--json``.

Nothing here raises: a pairing must not end because nobody reads what is said about it.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

from frelay.client.peer import agreed_protocol
from frelay.client.trio import TrioWire
from frelay.errors import Refused, printable
from frelay.protocol.messages import Message, Paired, Waiting

__all__ = ["Report"]


class Report:
    """Where one run of ``frelay connect`` writes its messages."""

    def __init__(self, *, as_json: bool, is_quiet: bool) -> None:
        self._as_json: Final = as_json
        self._is_quiet: Final = is_quiet
        self._tells_steps: Final = not as_json and not is_quiet and _is_terminal()

    # --- steps -------------------------------------------------------------------------------------------------

    def listening(self, address: str) -> None:
        """The port is there."""
        self._say("listening", address=address)
        self._tell(f"listening on {address}")

    def status(self, message: Message, *, is_news: bool = True) -> None:
        """A message of the relay; ``is_news`` is False for one that a person has been told already."""
        if isinstance(message, Waiting):
            self._say(
                "waiting",
                route=message.route,
                party=message.party,
                identity=message.identity,
                deadline=message.deadline,
                peer_seen=message.peer_seen,
            )
            if is_news:
                self._tell(f"waiting on route {message.route} as {message.party} ({message.identity})")
        elif isinstance(message, Paired):
            self._say("paired", pairing=message.pairing, route=message.route, peer=message.peer, role=message.role)

    def connected(self, wire: TrioWire) -> None:
        """The inner handshake is done, and the peer is who it must be."""
        cipher = wire.ssl_object.cipher()
        self._say(
            "connected",
            peer=wire.paired.peer,
            pairing=wire.paired.pairing,
            cipher=cipher[0] if cipher else None,
            alpn=agreed_protocol(wire.ssl_object),
        )
        self._tell(f"paired with {wire.paired.peer} (pairing {wire.paired.pairing})")

    def ended(self, wire: TrioWire, sent: int, received: int, reason: str | None = None) -> None:
        """The end of a pairing; ``reason`` is given where it was none in order."""
        if reason is None:
            self._say("ended", clean=True, sent=sent, received=received)
        else:
            self._say("ended", clean=False, reason=reason, sent=sent, received=received)
        how = "ended" if reason is None else "was cut"
        self._tell(f"pairing {wire.paired.pairing} {how}: {sent} bytes sent, {received} received")

    def hung_up(self) -> None:
        """A caller went before it had a partner."""
        self._say("hung-up")
        self._tell("a caller hung up before the other function came")

    # --- failures ----------------------------------------------------------------------------------------------

    def fail(self, error: BaseException, *, pause: float | None = None) -> None:
        """A failure; with ``pause`` something is tried again after that many seconds."""
        if not self._as_json:
            again = "" if pause is None else f"; trying again in {pause:.1f} s"
            _write(f"frelay: {printable(str(error))}{again}")
            return
        facts: dict[str, Any] = {}
        if isinstance(error, Refused):
            facts = {"code": error.code, "retry_after": error.retry_after}
        _write(_line("failed", error=type(error).__name__, reason=str(error), **facts))
        if pause is not None:
            self._say("retrying", seconds=round(pause, 2))

    def retrying(self, error: BaseException, pause: float) -> None:
        """Another try after what is no failure yet: the caller is still waiting."""
        self._say("retrying", seconds=round(pause, 2), reason=str(error))
        self._tell(f"{error}; trying again in {pause:.1f} s")

    def bug(self, error: BaseException) -> None:
        """What nobody had thought of; the name of the error is what a report of it needs."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if self._as_json:
            _write(_line("failed", error=type(error).__name__, reason=f"unexpected error, a bug in frelay: {text}"))
        else:
            _write(f"frelay: unexpected error, a bug in frelay: {printable(text)}")

    # --- where it goes -----------------------------------------------------------------------------------------

    def _say(self, event: str, **facts: Any) -> None:
        if self._as_json and not self._is_quiet:
            _write(_line(event, **facts))

    def _tell(self, text: str) -> None:
        if self._tells_steps:
            _write(f"frelay: {printable(text)}")


def _line(event: str, **facts: Any) -> str:
    return json.dumps({"event": event, **facts})


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except (OSError, ValueError):
        return False


def _write(line: str) -> None:
    # Without this test print() would write to standard output, into the data.
    if sys.stderr is None:
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # stderr has gone; a pairing is worth more than its messages
