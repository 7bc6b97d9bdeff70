"""Each key of each section is in force after a reload, or is reported as one that needs a restart, and stays as it is.

:data:`KEYS` holds a proof for every key of the model. A new key without one fails here.
"""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import trio

from frelay.config.model import (
    AdminSection,
    Config,
    Limits,
    MetricsSection,
    RelaySection,
    Route,
    RouteLimits,
    Section,
    TcpSection,
    TlsSection,
)
from frelay.config.plan import _TIMINGS, _WIRING, plan, without_restart
from frelay.errors import ConfigError
from support.admin import ADMIN, admin
from support.certs import TestAuthority
from support.party import TLS_HEADER, Party, pair
from support.ports import reserved_port
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import TIMEOUT, eventually

SECTIONS: Final[Mapping[str, type[Section]]] = {
    "relay": RelaySection,
    "tls": TlsSection,
    "limits": Limits,
    "tcp": TcpSection,
    "admin": AdminSection,
    "metrics": MetricsSection,
}

# Before the reload all limits are wide, so a limit that takes effect is the new one.
BEFORE: Final[Mapping[str, Mapping[str, str]]] = {
    "relay": {"drain_timeout": "600"},
    "limits": {
        "handshake_timeout": "600",
        "join_timeout": "600",
        "handoff_timeout": "600",
        "wait_timeout": "600",
        "ping_interval": "600",
        "pong_timeout": "600",
    },
    "admin": {"listen": '"127.0.0.1:0"', "allow": '["dns:operator.demo"]'},
    "metrics": {"listen": '"127.0.0.1:0"'},
}

Probe = Callable[[Site, RelayInProcess], Awaitable[None]]


def sections(**changes: Mapping[str, str]) -> str:
    """BEFORE with other values, as TOML; the site itself writes ``tls``."""
    text = ""
    for name in ("relay", "limits", "tcp", "admin", "metrics"):
        table = {**BEFORE.get(name, {}), **changes.get(name, {})}
        text += f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in table.items())
    return text


# --- what shows that a key is in force --------------------------------------------------------------------------------


async def refused(site: Site, relay: RelayInProcess, *, code: str) -> None:
    party = await site.party(relay, "func1")
    await party.join()
    await party.expect("WAITING")
    with trio.fail_after(TIMEOUT):
        while (found := await party.next_frame()) is not None:
            if found[0] == "REFUSED":
                assert found[1]["code"] == code
                return
    raise AssertionError(f"{code} expected")


async def both(site: Site, relay: RelayInProcess) -> tuple[Party, Party, Mapping[str, Any]]:
    one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
    paired, _ = await pair(one, two)
    return one, two, paired


async def told(site: Site, relay: RelayInProcess, *, name: str, value: float) -> None:
    *_, paired = await both(site, relay)
    assert paired["limits"][name] == value


async def of_a_pairing(site: Site, relay: RelayInProcess, *, name: str, value: float) -> None:
    await both(site, relay)
    (pairing,) = relay.relay.pairings
    assert getattr(pairing.limits, name) == value


async def second_is_refused(site: Site, relay: RelayInProcess, *, code: str) -> None:
    await both(site, relay)
    one, two = await site.party(relay, "func1"), await site.party(relay, "func2")
    await one.join()
    await two.join()
    await relay.log("refused", code=code)


async def no_second_waits(site: Site, relay: RelayInProcess, *keys: str) -> None:
    """``keys`` are those of the first and the second leg; without them both join without one."""
    one, two = await site.party(relay, "func1"), await site.party(relay, "func1")
    fields = [{"meet": key} for key in keys] or [{}, {}]
    await one.join(**fields[0])
    await one.expect("WAITING")
    await two.join(**fields[1])
    assert (await two.refusal())["code"] == "queue-full"


async def no_second_waits_with_its_key(site: Site, relay: RelayInProcess) -> None:
    await no_second_waits(site, relay, "job", "job")


async def no_second_waits_with_a_key(site: Site, relay: RelayInProcess) -> None:
    await no_second_waits(site, relay, "job/1", "job/2")


async def bytes_are_held_back(site: Site, relay: RelayInProcess) -> None:
    one, two, _ = await both(site, relay)
    await one.hand_off()
    await two.hand_off()
    began = trio.current_time()
    await one.send_raw(TLS_HEADER + bytes(40_000))
    with trio.fail_after(TIMEOUT):
        await two.receive_exactly(40_003)
    assert trio.current_time() - began > 0.5


