"""An authority in ``client_ca`` is trusted because it stands there, whether or not its own issuer stands there too.

"The CA" of cert-manager, Vault or a cloud's private CA is often the issuing authority, without the root above it.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
from cryptography import x509

from frelay.config.load import load
from frelay.errors import ConfigError
from frelay.pki.files import certificates_pem
from frelay.relay.prepare import prepare
from support.certs import Credential, TestAuthority
from support.clients import CLIENTS, Client, answer, ask, options
from support.clients import meet as clients_meet
from support.commands import frelay_command
from support.ends import MODES, OPEN, End, join_ends
from support.party import pair
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import TIMEOUT, eventually

NAMES: Final = ("func1", "func2")


class Pki:
    """A root, an authority below it that issues functions, and the files of a site."""

    def __init__(self, directory: Path) -> None:
        self.root = TestAuthority.root_for_intermediates()
        self.issuing = self.root.intermediate("issuing CA")
        self.site = Site(directory, self.issuing)
        self.site.client_ca = directory / "anchors.pem"
        self.trust(self.issuing)

    def trust(self, *authorities: TestAuthority) -> None:
        """Make them ``client_ca``."""
        self.site.client_ca.write_bytes(certificates_pem([one.authority.certificate for one in authorities]))

    def lists(self, *lists: bytes) -> None:
        """Make them ``crl``."""
        self.site.ca.write_crl(self.site.directory, b"".join(lists))

    def send_leaf_alone(self) -> None:
        """From now on functions show no intermediate."""
        for name in NAMES:
            self.site.paths[name][0].write_bytes(self.site.credentials[name].cert_pem)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


async def meet(pki: Pki, relay: RelayInProcess) -> None:
    await pair(await pki.site.party(relay, "func1"), await pki.site.party(relay, "func2"))


async def refusal(pki: Pki, relay: RelayInProcess, name: str = "func1") -> str:
    """Why the relay refuses ``name``, as its log says."""
    seen = len(relay.logged("refused"))
    await (await pki.site.connect(relay, name)).alert()
    await eventually(lambda: len(relay.logged("refused")) > seen, "it is refused")
    return str(relay.logged("refused")[-1]["reason"])


async def talk(one: End, two: End) -> None:
    with trio.fail_after(TIMEOUT):
        for source, sink in ((one, two), (two, one)):
            await source.send(b"still here")
            assert await sink.receive_exactly(10) == b"still here"


async def inspected(relay: RelayInProcess) -> None:
    await eventually(lambda: not relay.relay.parts.recheck.is_requested, "the recheck begins")
    await trio.testing.wait_all_tasks_blocked()


# --- it works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", ["the chain", "the leaf"])
async def test_the_issuing_authority_alone(pki: Pki, shown: str) -> None:
    if shown == "the leaf":
        pki.send_leaf_alone()
    async with pki.site.relay() as relay:
        await meet(pki, relay)
        assert not relay.logged("configuration warning")


async def test_an_authority_below_it_that_the_function_shows(pki: Pki) -> None:
    below = pki.issuing.intermediate("below")
    for name in NAMES:
        pki.site.add(name, below.party(dns=[f"{name}.demo"]))
    async with pki.site.relay() as relay:
        await meet(pki, relay)


def test_check_and_why_agree(pki: Pki) -> None:
    said = frelay_command("check", "-c", pki.site.write())
    assert (said.code, said.stderr) == (0, "")
    found = json.loads(
        frelay_command("why", "--json", "-c", pki.site.config, "--cert", pki.site.paths["func1"][0]).stdout
    )
    assert found["admitted"] is True


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_without_a_descriptor_for_it_nothing_is_loaded(pki: Pki, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(name: str, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "memfd_create", fail)
    with pytest.raises(ConfigError, match=os.strerror(number)):
        prepare(load(pki.site.write()))


def test_a_kernel_that_knows_no_seals_will_do(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    make = os.memfd_create

    def old(name: str, flags: int) -> int:
        if flags & ~os.MFD_CLOEXEC:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return make(name, flags)

    monkeypatch.setattr(os, "memfd_create", old)
    assert prepare(load(pki.site.write())) is not None


async def test_another_authority_of_its_name_is_no_anchor(pki: Pki) -> None:
    twin = TestAuthority.root_for_intermediates().intermediate("issuing CA")
    pki.site.add("func1", twin.party(dns=["func1.demo"]))
    async with pki.site.relay() as relay:
        assert "issuer" in await refusal(pki, relay) or "signature" in await refusal(pki, relay)


async def test_nor_is_the_root_above_it(pki: Pki) -> None:
    """Only what stands in the file is trusted, not what its issuer has issued besides."""
    pki.site.add("func1", pki.root.intermediate("another").party(dns=["func1.demo"]))
    async with pki.site.relay() as relay:
        assert "issuer" in await refusal(pki, relay)


@pytest.mark.parametrize("client", CLIENTS)
async def test_functions_go_by_the_issuing_authority_alone_too(pki: Pki, client: Client) -> None:
    """As their ``ca``, in the TLS to the relay and on both sides of the inner TLS."""
    site = pki.site
    site.ca_path = site.client_ca
    async with site.relay() as relay:
        address = f"127.0.0.1:{relay.port()}"
        given = (options(site, "func1", "func2"), options(site, "func2", "func1"))
        assert await clients_meet((client, client), address, (ask(b"a"), answer(b"b")), given) == (b"b", b"a")


# --- and revocation holds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", ["the chain", "the leaf"])
async def test_its_own_list_is_enough(pki: Pki, shown: str) -> None:
    bad = pki.site.add("bad", pki.issuing.party(dns=["func1.demo"]))
    if shown == "the leaf":
        pki.send_leaf_alone()
    pki.lists(pki.issuing.crl(revoked=[bad]))
    assert frelay_command("check", "-c", pki.site.write(crl=True)).code == 0
    async with pki.site.relay(crl=True) as relay:
        await meet(pki, relay)
        assert "revoked" in await refusal(pki, relay, "bad")


async def test_another_root_of_its_issuers_name_changes_nothing(pki: Pki) -> None:
    """The list of that root has the name of the anchor's issuer, and another key."""
    twin = TestAuthority.root_for_intermediates()
    assert twin.authority.certificate.subject == pki.issuing.authority.certificate.issuer
    bad = pki.site.add("bad", pki.issuing.party(dns=["func1.demo"]))
    pki.trust(pki.issuing, twin)
    pki.lists(pki.issuing.crl(revoked=[bad]), twin.crl())
    async with pki.site.relay(OPEN, crl=True) as relay:
        await meet(pki, relay)
        assert "revoked" in await refusal(pki, relay, "bad")
        ends = await join_ends(pki.site, relay)
        await relay.relay.reload()
        await inspected(relay)
        await talk(*ends)


