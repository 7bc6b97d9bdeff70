"""A function that serves many, in ordinary blocking code: :func:`listen`. Standard library only.

This is a shell of :mod:`frelay.client.standing`. A leg must answer the relay's PINGs while the program does something
else, so each leg has a thread until its wire is accepted, and one more thread starts them. All of them are daemon
threads: a program that forgets to close its listener still ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Self, Unpack

from frelay.client.blocking import Interrupted, Shell
from frelay.client.joining import Joining
from frelay.client.options import Options
from frelay.client.signature import shows_its_options
from frelay.client.standing import Action, End, GiveUp, Leg, Standing, Start, Tell, Wait
from frelay.client.steps import drive
from frelay.client.wire import Wire
from frelay.errors import FrelayError, ListenerClosed, RelayUnreachable
from frelay.protocol.messages import Message

__all__ = ["Listener", "listen"]

# How long close() waits for its threads, and how often it interrupts them meanwhile.
_CLOSE_LIMIT: Final = 5.0
_INTERRUPT_AGAIN: Final = 0.05


@shows_its_options
def listen(
    address: str,
    *,
    standing: int = 2,
    on_error: Callable[[FrelayError], None] | None = None,
    **options: Unpack[Options],
) -> Listener:
    """Join a route again and again, and give out a wire for each caller: end-to-end mTLS, ready for use.

    Args:
        address: the relay's ``host:port``, as for :func:`frelay.connect`; so are all arguments that are not named here.
        wait: seconds that a leg waits before it joins again, which the program does not see; with None the relay's
            limit ends the waiting.
        retry: how long to pause after a failure: a :class:`~frelay.Retry`. If it limits the tries, the listener ends
            after so many failures in a row.
        on_status: called with each message of the relay to any leg; in the thread of the leg.
        standing: how many legs wait at the relay at all times. With a long way to the relay, or callers that come in
            bursts, more of them serve faster.
        on_error: called with each error that the listener outlives: a caller that failed (PeerIdentityMismatch,
            PeerGone, CertificateRefused), or a join that failed and is tried again; in a thread of the listener.

    The files are read again when they have changed, and after each failed join. An error that no pause mends (Refused
    without ``retry_after``, CertificateError, a relay that is not trusted, RelayTooOld) ends the listener when it has
    come four times in a row, which takes about three seconds. :meth:`Listener.accept` raises it then. An exception of
    ``on_status`` or ``on_error`` ends the listener, too.

    Raises:
        CertificateError: a file is missing or unreadable.
        ValueError: ``address``, ``peer`` or another argument cannot be read.
        RelayUnreachable: the environment names a proxy that cannot be used.
    """
    return Listener(Standing.make(address, standing, time.monotonic, options), options.get("on_status"), on_error)


class Listener:
    """Gives out wires: an iterator, and a context manager that closes it. All methods are safe for many threads.

    A wire is given out only when its inner TLS is up and its peer is checked. It is the caller's from then on, and
    outlives the listener.
    """

    def __init__(
        self,
        standing: Standing,
        on_status: Callable[[Message], None] | None,
        on_error: Callable[[FrelayError], None] | None,
    ) -> None:
        self._standing: Final = standing
        self._on_status: Final = on_status
        self._on_error: Final = on_error
        self._changed: Final = threading.Condition()
        """Held for all that follows, and for the calls of ``standing``."""
        self._ready: Final[deque[tuple[Leg, Wire]]] = deque()
        self._shells: Final[dict[Leg, Shell]] = {}
        self._threads: Final[set[threading.Thread]] = set()
        self._error: BaseException | None = None
        """Why the listener has ended."""
        self._is_closed = False
        keeper = threading.Thread(target=self._keep_legs_waiting, name="frelay listener", daemon=True)
        self._threads.add(keeper)
        keeper.start()

    # --- for the program -------------------------------------------------------------------------------------------

    def accept(self, timeout: float | None = None) -> Wire:
        """The wire to the next caller; the program closes it.

        Raises TimeoutError after ``timeout`` seconds without a caller, ListenerClosed after :meth:`close`, and the
        error that has ended the listener once all wires are given out.
        """
        with self._changed:
            if not self._changed.wait_for(self._can_answer, timeout):
                raise TimeoutError(f"no caller came within {timeout:g} s")
            if self._is_closed:
                raise ListenerClosed("this listener is closed")
            if not self._ready:
                if self._error is None:
                    raise AssertionError("nothing is there to be accepted")
                raise self._error
            leg, wire = self._ready.popleft()
            self._standing.accepted(leg)
            self._standing.released(leg)
            self._changed.notify_all()
            return wire

    def close(self) -> None:
        """Give up all legs, and cut the wires that nobody has accepted; wakes those who wait in :meth:`accept`."""
        with self._changed:
            self._is_closed = True
            unaccepted = [wire for _, wire in self._ready]
            self._ready.clear()
            self._changed.notify_all()
        for wire in unaccepted:
            wire.abandon()
        deadline = time.monotonic() + _CLOSE_LIMIT
        while time.monotonic() < deadline:
            with self._changed:
                shells, threads = list(self._shells.values()), self._threads - {threading.current_thread()}
            if not threads:
                return
            for shell in shells:
                shell.interrupt()
            threads.pop().join(_INTERRUPT_AGAIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Wire:
        """The wire to the next caller; the iteration ends when the listener is closed."""
        try:
            return self.accept()
        except ListenerClosed:
            raise StopIteration from None

    def _can_answer(self) -> bool:
        has_ended = self._error is not None and not self._standing.in_handshake
        return bool(self._ready) or self._is_closed or has_ended

    # --- the threads -----------------------------------------------------------------------------------------------

    def _keep_legs_waiting(self) -> None:
        try:
            while (action := self._next_action()) is not None:
                if isinstance(action, Tell) and self._on_error is not None:
                    self._on_error(action.error)
        except BaseException as error:
            self._end(error)
        finally:
            self._forget_thread()

    def _next_action(self) -> Action | None:
        """Do what does not call the program; None when the listener is over."""
        with self._changed:
            if self._is_closed or self._error is not None:
                return None
            action = self._standing.next()
            match action:
                case Start(leg):
                    self._start(leg)
                case GiveUp(leg):
                    self._shells[leg].interrupt()
                case Wait(seconds):
                    self._changed.wait(seconds)
                case End(error):
                    self._end(error)
        return action

    def _start(self, leg: Leg) -> None:
        shell = self._shells[leg] = Shell()
        thread = threading.Thread(target=self._run, args=(leg, shell), name="frelay leg", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            self._threads.discard(thread)
            del self._shells[leg]
            self._standing.failed(leg, RelayUnreachable(f"no thread could be started to join: {error}"))

    def _end(self, error: BaseException) -> None:
        """No further join helps, or the program's own function has raised ``error``."""
        with self._changed:
            self._error = self._error or error
            for leg in self._standing.unpaired:
                self._shells[leg].interrupt()
            self._changed.notify_all()

    def _run(self, leg: Leg, shell: Shell) -> None:
        """One leg, from JOIN until its wire is ready."""
        joining = Joining(leg.plan, time.monotonic, inner_tls_on_socket=True)
        wire: Wire | None = None
        failure: BaseException | None = None
        try:
            drive(joining.steps(), shell.perform, lambda message: self._status(leg, message))
            wire = shell.take_wire()
        except BaseException as error:
            failure = error
        finally:
            shell.close(joining)
        with self._changed:
            del self._shells[leg]
            if wire is not None and not self._is_closed:
                self._ready.append((leg, wire))
                wire = None
                self._standing.joined(leg)
            elif isinstance(failure, FrelayError) and not self._is_closed:
                self._standing.failed(leg, failure)
            else:
                self._standing.gone(leg)
                if failure is not None and not isinstance(failure, FrelayError | Interrupted):
                    self._end(failure)
            self._changed.notify_all()
        if wire is not None:
            wire.abandon()
        self._forget_thread()

    def _status(self, leg: Leg, message: Message) -> None:
        with self._changed:
            self._standing.status(leg, message)
            self._changed.notify_all()
        if self._on_status is not None:
            self._on_status(message)

    def _forget_thread(self) -> None:
        with self._changed:
            self._threads.discard(threading.current_thread())
