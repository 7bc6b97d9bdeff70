"""Which proxy is used follows curl and Go; and the secrets in its URL stay in it."""

from __future__ import annotations

import pytest

from frelay.client.proxy import Proxy, choose_proxy, parse_proxy


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
