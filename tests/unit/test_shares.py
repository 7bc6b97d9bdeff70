"""Shares count like a list of (holder, place) pairs, and the last things of a pool go to holders that have few."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frelay.net.shares import Pool, Shares, holder_at


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.integers(0, 30)), max_size=200))
def test_the_counts_are_those_of_a_plain_list(steps: list[tuple[str, bool, int]]) -> None:
    shares: Shares[str, int] = Shares()
    plain: list[tuple[str, int]] = []
    for number, (holder, takes, which) in enumerate(steps):
        if takes or not plain:
            shares.add(holder, number)
            plain.append((holder, number))
        else:
            gone = plain.pop(which % len(plain))
            shares.remove(*gone)
        counts = Counter(holder for holder, _ in plain)
        assert len(shares) == len(plain)
        assert shares.holders() == len(counts)
        assert shares.most == max(counts.values(), default=0)
        for one in "abcd":
            assert shares.held(one) == counts[one]
            if counts[one]:
                places = [place for held_by, place in plain if held_by == one]
                assert (shares.oldest(one), shares.newest(one)) == (places[0], places[-1])
        if plain:
            assert counts[shares.greediest()] == shares.most


def test_nobody_holds_anything_at_first() -> None:
    shares: Shares[str, int] = Shares()
    assert (len(shares), shares.most, shares.held("a")) == (0, 0, 0)
    for ask in (lambda: shares.greediest(), lambda: shares.newest("a"), lambda: shares.remove("a", 1)):
        with pytest.raises(KeyError):
            ask()


SIZES = st.integers(1, 300)


@given(size=SIZES, part=st.integers(1, 40), least=st.integers(1, 6))
def test_no_holder_takes_a_whole_pool_and_a_newcomer_gets_the_last_place(size: int, part: int, least: int) -> None:
    pool: Pool[int] = Pool(part=part, least=least)
    taken = 0
    while pool.may_take("greedy", size):
        pool.take(taken, ["greedy"])
        taken += 1
    # It takes all that is not kept for others, and at most half of the kept part.
    kept = min(size, max(least, size // part))
    assert size - kept <= taken <= size - kept // 2
    assert taken < size or size == 1
    while not pool.is_full(size):
        assert pool.may_take(f"newcomer {taken}", size), "one is free, and a newcomer did not get it"
        pool.take(taken, [f"newcomer {taken}"])
        taken += 1
    assert not pool.may_take("the next one", size)


def test_who_holds_few_gets_more_of_what_is_kept_than_who_holds_many() -> None:
    """A holder may take one more while it has fewer than are free. With one of 64, it gets four of the last eight."""
    pool: Pool[int] = Pool(part=8, least=1)
    for thing in range(55):
        pool.take(thing, ["many"])
    pool.take(55, ["few"])
    granted = []
    for thing in range(56, 64):
        may = [holder for holder in ("many", "few", f"new {thing}") if pool.may_take(holder, 64)]
        granted.append(may[0])
        pool.take(thing, may[:1])
    assert granted == ["few"] * 4 + [f"new {thing}" for thing in range(60, 64)]


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.sampled_from("abc"), max_size=3)), max_size=60))
def test_what_is_given_back_is_charged_to_nobody(steps: list[tuple[int, list[str]]]) -> None:
    pool: Pool[int] = Pool(part=4, least=1)
    plain: dict[int, set[str]] = {}
    for thing, holders in steps:
        if thing in plain and not holders:
            pool.give_back(thing)
            pool.give_back(thing)
            del plain[thing]
        else:
            pool.take(thing, holders)
            plain[thing] = set(holders)
        assert len(pool) == len(plain)
        for holder in "abc":
            assert pool.held(holder) == sum(holder in charged for charged in plain.values())


@pytest.mark.parametrize(
    ("host", "other", "is_one"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
    ],
)
def test_an_address_stands_for_its_owner(host: str, other: str, is_one: bool) -> None:
    assert (holder_at(host) == holder_at(other)) is is_one
