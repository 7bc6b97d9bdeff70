"""Which connection of an HTTP server is closed to make room for a new one."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing

from frelay.admin.connections import GRACE, ConnectionSlot, ConnectionSlots, holder_of


@pytest.mark.parametrize(
    ("address", "holder"),
    [
        (("192.0.2.1", 1), "192.0.2.1"),
        (("2001:db8::1", 1, 0, 0), "2001:db8::/64"),
        (("2001:db8::ffff:0:0:1", 2, 0, 0), "2001:db8::/64"),
        (("2001:db8:0:1::1", 2, 0, 0), "2001:db8:0:1::/64"),
        (("::ffff:192.0.2.1", 1, 0, 0), "192.0.2.1"),
        (("fe80::1%lo", 1, 0, 3), "fe80::/64"),
        ("", "unix"),
        (b"", "unix"),
    ],
)
def test_who_holds_a_connection(address: object, holder: str) -> None:
    assert holder_of(address) == holder


class Server:
    """Slots whose connections end when their scope is cancelled."""

    def __init__(self, most: int, nursery: trio.Nursery) -> None:
        self.slots = ConnectionSlots(most)
        self.inside: list[ConnectionSlot] = []
        self._nursery = nursery

    async def enter(self, holder: str, *, is_served: bool = False) -> ConnectionSlot:
        slot = await self.slots.take(holder)
        self.inside.append(slot)
        if is_served:
            slot.our_turn()
        await self._nursery.start(self._stay, slot)
        return slot

    async def _stay(self, slot: ConnectionSlot, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        with slot.scope:
            await trio.sleep_forever()
        self.inside.remove(slot)
        slot.give_back()

    @property
    def holders(self) -> Counter[str]:
        return Counter(slot.holder for slot in self.inside)


async def test_a_newcomer_displaces_the_longest_silent_of_who_has_most(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        server = Server(4, nursery)
        first = await server.enter("a")
        for holder in "aab":
            await trio.sleep(0.001)
            await server.enter(holder)
        await server.enter("c")  # at once, because "a" has two connections more than "c"
        assert server.holders == {"a": 2, "b": 1, "c": 1}
        assert first not in server.inside
        nursery.cancel_scope.cancel()


async def test_who_is_served_is_never_displaced(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        server = Server(3, nursery)
        served = [await server.enter("a", is_served=True) for _ in range(3)]
        with trio.move_on_after(100) as timeout:
            await server.enter("b")
        assert timeout.cancelled_caught
        assert server.inside == served
        assert not server.slots.is_wanted
        nursery.start_soon(server.enter, "b")
        await trio.testing.wait_all_tasks_blocked()
        assert served[1].is_wanted
        served[1].clients_turn()
        await trio.testing.wait_all_tasks_blocked()
        assert server.holders == {"a": 2, "b": 1}
        nursery.cancel_scope.cancel()


@pytest.mark.load
async def test_one_address_cannot_churn_its_own_places(autojump_clock: trio.testing.MockClock) -> None:
    """Each has time for one step, so a client that sends its request is answered in any flood from its address."""
    async with trio.open_nursery() as nursery:
        server = Server(4, nursery)
        for _ in range(4):
            await server.enter("a")
        began = trio.current_time()
        for _ in range(8):
            await server.enter("a")
        assert trio.current_time() - began >= 2 * GRACE
        nursery.cancel_scope.cancel()


async def test_who_has_more_displaces_nobody_who_has_fewer(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        server = Server(4, nursery)
        only = await server.enter("b")
        for _ in range(3):
            await server.enter("a")
        for _ in range(20):
            await server.enter("a")
        assert only in server.inside
        nursery.cancel_scope.cancel()


async def test_bytes_win_no_time_and_steps_do(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        server = Server(2, nursery)
        one, two = await server.enter("a"), await server.enter("a")
        await trio.sleep(GRACE)
        one.clients_turn()  # for example, its handshake is done
        await server.enter("a")
        assert one in server.inside
        assert two not in server.inside
        nursery.cancel_scope.cancel()


async def test_a_place_that_is_given_back_twice_is_one() -> None:
    slots = ConnectionSlots(1)
    slot = await slots.take("a")
    slot.give_back()
    slot.give_back()
    assert len(slots) == 0
    await slots.take("b")
    assert len(slots) == 1
