"""Shares count like a list of (holder, place) pairs does, and the last places of a pool go to those who hold little."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frelay.shares import Shares


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


@given(size=st.integers(1, 200), greedy=st.integers(1, 400), kept=st.integers(1, 40))
def test_no_holder_takes_a_whole_pool_and_a_newcomer_gets_the_last_place(size: int, greedy: int, kept: int) -> None:
    shares: Shares[str, int] = Shares()

    def take(holder: str, place: int) -> bool:
        free = size - len(shares)
        if free <= 0 or not shares.may_take(holder, free=free, kept=kept):
            return False
        shares.add(holder, place)
        return True

    taken = sum(take("greedy", number) for number in range(greedy))
    if size > 1:
        assert taken < size
    newcomers = 0
    while len(shares) < size:
        assert take(f"newcomer {newcomers}", -1), "a place is free, and a newcomer did not get it"
        newcomers += 1