async def silent_is_cut(site: Site, relay: RelayInProcess) -> None:
    party = await site.connect(relay)
    await party.ended()
    await relay.log("refused", reason="no TLS handshake within 0.3 s")


async def without_join_is_cut(site: Site, relay: RelayInProcess) -> None:
    await site.party(relay)
    await relay.log("refused", reason="no JOIN within 0.3 s")


async def without_hand_off_is_cut(site: Site, relay: RelayInProcess) -> None:
    await both(site, relay)
    await relay.log("pairing ended", outcome="handoff-timeout")


async def is_pinged(site: Site, relay: RelayInProcess) -> None:
    party = await site.party(relay)
    await party.join()
    await party.expect("WAITING")
    await party.expect("PING")


async def turns(site: Site, relay: RelayInProcess, *, expected: int) -> None:
    for _ in range(3):
        party = await site.connect(relay)
        with pytest.raises(ssl.SSLWantReadError):
            party.tls.do_handshake()
        await party.flush()
    strangers = relay.relay.admission.strangers
    await eventually(lambda: strangers.running + strangers.held == 3, "all three have spoken")
    assert strangers.running == expected


async def fewer_legs_and_pipes(site: Site, relay: RelayInProcess) -> None:
    admission = relay.relay.admission
    assert 2 * admission.leg_budget <= admission.descriptor_limit * 0.01
    taken = 0
    pipes = relay.relay.parts.forwarding.pipes
    held = []
    while (pipe := pipes.take()) is not None:
        held.append(pipe)
        taken += 1
    for pipe in held:
        pipes.give(pipe, is_empty=True)
    assert taken == admission.leg_budget // 2


async def option(site: Site, relay: RelayInProcess, *, level: int, name: int, value: object, size: int = 0) -> None:
    party = await site.party(relay)
    await party.join()
    await party.expect("WAITING")
    (place,) = relay.relay.routes["demo"].lobby.waiting("func1")
    found: object = place.leg.sock.getsockopt(level, name, size) if size else place.leg.sock.getsockopt(level, name)
    assert found == value


async def route_is_removed(site: Site, relay: RelayInProcess) -> None:
    """The pairing of a removed route is cut after drain_timeout."""
    await both(site, relay)
    text = site.config.read_text()
    site.config.write_text(text.replace(DEMO, ""))
    await relay.relay.reload()
    await relay.log("pairing ended", outcome="route-removed")


async def new_directory_is_read(site: Site, relay: RelayInProcess) -> None:
    assert "extra" in relay.relay.routes


async def other_certificate_is_shown(site: Site, relay: RelayInProcess) -> None:
    party = await site.party(relay, server_hostname="second.test")
    await party.join()
    await party.expect("WAITING")


async def other_authority_is_known(site: Site, relay: RelayInProcess) -> None:
    party = await site.party(relay, "foreign")
    await party.join()
    await party.expect("WAITING")


async def func1_is_revoked(site: Site, relay: RelayInProcess) -> None:
    party = await site.connect(relay, "func1")
    assert "REVOKED" in await party.alert()


@asynccontextmanager
async def caller(site: Site, relay: RelayInProcess, name: str) -> AsyncIterator[httpx.AsyncClient]:
    context = ssl.create_default_context(cafile=str(site.ca_path))
    context.load_cert_chain(*site.paths[name])
    port = relay.relay.served["admin"][0].rpartition(":")[2]
    async with httpx.AsyncClient(verify=context, base_url=f"https://localhost:{port}", timeout=TIMEOUT) as client:
        yield client


async def another_may_call(site: Site, relay: RelayInProcess) -> None:
    async with caller(site, relay, "func1") as api:
        assert (await api.get("/v1/status")).status_code == 200
    async with caller(site, relay, "operator") as api:
        with pytest.raises(httpx.TransportError):
            await api.get("/v1/status")


async def is_in_the_plan_alone(site: Site, relay: RelayInProcess) -> None:
    """What the file says needs a restart: nothing of what runs is touched."""
    async with caller(site, relay, "operator") as api:
        status = (await api.get("/v1/status")).json()
        assert status["name"] == "relay-1"
        assert status["last_reload"]["restart_only"]
    (place,) = relay.relay.served["metrics"]
    async with httpx.AsyncClient(timeout=TIMEOUT) as http:
        assert (await http.get(f"http://{place}/healthz")).status_code == 200


