"""The operator's commands over TLS: both sides show certificates, and each wrong one has its own message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from support.certs import TestAuthority
from support.commands import Said, ask, frelay_command
from support.ports import free_port
from support.site import DEMO, Site


@pytest.fixture
def place(site: Site) -> str:
    site.add("operator", site.ca.party(dns=["operator.demo"]))
    return f"127.0.0.1:{free_port()}"


@asynccontextmanager
async def served(site: Site, place: str) -> AsyncIterator[None]:
    async with site.process(DEMO, sections=f'[admin]\nlisten = "{place}"\nallow = ["dns:operator.demo"]\n'):
        yield


def credentials(site: Site, name: str = "operator", ca: Path | None = None) -> list[str]:
    cert, key = site.paths[name]
    return ["--cert", str(cert), "--key", str(key), "--ca", str(ca or site.ca_path)]


def only_message(said: Said) -> str:
    assert (said.code, said.stdout) == (1, "")
    (message,) = said.messages
    return message


async def test_who_is_allowed_does_everything(site: Site, place: str) -> None:
    add = ("route", "add", "two", "--listen", "127.0.0.1:0", "--func1", "dns:a.demo", "--func2", "dns:b.demo")
    shown = credentials(site)
    async with served(site, place):
        for command in (
            ("status",),
            add,
            ("route", "list"),
            ("route", "show", "two"),
            ("route", "delete", "two"),
            ("reload",),
            ("plan", "-c", str(site.config)),
            ("top", "--interval", "0.1"),
        ):
            said = await ask(*command, "--admin", f"https://{place}", *shown)
            assert (said.code, said.stderr) == (0, ""), command
        assert (await ask("status", "-c", site.config, *shown)).code == 0
        cert, key = site.paths["operator"]
        env = {"FRELAY_ADMIN": place, "FRELAY_ADMIN_CERT": str(cert), "FRELAY_ADMIN_KEY": str(key)}
        assert (await ask("status", env={**env, "FRELAY_ADMIN_CA": str(site.ca_path)})).code == 0


async def test_the_certificate_may_hold_its_key(site: Site, place: str) -> None:
    cert, key = site.paths["operator"]
    both = site.directory / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    async with served(site, place):
        said = await ask("status", "--admin", place, "--cert", both, "--ca", site.ca_path)
    assert said.code == 0


async def test_who_is_not_on_the_list_is_told_where_to_look(site: Site, place: str) -> None:
    async with served(site, place):
        message = only_message(await ask("status", "--admin", place, *credentials(site, "func1")))
    assert message.startswith(f"frelay: {place} closed the connection without an answer: is a name of --cert in ")


async def test_a_certificate_of_another_authority(site: Site, place: str) -> None:
    site.add("stranger", TestAuthority("other CA").party(dns=["operator.demo"]))
    async with served(site, place):
        message = only_message(await ask("status", "--admin", place, *credentials(site, "stranger")))
    assert message == f"frelay: {place} does not accept --cert: unknown ca"


async def test_a_relay_of_another_authority(site: Site, place: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = TestAuthority("other CA").write(tmp_path / "other")
    async with served(site, place):
        message = only_message(await ask("status", "--admin", place, *credentials(site, ca=other)))
    assert message.startswith(f"frelay: the certificate of {place} is not valid for '127.0.0.1' with this --ca: ")


async def test_a_relay_of_another_name(site: Site, place: str) -> None:
    """The name is checked: the host that was dialled, or the one that --server-name gives."""
    async with served(site, place):
        wrong = await ask("status", "--admin", place, *credentials(site), "--server-name", "other.test")
        right = await ask("status", "--admin", place, *credentials(site), "--server-name", "relay.test")
    assert "is not valid for 'other.test' with this --ca: Hostname mismatch" in only_message(wrong)
    assert right.code == 0


def test_nobody_listens(site: Site, place: str) -> None:
    message = only_message(frelay_command("status", "--admin", place, *credentials(site)))
    assert message == f"frelay: no relay is running at {place}: connection refused (from --admin)"


def test_a_host_that_nobody_knows(site: Site, place: str) -> None:
    message = only_message(frelay_command("status", "--admin", "no.such.invalid:1", *credentials(site)))
    assert message.startswith("frelay: no.such.invalid:1 cannot be reached: ")


async def test_a_port_that_is_something_else(site: Site, place: str) -> None:
    """A route accepts the same certificates, but has another protocol."""
    async with site.process(DEMO) as relay:
        route = f"127.0.0.1:{relay.port()}"
        message = only_message(await ask("status", "--admin", route, *credentials(site)))
    assert message.startswith(f"frelay: {route} ")


def test_files_that_are_wrong(site: Site, place: str) -> None:
    cert, key = site.paths["operator"]
    missing = frelay_command("status", "--admin", place, "--cert", "no.pem", "--ca", site.ca_path)
    assert only_message(missing) == "frelay: cert: there is no file no.pem"
    other = frelay_command(
        "status", "--admin", place, "--cert", cert, "--key", site.paths["func1"][1], "--ca", site.ca_path
    )
    assert "are no PEM certificate and its key" in only_message(other)
    no_ca = frelay_command("status", "--admin", place, "--cert", cert, "--key", key, "--ca", key)
    assert "holds no readable PEM certificate" in only_message(no_ca)
