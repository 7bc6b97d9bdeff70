"""What a foreign scanner says about a route: only TLS 1.3, and nothing weak in it.

sslscan, since it is done in a second; it looks at the handshake alone, and so does not get beyond what a stranger gets.
What it does not look for, tickets and resumption, is the matter of test_no_session_is_ever_resumed.py.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import trio

from support.relay import RelayProcess
from support.site import Site
from support.tools import tool
from support.waiting import TIMEOUT

# It makes a connection for each question, many at once.
LIMITS = "[limits]\nmax_pre_auth_per_ip = 256\n"
STRONG = 128
"""Bits of security, of ciphers and key exchanges."""


async def scan(site: Site, relay: RelayProcess, *options: str) -> ElementTree.Element:
    report = site.directory / "scan.xml"
    command = [tool("sslscan"), f"--xml={report}", "--sni-name=localhost", *options, f"127.0.0.1:{relay.port()}"]
    with trio.fail_after(3 * TIMEOUT):
        await trio.run_process(command, capture_stdout=True, capture_stderr=True)
    found = ElementTree.parse(report).getroot().find("ssltest")
    assert found is not None
    return found


@pytest.mark.parametrize("known", [True, False], ids=["with a certificate", "as a stranger"])
async def test_tls_1_3_and_nothing_weak(site: Site, known: bool) -> None:
    """The relay speaks the same way to everybody, strangers too."""
    certificate, key = site.paths["func1"]
    options = [f"--certs={certificate}", f"--pk={key}"] if known else []
    async with site.process(sections=LIMITS) as relay:
        found = await scan(site, relay, *options)
        protocols = {(one.get("type"), one.get("version")): one.get("enabled") for one in found.iter("protocol")}
        assert [name for name, enabled in protocols.items() if enabled != "0"] == [("tls", "1.3")]
        assert {("ssl", "3"), ("tls", "1.0"), ("tls", "1.1"), ("tls", "1.2")} < protocols.keys()
        strengths = {one.get("cipher") or one.get("name"): int(one.get("bits", 0)) for one in found.iter("cipher")}
        strengths |= {one.get("name"): int(one.get("bits", 0)) for one in found.iter("group")}
        assert {"TLS_AES_128_GCM_SHA256", "x25519"} <= strengths.keys(), "it has seen some"
        assert not {name: bits for name, bits in strengths.items() if bits < STRONG}
        renegotiation = found.find("renegotiation")
        assert renegotiation is not None
        assert (renegotiation.get("supported"), renegotiation.get("secure")) == ("0", "0")
        assert all(heartbleed.get("vulnerable") == "0" for heartbleed in found.iter("heartbleed"))
        assert all(compression.get("supported") == "0" for compression in found.iter("compression"))
        # The relay still works.
        party = await site.party(relay, "func1")
        await party.join()
        await party.expect("WAITING")
