"""The choice of the proxy follows curl and Go; the secrets in its URL appear nowhere else."""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frelay.client.proxy import Proxy, choose_proxy, connect_through, parse_proxy
from frelay.client.steps import Receive, Send
from frelay.errors import RelayUnreachable


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://proxy.acme:3128", "proxy.acme", 3128),
        ("http://proxy.acme:3128/", "proxy.acme", 3128),
        ("proxy.acme:3128", "proxy.acme", 3128),
        ("http://proxy.acme", "proxy.acme", 8080),
        ("http://[::1]:8888", "::1", 8888),
    ],
)
def test_a_url_is_read(url: str, host: str, port: int) -> None:
    assert parse_proxy(url) == Proxy(host, port)


@pytest.mark.parametrize(
    "url", ["https://me:s3cret@p:1", "socks5://p:1", "http://", "http://me:s3cret@p:99999", "http://me:s3cret@p/x"]
)
def test_what_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="proxy") as caught:
        parse_proxy(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_user_and_password_are_decoded_and_never_shown() -> None:
    proxy = parse_proxy("http://user:p%40ss%3A@proxy.acme:3128")
    assert proxy.authorization == "Basic dXNlcjpwQHNzOg=="
    assert "dXNl" not in f"{proxy!r} {proxy}"
    assert "p@ss" not in f"{proxy!r} {proxy}"


ENVIRONMENT = {"HTTPS_PROXY": "http://proxy.acme:3128"}


@pytest.mark.parametrize(
    ("host", "exceptions", "goes_directly"),
    [
        ("relay.acme", "", False),
        ("relay.acme", "*", True),
        ("relay.acme", "acme", True),
        ("relay.acme", ".acme", True),
        ("relay.acme", "*.acme", True),
        ("RELAY.acme.", "other, relay.ACME", True),
        ("relay.acme", "relay.acme:9001", True),
        ("relay.acme", "relay.acme:9002", False),
        ("relay.acme", "lay.acme", False),
        ("relay.acme", "relay", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.2.0.0/16", False),
        ("fd00::1", "fd00::/8", True),
        ("fd00::1", "[fd00::1]:9001", True),
        ("relay.acme", ",,", False),
        ("localhost", "", True),
        ("127.0.0.2", "", True),
        ("::1", "", True),
    ],
)
def test_no_proxy_excepts_hosts(host: str, exceptions: str, goes_directly: bool) -> None:
    found = choose_proxy(None, host, 9001, {**ENVIRONMENT, "NO_PROXY": exceptions})
    assert (found is None) is goes_directly


def test_an_argument_overrides_the_environment() -> None:
    assert choose_proxy("http://other:1", "127.0.0.1", 9001, ENVIRONMENT) == Proxy("other", 1)
    assert choose_proxy("", "relay.acme", 9001, ENVIRONMENT) is None
    assert choose_proxy(None, "relay.acme", 9001, {"https_proxy": "lower:2"}) == Proxy("lower", 2)
    assert choose_proxy(None, "relay.acme", 9001, {}) is None


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
@pytest.mark.parametrize(
    "url", ["https://me:s3cret@p:1", "socks5h://p:1", "http://p:0", "http://p:port", "http://", "://", "http://a b:1"]
)
def test_an_environment_that_cannot_be_used_is_named(variable: str, url: str) -> None:
    """It is no fault of the call, so it is no ValueError; and no retry would help."""
    with pytest.raises(RelayUnreachable, match=f"environment variable {variable} cannot be used: .*NO_PROXY") as caught:
        choose_proxy(None, "relay.acme", 9001, {variable: url})
    assert "s3cret" not in str(caught.value)
    assert choose_proxy(None, "relay.acme", 9001, {variable: url, "NO_PROXY": "acme"}) is None
    assert choose_proxy("", "relay.acme", 9001, {variable: url}) is None
    with pytest.raises(ValueError, match="proxy"):
        choose_proxy(url, "relay.acme", 9001, {})


@given(st.text(), st.text())
def test_whatever_the_environment_holds(url: str, exceptions: str) -> None:
    with suppress(RelayUnreachable):
        choose_proxy(None, "relay.acme", 9001, {"HTTPS_PROXY": url, "NO_PROXY": exceptions})


def test_a_password_is_any_octets() -> None:
    """%FF is one octet, and so is an octet from the environment that is not UTF-8."""
    for password in ("%FF", os.fsdecode(b"\xff")):
        proxy = parse_proxy(f"http://me:{password}@p:1")
        assert proxy.authorization == "Basic " + base64.b64encode(b"me:\xff").decode()


def asked(says: bytes, chunk: int = 65536, host: str = "relay.acme") -> bytes:
    """What ``connect_through`` sends to a proxy that answers this and closes; raises what it raises."""
    steps: Any = connect_through("outer", Proxy("p", 3128), host, 9001, lambda: 1.0)
    sent = b""
    answer = None
    try:
        while True:
            step = steps.send(answer)
            answer = None
            if isinstance(step, Send):
                sent += step.data
            else:
                assert isinstance(step, Receive)
                answer, says = says[:chunk], says[chunk:]
    except StopIteration:
        return sent


@pytest.mark.parametrize("chunk", [65536, 1, 3])
def test_a_good_answer_in_any_pieces_opens_the_way(chunk: int) -> None:
    assert asked(b"HTTP/1.0 200 OK\r\nVia: 1.1 p\r\n\r\n", chunk).startswith(b"CONNECT relay.acme:9001 HTTP/1.1\r\n")
    assert asked(b"HTTP/1.1 204\r\n\r\n", chunk)


def test_a_name_in_other_letters_is_asked_for_as_dns_has_it() -> None:
    assert b"CONNECT xn--rlay-bpa.acme:9001 " in asked(b"HTTP/1.1 200 OK\r\n\r\n", host="rélay.acme")
    with pytest.raises(RelayUnreachable, match="is not a host name"):
        asked(b"", host="r\u00e9" * 100)


@pytest.mark.parametrize(
    "says",
    [
        b"HTTP/1.1 " + b"9" * 5000 + b" x\r\n\r\n",
        b"HTTP/1.1 20\r\n\r\n",
        b"HTTP/1.1 2\xb2\xb2 OK\r\n\r\n",
        b"HTTP/1.1 -200 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000,
        b"SSH-2.0-OpenSSH\r\n",
    ],
)
def test_what_is_no_http_is_said_to_be_none(says: bytes) -> None:
    with pytest.raises(RelayUnreachable, match="no answer that is HTTP"):
        asked(says)


def test_the_words_of_a_proxy_are_shown_on_one_line_and_not_all() -> None:
    with pytest.raises(RelayUnreachable) as caught:
        asked(b"HTTP/1.1 403 no\x1b[2J\nfrelay: all is well \xff\xe2\x80\xae" + b"x" * 60_000 + b"\r\n\r\n")
    text = str(caught.value)
    assert text.isprintable()
    assert "refused a connection to relay.acme:9001: 403 no" in text
    assert len(text) < 1000


@given(st.one_of(st.binary(), st.binary().map(lambda tail: b"HTTP/1.1 " + tail + b"\r\n\r\n")), st.integers(1, 9))
def test_whatever_a_proxy_says(says: bytes, chunk: int) -> None:
    with suppress(RelayUnreachable):
        asked(says, chunk)
