"""Strangers: connections that have not shown their identity yet. Limits their number, and evicts some for others.

A stranger costs two things, and each has a limit of its own:

* A *descriptor*, from ``accept`` on. All strangers share one pool, apart from the descriptors of admitted legs
  (:mod:`frelay.net.slots` says how large it is). While the pool has room, a stranger may stay silent. When it is full,
  a new connection evicts one of the address that has the most strangers.
* A *handshake*: OpenSSL's state, some 50 KiB, and processor time. At most ``max_pre_auth`` handshakes run at once, and
  ``max_pre_auth_per_ip`` of one address. Each needs a *turn*, which a stranger requests when its first bytes are
  complete. So strangers that are silent, or send a ClientHello byte by byte, hold nothing that a function needs. While
  an address has all its turns, its other connections are *held back*: they stay connected and are served later.

The next turn goes to the address with the fewest running handshakes, and addresses with equally many take turns. So an
address with 1,000 callers delays its own callers only.

At most :data:`_TURNS_PER_PASS` turns are given in one pass of the event loop. So a flood of callers that disconnect and
come again delays neither the connections that are in nor the next turn of another address.

A handshake that waits for its peer could hold its turn until handshake_timeout. So while all turns are taken, a
handshake without progress for :data:`_STALL_TIMEOUT` loses its turn to a stranger of an address with fewer handshakes,
and after :data:`_LONG_STALL_TIMEOUT` to any stranger. A function behind 300 ms of network, or on a small share of a
processor, answers sooner. While turns are free no handshake loses its turn.

An address here is an IPv4 address or an IPv6 /64 network (:func:`~frelay.net.shares.holder_at`), because one IPv6 host
may use 2^64 addresses.

Nothing here does I/O. Each step costs O(1), or O(``max_pre_auth_per_ip``) when it gives a turn.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import trio

from frelay.config.model import Limits
from frelay.net.shares import Shares, holder_at

__all__ = ["Stage", "Stranger", "Strangers"]

# Seconds without progress after which a handshake may lose its turn: to an address with fewer handshakes, and to any
# address. A round trip by satellite takes 0.6 s, and a lost segment costs 1 s more.
_STALL_TIMEOUT: Final = 1.0
_LONG_STALL_TIMEOUT: Final = 2.0
# Seconds in which a new stranger is not evicted for another one of its own address: it is about to send.
_GRACE: Final = 0.25
# Turns given in one pass of the event loop. Each blocks it for about a millisecond, for the relay's signature, and all
# pairings wait meanwhile.
_TURNS_PER_PASS: Final = 8
# Seconds between two checks of the timeouts above, while a stranger is held back.
_POLL_INTERVAL: Final = 0.1

_LOST_PLACE: Final = "gave its place to another connection: all places for strangers are taken"
_LOST_TURN: Final = "gave its handshake's place to another connection: it made no progress (limits.max_pre_auth)"
_LOST_TURN_TO_OWN: Final = (
    "gave its handshake's place to another connection of its address: it made no progress (limits.max_pre_auth_per_ip)"
)
_NO_PLACE: Final = "all places for strangers are taken, and no address has more of them than this one"


class Stage(enum.Enum):
    """How far a stranger has come."""

    QUIET = enum.auto()
    """Its first bytes are not complete."""
    HELD = enum.auto()
    """Its first bytes are complete, and it waits for its turn."""
    RUNNING = enum.auto()
    """It has its turn: handshake and JOIN."""
    LEAVING = enum.auto()
    """It was refused, and its close lingers."""
    GONE = enum.auto()
    """It is admitted or closed, and so no stranger any more."""


class Stranger:
    """One connection until it is admitted or closed."""

    __slots__ = ("_close", "_wake", "evicted_because", "holder", "since", "stage")

    def __init__(self, holder: str, close: Callable[[], object], now: float) -> None:
        self._close: Final = close
        self._wake: Callable[[], object] | None = None
        self.holder = holder
        self.since = now
        """When it last made progress."""
        self.stage = Stage.QUIET
        self.evicted_because: str | None = None
        """Why it was disconnected to make room for another one; None if it was not."""


_Row = OrderedDict[Stranger, None]


class Strangers:
    """All strangers of one relay. Run :meth:`run` in a task. ``room()`` is how many there may be now."""

    def __init__(self, limits: Limits, *, room: Callable[[], int], clock: Callable[[], float]) -> None:
        self._limits = limits
        self._room: Final = room
        self._clock: Final = clock
        self._all: Final[Shares[str, Stranger]] = Shares()
        self._running: Final[Shares[str, Stranger]] = Shares()
        """Strangers with a turn. The oldest of a holder is the one without progress for the longest time."""
        self._idle: Final[dict[str, _Row]] = {}
        """Strangers that have not requested a turn, or were refused, by holder: the first of them is evicted first."""
        self._held_back: Final[dict[str, _Row]] = {}
        """Strangers that wait for their turn, by holder, oldest first."""
        self._queues: Final[dict[int, OrderedDict[str, None]]] = {}
        """The holders in ``_held_back``, by how many running handshakes they have."""
        self._queue_of: Final[dict[str, int]] = {}
        """The key of ``_queues`` under which a holder stands."""
        self._given = 0
        """Turns given in this pass of the event loop."""
        self._something_to_do = trio.Event()

    def __len__(self) -> int:
        """How many strangers there are."""
        return len(self._all)

    @property
    def running(self) -> int:
        """How many have a turn."""
        return len(self._running)

    @property
    def held(self) -> int:
        """How many wait for a turn."""
        return sum(map(len, self._held_back.values()))

    @property
    def holders(self) -> int:
        """How many addresses they come from."""
        return self._all.holders()

    def set_limits(self, limits: Limits) -> None:
        """Put new limits in force; strangers that have a turn keep it."""
        self._limits = limits
        self._give_turns()

    async def run(self) -> None:
        """Give turns when a timeout frees them, and those that were too many for one pass, until cancelled."""
        while True:
            await self._something_to_do.wait()
            while self._held_back or self._given:
                await trio.sleep(0 if self._given else _POLL_INTERVAL)
                self._given = 0
                self._give_turns()
            self._something_to_do = trio.Event()

    # --- the pool ----------------------------------------------------------------------------------------------

    def enter(self, host: str, close: Callable[[], object]) -> Stranger | str:
        """Enter the accepted connection from ``host``; ``close`` disconnects it. Returns a text if there is no room."""
        holder = holder_at(host)
        if len(self._all) >= self._room() and not self._make_room(holder):
            return _NO_PLACE
        self._give_turns()  # The evicted stranger may have had a turn.
        stranger = Stranger(holder, close, self._clock())
        self._all.add(holder, stranger)
        self._idle.setdefault(holder, OrderedDict())[stranger] = None
        return stranger

    def move_to_host(self, stranger: Stranger, host: str) -> None:
        """Count it as a connection from ``host``, as a PROXY header says; only while it is QUIET."""
        self._remove(stranger)
        stranger.holder = holder_at(host)
        stranger.since = self._clock()
        self._all.add(stranger.holder, stranger)
        self._idle.setdefault(stranger.holder, OrderedDict())[stranger] = None

    def evict_excess(self) -> None:
        """Evict strangers until there is room for the rest, because legs have taken some of it."""
        while len(self._all) > self._room():
            victim = self._least_needed(self._all.greediest())
            if victim is None:
                break
            self._evict(victim, _LOST_PLACE)
        self._give_turns()

    def note_refused(self, stranger: Stranger) -> None:
        """It was refused: it loses its turn and is evicted before the others."""
        if stranger.stage in (Stage.LEAVING, Stage.GONE):
            return
        holder = stranger.holder
        self._remove(stranger)
        self._all.add(holder, stranger)
        stranger.stage = Stage.LEAVING
        row = self._idle.setdefault(holder, OrderedDict())
        row[stranger] = None
        row.move_to_end(stranger, last=False)
        self._give_turns()

    def release(self, stranger: Stranger) -> None:
        """It is admitted or closed, and so no stranger any more. Idempotent."""
        if stranger.stage is Stage.GONE:
            return
        had_turn = stranger.stage is Stage.RUNNING
        self._remove(stranger)
        stranger.stage = Stage.GONE
        if had_turn:
            self._give_turns()

    def _make_room(self, holder: str) -> bool:
        """Evict a stranger for a new one of ``holder``; returns whether that was possible."""
        if not self._all.most:
            return False
        is_own = self._all.held(holder) >= self._all.most
        victim = self._least_needed(holder if is_own else self._all.greediest())
        if victim is None:
            return False
        if is_own and victim.stage is not Stage.LEAVING:
            timeout = _GRACE if victim.stage is Stage.QUIET else _LONG_STALL_TIMEOUT
            if victim.stage is Stage.HELD or self._clock() - victim.since < timeout:
                return False
        self._evict(victim, _LOST_PLACE)
        return True

    def _least_needed(self, holder: str) -> Stranger | None:
        """The stranger of ``holder`` to evict first, if any: refused, silent, stalled handshake, newest held back."""
        if row := self._idle.get(holder):
            return next(iter(row))
        if self._running.held(holder):
            oldest = self._running.oldest(holder)
            if self._clock() - oldest.since >= _STALL_TIMEOUT:
                return oldest
        if row := self._held_back.get(holder):
            return next(reversed(row))
        return None

    def _evict(self, victim: Stranger, why: str) -> None:
        self._remove(victim)
        if victim.stage is not Stage.LEAVING:
            victim.evicted_because = why
        victim.stage = Stage.GONE
        victim._close()

    def _remove(self, stranger: Stranger) -> None:
        holder = stranger.holder
        self._all.remove(holder, stranger)
        if stranger.stage is Stage.RUNNING:
            self._running.remove(holder, stranger)
            self._requeue(holder)
        elif stranger.stage is Stage.HELD:
            self._drop(self._held_back, stranger)
            self._requeue(holder)
        else:
            self._drop(self._idle, stranger)

    @staticmethod
    def _drop(rows: dict[str, _Row], stranger: Stranger) -> None:
        row = rows[stranger.holder]
        del row[stranger]
        if not row:
            del rows[stranger.holder]

    # --- turns -------------------------------------------------------------------------------------------------

    def request_turn(self, stranger: Stranger, wake: Callable[[], object]) -> bool:
        """Request a turn, because the first bytes are complete; returns whether it has the turn now.

        If not, ``wake`` is called when it has. An evicted stranger never gets its turn.
        """
        if stranger.stage is Stage.GONE:
            return False
        self._drop(self._idle, stranger)
        stranger.stage = Stage.HELD
        self._held_back.setdefault(stranger.holder, OrderedDict())[stranger] = None
        self._requeue(stranger.holder)
        self._give_turns()
        if Stage(stranger.stage) is Stage.RUNNING:
            return True
        stranger._wake = wake
        self._something_to_do.set()
        return False

    def note_progress(self, stranger: Stranger) -> None:
        """The peer of a running handshake has made progress."""
        if stranger.stage is Stage.RUNNING:
            self._running.remove(stranger.holder, stranger)
            self._running.add(stranger.holder, stranger)
            stranger.since = self._clock()

    def _give_turns(self) -> None:
        limits = self._limits
        while (
            self._given < _TURNS_PER_PASS
            and self._queues
            and (fewest := min(self._queues)) < limits.max_pre_auth_per_ip
        ):
            if len(self._running) >= limits.max_pre_auth and not self._free_turn(fewest):
                break
            self._give_turn(next(iter(self._queues[min(self._queues)])))
        full = [count for count in self._queues if count >= limits.max_pre_auth_per_ip]
        for holder in [holder for count in full for holder in self._queues[count]]:
            # After a reload lowered a limit, more handshakes than it allows may still run; then give no further turn.
            if len(self._running) > limits.max_pre_auth or self._running.held(holder) > limits.max_pre_auth_per_ip:
                continue
            oldest = self._running.oldest(holder)
            if self._clock() - oldest.since >= _LONG_STALL_TIMEOUT:
                self._evict(oldest, _LOST_TURN_TO_OWN)
                self._give_turn(holder)

    def _free_turn(self, fewest: int) -> bool:
        """Evict a stalled handshake for a holder that has ``fewest`` running; returns whether there was one."""
        if len(self._running) > self._limits.max_pre_auth:
            return False
        oldest = self._running.oldest(self._running.greediest())
        timeout = _STALL_TIMEOUT if self._running.most > fewest + 1 else _LONG_STALL_TIMEOUT
        if self._clock() - oldest.since < timeout:
            return False
        self._evict(oldest, _LOST_TURN)
        return True

    def _give_turn(self, holder: str) -> None:
        self._given += 1
        self._something_to_do.set()
        stranger = next(iter(self._held_back[holder]))
        self._drop(self._held_back, stranger)
        stranger.stage, stranger.since = Stage.RUNNING, self._clock()
        self._running.add(holder, stranger)
        self._requeue(holder)
        if stranger._wake is not None:
            stranger._wake()

    def _requeue(self, holder: str) -> None:
        """Put ``holder`` into the queue where it belongs, at the end of it if it was in another one."""
        before = self._queue_of.get(holder)
        if holder in self._held_back and before == self._running.held(holder):
            return
        if before is not None:
            del self._queue_of[holder]
            equals = self._queues[before]
            del equals[holder]
            if not equals:
                del self._queues[before]
        if holder in self._held_back:
            now = self._queue_of[holder] = self._running.held(holder)
            self._queues.setdefault(now, OrderedDict())[holder] = None
