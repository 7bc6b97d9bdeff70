"""``frelay top``: polls a running relay and shows each snapshot on the terminal.

On a terminal a thread polls the relay, and the main thread draws and reads keys. So ``q`` works at once, even if the
relay answers slowly or not at all. ``top_view`` and ``top_layout`` decide what is drawn; this module holds only what
needs a terminal. However it ends (a key, a signal, an exception), it restores the terminal.

Without a terminal (a pipe, a file, ``--count``, ``--json``) it prints snapshots and ends.
"""

from __future__ import annotations

import contextlib
import curses
import json
import locale
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

from frelay.cli.admin_client import AdminClient, CallFailed
from frelay.cli.text import ago, cut, date
from frelay.cli.top_layout import Layout, Line, Screen, Style, lay_out, plain_lines, press
from frelay.cli.top_view import Snapshot, rates, view
from frelay.errors import FrelayError, printable

__all__ = ["poll", "top"]

# Seconds: a pressed key and a new window size take effect within this time.
_KEY_TIMEOUT: Final = 0.1
# How long curses waits for the rest of a key sequence after Escape. With its default, a second, Escape seems to do
# nothing.
_ESCAPE_DELAY: Final = 25  # ms


def top(client: AdminClient, *, interval: float, count: int | None, as_json: bool) -> int:
    """Show the relay behind ``client`` each ``interval`` seconds; raises CallFailed if the first poll fails."""
    # Before the screen is cleared: a wrong address or certificate is an error at once.
    first = poll(client)
    if count is None and not as_json and sys.stdout.isatty() and sys.stdin.isatty():
        return _show(client, first, interval)
    return _print(client, first, interval, count or 1, as_json=as_json)


def poll(client: AdminClient) -> Snapshot:
    """Ask the relay for a snapshot; raises CallFailed."""
    with client:
        routes = client.get("/v1/routes")["routes"]
        pairings = client.get("/v1/pairings")["pairings"]
        at = time.monotonic()
        return Snapshot(at, client.get("/v1/status"), tuple(routes), tuple(pairings))


# --- printed ----------------------------------------------------------------------------------------------------------


def _print(client: AdminClient, before: Snapshot, interval: float, count: int, *, as_json: bool) -> int:
    code = 0
    for number in range(count):
        time.sleep(interval)
        try:
            now = poll(client)
        except CallFailed as error:
            code = 1
            text = json.dumps({"at": time.time(), "error": error.message}) if as_json else f"no answer: {error.message}"
            print(text, flush=True)
            continue
        code = 0
        if as_json:
            print(json.dumps(_as_json(now, before)), flush=True)
        else:
            if number:
                print()
            print(date(now.status["now"]))
            print("\n".join(plain_lines(view(now, before))), flush=True)
        before = now
    return code


def _as_json(now: Snapshot, before: Snapshot) -> dict[str, Any]:
    return {
        "at": now.status["now"],
        "error": None,
        "status": now.status,
        "routes": now.routes,
        "pairings": now.pairings,
        "rates": {
            kind: {key: rate._asdict() for key, rate in found.items()} for kind, found in rates(before, now).items()
        },
    }


# --- on a terminal ----------------------------------------------------------------------------------------------------


