"""A real browser beside a Trio test: Debian's Chromium, driven by Playwright, on a thread of its own.

Playwright's blocking API belongs to the thread that started it, and must not run in Trio's thread. So a test passes
functions to it. A browser cannot reach the Unix socket of a relay's admin API, so a port of 127.0.0.1 is forwarded to
it, as an operator does with ``ssh -L``::

    async with forwarded(site.directory / "frelay.sock") as way, chromium.page(way.url) as view:
        await view.see(lambda page: expect(page.get_by_role("heading", name="Routes")).to_be_visible())

If a page wrote an error to its console or sent a request to another host, its test fails at the end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Literal, TypeVar

import trio
from playwright.sync_api import Browser as Chrome
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright

from support.tools import tool

__all__ = ["Browser", "Forwarded", "View", "browser", "forwarded"]

T = TypeVar("T")

# No sandbox, since CI runs as root in a container. No request that the browser makes for itself.
_OPTIONS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)
_TIMEOUT: Final = 30_000.0
# What is looked for has its own default, of 5 s, which a busy machine needs for one refresh of the page.
expect.set_options(timeout=_TIMEOUT)


class View:
    """One open page."""

    def __init__(self, owner: Browser, page: Page, url: str) -> None:
        self._owner: Final = owner
        self._page: Final = page
        self._url: Final = url
        self.console: Final[list[str]] = []
        """The errors and warnings that the page has written so far."""
        self.elsewhere: Final[list[str]] = []
        """The requests that it has sent to other hosts than the relay."""
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("request", self._judge)

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.console.append(message.text)

    def _judge(self, request: Any) -> None:
        if not request.url.startswith((self._url, "data:")):
            self.elsewhere.append(request.url)

    async def see(self, look: Callable[[Page], T]) -> T:
        """Run ``look`` with the page, on the browser's thread."""
        return await self._owner.run(lambda: look(self._page))

    async def shoot(self, name: str, *, full: bool = True) -> None:
        """Write a picture into the directory FRELAY_SCREENSHOTS, if that is set: for people who change the page."""
        directory = os.environ.get("FRELAY_SCREENSHOTS")
        if directory:
            await self.see(lambda page: page.screenshot(path=Path(directory) / f"{name}.png", full_page=full))


class Browser:
    """Chromium on its thread. Make it with :func:`browser`."""

    def __init__(self) -> None:
        self._jobs: Final[SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]] = SimpleQueue()
        self._chrome: Chrome | None = None

    def _work(self, executable: str, ready: Future[None]) -> None:
        try:
            with sync_playwright() as playwright:
                self._chrome = playwright.chromium.launch(executable_path=executable, args=list(_OPTIONS))
                ready.set_result(None)
                while (job := self._jobs.get()) is not None:
                    function, result = job
                    try:
                        result.set_result(function())
                    except BaseException as error:
                        result.set_exception(error)
                self._chrome.close()
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def run(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the browser's thread."""
        result: Future[T] = Future()
        self._jobs.put((function, result))
        return await trio.to_thread.run_sync(result.result)

    @asynccontextmanager
    async def page(
        self, url: str, *, width: int = 1280, height: int = 900, scheme: Literal["light", "dark"] = "light"
    ) -> AsyncIterator[View]:
        """A page at ``url``, in a new profile."""

        def open_page() -> View:
            assert self._chrome is not None
            context = self._chrome.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            context.set_default_timeout(_TIMEOUT)
            view = View(self, context.new_page(), url)
            view._page.goto(url)
            return view

        view = await self.run(open_page)
        try:
            yield view
            assert view.console == []
            assert view.elsewhere == []
        finally:
            with trio.CancelScope(shield=True):
                await view.see(lambda page: page.context.close())


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium, started; without it the test is skipped, or fails where ``CI`` is set."""
    executable = tool("chromium")
    found = Browser()
    ready: Future[None] = Future()
    thread = threading.Thread(target=found._work, args=(executable, ready), name="chromium")
    thread.start()
    try:
        ready.result(timeout=60)
        yield found
    finally:
        found._jobs.put(None)
        thread.join(timeout=30)


class Forwarded:
    """A port of 127.0.0.1 that leads to a Unix socket, and can be cut."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self._path: Final = path
        self._nursery: Final = nursery
        self._served = trio.CancelScope()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    async def _serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.CancelScope() as self._served:
            listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
            self.port = listeners[0].socket.getsockname()[1]
            task_status.started()
            await trio.serve_listeners(self._pass_on, listeners)

    async def _pass_on(self, client: trio.SocketStream) -> None:
        async def copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            try:
                async for data in source:
                    await sink.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # either end may close at any time
            nursery.cancel_scope.cancel(reason="one end has gone")

        try:
            server = await trio.open_unix_socket(str(self._path))
        except OSError:
            await client.aclose()
            return
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(copy, client, server)
            nursery.start_soon(copy, server, client)

    def cut(self) -> None:
        """Stop listening at the port, and close all connections."""
        self._served.cancel(reason="the test cuts the connection")

    async def mend(self) -> None:
        """Listen at the same port again."""
        await self._nursery.start(self._serve)


@asynccontextmanager
async def forwarded(path: Path) -> AsyncIterator[Forwarded]:
    """Forward a port to the Unix socket ``path``."""
    async with trio.open_nursery() as nursery:
        way = Forwarded(path, nursery)
        await way.mend()
        yield way
        nursery.cancel_scope.cancel(reason="the test is over")
