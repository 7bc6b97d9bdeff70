"""On a terminal ``frelay connect`` says what it does; elsewhere, and with --quiet, only what failed."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from frelay.net.sockets import format_address
from support.commands import arguments
from support.connects import dial, offering, still_echoes
from support.services import echo, nobody, serving
from support.site import DEMO, Site
from support.waiting import TIMEOUT


class Screen:
    """The text that a command has written on its terminal."""

    def __init__(self) -> None:
        self.text = ""
        self._more = trio.Event()

    async def read(self, descriptor: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(descriptor)
            try:
                data = os.read(descriptor, 65536)
            except OSError:
                return  # no process has the terminal open any more
            self.text += data.decode().replace("\r\n", "\n")
            self._more.set()
            self._more = trio.Event()

    async def shows(self, text: str) -> str:
        """Wait for ``text``; returns the rest of its line."""
        with trio.move_on_after(TIMEOUT):
            while text not in self.text or "\n" not in self.text.partition(text)[2]:
                await self._more.wait()
        assert text in self.text, self.text
        return self.text.partition(text)[2].partition("\n")[0]


@asynccontextmanager
async def on_a_terminal(line: list[str]) -> AsyncIterator[tuple[Screen, trio.Process]]:
    ours, theirs = pty.openpty()
    screen = Screen()
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs
        )
        os.close(theirs)
        nursery.start_soon(screen.read, ours)
        try:
            yield screen, process
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()
    os.close(ours)


async def test_each_step_on_a_terminal(site: Site) -> None:
    async with serving(echo) as service, site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        async with (
            on_a_terminal(arguments(site, place, "func2", "func1", "--to", service.address)) as (there, _),
            on_a_terminal(arguments(site, place, "func1", "func2", "--listen", "127.0.0.1:0")) as (here, _),
        ):
            assert await there.shows("frelay: waiting on route demo as func2 ") == "(dns:func2.demo)"
            async with await dial(await here.shows("frelay: listening on ")) as caller:
                await still_echoes(caller, b"12345")
                pairing = (await here.shows("frelay: paired with dns:func2.demo (pairing ")).rstrip(")")
                await there.shows(f"frelay: paired with dns:func1.demo (pairing {pairing})")
                await caller.send_eof()
                await here.shows(f"frelay: pairing {pairing} ended: 5 bytes sent, 5 received")


async def test_with_a_key_each_step_names_it(site: Site) -> None:
    """And says that the party is not decided yet, where the certificate fits both."""
    site.add("both", site.ca.party(dns=["both.demo"]))
    routes = DEMO.replace('"dns:func1.demo"', '["dns:func1.demo", "dns:both.demo"]')
    routes = routes.replace('"dns:func2.demo"', '["dns:func2.demo", "dns:both.demo"]')
    key = "<b>job/1</b>&%s"
    async with serving(echo) as service, site.relay(routes) as relay:
        place = f"127.0.0.1:{relay.port()}"
        to = arguments(site, place, "both", "func2", "--to", service.address, "--meet", key)
        here = arguments(site, place, "func2", "both", "--listen", "127.0.0.1:0", "--meet", key)
        async with on_a_terminal(to) as (there, _), on_a_terminal(here) as (listening, _):
            assert await there.shows("frelay: waiting on ") == f"route demo, key {key}, as either party (dns:both.demo)"
            async with await dial(await listening.shows("frelay: listening on ")) as caller:
                await still_echoes(caller, b"12345")
                await listening.shows("frelay: paired with dns:both.demo ")
                await there.shows("frelay: paired with dns:func2.demo ")


async def test_a_key_that_nobody_else_names(site: Site) -> None:
    async with site.relay(sections="[limits]\nwait_timeout = 0.5\n") as relay:
        other = await site.party(relay, "func1")
        await other.join(meet="job/01")
        await other.expect("WAITING")
        line = arguments(site, f"127.0.0.1:{relay.port()}", "func2", "func1", "--meet", "job/1")
        async with on_a_terminal(line) as (screen, process):
            assert await screen.shows("frelay: waiting on ") == "route demo, key job/1, as func2 (dns:func2.demo)"
            with trio.fail_after(TIMEOUT):
                assert await process.wait() == 4
            assert await screen.shows("frelay: wait-timeout: ") == "nobody came with this key within 0.5 s"


async def test_quiet(site: Site) -> None:
    """Failures only, on a terminal as elsewhere."""
    async with site.relay() as relay:
        place = f"127.0.0.1:{relay.port()}"
        line = arguments(site, place, "func1", "func2", "--wait", "1.5", "--quiet")
        async with on_a_terminal(line) as (screen, process):
            with trio.fail_after(TIMEOUT):
                assert await process.wait() == 4
            await screen.shows("nobody came within ")
            assert screen.text.count("\n") == 1


async def failure(line: list[str], code: int = 1) -> str:
    """The one line that a failing command writes."""
    with trio.fail_after(TIMEOUT):
        done = await trio.run_process(line, capture_stderr=True, check=False)
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert text.startswith("frelay: ") == (code == 1)
    assert text.count("\n") == 1 or code == 2, text
    return text.removeprefix("frelay: ").rstrip("\n")


async def test_an_address_that_is_in_use_is_named(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = format_address(other.getsockname())
        line = arguments(site, "127.0.0.1:1", "func1", "func2", "--listen", place)
        assert await failure(line) == f"cannot listen on {place}: Address already in use"


@pytest.mark.parametrize("what", ["a socket in use", "a file", "no directory"])
async def test_a_unix_socket_that_cannot_be_is_named(site: Site, what: str) -> None:
    path = site.directory / "socket"
    reason = "Address already in use"
    with socket.socket(socket.AF_UNIX) as other:
        if what == "a socket in use":
            other.bind(str(path))
            other.listen()
        elif what == "a file":
            path.write_text("precious")
            reason = "there is a file of that name already, which is no socket"
        else:
            path = site.directory / "nowhere" / "socket"
            reason = "No such file or directory"
        line = arguments(site, "127.0.0.1:1", "func1", "func2", "--listen", f"unix:{path}")
        assert await failure(line) == f"cannot listen on unix:{path}: {reason}"
    if what == "a file":
        assert path.read_text() == "precious"


async def test_what_is_no_address_is_usage(site: Site) -> None:
    for option in ("--listen", "--to"):
        for place in ("unix:", "127.0.0.1", f"unix:/{'x' * 108}", ":80", "localhost:70000"):
            await failure(arguments(site, "127.0.0.1:1", "func1", "func2", option, place), 2)
    await failure(arguments(site, "127.0.0.1:1", "func1", "func2", "--to", "127.0.0.1:1", "--concurrency", "0"), 2)


async def test_a_service_that_is_down_is_named(site: Site) -> None:
    """TCP or Unix socket; the text does not blame the caller's side."""
    async with site.relay() as relay:
        with nobody() as tcp:
            for place in (tcp, f"unix:{site.directory}/nobody"):
                async with offering(site, relay, place) as there:
                    line = arguments(site, f"127.0.0.1:{relay.port()}", "func1", "func2")
                    await failure(line)
                    reason = (await there.say("failed"))["reason"]
                    assert reason.startswith(f"no connection to the local service {place}: "), reason