RESTART: Final = is_in_the_plan_alone

KEYS: Final[Mapping[str, tuple[str, Probe]]] = {
    "relay.name": ('"another"', RESTART),
    "relay.user": ('"nobody"', RESTART),
    "relay.workers": ("3", RESTART),
    "relay.routes_dir": ('"more.d"', new_directory_is_read),
    "relay.drain_timeout": ("0.1", route_is_removed),
    "relay.policy_ends_pairings": ("true", route_is_removed),
    "tls.certificate": ('"second.pem"', other_certificate_is_shown),
    "tls.private_key": ('"second.key"', other_certificate_is_shown),
    "tls.client_ca": ('"all.pem"', other_authority_is_known),
    "tls.crl": ('"crl.pem"', func1_is_revoked),
    "limits.wait_timeout": ("0.3", partial(refused, code="wait-timeout")),
    "limits.half_close_timeout": ("77", partial(told, name="half_close_timeout", value=77)),
    "limits.idle_timeout": ("77", partial(told, name="idle_timeout", value=77)),
    "limits.stall_timeout": ("77", partial(told, name="stall_timeout", value=77)),
    "limits.max_lifetime": ("77", partial(told, name="max_lifetime", value=77)),
    "limits.certificate_grace": ("77", partial(of_a_pairing, name="certificate_grace", value=77)),
    "limits.max_waiting_per_party": ("1", no_second_waits),
    "limits.max_waiting_per_meet": ("1", no_second_waits_with_its_key),
    "limits.max_waiting_by_meet": ("1", no_second_waits_with_a_key),
    "limits.max_pairings": ("1", partial(second_is_refused, code="limit")),
    "limits.max_pairings_in_all": ("1", partial(second_is_refused, code="limit")),
    "limits.max_bytes_per_second": ("20_000", bytes_are_held_back),
    "limits.handshake_timeout": ("0.3", silent_is_cut),
    "limits.join_timeout": ("0.3", without_join_is_cut),
    "limits.handoff_timeout": ("0.3", without_hand_off_is_cut),
    "limits.ping_interval": ("0.3", is_pinged),
    "limits.pong_timeout": ("0.3", partial(refused, code="pong-timeout")),
    "limits.max_pre_auth": ("2", partial(turns, expected=2)),
    "limits.max_pre_auth_per_ip": ("2", partial(turns, expected=2)),
    "limits.fd_budget": ("0.01", fewer_legs_and_pipes),
    "tcp.keepalive": ("[77, 7, 7]", partial(option, level=socket.IPPROTO_TCP, name=socket.TCP_KEEPIDLE, value=77)),
    "tcp.user_timeout": ("130", partial(option, level=socket.IPPROTO_TCP, name=socket.TCP_USER_TIMEOUT, value=130_000)),
    "tcp.nodelay": ("false", partial(option, level=socket.IPPROTO_TCP, name=socket.TCP_NODELAY, value=0)),
    "tcp.congestion_control": (
        '"reno"',
        partial(option, level=socket.IPPROTO_TCP, name=socket.TCP_CONGESTION, value=b"reno".ljust(16, b"\0"), size=16),
    ),
    "admin.listen": ('"127.0.0.1:9"', RESTART),
    "admin.allow": ('["dns:func1.demo"]', another_may_call),
    "metrics.listen": ('"127.0.0.1:9"', RESTART),
}


def keys_of_the_model() -> set[str]:
    return {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}


def test_every_key_has_its_proof() -> None:
    assert set(KEYS) == keys_of_the_model()


