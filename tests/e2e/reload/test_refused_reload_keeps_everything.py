"""A reload that cannot succeed changes nothing at all: the old configuration stays whole, and the reason is visible."""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from support.certs import TestAuthority
from support.descriptors import open_descriptors, opened_since
from support.ends import join_ends
from support.party import TLS_HEADER
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import eventually

# Beside every bad change stands a good one; the relay must not take that over either.
GOOD = DEMO.replace('"demo"', '"good"')


def configured(site: Site, routes: str, sections: str = "") -> None:
    site.write(routes, sections=sections, crl=True)


def route_file(text: str, sections: str = "") -> Callable[[Site], None]:
    return lambda site: configured(site, GOOD + text, sections)


def no_route_file(site: Site) -> None:
    site.config.unlink()


def route_file_as_directory(site: Site) -> None:
    site.config.unlink()
    site.config.mkdir()


def route_file_in_another_encoding(site: Site) -> None:
    site.config.write_bytes((DEMO + "# caf\u00e9\n").encode("latin-1"))


def with_good(change: Callable[[Site], object]) -> Callable[[Site], None]:
    def both(site: Site) -> None:
        configured(site, GOOD + DEMO)
        change(site)

    return both


def certificate_of_another_key(site: Site) -> None:
    other = site.ca.relay()
    site.relay_paths[0].write_bytes(other.chain_pem)


def key_of_another_certificate(site: Site) -> None:
    other = site.ca.relay()
    site.relay_paths[1].write_bytes(other.key_pem)


def expired_certificate(site: Site) -> None:
    now = datetime.now(UTC)
    site.ca.odd(
        None,
        not_before=now - timedelta(days=2),
        not_after=now - timedelta(hours=1),
        purposes=[ExtendedKeyUsageOID.SERVER_AUTH],
    ).write(site.directory, "relay")


def certificate_of_a_client(site: Site) -> None:
    site.ca.odd(None, purposes=[ExtendedKeyUsageOID.CLIENT_AUTH]).write(site.directory, "relay")


def directory_as_key(site: Site) -> None:
    site.relay_paths[1].unlink()
    site.relay_paths[1].mkdir()


# DER of a PKCS#8 PrivateKeyInfo whose algorithm is 1.2.3.4: well-formed, and of an unknown kind.
KEY_OF_UNKNOWN_ALGORITHM = """-----BEGIN PRIVATE KEY-----
MA4CAQAwBQYDKgMEBAIEAA==
-----END PRIVATE KEY-----
"""


def of_unknown_algorithm(certificate: bytes) -> bytes:
    """The same certificate with a public key of a kind that does not exist; its signature is not looked at."""
    body = ssl.PEM_cert_to_DER_cert(certificate.decode())
    ec_public_key = bytes.fromhex("06072a8648ce3d0201")
    assert ec_public_key in body
    return ssl.DER_cert_to_PEM_cert(body.replace(ec_public_key, bytes.fromhex("06072a8648ce3d0279"))).encode()


def certificate_of_unknown_algorithm(site: Site) -> None:
    path = site.relay_paths[0]
    path.write_bytes(of_unknown_algorithm(path.read_bytes()))


def authority_of_unknown_algorithm(site: Site) -> None:
    site.ca_path.write_bytes(of_unknown_algorithm(site.ca_path.read_bytes()))


def pem(name: str) -> Callable[[Site], Path]:
    return lambda site: site.directory / name


