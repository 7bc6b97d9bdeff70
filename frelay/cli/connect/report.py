"""The messages of ``frelay connect`` on stderr: always failures, on a terminal also steps, with ``--json`` all as JSON.

Nothing here raises: a pairing must not end because stderr cannot be written.
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
        self._writes_steps: Final = not as_json and not is_quiet and _is_terminal()

    # --- steps -------------------------------------------------------------------------------------------------

    def listening(self, address: str) -> None:
        """We listen at ``address`` now."""
        self._write_event("listening", address=address)
        self._write_step(f"listening on {address}")

    def status(self, message: Message, *, is_new: bool = True) -> None:
        """A message of the relay; with ``is_new`` False a terminal does not show it again."""
        if isinstance(message, Waiting):
            self._write_event(
                "waiting",
                route=message.route,
                party=message.party,
                identity=message.identity,
                deadline=message.deadline,
                peer_seen=message.peer_seen,
                **_key(message),
            )
            if is_new:
                party = message.party or "either party"
                where = (
                    f"route {message.route}" if message.meet is None else f"route {message.route}, key {message.meet},"
                )
                self._write_step(f"waiting on {where} as {party} ({message.identity})")
        elif isinstance(message, Paired):
            self._write_event(
                "paired",
                pairing=message.pairing,
                route=message.route,
                peer=message.peer,
                role=message.role,
                **_key(message),
            )

    def connected(self, wire: TrioWire) -> None:
        """The inner handshake is done, and the peer has a name that ``--peer`` allows."""
        cipher = wire.ssl_object.cipher()
        self._write_event(
            "connected",
            peer=wire.paired.peer,
            pairing=wire.paired.pairing,
            cipher=cipher[0] if cipher else None,
            alpn=agreed_protocol(wire.ssl_object),
        )
        self._write_step(f"paired with {wire.paired.peer} (pairing {wire.paired.pairing})")

    def ended(self, wire: TrioWire, sent: int, received: int, reason: str | None = None) -> None:
        """A pairing has ended; ``reason`` says why if it was no clean end."""
        if reason is None:
            self._write_event("ended", clean=True, sent=sent, received=received)
        else:
            self._write_event("ended", clean=False, reason=reason, sent=sent, received=received)
        how = "ended" if reason is None else "was cut"
        self._write_step(f"pairing {wire.paired.pairing} {how}: {sent} bytes sent, {received} received")

    def hung_up(self) -> None:
        """A caller hung up before it had a partner."""
        self._write_event("hung-up")
        self._write_step("a caller hung up before the other function came")

    # --- failures ----------------------------------------------------------------------------------------------

    def fail(self, error: BaseException, *, pause: float | None = None) -> None:
        """A failure; with ``pause`` we try again after that many seconds."""
        if not self._as_json:
            again = "" if pause is None else f"; trying again in {pause:.1f} s"
            _write(f"frelay: {printable(str(error))}{again}")
            return
        facts: dict[str, Any] = {}
        if isinstance(error, Refused):
            facts = {"code": error.code, "retry_after": error.retry_after}
        _write(_line("failed", error=type(error).__name__, reason=str(error), **facts))
        if pause is not None:
            self._write_event("retrying", seconds=round(pause, 2))

    def retrying(self, error: BaseException, pause: float) -> None:
        """We join again after ``error``. For the caller, which still waits, it is no failure yet."""
        self._write_event("retrying", seconds=round(pause, 2), reason=str(error))
        self._write_step(f"{error}; trying again in {pause:.1f} s")

    def bug(self, error: BaseException) -> None:
        """An unexpected error. The text has the name of the exception, which a bug report needs."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if self._as_json:
            _write(_line("failed", error=type(error).__name__, reason=f"unexpected error, a bug in frelay: {text}"))
        else:
            _write(f"frelay: unexpected error, a bug in frelay: {printable(text)}")

    # --- output ------------------------------------------------------------------------------------------------

    def _write_event(self, event: str, **facts: Any) -> None:
        if self._as_json and not self._is_quiet:
            _write(_line(event, **facts))

    def _write_step(self, text: str) -> None:
        if self._writes_steps:
            _write(f"frelay: {printable(text)}")


def _key(message: Waiting | Paired) -> dict[str, str]:
    return {} if message.meet is None else {"meet": message.meet}


def _line(event: str, **facts: Any) -> str:
    return json.dumps({"event": event, **facts})


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except (OSError, ValueError):
        return False


def _write(line: str) -> None:
    # With file=None print() would write to standard output, into the data.
    if sys.stderr is None:
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # stderr is gone, and the pairing must go on without it
