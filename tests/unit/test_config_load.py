"""A route file becomes a configuration, or every problem in it is reported with file, key path and line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from frelay.config.document import ARRAYS, SECTIONS
from frelay.config.load import load
from frelay.config.model import (
    Address,
    Addresses,
    Config,
    Dial,
    Limits,
    RelaySection,
    Route,
    RouteLimits,
    TcpSection,
    TlsSection,
)
from frelay.errors import ConfigError, Problem
from frelay.protocol.identity import parse_selector

TLS = """\
[tls]
certificate = "certs/relay.pem"
private_key = "certs/relay.key"
client_ca = "/etc/ssl/ca.pem"
"""
ROUTE = """\
[[route]]
name = "shuffle"
listen = "127.0.0.1:9001"
func1 = ["dns:func1.acme"]
func2 = ["dns:func2.acme"]
"""

Written = Callable[[str], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes ``relay.toml`` and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "relay.toml"
        path.write_text(text)
        return path

    return write


def problems(path: Path) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return list(caught.value.problems)


def only_problem(path: Path) -> Problem:
    found = problems(path)
    assert len(found) == 1, [str(problem) for problem in found]
    return found[0]


def route_of(written: Written, keys: str, before: str = "") -> Route:
    config = load(written(f'{TLS}{before}\n[[route]]\nname = "r"\nlisten = "127.0.0.1:9001"\n{keys}\n'))
    return config.routes_by_name["r"]


BOTH = 'func1 = "dns:a.acme"\nfunc2 = "dns:b.acme"\n'


# --- what is read ------------------------------------------------------------------------------------------------


def test_an_empty_file_is_a_configuration_of_defaults(written: Written) -> None:
    config = load(written(""))
    assert config.routes == ()
    routes_dir = config.path.parent / "routes.d"
    assert config.relay == RelaySection(name="relay-1", routes_dir=routes_dir, drain_timeout=30, workers=1)
    assert config.limits == Limits(
        handshake_timeout=10,
        join_timeout=5,
        handoff_timeout=5,
        wait_timeout=60,
        ping_interval=15,
        pong_timeout=10,
        half_close_timeout=60,
        idle_timeout=3600,
        stall_timeout=120,
        max_lifetime=86400,
        max_pre_auth=256,
        max_pre_auth_per_ip=32,
        max_waiting_per_party=16,
        max_waiting_per_meet=64,
        max_waiting_by_meet=1024,
        max_pairings=1024,
        fd_budget=0.8,
    )
    assert config.tcp == TcpSection(keepalive=(30, 10, 3), user_timeout=120, nodelay=True)
    assert (config.tls, config.admin, config.metrics) == (None, None, None)


def test_sections_that_are_written_have_their_defaults(written: Written, tmp_path: Path) -> None:
    config = load(written("[admin]\n[metrics]\n"))
    assert config.admin is not None
    assert config.admin.listen == f"unix:{tmp_path}/frelay.sock"
    assert config.admin.socket_path == tmp_path / "frelay.sock"
    assert config.admin.address is None
    assert config.admin.allow == ()
    assert config.metrics is not None
    assert config.metrics.listen == Address("127.0.0.1", 9464)


def test_paths_start_from_the_directory_of_the_file(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(f'[relay]\nroutes_dir = "routes.d"\n{TLS}crl = "../crl.pem"\n')
    monkeypatch.chdir(tmp_path)
    config = load(Path("relay.toml"))
    assert config.path == tmp_path / "relay.toml"
    assert config.relay.routes_dir == tmp_path / "routes.d"
    assert config.tls == TlsSection(
        certificate=tmp_path / "certs/relay.pem",
        private_key=tmp_path / "certs/relay.key",
        client_ca=Path("/etc/ssl/ca.pem"),
        crl=tmp_path / "../crl.pem",
    )


def test_a_route_has_its_defaults(written: Written, tmp_path: Path) -> None:
    assert load(written(TLS + ROUTE)).routes == (
        Route(
            name="shuffle",
            listen=Addresses([Address("127.0.0.1", 9001)]),
            func1=(parse_selector("dns:func1.acme"),),
            func2=(parse_selector("dns:func2.acme"),),
            outer="mtls",
            allow_from=(),
            proxy_protocol=(),
            handoff="close-notify",
            require_inner_tls=True,
            hello_settle=0.2,
            ticket_timeout=10,
            limits=RouteLimits(),
            source=tmp_path / "relay.toml",
        ),
    )


def test_a_route_overrides_limits_and_inherits_the_others(written: Written) -> None:
    route = route_of(
        written, f"{BOTH}idle_timeout = 7\nmax_pairings = 3", "[limits]\nwait_timeout = 5\nmax_pairings = 9"
    )
    assert route.limits == RouteLimits(wait_timeout=5, idle_timeout=7, max_pairings=3)


def test_one_selector_needs_no_list_and_groups_are_expanded_once(written: Written) -> None:
    group = '[[group]]\nname = "workers"\nparties = ["uri:spiffe://acme/jobs/*", "dns:w.acme"]\n'
    route = route_of(written, 'func1 = "dns:a.acme"\nfunc2 = ["dns:w.acme", "group:workers", "dns:z.acme"]', group)
    assert [str(selector) for selector in _selectors(route.func1)] == ["dns:a.acme"]
    assert [str(selector) for selector in _selectors(route.func2)] == [
        "dns:w.acme",
        "uri:spiffe://acme/jobs/*",
        "dns:z.acme",
    ]


def _selectors(party: Any) -> tuple[Any, ...]:
    assert isinstance(party, tuple)
    return party


@pytest.mark.parametrize("party", ["func1", "func2"])
def test_one_party_may_be_a_place_to_dial(written: Written, party: str) -> None:
    other = "func2" if party == "func1" else "func1"
    route = route_of(written, f'{party} = {{ dial = "DB.internal:5432" }}\n{other} = "dns:a.acme"')
    assert getattr(route, party) == Dial(Address("db.internal", 5432), 5)


def test_a_service_may_have_its_own_time_to_be_reached(written: Written) -> None:
    route = route_of(written, 'func1 = "dns:a.acme"\nfunc2 = { dial = "db:5432", connect_timeout = 1.5 }')
    assert route.func2 == Dial(Address("db", 5432), 1.5)


def test_a_plain_route_has_networks_and_no_parties(written: Written) -> None:
    config = load(
        written('[[route]]\nname = "r"\nlisten = "[::1]:1"\nouter = "none"\nallow_from = ["10.0.0.0/8", "::1"]\n')
    )
    (route,) = config.routes
    assert (route.outer, route.func1, route.func2) == ("none", (), ())
    assert route.allow_from == (ip_network("10.0.0.0/8"), ip_network("::1/128"))


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ('"always"', "always")])
def test_require_inner_tls_has_three_values(written: Written, text: str, value: object) -> None:
    assert route_of(written, f"{BOTH}require_inner_tls = {text}").require_inner_tls == value


def test_the_hello_handoff_has_its_settling_time(written: Written) -> None:
    route = route_of(written, f'{BOTH}handoff = "hello"\nhello_settle = 1')
    assert (route.handoff, route.hello_settle) == ("hello", 1.0)


def test_routes_share_an_address_if_all_of_them_can_tell_callers_apart(written: Written) -> None:
    second = ROUTE.replace("shuffle", "other")
    assert len(load(written(TLS + ROUTE + second)).routes) == 2


def test_port_0_is_never_shared_and_never_in_the_way(written: Written) -> None:
    plain = '[[route]]\nname = "p"\nlisten = "0.0.0.0:0"\nouter = "none"\nallow_from = ["::1"]\n'
    text = (
        TLS + ROUTE.replace("9001", "0") + plain + plain.replace('"p"', '"q"') + '[metrics]\nlisten = "127.0.0.1:0"\n'
    )
    assert len(load(written(text)).routes) == 3


def test_a_byte_order_mark_is_no_error(written: Written) -> None:
    path = written("")
    path.write_bytes(b"\xef\xbb\xbf[relay]\r\nname = 'r'\r\n")
    assert load(path).relay.name == "r"


# --- routes_dir --------------------------------------------------------------------------------------------------


def test_routes_dir_holds_one_route_a_file(written: Written, tmp_path: Path) -> None:
    directory = tmp_path / "routes.d"
    directory.mkdir()
    for name in ("b", "a"):
        (directory / f"{name}.toml").write_text(f'name = "{name}"\nlisten = "127.0.0.1:9001"\n{BOTH}')
    (directory / ".hidden.toml").write_text("not TOML at all")
    (directory / "c.toml~").write_text("not TOML at all")
    main = written(f'[relay]\nroutes_dir = "routes.d"\n{TLS}{ROUTE}')
    config = load(main)
    assert [(route.name, route.source) for route in config.routes] == [
        ("shuffle", main),
        ("a", directory / "a.toml"),
        ("b", directory / "b.toml"),
    ]
    assert config.files == (main, directory / "a.toml", directory / "b.toml")
    assert config.watched_files == (
        *config.files,
        directory,
        tmp_path / "certs/relay.pem",
        tmp_path / "certs/relay.key",
        Path("/etc/ssl/ca.pem"),
    )


def test_a_routes_dir_that_does_not_exist_has_no_routes(written: Written) -> None:
    assert load(written('[relay]\nroutes_dir = "nowhere"\n')).routes == ()


def test_problems_in_routes_dir_name_their_own_file_and_line(written: Written, tmp_path: Path) -> None:
    directory = tmp_path / "routes.d"
    directory.mkdir()
    (directory / "a.toml").write_text(f'\nname = "b"\nlisten = "nowhere"\n{BOTH}')
    (directory / "c.toml").write_text(f"[[route]]\n{ROUTE.partition(chr(10))[2]}")
    (directory / "d.toml").write_text("name =")
    (directory / "e.toml").symlink_to("gone")
    (directory / "f.toml").mkdir()
    main = written(f'[relay]\nroutes_dir = "routes.d"\n{TLS}{ROUTE.replace("shuffle", "c c")}')
    assert [(found.file, found.key, found.line) for found in problems(main)] == [
        (main, "route[0].name", 8),
        (directory / "a.toml", "name", 2),
        (directory / "a.toml", "listen", 3),
        (directory / "c.toml", "route", 1),
        (directory / "d.toml", None, 1),
        (directory / "e.toml", None, None),
        (directory / "f.toml", None, None),
    ]


def test_a_routes_dir_that_is_a_file_is_a_problem(written: Written, tmp_path: Path) -> None:
    (tmp_path / "routes.d").write_text("")
    found = only_problem(written('[relay]\nroutes_dir = "routes.d"\n'))
    assert (found.key, found.line) == ("relay.routes_dir", 2)
    assert "Not a directory" in found.message


def test_routes_of_the_directory_are_judged_beside_another_mistake_in_relay(written: Written, tmp_path: Path) -> None:
    (tmp_path / "routes.d").mkdir()
    (tmp_path / "routes.d/a.toml").write_text('name = "a"\n')
    found = problems(written('[relay]\nroutes_dir = "routes.d"\nworker = 1\n'))
    assert {problem.key for problem in found} == {"relay.worker", "tls", "func1", "func2", "listen"}


def test_double_names_name_both_files_and_lines(written: Written, tmp_path: Path) -> None:
    """TESTPLAN 40: two routes with one name."""
    (tmp_path / "routes.d").mkdir()
    other = tmp_path / "routes.d/shuffle.toml"
    other.write_text(f'# first\nlisten = "127.0.0.1:9002"\n{BOTH}name = "shuffle"\n')
    main = written(f'[relay]\nroutes_dir = "routes.d"\n{TLS}{ROUTE}{ROUTE.replace("9001", "9003")}')
    found = problems(main)
    assert [(problem.file, problem.key, problem.line) for problem in found] == [
        (main, "route[shuffle].name", 13),
        (other, "name", 5),
    ]
    assert all(f"{main}:8" in problem.message for problem in found)


# --- every rule that can be broken -------------------------------------------------------------------------------

PLAIN = '[[route]]\nname = "p"\nlisten = "127.0.0.1:1"\nouter = "none"\nallow_from = ["::1"]\n'

BROKEN = [
    # unknown keys and wrong shapes
    ("[relays]\n", "relays", 1, 'did you mean "relay"?'),
    ("[[routes]]\n", "routes", 1, 'did you mean "route"?'),
    ('name = "x"\n', "name", 1, "known here: admin, group, limits, metrics, relay, route, tcp, tls"),
    ("handshake_timeout = 1\n", "handshake_timeout", 1, "belongs into [limits]"),
    ("[limits]\nhandshake_timout = 1\n", "limits.handshake_timout", 2, 'did you mean "handshake_timeout"?'),
    ("[limits]\nuser_timeout = 1\n", "limits.user_timeout", 2, "belongs into [tcp]"),
    ("[limits]\nqqq = 1\n", "limits.qqq", 2, "known here: certificate_grace, fd_budget, "),
    ('[limits]\n"a b\\u001b" = 1\n', 'limits."a b\\u001b"', 2, "known here"),
    ("[metrics.sub]\n", "metrics.sub", 1, "known here: listen"),
    ("relay = 1\n", "relay", 1, "write [relay]"),
    ("[[relay]]\n", "relay", 1, "write [relay]"),
    ("[route]\n", "route", 1, "write [[route]]"),
    ("route = [1]\n", "route[0]", 1, "must be a table, not 1"),
    ("group = 1\n", "group", 1, "write [[group]]"),
    # types are strict
    ('[limits]\njoin_timeout = "10"\n', "limits.join_timeout", 2, 'must be a number, not "10"'),
    ("[limits]\njoin_timeout = true\n", "limits.join_timeout", 2, "must be a number, not true"),
    ("[limits]\njoin_timeout = []\n", "limits.join_timeout", 2, "must be a number, not an empty list"),
    ("[limits]\njoin_timeout = 2020-01-01\n", "limits.join_timeout", 2, "must be a number, not a date or time"),
    ("[limits]\nmax_pairings = 1.0\n", "limits.max_pairings", 2, "must be a whole number, not 1.0"),
    ("[limits]\nmax_pairings = true\n", "limits.max_pairings", 2, "must be a whole number, not true"),
    ("[tcp]\nnodelay = 1\n", "tcp.nodelay", 2, "must be true or false, not 1"),
    ("[tcp]\ncongestion_control = 1\n", "tcp.congestion_control", 2, "must be text"),
    ('[tcp]\ncongestion_control = "Cubic"\n', "tcp.congestion_control", 2, "as in cubic"),
    ('[tcp]\ncongestion_control = "sixteen_letters_"\n', "tcp.congestion_control", 2, "at most 15"),
    ('[tcp]\ncongestion_control = ""\n', "tcp.congestion_control", 2, "at most 15"),
    ("[relay]\nname = 1\n", "relay.name", 2, "letter or digit"),
    ("[relay]\nroutes_dir = 1\n", "relay.routes_dir", 2, "must be text"),
    ('[relay]\nroutes_dir = ""\n', "relay.routes_dir", 2, "is not a path"),
    # bounds
    ("[limits]\njoin_timeout = 0\n", "limits.join_timeout", 2, "must be more than 0, not 0"),
    ("[limits]\njoin_timeout = -1.5\n", "limits.join_timeout", 2, "must be more than 0, not -1.5"),
    ("[limits]\njoin_timeout = nan\n", "limits.join_timeout", 2, "must be a finite number, not nan"),
    ("[limits]\njoin_timeout = inf\n", "limits.join_timeout", 2, "must be a finite number, not inf"),
    ("[limits]\njoin_timeout = 1e999\n", "limits.join_timeout", 2, "must be a finite number, not inf"),
    (f"[limits]\njoin_timeout = 1{'0' * 400}\n", "limits.join_timeout", 2, "must be a number, not 1000"),
    (f"[limits]\njoin_timeout = 0x1{'0' * 9000}\n", "limits.join_timeout", 2, "not a very large number"),
    ("[limits]\nmax_pairings = 0\n", "limits.max_pairings", 2, "must be at least 1, not 0"),
    ("[limits]\nmax_pairings = 3000000000\n", "limits.max_pairings", 2, "must be at most 2147483647"),
    ("[limits]\nfd_budget = 0\n", "limits.fd_budget", 2, "must be more than 0, not 0"),
    ("[limits]\nfd_budget = 1.1\n", "limits.fd_budget", 2, "must be at most 1, not 1.1"),
    ("[relay]\ndrain_timeout = 0\n", "relay.drain_timeout", 2, "must be more than 0"),
    ('[relay]\nuser = "a; b"\n', "relay.user", 2, "is not the name of a user: letters, digits"),
    ("[relay]\nuser = 1000\n", "relay.user", 2, "must be text: the name of a user of this machine"),
    ("[relay]\nworkers = 0\n", "relay.workers", 2, "whole number from 1 to 256"),
    ("[relay]\nworkers = 257\n", "relay.workers", 2, "whole number from 1 to 256"),
    ("[relay]\nworkers = true\n", "relay.workers", 2, "whole number from 1 to 256"),
    ('[relay]\nworkers = "all"\n', "relay.workers", 2, 'or "auto"'),
    ("[tcp]\nkeepalive = [30, 10]\n", "tcp.keepalive", 2, "three whole numbers"),
    ("[tcp]\nkeepalive = [30, 0, 3]\n", "tcp.keepalive[1]", 2, "must be at least 1, not 0"),
    ("[tcp]\nkeepalive = [\n30,\n10,\n128]\n", "tcp.keepalive[2]", 5, "must be at most 127, not 128"),
    ("[tcp]\nuser_timeout = 119\n", "tcp.user_timeout", 2, "shorter than limits.stall_timeout of 120 s"),
    (
        "[limits]\nstall_timeout = 121\n",
        "tcp.user_timeout",
        2,
        "of 120 s is shorter than limits.stall_timeout of 121 s",
    ),
    # groups
    ('[[group]]\nname = "a b"\nparties = "dns:a.b"\n', "group[0].name", 2, "letter or digit"),
    ('[[group]]\nname = "g"\n', "group[g].parties", 1, "is required"),
    ('[[group]]\nname = "g"\nparties = []\n', "group[g].parties", 3, "empty list"),
    ('[[group]]\nname = "g"\nparties = ["dns:a.b",\n"x"]\n', "group[g].parties[1]", 4, "not a selector"),
    ('[[group]]\nname = "g"\nparties = ["group:g"]\n', "group[g].parties[0]", 3, "a group cannot be named here"),
    (
        '[[group]]\nname = "g"\nparties = "dns:a.b"\n[[group]]\nname = "g"\nparties = "dns:a.b"\n',
        "group[g].name",
        5,
        "relay.toml:2",
    ),
    # the HTTP servers
    ('[metrics]\nlisten = ":9464"\n', "metrics.listen", 2, "0.0.0.0:9464"),
    ('[admin]\nlisten = "unix:"\n', "admin.listen", 2, "is not a path"),
    (f'[admin]\nlisten = "unix:/{"a" * 107}"\n', "admin.listen", 2, "at most 107 bytes"),
    ('[admin]\nallow = ["dns:a.b"]\n', "admin.allow", 2, "file mode"),
    (f'{TLS}[admin]\nlisten = "127.0.0.1:1"\n', "admin.allow", 5, "is required if the API listens on HOST:PORT"),
    ('[admin]\nlisten = "127.0.0.1:1"\nallow = "dns:a.b"\n', "admin.listen", 2, "needs [tls]"),
    (
        f'{TLS}[admin]\nlisten = "0.0.0.0:1"\nallow = "dns:a.b"\n[metrics]\nlisten = "127.0.0.1:1"\n',
        "metrics.listen",
        9,
        "overlaps the admin API",
    ),
    (f'{PLAIN}[metrics]\nlisten = "0.0.0.0:1"\n', "route[p].listen", 3, "overlaps the metrics on 0.0.0.0:1"),
    # several addresses
    (PLAIN.replace('"127.0.0.1:1"', "[]"), "route[p].listen", 3, "name at least one address"),
    (PLAIN.replace('"127.0.0.1:1"', "1"), "route[p].listen", 3, "must be HOST:PORT, or a list of them"),
    (PLAIN.replace('"127.0.0.1:1"', '["[::1]:1",\n"x"]'), "route[p].listen[1]", 4, "is not an address"),
    (PLAIN.replace('"127.0.0.1:1"', '["[::1]:1",\n"[::1]:1"]'), "route[p].listen", 3, "names [::1]:1 twice"),
    (PLAIN.replace('"127.0.0.1:1"', '["a.b:1",\n"a.b.:1"]'), "route[p].listen", 3, "names a.b:1 twice"),
    (
        PLAIN.replace('"127.0.0.1:1"', '["[::1]:1",\n"localhost:1"]'),
        "route[p].listen[1]",
        4,
        "localhost:1 overlaps [::1]:1, which this route has too",
    ),
    (
        TLS + ROUTE + PLAIN.replace('"127.0.0.1:1"', '["[::]:9001", "127.0.0.1:1",\n"0.0.0.0:9001"]'),
        "route[p].listen[2]",
        13,
        'overlaps 127.0.0.1:9001 of route "shuffle"',
    ),
    (
        f"""{PLAIN.replace('"127.0.0.1:1"', '["[::1]:1", "127.0.0.1:1"]')}[metrics]\nlisten = "127.0.0.1:1"\n""",
        "route[p].listen[1]",
        3,
        "overlaps the metrics",
    ),
    # TLS
    (ROUTE, "tls", None, 'is required by route "shuffle"'),
    (TLS.replace('private_key = "certs/relay.key"\n', ""), "tls.private_key", 1, "is required"),
    # one route
    (f"{TLS}{ROUTE.replace('shuffle', '../etc')}", "route[0].name", 6, "letter or digit"),
    (f"{TLS}{ROUTE.replace('shuffle', 'a' * 64)}", "route[0].name", 6, "at most 63"),
    (f"{TLS}{ROUTE.replace('shuffle', '')}", "route[0].name", 6, "letter or digit"),
    (f"{TLS}{ROUTE.replace('shuffle', 'a' + chr(92) + 'n')}", "route[0].name", 6, "letter or digit"),
    (f"{TLS}{ROUTE.replace('127.0.0.1', '*')}", "route[shuffle].listen", 7, "0.0.0.0:9001"),
    (f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', "[]"), "route[shuffle].func1", 8, "lets nobody in"),
    (f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', "7"), "route[shuffle].func1", 8, "or a list of them"),
    (f"{TLS}{ROUTE}".replace("dns:func1", "func1"), "route[shuffle].func1[0]", 8, "dns:NAME, uri:URI or spki"),
    (f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', '"x"'), "route[shuffle].func1", 8, "dns:NAME, uri:URI or spki"),
    (f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', '["dns:a.b",\n\n9]'), "route[shuffle].func1[1]", 10, "must be text"),
    (
        f'{TLS}{ROUTE}[[group]]\nname = "g"\nparties = "dns:a.b"\n'.replace("dns:func1.acme", "group:h"),
        "route[shuffle].func1[0]",
        8,
        "there is no group 'h'; groups in this configuration: g",
    ),
    (f"{TLS}{ROUTE}".replace('func2 = ["dns:func2.acme"]\n', ""), "route[shuffle].func2", 5, "is required"),
    (f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', "{}"), "route[shuffle].func1.dial", 8, "is required"),
    (
        f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', '{ dial = "a:1", dail = 1 }'),
        "route[shuffle].func1.dail",
        8,
        'did you mean "dial"?',
    ),
    (
        f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', '{ dial = "a:1", connect_timeout = 0 }'),
        "route[shuffle].func1.connect_timeout",
        8,
        "must be more than 0, not 0",
    ),
    (
        f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', '{ dial = "a:1", connect_timeout = "5" }'),
        "route[shuffle].func1.connect_timeout",
        8,
        "must be a number",
    ),
    (f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', '{ dial = "a:0" }'), "route[shuffle].func1.dial", 8, "1 to 65535"),
    (
        f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', '{ dial = "[::]:1" }'),
        "route[shuffle].func1.dial",
        8,
        "name one host",
    ),
    (
        f"{TLS}{ROUTE}".replace('["dns:func1.acme"]', '{ dial = "a:1" }').replace(
            '["dns:func2.acme"]', '{ dial = "b:1" }'
        ),
        "route[shuffle].func2",
        9,
        "only one of func1 and func2 can be dialled",
    ),
    (f'{TLS}{ROUTE}outer = "tls"\n', "route[shuffle].outer", 10, 'must be "mtls" or "none", not "tls"'),
    (f"{TLS}{ROUTE}require_inner_tls = 1\n", "route[shuffle].require_inner_tls", 10, 'true, false or "always"'),
    (f"{TLS}{ROUTE}hello_settle = 1\n", "route[shuffle].hello_settle", 10, 'is for handoff = "hello" only'),
    (f'{TLS}{ROUTE}allow_from = ["::1"]\n', "route[shuffle].allow_from", 10, 'is for outer = "none" only'),
    (f"{TLS}{ROUTE}ping_interval = 1\n", "route[shuffle].ping_interval", 10, "belongs into [limits]"),
    (f"{TLS}{ROUTE}stall_timeout = 500\n", "route[shuffle].stall_timeout", 10, "longer than tcp.user_timeout of 120 s"),
    # plain routes
    (f'{PLAIN}func1 = "dns:a.b"\n', "route[p].func1", 6, "without TLS nobody shows a certificate"),
    (f'{PLAIN}handoff = "hello"\n', "route[p].handoff", 6, "no TLS to hand off"),
    (f"{PLAIN}ticket_timeout = 1\n", "route[p].ticket_timeout", 6, "no TLS to hand off"),
    (PLAIN.replace('["::1"]', "[]"), "route[p].allow_from", 5, "all that decides who gets in"),
    (PLAIN.replace('allow_from = ["::1"]\n', ""), "route[p].allow_from", 1, "all that decides who gets in"),
    (PLAIN.replace('["::1"]', '"::1"'), "route[p].allow_from", 5, "must be a list of networks"),
    (PLAIN.replace("::1", "10.0.0.1/8"), "route[p].allow_from[0]", 5, "write 10.0.0.0/8"),
    # routes together
    (f"{TLS}{ROUTE}{PLAIN.replace('127.0.0.1:1', '0.0.0.0:9001')}", "route[p].listen", 12, "0.0.0.0:9001 overlaps"),
    (f"{TLS}{ROUTE}{PLAIN.replace('127.0.0.1:1', 'localhost:9001')}", "route[p].listen", 12, "both cannot be bound"),
    (f"{TLS}{ROUTE}{PLAIN.replace('127.0.0.1:1', '127.0.0.1:9001')}", "route[p].listen", 12, 'outer = "none"'),
    (
        f'{TLS}{ROUTE}{ROUTE.replace("shuffle", "other")}handoff = "hello"\n',
        "route[other].listen",
        12,
        "is shared with route",
    ),
    (f"{TLS}{ROUTE}{ROUTE.replace('shuffle', 'Shuffle')}", "route[Shuffle].name", 11, "in case only"),
    (
        f'{TLS}{ROUTE}{ROUTE.replace("shuffle", "other")}proxy_protocol = ["10.0.0.0/8"]\n',
        "route[other].proxy_protocol",
        15,
        'differs from that of route "shuffle"',
    ),
    (f'{TLS}{ROUTE}proxy_protocol = ["10.0.0.1/8"]\n', "route[shuffle].proxy_protocol[0]", 10, "write 10.0.0.0/8"),
]


@pytest.mark.parametrize(
    ("text", "key", "line", "words"), BROKEN, ids=[f"{case[1]}-{n}" for n, case in enumerate(BROKEN)]
)
def test_each_broken_rule_is_one_problem_at_its_key_and_line(
    written: Written, text: str, key: str, line: int | None, words: str
) -> None:
    """TESTPLAN 40: an unknown key, two routes with one name, and every other rule of the route file."""
    path = written(text)
    found = only_problem(path)
    assert (found.file, found.key, found.line) == (path, key, line)
    assert words in found.message


def test_all_problems_are_reported_at_once_in_the_order_of_their_lines(written: Written) -> None:
    text = (
        '[relay]\nnmae = "x"\n'  # 2
        "[limits]\nfd_budget = 2\nidle_timeout = 0\n"  # 4, 5
        '[[group]]\nname = "g"\nparties = ["oops"]\n'  # 8
        '[[route]]\nname = "a"\nlisten = "nowhere"\nfunc1 = "group:g"\nfunc2 = "group:h"\nallow_from = []\n'  # 11 13 14
        '[[route]]\nname = "a"\nlisten = "127.0.0.1:1"\nouter = "none"\nidle_timeout = "1"\n'  # 15 16 19
    )
    found = problems(written(text))
    assert [(problem.key, problem.line) for problem in found] == [
        ("tls", None),
        ("relay.nmae", 2),
        ("limits.fd_budget", 4),
        ("limits.idle_timeout", 5),
        ("group[g].parties[0]", 8),
        ("route[a].listen", 11),
        ("route[a].func2", 13),
        ("route[a].allow_from", 14),
        ("route[a].allow_from", 15),
        ("route[a].name", 16),
        ("route[a].idle_timeout", 19),
    ]


def test_every_route_that_overlaps_an_earlier_one_is_named_once(written: Written) -> None:
    """In any order of the wide address and the others."""
    addresses = ["127.0.0.1:1", "0.0.0.0:1", "127.0.0.2:1", "[::1]:1", "localhost:1", "127.0.0.1:2"]
    text = "".join(PLAIN.replace('"p"', f'"p{n}"').replace("127.0.0.1:1", at) for n, at in enumerate(addresses))
    found = problems(written(text))
    assert [problem.key for problem in found] == [f"route[p{n}].listen" for n in (1, 2, 4)]


# --- files that are no route files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"[relay]\nname = \n", 2, "Invalid value"),
        (b"[relay]\nname = 'a'\nname = 'b'\n", 3, "Cannot overwrite a value"),
        (b"[relay]\n\n[relay]\n", 3, "Cannot declare"),
        (b"a = [1,\n2,\n", 3, "up to the end of the file"),
        (b'a = """\n\n', 3, "Unterminated string"),
        (b"[relay\n", 1, "not valid TOML"),
        (b"a = 'x'\n\n# \xff\n", 3, "is not UTF-8 (byte 0xff)"),
        (b"\xff\xfea\x00", 1, "is not UTF-8"),
        (b"a = 1\x00\n", 1, "not valid TOML"),
        (b"a = " + b"[" * 100_000, None, "nest too deeply"),
        (b"a = " + b"1" * 5000, None, "not usable TOML"),
        (b"#" * (1024 * 1024 + 1), None, "more than 1 MiB"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else None,
)
def test_a_file_that_is_no_toml_is_one_problem_with_its_line(
    tmp_path: Path, content: bytes, line: int | None, words: str
) -> None:
    """TESTPLAN 40: a syntax error."""
    path = tmp_path / "relay.toml"
    path.write_bytes(content)
    found = only_problem(path)
    assert (found.file, found.key, found.line) == (path, None, line)
    assert words in found.message


