"""Which strangers get a turn, which are held back, and which are evicted for others."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from frelay.config.model import Limits
from frelay.net.slots import Admission
from frelay.net.strangers import Stage, Stranger, Strangers


class Yard:
    """Strangers, and a clock that only the test moves."""

    def __init__(self, *, room: int = 1000, **limits: Any) -> None:
        self.now = 0.0
        self.room = room
        self.strangers = Strangers(Limits(**limits), room=lambda: self.room, clock=lambda: self.now)
        self.cut: list[Stranger] = []

    def come(self, host: str) -> Stranger:
        found = self.strangers.enter(host, lambda: self.cut.append(found))  # type: ignore[arg-type]
        assert isinstance(found, Stranger), found
        return found

    def ask(self, host: str) -> Stranger:
        stranger = self.come(host)
        self.strangers.request_turn(stranger, lambda: None)
        return stranger

    def next_pass(self) -> None:
        """Does what the task of the strangers does in each pass of the event loop."""
        self.strangers._given = 0
        self.strangers._give_turns()

    def stages(self, strangers: list[Stranger]) -> list[Stage]:
        return [stranger.stage for stranger in strangers]


def test_the_quiet_have_no_turn() -> None:
    yard = Yard(max_pre_auth=1)
    for _ in range(10):
        yard.come("10.0.0.1")
    assert yard.ask("10.0.0.1").stage is Stage.RUNNING
    assert (len(yard.strangers), yard.strangers.running) == (11, 1)


def test_an_address_has_its_turns_in_the_order_of_coming() -> None:
    yard = Yard(max_pre_auth_per_ip=2)
    callers = [yard.ask("10.0.0.1") for _ in range(5)]
    assert yard.stages(callers) == [Stage.RUNNING] * 2 + [Stage.HELD] * 3
    yard.strangers.release(callers[1])
    assert yard.stages(callers[2:]) == [Stage.RUNNING, Stage.HELD, Stage.HELD]
    assert not yard.cut


def test_who_has_none_comes_before_who_has_many() -> None:
    """A thousand callers of one address delay only callers of that address."""
    yard = Yard(max_pre_auth=4, max_pre_auth_per_ip=4)
    crowd = [yard.ask("10.0.0.1") for _ in range(1000)]
    other = yard.ask("10.0.0.2")
    assert yard.stages([other]) == [Stage.HELD]
    yard.strangers.release(crowd[0])
    assert yard.stages([other, crowd[4]]) == [Stage.RUNNING, Stage.HELD]


def test_equals_take_turns() -> None:
    yard = Yard(max_pre_auth=1)
    first = yard.ask("10.0.0.9")
    callers = [yard.ask(f"10.0.0.{number}") for _ in range(2) for number in (1, 2, 3)]
    order: list[str] = []
    while len(order) < len(callers):
        yard.next_pass()
        yard.strangers.release(first)
        (first,) = [one for one in callers if one.stage is Stage.RUNNING]
        order.append(first.holder)
    assert order == [f"address 10.0.0.{number}" for _ in range(2) for number in (1, 2, 3)]


def test_turns_are_given_in_portions() -> None:
    """A handshake blocks the event loop for a millisecond, and no task must wait for hundreds of them."""
    yard = Yard()
    callers = [yard.ask(f"10.0.{number}.1") for number in range(30)]
    for count in (8, 16, 24, 30):
        assert yard.stages(callers).count(Stage.RUNNING) == count
        yard.next_pass()


def test_a_turn_that_lets_others_wait_goes_to_an_address_with_fewer() -> None:
    yard = Yard(max_pre_auth=3)
    greedy = [yard.ask("10.0.0.1") for _ in range(3)]
    yard.now = 0.9
    yard.strangers.note_progress(greedy[0])
    other = yard.ask("10.0.0.2")
    assert yard.stages([other]) == [Stage.HELD]
    yard.now = 1.0
    yard.next_pass()
    assert yard.cut == [greedy[1]]
    assert greedy[1].evicted_because is not None
    assert yard.stages([other]) == [Stage.RUNNING]


def test_among_equals_and_at_one_address_it_takes_longer() -> None:
    """Longer than a function takes behind 300 ms of network and with a lost segment."""
    for hosts in (("10.0.0.1", "10.0.0.2"), ("10.0.0.1", "10.0.0.1")):
        yard = Yard(max_pre_auth=1)
        one, two = (yard.ask(host) for host in hosts)
        yard.now = 1.9
        yard.next_pass()
        assert (one.stage, two.stage) == (Stage.RUNNING, Stage.HELD)
        yard.now = 2.0
        yard.next_pass()
        assert yard.cut == [one]
        assert two.stage is Stage.RUNNING


def test_with_turns_to_spare_nobody_gives_way() -> None:
    yard = Yard(max_pre_auth=3)
    slow = yard.ask("10.0.0.1")
    yard.now = 100.0
    assert yard.ask("10.0.0.1").stage is Stage.RUNNING
    assert slow.stage is Stage.RUNNING


def test_a_lingering_close_holds_no_turn_and_is_the_first_to_go() -> None:
    yard = Yard(room=3, max_pre_auth=1)
    refused, waiting, quiet = yard.ask("10.0.0.1"), yard.ask("10.0.0.1"), yard.come("10.0.0.1")
    yard.strangers.note_refused(refused)
    assert waiting.stage is Stage.RUNNING
    yard.come("10.0.0.1")
    assert yard.cut == [refused]
    assert refused.evicted_because is None, "it was told already"
    assert quiet.stage is Stage.QUIET


def test_a_full_pool_takes_from_the_address_with_the_most() -> None:
    yard = Yard(room=5)
    many = [yard.come("10.0.0.1") for _ in range(3)]
    few = [yard.come("10.0.0.2") for _ in range(2)]
    other = yard.come("10.0.0.3")
    assert yard.cut == [many[0]]
    assert yard.stages([*many[1:], *few, other]) == [Stage.QUIET] * 5


def test_an_address_that_has_the_most_takes_from_itself() -> None:
    """It loses its longest silent stranger if that had time to send; otherwise the newcomer is refused."""
    yard = Yard(room=3)
    own = [yard.come("10.0.0.1") for _ in range(3)]
    assert isinstance(yard.strangers.enter("10.0.0.1", lambda: None), str)
    assert not yard.cut
    yard.now = 0.3
    yard.come("10.0.0.1")
    assert yard.cut == [own[0]]


@pytest.mark.parametrize(
    ("one", "other", "are_one"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("fe80::1%1", "fe80::2%1", True),
    ],
)
def test_an_address_is_an_ipv4_address_or_an_ipv6_64(one: str, other: str, are_one: bool) -> None:
    yard = Yard(max_pre_auth_per_ip=1)
    yard.ask(one)
    assert (yard.ask(other).stage is Stage.HELD) is are_one


def test_who_was_moved_counts_where_it_comes_from() -> None:
    yard = Yard(max_pre_auth_per_ip=1)
    yard.ask("10.0.0.1")
    behind = yard.come("10.0.0.1")
    yard.strangers.move_to_host(behind, "203.0.113.1")
    assert yard.strangers.request_turn(behind, lambda: None)
    assert yard.strangers.holders == 2


def test_nothing_is_left_of_those_who_went() -> None:
    yard = Yard(room=50, max_pre_auth=3, max_pre_auth_per_ip=2)
    strangers = [yard.come(f"10.0.0.{number % 7}") for number in range(40)]
    for number, stranger in enumerate(strangers):
        if number % 2:
            yard.strangers.request_turn(stranger, lambda: None)
        if number % 5 == 0:
            yard.strangers.note_refused(stranger)
    for stranger in strangers:
        yard.strangers.release(stranger)
        yard.strangers.release(stranger)
        yard.next_pass()
    inner = yard.strangers
    assert (len(inner), inner.running, inner.held, inner.holders) == (0, 0, 0, 0)
    assert [len(left) for left in (inner._idle, inner._held_back, inner._queues, inner._queue_of)] == [0] * 4


async def test_legs_and_strangers_have_their_shares() -> None:
    """Strangers may use what legs leave free and lose it to them, but a quarter is always theirs."""
    admission = Admission(Limits(), descriptor_limit=1000)
    legs, most = admission.leg_budget, admission.stranger_budget
    own = most // 4
    assert 2 * legs + own == most
    cut = 0

    def count() -> None:
        nonlocal cut
        cut += 1

    for number in range(most):
        assert isinstance(admission.strangers.enter(f"10.{number // 256}.{number % 256}.1", count), Stranger)
    admission.admitted = legs
    admission.strangers.evict_excess()
    assert admission.stranger_budget == own
    assert cut == most - own
    assert admission.legs == legs + own


@pytest.mark.load
async def test_the_task_gives_what_only_time_makes_free(autojump_clock: trio.testing.MockClock) -> None:
    strangers = Strangers(Limits(max_pre_auth=1), room=lambda: 9, clock=trio.current_time)
    found = [strangers.enter(host, lambda: None) for host in ("10.0.0.1", "10.0.0.1", "10.0.0.2")]
    turn = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(strangers.run)
        for stranger in found:
            assert isinstance(stranger, Stranger)
            strangers.request_turn(stranger, turn.set)
        began = trio.current_time()
        await turn.wait()
        assert 2 <= trio.current_time() - began < 2.5
        nursery.cancel_scope.cancel()
