"""Which bytes the watch counts as not accepted by their receiver."""

from __future__ import annotations

import select

import pytest
import trio

from frelay.net.sockets import close_with_reset
from frelay.net.tcp import is_dead, unacknowledged
from frelay.pairing.pump import Pump
from frelay.pairing.watch import Sample
from support.streams import tcp_pair
from support.waiting import eventually


class Idle:
    """A pump that has nothing to do."""

    moved = 0
    is_blocked = is_held_back = has_finished = False

    async def run(self) -> None:
        await trio.sleep_forever()

    def on_idle(self) -> None:
        pass


@pytest.mark.parametrize("hangs_up", [False, True])
async def test_what_a_party_has_left_untaken_is_pending_until_it_has_gone(hangs_up: bool) -> None:
    """When the party has gone, they are no stall: what it sent before may still be delivered for a long time."""
    sink, far = tcp_pair(8192)
    try:
        while select.select([], [sink], [], 0)[1]:
            sink.send(bytes(65536))
        await eventually(lambda: unacknowledged(sink) > 0)
        pump: Pump = Idle()
        sample = Sample(pump, sink, 0.0)
        if hangs_up:
            close_with_reset(far)
            await eventually(lambda: is_dead(sink))
        for now in (1.0, 2.0, 3.0):
            sample.take(now)
        assert unacknowledged(sink) > 0
        assert (sample.blocked_since is None) == hangs_up
    finally:
        close_with_reset(sink)
        close_with_reset(far)