@pytest.mark.parametrize("key", sorted(KEYS))
async def test_a_changed_key_is_in_force_or_needs_a_restart(
    site: Site, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frelay.net.strangers._LONG_STALL_TIMEOUT", 600)
    value, probe = KEYS[key]
    section, _, name = key.partition(".")
    site.add("operator", site.ca.party(dns=["operator.demo"]))
    other = TestAuthority("other CA")
    site.add("foreign", other.party(dns=["func1.demo"]))
    site.ca.relay(dns=["second.test"]).write(site.directory, "second")
    (site.directory / "all.pem").write_bytes(
        site.ca_path.read_bytes() + other.write(site.directory, "other").read_bytes()
    )
    site.ca.write_crl(site.directory, site.ca.crl(revoked=[site.credentials["func1"]]))
    (site.directory / "more.d").mkdir()
    (site.directory / "more.d" / "extra.toml").write_text(DEMO.partition("]]")[2].replace('"demo"', '"extra"'))
    before: dict[str, dict[str, str]] = {}
    after: dict[str, dict[str, str]] = {}
    if key == "relay.policy_ends_pairings":
        before, after = {"relay": {name: "false", "drain_timeout": "0.1"}}, {"relay": {"drain_timeout": "0.1"}}
    if key == "limits.pong_timeout":
        before = after = {"limits": {"ping_interval": "0.2"}}
    if key == "tcp.nodelay":
        before = {"tcp": {name: "true"}}
    after = {**after, section: {**after.get(section, {}), name: value}}
    async with site.relay(sections=sections(**before)) as relay:
        running = relay.relay.config
        site.write(sections=sections(**after))
        if section == "tls":
            certificate = {"tls.certificate": "second", "tls.private_key": "second"}.get(key, "relay")
            text = site.config.read_text().replace("relay.pem", f"{certificate}.pem")
            text = text.replace("relay.key", f"{certificate}.key")
            if key == "tls.client_ca":
                text = text.replace(f'"{site.client_ca.name}"', '"all.pem"')
            if key == "tls.crl":
                text = text.replace("[relay]", 'crl = "crl.pem"\n[relay]', 1)
            site.config.write_text(text)
        changes = await relay.relay.reload()
        if probe is RESTART:
            assert changes.restart_only == (key,)
            assert changes.settings == ()
            assert getattr(getattr(relay.relay.config, section), name) == getattr(getattr(running, section), name)
            assert relay.logged("reloaded", restart_only=[key])
        else:
            assert changes.restart_only == ()
            assert key in changes.settings or any(name in kept.changed for kept in changes.keep)
        await probe(site, relay)


# --- routes ---------------------------------------------------------------------------------------------------------


def test_every_key_of_a_route_is_planned() -> None:
    """A key that the plan does not compare would be in force for new routes only, and no report would say so."""
    # In this order: the identity; compared key by key; its file, which changes nothing; compared as a set of sockets.
    told = {"name", "limits", "source", "listen"}
    assert set(Route.model_fields) - told == set(_WIRING) | set(_TIMINGS)


# --- what needs a restart ---------------------------------------------------------------------------------------------

TCP: Final = '[admin]\nlisten = "127.0.0.1:0"\nallow = ["dns:operator.demo"]\n'
METRICS: Final = '[metrics]\nlisten = "127.0.0.1:0"\n'


@pytest.mark.parametrize(
    ("section", "reported"),
    [
        ("", ("admin",)),
        (ADMIN, ("admin.listen", "admin.allow")),
        (TCP.replace(":0", ":9").replace("operator", "another"), ("admin.listen",)),
    ],
    ids=["gone", "to a Unix socket", "elsewhere, with another list"],
)
async def test_the_admin_api_stays_as_it_is(site: Site, section: str, reported: tuple[str, ...]) -> None:
    """``allow`` belongs to the section: it goes with the section, or changes at once."""
    site.add("operator", site.ca.party(dns=["operator.demo"]))
    site.add("another", site.ca.party(dns=["another.demo"]))
    async with site.relay(sections=TCP) as relay:
        site.write(sections=section)
        changes = await relay.relay.reload()
        assert set(changes.restart_only) == set(reported)
        allowed = "another" if "another" in section else "operator"
        for name in ("operator", "another"):
            async with caller(site, relay, name) as api:
                if name == allowed:
                    assert (await api.get("/v1/status")).json()["last_reload"]["restart_only"] == [
                        *changes.restart_only
                    ]
                else:
                    with pytest.raises(httpx.TransportError):
                        await api.get("/v1/status")


async def test_the_admin_api_outlives_tls(site: Site) -> None:
    """A file without [tls] and [admin]: the API on TCP goes on, and its certificates are loaded as before."""
    site.add("operator", site.ca.party(dns=["operator.demo"]))
    plain = '[[route]]\nname = "plain"\nlisten = "127.0.0.1:0"\nouter = "none"\nallow_from = ["127.0.0.0/8"]\n'
    async with site.relay(sections=TCP) as relay:
        site.config.write_text(plain)
        changes = await relay.relay.reload()
        assert set(changes.restart_only) == {"admin", "tls"}
        async with caller(site, relay, "operator") as api:
            assert (await api.get("/v1/status")).json()["routes"] == 1


@pytest.mark.parametrize("before", [METRICS, "", ADMIN], ids=["metrics gone", "both come", "metrics come"])
async def test_a_section_that_comes_or_goes_needs_a_restart(site: Site, before: str) -> None:
    async with site.relay(sections=before) as relay:
        served = relay.relay.served
        site.write(sections="" if before == METRICS else ADMIN + METRICS)
        changes = await relay.relay.reload()
        assert changes.restart_only == {METRICS: ("metrics",), "": ("admin", "metrics"), ADMIN: ("metrics",)}[before]
        assert relay.relay.served == served
        assert relay.relay.needs_restart == changes.restart_only


async def test_it_is_said_until_it_is_done_or_taken_back(site: Site) -> None:
    """Not only the reload that brought it reports it: an operator must see it an hour later, too."""
    async with site.relay(sections=ADMIN), admin(site) as api:
        name = '[relay]\nname = "another"\n'
        site.write(sections=name + ADMIN)
        for _ in range(2):
            done = (await api.post("/v1/reload")).json()
            assert done["restart_only"] == ["relay.name"]
            status = (await api.get("/v1/status")).json()
            assert status["last_reload"]["restart_only"] == ["relay.name"]
            assert status["name"] == "relay-1"
            assert (await api.get("/v1/config")).json()["relay"]["name"] == "relay-1"
        site.write(sections=ADMIN)
        assert (await api.post("/v1/reload")).json()["restart_only"] == []
        assert (await api.get("/v1/status")).json()["last_reload"]["restart_only"] == []


async def test_what_needs_a_restart_is_judged_all_the_same(site: Site) -> None:
    """Otherwise only the restart would say so, at the worst time."""
    async with site.relay() as relay:
        site.write(sections='[relay]\nuser = "frelay-nobody-of-that-name"\n')
        with pytest.raises(ConfigError, match="no user"):
            await relay.relay.reload()


async def test_an_address_that_the_running_api_has_is_not_free(site: Site) -> None:
    """A file that gives it to a route is refused as a whole, with the reason; the API stays."""
    with reserved_port() as port:
        section = METRICS.replace(":0", f":{port}")
        async with site.relay(sections=section) as relay:
            site.write(DEMO.replace(":0", f":{port}"))
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
                await relay.relay.reload()
            assert relay.relay.config.metrics is not None


def test_a_plan_is_the_same_from_either_side() -> None:
    """After a reload the same file changes only keys that need a restart."""
    old = Config(path=Path("/f"), relay=RelaySection(name="old"), admin=AdminSection(listen="unix:/s"))
    new = Config(path=Path("/f"), relay=RelaySection(name="new", drain_timeout=1), limits=Limits(ping_interval=1))
    settled = without_restart(old, new)
    assert plan(settled, new).settings == ()
    assert plan(settled, new).restart_only == plan(old, new).restart_only == ("relay.name", "admin")
    assert plan(old, new).settings == ("relay.drain_timeout", "limits.ping_interval")
    assert RouteLimits.model_fields.keys() <= Limits.model_fields.keys()


async def test_with_workers_the_same_holds(site: Site) -> None:
    """A supervisor too keeps the keys that need a restart, and its workers get the values that run."""
    async with site.process(sections=ADMIN, workers=2) as relay:
        site.write(sections='[relay]\nname = "another"\n[limits]\nping_interval = 0.3\n')
        relay.signal(signal.SIGHUP)
        done = await relay.log("reloaded")
        assert set(done["restart_only"]) == {"relay.name", "admin"}
        async with admin(site) as api:
            status = (await api.get("/v1/status")).json()
            assert status["name"] == "relay-1"
            assert set(status["last_reload"]["restart_only"]) == {"relay.name", "admin"}
        party = await site.party(relay)
        await party.join()
        await party.expect("WAITING")
        await party.expect("PING")
