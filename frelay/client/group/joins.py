"""Joinings of a group, several at once on sockets that do not block. Standard library only.

This is a shell of :mod:`frelay.client.joining`, as those of the three clients are. It serves all three kinds of groups,
because it waits for nothing: :meth:`Join.resume` goes on as far as the kernel lets it.
"""

from __future__ import annotations

import errno
import os
import queue
import socket
import time
from typing import Any, Final

from frelay.client.group.poll import Poll
from frelay.client.joining import Joined, Joining
from frelay.client.options import JoinPlan
from frelay.client.sockets import Connections, look_up_in_thread, numeric
from frelay.client.steps import Close, Connection, Endpoint, Open, Pause, Receive, Resolve, Send, Status, Step
from frelay.errors import FrelayError

__all__ = ["Join", "LookUps"]

_READ: Final = 65536


class LookUps:
    """The look-ups of names, each done once for all joinings, in a thread that nobody waits for."""

    def __init__(self, poll: Poll) -> None:
        self._poll: Final = poll
        self._found: Final[dict[tuple[str, int], list[Endpoint] | OSError | None]] = {}
        self._answers: Final[queue.SimpleQueue[tuple[str, int, list[Endpoint] | OSError]]] = queue.SimpleQueue()
        self._bell: int | None = None
        self._waiting: Final[list[Join]] = []

    def find(self, host: str, port: int, join: Join) -> list[Endpoint]:
        """The endpoints; raises BlockingIOError if ``join`` must wait for them, else OSError."""
        endpoints = numeric(host, port)
        if endpoints is not None:
            return endpoints
        if (host, port) not in self._found:
            self._begin(host, port)
        found = self._found[host, port]
        if found is None:
            self._waiting.append(join)
            raise BlockingIOError
        if isinstance(found, OSError):
            del self._found[host, port]  # the next try asks again
            raise found
        return found

    def _begin(self, host: str, port: int) -> None:
        if self._bell is None:
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._poll.add(self._bell, self)
        self._found[host, port] = None
        # The thread gets a descriptor of its own: it may outlive this group and must not ring another file's number.
        bell, answers = os.dup(self._bell), self._answers

        def done(result: list[Endpoint] | OSError) -> None:
            answers.put((host, port, result))
            os.eventfd_write(bell, 1)
            os.close(bell)

        look_up_in_thread(host, port, done)

    def ready(self, events: int) -> None:
        """See Owner: an answer is there."""
        try:
            while True:
                host, port, result = self._answers.get_nowait()
                self._found[host, port] = result
        except queue.Empty:
            pass
        for join in self._waiting:
            join.ready(events)
        self._waiting.clear()

    def close(self) -> None:
        """Close the bell; answers that still come are dropped."""
        if self._bell is not None:
            os.close(self._bell)
            self._bell = None


class Join:
    """One joining. When it ``is_done``, it has a result in ``joined`` and ``sock``, or an ``error``."""

    def __init__(self, plan: JoinPlan, poll: Poll, look_ups: LookUps, *, pause: float = 0.0) -> None:
        self._poll: Final = poll
        self._look_ups: Final = look_ups
        self._joining: Final = Joining(plan, time.monotonic)
        self._steps: Final = self._joining.steps()
        self._connections: Final = Connections()
        self._step: Step | None = None
        self._unsent = memoryview(b"")
        self.wakes_at = time.monotonic() + pause
        """When :meth:`resume` must be called, also if the kernel reports nothing."""
        self.is_ready = False
        """Whether the kernel has reported something since the last :meth:`resume`."""
        self.is_done = False
        self.joined: Joined | None = None
        self.sock: socket.socket | None = None
        self.error: FrelayError | None = None

    def ready(self, events: int) -> None:
        """See Owner."""
        self.is_ready = True

    def resume(self) -> None:
        """Go on as far as possible without waiting."""
        self.is_ready = False
        if self._step is None and time.monotonic() >= self.wakes_at:
            self._go_on(None, None)
        while self._step is not None:
            answer: Any = None
            failure: OSError | None = None
            try:
                answer = self._attempt(self._step)
            except BlockingIOError:
                if time.monotonic() < self.wakes_at:
                    return
                failure = TimeoutError("timed out")
            except OSError as error:
                failure = error
            self._go_on(answer, failure)

    def _go_on(self, answer: Any, failure: OSError | None) -> None:
        """Get the next step."""
        self._step = None
        try:
            step = self._steps.send(answer) if failure is None else self._steps.throw(failure)
        except StopIteration as done:
            self.joined = done.value
            self.sock = self._connections.take(done.value.connection)
            self._finish()
        except FrelayError as error:
            self.error = error
            self._finish()
        else:
            self._step = step
            self._begin(step)

    def _begin(self, step: Step) -> None:
        seconds = 0.0
        if isinstance(step, Pause):
            seconds = step.seconds
        elif isinstance(step, Resolve | Receive | Send | Open):
            seconds = step.timeout
        if isinstance(step, Send):
            self._unsent = memoryview(step.data)
        if isinstance(step, Open):
            self._forget(step.connection)
            self._connections.add(step.connection, step.endpoint).setblocking(False)
        self.wakes_at = time.monotonic() + seconds

    def _attempt(self, step: Step) -> Any:
        """Perform ``step``; raises BlockingIOError if it must wait, else OSError if it fails."""
        match step:
            case Receive(connection):
                return self._connections.sockets[connection].recv(_READ)
            case Send(connection):
                while self._unsent:
                    self._unsent = self._unsent[self._connections.sockets[connection].send(self._unsent) :]
                return None
            case Open(connection, endpoint):
                return self._connect(connection, endpoint)
            case Resolve(host, port):
                return self._look_ups.find(host, port, self)
            case Close(connection, final_bytes):
                self._forget(connection)
                return self._connections.close(connection, final_bytes)
            case Pause():
                if time.monotonic() < self.wakes_at:
                    raise BlockingIOError
                return None
            case Status():
                return None
            case _:
                raise AssertionError(f"{step} is not for this shell")

    def _connect(self, connection: Connection, endpoint: Endpoint) -> None:
        sock = self._connections.sockets[connection]
        number = sock.connect_ex(endpoint.sockaddr)
        if number in (errno.EINPROGRESS, errno.EALREADY):
            self._poll.add(sock, self)
            raise BlockingIOError
        if number not in (0, errno.EISCONN):
            raise OSError(number, os.strerror(number))
        self._poll.add(sock, self)

    def _forget(self, connection: Connection) -> None:
        sock = self._connections.sockets.get(connection)
        if sock is not None:
            self._poll.remove(sock)

    def _finish(self) -> None:
        self.is_done = True
        for connection in tuple(self._connections.sockets):
            self._forget(connection)
        self._connections.close_all(self._joining.final_bytes)

    def close(self) -> None:
        """Give up; the relay is told that this rank no longer waits."""
        if not self.is_done:
            self._step = None
            self._finish()
            self._steps.close()
        if self.sock is not None:
            self._poll.remove(self.sock)
            self.sock.close()
