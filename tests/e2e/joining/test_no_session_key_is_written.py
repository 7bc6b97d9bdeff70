"""SSLKEYLOGFILE makes many programs write the keys of their TLS connections to a file; frelay does not.

The relay's OpenSSL ignores the variable, and Python's ``ssl`` reads it only in ``create_default_context``, which
frelay's clients do not use. So a person who can set a function's environment still cannot read its traffic.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio

from support.clients import CLIENTS, Client, answer, ask, options, run_function
from support.commands import arguments, command
from support.site import DEMO, Site


def test_the_variable_does_something_where_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests below would show nothing."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    context = ssl.create_default_context()
    assert context.keylog_filename == str(tmp_path / "keys")


@pytest.mark.parametrize("mode", ["handoff", "tunnel"])
async def test_neither_the_relay_nor_the_command_writes_one(site: Site, tmp_path: Path, mode: str) -> None:
    keys = tmp_path / "keys"
    env = {"SSLKEYLOGFILE": str(keys)}
    async with site.process(DEMO, env=env) as relay:
        place = f"127.0.0.1:{relay.port()}"
        async with (
            command(arguments(site, place, "func1", "func2", "--mode", mode), env) as one,
            command(arguments(site, place, "func2", "func1", "--mode", mode), env) as two,
        ):
            await one.stdin.send_all(b"hello")
            await one.stdin.aclose()
            assert await two.output() == b"hello"
            await two.stdin.aclose()
            assert await one.exit_code() == await two.exit_code() == 0
        assert await relay.log("pairing ended", outcome="closed")
    assert not keys.exists()


@pytest.mark.parametrize("client", CLIENTS)
async def test_no_client_in_python_writes_one(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    keys = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(keys))
    async with site.relay() as relay, trio.open_nursery() as nursery:
        place = f"127.0.0.1:{relay.port()}"
        nursery.start_soon(run_function, client, place, ask(b"hello"), options(site, "func1", "func2"))
        given = options(site, "func2", "func1")
        assert await run_function(client, place, answer(b"hello yourself"), given) == b"hello"
    assert not keys.exists()