CASES: dict[str, tuple[Callable[[Site], object], str]] = {
    "syntax error": (route_file('[[route]]\nname = "demo\n'), "relay.toml:"),
    "unknown key": (route_file(DEMO + "colour = 1\n"), "colour"),
    "unknown section": (route_file(DEMO, "[limit]\nidle_timeout = 1\n"), "limit"),
    "double route": (route_file(DEMO + DEMO), "there is a route"),
    "wrong type": (route_file(DEMO + 'idle_timeout = "long"\n'), "idle_timeout"),
    "no selector": (route_file(DEMO.replace('func2 = "dns:func2.demo"', "")), "func2"),
    "no route file": (no_route_file, "relay.toml"),
    "directory as route file": (route_file_as_directory, "relay.toml"),
    "another encoding": (route_file_in_another_encoding, "relay.toml"),
    "certificate of another key": (with_good(certificate_of_another_key), "is not the key of"),
    "key of another certificate": (with_good(key_of_another_certificate), "is not the key of"),
    "key that others can read": (with_good(lambda site: site.relay_paths[1].chmod(0o660)), "chmod 600"),
    "no key": (with_good(lambda site: site.relay_paths[1].unlink()), "does not exist"),
    "directory as key": (with_good(directory_as_key), "cannot be read"),
    "empty key": (with_good(lambda site: site.relay_paths[1].write_bytes(b"")), "tls.private_key"),
    "key of an unknown algorithm": (
        with_good(lambda site: site.relay_paths[1].write_text(KEY_OF_UNKNOWN_ALGORITHM)),
        "private_key",
    ),
    "certificate with a key of an unknown algorithm": (with_good(certificate_of_unknown_algorithm), "tls.certificate"),
    "CA with a key of an unknown algorithm": (with_good(authority_of_unknown_algorithm), "was not signed by"),
    "no certificate": (with_good(lambda site: site.relay_paths[0].unlink()), "does not exist"),
    "broken certificate": (with_good(lambda site: site.relay_paths[0].write_text("PEM?")), "tls.certificate"),
    "expired certificate": (with_good(expired_certificate), "expired on"),
    "certificate of a client": (with_good(certificate_of_a_client), "not for servers"),
    "no CA": (with_good(lambda site: site.ca_path.unlink()), "does not exist"),
    "a leaf as CA": (with_good(lambda site: site.ca_path.write_bytes(site.relay_paths[0].read_bytes())), "not a CA"),
    "no CRL": (with_good(lambda site: pem("crl.pem")(site).unlink()), "does not exist"),
    "broken CRL": (with_good(lambda site: pem("crl.pem")(site).write_text("revoked: all")), "tls.crl"),
    "half a CRL": (
        with_good(lambda site: pem("crl.pem")(site).write_bytes(site.ca.crl()[:200])),
        "tls.crl",
    ),
    "expired CRL": (with_good(lambda site: site.ca.write_crl(site.directory, site.ca.expired_crl())), "expired on"),
    "CRL of another CA": (
        with_good(lambda site: site.ca.write_crl(site.directory, TestAuthority("other CA").crl())),
        "was not signed by",
    ),
}


@contextmanager
def saved(directory: Path) -> Iterator[Callable[[], None]]:
    """Remember the content of the files in ``directory``; gives a function that puts all of it back."""
    files = {path: (path.read_bytes(), path.stat().st_mode & 0o777) for path in directory.iterdir() if path.is_file()}

    def restore() -> None:
        for path, (content, mode) in files.items():
            if path.is_dir():
                path.rmdir()
            path.write_bytes(content)
            path.chmod(mode)

    yield restore


async def refused(relay: RelayInProcess) -> str:
    """Reload as SIGHUP does, and give what the log says about it."""
    before = len(relay.logged("reload refused, the old configuration stays"))
    relay.relay.request_reload()
    await eventually(lambda: len(relay.logged("reload refused, the old configuration stays")) > before, "a refusal")
    entries = relay.logged("reload refused, the old configuration stays")[before:]
    return "\n".join(entry["problem"] for entry in entries)


def kept_reason(relay: RelayInProcess) -> str:
    """What the status shows as the reason why the last reload was refused, "None" if it was not."""
    return str(relay.relay.last_reload_error)


async def works(site: Site, relay: RelayInProcess) -> None:
    """A new pairing can be made, and carries bytes."""
    one, two = await join_ends(site, relay)
    await one.send(TLS_HEADER + b"new")
    assert await two.receive_exactly(6) == TLS_HEADER + b"new"
    one.party.close()
    two.party.close()


@pytest.mark.load
@pytest.mark.parametrize(("change", "reason"), CASES.values(), ids=CASES.keys())
async def test_the_old_configuration_stays_whole(site: Site, change: Callable[[Site], object], reason: str) -> None:
    """TESTPLAN 40: nothing of the new one is in force, the reason is logged and kept, and traffic goes on."""
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(crl=True) as relay:
        with saved(site.directory) as restore:
            one, two = await join_ends(site, relay)
            await one.send(TLS_HEADER + b"before")
            assert await two.receive_exactly(9) == TLS_HEADER + b"before"
            config, trust, port = relay.relay.config, relay.relay.parts.active.trust, relay.port()
            route = relay.relay.routes["demo"]
            descriptors = open_descriptors()

            change(site)
            logged = await refused(relay)

            assert reason in logged
            assert reason in kept_reason(relay)
            assert relay.relay.config is config
            assert relay.relay.parts.active.trust is trust
            assert relay.relay.routes == {"demo": route}
            assert relay.port() == port
            assert not opened_since(descriptors)
            await one.send(b"after")
            assert await two.receive_exactly(5) == b"after"
            restore()
            # The party of this test reads these files itself.
            await works(site, relay)

            await relay.relay.reload()
            assert kept_reason(relay) == "None"
            await two.send(TLS_HEADER)
            assert await one.receive_exactly(3) == TLS_HEADER
    assert len(relay.logged("pairing ended", outcome="internal-error")) == 0


