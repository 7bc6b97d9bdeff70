"""``frelay connect --listen``: each connection to a local port becomes a pairing.

Every caller has its own task. The task owns the caller's socket and joins the route for it; its failure is one line on
stderr and ends nothing else. At most eight callers join at once, and the others wait here in their order: a route has
few places for waiting functions, and others need them too. We read nothing from a caller before it is paired. So what
it sends early waits in the kernel, and we can join again without losing it.
"""

from __future__ import annotations

import errno
import math
import resource
from collections.abc import Callable
from typing import Final

import trio

from frelay.cli.connect.address import LocalError, address_text, listening
from frelay.cli.connect.bridge import bridge
from frelay.cli.connect.hangup import wait_hung_up
from frelay.cli.connect.join import Joiner, back_off
from frelay.cli.connect.local import LocalSocket
from frelay.cli.connect.report import Report
from frelay.client.retry import Retry
from frelay.client.standing import is_wait_timeout
from frelay.client.trio import TrioWire
from frelay.errors import CertificateError, FrelayError, Refused
from frelay.protocol.messages import Message, Paired

__all__ = ["Port", "raise_descriptor_limit"]

MOST_JOINING: Final = 8
# The relay's codes for "no place" or "no partner" at the moment. Each passes without a change.
_PASSING: Final = frozenset({"queue-full", "limit", "wait-timeout", "draining"})
# A certificate and its key are two files. During a renewal one of them is already new, and they do not fit each other.
_TRIES_WITH_BAD_FILES: Final = 3
# The caller's socket, the descriptor of its watch or the wire, and in mode ticket the second connection of a join.
_DESCRIPTORS_OF_ONE: Final = 3
_DESCRIPTORS_OF_OURS: Final = 64
_UNLIMITED: Final = 1_048_576  # the default of fs.nr_open
_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE_WHEN_FULL: Final = 0.1


def raise_descriptor_limit() -> int:
    """Raise this process's limit of descriptors as far as it may; returns the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        hard = soft
    return _UNLIMITED if hard == resource.RLIM_INFINITY else hard


class Port:
    """A local address whose connections become pairings."""

    def __init__(self, address: str, joiner: Joiner, retry: Retry | None, report: Report) -> None:
        self._address: Final = address
        self._joiner: Final = joiner
        self._retry: Final = retry
        self._report: Final = report
        self._join_slots: Final = trio.Semaphore(MOST_JOINING)
        most = (raise_descriptor_limit() - _DESCRIPTORS_OF_OURS) // _DESCRIPTORS_OF_ONE
        self._caller_slots: Final = trio.Semaphore(max(MOST_JOINING, most))

    async def serve(self) -> int:
        """Serve until cancelled; returns an exit code only if it cannot listen at the address."""
        try:
            with listening(self._address) as listeners:
                async with trio.open_nursery() as nursery:
                    for listener in listeners:
                        self._report.listening(address_text(listener.getsockname()))
                        nursery.start_soon(self._accept, listener, nursery)
        except* LocalError as group:
            self._report.fail(group.exceptions[0])
        return 1

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        is_full = False
        while True:
            await self._caller_slots.acquire()  # more callers wait in the kernel
            try:
                sock, _ = await listener.accept()
            except OSError as error:
                # Other errors belong to one connection, as accept(2) says; the next accept returns another one.
                self._caller_slots.release()
                if error.errno in _FULL:
                    if not is_full:
                        self._report.fail(LocalError(f"new callers must wait: {error.strerror}"))
                    is_full = True
                    await trio.sleep(_PAUSE_WHEN_FULL)
                continue
            except BaseException:
                self._caller_slots.release()
                raise
            is_full = False
            nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        """Serve one caller from accept to its end. Raises nothing."""
        try:
            local = LocalSocket(sock)
            try:
                wire = await self._join_unless_hung_up(sock)
                if wire is None:
                    self._report.hung_up()
                    return
                await bridge(local, wire, self._report)
                await local.aclose()
            except FrelayError as error:
                self._report.fail(error)
            finally:
                local.cut()
        except Exception as error:
            # A bug of ours or of a library ends this caller, not the port with all the others.
            self._report.bug(error)
        finally:
            sock.close()
            self._caller_slots.release()

    async def _join_unless_hung_up(self, sock: trio.socket.SocketType) -> TrioWire | None:
        """A wire for the caller, or None if it hung up first; raises FrelayError."""
        wire: TrioWire | None = None
        failure: FrelayError | None = None
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await wait_hung_up(sock)
                nursery.cancel_scope.cancel(reason="the caller hung up")

            nursery.start_soon(watch)
            try:
                wire = await self._join()
            except FrelayError as error:
                failure = error
            nursery.cancel_scope.cancel(reason="joined")
        if failure is not None:
            raise failure
        return wire

    async def _join(self) -> TrioWire:
        """Join within ``--wait``, and join again as long as that can help; raises FrelayError."""
        wait = self._joiner.wait
        deadline = math.inf if wait is None else trio.current_time() + wait
        slot = _JoinSlot(self._join_slots)
        tries = failures = 0
        try:
            while True:
                with trio.move_on_at(deadline) as limit:
                    await slot.take()
                left = deadline - trio.current_time()
                if limit.cancelled_caught or left <= 0:
                    raise _nobody_came(wait)
                try:
                    return await self._joiner.join_once(None if wait is None else left, slot.on_status(self._report))
                except FrelayError as error:
                    pause = self._pause_after(error, tries, failures)
                    if pause is None or trio.current_time() + pause >= deadline:
                        raise _nobody_came(wait) if is_wait_timeout(error) else error from None
                    self._report.retrying(error, pause)
                    failures = 0 if is_wait_timeout(error) else failures + 1
                    tries += 1
                await trio.sleep(pause)
        finally:
            slot.give_back()

    def _pause_after(self, error: FrelayError, tries: int, failures: int) -> float | None:
        if isinstance(error, Refused) and error.code in _PASSING:
            return back_off(self._retry or Retry(), error, failures)
        if isinstance(error, CertificateError):
            return back_off(Retry(), error, failures) if failures < _TRIES_WITH_BAD_FILES else None
        return None if self._retry is None else self._retry.pause_after(error, tries, failures)


def _nobody_came(wait: float | None) -> Refused:
    """The refusal for the caller's whole wait: the relay knows only the wait of the last join."""
    return Refused("wait-timeout", f"nobody came within {wait or 0:g} s", retry_after=0.0)


class _JoinSlot:
    """The right of one caller to join, held from before JOIN to PAIRED. A partner's slow handshake does not hold it."""

    def __init__(self, slots: trio.Semaphore) -> None:
        self._slots: Final = slots
        self._is_held = False

    async def take(self) -> None:
        if not self._is_held:
            await self._slots.acquire()
            self._is_held = True

    def give_back(self) -> None:
        if self._is_held:
            self._is_held = False
            self._slots.release()

    def on_status(self, report: Report) -> Callable[[Message], None]:
        """The ``on_status`` for a join: it reports the relay's messages, and gives the slot back at PAIRED."""

        def on_status(message: Message) -> None:
            report.status(message)
            if isinstance(message, Paired):
                self.give_back()

        return on_status
