"""Whatever a stranger calls itself (by certificate, server name, protocol or route), it cannot write into the log.

It cannot make a line of its own, nor move the cursor of a reader. TESTPLAN 54. ``tests/unit/test_log.py`` shows this
for every kind of value; here the names come over the wire.
"""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
from pathlib import Path
from typing import Final

import pytest
import trio
from cryptography import x509

from frelay.pki.authority import Authority
from frelay.relay.logging import LogFormat
from support.certs import TestAuthority
from support.commands import relay_logging_to
from support.der import der, san_der
from support.site import Site
from support.waiting import TIMEOUT

FORGED: Final = "2026-11-24T20:00:00Z [info     ] forged"
HOSTILE: Final = f"x\n{FORGED}\r\x1b[2J\x07\x7f\u202eabc\u2028"
# What each of them would leave in the log if it were not escaped.
_CONTROL: Final = re.compile(r"[^\n -~]")


async def _call(site: Site, port: int, name: str, server_name: str | None, alpn: list[str], route: str | None) -> None:
    """Connect with these names, and read the answer."""
    context = site.context(name, alpn=alpn)
    context.check_hostname = False  # otherwise it would give up before the relay answers
    party = await site.connect(port, name, server_hostname=server_name, context=context)
    with trio.fail_after(TIMEOUT):
        try:
            await party.handshake()
            if alpn == ["frelay/1"]:
                await party.join(**({} if route is None else {"route": route}))
            while await party.receive():
                pass
        except (ssl.SSLError, trio.BrokenResourceError):
            pass  # refused by an alert
    party.close()


@pytest.mark.parametrize("format_", ["console", "json"])
async def test_no_name_can_forge_a_line(site: Site, tmp_path: Path, format_: LogFormat) -> None:
    root = TestAuthority().odd(None, common_name=HOSTILE, ca=True)
    other = TestAuthority(authority=Authority(root.certificate, root.private_key))
    site.add("stranger", other.odd(san_der(dns=[HOSTILE.encode()], uris=[b"spiffe://x/\x1b[2J"]), common_name=HOSTILE))
    site.add("verified", site.ca.odd(san_der(dns=[b"a\n\x1b[2J.demo"]), common_name=HOSTILE))
    site.add("mail", site.ca.odd([x509.OtherName(x509.ObjectIdentifier("1.2.3"), der(0x0C, HOSTILE.encode()))]))
    calls: list[tuple[str, str | None, list[str], str | None]] = [
        ("stranger", "localhost", ["frelay/1"], None),
        ("verified", "localhost", ["frelay/1"], None),
        ("mail", "localhost", ["frelay/1"], None),
        ("func1", "localhost", [f"h2\n{FORGED}\x1b[2J"], None),
        ("verified", "sni\x1b[2J", ["frelay/1"], None),
        ("verified", "sni\n\x1b[2J", [], None),
        ("func1", "localhost", ["frelay/1"], f"demo\n{FORGED}"),
        ("func1", "localhost", ["frelay/1"], 'demo" level=info x="y'),
        ("func1", "localhost", ["frelay/1"], "\u202eomed"),
    ]
    path = tmp_path / "log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        async with relay_logging_to(site, log, "--log-format", format_) as (process, port):
            for call in calls:
                await _call(site, port, *call)
            process.send_signal(signal.SIGTERM)
            await process.wait()
    finally:
        os.close(log)
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert not _CONTROL.search(text), _CONTROL.search(text)
    assert len([line for line in lines if "refused" in line]) == len(calls)
    for line in lines:
        assert not line.startswith(FORGED)
        if format_ == "json":
            json.loads(line)
        else:
            assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z \[(debug|info|warning|error) *\] ", line), line
    # The names have arrived; otherwise this test would show nothing.
    assert all(text.count(word) for word in ("forged", "otherName", "sni", "h2", "level=info x="))