def test_a_file_that_is_not_there_comes_with_the_remedy(tmp_path: Path) -> None:
    found = only_problem(tmp_path / "relay.toml")
    assert str(found) == f'{tmp_path}/relay.toml: there is no such file: "frelay init DIR" writes a working one'


def test_what_is_not_a_file_is_a_problem_and_never_waited_for(tmp_path: Path) -> None:
    assert "is a directory" in only_problem(tmp_path).message
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "not a regular file" in only_problem(fifo).message
    assert "not a regular file" in only_problem(Path("/dev/zero")).message
    assert "Not a directory" in only_problem(Path("/dev/null/relay.toml")).message
    assert "null byte" in only_problem(Path("a\0b")).message
    (tmp_path / "dangling").symlink_to("gone")
    assert "symbolic link" in only_problem(tmp_path / "dangling").message


def test_refusing_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for path in (tmp_path, Path("/dev/zero"), tmp_path / "none"):
        problems(path)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_that_may_not_be_read_is_a_problem(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """TESTPLAN 40: an unreadable file. Root can read every file, so a replacement of open(2) refuses."""
    path = written("")

    def refuse(*arguments: object, **keywords: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("frelay.config.document.os.open", refuse)
    assert f"may not be read by user {os.geteuid()}" in only_problem(path).message


# --- what a message may quote --------------------------------------------------------------------------------------


def test_no_message_can_forge_a_log_line_or_steer_a_terminal(written: Written) -> None:
    """TESTPLAN 54: names with CR, LF and ESC are escaped."""
    evil = "x\\r\\n\\u001b[2J\\u009b\\u2028\\u202e"
    text = (
        f'"{evil}" = 1\n[relay]\nname = "{evil}"\n"{evil}" = 2\n[[route]]\nname = "{evil}"\nlisten = "{evil}:1"\n'
        f'func1 = "{evil}"\nfunc2 = {{ dial = "{evil}" }}\nouter = "{evil}"\nallow_from = ["{evil}"]\n'
    )
    found = problems(written(text))
    assert len(found) >= 8
    for problem in found:
        assert str(problem).isprintable(), str(problem)


def test_messages_stay_short_whatever_the_value(written: Written) -> None:
    found = problems(written(f'{TLS}{ROUTE}"{"k" * 10_000}" = 1\n'.replace("func1.acme", "a" * 100_000)))
    assert len(found) == 2
    assert all(len(str(problem)) < 2000 for problem in found)


PEM = "-----BEGIN PRIVATE KEY-----\\nSECRETSECRET\\n-----END PRIVATE KEY-----"


def test_a_key_pasted_into_the_file_is_refused_without_repeating_it(written: Written) -> None:
    found = only_problem(written(TLS.replace("certs/relay.key", PEM)))
    assert (found.key, found.line) == ("tls.private_key", 3)
    assert "is PEM text: put that into a file" in found.message
    assert "SECRET" not in str(found)


def test_the_private_key_is_masked_wherever_a_configuration_is_shown(written: Written) -> None:
    config = load(written(TLS))
    for shown in (repr(config), str(config), repr(config.tls), str(config.tls), f"{config.tls}"):
        assert "relay.pem" in shown
        assert "private_key='***'" in shown
        assert "relay.key" not in shown


def test_a_section_built_by_hand_does_not_repeat_its_input_in_errors() -> None:
    with pytest.raises(ValidationError) as caught:
        TlsSection.model_validate({"certificate": "a", "private_key": "SECRET"})
    assert "SECRET" not in str(caught.value)


# --- frozen --------------------------------------------------------------------------------------------------------


def test_nothing_in_a_configuration_can_be_changed(written: Written) -> None:
    config = load(written(TLS + ROUTE))
    for section in (
        config,
        config.relay,
        config.tls,
        config.limits,
        config.tcp,
        config.routes[0].limits,
        config.routes[0],
    ):
        assert section is not None
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, None)
    with pytest.raises(TypeError):
        config.groups["x"] = ()  # type: ignore[index]
    with pytest.raises(TypeError):
        config.routes_by_name["x"] = config.routes[0]  # type: ignore[index]
    with pytest.raises(AttributeError):
        config.routes[0].listen[0].port = 1  # type: ignore[misc]


def test_equal_files_give_equal_configurations_with_hashable_routes(written: Written) -> None:
    one, other = load(written(TLS + ROUTE)), load(written(TLS + "# a comment\n" + ROUTE))
    assert one == other
    assert len({*one.routes, *other.routes}) == 1


def test_a_configuration_can_be_built_by_hand(tmp_path: Path) -> None:
    route = Route(
        name="r",
        listen=Addresses([Address("127.0.0.1", 0)]),
        func1=(parse_selector("dns:a.b"),),
        func2=Dial(Address("h", 1)),
        source=tmp_path,
    )
    assert Config(path=tmp_path, routes=(route,)).routes_by_name == {"r": route}


# --- the example ---------------------------------------------------------------------------------------------------

EXAMPLE = Path(__file__).parents[2] / "config" / "relay.toml"


def test_the_example_is_a_valid_route_file_with_one_route() -> None:
    config = load(EXAMPLE)
    assert [(route.name, str(route.listen)) for route in config.routes] == [("demo", "127.0.0.1:9001")]
    assert config.tls is not None
    assert config.tls.certificate == EXAMPLE.parent / "certs/relay.pem"


def test_the_example_shows_every_key_with_its_true_default(written: Written) -> None:
    """With all comments removed, the example differs only in the keys without a default."""
    text = EXAMPLE.read_text()
    keys = {(section, key) for section, keys in _keys_of_example(text).items() for key in keys}
    wanted = {(name, key) for name, model in (*SECTIONS.items(), *ARRAYS.items()) for key in model.model_fields}
    inherited = {("route", key) for key in RouteLimits.model_fields}
    assert keys - inherited == wanted - inherited

    uncommented = _uncommented(text, ("relay", "limits", "tcp", "metrics"))
    config = load(written(uncommented))
    assert config.relay == RelaySection(routes_dir=config.path.parent / "routes.d")
    assert config.limits == Limits()
    assert config.tcp == TcpSection()
    assert config.metrics is not None
    assert config.metrics.listen == Address("127.0.0.1", 9464)
    (demo,) = config.routes
    assert demo == load(EXAMPLE).routes[0].model_copy(update={"source": config.path})


def test_the_commented_routes_of_the_example_are_valid_too(written: Written) -> None:
    config = load(written(_uncommented(EXAMPLE.read_text(), ("group", "route"))))
    assert sorted(config.routes_by_name) == ["balanced", "database", "demo", "hello", "mesh"]
    demo = config.routes_by_name["demo"]
    assert demo == load(EXAMPLE).routes[0].model_copy(update={"source": config.path})


_HEADER = re.compile(r"(?:# )?\[\[?(?P<name>[a-z]+)\]\]?")
_KEY = re.compile(r"(?:# )?(?P<key>[a-z0-9_]+) +?= ")


def _keys_of_example(text: str) -> dict[str, set[str]]:
    keys: dict[str, set[str]] = {}
    section = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            section = header["name"]
        elif key := _KEY.match(line):
            keys.setdefault(section, set()).add(key["key"])
    return keys


def _uncommented(text: str, sections: tuple[str, ...]) -> str:
    lines = []
    section = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            section = header["name"]
        is_code = _HEADER.match(line) or _KEY.match(line)
        is_choice = line.startswith(('# outer = "mtls"', "# crl", "# max_bytes_per_second", "# user", "# congestion"))
        lines.append(line.removeprefix("# ") if is_code and section in sections and not is_choice else line)
    return "\n".join(lines)
