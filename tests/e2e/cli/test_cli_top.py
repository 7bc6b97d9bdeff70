"""``frelay top``: on a terminal of tmux, with no, few and many routes; and printed without a terminal."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio

from support.admin import ADMIN
from support.commands import FRELAY, ask
from support.party import TLS_HEADER, pair
from support.ports import reserved_port
from support.site import DEMO, Site
from support.tools import tool
from support.waiting import TIMEOUT

OPTIONS: Final = ("--interval", "0.2")


class Terminal:
    """A terminal of tmux, in a server of its own, with one shell in it."""

    def __init__(self, directory: Path) -> None:
        self._tmux: Final = (tool("tmux"), "-S", str(directory / "tmux"), "-f", "/dev/null")
        self.directory = directory

    async def tmux(self, *arguments: str) -> str:
        done = await trio.run_process([*self._tmux, *arguments], capture_stdout=True)
        text: str = done.stdout.decode()
        return text

    async def run(self, *command: str, env: str = "", cells: int = 100, height: int = 30) -> None:
        """Run a command in a new window of this size; afterwards ``EXIT`` and its code, and how the terminal is."""
        line = shlex.join(command)
        # ^C goes to all processes of the terminal, but the shell must stay.
        script = f"trap : INT; stty -g > before; {env} {line}; echo EXIT $?; stty -g > after; exec sleep 1000"
        size = ("-x", str(cells), "-y", str(height), "-c", str(self.directory))
        await self.tmux("new-session", "-d", *size, "sh", "-c", script)
        # Only for this tmux server: the tests may be run inside another tmux.
        await self.tmux("set-option", "-g", "default-terminal", "screen-256color")

    async def keys(self, *keys: str) -> None:
        await self.tmux("send-keys", *keys)

    async def screen(self, *options: str) -> list[str]:
        return (await self.tmux("capture-pane", "-p", *options)).splitlines()

    async def shows(self, condition: Callable[[str], bool], what: str) -> list[str]:
        """The lines of the screen once ``condition`` holds for its text.

        A screen is drawn in pieces: what is to be seen at one time belongs into one condition.
        """
        deadline = trio.current_time() + TIMEOUT
        while True:
            lines = await self.screen()
            if condition("\n".join(lines)):
                return lines
            assert trio.current_time() < deadline, f"{what}:\n" + "\n".join(lines)
            await trio.sleep(0.05)

    async def text(self, text: str) -> list[str]:
        return await self.shows(lambda screen: text in screen, f"{text!r} is not to be seen")

    async def pid(self) -> int:
        """The process of ``frelay top``: the one child of the shell."""
        return only_child(int(await self.tmux("list-panes", "-F", "#{pane_pid}")))

    async def is_as_before(self, code: int) -> None:
        """The command has ended with this code, and the terminal is what it was."""
        await self.text(f"EXIT {code}")
        before, after = (self.directory / name for name in ("before", "after"))
        # The shell creates the file before it writes to it.
        await self.shows(lambda _: after.exists() and after.stat().st_size > 0, "the shell does not go on")
        assert after.read_text() == before.read_text()
        # The alternate screen is left, and the cursor is back.
        assert await self.tmux("display-message", "-p", "#{alternate_on}#{cursor_flag}") == "01\n"


def only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@asynccontextmanager
async def terminal(site: Site) -> AsyncIterator[Terminal]:
    found = Terminal(site.directory)
    try:
        yield found
    finally:
        with trio.CancelScope(shield=True):
            await trio.run_process([*found._tmux, "kill-server"], check=False, stderr=subprocess.DEVNULL)


@pytest.fixture(autouse=True, scope="module")
def _tmux() -> None:
    tool("tmux")


def top(site: Site) -> list[str]:
    return [*FRELAY, "top", "-c", str(site.config), *OPTIONS]


def routes(*names: str, listen: str = "127.0.0.1:0") -> str:
    return "".join(DEMO.replace('"demo"', f'"{name}"').replace("127.0.0.1:0", listen) for name in names)


@pytest.mark.load
async def test_no_route_at_all(site: Site) -> None:
    async with site.process("", sections=ADMIN), terminal(site) as screen:
        await screen.run(*top(site))
        await screen.shows(
            lambda text: (
                text.startswith("relay-1: running, up ")
                and "ROUTE (none)" in text
                and text.splitlines()[-1].startswith("q quit  ? help")
            ),
            "the relay without a route is not to be seen",
        )
        await screen.keys("q")
        await screen.is_as_before(0)


@pytest.mark.load
async def test_three_routes_with_who_waits_and_who_is_paired(site: Site) -> None:
    async with site.process(routes("one", "two", "three"), sections=ADMIN) as relay, terminal(site) as screen:
        a, b = [await site.party(relay, name, route="one") for name in ("func1", "func2")]
        await pair(a, b)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.hand_off)
            nursery.start_soon(b.hand_off)
        waits = await site.party(relay, "func2", route="two")
        await waits.join()
        await waits.expect("WAITING")
        stranger = await site.party(relay, None, route="three")
        await stranger.ended()
        await screen.run(*top(site), cells=80, height=24)
        await screen.text("ROUTE (3)")

        async def talk() -> None:
            await a.send_raw(TLS_HEADER)
            while True:
                await a.send_raw(bytes(5000))
                await b.receive_exactly(5000)
                await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk)
            lines = await screen.shows(
                lambda text: (
                    any(line.startswith("one ") and " kB  " in line for line in text.splitlines())
                    and all(title in text for title in ("PAIRING (1)", "WAITING (1)", "REFUSED (1)"))
                    and first_words(text).count("two") == 2
                ),
                "no rate, or not all that there is",
            )
            nursery.cancel_scope.cancel()
        assert len(lines) == 24
        assert [line.split()[:3] for line in lines if line.startswith("two ")][1] == ["two", "func2", "dns:func2.demo"]
        await screen.keys("?")
        await screen.text("shift-tab")
        await screen.keys("?", "n")
        await screen.text("by name")
        await screen.keys("C-c")
        await screen.is_as_before(0)


def first_words(screen: str) -> list[str]:
    """The first word of each line; empty for an empty line."""
    return [line.partition(" ")[0] for line in screen.splitlines()]


@pytest.mark.load
async def test_three_hundred_routes_can_be_gone_through(site: Site) -> None:
    names = [f"route-{number:03}" for number in range(300)]
    with reserved_port() as port:
        many = routes(*names, listen=f"127.0.0.1:{port}")
        async with site.process(many, sections=ADMIN), terminal(site) as screen:
            await screen.run(*top(site), cells=80, height=24)
            await screen.text("ROUTE (1-18 of 300)")
            await screen.keys("G")
            await screen.text("route-299")
            await screen.keys("g", "j")
            await screen.shows(
                lambda text: "ROUTE (2-19 of 300)" in text and first_words(text)[2:20] == names[1:19],
                "the routes 2 to 19 are not to be seen",
            )
            await screen.tmux("resize-window", "-x", "120", "-y", "40")
            lines = await screen.text("ROUTE (2-35 of 300)")
            assert len(lines) == 40
            await screen.tmux("resize-window", "-x", "30", "-y", "6")
            lines = await screen.shows(
                lambda text: text.count("\n") == 5 and "route-" in text, "it is not made smaller"
            )
            assert all(len(line) <= 30 for line in lines)
            await screen.keys("q")
            await screen.is_as_before(0)


@pytest.mark.load
async def test_a_relay_that_goes_and_comes_back(site: Site) -> None:
    async with terminal(site) as screen:
        async with site.process(DEMO, sections=ADMIN) as relay:
            await screen.run(*top(site))
            await screen.text("ROUTE (1)")
            relay.process.kill()
            await screen.shows(
                lambda text: (
                    "no answer (" in text
                    and "no relay is running here" in text.splitlines()[1]
                    and "demo" in first_words(text)
                ),
                "what was there last, and that nobody answers, is not to be seen",
            )
        async with site.process(DEMO, sections=ADMIN):
            await screen.shows(lambda text: "no answer" not in text and "ROUTE (1)" in text, "it is not found again")
            await screen.keys("q")
            await screen.is_as_before(0)


@pytest.mark.load
async def test_a_relay_that_stands_still_holds_up_no_key(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN) as relay, terminal(site) as screen:
        await screen.run(*top(site))
        await screen.text("ROUTE (1)")
        relay.signal(signal.SIGSTOP)
        try:
            await screen.keys("a")
            await screen.text("by age")
            await screen.keys("q")
            await screen.is_as_before(0)
        finally:
            relay.signal(signal.SIGCONT)


@pytest.mark.load
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_gives_the_terminal_back(site: Site, number: signal.Signals) -> None:
    async with site.process(DEMO, sections=ADMIN), terminal(site) as screen:
        await screen.run(*top(site))
        await screen.text("ROUTE (1)")
        os.kill(await screen.pid(), number)
        await screen.is_as_before(128 + number)


@pytest.mark.load
async def test_a_refused_reload_is_seen_and_no_color_is_honoured(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN) as relay, terminal(site) as screen:
        site.write(DEMO + "wait_timeot = 1\n", sections=ADMIN)
        await relay.log("reload refused, the old configuration stays")
        for env, is_red in (("NO_COLOR=1", False), ("NO_COLOR=", True)):
            await screen.run(*top(site), env=env)
            await screen.text("last reload refused: ")
            codes = "\n".join(await screen.screen("-e"))
            assert ("\x1b[31m" in codes or "\x1b[1;31m" in codes or "\x1b[1m\x1b[31m" in codes) is is_red
            await screen.keys("q")
            await screen.text("EXIT 0")
            await screen.tmux("kill-server")
            await trio.sleep(0.1)


@pytest.mark.load
async def test_a_terminal_that_nobody_knows(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN), terminal(site) as screen:
        await screen.run(*top(site), env="TERM=no-such-terminal")
        lines = await screen.text("EXIT 1")
        assert "curses does not know this terminal (TERM=no-such-terminal)" in " ".join(lines)


# --- printed ----------------------------------------------------------------------------------------------------------


async def test_without_a_terminal_it_prints_one_snapshot(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN):
        said = await ask("top", "-c", site.config, *OPTIONS)
        thrice = await ask("top", "-c", site.config, *OPTIONS, "--count", "3")
    assert (said.code, said.stderr) == (0, "")
    moment, title, *tables = said.stdout.splitlines()
    assert moment.endswith(" UTC")
    assert title.startswith("relay-1: running, up ")
    assert tables[0].split() == ["ROUTE", "(1)", "LISTEN", "WAITING", "PAIRINGS", "1>2", "/s", "2>1", "/s", "BYTES"]
    assert tables[1].split()[:1] == ["demo"]
    # The rates are known at once: it took two snapshots.
    assert "-" not in tables[1].split()
    assert thrice.stdout.count("relay-1: running") == 3


async def test_as_json_one_object_a_line(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN) as relay:
        parties = [await site.party(relay, name) for name in ("func1", "func2")]
        await pair(*parties)
        for party in parties:
            await party.hand_off()
        said = await ask("top", "-c", site.config, *OPTIONS, "--count", "2", "--json")
    assert (said.code, said.stderr) == (0, "")
    snapshots = [json.loads(line) for line in said.stdout.splitlines()]
    assert len(snapshots) == 2
    for snapshot in snapshots:
        assert set(snapshot) == {"at", "error", "status", "routes", "pairings", "rates"}
        assert snapshot["error"] is None
        assert snapshot["rates"]["routes"] == {"demo": {"func1_to_func2": 0, "func2_to_func1": 0}}
        assert list(snapshot["rates"]["pairings"]) == [snapshot["pairings"][0]["id"]]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
async def test_a_relay_that_goes_is_told_in_each_form(site: Site, options: tuple[str, ...]) -> None:
    async with site.process(DEMO, sections=ADMIN) as relay:
        process = await trio.lowlevel.open_process(
            [*top(site), "--count", "1000", *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        seen = b""
        with trio.fail_after(TIMEOUT):
            async for chunk in process.stdout:
                seen += chunk
                if relay.process.returncode is None and b"relay-1" in seen:
                    relay.process.kill()
                if b"no relay is running here" in seen and seen.endswith(b"\n"):
                    break
        process.terminate()
        await process.wait()
        await process.stdout.aclose()
    last = seen.splitlines()[-1]
    if options:
        assert set(json.loads(last)) == {"at", "error"}
    else:
        assert last.startswith(b"no answer: no relay is running here")


async def test_a_reader_that_hangs_up_ends_it_without_a_word(site: Site) -> None:
    async with site.process(DEMO, sections=ADMIN):
        command = f"{shlex.join(top(site))} --count 100 | head -1"
        done = await trio.run_process(["sh", "-c", command], capture_stdout=True, capture_stderr=True)
    assert done.stdout.endswith(b" UTC\n")
    assert done.stderr == b""


@pytest.mark.load
async def test_no_relay_at_first_is_a_failure_even_on_a_terminal(site: Site) -> None:
    site.write(DEMO, sections=ADMIN)
    async with terminal(site) as screen:
        await screen.run(*top(site))
        lines = await screen.text("EXIT 1")
        assert "frelay: no relay is running here" in " ".join(lines)