async def test_an_authority_below_it_needs_a_list_too(pki: Pki) -> None:
    below = pki.issuing.intermediate("below")
    for name in NAMES:
        pki.site.add(name, below.party(dns=[f"{name}.demo"]))
    pki.lists(pki.issuing.crl())
    async with pki.site.relay(crl=True) as relay:
        assert "unable to get certificate CRL (at depth 0" in await refusal(pki, relay)
        # The signature of a list is verified with the authority's certificate when it is loaded.
        pki.trust(pki.issuing, below)
        pki.lists(pki.issuing.crl(number=2), below.crl())
        await relay.relay.reload()
        await meet(pki, relay)


async def test_an_authority_below_it_may_be_revoked(pki: Pki) -> None:
    below = pki.issuing.intermediate("below")
    itself = Credential("below", below.authority.certificate, below.authority.private_key, ())
    for name in NAMES:
        pki.site.add(name, below.party(dns=[f"{name}.demo"]))
    pki.trust(pki.issuing, below)
    pki.lists(pki.issuing.crl(revoked=[itself]), below.crl())
    async with pki.site.relay(crl=True) as relay:
        assert "revoked (at depth 1" in await refusal(pki, relay)


async def test_where_its_root_is_there_too_the_root_may_revoke_it(pki: Pki) -> None:
    """If the issuer of an authority stands in the file too, the chain continues up to that issuer."""
    itself = Credential("issuing", pki.issuing.authority.certificate, pki.issuing.authority.private_key, ())
    pki.trust(pki.root, pki.issuing)
    pki.lists(pki.root.crl(), pki.issuing.crl())
    async with pki.site.relay(crl=True) as relay:
        await meet(pki, relay)
        pki.lists(pki.root.crl(revoked=[itself], number=2), pki.issuing.crl())
        await relay.relay.reload()
        assert "revoked (at depth 1" in await refusal(pki, relay)


async def test_where_its_root_is_there_too_the_roots_constraints_hold(tmp_path: Path) -> None:
    forbidden = x509.NameConstraints(None, [x509.DNSName("demo")])
    root = TestAuthority.root_for_intermediates("strict root", critical=[forbidden])
    pki = Pki(tmp_path)
    issuing = root.intermediate("issuing below a strict root")
    pki.site.add("func1", issuing.party(dns=["func1.demo"]))
    pki.trust(pki.issuing, root, issuing)
    async with pki.site.relay() as relay:
        assert "excluded subtree violation" in await refusal(pki, relay)


# --- after a reload -------------------------------------------------------------------------------------------------


async def test_who_is_in_is_judged_again_by_it(pki: Pki) -> None:
    """Pairings survive reloads with new lists, and end when a list has their certificate or the anchor is removed."""
    pki.lists(pki.issuing.crl())
    pki.site.add("other", pki.issuing.party(dns=["func1.demo"]))
    async with pki.site.relay(OPEN, crl=True) as relay:
        pairs = [await join_ends(pki.site, relay, mode, mode) for mode in MODES]
        bad = await join_ends(pki.site, relay, names=("other", "func2"))
        pki.lists(pki.issuing.crl(number=2))
        await relay.relay.reload()
        await inspected(relay)
        for ends in (*pairs, bad):
            await talk(*ends)
        pki.lists(pki.issuing.crl(revoked=[pki.site.credentials["other"]], number=3))
        await relay.relay.reload()
        await eventually(lambda: len(relay.logged("pairing ended")) == 1, "one is ended")
        await inspected(relay)
        for ends in pairs:
            await talk(*ends)
        stranger = TestAuthority("stranger")
        pki.trust(stranger)
        pki.lists(stranger.crl())
        await relay.relay.reload()
        await eventually(lambda: len(relay.logged("pairing ended")) == len(pairs) + 1, "all are ended")
        assert {entry["outcome"] for entry in relay.logged("pairing ended")} == {"revoked"}


async def test_the_root_may_take_its_place(pki: Pki) -> None:
    """Functions that are in need not connect again with a longer chain."""
    async with pki.site.relay(OPEN) as relay:
        waiting = await pki.site.party(relay, "func1")
        await waiting.join()
        await waiting.expect("WAITING")
        pki.trust(pki.root)
        await relay.relay.reload()
        await inspected(relay)
        other = await pki.site.party(relay, "func2")
        await other.join()
        await waiting.expect("PAIRED")
