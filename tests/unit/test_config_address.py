"""Each address and network has one meaning, or is refused with a message that says how to write it."""

from __future__ import annotations

import pytest

from frelay.config.address import Address, parse_address, parse_listen, parse_network


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("127.0.0.1:9001", "127.0.0.1", 9001, "127.0.0.1:9001"),
        ("0.0.0.0:0", "0.0.0.0", 0, "0.0.0.0:0"),
        ("[::1]:9001", "::1", 9001, "[::1]:9001"),
        ("[0:0:0::1]:9001", "::1", 9001, "[::1]:9001"),
        ("[::]:65535", "::", 65535, "[::]:65535"),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1, "[fe80::1%eth0]:1"),
        ("localhost:9001", "localhost", 9001, "localhost:9001"),
        ("Gateway.Acme:5432", "gateway.acme", 5432, "gateway.acme:5432"),
        ("db.svc.cluster.local.:5432", "db.svc.cluster.local.", 5432, "db.svc.cluster.local.:5432"),
        ("my_service:80", "my_service", 80, "my_service:80"),
    ],
)
def test_an_address_is_read_and_shown(text: str, host: str, port: int, shown: str) -> None:
    address = parse_address(text)
    assert (address.host, address.port, str(address)) == (host, port, shown)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (":9001", "0.0.0.0:9001"),
        ("*:9001", "[::]:9001"),
        ("::1:9001", "in brackets"),
        ("::", "in brackets"),
        ("127.0.0.1", "HOST:PORT"),
        ("", "HOST:PORT"),
        ("9001", "HOST:PORT"),
        ("127.0.0.1:http", "HOST:PORT"),
        ("127.0.0.1:-1", "HOST:PORT"),
        ("127.0.0.1:+1", "HOST:PORT"),
        ("127.0.0.1: 1", "HOST:PORT"),
        ("127.0.0.1:1\n", "HOST:PORT"),
        ("127.0.0.1:\u0661", "HOST:PORT"),
        ("127.0.0.1:65536", "at most 65535"),
        ("127.1:1", "not an IPv4 address"),
        ("0x7f.0.0.0x1:1", "not an IPv4 address"),
        ("010.0.0.1:1", "not an IPv4 address"),
        ("256.0.0.1:1", "not an IPv4 address"),
        ("2130706433:1", "not an IPv4 address"),
        ("[127.0.0.1]:1", "not an IPv6 address"),
        ("[::1%]:1", "not an IPv6 address"),
        ("[::1%a b]:1", "network interface"),
        ("a..b:1", "neither an IP address nor a host name"),
        ("-a:1", "neither an IP address nor a host name"),
        ("b\u00fccher.example:1", "neither an IP address nor a host name"),
        ("user@host:1", "neither an IP address nor a host name"),
        (f"{'a' * 64}:1", "neither an IP address nor a host name"),
        (f"{'a.' * 127}a:1", "neither an IP address nor a host name"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_with_a_remedy(text: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_address(text)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "overlaps"),
    [
        ("127.0.0.1:1", "127.0.0.1:1", True),
        ("127.0.0.1:1", "127.0.0.1:2", False),
        ("127.0.0.1:1", "127.0.0.2:1", False),
        ("0.0.0.0:1", "127.0.0.1:1", True),
        ("0.0.0.0:1", "[::]:1", False),
        ("0.0.0.0:1", "[::1]:1", False),
        ("[::]:1", "[::1]:1", True),
        ("0.0.0.0:0", "0.0.0.0:0", False),
        ("localhost:1", "127.0.0.1:1", True),
        ("localhost:1", "[::1]:1", True),
        ("localhost:1", "127.0.0.2:1", False),
        ("relay.acme:1", "0.0.0.0:1", True),
        ("relay.acme:1", "10.0.0.1:1", False),
        ("relay.acme:1", "other.acme:1", False),
    ],
)
def test_addresses_overlap_where_the_kernel_could_not_bind_both(one: str, other: str, overlaps: bool) -> None:
    assert parse_address(one).overlaps(parse_address(other)) is overlaps
    assert parse_address(other).overlaps(parse_address(one)) is overlaps
    if overlaps and one != other:
        assert parse_address(one).is_wide or parse_address(other).is_wide


def test_addresses_are_keys() -> None:
    assert {Address("::1", 1): "a"}[parse_address("[0::1]:1")] == "a"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("10.0.0.0/8", "10.0.0.0/8"), ("10.1.2.3", "10.1.2.3/32"), ("fd00::/8", "fd00::/8"), ("::1", "::1/128")],
)
def test_a_network_is_read(text: str, shown: str) -> None:
    assert str(parse_network(text)) == shown


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("10.0.0.1/8", "write 10.0.0.0/8 if you mean the whole network"),
        ("10.0.0.0/0.0.0.255", "ADDRESS/BITS"),
        ("10.0.0.0/33", "ADDRESS/BITS"),
        ("10.0.0.0/", "ADDRESS/BITS"),
        ("10.0/8", "ADDRESS/BITS"),
        ("localhost", "ADDRESS/BITS"),
        ("fe80::%eth0/64", "ADDRESS/BITS"),
        ("", "ADDRESS/BITS"),
    ],
)
def test_a_network_that_says_more_than_it_shows_is_refused(text: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_network(text)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Relay.Acme.:1", "relay.acme:1"),
        ("relay.acme:1", "relay.acme:1"),
        ("LOCALHOST.:1", "localhost:1"),
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("[::]:1", "[::]:1"),
    ],
)
def test_a_place_to_listen_is_one_with_and_without_a_dot_at_its_end(text: str, shown: str) -> None:
    assert str(parse_listen(text)) == shown


def test_localhost_is_localhost_wherever_it_stands() -> None:
    """No resolver is asked for ``localhost``; for any other name the dot may matter to a resolver."""
    assert parse_address("localhost.:1") == Address("localhost", 1)