class _Ended(Exception):
    """A signal told us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _show(client: AdminClient, first: Snapshot, interval: float) -> int:
    news: queue.SimpleQueue[Snapshot | CallFailed] = queue.SimpleQueue()
    threading.Thread(target=_keep_polling, args=(client, interval, news), daemon=True).start()
    try:
        with _ended_by_signals(), _terminal() as window:
            _Loop(window, first, news).run()
    except _Ended as ended:
        return 128 + ended.number
    except KeyboardInterrupt:
        pass  # as q
    return 0


def _keep_polling(client: AdminClient, interval: float, news: queue.SimpleQueue[Snapshot | CallFailed]) -> None:
    while True:
        time.sleep(interval)
        try:
            news.put(poll(client))
        except CallFailed as error:
            news.put(error)
        except Exception as error:
            # Without this an answer that we did not foresee would end the thread, and the screen would stand still.
            news.put(CallFailed(f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise an exception instead of killing us, so that the terminal is restored."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended(number)

    old = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _terminal() -> Iterator[curses.window]:
    """Take the terminal as a window, and restore it at the end; raises FrelayError if curses does not know its TERM."""
    try:
        locale.setlocale(locale.LC_ALL, "")
    except locale.Error:
        pass  # the locale is not installed here: _draw escapes what the encoding cannot show
    for name in ("LINES", "COLUMNS"):
        # Some shells export these; ncurses would trust them and never see that the window changed.
        os.environ.pop(name, None)
    try:
        curses.setupterm()
    except curses.error:
        text = f"curses does not know this terminal (TERM={os.environ.get('TERM', '')}): use frelay top --count 1"
        raise FrelayError(printable(text)) from None
    window = curses.initscr()
    try:
        curses.noecho()
        curses.cbreak()
        curses.set_escdelay(_ESCAPE_DELAY)
        window.keypad(True)
        window.nodelay(True)
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        yield window
    finally:
        with contextlib.suppress(curses.error):
            curses.curs_set(1)
        window.keypad(False)
        curses.nocbreak()
        curses.echo()
        curses.endwin()


_KEYS: Final = {
    curses.KEY_UP: "up",
    curses.KEY_DOWN: "down",
    curses.KEY_PPAGE: "page up",
    curses.KEY_NPAGE: "page down",
    curses.KEY_HOME: "home",
    curses.KEY_END: "end",
    curses.KEY_BTAB: "shift-tab",
    ord("\t"): "tab",
}


@dataclass(slots=True)
class _Loop:
    """The main thread's loop: draw, then wait for a key or for the next snapshot."""

    window: curses.window
    now: Snapshot
    news: queue.SimpleQueue[Snapshot | CallFailed]
    before: Snapshot | None = None
    trouble: str = ""
    screen: Screen = field(default_factory=Screen)

    def run(self) -> None:
        """Run until ``q`` is pressed or the terminal is closed."""
        styles, encoding = _styles(), locale.getpreferredencoding(False)
        while not self.screen.is_done:
            layout = self._layout()
            self._draw(layout.lines, styles, encoding)
            while not (self._handle_keys(layout) or self._handle_news()):
                pass

    def _layout(self) -> Layout:
        height, cells = self.window.getmaxyx()
        alarms = []
        if self.trouble:
            alarms = [f"no answer ({self.trouble}); shown is the state of {ago(self.now.status['now'])}; trying again"]
        return lay_out(view(self.now, self.before, self.screen.sort, alarms), self.screen, cells, height)

    def _handle_keys(self, layout: Layout) -> bool:
        """Wait a moment for keys; true if the screen has to be drawn again."""
        readable, _, _ = select.select([sys.stdin], [], [], _KEY_TIMEOUT)
        is_new = False
        while (key := self.window.getch()) != -1:
            if key != curses.KEY_RESIZE:
                name = _KEYS.get(key) or (chr(key) if 32 <= key < 127 else "")
                self.screen = press(self.screen, name, layout.last)
            is_new = True
        if readable and not is_new and not os.isatty(sys.stdin.fileno()):
            raise _Ended(signal.SIGHUP)  # a closed terminal stays readable for ever
        return is_new

    def _handle_news(self) -> bool:
        is_new = False
        while not self.news.empty():
            found = self.news.get()
            if isinstance(found, CallFailed):
                self.trouble = found.message
            else:
                self.before, self.now, self.trouble = self.now, found, ""
            is_new = True
        return is_new

    def _draw(self, lines: tuple[Line, ...], styles: dict[Style, int], encoding: str) -> None:
        self.window.erase()
        _, cells = self.window.getmaxyx()
        for row, line in enumerate(lines):
            text = line.text.encode(encoding, "backslashreplace").decode(encoding)
            try:
                self.window.addstr(row, 0, cut(text, cells), styles[line.style])
            except curses.error:
                pass  # curses fails after the last cell of the last line; or the window has just shrunk
        self.window.refresh()


def _styles() -> dict[Style, int]:
    alarm = curses.A_BOLD
    if not os.environ.get("NO_COLOR") and curses.has_colors():
        with contextlib.suppress(curses.error):  # some terminals have colours, but no default ones
            curses.start_color()
            curses.use_default_colors()
            curses.init_pair(1, curses.COLOR_RED, -1)
            alarm |= curses.color_pair(1)
    return {
        Style.TITLE: curses.A_BOLD,
        Style.ALARM: alarm,
        Style.HEADING: curses.A_BOLD,
        Style.FOCUS: curses.A_BOLD | curses.A_REVERSE,
        Style.ROW: curses.A_NORMAL,
        Style.FOOTER: curses.A_DIM,
    }
