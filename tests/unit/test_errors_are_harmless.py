"""The text of an error is safe to print, although a peer, a proxy or a relay may have written a part of it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import frelay
from frelay.client.trio.wire import _StreamRefused
from frelay.client.wire import _WireRefused
from frelay.errors import ConfigError, Problem

# Characters that standards, terminals or log readers do not treat as plain text.
STEERING = {
    "escape sequence": "\x1b[2J\x1b]0;owned\x07",
    "8-bit escape sequence": "\x9b2J",
    "line": "one\ntwo\rthree",
    "line separator": "one\u2028two\u2029three\x85four",
    "bidirectional override": "\u202egnp.exe\u2066\u2069\u061c",
    "nothing to see": "\u200b\ufeff\u00ad\0",
    "lone surrogate": "\udcff",
    "tag": "\U000e0041",
}
ERRORS = (
    frelay.RelayUnreachable,
    frelay.HandOffFailed,
    frelay.CertificateError,
    frelay.CertificateRefused,
    frelay.RemoteProtocolError,
    _WireRefused,
    _StreamRefused,
    lambda text: frelay.Refused(text, text),
    lambda text: frelay.PeerIdentityMismatch("dns:func2.demo", [text]),
)


@pytest.mark.parametrize("make", ERRORS)
@pytest.mark.parametrize("what", STEERING)
def test_no_text_of_an_error_steers_a_terminal(make: type[frelay.FrelayError], what: str) -> None:
    error = make(f"before {STEERING[what]} behind")
    assert str(error).isprintable()
    assert "before " in str(error)
    assert " behind" in str(error)


@pytest.mark.parametrize("make", ERRORS)
@given(st.text())
def test_whatever_the_text(make: type[frelay.FrelayError], text: str) -> None:
    error = make(text)
    assert str(error).isprintable()  # hence no surrogate, which could not be written either
    for value in (getattr(error, "code", ""), getattr(error, "reason", None) or "", *getattr(error, "found", ())):
        assert value.isprintable()


def test_other_letters_than_ascii_stay_as_they_are() -> None:
    assert str(frelay.RelayUnreachable("größer als 東京 \U0001f600")) == "größer als 東京 \U0001f600"


@pytest.mark.parametrize("make", ERRORS)
def test_its_length_is_bounded(make: type[frelay.FrelayError]) -> None:
    assert len(str(make("x" * 1_000_000))) < 10_000
    assert len(str(make("\0" * 1_000_000))) < 10_000


def test_of_thousands_of_names_a_few_are_shown() -> None:
    error = frelay.PeerIdentityMismatch("dns:func2.demo", [f"dns:n{number}.demo" for number in range(3500)])
    assert "dns:n7.demo and 3492 more, where dns:func2.demo was expected" in str(error)
    assert len(error.found) == 3500


def test_a_problem_keeps_its_line() -> None:
    """frelay itself writes these texts, one line for each problem."""
    error = ConfigError([Problem(Path("a.toml"), "one"), Problem(Path("b.toml"), "two")])
    assert str(error) == "a.toml: one\nb.toml: two"


@pytest.mark.parametrize(
    "error",
    [
        frelay.Refused("queue-full", "try later", 5.0),
        frelay.PeerIdentityMismatch("dns:a", ["dns:b", "dns:c"]),
        frelay.CertificateRefused("why"),
        _WireRefused("why"),
    ],
)
def test_it_comes_back_from_another_process(error: frelay.FrelayError) -> None:
    """A pool of processes pickles the errors of its workers, and breaks if that fails."""
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
