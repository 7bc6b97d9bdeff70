"""In whatever way a file of the configuration changes, the relay takes the change over by itself, once and whole.

Each test makes a change and then a second one of the same kind, and counts two right reloads and no third. So no test
has to wait for something *not* to happen.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from frelay.config.load import load
from frelay.relay.run import make_relay
from support.ends import join_ends
from support.party import TLS_HEADER
from support.relay import RelayInProcess
from support.site import DEMO, Site
from support.waiting import eventually

REFUSED = "reload refused, the old configuration stays"

Way = Callable[[Path, bytes], None]
"""How a file gets a new content."""


def route(name: str) -> str:
    return DEMO.replace('"demo"', f'"{name}"')


def text_with(site: Site, routes: str) -> bytes:
    """The route file that :meth:`Site.write` would write, without writing it."""
    kept = site.config
    site.config = site.directory / "scratch.txt"
    try:
        return site.write(routes).read_bytes()
    finally:
        site.config.unlink()
        site.config = kept


async def reloaded(relay: RelayInProcess, count: int) -> list[str]:
    """Wait for the ``count``-th reload; gives the routes that are in force after it."""
    await eventually(lambda: len(relay.logged("reloaded")) >= count, f"reload number {count}")
    return sorted(relay.relay.routes)


async def nothing_more(relay: RelayInProcess, reloads: int, refusals: int = 0) -> None:
    """Wait until every request so far is served, and check that there were no more."""
    # The watcher looks again at least this long after an event; a second report of the same change would come now.
    await trio.sleep(0.6)
    assert len(relay.logged("reloaded")) == reloads
    assert len(relay.logged(REFUSED)) == refusals


async def change(way: Way, path: Path, content: bytes) -> None:
    """Change the file while the relay goes on beside it."""
    await trio.to_thread.run_sync(way, path, content)


# --- the route file -------------------------------------------------------------------------------------------


def write_in_place(path: Path, content: bytes) -> None:
    inode = path.stat().st_ino
    path.write_bytes(content)
    assert path.stat().st_ino == inode


def rename_over(path: Path, content: bytes) -> None:
    new = path.with_name(".new")
    new.write_bytes(content)
    new.replace(path)


def delete_and_recreate(path: Path, content: bytes) -> None:
    path.unlink()
    time.sleep(0.01)
    path.write_bytes(content)


def write_in_two_halves_quickly(path: Path, content: bytes) -> None:
    """Write as a program with a small buffer does: for a moment the file is neither old nor new."""
    with path.open("wb", buffering=0) as file:
        file.write(content[: len(content) // 2])
        time.sleep(0.02)
        file.write(content[len(content) // 2 :])


def touch_and_write(path: Path, content: bytes) -> None:
    """Cause events that change nothing around the one that is a change."""
    path.touch()
    path.chmod(0o600)
    path.write_bytes(content)
    path.touch()


def move_away_and_hard_link(path: Path, content: bytes) -> None:
    """As some editors do: the old file becomes a backup, the new one comes by link."""
    new = path.with_name(".new")
    new.write_bytes(content)
    backup = path.with_name("relay.toml~")
    backup.unlink(missing_ok=True)
    path.rename(backup)
    os.link(new, path)
    new.unlink()


WAYS: list[Way] = [
    write_in_place,
    rename_over,
    delete_and_recreate,
    write_in_two_halves_quickly,
    touch_and_write,
    move_away_and_hard_link,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_one_right_reload_each(site: Site, way: Way) -> None:
    """TESTPLAN 41: the new content is in force, and was taken over once; the pairing beside it goes on."""
    async with site.relay(watch=True) as relay:
        one, two = await join_ends(site, relay)
        await change(way, site.config, text_with(site, DEMO + route("a")))
        assert await reloaded(relay, 1) == ["a", "demo"]
        await change(way, site.config, text_with(site, DEMO + route("b")))
        assert await reloaded(relay, 2) == ["b", "demo"]
        first, second = relay.logged("reloaded")
        assert (first["added"], first["removed"]) == (["a"], [])
        assert (second["added"], second["removed"]) == (["b"], ["a"])
        await one.send(TLS_HEADER)
        assert await two.receive_exactly(3) == TLS_HEADER
        await nothing_more(relay, 2)


async def test_a_file_that_stays_half_written_for_a_while(site: Site) -> None:
    """TESTPLAN 41: half a file is refused with a reason, and its second half makes the one right reload."""
    async with site.relay(watch=True) as relay:
        content = text_with(site, DEMO + route("a"))
        with site.config.open("wb", buffering=0) as file:
            file.write(content[:-12])
            await relay.log(REFUSED)
            assert sorted(relay.relay.routes) == ["demo"]
            assert str(relay.relay.last_reload_error) != "None"
            file.write(content[-12:])
        assert await reloaded(relay, 1) == ["a", "demo"]
        assert str(relay.relay.last_reload_error) == "None"
        await nothing_more(relay, 1, refusals=len(relay.logged(REFUSED)))


async def test_a_file_that_is_gone_for_a_while(site: Site) -> None:
    """TESTPLAN 41: a relay outlives its route file, says that it misses it, and takes the next one."""
    async with site.relay(watch=True) as relay:
        site.config.unlink()
        await relay.log(REFUSED)
        assert sorted(relay.relay.routes) == ["demo"]
        site.config.write_bytes(text_with(site, DEMO + route("a")))
        assert await reloaded(relay, 1) == ["a", "demo"]


async def test_the_same_content_again_is_no_change(site: Site) -> None:
    """TESTPLAN 41: what counts is the content; a rewrite of the same bytes reloads nothing."""
    async with site.relay(watch=True) as relay:
        same = site.config.read_bytes()
        for way in WAYS[:3]:
            await change(way, site.config, same)
        await change(rename_over, site.config, text_with(site, DEMO + route("a")))
        assert await reloaded(relay, 1) == ["a", "demo"]
        assert relay.logged("reloaded")[0]["added"] == ["a"]
        await nothing_more(relay, 1)


async def test_a_busy_neighbour_does_not_hold_it_up(site: Site) -> None:
    """TESTPLAN 41: a file beside it that is written all the time, such as a log, gives many events and no reload."""
    over = threading.Event()

    def write_all_the_time() -> None:
        with (site.directory / "noise.log").open("ab", buffering=0) as log:
            while not over.wait(0.001):
                log.write(b"line\n")

    async with site.relay(watch=True) as relay, trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, write_all_the_time)
        try:
            for count, name in enumerate(("a", "b"), start=1):
                await change(rename_over, site.config, text_with(site, DEMO + route(name)))
                assert await reloaded(relay, count) == [name, "demo"]
            await nothing_more(relay, 2)
        finally:
            over.set()


# --- symlinks, as Kubernetes sets them ----------------------------------------------------------------------------


def mount(site: Site) -> Path:
    """Make the site's directory a ConfigMap's: every file is a symlink through ``..data``."""
    volume = site.directory.with_name("volume")
    volume.mkdir()
    swap(site, volume, "v1", site.config.read_bytes())
    for file in site.directory.iterdir():
        (volume / file.name).symlink_to(Path("..data") / file.name)
    return volume


def swap(site: Site, volume: Path, version: str, content: bytes) -> None:
    """A new version beside the old one, ``..data`` turned over to it by rename, the old one deleted."""
    data = volume / "..data"
    old = data.resolve() if data.is_symlink() else None
    shutil.copytree(site.directory, volume / f"..{version}")
    (volume / f"..{version}" / "relay.toml").write_bytes(content)
    new = volume / "..data_tmp"
    new.symlink_to(f"..{version}")
    new.replace(data)
    if old is not None:
        shutil.rmtree(old)


async def test_a_configmap_that_is_swapped(site: Site) -> None:
    """TESTPLAN 41: the ``..data`` swap changes all the files at once, and makes one reload."""
    site.write()
    volume = mount(site)
    own = site.config
    site.config = volume / "relay.toml"
    write = site.write
    site.write = lambda *args, **kwargs: site.config  # type: ignore[method-assign]  # it is there already
    async with site.relay(watch=True) as relay:
        site.write = write  # type: ignore[method-assign]
        site.config = own
        # The second version brings a new certificate, too.
        site.ca.relay(common_name="the second one").write(site.directory, "relay")
        swap(site, volume, "v2", text_with(site, DEMO + route("a")))
        assert await reloaded(relay, 1) == ["a", "demo"]
        trust = relay.relay.parts.active.trust
        assert trust is not None
        assert "the second one" in trust.subject
        swap(site, volume, "v3", text_with(site, DEMO + route("b")))
        assert await reloaded(relay, 2) == ["b", "demo"]
        await nothing_more(relay, 2)


# --- the other files --------------------------------------------------------------------------------------------


async def test_certificate_key_ca_and_crl_are_watched_too(site: Site) -> None:
    """TESTPLAN 41: each of the files that the configuration names makes one reload."""
    site.ca.write_crl(site.directory, site.ca.crl())
    async with site.relay(watch=True, crl=True) as relay:
        site.ca.relay().write(site.directory, "relay")
        await reloaded(relay, 1)
        site.ca.write_crl(site.directory, site.ca.crl(number=2))
        await reloaded(relay, 2)
        site.ca_path.write_bytes(site.ca_path.read_bytes() + b"\n")
        await reloaded(relay, 3)
        await nothing_more(relay, 3)


async def test_files_that_come_after_the_route_file_that_names_them(site: Site) -> None:
    """TESTPLAN 41: a deployment may write its files in any order; the last of them completes it."""
    async with site.relay(watch=True) as relay:
        text = site.config.read_text().replace("relay.pem", "next.pem").replace("relay.key", "next.key")
        await change(rename_over, site.config, text.encode())
        await relay.log(REFUSED)
        site.ca.relay(common_name="the next one").write(site.directory, "next")
        await reloaded(relay, 1)
        trust = relay.relay.parts.active.trust
        assert trust is not None
        assert "the next one" in trust.subject
        # From now on they are watched like all others, and the old ones no longer.
        site.ca.relay(common_name="the one after").write(site.directory, "next")
        await reloaded(relay, 2)
        site.ca.relay(common_name="the forgotten one").write(site.directory, "relay")
        await nothing_more(relay, 2, refusals=len(relay.logged(REFUSED)))


async def test_routes_dir_is_watched(site: Site) -> None:
    """TESTPLAN 41: a file that comes, changes and goes in routes_dir is a route that comes, changes and goes."""
    routes = site.directory / "routes.d"
    routes.mkdir()
    own = 'name = "a"\nlisten = "127.0.0.1:0"\nfunc1 = "dns:func1.demo"\nfunc2 = "dns:func2.demo"\n'
    async with site.relay(watch=True, sections='[relay]\nroutes_dir = "routes.d"\n') as relay:
        (routes / "a.toml").write_text(own)
        assert await reloaded(relay, 1) == ["a", "demo"]
        await change(rename_over, routes / "a.toml", (own + "idle_timeout = 7\n").encode())
        await reloaded(relay, 2)
        assert relay.relay.routes["a"].config.limits.idle_timeout == 7
        (routes / "a.toml").unlink()
        assert await reloaded(relay, 3) == ["demo"]
        await nothing_more(relay, 3)


async def test_a_change_before_the_relay_was_ready_is_not_lost(site: Site) -> None:
    """The file is loaded once more after the watcher has marked it, so that no change falls between the two."""
    late = make_relay(load(site.write(DEMO)), watch_files=True)
    site.write(DEMO + route("a"))
    async with trio.open_nursery() as nursery:
        await nursery.start(late.run)
        assert sorted(late.routes) == ["a", "demo"]
        nursery.cancel_scope.cancel()
