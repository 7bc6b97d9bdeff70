"""Even at level debug the log holds no secret: no ticket, no key, no PEM."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

import pytest
import trio

from support.commands import relay_logging_to
from support.party import TLS_HEADER
from support.site import Site
from support.waiting import TIMEOUT

_WRONG: Final = "5ec2e7" * 10 + "0000"


async def _bring(port: int, ticket: str, data: bytes = b"") -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(f"FRELAY/1 {ticket}\n".encode() + data)
    return stream


@pytest.mark.parametrize("format_", ["console", "json"])
async def test_a_ticket_pairing_at_debug_level(site: Site, tmp_path: Path, format_: str) -> None:
    path = tmp_path / "log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        async with relay_logging_to(site, log, "--log-format", format_) as (process, port):
            one, two = await site.party(port, "func1"), await site.party(port, "func2")
            await one.join(modes=["ticket"])
            await two.join(modes=["ticket"])
            tickets = [(await party.expect("WAITING"), await party.expect("PAIRED"))[1] for party in (one, two)]
            used, unused = (paired["ticket"] for paired in tickets)
            assert len(bytes.fromhex(used)) == len(bytes.fromhex(unused)) == 32
            raw = await _bring(port, used, TLS_HEADER)
            for ticket in (_WRONG, used):  # one that was never issued, and one that is used already
                with trio.fail_after(TIMEOUT):
                    try:
                        assert await (await _bring(port, ticket)).receive_some(1) == b""
                    except trio.BrokenResourceError:
                        pass  # an end as well
            await raw.aclose()
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)
            with trio.fail_after(TIMEOUT * 2):
                for party in (one, two):
                    party.close()
                await process.wait()
    finally:
        os.close(log)
    text = path.read_text()
    assert text.count("the ticket is unknown, used or expired") == 2, (
        "this log tells of tickets, or it would show nothing"
    )
    assert "pairing ended" in text
    for ticket in (used, unused, _WRONG):
        # Nor a part of it that would help to guess the rest.
        assert ticket[:16] not in text
        assert ticket[-16:] not in text
    assert "-----BEGIN" not in text
    for key in site.directory.glob("*.key"):
        body = [line for line in key.read_text().splitlines() if not line.startswith("-----")]
        assert body
        assert not [line for line in body if line in text]
