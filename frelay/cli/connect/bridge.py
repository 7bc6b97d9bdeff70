"""The bridge of ``frelay connect``: it copies bytes between a local side and the wire to the other function.

It copies each direction alone. So an end of one direction (FIN, a closed pipe, close_notify) is passed on as the end of
that direction, and the other goes on. The rules:

* if reading from a side fails (a reset, an end without close_notify), the bridge cuts the other side too: incomplete
  data must not look complete;
* if writing to a side fails, only that direction stops. The bridge still copies what that side sent before, for example
  the answer of a server that answers early and closes.

The bridge closes the wire. The caller owns the local side: it closes that in order after a return, and cuts it after an
error.
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
_LOCAL: Final = "the local side"
_PEER: Final = "the other function"


class Broken(FrelayError):
    """The local side or the wire broke; the text says which and how."""


class _Direction:
    """One direction, and how many bytes it has copied."""

    def __init__(self, source: str, sink: str, check_first: Callable[[bytes], None] | None = None) -> None:
        self._source: Final = source
        self._sink: Final = sink
        self._check_first = check_first
        self._dropping: Final = trio.CancelScope()
        self.count = 0
        self.lost: str | None = None
        """Why bytes of this direction were dropped although its source went on."""
        self.reset: OSError | None = None
        """The error of the sink, if its connection was reset. A sink that only stopped reading has none."""

    async def copy(
        self, source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream, opposite: _Direction
    ) -> None:
        """Copy until the source ends; raises Broken if the source breaks.

        If the sink takes no more, drop the source's bytes as long as the opposite direction goes on. We must still read
        them: a program that cannot write may stop reading too, and then the opposite direction would never end.
        """
        try:
            while True:
                data = await self._receive(source)
                if self._check_first is not None:
                    self._check_first(data)
                    self._check_first = None
                if not data and opposite.reset is not None:
                    # This is no end. The kernel reports a reset only once, and the opposite direction's write got it.
                    raise Broken(f"{self._source} broke: {opposite.reset}")
                try:
                    if not data:
                        await sink.send_eof()
                        return
                    await sink.send_all(data)
                except trio.BrokenResourceError as error:
                    if not data:
                        return
                    self._on_sink_failure(error)
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
            # An error of ours says more than OpenSSL's.
            text = error if isinstance(error, FrelayError) else error.__cause__ or error
            raise Broken(f"{self._source} broke: {text}") from error

    def _on_sink_failure(self, error: trio.BrokenResourceError) -> None:
        self.lost = f"{self._sink} takes nothing more: {error.__cause__ or error}"
        cause = error.__cause__ or error.__context__
        # A reset after a FIN is EPIPE, which is not in this list: see tcp_reset in net/ipv4/tcp_input.c.
        if isinstance(cause, OSError) and cause.errno in _RESET:
            self.reset = cause


async def bridge(
    local: LocalSide, wire: TrioWire, report: Report, check_first: Callable[[bytes], None] | None = None
) -> None:
    """Copy both directions to their ends, and close the wire. If it raises Broken, it has cut the wire.

    ``check_first`` gets the first bytes from the wire before the local side does. An error from it ends the bridge.
    """
    out, back = _Direction(_LOCAL, _PEER), _Direction(_PEER, _LOCAL, check_first)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(out.copy, local, wire, back)
            nursery.start_soon(back.copy, wire, local, out)
        if out.lost is not None:
            await local.linger()
    except BaseException as error:
        await trio.aclose_forcefully(wire)
        broken = _only_error(error)
        if not isinstance(broken, FrelayError):
            raise
        report.ended(wire, out.count, back.count, str(broken))
        raise broken from None
    # Close in order also if one side did not take everything: the last bytes for the other must still arrive.
    await wire.aclose()
    lost = out.lost or back.lost
    report.ended(wire, out.count, back.count, lost)
    if lost is not None:
        raise Broken(lost)


def _only_error(error: BaseException) -> BaseException | None:
    """The one error that ended the nursery; None if there were several, such as a cancellation and a bug."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    found = [_only_error(one) for one in error.exceptions]
    return found[0] if len(found) == 1 or all(isinstance(one, Broken) for one in found) else None
