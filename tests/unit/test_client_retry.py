"""A retry comes only if it can help, not before the relay allows it, and not at one moment with a thousand others."""

from __future__ import annotations

import pytest

from frelay.client.retry import NoRelay, Retry, read_retry
from frelay.errors import (
    FrelayError,
    HandOffFailed,
    PeerGone,
    PeerIdentityMismatch,
    Refused,
    RelayUnreachable,
)


@pytest.mark.parametrize(
    "error", [RelayUnreachable("x"), HandOffFailed("x"), PeerGone("x"), Refused("wait-timeout", "x", 0.0)]
)
def test_what_may_pass_is_tried_again(error: FrelayError) -> None:
    assert Retry().pause_after(error, 0, 0) is not None


@pytest.mark.parametrize(
    "error", [NoRelay("x"), PeerIdentityMismatch("dns:a", []), Refused("not-authorised", "x", None)]
)
def test_what_will_not_pass_is_not(error: FrelayError) -> None:
    assert Retry().pause_after(error, 0, 0) is None


def test_the_pause_grows_to_its_limit_and_varies() -> None:
    retry = Retry(first=1.0, longest=8.0)
    for failures, ceiling in ((0, 1.0), (1, 2.0), (3, 8.0), (10, 8.0), (10_000, 8.0)):
        pauses = [retry.pause_after(RelayUnreachable("x"), 0, failures) or 0.0 for _ in range(200)]
        assert all(ceiling / 2 <= pause <= ceiling for pause in pauses)
        assert max(pauses) - min(pauses) > ceiling / 8


def test_the_relays_wish_is_a_minimum() -> None:
    assert (Retry().pause_after(Refused("queue-full", "x", 60.0), 0, 0) or 0) > 60.0


def test_a_number_of_tries_is_kept() -> None:
    error = RelayUnreachable("x")
    assert [Retry(tries=2).pause_after(error, tries, 0) is not None for tries in (0, 1, 2)] == [True, True, False]
    assert Retry(tries=0).pause_after(error, 0, 0) is None


def test_the_argument_may_be_short() -> None:
    assert read_retry(None) is None
    assert read_retry(False) is None
    assert read_retry(True) == Retry()
    assert read_retry(5) == Retry(tries=5)
    assert read_retry(Retry(first=2.0)) == Retry(first=2.0)


@pytest.mark.parametrize(("tries", "first", "longest"), [(-1, 0.5, 30.0), (None, 0.0, 30.0), (None, 60.0, 30.0)])
def test_nonsense_is_refused(tries: int | None, first: float, longest: float) -> None:
    with pytest.raises(ValueError, match="retry"):
        Retry(tries, first, longest)
