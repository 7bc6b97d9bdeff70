"""New certificates come by reload: the next handshake has them, what runs is not touched, and they always fit."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest
import trio
from cryptography import x509

from frelay.errors import ConfigError
from support.certs import Credential
from support.ends import OPEN, End, join_all, join_ends
from support.party import Party, pair
from support.relay import RelayInProcess
from support.site import Site
from support.waiting import eventually


def shown_by(party: Party) -> str:
    """The subject of the certificate that the relay showed to this party."""
    der = party.tls.getpeercert(True)
    assert der is not None
    return x509.load_der_x509_certificate(der).subject.rfc4514_string()


async def still_talks(one: End, two: End) -> None:
    for source, sink in ((one, two), (two, one)):
        await source.send(b"as before")
        assert await sink.receive_exactly(9) == b"as before"


async def shows(site: Site, relay: RelayInProcess, subject: str) -> None:
    party = await site.party(relay, "func1")
    assert shown_by(party) == subject
    party.close()


async def test_the_next_handshake_has_the_new_certificate(site: Site) -> None:
    """Pairings that run go on in every mode, though the certificate that they began with is gone."""
    async with site.relay(OPEN) as relay:
        pairs = await join_all(site, relay)
        await shows(site, relay, "CN=relay")
        site.ca.relay(common_name="the next one").write(site.directory, "relay")
        await relay.relay.reload()
        await shows(site, relay, "CN=the next one")
        for one, two in pairs:
            await still_talks(one, two)
        assert not relay.logged("pairing ended")
        await still_talks(*await join_ends(site, relay))


async def test_a_handshake_that_has_begun_ends_with_the_certificate_that_it_began_with(site: Site) -> None:
    """A reload in the middle of a handshake does not make it fail."""
    async with site.relay(OPEN) as relay:
        one = await site.connect(relay, "func1")
        # The relay's first flight has arrived, so it has chosen its certificate.
        with pytest.raises(ssl.SSLWantReadError):
            one.tls.do_handshake()
        await one.flush()
        await one.pull()
        site.ca.relay(common_name="the next one").write(site.directory, "relay")
        await relay.relay.reload()
        await one.handshake()
        assert shown_by(one) == "CN=relay"
        two = await site.party(relay, "func2")
        assert shown_by(two) == "CN=the next one"
        await pair(one, two)


async def test_who_waits_is_paired_across_a_reload(site: Site) -> None:
    """A place in the lobby is kept; the certificate behind it is judged by the new CA bundle, which still holds it."""
    async with site.relay(OPEN) as relay:
        one = await site.party(relay, "func1")
        await one.join()
        await one.expect("WAITING")
        site.ca.relay(common_name="the next one").write(site.directory, "relay")
        await relay.relay.reload()
        two = await site.party(relay, "func2")
        await two.join()
        await two.expect("WAITING")
        assert (await one.expect("PAIRED"))["pairing"] == (await two.expect("PAIRED"))["pairing"]


# --- a swap in the middle of the reading -----------------------------------------------------------------------------


class SlowFile:
    """A file replaced by a FIFO: its reader waits in the middle of a load until the test lets it go on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink()
        os.mkfifo(path, 0o600)

    async def give(self, content: bytes) -> None:
        """Give ``content`` to the one reader that waits now or later; after that it is an ordinary file."""

        def write() -> None:
            new = self.path.with_name(f".{self.path.name}.new")
            new.touch(0o600)
            new.write_bytes(content)
            with open(self.path, "wb") as fifo:  # waits for the reader, which has read the other files by then
                new.replace(self.path)
                fifo.write(content)

        await trio.to_thread.run_sync(write)


async def swapped_in_between(site: Site, relay: RelayInProcess, slow: int, new: Credential) -> None:
    """Reload with a swap of certificate and key after the one was read and before the other is.

    ``slow`` says which of the files is the one that is read second.
    """
    contents = (new.chain_pem, new.key_pem)
    second = SlowFile(site.relay_paths[slow])
    relay.relay.request_reload()
    await second.give(contents[slow])
    site.relay_paths[1 - slow].write_bytes(contents[1 - slow])


async def test_a_swap_between_reading_certificate_and_key(site: Site) -> None:
    """TESTPLAN 43: the old certificate never meets the new key; the reload is refused, and the next one is right."""
    async with site.relay(OPEN) as relay:
        one, two = await join_ends(site, relay)
        new = site.ca.relay(common_name="the next one")
        await swapped_in_between(site, relay, 1, new)
        refused = await relay.log("reload refused, the old configuration stays")
        assert "is not the key of" in refused["problem"]
        await shows(site, relay, "CN=relay")
        await still_talks(one, two)
        await relay.relay.reload()
        await shows(site, relay, "CN=the next one")
        await still_talks(one, two)


async def test_swaps_at_any_moment(site: Site) -> None:
    """TESTPLAN 43: with certificate and key replaced all the time, every handshake that is made shows a whole pair."""
    shown: set[str] = set()
    refusals: set[str] = set()
    async with site.relay(OPEN) as relay:
        over = trio.Event()

        def replace_all_the_time() -> None:
            number = 0
            while not over.is_set():
                site.ca.relay(common_name=f"number {number}").write(site.directory, "relay")
                number += 1

        async def reload_all_the_time() -> None:
            while not over.is_set():
                try:
                    await relay.relay.reload()
                except ConfigError as error:
                    refusals.add(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, replace_all_the_time)
            nursery.start_soon(reload_all_the_time)
            with trio.move_on_after(20):
                while len(shown) < 5:
                    party = await site.party(relay, "func1")
                    shown.add(shown_by(party))
                    party.close()
            over.set()
        assert len(shown) >= 5, "no certificate was ever taken over"
        assert all("is not the key of" in reason for reason in refusals)
        await eventually(lambda: relay.legs == 0, "all of them are gone")