@pytest.mark.load
async def test_a_port_in_use(site: Site) -> None:
    """TESTPLAN 40: for one address that cannot be bound all is refused, and the other addresses are given back."""
    async with site.relay() as relay:
        one, two = await join_ends(site, relay)
        route = relay.relay.routes["demo"]
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            site.write(GOOD + DEMO + GOOD.replace('"good"', '"bad"').replace(":0", f":{port}"))
            descriptors = open_descriptors()
            logged = await refused(relay)
            assert f"cannot listen on 127.0.0.1:{port}" in logged
            assert "route[bad].listen" in logged
            assert "in use" in logged
            assert relay.relay.routes == {"demo": route}
            assert not opened_since(descriptors)
        await one.send(TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER
        await works(site, relay)
        changes = await relay.relay.reload()
        assert [added.route.name for added in changes.add] == ["good", "bad"]
        assert relay.own_port("bad") == port


async def test_a_fault_in_loading_is_a_refused_reload_and_no_more(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """TESTPLAN 40: pairings and routes survive any bug that a file may trigger in the loader."""

    def fail(path: Path, **options: object) -> None:
        raise RuntimeError("nobody thought of this")

    async with site.relay() as relay:
        one, two = await join_ends(site, relay)
        with monkeypatch.context() as patch:
            patch.setattr("frelay.relay.reload.load", fail)
            relay.relay.request_reload()
            event = "a bug in frelay ended this reload, the old configuration stays"
            await relay.log(event)
        assert "nobody thought of this" in kept_reason(relay)
        await one.send(TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER
        await works(site, relay)
        relay.relay.request_reload()
        await relay.log("reloaded")
        # The site fails a test for every bug that is logged; the test has caused this one on purpose.
        relay.events[:] = [entry for entry in relay.events if entry["event"] != event]


async def test_all_problems_are_told_at_once(site: Site) -> None:
    """TESTPLAN 40: the operator sees all problems with file and line, and not only the first."""
    async with site.relay() as relay:
        site.write(DEMO + "colour = 1\nflavour = 2\n" + DEMO)
        logged = await refused(relay)
        assert "colour" in logged
        assert "flavour" in logged
        assert "there is a route" in logged
        assert relay.relay.last_reload_error is not None
        assert all(problem.line for problem in relay.relay.last_reload_error.problems)


async def test_a_missing_file_is_told_with_them(site: Site) -> None:
    async with site.relay() as relay:
        site.relay_paths[0].unlink()
        site.write(DEMO + "colour = 1\n")
        logged = await refused(relay)
        assert "colour" in logged
        assert f"{site.relay_paths[0]} does not exist" in logged
        assert len(logged.splitlines()) == 2


async def test_the_same_by_signal_to_a_process(site: Site) -> None:
    """TESTPLAN 40: SIGHUP with a bad file leaves a real relay as it was; after a good one it takes the change over."""
    async with site.process(options=["--no-watch"]) as relay:
        one, two = await join_ends(site, relay)
        site.config.write_text("[[route")
        relay.signal(signal.SIGHUP)
        await relay.log("reload refused, the old configuration stays")
        await one.send(TLS_HEADER + b"still here")
        assert await two.receive_exactly(13) == TLS_HEADER + b"still here"
        site.write(DEMO + GOOD)
        relay.signal(signal.SIGHUP)
        assert (await relay.log("reloaded"))["added"] == ["good"]
        await two.send(TLS_HEADER)
        assert await one.receive_exactly(3) == TLS_HEADER
        relay.signal(signal.SIGTERM)
        await relay.log("draining")
        one.party.close()
        two.party.close()
        assert await relay.exit_code() == 0
