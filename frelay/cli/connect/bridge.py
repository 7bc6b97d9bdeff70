"""The bridge of ``frelay connect``: bytes between a local side and the wire to the other function.

The two directions are carried each for itself, so an end of one (FIN, a closed pipe, close_notify) arrives as an end of
that one, and the other goes on. The rules:

* a side that breaks while it is read from (a reset, an end without close_notify) cuts the other side too: nothing may
  look complete that is not;
* a side that breaks while it is written to stops that direction only. What it had said before it went is still to be
  carried, as with a server that answers early and closes.

The bridge ends the wire. The local side stays its owner's, who ends it in order after a return and cuts it otherwise.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

import trio

from frelay.cli.connect.local import LocalSide
from frelay.cli.connect.report import Report
from frelay.client.trio import TrioWire
from frelay.errors import FrelayError

__all__ = ["Broken", "bridge"]

_CHUNK: Final = 262144
_RESET: Final = frozenset(
    {errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
)
_INSIDE: Final = "the local side"
_OUTSIDE: Final = "the other function"


class Broken(FrelayError):
    """A side broke; the text says which and how."""


class _Carrier:
    """One direction, with what it has carried so far."""

    def __init__(self, source: str, sink: str, check_first: Callable[[bytes], None] | None = None) -> None:
        self._source: Final = source
        self._sink: Final = sink
        self._check_first = check_first
        self._dropping: Final = trio.CancelScope()
        self.count = 0
        self.lost: str | None = None
        """Why bytes of this direction were dropped, though its source went on."""
        self.reset: OSError | None = None
        """How the sink's connection broke, where that was a reset and not only an end of its reading."""

    async def carry(
        self, source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream, opposite: _Carrier
    ) -> None:
        """Carry to the source's end; raises Broken where the source breaks.

        Once the sink takes nothing more, bytes are dropped as long as the opposite direction goes on. They are still
        read, since a program that cannot write may not read either, and then that direction would never end.
        """
        try:
            while True:
                data = await self._receive(source)
                if self._check_first is not None:
                    self._check_first(data)
                    self._check_first = None
                if not data and opposite.reset is not None:
                    # Writing was told of the reset, and the kernel tells only once: this is no end.
                    raise Broken(f"{self._source} broke: {opposite.reset}")
                try:
                    if not data:
                        await sink.send_eof()
                        return
                    await sink.send_all(data)
                except trio.BrokenResourceError as error:
                    if not data:
                        return
                    self._lose(error)
                    break
                self.count += len(data)
            with self._dropping:
                while await self._receive(source):
                    pass
        finally:
            opposite._dropping.cancel(reason="the other direction has ended")

    async def _receive(self, source: trio.abc.ReceiveStream) -> bytes:
        try:
            return bytes(await source.receive_some(_CHUNK))
        except (trio.BrokenResourceError, OSError) as error:
            # frelay's own say more than what OpenSSL calls it.
            text = error if isinstance(error, FrelayError) else error.__cause__ or error
            raise Broken(f"{self._source} broke: {text}") from error

    def _lose(self, error: trio.BrokenResourceError) -> None:
        self.lost = f"{self._sink} takes nothing more: {error.__cause__ or error}"
        cause = error.__cause__ or error.__context__
        # After a FIN it would be EPIPE: see tcp_reset in net/ipv4/tcp_input.c.
        if isinstance(cause, OSError) and cause.errno in _RESET:
            self.reset = cause


async def bridge(
    local: LocalSide, wire: TrioWire, report: Report, check_first: Callable[[bytes], None] | None = None
) -> None:
    """Carry both directions to their ends, and end the wire. Raises Broken; then the wire was cut.

    ``check_first`` sees the first bytes from the wire before the local side does; what it raises ends the bridge.
    """
    out, back = _Carrier(_INSIDE, _OUTSIDE), _Carrier(_OUTSIDE, _INSIDE, check_first)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(out.carry, local, wire, back)
            nursery.start_soon(back.carry, wire, local, out)
        if out.lost is not None:
            await local.linger()
    except BaseException as error:
        await trio.aclose_forcefully(wire)
        broken = _only_error(error)
        if not isinstance(broken, FrelayError):
            raise
        report.ended(wire, out.count, back.count, str(broken))
        raise broken from None
    # In order also where one side took not everything: the last bytes of the other must still arrive.
    await wire.aclose()
    lost = out.lost or back.lost
    report.ended(wire, out.count, back.count, lost)
    if lost is not None:
        raise Broken(lost)


def _only_error(error: BaseException) -> BaseException | None:
    """What ended the nursery; None if that was several things, such as a cancellation and a bug."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    found = [_only_error(one) for one in error.exceptions]
    return found[0] if len(found) == 1 or all(isinstance(one, Broken) for one in found) else None
